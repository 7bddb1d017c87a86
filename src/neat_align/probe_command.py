"""`neat-align probe`: measure a bank's pairs on a model, and say in a terminal which are worth training with."""

from __future__ import annotations

import functools
import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neat_align.browse import printable
from neat_align.commands import load_data
from neat_align.config import PLACEMENTS
from neat_align.data import PromptRow, is_conversational
from neat_align.demo.model import demo_model_path
from neat_align.errors import ConfigError, PromptError
from neat_align.evaluation import paired_bootstrap
from neat_align.expand import prompt_at
from neat_align.logprobs import choose_layout, score_completions
from neat_align.policy import load_policy, load_tokenizer
from neat_align.precision import half_precision_copy
from neat_align.probe import MIN_PROMPTS, PairProbe, PlacementProbe, Probe, ProbeParams, ProbeTools, Verdict, probe_bank
from neat_align.progress import stage_bars
from neat_align.prompts import InstructionBank, InstructionPair, Placement, check_template, eos_token_ids, load_bank, prompt_ids
from neat_align.rewards import resolve_rewards
from neat_align.run_record import commit, fingerprint, versions
from neat_align.sampling import SamplingParams, TransformersSampler
from neat_align.settings import RunSettings
from neat_align.storage import write_json

logger = logging.getLogger(__name__)

FORMAT = 1
# Training drops an answer that repeats or announces its instruction; from this share on it is said.
LEAKY = 0.2
# Nats per token. At this distance the default logistic loss (beta 2) has 2σ(−2) = 24 % of the gradient that a pair has whose two
# answers are equally likely: the policy would not have written such a negative anyway.
UNLIKELY = 1.0
WORKING: tuple[Verdict, ...] = ("strong", "works")
# What a run computes in by default.
COMPUTE = torch.bfloat16
VERDICT_STYLES: dict[Verdict, str] = {
    "strong": "bold green",
    "works": "green",
    "no contrast": "yellow",
    "reversed": "red",
    "too few": "dim",
}


