"""comparison.json and examples.json as records for the page.

A missing piece is None or empty, a wrong file is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neat_align.errors import ConfigError, DataError
from neat_align.files.atomic import read_json
from neat_align.prompts.rows import Prompt
from neat_align.reporting.run_files import mapping, number

FORMAT = 1
# The start policy: what gains, intervals and wins are measured against.
BASE = "base"


@dataclass(frozen=True)
class Estimate:
    """A number with what is known around it: `delta` and its 95 % interval against base, or
    `low`/`high` around the mean.
    """

    mean: float | None = None
    delta: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Wins:
    """Shares of prompts won, tied and lost, and the 95 % interval of won minus lost."""

    win: float
    tie: float
    lose: float
    low: float | None = None
    high: float | None = None

    @property
    def net(self) -> float:
        """Share won minus share lost."""
        return self.win - self.lose

    def turned(self) -> Wins:
        """The same seen from the other side."""
        return Wins(
            self.lose,
            self.tie,
            self.win,
            None if self.high is None else -self.high,
            None if self.low is None else -self.low,
        )


@dataclass(frozen=True)
class MethodRow:
    """A method's line of the table. `at_equal_kl` is empty where its runs do not reach the common
    KL.

    `against` holds the paired differences to other methods, by method and then by `at_budget` or
    `at_equal_kl`.
    """

    runs: int | None = None
    collapsed: int = 0
    at_budget: dict[str, Estimate] = field(default_factory=dict)
    at_equal_kl: dict[str, Estimate] = field(default_factory=dict)
    wins: dict[str, Wins] = field(default_factory=dict)
    against: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodRun:
    """One training run; `collapsed` says why when it did. `points` are its evaluations, one a
    round.
    """

    method: str
    strength: str
    seed: int | None
    collapsed: str | None
    seconds: float | None
    trained_tokens: float | None
    points: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CurvePoint:
    """The mean over seeds after a round: KL to the start (nats per token) and each reward, with
    intervals.
    """

    round: int | None
    kl: Estimate
    collapsed: bool
    values: dict[str, Estimate]


@dataclass(frozen=True)
class Curve:
    """One method at one strength."""

    method: str
    strength: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Example:
    """One held-out prompt with each method's answer and its reward."""

    prompt: Prompt
    answers: dict[str, str]
    rewards: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """One comparison: one model, one data set, some methods.

    `facts` is the file's own mapping, for what is only shown.
    """

    name: str
    facts: dict[str, Any]
    seeds: tuple[int, ...]
    rewards: tuple[str, ...]
    judges: tuple[str, ...]
    kl_target: float | None
    methods: dict[str, dict[str, Any]]
    runs: tuple[MethodRun, ...]
    rows: dict[str, MethodRow]
    curves: tuple[Curve, ...]
    examples: tuple[Example, ...]
    problems: tuple[str, ...]

    @property
    def rivals(self) -> list[str]:
        """The methods that are compared with base, in display order."""
        return [name for name in self.methods if name != BASE]

    def row(self, method: str) -> MethodRow:
        """A method's line; an empty one where the table has none."""
        return self.rows.get(method, MethodRow())

    def collapsed(self, method: str) -> bool:
        """Whether any of the method's runs collapsed: such a method wins nothing."""
        return self.row(method).collapsed > 0

    def estimate(self, method: str, side: str, metric: str) -> Estimate | None:
        """What is known of a metric `at_budget` or `at_equal_kl`, where base is as at budget; None
        where nothing is.
        """
        row = self.row(method)
        at_budget = side == "at_budget" or method == BASE
        e = (row.at_budget if at_budget else row.at_equal_kl).get(metric)
        return e if e is not None and (e.mean is not None or e.delta is not None) else None

    def gains(self, side: str, metric: str = "reward") -> dict[str, Estimate]:
        """Each rival's estimate of a metric `at_budget` or `at_equal_kl`, where it has a gain over
        base.
        """
        estimates = {m: self.estimate(m, side, metric) for m in self.rivals}
        return {m: e for m, e in estimates.items() if e is not None and e.delta is not None}

    @property
    def scores(self) -> list[tuple[str, str]]:
        """(name in the file, name for a reader) of the trained reward and of each held-out
        judge.
        """
        return [("reward", self.reward_name), *((f"judges/{name}", name) for name in self.judges)]

    @property
    def reward_name(self) -> str:
        """The trained reward in words."""
        return f"reward ({' + '.join(self.rewards)})" if self.rewards else "reward"


