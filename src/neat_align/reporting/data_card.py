"""The card of an exported data set: README.md with the hub's metadata.

It says what the file holds and where it comes from, in numbers, and that some of it was written to
be bad. Nothing of this machine is in it: a model or data set that is a path is called local.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from neat_align.files.atomic import read_json
from neat_align.files.secrets import redacted
from neat_align.reporting.card_facts import DEMO_BASE
from neat_align.reporting.run_files import mapping
from neat_align.reporting.trainer_configs import TITLES, TrainerConfig
from neat_align.rounds.completions import ORIGINS
from neat_align.rounds.export_file import ExportCounts
from neat_align.rounds.exports import RowForm
from neat_align.rounds.ranking import BAD_ORIGINS
from neat_align.rounds.trainer_rows import TrainerName

# Told by it from a README of somebody's own, which is never written over.
MADE_BY = "<!-- data card written by neat-align export -->"
# A name on the hub, its owner left out or not.
HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
)
# Instructions that a card names; the rest is counted.
_NAMED = 20
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".yaml", ".yml")


@dataclass(frozen=True)
class DataOrigin:
    """Where groups come from, as far as their folder says.

    `rewards` are the names of the reward functions; `rounds` those of the rounds, as their folders
    are called.
    """

    model: str | None = None
    dataset: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    rewards: tuple[str, ...] = ()
    rounds: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportedFile:
    """The file that a card is about."""

    name: str
    form: RowForm
    trainer: TrainerName
    counts: ExportCounts
    config: TrainerConfig | None


def data_origin(run: Path | None, rewards: list[str], rounds: list[str]) -> DataOrigin:
    """What the folder of a run (run.json, result.json) or an expansion (expansion.json) says."""
    if run is None:
        return DataOrigin(rewards=tuple(map(_reward_name, rewards)), rounds=tuple(rounds))
    record = _read(run / "run.json") or _read(run / "expansion.json")
    result = _read(run / "result.json")
    facts = {**result, **record}
    model, dataset = (
        facts[k] if isinstance(facts.get(k), str) else result.get(k) for k in ("model", "dataset")
    )
    return DataOrigin(
        public_name(model),
        public_name(dataset),
        {"seed": record.get("seed"), **mapping(record.get("config"))},
        mapping(record.get("versions")),
        tuple(map(_reward_name, rewards or map(str, record.get("rewards") or ()))),
        tuple(rounds),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return mapping(redacted(read_json(path))) if path.is_file() else {}
    except ValueError:
        return {}


def public_name(name: Any) -> str | None:
    """A hub name as it is; "local" for what is a path, or lies on this machine."""
    if not isinstance(name, str) or not name:
        return None
    if name == "demo":
        return DEMO_BASE
    path = Path(name)
    is_local = HUB_NAME.fullmatch(name) is None or name.startswith(".") or path.exists()
    return "local" if is_local or path.suffix in _DATA_SUFFIXES else name


def _reward_name(name: str) -> str:
    """Without the address of a server or the folder of a model."""
    if "://" in name:
        return "a reward server"
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def data_card(file: ExportedFile, origin: DataOrigin, title: str) -> str:
    """The card's Markdown. `title` is the data set's name."""
    parts = [
        f"---\n{yaml.safe_dump(_metadata(file, title), sort_keys=False, allow_unicode=True)}---",
        MADE_BY,
        f"# {_plain(title)}",
        _opening(file),
        _warning(file),
        _origins(file.counts, origin),
        _how_made(file, origin),
        _columns(file),
        _training(file),
        _instructions(file.counts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(file: ExportedFile, title: str) -> dict[str, Any]:
    rows = file.counts.rows
    size = next((name for most, name in _SIZES if rows < most), "n>100M")
    tags = ["neat-align", "synthetic", file.form]
    if file.form in ("preference", "reward"):
        tags += ["dpo"] if file.form == "preference" else ["reward-model"]
    # The hub shows a warning before data sets with this tag.
    tags.append("not-for-all-audiences")
    return {
        "pretty_name": title,
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "tags": tags,
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": file.name}]}
        ],
    }


_FORMS: dict[RowForm, str] = {
    "preference": "pairs of answers, `chosen` above `rejected`",
    "ranked": "answers to each prompt, best first, with their rewards",
    "kto": "answers with a label: desirable or not",
    "sft": "the best answer to each prompt",
    "reward": "pairs of whole conversations or texts, `chosen` above `rejected`",
}


def _opening(file: ExportedFile) -> str:
    counts = file.counts
    left = sum(n for why, n in counts.left_out.items() if why != "turns")
    more = f" {left:,} groups gave no row ({_reasons(counts.left_out)})." if left else ""
    return (
        f"{counts.rows:,} rows from {counts.groups:,} groups of answers to one prompt each: "
        f"{_FORMS[file.form]}. A language model wrote them itself: it was asked plainly, under "
        "instructions to answer well, and under instructions to answer badly, and each answer was "
        "scored (NEAT, [arXiv:2410.12194](https://arxiv.org/abs/2410.12194))." + more
    )


def _reasons(left_out: Counter[str]) -> str:
    return ", ".join(f"{why}: {n:,}" for why, n in sorted(left_out.items()))


def _warning(file: ExportedFile) -> str:
    bad = sum(n for (_, origin), n in file.counts.used.items() if origin in BAD_ORIGINS)
    if file.form == "ranked":
        bad = sum(
            file.counts.origins[o].completions for o in BAD_ORIGINS & set(file.counts.origins)
        )
    where = f" {bad:,} of the answers here are of that kind." if bad else ""
    return (
        "> **Content warning.** Answers of origin `negative` and `rejected` were written to be bad "
        f"on purpose: they may be rude, harmful, hateful or false.{where} They are here to be "
        "unlearned. Do not show them to people who do not expect them, and do not train on them as "
        "answers to imitate."
    )


def _origins(counts: ExportCounts, origin: DataOrigin) -> str:
    names = [_plain(name) for name in origin.rewards]
    # One function's reward is the total.
    shown = names if len(names) > 1 else []
    head = ["origin", "answers", f"mean reward{f' ({names[0]})' if len(names) == 1 else ''}"]
    lines = [
        "## Answers by origin",
        "",
        f"| {' | '.join([*head, *(f'mean of {name}' for name in shown)])} |",
        f"|---{'|---:' * (2 + len(shown))}|",
    ]
    for name in ORIGINS:
        if (scores := counts.origins.get(name)) is None:
            continue
        cells = [name, f"{scores.completions:,}", _mean(scores.total, scores.rewarded)]
        cells += [_mean(scores.part_totals.get(i, 0.0), scores.parts[i]) for i in range(len(shown))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Of all answers in these groups, also those that no row has."]
    return "\n".join(lines)


def _mean(total: float, count: int) -> str:
    return f"{total / count:.3f}" if count else "–"


def _how_made(file: ExportedFile, origin: DataOrigin) -> str:
    config = origin.config
    facts: list[tuple[str, Any]] = [
        ("written by", _called(origin.model, "model")),
        ("prompts from", _called(origin.dataset, "data set")),
        ("instruction bank", _called(public_name(config.get("instruction_bank")), "bank")),
        ("rewards", ", ".join(origin.rewards) or None),
        ("ranked by", config.get("rank_by")),
        ("answers to a prompt", _answers(config)),
        ("temperature", config.get("temperature")),
        ("seed", config.get("seed")),
        ("rounds", ", ".join(origin.rounds) or None),
        ("versions", _versions(origin.versions)),
    ]
    lines = [f"| {name} | {_plain(str(value))} |" for name, value in facts if value is not None]
    return "\n".join(["## How it was made", "", "| | |", "|---|---|", *lines])


def _called(name: str | None, what: str) -> str | None:
    return f"a local {what}" if name == "local" else name


def _answers(config: dict[str, Any]) -> str | None:
    counts = {name: config.get(f"num_{name}") for name in ("positive", "negative", "plain")}
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or None


def _versions(versions: dict[str, str]) -> str | None:
    names = ("neat-align", "transformers", "torch", "python")
    return ", ".join(f"{n} {versions[n]}" for n in names if n in versions) or None


_MEANINGS = {
    "prompt": "the plain prompt; the instruction that an answer was written under is not in it",
    "messages": "the conversation",
    "chosen": "the better one",
    "rejected": "the worse one",
    "completion": "an answer",
    "label": "true: its rank is above the mean of the prompt's answers",
    "completions": "answers, best first",
    "rewards": "their rewards, higher is better",
    "origins": "their origins",
    "score": "its reward, higher is better",
    "score_chosen": "reward of `chosen`",
    "score_rejected": "reward of `rejected`",
    "score_margin": "their difference",
    "origin": "how it was written: `positive`, `negative` (under an instruction), `plain`; "
    "`chosen`, `rejected` (the source data's own)",
    "origin_chosen": "how `chosen` was written: `positive`, `negative` (under an instruction), "
    "`plain`; `chosen`, `rejected` (the source data's own)",
    "origin_rejected": "the same of `rejected`",
    "seed": "the seed that it was sampled with; null for the data's own",
    "seed_chosen": "the seed that `chosen` was sampled with; null for the data's own",
    "seed_rejected": "the same of `rejected`",
    "prompt_id": "the prompt's id in the source data",
    "system": "the conversation's system turn",
    "input": "the user's turn",
}


def _columns(file: ExportedFile) -> str:
    lines = [f"| `{name}` | {_MEANINGS[name]} |" for name in file.counts.columns]
    return "\n".join(["## Columns", "", "| column | |", "|---|---|", *lines])


def _training(file: ExportedFile) -> str:
    if file.config is None:
        return ""
    text = f"## Training on it with {TITLES[file.trainer]}\n\n"
    for name, content in file.config.files:
        text += f"`{name}` beside the file:\n\n```json\n{content}\n```\n\n"
    return f"{text}```{file.config.language}\n{file.config.text}\n```"


def _instructions(counts: ExportCounts) -> str:
    if not counts.instructions:
        return ""
    lines = ["## Instructions", "", "| origin | answers | instruction |", "|---|---:|---|"]
    for (origin, text), n in counts.instructions.most_common(_NAMED):
        lines.append(f"| {origin} | {n:,} | {_plain(text)} |")
    if len(counts.instructions) > _NAMED:
        lines += ["", f"And {len(counts.instructions) - _NAMED} more."]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text as one line of a table that is shown as it is: no HTML, no links, no formatting."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\|`*_\[\]#~])", r"\\\1", line)


def origin_names(counts: ExportCounts) -> str:
    """The origins of a file's rows in a line, for the terminal: which columns hold how many."""
    by_column: dict[str, list[str]] = {}
    for (column, origin), n in sorted(counts.used.items(), key=lambda item: -item[1]):
        by_column.setdefault(column, []).append(f"{n:,} {origin}")
    words = {"origin_chosen": "chosen", "origin_rejected": "rejected", "origin": "answers"}
    return "; ".join(f"{words[c]}: {', '.join(by_column[c])}" for c in words if c in by_column)
