"""What a person sees while a run works: in a terminal, and in plain lines where there is none."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from neat_align.cli.display import LINE_EVERY, RunDisplay
from neat_align.cli.run_state import RunState, Stage, drawn
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.runs.plan import RunPlan

PLAN = RunPlan(
    rows=40,
    rounds=3,
    prompts_per_round=8,
    completions_per_prompt=2,
    prompt_tokens=None,
    max_completion_length=16,
    optimizer_steps=6,
)


class Watched:
    """A display on a clock that a test moves, and what it wrote."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.now, self.file = 100.0, io.StringIO()
        console = Console(file=self.file, width=80, force_terminal=terminal)
        self.display = RunDisplay(console, lambda: self.now)
        self.display.on_plan(PLAN, 0)

    def at(self, seconds: float, *stage: Any) -> None:
        self.now = 100.0 + seconds
        self.display.on_stage(*stage)

    def step(self, global_step: int) -> None:
        state = SimpleNamespace(is_world_process_zero=True, global_step=global_step, max_steps=6)
        self.display.on_step_begin(None, state, None)
        state.global_step += 1
        self.display.on_step_end(None, state, None)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def group(*answers: Completion) -> CompletionGroup:
    return CompletionGroup("p", [{"role": "user", "content": "Hello \x1b[31mthere"}], (1,), answers)


def test_a_stage_says_how_fast_it_was_when_another_one_begins() -> None:
    run = Watched()
    run.at(0, "round 1", "sample", 0, 16)
    run.display.on_tokens(200)
    run.at(4, "round 1", "sample", 16, 16)
    run.at(4, "round 1", "score", 0, 8)
    run.at(6, "round 1", "score", 8, 8)
    run.display.on_stages_end("round 1")
    assert "round 1 of 3: sampling 16/16, 4 s, 50 tokens/s" in run.lines
    assert run.lines[-1] == "round 1 of 3: scoring 8/8, 2 s"


def test_the_time_of_a_stage_is_its_own_where_two_take_turns() -> None:
    run = Watched()
    run.at(0, "round 1", "sample", 0, 8)
    run.at(2, "round 1", "sample", 4, 8)
    run.at(2, "round 1", "score", 0, 4)
    run.at(92, "round 1", "score", 2, 4)
    run.at(92, "round 1", "sample", 4, 8)
    run.at(94, "round 1", "sample", 8, 8)
    run.at(94, "round 1", "score", 2, 4)
    assert "round 1 of 3: sampling 8/8, 4 s" in run.lines


def test_what_was_finished_before_a_break_is_no_speed_of_ours() -> None:
    run = Watched()
    run.at(0, "round 1", "sample", 90, 100)
    run.at(LINE_EVERY + 5, "round 1", "sample", 95, 100)
    assert run.lines[-1] == "round 1 of 3: sampling 95/100, 20 s left"


def test_lines_of_one_stage_are_a_few_a_minute() -> None:
    run = Watched()
    for second in range(61):
        run.at(second, "round 1", "sample", second, 1000)
    assert len(run.lines) == 1 + 60 // LINE_EVERY


def test_the_time_left_of_a_run_is_what_its_last_round_took() -> None:
    run = Watched()
    run.at(0, "round 1", "sample", 0, 16)
    run.now = 160.0
    run.step(0)
    run.step(1)
    run.at(120, "round 2", "sample", 0, 16)
    run.at(150, "round 2", "sample", 4, 16)
    # Two minutes a round: a minute and a half of this one are left, and the last one.
    assert run.lines[-1].endswith("run: about 4 min left")
    assert "round 1 of 3: learning 2/2, 0 s" in run.lines


def test_a_resumed_run_goes_on_in_its_own_round() -> None:
    run = Watched()
    run.step(4)
    run.step(5)
    assert run.lines == [
        "round 3 of 3: learning 0/2",
        "round 3 of 3: learning 2/2, 0 s",
    ]


def test_two_first_groups_are_shown_once_and_negatives_are_folded_away() -> None:
    run = Watched()
    answers = (
        Completion("positive", 0, "Good\nmorning " * 20, (1,), reward=0.9),
        Completion("negative", 0, "a harmful text", (2,), reward=-0.4),
    )
    run.display.on_round_made(0, [group(*answers)] * 3)
    run.display.on_round_made(1, [group(*answers)] * 3)
    assert run.lines[0] == "2 of the round's 3 groups (neat-align inspect shows all):"
    assert run.lines[1] == "  prompt Hello there"
    assert run.lines[2].startswith("  best   +0.90  Good morning Good")
    assert run.lines[3] == "  worst  -0.40  (negative, folded away)"
    assert len(run.lines) == 1 + 2 * 3
    assert max(map(len, run.lines)) <= 80
    assert "harmful" not in run.file.getvalue()


def test_a_terminal_shows_all_of_it_in_four_lines_of_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    state = RunState(
        title="round 2",
        rounds=12,
        round_index=1,
        step=24,
        steps=144,
        round_since=100.0,
        round_seconds=240.0,
        best=Completion("positive", 0, "thank you " * 30, (1,), reward=0.9),
        worst=Completion("negative", 0, "a harmful text", (2,), reward=-0.4),
        stage=Stage("sample", 100.0, 2048, 0, 1024, tokens=60_000),
    )
    with console.capture() as shown:
        console.print(drawn(state, now=130.0))
    lines = shown.get().splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 80
    assert "round 2 of 12: sampling" in lines[0]
    assert "1,024/2,048" in lines[0]
    assert "2,000 tokens/s" in lines[0]
    assert "30 s left" in lines[0]
    assert lines[1] == "  step 24 of 144; the run has about 44 min left"
    assert lines[3] == "  worst -0.40  (negative, folded away)"


def test_a_terminal_is_given_back_when_the_stages_end() -> None:
    run = Watched(terminal=True)
    run.at(0, "evaluate", "evaluate (plain)", 0, 4)
    run.at(1, "evaluate", "evaluate (plain)", 4, 4)
    run.display.on_stages_end("evaluate")
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    written = run.file.getvalue()
    assert written.rindex(shown) > written.rindex(hidden)
