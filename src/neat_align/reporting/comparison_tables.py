"""The comparison page's tables: gains, prices, wins, and each method's own points."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from neat_align.reporting.comparison_charts import css_of, shape_of
from neat_align.reporting.comparison_files import (
    BASE,
    Comparison,
    Estimate,
    MethodRun,
    Wins,
)
from neat_align.reporting.pages import bounds, change, digits_for, duration, plain, signed
from neat_align.reporting.run_files import mapping, number

# What a method pays: (name in the file, heading, decimals, whether it is a share of one).
_PRICES: tuple[tuple[str, str, int, bool], ...] = (
    ("perplexity", "perplexity", 2, False),
    ("distinct2", "distinct-2", 3, False),
    ("mean_length", "tokens", 1, False),
    ("clipped", "cut", 0, True),
    ("repetition", "repetition", 1, True),
    ("refusals", "refusals", 1, True),
    ("pair_accuracy", "human pairs ordered", 0, True),
)
# Columns of a run's points: (name in the file, heading, decimals).
_POINT_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("perplexity", "perplexity", 2),
    ("distinct2", "distinct-2", 3),
    ("mean_length", "tokens", 1),
    ("clipped", "cut", 2),
    ("repetition", "repetition", 3),
    ("refusals", "refusals", 3),
    ("pair_accuracy", "pairs", 2),
    ("entropy", "entropy", 2),
)


@dataclass(frozen=True)
class Tag:
    """How a method is named on the page: with its colour, its shape, and whether it collapsed."""

    name: str
    css: str
    shape: str
    collapsed: bool


@dataclass(frozen=True)
class Cell:
    """A number and what is known around it; `lead` when nothing in its column is shown to be
    larger.
    """

    text: str
    around: str = ""
    lead: bool = False


def tag(c: Comparison, method: str) -> Tag:
    """A method's name as the page writes it."""
    return Tag(method, css_of(c, method), shape_of(c, method), c.collapsed(method))


def unbeaten(c: Comparison, side: str, metric: str) -> list[str]:
    """The methods that the one with the largest gain is not shown to beat, itself first. Never a
    collapsed one.

    Shown to beat: the paired difference of the two has an interval above 0; where that was not
    written down, their intervals against base do not meet.
    """
    gains = {m: e for m, e in c.gains(side, metric).items() if not c.collapsed(m)}
    by_gain = sorted(gains, key=lambda m: -(gains[m].delta or 0.0))
    best = next((m for m in by_gain if gains[m].low is not None), None)
    if best is None:
        return []

    def behind(m: str) -> bool:
        paired = c.row(best).against.get(m, {}).get(side, {}).get(metric)
        if paired is not None and paired.low is not None:
            return paired.low > 0
        high, low = gains[m].high, gains[best].low
        return high is not None and low is not None and high < low

    return [best, *(m for m in by_gain if m != best and not behind(m))]


def leaders(c: Comparison, side: str, metric: str) -> list[str]:
    """The unbeaten methods that are themselves shown to gain over base."""
    estimates = {m: c.estimate(m, side, metric) for m in unbeaten(c, side, metric)}
    return [m for m, e in estimates.items() if e is not None and e.low is not None and e.low > 0]


def gain_scores(c: Comparison) -> list[tuple[str, str]]:
    """(name in the file, name for a reader) of the rewards of which any method has a number."""
    names = [*c.scores, ("length_controlled_reward", "reward, length held equal")]
    return [
        (name, label)
        for name, label in names
        if any(name in c.row(m).at_budget or name in c.row(m).at_equal_kl for m in c.methods)
    ]


