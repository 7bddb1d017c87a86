"""What a judge is made of: its YAML file and its rubric, checked.

A judge's file (docs/judges.md has all keys):

    base_url: http://127.0.0.1:8000/v1
    model: Qwen/Qwen3-8B
    rubric: helpful          # a shipped one, a file, or a rubric itself

Nothing in it is a secret: `api_key_env` is the name of the environment variable with the API key.
Errors are RewardError and name the file, the key, and what to change.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast
from urllib.parse import urlsplit

from neat_align.errors import RewardError, did_you_mean
from neat_align.files.secrets import names_secret
from neat_align.files.yaml import YamlDocument, parse_yaml, read_yaml

Form: TypeAlias = Literal["pointwise", "pairwise", "ranking"]
SHIPPED_RUBRICS = ("helpful", "harmless", "honest", "polite")
OPENAI_HOST, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
_RUBRIC_KEYS = ("name", "description", "source", "criteria", "scale", "levels")
_CHOICES: dict[str, tuple[str, ...]] = {
    "form": ("pointwise", "pairwise", "ranking"),
    "against": ("group", "chosen"),
    "response_format": ("auto", "json_schema", "json_object", "text"),
}
# Smallest values; `temperature` and `max_failures` have a largest one as well.
_AT_LEAST: dict[str, float] = {
    "opponents": 1,
    "orders": 1,
    "max_tokens": 1,
    "concurrency": 1,
    "max_retries": 0,
    "temperature": 0,
    "max_failures": 0,
}
_AT_MOST: dict[str, float] = {"orders": 2, "temperature": 2, "max_failures": 1}
_MOST_LEVELS = 1000
# Options that only one form reads.
_ONLY_FOR: dict[str, Form] = {
    "against": "pairwise",
    "opponents": "pairwise",
    "orders": "ranking",
    "logprobs": "pointwise",
}


@dataclass(frozen=True)
class Rubric:
    """What a judge looks at. `scale` is the lowest and the highest score, whole numbers; `levels`
    say what some of the scores mean.
    """

    name: str
    criteria: str
    scale: tuple[int, int] = (1, 10)
    levels: Mapping[int, str] = field(default_factory=dict)
    description: str = ""
    source: str = ""


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, in any currency, which is that of the totals."""

    input: float = 0.0
    output: float = 0.0


