"""One round of data: sample → filter → score → rank, stage by stage on disk.

    prompts ──► completions under + and − instructions ──► leaks, blanks, repeats out
            ──► rewards and log-probabilities ──► groups with a pair

A round's folder holds `groups.parquet` and, written last, `manifest.json`: a folder with a manifest
is finished and is read instead of made again. Until then finished batches of samples and of scores
are kept in its `work` folder (`rollout_store`) and taken up.

A large round goes through the stages in slices of at most `SLICE_PROMPTS` prompts, so that it needs
the memory of one slice: the groups of a finished one are in the file (`group_file`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

from neat_align.errors import CollapseError
from neat_align.prompts.rows import PromptRow
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.filters import without_unusable
from neat_align.rounds.metrics import RoundMeasures
from neat_align.rounds.params import (
    Progress,
    RoundParams,
    RoundProgress,
    RoundTools,
    measured_prompts,
)
from neat_align.rounds.prompt_order import prompt_at
from neat_align.rounds.ranking import ordered_pairs, rank_keys
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.rounds.round_files import (
    FORMAT,
    FinishedRound,
    finished_round,
    write_manifest,
    write_round_groups,
)
from neat_align.rounds.sampling_stage import sampled_groups
from neat_align.rounds.scoring_notes import write_lists
from neat_align.rounds.scoring_stage import score_groups
from neat_align.rounds.shards import RolledOut, Slice, SliceMaker

T = TypeVar("T")

# Prompts that are sampled and scored before the next ones. 512 prompts of 8 answers of 64 tokens
# are 55 MB in memory, and enough for batches of thousands of completions.
SLICE_PROMPTS = 512


def make_round(
    rows: Sequence[PromptRow],
    *,
    num_groups: int,
    position: int,
    round_index: int,
    params: RoundParams,
    tools: RoundTools,
    folder: Path,
    progress: Progress | None = None,
    slice_maker: SliceMaker | None = None,
    slice_prompts: int | None = None,
) -> FinishedRound:
    """Make one round of up to `num_groups` groups, or read it when it is finished on disk.

    `position` is where the round begins in the stream of prompts (`prompt_order`). Prompts whose
    completions make no pair are counted and left out, and the prompts that follow take their place,
    as long as the round's budget of prompts lasts (each prompt at most once a round, at most twice
    `num_groups` prompts).

    `slice_maker` samples and scores slices in the place of `tools`, whose instructions and names of
    rewards it works under: the groups are the same. Slices have at most `slice_prompts` prompts
    (None: `SLICE_PROMPTS`); negatives from other prompts depend on it.

    Raises CollapseError when fewer than `min_pair_fraction` of the prompts made a pair, or none
    did.
    """
    finished = finished_round(folder)
    if finished is not None:
        return finished
    made = _Round(rows, num_groups, position, round_index, params, tools, folder, progress)
    made.slice_prompts = slice_prompts or SLICE_PROMPTS
    reward_names = [reward.name for reward in tools.rewards]
    make = slice_maker or made.roll_out
    groups = write_round_groups(folder, made.groups(make), reward_names)
    return write_manifest(
        folder,
        round_index,
        groups,
        write_lists(folder, made.measures.metrics(made.kept, made.removed)),
        next_position=position + made.used,
        num_prompts=made.measures.prompts,
        reward_names=reward_names,
    )


class _Round:
    """A round that is being made: its groups come one slice after the other.

    `kept` groups have a pair so far, `used` places of the prompt stream were taken, `removed`
    counts filtered completions by reason. It does not hold who makes its slices, which may be
    itself: with its tools, and the copy that samples, it is let go as soon as it is made.
    """

    def __init__(
        self,
        rows: Sequence[PromptRow],
        num_groups: int,
        position: int,
        round_index: int,
        params: RoundParams,
        tools: RoundTools,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self.rows = rows
        self.num_groups = num_groups
        self.position = position
        self.round_index = round_index
        self.params = params
        self.tools = tools
        self.folder = folder
        self.progress = RoundProgress(progress, params)
        self.measures = RoundMeasures([reward.name for reward in tools.rewards])
        self.removed: Counter[str] = Counter()
        self.kept = self.used = 0
        self.slice_prompts = SLICE_PROMPTS

    def groups(self, make: SliceMaker) -> Iterator[CompletionGroup]:
        """The round's groups, those with a pair, in order. Raises CollapseError after the last."""
        budget = min(len(self.rows), 2 * self.num_groups)
        seen: set[str] = set()
        while self.kept < self.num_groups and self.used < budget:
            take = min(self.num_groups - self.kept, budget - self.used)
            first = self.position + self.used
            unseen = _unseen_rows(self.rows, range(first, first + take), self.params, seen)
            seen.update(row.id for row in unseen)
            self.progress.expect(len(unseen))
            yield from self._teaching(make(self._slices(unseen), self.progress))
            self.used += take
        _refuse_too_few_pairs(self.kept, self.measures.prompts, self.params, self.removed)

    def _slices(self, rows: Sequence[PromptRow]) -> Iterator[Slice]:
        wanted = measured_prompts(min(self.num_groups, len(self.rows)))
        to_measure = max(0, wanted - self.measures.prompts)
        for start, part in even_slices(rows, self.slice_prompts):
            yield Slice(
                tuple(part),
                self.folder / "work" / f"{self.used + start:06d}",
                _plan(part, self.round_index, self.params, self.tools),
                frozenset(row.id for row in part[: max(0, to_measure - start)]),
            )

    def _teaching(self, made: Iterator[RolledOut]) -> Iterator[CompletionGroup]:
        """Take all groups into the measures; gives those with something to learn from."""
        for rolled_out in made:
            self.removed.update(rolled_out.removed)
            for group in rolled_out.groups:
                self.measures.add(group)
                if _teaches(group, self.params):
                    self.kept += 1
                    yield group

    def roll_out(self, slices: Iterable[Slice], progress: RoundProgress) -> Iterator[RolledOut]:
        """The slices, sampled, filtered and scored here one after the other."""
        for part in slices:
            removed: Counter[str] = Counter()
            yield RolledOut(self._roll_out(part, removed, progress), removed)

    def _roll_out(
        self, part: Slice, removed: Counter[str], progress: RoundProgress
    ) -> list[CompletionGroup]:
        rows, params, tools = part.rows, self.params, self.tools
        store = RolloutStore(part.folder)
        store.open_for(part.plan)
        sampled = sampled_groups(rows, self.round_index, params, tools, store, progress.sampled)
        usable = [without_unusable(group, removed) for group in sampled]
        return score_groups(
            usable,
            rows,
            tools,
            store,
            part.measured,
            progress.scored,
            weighing_pairs=params.weighing_pairs,
        )