@dataclass(frozen=True)
class ProbeSettings:
    """The command's options; names and meanings are those of `train`."""

    bank: str
    model: str
    dataset_name: str = "demo"
    as_conversations: bool = False
    reward: str = "vader"
    placement: str = "user_suffix"
    prompts: int = 24
    samples: int = 2
    max_completion_length: int = 48
    temperature: float = 0.7
    seed: int = 0
    generation_batch_size: int = 64

    def __post_init__(self) -> None:
        if self.placement not in (*PLACEMENTS, "all"):
            raise ConfigError(f"placement is {self.placement!r}; it must be one of {', '.join(PLACEMENTS)}, or all to compare them")
        if self.prompts < MIN_PROMPTS:
            raise ConfigError(f"prompts is {self.prompts}; it must be {MIN_PROMPTS} or more: an interval over fewer means nothing")
        for name in ("samples", "max_completion_length", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be above 0")


def run_probe(settings: ProbeSettings, output: Path | None, console: Console, *, disable_progress: bool = False) -> Probe:
    """Probe, print what was found, and write it to `output` as JSON where one is given."""
    started = time.monotonic()
    if output is not None and output.suffix != ".json":
        raise ConfigError(f"{output} must end in .json: the probe's numbers are written as JSON")
    bank = load_bank(settings.bank)
    rows = _rows(settings)
    model = load_policy(demo_model_path() if settings.model == "demo" else settings.model)
    tokenizer = load_tokenizer(model)
    conversational = is_conversational(rows)
    if not conversational and tokenizer.chat_template:
        logger.warning("the prompts are text and are used without the tokenizer's chat template: for a chat model, --as_conversations")
    placements, refused = usable_placements(settings.placement, tokenizer, bank, conversational=conversational)
    tools = _tools(settings, model, tokenizer, rows, conversational=conversational)
    params = ProbeParams(
        placements=placements,
        sampling=SamplingParams(settings.max_completion_length, settings.temperature),
        samples=settings.samples,
        seed=settings.seed,
    )
    with stage_bars("probe", disable_progress) as progress:
        found = probe_bank(rows, bank, params, tools, progress)
    print_probe(console, found, bank, settings, refused)
    if output is not None:
        write_json(
            output,
            {
                "format": FORMAT,
                "settings": asdict(settings),
                "bank": bank.name,
                "data": {"prompts": len(found.prompt_ids), "sha256": fingerprint(rows)},
                "refused_placements": refused,
                **found.to_json(),
                "wall_seconds": time.monotonic() - started,
                "commit": commit(),
                "versions": versions(),
            },
        )
        console.print(f"numbers {output}", markup=False, highlight=False, soft_wrap=True)
    return found


# ---- what is probed with ---------------------------------------------------------------------------------------------


def _rows(settings: ProbeSettings) -> list[PromptRow]:
    """The prompts that a run with this seed would begin with, as many different ones as are asked for."""
    data = RunSettings(dataset_name=settings.dataset_name, holdout=0, as_conversations=settings.as_conversations)
    rows = list({row.id: row for row in load_data(data)[0]}.values())
    if len(rows) < MIN_PROMPTS:
        raise ConfigError(
            f"{settings.dataset_name} has {len(rows)} different prompts and a probe needs {MIN_PROMPTS} or more: name other data"
        )
    return [rows[prompt_at(len(rows), settings.seed, i)] for i in range(min(settings.prompts, len(rows)))]


def usable_placements(
    placement: str, tokenizer: Any, bank: InstructionBank, *, conversational: bool
) -> tuple[tuple[Placement, ...], dict[str, str]]:
    """The placements to probe, and why others are left out of `all`. Raises PromptError when the template takes none of them."""
    asked = cast("tuple[Placement, ...]", PLACEMENTS if placement == "all" else (placement,))
    refused: dict[str, str] = {}
    for one in asked:
        try:
            check_template(tokenizer, bank, one, conversational=conversational)
        except PromptError as error:
            refused[one] = str(error)
            if len(refused) == len(asked):
                raise
    return tuple(one for one in asked if one not in refused), refused


def _tools(settings: ProbeSettings, model: Any, tokenizer: Any, rows: Sequence[PromptRow], *, conversational: bool) -> ProbeTools:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device)
    ids = [prompt_ids(tokenizer, row.prompt) for row in rows]
    longest = max(map(len, ids)) + settings.max_completion_length
    layout = choose_layout(model, ids[:2], pad_token_id=tokenizer.pad_token_id, longest=longest)
    context = getattr(model.config, "max_position_embeddings", None)
    # As in a run: a CPU is faster with a half-precision copy than under autocast.
    on_cpu = device is None or device.type == "cpu"
    policy, autocast_dtype = (half_precision_copy(model, COMPUTE), None) if on_cpu else (model, COMPUTE)
    return ProbeTools(
        tokenizer=tokenizer,
        sampler=TransformersSampler(
            model=policy,
            eos_token_ids=eos_token_ids(tokenizer, model, conversational=conversational),
            pad_token_id=tokenizer.pad_token_id,
            batch_size=settings.generation_batch_size,
            autocast_dtype=autocast_dtype,
        ),
        logprobs=functools.partial(
            score_completions, policy, layout=layout, pad_token_id=tokenizer.pad_token_id, autocast_dtype=autocast_dtype
        ),
        rewards=None if settings.reward == "contrast" else resolve_rewards(settings.reward, None),
        max_prompt_length=None if context is None else context - settings.max_completion_length,
    )


# ---- what is shown ---------------------------------------------------------------------------------------------------


