"""Several methods on one model and one data set, at equal budget: the runs and the result file.

Runs are made one after the other and kept in folders of their own, so that a comparison that was
interrupted goes on where it stopped, and a method or a seed can be added later. Rounds that two
runs would sample alike (the first round of the same seed and way of sampling: the policy has not
moved yet) are sampled once.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate.utils.memory import clear_device_cache
from transformers import PrinterCallback, TrainerCallback

from neat_align.comparison.before_runs import (
    Settings,
    checked_settings,
    common_reward,
    own_options,
    trained_here,
)
from neat_align.comparison.outcomes import Point, Run
from neat_align.comparison.result_file import comparison_result, example_answers
from neat_align.comparison.spec import BASE, CompareSpec, Method, strength_name
from neat_align.config import NEATConfig
from neat_align.errors import CollapseError, ConfigError
from neat_align.files.atomic import read_json, write_folder, write_json
from neat_align.files.secrets import redacted
from neat_align.learning.batches import without_unread_completions
from neat_align.modeling.packing import tokens_in
from neat_align.pipeline import build_trainer
from neat_align.reporting.comparison_report import write_comparison_report
from neat_align.rewards.judge import judge_facts
from neat_align.rounds.round_files import read_round
from neat_align.trainer import NEATTrainer
from neat_align.trainer.round_maker import round_params

# Training metrics whose means over a round stand in the result file: what the diagnosis of
# negatives needs.
_DIAGNOSIS = (
    *("ranking/", "logps/", "loss/", "grad_norm", "contrast/"),
    *("removed/", "reward/", "sampling/", "completions/"),
)


@dataclass(frozen=True)
class Caller:
    """What a comparison is given by whoever calls it, since it knows neither options nor terminals.

    `read_options` turns a run's options, as a recipe holds them, into typed arguments (raises
    ConfigError). `callbacks` gives the callbacks that show a run. `on_run` is told of every run:
    its number, of how many, the run, and the seconds of each run that was made so far.
    """

    read_options: Callable[[Mapping[str, Any]], Settings]
    callbacks: Callable[[NEATConfig], list[TrainerCallback]]
    on_run: Callable[[int, int, Run, Sequence[float]], None]


@dataclass(frozen=True)
class _Job:
    method: Method
    strength: Mapping[str, Any]
    seed: int
    folder: Path

    @property
    def is_made(self) -> bool:
        """Whether the run is there: what is written last of it is."""
        return (self.folder / "points.json").is_file()


@dataclass(frozen=True)
class _SharedRounds:
    """First rounds that several runs go on from, and whether one of the methods needs the start
    policy's log-probabilities of them.
    """

    folder: Path
    needs_reference: bool


def run_comparison(spec: CompareSpec, out: Path, caller: Caller) -> dict[str, Any]:
    """Make every run that is not there yet; write `comparison.json` and its page to `out`."""
    jobs = list(_jobs(spec, out / "runs"))
    to_make = {job.method.name for job in jobs if not job.is_made}
    configs = checked_settings(spec, caller.read_options, to_make)
    starts = {
        seed: _start(spec, seed, out / "runs" / BASE / f"seed{seed}", caller) for seed in spec.seeds
    }
    needs_reference = any(config.needs_reference for config in trained_here(spec, configs))
    shared = _SharedRounds(out / "shared-rounds", needs_reference)
    runs: list[Run] = []
    took: list[float] = []
    for i, job in enumerate(jobs, start=1):
        begun, was_there = time.monotonic(), job.is_made
        run = _run(spec, job, starts[job.seed], shared, caller)
        runs.append(run)
        if not was_there:
            took.append(time.monotonic() - begun)
        caller.on_run(i, len(jobs), run, took)
    result = comparison_result(spec, starts, runs, configs)
    write_json(out / "comparison.json", result)
    write_json(out / "examples.json", example_answers(starts, runs, spec))
    write_comparison_report(out)
    return result


def number_of_runs(spec: CompareSpec) -> int:
    """Runs that a comparison makes or reads; the start policy is not one."""
    return sum(1 for _ in _jobs(spec, Path()))


def _jobs(spec: CompareSpec, folder: Path) -> Iterator[_Job]:
    trained = [m for m in spec.methods if m.name != BASE]
    for seed, method in product(spec.seeds, trained):
        for strength in spec.strengths_of(method):
            name = strength_name(strength).replace("/", "_")
            yield _Job(method, strength, seed, folder / method.name / name / f"seed{seed}")


# ---- runs ----------------------------------------------------------------------------------------


class _EvaluateRounds(TrainerCallback):
    """Evaluates the policy after every round and keeps the evaluation as a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainer: NEATTrainer | None = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A round is over."""
        assert self.trainer is not None
        path = self.folder / f"evaluation-{round(state.epoch)}.json"
        if not path.is_file():
            self.trainer.evaluate()
            assert self.trainer.last_evaluation is not None
            write_json(path, self.trainer.last_evaluation.to_json())


def _build(
    spec: CompareSpec,
    method: Method,
    strength: Mapping[str, Any],
    seed: int,
    folder: Path,
    caller: Caller,
) -> NEATTrainer:
    # A trainer and its model hold each other, so the run before this one is still in memory; two of
    # them may not fit.
    clear_device_cache(garbage_collection=True)
    given = {**spec.options(method, strength, seed), "output_dir": str(folder)}
    settings, config = caller.read_options(given)
    callback = _EvaluateRounds(folder)
    trainer = build_trainer(
        settings,
        config,
        [callback, *caller.callbacks(config)],
        eval_rewards=common_reward(spec, method, caller.read_options),
        policy=method.policy_of(seed),
    )
    if not trainer.parts.data.eval_rows:
        raise ConfigError(
            "a comparison needs held-out prompts: set holdout or eval_dataset_name under settings"
        )
    callback.trainer = trainer
    # With disable_tqdm it prints every log as a dict, and a run is one line here.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _start(spec: CompareSpec, seed: int, folder: Path, caller: Caller) -> Point:
    """The start policy's evaluation with a seed."""
    path = folder / "evaluation-0.json"
    base = spec.methods[0]
    if path.is_file():
        _check_key(folder, spec.options(base, {}, seed), None)
    else:
        trainer = _build(spec, base, {}, seed, folder, caller)
        _check_key(folder, spec.options(base, {}, seed), trainer)
        trainer.evaluate()
        assert trainer.last_evaluation is not None
        write_json(path, trainer.last_evaluation.to_json())
    return Point(0, read_json(path))


