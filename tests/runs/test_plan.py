"""How much a run will do, and with what share of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neat_align import NEATConfig
from neat_align.errors import ConfigError
from neat_align.rounds.prompt_order import percent_of_data, prompt_at
from neat_align.runs.events import WHOLE_DATA, RunCallback, tell_plan
from neat_align.runs.plan import RunPlan, plan_run


def config(folder: Path, **changes: Any) -> NEATConfig:
    return NEATConfig(output_dir=str(folder), **changes)


def planned(folder: Path, rows: int, per_round: int = 64, **changes: Any) -> RunPlan:
    return plan_run(
        config(folder, **changes), [10] * rows, prompts_per_round=per_round, steps_per_round=16
    )


def test_a_default_run_by_hand(tmp_path: Path) -> None:
    plan = planned(tmp_path, 10_000)
    assert plan.lines(more=WHOLE_DATA) == [
        "plan: 3 rounds of 64 prompts, 48 optimizer steps",
        "data: 192 prompts: 1.92 % of the data (10,000 rows); data_passes: 1 is one pass",
        "  over all of it",
        "sampling: 768 completions of at most 196,608 tokens, from prompts of 1,920",
        "  tokens; more where prompts give nothing to learn from, at most twice as many",
    ]
    assert plan.to_json() == {
        "rows": 10_000,
        "rounds": 3,
        "prompts_per_round": 64,
        "completions_per_prompt": 4,
        "prompt_tokens": 1_920,
        "max_completion_length": 256,
        "optimizer_steps": 48,
        "prompts": 192,
        "completions": 768,
        "max_completion_tokens": 196_608,
        "share_of_data": 0.0192,
    }


@pytest.mark.parametrize(
    ("changes", "rows", "rounds", "steps", "share"),
    [
        ({"data_passes": 1}, 10_000, 157, 2_512, "100.5 %"),  # 10,048 prompts
        ({"data_passes": 1.0}, 640, 10, 160, "100 %"),
        ({"data_passes": 0.1}, 640, 1, 16, "10 %"),  # exactly: 0.1 is no float
        ({"data_passes": 0.3}, 640, 3, 48, "30 %"),
        ({"data_passes": 2}, 640, 20, 320, "200.0 %"),
        ({"data_passes": 0.001}, 640, 1, 16, "10 %"),  # a round is the least
        ({"max_steps": 17}, 6_400, 2, 17, "2 %"),
        ({"max_steps": 16}, 6_400, 1, 16, "1 %"),
        ({"num_train_epochs": 5}, 64, 5, 80, "500.0 %"),
    ],
)
def test_rounds_steps_and_share(
    tmp_path: Path, changes: dict[str, Any], rows: int, rounds: int, steps: int, share: str
) -> None:
    plan = planned(tmp_path, rows, **changes)
    assert (plan.rounds, plan.optimizer_steps) == (rounds, steps)
    assert percent_of_data(plan.share) == share


@given(
    rows=st.integers(1, 400),
    per_round=st.integers(1, 80),
    passes=st.one_of(st.integers(1, 3), st.sampled_from([0.25, 0.5, 0.1, 1.5])),
)
def test_one_pass_takes_every_row(
    tmp_path_factory: pytest.TempPathFactory, rows: int, per_round: int, passes: float
) -> None:
    groups = min(rows, per_round)
    args = config(Path("unused"), data_passes=passes)
    lengths = list(range(1, rows + 1))
    plan = plan_run(args, lengths, prompts_per_round=groups, steps_per_round=3)
    taken = [prompt_at(rows, args.seed, i) for i in range(plan.prompts)]
    for number in range(int(passes)):
        assert set(taken[number * rows : (number + 1) * rows]) == set(range(rows))
    assert plan.prompts >= passes * rows > plan.prompts - groups  # and no round more than it takes
    assert plan.prompt_tokens == sum(lengths[i] for i in taken)


@given(
    st.builds(
        RunPlan,
        rows=st.integers(1, 10**9),
        rounds=st.integers(1, 10**7),
        prompts_per_round=st.integers(1, 10**6),
        completions_per_prompt=st.integers(0, 64),
        prompt_tokens=st.none() | st.integers(1, 10**15),
        max_completion_length=st.integers(1, 10**5),
        optimizer_steps=st.integers(0, 10**9),
    ),
    st.integers(0, 10**6),
)
def test_any_plan_is_a_few_lines_of_a_terminal(plan: RunPlan, done: int) -> None:
    lines = plan.lines(more=WHOLE_DATA, done_steps=done)
    assert 3 <= len(lines) <= 7
    assert max(map(len, lines)) <= 80
    is_whole = plan.prompts == plan.rows
    assert (": 100 % of" in " ".join(lines)) == is_whole


def test_a_share_is_never_rounded_to_all_of_the_data() -> None:
    assert percent_of_data(9_999 / 10_000) == "99.9 %"
    assert percent_of_data(10_001 / 10_000) == "100.1 %"
    assert percent_of_data(64 / 1_000_000) == "0.0064 %"
    assert percent_of_data(1 / 10**9) == "under 0.001 %"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_train_epochs": 5}, "data_passes is 1 and num_train_epochs is 5, and both say how"),
        ({"max_steps": 8}, "data_passes is 1 and max_steps is 8, and both say how long to train"),
    ],
)
def test_passes_and_another_length_are_refused(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, data_passes=1, **other)
    for value in (0, -1):
        with pytest.raises(ConfigError, match=r"data_passes is .*a number of passes"):
            config(tmp_path, data_passes=value)


class Hears(RunCallback):
    def __init__(self) -> None:
        self.heard: list[tuple[RunPlan, int]] = []

    def on_plan(self, plan: RunPlan, done_steps: int) -> None:
        self.heard.append((plan, done_steps))


def test_the_plan_is_logged_where_no_callback_shows_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, hears = planned(tmp_path, 100), Hears()
    tell_plan([hears, RunCallback()], plan, 7)
    assert (hears.heard, caplog.records) == ([(plan, 7)], [])
    tell_plan([RunCallback()], plan, 7)
    (said,) = caplog.records
    assert said.message.startswith("plan: 3 rounds of 64 prompts, 48 optimizer steps (7 done)\n")
    assert said.levelname == "WARNING"  # shown by default
