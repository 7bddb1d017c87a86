"""What `neat-align init` finds out about a model and its data: no weights, nothing sampled."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import Any

from neat_align.cli.dry_run import model_on_meta
from neat_align.cli.probe_run import usable_placements
from neat_align.errors import DataError, PromptError
from neat_align.modeling.loading import load_tokenizer
from neat_align.modeling.model_shape import shape_of_model
from neat_align.modeling.requirements import context_of
from neat_align.pipeline import load_data
from neat_align.prompts.instruction_banks import InstructionBank, load_bank
from neat_align.prompts.row_checks import check_prompts
from neat_align.prompts.row_forms import to_conversation, to_text
from neat_align.prompts.row_prompts import instructed_ids
from neat_align.prompts.rows import PromptRow, TemplateInputs, hashable, is_conversational
from neat_align.prompts.skipped_rows import SkippedRows
from neat_align.prompts.template_check import check_rendering
from neat_align.prompts.template_inputs import with_template_kwargs
from neat_align.rounds.human_answers import answer_ids
from neat_align.script_arguments import ScriptArguments

# Rows of which tokens are counted: all of most data, else so many, evenly spaced.
COUNTED = 20_000
# Prompts that are put under every instruction of the bank: the longest ones.
INSTRUCTED = 16
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class ModelFacts:
    """A model as its configuration and its tokenizer say that it is.

    Attributes:
        kind: its class.
        parameters: its weights, each once.
        context: tokens of prompt and completion together; None: no limit.
        has_template: whether the tokenizer has a chat template.
        placements: where instructions can go on the prompts of the data.
        refused: why not elsewhere, by placement.
        thinks: whether the template can be asked to leave thoughts out (`enable_thinking`).
    """

    kind: str
    parameters: int
    context: int | None
    has_template: bool
    placements: tuple[str, ...]
    refused: dict[str, str]
    thinks: bool


@dataclass(frozen=True)
class DataFacts:
    """Rows of data as a run would use them.

    Attributes:
        rows: that can be read.
        prompts: different ones.
        form: "messages" or "text", as the file has them.
        conversational: whether a run uses them as messages.
        pairs, answered: rows with chosen and rejected, and with one answer at least.
        with_system: rows that begin with a system turn.
        unreadable: rows that cannot be read, or that the template refuses.
        counted: rows of which tokens were counted.
        lengths: tokens of those prompts, in increasing order.
        instructed: the most tokens that an instruction of the bank adds to one of the longest.
        answer_lengths: tokens of their answers, in increasing order.
    """

    rows: int
    prompts: int
    form: str
    conversational: bool
    pairs: int
    answered: int
    with_system: int
    unreadable: int
    counted: int
    lengths: Sequence[int]
    instructed: int
    answer_lengths: Sequence[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that was counted."""
        return self.lengths[-1]

    @property
    def median(self) -> int:
        """Tokens of a prompt in the middle."""
        return median_low(self.lengths)


def look(script: ScriptArguments, bank_name: str) -> tuple[ModelFacts, DataFacts]:
    """Look at model and data. Raises what a run would where nothing could be done with them."""
    bank = load_bank(bank_name)
    model = model_on_meta(script, script.load_options)
    tokenizer = load_tokenizer(model, revision=script.model_revision)
    template = tokenizer.chat_template
    with _unsaid():
        skipped = SkippedRows()
        rows, _ = load_data(replace(script, holdout=0), "skip", skipped)
        used = list(map(to_conversation if template else to_text, rows))
        conversational = is_conversational(used)
        thinks = conversational and "enable_thinking" in str(template)
        inputs = TemplateInputs(kwargs={"enable_thinking": False} if thinks else {})
        used = with_template_kwargs(used, inputs.kwargs)
        check_rendering(tokenizer, conversational=conversational, inputs=inputs)
        placements, refused = usable_placements(
            "all", tokenizer, bank, conversational=conversational, inputs=inputs
        )
        data = _data_facts(rows, used, tokenizer, bank, placements, skipped)
    facts = ModelFacts(
        kind=type(_inner(model)).__name__,
        parameters=shape_of_model(model).parameters,
        context=context_of(model),
        has_template=bool(template),
        placements=placements,
        refused=refused,
        thinks=thinks,
    )
    return facts, data


def _data_facts(
    rows: Sequence[PromptRow],
    used: Sequence[PromptRow],
    tokenizer: Any,
    bank: InstructionBank,
    placements: Sequence[str],
    skipped: SkippedRows,
) -> DataFacts:
    """`rows` are as the file has them, `used` as the model takes them."""
    conversational = is_conversational(used)
    picked = used[:: -(-len(used) // COUNTED)]
    counted = check_prompts(
        picked,
        tokenizer,
        _NO_LIMIT,
        conversational=conversational,
        on_bad_row="skip",
        skipped=skipped,
    )
    by_length = sorted(zip(counted.lengths, counted.rows, strict=True), key=lambda pair: -pair[0])
    return DataFacts(
        rows=len(rows),
        prompts=len({hashable(row.prompt) for row in rows}),
        form="messages" if is_conversational(rows) else "text",
        conversational=conversational,
        pairs=sum(row.chosen is not None and row.rejected is not None for row in rows),
        answered=sum(row.chosen is not None or row.rejected is not None for row in rows),
        with_system=sum(_has_system(row) for row in rows),
        unreadable=skipped.count,
        counted=len(picked),
        lengths=sorted(counted.lengths),
        instructed=_most_added(by_length[:INSTRUCTED], tokenizer, bank, placements),
        answer_lengths=_answer_lengths(counted.rows, tokenizer),
    )


def _inner(model: Any) -> Any:
    return model.get_base_model() if "Peft" in type(model).__name__ else model


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """What a run will say of its rows is said there, and in numbers here."""
    logger = logging.getLogger("neat_align")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _has_system(row: PromptRow) -> bool:
    return not isinstance(row.prompt, str) and row.prompt[0]["role"] == "system"


def _most_added(
    longest: Sequence[tuple[int, PromptRow]],
    tokenizer: Any,
    bank: InstructionBank,
    placements: Sequence[str],
) -> int:
    """The most tokens that any instruction adds to one of the longest prompts, wherever it goes."""
    added = [0]
    for length, row in longest:
        for text in {t for pair in bank.pairs for t in (pair.positive, pair.negative)}:
            for placement in placements:
                with contextlib.suppress(PromptError, DataError):
                    added.append(len(instructed_ids(tokenizer, row, text, placement)) - length)
    return max(added)


def _answer_lengths(rows: Sequence[PromptRow], tokenizer: Any) -> list[int]:
    """Tokens of the data's own answers, end of turn included, in increasing order."""
    found = [
        len(answer_ids(row, answer, tokenizer, None)[0])
        for row in rows[:: -(-len(rows) // 2000)]
        for answer in (row.chosen, row.rejected)
        if answer is not None
    ]
    return sorted(found)


def short_name(name: str) -> str:
    """The last part of a model's or a data set's name, without the ending of a file."""
    path = Path(name)
    return (
        path.stem if path.suffix.lower() in (".jsonl", ".json", ".parquet", ".csv") else path.name
    )