def _run(spec: CompareSpec, job: _Job, start: Point, shared: _SharedRounds, caller: Caller) -> Run:
    """A run, made or read."""
    if job.is_made:
        _check_key(job.folder, own_options(spec, job.method, job.strength, job.seed), None)
    elif job.method.policy is not None:
        _evaluate_policy(spec, job, caller)
    else:
        _make_run(spec, job, shared, caller)
    facts = read_json(job.folder / "points.json")
    points = [
        Point(r, read_json(job.folder / f"evaluation-{r}.json"), training)
        for r, training in zip(facts["rounds"], facts["training"], strict=True)
    ]
    return Run(
        method=job.method.name,
        strength=strength_name(job.strength),
        seed=job.seed,
        start=start,
        points=tuple(points),
        seconds=facts["seconds"],
        trained_tokens=facts["trained_tokens"],
        prompts_per_round=facts.get("prompts_per_round"),
        planned_rounds=facts.get("planned_rounds"),
        broke=facts.get("broke"),
    )


def _make_run(spec: CompareSpec, job: _Job, shared: _SharedRounds, caller: Caller) -> None:
    """Train, or go on with, one run; its `points.json` is written last."""
    begun = time.monotonic()
    trainer = _build(spec, job.method, job.strength, job.seed, job.folder, caller)
    _check_key(job.folder, own_options(spec, job.method, job.strength, job.seed), trainer)
    broke = _train(trainer, shared, job.method.settings.get("reward_funcs"))
    evaluations = job.folder.glob("evaluation-*.json")
    rounds = sorted(int(path.stem.rpartition("-")[2]) for path in evaluations)
    facts = {
        "rounds": rounds,
        "seconds": time.monotonic() - begun,
        "trained_tokens": _trained_tokens(trainer),
        # Fewer than was asked for, where the data has fewer.
        "prompts_per_round": len(trainer.rounds),
        "planned_rounds": trainer.parts.plan.rounds,
        "training": [_round_means(job.folder, r) for r in rounds],
        "stopped": trainer.stopped_because,
        "broke": broke,
    }
    write_json(job.folder / "points.json", facts)
    for checkpoint in job.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # the run is over, and its policy has been evaluated


