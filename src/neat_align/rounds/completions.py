"""Completions and the groups they form: plain frozen records, and their Parquet form.

No torch here: a group file can be opened, checked and turned into a preference data set on a
machine that cannot train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from neat_align.errors import DataError
from neat_align.prompts.row_prompts import InstructedPairs
from neat_align.prompts.rows import Prompt
from neat_align.sampling.protocol import FinishReason

if TYPE_CHECKING:
    import pyarrow as pa


Origin: TypeAlias = Literal["positive", "negative", "plain", "chosen", "rejected"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to one prompt.

    `token_ids` holds the end-of-turn token when `finish_reason` is "stop" and does not when it is
    "length" (cut). `instruction` is the text that made the answer positive or negative; None for
    plain and human answers. `sampling_logprob` is the **sum** over tokens, in nats, under the
    prompt the completion was sampled with, of the untempered policy; None for human answers.
    `branch_at` is how many of its first tokens a completion shares with the plain answer that it
    branched from (`branching`), None for one that did not branch; its `sampling_logprob` is of all
    tokens under its instruction, those that it shares too.
    `policy_logprobs` and `ref_logprobs` are per-token log-probabilities in nats under the **plain**
    prompt, of the policy that began the round and of the start policy; empty when not computed.
    `contrasts` are the tokens' contrasts of the instructions in nats, empty when not computed
    (`scoring_stage.with_contrasts`).
    `reward` is the weighted sum of `reward_components` (one a reward function, None where it
    abstained), or of what these are within their group (`rewards.aggregation`), higher is better;
    None when every function abstained.
    """

    origin: Origin
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason = "stop"
    instruction: str | None = None
    seed: int | None = None
    sampling_logprob: float | None = None
    policy_logprobs: tuple[float, ...] = ()
    ref_logprobs: tuple[float, ...] = ()
    reward: float | None = None
    reward_components: tuple[float | None, ...] = ()
    branch_at: int | None = None
    contrasts: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionGroup:
    """All completions of one prompt.

    `prompt_ids` is the plain prompt as the policy sees it, generation prompt included.
    `contrast_ids` are the same prompt under (positive, negative) instructions, a pair of the bank
    each, where contrast distillation or the weights of tokens read them.
    """

    prompt_id: str
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    contrast_ids: InstructedPairs = ()


# Column of a group file, and the field of `Completion` that it lists.
_COMPLETION_COLUMNS: tuple[tuple[str, str], ...] = (
    ("completions", "text"),
    ("origins", "origin"),
    ("rewards", "reward"),
    ("indices", "index"),
    ("instructions", "instruction"),
    ("finish_reasons", "finish_reason"),
    ("seeds", "seed"),
    ("completion_ids", "token_ids"),
    ("sampling_logprobs", "sampling_logprob"),
    ("policy_logprobs", "policy_logprobs"),
    ("ref_logprobs", "ref_logprobs"),
    ("reward_components", "reward_components"),
    ("branch_points", "branch_at"),
    ("token_contrasts", "contrasts"),
)
# Columns that files of earlier versions do not have.
_ADDED_COLUMNS = frozenset({"branch_points", "token_contrasts"})
_CONTRAST_COLUMN = "contrast_prompt_ids"
# Fields that Arrow gives as lists, and what stands in fields without a default that were not read.
_TUPLE_FIELDS = (
    "token_ids",
    "policy_logprobs",
    "ref_logprobs",
    "reward_components",
    "contrasts",
)
_ABSENT: dict[str, Any] = {"index": 0, "text": "", "token_ids": ()}


def prompt_type(*, conversational: bool) -> pa.DataType:
    """What a prompt is in Arrow: text, or a list of messages."""
    import pyarrow as pa

    if not conversational:
        return pa.string()
    return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def arrow_schema(*, conversational: bool, reward_names: Sequence[str] = ()) -> pa.Schema:
    """Schema of a group file: one row a group, one list a completion field.

    All lists of a row are equally long. `conversational` prompts are lists of messages, else text.
    """
    import pyarrow as pa

    ints, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    item_types: dict[str, Any] = {
        "completions": pa.string(),
        "origins": pa.string(),
        "rewards": pa.float64(),
        "indices": pa.int32(),
        "instructions": pa.string(),
        "finish_reasons": pa.string(),
        "seeds": pa.uint64(),
        "completion_ids": ints,
        "sampling_logprobs": pa.float64(),
        "policy_logprobs": floats,
        "ref_logprobs": floats,
        "reward_components": pa.list_(pa.float64()),
        "branch_points": pa.int32(),
        "token_contrasts": floats,
    }
    fields: list[Any] = [
        ("prompt_id", pa.string()),
        ("prompt", prompt_type(conversational=conversational)),
        ("prompt_ids", ints),
    ]
    fields += [(name, pa.list_(item_types[name])) for name, _ in _COMPLETION_COLUMNS]
    fields.append((_CONTRAST_COLUMN, pa.list_(pa.list_(ints))))
    return pa.schema(fields, metadata={"neat_align.reward_names": "\n".join(reward_names)})


