"""What `expand` runs on: engines and their options, and a worker that is made like the trainer."""

from __future__ import annotations

import json
import logging
import pickle
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_group

from neat_align import NEATConfig
from neat_align.cli import app, main
from neat_align.cli.expand import work_key, write_expansion
from neat_align.cli.expand_ray import (
    RayOptions,
    WorkerSetup,
    _cpus,
    check_ray_run,
    cluster_address,
    config_values,
    on_the_cpu,
)
from neat_align.errors import ConfigError, DataError
from neat_align.pipeline import build_trainer
from neat_align.rounds.make_round import make_round
from neat_align.rounds.params import RoundProgress
from neat_align.rounds.shard_stages import Shard, reward_shard, sample_shard
from neat_align.rounds.shards import RolledOut, Slice, read_shard
from neat_align.script_arguments import ScriptArguments
from neat_align.trainer.round_maker import round_params
from small_rounds import files_of
from small_trainer import ROWS, config
from tiny import save_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models, and prompts."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model", "llama")
    save_tiny(folder / "other", "llama", seed=1)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def script(place: Path, **changes: Any) -> ScriptArguments:
    given = {
        "model_name_or_path": str(place / "model"),
        "dataset_name": str(place / "data.jsonl"),
        "reward_funcs": ["small_trainer:count_e"],
        "holdout": 0,
    }
    return ScriptArguments(**{**given, **changes})


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--engine spark", "engine is 'spark'; it must be local or ray"),
        ("--num_workers 2", "num_workers is 2, which only --engine ray reads"),
        ("--num-reward-workers 2", "num_reward_workers is 2, which only --engine ray reads"),
        ("--gpus_per_worker 1", "gpus_per_worker is 1.0, which only --engine ray reads"),
        ("--shard_prompts 64", "shard_prompts is 64, which only --engine ray reads"),
        ("--ray_address auto", "ray_address is 'auto', which only --engine ray reads"),
        ("--engine ray", "say how many workers hold the policy, --num_workers"),
        ("--engine ray --num_workers 0", "num_workers is 0; it must be 1 or more"),
        ("--engine ray --num_workers 1 --shard-prompts 0", "shard_prompts is 0; it must be 1 or"),
        ("--engine ray --num_workers 1 --gpus-per-worker 2", "gpus_per_worker is 2; it must be 0"),
        (
            "--engine ray --num_workers 1 --gpus_per_reward_worker -1",
            "gpus_per_reward_worker is -1; it must be 0",
        ),
        (
            "--engine ray --num_workers 1 --num_reward_workers 2 --rank_by origin",
            "num_reward_workers is given and reward_funcs is empty",
        ),
        (
            "--engine ray --num_workers 1 --shard_prompts 64 --reward_funcs vader --num_negative 1 "
            "--negative_source other_prompts --rank_by origin_then_reward",
            "which prompts a negative can be from would depend on it",
        ),
    ],
)
def test_options_that_an_engine_would_ignore_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["expand", "--output", str(tmp_path / "out.jsonl"), "--bf16=false", *words.split()])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert not list(tmp_path.iterdir())


def test_without_ray_its_installation_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_BACKEND_LOG_LEVEL", "RAY_ENABLE_AUTO_CONNECT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with pytest.raises(ConfigError, match=r"pip install 'neat-align\[ray\]'"):
        write_expansion(
            script(place), config(tmp_path / "run"), tmp_path / "o.jsonl", "ranked", RayOptions(1)
        )


def test_a_cluster_that_does_not_answer_is_told_at_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_BACKEND_LOG_LEVEL", "RAY_ENABLE_AUTO_CONNECT"):
        monkeypatch.setenv(name, "0")
    with socket.socket() as nobody:  # has a port, and listens not
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        for options in (RayOptions(1, ray_address=address), RayOptions(1)):
            if options.ray_address is None:
                monkeypatch.setenv("RAY_ADDRESS", f"ray://{address}")
            with pytest.raises(ConfigError, match=r"Ray cannot be reached \(.*correct ray_address"):
                write_expansion(
                    script(place), config(tmp_path / "run"), tmp_path / "o.jsonl", "ranked", options
                )


