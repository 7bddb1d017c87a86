"""Memory of two processes while they load a model and divide its weights, as FSDP2 does.

    python benchmarks/loading_memory.py --json OUT

A random Llama of 25 million weights, in a folder in bf16, loaded in fp32 as for training all of
them. `whole`: every process loads it, and each keeps its half. `once`: with
`cpu_ram_efficient_loading` the first process alone loads it, and hands the halves out. `mapped`: as
`whole`, loaded in the type of the file, whose pages then are read where they are needed, and
shared. What each process holds is its resident memory less that before loading; without a GPU the
halves are in it, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from transformers import LlamaConfig, LlamaForCausalLM

from neat_align.modeling.load_options import LoadOptions
from neat_align.modeling.loading import load_policy
from neat_align.trainer.first_process import give_room

MB = 1e6
WAYS = ("whole", "once", "mapped")


def held() -> float:
    """Megabytes of resident memory."""
    return psutil.Process().memory_info().rss / MB


def divided(model: torch.nn.Module, *, once: bool) -> None:
    """As accelerate does on accelerators; on a CPU it would not, unasked."""
    accelerator = Accelerator(cpu=True)
    state: Any = accelerator.state
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=once,
        state_dict_type="FULL_STATE_DICT",
    )
    fsdp2_prepare_model(accelerator, model)


def worker(folder: Path, how: str) -> None:
    """One process: writes what it held to FOLDER/HOW-RANK.json."""
    PartialState(cpu=True)
    before = held()
    options = LoadOptions("bfloat16" if how == "mapped" else "float32")
    model = load_policy(str(folder), options, once=how == "once")
    loaded = held() - before
    give_room(model)
    harness.reset_peak_rss()
    divided(model, once=how == "once")
    found = {
        "loaded": round(loaded),
        "most while dividing": round(harness.peak_rss() / MB - before),
    }
    (folder / f"{how}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def measured(folder: Path, how: str) -> list[dict[str, float]]:
    """What each of two processes held."""
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(harness.free_port()), __file__),
            *("--worker", str(folder), how),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [json.loads((folder / f"{how}-{rank}.json").read_text()) for rank in (0, 1)]


def main() -> None:
    """Measure both ways."""
    parser: argparse.ArgumentParser = harness.parser(__doc__)
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "HOW"))
    args = parser.parse_args()
    if args.worker:
        worker(Path(args.worker[0]), args.worker[1])
    shape = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=5,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as name:
        model = LlamaForCausalLM(shape).to(torch.bfloat16)
        model.save_pretrained(name)
        size = 4 * sum(p.numel() for p in model.parameters())
        result: dict[str, Any] = {"setting": {"processes": 2, "weights MB": round(size / MB)}}
        for how in WAYS:
            result[how] = measured(Path(name), how)
    rows = [
        [how, str(rank), *(f"{value:.0f}" for value in found.values())]
        for how in WAYS
        for rank, found in enumerate(result[how])
    ]
    columns = ["", "process", *result["once"][0]]
    harness.show(f"MB held, of a model of {size / MB:.0f} MB in fp32", columns, rows)
    harness.save(args.json, result)


if __name__ == "__main__":
    main()
