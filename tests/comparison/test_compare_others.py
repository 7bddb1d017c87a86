"""`neat-align compare`: methods that are trained on a reward of their own, and policies that were
trained elsewhere.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compare import CALLS, compared, place, run_folder, spec

from neat_align import ConfigError, RewardError
from neat_align.cli.options import options_from
from neat_align.comparison.before_runs import common_reward
from neat_align.errors import DataError
from neat_align.files.atomic import read_json
from neat_align.pipeline import build_trainer
from neat_align.rounds.completions import read_groups
from small_rounds import files_of
from tiny import skip_without_encoder

__all__ = ["place"]  # a fixture
ONE = {"num_train_epochs": 1}
LETTERS, SPACES = "test_compare:letters", "test_compare:spaces"


def of_letters(text: str) -> float:
    return text.count("e") + 0.01 * len(text)


def vowels(completions: Sequence[Any], **columns: Any) -> list[float]:
    return [float(sum(c[0]["content"].count(v) for v in "aeiou")) for c in completions]


def nan_weighted(text: str) -> float:
    return 2.0 * of_letters(text) - 0.5 * text.count(" ")


# ---- a reward of its own -------------------------------------------------------------------------


def test_a_method_learns_from_its_own_reward_and_is_judged_by_the_comparisons(
    place: Path, tmp_path: Path
) -> None:
    own = {"like": "dpo", "reward_funcs": [f"{__name__}:vowels"]}
    given = spec(place, methods={"dpo": None, "own": own}, seeds=[0], settings=ONE)
    result, said = compared(given, tmp_path)
    for method in ("dpo", "own"):
        evaluation = read_json(run_folder(tmp_path, method, 0) / "evaluation-1.json")
        texts = [answers[0] for answers in evaluation["completions"]]
        assert evaluation["rewards"] == pytest.approx([of_letters(t) for t in texts]), method
        assert evaluation["contrast"]["plain"] == pytest.approx(sum(map(of_letters, texts)) / 3)
        assert list(evaluation["judges"]) == ["spaces"]
        groups = read_groups(
            run_folder(tmp_path, method, 0) / "rounds" / "00000" / "groups.parquet"
        )
        for c in (c for g in groups for c in g.completions):
            trained = of_letters(c.text) if method == "dpo" else sum(map(c.text.count, "aeiou"))
            assert c.reward == pytest.approx(trained), method
    # The table, the examples and the line of the run.
    rows = {r["method"]: r["at_budget"]["reward"] for r in result["table"]}
    last = read_json(run_folder(tmp_path, "own", 0) / "evaluation-1.json")["rewards"]
    assert rows["own"]["mean"] == pytest.approx(sum(last) / 3)
    assert rows["own"]["delta"] == pytest.approx(sum(last) / 3 - rows["base"]["mean"])
    examples = read_json(tmp_path / "examples.json")
    assert [x["rewards"]["own"] for x in examples] == last
    assert f"own (as set) seed 0: reward {sum(last) / 3:.2f}" in said
    # They sampled alike and were rewarded otherwise: nothing is shared but the start.
    assert len(list((tmp_path / "shared-rounds").iterdir())) == 2
    described = {m["name"]: m["description"] for m in result["methods"]}
    assert described["own"].endswith(
        f"; trained on {__name__}:vowels; its reward here is the comparison's all the same"
    )
    assert "trained on" not in described["dpo"]
    assert "is the comparison&#39;s all the same" in (tmp_path / "comparison.html").read_text()
    assert result["rewards"] == [LETTERS]
    # Read again, and nothing is made.
    CALLS.clear()
    assert {**compared(given, tmp_path)[0], "date": ""} == {**result, "date": ""}
    assert not CALLS


def test_two_rewards_of_one_name_do_not_share_a_round(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first round is scored by its own method's function, whatever that is called."""
    monkeypatch.syspath_prepend(place)
    for module, letter in (("rewards_a", "a"), ("rewards_o", "o")):
        (place / f"{module}.py").write_text(
            "def score(completions, **columns):\n"
            f"    return [float(c[0]['content'].count({letter!r})) for c in completions]\n"
        )
    methods = {
        letter: {"like": "dpo", "reward_funcs": [f"rewards_{letter}:score"]} for letter in "ao"
    }
    compared(spec(place, methods=methods, seeds=[0], settings=ONE), tmp_path)
    for letter in "ao":
        file = run_folder(tmp_path, letter, 0) / "rounds" / "00000" / "groups.parquet"
        for c in (c for g in read_groups(file) for c in g.completions):
            assert c.reward == c.text.count(letter)


