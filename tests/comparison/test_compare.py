"""`neat-align compare` on a tiny model: shared first rounds, interruptions, what is added
later, what is refused.
"""

from __future__ import annotations

import io
import json
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback
from typer.testing import CliRunner

from neat_align import ConfigError, RewardError
from neat_align.cli.app import app
from neat_align.cli.compare import show_comparison
from neat_align.cli.options import options_from
from neat_align.cli.progress import PrintGroups, terminal_callbacks
from neat_align.comparison.runner import Caller, _build, run_comparison
from neat_align.comparison.spec import CompareSpec, parse_spec
from neat_align.files.atomic import read_json
from neat_align.rounds import params
from neat_align.rounds.completions import read_groups
from neat_align.rounds.round_files import read_round
from neat_align.trainer.round_callback import RoundCallback
from pages import assert_sealed
from small_rounds import files_of
from tiny import save_tiny

# Two that sample alike and learn differently.
METHODS = {"sft-best": None, "dpo": None}
INTERRUPT: dict[str, int | None] = {"rewards": None}
CALLS: list[int] = []


def letters(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    **columns: Any,
) -> list[float]:
    """The trained reward; fails like a server that is away at the call that INTERRUPT names,
    counted from 1.
    """
    CALLS.append(len(completions))
    if len(CALLS) == INTERRUPT["rewards"]:
        raise ConnectionError("the reward server is away")
    return [c[0]["content"].count("e") + 0.01 * len(c[0]["content"]) for c in completions]


def spaces(completions: Sequence[Any], **columns: Any) -> list[float]:
    return [float(c[0]["content"].count(" ")) for c in completions]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    save_tiny(folder / "model", "llama")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "chosen": [{"role": "assistant", "content": "Good."}],
            "rejected": [{"role": "assistant", "content": f"Bad {i}."}],
        }
        for i in range(8)
    ]
    (folder / "data.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return folder


def raw_spec(place: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "model_name_or_path": str(place / "model"),
        "dataset_name": str(place / "data.jsonl"),
        "reward_funcs": [f"{__name__}:letters"],
        "judge_funcs": [f"{__name__}:spaces"],
        "holdout": 3,
        "prompts_per_round": 2,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 2,
        "use_human_completions": False,
        "max_prompt_length": 100,
        "max_completion_length": 6,
        "evaluate_contrast": False,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "kl_weight": 0.0,
        "drift_prompts": 0,
        "bf16": False,
        "disable_tqdm": True,
        **changes.pop("settings", {}),
    }
    return {"name": "tiny", "settings": settings, "seeds": [0, 1], "methods": METHODS, **changes}


def spec(place: Path, **changes: Any) -> CompareSpec:
    return parse_spec(raw_spec(place, **changes), "tiny.yaml")


def compared(spec: CompareSpec, out: Path) -> tuple[dict[str, Any], str]:
    """The result file, and what was said."""
    console = Console(file=io.StringIO(), width=80)
    show_comparison(spec, out, console)
    assert isinstance(console.file, io.StringIO)
    return read_json(out / "comparison.json"), console.file.getvalue()


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, dict[str, Any], str]:
    """The comparison without an interruption."""
    return place / "whole", *compared(spec(place), place / "whole")


