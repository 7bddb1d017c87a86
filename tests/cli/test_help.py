"""Every verb explains itself in one form, within 80 columns, and asking costs no heavy import."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields

import pytest
import typer
from transformers import TrainingArguments

from neat_align import NEATConfig
from neat_align.cli import app, main
from neat_align.cli.option_facts import every_option, facts_of, our_options
from neat_align.cli.option_groups import GROUPS, TRAINER_GROUPS, all_names
from neat_align.cli.pages import PAGES
from neat_align.config.constraints import default_of
from neat_align.config.trainer_values import CHOICES
from neat_align.config.unsupported import REFUSED, SCRIPT_OPTIONS
from neat_align.script_arguments import ScriptArguments

VERBS = sorted(typer.main.get_group(app).commands)
OF_A_RUN = sorted(name for name in VERBS if PAGES[name].run_options)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*words])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_verbs_are_these() -> None:
    assert VERBS == [
        "capability",
        "compare",
        "demo",
        "doctor",
        "evaluate",
        "expand",
        "export",
        "init",
        "inspect",
        "merge",
        "probe",
        "push",
        "report",
        "train",
    ]


def test_the_first_page_has_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(PAGES) == VERBS  # a new verb needs a page
    page = shown(capsys, "--help")
    assert "\n  --install-completion\n" in page
    assert sorted(re.findall(r"^  (\w+) ", page, flags=re.MULTILINE)) == VERBS
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert (stopped.value.code, capsys.readouterr().out) == (2, page)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["expand", "--help"]])
def test_help_imports_neither_torch_nor_transformers(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from neat_align.cli import main\n"
        "try:\n"
        f"    main({words})\n"
        "except SystemExit as stopped:\n"
        "    assert stopped.code == 0, stopped.code\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert "Usage: neat-align" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_usage_examples_and_its_options_within_80_columns(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = shown(capsys, verb, "--help")
    assert page.startswith(f"Usage: neat-align {verb}")
    examples = page.partition("\nExamples:\n")[2].partition("\n\n")[0]
    assert f"  neat-align {verb}" in examples
    assert "\n  --help\n" in page
    assert max(map(len, page.splitlines())) <= 80
    listed = re.findall(r"^  (--[\w-]+)", page.partition("Examples:")[2], flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    command = typer.main.get_group(app).commands[verb]
    own = {"--" + str(p.name) for p in command.params if str(p.opts[0]).startswith("--")}
    assert len(own - set(re.findall(r"--\w+", page))) <= 2  # `bank` is --instruction_bank


@pytest.mark.parametrize("verb", VERBS)
def test_an_example_uses_options_that_there_are(verb: str) -> None:
    command = typer.main.get_group(app).commands[verb]
    own = {o.replace("-", "_") for p in command.params for o in p.opts}
    own |= {name.replace("-", "_") for names, _, _ in PAGES[verb].more for name in names}
    if PAGES[verb].run_options:
        from neat_align.cli.completion import run_flags

        own |= {flag.replace("-", "_") for flag in run_flags()}
    used = re.findall(r"--[\w-]+", " ".join(PAGES[verb].examples))
    assert {name.replace("-", "_") for name in used} <= own


# ---- a run's options -----------------------------------------------------------------------------


def test_every_option_of_a_run_stands_in_exactly_one_group() -> None:
    declared = {f.name for kind in (ScriptArguments, NEATConfig) for f in fields(kind) if f.init}
    assert sorted(all_names()) == sorted(declared - {"hub_token", *REFUSED, *SCRIPT_OPTIONS})


def test_our_own_options_stand_on_the_first_page_and_cost_no_import() -> None:
    theirs = {f.name for f in fields(TrainingArguments)}
    ours = {f.name for f in fields(NEATConfig)} | {f.name for f in fields(ScriptArguments)}
    first = {name for names in GROUPS.values() for name in names}
    hidden = {"hub_token", *REFUSED, *SCRIPT_OPTIONS}
    assert ours - theirs - hidden <= first
    assert first <= {*our_options()}
    assert not first & {name for names in TRAINER_GROUPS.values() for name in names}


def test_what_is_said_of_an_option_of_transformers_is_true() -> None:
    declared = {f.name: f for f in fields(NEATConfig)}
    for name, facts in our_options().items():
        if name not in declared:
            continue
        true = facts_of(declared[name])
        assert (facts.is_list, facts.is_switch) == (true.is_list, true.is_switch), name
        if name == "output_dir":
            assert facts.default == f"default: {NEATConfig().output_dir}"
        else:
            assert facts.default == true.default, name
        assert set(facts.choices) <= set(CHOICES.get(name, facts.choices))


def test_train_shows_its_options_and_help_all_every_one_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first, every = shown(capsys, "train", "--help"), shown(capsys, "train", "--help_all")
    listed = [re.findall(r"^  --(\w+)", page, flags=re.MULTILINE)[:] for page in (first, every)]
    of_train = {"config", "dry_run", "help"}
    assert [n for n in listed[0] if n not in of_train] == [n for ns in GROUPS.values() for n in ns]
    assert [n for n in listed[1] if n not in of_train] == all_names()
    assert max(len(line) for line in every.splitlines() if "https://" not in line) <= 80
    assert "\nEssentials\n  --model_name_or_path, --model TEXT [required]\n" in first
    assert "  --on_bad_row error|skip [default: error]\n" in first
    assert "  --learning_rate FLOAT [default: 1e-05]\n" in first


@pytest.mark.parametrize("verb", OF_A_RUN)
def test_help_all_of_a_verb_that_takes_a_runs_options_has_all(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = re.findall(r"^  --(\w+)", shown(capsys, verb, "--help-all"), flags=re.MULTILINE)
    assert set(all_names()) <= set(names)


def test_a_default_is_the_declared_one() -> None:
    known = every_option()
    assert known["lora_r"].default == f"default: {default_of(_field('lora_r'))}"
    assert known["max_kl"].default == ""
    assert known["bf16"].default == "default: true"


def _field(name: str) -> object:
    return next(f for f in fields(ScriptArguments) if f.name == name)
