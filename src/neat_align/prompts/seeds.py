"""Seeds and draws that depend on their arguments alone: the same in every process and order."""

from __future__ import annotations

import hashlib
import json

from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair


def draw_pair(
    bank: InstructionBank, *, run_seed: int, round_index: int, prompt_id: str
) -> InstructionPair:
    """The pair that a prompt is sampled with in a round; every round draws anew."""
    return bank.pairs[stable_hash("pair", run_seed, round_index, prompt_id) % len(bank.pairs)]


def draw_pairs(
    bank: InstructionBank, count: int, *, run_seed: int, round_index: int, prompt_id: str
) -> tuple[InstructionPair, ...]:
    """`count` different pairs for a prompt in a round, the one of `draw_pair` first.

    All pairs of the bank where it has no more than `count`.
    """
    first = draw_pair(bank, run_seed=run_seed, round_index=round_index, prompt_id=prompt_id)
    others = [pair for pair in bank.pairs if pair != first]

    def draw(pair: InstructionPair) -> int:
        texts = (pair.positive, pair.negative)
        return stable_hash("pairs", run_seed, round_index, prompt_id, *texts)

    return (first, *sorted(others, key=draw)[: count - 1])


def completion_seed(
    run_seed: int, round_index: int, prompt_id: str, origin: str, index: int
) -> int:
    """A completion's seed, in [0, 2**63).

    The same whatever the batch, the order, the number of processes or an interruption.
    """
    return stable_hash("completion", run_seed, round_index, prompt_id, origin, index) >> 1


def stable_hash(*parts: str | int) -> int:
    """A BLAKE2b hash in [0, 2**64): the same in every process and on every machine."""
    digest = hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
