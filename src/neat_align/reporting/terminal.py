"""Groups of completions in the terminal: what was asked, what was answered, what it was worth.

Model output is shown as text and nothing else: it is never read as markup, and control characters
are taken out of it.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeAlias, TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from neat_align.errors import ConfigError, DataError
from neat_align.reporting.group_counts import Counts, counts_of, reward_names
from neat_align.rounds.completions import ORIGINS, Completion, CompletionGroup, Origin
from neat_align.rounds.group_file import GroupFile, unreadable, without_tokens

# Columns of a group's text on a terminal of 80.
_ROOM = 45
_T = TypeVar("_T")
SortOrder: TypeAlias = Literal["order", "gap", "reward"]
ORIGIN_STYLES: dict[Origin, str] = {
    "positive": "bright_blue",
    "negative": "dark_orange",
    "plain": "default",
    "chosen": "green",
    "rejected": "magenta",
}
# A whole escape sequence first (its letters would stay behind), then single control and reordering
# characters.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor movement
    # window titles, links, clipboard
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """Text that a terminal can only print.

    Escape sequences, controls and reordering marks are taken out, lone surrogates replaced.
    """
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", text)).expandtabs(4)


def render_group(
    group: CompletionGroup,
    number: int,
    total: int,
    *,
    origin: str | None = None,
    reward_names: Sequence[str] = (),
) -> RenderableType:
    """One group: its prompt, then its completions, best reward first. `number` counts from 1.

    Where there are several rewards (`reward_names`), each stands below the text. With `origin` only
    completions of that origin are shown; ranks are still those of the whole group, equal rewards
    share one, and a completion without a reward has none.
    """
    title = Text.assemble(
        ("prompt ", "dim"),
        f"{number} of {total}",
        ("  ", ""),
        (_shortened(printable(group.prompt_id), 40), "dim"),
    )
    table = Table(
        box=box.SIMPLE_HEAD, expand=True, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False
    )
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("origin", no_wrap=True)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("end", no_wrap=True)
    table.add_column("text", ratio=1, overflow="fold")
    rewards = [c.reward for c in group.completions if c.reward is not None]
    for c in best_first(group):
        if origin is not None and c.origin != origin:
            continue
        rank = "–" if c.reward is None else str(1 + sum(r > c.reward for r in rewards))
        style = ORIGIN_STYLES[c.origin]
        table.add_row(
            rank,
            Text(c.origin, style=style),
            _number(c.reward),
            str(len(c.token_ids)),
            end_of(c),
            _answer(c, reward_names),
        )
        table.add_row()
    return Group(
        Panel(_prompt(group), title=title, title_align="left", box=box.ROUNDED, border_style="dim"),
        table,
    )


def _answer(c: Completion, reward_names: Sequence[str]) -> Text:
    text = c.text.strip()
    shown = Text(printable(text).strip()) if text else Text("(empty)", style="dim italic")
    if len(reward_names) > 1:
        shown.append(f"\n{_each_reward(c, reward_names)}", style="not italic dim")
    return shown


def _each_reward(c: Completion, names: Sequence[str]) -> str:
    """The single rewards whose weighted sum is the reward, in a line where they fit in one."""
    parts = zip(names, c.reward_components, strict=False)  # a file of before has none
    told = [f"{printable(name)} {_number(value)}" for name, value in parts]
    line = " · ".join(told)
    return line if len(line) <= _ROOM else "\n".join(told)


def _prompt(group: CompletionGroup) -> Text:
    if isinstance(group.prompt, str):
        return Text(printable(group.prompt), overflow="fold")
    text = Text(overflow="fold")
    for i, message in enumerate(group.prompt):
        text.append("\n" * (i > 0))
        text.append(f"{printable(message.get('role', ''))}  ", style="bold dim")
        text.append(printable(message.get("content", "")))
    return text


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def best_first(group: CompletionGroup) -> list[Completion]:
    """A group's completions, best reward first; those without one at the end."""
    return sorted(group.completions, key=lambda c: (c.reward is None, -(c.reward or 0.0)))


