"""A run that is interrupted anywhere, damaged, or short of memory ends as the one that was left
alone; or says why not.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from crashes import Crash, crash_at_rename
from neat_align import CollapseError, ConfigError, NEATTrainer
from neat_align.errors import RunInterrupted, SaveError
from neat_align.modeling.logprobs import logprobs_of
from neat_align.runs.checkpoints import MARKER, is_complete, mark_complete
from neat_align.runs.lock import one_writer
from neat_align.sampling.transformers_sampler import TransformersSampler
from small_trainer import TOKENIZER, count_e, logged, trainer, weights
from tiny import tiny_model

# Two rounds of two steps. Log lines fall between saves, batches and accumulation steps are several.
SMALL: dict[str, Any] = {
    "num_train_epochs": 2,
    "prompts_per_round": 4,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 6,
    "drift_prompts": 2,
    "generation_batch_size": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 3,
    "learning_rate": 1e-3,
}
TIMES = ("runtime", "per_second")


def small(folder: Path, **changes: Any) -> NEATTrainer:
    return trainer(folder, **{**SMALL, **changes})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in logged(folder)]


def rounds(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.glob("rounds/0*/*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    t = small(folder)
    t.train()
    assert t.state.global_step == 4
    return folder, weights(t)


def assert_as(whole: tuple[Path, dict[str, torch.Tensor]], t: NEATTrainer) -> None:
    folder, expected = whole
    assert t.state.global_step == 4
    for name, value in weights(t).items():
        assert torch.equal(value, expected[name]), name
    assert rounds(t.output_dir) == rounds(folder)
    assert lines(t.output_dir) == lines(folder)


# ---- killed, and resumed -------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("point", [2, 8, 15, 22, 28])
def test_a_crash_beside_any_rename_loses_nothing(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, point: int, before: bool
) -> None:
    """Everything durable is renamed into place: crash just before or after the n-th rename, go on,
    and compare.
    """
    with monkeypatch.context() as patch:
        crash_at_rename(patch, point, before=before)
        with pytest.raises(Crash):
            small(tmp_path).train()
    t = small(tmp_path)
    t.train(resume_from_checkpoint=True)
    assert_as(whole, t)


def test_finished_batches_are_neither_sampled_nor_scored_again(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[int] = []
    scored: list[str] = []
    sample = TransformersSampler.sample

    def counting(self: Any, requests: Any, params: Any, **kwargs: Any) -> Any:
        drawn = sample(self, requests, params, **kwargs)
        sampled.extend(r.seed for r in requests)
        if len(sampled) == 12:  # the second batch was drawn, but never written
            raise Crash
        return drawn

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        if len(scored) == 6:
            scored.append("failed")
            raise ConnectionError("away")
        scored.extend(c[0]["content"] for c in completions)
        return count_e(prompts, completions, completion_ids)

    reward.__name__ = "count_e"
    monkeypatch.setattr(TransformersSampler, "sample", counting)
    with pytest.raises(Crash):
        small(tmp_path, reward=reward, drift_prompts=0).train()
    with pytest.raises(ValueError, match="away"):
        small(tmp_path, reward=reward, drift_prompts=0).train(resume_from_checkpoint=True)
    assert len(sampled) == 16 + 6  # four prompts, four answers each; the lost batch twice
    assert len(set(sampled)) == 16
    small(tmp_path, reward=reward, drift_prompts=0, num_train_epochs=2).train(
        resume_from_checkpoint=True
    )
    first_round = [s for s in scored if s != "failed"]
    assert len(sampled) == 16 + 6 + 16
    assert len(first_round) == sum(
        len(g["completion_ids"]) for i in range(2) for g in _rows(tmp_path, i)
    )


@pytest.mark.parametrize("kind", ["killed", "stopped"])
def test_a_call_that_hands_over_is_gone_on_with(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As on a GPU: a round's completions are asked for at once, and stored as they end."""
    sample, handed, die = TransformersSampler.sample, list[int](), True

    def listened(self: Any, requests: Any, params: Any, finished: Any = None, **more: Any) -> Any:
        def told(places: Sequence[int], samples: Any) -> None:
            handed.extend(requests[i].seed for i in places)
            if die and len(handed) > 8 and kind == "killed":
                raise Crash
            if die and len(handed) > 8:
                os.kill(os.getpid(), signal.SIGTERM)
            finished(places, samples)

        return sample(self, requests, params, finished=finished and told, **more)

    monkeypatch.setattr(TransformersSampler, "sample", listened)
    monkeypatch.setattr(TransformersSampler, "hands_over", True)
    with pytest.raises(Crash if kind == "killed" else RunInterrupted):
        small(tmp_path).train()
    before, die = len(handed), False
    again = small(tmp_path)
    again.train(resume_from_checkpoint=True)
    # What was handed over and not stored is drawn again, and nothing else.
    lost = len(handed) - 32
    assert lost == (before - 6 if kind == "killed" else 0)
    assert before > 8
    assert_as(whole, again)  # a model so small is not rounded otherwise beside others


