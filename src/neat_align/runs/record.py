"""run.json: what was run, on what, with which versions. Secrets are masked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from neat_align.config import NEATConfig
from neat_align.files.atomic import read_json, write_json
from neat_align.files.provenance import versions
from neat_align.files.secrets import redacted
from neat_align.prompts.rows import PromptRow
from neat_align.runs.run_key import fingerprint


def write_run_record(
    output_dir: Path,
    args: NEATConfig,
    rows: Sequence[PromptRow],
    reward_names: Sequence[str],
    metrics_bytes: int = 0,
) -> None:
    """Write run.json into the run directory.

    `metrics_bytes` is how long metrics.jsonl is before the first step.
    """
    record: dict[str, Any] = {
        "config": redacted(cast("Any", args).to_dict()),
        "versions": versions(),
        "seed": args.seed,
        "data": {"rows": len(rows), "sha256": fingerprint(rows)},
        "rewards": list(reward_names),
        "metrics_bytes": metrics_bytes,
    }
    write_json(output_dir / "run.json", record)


def record_changes(output_dir: Path, args: NEATConfig, step: int, changes: Sequence[str]) -> None:
    """Note in run.json that the run went on from `step` with other settings; `config` then holds
    the new ones.
    """
    path = output_dir / "run.json"
    if path.is_file():
        record = read_json(path)
        record["config"] = redacted(cast("Any", args).to_dict())
        record["changes"] = [
            *record.get("changes", []),
            {"from_step": step, "changed": list(changes)},
        ]
        write_json(path, record)
