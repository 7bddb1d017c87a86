"""A language model behind an OpenAI-compatible endpoint as a reward: it reads answers and a rubric,
and says how good they are. docs/judges.md is for its users.

    pointwise  each answer's score on the rubric's scale; one call an answer
    pairwise   each answer's win rate, 0 to 1: against the others to its prompt (K answers: K(K−1)
               calls, less with `opponents`), or against the data's `chosen` answer (two calls)
    ranking    each answer's place among those to its prompt, 1 (best) to 0; `orders` calls a prompt

A pair is judged in both orders; where the two verdicts differ, the position decided and it is a
tie. What cannot be judged is None, never a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from neat_align.prompts.rows import Prompt
from neat_align.rewards.judge_client import Counts, JudgeClient, Session
from neat_align.rewards.judge_file import JudgeSettings, read_judge
from neat_align.rewards.judge_forms import (
    Judged,
    judge_against_chosen,
    judge_each,
    judge_groups,
    judge_pairs,
)
from neat_align.rewards.protocol import (
    CompletionInput,
    NamedReward,
    Score,
    Unscorable,
    completion_text,
)

_MILLION = 1_000_000
_NO_ANSWER = (
    "has no chosen answer, and the judge compares with that (against: chosen): give the row one, "
    "or set against: group"
)


def judge_facts(rewards: Iterable[NamedReward]) -> dict[str, str]:
    """Who judges by what, for a run's record and its key: a line a judge, by the name of each."""
    facts = {}
    for reward in rewards:
        if isinstance(reward.function, JudgeReward):
            s = reward.function.settings
            what = f"{s.model}, {s.form}, rubric {s.rubric.name}, {s.fingerprint()[:12]}"
            facts[f"judge {reward.name}"] = what
    return facts


def compares_group(reward: NamedReward) -> bool:
    """Whether a score says how an answer stands among those to its prompt, and nothing of how good
    they are: its mean is the same for every policy.
    """
    return isinstance(reward.function, JudgeReward) and reward.function.settings.compares_group


class JudgeReward:
    """A judge as a reward function. RewardError where its endpoint may not be asked."""

    def __init__(self, settings: JudgeSettings, allow_http_hosts: Sequence[str] = ()) -> None:
        self.settings, self.name = settings, settings.name
        self.client = JudgeClient(settings, allow_http_hosts)
        self.target = self.client.target

    @classmethod
    def from_file(cls, path: str, allow_http_hosts: Sequence[str] = ()) -> JudgeReward:
        """The judge of a YAML file."""
        return cls(read_judge(path), allow_http_hosts)

    @property
    def token_variable(self) -> str | None:
        """The environment variable with the API key that is sent."""
        return self.settings.api_key_env or None

    @property
    def needs_chosen(self) -> bool:
        """Whether answers are held against the data's own."""
        return self.settings.form == "pairwise" and self.settings.against == "chosen"

    def unscorable_answers(self, chosen: Sequence[str | None]) -> dict[int, str]:
        """The reason by position, for rows without the answer that the judge compares with."""
        if not self.needs_chosen:
            return {}
        return {i: _NO_ANSWER for i, text in enumerate(chosen) if not (text or "").strip()}

    async def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        chosen: Sequence[str | None] | None = None,
        log_extra: Callable[[str, Sequence[Any]], None] | None = None,
        log_total: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[Score]:
        """The judge's score for each answer; None where a judgement failed."""
        answers = [completion_text(completion) for completion in completions]
        own = chosen or [None] * len(answers)
        missing = self.unscorable_answers(own)
        rows = [i for i in range(len(answers)) if i not in missing]
        async with self.client.session() as session:
            told = [prompts[i] for i in rows], [answers[i] for i in rows]
            judged = await self._judged(session, *told, [own[i] or "" for i in rows])
            session.close()
        if log_extra is not None and any(judged.reasons):
            log_extra(f"{self.name}/reasoning", judged.reasons)
        if log_total is not None:
            for name, value in self._totals(session.counts).items():
                log_total(f"judge/{self.name}/{name}", value)
        scores: list[Score] = [Unscorable(_NO_ANSWER)] * len(answers)
        for i, score in zip(rows, judged.scores, strict=True):
            scores[i] = score
        return scores

    async def _judged(
        self,
        session: Session,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        chosen: Sequence[str],
    ) -> Judged:
        if self.needs_chosen:
            return await judge_against_chosen(session, self.settings, prompts, answers, chosen)
        judge = {"pointwise": judge_each, "pairwise": judge_pairs, "ranking": judge_groups}
        return await judge[self.settings.form](session, self.settings, prompts, answers)

    def _totals(self, counts: Counts) -> dict[str, float]:
        """What this call used, for the log; the cost where the judge's file has prices."""
        totals: dict[str, float] = {
            "calls": counts.calls,
            "cached": counts.cached,
            "failed": counts.failed.total(),
            "prompt_tokens": counts.prompt_tokens,
            "completion_tokens": counts.completion_tokens,
        }
        prices = self.settings.prices
        if prices.input or prices.output:
            paid = counts.prompt_tokens * prices.input + counts.completion_tokens * prices.output
            totals["cost"] = paid / _MILLION
        return {name: float(value) for name, value in totals.items()}
