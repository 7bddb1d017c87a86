"""The three forms of judging: scores of answers, pairs in both orders, rankings of groups.

Each makes its calls at once and gives an entry an answer: a score, or None where judgements failed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from neat_align.network.event_loop import all_of
from neat_align.prompts.rows import Prompt
from neat_align.rewards import judge_prompts as ask
from neat_align.rewards.judge_answers import (
    Verdict,
    expected_score,
    read_better,
    read_order,
    read_score,
    read_verdict,
)
from neat_align.rewards.judge_client import Reply, Session
from neat_align.rewards.judge_file import JudgeSettings

# What the first of a pair gets for a verdict.
_WON = {"A": 1.0, "B": 0.0, ask.TIE: 0.5}


@dataclass(frozen=True)
class Judged:
    """A score an answer, and the reasons, where they were given; both None where it failed."""

    scores: list[float | None]
    reasons: list[str | None] = field(default_factory=list)


# ---- pointwise -----------------------------------------------------------------------------------


async def judge_each(
    session: Session, settings: JudgeSettings, prompts: Sequence[Prompt], answers: Sequence[str]
) -> Judged:
    """Each answer's score on the rubric's scale."""
    rubric = settings.rubric

    async def judged(prompt: Prompt, answer: str) -> Verdict | None:
        if settings.logprobs:
            asked = ask.score_only(rubric, prompt, answer)
        else:
            asked = ask.pointwise(rubric, prompt, answer, explain=settings.explain)
        verdict: Verdict | None = await session.judgement(asked, read)
        return verdict

    def read(reply: Reply) -> Verdict:
        if settings.logprobs and reply.first_token:
            return Verdict(expected_score(reply.first_token, rubric.scale))
        verdict = read_verdict(reply.text, "score")
        return Verdict(read_score(verdict.value, rubric.scale), verdict.reasoning)

    found = await all_of(judged(p, a) for p, a in zip(prompts, answers, strict=True))
    scores = [None if v is None else float(v.value) for v in found]
    return Judged(scores, [None if v is None else v.reasoning for v in found])


# ---- pairwise ------------------------------------------------------------------------------------


async def judge_pairs(
    session: Session, settings: JudgeSettings, prompts: Sequence[Prompt], answers: Sequence[str]
) -> Judged:
    """Each answer's win rate against others to the same prompt; None for one without any."""
    groups = groups_of(prompts)
    pairs = [
        [(group[i], group[j]) for i, j in schedule(len(group), settings.opponents)]
        for group in groups
    ]
    flat = [pair for of_group in pairs for pair in of_group]
    results = await all_of(
        _first_wins(session, settings, prompts[i], answers[i], answers[j]) for i, j in flat
    )
    return Judged(win_rates(len(answers), dict(zip(flat, results, strict=True))))


async def judge_against_chosen(
    session: Session,
    settings: JudgeSettings,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    chosen: Sequence[str],
) -> Judged:
    """1 for each answer that is better than the data's own, 0 for a worse one, ½ for a tie."""
    asked = zip(prompts, answers, chosen, strict=True)
    return Judged(await all_of(_first_wins(session, settings, p, a, c) for p, a, c in asked))


async def _first_wins(
    session: Session, settings: JudgeSettings, prompt: Prompt, first: str, second: str
) -> float | None:
    """1 where the first answer is better in both orders, 0 where the second is, else ½."""
    if first.strip() == second.strip():
        return 0.5  # nobody needs to be asked

    def read(reply: Reply) -> str:
        return read_better(read_verdict(reply.text, "better").value)

    rubric, explain = settings.rubric, settings.explain
    there, back = await all_of(
        session.judgement(ask.pairwise(rubric, prompt, a, b, explain=explain), read)
        for a, b in ((first, second), (second, first))
    )
    return both_orders(there, back)


