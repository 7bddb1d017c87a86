"""What should make the reader of a run's report pause."""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from typing import Any, TypeAlias

from neat_align.reporting.pages import change, digits_for, percent
from neat_align.reporting.run_files import RunContents, mapping, number
from neat_align.reporting.run_groups import instruction_rows

# (key, sentence)
KeyedSentence: TypeAlias = tuple[str, str]
# A warning is shown past these.
LENGTH_DRIFT = 0.15
DISTINCT2_SHARE = 0.90
PERPLEXITY_RISE = 0.05
CUT_RISE = 0.10
CUT_SHARE = 0.75
SAME_ANSWER = 0.10
ABSTAINED = 0.05
INVERSION_RATE = 0.40
PAIR_FRACTION = 0.50
ACTIVE_NEGATIVES = 0.10
# Prompts below which a share, or a pair of instructions that shows nothing, is no warning.
MANY_PROMPTS = 10
# Held-out prompts below which the intervals themselves are guesses.
FEW_HELD_OUT = 30


def warnings_of(run: RunContents) -> list[KeyedSentence]:
    """(key, sentence) of everything that should make a reader pause; empty when nothing does."""
    return [
        *_notices(run),
        *_outcome(run),
        *_small_sample(run),
        *_price(run),
        *_collapse(run),
        *_inversion(run),
        *_idle_instructions(run),
        *_last_round(run),
        *_saturation(run),
        *_progress(run),
    ]


def _notices(run: RunContents) -> list[KeyedSentence]:
    """What the run said about its data when it began."""
    told = mapping(run.record.get("data")).get("notices")
    return [("data", text) for text in told] if isinstance(told, list) else []


def _outcome(run: RunContents) -> list[KeyedSentence]:
    told = []
    (low, high), by = run.interval("reward"), run.delta("reward")
    if low is not None and high is not None and low <= 0 <= high:
        text = (
            "The interval of the reward's change includes 0: this run does not show that training "
            "helped."
        )
        told.append(("interval", text))
    elif by is not None and by < 0:
        told.append(("reward", "The held-out reward fell."))
    judged = run.delta("second_judge")
    if judged is not None and judged < 0:
        worse = change(judged, *run.interval("second_judge"), digits_for((0, judged)))
        text = (
            f"The second judge, {run.result.get('second_judge')}, which training never saw, finds "
            f"the answers worse: {worse}."
        )
        told.append(("judge", text))
    return told


def _small_sample(run: RunContents) -> list[KeyedSentence]:
    prompts = number(run.result.get("held_out_prompts"))
    if prompts is None or prompts >= FEW_HELD_OUT:
        return []
    held_out = "1 held-out prompt" if prompts == 1 else f"{prompts:.0f} held-out prompts"
    text = (
        f"Everything here is measured on {held_out}: of fewer than {FEW_HELD_OUT} an interval is "
        "itself a guess. Hold more out (holdout), or evaluate on other data (eval_dataset_name)."
    )
    return [("prompts", text)]


def _price(run: RunContents) -> list[KeyedSentence]:
    told = []
    length = _ratio(run, "mean_length", "drift/length_ratio")
    if length is not None and abs(length - 1) > LENGTH_DRIFT:
        changed = f"{percent(abs(length - 1))} {'longer' if length > 1 else 'shorter'}"
        text = f"Answers became {changed}: the reward may be paying for length."
        told.append(("length", text))
    cut = run.both("clipped")
    most_cut = _most_are_cut(run)
    if most_cut:
        told.append(("cut", most_cut))
    elif cut is not None and cut[1] - cut[0] > CUT_RISE:
        text = (
            f"{percent(cut[1])} of the answers are cut at the length limit, {percent(cut[0])} were "
            "before training."
        )
        told.append(("cut", text))
    perplexity = _ratio(run, "perplexity")
    if perplexity is not None and perplexity - 1 > PERPLEXITY_RISE:
        text = (
            f"Perplexity of the human-preferred answers rose by {percent(perplexity - 1)}: the "
            "policy is moving away from good text."
        )
        told.append(("perplexity", text))
    return told


def _most_are_cut(run: RunContents) -> str:
    """What is said where most answers have no end; empty where that is not so."""
    cut = run.both("clipped")
    share = cut[1] if cut is not None else _last_metric(run, "completions/clipped_ratio")
    if share is None or share < CUT_SHARE:
        return ""
    limit = number(run.config.get("max_completion_length"))
    at = "" if limit is None else f" of {limit:.0f} tokens (max_completion_length)"
    which = "All" if share == 1 else percent(share)
    return (
        f"{which} {'answers' if share == 1 else 'of the answers'} are cut at the length limit{at}: "
        "rewards judge unfinished texts, and no answer shows how to end. Raise it, or check that "
        "the model's end-of-turn token is right."
    )


