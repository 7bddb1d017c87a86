"""What the benchmarks share.

A model, sides timed in turn, peak memory in a process of its own, a result file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import psutil
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from neat_align.files.provenance import commit, cpu_name, versions
from neat_align.modeling.demo_model import demo_model_path, find_gguf
from neat_align.modeling.device import compute_device

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
GIB = 2**30


# Randomly initialised Llama shapes. demo-shape is the demo's model where that is not installed; its
# numbers are another's, its arithmetic is not.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "demo-shape": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny": {
        "vocab_size": 49_152,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def load_model(name: str) -> Any:
    """A model with fp32 weights.

    `demo` is SmolLM2-135M-Instruct; else one of SHAPES.
    """
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    if name not in SHAPES:
        raise SystemExit(f"--model is {name!r}; it must be demo, {', '.join(SHAPES)}")
    torch.manual_seed(0)
    shape = LlamaConfig(**SHAPES[name], max_position_embeddings=8192, tie_word_embeddings=True)
    with device():  # a billion random numbers take a CPU a quarter of a minute
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)


def load_tokenizer() -> Any:
    """The demo model's tokenizer; a token a byte where that is not installed."""
    if find_gguf() is not None:
        return AutoTokenizer.from_pretrained(demo_model_path())
    vocabulary = {symbol: i + 3 for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    specials = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(BPE({**specials, **vocabulary}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return compute_device()


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def in_turn(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side.

    One run each to warm up, then `repeats` rounds in which every side runs once, in turning order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(repeats + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            side = sides[name]
            synchronize()
            start = time.perf_counter()
            side()
            synchronize()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def speedup(peer: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """The peer's time over ours, paired by round."""
    return spread([p / o for p, o in zip(peer, ours, strict=True)])


@contextlib.contextmanager
def timed_calls(calls: Sequence[tuple[str, Any, str]], seconds: dict[str, float]) -> Iterator[None]:
    """While open, adds the seconds of calls to `seconds`, by what they are called.

    Each of `calls` is that, where the function is looked up, and its name there.
    """

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed

    with contextlib.ExitStack() as patched:
        for name, owner, attribute in calls:
            function = around(name, getattr(owner, attribute))
            patched.enter_context(patch.object(owner, attribute, function))
        yield


def reset_peak_rss() -> None:
    """Let the kernel's peak of this process's resident set begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM


def peak_rss() -> int:
    """The most bytes in this process's resident set since it began, or was reset."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


class PeakMemory:
    """Peak bytes added while it is open.

    Resident set on a CPU (sampled by the kernel), allocator's peak on a GPU.
    """

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            reset_peak_rss()
            self.start = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self.start
        else:
            self.bytes = peak_rss() - self.start


def in_memory(model: torch.nn.Module) -> None:
    """Have all of a model and of its gradients in memory, so that a step adds neither.

    Weights that were read from a file come into memory when they are used.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
        parameter.grad = torch.ones_like(parameter)


def in_own_process(arguments: Sequence[str]) -> Any:
    """Run this script again with other arguments; its last line of output is JSON.

    Whatever is freed goes back to the system at once, so that its peak is that of what is used and
    does not depend on what the allocator keeps.
    """
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, sys.argv[0], *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **at_once},
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def facts() -> dict[str, Any]:
    """Machine, versions and commit."""
    found: dict[str, Any] = {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    with contextlib.suppress(PackageNotFoundError):
        found["versions"]["trl"] = version("trl")
    found["machine"] = {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["machine"]["gpu"] = torch.cuda.get_device_name()
    return found


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write the result file."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, **facts()}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, help="where the result file goes")
    made.add_argument(
        "--repeats", type=int, default=5, help="timed runs of each side (after one to warm up)"
    )
    made.add_argument("--model", default="demo", help=f"demo, or {', '.join(SHAPES)}")
    return made