@dataclass(frozen=True)
class JudgeSettings:
    """A judge's file. docs/judges.md says what each key is for.

    Attributes:
        base_url: of the OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.
        model: as the endpoint calls it.
        rubric: what the judge looks at.
        name: what metrics call the judge.
        form: a score for each answer, two answers held against each other, or a whole group ranked.
        against: pairwise: each other's opponents are the answers of the `group`, or the data's own
            `chosen` answer.
        opponents: pairwise in a group: how many others each answer meets at most.
        orders: ranking: 2 ranks a shuffled order and its reverse, 1 only the first.
        explain: the judge writes its reasons before its verdict.
        logprobs: pointwise: the score is the mean over the scale by the probabilities of the score
            token, in place of the one that was sampled.
        response_format: how the form of an answer is asked for; `auto` takes a JSON schema where
            the server has it.
        temperature: None: not sent, for models that take none.
        max_tokens: of one answer.
        seed: None: not sent.
        extra_body: keys that the request gets besides, such as chat_template_kwargs.
        concurrency: requests under way at once.
        timeout: seconds for one request.
        max_retries: how often a request is tried again.
        max_failures: share of the newest judgements that may fail before the run stops.
        prices: per million tokens.
        api_key_env: the environment variable with the API key; "": none is sent.
        cache: false, or the file of the cache; true is neat-align's own.
    """

    base_url: str
    model: str
    rubric: Rubric
    name: str = ""
    form: Form = "pointwise"
    against: str = "group"
    opponents: int = 7
    orders: int = 2
    explain: bool = True
    logprobs: bool = False
    response_format: str = "auto"
    temperature: float | None = 0.0
    max_tokens: int = 1024
    seed: int | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 16
    timeout: float = 60.0
    max_retries: int = 6
    max_failures: float = 0.1
    prices: Prices = field(default_factory=Prices)
    api_key_env: str = ""
    cache: bool | str = True

    @property
    def compares_group(self) -> bool:
        """Whether a score says how an answer stands among those to the same prompt, and no more."""
        return self.form == "ranking" or (self.form == "pairwise" and self.against == "group")

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides scores: a run may not go on with another judge."""
        free = {
            *("base_url", "concurrency", "timeout", "max_retries", "max_failures", "prices"),
            *("api_key_env", "cache", "name"),
        }
        deciding = {k: v for k, v in asdict(self).items() if k not in free}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode("ascii")).hexdigest()


def is_judge(spec: str) -> bool:
    """Whether a reward's name is a judge's file: "judge:path.yaml"."""
    return spec.startswith("judge:") and spec.endswith((".yaml", ".yml"))


def read_judge(path: str) -> JudgeSettings:
    """The judge in a YAML file. Paths in it are from its own folder. Raises RewardError."""
    file = Path(path).expanduser()
    document = read_yaml(file, RewardError)
    raw = _mapping(document, "a judge's file", [f.name for f in fields(JudgeSettings)])
    for key in ("base_url", "model", "rubric"):
        if key not in raw:
            raise RewardError(
                f"{document.where}: {key} is missing; a judge needs base_url, model and rubric"
            )
    kinds = typing.get_type_hints(JudgeSettings)
    values: dict[str, Any] = {}
    for f in fields(JudgeSettings):
        if f.name in raw and f.name not in ("rubric", "prices"):
            values[f.name] = _value(f.name, raw[f.name], kinds[f.name], document)
    values["rubric"] = _rubric(raw["rubric"], file, document)
    values["prices"] = _prices(raw.get("prices", {}), document)
    values.setdefault("name", file.stem)
    is_openai = _host(values["base_url"]) == OPENAI_HOST
    values.setdefault("api_key_env", OPENAI_KEY if is_openai else "")
    if isinstance(values.get("cache"), str):
        values["cache"] = str(file.parent / Path(values["cache"]).expanduser())
    settings = JudgeSettings(**values)
    _check_together(settings, raw, document)
    return settings


def judges_among(specs: Iterable[Any]) -> dict[str, JudgeSettings]:
    """The judges among rewards as a user names them, by that name. Raises RewardError."""
    return {
        spec: read_judge(spec.removeprefix("judge:"))
        for spec in specs
        if isinstance(spec, str) and is_judge(spec)
    }


def load_rubric(name_or_path: str, folder: Path = Path()) -> Rubric:
    """The shipped rubric of that name, or the one in that YAML file. Raises RewardError."""
    if name_or_path in SHIPPED_RUBRICS:
        where = f"{name_or_path}.yaml"
        text = resources.files("neat_align.rewards").joinpath("rubrics", where).read_text("utf-8")
        return _parsed_rubric(parse_yaml(text, where, RewardError))
    path = folder / Path(name_or_path).expanduser()
    looks_like_path = path.suffix in (".yaml", ".yml") or os.sep in name_or_path
    if not looks_like_path and not path.is_file():
        meant = did_you_mean(name_or_path, SHIPPED_RUBRICS)
        hint = f" D{meant[1:]}" if meant else ""
        raise RewardError(
            f"there is no rubric {name_or_path!r}.{hint} Shipped rubrics: "
            f"{', '.join(SHIPPED_RUBRICS)}. For one of your own, give the path of its .yaml file"
        )
    return _parsed_rubric(read_yaml(path, RewardError))


# ---- the judge's keys ----------------------------------------------------------------------------


def _mapping(document: YamlDocument, what: str, allowed: Sequence[str]) -> dict[str, Any]:
    raw = document.value
    if not isinstance(raw, dict):
        raise RewardError(
            f"{document.where}: {what} is a mapping with keys such as {', '.join(allowed[:3])}; "
            f"this is a {type(raw).__name__}"
        )
    for key in raw:
        if key not in allowed:
            where = document.place(str(key))
            if names_secret(str(key)):
                raise RewardError(
                    f"{where}: {key} would be a secret in a file: put it into an environment "
                    "variable, and that variable's name into api_key_env"
                )
            hint = did_you_mean(key, allowed) or "remove it;"
            raise RewardError(
                f"{where}: unknown key {str(key)!r}: {hint} allowed are {', '.join(allowed)}"
            )
    return raw


def _value(name: str, value: Any, kind: Any, document: YamlDocument) -> Any:
    """One key's value, if it is what the key takes. Raises RewardError."""
    if not _fits(value, kind):
        raise _wrong(document, name, value, _words(name, kind))
    if name in _CHOICES and value not in _CHOICES[name]:
        meant = did_you_mean(value, _CHOICES[name]).replace("'", "")  # as the list has it
        hint = f" ({meant})" if meant else ""
        raise _wrong(document, name, value, f"one of {', '.join(_CHOICES[name])}{hint}")
    if value is not None and not isinstance(value, bool | str | dict):
        low, high = _AT_LEAST.get(name, -math.inf), _AT_MOST.get(name, math.inf)
        is_late = name == "timeout" and not 0 < value < math.inf
        if is_late or not low <= value <= high:
            raise _wrong(document, name, value, _words(name, kind))
    if name in ("base_url", "model") and not value.strip():
        raise _wrong(document, name, value, "text that is not empty")
    return value


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # who asks there says what is wrong with it
        return None


def _fits(value: Any, kind: Any) -> bool:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    plain = [typing.get_origin(option) or option for option in options]
    plain = [str if option is Literal else option for option in plain]
    if isinstance(value, bool):
        return bool in plain
    if float in plain and isinstance(value, int):
        return True
    return any(isinstance(value, option) for option in plain)


