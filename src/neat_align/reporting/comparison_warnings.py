"""What should make the reader of a comparison pause."""

from __future__ import annotations

from statistics import fmean
from typing import TypeAlias

from neat_align.reporting.comparison_files import Comparison, Estimate
from neat_align.reporting.pages import change, listed, percent, plain
from neat_align.reporting.run_files import mapping, number

# (key, sentence)
KeyedSentence: TypeAlias = tuple[str, str]
# A warning is shown past these.
LENGTH_DRIFT = 0.15
PERPLEXITY_RISE = 0.05
DISTINCT2_SHARE = 0.90
TOKEN_SPREAD = 1.5
FEW_SEEDS = 3
_SIDES = (("at_equal_kl", "at equal KL"), ("at_budget", "at equal budget"))


def warnings_of(c: Comparison) -> list[KeyedSentence]:
    """(key, sentence) of everything that should make a reader pause; empty when nothing does."""
    return [
        *_collapses(c),
        *_few_seeds(c),
        *_unused_budget(c),
        *_unequal_tokens(c),
        *_no_common_kl(c),
        *_prices(c),
        *_doubtful(c),
    ]


def _collapses(c: Comparison) -> list[KeyedSentence]:
    seeds_of: dict[tuple[str, str, str], list[str]] = {}
    for run in c.runs:
        if run.collapsed is not None:
            seed = "?" if run.seed is None else str(run.seed)
            seeds_of.setdefault((run.method, run.strength, run.collapsed), []).append(seed)
    told = []
    for (method, strength, why), seeds in seeds_of.items():
        name = f"{method} ({strength})" if strength else method
        on = f"seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}"
        told.append(("collapsed", f"{name} collapsed on {on}: {why.rstrip('.')}."))
    explained = {method for method, _, _ in seeds_of}
    for m in c.methods:
        if c.collapsed(m) and m not in explained:
            told.append(("collapsed", f"{m}: {c.row(m).collapsed} of its runs collapsed."))
    return told


# ---- where the methods did not get the same ------------------------------------------------------


def _few_seeds(c: Comparison) -> list[KeyedSentence]:
    count = len(c.seeds)
    if not 0 < count < FEW_SEEDS:
        return []
    few = "is only one seed" if count == 1 else f"are only {count} seeds"
    return [("seeds", f"There {few}: the intervals say little about other seeds.")]


def _unused_budget(c: Comparison) -> list[KeyedSentence]:
    rounds = number(mapping(c.facts.get("budget")).get("rounds"))
    told = []
    for m in c.rivals:
        runs = [r for r in c.runs if r.method == m]
        seeds = {r.seed for r in runs}
        missing = [str(s) for s in c.seeds if runs and s not in seeds]
        if missing:
            which = f"seed{'s' if len(missing) > 1 else ''} {listed(missing)}"
            told.append(("budget", f"{m} has no run with {which}."))
        if rounds is None:
            continue
        last_rounds = [
            max((number(p.get("round")) or 0.0 for p in r.points), default=0.0)
            for r in runs
            if r.collapsed is None
        ]
        short = sum(last < rounds for last in last_rounds)
        if short:
            text = (
                f"{m} did not use its budget: {short} of its runs ended before round "
                f"{plain(rounds, 0)}."
            )
            told.append(("budget", text))
    return told


def _unequal_tokens(c: Comparison) -> list[KeyedSentence]:
    means = {}
    for m in c.rivals:
        runs = [r for r in c.runs if r.method == m and r.collapsed is None]
        tokens = [r.trained_tokens for r in runs if r.trained_tokens]
        if tokens:
            means[m] = fmean(tokens)
    if not means:
        return []
    most, least = max(means, key=lambda m: means[m]), min(means, key=lambda m: means[m])
    if means[most] <= TOKEN_SPREAD * means[least]:
        return []
    times = plain(means[most] / means[least], 1)
    return [("budget", f"{most} trained on {times} times as many tokens a run as {least}.")]


def _no_common_kl(c: Comparison) -> list[KeyedSentence]:
    if c.kl_target is not None or len(c.rivals) < 2:
        return []
    text = (
        "There is no KL that all methods reached: they are compared at equal budget only, where "
        "going farther helps."
    )
    return [("kl", text)]


# ---- what a method cost, and whether it helped ---------------------------------------------------


def _prices(c: Comparison) -> list[KeyedSentence]:
    told = []
    for m in c.rivals:
        ratios = {name: e.ratio for name, e in c.row(m).at_budget.items()}
        length, perplexity = ratios.get("mean_length"), ratios.get("perplexity")
        variety = ratios.get("distinct2")
        if length is not None and abs(length - 1) > LENGTH_DRIFT:
            changed = f"{percent(abs(length - 1))} {'longer' if length > 1 else 'shorter'}"
            text = f"{m}’s answers became {changed}: the reward may be paying for length."
            told.append(("length", text))
        if perplexity is not None and perplexity - 1 > PERPLEXITY_RISE:
            rise = percent(perplexity - 1)
            text = f"{m}’s perplexity of the human-preferred answers rose by {rise}."
            told.append(("perplexity", text))
        if variety is not None and variety < DISTINCT2_SHARE:
            text = (
                f"{m}’s distinct-2 fell to {percent(variety)} of base’s: its answers are growing "
                "alike."
            )
            told.append(("distinct2", text))
    return told


def _doubtful(c: Comparison) -> list[KeyedSentence]:
    """Gains that are not shown, and gains that the held-out judge does not see."""
    told = []
    for m in c.rivals:
        gains = [(words, e) for side, words in _SIDES if (e := c.gains(side).get(m)) is not None]
        unsure = [words for words, e in gains if _holds_zero(e)]
        if unsure:
            text = f"{m} is not shown to change the reward: its interval includes 0 "
            told.append(("interval", f"{text}{listed(unsure)}."))
        fell = [_in_words(words, e) for words, e in gains if e.high is not None and e.high < 0]
        if fell:
            told.append(("reward", f"{m} fell below base: {listed(fell)}."))
        told += _judged_worse(c, m)
    return told


def _judged_worse(c: Comparison, method: str) -> list[KeyedSentence]:
    told = []
    for judge in c.judges:
        worse = []
        for side, words in _SIDES:
            gain, judged = c.gains(side).get(method), c.gains(side, f"judges/{judge}").get(method)
            if gain and judged and (gain.delta or 0.0) > 0 > (judged.delta or 0.0):
                worse.append(_in_words(words, judged))
        if worse:
            text = f"{method} gains reward, and the held-out judge {judge} finds its answers worse"
            told.append(("judge", f"{text}: {listed(worse)}."))
    return told


def _in_words(where: str, e: Estimate) -> str:
    return f"{where} {change(e.delta, e.low, e.high, 3)}"


def _holds_zero(e: Estimate) -> bool:
    return e.low is not None and e.high is not None and e.low <= 0 <= e.high