def test_processes_of_a_launcher_are_refused(place: Path, tmp_path: Path) -> None:
    class Launched(NEATConfig):
        world_size = 2  # type: ignore[assignment]

    args = Launched(output_dir=str(tmp_path), bf16=False, disable_tqdm=True)
    with pytest.raises(ConfigError, match="2 processes were launched: start one process"):
        check_ray_run(script(place), args, RayOptions(1))


def test_a_cluster_is_used_only_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(RayOptions(1)) is None
    assert cluster_address(RayOptions(1, ray_address="10.0.0.1:6379")) == "10.0.0.1:6379"
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert [_cpus(RayOptions(n)) for n in (1, 3, 40)] == [16, 5, 1]
    assert _cpus(RayOptions(2, gpus_per_worker=1)) == 1
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster_address(RayOptions(1)) == "auto"
    assert _cpus(RayOptions(1)) == 1


# ---- a worker's tools ----------------------------------------------------------------------------


def test_a_configuration_is_made_again_from_its_values(tmp_path: Path) -> None:
    args = config(
        tmp_path,
        lr_scheduler_kwargs={"num_cycles": 2},
        lr_scheduler_type="cosine_with_restarts",
        chat_template_kwargs={"a": 1},
        accelerator_config={"split_batches": False},
        reward_weights=[2.0],
        eval_strategy="no",
    )
    values = pickle.loads(pickle.dumps(config_values(args)))
    assert NEATConfig(**values).to_dict() == args.to_dict()
    assert on_the_cpu(args).use_cpu is True
    setup = WorkerSetup(ScriptArguments(), values, ())
    assert [setup.on(gpus).config["use_cpu"] for gpus in (0, 0.5, 1)] == [True, None, None]
    secret = config_values(config(tmp_path, hub_token="hf_secret"))
    assert "hf_secret" not in str(secret)


