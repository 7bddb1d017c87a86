"""What a run takes of time and memory: said before anything is paid for, from a few timed passes.

The same passes find a machine whose threads are in each other's way.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from neat_align.config import NEATConfig
from neat_align.modeling.memory_estimate import GIB
from neat_align.runs.plan import WIDTH, RunPlan
from neat_align.sampling.policies import Policies
from neat_align.sampling.protocol import Sampler, SampleRequest, SamplingParams
from neat_align.trainer.memory_plan import memory_now
from neat_align.trainer.setup import PolicySetup, TrainingData

# The rows that are timed: one prompt, so many completions of so many tokens.
_PROMPT, _COMPLETIONS, _COMPLETION = 64, 4, 48
# Sampling is timed as the difference of a longer and a shorter call, in which the prompt's reading
# and a copy of the weights cancel out.
_SHORT, _LONG = 1, 5
# Two tries that take as long as each other, to so much, were disturbed by nothing.
_AGREE, _TRIES = 1.1, 3
# One thread that is so many times as fast as all of them together is worth a warning: a tiny model
# alone is a little faster on one.
_CONTENDED = 1.5
# A token that is learned from is read forward, and backward at twice the cost.
_LEARNED = 3


@dataclass(frozen=True)
class Pace:
    """How fast this process is, in tokens a second: it reads them (log-probabilities) and writes
    them (sampling; None: another engine does). `one_thread` is how many times as fast it reads on a
    single thread; None where that was not tried.
    """

    reads: float
    writes: float | None
    one_thread: float | None

    def warning(self, threads: int) -> str | None:
        """What to do about threads that are in each other's way; None: nothing."""
        if self.one_thread is None or self.one_thread < _CONTENDED:
            return None
        return (
            f"one thread is {self.one_thread:.1f} times as fast here as {threads}: other work runs "
            "on these cores. Set OMP_NUM_THREADS=1, or let the other work end"
        )


def measured_pace(policies: Policies, *, at_once: int, sampler: Sampler | None) -> Pace:
    """Time a few passes of the current policy, some seconds in all.

    `at_once`: completions that are sampled beside each other. `sampler` draws from the policy in
    this process (None: another engine does).
    """
    size = int(cast("Any", policies.model).get_input_embeddings().weight.shape[0])
    prompt = tuple(3 + i % (size - 3) for i in range(_PROMPT))
    rows = [tuple(5 + (7 * i + j) % (size - 5) for j in range(_COMPLETION)) for i in range(4)]

    def read() -> None:
        policies.logprobs([prompt] * _COMPLETIONS, rows)

    tokens = _PROMPT + _COMPLETIONS * _COMPLETION
    seconds = _seconds(read)
    threads, one = torch.get_num_threads(), None
    if threads > 1 and next(policies.model.parameters()).device.type == "cpu":
        torch.set_num_threads(1)
        try:
            one = seconds / _seconds(read, tries=1)
            if one > 1:  # or else no other try would make it a reason for a warning
                one = max(one, seconds / _seconds(read, tries=1))
        finally:
            torch.set_num_threads(threads)
    writes = None if sampler is None else _writes(sampler, prompt, at_once)
    return Pace(tokens / seconds, writes, one)


def _writes(sampler: Sampler, prompt: tuple[int, ...], at_once: int) -> float:
    requests = [SampleRequest(prompt, i) for i in range(at_once)]
    short, long = (
        _seconds(lambda n=n: sampler.sample(requests, SamplingParams(n)))  # type: ignore[misc]
        for n in (_SHORT, _LONG)
    )
    return at_once * (_LONG - _SHORT) / max(long - short, 1e-3)


def _seconds(work: Callable[[], object], tries: int = _TRIES) -> float:
    """The fastest of a few tries, which was disturbed least; two that agree are enough.

    The first one may allocate what the others have then.
    """
    taken: list[float] = []
    while len(taken) < tries and not (len(taken) == 2 and max(taken) < _AGREE * min(taken)):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        start = time.perf_counter()
        work()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - start)
    return max(min(taken), 1e-6)


def seconds_at_most(args: NEATConfig, plan: RunPlan, pace: Pace, eval_rows: int) -> float:
    """How long the run takes if every completion is as long as it may be; rewards not counted.

    Read: prompts under either instruction, what the start policy scores, what is learned from (and
    computed again with checkpointing), what teachers read under instructions, two evaluations.
    """
    written = plan.completions * plan.max_completion_length
    prompts = plan.prompt_tokens or plan.prompts * args.max_prompt_length
    learned = _LEARNED + bool(args.activation_checkpointing)
    passes = learned + args.needs_reference + 2 * args.contrast_pairs
    read = 2 * prompts + passes * (prompts + written)
    if args.num_eval_prompts is not None:
        eval_rows = min(eval_rows, args.num_eval_prompts)
    answers = eval_rows * (args.num_eval_generations + 2 * args.evaluate_contrast)
    evaluated = 2 * answers * plan.max_completion_length
    read += evaluated
    seconds: float = read / pace.reads
    if pace.writes is not None:
        seconds += (written + evaluated) / pace.writes
    return seconds / int(args.world_size)


def outlook(
    args: NEATConfig,
    setup: PolicySetup,
    data: TrainingData,
    policies: Policies,
    plan: RunPlan,
    *,
    sharded: bool,
    sampler: Sampler | None = None,
) -> list[str]:
    """Memory and time in lines of at most 80 columns; time is measured, so it takes seconds.

    `sampler` draws from the current policy; None makes one where this process samples. Where ranks
    share the weights nothing is timed: a pass is a call that all have to make.
    """
    memory = memory_now(args, setup, data)
    lines = []
    if memory is not None and memory.room is not None:
        when = "learning" if memory.estimate.training >= memory.estimate.total else "sampling"
        lines.append(
            f"memory: about {memory.estimate.total / GIB:.1f} of {memory.room / GIB:.1f} GiB on "
            f"{memory.device}, most of it while {when}"
        )
    if not sharded:
        sampled = plan.prompts_per_round * plan.completions_per_prompt
        at_once = max(1, min(args.generation_batch_size, sampled))
        writes = sampled > 0 and policies.make_sampler is None
        drawing = (sampler or policies.sampler()) if writes else None
        pace = measured_pace(policies, at_once=at_once, sampler=drawing)
        lines.append(f"time: {_said(args, plan, pace, len(data.eval_rows or ()))}")
        if warning := pace.warning(torch.get_num_threads()):
            lines.append(f"warning: {warning}")
    return [
        line
        for text in lines
        for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    ]


def _said(args: NEATConfig, plan: RunPlan, pace: Pace, eval_rows: int) -> str:
    minutes = seconds_at_most(args, plan, pace, eval_rows) / 60
    most = f"{minutes:.0f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"
    if minutes >= 120:
        most = f"{minutes / 60:.1f} hours"
    speeds = f"reads {pace.reads:,.0f} tokens/s"
    besides = "rewards come on top"
    if pace.writes is not None:
        speeds += f", writes {pace.writes:,.0f}"
    elif plan.completions:
        besides = "another engine's sampling and rewards come on top"
    return f"at most about {most} ({speeds}; {besides})"
