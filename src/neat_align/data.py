"""Prompts and human preference pairs: read, told apart, validated before anything is sampled.

Forms understood (TRL's, plus HH-RLHF's transcripts): `prompt` as text or messages, with or without `chosen` and `rejected`;
`chosen` and `rejected` alone, which share the prompt as their beginning; whole Human/Assistant transcripts.
Every message names where the row is: `file.jsonl:17` is a line (from 1), `row 17` an index (from 0).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeAlias

from neat_align.errors import DataError
from neat_align.groups import Message, Prompt

ROLES = ("system", "user", "assistant")
HUMAN_MARK, ASSISTANT_MARK = "\n\nHuman:", "\n\nAssistant:"
ROLE_OF = {"": "system", "Human": "user", "Assistant": "assistant"}  # what goes before the first mark is the system's
MAX_ERRORS_SHOWN = 5
SAME_ANSWERS = "chosen and rejected are the same, so there is nothing to prefer: drop the row"

_Record: TypeAlias = tuple[str, object]  # where a row is, and the row, or the DataError that came in reading it
_Pair: TypeAlias = tuple[Prompt, str | None, str | None]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt with the data's own answers, if any. `columns` is everything else in the row, for reward functions.

    `id` is the row's `id` or `prompt_id` where it has one, else a hash of its content. The prompt's last turn is the user's.
    Answers are text, as written; those cut out of whole transcripts are without the blanks around them.
    """

    id: str
    prompt: Prompt
    chosen: str | None
    rejected: str | None
    columns: Mapping[str, Any]
    where: str


