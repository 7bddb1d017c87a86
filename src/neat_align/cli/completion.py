"""What a shell completes of a run's options: their names, and values where they are few.

It answers on every press of a key, so nothing here imports transformers or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from neat_align.cli.option_facts import our_options
from neat_align.cli.option_groups import all_names
from neat_align.cli.option_names import flags, option_name


@dataclass(frozen=True)
class Completion:
    """A word that a shell offers; the attributes are those of click's CompletionItem."""

    value: str
    type: str = "plain"
    help: str = ""


def run_flags() -> list[str]:
    """Every way to write every option of a run."""
    return [flag for name in all_names() for flag in flags(name)]


def items(offered: Iterable[str], incomplete: str) -> list[Completion]:
    """What is offered and goes on from what is typed, with the typed one's dash."""
    # --max-completion-length for somebody who types dashes.
    dashed = "-" in incomplete[2:] and "_" not in incomplete
    written = ["--" + o[2:].replace("_", "-") if dashed else o for o in offered]
    return [Completion(w) for w in dict.fromkeys(written) if w.startswith(incomplete)]


def values_after(words: Sequence[str], incomplete: str) -> list[Completion]:
    """Values of the option that stands before; nothing (the shell then offers files) where any text
    is one.
    """
    before = [word for word in words if word != "="]
    at = next((i for i in reversed(range(len(before))) if before[i].startswith("--")), None)
    if at is None:
        return []
    name, taken = option_name(before[at]), len(before) - at - 1
    facts = our_options().get(name)
    if taken and not (facts is not None and facts.is_list):
        return []
    if name in _VALUES:
        found = _VALUES[name](incomplete)
    elif facts is not None and facts.choices:
        found = [*facts.choices]
    elif facts is not None and facts.is_switch:
        found = ["true", "false"]
    else:
        return []
    return [Completion(value) for value in found if value.startswith(incomplete)]


# ---- values: what ships by name; a shell offers files where nothing of it is meant ---------------


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes."""
    return [n for n in _yaml_files() if n.startswith(incomplete) and not n.startswith("compare-")]


def comparisons(incomplete: str) -> list[str]:
    """Shipped comparisons."""
    return [n for n in _yaml_files() if n.startswith(incomplete) and n.startswith("compare-")]


def banks(incomplete: str) -> list[str]:
    """Shipped banks of instructions."""
    from neat_align.prompts.instruction_banks import SHIPPED_BANKS

    return [bank for bank in SHIPPED_BANKS if bank.startswith(incomplete)]


def rewards(incomplete: str) -> list[str]:
    """Shipped rewards."""
    from neat_align.rewards.resolve import SHIPPED

    return [name for name in (*SHIPPED, "contrast") if name.startswith(incomplete)]


def demo(incomplete: str) -> list[str]:
    """The demo's model, or its prompts."""
    return ["demo"] if "demo".startswith(incomplete) else []


_VALUES: Mapping[str, Callable[[str], list[str]]] = {
    "model_name_or_path": demo,
    "dataset_name": demo,
    "instruction_bank": banks,
    "reward_funcs": rewards,
    "judge_funcs": rewards,
}


def _yaml_files() -> list[str]:
    folder = Path(str(files("neat_align.cli") / "recipes"))
    return sorted(path.stem for path in folder.glob("*.yaml"))
