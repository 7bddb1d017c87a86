"""Runs in which another engine samples: a vLLM server, or a sampler that a script gives."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neat_align import (
    ConfigError,
    NEATTrainer,
    PolicyNow,
    Sample,
    SampleRequest,
    SamplerError,
    SamplerUnavailableError,
    SamplingParams,
)
from neat_align.network import event_loop
from neat_align.network.client import RetryPolicy
from neat_align.sampling.transformers_sampler import TransformersSampler
from neat_align.sampling.vllm_client import VllmClient
from small_trainer import ROWS, assert_same_weights, config, count_e, lora
from vllm_server import TOKENIZER, Asked, RealVllm, StandIn, save_servable, servable_model


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetryPolicy, "pause", lambda *_: 0.01)


# Two rounds of 16 completions.
SMALL = {
    "num_train_epochs": 2,
    "prompts_per_round": 4,
    "max_completion_length": 6,
    "evaluate_contrast": False,
}


def trainer(folder: Path, **changes: Any) -> NEATTrainer:
    extra = {k: changes.pop(k) for k in ("peft_config", "sampler_object") if k in changes}
    return NEATTrainer(
        servable_model(),
        count_e,
        config(folder, **{**SMALL, **changes}),
        ROWS,
        eval_dataset=ROWS[:2],
        processing_class=TOKENIZER,
        peft_config=extra.get("peft_config"),
        sampler=extra.get("sampler_object"),
    )


def asking(url: str, **changes: Any) -> dict[str, Any]:
    return {"sampler": "vllm", "vllm_server": url, **changes}


@contextlib.contextmanager
def stand_in(**changes: Any) -> Iterator[StandIn]:
    with StandIn(servable_model(), **changes) as server:
        yield server


def of_rounds(server: StandIn) -> list[tuple[Any, ...]]:
    """The completions of rounds that were asked for; those that the sampler is tried on are of seed
    0.
    """
    return [(tuple(b["prompt"]), b["seed"]) for b in server.completions() if b["seed"]]


# ---- a vLLM server ------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_run_learns_from_what_a_server_samples(tmp_path: Path, adapter: bool) -> None:
    with stand_in() as server:
        t = trainer(tmp_path, **asking(server.url), **({"peft_config": lora()} if adapter else {}))
        t.train()
        # 4 groups of 4 completions, twice; each group's from the weights of its round.
        assert len(of_rounds(server)) == 32
        names = {b["model"] for b in server.completions()}
        assert len(names) == (2 if adapter else 1)
        assert server.paths().count("/collective_rpc") == (0 if adapter else 2)
        assert server.paths().count("/v1/load_lora_adapter") == (2 if adapter else 0)
        assert len(server.adapters) == (1 if adapter else 0)
        t.evaluate()
        assert server.paths().count("/collective_rpc") == (0 if adapter else 3)


@pytest.mark.slow
def test_the_start_policy_is_the_servers_base(tmp_path: Path) -> None:
    with stand_in() as server:
        changes = asking(server.url, negative_policy="initial", peft_config=lora())
        trainer(tmp_path, **changes).train()
        asked = [b["model"] for b in server.completions() if b["seed"]]
    assert asked.count("base") == 16
    assert len(set(asked)) == 3


@pytest.mark.slow
def test_a_server_that_dies_costs_no_finished_completion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second round, with 9 of 16 completions finished; then it is started again."""
    monkeypatch.setattr(event_loop, "_LOOK_EVERY", 0.01)  # handed over one by one, stored by two
    with stand_in() as server:
        whole = trainer(tmp_path / "whole", **asking(server.url))
        whole.train()
    finished = 16 + 9

    def dies(asked: Asked) -> Any:
        is_one = asked.path == "/v1/completions" and asked.body["seed"]
        return None if is_one and len(of_rounds(first)) > finished else ...

    with stand_in(before=dies) as first:
        changes = asking(first.url, vllm_concurrency=1, generation_batch_size=8)
        with pytest.raises(SamplerUnavailableError, match="start the run again"):
            trainer(tmp_path / "broken", **changes).train()
        port, had = first.port, of_rounds(first)[:finished]
    with stand_in(port=port) as second:
        t = trainer(tmp_path / "broken", **changes)
        t.train(resume_from_checkpoint=True)
        again = of_rounds(second)
    assert len(again) == 32 - finished
    assert not set(had) & set(again)
    assert_same_weights(t, whole)


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_real_server_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second round, started again with its first weights, and the run goes on."""
    asked = list[int]()
    own = VllmClient.completion

    async def completion(self: VllmClient, connections: Any, model: str, request: Any, *a: Any):
        sample = await own(self, connections, model, request, *a)
        if request.seed:
            asked.append(request.seed)
        if len(asked) == 25 and server.port:
            server.kill()
        return sample

    monkeypatch.setattr(VllmClient, "completion", completion)
    served = save_servable(tmp_path / "served")
    changes = {"vllm_concurrency": 1, "generation_batch_size": 8}
    with RealVllm(served, tmp_path / "log", ("--dtype", "float32")) as server:
        changes = asking(server.url, **changes)
        with pytest.raises(SamplerUnavailableError, match="start the run again"):
            trainer(tmp_path / "run", **changes).train()
        assert len(asked) == 25
    with RealVllm(served, tmp_path / "log", ("--dtype", "float32"), port=server.port):
        t = trainer(tmp_path / "run", **changes)
        t.train(resume_from_checkpoint=True)
    assert t.state.global_step == 4
    assert len(asked) == len(set(asked)) == 32


def test_a_server_that_forgot_the_weights_stops_the_round(tmp_path: Path) -> None:
    """Started again by somebody, with its first weights, in the middle of the second round."""

    def forgets(asked: Asked) -> Any:
        if len(of_rounds(server)) == 16 + 5:
            server.model = servable_model().eval()
        return ...

    with (
        stand_in(before=forgets) as server,
        pytest.raises(SamplerError, match="Nothing of this batch is kept"),
    ):
        trainer(tmp_path, **asking(server.url, learning_rate=0.1)).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vllm_server": None}, "vllm_server is missing"),
        ({"sampler": "transformers"}, "but sampler is transformers: remove it"),
        ({"generation_copy": "always"}, "generation_copy is always but sampler is vllm"),
        ({"vllm_concurrency": 0}, "vllm_concurrency is 0"),
        ({"sampler_tolerance": 0.0}, "it must be above 0"),
        ({"vllm_timeout": -1.0}, "it must be above 0"),
        ({"sampler": "sglang"}, "it must be one of transformers, vllm"),
        ({"vllm_sync_backend": "ipc"}, "it must be one of folder, nccl"),
        (
            {"vllm_sync_backend": "nccl", "vllm_sync_folder": "here"},
            "nccl, which writes no weights: remove",
        ),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **asking("http://127.0.0.1:1", **changes))


def test_weights_by_nccl_need_a_gpu_and_are_all_weights(tmp_path: Path) -> None:
    with stand_in() as server:
        changes = asking(server.url, vllm_sync_backend="nccl")
        with pytest.raises(ConfigError, match="torch sees none here: set vllm_sync_backend"):
            trainer(tmp_path, **changes)
        with pytest.raises(ConfigError, match="an adapter is trained, which goes alone"):
            trainer(tmp_path, **changes, peft_config=lora())
        assert set(server.paths()) == {"/v1/models"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", r"the vLLM server 127\.0\.0\.1_1 cannot be asked"),
        ("http://vllm.example:8000", "allow_http_hosts"),
    ],
)
def test_a_server_that_cannot_be_asked(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        trainer(tmp_path, **asking(url))


def test_a_server_with_too_little_room_is_refused_before_anything(tmp_path: Path) -> None:
    with stand_in(max_model_len=30) as server:
        with pytest.raises(SamplerError, match=r"takes rows of 30 tokens.*--max-model-len \d+"):
            trainer(tmp_path, **asking(server.url))
        # Plain prompts would fit, those with an instruction on them do not.
        server.max_model_len = 60
        with pytest.raises(SamplerError, match="with the instruction"):
            trainer(tmp_path, **asking(server.url))
        assert set(server.paths()) == {"/v1/models"}


def test_all_weights_and_the_start_policy_need_two_servers(tmp_path: Path) -> None:
    with stand_in() as server:
        t = trainer(tmp_path, **asking(server.url, negative_policy="initial"))
        with pytest.raises(ConfigError, match="Train an adapter"):
            t.train()
        assert not of_rounds(server)


# ---- a sampler that a script gives --------------------------------------------------------------


def own_engine(policy: PolicyNow) -> TransformersSampler:
    # The start policy's adapter is off during this call alone.
    model = copy.deepcopy(policy.model) if policy.adapter_is_off else policy.model
    return TransformersSampler(model, policy.eos_token_ids, TOKENIZER.pad_token_id)


@pytest.mark.slow
def test_a_function_is_asked_before_every_round_and_evaluation(tmp_path: Path) -> None:
    seen = list[tuple[str, str]]()

    def make(policy: PolicyNow) -> TransformersSampler:
        seen.append((policy.which, policy.version))
        return own_engine(policy)

    changes = {"sampler_object": make, "negative_policy": "initial", "peft_config": lora()}
    t = trainer(tmp_path, **changes)
    t.train()
    t.evaluate()
    which, versions = zip(*seen, strict=True)
    assert which == ("current", "start", "current", "start", "current")
    assert len(set(versions[::2])) == 3


def test_an_object_samples_as_the_policy_itself(tmp_path: Path) -> None:
    """The policy's own sampler, given from outside, makes the same run to the bit."""
    plain = trainer(tmp_path / "plain")
    plain.train()
    t = trainer(tmp_path / "given", sampler_object=own_engine)
    t.train()
    assert_same_weights(t, plain)


