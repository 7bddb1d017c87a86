"""What a model's card knows: of the model, its base and its data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from neat_align.files.atomic import read_json
from neat_align.reporting.card_texts import hub_name, is_hub_name, words
from neat_align.reporting.run_files import RunContents, mapping

# What `demo` stands for, and its license.
DEMO_BASE, DEMO_LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"


@dataclass(frozen=True)
class CardModel:
    """What is known of the model itself.

    `base` is the name or folder that it was loaded from. `adapter` is the kind of the adapter that
    the folder holds ("LORA"); None: whole weights. `was_merged`: an adapter was trained and then
    merged into them.
    """

    base: str
    revision: str | None = None
    adapter: str | None = None
    was_merged: bool = False

    @property
    def loaded_by(self) -> str:
        """The library that loads it, as the hub names it."""
        return "transformers" if self.adapter is None else "peft"


@dataclass(frozen=True)
class CardWishes:
    """What whoever asks for a card wants in it; None and () leave it to the run."""

    name: str | None = None
    language: Sequence[str] = ()
    license: str | None = None
    base: str | None = None
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()


def recorded_of(run: RunContents, run_dir: Path) -> CardModel:
    """The model as a run has recorded it, or as it lies in the run's model/."""
    model, script = mapping(run.record.get("model")), mapping(run.record.get("script"))
    named = model.get("name") or script.get("model_name_or_path") or run.result.get("model") or ""
    adapter, saved = model.get("adapter"), run_dir / "model" / "adapter_config.json"
    if not model and saved.is_file():  # a run of an early version
        adapter = read_json(saved).get("peft_type")
    return CardModel(str(named), script.get("model_revision"), adapter)


def is_demo(run: RunContents, model: CardModel) -> bool:
    """Whether the base is the demo's model, loaded from a folder."""
    script = mapping(run.record.get("script")).get("model_name_or_path", run.result.get("model"))
    return script == "demo" and not is_hub_name(model.base)


def base_words(run: RunContents, model: CardModel) -> str:
    """The base's last name."""
    base = DEMO_BASE if is_demo(run, model) else model.base
    return words(re.split(r"[/\\]", base.rstrip("/\\"))[-1] or "model")


def base_on_hub(run: RunContents, model: CardModel) -> str | None:
    """The base's name on the hub; None where it is a folder."""
    return DEMO_BASE if is_demo(run, model) else hub_name(model.base)


def data_names(run: RunContents) -> list[str]:
    """Training data and held-out data, as they were named."""
    script = mapping(run.record.get("script"))
    named = [script.get("dataset_name") or run.result.get("dataset")]
    return [str(n) for n in (*named, script.get("eval_dataset_name")) if n]


def data_on_hub(run: RunContents) -> list[str]:
    """Those of them that are names on the hub."""
    return [name for name in map(hub_name, data_names(run)) if name is not None]


def license_of(base: str | None) -> str | None:
    """The license that a base's own card names, where that card is on this machine."""
    if not base:
        return None
    if base == DEMO_BASE:
        return DEMO_LICENSE
    found = Path(base) / "README.md"
    if is_hub_name(base):
        cached = try_to_load_from_cache(base, "README.md")
        found = Path(cached) if isinstance(cached, str) else found
    if not found.is_file():
        return None
    try:
        named = ModelCard.load(found, ignore_metadata_errors=True).data.license
    except (ValueError, OSError, yaml.YAMLError):  # somebody else's card
        return None
    return named if isinstance(named, str) else None
