"""Runs whose reward is a server: paused while it is down and gone on with later; and a planted
secret that turns up nowhere.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import yaml

from neat_align import ConfigError, NEATConfig, NEATTrainer, cli
from neat_align.cli.progress import PrintPlan
from neat_align.comparison.runner import _check_key
from neat_align.files.secrets import redacted, scrubbed
from neat_align.rewards import http
from neat_align.rewards.http import TOKEN_VARIABLE
from neat_align.sampling.transformers_sampler import TransformersSampler
from neat_align.trainer.setup import TrainingData
from reward_server import Asked, Behaviour, Handler, RewardServer, by_length
from tiny import save_tiny

CANARY = "canary-4c1d0b8e77"
PASSWORD = "swordfish-4c1d0b8e77"


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(http.RetryPolicy, "pause", lambda self, failed, asked, rng: 0.0)
        yield


def options(folder: Path, url: str, **changes: Any) -> dict[str, Any]:
    """A run of two rounds on a tiny model."""
    data = folder / "data.jsonl"
    if not data.exists():
        save_tiny(folder / "model", "llama")
        rows = [
            {
                "prompt": [{"role": "user", "content": f"What is {i}?"}],
                "chosen": [{"role": "assistant", "content": f"It is {i}."}],
            }
            for i in range(26)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(data),
        "reward_funcs": [url],
        "holdout": 2,
        "num_positive": 2,
        "num_negative": 2,
        "num_plain": 1,
        "prompts_per_round": 24,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "max_prompt_length": 300,
        "max_completion_length": 6,
        "drift_prompts": 0,
        "bf16": False,
        "disable_tqdm": True,
        "output_dir": str(folder / "run"),
        **changes,
    }


def run_cli(folder: Path, command: str, settings: dict[str, Any], *words: str) -> int:
    """Exit code of `neat-align`."""
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--config", str(config), *words])
    return int(ended.value.code or 0)


class Log:
    """What was asked of the policy and of the server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sampled, self.scored = 0, Counter[str]()
        sample = TransformersSampler.sample

        def counted(sampler: Any, requests: Any, *rest: Any, **more: Any) -> Any:
            self.sampled += len(requests)
            return sample(sampler, requests, *rest, **more)

        monkeypatch.setattr(TransformersSampler, "sample", counted)
        # The plan's timed draws are no work of the run.
        monkeypatch.setattr(PrintPlan, "on_outlook", lambda *_: None)

    def down_after(self, good: int) -> Behaviour:
        """A server that answers so many requests."""

        def behaviour(handler: Handler, asked: Asked, number: int) -> None:
            if number >= good:
                return handler.answer(503, b"")
            self.scored.update(json.dumps(row) for row in asked.rows)
            return by_length(handler, asked, number)

        return behaviour


