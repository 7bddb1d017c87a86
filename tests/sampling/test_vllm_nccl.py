"""Weights by NCCL, as far as a machine without a GPU can tell: which requests are made in which
order, that what is listed is what is sent, who is refused, and NCCL's library up to the GPU.
"""

from __future__ import annotations

import base64
import ctypes.util
import importlib.util
import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from neat_align.errors import ConfigError, SamplerError, SamplerUnavailableError
from neat_align.modeling.whole_weights import weight_forms, whole_weights
from neat_align.sampling.nccl import TYPES, Nccl
from neat_align.sampling.policy_now import PolicyNow
from neat_align.sampling.vllm_client import VllmClient
from neat_align.sampling.vllm_nccl import VllmNccl, check_sendable
from neat_align.sampling.vllm_weights import VllmWeights
from tiny import tiny_model
from vllm_server import Asked, RealVllm, StandIn, save_servable, servable_model

ID = bytes(range(128))
STEPS = [
    "/pause?mode=wait",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/resume",
]


@dataclass
class Wire:
    """A group of two in one process: the stand-in takes from it what the trainer sends.

    `joins` and `sends` are called first, and may fail or wait as NCCL does without its peer.
    """

    joins: Callable[[], Any] = lambda: None
    sends: Callable[[], Any] = lambda: None
    members: int = 3
    tensors: Any = field(default_factory=queue.Queue)
    said: list[str] = field(default_factory=list)

    def version(self) -> int:
        return 22707

    def unique_id(self) -> bytes:
        return ID

    def join(self, unique_id: bytes, members: int, device: torch.device) -> Wire:
        assert (unique_id, members) == (ID, self.members)
        self.joins()
        return self

    def warm_up(self) -> None:
        self.said.append("warm-up")

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.sends()
        self.tensors.put(tensor.clone())

    def abort(self) -> None:
        self.said.append("abort")


@dataclass
class Receiver:
    """The endpoints of vLLM's weight-transfer engine, which load what came over the wire."""

    wire: Wire
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    server: Any = None

    def __call__(self, asked: Asked) -> Any:
        if asked.path in self.answers:
            return self.answers[asked.path]
        if asked.path == "/get_world_size":
            return 200, {"world_size": 2}
        if asked.path == "/update_weights":
            told = asked.body["update_info"]
            state = dict[str, torch.Tensor]()
            for name, dtype, shape in zip(
                told["names"], told["dtype_names"], told["shapes"], strict=True
            ):
                state[name] = self.wire.tensors.get(timeout=5.0)
                assert state[name].dtype == getattr(torch, dtype)
                assert list(state[name].shape) == shape
            missing = self.server.model.load_state_dict(state, strict=False).missing_keys
            assert set(missing) <= {"lm_head.weight"}, missing
        engine = ("weight", "/pause", "/resume")
        return (200, {}) if any(word in asked.path for word in engine) else ...


def giving(server: StandIn, wire: Wire, folder: Path, timeout: float = 5.0) -> VllmWeights:
    client = VllmClient(server.url, timeout=timeout)
    nccl: Any = wire
    return VllmWeights(client, folder, torch.bfloat16, nccl=VllmNccl(client, nccl, timeout))


def now(model: torch.nn.Module) -> PolicyNow:
    return PolicyNow(model, "current", False, (2,), lambda *_: [])