MIXED_PROMPTS = "groups of one file mix text prompts and conversations: keep them in two files"


def groups_to_table(
    groups: Sequence[CompletionGroup], reward_names: Sequence[str] = ()
) -> pa.Table:
    """Groups as an Arrow table, in order.

    Raises DataError where some prompts are text and others conversations.
    """
    import pyarrow as pa

    conversational = bool(groups) and not isinstance(groups[0].prompt, str)
    if any(isinstance(g.prompt, str) == conversational for g in groups):
        raise DataError(MIXED_PROMPTS)
    rows: list[dict[str, Any]] = []
    for g in groups:
        row: dict[str, Any] = {
            "prompt_id": g.prompt_id,
            "prompt": g.prompt,
            "prompt_ids": list(g.prompt_ids),
            _CONTRAST_COLUMN: [[list(ids) for ids in pair] for pair in g.contrast_ids],
        }
        for column, field in _COMPLETION_COLUMNS:
            row[column] = [getattr(c, field) for c in g.completions]
        rows.append(row)
    return pa.Table.from_pylist(
        rows, schema=arrow_schema(conversational=conversational, reward_names=reward_names)
    )


def groups_from_table(
    table: pa.Table, columns: Sequence[str] | None = None
) -> list[CompletionGroup]:
    """The inverse of `groups_to_table`. Raises DataError for a table with other columns.

    With `columns` the table has only these, "origins" among them, and other fields are empty.
    """
    if columns is None:
        check_columns(table.column_names)
        columns = table.column_names
    listed = [(c, field) for c, field in _COMPLETION_COLUMNS if c in columns]
    fields = [field for _, field in listed]
    tuples = [name for name in _TUPLE_FIELDS if name in fields]
    absent = {field: value for field, value in _ABSENT.items() if field not in fields}
    groups: list[CompletionGroup] = []
    for row in table.to_pylist():
        completions = []
        for values in zip(*(row[column] for column, _ in listed), strict=True):
            values_by_field = dict(zip(fields, values, strict=True))
            for name in tuples:
                values_by_field[name] = tuple(values_by_field[name] or ())
            completions.append(Completion(**absent, **values_by_field))
        groups.append(
            CompletionGroup(
                row.get("prompt_id", ""),
                row.get("prompt", ""),
                tuple(row.get("prompt_ids", ())),
                tuple(completions),
                _pairs_of_ids(row.get(_CONTRAST_COLUMN) or ()),
            )
        )
    return groups


def _pairs_of_ids(pairs: Sequence[Sequence[Sequence[int]]]) -> InstructedPairs:
    return tuple((tuple(positive), tuple(negative)) for positive, negative in pairs)


def check_columns(names: Sequence[str]) -> None:
    """Raise DataError where the columns of a group file are not all there."""
    needed = {"prompt_id", "prompt", "prompt_ids", *(c for c, _ in _COMPLETION_COLUMNS)}
    missing = sorted(needed - _ADDED_COLUMNS - set(names))
    if missing:
        raise DataError(
            f"this is not a group file: columns {', '.join(missing)} are missing (it has "
            f"{list(names)})"
        )


def reward_names_of(table: pa.Table) -> list[str]:
    """Names of the reward functions behind `reward_components`, in order."""
    return reward_names_in(cast("dict[bytes, bytes] | None", table.schema.metadata))


def reward_names_in(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """The same, from what a group file's schema says beside its columns."""
    joined = (metadata or {}).get(b"neat_align.reward_names", b"").decode()
    return joined.split("\n") if joined else []


def read_groups(path: str | Path) -> list[CompletionGroup]:
    """Groups of one Parquet file. Raises OSError where its pages do not match their checksums."""
    import pyarrow.parquet as pq

    return groups_from_table(pq.read_table(path, page_checksum_verification=True))
