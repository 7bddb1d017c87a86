"""How start-up grows with the data: time and memory until a run may begin, at 1k to 100k prompts.

    python benchmarks/startup.py --json benchmarks/results/startup.json

A file of conversations with a chosen and a rejected answer (130 words a row) is read, every prompt
is checked with the demo model's tokenizer and chat template, the data is fingerprinted for the run
key, and a trainer is made around a tiny model: everything before the first completion is sampled.
Each size runs in a process of its own, and so does the empty start that is taken off (64 prompts).
CPU seconds, since wall seconds say as much about the machine's other work.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import in_own_process, load_tokenizer, parser, save, show
from transformers import LlamaConfig, LlamaForCausalLM

from neat_align import NEATConfig, NEATTrainer
from neat_align.errors import ConfigError
from neat_align.files.provenance import peak_rss_bytes
from neat_align.pipeline import load_data
from neat_align.script_arguments import ScriptArguments

SIZES = (1_000, 10_000, 100_000)
EMPTY = 64
TEXT = (
    "the of to and in is it you that he was for on are with as his they be at one have this "
    "from or had by hot word but what some we can out other were all there when up use your how "
    "said each she which their time will way about many then them write would like so these her "
    "long"
)
WORDS = TEXT.split()


def write_prompts(path: Path, count: int) -> None:
    """Conversations with answers, a line each; every row differs."""
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(draw.choices(WORDS, k=number))

    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {
                "prompt": [{"role": "user", "content": f"{i}: {words(40)}?"}],
                "chosen": [{"role": "assistant", "content": words(45)}],
                "rejected": [{"role": "assistant", "content": words(45)}],
                "topic": words(1),
            }
            file.write(json.dumps(row) + "\n")


def tiny_model(tokenizer: Any) -> LlamaForCausalLM:
    """A model with hardly any weights, so that what is measured is the data."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def measure(count: int) -> dict[str, float]:
    """CPU seconds of each part of a start with this many prompts, and peak resident bytes."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begun = time.process_time()
        result = work()
        seconds[name] = time.process_time() - begun
        return result

    warnings.simplefilter("ignore")
    tokenizer = load_tokenizer()
    model = tiny_model(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        write_prompts(path, count)
        config = NEATConfig(
            output_dir=f"{folder}/run", rank_by="origin", report_to="none", use_cpu=True
        )
        script = ScriptArguments(dataset_name=str(path), holdout=min(64, count // 4))
        before = peak_rss_bytes()
        rows, held_out = timed("read", lambda: load_data(script))

        def make_trainer() -> NEATTrainer:
            return NEATTrainer(
                model,
                args=config,
                train_dataset=rows,
                eval_dataset=held_out,
                processing_class=tokenizer,
            )

        trainer = timed("check and trainer", make_trainer)
        timed("run key", trainer.parts.run_key)
        timed("plan", lambda: trainer.parts.plan)
    if len(trainer.parts.data.rows) + len(held_out) != count:
        raise ConfigError(f"{count} prompts were written, and not all of them were read")
    return {**seconds, "peak_bytes": peak_rss_bytes(), "bytes_added": peak_rss_bytes() - before}


def growth(runs: dict[int, dict[str, float]]) -> dict[str, Any]:
    """What a prompt costs at each size, without the empty start, and how that grows.

    `…_ratio` divides the last size's cost a prompt by that of the size before: 1 is linear.
    """
    empty, found = runs[EMPTY], {}
    parts = [name for name in empty if not name.startswith(("peak", "bytes"))]
    for size in SIZES:
        added = size - EMPTY
        micro = {name: 1e6 * max(0.0, runs[size][name] - empty[name]) / added for name in parts}
        found[size] = {
            "microseconds_a_prompt": {**micro, "all": sum(micro.values())},
            "megabytes_a_thousand_prompts": (runs[size]["peak_bytes"] - empty["peak_bytes"])
            / added
            / 1e3,
        }
    last, before = found[SIZES[-1]], found[SIZES[-2]]
    return {
        "sizes": {str(size): facts for size, facts in found.items()},
        "time_ratio": last["microseconds_a_prompt"]["all"] / before["microseconds_a_prompt"]["all"],
        "memory_ratio": last["megabytes_a_thousand_prompts"]
        / before["megabytes_a_thousand_prompts"],
    }


def main() -> None:
    """Measure every size, print a table, write the result file."""
    made = parser(__doc__)
    made.add_argument("--one", type=int, help="measure this many prompts in this process")
    args = made.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one)))
        return
    runs = {size: in_own_process(["--one", str(size)]) for size in (EMPTY, *SIZES)}
    result = {"runs": {str(size): run for size, run in runs.items()}, "growth": growth(runs)}
    rows = []
    for size, facts in result["growth"]["sizes"].items():
        micro = facts["microseconds_a_prompt"]
        rows.append(
            [
                f"{int(size):,}",
                *(f"{micro[name]:.1f}" for name in micro),
                f"{facts['megabytes_a_thousand_prompts']:.2f}",
            ]
        )
    show(
        "Start-up: CPU microseconds a prompt, peak MB a thousand prompts",
        ["prompts", *micro, "MB"],
        rows,
    )
    grown = result["growth"]
    print(
        f"100k against 10k, a prompt: time x{grown['time_ratio']:.2f}, memory "
        f"x{grown['memory_ratio']:.2f} (1 is linear)"
    )
    save(args.json, {"benchmark": "startup", "command": " ".join(sys.argv), **result})


if __name__ == "__main__":
    main()
