"""Benchmark tasks before and after: against probabilities computed by hand, and through the command
line.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from neat_align.cli.app import main
from neat_align.cli.capability import capability_table
from neat_align.errors import ConfigError
from neat_align.evaluation.benchmark_tasks import (
    CapabilityParams,
    capability,
    capability_change,
    model_path,
)
from tiny import save_tiny

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install -e '.[capability]'",
)
# Choices of equal length, or a random model always takes the shorter.
QUESTIONS = [(f"What is {i}?", [chr(97 + i), chr(65 + i)], i * i % 3 % 2) for i in range(24)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one multiple-choice task, whose documents are a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        json.dumps({"question": q, "choices": choices, "gold": gold})
        for q, choices, gold in QUESTIONS
    ]
    (folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
    task = f"""
task: tiny_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    (folder / "tiny_questions.yaml").write_text(task)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model", "llama", seed=1)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An adapter on the base that is large enough to change answers."""
    folder = tmp_path_factory.mktemp("adapter") / "model"
    torch.manual_seed(4)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def accuracy_by_hand(
    model: torch.nn.Module, tokenizer: object, questions: list[tuple[str, list[str], int]]
) -> float:
    """Share of questions whose right choice is the likelier text, one forward pass a choice."""
    right = 0
    for question, choices, gold in questions:
        sums = []
        for choice in choices:
            context = tokenizer(question)["input_ids"]  # type: ignore[operator]
            ids = tokenizer(f"{question} {choice}")["input_ids"]  # type: ignore[operator]
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logps[t - 1, ids[t]]) for t in range(len(context), len(ids))))
        right += sums.index(max(sums)) == gold
    return right / len(questions)


@needs_harness
def test_accuracy_is_that_of_a_forward_pass_by_hand(tasks: Path, base: Path) -> None:
    found = capability(str(base), ["tiny_questions"], include_path=tasks)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    expected = accuracy_by_hand(model, AutoTokenizer.from_pretrained(base), QUESTIONS)
    assert 0 < expected < 1, "the test needs a model that is right sometimes"
    p, n = expected, len(QUESTIONS)
    assert found == {
        "tiny_questions": {
            "acc": pytest.approx(p),
            "acc_stderr": pytest.approx(math.sqrt(p * (1 - p) / (n - 1))),
        }
    }


@needs_harness
def test_an_adapter_is_measured_merged_into_its_base(
    tasks: Path, base: Path, adapter: Path
) -> None:
    params = CapabilityParams(("tiny_questions",), limit=10, include_path=tasks)
    result = capability_change(str(adapter), str(base), params)
    model = get_merged(base, adapter)
    expected = accuracy_by_hand(model, AutoTokenizer.from_pretrained(base), QUESTIONS[:10])
    before, after, change = (result[k]["tiny_questions"] for k in ("before", "after", "change"))
    assert after["acc"] == pytest.approx(expected)
    assert after["acc"] != before["acc"], "the test needs an adapter that changes answers"
    assert change["acc"] == pytest.approx(after["acc"] - before["acc"])
    assert change["acc_stderr"] == pytest.approx(
        math.hypot(before["acc_stderr"], after["acc_stderr"])
    )


def get_merged(base: Path, adapter: Path) -> torch.nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(adapter)
    ).eval()


@needs_harness
def test_the_command_prints_a_table_and_writes_json_into_the_run(
    tmp_path: Path, tasks: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "model").symlink_to(adapter)
    arguments = [
        "--model",
        str(run),
        "--base",
        str(base),
        "--tasks",
        "tiny_questions",
        "--limit",
        "1",
        "--include_path",
        str(tasks),
    ]
    with pytest.raises(SystemExit) as stopped:
        main(["capability", *arguments])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "tiny_questions" in shown
    assert "the first 1 documents" in shown
    result = json.loads((run / "capability.json").read_text())
    assert result["before"]["tiny_questions"].keys() == {"acc"}, (
        "one document has no standard error"
    )
    assert result["versions"]["lm-eval"].startswith("0.4.")


@needs_harness
def test_what_the_harness_cannot_do_is_said(tmp_path: Path, tasks: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match=r"knows no task 'tiny_question'.*--include_path"):
        capability(str(base), ["tiny_questions", "tiny_question"], include_path=tasks)
    broken = (
        (tasks / "tiny_questions.yaml")
        .read_text()
        .replace("questions.jsonl", "absent.jsonl")
        .replace("tiny_", "broken_")
    )
    (tmp_path / "broken_questions.yaml").write_text(broken)
    with pytest.raises(ConfigError, match="data of broken_questions cannot be read"):
        capability(str(base), ["broken_questions"], include_path=tmp_path)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'neat-align\[capability\]'"):
        capability("anything", ["hellaswag"])


def test_parameters_that_measure_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tasks is empty"):
        CapabilityParams(())
    with pytest.raises(ConfigError, match="limit is 0; it must be 1 or more"):
        CapabilityParams(("hellaswag",), limit=0)
    with pytest.raises(ConfigError, match="is not a folder"):
        CapabilityParams(("hellaswag",), include_path=tmp_path / "absent")


def test_a_run_stands_for_its_trained_model(tmp_path: Path) -> None:
    assert model_path("some/name") == "some/name"
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="a run without a trained model"):
        model_path(str(tmp_path))
    (tmp_path / "model").mkdir()
    assert model_path(str(tmp_path)) == str(tmp_path / "model")


def test_the_table_shows_a_missing_standard_error_as_none() -> None:
    from rich.console import Console

    sides = {
        "before": {"t": {"acc": 0.5, "acc_stderr": 0.1}},
        "after": {"t": {"acc": 0.25}},
        "change": {"t": {"acc": -0.25}},
    }
    console = Console(width=100, record=True)
    console.print(capability_table({"limit": None, **sides}))
    text = console.export_text()
    assert "0.500 ± 0.100" in text
    assert "0.250 ±" not in text
    assert "-0.250" in text
