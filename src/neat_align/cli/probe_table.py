"""A probe's numbers in the terminal: which instruction pairs are worth training with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neat_align.cli.probe_options import ProbeSettings
from neat_align.evaluation.probe_summary import (
    DecodingProbe,
    PairProbe,
    PlacementProbe,
    Probe,
    Side,
    Verdict,
)
from neat_align.evaluation.statistics import PairedDifference, paired_bootstrap
from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair
from neat_align.reporting.terminal import printable

# Training drops an answer that repeats or announces its instruction; from this share on it is said.
LEAKY = 0.2
# Nats per token. At this distance the default logistic loss (beta 2) has 2σ(−2) = 24 % of the
# gradient that a pair has whose two answers are equally likely: the policy would not have written
# such a negative anyway.
UNLIKELY = 1.0
WORKING: tuple[Verdict, ...] = ("strong", "works")
VERDICT_STYLES: dict[Verdict, str] = {
    "strong": "bold green",
    "works": "green",
    "no contrast": "yellow",
    "reversed": "red",
    "too few": "dim",
}


def print_probe(
    console: Console,
    probe: Probe,
    bank: InstructionBank,
    settings: ProbeSettings,
    refused: dict[str, str],
) -> None:
    """The two tables, the instructions in full, and what to do next, within 80 columns."""
    many = len(probe.placements) > 1

    def say(text: str = "", style: str = "") -> None:
        console.print(Text(printable(text), style=style), width=min(80, console.width))

    answers = f"{settings.samples} answer{'s' * (settings.samples > 1)} to each"
    say(
        f"bank {bank.name} on {settings.model}: {len(probe.prompt_ids)} prompts of "
        f"{settings.dataset_name}, {answers} under every instruction",
        "bold",
    )
    say()
    console.print(_reward_table(probe, settings.reward, many=many))
    say()
    console.print(_answers_table(probe, many=many))
    plain = probe.pairs[0].plain
    say(
        f"plain answers: {plain.mean_length:.0f} tokens, likelihood {plain.logprob:.2f}. "
        "Intervals are 95 %, over prompts; d is Cohen's; inverted: negatives with the higher "
        "reward; leaks: answers that give their instruction away, which training drops; "
        "likelihood: under the plain prompt, nats per token.",
        "dim",
    )
    say()
    for number, pair in enumerate(bank.pairs, start=1):
        console.print(_in_full(number, pair), width=min(80, console.width))
    say()
    if probe.decodings:
        for place in dict.fromkeys(d.placement for d in probe.decodings):
            here = [d for d in probe.decodings if d.placement == place]
            console.print(_decoding_table(here, place if many else None))
        say(_decoding_caption(bank, settings), "dim")
        say()
    for placement, why in refused.items():
        say(f"{placement} was left out: {why}", "yellow")
    for line in remarks(probe, settings):
        say(line)
    what, command = next_steps(probe, settings)
    say(f"next: {what}")
    if command is not None:
        console.print(command, markup=False, highlight=False, soft_wrap=True)


def _table(title: str, *, many: bool, first: str = "#") -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0
    )
    table.add_column(first, justify="right", no_wrap=True)
    if many:
        table.add_column("placement", no_wrap=True)
    return table


def _first_cells(pair: PairProbe, *, many: bool) -> list[str]:
    return [str(pair.number), pair.placement] if many else [str(pair.number)]


def _reward_table(probe: Probe, reward: str, *, many: bool) -> Table:
    table = _table(f"mean reward ({printable(reward)[-40:]}) under each instruction", many=many)
    width = 15 if many else 27
    table.add_column("instructions")  # the only column that gives way when numbers are long
    for heading in ("+", "plain", "−", "gap"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for pair in probe.pairs:
        good, plain, bad, gap = pair.positive, pair.plain, pair.negative, pair.gap
        texts = shortened(good.instruction or "", bad.instruction or "", width)
        table.add_row(
            *_first_cells(pair, many=many),
            Text(texts, no_wrap=True, overflow="ellipsis"),
            *(_number(side.reward) for side in (good, plain, bad)),
            "–" if gap is None else _number(gap.delta),
            "–" if gap is None else f"{_number(gap.low)} … {_number(gap.high)}",
            Text(pair.verdict, style=VERDICT_STYLES[pair.verdict]),
        )
    return table


def _answers_table(probe: Probe, *, many: bool) -> Table:
    table = _table("the answers, under the positive/negative instruction", many=many)
    for heading in ("d", "inverted", "leaks", "blank", "tokens", "cut", "likelihood"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in probe.pairs:
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


def _decoding_table(decodings: Sequence[DecodingProbe], placement: str | None) -> Table:
    """Of one placement, which is named where there are several."""
    where = "" if placement is None else f" ({placement})"
    title = f"decoding from the contrast of the bank's pairs{where}, nothing trained"
    table = _table(title, many=False, first="alpha")
    for heading in ("reward", "effect"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    for heading in ("KL", "distinct-2", "leaks", "tokens", "likelihood"):
        table.add_column(heading, justify="right", no_wrap=True)
    plain = decodings[0].plain, None, None, decodings[0].plain_distinct2
    table.add_row("plain", *_decoded_cells(*plain))
    for d in decodings:
        table.add_row(f"{d.alpha:g}", *_decoded_cells(d.answers, d.effect, d.kl, d.distinct2))
    return table


def _decoded_cells(
    side: Side, effect: PairedDifference | None, kl: float | None, distinct2: float | None
) -> list[str]:
    low_to_high = "" if effect is None else f"{_number(effect.low)} … {_number(effect.high)}"
    return [
        _number(side.reward),
        "–" if effect is None else _number(effect.delta),
        low_to_high,
        "–" if kl is None else f"{kl:.3f}",
        "–" if distinct2 is None else f"{distinct2:.3f}",
        f"{side.leaks:.0%}",
        f"{side.mean_length:.0f}",
        f"{side.logprob:.2f}",
    ]


def _decoding_caption(bank: InstructionBank, settings: ProbeSettings) -> str:
    pairs = min(settings.num_pairs, len(bank.pairs))
    moved = f"tokens of at least {settings.cut:g} times the likeliest one's probability are moved"
    return (
        f"effect: on the reward, against plain answers. KL: to the model as it is, nats per token. "
        f"The log-ratio is the mean over {pairs} pair{'s' * (pairs > 1)} a prompt; "
        f"{moved if settings.cut else 'all tokens are moved'}. Distillation of the contrast learns "
        "these answers, so this is about what it can reach."
    )


def _in_full(number: int, pair: InstructionPair) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=2, justify="right")
    grid.add_column(width=1)
    grid.add_column(overflow="fold")
    grid.add_row(str(number), "+", Text(printable(pair.positive)))
    grid.add_row("", "−", Text(printable(pair.negative)))
    return grid


def shortened(positive: str, negative: str, width: int) -> str:
    """The two instructions from their first differing word to their last, each cut to its half of
    `width` characters.
    """
    good, bad = printable(positive).split(), printable(negative).split()
    while good and bad and good[0] == bad[0]:
        good, bad = good[1:], bad[1:]
    while good and bad and good[-1] == bad[-1]:
        good, bad = good[:-1], bad[:-1]
    half = (width - 3) // 2
    return " / ".join(
        text if len(text) <= half else f"{text[: half - 1].rstrip(' ,')}…"
        for text in (" ".join(good), " ".join(bad))
    )


def _number(value: float | None) -> str:
    """At most five characters for the usual sizes of a reward."""
    if value is None:
        return "–"
    if abs(value) < 9.995:
        return f"{value:+.2f}"
    return f"{value:+.1f}" if abs(value) < 99.95 else f"{value:+.3g}"


# ---- what to do with it --------------------------------------------------------------------------


def remarks(probe: Probe, settings: ProbeSettings) -> list[str]:
    """What the numbers mean for training: placements compared, leaks, unlikely negatives, cuts."""
    lines: list[str] = []
    if len(probe.placements) > 1 and probe.placements[0].gap is not None:
        lines += [_placement_line(p, probe) for p in probe.placements]
    where = {p: f" ({p.placement})" if len(probe.placements) > 1 else "" for p in probe.pairs}
    for p in probe.pairs:
        for side, name in ((p.positive, "positives"), (p.negative, "negatives")):
            if side.leaks >= LEAKY:
                lines.append(
                    f"pair {p.number}{where[p]}: {side.leaks:.0%} of the {name} give their "
                    "instruction away; training drops them"
                )
        if p.likelihood_difference <= -UNLIKELY:
            lines.append(
                f"pair {p.number}{where[p]}: the negatives are {-p.likelihood_difference:.1f} "
                "nats per token less likely than the positives under the plain prompt; the model "
                "would hardly write them, so ranking them low teaches little"
            )
    cut = [side.clipped for p in probe.pairs for side in (p.positive, p.negative)]
    if sum(cut) / len(cut) > 0.5:
        lines.append(
            f"{sum(cut) / len(cut):.0%} of the answers were cut at "
            f"{settings.max_completion_length} tokens, so a difference in length may be hidden: "
            "raise --max_completion_length to see it"
        )
    return lines


def _placement_line(placement: PlacementProbe, probe: Probe) -> str:
    here = [p for p in probe.pairs if p.placement == placement.placement]
    good = sum(p.verdict in WORKING for p in here)
    line = f"{placement.placement}: {good} of {len(here)} pairs work"
    if placement.gap is None:
        return line
    low, high = _number(placement.gap.low), _number(placement.gap.high)
    line += f", mean gap {_number(placement.gap.delta)} [{low}, {high}]"
    best = probe.placements[0]
    behind = paired_bootstrap(placement.gaps, best.gaps) if placement is not best else None
    if behind is not None and behind.low <= 0:
        line += f", not clearly behind {best.placement}"
    return line


def next_steps(probe: Probe, settings: ProbeSettings) -> tuple[str, str | None]:
    """What to do, and the command to train with at the placement with the largest mean gap; no
    command when no pair works.
    """
    best = probe.placements[0].placement
    here = sorted((p for p in probe.pairs if p.placement == best), key=lambda p: p.number)
    good = [p.number for p in here if p.verdict in WORKING]
    rest = [p.number for p in here if p.number not in good]
    if not good:
        where, other = f"with placement {best}", "--placement all, "
        if settings.placement == "all":
            where, other = "where this bank works best", ""
        return (
            f"do not train: no pair raises {settings.reward} {where}. Try {other}other wording, "
            "another --reward, or more --prompts.",
            None,
        )
    what = "every pair works; train with the bank:"
    if rest:
        copy = f"drop {_pairs(rest)} from a copy of the bank ({len(good)} left)"
        what = f"{copy}, then train with the copy:"
    options = {
        "model_name_or_path": settings.model,
        "dataset_name": settings.dataset_name,
        **_given(settings),
        "reward_funcs": settings.reward,
        "instruction_bank": "my-bank.yaml" if rest else settings.bank,
        "instruction_placement": best,
        "temperature": str(settings.temperature),
        "output_dir": "runs/mine",
    }
    words = [f"--{name} {shlex.quote(value)}" for name, value in options.items()]
    if settings.allow_http_hosts:
        words.append(f"--allow_http_hosts {shlex.join(settings.allow_http_hosts)}")
    return what, " \\\n    ".join(["  neat-align train", *_filled(words, 74)])


def _given(settings: ProbeSettings) -> dict[str, str]:
    """What the probe was told of the rows, where it was told anything."""
    given = {
        "as_conversations": "true" if settings.as_conversations else None,
        "as_texts": "true" if settings.as_texts else None,
        "on_bad_row": None if settings.on_bad_row == "error" else settings.on_bad_row,
        "chat_template_kwargs": settings.chat_template_kwargs,
    }
    return {name: value for name, value in given.items() if value is not None}


def _pairs(numbers: Sequence[int]) -> str:
    *first, last = [str(n) for n in numbers]
    return f"pairs {', '.join(first)} and {last}" if first else f"pair {last}"


def _filled(words: Sequence[str], width: int) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
