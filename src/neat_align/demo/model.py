"""The demo's model. Judges use it too, so `modeling.demo_model` finds and converts it."""

from __future__ import annotations

from neat_align.modeling.demo_model import HUB_NAME, PACKAGE, demo_model_path, find_gguf

__all__ = ["HUB_NAME", "PACKAGE", "demo_model_path", "find_gguf"]
