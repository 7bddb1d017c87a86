"""`neat-align export` from a run, a round, an expansion, a file of groups; and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from neat_align.cli import main
from neat_align.files.atomic import write_json
from neat_align.rounds.group_file import GroupFile, write_groups
from run_files import build_run, change_json

Export = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("made") / "demo", groups=12, prompts=2)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run of three rounds with twelve groups each, in a folder of its own."""
    return Path(shutil.copytree(made, tmp_path / "runs" / "demo"))


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Export:
    """Runs the command; gives what it says, on stderr where it refuses (code 2)."""

    def called(*words: Any, code: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(["export", *map(str, words)])
        said = capsys.readouterr()
        assert done.value.code == code, said
        return said.out if code == 0 else said.err

    return called


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(path: Path, groups: Any) -> Path:
    with path.open("wb") as file:
        write_groups(file, groups, ["tone"])
    return path


def changed(run: Path, path: Path, **changes: Any) -> Path:
    """A file of the run's first groups, with every completion changed."""
    groups = list(GroupFile(run / "rounds" / "00000" / "groups.parquet"))
    return written(
        path,
        [
            replace(g, completions=tuple(replace(c, **changes) for c in g.completions))
            for g in groups
        ],
    )


# ---- where groups come from ----------------------------------------------------------------------


def test_a_run_gives_the_rows_of_all_its_rounds_beside_it(run: Path, export: Export) -> None:
    said = export(run)
    rows = lines_of(run.with_name("demo-preference.jsonl"))
    assert said.startswith("36 rows (preference) of 36 groups in ")
    assert len(rows) == 36
    assert {row["prompt_id"][:5] for row in rows} == {"id-0-", "id-1-", "id-2-"}
    assert all(row["origin_chosen"] in ("positive", "chosen") for row in rows)
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert "written to be harmful, on purpose" in said


def test_rounds_are_chosen_by_number(run: Path, tmp_path: Path, export: Export) -> None:
    for wanted, expected in (("1", {"1"}), ("0,2", {"0", "2"}), ("1-2", {"1", "2"})):
        output = tmp_path / f"{wanted}.jsonl"
        export(run, "--rounds", wanted, "--output", output)
        assert {row["prompt_id"][3] for row in lines_of(output)} == expected
    assert "rounds is '7' and" in export(run, "--rounds", "7", "--output", tmp_path / "o", code=2)
    assert "holds 0, 1, 2" in export(run, "--rounds", "0-5", "--output", tmp_path / "o", code=2)
    for wrong in ("x", "2-", "-", "1;2"):
        assert "write numbers and ranges" in export(run, f"--rounds={wrong}", code=2)
    assert "goes down" in export(run, "--rounds", "2-1", code=2)


def test_a_round_and_a_file_of_groups_give_the_same(
    run: Path, tmp_path: Path, export: Export
) -> None:
    folder = run / "rounds" / "00001"
    outputs = []
    for i, source in enumerate((folder, folder / "groups.parquet")):
        outputs.append(tmp_path / f"{i}.jsonl")
        export(source, "--format", "kto", "--output", outputs[-1])
    export(run, "--rounds", "1", "--format", "kto", "--output", tmp_path / "2.jsonl")
    texts = {path.read_text() for path in (*outputs, tmp_path / "2.jsonl")}
    assert len(texts) == 1


def test_an_expansions_data_set_leads_to_its_groups(
    run: Path, tmp_path: Path, export: Export
) -> None:
    run.rename(tmp_path / "data-run")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    export(tmp_path / "data.jsonl", "--format", "sft")
    assert len(lines_of(tmp_path / "data-sft.jsonl")) == 36


def test_the_runs_own_ranking_holds_unless_another_is_asked_for(
    run: Path, tmp_path: Path, export: Export
) -> None:
    change_json(run / "run.json", config={"rank_by": "origin", "reward_margin": 0.0})
    export(run, "--output", tmp_path / "own.jsonl")
    export(run, "--output", tmp_path / "asked.jsonl", "--rank_by", "reward")
    own, asked = (lines_of(tmp_path / f"{name}.jsonl") for name in ("own", "asked"))
    assert all(row["origin_rejected"] in ("negative", "rejected") for row in own)
    assert own != asked
    change_json(run / "run.json", config={"rank_by": "reward", "reward_margin": 1.0})
    said = export(run, "--output", tmp_path / "margin.jsonl")
    assert min(row["score_margin"] for row in lines_of(tmp_path / "margin.jsonl")) > 1.0
    assert re.search(r"\d+ groups left out: no gap above 1", said)
    export(run, "--output", tmp_path / "all.jsonl", "--reward-margin", "0", "--pairs", "all")
    assert len(lines_of(tmp_path / "all.jsonl")) > 100


# ---- files and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["preference", "ranked", "kto", "sft", "reward"])
def test_a_folder_is_a_data_set_with_a_card_that_the_hubs_library_loads(
    run: Path, tmp_path: Path, export: Export, form: str
) -> None:
    folder = tmp_path / "out"
    export(run, "--format", form, "--output", f"{folder}/")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "train.parquet"]
    card = DatasetCard.load(folder / "README.md")
    assert card.data.pretty_name == "out"
    assert "not-for-all-audiences" in (card.data.tags or [])
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    columns = re.findall(r"^\| `(\w+)` \| \w", card.text, re.MULTILINE)
    assert columns == loaded["train"].column_names
    assert len(loaded["train"]) == int(re.findall(r"^(\d+) rows", card.text, re.MULTILINE)[0])
    assert str(tmp_path) not in card.content


