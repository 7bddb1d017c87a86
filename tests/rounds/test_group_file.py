"""A round's groups as a file: what is read a few at a time is what was written all at once."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from neat_align.errors import DataError
from neat_align.files.atomic import write_table
from neat_align.learning.current_round import CurrentRoundDataset
from neat_align.rounds.completions import (
    Completion,
    CompletionGroup,
    groups_to_table,
    read_groups,
    reward_names_of,
)
from neat_align.rounds.export_file import write_rows
from neat_align.rounds.exports import ROW_FORMS, RowRules, rows_of
from neat_align.rounds.group_file import ROW_GROUP, GroupFile, without_tokens, write_groups
from neat_align.rounds.round_files import read_round

EARLIER = Path(__file__).resolve().parents[1] / "fixtures" / "run_before_rooms" / "finished"


def group(i: int, *, text_prompt: bool = False) -> CompletionGroup:
    """A group that holds its number wherever it can, with one, two or three completions."""
    completions = tuple(
        Completion(
            ("positive", "negative", "plain")[k],
            k,
            f"Answer {i}/{k}.",
            tuple(range(i % 7 + k + 1)),
            instruction=None if k == 2 else f"Be number {k}.",
            seed=2**63 + i,
            sampling_logprob=-float(i),
            ref_logprobs=(-0.5,) * (i % 7 + k + 1),
            reward=None if (i + k) % 5 == 0 else i / 8 + k,
            reward_components=(None, i / 8),
        )
        for k in range(1 + i % 3)
    )
    prompt: Any = f"Q{i}" if text_prompt else [{"role": "user", "content": f"Q{i}"}]
    return CompletionGroup(f"id-{i}", prompt, (i, i + 1), completions)


GROUPS = [group(i) for i in range(2 * ROW_GROUP + 22)]


def written(path: Path, groups: list[CompletionGroup]) -> Path:
    with path.open("wb") as file:
        assert write_groups(file, groups, ["a", "b"]) == len(groups)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("groups") / "groups.parquet", GROUPS)


@pytest.mark.parametrize("count", [0, 1, ROW_GROUP - 1, ROW_GROUP, ROW_GROUP + 1, len(GROUPS)])
def test_it_is_the_sequence_of_what_was_written(tmp_path: Path, count: int) -> None:
    groups = GROUPS[:count]
    file = GroupFile(written(tmp_path / "groups.parquet", groups))
    assert len(file) == count
    assert list(file) == groups == read_groups(file.path)
    assert [file[i] for i in range(count)] == groups
    assert [file[i - count] for i in range(count)] == groups
    assert file[3:80:7] == groups[3:80:7]
    assert file[:2] == groups[:2]
    for outside in (count, -count - 1):
        with pytest.raises(IndexError, match=f"group {outside} of {count}"):
            file[outside]
    assert reward_names_of(pq.read_table(file.path)) == ["a", "b"]


def test_text_prompts_and_conversations_of_different_row_groups_are_refused(tmp_path: Path) -> None:
    mixed = [*GROUPS[:ROW_GROUP], group(0, text_prompt=True)]
    with pytest.raises(DataError, match="mix text prompts and conversations"):
        written(tmp_path / "groups.parquet", mixed)


def test_files_that_hold_the_same_groups_are_equal(path: Path, tmp_path: Path) -> None:
    file, again = GroupFile(path), GroupFile(written(tmp_path / "other.parquet", GROUPS))
    assert file == again
    assert file == list(again)
    assert file == GROUPS
    assert tuple(GROUPS) == file
    changed = [*GROUPS[:-1], replace(GROUPS[-1], prompt_id="another")]
    assert file != changed
    assert file != GROUPS[:-1]
    assert file != "groups"
    assert repr(file) == f"GroupFile({str(path)!r}, {len(GROUPS)} groups)"


# ---- how it is read ------------------------------------------------------------------------------


class Opened(GroupFile):
    """Counts how often the file is opened: once for a row group, once for a pass."""

    opened = 0

    def _open(self) -> Any:
        self.opened += 1
        return super()._open()


def test_each_row_group_is_read_once_in_order_and_lately_read_ones_are_kept(path: Path) -> None:
    file = Opened(path)
    assert [file[i] for i in range(len(file))] == GROUPS
    assert file.opened == 3
    for i in (5, 149, 70, 64, 0, -1):
        assert file[i] == GROUPS[i]
    assert file.opened == 3
    assert list(file) == GROUPS
    assert file.opened == 4


def test_only_a_few_row_groups_are_kept(tmp_path: Path) -> None:
    many = [group(i) for i in range(12 * ROW_GROUP)]
    file = Opened(written(tmp_path / "groups.parquet", many))
    for i in range(0, len(many), ROW_GROUP):
        file[i]
    assert (file.opened, len(file._read)) == (12, 8)
    assert file[0] == many[0]  # gone, and read again
    assert file.opened == 13


def test_a_pass_without_tokens_has_what_ranks_and_nothing_else(path: Path) -> None:
    said = ("finish_reason", "seed", "reward_components")
    for texts in (False, True):
        for got, whole in zip(GroupFile(path).without_tokens(texts=texts), GROUPS, strict=True):
            assert got.prompt_ids == ()
            assert got.prompt == (whole.prompt if texts else "")
            for c, w in zip(got.completions, whole.completions, strict=True):
                assert c == Completion(
                    w.origin,
                    w.index,
                    w.text if texts else "",
                    (),
                    instruction=w.instruction,
                    reward=w.reward,
                    **{f: getattr(w, f) for f in said if texts or f == "reward_components"},
                )
    assert list(without_tokens(GROUPS)) == GROUPS  # in memory already


def test_the_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    old = read_groups(EARLIER / "rounds" / "00000" / "groups.parquet")
    made = read_round(EARLIER / "rounds" / "00000")
    assert made is not None
    assert made.groups == old
    assert [made.groups[i] for i in range(len(old))] == old
    # All groups in one row group, as earlier versions wrote them.
    write_table(tmp_path / "big.parquet", groups_to_table(GROUPS))
    file = Opened(tmp_path / "big.parquet")
    assert file._contents.num_row_groups == 1
    assert list(file) == GROUPS
    assert [file[i] for i in range(len(file))] == GROUPS
    assert file.opened == 2


# ---- in other processes --------------------------------------------------------------------------


def test_it_goes_to_other_processes(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(path.parent)
    file = GroupFile(path.name)
    file[3]
    sent = pickle.dumps(file)
    assert len(sent) < 1000  # neither the groups nor the table of contents
    monkeypatch.chdir(tmp_path)  # the path is not relative to where somebody is
    assert pickle.loads(sent) == file == GROUPS


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_read_the_groups(path: Path, start: str) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this machine cannot {start}")
    data = CurrentRoundDataset(len(GROUPS))
    data.groups = GroupFile(path)
    assert data[70] == GROUPS[70]  # the parent has read something before they begin
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=10,
        num_workers=1 if start == "spawn" else 2,
        collate_fn=list,
        multiprocessing_context=start,
    )
    assert [g for batch in loader for g in batch] == GROUPS


# ---- damage --------------------------------------------------------------------------------------


def test_damage_and_a_lost_file_are_named(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "groups.parquet"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 1
    copy.write_bytes(whole)

    def first_error(reads: Iterator[Any]) -> str:
        with pytest.raises(DataError) as raised:
            list(reads)
        return str(raised.value)

    damaged = GroupFile(copy)
    for reads in (iter(damaged), (damaged[i] for i in range(len(damaged)))):
        said = first_error(reads)
        assert str(copy) in said
        assert "could not be read as groups" in said
        assert "it is damaged, or not a group file" in said
    copy.unlink()
    said = first_error(iter(damaged))
    assert said == f"{copy} is gone: the groups of a round are read from it as they are needed"
    pq.write_table(pq.read_table(path).drop_columns(["seeds"]), copy)
    with pytest.raises(DataError, match="not a group file: columns seeds are missing"):
        GroupFile(copy)


def test_no_damaged_byte_is_read_as_something_else(path: Path, tmp_path: Path) -> None:
    """Compressed pages often decompress all the same: their checksums are looked at."""
    whole, copy = path.read_bytes(), tmp_path / "groups.parquet"
    refused = 0
    for place in range(50, len(whole) - pq.read_metadata(path).serialized_size - 50, 97):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        copy.write_bytes(damaged)
        try:
            assert list(GroupFile(copy)) == GROUPS, place
        except DataError:
            refused += 1
    assert refused > 50


# ---- data sets of it -----------------------------------------------------------------------------

RULES = RowRules(allow_negative_chosen=True, allow_cut_chosen=True)


@pytest.mark.parametrize("text_prompt", [False, True])
@pytest.mark.parametrize("form", ROW_FORMS)
def test_rows_are_written_as_they_are_made(tmp_path: Path, form: Any, *, text_prompt: bool) -> None:
    groups = [group(i, text_prompt=text_prompt) for i in range(600)]  # three chunks
    rows = [row for g in groups for row in rows_of(g, form, RULES)]
    assert len(rows) > 256
    for name in ("a.parquet", "a.jsonl"):
        with (tmp_path / name).open("wb") as file:
            counts = write_rows(file, iter(groups), form, RULES, as_lines=name.endswith("l"))
        assert (counts.rows, counts.groups) == (len(rows), 600)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    read = [json.loads(line) for line in lines]
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == read
    if form == "kto":  # dealt: neighbours are of different prompts
        assert read != rows
        read, rows = (sorted(found, key=str) for found in (read, rows))
    assert read == rows


@pytest.mark.parametrize("form", ROW_FORMS)
def test_rows_without_rewards_have_the_columns_of_the_others(tmp_path: Path, form: Any) -> None:
    silent = [
        replace(g, completions=tuple(replace(c, reward=None) for c in g.completions))
        for g in GROUPS[:20]
    ]
    for name, groups in (("silent", silent), ("all", GROUPS), ("none", [])):
        with (tmp_path / name).open("wb") as file:
            write_rows(file, groups, form, replace(RULES, rank_by="origin"))
    kept = [pq.read_schema(tmp_path / name) for name in ("silent", "all")]
    assert kept[0] == kept[1]
    assert pq.read_schema(tmp_path / "none").names == kept[0].names
    assert pq.read_table(tmp_path / "silent").num_rows > 0
