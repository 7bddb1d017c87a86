"""What a terminal shows of a run: which callbacks its arguments ask for."""

from __future__ import annotations

from pathlib import Path

from neat_align import NEATConfig, terminal_callbacks


def names(folder: Path, *, disable_tqdm: bool, log_completions: bool) -> list[str]:
    args = NEATConfig(
        output_dir=str(folder), disable_tqdm=disable_tqdm, log_completions=log_completions
    )
    return [type(callback).__name__ for callback in terminal_callbacks(args)]


def test_the_display_and_groups_are_shown_as_the_arguments_ask(tmp_path: Path) -> None:
    plan, bars = "PrintPlan", ["PrintPlan", "RunDisplay"]
    assert names(tmp_path, disable_tqdm=False, log_completions=False) == bars
    assert names(tmp_path, disable_tqdm=False, log_completions=True) == [*bars, "PrintGroups"]
    assert names(tmp_path, disable_tqdm=True, log_completions=True) == [plan, "PrintGroups"]
    assert names(tmp_path, disable_tqdm=True, log_completions=False) == [plan]
