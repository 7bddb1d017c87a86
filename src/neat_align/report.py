"""report.html: one self-contained page on a run, for a reader who was not there.

What the page may do is in report_page; answers written to be bad stay folded until they are asked for.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from neat_align.groups import BAD_ORIGINS, ORIGINS, RankBy, rank_keys
from neat_align.report_charts import Points, chart
from neat_align.report_input import RunFacts, number, read_run
from neat_align.report_page import bounds, change, digits_for, duration, percent, plain, signed, turns, write_page

# Prompts shown with their answers before and after, and groups shown of the last round.
SHOWN_PROMPTS = 20
SHOWN_GROUPS = 6
# A warning is shown past these.
LENGTH_DRIFT = 0.15
DISTINCT2_SHARE = 0.90
PERPLEXITY_RISE = 0.05
INVERSION_RATE = 0.40
PAIR_FRACTION = 0.50
ACTIVE_NEGATIVES = 0.10


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from what the run has left there so far; returns its path.

    Raises ConfigError when the folder holds nothing of a run.
    """
    return write_page(run_dir / "report.html", "report.html.j2", page_context(read_run(run_dir)))


# ---- the outcome ------------------------------------------------------------------------------------------------------


def _pair(result: dict[str, Any], name: str) -> tuple[float, float] | None:
    before, after = number(result.get(f"{name}_before")), number(result.get(f"{name}_after"))
    return None if before is None or after is None else (before, after)


def _interval(result: dict[str, Any], name: str) -> tuple[float, float] | None:
    both = result.get(f"{name}_delta_ci95") or []
    low, high = (number(v) for v in both) if len(both) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def _delta(result: dict[str, Any], name: str) -> float | None:
    """The paired difference; where some prompts have one number only it is not the difference of the means."""
    paired, both = number(result.get(f"{name}_delta")), _pair(result, name)
    return paired if paired is not None else both[1] - both[0] if both else None


def _change(result: dict[str, Any], name: str, digits: int) -> str:
    low, high = _interval(result, name) or (None, None)
    return change(_delta(result, name), low, high, digits)


def headline(run: RunFacts) -> str:
    """The run in a sentence."""
    rewards = _pair(run.result, "reward")
    if rewards is not None:
        digits = digits_for(rewards)
        gained, prompts = _change(run.result, "reward", digits), run.result.get("held_out_prompts", "?")
        return f"Held-out reward {plain(rewards[0], digits)} → {plain(rewards[1], digits)}, {gained} on {prompts} prompts"
    seen = _held_out(run)
    if len(seen) > 1:
        digits = digits_for(v for _, v in seen)
        return f"Held-out reward {plain(seen[0][1], digits)} → {plain(seen[-1][1], digits)} while training; there is no paired comparison"
    rounds = len(run.rounds)
    return f"{rounds} round{'' if rounds == 1 else 's'} of training, without a held-out comparison"


# ---- warnings --------------------------------------------------------------------------------------------------------


def warnings_of(run: RunFacts) -> list[tuple[str, str]]:
    """(key, sentence) of everything that should make a reader pause; empty when nothing does."""
    r, found = run.result, []
    interval, by = _interval(r, "reward"), _delta(r, "reward")
    if interval is not None and interval[0] <= 0 <= interval[1]:
        found.append(("interval", "The interval of the reward's change includes 0: this run does not show that training helped."))
    elif by is not None and by < 0:
        found.append(("reward", "The held-out reward fell."))
    lengths = _pair(r, "mean_length")
    ratio = lengths[1] / lengths[0] if lengths and lengths[0] else run.last("drift/length_ratio")
    if ratio is not None and abs(ratio - 1) > LENGTH_DRIFT:
        changed = f"{percent(abs(ratio - 1))} {'longer' if ratio > 1 else 'shorter'}"
        found.append(("length", f"Answers became {changed}: the reward may be paying for length."))
    variety = _pair(r, "distinct2")
    ratio = variety[1] / variety[0] if variety and variety[0] else run.last("drift/distinct2_ratio")
    if ratio is not None and ratio < DISTINCT2_SHARE:
        found.append(("distinct2", f"Distinct-2 fell to {percent(ratio)} of its start: the answers are growing alike."))
    perplexity = _pair(r, "perplexity")
    if perplexity is not None and perplexity[0] and perplexity[1] / perplexity[0] - 1 > PERPLEXITY_RISE:
        rise = percent(perplexity[1] / perplexity[0] - 1)
        found.append(("perplexity", f"Perplexity of the human-preferred answers rose by {rise}: the policy is moving away from good text."))
    judged = _delta(r, "second_judge")
    if judged is not None and judged < 0:
        worse = _change(r, "second_judge", digits_for((0, judged)))
        found.append(("judge", f"The second judge, {r.get('second_judge')}, which training never saw, finds the answers worse: {worse}."))
    return found + _training_warnings(run)


