"""Rows as each trainer reads them: TRL's, and what OpenRLHF, axolotl and LLaMA-Factory want else.

Read in their documentation and, where that leaves a question, in their code:

- OpenRLHF 0.11 (README "Prepare Datasets", `openrlhf/datasets/{reward,sft}_dataset.py`): TRL's rows
  as they are.
- axolotl (docs/rlhf.qmd, docs/dataset-formats/conversation.qmd, `prompt_strategies/`): `messages`
  with one `chosen` and one `rejected` message; KTO and reward models of one question as texts.
- LLaMA-Factory (data/README.md, `src/llamafactory/data/converter.py`): `messages` with one message
  each, turns of user and assistant in turn after an optional system turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from neat_align.errors import ConfigError
from neat_align.rounds.completions import prompt_type
from neat_align.rounds.exports import Row, RowForm

if TYPE_CHECKING:
    import pyarrow as pa

TrainerName: TypeAlias = Literal["trl", "openrlhf", "axolotl", "llamafactory"]
TRAINERS: tuple[TrainerName, ...] = get_args(TrainerName)
# What a column holds: a text; a prompt or answer as the prompts are (text or messages); messages;
# one message.
_Kind: TypeAlias = Literal[
    "text", "turns", "messages", "message", "number", "seed", "flag", "texts", "numbers"
]
_PAIR_SOURCES: dict[str, _Kind] = {
    "score_chosen": "number",
    "score_rejected": "number",
    "score_margin": "number",
    "origin_chosen": "text",
    "origin_rejected": "text",
    "seed_chosen": "seed",
    "seed_rejected": "seed",
    "prompt_id": "text",
}
_SOURCES: dict[str, _Kind] = {
    "score": "number",
    "origin": "text",
    "seed": "seed",
    "prompt_id": "text",
}
_TRL: dict[RowForm, dict[str, _Kind]] = {
    "preference": {"prompt": "turns", "chosen": "turns", "rejected": "turns", **_PAIR_SOURCES},
    "ranked": {"prompt": "turns", "completions": "texts", "rewards": "numbers", "origins": "texts"},
    "kto": {"prompt": "turns", "completion": "turns", "label": "flag", **_SOURCES},
    "sft": {"prompt": "turns", "completion": "turns", **_SOURCES},
    "reward": {"chosen": "turns", "rejected": "turns", **_PAIR_SOURCES},
}
_ONE_MESSAGE_EACH: dict[str, _Kind] = {
    "messages": "messages",
    "chosen": "message",
    "rejected": "message",
    **_PAIR_SOURCES,
}
_TEXT_PAIR: dict[str, _Kind] = {
    "prompt": "text",
    "chosen": "text",
    "rejected": "text",
    **_PAIR_SOURCES,
}


@dataclass(frozen=True)
class RowShape:
    """The columns of a trainer's rows, and how one is made; None where the trainer cannot read it.

    `made_from` is the form of the row that `convert` is given.
    """

    columns: dict[str, _Kind]
    made_from: RowForm
    convert: Callable[[Row], Row | None]

    def schema(self, *, conversational: bool) -> pa.Schema:
        """The columns in Arrow, in order."""
        import pyarrow as pa

        messages = prompt_type(conversational=True)
        types: dict[_Kind, Any] = {
            "text": pa.string(),
            "turns": prompt_type(conversational=conversational),
            "messages": messages,
            "message": messages.value_type,
            "number": pa.float64(),
            "seed": pa.uint64(),
            "flag": pa.bool_(),
            "texts": pa.list_(pa.string()),
            "numbers": pa.list_(pa.float64()),
        }
        return pa.schema([(name, types[kind]) for name, kind in self.columns.items()])


def row_shape(form: RowForm, trainer: TrainerName = "trl", *, conversational: bool) -> RowShape:
    """What rows of a form are for a trainer. Raises ConfigError where it reads no such data."""
    as_in_trl = RowShape(_TRL[form], form, _same)
    if trainer == "trl":
        return as_in_trl
    if form == "ranked":
        raise ConfigError(
            f"--for is {trainer} and --format is ranked, which none of these trainers reads: leave "
            "--for out, or choose preference, kto, sft or reward"
        )
    if trainer == "openrlhf":
        if form == "kto":
            raise ConfigError(
                "--for is openrlhf and --format is kto, which OpenRLHF no longer trains on: choose "
                "preference, sft or reward, or another trainer"
            )
        return as_in_trl
    shapes = _AXOLOTL if trainer == "axolotl" else _LLAMA_FACTORY
    if conversational:
        return shapes[form]
    if form == "reward":
        if trainer == "axolotl":
            raise ConfigError(
                "--for is axolotl, --format is reward, and the prompts are plain text: axolotl's "
                "reward models read conversations; leave --for out for TRL's RewardTrainer"
            )
        return RowShape(_TEXT_PAIR, "preference", _same)
    return as_in_trl


# ---- a row of TRL's as another trainer's ---------------------------------------------------------


def _same(row: Row) -> Row:
    return row


def _one_message_each(row: Row) -> Row:
    sides = {side: row[side][0] for side in ("chosen", "rejected")}
    rest = {k: v for k, v in row.items() if k not in ("prompt", *sides)}
    return {"messages": row["prompt"], **sides, **rest}


def _one_conversation(row: Row) -> Row:
    rest = {k: v for k, v in row.items() if k not in ("prompt", "completion")}
    return {"messages": [*row["prompt"], *row["completion"]], **rest}


def _question_texts(row: Row) -> Row | None:
    """Axolotl's KTO: a system text, a question, an answer."""
    asked = _single_question(row["prompt"])
    if asked is None:
        return None
    system, question = asked
    answer = row["completion"][0]["content"]
    rest = {k: v for k, v in row.items() if k not in ("prompt", "completion")}
    return {"system": system, "prompt": question, "completion": answer, **rest}


