"""report.html: one self-contained page on a run, for a reader who was not there.

Answers written to be bad stay folded until they are asked for.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from neat_align.prompts.skipped_rows import SKIPPED_FILE
from neat_align.reporting.charts import LineChart, Series, box_figure, line_chart, line_figure
from neat_align.reporting.pages import (
    change,
    digits_for,
    duration,
    plain,
    turns,
    write_page,
)
from neat_align.reporting.round_rewards import spread_of_mean
from neat_align.reporting.run_files import RunContents, mapping, number, read_run
from neat_align.reporting.run_groups import FEW_PROMPTS, distributions, instruction_rows
from neat_align.reporting.run_tables import before_after_rows, contrast_rows, single_reward_rows
from neat_align.reporting.run_warnings import warnings_of
from neat_align.rewards.judge_totals import total_line
from neat_align.rounds.completions import ORIGINS, Origin
from neat_align.rounds.prompt_order import percent_of_data
from neat_align.rounds.ranking import BAD_ORIGINS, RankBy, rank_keys

# Prompts on the page with their answers before and after, and how many of the largest gains and of
# the largest losses come first.
SHOWN_PROMPTS = 200
EXTREMES = 7
# Groups of the last round on the page, and how many of them stand open from the start.
SHOWN_GROUPS = 48
OPEN_GROUPS = 6
_HELD_OUT = "Held-out reward"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from what the run has left there; returns its path.

    Raises ConfigError when the folder holds nothing of a run.
    """
    return write_page(run_dir / "report.html", "report.html.j2", page_context(read_run(run_dir)))


def headline(run: RunContents) -> str:
    """The run in a sentence."""
    rewards = run.both("reward")
    if rewards is not None:
        digits = digits_for(rewards)
        before, after = (plain(v, digits) for v in rewards)
        gained = change(run.delta("reward"), *run.interval("reward"), digits)
        prompts = run.result.get("held_out_prompts", "?")
        return f"Held-out reward {before} → {after}, {gained} on {prompts} prompts"
    seen = [v for _, v in _held_out(run).points]
    if len(seen) > 1:
        digits = digits_for(seen)
        first, last = plain(seen[0], digits), plain(seen[-1], digits)
        return f"Held-out reward {first} → {last} while training; there is no paired comparison"
    rounds = len(run.rounds)
    return f"{rounds} round{'' if rounds == 1 else 's'} of training, without a held-out comparison"


# ---- curves --------------------------------------------------------------------------------------


def _held_out(run: RunContents) -> Series:
    """Held-out reward by rounds of training; the first and the last with the 95 % interval over
    prompts.
    """
    seen: dict[float, float] = {}
    for name in ("before_reward", "eval_reward", "after_reward"):
        seen |= dict(_logged_points(run.log, name))
    rewards, end = run.both("reward"), run.last("epoch") or float(len(run.rounds))
    bars = []
    if rewards is not None:
        sides = ((0.0, rewards[0], run.before), (end, rewards[1], run.after))
        for x, reward, evaluation in sides:
            seen[x] = reward
            values = [v for v in map(number, evaluation.get("rewards") or []) if v is not None]
            ends = spread_of_mean(values, errors=1.96)
            bars += [(x, *ends)] if ends is not None else []
    return Series("held-out", "ink", sorted(seen.items()), bars=bars)


def _logged_points(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(rounds of training done, value) of each line that has a value of this name."""
    values = [(number(line.get("epoch")) or 0.0, number(line.get(name))) for line in lines]
    return [(x, v) for x, v in values if v is not None]


def _logged(run: RunContents, name: str, color: str) -> Series:
    """A metric of the optimizer steps: each round's mean, with every step behind it."""
    timed = [line for line in run.training_log if number(line.get("epoch")) is not None]
    steps = _logged_points(timed, name)
    values_of: dict[int, list[float]] = {}
    for x, y in steps:
        values_of.setdefault(math.ceil(x - 1e-9), []).append(y)
    means = [(end - 0.5, fmean(values)) for end, values in sorted(values_of.items())]
    label = name.rpartition("/")[2].replace("active_pair_fraction", "active")
    return Series(label, color, means, steps if len(steps) > len(means) else [])


def _sampled(run: RunContents, origin: Origin) -> Series:
    """The mean reward of each round's completions of an origin, in a band of one standard error
    over prompts.
    """
    points, spreads = [], []
    for i, r in enumerate(run.rounds):
        mean = number(r.metrics.get(f"reward/{origin}"))
        if mean is None:
            continue
        found = r.rewards.by_origin.get(origin)
        ends = found.spread if found is not None else None
        half = (ends[1] - ends[0]) / 2 if ends else 0.0
        points.append((float(i), mean))
        spreads.append((float(i), mean - half, mean + half))
    # One round has no area to fill.
    if len(spreads) > 1:
        return Series(origin, origin, points, band=spreads)
    return Series(origin, origin, points, bars=spreads)


def charts(run: RunContents) -> list[LineChart]:
    """The run's curves. A round's completions are placed where their policy stood: after as many
    rounds as came before.
    """
    sampled = [_sampled(run, o) for o in ORIGINS]
    pairs = [
        _logged(run, "ranking/accuracy", "ink"),
        _logged(run, "ranking/active_pair_fraction", "plain"),
    ]
    kl = Series("KL", "ink", _logged_points(run.log, "drift/kl"))
    # (title, unit, series)
    parts = [
        (_HELD_OUT, "mean, 95 % interval over prompts", [_held_out(run)]),
        ("Reward of what is sampled", "mean, ± one standard error over prompts", sampled),
        ("Loss", "weighted sum", [_logged(run, "loss", "ink")]),
        ("Ranking loss", "unweighted", [_logged(run, "loss/ranking", "ink")]),
        (
            "Language-modelling loss",
            "nats per token, best answer",
            [_logged(run, "loss/lm", "ink")],
        ),
        ("Pairs: ordered rightly, still active", "share of pairs", pairs),
        ("Distance to the start policy", "KL, nats per token, plain samples", [kl]),
    ]
    rounds = float(len(run.rounds))
    made = [line_chart(title, unit, series, rounds) for title, unit, series in parts]
    return [chart for chart in made if chart is not None]


# ---- tables and examples -------------------------------------------------------------------------


def examples(run: RunContents) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, prompts with both answers): the largest gains, the largest losses, and the others,
    a seeded draw if they are many.
    """
    rows = _answer_pairs(run.before, run.after)
    scored = sorted((r for r in rows if r["delta"]), key=lambda r: r["delta"])
    gains = [r for r in reversed(scored) if r["delta"] > 0][:EXTREMES]
    losses = [r for r in scored if r["delta"] < 0][:EXTREMES]
    shown_first = {id(r) for r in (*gains, *losses)}
    rest = [r for r in rows if id(r) not in shown_first]
    room = SHOWN_PROMPTS - len(gains) - len(losses)
    heading = "The other prompts" if len(rest) <= room else f"Of the others, {room} drawn at random"
    others = [rest[i] for i in _seeded_draw(run, "examples", len(rest), room)]
    parts = [("Largest gains", gains), ("Largest losses", losses), (heading, others)]
    return [(heading, cases) for heading, cases in parts if cases]


def _answer_pairs(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Each prompt with both answers and their rewards; none where the two evaluations are not of
    the same prompts.
    """
    keys = ("prompts", "completions", "rewards", "prompt_ids")
    count = len(before.get("prompts") or [])
    complete = all(len(side.get(key) or []) == count for side in (before, after) for key in keys)
    if not before or not complete or before.get("prompt_ids") != after.get("prompt_ids"):
        return []
    rows = []
    for i, prompt in enumerate(before["prompts"]):
        old, new = number(before["rewards"][i]), number(after["rewards"][i])
        rows.append(
            {
                "turns": turns(prompt),
                "before": before["completions"][i],
                "after": after["completions"][i],
                "rewards": (old, new),
                "delta": None if old is None or new is None else new - old,
            }
        )
    return rows


