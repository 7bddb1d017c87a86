"""Where each second of a run goes, on one page.

    python scripts/profile_round.py --json OUT [--config RECIPE] [-- OPTION=VALUE ...]

Runs a recipe (the demo's by default) as `neat-align train` does, with a stopwatch around each
stage. The stages are a tree: a line's own seconds are those that no line below it has. A stopwatch
takes a microsecond, which torch's profiler does not, so that the run is as long as without it. The
last lines of the page are ratios that the stages are held to.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from neat_align.cli.options import parse_options, recipe_path
from neat_align.files.atomic import write_json
from neat_align.files.provenance import commit, cpu_name, versions
from neat_align.pipeline import run_training

# (what a line is called, where the function is looked up, its name there).
STAGES = (
    ("start: model, data, checks", "neat_align.pipeline", "build_trainer"),
    ("evaluation", "neat_align.trainer.neat_trainer", "NEATTrainer.evaluate"),
    ("drift", "neat_align.evaluation.drift_monitor", "measure_drift"),
    ("round", "neat_align.trainer.round_maker", "RoundMaker.make"),
    ("sample", "neat_align.rounds.make_round", "sampled_groups"),
    ("score", "neat_align.rounds.make_round", "score_groups"),
    ("rewards", "neat_align.rounds.scoring_stage", "with_rewards"),
    ("log-probabilities", "neat_align.rounds.scoring_stage", "with_logprobs"),
    ("contrasts", "neat_align.rounds.scoring_stage", "with_contrasts"),
    ("copy that samples", "neat_align.sampling.policies", "half_precision_copy"),
    ("is decoding the same", "neat_align.sampling.decode_check", "_fastest"),
    ("decode", "neat_align.sampling.transformers_sampler", "draw_tokens"),
    ("read prompts", "neat_align.sampling.token_rows", "read_prompts"),
    ("read prompts", "neat_align.sampling.shared_rows", "read_prompts"),
    ("rewards and judges", "neat_align.rewards.scoring", "score"),
    ("KL to the start", "neat_align.sampling.policies", "exact_divergence"),
    ("log-probabilities of answers", "neat_align.evaluation.held_out", "_human_logprobs"),
    ("step", "neat_align.trainer.neat_trainer", "NEATTrainer.training_step"),
    ("forward", "neat_align.learning.step_engine", "head_inputs"),
    ("head: log-probabilities", "neat_align.learning.step_engine", "logprobs_of"),
    ("teacher's passes", "neat_align.learning.distillation", "teacher_of"),
    ("head: distillation", "neat_align.learning.distillation", "values_in_chunks"),
    ("backward", "accelerate", "Accelerator.backward"),
    ("checkpoint", "neat_align.trainer.neat_trainer", "NEATTrainer._save_checkpoint"),
    ("save the model", "neat_align.pipeline", "_save_model"),
    ("result and report", "neat_align.pipeline", "_write_result"),
)


@dataclass
class Line:
    """A stage under another one: its calls, and their seconds."""

    calls: int = 0
    seconds: float = 0.0
    below: dict[str, Line] = field(default_factory=dict)

    @property
    def own(self) -> float:
        """Seconds that no line below has."""
        return self.seconds - sum(line.seconds for line in self.below.values())

    def as_json(self) -> dict[str, Any]:
        """The tree as plain data."""
        below = {name: line.as_json() for name, line in self.below.items()}
        found = {"calls": self.calls, "seconds": round(self.seconds, 3)}
        return {**found, "own_seconds": round(self.own, 3), **({"below": below} if below else {})}

    def total(self, name: str) -> float:
        """Seconds of all lines of a name, wherever they stand."""
        return sum(
            line.seconds if found == name else line.total(name)
            for found, line in self.below.items()
        )


class Stopwatch:
    """Adds up where time goes; stages that are open are a stack."""

    def __init__(self) -> None:
        self.root = Line(calls=1)
        self.open = [self.root]
        self.tokens = 0

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed as a line under the stage that calls it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            line = self.open[-1].below.setdefault(name, Line())
            self.open.append(line)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                line.calls, line.seconds = (
                    line.calls + 1,
                    line.seconds + time.perf_counter() - start,
                )
                self.open.pop()

        return timed

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While open, every stage is timed."""
        with contextlib.ExitStack() as patched:
            for name, module, path in STAGES:
                owner: Any = importlib.import_module(module)
                *classes, last = path.split(".")
                for part in classes:
                    owner = getattr(owner, part)
                patched.enter_context(
                    patch.object(owner, last, self.around(name, getattr(owner, last)))
                )
            start = time.perf_counter()
            yield
            self.root.seconds = time.perf_counter() - start


def page(root: Line) -> str:
    """The tree as text: seconds, share of the run, calls."""
    lines = [f"{'seconds':>8} {'share':>6} {'own':>7} {'calls':>6}  stage"]

    def write(name: str, line: Line, depth: int) -> None:
        share = line.seconds / root.seconds
        if share >= 0.0005:
            lines.append(
                f"{line.seconds:8.2f} {share:6.1%} {line.own:7.2f} {line.calls:6d}  "
                f"{'  ' * depth}{name}"
            )
        for below in sorted(line.below.items(), key=lambda item: -item[1].seconds):
            write(*below, depth + 1)

    write("the run", root, 0)
    return "\n".join(lines)


def ratios(root: Line) -> dict[str, float]:
    """What the stages are held to: shares of a run's parts."""
    rounds = root.below.get("round") or Line()
    sampling = rounds.total("sample") or float("nan")
    return {
        "score_stage_over_sampling": round(rounds.total("score") / sampling, 3),
        "sampling_share_of_run": round(root.total("decode") / root.seconds, 3),
        "steps_share_of_run": round(root.total("step") / root.seconds, 3),
        "evaluations_share_of_run": round(root.total("evaluation") / root.seconds, 3),
    }


def main() -> None:
    """Run the recipe, print the page, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--config", type=Path, default=recipe_path("demo"))
    parser.add_argument("options", nargs="*", help="more options, NAME=VALUE, after --")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = [f"--output_dir={folder}", *(f"--{option}" for option in args.options)]
        script, config = parse_options(words, args.config)
        with watch.watching():
            result = run_training(script, config)
    found = ratios(watch.root)
    print(page(watch.root))
    print("\n".join(f"{name.replace('_', ' ')}: {value:.3f}" for name, value in found.items()))
    if args.json is None:
        return
    wanted = (
        *("reward_before", "reward_after", "reward_delta_ci95"),
        *("second_judge_before", "second_judge_after", "second_judge_delta_ci95"),
        *("perplexity_before", "perplexity_after", "wall_seconds", "peak_rss_bytes"),
    )
    write_json(
        args.json,
        {
            "recipe": args.config.name,
            "options": args.options,
            "ratios": found,
            "result": {name: result[name] for name in wanted if name in result},
            "profile": watch.root.as_json(),
            "commit": commit(),
            "versions": versions(),
            "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        },
    )


if __name__ == "__main__":
    main()
