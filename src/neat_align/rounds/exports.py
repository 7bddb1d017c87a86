"""Groups as other trainers read them: ranked lists and preference pairs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from neat_align.rounds.completions import Completion, CompletionGroup, prompt_type
from neat_align.rounds.ranking import RankBy, extremes, rank_keys

if TYPE_CHECKING:
    import pyarrow as pa

RowForm: TypeAlias = Literal["ranked", "preference"]
# Groups whose rows are made and written together.
_CHUNK = 256


def ranked_rows(
    groups: Iterable[CompletionGroup], *, rank_by: RankBy = "reward"
) -> list[dict[str, Any]]:
    """One row a group: `prompt`, `completions`, `rewards`, `origins`, best first.

    The shape that PRO and RRHF train on. Completions without a rank come last.
    """
    rows = []
    for group in groups:
        ranked = _best_first(group, rank_by)
        rows.append(
            {
                "prompt": group.prompt,
                "completions": [c.text for c in ranked],
                "rewards": [c.reward for c in ranked],
                "origins": [c.origin for c in ranked],
            }
        )
    return rows


def preference_rows(
    groups: Iterable[CompletionGroup], *, margin: float = 0.0, rank_by: RankBy = "reward"
) -> list[dict[str, Any]]:
    """One row a group: best against worst, in TRL's preference format.

    Groups whose best and worst are within `margin` are left out.
    """
    rows = []
    for group in groups:
        ends = extremes(rank_keys(group, rank_by), margin)
        if ends is None:
            continue
        best, worst = (group.completions[i] for i in ends)
        conversational = not isinstance(group.prompt, str)
        rows.append(
            {
                "prompt": group.prompt,
                "chosen": _answer(best, conversational),
                "rejected": _answer(worst, conversational),
                "chosen_reward": best.reward,
                "rejected_reward": worst.reward,
                "chosen_origin": best.origin,
                "rejected_origin": worst.origin,
            }
        )
    return rows


def write_rows(
    file: IO[bytes],
    groups: Iterable[CompletionGroup],
    form: RowForm,
    *,
    rank_by: RankBy = "reward",
    as_lines: bool = False,
) -> int:
    """Write the rows of one form to a file as the groups come; gives their number.

    Parquet, or JSON lines with `as_lines`. The groups' prompts are all text or all conversations.
    """
    to_rows = {"ranked": ranked_rows, "preference": preference_rows}[form]
    stream = iter(groups)
    first = list(islice(stream, _CHUNK))
    conversational = bool(first) and not isinstance(first[0].prompt, str)
    chunks = itertools.chain([first], iter(lambda: list(islice(stream, _CHUNK)), []))
    rows = (to_rows(chunk, rank_by=rank_by) for chunk in chunks)
    if as_lines:
        return _write_lines(file, rows)
    return _write_parquet(file, rows, row_schema(form, conversational=conversational))


def _write_lines(file: IO[bytes], chunks: Iterable[list[dict[str, Any]]]) -> int:
    count = 0
    for rows in chunks:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.write(text.encode("utf-8", "backslashreplace"))
        count += len(rows)
    return count


def _write_parquet(
    file: IO[bytes], chunks: Iterable[list[dict[str, Any]]], schema: pa.Schema
) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for rows in chunks:
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema))
            count += len(rows)
    return count


def row_schema(form: RowForm, *, conversational: bool) -> pa.Schema:
    """The columns of a form's rows, in order."""
    import pyarrow as pa

    prompt = prompt_type(conversational=conversational)
    if form == "ranked":
        lists = (("completions", pa.string()), ("rewards", pa.float64()), ("origins", pa.string()))
        return pa.schema([("prompt", prompt), *((name, pa.list_(kind)) for name, kind in lists)])
    return pa.schema(
        [
            ("prompt", prompt),
            ("chosen", prompt),
            ("rejected", prompt),
            ("chosen_reward", pa.float64()),
            ("rejected_reward", pa.float64()),
            ("chosen_origin", pa.string()),
            ("rejected_origin", pa.string()),
        ]
    )


def _best_first(group: CompletionGroup, rank_by: RankBy) -> list[Completion]:
    keys = [-math.inf if key is None else key for key in rank_keys(group, rank_by)]
    order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
    return [group.completions[i] for i in order]


def _answer(completion: Completion, conversational: bool) -> Any:
    if conversational:
        return [{"role": "assistant", "content": completion.text}]
    return completion.text
