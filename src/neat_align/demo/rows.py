"""The prompts that ship with the package."""

from __future__ import annotations

import json
from importlib.resources import files

from neat_align.prompts.loading import rows_from_dataset
from neat_align.prompts.rows import PromptRow


def demo_rows(split: str) -> list[PromptRow]:
    """The rows of one split; `split` is train or heldout."""
    text = (files("neat_align.demo") / "prompts.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    of_split = [record for record in records if record["split"] == split]
    for record in of_split:
        del record["split"]
    return rows_from_dataset(of_split, name="demo prompts")