def end_of(c: Completion) -> str:
    """How a completion ended, in a word: cut at the length limit, or not."""
    return "cut" if c.finish_reason == "length" else "stop"


# ---- reading -------------------------------------------------------------------------------------


def load_any(path: Path) -> list[tuple[str, Sequence[CompletionGroup]]]:
    """(name, groups) of a run's finished rounds in order, of one round, or of one group file.

    Groups are read from their file when they are asked for.

    Raises ConfigError when the path is none of these, DataError when what is there cannot be read.
    """
    if path.is_file():
        return [(path.name, _read(path, lambda: GroupFile(path)))]
    if not path.is_dir():
        raise ConfigError(
            f"there is nothing at {path}: give a run's output_dir, one of its rounds/NNNNN "
            "folders, or a group .parquet file"
        )
    if (path / "manifest.json").is_file() or (path / "groups.parquet").is_file():
        return [(path.name, _round(path))]
    rounds = path if path.name == "rounds" else path / "rounds"
    if not rounds.is_dir():
        raise ConfigError(
            f"{path} is neither a run (it has no rounds folder) nor a round (it has no "
            "manifest.json): give a run's output_dir, one of its rounds/NNNNN folders, or a group "
            ".parquet file"
        )
    finished = [
        folder for folder in sorted(rounds.iterdir()) if (folder / "manifest.json").is_file()
    ]
    if not finished:
        raise DataError(
            f"{rounds} holds no finished round (none has a manifest.json yet): wait for the first "
            "one, or look at the run's log"
        )
    return [(folder.name, _round(folder)) for folder in finished]


def _round(folder: Path) -> Sequence[CompletionGroup]:
    from neat_align.rounds.round_files import read_round

    made = _read(folder, lambda: read_round(folder))
    if made is None:
        raise DataError(
            f"{folder} is not finished: it has no manifest.json, which is written last; wait for "
            "it, or open its groups.parquet"
        )
    return made.groups