def load_rows(source: str | Path, *, split: str | None = None, limit: int | None = None) -> list[PromptRow]:
    """Rows of a .jsonl, .json, .parquet or .csv file, of a folder written by `save_to_disk`, or of a data set on the hub.

    Without `split`, a data set with several gives `train`. With `limit`, only the first this many rows are read.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be 1 or more, or unset for every row")
    path = Path(source).expanduser()
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"{source}: files of type {path.suffix or '(none)'} are not read; use one of {', '.join(_READERS)}")
        if split is not None:
            raise DataError(f"split is {split!r}, but {source} is a file and has no splits: remove split")
        return _collect(reader(path), str(source), limit)
    hub_name = isinstance(source, str) and path.suffix.lower() not in _READERS and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)
    if not path.exists() and not hub_name:
        raise DataError(f"{source}: there is no such file or folder: check the path (the current folder is {Path.cwd()})")
    return _collect(_numbered(_load_dataset(str(source), path, split), f"dataset '{source}'"), str(source), limit)


def rows_from_dataset(dataset: Iterable[Any], *, name: str = "train_dataset") -> list[PromptRow]:
    """Rows of a `datasets.Dataset` (one split), or of any iterable of mappings. `name` is what messages call it."""
    if isinstance(dataset, Mapping | str | Path):
        what = f"a dict of {', '.join(map(str, dataset))}" if isinstance(dataset, Mapping) else _show(str(dataset))
        raise DataError(f"{name} is {what}; it must be one data set or list of rows: pass one split, or read a file with load_rows")
    return _collect(_numbered(dataset, f"dataset '{name}'"), name, None)


def is_conversational(rows: Sequence[PromptRow]) -> bool:
    """Whether the prompts are messages. Rows that were read together are all text or all messages."""
    return bool(rows) and not isinstance(rows[0].prompt, str)


def to_conversation(row: PromptRow) -> PromptRow:
    """The row with its prompt as messages: the turns of a Human/Assistant transcript, or else one user message.

    Text before the first turn becomes the system message; blank turns are dropped, and neighbours of one role joined.
    """
    if not isinstance(row.prompt, str):
        return row
    return replace(row, prompt=_transcript_messages(row.prompt) or [{"role": "user", "content": row.prompt}])


def _jsonl(path: Path) -> Iterator[_Record]:
    with path.open("rb") as file:  # bytes: only \n ends a line, whatever line separators the text holds
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                if line.strip():
                    yield f"{path}:{number}", json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield f"{path}:{number}", _unreadable(error)


def _json(path: Path) -> Iterator[_Record]:
    text = _decode(path)
    if not text.lstrip().startswith("["):  # one object a line, as many files with this ending are
        yield from _jsonl(path)
        return
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: {_unreadable(error)}") from None
    yield from _numbered(items, str(path))


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {_unreadable(error)}") from None


def _unreadable(error: Exception) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"not valid UTF-8 (byte 0x{error.object[error.start]:02x}): save the file as UTF-8")
    where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    return DataError(f"not valid JSON{where} ({getattr(error, 'msg', error)}): write one object a line, or one list in a .json file")


def _parquet(path: Path) -> Iterator[_Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        read_table: Any = pq.read_table
        items = read_table(path).to_pylist()
    except (pa.ArrowException, ValueError, OSError, ArithmeticError, TypeError, MemoryError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read as Parquet ({said}): write the file again") from None
    yield from _numbered(items, str(path))


def _csv(path: Path) -> Iterator[_Record]:
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or ("prompt" not in header and not {"chosen", "rejected"} <= set(header)):
            raise DataError(f"{path}:1: the header is {_show(header)}; it must name prompt, or chosen and rejected, and no column twice")
        line = reader.line_num + 1
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if len(fields) not in (0, len(header)):
                yield where, DataError(f"{len(fields)} fields where the header has {len(header)}: quote fields that hold commas")
            elif fields:  # an empty field is how CSV says that there is none
                pairs = zip(header, fields, strict=True)
                yield where, {k: None if v == "" and k in ("id", "prompt_id", "chosen", "rejected") else v for k, v in pairs}
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV ({error}): quote the field, or use .jsonl") from None


_READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}


def _load_dataset(source: str, path: Path, split: str | None) -> Any:
    from datasets.exceptions import DatasetsError
    from datasets.load import load_dataset, load_from_disk

    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    try:
        loaded: Any = load_from_disk(path) if saved else load_dataset(str(path) if path.is_dir() else source, split=split)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        raise DataError(f"{source}: there is no such file, and it cannot be loaded as a data set: {error}") from error
    if isinstance(loaded, dict):
        name = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
        if name not in loaded:
            raise DataError(f"{source}: there is no split {name!r}; set split to one of {', '.join(map(str, loaded))}")
        return loaded[name]
    if saved and split is not None:
        raise DataError(f"split is {split!r}, but {source} holds one data set without splits: remove split")
    return loaded


def _numbered(rows: Any, name: str) -> Iterator[_Record]:
    for index, row in enumerate(rows.with_format(None) if hasattr(rows, "with_format") else rows):
        yield f"{name}, row {index}", row


def _collect(records: Iterable[_Record], source: str, limit: int | None) -> list[PromptRow]:
    checker, rows, errors = _Checker(), [], []
    for where, record in islice(records, limit):
        try:
            rows.append(checker.row(where, record))
        except DataError as error:
            errors.append(f"{where}: {error}")
    if errors:
        more = [f"… and {len(errors) - MAX_ERRORS_SHOWN} more"] if len(errors) > MAX_ERRORS_SHOWN else []
        count = [f"{source}: {len(errors)} of {len(errors) + len(rows)} rows cannot be used:"] if len(errors) > 1 else []
        raise DataError("\n  ".join([*count, *errors[:MAX_ERRORS_SHOWN], *more]))
    if not rows:
        raise DataError(f"{source}: no rows: it is empty; a row with a prompt is needed")
    for oddity, places in checker.oddities.items():
        warnings.warn(f"{source}: {len(places)} of {len(rows)} rows {oddity} (the first: {places[0]})", stacklevel=3)
    return rows


class _Checker:
    """What must hold between rows: one form for all, no id twice. Gathers what is worth a warning."""

    def __init__(self) -> None:
        self.oddities: defaultdict[str, list[str]] = defaultdict(list)
        self._forms: dict[str, tuple[str, str]] = {}
        self._id_places: dict[str, str] = {}
        self._hashes: Counter[str] = Counter()
        self._prompts: Counter[str] = Counter()

    def row(self, where: str, record: object) -> PromptRow:
        if isinstance(record, DataError):
            raise record
        if not isinstance(record, Mapping) or not all(isinstance(name, str) for name in record):
            raise DataError(f'the row is {_show(record)}, not an object with named fields: write it as {{"prompt": …}}')
        _check_text(record)
        prompt, chosen, rejected = _read_pair(record)
        for field, value in (("prompt", prompt), ("chosen", record.get("chosen")), ("rejected", record.get("rejected"))):
            form = "text" if isinstance(value, str) else "messages"
            first, place = self._forms.setdefault(field, (form, where)) if value is not None else (form, where)
            if form != first:
                raise DataError(f"{field} is {form}, but {first} at {place}: use one form in all rows")
        oddities, pair_is_usable = _oddities(record, prompt, chosen, rejected)
        if not pair_is_usable:
            chosen = rejected = None
        row_id, id_field = self._identify(record, [prompt, chosen, rejected], where)
        self._prompts[key := json.dumps(prompt)] += 1
        if self._prompts[key] > 1:
            oddities.append("repeat an earlier prompt; they are kept and weigh more: drop them if that is not meant")
        for oddity in oddities:
            self.oddities[oddity].append(where)
        columns = {k: v for k, v in record.items() if k not in ("prompt", "chosen", "rejected", id_field)}
        return PromptRow(row_id, prompt, chosen, rejected, columns, where)

    def _identify(self, row: Mapping[str, Any], content: list[Any], where: str) -> tuple[str, str]:
        field = next((name for name in ("id", "prompt_id") if row.get(name) is not None), "")
        if field:
            value = row[field]
            if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
                raise DataError(f"{field} is {_show(value)}; it must be text or a whole number: correct it, or leave the field out")
            row_id = str(value)
        else:
            digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
            self._hashes[digest] += 1
            row_id = digest if self._hashes[digest] == 1 else f"{digest}-{self._hashes[digest]}"
        first = self._id_places.setdefault(row_id, where)
        if first != where:
            raise DataError(f"{field or 'id'} {row_id!r} is also that of {first}: make ids unique, or leave the field out")
        return row_id, field


def _check_text(row: Mapping[str, Any]) -> None:
    """Refuse what UTF-8 cannot hold, in any column: it would fail at the first write, hours later."""
    for field, value in row.items():
        try:
            json.dumps([field, value], ensure_ascii=False, skipkeys=True, default=str).encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"U+{ord(error.object[error.start]):04X}"
            raise DataError(f"{field!a} holds the lone surrogate {code}, half of a character: replace it in the text") from None
        except RecursionError:
            raise DataError(f"{field!a} is nested too deeply: flatten it, or leave the column out") from None


def _read_pair(row: Mapping[str, Any]) -> _Pair:
    """Prompt and answers of a row, whatever its form."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" in row:
        # Some data sets repeat the prompt as text beside whole conversations; like TRL, read the conversations.
        if not (isinstance(row["prompt"], str) and isinstance(chosen, list | tuple)):
            return _read_prompt(row["prompt"]), _read_answer(chosen, "chosen"), _read_answer(rejected, "rejected")
    elif "chosen" not in row or "rejected" not in row:
        raise DataError(f"prompt is missing (the row has {', '.join(row) or 'no fields'}): give prompt, or both chosen and rejected")
    for field in ("chosen", "rejected"):
        if not isinstance(row.get(field), str if isinstance(chosen, str) else list | tuple):
            both = "chosen and rejected must be both text or both messages, and begin with the prompt"
            raise DataError(f"{field} is {_show(row.get(field))}; without a prompt, {both}: correct it, or drop the row")
    if chosen == rejected:
        raise DataError(SAME_ANSWERS)
    if isinstance(chosen, str):
        return _split_text(chosen, str(rejected))
    good, bad = _read_messages(chosen, "chosen"), _read_messages(rejected, "rejected")
    same = _common(good, bad)
    if not same:
        raise DataError("chosen and rejected share no first message to be the prompt: give prompt as messages, or answers as text")
    return _read_prompt(good[:same]), _read_answer(good[same:], "chosen"), _read_answer(bad[same:], "rejected")


