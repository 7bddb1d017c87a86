"""The prompts that ship with the package."""

from __future__ import annotations

import json
from importlib.resources import files

from neat_align.prompts.loading import rows_from_dataset
from neat_align.prompts.rows import PromptRow


def demo_rows(split: str) -> list[PromptRow]:
    """The prompts that ship with the package; `split` is train or heldout."""
    text = (files("neat_align.demo") / "prompts.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return rows_from_dataset(
        [{k: v for k, v in r.items() if k != "split"} for r in records if r["split"] == split],
        name="demo prompts",
    )
