"""One whole round (sample, score, train one step) against one step of TRL's online trainers.

On equal work.

    python benchmarks/round.py --json OUT

Every side starts from the same weights and gets the same prompts of P tokens, samples K completions
of exactly R tokens for each (no end token is accepted), scores them with the same reward, and takes
one AdamW step on all weights. Timed from the start of training to the end of its first step, the
sides in turn.

  neat        NEATTrainer, half of the completions positive and half negative: its prompts carry the
              instruction on top, and it computes the log-probabilities that it logs. On a CPU it
              samples from a bf16 copy. No drift measurement
  grpo        TRL's GRPOTrainer, without a KL term (its default): no reference model runs
  online_dpo  TRL's experimental OnlineDPOTrainer, which samples two completions a prompt (--k 2)
              and runs a reference model
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import harness
import transformers
from datasets import Dataset
from transformers import TrainerCallback

from neat_align import NEATConfig, NEATTrainer
from neat_align.trainer import parts

TEXT = (
    "my neighbour asked whether the old bicycle in the yard could be mended "
    "before the summer fair and I said that I would look at it soon"
)
WORDS = TEXT.split()


def text_of(tokenizer: Any, tokens: int, number: int) -> str:
    """A text of exactly so many tokens, another one for every number."""
    words = [f"{number}:"]
    while len(tokenizer(" ".join(words)).input_ids) < tokens:
        words.append(WORDS[(number + len(words)) % len(WORDS)])
    text = " ".join(words)
    while len(tokenizer(text).input_ids) > tokens:
        text = text[:-1]
    return text


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Cheap, and different for different completions."""
    return [sum(map(ord, c)) % 97 / 97 for c in completions]


class Clock(TrainerCallback):
    """Seconds from the start of training to the end of the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        harness.synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        harness.synchronize()
        self.seconds = time.perf_counter() - self.start
        control.should_training_stop = True


def common(args: Any, folder: str) -> dict[str, Any]:
    """Training arguments of every side."""
    return {
        "output_dir": folder,
        "bf16": args.dtype == "bf16",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-6,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
    }


def neat(args: Any, model: Any, tokenizer: Any, texts: list[str], folder: str) -> Any:
    settings = NEATConfig(
        **common(args, folder),
        per_device_train_batch_size=args.prompts,
        prompts_per_round=args.prompts,
        num_positive=args.k - args.k // 2,
        num_negative=args.k // 2,
        num_plain=0,
        max_completion_length=args.completion,
        max_tokens_per_micro_batch=args.max_tokens,
        drift_prompts=0,
    )
    rows = [{"prompt": t} for t in texts]
    # No end token, so that every completion has its full length.
    with patch.object(parts, "eos_token_ids", return_value=()):
        return NEATTrainer(model, reward, settings, rows, processing_class=tokenizer)


def grpo(args: Any, model: Any, tokenizer: Any, texts: list[str], folder: str) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        **common(args, folder),
        use_cpu=harness.device().type == "cpu",
        per_device_train_batch_size=args.rows,
        gradient_accumulation_steps=args.prompts * args.k // args.rows,
        num_generations=args.k,
        max_completion_length=args.completion,
        generation_kwargs={"min_new_tokens": args.completion},
    )
    return GRPOTrainer(
        model, reward, settings, Dataset.from_dict({"prompt": texts}), processing_class=tokenizer
    )


def online_dpo(args: Any, model: Any, tokenizer: Any, texts: list[str], folder: str) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    settings = OnlineDPOConfig(
        **common(args, folder),
        use_cpu=harness.device().type == "cpu",
        per_device_train_batch_size=max(1, args.rows // 2),
        gradient_accumulation_steps=args.prompts // max(1, args.rows // 2),
        max_new_tokens=args.completion,
        max_length=2 * (args.prompt + args.completion),
        temperature=1.0,
        generation_kwargs={"min_new_tokens": args.completion},
    )
    rows = Dataset.from_dict({"prompt": texts})
    return OnlineDPOTrainer(
        model, reward_funcs=reward, args=settings, train_dataset=rows, processing_class=tokenizer
    )


PEERS: dict[str, Callable[..., Any]] = {"grpo": grpo, "online_dpo": online_dpo}


def one_step(
    make: Callable[..., Any], args: Any, base: Any, tokenizer: Any, texts: list[str]
) -> tuple[float, float | None]:
    """Seconds of a fresh trainer's first step, and the share of completions that ours kept."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = make(args, copy.deepcopy(base), copy.deepcopy(tokenizer), texts, folder)
        trainer.add_callback(clock)
        trainer.train()
        # While the folder is there: groups are read from its files.
        kept = share_kept(trainer, args) if isinstance(trainer, NEATTrainer) else None
    return clock.seconds, kept


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--peer", choices=list(PEERS), default="grpo")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="the peer's rows per forward pass")
    parser.add_argument("--max-tokens", type=int, default=4096, help="our tokens per forward pass")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="bf16")
    args = parser.parse_args()
    if args.peer == "online_dpo" and args.k != 2:
        raise SystemExit("online_dpo samples two completions a prompt: give --k 2")
    return args


def share_kept(trainer: NEATTrainer, args: argparse.Namespace) -> float:
    """Share of our completions that are left after filtering; the work must be equal."""
    trained = [c for g in trainer.rounds.groups for c in g.completions]
    assert {len(c.token_ids) for c in trained} == {args.completion}
    kept = len(trained) / (args.prompts * args.k)
    assert kept > 0.95, (
        f"only {kept:.0%} of the completions are left after filtering: the work is not equal"
    )
    return kept


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    base, tokenizer = harness.load_model(args.model), harness.load_tokenizer()
    tokenizer.chat_template = None
    texts = [text_of(tokenizer, args.prompt, i) for i in range(args.prompts)]
    sides = {"neat": neat, args.peer: PEERS[args.peer]}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    kept: float | None = None
    for number in range(args.repeats + 1):
        for name, make in sides.items():
            taken, share = one_step(make, args, base, tokenizer, texts)
            kept = kept if share is None else share
            if number > 0:
                seconds[name].append(taken)
    ratio = harness.speedup(seconds[args.peer], seconds["neat"])
    rows = []
    for name, values in seconds.items():
        s = harness.spread(values)
        over = s["median"] / harness.spread(seconds["neat"])["median"]
        rows.append([name, f"{s['median']:.2f}", f"{s['min']:.2f}–{s['max']:.2f}", f"{over:.2f}x"])
    title = (
        f"a round of {args.prompts} prompts of {args.prompt} tokens, {args.k} completions of "
        f"{args.completion}, {args.dtype}"
    )
    harness.show(title, ["side", "seconds", "range", "over ours"], rows)
    names = ("peer", "prompt", "completion", "k", "prompts", "rows", "max_tokens", "dtype", "model")
    setting = {name: getattr(args, name) for name in names}
    result = {
        "setting": {**setting, "device": harness.device().type},
        "seconds": {name: harness.spread(values) for name, values in seconds.items()},
        "share_of_our_completions_trained_on": kept,
        "speedup_vs_trl": ratio["median"],
        "speedup_vs_trl_range": [ratio["min"], ratio["max"]],
    }
    harness.save(args.json, result)


if __name__ == "__main__":
    main()
