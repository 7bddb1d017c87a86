"""A probe from settings to result: the model, the prompts and the tools, then the page and JSON."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from neat_align.cli.console import json_file
from neat_align.cli.probe_options import ProbeSettings
from neat_align.cli.probe_table import print_probe
from neat_align.cli.progress import stage_display
from neat_align.config import PLACEMENTS
from neat_align.errors import ConfigError, DataError, PromptError
from neat_align.evaluation.probe import check_room, probe_bank
from neat_align.evaluation.probe_params import DecodingParams, ProbeParams, ProbeTools
from neat_align.evaluation.probe_summary import MIN_PROMPTS, Probe
from neat_align.files.atomic import write_json
from neat_align.files.provenance import commit, versions
from neat_align.modeling.demo_model import model_source
from neat_align.modeling.device import compute_device
from neat_align.modeling.layout import choose_layout
from neat_align.modeling.loading import load_policy, load_tokenizer
from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.precision import half_precision_copy
from neat_align.modeling.requirements import context_of
from neat_align.pipeline import load_data
from neat_align.prompts.instruction_banks import InstructionBank, load_bank
from neat_align.prompts.placement import Placement
from neat_align.prompts.rendering import eos_token_ids
from neat_align.prompts.row_checks import checked_text, warn_of_unused_template
from neat_align.prompts.row_prompts import row_prompt_ids
from neat_align.prompts.rows import NO_INPUTS, PromptRow, TemplateInputs, is_conversational
from neat_align.prompts.skipped_rows import SKIPPED_FILE, BadRows, SkippedRows, check_on_bad_row
from neat_align.prompts.template_check import check_rendering, check_template
from neat_align.prompts.template_inputs import read_kwargs, with_template_kwargs
from neat_align.rewards.http import check_http_hosts
from neat_align.rewards.judge import compares_group
from neat_align.rewards.protocol import NamedReward
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rounds.prompt_order import prompt_at
from neat_align.runs.run_key import fingerprint
from neat_align.sampling.batch_check import KnownWay
from neat_align.sampling.contrast_sampler import ContrastSampler
from neat_align.sampling.protocol import SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from neat_align.script_arguments import ScriptArguments

FORMAT = 1
# What a run computes in by default.
COMPUTE = torch.bfloat16


def run_probe(
    settings: ProbeSettings,
    output: Path | None,
    console: Console | None = None,
    *,
    disable_progress: bool = False,
) -> Probe:
    """Probe, print the result, and write it to `output`, a .json file or a folder, where given."""
    console, started = console or Console(), time.monotonic()
    output = json_file(output, "probe.json")
    bank = load_bank(settings.bank)
    skipped = SkippedRows()
    inputs = TemplateInputs(
        None, read_kwargs(settings.chat_template_kwargs, "chat_template_kwargs")
    )
    rows = with_template_kwargs(_rows(settings, skipped), inputs.kwargs)
    model = load_policy(model_source(settings.model), settings.load_options)
    tokenizer = load_tokenizer(model)
    conversational = is_conversational(rows)
    warn_of_unused_template(tokenizer, conversational=conversational)
    check_rendering(tokenizer, conversational=conversational, inputs=inputs)
    placements, refused = usable_placements(
        settings.placement, tokenizer, bank, conversational=conversational, inputs=inputs
    )
    room = _room(settings, model)
    rows = _with_room(settings, rows, bank, placements, tokenizer, room, skipped)
    say_skipped(skipped, output, console)
    tools = _tools(settings, model, tokenizer, rows, inputs, room, conversational=conversational)
    params = ProbeParams(
        placements=placements,
        sampling=SamplingParams(settings.max_completion_length, settings.temperature),
        samples=settings.samples,
        seed=settings.seed,
        decoding=_decoding(settings),
    )
    with stage_display("probe", disable_progress) as progress:
        probe = probe_bank(rows, bank, params, tools, progress)
    print_probe(console, probe, bank, settings, refused)
    if output is not None:
        facts = {
            "settings": asdict(settings),
            "bank": bank.name,
            "data": {"prompts": len(probe.prompt_ids), "sha256": fingerprint(rows)},
            "refused_placements": refused,
            "skipped_rows": skipped.count,
            "wall_seconds": time.monotonic() - started,
        }
        _write(output, probe, facts, console)
    return probe


def _write(output: Path, probe: Probe, facts: Mapping[str, Any], console: Console) -> None:
    made_with = {"commit": commit(), "versions": versions()}
    write_json(output, {"format": FORMAT, **facts, **probe.to_json(), **made_with})
    console.print(f"numbers {output}", markup=False, highlight=False, soft_wrap=True)


# ---- what is probed with -------------------------------------------------------------------------


def _rows(settings: ProbeSettings, skipped: SkippedRows) -> list[PromptRow]:
    """All prompts, each once, in the order in which a run with this seed would take them."""
    data = ScriptArguments(
        dataset_name=settings.dataset_name,
        holdout=0,
        as_conversations=settings.as_conversations,
        as_texts=settings.as_texts,
    )
    read = load_data(data, settings.on_bad_row, skipped)[0]
    rows = list({row.id: row for row in read}.values())
    if len(rows) < MIN_PROMPTS:
        raise ConfigError(
            f"{settings.dataset_name} has {len(rows)} different prompts and a probe needs "
            f"{MIN_PROMPTS} or more: name other data"
        )
    return [rows[prompt_at(len(rows), settings.seed, i)] for i in range(len(rows))]


def _with_room(
    settings: ProbeSettings,
    rows: Sequence[PromptRow],
    bank: InstructionBank,
    placements: Sequence[Placement],
    tokenizer: Any,
    room: int | None,
    skipped: SkippedRows,
) -> list[PromptRow]:
    """As many of the first rows as are asked for and leave room for an answer.

    `room` is in tokens (`check_room`). Raises DataError or PromptError for the first row that does
    not fit, unless such rows are skipped.
    """
    bad = BadRows(settings.dataset_name, settings.on_bad_row, skipped)
    kept: list[PromptRow] = []
    for row in rows:
        if len(kept) == settings.prompts:
            break
        try:
            checked_text(row, tokenizer, conversational=not isinstance(row.prompt, str))
            check_room(row, bank, placements, tokenizer, room)
            kept.append(row)
        except (DataError, PromptError) as error:
            if not bad.skips:
                raise
            bad.add(row.where, row.id, str(error).removeprefix(f"{row.where}: "))
    bad.settle(len(kept))
    return kept


def say_skipped(skipped: SkippedRows, output: Path | None, console: Console) -> None:
    """Say which rows were left out; beside a file of numbers, all of them are listed."""
    if output is not None and skipped.count:
        skipped.write(output.parent, f"{output.stem}-{SKIPPED_FILE}")
        return
    for tally in skipped.tallies:
        text = f"left out: {tally.said()}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def usable_placements(
    placement: str,
    tokenizer: Any,
    bank: InstructionBank,
    *,
    conversational: bool,
    inputs: TemplateInputs = NO_INPUTS,
) -> tuple[tuple[Placement, ...], dict[str, str]]:
    """The placements to probe, and why others are left out of `all`.

    Raises PromptError when the template takes none of them.
    """
    asked = cast("tuple[Placement, ...]", PLACEMENTS if placement == "all" else (placement,))
    refused: dict[str, str] = {}
    for one in asked:
        try:
            check_template(tokenizer, bank, one, conversational=conversational, inputs=inputs)
        except PromptError as error:
            refused[one] = str(error)
            if len(refused) == len(asked):
                raise
    return tuple(one for one in asked if one not in refused), refused


def _room(settings: ProbeSettings, model: Any) -> int | None:
    """Tokens that the model's context leaves for a prompt; None: no limit."""
    context = context_of(model)
    return None if context is None else context - settings.max_completion_length