def test_a_run_pauses_while_the_server_is_down_and_pays_for_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paused, whole = Log(monkeypatch), tmp_path / "whole"
    with RewardServer(
        paused.down_after(0)
    ) as server:  # down in the first evaluation, before any round
        settings = options(tmp_path, server.url)
        assert run_cli(tmp_path, "train", settings) == cli.PAUSED == 75
        lost = paused.sampled
    assert "go on with the same command and --resume true" in capsys.readouterr().err
    # Three requests are the evaluation's (plain, positive and negative answers), the other four are
    # the first batch of the round, 60 rows.
    with RewardServer(paused.down_after(7), port=server.port):
        assert run_cli(tmp_path, "train", settings, "--resume", "true") == 75
    said = capsys.readouterr().err
    assert re.search(
        r"paused: the reward server 127\.0\.0\.1_\d+_score answered 503: given up on rows \d+ to "
        r"\d+ after 6 tries",
        said,
    )
    assert len(list((tmp_path / "run").rglob("scored-*.parquet"))) == 1
    with RewardServer(paused.down_after(1000), port=server.port):
        assert run_cli(tmp_path, "train", settings, "--resume", "true") == 0
    monkeypatch.undo()
    fresh = Log(monkeypatch)
    with RewardServer(fresh.down_after(1000), port=server.port):
        assert run_cli(tmp_path, "train", {**settings, "output_dir": str(whole)}) == 0
    assert paused.scored == fresh.scored
    assert lost == 2  # the evaluation's first answers, which nothing had kept yet
    assert paused.sampled == fresh.sampled + lost
    for name in ("evaluation-after.json", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sync, full = os.fsync, tmp_path / "full"

    def fsync(descriptor: int) -> None:
        if (
            full.exists()
            and "groups.parquet" in Path(f"/proc/self/fd/{descriptor}").readlink().name
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    settings = options(tmp_path, "contrast")
    full.touch()
    assert run_cli(tmp_path, "train", settings) == 2
    said = capsys.readouterr().err
    assert "error: the disk is full: No space left on device" in said
    assert "when there is room, go on with the same command and --resume true" in said
    assert "Traceback" not in said
    full.unlink()
    assert run_cli(tmp_path, "train", settings, "--resume", "true") == 0


# ---- secrets -------------------------------------------------------------------------------------


def leaky(completions: Any, **_: Any) -> list[float]:
    """A reward whose library puts the key into its message."""
    raise ValueError(f"401 for the key {os.environ['JUDGE_API_KEY']}")


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.suffix == ".parquet":  # compressed
            table = pq.read_table(path)
            data = repr((table.to_pylist(), table.schema.metadata)).encode()
        yield path, data


@pytest.mark.slow
def test_a_planted_secret_turns_up_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in (TOKEN_VARIABLE, "HF_TOKEN", "JUDGE_API_KEY"):
        monkeypatch.setenv(name, CANARY)

    def echoing(handler: Handler, asked: Asked, number: int) -> None:
        """Says back what it was sent, with every answer and with an error."""
        if number == 5:
            return handler.answer(400, repr(asked.headers).encode())
        rewards = [float(len(row["completion"])) for row in asked.rows]
        return handler.answer(
            503 if number == 1 else 200,
            json.dumps({"rewards": rewards, "you": asked.headers}).encode(),
        )

    with RewardServer(echoing) as server:
        settings = options(
            tmp_path,
            server.url,
            run_name=f"https://me:{PASSWORD}@tracker.example/?api_key={PASSWORD}",
            save_strategy="epoch",
        )
        assert run_cli(tmp_path, "train", settings) == 2
        assert "[redacted]" in capfd.readouterr().err
        assert run_cli(tmp_path, "train", settings, "--resume", "true") == 0
        assert server.asked[0].headers["authorization"] == f"Bearer {CANARY}"
    leaks = {
        "reward_funcs": ["test_paused_runs:leaky"],
        "output_dir": str(tmp_path / "run" / "leaky"),
        "holdout": 0,
    }
    assert run_cli(tmp_path, "train", {**settings, **leaks}) == 2
    out, err = capfd.readouterr()
    assert "raised ValueError on" in err
    assert "401 for the key [redacted]" in err
    for where, text in (("stdout", out), ("stderr", err)):
        assert CANARY not in text, where
        assert PASSWORD not in text, where
    seen = [
        path.relative_to(tmp_path / "run").as_posix()
        for path, data in contents(tmp_path / "run")
        if data
    ]
    assert {
        "run.json",
        "result.json",
        "report.html",
        "metrics.jsonl",
        "model/training_args.bin",
    } <= set(seen)
    found = [
        path.name
        for path, data in contents(tmp_path / "run")
        if CANARY.encode() in data or PASSWORD.encode() in data
    ]
    assert found == []
    assert (
        json.loads((tmp_path / "run" / "run.json").read_text())["config"]["run_name"]
        == "https://[redacted]@tracker.example/?api_key=[redacted]"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--reward_funcs", f"https://me:{PASSWORD}@judge.example/score"],
            "holds a user name or password",
        ),
        (
            ["--judge_funcs", f"https://judge.example/score?key={PASSWORD}"],
            "has a query or fragment",
        ),
        (["--hub_token", PASSWORD], "hub_token is a secret.*set HF_TOKEN"),
        ([f"--hub-token={PASSWORD}"], "hub_token is a secret.*set HF_TOKEN"),
    ],
)
def test_secrets_in_the_configuration_are_refused_and_not_shown(
    tmp_path: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(tmp_path, "train", options(tmp_path, "vader"), *words) == 2
    out, err = capfd.readouterr()
    assert re.search(message, err)
    assert PASSWORD not in out + err
    assert not [path for path, data in contents(tmp_path / "run") if PASSWORD.encode() in data]


def test_arguments_are_pickled_without_secrets_and_used_with_them(tmp_path: Path) -> None:
    args = NEATConfig(output_dir=str(tmp_path), hub_token=CANARY, use_cpu=True)
    assert args.hub_token == CANARY
    assert CANARY.encode() not in pickle.dumps(args)
    assert pickle.loads(pickle.dumps(args)).learning_rate == args.learning_rate


def test_a_comparison_keeps_no_secret_in_its_options(tmp_path: Path) -> None:
    trainer = NEATTrainer.__new__(NEATTrainer)
    trainer.parts = cast("Any", SimpleNamespace(data=TrainingData([], [], conversational=False)))
    options = {
        "run_name": f"https://me:{PASSWORD}@tracker.example",
        "wandb_api_key": PASSWORD,
        "seed": 1,
    }
    _check_key(tmp_path, options, trainer)
    assert PASSWORD not in (tmp_path / "options.json").read_text()
    _check_key(tmp_path, options, trainer)  # the same options again are the same
    with pytest.raises(ConfigError, match="seed was 1 and is 2"):
        _check_key(tmp_path, {**options, "seed": 2}, trainer)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (
            "see https://me:pw@host/a@b and ftp://x@y",
            "see https://[redacted]@host/a@b and ftp://[redacted]@y",
        ),
        ("https://h/?a=1&api_key=s3cret&b=2#x", "https://h/?a=1&api_key=[redacted]&b=2#x"),
        ("https://h/?X-Amz-Signature=abc", "https://h/?X-Amz-Signature=[redacted]"),
        ("mail me@example.com, ratio 3:1, a//b", "mail me@example.com, ratio 3:1, a//b"),
        (f"Bearer {CANARY}!", "Bearer [redacted]!"),
        (f"{CANARY}-longer", "[redacted]"),
        ("hunter2 and /run/secrets/token", "hunter2 and /run/secrets/token"),
    ],
)
def test_what_is_scrubbed_from_texts(
    text: str, clean: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{TOKEN_VARIABLE}_JUDGE_EXAMPLE", CANARY)
    monkeypatch.setenv("OTHER_SECRET", f"{CANARY}-longer")
    monkeypatch.setenv("SHORT_PASSWORD", "hunter2")
    monkeypatch.setenv("TOKEN_FILE", "/run/secrets/token")
    assert scrubbed(text) == clean
    assert redacted({"a": [text]}) == {"a": [clean]}
