"""The tools of a round and of an evaluation, with their costly calls shared by all ranks.

A share is whole prompts: equal prompts are drawn and scored together, and a reward function sees
all completions of a prompt in one call. Shares cost about the same by tokens. No result depends on
which rank computes it.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

from neat_align.evaluation.held_out import EvalTools
from neat_align.modeling.kl import Divergence
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.skipped_rows import OnBadRow
from neat_align.rewards.protocol import NamedReward, ScoredRows
from neat_align.rewards.scoring import ScoreFunction, added
from neat_align.rounds.params import LogprobFunction, RoundTools
from neat_align.runs.ranks import Ranks
from neat_align.runs.shared_calls import Functions, Share, SharedCalls, Together
from neat_align.sampling.protocol import (
    Finished,
    Sample,
    Sampler,
    SampleRequest,
    SamplingParams,
    handing_over,
)

T = TypeVar("T")


def deal(keys: Sequence[Hashable], costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Places of the items that each rank takes, in order: equal keys together, costs even.

    The dearest key first, each to the rank that has the least so far.
    """
    members: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        members.setdefault(key, []).append(place)
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    priced = [(sum(costs[place] for place in places), places) for places in members.values()]
    for cost, places in sorted(priced, key=lambda group: -group[0]):
        load, rank = heapq.heappop(loads)
        shares[rank] += places
        heapq.heappush(loads, (load + cost, rank))
    return [sorted(share) for share in shares]


def in_order(shares: Sequence[Sequence[int]], values: Sequence[Sequence[T] | None]) -> list[T]:
    """The values of each share's places, put back into the order of the places."""
    placed: dict[int, T] = {}
    for share, own in zip(shares, values, strict=True):
        placed.update(zip(share, own or (), strict=True))
    return [placed[i] for i in range(len(placed))]


def _dealt(
    shares: Sequence[Sequence[int]], columns: Sequence[Sequence[Any]], *same: Any
) -> list[Share]:
    """Each rank's arguments: its places of the columns, and what is the same for all ranks."""
    return [
        (*([column[i] for i in share] for column in columns), *same) if share else None
        for share in shares
    ]


# ---- one call each -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedSampler:
    """Draws a share of the requests on each rank. `own` is rank 0's, which reports progress.

    Each rank fills its places again as completions of its share end. Rank 0's are handed over as
    they end, the others' when their shares are drawn, or were drawn until one was asked to stop.
    """

    calls: SharedCalls
    name: str
    own: Sampler

    @property
    def hands_over(self) -> bool:
        """Whether rank 0's own does so now."""
        return handing_over(self.own) is not None

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[Sample]:
        """One `Sample` a request, in order.

        Raises RunInterrupted where a rank was asked to stop before its share was drawn.
        """
        shares = deal(
            [r.prompt_ids for r in requests],
            [len(r.prompt_ids) + r.limit(params) for r in requests],
            self.calls.ranks.count,
        )

        def heard(rank: int, drawn: Sequence[Sample | None]) -> None:
            ended = [(i, s) for i, s in zip(shares[rank], drawn, strict=True) if s is not None]
            if finished is not None and ended:
                finished([i for i, _ in ended], [s for _, s in ended])
            if progress is not None:
                progress(len(ended))

        own = partial(self.own.sample, progress=progress)
        handing = handing_over(self.own)
        if handing is not None and finished is not None:

            def of_own(places: Sequence[int], samples: Sequence[Sample]) -> None:
                finished([shares[0][i] for i in places], samples)

            own = partial(handing.sample, progress=progress, finished=of_own)
        drawn = self.calls.ask(self.name, _dealt(shares, [requests], params), own, heard)
        samples: list[Sample | None] = in_order(shares, drawn)
        if None in samples:
            self.calls.ranks.raise_if_this_rank_must_stop("while completions were drawn")
        return cast("list[Sample]", samples)


class _AskedToStopError(Exception):
    """Ends a draw on a rank that was asked to stop."""