def _tools(
    settings: ProbeSettings,
    model: Any,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    inputs: TemplateInputs,
    room: int | None,
    *,
    conversational: bool,
) -> ProbeTools:
    device = compute_device()
    model.to(device)
    ids = [row_prompt_ids(tokenizer, row) for row in rows]
    longest = max(map(len, ids)) + settings.max_completion_length
    layout = choose_layout(model, ids[:2], pad_token_id=tokenizer.pad_token_id, longest=longest)
    # As in a run: a CPU is faster with a half-precision copy than under autocast.
    copies = device.type == "cpu" and settings.dtype == "float32"
    copied = half_precision_copy(model, COMPUTE) if copies else None
    policy, autocast_dtype = (model, COMPUTE) if copied is None else (copied, None)
    eos = eos_token_ids(tokenizer, model, conversational=conversational, inputs=inputs)
    known_way = KnownWay()  # measured in the weights' own type, where what differs is no rounding
    TransformersSampler(model, eos, tokenizer.pad_token_id, known_way=known_way).settle(
        [tuple(row) for row in ids[:2]]
    )
    sampler = TransformersSampler(
        policy,
        eos,
        tokenizer.pad_token_id,
        settings.generation_batch_size,
        autocast_dtype=autocast_dtype,
        known_way=known_way,
    )
    return ProbeTools(
        tokenizer=tokenizer,
        sampler=sampler,
        decoder=functools.partial(ContrastSampler, sampler),
        logprobs=functools.partial(
            score_completions,
            policy,
            layout=layout,
            pad_token_id=tokenizer.pad_token_id,
            autocast_dtype=autocast_dtype,
        ),
        rewards=_rewards(settings),
        template_kwargs=inputs.kwargs,
        max_prompt_length=room,
        on_bad_row=check_on_bad_row(settings.on_bad_row),
    )


def _decoding(settings: ProbeSettings) -> DecodingParams | None:
    """None where no alpha is given."""
    if not settings.alpha:
        return None
    return DecodingParams(settings.alpha, settings.num_pairs, settings.cut)


def _rewards(settings: ProbeSettings) -> tuple[NamedReward, ...] | None:
    """What answers are scored with; None for `contrast`, which needs the probe's own scorer."""
    if settings.reward == "contrast":
        return None
    hosts = settings.allow_http_hosts or None
    rewards = resolve_rewards(settings.reward, None, allow_http_hosts=hosts)
    check_http_hosts(hosts, [reward.function for reward in rewards])
    for reward in filter(compares_group, rewards):
        raise ConfigError(
            f"reward is the judge {reward.name!r}, which holds a prompt's answers against each "
            "other, and instructions are compared over all prompts: use form: pointwise, or form: "
            "pairwise with against: chosen"
        )
    return rewards
