"""The errors a user can meet. Each message says what came, what was needed, and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class NEATError(ValueError):
    """Base of every error that neat-align raises for the person at the keyboard."""


class ConfigError(NEATError):
    """A configuration that cannot train, or an option that the chosen mode would ignore."""


class DataError(NEATError):
    """A prompt or preference row that cannot be used; names file, line and field."""


class PromptError(NEATError):
    """An instruction, bank or chat template that would make a prompt wrong or the contrast
    empty.
    """


class RewardError(NEATError):
    """A reward function that raised, or returned something that is not a score."""


class RewardTimeoutError(RewardError):
    """A reward function that did not return within `reward_timeout`."""


class RewardUnavailableError(RewardError):
    """A reward server that stayed down through all retries: the run stops, and goes on from what it
    has when started again.
    """


class SamplerError(NEATError):
    """A sampler outside of this process that cannot be used, or gave what is no sample of the
    policy's.
    """


class SamplerUnavailableError(SamplerError):
    """A sampler's server that stayed down through all retries: the run stops, and goes on from what
    it has when started again.
    """


class CollapseError(NEATError):
    """Training cannot go on: too few pairs to rank are left, or a number is not finite.

    (A drift limit, `max_kl` or `min_distinct2_ratio`, ends a run in order: `stopped_because`.)
    """


class SaveError(NEATError):
    """A checkpoint that could not be written whole (a full disk, a missing file); nothing of it is
    left.
    """


class HubError(NEATError):
    """The Hugging Face hub did not take what it was asked to; the model stays where it is."""


class OtherProcessError(NEATError):
    """Another process of the run failed, and said why: this one only has to end, too."""


class RunInterrupted(SystemExit):
    """A run that SIGINT or SIGTERM ended at a place from which it goes on exactly.

    It is a SystemExit with code 128 + signal, so a script that lets it pass exits as shells and
    schedulers expect. `message` says how to go on; it was printed to stderr when this was raised.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number
        self.message = message

    def __str__(self) -> str:
        return self.message


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error says, on one line, for another one's message; its first `most` characters."""
    return " ".join(str(error).split())[:most]


def short(value: object) -> str:
    """A value for a message, of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def did_you_mean(name: object, known: Iterable[str], most: int = 1) -> str:
    """ "did you mean 'vader'?", for a name that is none of the known ones; "" where none is near.

    Upper and lower case count as the same.
    """
    by_lower = {word.lower(): word for word in sorted(known, reverse=True)}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=most)
    words = " or ".join(repr(by_lower[word]) for word in near)
    return f"did you mean {words}?" if words else ""


# Prompts that a message names; a batch may hold thousands.
NAMED = 8


def name_list(names: Sequence[str], separator: str = ", ") -> str:
    """Prompt ids for a message: the first few, and how many more."""
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - NAMED} more" if len(unique) > NAMED else ""
    return separator.join(unique[:NAMED]) + more
