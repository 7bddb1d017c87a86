"""What every card says, and how a card writes text that comes from outside.

A card is Markdown that the hub renders, and it leaves the machine: what stands in it must neither
be read as markup nor say where anything lies on a disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neat_align.reporting.terminal import printable

METHOD = (
    "The model wrote several answers to every prompt, some of them under instructions to be good "
    "and some under instructions to be bad, and {ranked}. It then learned, on the plain prompt, to "
    "rank the better above the worse and to write the best: NEAT, *Negative-Prompt-driven "
    "Alignment for Generative Language Model* "
    "([arXiv:2410.12194](https://arxiv.org/abs/2410.12194)), in the independent implementation "
    "neat-align, whose losses are its own documented choice."
)
BY_REWARD = "a reward scored all of them as answers to the plain prompt"
BY_ORIGIN = "their instructions alone said which are the better ones"
CAUTION = (
    "It was trained on answers that were written to be bad, on purpose and under instruction. They "
    "are not part of this repository, and the model learned to rank them low; it can still write "
    "such text, by itself or when it is asked to.",
    "A reward is a proxy. A gain in the one that was trained on can be bought by length, flattery "
    "or sameness: read the second judge, KL, distinct-2 and answers to your own prompts beside it.",
    "It was measured on prompts like those that it was trained on, in their language, and on "
    "nothing else; its base's limits and license stay.",
)
CITATION = """@article{qiao2024neat,
  title   = {Negative-Prompt-driven Alignment for Generative Language Model},
  author  = {Qiao, Shiqi and Xv, Ning and Liu, Biao and Geng, Xin},
  journal = {arXiv preprint arXiv:2410.12194},
  year    = {2024}
}"""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_MARKUP = re.compile(r"([\\`*|<>\[\]])")
_FILE_ENDINGS = (".json", ".jsonl", ".parquet", ".csv", ".gz", ".yaml", ".yml", ".txt")


def is_hub_name(name: str) -> bool:
    """Whether this is `owner/name` and nothing on this machine's disk."""
    if not _HUB_NAME.fullmatch(name) or name.endswith(_FILE_ENDINGS):
        return False
    return "--" not in name and ".." not in name and not Path(name).exists()


def hub_name(name: str) -> str | None:
    """The name, where it is one of the hub's; None for a folder or a file."""
    return name if is_hub_name(name) else None


def words(text: Any) -> str:
    """Text on one line that Markdown does not read as markup."""
    return _MARKUP.sub(r"\\\1", " ".join(printable(str(text)).split()))


def safe_value(value: Any) -> Any:
    """A setting without the machine in it.

    Of a path the last name stays, of a URL that there is one; hub names, import paths and all other
    values stay as they are.
    """
    if isinstance(value, Mapping):
        return {str(k): safe_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [safe_value(v) for v in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        return "(a server's URL)"
    if re.search(r"[/\\]", value) and not is_hub_name(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    right = ["---", *("---:" for _ in heading[1:])] if len(heading) > 2 else ["---"] * len(heading)
    lines = [heading, right, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
