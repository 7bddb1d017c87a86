"""Two processes that ask one vLLM server (a stand-in) make the round that one process makes, also
where they divide the weights that they give it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_sharded_runs import needs_deepspeed

from launch import launch
from vllm_server import Asked, RealVllm, StandIn, save_servable, servable_model

pytestmark = [pytest.mark.distributed]
SCRIPT = "two_processes_vllm.py"


def asked_and_learned(
    folder: Path, what: list[str], *, processes: int
) -> tuple[list[tuple[int, tuple[int, ...]]], dict[str, torch.Tensor]]:
    """Seed and prompt of what the server was asked for, and the weights at the end."""
    with StandIn(servable_model()) as server:
        launch(SCRIPT, folder, server.url, *what, processes=processes)
    rounds = [b for b in server.completions() if b["seed"]]
    # Rank 0 gives each round's weights, once.
    path = "/v1/load_lora_adapter" if "lora" in what else "/collective_rpc"
    assert server.paths().count(path) == 2
    for rank in range(1, processes):
        first, other = (torch.load(folder / f"weights-{r}.pt") for r in (0, rank))
        assert all(torch.equal(other[name], value) for name, value in first.items())
    asked = sorted((b["seed"], tuple(b["prompt"])) for b in rounds)
    return asked, torch.load(folder / "weights-0.pt")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [[], ["lora"]], ids=["full", "lora"])
def test_two_processes_ask_one_server(tmp_path: Path, adapter: list[str]) -> None:
    asked, learned = asked_and_learned(tmp_path / "1", adapter, processes=1)
    assert len(asked) == 32
    for sharing in ([], ["shards"]):
        folder = tmp_path / "".join(["2", *sharing])
        also_asked, found = asked_and_learned(folder, [*adapter, *sharing], processes=2)
        assert also_asked == asked
        assert found.keys() == learned.keys()
        for name, weight in learned.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("adapter", [[], ["lora"]], ids=["full", "lora"])
def test_what_zero_3_divides_is_given_whole(
    tmp_path: Path, adapter: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canary of each round says so; DeepSpeed's own step is not one process's to the bit."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    asked, _ = asked_and_learned(tmp_path, [*adapter, "zero3"], processes=2)
    assert len(asked) == 32


@pytest.mark.slow
def test_a_scripts_own_engine_gathers_them_too(tmp_path: Path) -> None:
    """Each process draws its share from a copy; without the weights of the round it would stop."""
    launch(SCRIPT, tmp_path, "given", "shards")
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], servable_model().lm_head.weight)


@pytest.mark.slow
def test_a_server_that_takes_no_weights_ends_both_at_once(tmp_path: Path) -> None:
    def refuses(asked: Asked) -> object:
        return (500, {"error": "no"}) if asked.path == "/collective_rpc" else ...

    with StandIn(servable_model(), before=refuses) as server:
        launch(SCRIPT, tmp_path, server.url, "shards")
    first, second = ((tmp_path / f"stopped-{rank}.txt").read_text() for rank in (0, 1))
    assert first.startswith("SamplerError: the vLLM server 127.0.0.1_")
    assert "could not read the weights" in first
    assert second.startswith("OtherProcessError: another process failed while vLLM was given")


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("adapter", [[], ["lora"]], ids=["full", "lora"])
def test_a_real_server_is_given_what_two_processes_divide(
    tmp_path: Path, adapter: list[str]
) -> None:
    """Both rounds end only if the canaries agree, which each process has of its share."""
    more = ("--dtype", "float32", *(("--enable-lora",) if adapter else ()))
    with RealVllm(save_servable(tmp_path / "served"), tmp_path / "log", more) as server:
        launch(SCRIPT, tmp_path / "run", server.url, *adapter, "shards")
    assert not list((tmp_path / "run").glob("stopped-*"))
    assert len(list((tmp_path / "run" / "rounds").iterdir())) == 2
