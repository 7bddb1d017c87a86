"""Two processes that ask one vLLM server (a stand-in) make the round that one process makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_distributed import run

from vllm_server import StandIn, servable_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_two_processes_ask_one_server(tmp_path: Path, adapter: bool) -> None:
    asked = {}
    for processes in (1, 2):
        with StandIn(servable_model()) as server:
            folder = tmp_path / str(processes)
            more = ["lora"] if adapter else []
            script = "two_processes_vllm.py"
            run(folder, server.url, *more, processes=processes, script=script)
        rounds = [b for b in server.completions() if b["seed"]]
        asked[processes] = sorted((b["seed"], tuple(b["prompt"])) for b in rounds)
        # Rank 0 gives each round's weights, once.
        path = "/v1/load_lora_adapter" if adapter else "/collective_rpc"
        assert server.paths().count(path) == 2
    assert asked[1] == asked[2]
    assert len(asked[1]) == 32
    one = torch.load(tmp_path / "1" / "weights-0.pt")
    for rank in (0, 1):
        other = torch.load(tmp_path / "2" / f"weights-{rank}.pt")
        for name, weight in one.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-6, msg=name)
