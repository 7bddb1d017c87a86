"""What `quick.py` decides: whether a machine is quiet enough to tell, and which ratio has fallen.

Pure functions of numbers. A ratio is a peer's time over ours, so that lower is worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

# Under this share of the committed ratio a figure has fallen.
FALL = 0.8
# Under this share of the processor time that the committed figures had, others are at work here.
LEAST_CPU = 0.8
# Instructions by which CPUs multiply numbers of a type. Every CPU here multiplies fp32.
INSTRUCTIONS = {
    "fp32": frozenset[str](),
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"}),
}
# The demo's model and random weights of its shape do the same arithmetic.
SAME_ARITHMETIC = frozenset({"demo", "demo-shape"})

Verdict = Literal["holds", "fallen", "unclear"]


@dataclass(frozen=True)
class Noise:
    """What identical work showed of the machine.

    `pair` is the standard deviation of the logarithm of the ratio of two runs of the same work;
    `cpu_share` is the processor time that this process had, of what its threads could have had.
    """

    pair: float
    cpu_share: float

    def worse(self, other: Noise) -> Noise:
        """The noisier of both."""
        return Noise(max(self.pair, other.pair), min(self.cpu_share, other.cpu_share))


@dataclass(frozen=True)
class Here:
    """What the figures of this process depend on, besides the code."""

    model: str
    device: str
    threads: int
    instructions: frozenset[str]


# ---- noise ---------------------------------------------------------------------------------------


def pair_noise(seconds: Sequence[float]) -> float:
    """`Noise.pair` of runs of the same work, one after the other.

    Of runs in a row, since a ratio is taken of such: what the machine drifts by in minutes cancels
    in both. Their mean is known (the work is the same), so nothing is taken off for it.
    """
    steps = [math.log(later / before) for before, later in pairwise(seconds)]
    return math.sqrt(sum(step * step for step in steps) / len(steps))


def error_of_median(pair: float, pairs: int) -> float:
    """How far the median of so many ratios may be off: two standard errors, as a share of it.

    The standard error of a median of n normal values is √(π/2) of that of their mean.
    """
    return 2 * math.sqrt(math.pi / 2) * pair / math.sqrt(pairs)


def with_error_of(committed: float, now: float) -> float:
    """The error of a ratio of two figures, each with its own."""
    return math.hypot(committed, now)


def can_tell(error: float) -> bool:
    """Whether a figure that fell to `FALL` can be told from one that holds.

    The one reads at most FALL·(1 + error), the other at least 1 − error: they must not meet. With
    FALL at 0.8 that is an error of less than a ninth.
    """
    return FALL * (1 + error) < 1 - error


def has_the_machine(cpu_share: float, committed: float) -> bool:
    """Whether this process had about as much of its threads' time as when figures were made.

    A steady load of others slows two runs in a row alike: only this shows it.
    """
    return cpu_share >= LEAST_CPU * committed


# ---- one figure ----------------------------------------------------------------------------------


def verdict(ratio: float, committed: float, error: float) -> Verdict:
    """What a measured ratio says beside the committed one."""
    if not can_tell(error):
        return "unclear"
    return "fallen" if ratio < FALL * committed else "holds"


def ratio_of(peer: Sequence[float], ours: Sequence[float]) -> float:
    """The peer's time over ours: the median of the ratios of runs beside each other."""
    return median(p / o for p, o in zip(peer, ours, strict=True))


def why_not_compared(dtype: str, here: Here, committed: Here) -> str | None:
    """Why a figure of this number type says nothing beside the committed one; None if it does."""
    if here.model != committed.model and not {here.model, committed.model} <= SAME_ARITHMETIC:
        return f"measured on the model {committed.model}, here is {here.model}"
    if here.device != committed.device:
        return f"measured on {committed.device}, here is {here.device}"
    if here.threads != committed.threads:
        return f"measured with {committed.threads} threads, here are {here.threads}"
    known = INSTRUCTIONS[dtype]
    there, own = committed.instructions & known, here.instructions & known
    if there != own:
        return f"measured on a CPU with {_named(there)} for {dtype}, here is {_named(own)}"
    return None


def _named(instructions: Iterable[str]) -> str:
    return " and ".join(sorted(instructions)) or "no instructions"


# ---- the machine ---------------------------------------------------------------------------------


def instructions_in(cpuinfo: str) -> frozenset[str]:
    """Those of `INSTRUCTIONS` that Linux's /proc/cpuinfo names."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    words = [v.split() for name, _, v in lines if name.strip() in ("flags", "Features")]
    return frozenset().union(*INSTRUCTIONS.values()) & frozenset().union(*words)


def instructions_here() -> frozenset[str]:
    """The same of this machine; none where there is no such file."""
    path = Path("/proc/cpuinfo")
    return instructions_in(path.read_text(encoding="utf-8")) if path.is_file() else frozenset()


# ---- the committed file --------------------------------------------------------------------------


@dataclass(frozen=True)
class Committed:
    """The figures that were committed, how they were made, and by which commit."""

    ratios: Mapping[str, float]
    repeats: int
    noise: Noise
    here: Here
    commit: str


def as_result(
    ratios: Mapping[str, Mapping[str, Any]], repeats: int, noise: Noise, here: Here
) -> dict[str, Any]:
    """What the result file holds, besides what every such file does."""
    return {
        "setting": {
            "model": here.model,
            "device": here.device,
            "threads": here.threads,
            "instructions": sorted(here.instructions),
            "repeats": repeats,
        },
        "noise": {"pair": noise.pair, "cpu_share": noise.cpu_share},
        "figures": {name: dict(figure) for name, figure in ratios.items()},
    }


def from_result(result: Mapping[str, Any]) -> Committed:
    """The inverse, of a whole result file."""
    s = result["setting"]
    return Committed(
        ratios={name: figure["ratio"] for name, figure in result["figures"].items()},
        repeats=s["repeats"],
        noise=Noise(result["noise"]["pair"], result["noise"]["cpu_share"]),
        here=Here(s["model"], s["device"], s["threads"], frozenset(s["instructions"])),
        commit=str(result["commit"]),
    )
