"""Print the table of docs/reliability.md from a result of `make faults`.

python scripts/faults_table.py benchmarks/results/faults.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    """A row a fault, and all of them together."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = found["rows"]
    print("| fault | tried | lost |")
    print("|---|---|---|")
    for row in rows:
        print(f"| {row['fault']} | {row['tried']} | {row['lost']} |")
    print(f"| **all** | **{sum(r['tried'] for r in rows)}** | **{sum(r['lost'] for r in rows)}** |")
    print()
    cut = (
        ""
        if found["tried"] == found["planned"]
        else f" ({found['tried']} of the {found['planned']} tries of the whole script)"
    )
    print(
        f"Commit {found['commit']}, seed {found['seed']}, {found['events']} events in the "
        f"unbroken run{cut}."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
