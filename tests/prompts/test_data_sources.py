"""Where rows come from: packed and several files, parts of splits, named columns, mixtures."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neat_align.errors import ConfigError, DataError
from neat_align.prompts.data_sources import mixed_records
from neat_align.prompts.dataset_config import DatasetConfig, as_dataset_config, read_split
from neat_align.prompts.loading import load_rows, stream_rows
from neat_align.prompts.skipped_rows import SkippedRows


@pytest.fixture(autouse=True)
def no_stray_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def prompts(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{i}"} for i in range(count)]


def file(path: Path, name: str = "a", count: int = 10) -> Path:
    path.write_bytes(lines(prompts(name, count)))
    return path


def read(source: Any, **options: Any) -> list[str]:
    return [str(row.prompt) for row in load_rows(source, **options)]


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(source, **options)
    return str(caught.value)


# ---- files ---------------------------------------------------------------------------------------


def by_arrow(codec: str) -> Callable[[bytes], bytes]:
    return lambda data: pa.Codec(codec).compress(data, asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": by_arrow("zstd"),
    ".lz4": by_arrow("lz4"),
}


@pytest.mark.parametrize("ending", list(PACKERS))
def test_packed_files_are_read_as_what_is_in_them(tmp_path: Path, ending: str) -> None:
    pack, expected = PACKERS[ending], [f"a{i}" for i in range(3)]
    texts = {
        ".jsonl": lines(prompts("a", 3)),
        ".json": json.dumps(prompts("a", 3)).encode(),
        ".csv": b"prompt,n\na0,1\na1,2\na2,3\n",
    }
    for suffix, content in texts.items():
        path = tmp_path / f"data{suffix}{ending}"
        path.write_bytes(pack(content))
        assert read(path) == expected
    many = pack(lines(prompts("a", 20_000)))
    path = tmp_path / f"cut.jsonl{ending}"
    for content in (many[: len(many) // 2], b"not packed at all"):
        path.write_bytes(content)
        said = refused(path)
        assert said.startswith(f"{path}: cannot be unpacked (")
        assert said.endswith("its name ends wrongly; get the file again")
    path = tmp_path / f"bad.jsonl{ending}"
    path.write_bytes(pack(lines(prompts("a", 2)) + b"{no\n"))
    assert f"{path}:3: not valid JSON" in refused(path)


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    second, first = file(tmp_path / "part-2.jsonl", "b", 2), file(tmp_path / "part-1.jsonl", "a", 2)
    pq.write_table(pa.Table.from_pylist(prompts("c", 2)), tmp_path / "deep" / "er" / "part.parquet")
    rows = load_rows(f"{tmp_path}/part-*.jsonl")
    assert [(r.prompt, r.where) for r in rows] == [
        (f"{name}{i}", f"{path}:{i + 1}")
        for name, path in (("a", first), ("b", second))
        for i in (0, 1)
    ]
    assert read(f"{tmp_path}/**/*.[pj]*") == ["c0", "c1", "a0", "a1", "b0", "b1"]
    assert read(f"{tmp_path}/part-*.jsonl", limit=3) == ["a0", "a1", "b0"]
    assert read(DatasetConfig(str(tmp_path), data_files="part-?.jsonl")) == ["a0", "a1", "b0", "b1"]
    assert read(DatasetConfig("json", data_files=[str(second), str(first)])) == [
        *("b0", "b1", "a0", "a1")
    ]
    assert f"no file is at {tmp_path}/x*.jsonl: check the path" in refused(f"{tmp_path}/x*.jsonl")
    odd = tmp_path / "data[1].jsonl"  # a name that looks like a pattern
    assert read(file(odd, "o", 1)) == ["o0"]
    assert "name is 'en', but" in refused(DatasetConfig(str(first), name="en"))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[8:]", range(8, 10)),
        ("train[2:4]", range(2, 4)),
        ("train[-3:]", range(7, 10)),
        ("train[:-8]", range(2)),
        ("train[:25%]", range(2)),
        ("train[75%:]", range(8, 10)),
        ("train[-20%:]", range(8, 10)),
        ("train[5:900]", range(5, 10)),
    ],
)
def test_parts_of_a_split_are_those_of_datasets(
    tmp_path: Path, split: str, expected: range
) -> None:
    """A file, a saved data set and `datasets` itself, which rounds as we do."""
    path = file(tmp_path / "a.jsonl")
    rows = [f"a{i}" for i in expected]
    assert read(path, split=split) == rows
    whole = datasets.Dataset.from_list(prompts("a", 10))
    datasets.DatasetDict({"train": whole}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", split=split) == rows
    found = read_split(split)
    assert found is not None
    assert [f"a{i}" for i in range(10)][found.part(10)] == rows
    theirs = datasets.ReadInstruction.from_spec(split).to_absolute({"train": 10})
    assert list(range(theirs[0].from_ or 0, 10 if theirs[0].to is None else theirs[0].to)) == list(
        expected
    )


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    path = file(tmp_path / "a.jsonl")
    assert "is a file and has no splits: remove split" in refused(path, split="test[:2]")
    assert "no rows" in refused(path, split="train[20:]")
    for wrong in ("train[", "train[:x]", "train[1]", "[:3]"):
        with pytest.raises(ConfigError, match=r"split is .*must be a split's name, or a part"):
            as_dataset_config({"path": "a", "split": wrong}, "datasets[0]")


# ---- columns -------------------------------------------------------------------------------------


def test_columns_get_the_names_that_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"question": "q?", "good": "g", "bad": "b", "prompt": "not this", "score": 3},
        {"question": "r?", "good": "h", "score": 4},
    ]
    path.write_bytes(lines(rows))
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "topic": "score"}
    first, second = load_rows(DatasetConfig(str(path), columns=columns))
    assert (first.prompt, first.chosen, first.rejected) == ("q?", "g", "b")
    assert first.columns == {"topic": 3}
    assert (second.prompt, second.chosen, second.rejected) == ("r?", "h", None)
    csv = tmp_path / "a.csv"
    csv.write_text("question,good,id\nq?,g,\nr?,,7\n")
    with_csv = DatasetConfig(str(csv), columns={"prompt": "question", "chosen": "good"})
    one, two = load_rows(with_csv)
    assert (one.prompt, one.chosen, two.chosen, two.id) == ("q?", "g", None, "7")
    assert "(columns: {prompt: …} says which one is the prompt)" in refused(csv)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    swapped = {"prompt": "question", "chosen": "bad", "rejected": "good"}
    row = load_rows(DatasetConfig(str(tmp_path / "a.parquet"), columns=swapped))[0]
    assert (row.chosen, row.rejected, row.columns) == ("b", "g", {"score": 3})
    kept = load_rows(DatasetConfig(str(path), split="train[:1]", columns=["prompt", "score"]))
    assert [(r.prompt, r.columns) for r in kept] == [("not this", {"score": 3})]


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"question": "q?", "good": "g"}, {"question": "r?", "score": 1}]))
    for columns, said in (
        ({"prompt": "questoin"}, "columns reads prompt from 'questoin'"),
        ({"prompt": "question", "chosen": "best"}, "columns reads chosen from 'best'"),
        (["question", "best"], "columns keeps 'best'"),
    ):
        assert refused(DatasetConfig(str(path), columns=columns)) == (
            f"{path}: {said}, and no row has that column; there are question, good, score: correct "
            "columns"
        )
    columns = {"prompt": "question", "chosen": "good"}
    assert len(load_rows(DatasetConfig(str(path), columns=columns))) == 2


# ---- mixtures ------------------------------------------------------------------------------------


def mixture(tmp_path: Path, *shares: tuple[str, int, float | None]) -> list[DatasetConfig]:
    return [
        DatasetConfig(str(file(tmp_path / f"{name}.jsonl", name, count)), fraction=fraction)
        for name, count, fraction in shares
    ]


def counted(rows: list[str]) -> dict[str, int]:
    return Counter(row[0] for row in rows)


def test_without_fractions_all_rows_of_all_are_taken(tmp_path: Path) -> None:
    sources = mixture(tmp_path, ("a", 3, None), ("b", 2, None))
    assert read(sources) == ["a0", "a1", "a2", "b0", "b1"]


def test_fractions_are_shares_of_every_stretch(tmp_path: Path) -> None:
    sources = mixture(tmp_path, ("a", 90, 3), ("b", 90, 1))
    rows = read(sources)
    assert counted(rows) == {"a": 90, "b": 30}  # a runs out; what is left of b is not used
    assert [row for row in rows if row[0] == "a"] == [f"a{i}" for i in range(90)]
    for start in range(0, 120, 4):
        assert counted(rows[start : start + 4]) == {"a": 3, "b": 1}
    assert read(sources, limit=40) == rows[:40]
    assert read(sources) == rows


def test_the_mixture_is_as_large_as_trls(tmp_path: Path) -> None:
    """TRL 1.16: the largest mixture of these shares in which no row comes twice."""
    trl = pytest.importorskip("trl", reason="the comparison needs trl: pip install -e '.[bench]'")
    shares: list[tuple[str, int, float | None]] = [("a", 50, 0.5), ("b", 30, 0.2), ("c", 40, 0.3)]
    sources = mixture(tmp_path, *shares)
    entries: list[Any] = [
        {"path": "json", "data_files": source.path, "fraction": source.fraction}
        for source in sources
    ]
    theirs = trl.get_dataset(trl.DatasetMixtureConfig(datasets=entries))["train"]["prompt"]
    rows = read(sources)
    assert counted(rows) == counted(theirs) == {"a": 50, "b": 20, "c": 30}
    assert sorted(rows) == sorted(theirs)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4))
def test_shares_are_kept_to_about_one_row(sets: list[tuple[int, int]]) -> None:
    total = sum(weight for _, weight in sets)
    sources = [DatasetConfig(str(i), fraction=weight) for i, (_, weight) in enumerate(sets)]
    drawn = draw(sources, [count for count, _ in sets])
    taken = [0] * len(sets)
    for place, index in enumerate(drawn, 1):
        taken[index] += 1
        for (_, weight), has in zip(sets, taken, strict=True):
            assert abs(has - place * weight / total) < 2
    assert any(has == count for (count, _), has in zip(sets, taken, strict=True))
    assert all(has <= count for (count, _), has in zip(sets, taken, strict=True))


def draw(sources: list[DatasetConfig], counts: list[int]) -> list[int]:
    import neat_align.prompts.data_sources as module

    def records(source: DatasetConfig, *, streaming: bool = False) -> Iterator[Any]:
        return iter([("", {})] * counts[int(source.path)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "records_of", records)
        return [index for index, _ in mixed_records(sources)]


def test_ids_and_forms_are_each_data_sets_own(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    turn = [{"role": "user", "content": "b?"}]
    a.write_bytes(lines([{"id": 1, "prompt": "a?", "chosen": "x", "rejected": "y"}]))
    answer = [{"role": "assistant", "content": "z"}]
    b.write_bytes(lines([{"id": 1, "prompt": turn, "chosen": answer}]))
    sources = [DatasetConfig(str(a)), DatasetConfig(str(b))]
    rows = load_rows(sources, mixed_forms=True)
    assert [(r.id, r.chosen) for r in rows] == [("1:1", "x"), ("2:1", "z")]
    b.write_bytes(lines([{"id": 1, "prompt": turn}]))
    assert (
        f"prompt is messages, but text at {a}:1: use one form in all rows (as_conversations: true "
        "turns text into messages)"
    ) in refused(sources)
    assert [r.prompt for r in load_rows(sources, mixed_forms=True)] == ["a?", turn]


def test_bad_rows_of_a_mixture_are_listed_with_their_files(tmp_path: Path) -> None:
    sources = mixture(tmp_path, ("a", 3, None), ("b", 3, None))
    Path(sources[1].path).write_bytes(lines([{"prompt": "b0"}, {"id": 4, "prompt": 5}]))
    assert f"{sources[1].path}:2: prompt is 5 (int)" in refused(sources)
    skipped = SkippedRows()
    assert read(sources, on_bad_row="skip", skipped=skipped) == ["a0", "a1", "a2", "b0"]
    assert [(entry["where"], entry["id"]) for entry in skipped] == [(f"{sources[1].path}:2", 4)]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "datasets[1] has no path"),
        ({"path": ""}, "datasets[1] has no path"),
        (7, "datasets[1] is 7; it must be a data set's path, or a mapping"),
        ({"path": "a", "weight": 1}, "has 'weight', which is not read; it is called fraction here"),
        ({"path": "a", "type": "sharegpt"}, "the form of the rows is told from their columns"),
        ({"path": "a", "splits": "x"}, "has 'splits', which is not read; did you mean 'split'?"),
        ({"path": "a", "fraction": 0}, "datasets[1].fraction is 0; it must be a number above 0"),
        ({"path": "a", "fraction": True}, "datasets[1].fraction is True; it must be a number"),
        ({"path": "a", "fraction": float("inf")}, "datasets[1].fraction is inf"),
        ({"path": "a", "split": 3}, "datasets[1].split is 3; it must be text"),
        ({"path": "a", "data_files": {"train": "x"}}, "data_files is {'train': 'x'}; it must be a"),
        ({"path": "a", "columns": "prompt"}, "datasets[1].columns is 'prompt'; it must map names"),
        ({"path": "a", "columns": {"prompt": 1}}, "datasets[1].columns is {'prompt': 1}; it must"),
        (
            {"path": "a", "columns": {"prompt": "q", "chosen": "q"}},
            "datasets[1].columns gives the column 'q' to prompt, chosen",
        ),
        ('{"path": "a"', 'datasets[1] is \'{"path": "a"\', which is no JSON'),
    ],
)
def test_entries_that_cannot_be_meant(entry: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        as_dataset_config(entry, "datasets[1]")
    assert said in str(caught.value)


def test_an_entry_may_be_written_in_each_way() -> None:
    full = DatasetConfig("a.jsonl", split="train[:3]", fraction=0.5)
    text = '{"path": "a.jsonl", "split": "train[:3]", "fraction": 0.5}'
    for given_as in (full, text, json.loads(text), DatasetConfig(text)):
        assert as_dataset_config(given_as, "datasets[0]") == full
    assert as_dataset_config("a.jsonl", "datasets[0]") == DatasetConfig("a.jsonl")


def test_a_folder_is_streamed_by_datasets(tmp_path: Path) -> None:
    """As a data set of the hub is: its splits have names, and no length until they are read."""
    folder = tmp_path / "data"
    folder.mkdir()
    file(folder / "train.jsonl", "a", 10)
    file(folder / "test.jsonl", "b", 4)
    for split, said in (
        ("train[50%:]", "is not known while it is streamed: name rows, as in train[:1000]"),
        ("dev", "there is no split 'dev'; set split to one of train, test"),
        ("train+test", "one split or a part of one is read: correct it"),
    ):
        with pytest.raises(DataError) as caught:
            next(stream_rows([DatasetConfig(str(folder), split=split)], 3))
        assert said in str(caught.value)
    for split, expected in (
        (None, [f"a{i}" for i in range(10)]),
        ("test", [f"b{i}" for i in range(4)]),
        ("train[2:5]", ["a2", "a3", "a4"]),
    ):
        source = DatasetConfig(str(folder), split=split)
        rows = [str(row.prompt) for part in stream_rows([source], 3) for row in part]
        assert rows == expected
        assert read(source) == expected
