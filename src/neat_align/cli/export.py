"""`neat-align export`: what a run or an expansion wrote, as data of other trainers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from neat_align.errors import ConfigError, DataError

if TYPE_CHECKING:
    from neat_align.cli.export_source import GroupSource
    from neat_align.reporting.trainer_configs import TrainerConfig
    from neat_align.rounds.export_file import ExportCounts
    from neat_align.rounds.exports import RowForm, RowRules
    from neat_align.rounds.ranking import PairSelection
    from neat_align.rounds.trainer_rows import TrainerName


class Format(StrEnum):
    """Rows of an export."""

    preference = "preference"
    ranked = "ranked"
    kto = "kto"
    sft = "sft"
    reward = "reward"


class Trainer(StrEnum):
    """Who reads an export."""

    trl = "trl"
    openrlhf = "openrlhf"
    axolotl = "axolotl"
    llamafactory = "llamafactory"


class Pairs(StrEnum):
    """Pairs of a group."""

    best_worst = "best_worst"
    all = "all"


class RankedBy(StrEnum):
    """What ranks completions, as `rank_by` of `train`."""

    reward = "reward"
    origin = "origin"
    origin_then_reward = "origin_then_reward"


_Source = Annotated[Path, typer.Argument(help="A run, one of its rounds, or what expand wrote.")]
_Form = Annotated[
    Format,
    typer.Option("--format", metavar="NAME", help="preference, ranked, kto, sft or reward."),
]
_Output = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="A .jsonl or .parquet file, or a folder/ for train.parquet with a data card. "
        "PATH-NAME.jsonl when left out.",
    ),
]
_For = Annotated[
    Trainer,
    typer.Option(
        "--for", metavar="NAME", help="Who reads it: trl, openrlhf, axolotl or llamafactory."
    ),
]
_Rounds = Annotated[
    str | None,
    typer.Option(metavar="0,2-3", help="Only these rounds of a run; all when left out."),
]
_Pairs = Annotated[
    Pairs,
    typer.Option(
        metavar="NAME", help="preference, reward: best_worst is one pair a group, all is all."
    ),
]
_RankBy = Annotated[
    RankedBy | None,
    typer.Option(
        metavar="NAME", help="reward, origin or origin_then_reward; the run's own when left out."
    ),
]
_Margin = Annotated[
    float | None,
    typer.Option(metavar="GAP", help="Gaps up to this are near ties; the run's own when left out."),
]
_Negative = Annotated[
    bool,
    typer.Option("--allow-negative", help="Also learn from answers to a negative instruction."),
]
_Cut = Annotated[bool, typer.Option("--allow-cut", help="Also learn from answers that were cut.")]
_Card = Annotated[
    bool, typer.Option("--card", help="Write a data card, README.md, beside the file.")
]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over files that are there.")]
_Push = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Send file and card to this data set of the hub."),
]
_Public = Annotated[
    bool, typer.Option("--public", help="push_to_hub: not a private data set, where it is new.")
]


def export(
    path: _Source,
    form: _Form = Format.preference,
    output: _Output = None,
    trainer: _For = Trainer.trl,
    rounds: _Rounds = None,
    pairs: _Pairs = Pairs.best_worst,
    rank_by: _RankBy = None,
    reward_margin: _Margin = None,
    allow_negative: _Negative = False,
    allow_cut: _Cut = False,
    card: _Card = False,
    overwrite: _Overwrite = False,
    push_to_hub: _Push = None,
    public: _Public = False,
) -> None:
    """What a run or an expansion wrote, as data that TRL and other trainers read."""
    from neat_align.cli.export_push import check_push, push
    from neat_align.cli.export_source import find_groups
    from neat_align.rounds.exports import RowRules

    if public and push_to_hub is None:
        raise ConfigError("public is given and push_to_hub is not: leave it out")
    if push_to_hub is not None:
        check_push(push_to_hub)
    source = find_groups(path, rounds)
    _check_rules(form.value, pairs.value, reward_margin)
    own = source.settings()
    rules = RowRules(
        rank_by.value if rank_by else own.get("rank_by") or "reward",
        own.get("reward_margin", 0.0) if reward_margin is None else reward_margin,
        pairs.value,
        allow_negative_chosen=allow_negative,
        allow_cut_chosen=allow_cut,
    )
    to = _target(path, output, form.value, wants_card=card)
    _check_free(to, overwrite=overwrite)
    made = _write(source, to, form.value, trainer.value, rules, push_to_hub)
    _tell(made, to, rules)
    if push_to_hub is not None:
        url = push(push_to_hub, to.file, made.texts, public=public)
        print(f"sent to {url}")


@dataclass(frozen=True)
class Target:
    """The file to write, and whether a card goes beside it."""

    file: Path
    has_card: bool

    @property
    def card(self) -> Path:
        """Where the card goes."""
        return self.file.with_name("README.md")


@dataclass(frozen=True)
class Exported:
    """What was written: counts, the trainer's lines, and the texts beside the file by name."""

    form: RowForm
    trainer: TrainerName
    counts: ExportCounts
    config: TrainerConfig | None
    texts: dict[str, str]


# ---- what is asked for ---------------------------------------------------------------------------


def _check_rules(form: RowForm, pairs: PairSelection, margin: float | None) -> None:
    if pairs != "best_worst" and form not in ("preference", "reward"):
        raise ConfigError(
            f"pairs is {pairs} and format is {form}, which has no pairs: leave --pairs out"
        )
    if margin is not None and not 0 <= margin < float("inf"):
        raise ConfigError(f"reward_margin is {margin:g}; it must be 0 or more")
    if margin is not None and form in ("ranked", "sft"):
        raise ConfigError(
            f"reward_margin is {margin:g} and format is {form}, which compares no two answers: "
            "leave it out"
        )


