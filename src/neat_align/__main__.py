"""`python -m neat_align`: the command line, for launchers that start a module (torchrun -m)."""

from __future__ import annotations

from neat_align.cli.app import main

if __name__ == "__main__":
    main()