def _split_text(chosen: str, rejected: str) -> _Pair:
    """The shared beginning is the prompt: up to the last common `Assistant:` of transcripts, else as TRL has it."""
    same = _common(chosen, rejected)
    if chosen.lstrip().startswith("Human:") and rejected.lstrip().startswith("Human:"):
        end = chosen.rfind(ASSISTANT_MARK, 0, same) + len(ASSISTANT_MARK)
        if end < len(ASSISTANT_MARK):
            raise DataError("chosen and rejected are transcripts that differ before their first Assistant turn: drop the row")
        return _read_prompt(chosen[:end]), chosen[end:].strip(), rejected[end:].strip()
    if same == min(len(chosen), len(rejected)):
        raise DataError("chosen and rejected: one is the beginning of the other, so the prompt's end cannot be told: add a prompt field")
    if same and chosen[same - 1] == " ":
        same -= 1
    if not chosen[:same].strip():
        raise DataError("prompt is missing, and chosen and rejected share no beginning: add a prompt field")
    return _read_prompt(chosen[:same]), chosen[same:], rejected[same:]


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _read_prompt(value: object) -> Prompt:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"prompt is blank ({_show(value)}): write one, or drop the row")
        if re.match(r"""\s*\[\{['"](role|content)['"]""", value):
            raise DataError("prompt is a list of messages written as text: store it as a list (.jsonl and .parquet can, .csv cannot)")
        _transcript_messages(value)
        return value
    if not isinstance(value, list | tuple):
        raise DataError(f"prompt is {_show(value)}; it must be text or a list of messages")
    messages = _read_messages(value, "prompt")
    last = messages[-1]
    if last["role"] == "assistant":
        raise DataError("prompt ends with an assistant message: split it off into chosen")
    if last["role"] != "user" or not last["content"].strip():
        raise DataError(f"prompt must end with a user message that says something, not {_show(last)}: add one, or drop the row")
    return messages


