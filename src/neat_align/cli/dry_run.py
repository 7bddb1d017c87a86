"""`neat-align train --dry-run`: what a run would do and take, with nothing trained or written.

First what the data and the model's configuration say. Then, where the weights are on this machine
and fit, the model is loaded: every check of the run is made, its speed is measured, and two prompts
are answered as a round would answer them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model
from transformers import AutoConfig
from transformers.utils import find_adapter_config_file

from neat_align.cli.run_state import asked_and_answered, fills_its_line, shown_answers
from neat_align.config import NEATConfig
from neat_align.config.unsupported import check_command_options
from neat_align.errors import ConfigError
from neat_align.modeling.adapters import LOAD_ERRORS, read_adapter
from neat_align.modeling.demo_model import model_source
from neat_align.modeling.load_options import LoadOptions
from neat_align.modeling.loading import load_tokenizer, weights_are_here
from neat_align.modeling.model_shape import meta_model
from neat_align.modeling.requirements import check_causal
from neat_align.modeling.target_modules import check_target_modules
from neat_align.pipeline import build_trainer, load_data, lora_config
from neat_align.prompts.rows import PromptRow, is_conversational
from neat_align.prompts.skipped_rows import SkippedRows
from neat_align.rounds.completions import CompletionGroup
from neat_align.runs.events import WHOLE_DATA
from neat_align.runs.plan import RunPlan, plan_run
from neat_align.sampling.protocol import Sampler
from neat_align.script_arguments import ScriptArguments
from neat_align.trainer.memory_plan import MemoryPlan, plan_memory
from neat_align.trainer.round_maker import RoundMaker
from neat_align.trainer.setup import TrainingData, read_rows, usable_rows

logger = logging.getLogger(__name__)
# Prompts that are answered, and tokens of their answers that are drawn first.
TRIED_PROMPTS, TRIED_TOKENS = 2, 32


@dataclass(frozen=True)
class Planned:
    """The plan of a run and the estimate of its memory, in lines; why the model is not tried (None:
    it can be). `read` is what they come of.
    """

    lines: list[str]
    untried: str | None
    read: Read


@dataclass(frozen=True)
class Read:
    """What was read for the plan, and need not be for the trial: rows to learn from and held-out
    rows, the model's tokenizer (None: it cannot be loaded), and what was made of the first ones.
    """

    rows: tuple[list[PromptRow], list[PromptRow]]
    tokenizer: Any
    data: TrainingData


def planned(script: ScriptArguments, args: NEATConfig) -> Planned:
    """What the data and the model's configuration say. Raises what the run would."""
    plan, memory, read = _plans(script, args)
    lines = [*plan.lines(more=WHOLE_DATA), *_with_checkpointing(args, memory)]
    return Planned(lines, _why_untried(script, args, fits=memory.fits), read)


def plans_of(script: ScriptArguments, args: NEATConfig) -> tuple[RunPlan, MemoryPlan]:
    """What a run would do, and take of the memory. Raises what the run would."""
    plan, memory, _ = _plans(script, args)
    return plan, memory


def _plans(script: ScriptArguments, args: NEATConfig) -> tuple[RunPlan, MemoryPlan, Read]:
    check_command_options(args)
    if not script.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: name a model to align, or demo")
    options = script.load_options_to_train
    model = model_on_meta(script, options)
    read = _read(script, args, model)
    data = read.data
    groups = args.groups_per_round(len(data.rows))
    lengths = data.prompt_lengths
    steps = args.steps_over(groups)
    plan = plan_run(args, lengths, prompts_per_round=groups, steps_per_round=steps)
    if read.tokenizer is None:
        plan = replace(plan, prompt_tokens=None)
    memory = plan_memory(
        args,
        model,
        data.rows,
        lengths,
        evaluates=bool(data.eval_rows) and args.num_eval_prompts != 0,
        in_4_bits=options.load_in_4bit,
    )
    return plan, memory, read