@pytest.mark.parametrize("tied", [False, True])
def test_weights_arrive_in_the_order_that_vllm_wants(tmp_path: Path, tied: bool) -> None:
    model, wire = servable_model(), Wire()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    receiver = Receiver(wire)
    with StandIn(servable_model(5), before=receiver) as server:
        receiver.server = server
        given = giving(server, wire, tmp_path)
        assert given.serve(now(model)) == given.serve(now(model)) == "base"
        asked = [a for a in server.asked if a.path != "/v1/models"]
        arrived = {name: v.clone() for name, v in server.model.state_dict().items()}
        first = len(asked)
        with torch.no_grad():
            model.model.embed_tokens.weight.add_(0.1)
        given.serve(now(model))
        # The group stays.
        assert [p for p in server.paths()[-8:] if p != "/v1/models"][-6:] == STEPS
        assert server.paths().count("/init_weight_transfer_engine") == 1
    assert [a.path for a in asked[:first]] == [
        "/shutdown_weight_transfer_engine",
        "/get_world_size",
        "/init_weight_transfer_engine",
        *STEPS,
    ]
    assert asked[2].body["init_info"] == {
        "nccl_unique_id_b64": base64.b64encode(ID).decode(),
        "rank_offset": 1,
        "world_size": 3,
        "packed": False,
    }
    assert asked[6].body == {"weight_version": now(servable_model()).version} or tied
    names = asked[5].body["update_info"]["names"]
    assert len(names) == len(set(names)) == (20 if tied else 21)  # what is tied goes once
    assert wire.said == ["warm-up"]
    for name, value in servable_model().state_dict().items():
        if not (tied and name == "lm_head.weight"):
            assert torch.equal(arrived[name], value.bfloat16().float()), name
    assert not list(tmp_path.iterdir())


def never() -> None:
    raise SamplerError("NCCL says: unhandled system error")


def waits(seconds: float = 3.0) -> None:
    queue.Queue[None]().get(timeout=seconds)


@pytest.mark.parametrize(
    ("wire", "answers", "message"),
    [
        (Wire(joins=never), {}, "unhandled system error"),
        (Wire(joins=waits), {}, r"did not meet over NCCL within 0.5 s.*22707 here"),
        (
            Wire(joins=waits),
            {"/init_weight_transfer_engine": (500, {"error": "no GPU"})},
            "answers /init_weight_transfer_engine with 500: .*no GPU",
        ),
        (
            Wire(),
            {"/start_weight_update": (500, {"error": "already active"})},
            "/start_weight_update with 500: .*already active.*start it again",
        ),
        (Wire(sends=never), {}, "unhandled system error"),
        (
            Wire(sends=waits),
            {"/update_weights": (500, {"error": "no memory"})},
            "/update_weights with 500: .*no memory",
        ),
        (
            Wire(sends=waits),
            {},
            # Whichever of the two limits is met first.
            r"has not received the weights within 0.5 s \(vllm_timeout\)|given up on /update_w",
        ),
    ],
)
def test_what_goes_wrong_on_either_side_is_said_and_nobody_waits_for_ever(
    tmp_path: Path, wire: Wire, answers: dict[str, Any], message: str
) -> None:
    receiver = Receiver(wire, answers)
    with StandIn(servable_model(5), before=receiver) as server:
        receiver.server = server
        with pytest.raises((SamplerError, SamplerUnavailableError), match=message):
            giving(server, wire, tmp_path, timeout=0.5).serve(now(servable_model()))
        assert "/resume" not in server.paths()
    # A group in which a weight got lost is of no more use.
    assert ("abort" in wire.said) == ("weight_update" not in message and wire.said != [])


def test_another_rank_sends_nothing(tmp_path: Path) -> None:
    with StandIn(servable_model()) as server:
        given = giving(server, Wire(), tmp_path)
        given.writes, given.on_rank_zero = False, lambda give: "rank 0's"
        assert given.serve(now(servable_model())) == "rank 0's"
        assert not server.paths()


def test_what_is_listed_is_what_is_given() -> None:
    for family in ("llama", "gpt2"):
        model = tiny_model(family, 64)
        for what in ((model,), (model, {"lm_head.weight"}), (model, None, torch.bfloat16)):
            forms = [(f.name, f.dtype, f.shape) for f in weight_forms(*what)]
            given = [(name, v.dtype, tuple(v.shape)) for name, v in whole_weights(*what)]
            assert forms == given


def test_weights_that_vllm_knows_by_other_names_are_refused() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = servable_model()
    check_sendable(model, weight_forms(model))
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )
    with pytest.raises(ConfigError, match=r"in another form than its files \(.*experts"):
        check_sendable(experts, weight_forms(experts))
    with pytest.raises(ConfigError, match="a number type that is not sent"):
        check_sendable(model, weight_forms(model, None, torch.float8_e4m3fn))