def both_orders(there: str | None, back: str | None) -> float | None:
    """What the first of a pair gets: 1, 0, or ½ where the two verdicts are not of one mind.

    `there` names the better one with the first answer as A, `back` with the first as B. None where
    one of them is missing: a verdict from one order alone would hold the judge's bias.
    """
    if there is None or back is None:
        return None
    first, second = _WON[there], 1.0 - _WON[back]
    return first if first == second else 0.5


def groups_of(prompts: Sequence[Prompt]) -> list[list[int]]:
    """The positions of each prompt's rows, which stand together."""
    groups: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        if i and prompt == prompts[i - 1]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def schedule(n: int, opponents: int) -> list[tuple[int, int]]:
    """The pairs (i < j) of n answers in which each meets as many others, at most `opponents`.

    All pairs where that is enough. Else answers meet their neighbours in a circle, then those two
    away, …: an odd number of opponents for an odd n does not come out even, and is one less (but at
    least two).
    """
    if opponents >= n - 1:
        return [(i, j) for i in range(n) for j in range(i + 1, n)]
    is_odd, even = opponents % 2 == 1, n % 2 == 0
    farthest = 1 if opponents == 1 and not even else opponents // 2
    pairs = [(i, (i + step) % n) for step in range(1, farthest + 1) for i in range(n)]
    if is_odd and even:
        pairs += [(i, i + n // 2) for i in range(n // 2)]
    return sorted((min(pair), max(pair)) for pair in pairs)


def win_rates(n: int, results: Mapping[tuple[int, int], float | None]) -> list[float | None]:
    """Each answer's mean result over its pairs; None for one without a result."""
    won: list[list[float]] = [[] for _ in range(n)]
    for (i, j), result in results.items():
        if result is not None:
            won[i].append(result)
            won[j].append(1.0 - result)
    return [fmean(values) if values else None for values in won]


# ---- ranking -------------------------------------------------------------------------------------


async def judge_groups(
    session: Session, settings: JudgeSettings, prompts: Sequence[Prompt], answers: Sequence[str]
) -> Judged:
    """Each answer's place among those to its prompt, 1 to 0; None for a single one."""
    groups = [group for group in groups_of(prompts) if len(group) > 1]
    ranked = await all_of(
        _rank(session, settings, prompts[group[0]], [answers[i] for i in group]) for group in groups
    )
    scores: list[float | None] = [None] * len(answers)
    for group, places in zip(groups, ranked, strict=True):
        if places is not None:
            for i, score in zip(group, places, strict=True):
                scores[i] = score
    return Judged(scores)


async def _rank(
    session: Session, settings: JudgeSettings, prompt: Prompt, answers: Sequence[str]
) -> list[float] | None:
    """One group's scores; None where a ranking failed."""
    shuffled = sorted(range(len(answers)), key=lambda i: _digest(prompt, answers[i], i))

    async def order(shown: Sequence[int]) -> list[int] | None:
        def read(reply: Reply) -> list[int]:
            return read_order(read_verdict(reply.text, "ranking").value, len(shown))

        texts = [answers[i] for i in shown]
        asked = ask.ranking(settings.rubric, prompt, texts, explain=settings.explain)
        places: list[int] | None = await session.judgement(asked, read)
        return None if places is None else [shown[place] for place in places]

    orders = await all_of(order(shown) for shown in (shuffled, shuffled[::-1])[: settings.orders])
    known = [found for found in orders if found is not None]
    return place_scores(known) if len(known) == len(orders) else None


def place_scores(orders: Sequence[Sequence[int]]) -> list[float]:
    """The mean over the orders (best first) of (n − place) / (n − 1), place 1 being the best."""
    n = len(orders[0])
    return [fmean((n - 1 - order.index(i)) / (n - 1) for order in orders) for i in range(n)]


def _digest(prompt: Prompt, answer: str, i: int) -> bytes:
    # By the answer first: the order in which a group came says who wrote what.
    return hashlib.sha256(repr((answer, prompt, i)).encode("utf-8", "surrogatepass")).digest()
