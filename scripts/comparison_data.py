"""Short prompts from a data set, as the comparisons on other data use them.

    python scripts/comparison_data.py IN.jsonl OUT.jsonl

Of the rows with one user turn of at most `--words` words it keeps `--rows`, evenly spaced, in the
file's order. Transcripts become their one human turn; with `--text`, prompts stay text to be
continued, which `--ask` puts into a question to a chat model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from neat_align.prompts.loading import load_rows
from neat_align.prompts.row_forms import to_conversation


def main() -> None:
    """Read, keep, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--text", action="store_true")
    parser.add_argument(
        "--ask",
        help='What a chat model is asked to do with a text: --text --ask "Go on with this film '
        'review: "',
    )
    args = parser.parse_args()
    if args.ask and not args.text:
        parser.error("--ask is about texts: give --text, too")
    kept: list[dict[str, Any]] = []
    seen: set[str] = set()
    rows = load_rows(args.source)
    for row in rows if args.text else map(to_conversation, rows):
        said = row.prompt if isinstance(row.prompt, str) else row.prompt[0]["content"]
        if (
            (not args.text and len(row.prompt) != 1)
            or len(said.split()) > args.words
            or said in seen
        ):
            continue
        seen.add(said)
        answers = {
            name: text
            for name, text in (("chosen", row.chosen), ("rejected", row.rejected))
            if text is not None
        }
        prompt = [{"role": "user", "content": args.ask + said}] if args.ask else row.prompt
        kept.append({"prompt": prompt, **answers})
    kept = [kept[i * len(kept) // args.rows] for i in range(min(args.rows, len(kept)))]
    args.out.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8"
    )
    print(f"{len(kept)} rows in {args.out}")


if __name__ == "__main__":
    main()
