from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from neat_align.cli.compare_file import read_spec
from neat_align.cli.options import options_from, recipe_path
from neat_align.comparison.spec import BASE, CompareSpec, parse_spec, shipped_methods, strength_name
from neat_align.errors import ConfigError

SHIPPED = sorted(recipe_path("demo").parent.glob("compare-*.yaml"))
COMMON = {"model_name_or_path": "demo", "dataset_name": "demo", "learning_rate": 1e-4}


def spec(**changes: Any) -> CompareSpec:
    raw: dict[str, Any] = {"name": "x", "settings": COMMON, "methods": {"neat": None}, **changes}
    return parse_spec({k: v for k, v in raw.items() if v != "absent"}, "folder/file.yaml")


# ---- what is read --------------------------------------------------------------------------------


def test_a_comparison_of_one_method_by_its_defaults() -> None:
    read = spec(name="absent")
    assert read.name == "file"
    assert [m.name for m in read.methods] == ["base", "neat"]
    assert read.methods[1] == shipped_methods()["neat"]
    assert (read.seeds, read.strengths, read.kl_target) == ((0,), ({},), None)
    assert read.settings == COMMON


def test_base_is_there_once_and_first_whether_named_or_not() -> None:
    for methods in ({"neat": None}, {"base": None, "neat": None}, {"neat": None, "base": {}}):
        assert [m.name for m in spec(methods=methods).methods] == ["base", "neat"]


def test_methods_are_shipped_changed_or_begin_as_another() -> None:
    read = spec(
        methods={
            "dpo": None,
            "neat": {"beta": 3.0},
            "mine": {"like": "neat", "gamma": 0.5},
            "yours": {"like": "mine", "beta": 5.0, "description": "in your words"},
            "copy": {"like": "simpo"},
        }
    )
    by_name = {m.name: m for m in read.methods}
    assert by_name["dpo"] == shipped_methods()["dpo"]
    assert by_name["neat"].settings == {
        "num_positive": 2,
        "num_negative": 2,
        "num_plain": 0,
        "beta": 3.0,
    }
    # As neat is here, not as it ships.
    assert by_name["mine"].settings == {
        "num_positive": 2,
        "num_negative": 2,
        "num_plain": 0,
        "beta": 3.0,
        "gamma": 0.5,
    }
    assert by_name["yours"].settings == {
        "num_positive": 2,
        "num_negative": 2,
        "num_plain": 0,
        "beta": 5.0,
        "gamma": 0.5,
    }
    assert by_name["neat"].description == shipped_methods()["neat"].description
    assert by_name["mine"].description == "neat with gamma=0.5"
    assert by_name["yours"].description == "in your words"
    assert by_name["copy"].description == shipped_methods()["simpo"].description


def test_a_strength_wins_over_a_method_and_a_method_over_the_common_settings() -> None:
    read = spec(
        settings={**COMMON, "beta": 1.0, "gamma": 0.1},
        methods={"neat": {"beta": 2.0, "learning_rate": 2e-4}},
        strengths=[{"learning_rate": 3e-4}, {"learning_rate": 4e-4, "beta": 9.0}],
    )
    options = [read.options(read.methods[1], strength, 7) for strength in read.strengths]
    common = {
        **COMMON,
        "gamma": 0.1,
        "num_positive": 2,
        "num_negative": 2,
        "num_plain": 0,
        "seed": 7,
    }
    assert options == [
        {**common, "beta": 2.0, "learning_rate": 3e-4},
        {**common, "beta": 9.0, "learning_rate": 4e-4},
    ]
    assert read.options(read.methods[0], {}, 1) == {**COMMON, "beta": 1.0, "gamma": 0.1, "seed": 1}