@pytest.mark.slow
def test_common_weights_judge_and_are_not_asked_of_a_methods_own_rewards(
    place: Path, tmp_path: Path
) -> None:
    settings = {**ONE, "reward_funcs": [LETTERS, SPACES], "reward_weights": [2.0, -0.5]}
    methods = {
        "one": {"like": "dpo", "reward_funcs": [SPACES]},
        "two": {"like": "dpo", "reward_funcs": [SPACES, LETTERS], "reward_weights": [1.0, 0.0]},
        "weighed": {"like": "dpo", "reward_weights": [0.0, 1.0]},
    }
    given = spec(place, methods=methods, seeds=[0], settings=settings)
    result, _ = compared(given, tmp_path)
    for method in methods:
        evaluation = read_json(run_folder(tmp_path, method, 0) / "evaluation-1.json")
        texts = [answers[0] for answers in evaluation["completions"]]
        assert evaluation["rewards"] == pytest.approx([nan_weighted(t) for t in texts]), method
        groups = read_groups(
            run_folder(tmp_path, method, 0) / "rounds" / "00000" / "groups.parquet"
        )
        for c in (c for g in groups for c in g.completions):
            assert c.reward == c.text.count(" "), method
    described = {m["name"]: m["description"] for m in result["methods"]}
    assert f"trained on {LETTERS} + {SPACES}" in described["weighed"]


def test_one_without_a_common_reward_has_no_reward_in_the_table(
    place: Path, tmp_path: Path
) -> None:
    settings = {**ONE, "reward_funcs": [], "rank_by": "origin"}
    own = {"like": "rlcd-dpo", "rank_by": "reward", "reward_funcs": [LETTERS]}
    given = spec(place, methods={"rlcd-dpo": None, "own": own}, seeds=[0], settings=settings)
    compared(given, tmp_path)
    evaluation = read_json(run_folder(tmp_path, "own", 0) / "evaluation-1.json")
    assert evaluation["rewards"] == [None] * 3
    assert evaluation["contrast"] == {}


def test_dlma_is_trained_on_the_policys_own_opinion(place: Path, tmp_path: Path) -> None:
    given = spec(place, methods={"dlma": None}, seeds=[0], settings=ONE)
    result, _ = compared(given, tmp_path)
    run = result["runs"][0]
    assert run["collapsed"] is None or "distinct" in run["collapsed"]
    evaluation = read_json(run_folder(tmp_path, "dlma", 0) / "evaluation-1.json")
    texts = [answers[0] for answers in evaluation["completions"]]
    assert evaluation["rewards"] == pytest.approx([of_letters(t) for t in texts])
    record = read_json(run_folder(tmp_path, "dlma", 0) / "run.json")
    assert (record["rewards"], record["evaluated_by"]) == (["contrast"], ["letters"])
    groups = read_groups(run_folder(tmp_path, "dlma", 0) / "rounds" / "00000" / "groups.parquet")
    rewards = [c.reward for g in groups for c in g.completions]
    assert any(r is not None and r < 0 for r in rewards) or len(set(rewards)) > 1


