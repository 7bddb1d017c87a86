"""`python -m neat_align.cli`."""

from __future__ import annotations

from neat_align.cli.app import main

main()
