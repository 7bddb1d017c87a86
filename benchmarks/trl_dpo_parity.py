"""Does our `dpo` ranking loss train as TRL's own DPOTrainer does?

Same pairs, same order, same start: the losses, step by step.

    python benchmarks/trl_dpo_parity.py --json OUT

The model writes good and bad answers to the demo's prompts (`make_round`); the best and the worst
answer of each prompt are the pair. Both trainers then get the same text: the rendered prompt, and
two answers. Each tokenises it by itself, and the token ids must be equal, or there is no
comparison. fp32, AdamW without weight decay, constant rate without warm-up, the same clipping of
gradients, no dropout, pairs in the order of the data; on our side `length_power: 0`,
`lm_weight: 0`, and groups of exactly one pair.

  packed  NEATTrainer, prompts shared within a pair
  padded  NEATTrainer, padded rows: its distance to `packed` is what rounding alone makes of two
          ways to add the same numbers
  trl     TRL's DPOTrainer; the reference model runs in every step, where ours is scored once,
          before the first

Text, not TRL's chat form: there the chat template's line break after an answer's end would be one
more trained token. And of an answer that was cut: TRL ends every text answer with eos, so here ours
has one, too (our rounds never add one; the loss is the same).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import harness
import torch
import transformers
from datasets import Dataset

from neat_align import NEATConfig, NEATTrainer
from neat_align.demo.rows import demo_rows
from neat_align.modeling.logprobs import score_completions
from neat_align.prompts.rendering import prompt_ids, prompt_text
from neat_align.prompts.rows import PromptRow
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.exports import preference_rows
from neat_align.rounds.human_answers import human_completions
from neat_align.rounds.round_files import FinishedRound

# Nats. The loss is a mean of −log σ of differences of summed fp32 log-probabilities.
LOSS_TOLERANCE = 1e-5
# ‖difference of the trained weights‖ / ‖weights‖, and over the way that training moved them. The
# second is far larger: AdamW makes a whole step of a gradient that is nothing but rounding.
WEIGHT_TOLERANCE = 1e-5
MOVED_TOLERANCE = 0.05


@dataclass(frozen=True)
class Setting:
    """What both trainers are given.

    A step has `pairs_per_batch` · `accumulation` pairs; `trl_beta` differs only to see the check
    fail.
    """

    learning_rate: float
    lora: bool = False
    beta: float = 0.1
    trl_beta: float | None = None
    epochs: int = 2
    pairs_per_batch: int = 4
    accumulation: int = 1


@dataclass(frozen=True)
class Trained:
    """A side's run.

    Loss (nats) and norm of the gradient before clipping at every step, and the trained weights.
    """

    losses: list[float]
    grad_norms: list[float]
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]


# ---- the pairs -----------------------------------------------------------------------------------


def sampled_groups(
    model: Any, tokenizer: Any, rows: Any, reward: Any, **settings: Any
) -> tuple[CompletionGroup, ...]:
    """One round's groups of a model, by `expand`."""
    with tempfile.TemporaryDirectory() as folder:
        config = NEATConfig(
            output_dir=folder,
            report_to="none",
            bf16=False,
            disable_tqdm=True,
            drift_prompts=0,
            **settings,
        )
        trainer = NEATTrainer(model, reward, config, rows, processing_class=tokenizer)
        return tuple(trainer.make_round(0).groups)  # their file goes with the folder


def text_pairs(groups: Sequence[CompletionGroup], tokenizer: Any) -> list[PromptRow]:
    """Best against worst, as text prompts with a chosen and a rejected answer."""
    rows = []
    for i, row in enumerate(
        preference_rows(groups, allow_negative_chosen=True, allow_cut_chosen=True)
    ):
        chosen, rejected = (
            a if isinstance(a, str) else a[0]["content"] for a in (row["chosen"], row["rejected"])
        )
        rows.append(
            PromptRow(
                str(i), prompt_text(tokenizer, row["prompt"]), chosen, rejected, {}, f"pair {i}"
            )
        )
    return rows


def pair_groups(rows: Sequence[PromptRow], tokenizer: Any, longest: int) -> list[CompletionGroup]:
    """The pairs as groups of two, tokenised as our rounds tokenise human answers."""
    groups = []
    for row in rows:
        pair = human_completions(row, tokenizer, longest)
        assert [c.finish_reason for c in pair] == ["stop", "stop"], (
            f"{row.where} is longer than {longest} tokens"
        )
        groups.append(
            CompletionGroup(
                row.id, row.prompt, tuple(prompt_ids(tokenizer, row.prompt)), tuple(pair)
            )
        )
    return groups


def resampled_alike(
    groups: Sequence[CompletionGroup], pairs: Sequence[CompletionGroup]
) -> dict[str, float]:
    """What the detour over text changed.

    Shares of the answers that were cut, and of those whose text gives the sampled ids again.
    """
    sampled: dict[str, Completion] = {c.text: c for g in groups for c in g.completions}
    answers = [c for g in pairs for c in g.completions]
    cut = sum(sampled[c.text].finish_reason == "length" for c in answers)
    kept = sum(c.token_ids[:-1] == _without_end(sampled[c.text]) for c in answers)
    return {"cut": cut / len(answers), "same_ids_as_sampled": kept / len(answers)}