def _seeded_draw(run: RunContents, of: str, count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, in order; the same for the same run."""
    rng = random.Random(f"{run.record.get('seed')}/{of}")
    return sorted(rng.sample(range(count), min(most, count)))


def sample_groups(run: RunContents) -> list[dict[str, Any]]:
    """A seeded draw of the last round's groups, completions best first, with their ranks.

    Equal keys share a rank; a completion without a key has none.
    """
    if not run.rounds:
        return []
    groups = run.rounds[-1].groups
    picked = _seeded_draw(run, "groups", len(groups), SHOWN_GROUPS)
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
    facts = [
        ("Model", r.get("model")),
        ("Data", r.get("dataset")),
        ("Rounds", len(run.rounds) or None),
        ("Prompts per round", c.get("prompts_per_round")),
        ("Planned prompts", _share_of_data(run.record)),
        ("Rows left out", _rows_left_out(run.record)),
        ("Conversations shortened", _rows_shortened(run.record)),
        ("Rewards", ", ".join(map(str, rewards)) if isinstance(rewards, list) else rewards),
        ("Evaluated by", ", ".join(map(str, run.record.get("evaluated_by") or [])) or None),
        *_judges(run),
        ("Instructions", c.get("instruction_bank")),
        ("Ranking loss", c.get("ranking_loss")),
        ("Learning rate", c.get("learning_rate")),
        ("Seed", r.get("seed", run.record.get("seed"))),
        ("Time", duration(r.get("wall_seconds"))),
        ("Peak memory", f"{memory / 2**30:.1f} GiB" if memory else None),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _judges(run: RunContents) -> list[tuple[str, str]]:
    """Each judge, by which model and rubric it judges, and what it used."""
    used = mapping(run.result.get("judges_used"))
    lines = []
    for key, what in run.record.items():
        if key.startswith("judge "):
            name = key.removeprefix("judge ")
            totals = mapping(used.get(name))
            by = ", ".join(str(what).split(", ")[:-1])  # without the digest of its settings
            lines.append((f"Judge {name}", f"{by}; {total_line(totals)}" if totals else by))
    return lines


def _share_of_data(record: dict[str, Any]) -> str | None:
    """How many prompts the run was to look at, and what share of the data that is."""
    plan = mapping(record.get("plan"))
    prompts, rows = number(plan.get("prompts")), number(plan.get("rows"))
    if prompts is None or not rows:
        return None
    return f"{prompts:,.0f}, {percent_of_data(prompts / rows)} of {rows:,.0f} rows"


def _rows_left_out(record: dict[str, Any]) -> str | None:
    """How many rows could not be used, and where they are listed."""
    count = number(mapping(record.get("data")).get("skipped_rows"))
    return f"{count:,.0f} ({SKIPPED_FILE})" if count else None


def _rows_shortened(record: dict[str, Any]) -> str | None:
    """How many conversations were used without their oldest turns."""
    count = number(mapping(record.get("data")).get("shortened_rows"))
    return f"{count:,.0f} (drop_old_turns)" if count else None


def page_context(run: RunContents) -> dict[str, Any]:
    """Everything that the template shows."""
    metrics, groups = [r.metrics for r in run.rounds], sample_groups(run)
    origins = [o for o in ORIGINS if any(f"reward/{o}" in m for m in metrics)]
    single_names, single_rows = single_reward_rows(run)
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
        "single_names": single_names,
        "single_rows": single_rows,
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
