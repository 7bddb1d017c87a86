"""report.html: one self-contained page on a run, for a reader who was not there.

What the page may do is in report_page; answers written to be bad stay folded until they are asked
for.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from neat_align.reporting.charts import LineChart, Series, box_figure, line_chart, line_figure
from neat_align.reporting.pages import (
    bounds,
    change,
    digits_for,
    duration,
    plain,
    signed,
    turns,
    write_page,
)
from neat_align.reporting.run_files import RunContents, number, read_run
from neat_align.reporting.run_groups import (
    FEW_PROMPTS,
    distributions,
    instruction_rows,
    prompt_means,
    spread_of_mean,
)
from neat_align.reporting.run_warnings import warnings_of
from neat_align.rounds.completions import ORIGINS, Origin
from neat_align.rounds.ranking import BAD_ORIGINS, RankBy, rank_keys

# Prompts on the page with their answers before and after, the gains and the losses that come first
# among them, groups of the last round on the page, and the groups that stand open before the reader
# asks for more.
SHOWN_PROMPTS = 200
EXTREMES = 7
SHOWN_GROUPS = 48
OPEN_GROUPS = 6
_HELD_OUT = "Held-out reward"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from what the run has left there so far; returns its
    path.

    Raises ConfigError when the folder holds nothing of a run.
    """
    return write_page(run_dir / "report.html", "report.html.j2", page_context(read_run(run_dir)))


def headline(run: RunContents) -> str:
    """The run in a sentence."""
    rewards = run.both("reward")
    if rewards is not None:
        digits = digits_for(rewards)
        gained, prompts = (
            change(run.delta("reward"), *run.interval("reward"), digits),
            run.result.get("held_out_prompts", "?"),
        )
        return (
            f"Held-out reward {plain(rewards[0], digits)} → {plain(rewards[1], digits)}, "
            f"{gained} on {prompts} prompts"
        )
    seen = _held_out(run).points
    if len(seen) > 1:
        digits = digits_for(v for _, v in seen)
        return (
            f"Held-out reward {plain(seen[0][1], digits)} → {plain(seen[-1][1], digits)} while "
            "training; there is no paired comparison"
        )
    rounds = len(run.rounds)
    return f"{rounds} round{'' if rounds == 1 else 's'} of training, without a held-out comparison"


# ---- curves --------------------------------------------------------------------------------------


def _held_out(run: RunContents) -> Series:
    """Held-out reward after so many rounds; before and after training with its 95 % interval over
    prompts.
    """
    rewards, end = run.both("reward"), run.last("epoch") or float(len(run.rounds))
    seen: dict[float, float] = {}
    for name in ("before_reward", "eval_reward", "after_reward"):
        seen |= {
            number(line.get("epoch")) or 0.0: v
            for line in run.log
            if (v := number(line.get(name))) is not None
        }
    bars = []
    for x, i, side in ((0.0, 0, run.before), (end, 1, run.after)):
        ends = spread_of_mean(
            [v for v in map(number, side.get("rewards") or []) if v is not None], errors=1.96
        )
        if rewards is not None:
            seen[x] = rewards[i]
            bars += [(x, *ends)] if ends is not None else []
    return Series("held-out", "ink", sorted(seen.items()), bars=bars)


def _logged(run: RunContents, name: str, css: str) -> Series:
    """A metric of the optimizer steps: each round's mean, with every step behind it."""
    lines = run.training_log
    steps = [
        (x, y)
        for line in lines
        if (x := number(line.get("epoch"))) is not None
        and (y := number(line.get(name))) is not None
    ]
    ends = sorted({math.ceil(x - 1e-9) for x, _ in steps})
    means = [(e - 0.5, fmean(y for x, y in steps if math.ceil(x - 1e-9) == e)) for e in ends]
    label = name.rpartition("/")[2].replace("active_pair_fraction", "active")
    return Series(label, css, means, steps if len(steps) > len(means) else [])


def _sampled(run: RunContents, origin: Origin) -> Series:
    """The mean reward of each round's completions of an origin, in a band of one standard error
    over prompts.
    """
    points, band = [], []
    for i, r in enumerate(run.rounds):
        mean, ends = (
            number(r.metrics.get(f"reward/{origin}")),
            spread_of_mean(prompt_means(r.groups, origin)),
        )
        if mean is not None:
            points.append((float(i), mean))
            half = (ends[1] - ends[0]) / 2 if ends else 0.0
            band.append((float(i), mean - half, mean + half))
    # One round has no area to fill.
    return (
        Series(origin, origin, points, band=band)
        if len(band) > 1
        else Series(origin, origin, points, bars=band)
    )