def gain_table(c: Comparison) -> dict[str, Any]:
    """Rewards of every method at equal budget and at equal KL, with the gain over base and its
    interval.
    """
    scores = gain_scores(c)
    if not scores:
        return {}
    # Held equal at equal budget only.
    at_equal_kl = [(name, label) for name, label in scores if name != "length_controlled_reward"]
    sides = [("at_budget", scores), ("at_equal_kl", [] if c.kl_target is None else at_equal_kl)]
    columns = {
        (side, name): _gain_column(c, side, name) for side, names in sides for name, _ in names
    }
    lines = []
    for m in c.methods:
        kl = c.row(m).at_budget.get("kl")
        cells = [Cell(plain(0.0 if m == BASE and kl is None else kl and kl.mean, 4))]
        cells += [column.get(m, Cell("–")) for column in columns.values()]
        lines.append((tag(c, m), cells))
    budget, equal = ([label for _, label in names] for _, names in sides)
    return {"budget": ["KL", *budget], "equal": equal, "lines": lines}


def _both(c: Comparison, method: str, name: str) -> list[Estimate]:
    estimates = (c.estimate(method, side, name) for side in ("at_budget", "at_equal_kl"))
    return [e for e in estimates if e is not None]


def _gain_column(c: Comparison, side: str, name: str) -> dict[str, Cell]:
    """The cells of a reward, by method. Both sides show as many decimals."""
    digits = digits_for(e.delta for m in c.rivals for e in _both(c, m, name))
    ahead, cells = leaders(c, side, name), {}
    for m in c.methods:
        e = c.estimate(m, side, name)
        if e is None:
            continue
        gain = "" if e.delta is None else change(e.delta, e.low, e.high, digits)
        # A difference that is estimated at once, as with lengths held equal, has no mean of its
        # own.
        text, around = (gain, "") if e.mean is None else (plain(e.mean, digits), gain)
        cells[m] = Cell(text, around, m in ahead)
    return cells


def price_table(c: Comparison) -> dict[str, Any]:
    """What else changed, at equal budget; columns that nobody measured are left out."""
    measured = []
    for price in _PRICES:
        estimates = [c.row(m).at_budget.get(price[0]) for m in c.methods]
        if any(e is not None and e.mean is not None for e in estimates):
            measured.append(price)
    if not measured:
        return {}
    lines = []
    for m in c.methods:
        row = c.row(m)
        cells = [
            _price_cell(row.at_budget.get(name, Estimate()), digits, share, is_base=m == BASE)
            for name, _, digits, share in measured
        ]
        runs = "–" if row.runs is None else str(row.runs)
        cells.append(Cell(runs, f"{row.collapsed} collapsed" if row.collapsed else ""))
        lines.append((tag(c, m), cells))
    return {"heads": [*(head for _, head, _, _ in measured), "runs"], "lines": lines}


def _price_cell(e: Estimate, digits: int, share: bool, *, is_base: bool) -> Cell:
    as_percent = share and e.mean is not None
    text = f"{plain(100 * (e.mean or 0.0), digits)}\u00a0%" if as_percent else plain(e.mean, digits)
    return Cell(text, "" if e.ratio is None or is_base else f"×\u00a0{plain(e.ratio)}")


# ---- wins ----------------------------------------------------------------------------------------


def wins_between(c: Comparison, method: str, other: str) -> Wins | None:
    """Prompt by prompt, one method against another, from whichever side it was written down."""
    mine, theirs = c.row(method).wins.get(other), c.row(other).wins.get(method)
    if mine is not None:
        return mine
    return None if theirs is None else theirs.turned()


def win_bars(c: Comparison) -> list[dict[str, Any]]:
    """Each method against base: shares of prompts, and the net with its interval."""
    rows = [(m, wins_between(c, m, BASE)) for m in c.rivals]
    return [
        {"tag": tag(c, m), "wins": w, "net": points(w.net), "interval": _point_bounds(w)}
        for m, w in rows
        if w is not None
    ]


def win_matrix(c: Comparison) -> list[tuple[Tag, list[dict[str, Any] | None]]]:
    """Row method against column method: net share of prompts won.

    Empty with fewer than two methods to compare.
    """
    lines = [(tag(c, m), [_win_cell(c, m, other) for other in c.methods]) for m in c.methods]
    known = any(cell is not None for _, cells in lines for cell in cells)
    return lines if known else []