def _target(path: Path, output: str | None, form: str, *, wants_card: bool) -> Target:
    if output is None:
        base = path if path.name not in ("", "..") else path.absolute().resolve()
        name = base.stem if base.is_file() else base.name
        return Target(base.with_name(f"{name}-{form}.jsonl"), wants_card)
    to = Path(output)
    if to.suffix in (".jsonl", ".parquet") and not to.is_dir():
        return Target(to, wants_card)
    if to.is_dir() or not to.suffix or output.endswith("/"):
        return Target(to / "train.parquet", has_card=True)
    raise ConfigError(f"output is {output!r}: end it in .jsonl or .parquet, or in / for a folder")


def _check_free(to: Target, *, overwrite: bool) -> None:
    """Refuse to write over files, and over a README.md that is none of ours in any case."""
    from neat_align.reporting.data_card import MADE_BY

    if to.file.exists() and not overwrite:
        raise ConfigError(f"{to.file} is there already: choose another --output, or --overwrite")
    if not to.has_card or not to.card.exists():
        return
    if MADE_BY not in to.card.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(
            f"{to.card} is there and is no data card of neat-align's: choose an --output in "
            "another folder, or leave --card out"
        )
    if not overwrite:
        raise ConfigError(f"{to.card} is there already: choose another folder, or --overwrite")


# ---- writing -------------------------------------------------------------------------------------


def _write(
    source: GroupSource,
    to: Target,
    form: RowForm,
    trainer: TrainerName,
    rules: RowRules,
    title: str | None,
) -> Exported:
    from neat_align.reporting.data_card import ExportedFile, data_card, data_origin
    from neat_align.reporting.trainer_configs import trainer_config

    counts = write_data(to.file, source.groups(), form, rules, trainer=trainer)
    config, shown = (
        trainer_config(trainer, form, file, conversational=counts.conversational)
        for file in (Path(to.file.name), to.file)
    )
    names = [name for name, _ in source.rounds]
    origin = data_origin(source.run, source.reward_names, names)
    name = title or (to.file.parent.name if to.file.stem == "train" else to.file.stem)
    file = ExportedFile(to.file.name, form, trainer, counts, config)
    texts = {"README.md": data_card(file, origin, name), **dict(config.files if config else ())}
    if to.has_card:
        for name, text in texts.items():
            _write_text(to.file.with_name(name), text)
    return Exported(form, trainer, counts, shown, texts)


def _write_text(path: Path, text: str) -> None:
    from neat_align.files.atomic import write_atomic

    write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_data(
    path: Path,
    groups: Any,
    form: RowForm,
    rules: RowRules,
    *,
    trainer: TrainerName = "trl",
) -> ExportCounts:
    """Write groups as rows into a .jsonl or .parquet file: complete, or not at all.

    Raises DataError where not one row comes of them, with what to change.
    """
    from neat_align.files.atomic import write_atomic
    from neat_align.rounds.export_file import write_rows

    found: list[ExportCounts] = []

    def write(file: IO[bytes]) -> None:
        as_lines = path.suffix == ".jsonl"
        found.append(write_rows(file, groups, form, rules, trainer=trainer, as_lines=as_lines))
        if not found[0].rows:
            raise DataError(_no_rows(found[0], form, trainer))

    write_atomic(path, write)
    return found[0]


_REMEDIES = {
    "no rewards": "no two answers to a prompt have a reward: --rank-by origin needs none",
    "near tie": "no answer stands above another by more than the margin: lower --reward-margin",
    "cut": "what stands above was cut at max_completion_length, and a trainer would put an end of "
    "turn there: sample longer answers, or pass --allow-cut",
    "negative": "what stands above was written under a negative instruction: pass "
    "--allow-negative to learn from it",
    "turns": "their turns are not those that {trainer} reads: leave --for out for TRL's rows",
}


def _no_rows(counts: ExportCounts, form: RowForm, trainer: TrainerName) -> str:
    lines = [
        f"{n} x {_REMEDIES[why].format(trainer=trainer)}"
        for why, n in counts.left_out.most_common()
    ]
    return (
        f"the {counts.groups} groups give no row of format {form}, and nothing is written: "
        + "; ".join(lines)
    )


# ---- what is said --------------------------------------------------------------------------------


def _tell(made: Exported, to: Target, rules: RowRules) -> None:
    from neat_align.reporting.data_card import origin_names

    counts = made.counts
    print(f"{counts.rows:,} rows ({made.form}) of {counts.groups:,} groups in {to.file}")
    if used := origin_names(counts):
        print(f"  {used}")
    if counts.labels:
        print(f"  {counts.labels[True]:,} desirable, {counts.labels[False]:,} not")
        if not counts.labels[True]:
            print(
                "  KTO needs both labels: what stands above a mean was cut (--allow-cut) or "
                "negative\n  (--allow-negative)"
            )
    for why, n in counts.left_out.most_common():
        what = "rows" if why == "turns" else "groups"
        print(f"  {n:,} {what} left out: {_LEFT_OUT[why].format(rules=rules, made=made)}")
    if to.has_card:
        print(f"its card: {to.card}")
    print("it holds text written to be harmful, on purpose")
    if made.config is not None:
        for name, text in made.config.files:
            if not to.has_card:
                print(f"\n{name} beside it:\n{text}")
        print(f"\n{made.config.text}")


_LEFT_OUT = {
    "no rewards": "fewer than two answers with a reward",
    "near tie": "no gap above {rules.margin:g}",
    "cut": "what stands above was cut (--allow-cut)",
    "negative": "what stands above is negative (--allow-negative)",
    "turns": "turns that {made.trainer} does not read",
}
