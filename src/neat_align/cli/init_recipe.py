"""The recipe that `neat-align init` writes: options that fit a model and its data, and why.

Each option comes with a comment that says what it was chosen by. Numbers that no data decides are
those of the recipes that docs/results.md measures (quickstart, no-reward).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from neat_align.cli.init_look import DataFacts, ModelFacts
from neat_align.errors import ConfigError
from neat_align.prompts.hold_out import held_out_count
from neat_align.prompts.instruction_banks import SHIPPED_BANKS

WIDTH = 100
# Lengths are rounded up to so many tokens.
_STEP = 16
# An answer shorter than this is no answer: the prompts that leave less room are left out.
_LEAST_ANSWER = 16
# Where the data has no answers to go by: enough for a paragraph; a CPU writes slowly.
_ANSWER = {"cpu": 64, "other": 256}
_LONGEST_ANSWER = 1024
_PROMPTS_PER_ROUND = {"cpu": 24, "other": 64}
_MOST_ROUNDS = 4
# From here on the frozen weights under the adapter are held in bf16.
_BIG = 1_000_000_000


@dataclass
class Recipe:
    """Options in the order in which they are written, each with its comment ("" for none)."""

    lines: list[tuple[str, Any, str]] = field(default_factory=list)

    def add(self, name: str, value: Any, why: str = "") -> None:
        """One more option, or another value of one that is there."""
        places = [i for i, (there, _, _) in enumerate(self.lines) if there == name]
        if places:
            self.lines[places[0]] = (name, value, why)
        else:
            self.lines.append((name, value, why))

    @property
    def settings(self) -> dict[str, Any]:
        """The options alone."""
        return {name: value for name, value, _ in self.lines}

    def text(self, head: Sequence[str]) -> str:
        """The recipe as YAML, under these lines of comment."""
        written = [f"# {line}".rstrip() for line in head]
        for name, value, why in self.lines:
            written += [f"# {line}" for line in textwrap.wrap(why, WIDTH - 2)]
            written.append(_as_yaml(name, value))
        return "\n".join(written) + "\n"


def _as_yaml(name: str, value: Any) -> str:
    """One option; lists and mappings on its line."""
    in_a_line = isinstance(value, list | dict)
    text = yaml.safe_dump(value, default_flow_style=in_a_line, width=10**6, allow_unicode=True)
    value_alone = text.removesuffix("...\n").strip()
    return f"{name}: {value_alone}"


@dataclass(frozen=True)
class Asked:
    """What the command was told: names as the user wrote them, `reward` "" for none."""

    model: str
    data: str
    split: str | None
    bank: str
    reward: str
    output_dir: str
    device: str


def recipe_for(
    asked: Asked, model: ModelFacts, data: DataFacts, placement: str, why: str
) -> Recipe:
    """A recipe that runs. `why` says what the placement was chosen by. Raises ConfigError."""
    recipe = Recipe()
    recipe.add("model_name_or_path", asked.model)
    recipe.add("dataset_name", asked.data)
    if asked.split is not None:
        recipe.add("dataset_train_split", asked.split)
    recipe.add("output_dir", asked.output_dir)
    _add_form(recipe, model, data)
    recipe.add(
        "instruction_bank",
        asked.bank,
        f"What answers should be more of: {', '.join(SHIPPED_BANKS)}, or a YAML file with pairs of "
        "your own.",
    )
    recipe.add("instruction_placement", placement, why)
    _add_objective(recipe, asked, data)
    lengths = _add_lengths(recipe, asked, model, data)
    _add_amount(recipe, asked, data, lengths)
    _add_adapter(recipe, model)
    recipe.add("max_kl", 0.5, "Stop when the policy has moved this far, in nats per token.")
    recipe.add("save_total_limit", 2)
    return recipe


def _add_form(recipe: Recipe, model: ModelFacts, data: DataFacts) -> None:
    if data.form == "text" and model.has_template:
        why = "The prompts are text and the model has a chat template: they become user turns."
        recipe.add("as_conversations", True, why)
    if data.form == "messages" and not model.has_template:
        why = (
            "The prompts are messages and the model has no chat template: they become "
            '"Human: … Assistant:" text.'
        )
        recipe.add("as_texts", True, why)
    if model.thinks:
        why = "The template can open a block of thought; answers are learned without one."
        recipe.add("chat_template_kwargs", {"enable_thinking": False}, why)


# ---- the objective -------------------------------------------------------------------------------


def _add_objective(recipe: Recipe, asked: Asked, data: DataFacts) -> None:
    own = f"{data.pairs:,} rows have chosen and rejected answers, which stand in the groups, too."
    if asked.reward:
        recipe.add(
            "reward_funcs", [asked.reward], "Every answer is scored by it; higher is better."
        )
        _add_ranking(recipe, own if data.pairs else "")
    elif data.pairs:
        why = (
            "No reward: chosen answers and those under the positive instruction rank above "
            "rejected ones and those under the negative. To rank by a reward name one "
            "(reward_funcs: [NAME]) and set rank_by: reward."
        )
        recipe.add("rank_by", "origin", why)
        _add_ranking(recipe, own)
    else:
        why = (
            "No reward: contrast distillation. At every token of its plain answers the policy "
            "learns what the two instructions make it say differently."
        )
        recipe.add("rank_by", "origin", why)
        for name, value in _DISTILLATION.items():
            recipe.add(name, value)


_DISTILLATION = {
    "num_positive": 0,
    "num_negative": 0,
    "num_plain": 4,
    "ranking_loss": "none",
    "lm_weight": 0,
    "kl_weight": 0,
    "distil_weight": 1.0,
    "distil_alpha": 1.0,
}


def _add_ranking(recipe: Recipe, why: str) -> None:
    recipe.add("num_positive", 2, why)
    for name, value in {
        "num_negative": 2,
        "num_plain": 0,
        "ranking_loss": "dpo",
        "lm_weight": 0.05,
        "kl_weight": 1.0,
    }.items():
        recipe.add(name, value)


# ---- lengths -------------------------------------------------------------------------------------


def _add_lengths(recipe: Recipe, asked: Asked, model: ModelFacts, data: DataFacts) -> int:
    """How long prompts and answers may be; gives the number of rows that are not too long."""
    answer, why_answer = _answer_length(asked, data)
    longest, left_out = data.longest, 0
    room = None if model.context is None else model.context - data.instructed
    if room is not None and longest + answer > room:
        answer = max(_LEAST_ANSWER, min(answer, room - longest))
        longest = min(longest, room - answer)
        why_answer += f" The context leaves {answer} beside the longest prompt that is kept."
    fitting = [length for length in data.lengths if length <= longest]
    left_out = len(data.lengths) - len(fitting)
    if not fitting:
        raise ConfigError(
            f"the shortest prompt of {asked.data} has {data.lengths[0]:,} tokens, and the context "
            f"of {model.context:,} leaves {max(0, longest):,} for it beside an instruction and an "
            "answer: name a model with a longer context, or shorter prompts"
        )
    rounded = -(-longest // _STEP) * _STEP
    most = rounded if room is None else min(rounded, room - answer)
    seen = "" if data.counted < data.rows else "all "
    of = f"{data.counted:,} of {data.rows:,} rows" if not seen else f"{data.rows:,} rows"
    why = f"In tokens; the longest prompt of {of} has {data.longest:,}, the median {data.median:,}."
    if model.context is not None:
        why += f" The model's context is {model.context:,}."
    if left_out:
        why += f" {left_out:,} are too long for it."
    recipe.add("max_prompt_length", most, why)
    if left_out or data.unreadable or data.counted < data.rows:
        why = "Leave out rows that cannot be used, and list them in skipped-rows.jsonl"
        counted = f" ({data.unreadable + left_out:,} of those that were looked at)."
        recipe.add("on_bad_row", "skip", why + counted)
    recipe.add("max_completion_length", answer, why_answer)
    return len(fitting)


def _answer_length(asked: Asked, data: DataFacts) -> tuple[int, str]:
    if not data.answer_lengths:
        answer = _ANSWER["cpu" if asked.device == "cpu" else "other"]
        return (
            answer,
            "In tokens. The data has no answers to go by: raise it where answers are cut.",
        )
    at = data.answer_lengths[min(len(data.answer_lengths) * 19 // 20, len(data.answer_lengths) - 1)]
    answer = min(_LONGEST_ANSWER, max(2 * _LEAST_ANSWER, -(-at // _STEP) * _STEP))
    return answer, f"In tokens; 95 % of the data's own answers have {at:,} or fewer."


# ---- how much ------------------------------------------------------------------------------------


def _add_amount(recipe: Recipe, asked: Asked, data: DataFacts, fitting: int) -> None:
    """Held-out prompts and rounds that the data has enough of."""
    on = "cpu" if asked.device == "cpu" else "other"
    share = fitting / max(1, data.counted)
    prompts = max(1, min(data.prompts, int(share * data.rows)))
    held_out = held_out_count(prompts, None) if prompts > 1 else 0
    left = prompts - held_out
    a_round = min(left, _PROMPTS_PER_ROUND[on])
    rounds = min(_MOST_ROUNDS, max(2, -(-left // a_round)))
    why = f"Of {prompts:,} different prompts, to measure the result on."
    if not held_out:
        why = "There is one prompt: nothing is measured. Add prompts, or give eval_dataset_name."
    elif held_out < 30:
        why += " So few measure a change only roughly: each is answered four times."
    recipe.add("holdout", held_out, why)
    if 0 < held_out < 30:
        recipe.add("num_eval_generations", 4)
    used = min(left, rounds * a_round)
    which = "all of" if used == left else f"{used:,} of"
    why = f"{rounds} rounds take {which} the {left:,} prompts that are left"
    why += (
        "; data_passes: 1 takes all of them."
        if used < left
        else f", {_times(rounds, a_round, left)}."
    )
    recipe.add("num_train_epochs", rounds, why)
    recipe.add("prompts_per_round", a_round)
    recipe.add("per_device_train_batch_size", max(1, min(8, -(-a_round // 4))))
    recipe.add("max_tokens_per_micro_batch", 2048 if on == "cpu" else 8192)
    recipe.add("generation_batch_size", 128)
    recipe.add("temperature", 0.7)


def _times(rounds: int, a_round: int, left: int) -> str:
    times = rounds * a_round / left
    if times < 1.05:
        return "each once"
    return "each twice" if abs(times - 2) < 0.05 else f"each {times:.3g} times on average"


# ---- the adapter ---------------------------------------------------------------------------------


def _add_adapter(recipe: Recipe, model: ModelFacts) -> None:
    big = model.parameters >= _BIG
    why = "Train a LoRA adapter on every linear layer; use_peft: false trains all weights"
    why += ", at a learning rate of 1.0e-5 and with more memory."
    recipe.add("use_peft", True, why)
    recipe.add("lora_r", 16)
    recipe.add("lora_alpha", 32)
    if big:
        recipe.add("dtype", "bfloat16", "The frozen weights under the adapter, in half the memory.")
    recipe.add("learning_rate", 1.0e-4 if big else 2.0e-4)
    recipe.add("lr_scheduler_type", "constant")
