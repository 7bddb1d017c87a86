"""examples/reward_model.py: a reward model from TRL's RewardTrainer is one that a run can use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neat_align.pipeline import run_training
from neat_align.script_arguments import ScriptArguments
from small_trainer import config
from tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"What do you say to number {i}?",
            "chosen": f"thank you {i}, I am glad",
            "rejected": f"I hate number {i}",
        }
        for i in range(count)
    ]


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "reward_model.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.slow
def test_a_reward_model_is_trained_and_aligned_by(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs(64)))
    done = script(
        *("--model", str(tmp_path / "model"), "--dataset", str(data)),
        *("--output", str(tmp_path / "reward"), "--holdout", "16"),
        *("--epochs", "4", "--learning_rate", "1e-3"),
    )
    assert done.returncode == 0, done.stderr
    assert "48 pairs to learn from, 16 held out" in done.stdout
    found = re.search(r"it orders (\d+) of 16 held-out pairs as people did", done.stdout)
    assert found is not None
    assert int(found[1]) >= 15
    assert f"--reward_funcs {tmp_path}/reward" in done.stdout
    run = ScriptArguments(
        model_name_or_path=str(tmp_path / "model"),
        dataset_name=str(data),
        as_conversations=True,
        holdout=4,
        reward_funcs=[str(tmp_path / "reward")],
    )
    result = run_training(run, config(tmp_path / "run"))
    assert result["rounds"] == 1
    (manifest,) = (tmp_path / "run" / "rounds").glob("*/manifest.json")
    groups = json.loads(manifest.read_text())
    assert groups["reward_names"] == ["reward"]
    # The data's own answers are told apart by what was learnt.
    assert groups["metrics"]["reward/chosen"] > groups["metrics"]["reward/rejected"] + 0.5
    data.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(4)))
    done = script(
        *("--model", str(tmp_path / "model"), "--dataset", str(data)),
        *("--output", str(tmp_path / "other")),
    )
    assert done.returncode == 1
    assert "0 of 4 rows have chosen and rejected: a reward model is trained on pairs" in done.stderr