def test_strengths_in_words() -> None:
    assert strength_name({}) == "as set"
    assert strength_name({"learning_rate": 1e-4, "beta": 2.0}) == "learning_rate=0.0001,beta=2.0"


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "unknown key 'method'; did you mean 'methods'?"),
        ({"lik": "demo"}, "unknown key 'lik'; did you mean 'like'?"),
        (
            {"learning_rate": 1},
            "unknown key 'learning_rate'; it may have name, like, settings, seeds, strengths, "
            "methods, kl_target",
        ),
        ({"seeds": []}, "seeds is []; it must be a list of different whole numbers"),
        ({"seeds": 3}, "seeds is 3; it must be a list"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]; it must be a list of different whole numbers"),
        ({"seeds": [0, True]}, "seeds is [0, True]; it must"),
        ({"seeds": [0.5]}, "seeds is [0.5]; it must"),
        (
            {"strengths": {"learning_rate": 1}},
            "strengths is {'learning_rate': 1}; it must be a list of different mappings",
        ),
        (
            {"strengths": [1]},
            "strengths is [1]; it must be a list of different mappings, such as [{learning_rate: "
            "1e-4}]",
        ),
        (
            {"strengths": [{"beta": 1}, {"beta": 1}]},
            "strengths is [{'beta': 1}, {'beta': 1}]; it must be a list of different mappings",
        ),
        ({"methods": {}}, "methods is {}; it must be a mapping of names"),
        (
            {"methods": ["neat"]},
            "methods is ['neat']; it must be a mapping of names, such as {base: , neat: }",
        ),
        ({"methods": "absent"}, "methods is None; it must be"),
        ({"methods": {"base": None}}, "methods names only base: add a method to compare it with"),
        (
            {"methods": {"neat": 3}},
            "method 'neat' is 3; give a mapping of options, or nothing for the shipped one",
        ),
        (
            {"methods": {"neet": None}},
            "there is no method 'neet'; did you mean 'neat'? Known: base, sft-best, ",
        ),
        ({"methods": {"mine": {"beta": 3.0}}}, "there is no method 'mine'"),
        ({"methods": {"zzz": None}}, "there is no method 'zzz'. Known: base, sft-best, "),
        # Only what stands above.
        (
            {"methods": {"mine": {"like": "yours"}, "yours": {"like": "neat"}}},
            "there is no method 'yours'",
        ),
        (
            {"methods": {"base": {"beta": 3.0}, "neat": None}},
            "base is the start policy and is not trained; it takes no options (beta)",
        ),
        (
            {"methods": {"base": {"like": "neat"}, "neat": None}},
            "base is the start policy and is not trained; it takes no options (like)",
        ),
        (
            {"settings": "absent"},
            "settings is None; it must hold the options of train that all methods share",
        ),
        ({"settings": [1]}, "settings is [1]; it must hold"),
        (
            {"methods": {"neat": {"seed": 3, "holdout": 2}}},
            "method 'neat' sets seed, holdout, which must be equal for all",
        ),
        (
            {"methods": {"neat": {"judge_funcs": ["x"]}}},
            "method 'neat' sets judge_funcs, which must be equal for all: put it under settings",
        ),
        # A method may learn from another reward; a strength is the same for all methods.
        (
            {"strengths": [{"reward_funcs": ["x"]}]},
            "a strength sets reward_funcs, which must be equal for all: put it under settings",
        ),
        (
            {"strengths": [{"reward_weights": [2.0]}]},
            "a strength sets reward_weights, which must be equal for all",
        ),
        (
            {"methods": {"theirs": {"policy": "x", "beta": 1.0}}},
            "method 'theirs' has a policy, which was trained elsewhere, and also beta: nothing",
        ),
        (
            {"methods": {"theirs": {"policy": ["x"]}}},
            "the policy of method 'theirs' is ['x']; it must be the folder or hub name",
        ),
        (
            {"methods": {"theirs": {"policy": None}}},
            "the policy of method 'theirs' is None; it must be the folder or hub name",
        ),
        (
            {"methods": {"theirs": {"policy": "x"}, "mine": {"like": "theirs"}}},
            "method 'mine' begins as 'theirs', which was trained elsewhere (policy) and has no",
        ),
        (
            {"methods": {"base": {"policy": "x"}, "neat": None}},
            "base is the start policy and is not trained; it takes no options (policy)",
        ),
        (
            {"methods": {"neat": {"as_conversations": True}}},
            "method 'neat' sets as_conversations, which must be equal for all",
        ),
        (
            {"strengths": [{"num_train_epochs": 4}]},
            "a strength sets num_train_epochs, which must be equal for all: put it under settings",
        ),
        (
            {"kl_target": 0},
            "kl_target is 0; it must be a number above 0, in nats per token, or unset",
        ),
        ({"kl_target": "much"}, "kl_target is 'much'; it must be"),
        ({"kl_target": True}, "kl_target is True; it must be"),
    ],
    ids=str,
)
def test_what_is_no_comparison_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="^folder/file.yaml: " + re.escape(message)):
        spec(**changes)


