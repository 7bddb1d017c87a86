"""What the help and the shell completion know of a run's options, without importing transformers.

Our own options are read from the dataclasses that declare them. Of transformers' own, those that
stand on the first page of the help are told here, in a line each; a test holds their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from typing import Any

from neat_align.cli.option_groups import REQUIRED, all_names
from neat_align.config.constraints import default_of, limits_of
from neat_align.config.objective_options import ObjectiveOptions
from neat_align.config.reward_options import RewardOptions
from neat_align.config.round_options import RoundOptions
from neat_align.config.sampler_options import SamplerOptions
from neat_align.config.trainer_defaults import TrainerDefaults
from neat_align.script_arguments import ScriptArguments


@dataclass(frozen=True)
class OptionFacts:
    """An option as a page of help shows it.

    `kind` is the word for its value (INT, TEXT …), `choices` the only values where there are any.
    """

    name: str
    kind: str
    default: str
    help: str
    choices: tuple[str, ...] = ()
    is_list: bool = False
    is_switch: bool = False


def our_options() -> dict[str, OptionFacts]:
    """Every option that is explained without transformers, by name."""
    declared = (
        *(ScriptArguments, RoundOptions, SamplerOptions, RewardOptions),
        *(ObjectiveOptions, TrainerDefaults),
    )
    return {f.name: facts_of(f) for kind in declared for f in fields(kind)} | {**_THEIRS}


def every_option() -> dict[str, OptionFacts]:
    """Every option of a run, by name; imports transformers, which takes seconds."""
    from neat_align.config import NEATConfig

    ours = our_options()
    names = {*all_names()}
    more = {f.name: facts_of(f) for f in fields(NEATConfig) if f.name in names - {*ours}}
    return ours | more


def facts_of(f: Field[Any]) -> OptionFacts:
    """A dataclass's field as the help shows it."""
    text = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    text = text if "[" not in str(f.type) and "|" not in str(f.type) else str(f.type)
    default = default_of(f)
    words = " ".join(str(f.metadata.get("help", "")).replace("%%", "%").split())
    # Where one text does as well (report_to), transformers' parser reads one.
    is_list = "list[" in text and "str" not in text.split(" | ")
    return OptionFacts(
        f.name,
        _kind(text, is_list=is_list),
        _shown(default, name=f.name),
        words,
        limits_of(f).choices,
        is_list,
        text.split(" |")[0].rpartition(".")[2] == "bool",
    )


def _kind(type_name: str, *, is_list: bool) -> str:
    if is_list:
        return "FLOAT ..." if "list[float]" in type_name else "TEXT ..."
    if "dict" in type_name:
        return "JSON"
    for word, kind in (("bool", "BOOL"), ("int", "INT"), ("float", "FLOAT")):
        if type_name.split(" |")[0] == word:
            return kind
    return "TEXT"


def _shown(default: Any, *, name: str) -> str:
    if name in REQUIRED:
        return "required"
    if default is MISSING or default in (None, "", []):
        return ""
    value = default.value if isinstance(default, Enum) else default
    return f"default: {str(value).lower() if isinstance(value, bool) else value}"


def _their(
    name: str, kind: str, default: str, help_text: str, choices: tuple[str, ...] = ()
) -> OptionFacts:
    shown = f"default: {default}" if default else ""
    return OptionFacts(name, kind, shown, help_text, choices, kind.endswith("..."), kind == "BOOL")


_THEIRS: Mapping[str, OptionFacts] = {
    facts.name: facts
    for facts in (
        _their(
            "output_dir",
            "FOLDER",
            "trainer_output",
            "Where the run goes: rounds, checkpoints, model/, report.html, result.json.",
        ),
        _their(
            "gradient_accumulation_steps",
            "INT",
            "1",
            "Batches to an optimizer step. (Micro-batches inside of a batch are made by "
            "max_tokens_per_micro_batch, and change nothing but memory.)",
        ),
        _their(
            "max_steps",
            "INT",
            "-1",
            "Optimizer steps in all, in place of num_train_epochs; -1: by rounds.",
        ),
        _their(
            "lr_scheduler_type",
            "TEXT",
            "linear",
            "Schedule of the learning rate over the run: linear, cosine, constant, "
            "constant_with_warmup, … (transformers' SchedulerType).",
        ),
        _their(
            "warmup_steps",
            "FLOAT",
            "0",
            "Steps over which the learning rate rises from 0; below 1, a share of all steps.",
        ),
        _their("weight_decay", "FLOAT", "0.0", "Weight decay of AdamW, biases and norms left out."),
        _their(
            "max_grad_norm", "FLOAT", "1.0", "Clip the gradient's norm at this; 0: do not clip."
        ),
        _their(
            "eval_strategy",
            "TEXT",
            "no",
            "Evaluate while training too: after every round (epoch) or every eval_steps (steps). "
            "Before and after training is evaluated in any case.",
            ("no", "epoch", "steps"),
        ),
        _their(
            "report_to",
            "TEXT",
            "none",
            "The tracker that gets every metric: wandb, trackio, tensorboard, mlflow, …, or all "
            "that are installed (a recipe may list several).",
        ),
        _their("run_name", "TEXT", "", "What the trackers call the run."),
    )
}
