"""What a reward function is, and what scoring gives back. No torch here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from neat_align.network.server_url import Target
from neat_align.prompts.rows import Message, Prompt

# Text, or the assistant's message(s) as TRL passes them.
CompletionInput: TypeAlias = str | list[Message]
# A shipped name (`resolve.SHIPPED`), a server's URL ("https://host/path"), a judge
# ("judge:FILE.yaml"), a reward model behind vLLM ("vllm:URL"), "package.module:function", the name
# or path of a sequence-classification model, such a model itself (a `PreTrainedModel` is a
# callable), or a reward function.
RewardSpec: TypeAlias = str | Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Unscorable:
    """What a reward function returns in place of a number for a row that it cannot score, such as
    one over its model's context.

    `reason` goes on from the row's name: "has 600 tokens, and the model takes 512". It is not an
    abstention (None): a row that one function cannot score has no reward at all, for the sum of the
    others would be another scale.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class RewardSum:
    """Reward functions as a user names them, and what each counts in their sum (None: 1 each)."""

    funcs: RewardSpec | Sequence[RewardSpec]
    weights: Sequence[float] | None = None


Score: TypeAlias = float | Unscorable | None


@runtime_checkable
class RewardFunction(Protocol):
    """TRL's signature: one number a row, higher is better, and `None` abstains.

    `columns` are the data's other columns. Everything is a deep copy of this call's own, which the
    function may change and keep; only objects that Python cannot copy (locks, open files) are the
    data's own.

    The data's own answers are given where the signature names them: `chosen` and `rejected`, a text
    or None a row. So are three of TRL's arguments: `trainer_state`, a copy of
    transformers' TrainerState (None outside of a trainer); `log_metric(name, value)`, a number that
    is averaged over the round, or the evaluation, and logged; `log_extra(column, values)`, one
    value a row, kept beside the completions (`rounds/*/reward-extra.jsonl`). `log_total(name,
    value)`, of ours, is a number that is added up in place of averaged: tokens, or money.

    A round is scored in batches of whole groups, about 64 rows each: all completions of one prompt
    come in one call, and nothing may be read from where a batch begins or ends. A call that runs
    out of memory (MemoryError, torch's OutOfMemoryError, HTTP 413) is made again on fewer prompts;
    after any other exception a function is not called again.

    Async functions run in one event loop for the life of the process, so they may keep clients and
    locks between calls; these must be made inside the function, not before.
    """

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> Sequence[Score] | Awaitable[Sequence[Score]]:
        """Score every row."""
        ...


@runtime_checkable
class ChecksPrompts(Protocol):
    """A reward function that can tell before anything is sampled which prompts it cannot score."""

    def unscorable_prompts(self, prompts: Sequence[Prompt]) -> Mapping[int, str]:
        """The reason by the prompt's position, for prompts no answer to which can be scored."""
        ...


@runtime_checkable
class AsksServer(Protocol):
    """A reward function that asks a server; its tries and pauses have limits of their own."""

    @property
    def target(self) -> Target:
        """Where the server is."""
        ...

    @property
    def token_variable(self) -> str | None:
        """The environment variable with the token that is sent there; None where none is."""
        ...


@runtime_checkable
class ChecksAnswers(Protocol):
    """A reward function that compares with the data's own answer, and can tell before anything is
    sampled where there is none.
    """

    def unscorable_answers(self, chosen: Sequence[str | None]) -> Mapping[int, str]:
        """The reason by the row's position, for rows no answer to which can be scored."""
        ...


@dataclass(frozen=True)
class NamedReward:
    """A reward function, the name it is logged under, and its weight in the sum.

    A reward of weight 0 is logged and never trained on.

    `timeout` is in seconds a call. A function that runs past it is left alone in its thread, since
    threads cannot be ended; an async one is cancelled. `trainer_state` gives the state that a
    function may ask for.
    """

    name: str
    function: RewardFunction
    weight: float
    timeout: float | None = None
    trainer_state: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that has no reward because a function could not score it; `row` is its position."""

    row: int
    reward: str
    reason: str


@dataclass(frozen=True)
class ScoredRows:
    """One entry a row.

    `components` has one number a function, unweighted; `rewards` is their weighted sum, or None.
    `left_out` are the rows that a function could not score. `metrics` has the numbers that
    functions logged under a name, one a call; `totals` those that were to be added up; `extra` the
    columns that they logged, one value a row, as JSON.
    """

    rewards: tuple[float | None, ...]
    components: tuple[tuple[float | None, ...], ...]
    left_out: tuple[LeftOut, ...] = ()
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    extra: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)


def completion_text(completion: CompletionInput) -> str:
    """The text of a completion, whichever form it comes in."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion)