def tried(script: ScriptArguments, args: NEATConfig, read: Read) -> Iterator[str]:
    """Load the model, and say how fast it is and what it answers. Raises what the run would.

    `read` is what the plan of this run came of.
    """
    with _leaving_no_folder(Path(str(args.output_dir))):
        trainer = build_trainer(script, args, data=read.rows, tokenizer=read.tokenizer)
    parts = trainer.parts
    if not args.num_generations:
        yield from parts.outlook()
        return
    sampler = parts.policies.sampler()  # one, since it may be a copy of the policy
    yield from parts.outlook(sampler)
    groups = _answered(args, parts.round_maker, sampler)
    yield f"{len(groups)} prompts, answered as in the first round, not scored:"
    for group in groups:
        yield from asked_and_answered(group)


def _answered(args: NEATConfig, maker: RoundMaker, sampler: Sampler) -> list[CompletionGroup]:
    """Two prompts with what is shown of their answers: mostly a few tokens are more than that."""
    if args.contrast_from != "branch":
        groups = maker.trial(TRIED_PROMPTS, sampler, at_most=TRIED_TOKENS)
        if all(fills_its_line(c) for group in groups for c in shown_answers(group)):
            return groups
    return maker.trial(TRIED_PROMPTS, sampler)


@contextlib.contextmanager
def _leaving_no_folder(folder: Path) -> Iterator[None]:
    """Takes away the empty folders that Trainer makes."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()


def _why_untried(script: ScriptArguments, args: NEATConfig, *, fits: bool) -> str | None:
    if args.world_size > 1:
        return "of several processes; start --dry-run as one"
    if args.sampler != "transformers":
        return f"since sampler is {args.sampler}, whose server would be given the weights"
    if not fits:
        return "since it does not fit"
    name = model_source(script.model_name_or_path)
    if not weights_are_here(name, script.model_revision):
        return f"since the weights of {name} are not on this machine: a run downloads them"
    return None


def _with_checkpointing(args: NEATConfig, memory: MemoryPlan) -> list[str]:
    """The table as the run would settle it, and what would help where it does not fit."""
    lines: list[str] = []
    if args.activation_checkpointing is None and memory.wants_checkpointing:
        lines.append("activation checkpointing would be on: without it there is no room")
        memory = memory.with_checkpointing()
    lines = [*memory.lines(), *lines]
    if not memory.fits:
        lines.append(f"it does not fit: {memory.advice()}")
    return lines


def model_on_meta(script: ScriptArguments, options: LoadOptions) -> torch.nn.Module:
    """The model that a run would train, without numbers. Raises ConfigError."""
    name, revision = model_source(script.model_name_or_path), script.model_revision
    trusted = script.trust_remote_code
    try:
        if find_adapter_config_file(name, revision=revision) is not None:
            saved = read_adapter(name, revision)
            name, revision = saved.base_name, saved.config.revision
        config: Any = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trusted)
    except LOAD_ERRORS as error:
        raise ConfigError(
            f"the configuration of the model {name} cannot be read ({error}): check the name"
        ) from error
    check_causal(config, name)
    saved_as = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    dtype = saved_as if options.dtype == "auto" else options.torch_dtype
    model: Any = meta_model(config).to(dtype)
    model.config.name_or_path = name
    adapter = lora_config(script)
    if adapter is None:
        return cast("torch.nn.Module", model)
    check_target_modules(model, adapter)
    return cast("torch.nn.Module", get_peft_model(model, adapter))


def _read(script: ScriptArguments, args: NEATConfig, model: torch.nn.Module) -> Read:
    """The rows that could be used; without a tokenizer every prompt is as long as it may be."""
    skipped = SkippedRows()
    given, held_out = load_data(script, args.on_bad_row, skipped)
    rows = read_rows(args, given, "train_dataset", skipped)
    data = TrainingData(rows, held_out, is_conversational(rows), skipped)
    try:
        tokenizer = load_tokenizer(
            model, revision=script.model_revision, trust_remote_code=script.trust_remote_code
        )
    except ConfigError as error:
        logger.warning(
            "%s: every prompt is taken to have max_prompt_length (%d) tokens",
            str(error).partition(" (")[0],
            args.max_prompt_length,
        )
        longest = [args.max_prompt_length] * len(rows)
        return Read((given, held_out), None, replace(data, prompt_lengths=longest))
    usable = usable_rows(args, data, rows, tokenizer, "training prompts", skipped=skipped)
    data = replace(data, rows=usable.rows, prompt_lengths=usable.lengths)
    return Read((given, held_out), tokenizer, data)