def charts(run: RunContents) -> list[LineChart]:
    """The run's curves. A round's completions are placed where their policy stood: after as many
    rounds as came before.
    """
    total = float(len(run.rounds))
    drift = [
        (number(x.get("epoch")) or 0.0, v)
        for x in run.log
        if (v := number(x.get("drift/kl"))) is not None
    ]
    pairs = [
        _logged(run, "ranking/accuracy", "ink"),
        _logged(run, "ranking/active_pair_fraction", "plain"),
    ]
    drawn = [
        line_chart(_HELD_OUT, "mean, 95 % interval over prompts", [_held_out(run)], total),
        line_chart(
            "Reward of what is sampled",
            "mean, ± one standard error over prompts",
            [_sampled(run, o) for o in ORIGINS],
            total,
        ),
        line_chart("Loss", "weighted sum", [_logged(run, "loss", "ink")], total),
        line_chart("Ranking loss", "unweighted", [_logged(run, "loss/ranking", "ink")], total),
        line_chart(
            "Language-modelling loss",
            "nats per token, best answer",
            [_logged(run, "loss/lm", "ink")],
            total,
        ),
        line_chart("Pairs: ordered rightly, still active", "share of pairs", pairs, total),
        line_chart(
            "Distance to the start policy",
            "KL, nats per token, plain samples",
            [Series("KL", "ink", drift)],
            total,
        ),
    ]
    return [c for c in drawn if c is not None]


# ---- tables and examples -------------------------------------------------------------------------


def before_after_rows(run: RunContents) -> list[tuple[str, str, str, str, str]]:
    """(what, before, after, change, interval) of everything that was measured twice."""
    r, rows = run.result, []
    names = [
        ("Reward", "reward"),
        (f"Second judge: {r.get('second_judge')}", "second_judge"),
        ("Perplexity of preferred answers", "perplexity"),
    ]
    names += [
        ("Distinct-2", "distinct2"),
        ("Length, tokens", "mean_length"),
        ("Share cut at the limit", "clipped"),
    ]
    for label, name in names:
        both, (low, high) = run.both(name), run.interval(name)
        if both is not None:
            d = 1 if name == "mean_length" else digits_for(both)
            rows.append(
                (
                    label,
                    plain(both[0], d),
                    plain(both[1], d),
                    signed(run.delta(name), d),
                    bounds(low, high, d),
                )
            )
    if number(r.get("kl_per_token")) is not None:
        rows.append(
            (
                "KL to the start, nats per token",
                plain(0, 3),
                plain(r["kl_per_token"], 3),
                signed(r["kl_per_token"], 3),
                "",
            )
        )
    return rows


def contrast_rows(run: RunContents) -> list[tuple[str, str, str, str, str]]:
    """(instruction, class, before, after, change) of the mean held-out reward, and of the gap
    between the two instructions.
    """
    sides = [
        {
            k: v
            for k, v in (run.result.get(f"contrast_{side}") or {}).items()
            if number(v) is not None
        }
        for side in ("before", "after")
    ]
    for side in sides:
        if {"positive", "negative"} <= side.keys():
            side["gap"] = side["positive"] - side["negative"]
    names = [
        n for n in ("positive", "plain", "negative", "gap") if all(n in side for side in sides)
    ]
    digits = digits_for(v for side in sides for v in side.values())
    return [
        (
            n,
            n,
            plain(sides[0][n], digits),
            plain(sides[1][n], digits),
            signed(sides[1][n] - sides[0][n], digits),
        )
        for n in names
    ]