def timeless(value: Any) -> Any:
    """A result without what no two comparisons share."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "date")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def run_folder(out: Path, method: str, seed: int) -> Path:
    return out / "runs" / method / "as set" / f"seed{seed}"


# ---- a comparison --------------------------------------------------------------------------------


def test_every_method_is_run_with_every_seed_and_the_result_says_so(
    whole: tuple[Path, dict[str, Any], str],
) -> None:
    out, result, said = whole
    assert [m["name"] for m in result["methods"]] == ["base", "sft-best", "dpo"]
    assert [r["method"] for r in result["table"]] == ["base", "sft-best", "dpo"]
    assert [(r["method"], r["seed"]) for r in result["runs"]] == [
        ("sft-best", 0),
        ("dpo", 0),
        ("sft-best", 1),
        ("dpo", 1),
    ]
    assert result["budget"] == {
        "rounds": 2,
        "prompts_per_round": 2,
        "completions_per_prompt": 4,
        "sampled_completions": 16,
        "optimizer_steps": 4,
        "held_out_prompts": 3,
        "samples_per_prompt": 1,
    }
    for run in result["runs"]:
        assert [p["round"] for p in run["points"]] == [1, 2]
        assert 0 < run["points"][0]["kl"] < run["points"][1]["kl"]
        assert (
            run["points"][0]["training"][
                "loss/lm" if run["method"] == "sft-best" else "loss/ranking"
            ]
            > 0
        )
        assert run["trained_tokens"] > 0
    assert [
        set(p) for p in read_json(out / "examples.json")[0].values() if isinstance(p, dict)
    ] == [{"base", "sft-best", "dpo"}] * 2
    assert result["machine"]["threads"] == 1
    for line in (
        "tiny: 2 methods, 4 runs into",
        "[1/4] sft-best (as set) seed 0: reward ",
        "[4/4] dpo (as set) seed 1: reward ",
    ):
        assert line in said
    table = said[said.index("tiny: change over base") :]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80
    assert "sft-best" in table
    assert not list(out.rglob("checkpoint-*"))


@pytest.mark.slow
def test_the_budget_counts_the_prompts_that_there_were_and_a_run_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = spec(
        place,
        seeds=[0],
        methods={"sft-best": None},
        settings={"prompts_per_round": 7, "num_train_epochs": 1},
    )
    budget = compared(few, tmp_path)[0]["budget"]
    assert (
        budget["prompts_per_round"],
        budget["sampled_completions"],
        budget["optimizer_steps"],
    ) == (5, 20, 5)
    assert "eval_reward" not in capsys.readouterr().out  # all that is said goes to the console


def test_the_page_is_written_and_sealed(whole: tuple[Path, dict[str, Any], str]) -> None:
    html = (whole[0] / "comparison.html").read_text(encoding="utf-8")
    assert_sealed(html)
    assert "sft-best" in html


def test_a_point_of_the_result_is_the_evaluation_of_its_round(
    whole: tuple[Path, dict[str, Any], str],
) -> None:
    out, result, _ = whole
    evaluation = read_json(run_folder(out, "dpo", 1) / "evaluation-2.json")
    point = result["runs"][3]["points"][1]
    assert point["reward"] == pytest.approx(sum(evaluation["rewards"]) / 3)
    assert point["kl"] == evaluation["kl"]
    base = [
        read_json(out / "runs" / "base" / f"seed{seed}" / "evaluation-0.json") for seed in (0, 1)
    ]
    assert base[0]["completions"] != base[1]["completions"]
    assert base[0]["kl"] is None
    mean = sum(sum(e["rewards"]) for e in base) / 6
    assert result["table"][0]["at_budget"]["reward"]["mean"] == pytest.approx(mean)


def test_a_round_is_told_by_the_means_of_its_own_steps(
    whole: tuple[Path, dict[str, Any], str],
) -> None:
    out, result, _ = whole
    lines = [
        json.loads(line)
        for line in (run_folder(out, "dpo", 1) / "metrics.jsonl").read_text().splitlines()
    ]
    steps = {line["step"]: line for line in lines if "loss" in line}
    rounds = [line for line in lines if "round" in line]
    for i, (first, last) in enumerate(((1, 2), (3, 4))):
        training = result["runs"][3]["points"][i]["training"]
        for name in ("loss/ranking", "grad_norm"):
            assert training[name] == pytest.approx((steps[first][name] + steps[last][name]) / 2)
        assert training["reward/plain"] == rounds[i]["reward/plain"]
        assert "learning_rate" not in training
    assert steps[1]["loss/ranking"] != steps[3]["loss/ranking"]
    assert rounds[0]["reward/plain"] != rounds[1]["reward/plain"]


def test_runs_that_sample_alike_share_their_first_round_and_not_their_second(
    whole: tuple[Path, dict[str, Any], str],
) -> None:
    out = whole[0]
    assert len(list((out / "shared-rounds").iterdir())) == 2  # one a seed
    first = {
        (m, s): files_of(run_folder(out, m, s) / "rounds" / "00000")
        for m in METHODS
        for s in (0, 1)
    }
    for seed in (0, 1):
        assert set(first["dpo", seed]) == {"groups.parquet", "manifest.json"}
        assert first["dpo", seed] == first["sft-best", seed]
        # Taken, not made again: a copy keeps the time of what it is of.
        times = [
            (run_folder(out, m, seed) / "rounds" / "00000" / "groups.parquet").stat().st_mtime_ns
            for m in METHODS
        ]
        assert times[0] == times[1]
    assert first["dpo", 0] != first["dpo", 1]
    second = [files_of(run_folder(out, m, 0) / "rounds" / "00001") for m in METHODS]
    assert second[0] != second[1]
    assert all((run_folder(out, m, s) / "run.json").is_file() for m in METHODS for s in (0, 1))


@pytest.mark.slow
def test_a_run_is_the_same_whether_its_first_round_was_shared_or_not(
    place: Path, whole: tuple[Path, dict[str, Any], str]
) -> None:
    """`dpo` took the first round of `sft-best` there; here it is alone."""
    alone, result = (
        place / "alone",
        compared(spec(place, methods={"dpo": None}, seeds=[0]), place / "alone")[0],
    )
    assert timeless(result["runs"]) == timeless(whole[1]["runs"][1:2])
    for pattern in ("evaluation-*.json", "groups.parquet", "manifest.json"):
        found, expected = (
            files_of(run_folder(out, "dpo", 0), pattern) for out in (alone, whole[0])
        )
        assert found == expected
        assert len(found) == 2


@pytest.mark.slow
def test_ways_of_sampling_that_differ_share_nothing(place: Path, tmp_path: Path) -> None:
    methods = {"neat-plain": None, "hot": {"like": "neat-plain", "reward_margin": 0.001}}
    compared(spec(place, methods=methods, seeds=[0], settings={"num_train_epochs": 1}), tmp_path)
    assert len(list((tmp_path / "shared-rounds").iterdir())) == 2


@pytest.mark.slow
def test_a_shared_first_round_has_the_reference_that_one_method_needs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sft-best` needs none for itself: of all but the first prompts it would have kept none."""
    monkeypatch.setattr(params, "MEASURED_PROMPTS", 1)
    settings = {"num_train_epochs": 1}

    def with_reference(method: str) -> list[bool]:
        round_folder = run_folder(tmp_path, method, 0) / "rounds" / "00000"
        groups = read_groups(round_folder / "groups.parquet")
        return [bool(c.ref_logprobs) for g in groups for c in g.completions]

    alone = spec(place, methods={"sft-best": None}, seeds=[0], settings=settings)
    compared(alone, tmp_path)
    assert not all(with_reference("sft-best"))
    # A method that is added later does not go on from that round.
    compared(spec(place, seeds=[0], settings=settings), tmp_path)
    assert all(with_reference("dpo"))
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "shared-rounds")
    compared(spec(place, seeds=[0], settings=settings), tmp_path)
    assert all(with_reference("sft-best"))
    assert all(with_reference("dpo"))
    assert len(list((tmp_path / "shared-rounds").iterdir())) == 1