def _words(name: str, kind: Any) -> str:
    if name in _CHOICES:
        return f"one of {', '.join(_CHOICES[name])}"
    if kind is bool:
        return "true or false"
    if kind is str:
        return "text"
    if name == "cache":
        return "true, false, or the path of a file"
    if name == "extra_body":
        return "a mapping"
    if name == "timeout":
        return "a number of seconds above 0"
    low, high = _AT_LEAST.get(name), _AT_MOST.get(name)
    number = "a whole number" if kind is int or name == "seed" else "a number"
    if low is None:
        return number
    return f"{number} of {low:g} or more" if high is None else f"{number} from {low:g} to {high:g}"


def _wrong(document: YamlDocument, name: str, value: Any, needed: str) -> RewardError:
    return RewardError(f"{document.place(name)}: {name} is {value!r}; it must be {needed}")


def _prices(raw: Any, document: YamlDocument) -> Prices:
    names = [f.name for f in fields(Prices)]
    inner = YamlDocument(raw, {}, f"{document.place('prices')}: prices")
    values = _mapping(inner, "prices", names)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise _wrong(inner, name, value, "what a million tokens cost, a number of 0 or more")
    return Prices(**{name: float(value) for name, value in values.items()})


def _check_together(
    settings: JudgeSettings, raw: Mapping[str, Any], document: YamlDocument
) -> None:
    for name, form in _ONLY_FOR.items():
        if name in raw and settings.form != form:
            raise RewardError(
                f"{document.place(name)}: {name} is read only with form: {form}, and form is "
                f"{settings.form}: remove it"
            )
    if "opponents" in raw and settings.against == "chosen":
        raise RewardError(
            f"{document.place('opponents')}: opponents is set, but against is chosen: each answer "
            "meets the row's chosen one alone; remove it"
        )
    low, high = settings.rubric.scale
    if settings.logprobs and (settings.explain or low < 0 or high > 9):
        raise RewardError(
            f"{document.place('logprobs')}: logprobs reads the score from the probabilities of one "
            f"token, so it needs explain: false and a scale within 0 to 9; explain is "
            f"{str(settings.explain).lower()} and the scale [{low}, {high}]"
        )
    variable = settings.api_key_env
    if variable and not names_secret(variable, of_environment=True):
        raise RewardError(
            f"{document.place('api_key_env')}: api_key_env is {variable!r}, which is no name by "
            "which a secret is recognised and kept out of files and messages: use a variable whose "
            "name ends in _API_KEY, such as MY_JUDGE_API_KEY (its name, not the key itself)"
        )


# ---- rubrics -------------------------------------------------------------------------------------


def _rubric(raw: Any, file: Path, document: YamlDocument) -> Rubric:
    if isinstance(raw, str):
        try:
            return load_rubric(raw, file.parent)
        except RewardError as error:
            raise RewardError(f"{document.place('rubric')}: {error}") from error
    inner = YamlDocument(raw, {}, f"{document.place('rubric')}: rubric")
    return _parsed_rubric(inner, file.stem)


def _parsed_rubric(document: YamlDocument, name: str | None = None) -> Rubric:
    raw = _mapping(document, "a rubric", _RUBRIC_KEYS)
    texts = {"name": name or Path(document.where).stem, "description": "", "source": ""}
    texts = {key: raw.get(key, default) for key, default in texts.items()}
    texts["criteria"] = raw.get("criteria", "")
    for key, value in texts.items():
        if not isinstance(value, str):
            raise _wrong(document, key, value, "text (put it in quotes)")
    if not texts["criteria"].strip():
        raise RewardError(
            f"{document.where}: criteria is missing: say what the judge is to look at, in a few "
            "sentences"
        )
    scale = _scale(raw.get("scale", [1, 10]), document)
    levels = _levels(raw.get("levels", {}), scale, document)
    return Rubric(**(texts | {"criteria": texts["criteria"].strip()}), scale=scale, levels=levels)


def _scale(raw: Any, document: YamlDocument) -> tuple[int, int]:
    are_whole = (
        isinstance(raw, list)
        and len(raw) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) for n in raw)
    )
    if not are_whole or raw[0] >= raw[1]:
        needed = "the lowest and the highest score, two whole numbers such as [1, 10]"
        raise _wrong(document, "scale", raw, needed)
    if raw[1] - raw[0] > _MOST_LEVELS:
        raise _wrong(document, "scale", raw, f"at most {_MOST_LEVELS} wide")
    return cast("tuple[int, int]", tuple(raw))


def _levels(raw: Any, scale: tuple[int, int], document: YamlDocument) -> dict[int, str]:
    if not isinstance(raw, dict):
        raise _wrong(document, "levels", raw, "a mapping of scores to what they mean")
    low, high = scale
    for score, meaning in raw.items():
        if isinstance(score, bool) or not isinstance(score, int) or not low <= score <= high:
            needed = f"whole numbers of the scale, {low} to {high}"
            raise RewardError(
                f"{document.where}: levels has the score {score!r}; it takes {needed}"
            )
        if not isinstance(meaning, str) or not meaning.strip():
            raise _wrong(document, f"levels[{score}]", meaning, "text that says what it means")
    return {score: raw[score].strip() for score in sorted(raw)}
