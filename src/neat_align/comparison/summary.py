"""From the evaluations of several methods to one table: at equal budget, at equal KL, with
intervals. Numbers only, no model.

Every method is evaluated after each round on the same held-out prompts and the same random draws. A
run is a curve of reward over KL that begins at the start policy with KL 0. At *equal budget*
methods are compared where they end; at *equal KL* where their curves pass `kl_target`, linearly
between two rounds in the square root of the KL (in which reward grows about linearly: 2210.10760),
and never beyond what a run reached. Intervals are 95 %, from a bootstrap that draws seeds and
prompts anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from neat_align.comparison.spec import BASE

# One value a held-out prompt; NaN where there is none.
Values: TypeAlias = NDArray[np.float64]
RESAMPLES = 2000
# A run that ends beyond one of these, as shares of the start policy's value, has collapsed: its
# reward does not count.
LEAST_DISTINCT2 = 0.8
MOST_PERPLEXITY = 1.3
LENGTHS = (0.5, 2.0)
MOST_REPETITION = 0.2  # over the start policy's, as a share of an answer's word trigrams
_RATIOS = ("perplexity", "distinct2", "mean_length")
_MEANS = ("clipped", "repetition", "refusals", "pair_accuracy", "entropy")


@dataclass(frozen=True)
class Point:
    """A policy after so many rounds: an `Evaluation` as plain data, and means of the round's
    training metrics.
    """

    round: int
    evaluation: Mapping[str, Any]
    training: Mapping[str, float] = field(default_factory=dict)

    @property
    def kl(self) -> float:
        """Exact KL to the start policy on plain samples, nats per token; 0 for the start policy
        itself.
        """
        return float(self.evaluation.get("kl") or 0.0)

    def values(self, metric: str) -> Values:
        """Per-prompt values of `reward` or `judges/NAME`."""
        found = (
            self.evaluation["rewards"]
            if metric == "reward"
            else self.evaluation["judges"][metric.removeprefix("judges/")]
        )
        return np.array([math.nan if v is None else v for v in found], dtype=np.float64)

    def number(self, name: str) -> float | None:
        """A single number of the evaluation, by the name that the table has for it."""
        e = self.evaluation
        if name == "mean_length":
            return fmean(e["lengths"])
        if name == "pair_accuracy":
            present = [v for v in e["pair_accuracy"] if v is not None]
            return fmean(present) if present else None
        return fmean(e[name]) if name in ("clipped", "repetition", "refusals") else e[name]


@dataclass(frozen=True)
class Run:
    """One method at one strength with one seed. `start` is the start policy with the same seed;
    `points` are in order.

    `broke` says why training broke down before its last round (a loss that is not finite, nothing
    left to rank); None where it did not.
    """

    method: str
    strength: str
    seed: int
    start: Point
    points: tuple[Point, ...]
    seconds: float = 0.0
    trained_tokens: int = 0
    prompts_per_round: int | None = None
    broke: str | None = None

    @property
    def collapsed(self) -> str | None:
        """Why the run counts as collapsed, or None: its training broke down, or its last policy is
        far from the start's.
        """
        return self.broke or (collapse_reason(self.points[-1], self.start) if self.points else None)


def collapse_reason(point: Point, start: Point) -> str | None:
    """Why a policy counts as collapsed, in words, or None: variety, perplexity, length or
    repetition far from the start's.
    """

    def ratio(name: str) -> float | None:
        now, then = point.number(name), start.number(name)
        return now / then if now is not None and then else None

    distinct, perplexity, length = ratio("distinct2"), ratio("perplexity"), ratio("mean_length")
    if point.number("distinct2") is None or (distinct is not None and distinct < LEAST_DISTINCT2):
        return f"distinct-2 is {distinct or 0:.0%} of the start's"
    if perplexity is not None and perplexity > MOST_PERPLEXITY:
        return f"perplexity of the reference answers is {perplexity:.0%} of the start's"
    if length is not None and not LENGTHS[0] <= length <= LENGTHS[1]:
        return f"answers are {length:.0%} as long as the start's"
    repeated = (point.number("repetition") or 0.0) - (start.number("repetition") or 0.0)
    return (
        f"{repeated:.0%} more of an answer repeats itself" if repeated > MOST_REPETITION else None
    )


# ---- intervals -----------------------------------------------------------------------------------


def bootstrap(
    table: NDArray[np.float64], statistic: str = "mean", lengths: NDArray[np.float64] | None = None
) -> tuple[float | None, float | None, float | None]:
    """(value, low, high) of a [seeds, prompts] table of differences: 95 %, seeds and prompts both
    drawn with replacement.

    `statistic` is `mean`, or `intercept`: the difference at equal length, by least squares on
    `lengths` (differences of length, of the same shape). NaN entries are left out; all three are
    None where there is nothing else.
    """
    if np.isnan(table).all():
        return None, None, None
    rng = np.random.default_rng(0)
    seeds, prompts = table.shape
    s = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    p = rng.integers(prompts, size=(RESAMPLES, 1, prompts))
    if statistic == "mean":
        value = float(_means(table.reshape(1, -1))[0])
        draws = _means(table[s, p].reshape(RESAMPLES, -1))
    else:
        assert lengths is not None
        value = float(_intercepts(table.reshape(1, -1), lengths.reshape(1, -1))[0])
        draws = _intercepts(
            table[s, p].reshape(RESAMPLES, -1), lengths[s, p].reshape(RESAMPLES, -1)
        )
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return value, float(low), float(high)


def _means(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row by row, over what is there; NaN for a row without anything."""
    there = (~np.isnan(y)).sum(axis=1)
    means: NDArray[np.float64] = np.divide(
        np.nansum(y, axis=1), there, out=np.full(len(y), math.nan), where=there > 0
    )
    return means


