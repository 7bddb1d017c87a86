"""Seeds and draws that depend on their arguments alone: the same in every process, batch
and order.
"""

from __future__ import annotations

import hashlib
import json

from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair

# ---- Stable draws --------------------------------------------------------------------------------


def stable_hash(*parts: str | int) -> int:
    """The first 64 bits of a BLAKE2b hash: the same in every process, on every machine, in every
    order of calls.
    """
    return int.from_bytes(
        hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=8).digest(), "big"
    )


def draw_pair(
    bank: InstructionBank, *, run_seed: int, round_index: int, prompt_id: str
) -> InstructionPair:
    """The pair that a prompt is sampled with in a round; it depends on the arguments alone.

    Rounds draw anew.
    """
    return bank.pairs[stable_hash("pair", run_seed, round_index, prompt_id) % len(bank.pairs)]


def completion_seed(
    run_seed: int, round_index: int, prompt_id: str, origin: str, index: int
) -> int:
    """A completion's seed, in [0, 2**63): the same whatever the batch, the order, the ranks or an
    interruption.
    """
    return stable_hash("completion", run_seed, round_index, prompt_id, origin, index) >> 1
