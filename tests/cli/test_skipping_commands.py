"""Every command that reads rows leaves bad ones out when it is told to, and says so."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from neat_align.cli.app import main
from neat_align.cli.compare import show_comparison
from neat_align.cli.probe_options import ProbeSettings
from neat_align.cli.probe_run import run_probe
from neat_align.comparison.spec import parse_spec
from neat_align.errors import ConfigError, DataError
from tiny import save_tiny


def letters(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    """A reward that differs on random text."""
    return [
        float(len(str(completion))) + 0.1 * str(completion).count("e") for completion in completions
    ]


def asked(text: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], **fields}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and twelve good rows among three bad ones."""
    folder = tmp_path_factory.mktemp("skipping")
    save_tiny(folder / "model", "llama")
    rows = [asked(f"What is {i}?") for i in range(12)]
    rows[3:3] = [asked(" "), asked("x" * 700), {"prompt": "text"}]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(place: Path, out: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(place / "model"),
        "dataset_name": str(place / "data.jsonl"),
        "reward_funcs": [f"{__name__}:letters"],
        "output_dir": str(out),
        "holdout": 3,
        "prompts_per_round": 4,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "max_prompt_length": 200,
        "max_completion_length": 6,
        "evaluate_contrast": False,
        "drift_prompts": 0,
        "kl_weight": 0.0,
        "bf16": False,
        "disable_tqdm": True,
        "on_bad_row": "skip",
    }


def recipe(place: Path, out: Path, **changes: Any) -> str:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**options(place, out), **changes}))
    return str(path)


def places(path: Path) -> list[int]:
    """The lines of the data file that are listed as left out."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(int(line["where"].rpartition(":")[2]) for line in lines)


def test_train(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["train", "--config", recipe(place, tmp_path / "run"), "--data-passes", "1"])
    assert not done.value.code
    assert places(tmp_path / "run" / "skipped-rows.jsonl") == [4, 5, 6]
    out = capsys.readouterr().out
    assert out.startswith("plan: 3 rounds of 4 prompts, 6 optimizer steps\n")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "12, 133.3 % of 9 rows" in page
    assert "3 (skipped-rows.jsonl)" in page


def test_evaluate(place: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as done:
        main(["evaluate", "--config", recipe(place, tmp_path / "run")])
    assert not done.value.code
    assert places(tmp_path / "run" / "skipped-rows.jsonl") == [4, 5, 6]
    assert len(json.loads((tmp_path / "run" / "evaluation.json").read_text())["prompts"]) == 3


def test_expand(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = ["expand", "--format", "ranked", "--output", str(output)]
    with pytest.raises(SystemExit) as done:
        main([*words, "--config", recipe(place, tmp_path / "run")])
    assert not done.value.code
    assert places(next(tmp_path.rglob("skipped-rows.jsonl"))) == [4, 5, 6]


@pytest.mark.slow
def test_compare_says_the_plan_of_its_runs_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {k: v for k, v in options(place, tmp_path).items() if k != "output_dir"}
    settings |= {"data_passes": 0.5, "num_train_epochs": 3}
    raw = {
        "name": "tiny",
        "settings": settings,
        "seeds": [0],
        "methods": {"dpo": None, "sft-best": None},
    }
    console = Console(file=io.StringIO(), width=80)
    show_comparison(parse_spec(raw, "tiny.yaml"), tmp_path / "out", console)
    assert capsys.readouterr().out.count("plan: 2 rounds of 4 prompts") == 1
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (result["budget"]["rounds"], result["budget"]["held_out_prompts"]) == (2, 3)
    for path in (tmp_path / "out").rglob("skipped-rows.jsonl"):
        assert places(path) == [4, 5, 6]
    differing = {**raw, "methods": {"dpo": {"on_bad_row": "error"}, "sft-best": None}}
    with pytest.raises(ConfigError, match="on_bad_row, which must be equal for all"):
        parse_spec(differing, "tiny.yaml")


def test_probe(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "bank": "politeness",
        "model": str(place / "model"),
        "dataset_name": str(place / "data.jsonl"),
        "reward": f"{__name__}:letters",
        "prompts": 12,
        "samples": 1,
        "max_completion_length": 6,
    }
    with pytest.raises(DataError, match="on_bad_row: skip"):
        run_probe(ProbeSettings(**settings), None, Console(), disable_progress=True)
    console = Console(file=io.StringIO(), width=80)
    skipping = ProbeSettings(**settings, on_bad_row="skip")
    probe = run_probe(skipping, tmp_path / "n.json", console, disable_progress=True)
    assert len(probe.prompt_ids) == 12
    assert places(tmp_path / "n-skipped-rows.jsonl") == [4, 5, 6]
    assert json.loads((tmp_path / "n.json").read_text())["skipped_rows"] == 3
    run_probe(skipping, None, console, disable_progress=True)
    assert isinstance(console.file, io.StringIO)
    assert "left out: " in console.file.getvalue()