def _intercepts(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares y = a + b x, row by row; a."""
    x = np.where(np.isnan(y), math.nan, x)
    mx, my = _means(x), _means(y)
    dx = x - mx[:, None]
    spread = np.nansum(dx**2, axis=1)
    slope = np.divide(
        np.nansum(dx * (y - my[:, None]), axis=1),
        spread,
        out=np.zeros_like(spread),
        where=spread > 0,
    )
    intercepts: NDArray[np.float64] = my - slope * mx
    return intercepts


def _delta(table: NDArray[np.float64], mean: float | None = None) -> dict[str, float | None]:
    value, low, high = bootstrap(table)
    return {**({} if mean is None else {"mean": mean}), "delta": value, "low": low, "high": high}


# ---- equal KL ------------------------------------------------------------------------------------


def values_at_kl(run: Run, metric: str, target: float) -> Values | None:
    """Per-prompt values where a run's curve first passes `target`, between two neighbouring points;
    None where it never does.

    Points after the first collapsed one are not looked at.
    """
    before = run.start
    for point in run.points:
        if collapse_reason(point, run.start) is not None:
            return None
        if point.kl >= target:
            low, high = math.sqrt(before.kl), math.sqrt(point.kl)
            weight = (math.sqrt(target) - low) / (high - low) if high > low else 1.0
            between: Values = (1 - weight) * before.values(metric) + weight * point.values(metric)
            return between
        before = point
    return None


def common_kl(runs: Sequence[Run]) -> float | None:
    """The largest KL that every run passed before it collapsed; None when none of them left the
    start.

    A run that collapsed in its first round, or that never left the start, is not asked: it has no
    answer to compare at any KL, and would leave the other methods without one.
    """
    reached = []
    for run in runs:
        kls = [0.0]
        for point in run.points:
            if collapse_reason(point, run.start) is not None:
                break
            kls.append(point.kl)
        reached.append(max(kls))
    return min((kl for kl in reached if kl > 0), default=None)


# ---- the table -----------------------------------------------------------------------------------


def summarise(
    starts: Mapping[int, Point],
    runs: Sequence[Run],
    methods: Sequence[str],
    kl_target: float | None,
) -> dict[str, Any]:
    """`kl_target`, `table`, `frontier` and `runs` of comparison.json. `starts` are the start
    policy's evaluations by seed.

    At equal budget a method stands for its first strength; at equal KL it is the mean over those
    strengths that pass the target. Methods are in the order of `methods`, `base` among them.
    """
    trained = [m for m in methods if m != BASE]
    target = kl_target if kl_target is not None else common_kl(runs)
    metrics = [
        "reward",
        *(f"judges/{name}" for name in next(iter(starts.values())).evaluation["judges"]),
    ]
    first = {m: next((r.strength for r in runs if r.method == m), "") for m in trained}
    at_end = {
        m: {r.seed: r for r in runs if r.method == m and r.strength == first[m] and r.points}
        for m in trained
    }
    final = {BASE: dict(starts)} | {
        m: {seed: r.points[-1] for seed, r in at_end[m].items()} for m in trained
    }
    crossing = {
        m: {metric: _crossings(runs, m, metric, target) for metric in metrics} for m in trained
    }
    table = []
    for m in methods:
        # A strong setting that collapses says nothing of the one that the row stands for.
        mine = [r for r in runs if r.method == m and r.strength == first.get(m)]
        table.append(
            {
                "method": m,
                "runs": len(mine),
                "collapsed": sum(r.collapsed is not None for r in mine),
                "at_budget": _at_budget(final[m], starts, metrics, is_base=m == BASE),
                "at_equal_kl": _at_equal_kl(crossing[m], starts) if m != BASE else None,
                "wins": {o: _wins(final[o], final[m]) for o in methods if o != m},
                "against": {
                    o: _against(final, crossing, m, o, metrics)
                    for o in trained
                    if o != m and m != BASE
                },
            }
        )
    return {
        "kl_target": target,
        "table": table,
        "frontier": [
            _curve(m, s, runs, metrics)
            for m in trained
            for s in dict.fromkeys(r.strength for r in runs if r.method == m)
        ],
        "runs": [_run_facts(r) for r in runs],
    }


def _stack(points: Mapping[int, Point], metric: str, seeds: Sequence[int]) -> NDArray[np.float64]:
    return np.stack([points[s].values(metric) for s in seeds])


def _at_budget(
    points: Mapping[int, Point],
    starts: Mapping[int, Point],
    metrics: Sequence[str],
    *,
    is_base: bool,
) -> dict[str, Any]:
    seeds = sorted(points)
    if not seeds:
        return {}
    facts: dict[str, Any] = {"kl": {"mean": fmean(points[s].kl for s in seeds)}}
    for metric in metrics:
        mine = _stack(points, metric, seeds)
        facts[metric] = {"mean": _nanmean(mine)}
        if not is_base:
            facts[metric] = _delta(mine - _stack(starts, metric, seeds), facts[metric]["mean"])
    if not is_base:
        lengths = np.array(
            [
                np.subtract(points[s].evaluation["lengths"], starts[s].evaluation["lengths"])
                for s in seeds
            ],
            dtype=np.float64,
        )
        difference = _stack(points, "reward", seeds) - _stack(starts, "reward", seeds)
        value, low, high = bootstrap(difference, "intercept", lengths)
        facts["length_controlled_reward"] = {"delta": value, "low": low, "high": high}
    for name in (*_RATIOS, *_MEANS):
        found = [points[s].number(name) for s in seeds]
        present = [v for v in found if v is not None]
        if len(present) < len(seeds):
            continue
        facts[name] = {"mean": fmean(present)}
        before = [starts[s].number(name) for s in seeds]
        if name in _RATIOS and not is_base and all(before):
            facts[name]["ratio"] = fmean(
                v / float(b or 1) for v, b in zip(present, before, strict=True)
            )
    return facts


def _crossings(
    runs: Sequence[Run], method: str, metric: str, target: float | None
) -> dict[int, Values]:
    """By seed, the mean over the strengths that pass the target."""
    found: dict[int, list[Values]] = {}
    for run in runs if target is not None else ():
        values = (
            values_at_kl(run, metric, target)
            if run.method == method and target is not None
            else None
        )
        if values is not None:
            found.setdefault(run.seed, []).append(values)
    return {seed: np.mean(values, axis=0) for seed, values in found.items()}


def _at_equal_kl(
    crossing: Mapping[str, Mapping[int, Values]], starts: Mapping[int, Point]
) -> dict[str, Any] | None:
    facts: dict[str, Any] = {}
    for metric, by_seed in crossing.items():
        seeds = sorted(by_seed)
        if not seeds:
            return None
        mine = np.stack([by_seed[s] for s in seeds])
        facts[metric] = _delta(mine - _stack(starts, metric, seeds), _nanmean(mine))
        facts["seeds"] = len(seeds)
    return facts


def _against(
    final: Mapping[str, Mapping[int, Point]],
    crossing: Mapping[str, Mapping[str, Mapping[int, Values]]],
    method: str,
    other: str,
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Paired differences of a method over another: seeds that both have."""
    seeds = sorted(set(final[method]) & set(final[other]))
    facts: dict[str, Any] = {"at_budget": None, "at_equal_kl": None}
    if seeds:
        facts["at_budget"] = {
            x: _delta(_stack(final[method], x, seeds) - _stack(final[other], x, seeds))
            for x in metrics
        }
    passed = sorted(set(crossing[method]["reward"]) & set(crossing[other]["reward"]))
    if passed:
        facts["at_equal_kl"] = {
            x: _delta(np.stack([crossing[method][x][s] - crossing[other][x][s] for s in passed]))
            for x in metrics
        }
    return facts


def _wins(other: Mapping[int, Point], mine: Mapping[int, Point]) -> dict[str, float | None] | None:
    """Shares of held-out prompts on which the reward is higher, equal, lower; and the interval of
    the net share.
    """
    seeds = sorted(set(other) & set(mine))
    if not seeds:
        return None
    gap = _stack(mine, "reward", seeds) - _stack(other, "reward", seeds)
    signs = np.where(np.isnan(gap), math.nan, np.sign(gap))
    counted = int((~np.isnan(signs)).sum())
    if not counted:
        return None
    _, low, high = bootstrap(signs)
    shares = {
        name: float((signs == value).sum()) / counted
        for name, value in (("win", 1), ("tie", 0), ("lose", -1))
    }
    return {**shares, "net_low": low, "net_high": high}


def _curve(
    method: str, strength: str, runs: Sequence[Run], metrics: Sequence[str]
) -> dict[str, Any]:
    mine = [r for r in runs if r.method == method and r.strength == strength]
    points = []
    for i in range(max((len(r.points) for r in mine), default=0)):
        have = [r for r in mine if len(r.points) > i]
        kls = np.array(
            [r.points[i].evaluation.get("kl_by_prompt") or [r.points[i].kl] for r in have],
            dtype=np.float64,
        )
        _, low, high = bootstrap(kls)
        fact: dict[str, Any] = {
            "round": have[0].points[i].round,
            "kl": fmean(r.points[i].kl for r in have),
            "kl_low": low,
            "kl_high": high,
        }
        fact["collapsed"] = any(collapse_reason(r.points[i], r.start) is not None for r in have)
        for metric in metrics:
            value, low, high = bootstrap(np.stack([r.points[i].values(metric) for r in have]))
            fact[metric] = {"mean": value, "low": low, "high": high}
        points.append(fact)
    return {"method": method, "strength": strength, "points": points}


def _run_facts(run: Run) -> dict[str, Any]:
    points = []
    for p in run.points:
        numbers = {name: p.number(name) for name in (*_RATIOS, *_MEANS)}
        judges = {name: _nanmean(p.values(f"judges/{name}")) for name in p.evaluation["judges"]}
        rewards = {
            "reward": _nanmean(p.values("reward")),
            "judges": judges,
            "contrast": dict(p.evaluation["contrast"]),
        }
        points.append(
            {"round": p.round, "kl": p.kl, **rewards, **numbers, "training": dict(p.training)}
        )
    facts = {
        "method": run.method,
        "strength": run.strength,
        "seed": run.seed,
        "collapsed": run.collapsed,
    }
    return {**facts, "seconds": run.seconds, "trained_tokens": run.trained_tokens, "points": points}


def _nanmean(values: NDArray[np.float64]) -> float | None:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else None
