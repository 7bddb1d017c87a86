"""A checkpoint counts when its marker is there and names what is there."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neat_align.config.sharding import Sharding
from neat_align.errors import ConfigError, SaveError
from neat_align.evaluation.held_out import Evaluation
from neat_align.files.atomic import checksums_of, read_json, sha256_of, write_json
from neat_align.runs.checkpoints import MARKER, checkpoint_to_resume, is_complete, mark_complete
from neat_align.runs.run_directory import required_files
from small_trainer import ROWS, StopAt, trainer


def checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "global").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights " + str(step).encode())
    (folder / "global" / "optimizer.pt").write_bytes(b"moments")
    if complete:
        mark_complete(folder)
    return folder


def test_a_marked_checkpoint_is_complete_and_names_all_its_files(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    assert is_complete(folder)
    facts = read_json(folder / MARKER)["files"]
    assert set(facts) == {"model.safetensors", "global/optimizer.pt"}
    assert facts["model.safetensors"] == {
        "size": 10,
        "crc32": [f"{zlib.crc32(b'weights 10'):08x}"],
    }


def test_marking_twice_does_not_count_the_marker(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    mark_complete(folder)
    assert is_complete(folder)
    assert MARKER not in read_json(folder / MARKER)["files"]


def test_without_a_marker_a_checkpoint_is_incomplete(tmp_path: Path) -> None:
    assert not is_complete(checkpoint(tmp_path, 10, complete=False))
    assert not is_complete(tmp_path / "checkpoint-99")


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "gone below"])
def test_a_checkpoint_that_was_changed_is_incomplete(tmp_path: Path, how: str) -> None:
    folder = checkpoint(tmp_path, 10)
    weights = folder / "model.safetensors"
    if how == "flipped":  # of the same size
        weights.write_bytes(b"W" + weights.read_bytes()[1:])
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "gone":
        weights.unlink()
    else:
        (folder / "global" / "optimizer.pt").unlink()
    assert not is_complete(folder)


def test_the_newest_complete_checkpoint_is_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100, 20):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-100"


def test_broken_newer_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 30, complete=False)
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"")
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("marker", ["", '{"files": {"model.saf', "{}", "[]"])
def test_a_damaged_marker_is_no_marker(tmp_path: Path, marker: str) -> None:
    checkpoint(tmp_path, 10)
    (checkpoint(tmp_path, 20) / MARKER).write_text(marker)
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-10"


def test_checkpoints_that_were_never_finished_are_a_start_from_the_first_step(
    tmp_path: Path,
) -> None:
    for step in (1, 2):
        checkpoint(tmp_path, step, complete=False)
    assert checkpoint_to_resume(tmp_path) is None


def test_blocks_have_checksums_of_their_own_and_sum_up_every_byte(tmp_path: Path) -> None:
    file, data = tmp_path / "weights", bytes(range(256)) * 41
    file.write_bytes(data)
    blocks = [data[i : i + 1000] for i in range(0, len(data), 1000)]
    assert checksums_of(file, block=1000) == [f"{zlib.crc32(b):08x}" for b in blocks]
    assert checksums_of(file) == [f"{zlib.crc32(data):08x}"]
    (tmp_path / "empty").write_bytes(b"")
    assert checksums_of(tmp_path / "empty") == []


@settings(max_examples=30)
@given(st.data())
def test_a_flipped_bit_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = checkpoint(tmp_path_factory.mktemp("run"), 10)
    names = ["model.safetensors", "global/optimizer.pt", MARKER]
    path = folder / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    assert not is_complete(folder)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_marker_with_sha256_of_an_earlier_version_is_still_read(
    tmp_path: Path, damaged: bool
) -> None:
    folder = checkpoint(tmp_path, 10, complete=False)
    files = [p for p in folder.rglob("*") if p.is_file()]
    facts = {
        p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256_of(p)}
        for p in files
    }
    write_json(folder / MARKER, {"files": facts, "resumable": True})
    if damaged:
        (folder / "model.safetensors").write_bytes(b"Weights 10")
    assert is_complete(folder) is not damaged


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        ({}, [3, 4, 5]),
        ({"save_total_limit": 0}, [1, 2, 3, 4, 5]),
        ({"save_total_limit": None}, [1, 2, 3, 4, 5]),
        ({"save_total_limit": 1}, [4, 5]),
    ],
)
def test_a_run_keeps_its_newest_three_checkpoints_unless_it_is_told_otherwise(
    limit: dict[str, int | None], kept: list[int], tmp_path: Path
) -> None:
    trainer(tmp_path, num_train_epochs=5, prompts_per_round=2, **limit).train()
    assert sorted(int(p.name[11:]) for p in tmp_path.glob("checkpoint-*")) == kept


def test_the_best_checkpoint_is_kept_beside_the_newest_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = iter([0.0, 9.0, 3.0, 2.0, 1.0, 0.0])
    real = Evaluation.summary
    monkeypatch.setattr(Evaluation, "summary", lambda e: real(e) | {"reward": next(rewards)})
    t = trainer(
        tmp_path,
        num_train_epochs=6,
        prompts_per_round=2,
        eval_dataset=ROWS[:1],
        evaluate_contrast=False,
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="reward",
    )
    t.train()
    assert sorted(int(p.name[11:]) for p in tmp_path.glob("checkpoint-*")) == [2, 4, 5, 6]
    assert t.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_the_number_of_processes_does_not_change_within_a_round(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "prompts_per_round": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(3)], **settings).train()
    key = read_json(tmp_path / "run-key.json")
    key["processes"], key["options"]["per_device_train_batch_size"] = 2, 1
    write_json(tmp_path / "run-key.json", key)
    with pytest.raises(ConfigError) as error:
        trainer(tmp_path, **settings).train(resume_from_checkpoint=True)
    assert "checkpoint-2 is in the middle of a round of 4 steps" in str(error.value)
    trainer(tmp_path, **settings, allow_changes=True).train(resume_from_checkpoint=True)
    assert read_json(tmp_path / "run.json")["changes"][0]["from_step"] == 2


# ---- weights that processes divide ---------------------------------------------------------------

WRITTEN: dict[Sharding, tuple[str, ...]] = {
    "none": ("optimizer.pt", "scheduler.pt"),
    "fsdp2": ("pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt"),
    "zero0": ("latest", "scheduler.pt", "global_step2/mp_rank_00_model_states.pt"),
    "zero2": (
        "latest",
        "scheduler.pt",
        "global_step2/mp_rank_00_model_states.pt",
        "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ),
    "zero3": (
        "latest",
        "scheduler.pt",
        *(
            f"global_step2/zero_pp_rank_{rank}_mp_rank_00_{part}_states.pt"
            for rank in (0, 1)
            for part in ("model", "optim")
        ),
    ),
}


@pytest.mark.parametrize("sharding", list(WRITTEN))
def test_a_checkpoint_is_complete_with_the_files_of_every_process_and_not_without(
    tmp_path: Path, sharding: Sharding
) -> None:
    """Names as accelerate 1.15 and DeepSpeed 0.19 write them on two processes."""
    args: Any = SimpleNamespace(save_only_model=False, world_size=2)
    names = (*WRITTEN[sharding], "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    required = required_files(args, sharding)
    mark_complete(tmp_path, required=required)
    assert is_complete(tmp_path)
    for name in names:
        if sharding == "zero0" and name == "scheduler.pt":
            continue  # written where the schedule is not DeepSpeed's own
        text = (tmp_path / name).read_text()
        (tmp_path / name).unlink()
        with pytest.raises(SaveError, match="was saved without"):
            mark_complete(tmp_path, required=required)
        (tmp_path / name).write_text(text)
