"""comparison.html: one self-contained page on which method gained what at which price, for a reader
who was not there.

A method of which a run collapsed is marked wherever it stands and is never called the best.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neat_align.reporting.comparison_charts import (
    frontier,
    frontier_figure,
    gain_charts,
    gain_figure,
    strengths,
)
from neat_align.reporting.comparison_files import (
    BASE,
    Comparison,
    Estimate,
    mapping,
    read_comparison,
)
from neat_align.reporting.comparison_tables import (
    gain_scores,
    gain_table,
    method_details,
    price_table,
    tag,
    unbeaten,
    win_bars,
    win_matrix,
)
from neat_align.reporting.pages import change, digits_for, listed, percent, plain, turns, write_page
from neat_align.reporting.run_files import number

# A warning is shown past these.
LENGTH_DRIFT = 0.15
PERPLEXITY_RISE = 0.05
DISTINCT2_SHARE = 0.90
TOKEN_SPREAD = 1.5
FEW_SEEDS = 3
# Prompts on the page, and the ones that stand open before the reader asks for more.
SHOWN_PROMPTS = 200
OPEN_PROMPTS = 8


def write_comparison_report(folder: Path) -> Path:
    """Write `comparison.html` beside the comparison.json (and examples.json) of a folder; returns
    its path.

    Raises ConfigError when the folder has no comparison, DataError when its file is of another
    format.
    """
    return write_page(
        folder / "comparison.html", "comparison.html.j2", page_context(read_comparison(folder))
    )


# ---- what came out -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The comparison in a sentence, what to add to it, and who gained most (None where nobody is
    shown to have gained).
    """

    sentence: str
    notes: tuple[str, ...]
    best: str | None


def estimates_at(c: Comparison, side: str, metric: str = "reward") -> dict[str, Estimate]:
    """Each rival's estimate of a reward `at_budget` or `at_equal_kl`, where there is a gain over
    base.
    """
    rows = {
        m: (c.row(m).at_equal_kl if side == "at_equal_kl" else c.row(m).at_budget).get(metric)
        for m in c.rivals
    }
    return {m: e for m, e in rows.items() if e is not None and e.delta is not None}


def verdict(c: Comparison) -> Verdict:
    """Who gained most, at equal KL where that was reached, and how sure that is."""
    side = (
        "at_equal_kl"
        if any(not c.collapsed(m) for m in estimates_at(c, "at_equal_kl"))
        else "at_budget"
    )
    kl = "" if c.kl_target is None else f" ({plain(c.kl_target, 3)} nats per token)"
    where = f"at equal KL{kl}" if side == "at_equal_kl" else "at equal budget"
    found = estimates_at(c, side)
    fit = sorted(
        ((m, e) for m, e in found.items() if not c.collapsed(m)),
        key=lambda pair: -(pair[1].delta or 0.0),
    )
    if not fit:
        why = "every method collapsed" if found else "no method has a gain over base in it"
        return Verdict(f"This comparison has no winner: {why}", (), None)
    best, e = fit[0]
    digits = digits_for((e.low, e.high, 0.0))
    gain = change(e.delta, e.low, e.high, digits)
    if e.low is None or e.low <= 0:
        why = "has no interval" if e.low is None else "has an interval that includes 0"
        return Verdict(
            f"No method is shown to beat base {where}: the largest gain, {best}’s {gain}, {why}",
            (),
            None,
        )
    others = [m for m in unbeaten(c, side, "reward") if m != best]
    if others:
        sentence = (
            f"{where[0].upper()}{where[1:]} {best} has the largest gain over base in "
            f"{c.reward_name}, {gain}"
        )
        notes = [f"This comparison does not put {listed(others)} behind it."]
    else:
        sentence = (
            f"{where[0].upper()}{where[1:]} {best} gains most over base in {c.reward_name}, {gain}"
        )
        notes = ["It is ahead of every other method beyond the intervals."] if len(fit) > 1 else []
    notes += [_judged(c, best, side, name) for name in c.judges]
    if side == "at_equal_kl" and (other := estimates_at(c, "at_budget").get(best)) is not None:
        notes.append(
            f"At equal budget it gains {change(other.delta, other.low, other.high, digits)}".strip()
            + "."
        )
    return Verdict(sentence, tuple(note for note in notes if note), best)


def _judged(c: Comparison, method: str, side: str, judge: str) -> str:
    e = estimates_at(c, side, f"judges/{judge}").get(method)
    if e is None:
        return ""
    digits = digits_for((e.low, e.high, 0.0))
    gain = change(e.delta, e.low, e.high, digits)
    if e.low is not None and e.low > 0:
        return f"The held-out judge {judge}, which training never saw, agrees: {gain}."
    if (e.high if e.high is not None else e.delta or 0.0) < 0:
        return (
            f"The held-out judge {judge}, which training never saw, finds its answers worse: "
            f"{gain}."
        )
    return (
        f"The held-out judge {judge}, which training never saw, cannot tell it from base: {gain}."
    )


