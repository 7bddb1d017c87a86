"""neat-align: negative-prompt-driven alignment of language models (NEAT, arXiv:2410.12194)."""

from __future__ import annotations

__version__ = "0.1.0"
