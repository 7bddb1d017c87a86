"""Completions and the groups they form: plain frozen records, their Arrow form, and their exports.

No torch here: a group file can be opened, checked and turned into a preference data set on a machine that cannot train.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from neat_align.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Origin: TypeAlias = Literal["positive", "negative", "plain", "chosen", "rejected"]
Polarity: TypeAlias = Literal["positive", "negative", "plain"]
FinishReason: TypeAlias = Literal["stop", "length"]
Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]
RankBy: TypeAlias = Literal["reward", "origin", "origin_then_reward"]
PairSelection: TypeAlias = Literal["all", "best_worst"]

ORIGINS: tuple[Origin, ...] = get_args(Origin)
# What `rank_by: origin` means: a larger number is better; equal numbers make no pair.
ORIGIN_RANK: dict[Origin, int] = {"positive": 2, "chosen": 2, "plain": 1, "negative": 0, "rejected": 0}
# Origins that were written to be bad; never the target of the language-modelling loss by default.
BAD_ORIGINS: frozenset[Origin] = frozenset({"negative", "rejected"})
ORIGIN_STEP = 1.0
"""How far `rank_by: origin_then_reward` puts the best bad completion below the worst good one, in reward units."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to one prompt.

    `token_ids` holds the end-of-turn token when `finish_reason` is "stop" and does not when it is "length" (cut).
    `instruction` is the text that made the answer positive or negative; None for plain and human answers.
    `sampling_logprob` is the **sum** over tokens, in nats, under the prompt the completion was sampled with, of the
    untempered policy; None for human answers. `policy_logprobs` and `ref_logprobs` are per-token log-probabilities in
    nats under the **plain** prompt, of the policy that began the round and of the start policy; empty when not computed.
    `reward` is the weighted sum of `reward_components` (one a reward function, None where it abstained), higher is
    better; None when every function abstained.
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


@dataclass(frozen=True, slots=True)
class CompletionGroup:
    """All completions of one prompt. `prompt_ids` is the plain prompt as the policy sees it, generation prompt included."""

    prompt_id: str
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]


def rank_keys(group: CompletionGroup, rank_by: RankBy) -> list[float | None]:
    """The number by which each completion is ranked, higher is better; None takes part in no pair.

    For `origin_then_reward` the rewards of negative and rejected completions are shifted together so that the best of
    them stands `ORIGIN_STEP` below the worst of the others.
    """
    if rank_by == "origin":
        return [float(ORIGIN_RANK[c.origin]) for c in group.completions]
    keys = [c.reward for c in group.completions]
    if rank_by == "reward":
        return keys
    is_bad = [c.origin in BAD_ORIGINS for c in group.completions]
    good = [k for k, bad in zip(keys, is_bad, strict=True) if k is not None and not bad]
    low = [k for k, bad in zip(keys, is_bad, strict=True) if k is not None and bad]
    if not good or not low:
        return keys
    shift = min(good) - ORIGIN_STEP - max(low)
    return [k + shift if k is not None and bad else k for k, bad in zip(keys, is_bad, strict=True)]


def ordered_pairs(keys: Sequence[float | None], margin: float) -> list[tuple[int, int]]:
    """Pairs (i, j) with key i above key j by more than `margin`. Ties, near-ties and missing keys make no pair."""
    present = [(i, k) for i, k in enumerate(keys) if k is not None]
    return [(i, j) for i, a in present for j, b in present if a - b > margin]


def best_index(
    group: CompletionGroup, keys: Sequence[float | None], *, allow_bad_origins: bool = False, allow_cut: bool = False
) -> int | None:
    """Index of the language-modelling target y*: of the completions that ended by themselves, the one with the highest key.

    `keys` are `rank_keys`. Completions of negative or rejected origin are eligible only with `allow_bad_origins`, cut ones
    only with `allow_cut` (they have no end of turn, so they teach nothing about where to stop); ones without a key never
    are. Ties go to the earlier completion. None when nothing is eligible.
    """
    best: int | None = None
    best_key = -math.inf
    for i, (c, key) in enumerate(zip(group.completions, keys, strict=True)):
        eligible = (allow_cut or c.finish_reason == "stop") and (allow_bad_origins or c.origin not in BAD_ORIGINS)
        if eligible and key is not None and key > best_key:
            best, best_key = i, key
    return best


def extremes(keys: Sequence[float | None], margin: float) -> tuple[int, int] | None:
    """Indices of the best and the worst key, the earlier one where several are equal; None when they are within `margin`."""
    present = [(i, k) for i, k in enumerate(keys) if k is not None]
    if not present:
        return None
    best, worst = max(present, key=lambda pair: pair[1]), min(present, key=lambda pair: pair[1])
    return (best[0], worst[0]) if best[1] - worst[1] > margin else None


def kept_completions(group: CompletionGroup, indices: Iterable[int | None]) -> CompletionGroup:
    """The group with only these completions, in their order; the first one where none is named, since a group is never empty."""
    wanted = {i for i in indices if i is not None} or {0}
    return replace(group, completions=tuple(c for i, c in enumerate(group.completions) if i in wanted))