def _until_stopped(sampler: Sampler, ranks: Ranks) -> Callable[..., list[Any]]:
    """Draws a share on a rank that serves: None stands for what was not drawn when it had to stop.

    A sampler that does not hand over draws all of its share, which is a batch.
    """

    def sample(requests: Sequence[SampleRequest], params: SamplingParams) -> list[Any]:
        handing = handing_over(sampler)
        if handing is None:
            return list(sampler.sample(requests, params))
        drawn: dict[int, Sample] = {}

        def finished(places: Sequence[int], samples: Sequence[Sample]) -> None:
            drawn.update(zip(places, samples, strict=True))
            if ranks.stop.signal_number and len(drawn) < len(requests):
                raise _AskedToStopError

        with contextlib.suppress(_AskedToStopError):
            return list(handing.sample(requests, params, finished=finished))
        return [drawn.get(i) for i in range(len(requests))]

    return sample


def _asked(
    calls: SharedCalls,
    name: str,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> tuple[list[list[int]], list[Any]]:
    """Each rank's share of these completions, and what the function gave for it."""
    shares = deal(
        [tuple(p) for p in prompts],
        [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)],
        calls.ranks.count,
    )
    return shares, calls.ask(name, _dealt(shares, [prompts, completions]))


def _shared_logprobs(
    calls: SharedCalls,
    name: str,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> list[tuple[float, ...]]:
    return in_order(*_asked(calls, name, prompts, completions))


def _shared_divergence(
    calls: SharedCalls,
    name: str,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> Divergence:
    shares, found = _asked(calls, name, prompts, completions)
    columns = {
        field: tuple(in_order(shares, [None if d is None else getattr(d, field) for d in found]))
        for field in ("kl", "entropy", "tokens")
    }
    return Divergence(**columns)


def _shared_score(
    calls: SharedCalls,
    name: str,
    known: Sequence[NamedReward],
    rows: Sequence[PromptRow],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    rewards: tuple[NamedReward, ...],
    on_bad_row: OnBadRow = "error",
) -> ScoredRows:
    """`score_answers` in shares; `rewards` are among those that are `known` on every rank."""
    shares = deal([row.id for row in rows], [1 + len(i) for i in ids], calls.ranks.count)
    functions = [(reward.name, id(reward.function)) for reward in known]
    places = tuple(
        (functions.index((reward.name, id(reward.function))), reward.weight) for reward in rewards
    )
    found = calls.ask(name, _dealt(shares, [rows, texts, ids], places, on_bad_row))
    return merged_scores(shares, found)


def merged_scores(
    shares: Sequence[Sequence[int]], found: Sequence[ScoredRows | None]
) -> ScoredRows:
    """The scores of all shares as those of one call; a column that a share lacks is None there."""
    scored = [(share, s) for share, s in zip(shares, found, strict=True) if s is not None]
    columns = dict.fromkeys(column for _, s in scored for column in s.extra)
    metrics: dict[str, tuple[float, ...]] = {}
    for _, s in scored:
        for name, values in s.metrics.items():
            metrics[name] = (*metrics.get(name, ()), *values)
    places = [share for share, _ in scored]
    left_out = [replace(left, row=share[left.row]) for share, s in scored for left in s.left_out]
    return ScoredRows(
        rewards=tuple(in_order(places, [s.rewards for _, s in scored])),
        components=tuple(in_order(places, [s.components for _, s in scored])),
        left_out=tuple(sorted(left_out, key=lambda left: left.row)),
        metrics=metrics,
        totals=added([s.totals for _, s in scored]),
        extra={
            column: tuple(
                in_order(places, [s.extra.get(column, (None,) * len(s.rewards)) for _, s in scored])
            )
            for column in columns
        },
    )


# ---- all calls of a stretch of work --------------------------------------------------------------


def _scoring(score: ScoreFunction, known: Sequence[NamedReward]) -> Callable[..., ScoredRows]:
    """`score` with this rank's own reward functions, asked for by place and weight."""

    def scored(
        rows: Sequence[PromptRow],
        texts: Sequence[str],
        ids: Sequence[Sequence[int]],
        places: Sequence[tuple[int, float]],
        on_bad_row: OnBadRow,
    ) -> ScoredRows:
        asked = tuple(replace(known[place], weight=weight) for place, weight in places)
        return score(rows, texts, ids, asked, on_bad_row)

    return scored


def round_functions(tools: RoundTools, ranks: Ranks) -> Functions:
    """What a rank does for a round, by name."""
    return {
        "sample": _until_stopped(tools.sampler, ranks),
        "sample negatives": _until_stopped(tools.negative_sampler, ranks),
        "score": _scoring(tools.score, tools.rewards),
        **_logprob_functions(tools),
    }


def _logprob_functions(tools: RoundTools) -> dict[str, LogprobFunction]:
    by_name = {
        "policy": tools.policy_logprobs,
        "reference": tools.ref_logprobs,
        "start": tools.start_logprobs,
    }
    return {name: function for name, function in by_name.items() if function is not None}


def shared_round_tools(tools: RoundTools, calls: SharedCalls) -> RoundTools:
    """A round's tools with its calls shared; a batch is so much larger. For rank 0."""
    both_are_one = tools.sampler is tools.negative_sampler
    sampler = SharedSampler(calls, "sample", tools.sampler)
    # Where two of these are one function it runs once, so they stay one: under its first name.
    shared: dict[LogprobFunction | None, LogprobFunction] = {}
    for name, function in _logprob_functions(tools).items():
        shared.setdefault(function, partial(_shared_logprobs, calls, name))
    return replace(
        tools,
        sampler=sampler,
        negative_sampler=sampler
        if both_are_one
        else SharedSampler(calls, "sample negatives", tools.negative_sampler),
        policy_logprobs=shared.get(tools.policy_logprobs),
        ref_logprobs=shared.get(tools.ref_logprobs),
        start_logprobs=shared.get(tools.start_logprobs),
        score=partial(_shared_score, calls, "score", tools.rewards),
        batch_size=tools.batch_size * calls.ranks.count,
    )


def eval_functions(tools: EvalTools, ranks: Ranks) -> Functions:
    """What a rank does for an evaluation, by name."""
    named: dict[str, Callable[..., Any] | None] = {
        "sample": _until_stopped(tools.sampler, ranks),
        "policy": tools.logprobs,
        "divergence": tools.divergence,
        "score": _scoring(tools.score, (*tools.rewards, *tools.judges)),
    }
    return {name: function for name, function in named.items() if function is not None}


def shared_eval_tools(tools: EvalTools, calls: SharedCalls) -> EvalTools:
    """An evaluation's tools with its calls shared. For rank 0."""
    divergence = None
    if tools.divergence is not None:
        divergence = partial(_shared_divergence, calls, "divergence")
    return replace(
        tools,
        sampler=SharedSampler(calls, "sample", tools.sampler),
        logprobs=partial(_shared_logprobs, calls, "policy"),
        divergence=divergence,
        score=partial(_shared_score, calls, "score", (*tools.rewards, *tools.judges)),
    )


# ---- led by rank 0 -------------------------------------------------------------------------------

Tools = TypeVar("Tools", RoundTools, EvalTools)


def lead_round(
    ranks: Ranks,
    tools: Callable[[], RoundTools],
    work: Callable[[RoundTools], None],
    what: str,
    together: Together,
) -> None:
    """Run `work` on rank 0 with tools whose calls all ranks share. Every rank calls this.

    `tools` makes a rank's own; `what` says when it was; `together` is open on every rank during a
    call. Raises as `SharedCalls.lead` does.
    """
    _lead(ranks, tools, (round_functions, shared_round_tools), work, what, together)


def lead_evaluation(
    ranks: Ranks,
    tools: Callable[[], EvalTools],
    work: Callable[[EvalTools], T],
    what: str,
    together: Together,
) -> T:
    """The same for an evaluation; gives every rank what `work` gave."""
    found: list[T] = []
    shared = (eval_functions, shared_eval_tools)
    _lead(ranks, tools, shared, lambda t: found.append(work(t)), what, together)
    return ranks.from_rank_zero(found[0] if found else cast("T", None))


def _lead(
    ranks: Ranks,
    tools: Callable[[], Tools],
    sharing: tuple[Callable[[Tools, Ranks], Functions], Callable[[Tools, SharedCalls], Tools]],
    work: Callable[[Tools], None],
    what: str,
    together: Together,
) -> None:
    made: list[Tools] = []
    ranks.run_or_stop(lambda: made.append(tools()), what)
    (own,) = made
    functions, shared = sharing
    calls = SharedCalls(ranks, functions(own, ranks), together)
    calls.lead(lambda: work(own if ranks.count == 1 else shared(own, calls)), what)