def test_a_run_is_not_gone_on_with_under_another_common_reward(place: Path, tmp_path: Path) -> None:
    """Even where the start policy's evaluation, which would say so, is gone."""
    own = {"like": "dpo", "reward_funcs": [f"{__name__}:vowels"]}
    compared(spec(place, methods={"own": own}, seeds=[0], settings=ONE), tmp_path)
    shutil.rmtree(tmp_path / "runs" / "base")
    changed = spec(
        place, methods={"own": own}, seeds=[0], settings={**ONE, "reward_funcs": [SPACES]}
    )
    with pytest.raises(ConfigError, match=r"own/as set/seed0 .* evaluated by was .*letters"):
        compared(changed, tmp_path)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ({"reward_funcs": ["vadr"]}, RewardError, "the reward 'vadr' is not a shipped one"),
        (
            {"reward_funcs": [LETTERS], "reward_weights": [1.0, 2.0]},
            ConfigError,
            "method 'own' has 2 reward weights for 1 rewards: give one a reward",
        ),
        ({"judge_funcs": [LETTERS]}, ConfigError, "'own' sets judge_funcs, which must be equal"),
    ],
    ids=str,
)
def test_an_own_reward_that_cannot_work_is_refused_before_anything_runs(
    place: Path, tmp_path: Path, method: dict[str, Any], error: type[Exception], message: str
) -> None:
    methods = {"dpo": None, "own": {"like": "dpo", **method}}
    with pytest.raises(error, match=message):
        compared(spec(place, methods=methods, settings=ONE), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_strength_cannot_change_the_reward(place: Path) -> None:
    with pytest.raises(ConfigError, match="a strength sets reward_funcs, which must be equal"):
        spec(place, strengths=[{"reward_funcs": [SPACES]}])


def test_only_a_method_with_its_own_reward_is_told_by_what_it_is_judged(place: Path) -> None:
    given = spec(place, methods={"dpo": None, "dlma": None})
    _, dpo, dlma = given.methods
    assert common_reward(given, dpo, options_from) is None
    told = common_reward(given, dlma, options_from)
    assert told is not None
    assert (list(told.funcs), told.weights) == ([LETTERS], None)  # type: ignore[arg-type]


def test_self_contrast_ranks_the_chosen_answer_first_and_needs_one(
    place: Path, tmp_path: Path
) -> None:
    skip_without_encoder()
    settings = {**ONE, "max_completion_length": 12}
    given = spec(place, methods={"self-contrast": None}, seeds=[0], settings=settings)
    compared(given, tmp_path / "out")
    folder = run_folder(tmp_path / "out", "self-contrast", 0)
    groups = read_groups(folder / "rounds" / "00000" / "groups.parquet")
    assert groups
    for g in groups:
        best = max(g.completions, key=lambda c: -2.0 if c.reward is None else c.reward)
        assert (best.origin, best.text) == ("chosen", "Good.")
        assert best.reward == pytest.approx(1.0, abs=1e-5)
    lines = (place / "data.jsonl").read_text(encoding="utf-8").splitlines()
    bare = [json.dumps({"prompt": json.loads(line)["prompt"]}) for line in lines]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([*lines[:6], *bare[6:]]) + "\n", encoding="utf-8")
    none = tmp_path / "none.jsonl"
    none.write_text("\n".join(bare) + "\n", encoding="utf-8")
    for path, row in ((mixed, r"mixed\.jsonl:[78]"), (none, r"none\.jsonl:2")):
        changed = spec(
            place,
            methods={"dpo": None, "self-contrast": None},
            settings={**settings, "dataset_name": str(path)},
        )
        with pytest.raises(
            DataError, match=rf"self-contrast(?s:.*){row}(?s:.*)has no chosen answer"
        ):
            compared(changed, tmp_path / "not-begun")
        assert not (tmp_path / "not-begun").exists()


