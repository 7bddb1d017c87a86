"""The same name for the same thing in every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from neat_align.cli import app
from neat_align.cli.compare_file import read_spec
from neat_align.cli.option_groups import all_names
from neat_align.cli.option_names import SPELLINGS, canonical, one_spelling
from neat_align.cli.pages import PAGES
from neat_align.errors import ConfigError

COMMANDS: dict[str, Any] = dict(typer.main.get_group(app).commands)
VERBS = sorted(COMMANDS)
# `expand --output` is the data set, --output_dir the folder in which it is made.
NOT_THE_SAME = {(verb, "output") for verb in ("expand", "export", "init", "merge")}
# Options of a verb that are no option of a run. A name that is new here must not be another word
# for something that there is.
OF_A_VERB = {
    "capability": {"base", "tasks", "limit", "include_path", "batch_size"},
    "compare": {"config", "json"},
    "demo": {"overwrite", "no_overwrite"},
    "doctor": set(),
    "evaluate": {"config"},
    "expand": {
        "config",
        "output",
        *("form", "format"),
        "engine",
        "num_workers",
        "gpus_per_worker",
        "num_reward_workers",
        "gpus_per_reward_worker",
        "shard_prompts",
        "ray_address",
    },
    "export": {
        *("output", "format", "for", "rounds", "pairs", "allow_negative", "allow_cut"),
        *("card", "overwrite", "public"),
    },
    "init": {"output", "measure"},
    "merge": {"output"},
    "push": {"repo", "public", "revision", "message"},
    "inspect": {"limit", "origin", "sort", "search"},
    "probe": {"prompts", "samples", "alpha", "pairs", "min_p"},
    "report": set(),
    "train": {"config", "dry_run"},
}


def spelled(param: Any) -> set[str]:
    """An option's names, with underscores and without the dashes before them."""
    names = [*param.opts, *param.secondary_opts]
    return {name[2:].replace("-", "_") for name in names if name.startswith("--")} - {"help"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_calls_a_thing_what_a_run_calls_it_and_takes_every_spelling(verb: str) -> None:
    own = set()
    for param in COMMANDS[verb].params:
        names = spelled(param)
        for name in names:
            if (verb, name) in NOT_THE_SAME:
                own.add(name)
                continue
            meant = canonical(name)
            if meant not in all_names():
                own.add(name)
            elif meant in SPELLINGS:
                assert names == {meant, *SPELLINGS[meant]}, f"{verb} --{name}"
    assert own == OF_A_VERB[verb]


@pytest.mark.parametrize("verb", VERBS)
def test_dashes_and_underscores_are_one(verb: str) -> None:
    normal = COMMANDS[verb].context_settings["token_normalize_func"]
    assert normal("max-completion-length") == "max_completion_length"


def test_what_takes_a_runs_options_lets_them_through() -> None:
    for verb in VERBS:
        lets_through = COMMANDS[verb].context_settings.get("ignore_unknown_options", False)
        assert lets_through == bool(PAGES[verb].run_options), verb


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--model", "m", "--data=d"], ["--model_name_or_path", "m", "--dataset_name=d"]),
        (["--reward", "a", "b"], ["--reward_funcs", "a", "b"]),
        (["--max-kl", "1", "--", "--model"], ["--max-kl", "1", "--", "--model_name_or_path"]),
    ],
)
def test_arguments_under_their_own_names(given: list[str], read: list[str]) -> None:
    assert one_spelling(given) == read


def test_a_comparison_takes_the_short_names_and_the_command_line_wins(tmp_path: Path) -> None:
    raw = {
        "name": "mine",
        "settings": {"model": "a", "data": "demo", "rewards": ["vader"]},
        "seeds": [0],
        "methods": {"dpo": {"bank": "honesty"}},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    spec = read_spec(path, ["--model", "b"])
    assert spec.settings == {
        "model_name_or_path": "b",
        "dataset_name": "demo",
        "reward_funcs": ["vader"],
    }
    assert spec.methods[1].settings["instruction_bank"] == "honesty"
    with pytest.raises(ConfigError, match="--model_name_or_path is given twice"):
        read_spec(path, ["--model", "b", "--model-name-or-path", "c"])
    raw["settings"] |= {"model_name_or_path": "b"}  # type: ignore[operator]
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine.yaml:\d: model and model_name_or_path are one"):
        read_spec(path)