def read_comparison(folder: Path) -> Comparison:
    """What `compare` left in a folder. Numbers may be missing anywhere and examples altogether.

    Raises ConfigError when the folder has no comparison, DataError when the file is not one that
    this version reads.
    """
    path = folder / "comparison.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no comparison.json: give the folder that `neat-align compare` wrote to"
        )
    try:
        facts = read_json(path)
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}): run the comparison again, or restore the file"
        ) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        came = (
            f"format {facts.get('format')!r}"
            if isinstance(facts, dict)
            else f"a {type(facts).__name__}"
        )
        raise DataError(
            f"{path}: came {came}, needed a mapping of format {FORMAT}: read it with the version "
            "of neat-align that wrote it"
        )
    problems: list[str] = []
    runs = tuple(_run(r) for r in _mappings(facts.get("runs")))
    rows = {str(r.get("method")): _row(r) for r in _mappings(facts.get("table"))}
    curves = tuple(_curve(c) for c in _mappings(facts.get("frontier")))
    methods = {str(m.get("name")): m for m in _mappings(facts.get("methods"))}
    for name in (*rows, *(r.method for r in runs), *(c.method for c in curves)):
        methods.setdefault(name, {})
    return Comparison(
        name=str(facts.get("name") or folder.resolve().name),
        facts=facts,
        seeds=tuple(s for s in _list(facts.get("seeds")) if isinstance(s, int)),
        rewards=tuple(map(str, _list(facts.get("rewards")))),
        judges=tuple(map(str, _list(facts.get("judges")))),
        kl_target=number(facts.get("kl_target")),
        methods=methods,
        runs=runs,
        rows=rows,
        curves=curves,
        examples=_examples(folder / "examples.json", problems),
        problems=tuple(problems),
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [v for v in _list(value) if isinstance(v, dict)]


def _count(value: Any) -> int | None:
    v = number(value)
    return None if v is None else int(v)


def _estimates(value: Any) -> dict[str, Estimate]:
    return {name: _estimate(v) for name, v in mapping(value).items() if isinstance(v, dict)}


def _estimate(v: dict[str, Any]) -> Estimate:
    low, high = number(v.get("low")), number(v.get("high"))
    if low is None or high is None:  # half an interval says nothing
        low = high = None
    return Estimate(
        number(v.get("mean")), number(v.get("delta")), low, high, number(v.get("ratio"))
    )


def _wins(value: Any) -> dict[str, Wins]:
    wins = {}
    for other, v in mapping(value).items():
        shares = mapping(v)
        win, tie, lose = (number(shares.get(name)) for name in ("win", "tie", "lose"))
        if win is None or lose is None:
            continue
        tie = 1 - win - lose if tie is None else tie
        ends = number(shares.get("net_low")), number(shares.get("net_high"))
        wins[other] = Wins(win, tie, lose, *ends)
    return wins


def _row(r: dict[str, Any]) -> MethodRow:
    sides = ("at_budget", "at_equal_kl")
    kept = _estimates(r.get("at_budget")), _estimates(r.get("at_equal_kl")), _wins(r.get("wins"))
    against = {
        other: {side: _estimates(mapping(v).get(side)) for side in sides}
        for other, v in mapping(r.get("against")).items()
    }
    return MethodRow(_count(r.get("runs")), _count(r.get("collapsed")) or 0, *kept, against)


def _run(r: dict[str, Any]) -> MethodRun:
    why = r.get("collapsed")
    return MethodRun(
        method=str(r.get("method")),
        strength=str(r.get("strength") or ""),
        seed=_count(r.get("seed")),
        collapsed=str(why) if why else None,
        seconds=number(r.get("seconds")),
        trained_tokens=number(r.get("trained_tokens")),
        points=tuple(_mappings(r.get("points"))),
    )


def _curve(c: dict[str, Any]) -> Curve:
    points = []
    for p in _mappings(c.get("points")):
        kl = _estimate({"mean": p.get("kl"), "low": p.get("kl_low"), "high": p.get("kl_high")})
        points.append(
            CurvePoint(_count(p.get("round")), kl, bool(p.get("collapsed")), _estimates(p))
        )
    return Curve(str(c.get("method")), str(c.get("strength") or ""), tuple(points))


def _examples(path: Path, problems: list[str]) -> tuple[Example, ...]:
    if not path.is_file():
        return ()
    try:
        rows = _mappings(read_json(path))
    except ValueError:
        problems.append("examples.json could not be read and is left out.")
        return ()
    return tuple(_example(row) for row in rows)


def _example(row: dict[str, Any]) -> Example:
    asked = row.get("prompt")
    prompt: Prompt
    if isinstance(asked, str):
        prompt = asked
    else:
        prompt = [{k: str(v) for k, v in m.items()} for m in _mappings(asked)]
    texts = {m: text for m, text in mapping(row.get("answers")).items() if isinstance(text, str)}
    rewards = mapping(row.get("rewards"))
    return Example(prompt, texts, {m: number(rewards.get(m)) for m in texts})