# ---- who is refused before anything is paid for -------------------------------------------------


def refusing(message: str, status: int = 500) -> Callable[[Asked], Any]:
    reply = status, {"error": {"message": message}}
    return lambda asked: reply if asked.path == "/init_weight_transfer_engine" else ...


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("Not Found", 404),
        ("Weight transfer not configured.", 500),
        ("Invalid init_info for IPCWeightTransferEngine", 500),
        ("Invalid init_info for SparseNCCLWeightEngine", 500),
    ],
)
def test_a_server_that_was_not_started_for_it(message: str, status: int) -> None:
    with StandIn(servable_model(), before=refusing(message, status)) as server:
        client = VllmClient(server.url, timeout=5.0)
        with pytest.raises(SamplerError, match=rf"{status}.*{message}.*--weight-transfer-config"):
            client.check_takes_nccl()
    right = "Invalid init_info for NCCLWeightTransferEngine: missing 'rank_offset'"
    with StandIn(servable_model(), before=refusing(right)) as server:
        VllmClient(server.url, timeout=5.0).check_takes_nccl()


def test_a_library_that_is_not_there_is_named() -> None:
    with pytest.raises(SamplerError, match=r"NCCL cannot be loaded \(.*no-nccl.so.*CUDA on Linux"):
        Nccl("no-nccl.so")


def has_nccl() -> bool:
    return ctypes.util.find_library("nccl") is not None or (
        importlib.util.find_spec("nvidia") is not None
        and importlib.util.find_spec("nvidia.nccl") is not None
    )


@pytest.mark.skipif(not has_nccl() or torch.cuda.is_available(), reason="no NCCL, or a GPU")
def test_the_real_library_is_called_rightly_up_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install nvidia-nccl-cu12` is enough."""
    import contextlib

    import nvidia.nccl

    from neat_align.sampling import nccl

    monkeypatch.setattr(nccl, "_on", lambda device: contextlib.nullcontext())
    library = Nccl(str(next(Path(nvidia.nccl.__path__[0]).glob("lib/libnccl.so*"))))
    assert library.version() > 20000
    one, other = library.unique_id(), library.unique_id()
    assert len(one) == 128
    assert one != other
    with pytest.raises(SamplerError, match=r"NCCL says: unhandled cuda error.*driver"):
        library.join(one, 2, torch.device("cuda", 0))


def test_the_types_are_those_of_ncclh() -> None:
    """As in vLLM's own wrapper of the library, and in every release since 2.10."""
    assert (TYPES[torch.float16], TYPES[torch.float32], TYPES[torch.bfloat16]) == (6, 7, 9)


# ---- a real server ------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_real_server_knows_every_step(tmp_path: Path) -> None:
    """On a CPU it has the engine and no GPU: it takes what it is told up to there."""
    served = save_servable(tmp_path / "served")
    engine = ("--weight-transfer-config", '{"backend": "nccl"}')
    with RealVllm(served, tmp_path / "log", ("--dtype", "float32", *engine)) as server:
        client = VllmClient(server.url, timeout=60.0)
        client.check_takes_nccl()
        assert client.workers() == 1
        wire: Any = Wire(joins=lambda: waits(30.0), members=2)
        nccl = VllmNccl(client, wire, 60.0)
        with pytest.raises(SamplerError, match=r"engine with 500.*Cannot access acc"):
            nccl.begin(torch.device("cpu"))
        client.transfer(STEPS[0])
        client.transfer(STEPS[1])
        told = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
        with pytest.raises(SamplerError, match=r"/update_weights with 500.*not initialized"):
            client.transfer(STEPS[2], {"update_info": told})
        with pytest.raises(SamplerError, match=r"/finish_weight_update with 500.*without a"):
            client.transfer(STEPS[3], {"weight_version": "0123"})
        client.reset_cache()
        client.transfer(STEPS[5])
    with RealVllm(served, tmp_path / "log", ("--dtype", "float32")) as server:
        client = VllmClient(server.url, timeout=60.0)
        with pytest.raises(SamplerError, match="Weight transfer not configured"):
            client.check_takes_nccl()