def examples(run: RunContents) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, prompts with both answers): the largest gains, the largest losses, and the others,
    a seeded draw if they are many.
    """
    before, after = run.before, run.after
    keys = ("prompts", "completions", "rewards", "prompt_ids")
    if any(
        len(side.get(key) or []) != len(before.get("prompts") or [])
        for side in (before, after)
        for key in keys
    ):
        return []
    if not before or before["prompt_ids"] != after["prompt_ids"]:
        return []
    rows = []
    for prompt, old, new, a, b in zip(
        before["prompts"],
        before["completions"],
        after["completions"],
        before["rewards"],
        after["rewards"],
        strict=True,
    ):
        delta = None if number(a) is None or number(b) is None else float(b) - float(a)
        rows.append(
            {
                "turns": turns(prompt),
                "before": old,
                "after": new,
                "rewards": (number(a), number(b)),
                "delta": delta,
            }
        )
    scored = sorted((r for r in rows if r["delta"]), key=lambda r: r["delta"])
    gains = [r for r in reversed(scored) if r["delta"] > 0][:EXTREMES]
    losses = [r for r in scored if r["delta"] < 0][:EXTREMES]
    rest = [r for r in rows if not any(r is shown for shown in (*gains, *losses))]
    room = SHOWN_PROMPTS - len(gains) - len(losses)
    heading = "The other prompts" if len(rest) <= room else f"Of the others, {room} drawn at random"
    picked = sorted(
        random.Random(f"{run.record.get('seed')}/examples").sample(
            range(len(rest)), min(room, len(rest))
        )
    )
    parts = [
        ("Largest gains", gains),
        ("Largest losses", losses),
        (heading, [rest[i] for i in picked]),
    ]
    return [(heading, shown) for heading, shown in parts if shown]


def sample_groups(run: RunContents) -> list[dict[str, Any]]:
    """A seeded draw of the last round's groups, completions best first, with their ranks (equal
    keys share one).
    """
    if not run.rounds:
        return []
    groups = list(run.rounds[-1].groups)
    picked = sorted(
        random.Random(f"{run.record.get('seed')}/groups").sample(
            range(len(groups)), min(SHOWN_GROUPS, len(groups))
        )
    )
    rank_by = cast("RankBy", run.config.get("rank_by", "reward"))
    shown = []
    for group in (groups[i] for i in picked):
        keys = rank_keys(group, rank_by)
        present = [k for k in keys if k is not None]
        ranked = [
            (None if k is None else 1 + sum(o > k for o in present), c)
            for k, c in zip(keys, group.completions, strict=True)
        ]
        ranked.sort(key=lambda pair: math.inf if pair[0] is None else pair[0])
        shown.append({"id": group.prompt_id, "turns": turns(group.prompt), "completions": ranked})
    return shown


def run_facts(run: RunContents) -> list[tuple[str, str]]:
    """(what, value) of the run's outline, for under the headline."""
    c, r = run.config, run.result
    memory = number(r.get("peak_rss_bytes"))
    rewards = run.record.get("rewards")
    found = [
        ("Model", r.get("model")),
        ("Rounds", len(run.rounds) or None),
        ("Prompts per round", c.get("prompts_per_round")),
        ("Rewards", ", ".join(map(str, rewards)) if isinstance(rewards, list) else rewards),
        ("Instructions", c.get("instruction_bank")),
        ("Ranking loss", c.get("ranking_loss")),
        ("Learning rate", c.get("learning_rate")),
        ("Seed", r.get("seed", run.record.get("seed"))),
        ("Time", duration(r.get("wall_seconds"))),
        ("Peak memory", f"{memory / 2**30:.1f} GiB" if memory else None),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def page_context(run: RunContents) -> dict[str, Any]:
    """Everything that the template shows."""
    metrics, groups = [r.metrics for r in run.rounds], sample_groups(run)
    origins = [o for o in ORIGINS if any(f"reward/{o}" in m for m in metrics)]
    instructions, rows, curves = instruction_rows(run), before_after_rows(run), charts(run)
    # The held-out curve belongs to the table of before and after, if there is one.
    beside = [c for c in curves if rows and c.title == _HELD_OUT]
    return {
        "run": run,
        "headline": headline(run),
        "facts": run_facts(run),
        "warnings": warnings_of(run),
        "problems": run.problems,
        "rows": rows,
        "beside_rows": [line_figure(c) for c in beside],
        "wins": run.result.get("win_rate") or {},
        "charts": [line_figure(c) for c in curves if c not in beside],
        "distributions": [box_figure(c) for c in distributions(run)],
        "origins": origins,
        "reward_digits": digits_for(m.get(f"reward/{o}") for m in metrics for o in origins),
        "contrast": contrast_rows(run),
        "instructions": instructions,
        "instruction_digits": digits_for(
            v for row in instructions for v in (row.under_positive, row.under_negative)
        ),
        "few_prompts": FEW_PROMPTS,
        "examples": examples(run),
        "groups": groups,
        "open_groups": OPEN_GROUPS,
        "all_groups": len(run.rounds[-1].groups) if run.rounds else 0,
        "group_origins": [
            o for o in ORIGINS if any(c.origin == o for g in groups for _, c in g["completions"])
        ],
        "bad_origins": BAD_ORIGINS,
        "settings": {
            k: json.dumps(v, ensure_ascii=False, default=str) for k, v in run.config.items()
        },
        "versions": run.record.get("versions") or run.result.get("versions") or {},
    }