def _read(path: Path, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except DataError:
        raise
    # pyarrow's and json's errors are ValueErrors
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise unreadable(path, error) from error


# ---- browsing ------------------------------------------------------------------------------------


def browse(
    path: Path,
    *,
    limit: int = 5,
    origin: str | None = None,
    sort: SortOrder = "order",
    search: str | None = None,
    console: Console | None = None,
) -> None:
    """Print what `load_any` finds: a table of the rounds, then up to `limit` groups of each.

    On a terminal it goes through a pager.

    Args:
        origin: show only completions of this origin, and only groups that have one.
        sort: `order` as sampled; `gap` the widest spread of rewards first; `reward` the highest
            mean reward first.
        search: only groups whose prompt or completions (of that origin) contain this text, whatever
            the case.
    """
    if limit < 1:
        raise ConfigError(
            f"limit is {limit}; it is the number of groups to show of each round, 1 or more"
        )
    if origin is not None and origin not in ORIGINS:
        raise ConfigError(f"origin is {origin!r}; it must be one of {', '.join(ORIGINS)}")
    if sort not in _SORT_KEYS:
        raise ConfigError(f"sort is {sort!r}; it must be one of {', '.join(_SORT_KEYS)}")
    rounds = load_any(path)
    console = console if console is not None else Console()
    with _paged(console):
        console.print(_header(rounds))
        for name, groups in rounds:
            found = _found(groups, limit, origin, _SORT_KEYS[sort], search)
            count = f"{len(groups)} groups"
            if origin or search:
                count = f"{found.matching} of {len(groups)} groups match"
            shown = f", {len(found.shown)} shown" if found.matching > len(found.shown) else ""
            console.print(
                Rule(Text(f"{_shortened(printable(name), 30)} · {count}{shown}"), style="dim")
            )
            for i in found.shown:
                about = (i + 1, len(groups))
                names = reward_names(groups)
                console.print(render_group(groups[i], *about, origin=origin, reward_names=names))


@dataclass(frozen=True)
class _Found:
    """How many groups match, and the places of those to show."""

    matching: int
    shown: list[int]


def _found(
    groups: Sequence[CompletionGroup],
    limit: int,
    origin: str | None,
    sort_key: Callable[[CompletionGroup], float],
    search: str | None,
) -> _Found:
    """The first `limit` matching groups in this order, from one pass over all of them."""
    matching = 0

    def keys() -> Iterator[tuple[float, int]]:
        nonlocal matching
        for i, group in enumerate(without_tokens(groups, texts=search is not None)):
            if _matches(group, origin, search):
                matching += 1
                yield sort_key(group), i

    first = heapq.nsmallest(limit, keys())  # equal keys: in the order of the file
    return _Found(matching, [i for _, i in first])


_SORT_KEYS: dict[str, Callable[[CompletionGroup], float]] = {
    "order": lambda g: 0.0,
    "gap": lambda g: min(_rewards(g), default=0.0) - max(_rewards(g), default=0.0),
    "reward": lambda g: -fmean(_rewards(g)) if _rewards(g) else float("inf"),
}


def _rewards(group: CompletionGroup) -> list[float]:
    return [c.reward for c in group.completions if c.reward is not None]


def _matches(group: CompletionGroup, origin: str | None, search: str | None) -> bool:
    texts = [c.text for c in group.completions if origin is None or c.origin == origin]
    if search is None:
        return bool(texts) or origin is None
    prompt = (
        group.prompt
        if isinstance(group.prompt, str)
        else "\n".join(m.get("content", "") for m in group.prompt)
    )
    return bool(texts) and any(search.casefold() in text.casefold() for text in (prompt, *texts))


def _header(rounds: Sequence[tuple[str, Sequence[CompletionGroup]]]) -> RenderableType:
    counted = [(name, counts_of(groups)) for name, groups in rounds]
    present = [o for o in ORIGINS if any(counts.answers[o] for _, counts in counted)]
    table = _table("mean reward by origin")
    table.add_column("round", overflow="fold")
    table.add_column("groups", justify="right")
    table.add_column("answers", justify="right")
    for origin in present:
        table.add_column(Text(origin, style=ORIGIN_STYLES[origin]), justify="right")
    table.add_column("inverted", justify="right")
    for name, counts in counted:
        table.add_row(
            Text(printable(name)),
            str(counts.groups),
            str(counts.answers.total()),
            *(_number(counts.rewards[origin].mean) for origin in present),
            f"{counts.inverted / counts.pairs:.0%}" if counts.pairs else "–",
        )
    single = _single_rewards(counted, present)
    return table if single is None else Group(table, Text(), single)


def _single_rewards(
    counted: Sequence[tuple[str, Counts]], present: Sequence[Origin]
) -> Table | None:
    """Each of several rewards by round and origin; None where there is one."""
    rows = [
        (name, reward, [counts.single[origin, i].mean for origin in present])
        for name, counts in counted
        for i, reward in enumerate(counts.reward_names)
    ]
    if not rows:
        return None
    table = _table("each reward, unweighted")
    table.add_column("round", overflow="fold")
    table.add_column("reward", overflow="fold")
    for origin in present:
        table.add_column(Text(origin, style=ORIGIN_STYLES[origin]), justify="right", no_wrap=True)
    for name, reward, means in rows:
        table.add_row(Text(printable(name)), Text(printable(reward)), *map(_number, means))
    return table


def _table(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        title=title,
        title_style="dim",
        title_justify="left",
    )


@contextlib.contextmanager
def _paged(console: Console) -> Iterator[None]:
    if not console.is_terminal:
        yield
        return
    # `less` shows colours only when told to; a reader's own LESS is kept.
    unset = "LESS" not in os.environ
    if unset:
        os.environ["LESS"] = "-FRX"
    try:
        with console.pager(styles=True):
            yield
    finally:
        if unset:
            os.environ.pop("LESS", None)