def _training_warnings(run: RunFacts) -> list[tuple[str, str]]:
    found = []
    metrics = run.rounds[-1].metrics if run.rounds else {}
    inverted, paired = number(metrics.get("contrast/inversion_rate")), number(metrics.get("round/pair_fraction"))
    if inverted is not None and inverted > INVERSION_RATE:
        text = (
            f"In the last round a negative beat a positive in {percent(inverted)} of their pairs (chance is 50 %): little contrast is left."
        )
        found.append(("inversion", text))
    if paired is not None and paired < PAIR_FRACTION:
        found.append(("pairs", f"In the last round only {percent(paired)} of the prompts gave two answers to rank."))
    lines = run.training_log
    end = number(lines[-1].get("epoch")) if lines else None
    name = "ranking/active_pair_fraction/negative"
    last_round = [number(line.get(name)) for line in lines if (number(line.get("epoch")) or 0.0) > (end or 0.0) - 1]
    active = [v for v in last_round if v is not None]
    if active and fmean(active) < ACTIVE_NEGATIVES:
        text = f"Pairs with a negative are saturated: only {percent(fmean(active))} of them still pulled in the last round."
        found.append(("saturated", text))
    if run.result.get("stopped_because"):
        found.append(("stopped", f"The run stopped early: {run.result['stopped_because']}."))
    else:
        steps, epochs = number(run.config.get("max_steps")) or 0.0, number(run.config.get("num_train_epochs"))
        unit, planned = ("steps", steps) if steps > 0 else ("rounds", epochs)
        done = run.last("step" if steps > 0 else "epoch")
        if done is not None and planned is not None and done < planned - 1e-6:
            found.append(("stopped", f"The run stopped early, or is not done: {done:.4g} of {planned:.4g} {unit} are logged."))
    return found


# ---- curves ----------------------------------------------------------------------------------------------------------


def _held_out(run: RunFacts) -> Points:
    """Held-out reward after so many rounds."""
    rewards = _pair(run.result, "reward")
    seen = {0.0: rewards[0]} if rewards else {}
    for name in ("before_reward", "eval_reward", "after_reward"):
        seen |= {number(line.get("epoch")) or 0.0: v for line in run.log if (v := number(line.get(name))) is not None}
    return sorted(seen.items())


def charts(run: RunFacts) -> list[dict[str, Any]]:
    """The run's curves. A round's completions are placed where their policy stood: after as many rounds as came before."""
    lines, total = run.training_log, float(len(run.rounds))

    def logged(name: str, css: str) -> tuple[str, str, Points, Points]:
        steps = [(x, y) for line in lines if (x := number(line.get("epoch"))) is not None and (y := number(line.get(name))) is not None]
        ends = sorted({math.ceil(x - 1e-9) for x, _ in steps})
        means = [(e - 0.5, fmean(y for x, y in steps if math.ceil(x - 1e-9) == e)) for e in ends]
        label = name.rpartition("/")[2].replace("active_pair_fraction", "active")
        return label, css, means, steps if len(steps) > len(means) else []

    def by_round(name: str, css: str) -> tuple[str, str, Points, Points]:
        points = [(float(i), v) for i, r in enumerate(run.rounds) if (v := number(r.metrics.get(f"reward/{name}"))) is not None]
        return name, css, points, []

    drift = [(number(x.get("epoch")) or 0.0, v) for x in run.log if (v := number(x.get("drift/kl"))) is not None]
    rewards = [*(by_round(o, o) for o in ORIGINS), ("held-out", "ink", _held_out(run), [])]
    drawn = [
        chart("Reward of what is sampled", "mean reward", rewards, total),
        chart("Loss", "weighted sum", [logged("loss", "ink")], total),
    ]
    drawn.append(chart("Ranking loss", "unweighted", [logged("loss/ranking", "ink")], total))
    drawn.append(chart("Language-modelling loss", "nats per token, best answer", [logged("loss/lm", "ink")], total))
    pairs = [logged("ranking/accuracy", "ink"), logged("ranking/active_pair_fraction", "plain")]
    drawn.append(chart("Pairs: ordered rightly, still active", "share of pairs", pairs, total))
    drawn.append(chart("Distance to the start policy", "KL, nats per token, plain samples", [("KL", "ink", drift, [])], total))
    return [c for c in drawn if c is not None]


# ---- tables and examples ---------------------------------------------------------------------------------------------