# ---- warnings ------------------------------------------------------------------------------------


def warnings_of(c: Comparison) -> list[tuple[str, str]]:
    """(key, sentence) of everything that should make a reader pause; empty when nothing does."""
    return [*_collapses(c), *_unequal(c), *_prices(c), *_doubtful(c)]


def _collapses(c: Comparison) -> list[tuple[str, str]]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for run in c.runs:
        if run.collapsed is not None:
            found.setdefault((run.method, run.strength, run.collapsed), []).append(
                "?" if run.seed is None else str(run.seed)
            )
    told = []
    for (method, strength, why), seeds in found.items():
        name = f"{method} ({strength})" if strength else method
        told.append(
            (
                "collapsed",
                f"{name} collapsed on seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}: "
                f"{why.rstrip('.')}.",
            )
        )
    known = {method for method, _, _ in found}
    told += [
        ("collapsed", f"{m}: {c.row(m).collapsed} of its runs collapsed.")
        for m in c.methods
        if c.collapsed(m) and m not in known
    ]
    return told


def _unequal(c: Comparison) -> list[tuple[str, str]]:
    """Where the methods did not get the same: seeds, rounds, trained tokens, a common KL."""
    told = []
    if 0 < len(c.seeds) < FEW_SEEDS:
        few = "one seed" if len(c.seeds) == 1 else f"{len(c.seeds)} seeds"
        told.append(
            (
                "seeds",
                f"There {'is' if len(c.seeds) == 1 else 'are'} only {few}: the intervals say "
                "little about other seeds.",
            )
        )
    rounds = number(mapping(c.facts.get("budget")).get("rounds"))
    for m in c.rivals:
        runs = [r for r in c.runs if r.method == m]
        missing = [str(s) for s in c.seeds if runs and s not in {r.seed for r in runs}]
        if missing:
            told.append(
                (
                    "budget",
                    f"{m} has no run with seed{'s' if len(missing) > 1 else ''} {listed(missing)}.",
                )
            )
        done = [
            max((number(p.get("round")) or 0.0 for p in r.points), default=0.0)
            for r in runs
            if r.collapsed is None
        ]
        short = [d for d in done if rounds is not None and d < rounds]
        if short:
            told.append(
                (
                    "budget",
                    f"{m} did not use its budget: {len(short)} of its runs ended before round "
                    f"{plain(rounds, 0)}.",
                )
            )
    tokens = {
        m: [
            r.trained_tokens
            for r in c.runs
            if r.method == m and r.collapsed is None and r.trained_tokens
        ]
        for m in c.rivals
    }
    means = {m: sum(values) / len(values) for m, values in tokens.items() if values}
    if means and max(means.values()) > TOKEN_SPREAD * min(means.values()):
        most, least = max(means, key=lambda m: means[m]), min(means, key=lambda m: means[m])
        told.append(
            (
                "budget",
                f"{most} trained on {plain(means[most] / means[least], 1)} times as many tokens a "
                f"run as {least}.",
            )
        )
    if c.kl_target is None and len(c.rivals) > 1:
        text = (
            "There is no KL that all methods reached: they are compared at equal budget only, "
            "where going farther helps."
        )
        told.append(("kl", text))
    return told


def _prices(c: Comparison) -> list[tuple[str, str]]:
    told = []
    for m in c.rivals:
        ratios = {name: e.ratio for name, e in c.row(m).at_budget.items() if e.ratio is not None}
        length, perplexity, variety = (
            ratios.get(name) for name in ("mean_length", "perplexity", "distinct2")
        )
        if length is not None and abs(length - 1) > LENGTH_DRIFT:
            changed = f"{percent(abs(length - 1))} {'longer' if length > 1 else 'shorter'}"
            told.append(
                ("length", f"{m}’s answers became {changed}: the reward may be paying for length.")
            )
        if perplexity is not None and perplexity - 1 > PERPLEXITY_RISE:
            told.append(
                (
                    "perplexity",
                    f"{m}’s perplexity of the human-preferred answers rose by "
                    f"{percent(perplexity - 1)}.",
                )
            )
        if variety is not None and variety < DISTINCT2_SHARE:
            told.append(
                (
                    "distinct2",
                    f"{m}’s distinct-2 fell to {percent(variety)} of base’s: its answers are "
                    "growing alike.",
                )
            )
    return told