def _rows(folder: Path, index: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(
        folder / "rounds" / f"{index:05d}" / "groups.parquet"
    ).to_pylist()
    return rows


# ---- signals -------------------------------------------------------------------------------------


class Signal(TrainerCallback):
    """Sends SIGTERM to this process at an event of the second step, or at the n-th of another
    event.
    """

    def __init__(self, event: str, nth: int = 1) -> None:
        self.event, self.left = event, nth

    def _at(self, event: str) -> None:
        if event == self.event:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at("substep")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at("save")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._at("drift" if "drift/kl" in logs else "log")


@pytest.mark.parametrize(
    ("event", "nth", "step"),
    [
        ("substep", 1, 1),
        ("substep", 2, 2),
        ("save", 3, 3),
        ("drift", 1, 0),
        ("drift", 2, 2),
        ("sample", 2, 0),
        ("sample", 4, 2),
        ("score", 1, 0),
    ],
)
def test_sigterm_in_any_stage_ends_with_a_complete_checkpoint(
    tmp_path: Path,
    whole: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    event: str,
    nth: int,
    step: int,
) -> None:
    sample, calls = TransformersSampler.sample, 0

    def signalling(self: Any, requests: Any, params: Any, **kwargs: Any) -> Any:
        nonlocal calls
        drawn = sample(self, requests, params, **kwargs)
        calls += len(requests) > 2  # not the two answers that measure drift
        if event == "sample" and calls == nth and len(requests) > 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        if event == "score":
            os.kill(os.getpid(), signal.SIGTERM)
        return count_e(prompts, completions, completion_ids)

    reward.__name__ = "count_e"
    monkeypatch.setattr(TransformersSampler, "sample", signalling)
    handler = signal.getsignal(signal.SIGTERM)
    # Saved at the end of a round only: what a signal in the middle leaves is its own.
    t = small(
        tmp_path,
        callbacks=[Signal(event, nth)],
        reward=reward,
        save_strategy="epoch" if event != "save" else "steps",
    )
    with pytest.raises(RunInterrupted) as stopped:
        t.train()
    assert stopped.value.code == 143
    assert "--resume true" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == handler
    assert t.state.global_step == step
    assert [p.name for p in sorted(tmp_path.glob("checkpoint-*")) if is_complete(p)][-1:] == (
        [f"checkpoint-{step}"] if step else []
    )
    monkeypatch.setattr(TransformersSampler, "sample", sample)
    again = small(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert_as(whole, again)


# ---- damaged on the disk -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after its third step."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(RunInterrupted):
        small(folder, callbacks=[Signal("save", 3)]).train()
    return folder


@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_the_same(
    tmp_path: Path, whole: Any, half: Path, name: str, how: str
) -> None:
    run = shutil.copytree(half, tmp_path / "run")
    path = run / "checkpoint-3" / name
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    t = small(run)
    t.train(resume_from_checkpoint=True)
    assert (run / "checkpoint-3.incomplete").is_dir()
    assert_as(whole, t)


def test_a_checkpoint_that_is_named_must_be_complete(tmp_path: Path, half: Path) -> None:
    run = shutil.copytree(half, tmp_path / "run")
    (run / "checkpoint-3" / MARKER).unlink()
    with pytest.raises(
        ConfigError, match=r"checkpoint-3 cannot be resumed from: it has no COMPLETE.json"
    ):
        small(run).train(resume_from_checkpoint=str(run / "checkpoint-3"))


def test_a_damaged_round_is_made_again_by_the_policy_that_sampled_it(
    tmp_path: Path, whole: Any, half: Path
) -> None:
    run = shutil.copytree(half, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-3")
    with (run / "rounds" / "00001" / "groups.parquet").open("ab") as file:
        file.write(b"x")
    t = small(run)
    t.train(resume_from_checkpoint=True)
    assert (run / "rounds" / "00001.incomplete").is_dir()
    shutil.rmtree(run / "rounds" / "00001.incomplete")
    assert_as(whole, t)


@pytest.mark.parametrize("where", ["optimizer", "marker"])
def test_a_full_disk_while_saving_leaves_the_older_checkpoint(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    target = "neat_align.runs.run_directory.mark_complete" if where == "marker" else "torch.save"
    real: Callable[..., Any] = mark_complete if where == "marker" else torch.save
    saves = 0

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        saves += where == "marker" or str(args[1]).endswith("optimizer.pt")
        if saves == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(target, full)
    with pytest.raises(
        SaveError,
        match=r"checkpoint-2 could not be written .*No space left.*older checkpoints are untouched",
    ):
        small(tmp_path).train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.setattr(target, real)
    t = small(tmp_path)
    t.train(resume_from_checkpoint=True)
    assert_as(whole, t)


def test_old_checkpoints_go_only_after_the_new_one_is_complete_and_two_stay(tmp_path: Path) -> None:
    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert is_complete(tmp_path / f"checkpoint-{state.global_step}")

    t = small(tmp_path, save_total_limit=1, callbacks=[Look()])
    t.train()
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    assert t.args.save_total_limit == 1


# ---- the same run, by one writer -----------------------------------------------------------------


def test_other_settings_are_refused_and_allowed_on_request(tmp_path: Path, half: Path) -> None:
    run = shutil.copytree(half, tmp_path / "run")
    with pytest.raises(
        ConfigError,
        match=r"other settings:\n  beta was None and is 3.0\n  learning_rate was 0.001 and is "
        r"0.002\n",
    ):
        small(run, learning_rate=2e-3, beta=3.0).train(resume_from_checkpoint=True)
    other = tiny_model("llama", len(TOKENIZER), seed=5, tokenizer=TOKENIZER)
    with pytest.raises(ConfigError, match="start weights was"):
        small(run, model=other).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="training data was"):
        small(
            run, rows=[{"prompt": [{"role": "user", "content": f"Other {i}?"}]} for i in range(5)]
        ).train(resume_from_checkpoint=True)
    t = small(run, learning_rate=2e-3, allow_changes=True)
    t.train(resume_from_checkpoint=True)
    assert json.loads((run / "run.json").read_text())["changes"] == [
        {"from_step": 3, "changed": ["learning_rate was 0.001 and is 0.002"]}
    ]
    small(run, learning_rate=2e-3).train(
        resume_from_checkpoint=True
    )  # they are the run's settings now


def test_options_that_change_no_number_may_change(tmp_path: Path, whole: Any, half: Path) -> None:
    run = shutil.copytree(half, tmp_path / "run")
    t = small(
        run,
        save_steps=2,
        disable_tqdm=False,
        generation_batch_size=16,
        max_tokens_per_micro_batch=5000,
    )
    t.train(resume_from_checkpoint=True)
    assert_as(whole, t)


def test_two_trainers_do_not_write_into_one_run(tmp_path: Path) -> None:
    with (
        one_writer(tmp_path),
        pytest.raises(ConfigError, match=rf"being written by process {os.getpid()}"),
    ):
        small(tmp_path).train()


def test_why_a_run_stopped_survives_a_resume(tmp_path: Path) -> None:
    t = small(tmp_path, max_kl=1e-9)
    t.train()
    assert t.state.global_step == 2
    again = small(tmp_path, max_kl=1e-9)
    again.train(resume_from_checkpoint=True)
    assert again.stopped_because == t.stopped_because is not None
    assert again.state.global_step == 2
    assert not (tmp_path / "rounds" / "00001").exists()
    assert lines(tmp_path)[-1]["train_loss"] > 0
    assert sum("train_loss" in line for line in lines(tmp_path)) == 1
    wider = small(tmp_path, max_kl=100.0, allow_changes=True)
    wider.train(resume_from_checkpoint=True)
    assert wider.state.global_step == 4


# ---- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "log-probability", "gradient"])
def test_what_is_not_finite_names_its_prompts_and_changes_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    t = small(tmp_path, drift_prompts=0)
    compute, before = t.compute_loss, dict[str, torch.Tensor]()
    trained: list[str] = []

    def poisoned(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        b = inputs["micro_batch"]
        if t.state.global_step != 2:
            return compute(model, inputs, *args, **kwargs)
        before.update(weights(t))
        trained.extend(b.groups.names)
        if what == "gradient":
            loss = compute(model, inputs, *args, **kwargs)
            next(t.policy.parameters()).register_hook(lambda g: g * float("inf"))
            return loss
        if what == "loss":
            monkeypatch.setattr(
                "neat_align.learning.step_engine.total_loss",
                lambda terms, **_: terms.ranking * float("nan"),
            )
        else:
            infinite = float("inf")
            monkeypatch.setattr(
                "neat_align.learning.step_engine.logprobs_of",
                lambda m, rows, inputs: logprobs_of(m, rows, inputs) - infinite,
            )
        return compute(model, inputs, *args, **kwargs)

    monkeypatch.setattr(t, "compute_loss", poisoned)
    named = {
        "loss": "the loss is nan at step 3; prompts",
        "log-probability": "log-probabilities of",
        "gradient": "the gradient of",
    }
    with pytest.raises(CollapseError, match=named[what]) as error:
        t.train()
    assert t.state.global_step == 2
    assert trained[0] in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in weights(t).items())
    assert is_complete(tmp_path / "checkpoint-2")


def test_a_policy_that_is_not_finite_writes_no_round(tmp_path: Path) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    model.get_output_embeddings().weight.data[5, 0] = float("nan")
    with pytest.raises(CollapseError, match=r"not finite while it samples.*; prompts "):
        small(tmp_path, model=model, drift_prompts=0, prefix_sharing="off").train()
    assert not list(tmp_path.rglob("samples-*.parquet"))


# ---- out of memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_in_training_cuts_the_step_and_keeps_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """A limit on tokens that only smaller micro-batches keep, met in the forward pass, or in the
    second half of a backward pass, when some gradients are there already: same step as with room
    for all.
    """
    changes = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "drift_prompts": 0,
        "logging_steps": 1,
    }
    roomy = small(tmp_path / "roomy", **changes)
    roomy.train()
    t = small(tmp_path / "tight", **changes)
    compute, raised = t.compute_loss, 0
    limit = max(t.parts.engine._tokens_in(g) for g in roomy.rounds.groups) + 1

    def tight(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal raised
        over = (
            inputs["micro_batch"].rows.input_ids.numel() > limit
            and len(t.parts.engine._groups) == 2
        )  # after an accumulation step that was fine
        if over and where == "forward":
            raised += 1
            raise torch.OutOfMemoryError("injected")
        loss = compute(model, inputs, *args, **kwargs)

        def fail(gradient: torch.Tensor) -> None:
            nonlocal raised
            raised += 1
            raise torch.OutOfMemoryError("injected")

        if over:
            handle = next(t.policy.parameters()).register_hook(fail)
            t.add_callback(_Removes(handle))
            monkeypatch.setattr(
                t.parts.engine,
                "_halve_micro_batches",
                lambda halve=t.parts.engine._halve_micro_batches: (handle.remove(), halve()),
            )
        return loss

    monkeypatch.setattr(t, "compute_loss", tight)
    with caplog.at_level(logging.WARNING):
        t.train()
    assert raised >= 1
    assert sum("memory ran out in training" in r.getMessage() for r in caplog.records) == 1
    assert t.parts.engine.micro_batch_tokens < t.args.max_tokens_per_micro_batch
    for name, value in weights(roomy).items():
        torch.testing.assert_close(weights(t)[name], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(lines(tmp_path / "roomy"), lines(tmp_path / "tight"), strict=True):
        for name in ("loss", "loss/lm", "loss/ranking", "ranking/accuracy"):
            assert (name in a) == (name in b)
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4, abs=1e-6)


class _Removes(TrainerCallback):
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle.remove()


def test_a_group_that_does_not_fit_alone_says_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = small(tmp_path, drift_prompts=0)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(t, "compute_loss", never)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"one group at a time .*gradient_checkpointing"
    ):
        t.train()


def test_out_of_memory_while_sampling_halves_the_batch_once_and_for_all(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw, sizes = TransformersSampler.draw, list[int]()

    def tight(self: Any, requests: Any, params: Any, places: int, *rest: Any) -> Any:
        sizes.append(places)
        if places > 3:
            raise torch.OutOfMemoryError("injected")
        return draw(self, requests, params, places, *rest)

    monkeypatch.setattr(TransformersSampler, "draw", tight)
    with caplog.at_level(logging.WARNING):
        small(tmp_path).train()
    assert sum(n > 3 for n in sizes) == 1
    assert sum("while 6 completions were sampled" in r.getMessage() for r in caplog.records) == 1
    for index in range(1):
        assert [r["completion_ids"] for r in _rows(tmp_path, index)] == [
            r["completion_ids"] for r in _rows(whole[0], index)
        ]