# ---- trained elsewhere ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["all weights", "an adapter"])
def trained(
    place: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder with `dpo` as it was trained outside of a comparison, its settings, and its
    evaluation.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    settings: dict[str, Any] = {**ONE, "num_eval_generations": 2, "evaluate_contrast": True}
    settings |= {"use_peft": request.param == "an adapter"}
    given = spec(place, methods={"dpo": None}, settings=settings)
    options = {**given.options(given.methods[1], {}, 0), "output_dir": str(folder / "run")}
    trainer = build_trainer(*options_from(options))
    trainer.train()
    trainer.save_model(str(folder / "seed0"))
    trainer.evaluate()
    assert trainer.last_evaluation is not None
    return folder, settings, json.loads(json.dumps(trainer.last_evaluation.to_json()))


def close(found: Any, expected: Any, where: str = "") -> None:
    """Equal, numbers up to what merging an adapter rounds."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            close(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for a, b in zip(found, expected, strict=True):
            close(a, b, where)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), where
    else:
        assert found == expected, where


@pytest.mark.slow
def test_a_policy_that_was_trained_elsewhere_is_evaluated_as_a_run_is(
    place: Path, trained: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    folder, settings, evaluation = trained
    theirs = {"policy": str(folder / "seed{seed}"), "description": "somebody's DPO"}
    methods = {"theirs": theirs, "dpo": None}
    given = spec(place, methods=methods, seeds=[0], settings=settings)
    result, said = compared(given, tmp_path)
    kept = tmp_path / "runs" / "theirs" / "as set" / "seed0" / "evaluation-1.json"
    close(read_json(kept), evaluation)
    assert evaluation["kl"] > 0
    theirs_run, dpo_run = result["runs"]
    assert (theirs_run["method"], theirs_run["trained_tokens"]) == ("theirs", 0)
    close(theirs_run["points"][0]["reward"], dpo_run["points"][0]["reward"])
    close(theirs_run["points"][0]["kl"], dpo_run["points"][0]["kl"])
    assert "tiny: 2 methods, 2 runs into" in said
    assert "[1/2] theirs (as set) seed 0: reward" in said
    row = {r["method"]: r for r in result["table"]}["theirs"]
    assert row["wins"]["dpo"]["tie"] == 1.0
    assert result["budget"]["completions_per_prompt"] == 4
    described = {m["name"]: m["description"] for m in result["methods"]}
    assert (
        described["theirs"]
        == "somebody's DPO; trained elsewhere, at a budget that is not checked here"
    )
    assert "somebody" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    before = files_of(tmp_path / "runs")
    CALLS.clear()
    assert {**compared(given, tmp_path)[0], "date": ""} == {**result, "date": ""}
    assert not CALLS
    assert files_of(tmp_path / "runs") == before


@pytest.mark.slow
def test_strengths_do_not_multiply_it_and_another_model_in_its_folder_is_refused(
    place: Path, tmp_path: Path
) -> None:
    for seed in (0, 1):
        shutil.copytree(place / "model", tmp_path / f"m{seed}")
    methods = {"theirs": {"policy": str(tmp_path / "m{seed}")}}
    methods["one"] = {"policy": str(place / "model")}
    given = spec(
        place,
        methods=methods,
        strengths=[{"learning_rate": 0.01}, {"learning_rate": 0.03}],
        settings={"num_train_epochs": 1},
    )
    result, _ = compared(given, tmp_path / "out")
    assert [(r["method"], r["strength"], r["seed"]) for r in result["runs"]] == [
        (name, "as set", seed) for seed in (0, 1) for name in methods
    ]
    described = {m["name"]: m["description"] for m in result["methods"]}
    said = "one model for all seeds, so its intervals know nothing of other trainings"
    assert described["one"].endswith(said)
    assert said not in described["theirs"]
    # The start policy itself: no step away.
    for run in result["runs"]:
        assert run["points"][0]["kl"] == pytest.approx(0, abs=1e-6)
    row = {r["method"]: r for r in result["table"]}["theirs"]
    assert row["at_budget"]["reward"]["delta"] == 0
    assert set(result["budget"]) == {"held_out_prompts", "samples_per_prompt"}
    from safetensors.torch import load_file, save_file

    path = tmp_path / "m1" / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + torch.ones(())}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"theirs/as set/seed1 .* policy's files was"):
        compared(given, tmp_path / "out")


@pytest.mark.parametrize("name", ["./no/such/seed{seed}", "no/such{seed}", "{empty}"])
def test_a_policy_that_is_not_there_is_refused_before_anything_runs(
    place: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    policy = name.replace("{empty}", str(tmp_path / "empty"))
    given = spec(place, methods={"dpo": None, "theirs": {"policy": policy}}, seeds=[1])
    is_at = re.escape(policy.replace("{seed}", "1"))
    with pytest.raises(
        ConfigError,
        match=rf"method 'theirs' with seed 1 is {is_at}, and there is no model \(.+: train",
    ):
        compared(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
