"""Sampling with places that are filled again, against batches that wait for their longest.

    python benchmarks/refill.py --json OUT

`--prompts` prompts, `--k` completions each, `--batch` of them beside each other, of a small random
Llama. When a completion ends is decided by a hash of its last token and its length, so that lengths
have the distribution that is asked for:

  lognormal   median 0.3 of the most that is allowed, sigma 0.6; few are cut
  geometric   mean a quarter of the most, as when every token may be the last
  all cut     every completion is as long as it may be: nothing to gain

Sides, which draw the same completions: `batches`, one call of the sampler for each batch, as rounds
were sampled before; `refilled`, one call for all. Passes that read on and passes over prompts are
counted, and are the same on every machine and under every load; seconds are of the process's CPU
time on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from neat_align.rounds.sampling_stage import BATCHES_A_CALL, even_batches
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler

END, VOCAB = 0, 4096


def lognormal(most: int) -> list[float]:
    """How likely a completion is longer than n tokens."""
    return [0.5 * math.erfc(math.log(n / (0.3 * most)) / (0.6 * 2**0.5)) for n in range(1, most)]


def geometric(most: int) -> list[float]:
    return [(1 - 4 / most) ** n for n in range(1, most)]


def all_cut(most: int) -> list[float]:
    return [1.0] * (most - 1)


DISTRIBUTIONS = {"lognormal": lognormal, "geometric": geometric, "all cut": all_cut}


class Ending:
    """Lets a model's completions end as a distribution says, and counts what goes through it."""

    def __init__(self, model: Any, prompt: int, longer_than: list[float]) -> None:
        survival = [1.0, *longer_than]
        hazards = [1 - b / a if a else 1.0 for a, b in zip(survival, longer_than, strict=False)]
        self.hazards = torch.tensor([*hazards, 0.0], device=model.device)
        self.prompt = prompt
        self.prompt_passes = self.token_passes = self.rows = 0
        self._hook = model.register_forward_hook(self._end, with_kwargs=True)

    def _end(self, _: Any, __: Any, inputs: dict[str, Any], output: Any) -> None:
        if "position_ids" not in inputs:
            return
        tokens, at = inputs["input_ids"][:, -1], inputs["position_ids"][:, -1]
        if inputs["input_ids"].shape[1] > 1:
            self.prompt_passes += 1
        else:
            self.token_passes += 1
            self.rows += len(tokens)
        length = (at - self.prompt + 1).clamp(0, len(self.hazards) - 1)
        number = ((tokens * 7919 + at * 104_729) * 2_654_435_761 % 2**32).double() / 2**32
        ends = (number < self.hazards[length]) & (at >= self.prompt)
        output.logits[:, -1, END] = torch.where(ends, torch.inf, -torch.inf)
        output.logits[:, -1, 1:].masked_fill_(ends[:, None], -torch.inf)
        output.logits[:, -1, END].masked_fill_(ends, 0.0)

    def close(self) -> None:
        self._hook.remove()


def measured(
    args: Any, model: Any, name: str, requests: list[SampleRequest]
) -> dict[str, dict[str, Any]]:
    """Passes and seconds of both sides for a distribution of lengths."""
    sampler = TransformersSampler(model, (END,), 1, args.batch)
    params = SamplingParams(args.completion)
    sampler.settle([r.prompt_ids for r in requests])

    def batches() -> list[Sample]:
        parts = (part for _, part in even_batches(requests, args.batch))
        return [sample for part in parts for sample in sampler.sample(part, params)]

    def refilled() -> list[Sample]:
        return sampler.sample(requests, params)

    sides: dict[str, Callable[[], list[Sample]]] = {"batches": batches, "refilled": refilled}
    found: dict[str, dict[str, Any]] = {side: {"seconds": []} for side in sides}
    drawn: dict[str, list[Sample]] = {}
    clock = time.process_time if harness.device().type == "cpu" else time.perf_counter
    for number in range(args.repeats + 1):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            ending = Ending(model, args.prompt, DISTRIBUTIONS[name](args.completion))
            harness.synchronize()
            start = clock()
            drawn[side] = sides[side]()
            harness.synchronize()
            seconds = clock() - start
            ending.close()
            if number:
                found[side]["seconds"].append(seconds)
            found[side] |= {
                "passes that read on": ending.token_passes,
                "passes over prompts": ending.prompt_passes,
                "rows beside each other": ending.rows / max(1, ending.token_passes),
            }
    alike = [a.token_ids == b.token_ids for a, b in zip(*drawn.values(), strict=True)]
    lengths = sorted(len(s.token_ids) for s in drawn["refilled"])
    found["completions"] = {
        "alike on both sides": sum(alike),
        "of": len(alike),
        "mean length": sum(lengths) / len(lengths),
        "longest": lengths[-1],
        "cut": sum(s.finish_reason == "length" for s in drawn["refilled"]),
    }
    return found


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--completion", type=int, default=128, help="the most that is allowed")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    if args.prompts * args.k > args.batch * BATCHES_A_CALL:
        parser.error(f"a round's call is at most {BATCHES_A_CALL} batches")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(shape).to(harness.device()).eval()
    prompts = [tuple(torch.randint(2, VOCAB, (args.prompt,)).tolist()) for _ in range(args.prompts)]
    requests = [
        SampleRequest(prompt, 1000 * i + j)
        for i, prompt in enumerate(prompts)
        for j in range(args.k)
    ]
    result: dict[str, Any] = {
        "setting": {
            name: getattr(args, name) for name in ("prompt", "completion", "prompts", "k", "batch")
        }
        | {"device": harness.device().type, "weights": sum(p.numel() for p in model.parameters())}
    }
    rows = []
    for name in DISTRIBUTIONS:
        found = measured(args, model, name, requests)
        ours, before = found["refilled"], found["batches"]
        ratio = harness.speedup(before.pop("seconds"), ours.pop("seconds"))
        passes = before["passes that read on"] / ours["passes that read on"]
        result[name] = {**found, "passes_ratio": passes, "seconds_ratio": ratio}
        both = (f"{before[key]:.4g} / {ours[key]:.4g}" for key in ours)
        rows.append([name, *both, f"{passes:.2f}x", f"{ratio['median']:.2f}x"])
    columns = ["lengths", *ours, "fewer passes", "faster"]
    harness.show(f"{len(requests)} completions, batches / refilled", columns, rows)
    harness.save(args.json, result)


if __name__ == "__main__":
    main()
