from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from neat_align.cli.app import main
from neat_align.cli.compare_file import read_spec
from neat_align.comparison.spec import CompareSpec
from neat_align.errors import ConfigError

FIRST: dict[str, Any] = {
    "name": "first",
    "settings": {"model_name_or_path": "demo", "dataset_name": "demo", "learning_rate": 1e-4},
    "seeds": [0, 1],
    "kl_target": 0.01,
    "methods": {"dpo": None, "neat": {"beta": 3.0}, "mine": {"like": "neat", "gamma": 0.5}},
}


def write(folder: Path, name: str, raw: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def read(folder: Path, *arguments: str) -> CompareSpec:
    return read_spec(write(folder, "first.yaml", FIRST), arguments)


# ---- beginning as another ------------------------------------------------------------------------


def test_settings_are_added_to_and_all_else_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, "first.yaml", FIRST)
    second = {
        "like": "first.yaml",
        "settings": {"learning_rate": 2e-4, "holdout": 8},
        "methods": {"neat": None},
    }
    got = read_spec(write(tmp_path, "second.yaml", second))
    assert got.settings == {
        "model_name_or_path": "demo",
        "dataset_name": "demo",
        "learning_rate": 2e-4,
        "holdout": 8,
    }
    assert (got.seeds, got.kl_target) == ((0, 1), 0.01)
    assert [m.name for m in got.methods] == ["base", "neat"]
    assert (
        "beta" not in got.methods[1].settings
    )  # neat as it ships: methods are replaced, not added to
    assert got.name == "second"  # two comparisons of one name would share a folder


def test_a_comparison_begins_as_one_that_begins_as_another(tmp_path: Path) -> None:
    write(tmp_path, "first.yaml", FIRST)
    write(tmp_path, "second.yaml", {"like": "first.yaml", "settings": {"holdout": 8}})
    got = read_spec(
        write(
            tmp_path,
            "third.yaml",
            {"like": "second.yaml", "settings": {"holdout": 9}, "seeds": [5]},
        )
    )
    assert got.settings == {**FIRST["settings"], "holdout": 9}
    assert got.seeds == (5,)
    assert [m.name for m in got.methods] == ["base", "dpo", "neat", "mine"]


def test_it_may_begin_as_a_shipped_one_and_have_no_settings_of_its_own(tmp_path: Path) -> None:
    got = read_spec(
        write(tmp_path, "mine.yaml", {"like": "compare-demo", "methods": {"neat-mix": None}})
    )
    assert got.settings == read_spec(Path("compare-demo")).settings
    assert [m.name for m in got.methods] == ["base", "neat-mix"]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            "nothing",
            "second.yaml:1: like is 'nothing', and there is no such file beside this one; these "
            "ship: compare-ablation",
        ),
        ("x" * 5000, "and there is no such file beside this one"),
        (3, "second.yaml:1: like is 3; it names the comparison that this one begins as"),
        ("", "second.yaml:1: like is ''; it names"),
        ("second.yaml", "begins as itself: "),
        ("list.yaml", "second.yaml: settings is None; it must hold the options"),
    ],
)
def test_what_it_cannot_begin_as(tmp_path: Path, like: Any, message: str) -> None:
    (tmp_path / "list.yaml").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_spec(write(tmp_path, "second.yaml", {"like": like, "methods": {"neat": None}}))


def test_a_ring_of_comparisons_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", {"like": "b.yaml"})
    with pytest.raises(
        ConfigError,
        match=r"a\.yaml begins as itself: .*a\.yaml -> .*b\.yaml -> .*a\.yaml\. Take one like out",
    ):
        read_spec(write(tmp_path, "b.yaml", {"like": "a.yaml"}).with_name("a.yaml"))


# ---- the command line ----------------------------------------------------------------------------


def test_options_of_train_are_for_all_methods(tmp_path: Path) -> None:
    words = (
        "--model_name_or_path my/model --learning-rate=0.001 --reward_funcs vader contrast "
        "--use_peft --holdout 8"
    )
    assert read(tmp_path, *words.split()).settings == {
        "model_name_or_path": "my/model",
        "dataset_name": "demo",
        "learning_rate": 0.001,
        "reward_funcs": ["vader", "contrast"],
        "use_peft": True,
        "holdout": 8,
    }


def test_passes_win_over_a_number_of_rounds_from_below(tmp_path: Path) -> None:
    below = write(
        tmp_path, "below.yaml", {**FIRST, "settings": {"num_train_epochs": 2, "seed_": 1}}
    )
    words = ["--data_passes", "1"]
    assert read_spec(below, words).settings == {"data_passes": 1, "seed_": 1}
    above = write(tmp_path, "above.yaml", {"like": below.name, "settings": {"data_passes": 0.5}})
    assert read_spec(above, []).settings == {"data_passes": 0.5, "seed_": 1}


def test_seeds_and_methods_are_the_comparisons(tmp_path: Path) -> None:
    got = read(tmp_path, "--seeds", "3", "4", "--methods", "mine", "simpo")
    assert got.seeds == (3, 4)
    by_name = {m.name: m.settings for m in got.methods}
    assert list(by_name) == ["base", "mine", "simpo"]
    # As the file's own neat is, though that one is not run.
    assert by_name["mine"] == {
        "num_positive": 2,
        "num_negative": 2,
        "num_plain": 0,
        "beta": 3.0,
        "gamma": 0.5,
    }
    assert read(tmp_path, "--seeds", "7").seeds == (7,)
    assert read(tmp_path) == read_spec(tmp_path / "first.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods neet", "there is no method 'neet'; did you mean 'neat'?"),
        ("--methods base", "--methods names only base: add a method to compare it with"),
        ("--methods", "--methods is given without a value: write --methods A B"),
        ("--seeds x", "seeds is ['x']; it must be a list of different whole numbers"),
        (
            "--seed 3",
            "settings sets seed, which a comparison decides itself (seeds lists them): take it out",
        ),
        (
            "--resume",
            "settings sets resume, which a comparison decides itself (a comparison always goes on "
            "where it stopped)",
        ),
        ("--beta 1 --beta 2", "--beta is given twice, and only one could count: keep one"),
        ("3 --beta 1", "'3' belongs to no option: options are written --name value"),
        ("--beta [1", "--beta:1: not valid YAML"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, *words.split())


def test_the_command_hands_its_arguments_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "compare",
                "--config",
                "compare-demo",
                "--output_dir",
                str(out),
                "--seeds",
                "0",
                "--datset_name",
                "mine.jsonl",
            ]
        )
    assert ended.value.code == 2
    assert "unknown option 'datset_name'; did you mean 'dataset_name'?" in capsys.readouterr().err
    assert not out.exists()