def _ratio(run: RunContents, name: str, logged: str | None = None) -> float | None:
    """A number after training over the one before; where the result has none, the last ratio that
    was logged.
    """
    both = run.both(name)
    if both is not None and both[0]:
        return both[1] / both[0]
    return None if logged is None else run.last(logged)


def _collapse(run: RunContents) -> list[KeyedSentence]:
    told = []
    variety = _ratio(run, "distinct2", "drift/distinct2_ratio")
    if variety is not None and variety < DISTINCT2_SHARE:
        text = f"Distinct-2 fell to {percent(variety)} of its start: the answers are growing alike."
        told.append(("distinct2", text))
    before, after = _commonest(run.before), _commonest(run.after)
    if after is not None and after > SAME_ANSWER and after > (before or 0.0):
        start = "" if before is None else f", {percent(before)} before training"
        text = (
            f"The policy is collapsing: it gives {percent(after)} of the held-out prompts the same "
            f"answer, word for word{start}."
        )
        told.append(("collapse", text))
    return told


def _commonest(evaluation: dict[str, Any]) -> float | None:
    """Share of prompts whose first answer is the commonest one; None for too few prompts to say."""
    answered = [answers for answers in evaluation.get("completions") or [] if answers]
    if len(answered) < MANY_PROMPTS:
        return None
    texts = Counter(" ".join(answers[0].split()) for answers in answered)
    return max(texts.values()) / len(answered)


# ---- the last round: what is left of the contrast, and whether its pairs still teach ------------


def _last_metric(run: RunContents, name: str) -> float | None:
    return number(run.rounds[-1].metrics.get(name)) if run.rounds else None


def _inversion(run: RunContents) -> list[KeyedSentence]:
    inverted = _last_metric(run, "contrast/inversion_rate")
    if inverted is None or inverted <= INVERSION_RATE:
        return []
    text = (
        f"In the last round a negative beat a positive in {percent(inverted)} of their pairs "
        "(chance is 50 %): little contrast is left."
    )
    return [("inversion", text)]


def _idle_instructions(run: RunContents) -> list[KeyedSentence]:
    measured = [row for row in instruction_rows(run) if row.prompts >= MANY_PROMPTS]
    idle = sum(row.verdict != "ahead" for row in measured)
    if not idle:
        return []
    text = (
        f"{idle} of {len(measured)} pairs of instructions with {MANY_PROMPTS} prompts or more make "
        "no contrast that shows: see “Which instructions make a contrast”."
    )
    return [("instructions", text)]


def _last_round(run: RunContents) -> list[KeyedSentence]:
    told = []
    paired = _last_metric(run, "round/pair_fraction")
    if paired is not None and paired < PAIR_FRACTION:
        text = f"In the last round only {percent(paired)} of the prompts gave two answers to rank."
        told.append(("pairs", text))
    abstained = _last_metric(run, "rewards/abstained")
    if abstained is not None and abstained > ABSTAINED:
        text = (
            f"In the last round the reward had no number for {percent(abstained)} of the "
            "completions."
        )
        told.append(("abstained", text))
    return told


def _saturation(run: RunContents) -> list[KeyedSentence]:
    lines = run.training_log
    end = (number(lines[-1].get("epoch")) if lines else None) or 0.0
    recent = [line for line in lines if (number(line.get("epoch")) or 0.0) > end - 1]
    logged = [number(line.get("ranking/active_pair_fraction/negative")) for line in recent]
    active = [v for v in logged if v is not None]
    if not active or fmean(active) >= ACTIVE_NEGATIVES:
        return []
    text = (
        f"Pairs with a negative are saturated: only {percent(fmean(active))} of them still pulled "
        "in the last round."
    )
    return [("saturated", text)]


def _progress(run: RunContents) -> list[KeyedSentence]:
    if run.result.get("stopped_because"):
        return [("stopped", f"The run stopped early: {run.result['stopped_because']}.")]
    steps = number(run.config.get("max_steps")) or 0.0
    unit, planned = "steps", steps if steps > 0 else None
    if planned is None:
        unit, planned = "rounds", number(run.config.get("num_train_epochs"))
        if run.config.get("data_passes") is not None:
            planned = number(mapping(run.record.get("plan")).get("rounds"))
    done = run.last("step" if unit == "steps" else "epoch")
    if done is None or planned is None or done >= planned - 1e-6:
        return []
    text = f"The run stopped early, or is not done: {done:.4g} of {planned:.4g} {unit} are logged."
    return [("stopped", text)]