def _read_messages(value: Any, field: str) -> list[Message]:
    if not value:
        raise DataError(f"{field} is an empty list of messages: add a message, or drop the row")
    for index, message in enumerate(value):
        at = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise DataError(f"{at} is {_show(message)}; a message must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"{at}.role is {_show(role)}; it must be one of {', '.join(ROLES)}: rename the role, or drop the message")
        if not isinstance(content, str):
            raise DataError(f"{at}.content is {_show(content)}; it must be text: join its parts, or drop the row")
        extra = [str(k) for k, v in message.items() if k not in ("role", "content") and v is not None]
        if extra:
            raise DataError(f"{at} also has {', '.join(extra)}, which would be lost: remove everything but role and content")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _read_answer(value: object, field: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise DataError(f"{field} is {_show(value)}; it must be text or a list with one assistant message")
    roles = [m["role"] for m in (_read_messages(value, field) if value else [])]
    if roles != ["assistant"]:
        came = ", ".join(roles) or "nothing"
        raise DataError(f"{field} must be one assistant message, not {came}: move earlier turns into prompt, and cut later ones")
    return str(value[0]["content"])


def _oddities(row: Mapping[str, Any], prompt: Prompt, chosen: str | None, rejected: str | None) -> tuple[list[str], bool]:
    """What to warn of, and whether the human answers can be learnt from: real data sets hold pairs that cannot."""
    answers = [a for a in (chosen, rejected) if a is not None]
    left_out = "the prompt is kept, the human answers are left out"
    if any(not a.strip() for a in answers):
        return [f"have a blank chosen or rejected answer; {left_out}"], False
    if len(answers) == 2 and chosen == rejected:
        raise DataError(SAME_ANSWERS)
    if isinstance(prompt, str):
        if any(HUMAN_MARK in a or ASSISTANT_MARK in a for a in answers) and _transcript_messages(prompt):
            return [f"have a chosen or rejected answer that goes on with more Human/Assistant turns; {left_out}"], False
        if "prompt" not in row and prompt[-1].isalnum() and any(a[0].isalnum() for a in answers):
            return ["have no prompt field, and what chosen and rejected share ends inside a word: add a prompt field"], True
    return [], True


def _transcript_messages(text: str) -> list[Message]:
    """Messages of a Human/Assistant transcript that is a prompt; none when the text is no transcript."""
    before, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text.lstrip())
    marks, open_end = parts[::2], text.rstrip().endswith(ASSISTANT_MARK)
    if "Human" not in marks or not (open_end if before else text.startswith(HUMAN_MARK) or "Assistant" in marks):
        return []
    spoken = [(ROLE_OF[m], t.strip()) for m, t in zip(["", *marks], [before, *parts[1::2]], strict=True) if t.strip()]
    messages = [{"role": role, "content": "\n\n".join(t for _, t in turns)} for role, turns in groupby(spoken, lambda turn: turn[0])]
    if not messages or messages[-1]["role"] != "user":
        raise DataError("prompt is a transcript that does not end with a Human turn: split the last Assistant turn off into chosen")
    return messages


def _show(value: object) -> str:
    """A value for a message: short, and its type where the value does not tell it."""
    if value is None:
        return "null"
    text = repr(value) if len(repr(value)) <= 80 else repr(value)[:79] + "…"
    return text if isinstance(value, str | list | tuple | Mapping) else f"{text} ({type(value).__name__})"
