"""What is said to a vLLM server, how its answers are read, and how it gets weights; a stand-in
answers (`test_sampler_contract` asks a real one).
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from neat_align.errors import (
    CollapseError,
    ConfigError,
    NEATError,
    SamplerError,
    SamplerUnavailableError,
)
from neat_align.network.client import RetryPolicy
from neat_align.sampling.policy_now import PolicyNow, weights_version
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams
from neat_align.sampling.vllm_client import VllmClient
from neat_align.sampling.vllm_sampler import VllmEngine, VllmSampler
from neat_align.sampling.vllm_weights import VllmWeights
from tiny import tiny_model
from vllm_server import Asked, StandIn, servable_model

TOKEN = "canary-5f1e77a3b0"
ASKED = [SampleRequest((5, 6, 7), seed) for seed in range(1, 9)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetryPolicy, "pause", lambda *_: 0.01)


def now(model: torch.nn.Module, **changes: Any) -> PolicyNow:
    return replace(PolicyNow(model, "current", False, (2,), lambda *_: []), **changes)


def sampler(server: StandIn, concurrency: int = 8) -> VllmSampler:
    client = VllmClient(server.url, timeout=20.0)
    return VllmSampler(client, "base", (2, 3), 512, concurrency)


def weights(server: StandIn, folder: Path, **changes: Any) -> VllmWeights:
    client = VllmClient(server.url, timeout=20.0)
    return VllmWeights(client, folder, **{"dtype": None, **changes})


# ---- completions ---------------------------------------------------------------------------------


def test_all_that_shapes_a_draw_is_said() -> None:
    """What is not said, a server fills from generation_config.json or its own command line."""
    with StandIn(servable_model()) as server:
        params = SamplingParams(4, temperature=0.7, top_p=0.9, top_k=11)
        sampler(server).sample([SampleRequest((5, 6, 7), 2**63 - 1, 3)], params)
    (body,) = server.completions()
    assert body == {
        "model": "base",
        "prompt": [5, 6, 7],
        "seed": 2**63 - 1,
        "n": 1,
        "max_tokens": 3,
        "min_tokens": 0,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 11,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": [2, 3],
        "stop": [],
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": False,
    }


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_are_under_way_than_were_asked_for(concurrency: int) -> None:
    def slow(asked: Asked) -> Any:
        time.sleep(0.01)
        return ...

    with StandIn(servable_model(), before=slow) as server:
        sampler(server, concurrency).sample(ASKED, SamplingParams(2))
    assert server.most_under_way <= concurrency


def test_a_token_goes_to_the_server_and_into_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEAT_ALIGN_VLLM_TOKEN", TOKEN)

    def echoes(asked: Asked) -> Any:
        return 400, {"error": {"message": f"you said {asked.headers['authorization']}"}}

    with StandIn(servable_model(), before=echoes) as server:
        with pytest.raises(SamplerError, match="you said") as caught:
            sampler(server).sample(ASKED[:1], SamplingParams(2))
        assert server.asked[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in str(caught.value)


def test_a_reward_servers_token_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEAT_ALIGN_REWARD_TOKEN", TOKEN)
    with StandIn(servable_model()) as server:
        sampler(server).sample(ASKED[:1], SamplingParams(2))
    assert "authorization" not in server.asked[0].headers


def test_a_server_that_wants_a_token_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        StandIn(servable_model(), before=lambda _: (401, {"error": "Unauthorized"})) as server,
        pytest.raises(SamplerError, match="environment variable NEAT_ALIGN_VLLM_TOKEN"),
    ):
        VllmClient(server.url, timeout=5.0).model()


def test_proxies_and_redirects_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with StandIn(servable_model()) as server:
        assert VllmClient(server.url, timeout=5.0).model().name == "base"
        server.before = lambda _: (307, {})
        with pytest.raises(SamplerError, match="redirects are not followed"):
            VllmClient(server.url, timeout=5.0).model()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://10.1.2.3:8000", "http is not encrypted"),
        ("https://169.254.169.254", "metadata"),
        ("127.0.0.1:8000", "begins with https://"),
        ("http://127.0.0.1:8000/v1", "leave out /v1"),
        ("http://127.0.0.1:8000/v1/", "leave out /v1"),
        (f"http://user:{TOKEN}@127.0.0.1:8000", "NEAT_ALIGN_VLLM_TOKEN"),
        (f"http://127.0.0.1:8000?key={TOKEN}", "query or fragment"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(SamplerError, match=message) as caught:
        VllmClient(url, timeout=1.0)
    assert TOKEN not in str(caught.value)


def test_a_host_that_was_named_may_be_asked_over_http() -> None:
    client = VllmClient("http://10.1.2.3:8000", timeout=1.0, allow_http_hosts=["10.1.*"])
    assert client.target.allowed


def test_a_url_with_a_path_is_a_server_behind_a_gateway() -> None:
    with StandIn(servable_model(), before=lambda _: (404, {})) as server:
        with pytest.raises(SamplerError):
            VllmClient(f"{server.url}/team/", timeout=5.0).model()
        assert server.paths() == ["/team/v1/models"]


def test_what_may_pass_is_tried_again() -> None:
    seen = dict[int, int]()

    def busy(asked: Asked) -> Any:
        seed = asked.body["seed"]
        seen[seed] = seen.get(seed, 0) + 1
        return {1: (503, {}), 2: None, 3: (429, {})}.get(seen[seed], ...)

    with StandIn(servable_model(), before=busy) as server:
        samples = sampler(server).sample(ASKED[:3], SamplingParams(3))
        server.before = lambda _: ...
        assert samples == sampler(server).sample(ASKED[:3], SamplingParams(3))
    assert set(seen.values()) == {4}


def test_what_has_ended_is_handed_over_before_the_error() -> None:
    def dies(asked: Asked) -> Any:
        return None if asked.body["seed"] > 5 else ...

    with StandIn(servable_model(), before=dies) as server:
        kept = dict[int, Sample]()
        with pytest.raises(SamplerUnavailableError, match="5 of the 8 completions"):
            sampler(server, 1).sample(
                ASKED,
                SamplingParams(3),
                finished=lambda p, s: kept.update(zip(p, s, strict=True)),
            )
        server.before = lambda _: ...
        assert kept == dict(enumerate(sampler(server).sample(ASKED[:5], SamplingParams(3))))


def test_a_completion_that_takes_too_long_is_an_error() -> None:
    def hangs(asked: Asked) -> Any:
        time.sleep(0.3)
        return ...

    with StandIn(servable_model(), before=hangs) as server:
        client = VllmClient(server.url, timeout=0.05, retry=RetryPolicy(tries=2))
        slow = VllmSampler(client, "base", (2,), 512)
        with pytest.raises(SamplerUnavailableError, match=r"within 0\.05 s"):
            slow.sample(ASKED[:1], SamplingParams(2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_ids": None}, SamplerError, "without token_ids"),
        ({"logprobs": None}, SamplerError, "not as many log-probabilities"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, SamplerError, "not as many"),
        ({"logprobs": {"token_logprobs": [-1.0, None]}}, CollapseError, "not finite"),
        ({"logprobs": {"token_logprobs": [-1.0, -9999.0]}}, CollapseError, "not finite"),
        ({"finish_reason": "abort"}, SamplerError, "because of 'abort'"),
    ],
)
def test_answers_that_are_no_completion(
    change: dict[str, Any], error: type[NEATError], message: str
) -> None:
    with (
        StandIn(servable_model(), changed=lambda choice: {**choice, **change}) as server,
        pytest.raises(error, match=message),
    ):
        sampler(server).sample(ASKED[:1], SamplingParams(2))


@pytest.mark.parametrize("reply", [[], {"choices": []}, {"choices": "no"}, {"data": 3}])
def test_answers_that_are_not_vllms(reply: Any) -> None:
    with StandIn(servable_model(), before=lambda _: (200, reply)) as server:
        with pytest.raises(SamplerError, match="without token_ids"):
            sampler(server).sample(ASKED[:1], SamplingParams(2))
        with pytest.raises(SamplerError, match="does not answer as vLLM"):
            VllmClient(server.url, timeout=5.0).model()


@pytest.mark.parametrize("reply", [{"data": []}, {"data": [{"id": "gpt", "object": "model"}]}])
def test_a_server_of_another_engine(reply: Any) -> None:
    with (
        StandIn(servable_model(), before=lambda _: (200, reply)) as server,
        pytest.raises(SamplerError, match="no model with its max_model_len"),
    ):
        VllmClient(server.url, timeout=5.0).model()


def test_progress_comes_in_the_callers_thread_and_may_stop_it() -> None:
    threads = set[threading.Thread]()

    def stop(finished: int) -> None:
        threads.add(threading.current_thread())
        raise KeyboardInterrupt

    with StandIn(servable_model()) as server, pytest.raises(KeyboardInterrupt):
        sampler(server).sample(ASKED, SamplingParams(2), progress=stop)
    assert threads == {threading.current_thread()}


# ---- weights -------------------------------------------------------------------------------------


def test_a_version_is_the_weights() -> None:
    model = servable_model()
    same, other = copy.deepcopy(model), servable_model(1)
    assert weights_version(model) == weights_version(same) != weights_version(other)
    with torch.no_grad():  # the smallest step that fp32 has
        weight = same.model.layers[0].mlp.up_proj.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(1.0))
    assert weights_version(model) != weights_version(same)
    swapped = copy.deepcopy(model)
    with torch.no_grad():
        row = swapped.lm_head.weight[0]
        row[:2] = row[:2].flip(0).clone()
    assert weights_version(model) != weights_version(swapped)
    for dtype in (torch.bfloat16, torch.float64):
        assert len(weights_version(copy.deepcopy(model).to(dtype))) == 16


def test_a_version_follows_what_is_trained_alone() -> None:
    model = get_peft_model(servable_model(), LoraConfig(target_modules=["q_proj"]))
    before = weights_version(model)
    with torch.no_grad():
        model.get_base_model().lm_head.weight.add_(1.0)
    assert weights_version(model) == before
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = 1e-30
    assert weights_version(model) != before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_whole_weights_arrive(tmp_path: Path, tied: bool, dtype: torch.dtype | None) -> None:
    model = servable_model()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    with StandIn(servable_model(5)) as server:
        name = weights(server, tmp_path, dtype=dtype).serve(now(model))
        assert name == "base"
        arrived = server.model.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(arrived[key], value.to(dtype or value.dtype).float()), key


def test_a_version_that_the_server_has_is_not_given_again(tmp_path: Path) -> None:
    with StandIn(servable_model(5)) as server:
        given, model = weights(server, tmp_path), servable_model()
        for _ in range(3):
            given.serve(now(model))
        assert server.paths().count("/collective_rpc") == 1
        with torch.no_grad():
            model.lm_head.weight.add_(0.1)
        given.serve(now(model))
        assert server.paths().count("/collective_rpc") == 2
    assert len(list(tmp_path.glob("current-*"))) == 1


def lora_model(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False, **changes}
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **settings})
    return get_peft_model(servable_model(), config)


def test_adapters_of_an_earlier_process_go_and_those_of_other_runs_stay(tmp_path: Path) -> None:
    with StandIn(servable_model()) as server:
        first = weights(server, tmp_path / "one").serve(now(lora_model(0)))
        other = weights(server, tmp_path / "two").serve(now(lora_model(0)))
        # Started again: with the same weights, and then with others.
        again = weights(server, tmp_path / "one").serve(now(lora_model(0)))
        second = weights(server, tmp_path / "one").serve(now(lora_model(1)))
        assert first == again != other
        assert set(server.adapters) == {second, other}


def test_an_adapter_of_another_name_is_found(tmp_path: Path) -> None:
    model = lora_model()
    model.add_adapter("mine", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("mine")
    with StandIn(servable_model()) as server:
        name = weights(server, tmp_path).serve(now(model))
        served = server.adapters[name]
        with torch.no_grad():
            row = torch.tensor([[5, 6, 7, 8]])
            expected, found = model.eval()(input_ids=row), served(input_ids=row)
    assert torch.allclose(expected.logits, found.logits, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
    ],
)
def test_adapters_that_vllm_would_serve_in_part(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with StandIn(servable_model()) as server:
        with pytest.raises(ConfigError, match=message):
            weights(server, tmp_path).serve(now(lora_model(**changes)))
        assert set(server.paths()) <= {"/v1/models"}
    assert not list(tmp_path.iterdir())


def test_other_adapters_than_lora_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(
        servable_model(),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    )
    with (
        StandIn(servable_model()) as server,
        pytest.raises(ConfigError, match="it is IA3Config, and not LoRA"),
    ):
        weights(server, tmp_path).serve(now(model))


def answering(path: str, status: int, body: Any) -> Callable[[Asked], Any]:
    return lambda asked: (status, body) if asked.path == path else ...


@pytest.mark.parametrize(
    ("path", "reply", "adapter", "message"),
    [
        ("/collective_rpc", (404, {}), False, "VLLM_SERVER_DEV_MODE=1"),
        ("/collective_rpc", (500, {"error": "no"}), False, "vllm_sync_folder"),
        ("/reset_prefix_cache", (200, {"success": False}), False, "serves that run alone"),
        ("/v1/load_lora_adapter", (404, {"detail": "Not Found"}), True, "--enable-lora"),
        ("/v1/load_lora_adapter", (404, {"error": "No adapter found"}), True, "sync_folder"),
        ("/v1/load_lora_adapter", (500, {"error": "rank"}), True, "--max-lora-rank"),
    ],
)
def test_a_server_that_takes_no_weights_says_how_to_start_it(
    tmp_path: Path, path: str, reply: tuple[int, Any], adapter: bool, message: str
) -> None:
    model = lora_model() if adapter else servable_model()
    with (
        StandIn(servable_model(), before=answering(path, *reply)) as server,
        pytest.raises(SamplerError, match=message),
    ):
        weights(server, tmp_path).serve(now(model))
    # What changes a server is not sent again because it failed.
    assert server.paths().count(path) == (3 if path == "/reset_prefix_cache" else 1)


def test_another_rank_writes_nothing_and_hears_the_name(tmp_path: Path) -> None:
    with StandIn(servable_model()) as server:
        settings = {"writes": False, "on_rank_zero": lambda give: "rank 0's"}
        for model in (servable_model(), lora_model()):
            assert weights(server, tmp_path, **settings).serve(now(model)) == "rank 0's"
        assert not server.paths()
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_family_is_given_as_it_is(tmp_path: Path) -> None:
    """What arrives is what transformers saves: gpt2's and qwen2's names too."""
    for family in ("gpt2", "qwen2"):
        model = tiny_model(family, 385)
        with StandIn(tiny_model(family, 385, seed=1)) as server:
            weights(server, tmp_path / family, dtype=torch.bfloat16).serve(now(model))
            arrived = server.model.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(arrived[key], value.bfloat16().float()), key


def test_an_engine_gives_the_samplers_what_they_need(tmp_path: Path) -> None:
    with StandIn(servable_model(), max_model_len=77) as server:
        given = weights(server, tmp_path)
        made = VllmEngine(given.client, given, 5)(now(servable_model(), eos_token_ids=(2, 9)))
    assert (made.model, made.eos_token_ids, made.max_model_len) == ("base", (2, 9), 77)
    assert made.concurrency == 5