def test_llama_factory_gets_its_description_in_the_folder(
    run: Path, tmp_path: Path, export: Export
) -> None:
    said = export(run, "--for", "llamafactory", "--output", f"{tmp_path}/lf/")
    info = json.loads((tmp_path / "lf" / "dataset_info.json").read_text())
    assert info["train"]["file_name"] == "train.parquet"
    assert f"dataset_dir: {tmp_path}/lf" in said
    told = export(run, "--for", "llamafactory", "--output", tmp_path / "a.jsonl")
    assert '"file_name": "a.jsonl"' in told  # printed where there is no folder of its own


def test_nothing_is_written_over_unless_asked(run: Path, tmp_path: Path, export: Export) -> None:
    output = tmp_path / "mine.jsonl"
    output.write_text("mine")
    assert "is there already" in export(run, "--output", output, code=2)
    assert output.read_text() == "mine"
    export(run, "--output", output, "--overwrite")
    assert len(lines_of(output)) == 36


def test_a_readme_of_somebodys_own_stays(run: Path, tmp_path: Path, export: Export) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# My project")
    words = [run, "--output", tmp_path / "a.jsonl", "--card", "--overwrite"]
    assert "is no data card of neat-align's" in export(*words, code=2)
    assert readme.read_text() == "# My project"
    assert not (tmp_path / "a.jsonl").exists()
    readme.unlink()
    export(*words)
    export(*words)  # a card of ours is written again
    assert "Content warning" in readme.read_text()


def test_a_file_has_no_card_unless_asked(run: Path, tmp_path: Path, export: Export) -> None:
    export(run, "--output", tmp_path / "only" / "a.parquet")
    assert [p.name for p in (tmp_path / "only").iterdir()] == ["a.parquet"]
    assert pq.read_table(tmp_path / "only" / "a.parquet").num_rows == 36


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "a.csv"], "end it in .jsonl or .parquet, or in / for a folder"),
        (["--pairs", "all", "--format", "kto"], "format is kto, which has no pairs"),
        (["--reward_margin", "1", "--format", "sft"], "which compares no two answers"),
        (["--reward_margin", "-1"], "reward_margin is -1; it must be 0 or more"),
        (["--reward_margin", "nan"], "reward_margin is nan; it must be 0 or more"),
        (["--public"], "public is given and push_to_hub is not"),
        (["--for", "openrlhf", "--format", "kto"], "OpenRLHF no longer trains on"),
        (["--format", "dpo"], "'dpo' is not one of"),
        (["--push_to_hub", "me/../x"], "it must be a hub name, such as me/my-pairs"),
        (["--push_to_hub", "me/pairs"], "HF_HUB_OFFLINE is set, which lets nothing out"),
    ],
)
def test_wrong_options_are_told_before_anything_is_written(
    run: Path, export: Export, words: list[str], said: str
) -> None:
    assert said in " ".join(export(run, *words, code=2).replace("│", " ").split())
    assert [p.name for p in run.parent.iterdir()] == ["demo"]


def test_a_run_without_rounds_says_so(run: Path, tmp_path: Path, export: Export) -> None:
    for manifest in run.glob("rounds/*/manifest.json"):
        manifest.unlink()
    assert "holds no finished round" in export(run, code=2)
    assert "there is nothing at" in export(tmp_path / "nowhere", code=2)
    assert "neither a run" in export(run.parent, code=2)
    empty = written(tmp_path / "empty.parquet", [])
    assert "holds no group: nothing can be exported" in export(empty, code=2)


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_a_file_that_holds_no_groups_says_where_they_are(
    run: Path, tmp_path: Path, export: Export, name: str
) -> None:
    export(run, "--output", tmp_path / name)
    said = export(tmp_path / name, "--format", "kto", code=2)
    assert "data.jsonl is not a file of groups" in said.replace("parquet is", "jsonl is")
    assert "data-run is not there): give a run's output_dir" in said