def print_probe(console: Console, found: Probe, bank: InstructionBank, settings: ProbeSettings, refused: dict[str, str]) -> None:
    """The two tables, the instructions in full, and what to do next. Nothing is wider than 80 columns."""
    many = len(found.placements) > 1

    def say(text: str = "", style: str = "") -> None:
        console.print(Text(printable(text), style=style), width=min(80, console.width))

    say(
        f"bank {bank.name} on {settings.model}: {len(found.prompt_ids)} prompts of {settings.dataset_name}, "
        f"{settings.samples} answer{'s' * (settings.samples > 1)} to each under every instruction",
        "bold",
    )
    say()
    console.print(_reward_table(found, settings.reward, many=many))
    say()
    console.print(_answers_table(found, many=many))
    plain = found.pairs[0].plain
    say(
        f"plain answers: {plain.mean_length:.0f} tokens, likelihood {plain.logprob:.2f}. Intervals are 95 %, over prompts; d is Cohen's; "
        "inverted: negatives with the higher reward; leaks: answers that give their instruction away, which training drops; "
        "likelihood: under the plain prompt, nats per token.",
        "dim",
    )
    say()
    for number, pair in enumerate(bank.pairs, start=1):
        console.print(_in_full(number, pair), width=min(80, console.width))
    say()
    for placement, why in refused.items():
        say(f"{placement} was left out: {why}", "yellow")
    for line in remarks(found, settings):
        say(line)
    what, command = next_steps(found, settings)
    say(f"next: {what}")
    if command is not None:
        console.print(command, markup=False, highlight=False, soft_wrap=True)


def _table(title: str, *, many: bool) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("#", justify="right", no_wrap=True)
    if many:
        table.add_column("placement", no_wrap=True)
    return table


def _first_cells(pair: PairProbe, *, many: bool) -> list[str]:
    return [str(pair.number), pair.placement] if many else [str(pair.number)]


