"""What a model can still do: benchmark tasks before and after, by EleutherAI's lm-eval harness.

Alignment can cost ability, and a reward does not see it. The harness is an optional extra,
`neat-align[capability]`, reached only through its documented Python interface: `simple_evaluate`,
`TaskManager`, `HFLM`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from neat_align.errors import ConfigError
from neat_align.files.provenance import commit, versions
from neat_align.modeling.demo_model import model_source
from neat_align.modeling.device import compute_device
from neat_align.modeling.loading import load_policy, load_tokenizer

# Of each task: every metric (in its own unit, mostly a share between 0 and 1), and its standard
# error as `<metric>_stderr`.
Results = dict[str, dict[str, float]]
STDERR = "_stderr"


@dataclass(frozen=True)
class CapabilityParams:
    """What is measured.

    `limit` is documents per task (None: all); `include_path` a folder with the user's task files.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    include_path: Path | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(
                "tasks is empty: name at least one task, for example hellaswag,arc_easy"
            )
        for name, value in (("limit", self.limit), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ConfigError(
                f"include_path {self.include_path} is not a folder: name the folder that holds "
                "the tasks' YAML files"
            )


def capability(
    model_folder: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 8,
) -> Results:
    """Metrics of a model on tasks (or groups of tasks) of the harness, with their standard errors.

    `model_folder` is a model's folder or name, an adapter's folder (merged into its base), a run,
    or `demo`. Weights are fp32, prompts go in as the task has them, without a chat template. A
    metric for which the harness has no standard error (one document, or none defined) has no
    `_stderr` entry.

    Raises ConfigError when the harness is not installed, a task is not known to it, or its data
    cannot be read.
    """
    params = CapabilityParams(tuple(tasks), limit, include_path, batch_size)
    return _evaluate(model_folder, params, _task_manager(params))


def capability_change(model: str, base: str, params: CapabilityParams) -> dict[str, Any]:
    """`base` and `model` on the same documents, as JSON: `before`, `after`, `change`, and versions.

    `change_stderr` is √(before² + after²), as if the two had seen different documents: on the same
    ones it is too large, so what it calls noise may be a loss all the same.
    """
    manager = _task_manager(params)
    before, after = _evaluate(base, params, manager), _evaluate(model, params, manager)
    change: Results = {}
    for task, metrics in after.items():
        change[task] = {}
        for name in (n for n in metrics if not n.endswith(STDERR)):
            change[task][name] = metrics[name] - before[task][name]
            errors = (before[task].get(name + STDERR), metrics.get(name + STDERR))
            if errors[0] is not None and errors[1] is not None:
                change[task][name + STDERR] = math.hypot(errors[0], errors[1])
    return {
        "model": model,
        "base": base,
        "tasks": list(params.tasks),
        "limit": params.limit,
        "before": before,
        "after": after,
        "change": change,
        "commit": commit(),
        "versions": {**versions(), "lm-eval": version("lm-eval")},
    }


def model_path(model: str) -> str:
    """What to load for a name that a user gives.

    Of a run its trained model, of `demo` the demo's model, else the name itself.
    """
    run = Path(model)
    if model == "demo" or not (run / "run.json").is_file():
        return model_source(model)
    if not (run / "model").is_dir():
        raise ConfigError(
            f"{run} is a run without a trained model (no {run / 'model'}): let it finish, or name "
            "a checkpoint's folder"
        )
    return str(run / "model")


def _task_manager(params: CapabilityParams) -> Any:
    """The harness' index of tasks.

    Of the user's own where they are all there, else of its thousands, which takes seconds.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"capability needs the lm-evaluation-harness, which cannot be imported ({error}). "
            "Run: pip install 'neat-align[capability]'"
        ) from error
    own = None if params.include_path is None else str(params.include_path)
    if own is not None:
        manager = TaskManager(include_path=own, include_defaults=False)
        if set(params.tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=own)
    known = set(manager.all_tasks)
    unknown = [task for task in params.tasks if task not in known]
    if unknown:
        raise ConfigError(
            f"the lm-evaluation-harness knows no task {', '.join(map(repr, unknown))}: `lm-eval "
            "ls tasks` lists its tasks; a task of your own needs --include_path with the folder "
            "of its YAML file"
        )
    return manager


def _evaluate(model: str, params: CapabilityParams, manager: Any) -> Results:
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # The harness and the model that it measured before may hold each other.
    clear_device_cache(garbage_collection=True)
    policy: Any = load_policy(model_path(model))
    policy.to(compute_device()).eval()
    wrapped = HFLM(
        pretrained=policy, tokenizer=load_tokenizer(policy), batch_size=params.batch_size
    )
    try:
        evaluated = simple_evaluate(
            wrapped,
            tasks=list(params.tasks),
            task_manager=manager,
            limit=params.limit,
            log_samples=False,
        )
    except (DatasetsError, OSError) as error:
        raise ConfigError(
            f"the data of {', '.join(params.tasks)} cannot be read: {error}. Tasks of the harness "
            "come from the hub; without a network, give a task of your own with dataset_path: "
            "json and data_files"
        ) from error
    assert evaluated is not None, "the harness returns results on the main process"
    return {task: _numbers(metrics) for task, metrics in evaluated["results"].items()}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The harness' `acc,none` and `acc_stderr,none` as `acc` and `acc_stderr`; of another filter,
    `acc,filter`. "N/A" is left out.
    """
    out: dict[str, float] = {}
    for key, value in metrics.items():
        name, comma, chosen_filter = key.partition(",")
        if comma and isinstance(value, int | float) and math.isfinite(value):
            metric, is_error = name.removesuffix(STDERR), name.endswith(STDERR)
            label = metric if chosen_filter == "none" else f"{metric},{chosen_filter}"
            out[label + (STDERR if is_error else "")] = float(value)
    return out
