"""What `comparison.json` and `examples.json` hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from neat_align.comparison.before_runs import trained_here
from neat_align.comparison.outcomes import Point, Run
from neat_align.comparison.spec import BASE, CompareSpec, Method
from neat_align.comparison.summary import summarise
from neat_align.config import NEATConfig
from neat_align.files.provenance import commit, cpu_name, versions
from neat_align.files.secrets import redacted
from neat_align.script_arguments import ScriptArguments

FORMAT = 1
# Held-out prompts whose answers are kept for the page.
EXAMPLES = 40
# Settings that stand beside the others in the file, or are of the machine.
_NOT_AMONG_SETTINGS = ("model_name_or_path", "dataset_name", "output_dir")


def comparison_result(
    spec: CompareSpec,
    starts: Mapping[int, Point],
    runs: Sequence[Run],
    configs: Mapping[str, tuple[ScriptArguments, NEATConfig]],
) -> dict[str, Any]:
    """The whole of `comparison.json`: what was compared, on what, and the tables.

    `starts` are the start policy's evaluations by seed, `configs` the settings by method.
    """
    settings, config = next(iter(configs.values()))
    here = trained_here(spec, configs)
    shared = {k: v for k, v in spec.settings.items() if k not in _NOT_AMONG_SETTINGS}
    methods = [
        {"name": m.name, "description": _described(m, spec), "settings": dict(m.settings)}
        for m in spec.methods
    ]
    return {
        "format": FORMAT,
        "name": spec.name,
        "model": settings.model_name_or_path,
        "dataset": settings.data_title,
        "seeds": list(spec.seeds),
        "rewards": settings.reward_funcs,
        "judges": settings.judge_funcs,
        "budget": {
            **(_budget(here[0], runs) if here else {}),
            "held_out_prompts": len(next(iter(starts.values())).evaluation["prompts"]),
            "samples_per_prompt": config.num_eval_generations,
        },
        "settings": redacted(shared),
        "methods": redacted(methods),
        **summarise(starts, runs, [m.name for m in spec.methods], spec.kl_target),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
    }


def _described(method: Method, spec: CompareSpec) -> str:
    """What a method is, and where its row is to be read otherwise than the others'."""
    notes = [method.description]
    if method.has_own_reward:
        trained = method.settings.get("reward_funcs", spec.settings.get("reward_funcs"))
        names = trained if isinstance(trained, str) else " + ".join(map(str, trained or []))
        notes.append(f"trained on {names}; its reward here is the comparison's all the same")
    if method.policy is not None:
        notes.append("trained elsewhere, at a budget that is not checked here")
        if len(spec.seeds) > 1 and "{seed}" not in method.policy:
            notes.append(
                "one model for all seeds, so its intervals know nothing of other trainings"
            )
    return "; ".join(notes)


def _budget(config: NEATConfig, runs: Sequence[Run]) -> dict[str, int]:
    """What every trained method had, from one method's settings."""
    planned = (run.planned_rounds for run in runs if run.planned_rounds)
    rounds = next(planned, int(config.num_train_epochs))
    # What a run had, which is less than was asked for where the data has fewer.
    made = (run.prompts_per_round for run in runs if run.prompts_per_round)
    prompts = next(made, config.prompts_per_round)
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return {
        "rounds": rounds,
        "prompts_per_round": prompts,
        "completions_per_prompt": config.num_generations,
        "sampled_completions": rounds * prompts * config.num_generations,
        "optimizer_steps": rounds * -(-prompts // per_step),
    }


def example_answers(
    starts: Mapping[int, Point], runs: Sequence[Run], spec: CompareSpec
) -> list[dict[str, Any]]:
    """Answers of every method's last policy to some held-out prompts, with the first seed."""
    seed = spec.seeds[0]
    last = {BASE: starts[seed]} | {
        run.method: run.points[-1] for run in reversed(runs) if run.seed == seed and run.points
    }
    evaluations = {m.name: last[m.name].evaluation for m in spec.methods if m.name in last}
    return [
        {
            "prompt": prompt,
            "answers": {name: e["completions"][i][0] for name, e in evaluations.items()},
            "rewards": {name: e["rewards"][i] for name, e in evaluations.items()},
        }
        for i, prompt in enumerate(starts[seed].evaluation["prompts"][:EXAMPLES])
    ]
