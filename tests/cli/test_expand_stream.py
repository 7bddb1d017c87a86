"""`expand` over data that is read as it is needed: the same rows, little memory, no work twice."""

from __future__ import annotations

import gzip
import json
import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neat_align.cli.expand import write_expansion
from neat_align.cli.expand_stream import expand_stream
from neat_align.cli.export_source import find_groups
from neat_align.errors import CollapseError, ConfigError, DataError
from neat_align.pipeline import load_data
from neat_align.prompts.dataset_config import DatasetConfig
from neat_align.prompts.loading import load_rows, stream_rows
from neat_align.prompts.skipped_rows import SkippedRows
from neat_align.script_arguments import ScriptArguments
from small_trainer import ROWS, config
from tiny import save_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model", "llama")
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "data.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def script(place: Path, **changes: Any) -> ScriptArguments:
    given = {
        "model_name_or_path": str(place / "model"),
        "dataset_name": str(place / "data.jsonl.gz"),
        "dataset_streaming": True,
        "reward_funcs": ["small_trainer:count_e"],
    }
    return ScriptArguments(**{**given, **changes})


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rounds_of_rows_until_the_data_ends(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = config(tmp_path / "run", prompts_per_round=5)
    out = tmp_path / "out.jsonl"
    write_expansion(script(place), args, out, "ranked")
    rows = written(out)
    prompts = [row["prompt"] for row in rows]
    assert sorted(map(str, prompts)) == sorted(str(row["prompt"]) for row in ROWS)
    # In rounds of the data's order.
    for start in (0, 5, 10):
        part = [str(row["prompt"]) for row in ROWS[start : start + 5]]
        assert sorted(map(str, prompts[start : start + 5])) == sorted(part)
    assert len(list((tmp_path / "run" / "rounds").glob("*/manifest.json"))) == 3
    said = capsys.readouterr().out
    assert said.startswith("plan: rounds of 5 prompts until the data ends\n")
    assert "12 rows (ranked) in" in said
    with pytest.raises(ConfigError, match="holds a finished expansion"):
        write_expansion(script(place), args, out, "ranked")
    write_expansion(script(place, resume=True), args, tmp_path / "again.jsonl", "ranked")
    assert written(tmp_path / "again.jsonl") == rows
    # What `export` takes the run's own rules from.
    kept = find_groups(tmp_path / "run").settings()
    assert (kept["rank_by"], kept["reward_margin"]) == (args.rank_by, args.reward_margin)


@pytest.mark.slow
def test_an_interrupted_one_goes_on_and_samples_nothing_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neat_align.trainer.round_maker import RoundMaker

    made: list[int] = []
    stopped_at: list[int] = []
    make = RoundMaker._make

    def counted(self: RoundMaker, index: int, *rest: Any) -> Any:
        if index == 2 and 2 not in stopped_at:
            stopped_at.append(index)
            raise OSError("the machine goes down")
        made.append(index)
        return make(self, index, *rest)

    monkeypatch.setattr(RoundMaker, "_make", counted)
    args, out = config(tmp_path / "run", prompts_per_round=5), tmp_path / "out.jsonl"
    with pytest.raises(OSError, match="goes down"):
        write_expansion(script(place), args, out, "ranked")
    assert not out.exists()
    write_expansion(script(place), args, out, "ranked")
    assert made == [0, 1, 2]
    whole = config(tmp_path / "whole", prompts_per_round=5)
    write_expansion(script(place), whole, tmp_path / "whole.jsonl", "ranked")
    assert written(out) == written(tmp_path / "whole.jsonl")
    (tmp_path / "run" / "expansion.json").unlink()
    other = config(tmp_path / "run", prompts_per_round=5, temperature=0.5)
    with pytest.raises(ConfigError, match=r"a finished round of something else \(temperature was"):
        write_expansion(script(place), other, out, "ranked")


def test_rows_that_cannot_be_used_and_rounds_without_any(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": [{"role": "user", "content": "many words " * 90}]}
    data = tmp_path / "data.jsonl"
    rows = [*ROWS[:4], *[long] * 4, *ROWS[4:6], "no row", *ROWS[6:7]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = script(place, dataset_name=str(data))
    with pytest.raises(DataError, match=f"4 prompts are longer than .*{data}:5"):
        write_expansion(
            given, config(tmp_path / "a", prompts_per_round=4), tmp_path / "a.jsonl", "ranked"
        )
    args = config(tmp_path / "run", prompts_per_round=4, on_bad_row="skip")
    with caplog.at_level(logging.WARNING):
        write_expansion(given, args, tmp_path / "out.jsonl", "ranked")
    assert "a whole round of rows is left out" in caplog.text
    assert len(written(tmp_path / "out.jsonl")) == 7
    listed = written(tmp_path / "run" / "skipped-rows.jsonl")
    assert sorted(entry["where"] for entry in listed) == sorted(
        f"{data}:{line}" for line in (5, 6, 7, 8, 11)
    )


@pytest.mark.slow
def test_too_few_pairs_stop_it_and_a_round_without_any_does_not(
    place: Path, tmp_path: Path
) -> None:
    """The reward of this test tells answers to one of the rounds' prompts apart, or none."""
    out = tmp_path / "out.jsonl"
    args = config(tmp_path / "run", prompts_per_round=4, min_pair_fraction=0.3)
    given = script(place, reward_funcs=["test_expand_stream:only_low_numbers"])
    write_expansion(given, args, out, "ranked")  # 4 of 4, 4 of 8, 4 of 12
    assert len(written(out)) == 4
    args = config(tmp_path / "none", prompts_per_round=4, min_pair_fraction=0.4)
    said = r"4 of 12 prompts so far .* under min_pair_fraction=0\.4"
    with pytest.raises(CollapseError, match=said):
        write_expansion(given, args, out, "ranked")


def only_low_numbers(
    prompts: list[Any], completions: list[Any], completion_ids: list[Any], **columns: Any
) -> list[float]:
    numbers = [int(p[-1]["content"].rstrip("?").split()[-1]) for p in prompts]
    return [
        float(len(c[0]["content"])) + 0.1 * i if n < 4 else 0.0
        for i, (n, c) in enumerate(zip(numbers, completions, strict=True))
    ]


def test_what_cannot_stream_says_so(place: Path, tmp_path: Path) -> None:
    args, out = config(tmp_path / "run"), tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match="dataset_streaming is true, and only expand streams"):
        load_data(script(place))
    with pytest.raises(ConfigError, match="no data that can be streamed is named"):
        write_expansion(script(place, dataset_name="demo"), args, out, "ranked")
    with pytest.raises(ConfigError, match="dataset_streaming is true and engine is ray"):
        expand_stream(script(place), args, out, "ranked", is_local=False)


# ---- rows ----------------------------------------------------------------------------------------


def test_a_stream_has_the_rows_of_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows: list[Any] = [{"prompt": f"a{i}"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [DatasetConfig(str(path), split="train[1:9]")]
    parts = list(stream_rows(sources, 3))
    assert [len(part) for part in parts] == [3, 3, 2]
    assert [row for part in parts for row in part] == load_rows(sources)
    assert sum(map(len, stream_rows(sources, 3, limit=4))) == 4
    rows[5], rows[6] = {"prompt": 3}, {"prompt": [{"role": "user", "content": "b"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = stream_rows(sources, 2)
    assert [[row.prompt for row in next(stream)] for _ in range(2)] == [["a1", "a2"], ["a3", "a4"]]
    with pytest.raises(DataError) as caught:  # of another form than rows that are long gone
        next(stream)
    assert f"{path}:6: prompt is 3" in str(caught.value)
    assert f"{path}:7: prompt is messages, but text at {path}:2" in str(caught.value)
    skipped = SkippedRows()
    good = [
        row for part in stream_rows(sources, 2, on_bad_row="skip", skipped=skipped) for row in part
    ]
    assert len(good) == 6
    assert skipped.count == 2
    with pytest.raises(DataError, match="no rows: it is empty"):
        next(stream_rows([DatasetConfig(str(path), split="train[99:]")], 2))


def streams(folder: Path, rows: int) -> Iterator[DatasetConfig]:
    content = [{"id": i, "prompt": f"{i} " + "word " * 100} for i in range(rows)]
    lines = "".join(json.dumps(row) + "\n" for row in content)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
    pq.write_table(pa.Table.from_pylist(content), folder / "a.parquet", row_group_size=500)
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        yield DatasetConfig(str(folder / name))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Python's own: 5 times the rows, the same peak; and far below what the rows take."""
    peaks: dict[int, list[int]] = {}
    for rows in (2000, 10_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        peaks[rows] = []
        for source in streams(folder, rows):
            tracemalloc.start()
            count = 0
            for part in stream_rows([source], 100):
                count += len(part)
                assert pa.total_allocated_bytes() < 10_000 * 600 / 3  # not Python's: Arrow's
            assert count == rows
            peaks[rows].append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    for few, many in zip(peaks[2000], peaks[10_000], strict=True):
        assert many < 1.2 * few + 100_000
        assert many < 10_000 * 600 / 3