def even_slices(items: Sequence[T], most: int) -> Iterator[tuple[int, Sequence[T]]]:
    """(place of the first, members) of as few slices of at most `most` as there can be.

    Their sizes differ by one at most: negatives from other prompts come from the same slice, so no
    prompt may be left alone.
    """
    count = -(-len(items) // most)
    ends = [len(items) * i // count for i in range(1, count + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        yield start, items[start:end]


def _unseen_rows(
    rows: Sequence[PromptRow], positions: range, params: RoundParams, seen: Set[str]
) -> list[PromptRow]:
    """The rows at these positions of the prompt stream, each prompt once and none of `seen`.

    A round that runs from one pass over the data into the next can meet a prompt again.
    """
    unseen: dict[str, PromptRow] = {}
    for position in positions:
        row = rows[prompt_at(len(rows), params.seed, position)]
        if row.id not in seen:
            unseen.setdefault(row.id, row)
    return list(unseen.values())


def _plan(
    rows: Sequence[PromptRow], round_index: int, params: RoundParams, tools: RoundTools
) -> dict[str, Any]:
    """What decides the samples and scores of these prompts, as JSON.

    Stored work is taken up only where this is the same.
    """
    return {
        "sampling": {
            "format": FORMAT,
            "round": round_index,
            "rows": [_content(row) for row in rows],
            "params": params.deciding(),
            "bank": [[pair.positive, pair.negative] for pair in tools.bank.pairs],
        },
        "rewards": [[reward.name, reward.weight] for reward in tools.rewards],
    }


def _content(row: PromptRow) -> list[Any]:
    """What a row decides by. Rows without inputs of the template are as in earlier versions."""
    content: list[Any] = [row.id, row.prompt, row.chosen, row.rejected]
    if row.template_inputs:
        content += [row.template_inputs.tools, dict(row.template_inputs.kwargs)]
    return content


def _teaches(group: CompletionGroup, params: RoundParams) -> bool:
    """Whether the group has what the objective learns from: a pair, or else a plain answer."""
    if not params.needs_pairs:
        return any(c.origin == "plain" for c in group.completions)
    return bool(ordered_pairs(rank_keys(group, params.rank_by), params.reward_margin))


def _refuse_too_few_pairs(
    kept: int, sampled: int, params: RoundParams, removed: Counter[str]
) -> None:
    if kept >= params.min_pair_fraction * sampled and (kept > 0 or params.may_be_empty):
        return
    if not params.needs_pairs:
        raise CollapseError(
            f"{kept} of {sampled} prompts have a plain answer left to learn from "
            f"({removed['empty']} empty answers were left out): the policy says nothing any more; "
            "the last checkpoint is kept"
        )
    raise CollapseError(
        f"{kept} of {sampled} prompts gave two completions whose rewards differ by more than "
        f"reward_margin={params.reward_margin} ({removed['empty']} empty answers were left "
        "out): there is too little to rank. Either the reward does not tell these answers "
        "apart (try another reward, or a smaller margin), or the policy no longer obeys the "
        "negative instruction (negative_policy: initial, or fewer rounds); the last "
        "checkpoint is kept"
    )
