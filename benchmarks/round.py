"""One whole round (sample, score, train one step) against one step of TRL's online trainers.

On equal work.

    python benchmarks/round.py --json OUT

Every side starts from the same weights and gets the same prompts of P tokens, samples K completions
of exactly R tokens for each (no end token is accepted), scores them with the same reward, and takes
one AdamW step on all weights, which stay in fp32 (`--dtype bf16` is autocast). Timed from the start
of training to the end of its first step, the sides in turn. The result file has what each side was
configured with, and how long our stages took (`our_stages`).

  neat        NEATTrainer, half of the completions positive and half negative: its prompts carry the
              instruction on top, and it computes the log-probabilities that it logs. On a CPU it
              samples from a bf16 copy. No drift measurement. Its KL term, which scores every
              completion under the start policy, is on (its default) where the peer has a reference
              model and off where it has none
  grpo        TRL's GRPOTrainer, without a KL term (its default): no reference model runs. Its loss
              is chunked: since 1.16 that is no option
  grpo_kl     the same with a KL term (beta 0.04), and so with a reference model
  grpo_best   the same, with every setting that a careful user of a CPU would change and that leaves
              the work equal:
                torch.set_float32_matmul_precision("medium")  the chunked loss multiplies its
                    gradients in fp32, also under autocast; this lets oneDNN do it in bf16, which is
                    how everything else of the step is multiplied. With --dtype bf16 only
              Those that are set as they should be in `grpo` already: gradient checkpointing off,
              all completions sampled at once (steps_per_generation), beta 0, one iteration, fused
              AdamW, bf16 autocast, no completions logged
  grpo_compact_head  grpo_best with TRL's code changed in one place, which no setting does: off
              CUDA and XPU its loss takes the vocabulary's logits of the prompts, too, and throws
              them away; here it takes the completions' alone
  grpo_bf16_weights  grpo_best with weights in bf16. NOT equal work: a step of the usual size is
              less than bf16 can tell, so that most weights do not move
  online_dpo  TRL's experimental OnlineDPOTrainer, which samples two completions a prompt (--k 2)
              and runs a reference model
  online_dpo_best  the same, with all prompts in one batch, since it samples batch by batch

Tried on a CPU, and left out (`round_settings.py` times those that run):
  attn_implementation="eager"  faster with short prompts, whose backward pass is slow in torch's
              fused attention on a CPU; slower with prompts of 256 tokens
  more or fewer rows a forward pass (grpo)  no difference beyond the noise; --rows sets them
  cache_implementation="static"  fails under autocast: a cache in fp32, keys in bf16; and it reads
              the whole length at every token
  torch_compile  compiles for longer than many steps take, and again for another length
  use_transformers_continuous_batching  turns the weights to bf16, for good: as grpo_bf16_weights
  use_vllm    a server gets its weights by NCCL, which refuses a CPU; the other mode wants vLLM,
              which has other versions of torch and transformers, in the trainer's own process
  use_liger_kernel, use_kernels  Triton and CUDA
  cast_lm_head_to_fp32  slower, and not for tied embeddings
  entropy     it is computed for the log whatever is set; top_entropy_quantile only adds to it
  loss_type, mask_truncated_completions, disable_dropout, dataloader's workers  no time in them:
              the model has no dropout, and the data are a few strings
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import harness
import torch
import transformers
from datasets import Dataset
from transformers import TrainerCallback

from neat_align import NEATConfig, NEATTrainer
from neat_align.rounds import make_round
from neat_align.trainer import policies_setup

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


def neat_settings(args: Any, folder: str) -> dict[str, Any]:
    kl_term = {} if PEERS[args.peer].has_reference else {"kl_weight": 0.0}
    return {
        **common(args, folder),
        **kl_term,
        "per_device_train_batch_size": args.prompts,
        "prompts_per_round": args.prompts,
        "num_positive": args.k - args.k // 2,
        "num_negative": args.k // 2,
        "num_plain": 0,
        "max_completion_length": args.completion,
        "max_tokens_per_micro_batch": args.max_tokens,
        "drift_prompts": 0,
    }


def neat(settings: dict[str, Any], model: Any, tokenizer: Any, texts: list[str]) -> Any:
    rows = [{"prompt": t} for t in texts]
    # No end token, so that every completion has its full length.
    with patch.object(policies_setup, "eos_token_ids", return_value=()):
        return NEATTrainer(model, reward, NEATConfig(**settings), rows, processing_class=tokenizer)


def grpo_settings(args: Any, folder: str) -> dict[str, Any]:
    return {
        **common(args, folder),
        "use_cpu": harness.device().type == "cpu",
        "per_device_train_batch_size": args.rows,
        "gradient_accumulation_steps": args.prompts * args.k // args.rows,
        "num_generations": args.k,
        "max_completion_length": args.completion,
        "generation_kwargs": {"min_new_tokens": args.completion},
    }


def grpo_kl_settings(args: Any, folder: str) -> dict[str, Any]:
    return {**grpo_settings(args, folder), "beta": 0.04}


def grpo(settings: dict[str, Any], model: Any, tokenizer: Any, texts: list[str]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    rows = Dataset.from_dict({"prompt": texts})
    return GRPOTrainer(model, reward, GRPOConfig(**settings), rows, processing_class=tokenizer)


def online_dpo_settings(args: Any, folder: str) -> dict[str, Any]:
    prompts = max(1, args.rows // 2)
    return {
        **common(args, folder),
        "use_cpu": harness.device().type == "cpu",
        "per_device_train_batch_size": prompts,
        "gradient_accumulation_steps": args.prompts // prompts,
        "max_new_tokens": args.completion,
        "max_length": 2 * (args.prompt + args.completion),
        "temperature": 1.0,
        "generation_kwargs": {"min_new_tokens": args.completion},
    }


def online_dpo_best_settings(args: Any, folder: str) -> dict[str, Any]:
    whole = {"per_device_train_batch_size": args.prompts, "gradient_accumulation_steps": 1}
    return {**online_dpo_settings(args, folder), **whole}


def online_dpo(settings: dict[str, Any], model: Any, tokenizer: Any, texts: list[str]) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    return OnlineDPOTrainer(
        model,
        reward_funcs=reward,
        args=OnlineDPOConfig(**settings),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
    )


@dataclass(frozen=True)
class Side:
    """A trainer, and what is set for it outside of its training arguments.

    `settings` gives the training arguments and `trainer` makes a trainer of them. `attention` and
    `weights` are the model's; `matmul` is torch's precision of fp32 products while it trains under
    autocast; `compact_head` lets TRL's loss skip the prompts' logits on a CPU as it does on a GPU.
    `has_reference` says whether a peer scores its completions under a reference model, too.
    """

    settings: Callable[[Any, str], dict[str, Any]]
    trainer: Callable[..., Any]
    attention: str = "sdpa"
    matmul: str = "highest"
    weights: str = "float32"
    compact_head: bool = False
    has_reference: bool = False

    def make(self, args: Any, base: Any, tokenizer: Any, texts: list[str], folder: str) -> Any:
        """A fresh trainer of a copy of the model."""
        model = copy.deepcopy(base).to(getattr(torch, self.weights))
        model.set_attn_implementation(self.attention)
        return self.trainer(self.settings(args, folder), model, copy.deepcopy(tokenizer), texts)

    @contextlib.contextmanager
    def training(self, args: Any) -> Iterator[None]:
        """While open, torch and TRL are set for this side; both sides share a process."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision(args))
        try:
            with compact_heads() if self.compact_head else contextlib.nullcontext():
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def precision(self, args: Any) -> str:
        """Of fp32 products: a side that trains in fp32 keeps it."""
        return self.matmul if args.dtype == "bf16" else "highest"

    def configuration(self, args: Any) -> dict[str, Any]:
        """All that the side was configured with, for the result file."""
        settings = self.settings(args, "")
        del settings["output_dir"]
        return {
            "training_arguments": settings,
            "attn_implementation": self.attention,
            "float32_matmul_precision": self.precision(args),
            "weights": self.weights,
            "equal_work": self.weights == "float32",
            "changed_in_trl": ["head over completions only"] if self.compact_head else [],
        }


