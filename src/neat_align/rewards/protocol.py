"""What a reward function is, and what scoring gives back. No torch here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from neat_align.prompts.rows import Message, Prompt

# Text, or the assistant's message(s) as TRL passes them.
CompletionInput: TypeAlias = str | list[Message]
# A shipped name ("vader", "minilm_tone"), a server's URL ("https://host/path"),
# "package.module:function", the name or path of a sequence-classification model, such a model
# itself (a `PreTrainedModel` is a callable), or a reward function.
RewardSpec: TypeAlias = str | Callable[..., Any]


@runtime_checkable
class RewardFunction(Protocol):
    """TRL's signature: one number a row, higher is better, and `None` abstains.

    `columns` are the data's other columns.

    A round is scored in batches of whole groups, about 64 rows each: all completions of one prompt
    come in one call, and nothing may be read from where a batch begins or ends.
    """

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> Sequence[float | None] | Awaitable[Sequence[float | None]]:
        """Score every row."""
        ...


@dataclass(frozen=True)
class NamedReward:
    """A reward function, the name it is logged under, and its weight in the sum.

    A reward of weight 0 is logged and never trained on.

    `timeout` is in seconds a call. A function that runs past it is left alone in its thread, since
    threads cannot be ended; an async one is cancelled.
    """

    name: str
    function: RewardFunction
    weight: float
    timeout: float | None = None


@dataclass(frozen=True)
class ScoredRows:
    """One entry a row.

    `components` has one number a function, unweighted; `rewards` is their weighted sum, or None.
    """

    rewards: tuple[float | None, ...]
    components: tuple[tuple[float | None, ...], ...]


def completion_text(completion: CompletionInput) -> str:
    """The text of a completion, whichever form it comes in."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion)