class InWorkers:
    """Makes shards with the tools of workers, as Ray's do."""

    def __init__(self, setup: WorkerSetup, names: tuple[str, ...], params: Any) -> None:
        setup = pickle.loads(pickle.dumps(setup.on(0)))
        self.policy, self.names, self.params = setup.policy_tools(), names, params
        self.judge = setup.reward_tools() if names else None

    def __call__(self, slices: Iterable[Slice], progress: RoundProgress) -> Iterator[RolledOut]:
        for n, part in enumerate(slices):
            shard = Shard(n, "key", part, 0, self.params, self.names)
            sample_shard(shard, self.policy)
            if self.judge is not None:
                reward_shard(shard, self.judge)
            made = read_shard(part.folder, "finished", "key")
            assert made is not None
            yield made


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({}, {}),
        ({"use_peft": True}, {"bf16": True, "kl_weight": 0.1}),
        ({"reward_funcs": ["contrast"]}, {"seed": 5, "num_plain": 1}),
        ({"reward_funcs": []}, {"rank_by": "origin", "contrast_from": "branch", "num_plain": 1}),
    ],
    ids=str,
)
def test_workers_make_the_trainers_own_round(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a worker's without a GPU
    told, args = script(place, **given), config(tmp_path / "run", prompts_per_round=12, **changes)
    trainer = build_trainer(told, args)
    own = trainer.make_round(0)
    rewards = trainer.parts.scored_by.rewards
    setup = WorkerSetup(told, config_values(trainer.args), tuple(trainer.parts.data.rows[:2]))
    names = tuple(reward.name for reward in rewards)
    maker = trainer.parts.round_maker
    made = make_round(
        maker.rows,
        num_groups=maker.num_groups,
        position=0,
        round_index=0,
        params=round_params(args),
        tools=maker.start_tools(),
        folder=tmp_path / "sharded",
        slice_maker=InWorkers(setup, names, round_params(args)),
    )
    assert made == own
    assert files_of(tmp_path / "sharded") == files_of(tmp_path / "run" / "rounds" / "00000")


# ---- unfinished work -----------------------------------------------------------------------------


def test_work_of_another_model_is_not_mixed_in(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while it was scored, then asked for with another model."""

    def away(**_: Any) -> list[float]:
        raise ConnectionError("the judge is away")

    monkeypatch.setattr("small_trainer.count_e", away)
    args = config(tmp_path / "run", prompts_per_round=12)
    output = tmp_path / "out.jsonl"
    with pytest.raises(Exception, match="the judge is away"):
        write_expansion(script(place), args, output, "ranked")
    assert list((tmp_path / "run").rglob("sampled.parquet"))
    monkeypatch.undo()
    other = script(place, model_name_or_path=str(place / "other"))
    with caplog.at_level(logging.WARNING):
        write_expansion(other, config(tmp_path / "run", prompts_per_round=12), output, "ranked")
    assert "is not taken up, and made again: start weights was" in caplog.text
    clean = tmp_path / "clean.jsonl"
    write_expansion(other, config(tmp_path / "clean", prompts_per_round=12), clean, "ranked")
    assert output.read_bytes() == clean.read_bytes()


def test_how_to_learn_is_no_part_of_what_is_sampled(place: Path, tmp_path: Path) -> None:
    def key(**changes: Any) -> dict[str, Any]:
        return work_key(build_trainer(script(place), config(tmp_path / "run", **changes)))

    same = key()
    assert key(learning_rate=1.0, per_device_train_batch_size=4, logging_steps=3) == same
    assert key(generation_batch_size=3) == same
    for changes in (
        {"seed": 2},
        {"temperature": 0.5},
        {"bf16": True},
        {"generation_copy": "never"},
    ):
        assert key(**changes) != same, changes
    assert replace(script(place), holdout=1)  # rows are in the key by their content


# ---- what is kept, for who exports it later ------------------------------------------------------


def test_preference_pairs_are_what_expand_writes_by_itself() -> None:
    options = {name: p for p in get_group(app).commands["expand"].params for name in p.opts}
    assert options["--format"].default == "preference"
    assert options["--form"] is options["--format"]


def test_an_expansion_is_exported_in_another_format_without_its_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data.jsonl"
    args = config(tmp_path / "data-run", prompts_per_round=4)
    write_expansion(script(place), args, output, "preference")
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert rows
    assert all({"prompt", "chosen", "rejected"} <= set(row) for row in rows)
    assert f"neat-align export {tmp_path / 'data-run'} --format kto" in capsys.readouterr().out
    for words in (["--format", "kto", "--allow-cut"], ["--output", f"{tmp_path}/again/"]):
        with pytest.raises(SystemExit) as done:
            main(["export", str(output), *words])
        assert done.value.code == 0
    labels = [json.loads(line) for line in (tmp_path / "data-kto.jsonl").read_text().splitlines()]
    assert {row["label"] for row in labels} == {True, False}
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    for said in ("a local model", "| instruction bank | politeness |", "| rewards | count\\_e |"):
        assert said in card
    assert str(tmp_path.parent) not in card
    assert str(place) not in (tmp_path / "data-run" / "expansion.json").read_text()


def test_an_expansion_that_gives_no_row_keeps_its_groups_and_says_how_to_use_them(
    place: Path, tmp_path: Path
) -> None:
    args = config(
        tmp_path / "run",
        prompts_per_round=4,
        max_completion_length=2,
        use_human_completions=False,
    )
    with pytest.raises(DataError, match="was cut at max_completion_length") as raised:
        write_expansion(script(place), args, tmp_path / "o.jsonl", "preference")
    assert f"`neat-align export {tmp_path / 'run'} --format preference`" in str(raised.value)
    assert not (tmp_path / "o.jsonl").exists()
    words = ["--output", str(tmp_path / "o.jsonl"), "--allow-cut"]
    with pytest.raises(SystemExit) as done:
        main(["export", str(tmp_path / "run"), *words])
    assert done.value.code == 0
    assert (tmp_path / "o.jsonl").read_text()