@contextlib.contextmanager
def compact_heads() -> Iterator[None]:
    """While open, TRL's chunked loss takes the logits of completions alone, on every device."""
    # The file's own copy of the name decides that and nothing else; the kernels have another.
    with patch("trl.trainer.utils._use_triton", return_value=True):
        yield


NEAT = Side(neat_settings, neat)
PEERS = {
    "grpo": Side(grpo_settings, grpo),
    "grpo_kl": Side(grpo_kl_settings, grpo, has_reference=True),
    "grpo_best": Side(grpo_settings, grpo, matmul="medium"),
    "grpo_compact_head": Side(grpo_settings, grpo, matmul="medium", compact_head=True),
    "grpo_bf16_weights": Side(grpo_settings, grpo, matmul="medium", weights="bfloat16"),
    "online_dpo": Side(online_dpo_settings, online_dpo, has_reference=True),
    "online_dpo_best": Side(online_dpo_best_settings, online_dpo, has_reference=True),
}

# Our stages: what a stage is called, and where its function is looked up.
STAGES = (
    ("sample", make_round, "sampled_groups"),
    ("score", make_round, "score_groups"),
    ("step", NEATTrainer, "training_step"),
)


@dataclass(frozen=True)
class Run:
    """One side's first step: its seconds and, if it is ours, our stages' and what was kept."""

    seconds: float
    stages: dict[str, float]
    kept: float | None