def before_after_rows(run: RunFacts) -> list[tuple[str, str, str, str, str]]:
    """(what, before, after, change, interval) of everything that was measured twice."""
    r, rows = run.result, []
    names = [
        ("Reward", "reward"),
        (f"Second judge: {r.get('second_judge')}", "second_judge"),
        ("Perplexity of preferred answers", "perplexity"),
    ]
    names += [("Distinct-2", "distinct2"), ("Length, tokens", "mean_length"), ("Share cut at the limit", "clipped")]
    for label, name in names:
        both, (low, high) = _pair(r, name), _interval(r, name) or (None, None)
        if both is not None:
            d = 1 if name == "mean_length" else digits_for(both)
            rows.append((label, plain(both[0], d), plain(both[1], d), signed(_delta(r, name), d), bounds(low, high, d)))
    if number(r.get("kl_per_token")) is not None:
        rows.append(("KL to the start, nats per token", plain(0, 3), plain(r["kl_per_token"], 3), signed(r["kl_per_token"], 3), ""))
    return rows


def contrast_rows(run: RunFacts) -> list[tuple[str, str, str, str, str]]:
    """(instruction, class, before, after, change) of the mean held-out reward, and of the gap between the two instructions."""
    sides = [{k: v for k, v in (run.result.get(f"contrast_{side}") or {}).items() if number(v) is not None} for side in ("before", "after")]
    for side in sides:
        if {"positive", "negative"} <= side.keys():
            side["gap"] = side["positive"] - side["negative"]
    names = [n for n in ("positive", "plain", "negative", "gap") if all(n in side for side in sides)]
    digits = digits_for(v for side in sides for v in side.values())
    return [(n, n, plain(sides[0][n], digits), plain(sides[1][n], digits), signed(sides[1][n] - sides[0][n], digits)) for n in names]


def examples(run: RunFacts, limit: int = SHOWN_PROMPTS) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, prompts with both answers): largest gains, largest losses, and a seeded draw of the rest."""
    before, after = run.before, run.after
    keys = ("prompts", "completions", "rewards", "prompt_ids")
    if any(len(side.get(key) or []) != len(before.get("prompts") or []) for side in (before, after) for key in keys):
        return []
    if not before or before["prompt_ids"] != after["prompt_ids"]:
        return []
    rows = []
    for prompt, old, new, a, b in zip(
        before["prompts"], before["completions"], after["completions"], before["rewards"], after["rewards"], strict=True
    ):
        delta = None if number(a) is None or number(b) is None else float(b) - float(a)
        rows.append({"turns": turns(prompt), "before": old, "after": new, "rewards": (a, b), "delta": delta})
    each = max(1, limit * 7 // 20)
    scored = sorted((r for r in rows if r["delta"]), key=lambda r: r["delta"])
    gains = [r for r in reversed(scored) if r["delta"] > 0][:each]
    losses = [r for r in scored if r["delta"] < 0][:each]
    rest = [r for r in rows if not any(r is shown for shown in (*gains, *losses))]
    random.Random(f"{run.record.get('seed')}/examples").shuffle(rest)
    parts = [
        ("Largest gains", gains),
        ("Largest losses", losses),
        ("Drawn at random from the rest", rest[: limit - len(gains) - len(losses)]),
    ]
    return [(heading, shown) for heading, shown in parts if shown]


def sample_groups(run: RunFacts, limit: int = SHOWN_GROUPS) -> list[dict[str, Any]]:
    """A seeded draw of the last round's groups, completions best first, with their ranks (equal keys share one)."""
    if not run.rounds:
        return []
    groups = list(run.rounds[-1].groups)
    picked = sorted(random.Random(f"{run.record.get('seed')}/groups").sample(range(len(groups)), min(limit, len(groups))))
    rank_by = cast("RankBy", run.config.get("rank_by", "reward"))
    shown = []
    for group in (groups[i] for i in picked):
        keys = rank_keys(group, rank_by)
        present = [k for k in keys if k is not None]
        ranked = [(None if k is None else 1 + sum(o > k for o in present), c) for k, c in zip(keys, group.completions, strict=True)]
        ranked.sort(key=lambda pair: math.inf if pair[0] is None else pair[0])
        shown.append({"id": group.prompt_id, "turns": turns(group.prompt), "completions": ranked})
    return shown


def run_facts(run: RunFacts) -> list[tuple[str, str]]:
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


def page_context(run: RunFacts) -> dict[str, Any]:
    """Everything that the template shows."""
    metrics = [r.metrics for r in run.rounds]
    origins = [o for o in ORIGINS if any(f"reward/{o}" in m for m in metrics)]
    return {
        "run": run,
        "headline": headline(run),
        "facts": run_facts(run),
        "warnings": warnings_of(run),
        "problems": run.problems,
        "rows": before_after_rows(run),
        "wins": run.result.get("win_rate") or {},
        "charts": charts(run),
        "origins": origins,
        "reward_digits": digits_for(m.get(f"reward/{o}") for m in metrics for o in origins),
        "contrast": contrast_rows(run),
        "examples": examples(run),
        "groups": sample_groups(run),
        "bad_origins": BAD_ORIGINS,
        "settings": {k: json.dumps(v, ensure_ascii=False, default=str) for k, v in run.config.items()},
        "versions": run.record.get("versions") or run.result.get("versions") or {},
    }
