"""Sampling: our sampler against the generation of TRL's GRPOTrainer.

The same number of sequences and tokens.

    python benchmarks/generation.py --json OUT

`--prompts` prompts of P tokens, K completions of exactly R tokens each; tokens per second counts
completion tokens.

  neat        TransformersSampler: the prompt read once for its completions; on a CPU in bf16, from
              the bf16 copy that rounds are sampled from (making the copy is counted)
  trl         GRPOTrainer._generate_single_turn, with transformers' `generate`
  continuous  transformers' continuous batching (`generate_batch`), bf16 copy
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
import transformers
from round import text_of

from neat_align.modeling.precision import half_precision_copy
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler


def make_sides(args: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """Functions that sample everything once and give the number of tokens that they sampled."""
    model, tokenizer = harness.load_model(args.model).to(harness.device()), harness.load_tokenizer()
    tokenizer.chat_template = None
    texts = [text_of(tokenizer, args.prompt, i) for i in range(args.prompts)]
    autocast = harness.DTYPES[args.dtype]

    def neat() -> int:
        policy, dtype = model, autocast
        if autocast is not None and harness.device().type == "cpu":
            policy, dtype = half_precision_copy(model, autocast), None
        asked = [
            SampleRequest(tuple(tokenizer(t).input_ids), 1000 * i + k)
            for i, t in enumerate(texts)
            for k in range(args.k)
        ]
        sampler = TransformersSampler(policy, (), tokenizer.pad_token_id, args.batch, dtype)
        return sum(len(s.token_ids) for s in sampler.sample(asked, SamplingParams(args.completion)))

    sides: dict[str, Callable[[], int]] = {"neat": neat, "trl": trl_side(args, tokenizer, texts)}
    if args.continuous:
        sides["continuous"] = continuous_side(args, tokenizer, texts)
    return sides


def trl_side(args: argparse.Namespace, tokenizer: Any, texts: list[str]) -> Callable[[], int]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        bf16=args.dtype == "bf16",
        use_cpu=harness.device().type == "cpu",
        report_to="none",
        per_device_train_batch_size=args.k,
        num_generations=args.k,
        max_completion_length=args.completion,
        generation_kwargs={"min_new_tokens": args.completion},
    )
    rows = Dataset.from_dict({"prompt": texts})
    trainer = GRPOTrainer(
        harness.load_model(args.model),
        lambda completions, **_: [0.0] * len(completions),
        settings,
        rows,
        processing_class=tokenizer,
    )
    # What `train` does before its first step: autocast goes around the model.
    trainer.model_wrapped = trainer.model = trainer.accelerator.prepare(trainer.model)
    prompts = [tokenizer(t).input_ids for t in texts for _ in range(args.k)]

    def trl() -> int:
        batches = [
            prompts[start : start + args.batch] for start in range(0, len(prompts), args.batch)
        ]
        return sum(
            len(ids)
            for batch in batches
            for ids in trainer._generate_single_turn(batch, None, {}, args.k)[0]
        )

    return trl


def continuous_side(
    args: argparse.Namespace, tokenizer: Any, texts: list[str]
) -> Callable[[], int]:
    from transformers import GenerationConfig

    dtype = harness.DTYPES[args.dtype]
    model = harness.load_model(args.model).to(harness.device())
    model = half_precision_copy(model, dtype) if dtype is not None else model.eval()
    config = GenerationConfig(
        max_new_tokens=args.completion,
        do_sample=True,
        eos_token_id=-1,
        pad_token_id=tokenizer.pad_token_id,
    )
    inputs = [tokenizer(t).input_ids for t in texts for _ in range(args.k)]

    def continuous() -> int:
        with torch.no_grad():
            outputs = model.generate_batch(
                inputs=inputs, generation_config=config, progress_bar=False
            )
        return sum(len(o.generated_tokens) for o in outputs.values())

    return continuous


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="sequences at once, on every side")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="bf16")
    parser.add_argument(
        "--continuous", action="store_true", help="also transformers' continuous batching"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    sides = make_sides(args)
    wanted = args.prompts * args.k * args.completion
    for name, side in sides.items():
        sampled = side()
        assert sampled == wanted, f"{name} sampled {sampled} tokens instead of {wanted}"
    seconds = harness.in_turn(sides, args.repeats)
    medians = {name: harness.spread(values)["median"] for name, values in seconds.items()}
    rows = [
        [n, f"{m:.2f}", f"{wanted / m:.0f}", f"{m / medians['neat']:.2f}x"]
        for n, m in medians.items()
    ]
    title = (
        f"{args.prompts} prompts of {args.prompt} tokens, {args.k} completions of "
        f"{args.completion}, {args.dtype}"
    )
    harness.show(title, ["side", "seconds", "tokens/s", "over ours"], rows)
    setting = {
        k: getattr(args, k)
        for k in ("prompt", "completion", "k", "prompts", "batch", "dtype", "model")
    }
    result: dict[str, Any] = {
        "setting": {**setting, "device": harness.device().type},
        "seconds": {name: harness.spread(values) for name, values in seconds.items()},
        "tokens_per_second": {name: wanted / m for name, m in medians.items()},
    }
    for name in list(sides)[1:]:
        result[f"speedup_vs_{name}"] = harness.speedup(seconds[name], seconds["neat"])["median"]
    harness.save(args.json, result)


if __name__ == "__main__":
    main()
