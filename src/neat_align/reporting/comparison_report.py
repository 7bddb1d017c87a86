"""comparison.html: one self-contained page that says which method gained what at which price.

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
from neat_align.reporting.comparison_warnings import warnings_of
from neat_align.reporting.pages import change, digits_for, listed, plain, signed, turns, write_page
from neat_align.reporting.run_files import mapping, number
from neat_align.reporting.run_warnings import FEW_HELD_OUT

# Prompts on the page, and the ones that stand open before the reader asks for more.
SHOWN_PROMPTS = 200
OPEN_PROMPTS = 8


def write_comparison_report(folder: Path) -> Path:
    """Write `comparison.html` beside a folder's comparison.json and examples.json; returns its
    path.

    Raises ConfigError when the folder has no comparison, DataError when its file is of another
    format.
    """
    context = page_context(read_comparison(folder))
    return write_page(folder / "comparison.html", "comparison.html.j2", context)


# ---- what came out -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The comparison in a sentence, what to add to it, and who gained most (None where nobody is
    shown to have gained).
    """

    sentence: str
    notes: tuple[str, ...]
    best: str | None


def verdict(c: Comparison) -> Verdict:
    """Who gained most, at equal KL where that was reached, and how sure that is."""
    side = "at_equal_kl" if _any_stands(c, c.gains("at_equal_kl")) else "at_budget"
    gains = c.gains(side)
    standing = {m: e for m, e in gains.items() if not c.collapsed(m)}
    if not standing:
        why = "every method collapsed" if gains else "no method has a gain over base"
        return Verdict(f"This comparison has no winner: {why}", (), None)
    best = max(standing, key=lambda m: standing[m].delta or 0.0)
    e = standing[best]
    digits = digits_for((e.low, e.high, 0.0))
    gain = change(e.delta, e.low, e.high, digits)
    if e.low is None or e.low <= 0:
        why = "has no interval" if e.low is None else "has an interval that includes 0"
        note = f"The largest gain in {c.reward_name}, {best}’s {gain}{_on_prompts(c)}, {why}."
        return Verdict(f"No method is shown to beat base {_WHERE[side]}", (note,), None)
    others = [m for m in unbeaten(c, side, "reward") if m != best]
    notes = [_what_is_compared(c, side)]
    if others:
        notes.append(f"This comparison does not put {listed(others)} behind it.")
    elif len(standing) > 1:
        notes.append("It is ahead of every other method beyond the intervals.")
    notes += [_judged(c, best, side, name) for name in c.judges]
    at_budget = c.gains("at_budget").get(best)
    if side == "at_equal_kl" and at_budget is not None:
        change_there = change(at_budget.delta, at_budget.low, at_budget.high, digits)
        notes.append(f"At equal budget it gains {change_there}.")
    leads = "has the largest gain" if others else "gains most" if len(standing) > 1 else "gains"
    sentence = f"{best} {leads} {_WHERE[side]}, {gain}"
    if _on_prompts(c):  # the interval stands in the tables
        sentence = f"{best} {leads}, {signed(e.delta, digits)}{_on_prompts(c)}"
    return Verdict(sentence, tuple(note for note in notes if note), best)


_WHERE = {"at_equal_kl": "at equal KL", "at_budget": "at equal budget"}


def _on_prompts(c: Comparison) -> str:
    """How few the held-out prompts are; empty where there are enough of them."""
    prompts = number(mapping(c.facts.get("budget")).get("held_out_prompts"))
    return f" on {prompts:.0f} prompts" if prompts is not None and prompts < FEW_HELD_OUT else ""


def _what_is_compared(c: Comparison, side: str) -> str:
    kl = "" if c.kl_target is None else f", {plain(c.kl_target, 3)} nats per token"
    where = f" Equal KL is where every method is as far from base{kl}." if "kl" in side else ""
    return f"The gain is over base, in {c.reward_name}.{where}"


def _any_stands(c: Comparison, gains: dict[str, Estimate]) -> bool:
    return any(not c.collapsed(m) for m in gains)


def _judged(c: Comparison, method: str, side: str, judge: str) -> str:
    e = c.gains(side, f"judges/{judge}").get(method)
    if e is None:
        return ""
    gain = change(e.delta, e.low, e.high, digits_for((e.low, e.high, 0.0)))
    who = f"The held-out judge {judge}, which training never saw,"
    if e.low is not None and e.low > 0:
        return f"{who} agrees: {gain}."
    if (e.high if e.high is not None else e.delta or 0.0) < 0:
        return f"{who} finds its answers worse: {gain}."
    return f"{who} cannot tell it from base: {gain}."


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
    last_rival = next((m for m in reversed(answered) if m != BASE), None)
    right = outcome.best if outcome.best in answered else last_rival
    frontiers = [frontier(c, name, label) for name, label in c.scores]
    strengths_of = {m: strengths(c, m) for m in c.rivals}
    return {
        "c": c,
        "verdict": outcome,
        "facts": _facts(c),
        "warnings": warnings_of(c),
        "problems": list(c.problems),
        "gains": gain_table(c),
        "prices": price_table(c),
        "gain_figures": [gain_figure(c, chart) for chart in gain_charts(c, gain_scores(c))],
        "frontiers": [frontier_figure(c, f) for f in frontiers if f is not None],
        "legend": [tag(c, m) for m in c.methods],
        "strengths": [(tag(c, m), names) for m, names in strengths_of.items() if len(names) > 1],
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
    words = {
        "rounds": "Rounds",
        "prompts_per_round": "Prompts per round",
        "completions_per_prompt": "Completions per prompt",
        "sampled_completions": "Completions sampled",
        "optimizer_steps": "Optimizer steps",
        "held_out_prompts": "Held-out prompts",
        "samples_per_prompt": "Answers per held-out prompt",
    }
    budget = mapping(c.facts.get("budget"))
    facts = [
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
        for name, value in facts
        if value not in (None, "")
    ]


def _origin(c: Comparison) -> list[tuple[str, str]]:
    """Where the numbers come from: commit, date, machine, versions."""
    facts = [("commit", c.facts.get("commit")), ("date", c.facts.get("date"))]
    facts += [*mapping(c.facts.get("machine")).items(), *mapping(c.facts.get("versions")).items()]
    return [(str(name), str(value)) for name, value in facts if value not in (None, "")]