def _reward_table(found: Probe, reward: str, *, many: bool) -> Table:
    table = _table(f"mean reward ({printable(reward)[-40:]}) under each instruction", many=many)
    width = 15 if many else 27
    table.add_column("instructions")  # the only column that gives way when numbers are long
    for heading in ("+", "plain", "−", "gap"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for pair in found.pairs:
        gap = pair.gap
        table.add_row(
            *_first_cells(pair, many=many),
            Text(shortened(pair.positive.instruction or "", pair.negative.instruction or "", width), no_wrap=True, overflow="ellipsis"),
            *(_number(v) for v in (pair.positive.reward, pair.plain.reward, pair.negative.reward, None if gap is None else gap.delta)),
            "–" if gap is None else f"{_number(gap.low)} … {_number(gap.high)}",
            Text(pair.verdict, style=VERDICT_STYLES[pair.verdict]),
        )
    return table


def _answers_table(found: Probe, *, many: bool) -> Table:
    table = _table("the answers, under the positive/negative instruction", many=many)
    for heading in ("d", "inverted", "leaks", "blank", "tokens", "cut", "likelihood"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in found.pairs:
        good, bad = pair.positive, pair.negative
        table.add_row(
            *_first_cells(pair, many=many),
            _number(pair.cohens_d),
            "–" if pair.inversion_rate is None else f"{pair.inversion_rate:.0%}",
            f"{100 * good.leaks:.0f}/{bad.leaks:.0%}",
            f"{100 * good.blanks:.0f}/{bad.blanks:.0%}",
            f"{good.mean_length:.0f}/{bad.mean_length:.0f}",
            f"{100 * good.clipped:.0f}/{bad.clipped:.0%}",
            f"{good.logprob:.2f}/{bad.logprob:.2f}",
        )
    return table


def _in_full(number: int, pair: InstructionPair) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=2, justify="right")
    grid.add_column(width=1)
    grid.add_column(overflow="fold")
    grid.add_row(str(number), "+", Text(printable(pair.positive)))
    grid.add_row("", "−", Text(printable(pair.negative)))
    return grid


def shortened(positive: str, negative: str, width: int) -> str:
    """The two instructions from their first differing word to their last, each cut to its half of `width` characters."""
    good, bad = printable(positive).split(), printable(negative).split()
    while good and bad and good[0] == bad[0]:
        good, bad = good[1:], bad[1:]
    while good and bad and good[-1] == bad[-1]:
        good, bad = good[:-1], bad[:-1]
    half = (width - 3) // 2
    return " / ".join(text if len(text) <= half else f"{text[: half - 1].rstrip(' ,')}…" for text in (" ".join(good), " ".join(bad)))


def _number(value: float | None) -> str:
    """At most five characters for the usual sizes of a reward."""
    if value is None:
        return "–"
    return f"{value:+.2f}" if abs(value) < 9.995 else f"{value:+.1f}" if abs(value) < 99.95 else f"{value:+.3g}"


# ---- what to do with it ----------------------------------------------------------------------------------------------


def remarks(found: Probe, settings: ProbeSettings) -> list[str]:
    """What the numbers mean for training: placements compared, leaks, unlikely negatives, answers that were cut."""
    lines: list[str] = []
    if len(found.placements) > 1 and found.placements[0].gap is not None:
        lines += [_placement_line(p, found) for p in found.placements]
    where = {p: f" ({p.placement})" if len(found.placements) > 1 else "" for p in found.pairs}
    for p in found.pairs:
        for side, name in ((p.positive, "positives"), (p.negative, "negatives")):
            if side.leaks >= LEAKY:
                lines.append(f"pair {p.number}{where[p]}: {side.leaks:.0%} of the {name} give their instruction away; training drops them")
        if p.likelihood_difference <= -UNLIKELY:
            lines.append(
                f"pair {p.number}{where[p]}: the negatives are {-p.likelihood_difference:.1f} nats per token less likely than the "
                "positives under the plain prompt; the model would hardly write them, so ranking them low teaches little"
            )
    cut = [side.clipped for p in found.pairs for side in (p.positive, p.negative)]
    if sum(cut) / len(cut) > 0.5:
        lines.append(
            f"{sum(cut) / len(cut):.0%} of the answers were cut at {settings.max_completion_length} tokens, so a difference in length may "
            "be hidden: raise --max_completion_length to see it"
        )
    return lines


def _placement_line(placement: PlacementProbe, found: Probe) -> str:
    mine = [p for p in found.pairs if p.placement == placement.placement]
    good = sum(p.verdict in WORKING for p in mine)
    line = f"{placement.placement}: {good} of {len(mine)} pairs work"
    if placement.gap is None:
        return line
    line += f", mean gap {_number(placement.gap.delta)} [{_number(placement.gap.low)}, {_number(placement.gap.high)}]"
    best = found.placements[0]
    behind = paired_bootstrap(placement.gaps, best.gaps) if placement is not best else None
    if behind is not None and behind.low <= 0:
        line += f", not clearly behind {best.placement}"
    return line


def next_steps(found: Probe, settings: ProbeSettings) -> tuple[str, str | None]:
    """What to do, and the command to train with at the placement with the largest mean gap; no command when no pair works."""
    best = found.placements[0].placement
    mine = sorted((p for p in found.pairs if p.placement == best), key=lambda p: p.number)
    good = [p.number for p in mine if p.verdict in WORKING]
    rest = [p.number for p in mine if p.number not in good]
    if not good:
        where, other = f"with placement {best}", "--placement all, "
        if settings.placement == "all":
            where, other = "where this bank works best", ""
        return (
            f"do not train: no pair raises {settings.reward} {where}. Try {other}other wording, another --reward, or more --prompts.",
            None,
        )
    what = "every pair works; train with the bank:"
    if rest:
        what = f"drop {_pairs(rest)} from a copy of the bank ({len(good)} left), then train with the copy:"
    options = {
        "model_name_or_path": settings.model,
        "dataset_name": settings.dataset_name,
        **({"as_conversations": "true"} if settings.as_conversations else {}),
        "reward_funcs": settings.reward,
        "instruction_bank": "my-bank.yaml" if rest else settings.bank,
        "instruction_placement": best,
        "temperature": str(settings.temperature),
        "output_dir": "runs/mine",
    }
    words = [f"--{name} {shlex.quote(value)}" for name, value in options.items()]
    return what, " \\\n    ".join(["  neat-align train", *_filled(words, 74)])


def _pairs(numbers: Sequence[int]) -> str:
    shown = [str(n) for n in numbers]
    return f"pair {shown[0]}" if len(shown) == 1 else f"pairs {', '.join(shown[:-1])} and {shown[-1]}"


def _filled(words: Sequence[str], width: int) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