# ---- interruptions -------------------------------------------------------------------------------


@pytest.mark.slow
def test_interrupted_and_taken_up_is_the_comparison_without_an_interruption(
    place: Path, whole: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times: while a first run's second round is scored, inside the second round of the next,
    and while it is evaluated.
    """
    out = place / "interrupted"
    steps = 0
    check = RoundCallback.on_pre_optimizer_step

    def stop_in_a_round(self: RoundCallback, *events: Any, **given: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:  # two of the first run, and the last but one of the second's four
            raise KeyboardInterrupt
        check(self, *events, **given)

    # Rewards: two of base; the first run's round, evaluation, and second round.
    CALLS.clear()
    monkeypatch.setitem(INTERRUPT, "rewards", 5)
    with pytest.raises(RewardError, match="the reward server is away"):
        compared(spec(place), out)
    assert read_round(run_folder(out, "sft-best", 0) / "rounds" / "00001") is None
    monkeypatch.setitem(INTERRUPT, "rewards", None)
    with monkeypatch.context() as patched:
        patched.setattr(RoundCallback, "on_pre_optimizer_step", stop_in_a_round)
        with pytest.raises(KeyboardInterrupt):
            compared(spec(place), out)
    assert (run_folder(out, "sft-best", 0) / "points.json").is_file()
    dpo = run_folder(out, "dpo", 0)
    assert not (dpo / "points.json").is_file()
    logged = [json.loads(line) for line in (dpo / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3], (
        "the test needs a step that is made again"
    )
    CALLS.clear()
    # The second round is there: the evaluation after it.
    monkeypatch.setitem(INTERRUPT, "rewards", 1)
    with pytest.raises(RewardError):
        compared(spec(place), out)
    result, said = compared(spec(place), out)
    assert timeless(result) == timeless(whole[1])
    assert "[1/4]" in said
    for pattern in ("evaluation-*.json", "groups.parquet"):
        assert files_of(out / "runs", pattern) == files_of(whole[0] / "runs", pattern)


@pytest.mark.slow
def test_a_copy_that_was_cut_short_is_not_taken_for_a_round(
    place: Path, whole: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place / "cut"
    copytree = shutil.copytree

    def cut_short(source: Path, target: Path, dirs_exist_ok: bool = False) -> Path:
        target.mkdir(parents=True, exist_ok=dirs_exist_ok)
        shutil.copyfile(source / "manifest.json", target / "manifest.json")
        raise KeyboardInterrupt

    first = spec(place, methods={"sft-best": None}, seeds=[0])
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            compared(first, out)
        assert not list((out / "shared-rounds").glob("[!.]*"))
        copies: list[Path] = []

        def cut_into_the_run(source: Path, target: Path, dirs_exist_ok: bool = False) -> Path:
            copies.append(target)
            return (
                copytree(source, target, dirs_exist_ok=dirs_exist_ok)
                if len(copies) == 1
                else cut_short(source, target, dirs_exist_ok)
            )

        # Now the copy is kept, and the one that the next method takes is cut short.
        shutil.rmtree(out / "runs")
        patched.setattr(shutil, "copytree", cut_into_the_run)
        with pytest.raises(KeyboardInterrupt):
            compared(spec(place, seeds=[0]), out)
        assert len(copies) == 2
    assert shutil.copytree is copytree
    assert timeless(compared(spec(place, seeds=[0]), out)[0]["runs"]) == timeless(
        whole[1]["runs"][:2]
    )


# ---- later ---------------------------------------------------------------------------------------


@pytest.fixture
def copied(whole: tuple[Path, dict[str, Any], str], tmp_path: Path) -> Path:
    shutil.copytree(whole[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_a_finished_comparison_is_read_and_a_method_and_a_seed_can_be_added(
    place: Path, whole: tuple[Path, dict[str, Any], str], copied: Path
) -> None:
    before = files_of(copied / "runs")
    CALLS.clear()
    again, _ = compared(spec(place), copied)
    assert not CALLS
    assert {**again, "date": ""} == {**whole[1], "date": ""}  # seconds, too
    more, _ = compared(spec(place, methods={**METHODS, "simpo": None}, seeds=[0]), copied)
    assert [(r["method"], r["seed"]) for r in more["runs"]] == [
        ("sft-best", 0),
        ("dpo", 0),
        ("simpo", 0),
    ]
    assert more["runs"][:2] == whole[1]["runs"][:2]
    assert files_of(run_folder(copied, "simpo", 0) / "rounds" / "00000") == files_of(
        run_folder(copied, "dpo", 0) / "rounds" / "00000"
    )
    after = files_of(copied / "runs")
    assert {k: after[k] for k in before} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": {"learning_rate": 0.03}},
            r"base/seed0 holds a run with other settings: learning_rate was 0\.02 and is 0\.03\. "
            r"Choose",
        ),
        (
            {"methods": {"dpo": {"beta": 0.5}}},
            r"dpo/as set/seed0 holds a run with other settings: beta was 0\.1 and is 0\.5\. Choose",
        ),
        # Nothing of simpo is there; but what it is compared with was made with other settings.
        (
            {"methods": {"simpo": None}, "settings": {"holdout": 2, "top_k": 5}},
            r"base/seed0 .* holdout was 3 and is 2; top_k was None and is 5\. Choose",
        ),
    ],
    ids=str,
)
def test_a_comparison_is_not_gone_on_with_under_other_settings(
    place: Path, copied: Path, changes: dict[str, Any], message: str
) -> None:
    before = files_of(copied)
    with pytest.raises(ConfigError, match=message):
        compared(spec(place, **changes), copied)
    assert files_of(copied) == before


def test_a_comparison_is_not_gone_on_with_on_other_data(
    place: Path, copied: Path, tmp_path: Path
) -> None:
    text = (place / "data.jsonl").read_text(encoding="utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.jsonl").write_text(
        text.replace("What is 7", "Who is 7"), encoding="utf-8"
    )
    options = read_json(run_folder(copied, "dpo", 0) / "options.json")
    options["options"]["dataset_name"] = str(tmp_path / "other" / "data.jsonl")
    base = copied / "runs" / "base" / "seed0" / "options.json"
    for path in (base, run_folder(copied, "dpo", 0) / "options.json"):
        facts = read_json(path)
        facts["options"]["dataset_name"] = options["options"]["dataset_name"]
        path.write_text(json.dumps(facts), encoding="utf-8")
    (run_folder(copied, "dpo", 0) / "points.json").unlink()  # as if it had been interrupted
    changed = spec(
        place,
        methods={"dpo": None},
        seeds=[0],
        settings={"dataset_name": options["options"]["dataset_name"]},
    )
    with pytest.raises(ConfigError, match="holds a run with other settings: the data changed"):
        compared(changed, copied)


# ---- what is refused, and what breaks down -------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {"dpo": None, "neat": {"num_positive": 3}}}, r"dpo 4, neat 5"),
        (
            {"methods": {"dpo": None}, "strengths": [{"beta": 0.1}, {"num_plain": 5}]},
            r"dpo \(beta=0\.1\) 4, dpo \(num_plain=5\) 5",
        ),
    ],
    ids=str,
)
def test_unequal_budgets_are_refused_before_anything_runs(
    place: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"do not sample the same number of completions a prompt \({said}\).* change "
        rf"num_positive",
    ):
        compared(spec(place, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_later_strength_that_cannot_work_is_refused_before_anything_runs(
    place: Path, tmp_path: Path
) -> None:
    strengths = [{"beta": 0.1}, {"beta": -1.0}]
    with pytest.raises(ConfigError, match=r"beta is -1\.0; it must be above 0"):
        compared(spec(place, methods={"dpo": None}, strengths=strengths), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_comparison_without_held_out_prompts_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="needs held-out prompts: set holdout or eval_dataset_name under settings"
    ):
        compared(spec(place, settings={"holdout": 0}), tmp_path)


def test_a_method_that_breaks_down_is_a_result_and_no_end(place: Path, tmp_path: Path) -> None:
    """Its reward margin leaves nothing to rank: it has collapsed, and the others have a table."""
    methods = {"strict": {"like": "dpo", "reward_margin": 1000.0}, "dpo": None}
    broken = spec(place, methods=methods, seeds=[0], settings={"num_train_epochs": 1})
    result, said = compared(broken, tmp_path)
    strict, dpo = result["runs"]
    assert "there is too little to rank" in strict["collapsed"]
    assert strict["points"] == []
    assert len(dpo["points"]) == 1
    rows = {r["method"]: r for r in result["table"]}
    assert (rows["strict"]["at_budget"], rows["strict"]["collapsed"]) == ({}, 1)
    assert rows["dpo"]["at_budget"]["reward"]["mean"] == pytest.approx(dpo["points"][0]["reward"])
    assert "[1/2] strict (as set) seed 0: " in said
    assert "COLLAPSED: 0 of" in said
    assert "too little to rank" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert timeless(compared(broken, tmp_path)[0]) == timeless(result)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_reads_a_file_and_writes_where_it_is_told(
    place: Path, copied: Path, tmp_path: Path
) -> None:
    import yaml

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw_spec(place)), encoding="utf-8")
    command = [
        "compare",
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--output-dir",
        str(copied),
        "--json",
        str(tmp_path / "a" / "b.json"),
    ]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "change over base" in done.output
    assert f"page    {copied / 'comparison.html'}" in done.output
    assert read_json(tmp_path / "a" / "b.json") == read_json(copied / "comparison.json")


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [False, True])
def test_nothing_of_a_run_is_in_memory_when_the_next_begins(
    place: Path, tmp_path: Path, use_peft: bool
) -> None:
    """Trainer, model, optimizer: also of a run that broke down, whose error holds its frames."""
    seen: list[weakref.ref[Any]] = []
    alive_at_a_start: list[int] = []

    class Watch(TrainerCallback):
        def note(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            parts = (given["model"], given.get("optimizer"), given.get("train_dataloader"))
            seen.extend(weakref.ref(part) for part in parts if part is not None)

        on_evaluate = on_step_end = note

    def callbacks(_: Any) -> list[TrainerCallback]:
        alive_at_a_start.append(sum(ref() is not None for ref in seen))
        return [Watch()]

    given = spec(
        place,
        seeds=[0],
        methods={"sft-best": None, "dpo": {"reward_margin": 1e6}, "rrhf": None},
        settings={"num_train_epochs": 1, "use_peft": use_peft, "bf16": True},
    )
    result = run_comparison(given, tmp_path, Caller(options_from, callbacks, lambda *_: None))
    assert len(alive_at_a_start) == 4
    assert alive_at_a_start == [0] * 4
    assert len(seen) >= 4
    assert "0 of" in str(result["runs"])


def test_a_run_is_shown_as_its_own_settings_ask(place: Path, tmp_path: Path) -> None:
    shown = spec(place, settings={"log_completions": True})
    caller = Caller(options_from, terminal_callbacks, lambda *_: None)
    trainer = _build(shown, shown.methods[1], {}, 0, tmp_path / "run", caller)
    kinds = {type(c) for c in trainer.callback_handler.callbacks}
    assert PrintGroups in kinds
    assert PrinterCallback not in kinds


def test_a_strength_has_a_folder_and_a_curve_of_its_own(place: Path, tmp_path: Path) -> None:
    strengths = [{"learning_rate": 0.01}, {"learning_rate": 0.03}]
    read = spec(
        place,
        methods={"dpo": None},
        seeds=[0],
        strengths=strengths,
        settings={"num_train_epochs": 1},
    )
    result, _ = compared(replace(read, kl_target=1e-6), tmp_path)
    names = ["learning_rate=0.01", "learning_rate=0.03"]
    assert sorted(p.name for p in (tmp_path / "runs" / "dpo").iterdir()) == names
    assert [c["strength"] for c in result["frontier"]] == names
    assert result["kl_target"] == 1e-6
    assert result["table"][1]["at_equal_kl"]["seeds"] == 1
    # How fast it learns decides nothing about what it samples first.
    assert len(list((tmp_path / "shared-rounds").iterdir())) == 1
