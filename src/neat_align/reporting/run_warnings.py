"""What should make the reader of a run's report pause."""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from typing import Any

from neat_align.reporting.pages import change, digits_for, percent
from neat_align.reporting.run_files import RunContents, number
from neat_align.reporting.run_groups import instruction_rows

# A warning is shown past these.
LENGTH_DRIFT = 0.15
DISTINCT2_SHARE = 0.90
PERPLEXITY_RISE = 0.05
CUT_RISE = 0.10
SAME_ANSWER = 0.10
ABSTAINED = 0.05
INVERSION_RATE = 0.40
PAIR_FRACTION = 0.50
ACTIVE_NEGATIVES = 0.10
# Prompts below which a share, or a pair of instructions that shows nothing, is no warning.
MANY_PROMPTS = 10


def warnings_of(run: RunContents) -> list[tuple[str, str]]:
    """(key, sentence) of everything that should make a reader pause; empty when nothing does."""
    return [*_outcome(run), *_price(run), *_collapse(run), *_contrast(run), *_progress(run)]


def _outcome(run: RunContents) -> list[tuple[str, str]]:
    found = []
    (low, high), by = run.interval("reward"), run.delta("reward")
    if low is not None and high is not None and low <= 0 <= high:
        found.append(
            (
                "interval",
                "The interval of the reward's change includes 0: this run does not show that "
                "training helped.",
            )
        )
    elif by is not None and by < 0:
        found.append(("reward", "The held-out reward fell."))
    judged = run.delta("second_judge")
    if judged is not None and judged < 0:
        worse = change(judged, *run.interval("second_judge"), digits_for((0, judged)))
        text = (
            f"The second judge, {run.result.get('second_judge')}, which training never saw, "
            f"finds the answers worse: {worse}."
        )
        found.append(("judge", text))
    return found


def _price(run: RunContents) -> list[tuple[str, str]]:
    found = []
    lengths = run.both("mean_length")
    ratio = lengths[1] / lengths[0] if lengths and lengths[0] else run.last("drift/length_ratio")
    if ratio is not None and abs(ratio - 1) > LENGTH_DRIFT:
        changed = f"{percent(abs(ratio - 1))} {'longer' if ratio > 1 else 'shorter'}"
        found.append(("length", f"Answers became {changed}: the reward may be paying for length."))
    cut = run.both("clipped")
    if cut is not None and cut[1] - cut[0] > CUT_RISE:
        found.append(
            (
                "cut",
                f"{percent(cut[1])} of the answers are cut at the length limit, {percent(cut[0])} "
                "were before training.",
            )
        )
    perplexity = run.both("perplexity")
    if (
        perplexity is not None
        and perplexity[0]
        and perplexity[1] / perplexity[0] - 1 > PERPLEXITY_RISE
    ):
        rise = percent(perplexity[1] / perplexity[0] - 1)
        found.append(
            (
                "perplexity",
                f"Perplexity of the human-preferred answers rose by {rise}: the policy is moving "
                "away from good text.",
            )
        )
    return found


def _collapse(run: RunContents) -> list[tuple[str, str]]:
    found = []
    variety = run.both("distinct2")
    ratio = variety[1] / variety[0] if variety and variety[0] else run.last("drift/distinct2_ratio")
    if ratio is not None and ratio < DISTINCT2_SHARE:
        found.append(
            (
                "distinct2",
                f"Distinct-2 fell to {percent(ratio)} of its start: the answers are growing alike.",
            )
        )
    before, after = _commonest(run.before), _commonest(run.after)
    if after is not None and after > SAME_ANSWER and after > (before or 0.0):
        text = (
            f"The policy is collapsing: it gives {percent(after)} of the held-out prompts the "
            "same answer, word for word"
        )
        found.append(
            (
                "collapse",
                f"{text}{'' if before is None else f', {percent(before)} before training'}.",
            )
        )
    return found


def _commonest(evaluation: dict[str, Any]) -> float | None:
    """Share of prompts whose first answer is the commonest one; None for too few prompts to say."""
    texts = [
        " ".join(answers[0].split()) for answers in evaluation.get("completions") or [] if answers
    ]
    return max(Counter(texts).values()) / len(texts) if len(texts) >= MANY_PROMPTS else None


def _contrast(run: RunContents) -> list[tuple[str, str]]:
    """Of the last round: what is left of the contrast, and whether its pairs still teach."""
    found = []
    metrics = run.rounds[-1].metrics if run.rounds else {}
    inverted, paired = (
        number(metrics.get("contrast/inversion_rate")),
        number(metrics.get("round/pair_fraction")),
    )
    abstained = number(metrics.get("rewards/abstained"))
    if inverted is not None and inverted > INVERSION_RATE:
        text = (
            f"In the last round a negative beat a positive in {percent(inverted)} of their "
            "pairs (chance is 50 %)"
        )
        found.append(("inversion", f"{text}: little contrast is left."))
    measured = [row for row in instruction_rows(run) if row.prompts >= MANY_PROMPTS]
    idle = [row for row in measured if row.verdict != "ahead"]
    if idle:
        text = (
            f"{len(idle)} of {len(measured)} pairs of instructions with {MANY_PROMPTS} prompts "
            "or more make no contrast that shows"
        )
        found.append(("instructions", f"{text}: see “Which instructions make a contrast”."))
    if paired is not None and paired < PAIR_FRACTION:
        found.append(
            (
                "pairs",
                f"In the last round only {percent(paired)} of the prompts gave two answers to "
                "rank.",
            )
        )
    if abstained is not None and abstained > ABSTAINED:
        found.append(
            (
                "abstained",
                f"In the last round the reward had no number for {percent(abstained)} of the "
                "completions.",
            )
        )
    lines = run.training_log
    end = number(lines[-1].get("epoch")) if lines else None
    name = "ranking/active_pair_fraction/negative"
    last_round = [
        number(line.get(name))
        for line in lines
        if (number(line.get("epoch")) or 0.0) > (end or 0.0) - 1
    ]
    active = [v for v in last_round if v is not None]
    if active and fmean(active) < ACTIVE_NEGATIVES:
        text = (
            f"Pairs with a negative are saturated: only {percent(fmean(active))} of them still "
            "pulled in the last round."
        )
        found.append(("saturated", text))
    return found


def _progress(run: RunContents) -> list[tuple[str, str]]:
    if run.result.get("stopped_because"):
        return [("stopped", f"The run stopped early: {run.result['stopped_because']}.")]
    steps, epochs = (
        number(run.config.get("max_steps")) or 0.0,
        number(run.config.get("num_train_epochs")),
    )
    unit, planned = ("steps", steps) if steps > 0 else ("rounds", epochs)
    done = run.last("step" if steps > 0 else "epoch")
    if done is not None and planned is not None and done < planned - 1e-6:
        return [
            (
                "stopped",
                f"The run stopped early, or is not done: {done:.4g} of {planned:.4g} {unit} are "
                "logged.",
            )
        ]
    return []
