"""What is shown of a run that works, and how it reads: no terminal here.

What was written under a negative instruction is folded away: it is harmful by design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from neat_align.reporting.terminal import printable
from neat_align.rounds.completions import Completion, CompletionGroup

# What a person calls the stages.
_STAGES = {
    "sample": "sampling",
    "score": "scoring",
    "evaluate (plain)": "plain answers",
    "evaluate (positive)": "answers under positive instructions",
    "evaluate (negative)": "answers under negative instructions",
}
# Columns of a quoted answer.
_QUOTED = 60
# Characters that a part of one may be shown as: a byte of UTF-8 each.
_PART_OF_ONE = 4
# Origins whose answers are not shown.
_FOLDED = ("negative", "rejected")


@dataclass
class Stage:
    """A piece of work with an end, and how far it is.

    `already` were finished when it was first heard of: no speed of this process's. It has been
    worked on for `worked` seconds, and since `since` (None: something else is, in between).
    """

    name: str
    since: float | None
    total: int
    already: int
    finished: int
    tokens: int = 0
    worked: float = 0.0

    def seconds(self, now: float) -> float:
        """How long it has been worked on."""
        return self.worked + (0.0 if self.since is None else now - self.since)

    def pause(self, now: float) -> None:
        """Something else is worked on."""
        self.worked, self.since = self.seconds(now), None

    def seconds_left(self, now: float) -> float | None:
        """None until something was finished."""
        made = self.finished - self.already
        return (self.total - self.finished) * self.seconds(now) / made if made > 0 else None

    def took(self, now: float) -> str:
        """How long it took, and how fast it was."""
        speed = self.speed(now)
        return f"{_duration(self.seconds(now))}{f', {speed}' if speed else ''}"

    def speed(self, now: float) -> str:
        """Tokens a second, where tokens are counted."""
        seconds = self.seconds(now)
        return f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens and seconds > 0 else ""


@dataclass
class RunState:
    """What is shown of a run; nothing of it is drawn here.

    `round_seconds` is what the last whole round took, with its learning and its checks.
    """

    title: str = ""
    stage: Stage | None = None
    rounds: int = 0
    round_index: int = 0
    step: int = 0
    steps: int = 0
    round_since: float | None = None
    round_seconds: float | None = None
    best: Completion | None = None
    worst: Completion | None = None

    def said(self, stage: Stage) -> str:
        """Where it is, and how far."""
        return f"{self.where(stage)} {stage.finished:,}/{stage.total:,}"

    def where(self, stage: Stage | None) -> str:
        """The round or evaluation, and the stage of it."""
        title = self.title
        if round_number(title) and self.rounds > 1:
            title += f" of {self.rounds}"
        if stage is None:
            return title
        return f"{title}: {_STAGES.get(stage.name, stage.name)}"

    def run_left(self, now: float) -> float | None:
        """Seconds until the last round's end, by what the last one took; None before that."""
        if self.round_seconds is None or self.round_since is None or not round_number(self.title):
            return None
        done = now - self.round_since
        rest = max(0.0, self.round_seconds - done)
        return rest + (self.rounds - self.round_index - 1) * self.round_seconds


def drawn(state: RunState, now: float) -> RenderableType:
    """What a terminal shows: at most four lines."""
    stage = state.stage
    line = Table.grid(padding=(0, 1))
    parts: list[RenderableType] = [Spinner("dots", style="bold"), Text(state.where(stage))]
    if stage is not None:
        parts.append(ProgressBar(total=max(1, stage.total), completed=stage.finished, width=16))
        parts.append(Text(f"{stage.finished:,}/{stage.total:,}"))
        parts.append(Text("  ".join(p for p in (stage.speed(now), _left(state, now)) if p)))
    line.add_row(*parts)
    lines: list[RenderableType] = [line]
    if state.steps:
        left = state.run_left(now)
        more = "" if left is None else f"; the run has about {_duration(left)} left"
        lines.append(Text(f"  step {state.step:,} of {state.steps:,}{more}", style="dim"))
    lines += [
        Text(f"  {word:<5} {quoted(c)}", style="dim", overflow="ellipsis", no_wrap=True)
        for word, c in (("best", state.best), ("worst", state.worst))
        if c is not None
    ]
    return Group(*lines)


def plain_line(state: RunState, stage: Stage, now: float) -> str:
    """The same in a line."""
    parts = [state.said(stage), stage.speed(now), _left(state, now)]
    run_left = state.run_left(now)
    if run_left is not None:
        parts.append(f"run: about {_duration(run_left)} left")
    return ", ".join(part for part in parts if part)


def round_number(title: str) -> int:
    """Which round is worked on, counted from 1; 0 for what is no round."""
    word, _, number = title.partition(" ")
    return int(number) if word == "round" and number.isdecimal() else 0


def _left(state: RunState, now: float) -> str:
    stage = state.stage
    left = None if stage is None else stage.seconds_left(now)
    return "" if not left else f"{_duration(left)} left"


def _duration(seconds: float) -> str:
    """As a person says it: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def first_groups(groups: Sequence[CompletionGroup], *, of: int) -> list[str]:
    """The prompts of a few groups of so many, each with its best and its worst answer."""
    lines = [f"{len(groups)} of the round's {of:,} groups (neat-align inspect shows all):"]
    for group in groups:
        lines.append(f"  prompt {_cut(prompt_text(group), _QUOTED + 9)}")
        answers = sorted(group.completions, key=by_reward)
        if answers:
            lines += [f"  best   {quoted(answers[-1])}", f"  worst  {quoted(answers[0])}"]
    return lines


def asked_and_answered(group: CompletionGroup) -> list[str]:
    """A prompt, and the first answer of each origin that is sampled."""
    lines = [f"  prompt   {_cut(prompt_text(group), _QUOTED + 7)}"]
    lines += [f"  {c.origin:<8} {quoted(c)}" for c in shown_answers(group)]
    return lines


def shown_answers(group: CompletionGroup) -> list[Completion]:
    """The first answer of each origin that is sampled."""
    return [c for c in group.completions if c.index == 0 and c.seed is not None]


def fills_its_line(completion: Completion) -> bool:
    """Whether a quote of it stays as it is if more tokens follow: it has ended, is folded away, or
    is so long that its last character, which may be a part of one, is cut off.
    """
    if completion.finish_reason == "stop" or completion.origin in _FOLDED:
        return True
    return len(_in_a_line(completion.text)) > _QUOTED + _PART_OF_ONE


def prompt_text(group: CompletionGroup) -> str:
    """What the user said last."""
    return group.prompt if isinstance(group.prompt, str) else str(group.prompt[-1]["content"])


def quoted(completion: Completion) -> str:
    """A completion's reward and its beginning. What was written under a negative instruction is
    folded away: it is harmful by design.
    """
    if completion.origin in _FOLDED:
        text = f"({completion.origin}, folded away)"
    else:
        text = _cut(completion.text, _QUOTED)
    return text if completion.reward is None else f"{completion.reward:+.2f}  {text}"


def by_reward(completion: Completion) -> float:
    """By reward; one without is in the middle."""
    return 0.0 if completion.reward is None else completion.reward


def _in_a_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _cut(text: str, width: int) -> str:
    words = _in_a_line(text)
    return words if len(words) <= width else f"{words[: width - 1]}…"