def one_step(side: Side, args: Any, base: Any, tokenizer: Any, texts: list[str]) -> Run:
    """A fresh trainer's first step."""
    clock = Clock()
    stages: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        side.training(args),
        harness.timed_calls(STAGES, stages),
    ):
        trainer = side.make(args, base, tokenizer, texts, folder)
        trainer.add_callback(clock)
        trainer.train()
        # While the folder is there: groups are read from its files.
        kept = share_kept(trainer, args) if isinstance(trainer, NEATTrainer) else None
    if stages:
        stages["rest"] = clock.seconds - sum(stages.values())
    return Run(clock.seconds, stages, kept)


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
    if PEERS[args.peer].trainer is online_dpo and args.k != 2:
        raise SystemExit(f"{args.peer} samples two completions a prompt: give --k 2")
    if args.peer.endswith("_best") and harness.device().type != "cpu":
        raise SystemExit(
            f"{args.peer} has the settings that are best on a CPU: give another --peer"
        )
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


def prepared(args: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    """Model, tokenizer and prompts of all sides, who say nothing beside the tables."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    base, tokenizer = harness.load_model(args.model), harness.load_tokenizer()
    tokenizer.chat_template = None
    return base, tokenizer, [text_of(tokenizer, args.prompt, i) for i in range(args.prompts)]


def main() -> None:
    args = arguments()
    base, tokenizer, texts = prepared(args)
    sides = {"neat": NEAT, args.peer: PEERS[args.peer]}
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(args.repeats + 1):
        for name, side in sides.items():
            run = one_step(side, args, base, tokenizer, texts)
            if number > 0:
                runs[name].append(run)
    result = summary(args, sides, runs)
    show(args, result)
    harness.save(args.json, result)


def summary(
    args: argparse.Namespace, sides: dict[str, Side], runs: dict[str, list[Run]]
) -> dict[str, Any]:
    """The result file, without the machine."""
    seconds = {name: [run.seconds for run in made] for name, made in runs.items()}
    ratio = harness.speedup(seconds[args.peer], seconds["neat"])
    names = ("peer", "prompt", "completion", "k", "prompts", "rows", "max_tokens", "dtype", "model")
    setting = {name: getattr(args, name) for name in names}
    ours = runs["neat"]
    return {
        "setting": {**setting, "device": harness.device().type},
        "configuration": {name: side.configuration(args) for name, side in sides.items()},
        "seconds": {name: harness.spread(values) for name, values in seconds.items()},
        "our_stages": {
            stage: harness.spread([run.stages[stage] for run in ours]) for stage in ours[0].stages
        },
        "share_of_our_completions_trained_on": ours[-1].kept,
        "speedup_vs_trl": ratio["median"],
        "speedup_vs_trl_range": [ratio["min"], ratio["max"]],
    }


def show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The sides, then our stages, as tables."""
    ours = result["seconds"]["neat"]["median"]
    title = (
        f"a round of {args.prompts} prompts of {args.prompt} tokens, {args.k} completions of "
        f"{args.completion}, {args.dtype}"
    )
    for heading, columns, table in (
        (title, ["side", "seconds", "range", "over ours"], result["seconds"]),
        ("our stages", ["stage", "seconds", "range", "of a round"], result["our_stages"]),
    ):
        rows = [
            [
                name,
                f"{s['median']:.2f}",
                f"{s['min']:.2f}–{s['max']:.2f}",
                f"{s['median'] / ours:.2f}x",
            ]
            for name, s in table.items()
        ]
        harness.show(heading, columns, rows)


if __name__ == "__main__":
    main()