def _doubtful(c: Comparison) -> list[tuple[str, str]]:
    """Gains that are not shown, and gains that the held-out judge does not see."""
    sides = (("at_equal_kl", "at equal KL"), ("at_budget", "at equal budget"))
    told = []
    for m in c.rivals:
        unsure = [words for side, words in sides if _holds_zero(estimates_at(c, side).get(m))]
        if unsure:
            told.append(
                (
                    "interval",
                    f"{m} is not shown to change the reward: its interval includes 0 "
                    f"{listed(unsure)}.",
                )
            )
        fell = [
            f"{words} {change(e.delta, e.low, e.high, 3)}"
            for side, words in sides
            if (e := _below(c, m, side))
        ]
        if fell:
            told.append(("reward", f"{m} fell below base: {listed(fell)}."))
        for judge in c.judges:
            gains = [
                (
                    words,
                    estimates_at(c, side).get(m),
                    estimates_at(c, side, f"judges/{judge}").get(m),
                )
                for side, words in sides
            ]
            worse = [
                f"{words} {change(j.delta, j.low, j.high, 3)}"
                for words, e, j in gains
                if e and j and (e.delta or 0) > 0 > (j.delta or 0)
            ]
            if worse:
                told.append(
                    (
                        "judge",
                        f"{m} gains reward, and the held-out judge {judge} finds its answers "
                        f"worse: {listed(worse)}.",
                    )
                )
    return told


def _below(c: Comparison, method: str, side: str) -> Estimate | None:
    e = estimates_at(c, side).get(method)
    return e if e is not None and e.high is not None and e.high < 0 else None


def _holds_zero(e: Estimate | None) -> bool:
    return e is not None and e.low is not None and e.high is not None and e.low <= 0 <= e.high


# ---- the page ------------------------------------------------------------------------------------


def page_context(c: Comparison) -> dict[str, Any]:
    """Everything that the template shows."""
    outcome = verdict(c)
    examples = [
        {
            "turns": turns(x.prompt),
            "answers": [(m, x.answers[m], x.rewards[m]) for m in c.methods if m in x.answers],
        }
        for x in c.examples
    ]
    answered = [m for m in c.methods if any(m in x.answers for x in c.examples)]
    right = (
        outcome.best
        if outcome.best in answered
        else next((m for m in reversed(answered) if m != BASE), None)
    )
    return {
        "c": c,
        "verdict": outcome,
        "facts": _facts(c),
        "warnings": warnings_of(c),
        "problems": list(c.problems),
        "gains": gain_table(c),
        "prices": price_table(c),
        "gain_figures": [gain_figure(c, chart) for chart in gain_charts(c, gain_scores(c))],
        "frontiers": [
            frontier_figure(c, f)
            for name, label in c.scores
            if (f := frontier(c, name, label)) is not None
        ],
        "legend": [tag(c, m) for m in c.methods],
        "strengths": [(tag(c, m), found) for m in c.rivals if len(found := strengths(c, m)) > 1],
        "bars": win_bars(c),
        "matrix": win_matrix(c),
        "details": method_details(c),
        "examples": examples[:SHOWN_PROMPTS],
        "all_examples": len(examples),
        "open_examples": OPEN_PROMPTS,
        "answered": answered,
        "picked": (answered[0] if answered else None, right),
        "tags": {m: tag(c, m) for m in c.methods},
        "origin": _origin(c),
    }


def _facts(c: Comparison) -> list[tuple[str, str]]:
    budget = mapping(c.facts.get("budget"))
    words = {
        "rounds": "Rounds",
        "prompts_per_round": "Prompts per round",
        "completions_per_prompt": "Completions per prompt",
        "sampled_completions": "Completions sampled",
        "optimizer_steps": "Optimizer steps",
        "held_out_prompts": "Held-out prompts",
        "samples_per_prompt": "Answers per held-out prompt",
    }
    found = [
        ("Model", c.facts.get("model")),
        ("Data", c.facts.get("dataset")),
        ("Trained reward", ", ".join(c.rewards)),
        ("Held-out judges", ", ".join(c.judges) or "none"),
        ("Seeds", ", ".join(map(str, c.seeds))),
        *((words.get(name, name.replace("_", " ")), value) for name, value in budget.items()),
        ("Compared at KL, nats per token", None if c.kl_target is None else plain(c.kl_target, 4)),
    ]
    return [
        (name, f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in found
        if value not in (None, "")
    ]


def _origin(c: Comparison) -> list[tuple[str, str]]:
    """Where the numbers come from: commit, date, machine, versions."""
    found = [("commit", c.facts.get("commit")), ("date", c.facts.get("date"))]
    found += [*mapping(c.facts.get("machine")).items(), *mapping(c.facts.get("versions")).items()]
    return [(str(name), str(value)) for name, value in found if value not in (None, "")]
