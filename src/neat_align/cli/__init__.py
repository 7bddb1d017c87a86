"""The command line: `neat-align VERB`.

Heavy imports happen inside commands, so that `--help` answers at once.
"""

from __future__ import annotations

from neat_align.cli.app import PAUSED, app, main

__all__ = ["PAUSED", "app", "main"]