@pytest.mark.parametrize(
    ("changes", "form", "said"),
    [
        (
            {"reward": None},
            "preference",
            "12 x no two answers to a prompt have a reward: --rank-by",
        ),
        ({"reward": 1.0}, "kto", "12 x no answer stands above another by more than the margin"),
        (
            {"finish_reason": "length"},
            "sft",
            "12 x what stands above was cut at max_completion_len",
        ),
        ({"origin": "negative"}, "reward", "12 x what stands above was written under a negative"),
    ],
)
def test_groups_that_give_no_row_say_what_to_change(
    run: Path, tmp_path: Path, export: Export, changes: dict[str, Any], form: str, said: str
) -> None:
    source = changed(run, tmp_path / "groups.parquet", **changes)
    output = tmp_path / "out.jsonl"
    told = export(source, "--format", form, "--output", output, code=2)
    assert f"the 12 groups give no row of format {form}, and nothing is written" in told
    assert said in told
    assert not output.exists()
    fix = {"no two": ["--rank-by", "origin"], "cut": ["--allow-cut"], "under": ["--allow-negative"]}
    for word, words in fix.items():
        if word in said:
            export(source, "--format", form, "--output", output, *words)


def test_labels_of_one_kind_are_told(run: Path, tmp_path: Path, export: Export) -> None:
    source = changed(run, tmp_path / "groups.parquet", finish_reason="length")
    said = export(source, "--format", "kto", "--output", tmp_path / "a.jsonl")
    assert "  0 desirable, " in said
    assert "KTO needs both labels" in said
    both = export(run, "--format", "kto", "--output", tmp_path / "b.jsonl")
    assert "KTO needs both labels" not in both


# ---- the card ------------------------------------------------------------------------------------


def test_the_card_says_what_the_numbers_are(run: Path, tmp_path: Path, export: Export) -> None:
    config = {
        "instruction_bank": "/home/me/banks/mine.yaml",
        "rank_by": "reward",
        "num_positive": 2,
        "num_negative": 2,
        "num_plain": 0,
        "temperature": 0.7,
    }
    change_json(run / "run.json", config=config)
    change_json(run / "result.json", model=str(tmp_path / "weights"), dataset="prompts.jsonl")
    export(run, "--rounds", "0", "--output", f"{tmp_path}/out/")
    card = (tmp_path / "out" / "README.md").read_text()
    groups = list(GroupFile(run / "rounds" / "00000" / "groups.parquet"))
    for origin, count in (("positive", 24), ("negative", 24), ("chosen", 12), ("rejected", 12)):
        rewards = [c.reward for g in groups for c in g.completions if c.origin == origin]
        mean = sum(r for r in rewards if r is not None) / count
        assert f"| {origin} | {count} | {mean:.3f} |" in card
    for line in (
        "| written by | a local model |",
        "| prompts from | a local data set |",
        "| instruction bank | a local bank |",
        "| rewards | tone |",
        "| answers to a prompt | 2 positive, 2 negative |",
        "| seed | 42 |",
        "| rounds | 00000 |",
        "| negative | 12 | Answer rudely. |",
        "mean reward (tone)",
    ):
        assert line in card
    assert "12 of the answers here are of that kind" in card
    assert "/home/me" not in card
    assert str(tmp_path) not in card


def test_the_card_has_a_mean_for_each_reward_function(
    run: Path, tmp_path: Path, export: Export
) -> None:
    groups = [
        replace(
            g,
            completions=tuple(
                replace(c, reward_components=(1.0, 0.5 if c.origin == "positive" else None))
                for c in g.completions
            ),
        )
        for g in GroupFile(run / "rounds" / "00000" / "groups.parquet")
    ]
    with (tmp_path / "groups.parquet").open("wb") as file:
        write_groups(file, groups, ["tone", "https://host.intern/score"])
    export(tmp_path / "groups.parquet", "--output", f"{tmp_path}/out/")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| mean reward | mean of tone | mean of a reward server |" in card
    assert re.search(r"\| positive \| 24 \| [\d.-]+ \| 1.000 \| 0.500 \|", card)
    assert re.search(r"\| negative \| 24 \| [\d.-]+ \| 1.000 \| – \|", card)
    assert "host.intern" not in card


def test_hostile_names_stay_text_in_the_card(run: Path, tmp_path: Path, export: Export) -> None:
    mark = "x |\n<script>alert(1)</script> [a](http://evil) **b**"
    source = changed(run, tmp_path / "groups.parquet", instruction=mark)
    write_json(tmp_path / "run.json", {"rewards": [mark]})
    export(source, "--output", f"{tmp_path}/out/")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card
    assert "[a](http" not in card
    assert r"x \| &lt;script&gt;" in card