def _evaluate_policy(spec: CompareSpec, job: _Job, caller: Caller) -> None:
    """Evaluate a policy that was trained elsewhere, as one that was trained here: the same prompts,
    draws, rewards and judges, and its KL to the start policy.
    """
    begun = time.monotonic()
    trainer = _build(spec, job.method, {}, job.seed, job.folder, caller)
    _check_key(job.folder, own_options(spec, job.method, {}, job.seed), trainer)
    events = trainer.callback_handler.callbacks
    evaluation = trainer.parts.evaluate(None, events, is_start=False, may_stop=True)
    write_json(job.folder / "evaluation-1.json", evaluation.to_json())
    facts = {
        "rounds": [1],
        "seconds": time.monotonic() - begun,
        "trained_tokens": 0,
        "training": [{}],
    }
    write_json(job.folder / "points.json", facts)


def _train(trainer: NEATTrainer, shared: _SharedRounds, own_reward: Any) -> str | None:
    """Train, and say why training broke down, or None. `own_reward` are a method's own functions.

    It begins with the first round that another run has sampled, where there is one. A method that
    breaks down is a result of the comparison like any other; everything else stops the comparison.
    """
    resume = (trainer.output_dir / "rounds").exists()
    trainer.parts.round_maker.first_round_is_shared = shared.needs_reference
    first = trainer.parts.directory.round_folder(0)
    cached = shared.folder / _first_round_key(trainer, own_reward)
    if not resume and cached.is_dir():
        write_folder(first, lambda new: shutil.copytree(cached, new, dirs_exist_ok=True))
        resume = True
    try:
        trainer.train(resume_from_checkpoint=True if resume else None)
    except CollapseError as error:
        return str(error)
    finally:
        if not cached.is_dir() and read_round(first) is not None:
            write_folder(cached, lambda new: shutil.copytree(first, new, dirs_exist_ok=True))
    return None


def _check_key(folder: Path, options: Mapping[str, Any], trainer: NEATTrainer | None) -> None:
    """Refuse to mix a run with what an earlier comparison left there under other settings."""
    path = folder / "options.json"
    given = {k: v for k, v in options.items() if v is not None}
    key = redacted(json.loads(json.dumps(given, default=str)))
    if path.is_file():
        kept = read_json(path)
        was = kept["options"]
        changed = [
            f"{k} was {was.get(k)!r} and is {key.get(k)!r}"
            for k in sorted({*was, *key})
            if was.get(k) != key.get(k)
        ]
        if trainer is not None and kept["data"] != _data_key(trainer):
            changed.append("the data changed")
        if changed:
            raise ConfigError(
                f"{folder} holds a run with other settings: {'; '.join(changed)}. Choose another "
                "--output_dir, or delete it"
            )
    elif trainer is not None:
        write_json(path, {"options": key, "data": _data_key(trainer)})


def _data_key(trainer: NEATTrainer) -> list[str]:
    return list(trainer.parts.data.fingerprints)


def _first_round_key(trainer: NEATTrainer, own_reward: Any) -> str:
    """What decides a first round, as a name.

    Two runs of one comparison with the same one sample the same first round.
    """
    decides: dict[str, Any] = {
        "params": round_params(trainer.args).deciding(),
        "bank": asdict(trainer.parts.setup.bank),
        "rewards": [[r.name, r.weight] for r in trainer.parts.scored_by.rewards],
        "groups": len(trainer.rounds),
        "data": _data_key(trainer),
        **judge_facts(trainer.parts.scored_by.rewards),
    }
    if own_reward is not None:
        decides["reward functions"] = own_reward  # two functions may have one name
    if not trainer.parts.round_maker.first_round_has_reference:
        decides["reference"] = "none"  # a method that is added later may need it
    return sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _trained_tokens(trainer: NEATTrainer) -> int:
    total = 0
    for folder in sorted((trainer.output_dir / "rounds").iterdir()):
        made = read_round(folder)
        for group in made.groups if made is not None else ():
            part = without_unread_completions(group, trainer.args)
            total += tokens_in(
                len(part.prompt_ids),
                [len(c.token_ids) for c in part.completions],
                trainer.parts.policies.layout,
            )
    return total


def _round_means(folder: Path, number: int) -> dict[str, float]:
    """Means of the training metrics that were logged in a round (counted from 1)."""
    sums: dict[str, list[float]] = {}
    for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        begins = "round" in line and line["round"] == number - 1
        if begins or ("loss" in line and number - 1 < line.get("epoch", -1) <= number):
            for name, value in line.items():
                if name.startswith(_DIAGNOSIS) and isinstance(value, int | float):
                    sums.setdefault(name, []).append(float(value))
    return {name: fmean(values) for name, values in sorted(sums.items())}
