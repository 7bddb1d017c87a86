"""run.json: what was run, on what, with which versions. Secrets are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback

from neat_align.config import NEATConfig
from neat_align.files.atomic import read_json, write_json
from neat_align.files.provenance import versions
from neat_align.files.secrets import redacted
from neat_align.runs.run_key import set_options


def write_run_record(
    output_dir: Path,
    args: NEATConfig,
    reward_names: Sequence[str],
    data: Mapping[str, Any],
    metrics_bytes: int = 0,
) -> None:
    """Write run.json into the run directory.

    `data` is what it says about data and plan. `metrics_bytes` is how long metrics.jsonl is before
    the first step.
    """
    record: dict[str, Any] = {
        "config": redacted(cast("Any", args).to_dict()),
        "set_options": set_options(args),
        "versions": versions(),
        "seed": args.seed,
        **data,
        "rewards": list(reward_names),
        "metrics_bytes": metrics_bytes,
    }
    write_json(output_dir / "run.json", record)


def update_run_record(output_dir: Path, data: Mapping[str, Any]) -> None:
    """Bring what run.json says about data and plan up to date."""
    path = output_dir / "run.json"
    record = read_json(path)
    updated = record | dict(data)
    if updated != record:
        write_json(path, updated)


class RecordMore(TrainerCallback):
    """Adds to run.json what only the command knows that makes the run."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = redacted(facts)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The run's record is there now."""
        if state.is_world_process_zero:
            update_run_record(Path(str(args.output_dir)), self.facts)


def record_changes(output_dir: Path, args: NEATConfig, step: int, changes: Sequence[str]) -> None:
    """Note in run.json that the run went on from `step` with other settings; `config` then holds
    the new ones.
    """
    path = output_dir / "run.json"
    if path.is_file():
        record = read_json(path)
        record["config"] = redacted(cast("Any", args).to_dict())
        record["set_options"] = set_options(args)
        record["changes"] = [
            *record.get("changes", []),
            {"from_step": step, "changed": list(changes)},
        ]
        write_json(path, record)
