"""From the evaluations of several methods to one table: at equal budget, at equal KL, with
intervals. Numbers only, no model.

Every method is evaluated after each round on the same held-out prompts and the same random draws.
At *equal budget* methods are compared where they end; at *equal KL* where their curves pass
`kl_target` (`equal_kl`). Intervals are 95 %, from a bootstrap that draws seeds and prompts anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from neat_align.comparison.equal_kl import common_kl, crossings
from neat_align.comparison.outcomes import Point, Run, Values, collapse_reason
from neat_align.comparison.spec import BASE
from neat_align.evaluation.statistics import crossed_bootstrap

_RATIOS = ("perplexity", "distinct2", "mean_length")
_MEANS = ("clipped", "repetition", "refusals", "pair_accuracy", "entropy")
# A method's policies by seed.
Points: TypeAlias = Mapping[int, Point]
# A method's values at equal KL, by metric and seed.
Crossings: TypeAlias = Mapping[str, Mapping[int, Values]]


def summarise(
    starts: Points, runs: Sequence[Run], methods: Sequence[str], kl_target: float | None
) -> dict[str, Any]:
    """`kl_target`, `table`, `frontier` and `runs` of comparison.json.

    `starts` are the start policy's evaluations by seed. At equal budget a method stands for its
    first strength; at equal KL it is the mean over those strengths that pass the target. Methods
    are in the order of `methods`, `base` among them.
    """
    trained = [m for m in methods if m != BASE]
    target = kl_target if kl_target is not None else common_kl(runs)
    judges = next(iter(starts.values())).evaluation["judges"]
    metrics = ["reward", *(f"judges/{name}" for name in judges)]
    # A strong setting that collapses says nothing of the one that the row stands for.
    at_first = {m: _at_first_strength(runs, m) for m in trained}
    final: dict[str, Points] = {BASE: dict(starts)}
    for m in trained:
        final[m] = {run.seed: run.points[-1] for run in at_first[m] if run.points}
    crossing = {
        m: {metric: crossings(runs, m, metric, target) for metric in metrics} for m in trained
    }
    table = []
    for m in methods:
        mine, others = at_first.get(m, []), [o for o in methods if o != m]
        rivals = [o for o in others if o != BASE] if m != BASE else []
        table.append(
            {
                "method": m,
                "runs": len(mine),
                "collapsed": sum(run.collapsed is not None for run in mine),
                "at_budget": _at_budget(final[m], starts, metrics, is_base=m == BASE),
                "at_equal_kl": _at_equal_kl(crossing[m], starts) if m != BASE else None,
                "wins": {o: _wins(final[o], final[m]) for o in others},
                "against": {o: _against(final, crossing, m, o, metrics) for o in rivals},
            }
        )
    return {
        "kl_target": target,
        "table": table,
        "frontier": [_curve(m, s, runs, metrics) for m in trained for s in _strengths(runs, m)],
        "runs": [_run_facts(run) for run in runs],
    }


def _strengths(runs: Sequence[Run], method: str) -> list[str]:
    return list(dict.fromkeys(run.strength for run in runs if run.method == method))


def _at_first_strength(runs: Sequence[Run], method: str) -> list[Run]:
    first = _strengths(runs, method)[:1]
    return [run for run in runs if run.method == method and run.strength in first]


def _stack(points: Points, metric: str, seeds: Sequence[int]) -> NDArray[np.float64]:
    """[seeds, prompts]."""
    return np.stack([points[s].values(metric) for s in seeds])


def _lengths(points: Points, seeds: Sequence[int]) -> NDArray[np.float64]:
    """[seeds, prompts], tokens."""
    return np.array([points[s].evaluation["lengths"] for s in seeds], dtype=np.float64)


def _delta(
    table: NDArray[np.float64], lengths: NDArray[np.float64] | None = None
) -> dict[str, float | None]:
    value, low, high = crossed_bootstrap(table, lengths)
    return {"delta": value, "low": low, "high": high}


def _nanmean(values: NDArray[np.float64]) -> float | None:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else None


# ---- the columns of a row ------------------------------------------------------------------------


def _at_budget(
    points: Points, starts: Points, metrics: Sequence[str], *, is_base: bool
) -> dict[str, Any]:
    """Means of the policies where they end, and their differences from the start with the same
    seed.
    """
    seeds = sorted(points)
    if not seeds:
        return {}
    facts: dict[str, Any] = {"kl": {"mean": fmean(points[s].kl for s in seeds)}}
    for metric in metrics:
        mine = _stack(points, metric, seeds)
        mean = _nanmean(mine)
        facts[metric] = {"mean": mean}
        if not is_base:
            delta = _delta(mine - _stack(starts, metric, seeds))
            facts[metric] = delta if mean is None else {"mean": mean, **delta}
    if not is_base:
        rewards = _stack(points, "reward", seeds) - _stack(starts, "reward", seeds)
        lengths = _lengths(points, seeds) - _lengths(starts, seeds)
        facts["length_controlled_reward"] = _delta(rewards, lengths)
    for name in (*_RATIOS, *_MEANS):
        now = _numbers(points, name, seeds)
        if now is None:
            continue
        facts[name] = {"mean": fmean(now)}
        before = _numbers(starts, name, seeds)
        if name in _RATIOS and not is_base and before is not None and all(before):
            facts[name]["ratio"] = fmean(v / b for v, b in zip(now, before, strict=True))
    return facts


def _numbers(points: Points, name: str, seeds: Sequence[int]) -> list[float] | None:
    """A number of each policy, by its name in the table; None where one of them has none."""
    numbers = [points[s].number(name) for s in seeds]
    present = [v for v in numbers if v is not None]
    return present if len(present) == len(seeds) else None


def _at_equal_kl(crossing: Crossings, starts: Points) -> dict[str, Any] | None:
    facts: dict[str, Any] = {}
    for metric, by_seed in crossing.items():
        seeds = sorted(by_seed)
        if not seeds:
            return None
        mine = np.stack([by_seed[s] for s in seeds])
        mean, delta = _nanmean(mine), _delta(mine - _stack(starts, metric, seeds))
        facts[metric] = delta if mean is None else {"mean": mean, **delta}
        facts["seeds"] = len(seeds)
    return facts


def _against(
    final: Mapping[str, Points],
    crossing: Mapping[str, Crossings],
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


def _wins(other: Points, mine: Points) -> dict[str, float | None] | None:
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
    _, low, high = crossed_bootstrap(signs)
    shares = {
        name: float((signs == value).sum()) / counted
        for name, value in (("win", 1), ("tie", 0), ("lose", -1))
    }
    return {**shares, "net_low": low, "net_high": high}


# ---- curves and runs -----------------------------------------------------------------------------


def _curve(
    method: str, strength: str, runs: Sequence[Run], metrics: Sequence[str]
) -> dict[str, Any]:
    """KL and every metric after each round, over the seeds that got so far."""
    mine = [run for run in runs if run.method == method and run.strength == strength]
    points = []
    for i in range(max((len(run.points) for run in mine), default=0)):
        reached = [run for run in mine if len(run.points) > i]
        at = [run.points[i] for run in reached]
        kls = [p.evaluation.get("kl_by_prompt") or [p.kl] for p in at]
        _, low, high = crossed_bootstrap(np.array(kls, dtype=np.float64))
        fact: dict[str, Any] = {
            "round": at[0].round,
            "kl": fmean(p.kl for p in at),
            "kl_low": low,
            "kl_high": high,
            "collapsed": any(
                collapse_reason(run.points[i], run.start) is not None for run in reached
            ),
        }
        for metric in metrics:
            value, low, high = crossed_bootstrap(np.stack([p.values(metric) for p in at]))
            fact[metric] = {"mean": value, "low": low, "high": high}
        points.append(fact)
    return {"method": method, "strength": strength, "points": points}


def _run_facts(run: Run) -> dict[str, Any]:
    return {
        "method": run.method,
        "strength": run.strength,
        "seed": run.seed,
        "collapsed": run.collapsed,
        "seconds": run.seconds,
        "trained_tokens": run.trained_tokens,
        "points": [_point_facts(point) for point in run.points],
    }


def _point_facts(point: Point) -> dict[str, Any]:
    judges = point.evaluation["judges"]
    return {
        "round": point.round,
        "kl": point.kl,
        "reward": _nanmean(point.values("reward")),
        "judges": {name: _nanmean(point.values(f"judges/{name}")) for name in judges},
        "contrast": dict(point.evaluation["contrast"]),
        **{name: point.number(name) for name in (*_RATIOS, *_MEANS)},
        "training": dict(point.training),
    }