def test_an_unknown_method_is_told_how_a_new_one_begins() -> None:
    with pytest.raises(
        ConfigError,
        match=re.escape("A method of your own says which one it begins as: {like: neat, …}"),
    ):
        spec(methods={"mine": {"beta": 3.0}})


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^x\.yaml holds list; a comparison is a mapping with name, like, settings, seeds",
    ):
        parse_spec(["neat"], "x.yaml")
    with pytest.raises(ConfigError, match=r"^x\.yaml holds NoneType"):
        parse_spec(None, "x.yaml")


def test_files_that_are_not_there_or_no_yaml_are_refused(tmp_path: Path) -> None:
    names = ", ".join(sorted(p.stem for p in SHIPPED))
    with pytest.raises(
        ConfigError, match=r"there is no comparison at .*nothing\.yaml; these ship: " + names
    ):
        read_spec(tmp_path / "nothing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.yaml:2: not valid YAML"):
        read_spec(broken)


# ---- what ships ----------------------------------------------------------------------------------


def test_every_shipped_method_is_a_configuration_and_samples_four_answers() -> None:
    methods = shipped_methods()
    assert next(iter(methods)) == BASE
    assert methods[BASE].settings == {}
    for name, method in methods.items():
        assert method.description, name
        _, config = options_from({**method.settings, "output_dir": "x", "bf16": False})
        assert config.num_generations == 4, name


def test_the_published_methods_learn_from_plain_answers_and_need_what_they_say() -> None:
    # Without the KL term of the common settings.
    own = {"kl_weight": 0.0, "output_dir": "x", "bf16": False}
    configs = {
        name: options_from({**m.settings, **own})[1] for name, m in shipped_methods().items()
    }
    plain = ("sft-best", "rrhf", "slic", "pro", "dpo", "simpo", "kto", "self-contrast")
    distils = ("contrast-distil", "positive-distil")
    distils += ("distil-swapped", "distil-sharpened", "distil-other-bank")
    plain += ("neat-plain", *distils)
    assert {name for name, c in configs.items() if c.num_plain == 4} == set(plain)
    assert {name for name, c in configs.items() if c.needs_reference} == {
        "dpo",
        "rlcd-dpo",
        "kto",
        "dlma",
        "self-contrast",
    }
    assert {name for name, c in configs.items() if c.pair_selection == "best_worst"} == {
        "slic",
        "dpo",
        "simpo",
        "rlcd-dpo",
        "dlma",
        "self-contrast",
    }
    assert {name for name, c in configs.items() if c.ranking_loss == "none"} == {
        "sft-best",
        *distils,
    }
    assert {name for name, c in configs.items() if c.distil_weight} == {"neat-distil", *distils}
    own = {
        name: m.settings["reward_funcs"]
        for name, m in shipped_methods().items()
        if m.has_own_reward
    }
    assert own == {"dlma": ["contrast"], "self-contrast": ["similarity"]}
    # Whatever the others rank by, and in whichever unit their margin is.
    for name in own:
        settings = shipped_methods()[name].settings
        assert (settings["rank_by"], settings["reward_margin"]) == ("reward", 0), name


def test_a_methods_own_reward_functions_have_no_weights_of_others() -> None:
    settings = {"reward_funcs": ["a", "b"], "reward_weights": [1.0, 2.0]}
    methods = {
        "own": {"like": "neat", "reward_funcs": ["c"]},
        "weighed": {"like": "neat", "reward_weights": [0.0, 1.0]},
        "both": {"like": "neat", "reward_funcs": ["c"], "reward_weights": [3.0]},
        "neat": None,
    }
    read = spec(settings=settings, methods=methods)
    found = {m.name: read.options(m, {}, 0) for m in read.methods}
    given = {
        name: (options["reward_funcs"], options.get("reward_weights"))
        for name, options in found.items()
    }
    assert given == {
        "base": (["a", "b"], [1.0, 2.0]),
        "own": (["c"], None),
        "weighed": (["a", "b"], [0.0, 1.0]),
        "both": (["c"], [3.0]),
        "neat": (["a", "b"], [1.0, 2.0]),
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_comparison_is_read(path: Path) -> None:
    read = read_spec(Path(path.stem))  # by its name
    assert read == read_spec(path)
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(raw["methods"]) == [m.name for m in read.methods if m.name in raw["methods"]]
    counts = set()
    for method in read.methods:
        for strength in read.strengths:
            _, config = options_from(
                {**read.options(method, strength, read.seeds[0]), "output_dir": "x"}
            )
            counts |= {config.num_generations} if method.name != BASE else set()
    assert len(counts) == 1, "the methods' budgets are not equal"
