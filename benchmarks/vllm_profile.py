"""Where a decoding second goes on a CPU: in a vLLM server, and in the transformers sampler.

    python benchmarks/vllm_profile.py --vllm-python PATH --model FOLDER --json OUT

The same prompts, completions and tokens for both, as benchmarks/vllm_sampler.py asks for them; each
side draws them once to warm up and once under torch's profiler, which slows both. Of each side's
wall time: operators by kind, each without what it calls, on the thread that runs the model, and
what is outside of torch's operators there (Python, scheduling, waiting for requests).
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_sampler import requests

from neat_align.modeling.precision import half_precision_copy
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from neat_align.sampling.vllm_client import VllmClient
from neat_align.sampling.vllm_sampler import VllmSampler

# Parts of operators' names, by kind; what has none of them is another operator.
KINDS = {
    "matrix products": ("::mm", "addmm", "linear", "bmm", "matmul", "onednn", "gemm"),
    "attention": ("attention", "attn", "softmax", "reshape_and_cache", "paged"),
    "sampling": ("sort", "topk", "multinomial", "log_softmax", "argmax", "gather", "exponential"),
}


def kind_of(name: str) -> str:
    return next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "other")


def has_operators(trace: dict[str, Any]) -> bool:
    """Whether a trace is of a process that runs the model: the server's own has none."""
    return any(event.get("cat") == "cpu_op" for event in trace["traceEvents"])


def by_kind(trace: dict[str, Any]) -> dict[str, float]:
    """Shares of the busiest thread's wall time, from a chrome trace."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") == "cpu_op":
            threads[event["pid"], event["tid"]].append(event)
    events = max(threads.values(), key=lambda found: sum(e["dur"] for e in found))
    events.sort(key=lambda e: (e["ts"], -e["dur"]))
    spent: dict[str, float] = defaultdict(float)
    open_: list[tuple[float, dict[str, Any]]] = []
    own = {id(e): float(e["dur"]) for e in events}
    top = 0.0
    for event in events:
        while open_ and open_[-1][0] <= event["ts"]:
            open_.pop()
        if open_:
            own[id(open_[-1][1])] -= event["dur"]
        else:
            top += event["dur"]
        open_.append((event["ts"] + event["dur"], event))
    for event in events:
        spent[kind_of(event["name"])] += own[id(event)]
    wall = max(e["ts"] + e["dur"] for e in events) - events[0]["ts"]
    shares = {kind: spent[kind] / wall for kind in (*KINDS, "other")}
    return {"wall_seconds": wall / 1e6, **shares, "outside of torch": 1 - top / wall}


@contextmanager
def served(python: str, model: str, traces: Path) -> Iterator[str]:
    """A vLLM server that can be profiled; its URL."""
    port = harness.free_port()
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
        *("--max-model-len", "512", "--enforce-eager", "--no-enable-chunked-prefill"),
        "--profiler-config",
        json.dumps({"profiler": "torch", "torch_profiler_dir": str(traces)}),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit("vLLM did not start") from None
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def post(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=300).close()


def of_server(args: Any, asked: list[SampleRequest], params: SamplingParams) -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory() as folder,
        served(args.vllm_python, args.model, Path(folder)) as url,
    ):
        client = VllmClient(url, timeout=600.0)
        model = client.model()
        sampler = VllmSampler(client, model.name, (), model.max_model_len, 256)
        sampler.sample(asked, params)
        post(f"{url}/start_profile")
        sampler.sample(asked, params)
        post(f"{url}/stop_profile")
        time.sleep(5)
        traces = [read(path) for path in Path(folder).rglob("*.json*")]
        found = [by_kind(trace) for trace in traces if has_operators(trace)]
    return max(found, key=lambda shares: shares["matrix products"] * shares["wall_seconds"])


def read(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    found: dict[str, Any] = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    return found


def of_transformers(
    args: Any, asked: list[SampleRequest], params: SamplingParams
) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    sampler = TransformersSampler(half_precision_copy(model, torch.bfloat16), (), 0, 64)
    sampler.sample(asked, params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sampler.sample(asked, params)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        return by_kind(read(Path(folder) / "trace.json"))


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--vllm-python", required=True, help="of the venv that has vLLM")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completion", type=int, default=32)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    asked = requests(tokenizer, args.prompts, 128, 8)
    params = SamplingParams(args.completion)
    sides = {
        "vllm": of_server(args, asked, params),
        "transformers": of_transformers(args, asked, params),
    }
    rows = [
        [name, *(f"{value:.2f}" for value in shares.values())] for name, shares in sides.items()
    ]
    harness.show("shares of wall time", ["side", *sides["vllm"]], rows)
    setting = {"prompts": args.prompts, "k": 8, "prompt": 128, "completion": args.completion}
    harness.save(args.json, {"setting": setting | {"dtype": "bf16"}, "shares": sides})


if __name__ == "__main__":
    main()