def _compared_texts(row: Row) -> Row | None:
    """Axolotl's `bradley_terry`: a system text, a question, two answers."""
    asked = _single_question(row["prompt"])
    if asked is None:
        return None
    system, question = asked
    sides = {side: row[side][0]["content"] for side in ("chosen", "rejected")}
    rest = {k: v for k, v in row.items() if k not in ("prompt", *sides)}
    return {"system": system, "input": question, **sides, **rest}


def _single_question(messages: list[dict[str, Any]]) -> tuple[str, str] | None:
    """The system text ("" without one) and the only user turn; None where there are more turns."""
    roles = [m["role"] for m in messages]
    if roles not in (["user"], ["system", "user"]):
        return None
    return (messages[0]["content"] if len(roles) > 1 else ""), messages[-1]["content"]


def _in_turn(convert: Callable[[Row], Row]) -> Callable[[Row], Row | None]:
    """Only rows whose turns LLaMA-Factory reads; others it skips with a line in its log."""

    def converted(row: Row) -> Row | None:
        roles = [m["role"] for m in row["prompt"]]
        turns = roles[1:] if roles[0] == "system" else roles
        expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
        return convert(row) if turns == expected else None

    return converted


_AXOLOTL: dict[RowForm, RowShape] = {
    "preference": RowShape(_ONE_MESSAGE_EACH, "preference", _one_message_each),
    "kto": RowShape(
        {"system": "text", "prompt": "text", "completion": "text", "label": "flag", **_SOURCES},
        "kto",
        _question_texts,
    ),
    "sft": RowShape({"messages": "messages", **_SOURCES}, "sft", _one_conversation),
    "reward": RowShape(
        {"system": "text", "input": "text", "chosen": "text", "rejected": "text", **_PAIR_SOURCES},
        "preference",
        _compared_texts,
    ),
}
_LLAMA_FACTORY: dict[RowForm, RowShape] = {
    "preference": RowShape(_ONE_MESSAGE_EACH, "preference", _in_turn(_one_message_each)),
    "kto": RowShape(
        {"messages": "messages", "label": "flag", **_SOURCES}, "kto", _in_turn(_one_conversation)
    ),
    "sft": RowShape({"messages": "messages", **_SOURCES}, "sft", _in_turn(_one_conversation)),
    "reward": RowShape(_ONE_MESSAGE_EACH, "preference", _in_turn(_one_message_each)),
}