def _without_end(c: Completion) -> tuple[int, ...]:
    return c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids


# ---- the two trainers ----------------------------------------------------------------------------


class PairTrainer(NEATTrainer):
    """Every round is the same given pairs instead of fresh samples.

    Everything after that is NEATTrainer's own.
    """

    pairs: tuple[CompletionGroup, ...] = ()

    def make_round(self, index: int) -> FinishedRound:
        return FinishedRound(index, self.pairs, {}, 0)


def common(setting: Setting, folder: str) -> dict[str, Any]:
    """Training arguments of both sides."""
    return {
        "output_dir": folder,
        "use_cpu": harness.device().type == "cpu",
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
        "num_train_epochs": setting.epochs,
        "per_device_train_batch_size": setting.pairs_per_batch,
        "gradient_accumulation_steps": setting.accumulation,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }


def peft_config(setting: Setting) -> Any:
    """A LoRA adapter, drawn from the seed by both trainers, or none."""
    from peft import LoraConfig

    if not setting.lora:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
    )


def ours(
    base: Any,
    tokenizer: Any,
    rows: list[PromptRow],
    groups: Sequence[CompletionGroup],
    setting: Setting,
    sharing: str,
) -> Trained:
    """NEATTrainer on the pairs; `sharing` is its prefix_sharing."""
    with tempfile.TemporaryDirectory() as folder:
        config = NEATConfig(
            kl_weight=0.0,
            **common(setting, folder),
            rank_by="origin",
            ranking_loss="dpo",
            beta=setting.beta,
            length_power=0.0,
            lm_weight=0.0,
            prompts_per_round=len(groups),
            drift_prompts=0,
            prefix_sharing=sharing,
            max_prompt_length=max(len(g.prompt_ids) for g in groups),
            max_completion_length=max(len(c.token_ids) for g in groups for c in g.completions),
        )
        model = copy.deepcopy(base)
        trainer = PairTrainer(
            model, None, config, rows, processing_class=tokenizer, peft_config=peft_config(setting)
        )
        assert trainer.parts.policies.layout == ("padded" if sharing == "off" else "packed")
        start = trained_weights(trainer.policy)
        flat = [(g, c) for g in groups for c in g.completions]
        scored = iter(
            score_completions(
                *(base.eval(), [g.prompt_ids for g, _ in flat], [c.token_ids for _, c in flat]),
                layout=trainer.parts.policies.layout,
                pad_token_id=tokenizer.pad_token_id,
                autocast_dtype=None,
            )
        )
        trainer.pairs = tuple(
            replace(
                g, completions=tuple(replace(c, ref_logprobs=next(scored)) for c in g.completions)
            )
            for g in groups
        )
        trainer.train()
        return Trained(*curves(trainer), start, trained_weights(trainer.policy))


def trls(
    base: Any,
    tokenizer: Any,
    rows: list[PromptRow],
    groups: Sequence[CompletionGroup],
    setting: Setting,
) -> Trained:
    """TRL's DPOTrainer on the same text.

    Raises SystemExit when it made other token ids of it than we did.
    """
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list(
        [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in rows]
    )
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            **common(setting, folder),
            beta=setting.beta if setting.trl_beta is None else setting.trl_beta,
            max_length=None,
            pad_to_multiple_of=None,
        )
        trainer = DPOTrainer(
            copy.deepcopy(base),
            ref_model=None if setting.lora else copy.deepcopy(base).eval(),
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=peft_config(setting),
        )
        check_same_ids(groups, trainer.train_dataset)
        start = trained_weights(trainer.model)
        trainer.train()
        return Trained(*curves(trainer), start, trained_weights(trainer.model))


