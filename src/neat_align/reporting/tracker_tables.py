"""A round's groups as the rows of a table, for the trackers that `report_to` names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neat_align.prompts.rows import Prompt
from neat_align.reporting.card_texts import table, words
from neat_align.reporting.pages import plain
from neat_align.reporting.terminal import best_first, end_of
from neat_align.rounds.completions import CompletionGroup

# A table is to be looked at: rounds/ has all of it.
MOST_ROWS = 128
MOST_CHARACTERS = 2000
# TensorBoard shows a table as text, whole, in the browser.
MARKDOWN_ROWS, MARKDOWN_CHARACTERS = 32, 400


def table_rows(
    groups: Sequence[CompletionGroup],
    round_index: int,
    reward_names: Sequence[str],
    *,
    most: int = MOST_ROWS,
) -> list[dict[str, Any]]:
    """At most so many completions of a round, a row each; whole groups, best reward first.

    Rounds count from 0, as `round` is logged. A reward that abstained is None. Groups are read from
    their file one by one, and no more of them than are shown.
    """
    rows: list[dict[str, Any]] = []
    for group in groups:
        if rows and len(rows) + len(group.completions) > most:
            break
        prompt = _clipped(prompt_text(group.prompt), MOST_CHARACTERS)
        for c in best_first(group):
            each = dict(zip(reward_names, c.reward_components, strict=False))
            rows.append(
                {
                    "round": round_index,
                    "prompt": prompt,
                    "origin": c.origin,
                    "reward": c.reward,
                    **({f"reward/{k}": v for k, v in each.items()} if len(each) > 1 else {}),
                    "completion": _clipped(c.text, MOST_CHARACTERS),
                    "tokens": len(c.token_ids),
                    "end": end_of(c),
                }
            )
    return rows[:most]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text: a conversation with a line a turn, and who says it before it."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The first rows as a Markdown table, long texts cut."""
    if not rows:
        return "no completions"
    names = list(rows[0])
    shown = [[_cell(row.get(name)) for name in names] for row in rows[:MARKDOWN_ROWS]]
    return table([words(name) for name in names], shown)


def _cell(value: Any) -> str:
    if isinstance(value, float) or value is None:
        return plain(value, 3)
    return words(_clipped(str(value), MARKDOWN_CHARACTERS))


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