class Wrong:
    """Draws rightly, and changes what it gives."""

    def __init__(self, change: Callable[[Sample], Sample]) -> None:
        self.change = change

    def of(self, policy: PolicyNow) -> Wrong:
        self.engine = own_engine(policy)
        return self

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Any = None
    ) -> list[Sample]:
        return [self.change(s) for s in self.engine.sample(requests, params, progress=progress)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, logprob=s.logprob / 2), "nats apart"),
        (lambda s: replace(s, finish_reason="stop"), "stop tokens of its own"),
    ],
)
def test_what_is_no_sample_of_the_policy_stops_the_run(
    tmp_path: Path, change: Callable[[Sample], Sample], message: str
) -> None:
    engine = Wrong(change)
    t = trainer(tmp_path, sampler_object=engine.of)
    with pytest.raises(ValueError, match=message):
        t.train()
    assert not list(tmp_path.glob("rounds/*/samples*"))


@pytest.mark.parametrize(
    ("sampler", "changes", "message"),
    [
        (3, {}, "sampler is 3: pass an object with sample"),
        (TransformersSampler, {}, "pass an object with sample"),
        (own_engine, asking("http://127.0.0.1:1"), "args.sampler is vllm: leave one out"),
        (own_engine, {"generation_copy": "never"}, "generation_copy is never"),
        (None, {"sampler_tolerance": 0.7}, "samples from the policy itself: remove it"),
    ],
)
def test_samplers_that_cannot_be_given(
    tmp_path: Path, sampler: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, sampler_object=sampler, **changes)


def test_one_object_cannot_be_two_policies(tmp_path: Path) -> None:
    one = own_engine(PolicyNow(servable_model(), "current", False, (2,), lambda *_: []))
    t = trainer(tmp_path, sampler_object=one, negative_policy="initial")
    with pytest.raises(ConfigError, match="draws from one policy"):
        t.train()


def test_a_resumed_run_may_ask_another_server(tmp_path: Path) -> None:
    """Where it is asked, and how, is no part of what a run is; who samples is."""
    with stand_in() as server:
        trainer(tmp_path, **asking(server.url, num_train_epochs=1)).train()
    key = json.loads((tmp_path / "run-key.json").read_text())["options"]
    assert key["sampler"] == "vllm"
    assert not [name for name in key if name.startswith("vllm_") or name == "sampler_tolerance"]
    assert torch.get_num_threads() == 1