def check_same_ids(groups: Sequence[CompletionGroup], rows: Any) -> None:
    """Both sides train on the same tokens, in the same order."""
    assert len(groups) == len(rows), f"TRL kept {len(rows)} of {len(groups)} pairs"
    for group, row in zip(groups, rows, strict=True):
        mine = [list(group.prompt_ids), *(list(c.token_ids) for c in group.completions)]
        theirs = [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
        if mine != theirs:
            raise SystemExit(
                f"pair {group.prompt_id}: the token ids differ, so there is nothing to "
                f"compare:\nours {mine}\nTRL  {theirs}"
            )


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights that train."""
    return {
        name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad
    }


def curves(trainer: Any) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of every step."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [float(e["loss"]) for e in steps], [float(e["grad_norm"]) for e in steps]


# ---- the comparison ------------------------------------------------------------------------------


def difference(a: Trained, b: Trained) -> dict[str, float]:
    """How far two runs are apart, from their first to their last step."""
    assert a.start.keys() == b.start.keys()
    assert all(torch.equal(a.start[name], b.start[name]) for name in a.start), (
        "the two sides do not start from the same weights"
    )
    assert len(a.losses) == len(b.losses), f"{len(a.losses)} steps against {len(b.losses)}"
    apart = norm({n: a.end[n] - b.end[n] for n in a.end})
    return {
        "loss_max": max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)),
        "grad_norm_max_relative": max(
            abs(x - y) / y for x, y in zip(a.grad_norms, b.grad_norms, strict=True)
        ),
        "weights_relative": apart / norm(b.end),
        "weights_relative_to_way_moved": apart / norm({n: b.end[n] - b.start[n] for n in b.end}),
    }


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm of all of them together."""
    return float(sum(t.double().square().sum() for t in tensors.values())) ** 0.5


def within(found: Mapping[str, float]) -> bool:
    """Whether a difference is inside the stated tolerances."""
    return (
        found["loss_max"] <= LOSS_TOLERANCE
        and found["weights_relative"] <= WEIGHT_TOLERANCE
        and found["weights_relative_to_way_moved"] <= MOVED_TOLERANCE
    )


def parity(base: Any, tokenizer: Any, rows: list[PromptRow], setting: Setting) -> dict[str, Any]:
    """Train all sides from copies of `base` on text pairs: curves, and how they differ."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None  # the prompts are rendered already
    longest = base.config.max_position_embeddings
    groups = pair_groups(rows, tokenizer, longest)
    sides: dict[str, Callable[[], Trained]] = {
        "packed": lambda: ours(base, tokenizer, rows, groups, setting, "auto"),
        "padded": lambda: ours(base, tokenizer, rows, groups, setting, "off"),
        "trl": lambda: trls(base, tokenizer, rows, groups, setting),
    }
    runs = {}
    for name, side in sides.items():
        with contextlib.redirect_stdout(io.StringIO()):  # the trainers' own log lines
            runs[name] = side()
        print(
            f"{name}: {len(runs[name].losses)} steps, last loss {runs[name].losses[-1]:.7f}",
            flush=True,
        )
    found = {
        "packed_and_trl": difference(runs["packed"], runs["trl"]),
        "padded_and_trl": difference(runs["padded"], runs["trl"]),
        "packed_and_padded": difference(runs["packed"], runs["padded"]),
    }
    return {
        "setting": asdict(setting),
        "pairs": len(rows),
        "steps": len(runs["trl"].losses),
        "losses": {name: run.losses for name, run in runs.items()},
        "grad_norms": {name: run.grad_norms for name, run in runs.items()},
        "differences": found,
        "within_tolerance": within(found["packed_and_trl"]) and within(found["padded_and_trl"]),
    }


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--completion", type=int, default=48, help="tokens of an answer at most")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--pairs-per-step", type=int, default=2)
    parser.add_argument(
        "--trl-beta", type=float, help="another beta for TRL's side, to see the check fail"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    base, tokenizer = harness.load_model(args.model), harness.load_tokenizer()
    sampling = {
        "prompts_per_round": args.prompts,
        "num_positive": 2,
        "num_negative": 2,
        "num_plain": 0,
        "max_completion_length": args.completion,
        "temperature": 0.7,
        "instruction_bank": "politeness",
    }
    groups = sampled_groups(copy.deepcopy(base), tokenizer, demo_rows("train"), "vader", **sampling)
    rows = text_pairs(groups, tokenizer)
    # Full batches, so that a mean of means is a mean.
    rows = rows[: len(rows) // args.pairs_per_step * args.pairs_per_step]
    result: dict[str, Any] = {
        "setting": {
            "model": args.model,
            "dtype": "fp32",
            "device": harness.device().type,
            **sampling,
        },
        "tolerance": {
            "loss_max": LOSS_TOLERANCE,
            "weights_relative": WEIGHT_TOLERANCE,
            "weights_relative_to_way_moved": MOVED_TOLERANCE,
        },
        "answers": resampled_alike(
            groups, pair_groups(rows, tokenizer, base.config.max_position_embeddings)
        ),
    }
    given = {
        "epochs": args.epochs,
        "pairs_per_batch": args.pairs_per_step,
        "trl_beta": args.trl_beta,
    }
    for name, setting in (
        ("full", Setting(1e-5, **given)),
        ("lora", Setting(2e-4, lora=True, **given)),
    ):
        print(f"{name}: {len(rows)} pairs", flush=True)
        result[name] = parity(base, tokenizer, rows, setting)
        show(name, result[name])
        harness.save(args.json, result)  # the first half is kept should the second be interrupted
    if not (result["full"]["within_tolerance"] and result["lora"]["within_tolerance"]):
        raise SystemExit("outside of the tolerance")


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print the curves and the differences."""
    losses = found["losses"]
    steps = [
        [str(i + 1), *(f"{losses[side][i]:.7f}" for side in losses)] for i in range(found["steps"])
    ]
    harness.show(f"{name}: loss at every step, nats", ["step", *losses], steps)
    apart = [[pair, *(f"{v:.1e}" for v in d.values())] for pair, d in found["differences"].items()]
    harness.show(
        f"{name}: differences", ["", "loss", "gradient norm", "weights", "over way moved"], apart
    )


if __name__ == "__main__":
    main()