def _win_cell(c: Comparison, method: str, other: str) -> dict[str, Any] | None:
    wins = None if method == other else wins_between(c, method, other)
    if wins is None:
        return None
    # No side is called ahead where a collapsed method plays.
    css = "fallen" if c.collapsed(method) or c.collapsed(other) else _side(wins)
    return {"css": css, "net": points(wins.net), "interval": _point_bounds(wins)}


def _side(w: Wins) -> str:
    """Whose side the interval is on; neither where it holds 0 or there is none."""
    if w.low is not None and w.low > 0:
        return "ahead"
    return "behind" if w.high is not None and w.high < 0 else "even"


def points(share: float) -> str:
    """A share of one as percentage points with a sign."""
    return signed(100 * share, 0)


def _point_bounds(w: Wins) -> str:
    return "" if w.low is None or w.high is None else bounds(100 * w.low, 100 * w.high, 0)


# ---- each method ---------------------------------------------------------------------------------


def method_details(c: Comparison) -> list[dict[str, Any]]:
    """What each method is, with what settings it ran, and every point of every seed."""
    return [_details(c, m, facts) for m, facts in c.methods.items()]


def _details(c: Comparison, method: str, facts: dict[str, Any]) -> dict[str, Any]:
    runs = [r for r in c.runs if r.method == method]
    heads, points = _point_table(c, runs)
    return {
        "tag": tag(c, method),
        "description": str(facts.get("description") or ""),
        "settings": {
            str(name): v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str)
            for name, v in mapping(facts.get("settings")).items()
        },
        "heads": heads,
        "points": points,
        "runs": [(_run_name(r), r.collapsed, _effort(r)) for r in runs],
        "training": _training(runs),
    }


def _run_name(r: MethodRun) -> str:
    seed = "" if r.seed is None else f"seed {r.seed}"
    return ", ".join(part for part in (r.strength, seed) if part) or "a run"


def _effort(r: MethodRun) -> str:
    tokens = None if r.trained_tokens is None else f"{plain(r.trained_tokens, 0)} tokens trained"
    return ", ".join(part for part in (duration(r.seconds), tokens) if part)


def _point_table(
    c: Comparison, runs: Iterable[MethodRun]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(headings, lines): one line a run and round; columns that no point has are left out."""
    rows = [(r, p) for r in runs for p in r.points]
    columns: list[tuple[str, int, list[Any]]] = [
        ("KL", 4, [p.get("kl") for _, p in rows]),
        (c.reward_name, 3, [p.get("reward") for _, p in rows]),
    ]
    columns += [
        (name, 3, [mapping(p.get("judges")).get(name) for _, p in rows]) for name in c.judges
    ]
    columns += [
        (head, digits, [p.get(name) for _, p in rows]) for name, head, digits in _POINT_COLUMNS
    ]
    sides = ("plain", "positive", "negative")
    columns += [
        (f"contrast, {side}", 3, [mapping(p.get("contrast")).get(side) for _, p in rows])
        for side in sides
    ]
    kept = [column for column in columns if any(number(v) is not None for v in column[2])]
    heads = ["round", *(head for head, _, _ in kept)]
    lines = [
        (
            _run_name(r),
            [plain(p.get("round"), 0), *(plain(values[i], digits) for _, digits, values in kept)],
        )
        for i, (r, p) in enumerate(rows)
    ]
    return heads, lines


def _training(runs: list[MethodRun]) -> dict[str, list[str]]:
    """Training metrics of each run's last round, by name; values in the order of the runs."""
    last = [mapping(r.points[-1].get("training")) if r.points else {} for r in runs]
    names = sorted({name for metrics in last for name in metrics})
    return {name: [plain(metrics.get(name), 4) for metrics in last] for name in names}