# ---- Arrow -----------------------------------------------------------------------------------------------------------

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
)


def arrow_schema(*, conversational: bool, reward_names: Sequence[str] = ()) -> pa.Schema:
    """Schema of a group file: one row a group, one list a completion field, all lists of a row equally long."""
    import pyarrow as pa

    prompt_type: Any = pa.string()
    if conversational:
        prompt_type = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
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
    }
    fields = [("prompt_id", pa.string()), ("prompt", prompt_type), ("prompt_ids", ints)]
    fields += [(name, pa.list_(item_types[name])) for name, _ in _COMPLETION_COLUMNS]
    return pa.schema(fields, metadata={"neat_align.reward_names": "\n".join(reward_names)})


def groups_to_table(groups: Sequence[CompletionGroup], reward_names: Sequence[str] = ()) -> pa.Table:
    """Groups as an Arrow table, in order. Prompts of one table are all text or all conversations."""
    import pyarrow as pa

    conversational = bool(groups) and not isinstance(groups[0].prompt, str)
    if any(isinstance(g.prompt, str) == conversational for g in groups):
        raise DataError("groups of one file mix text prompts and conversations: keep them in two files")
    rows: list[dict[str, Any]] = []
    for g in groups:
        row: dict[str, Any] = {"prompt_id": g.prompt_id, "prompt": g.prompt, "prompt_ids": list(g.prompt_ids)}
        for column, field in _COMPLETION_COLUMNS:
            row[column] = [getattr(c, field) for c in g.completions]
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=arrow_schema(conversational=conversational, reward_names=reward_names))


def groups_from_table(table: pa.Table) -> list[CompletionGroup]:
    """The inverse of `groups_to_table`."""
    missing = sorted({"prompt_id", "prompt", "prompt_ids", *(c for c, _ in _COMPLETION_COLUMNS)} - set(table.column_names))
    if missing:
        raise DataError(f"this is not a group file: columns {', '.join(missing)} are missing (it has {table.column_names})")
    groups: list[CompletionGroup] = []
    for row in table.to_pylist():
        columns = [row[column] for column, _ in _COMPLETION_COLUMNS]
        completions = []
        for values in zip(*columns, strict=True):
            kwargs = dict(zip((field for _, field in _COMPLETION_COLUMNS), values, strict=True))
            for name in ("token_ids", "policy_logprobs", "ref_logprobs", "reward_components"):
                kwargs[name] = tuple(kwargs[name] or ())
            completions.append(Completion(**kwargs))
        groups.append(CompletionGroup(row["prompt_id"], row["prompt"], tuple(row["prompt_ids"]), tuple(completions)))
    return groups


def reward_names_of(table: pa.Table) -> list[str]:
    """Names of the reward functions behind `reward_components`, in order."""
    metadata = cast("dict[bytes, bytes]", table.schema.metadata or {})
    joined = metadata.get(b"neat_align.reward_names", b"").decode()
    return joined.split("\n") if joined else []


def read_groups(path: str | Path) -> list[CompletionGroup]:
    """Groups of one Parquet file."""
    import pyarrow.parquet as pq

    return groups_from_table(pq.read_table(path, page_checksum_verification=True))


# ---- Exports ---------------------------------------------------------------------------------------------------------


def ranked_rows(groups: Iterable[CompletionGroup], *, rank_by: RankBy = "reward") -> list[dict[str, Any]]:
    """One row a group: `prompt`, `completions`, `rewards`, `origins`, best first (PRO's and RRHF's shape)."""
    rows = []
    for g in groups:
        keyed = zip(rank_keys(g, rank_by), g.completions, strict=True)
        order = [c for _, c in sorted(keyed, key=lambda pair: -math.inf if pair[0] is None else pair[0], reverse=True)]
        rows.append(
            {
                "prompt": g.prompt,
                "completions": [c.text for c in order],
                "rewards": [c.reward for c in order],
                "origins": [c.origin for c in order],
            }
        )
    return rows


def preference_rows(groups: Iterable[CompletionGroup], *, margin: float = 0.0, rank_by: RankBy = "reward") -> list[dict[str, Any]]:
    """One row a group: best against worst, in TRL's preference format. Groups without such a pair are left out."""
    rows = []
    for g in groups:
        ends = extremes(rank_keys(g, rank_by), margin)
        if ends is None:
            continue
        best, worst = (g.completions[i] for i in ends)
        chosen: Any = best.text
        rejected: Any = worst.text
        if not isinstance(g.prompt, str):
            chosen = [{"role": "assistant", "content": best.text}]
            rejected = [{"role": "assistant", "content": worst.text}]
        rows.append(
            {
                "prompt": g.prompt,
                "chosen": chosen,
                "rejected": rejected,
                "chosen_reward": best.reward,
                "rejected_reward": worst.reward,
                "chosen_origin": best.origin,
                "rejected_origin": worst.origin,
            }
        )
    return rows
