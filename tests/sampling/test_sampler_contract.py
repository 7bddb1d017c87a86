"""What every sampler owes, held against the transformers sampler, a stand-in for a vLLM server, and
a real vLLM server (`make test-vllm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from neat_align.errors import SamplerError
from neat_align.modeling.logprobs import score_completions
from neat_align.network.client import RetryPolicy
from neat_align.sampling.checked_sampler import CheckedSampler
from neat_align.sampling.policy_now import PolicyNow
from neat_align.sampling.protocol import Sampler, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from neat_align.sampling.vllm_client import VllmClient
from neat_align.sampling.vllm_sampler import VllmEngine
from neat_align.sampling.vllm_weights import VllmWeights
from vllm_server import TOKENIZER, RealVllm, StandIn, save_servable, servable_model

EOS = (TOKENIZER.eos_token_id,)
PROMPTS = [tuple(range(5, 5 + n)) for n in (4, 9, 9, 17, 30)]
TOLERANCE = 1e-3  # fp32 on both sides


def policy_now(model: torch.nn.Module, **changes: Any) -> PolicyNow:
    def score(prompts: Any, completions: Any) -> list[tuple[float, ...]]:
        return score_completions(
            model, prompts, completions, layout="padded", pad_token_id=0, autocast_dtype=None
        )

    return replace(PolicyNow(model, "current", False, EOS, score), **changes)


@dataclass
class Engine:
    """Gives a sampler of a policy as it is now, with its samples checked."""

    make: Callable[[PolicyNow], Sampler]
    client: VllmClient | None = None
    weights: VllmWeights | None = None

    def sampler(self, model: torch.nn.Module, **changes: Any) -> CheckedSampler:
        policy = policy_now(model, **changes)
        return CheckedSampler(self.make(policy), policy, TOLERANCE)


def vllm_engine(url: str, folder: Path, concurrency: int = 64) -> Engine:
    client = VllmClient(url, timeout=120.0, retry=RetryPolicy(tries=2, first_pause=0.01))
    weights = VllmWeights(client, folder, None)
    return Engine(VllmEngine(client, weights, concurrency), client, weights)


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealVllm]:
    folder = tmp_path_factory.mktemp("vllm")
    arguments = ("--dtype", "float32", "--enable-lora", "--max-lora-rank", "8")
    with RealVllm(save_servable(folder / "model"), folder / "log", arguments) as server:
        yield server


ENGINES = [
    "transformers",
    "stand_in",
    pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(600)]),
]
SERVERS = ENGINES[1:]


def engine_named(name: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    if name == "transformers":
        yield Engine(lambda policy: TransformersSampler(policy.model, EOS, 0))
    elif name == "stand_in":
        with StandIn(servable_model()) as server:
            yield vllm_engine(server.url, folder)
    else:
        yield vllm_engine(request.getfixturevalue("real_server").url, folder)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    yield from engine_named(request.param, request, tmp_path)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    yield from engine_named(request.param, request, tmp_path)


def requests(n: int, first_seed: int = 0, **changes: Any) -> list[SampleRequest]:
    return [SampleRequest(PROMPTS[i % 5], first_seed + i, **changes) for i in range(n)]


def logits_after(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double()


def test_a_seed_gives_the_same_tokens_and_another_seed_others(engine: Engine) -> None:
    sampler, params = engine.sampler(servable_model()), SamplingParams(12)
    once = sampler.sample(requests(10), params)
    again = sampler.sample(requests(10), params)
    assert [s.token_ids for s in once] == [s.token_ids for s in again]
    other = sampler.sample(requests(10, first_seed=1000), params)
    assert all(a.token_ids != b.token_ids for a, b in zip(once, other, strict=True))


def test_a_completion_depends_on_its_request_alone(engine: Engine) -> None:
    sampler, params = engine.sampler(servable_model()), SamplingParams(12)
    asked = requests(10)
    together = sampler.sample(asked, params)
    order = [7, 2, 9, 0, 5, 1, 8, 3, 6, 4]
    shuffled = sampler.sample([asked[i] for i in order], params)
    alone = [sampler.sample([r], params)[0] for r in asked[:4]]
    assert [s.token_ids for s in shuffled] == [together[i].token_ids for i in order]
    assert [s.token_ids for s in alone] == [s.token_ids for s in together[:4]]


def test_what_ends_a_completion_is_its_last_token(engine: Engine) -> None:
    model = servable_model()
    with torch.no_grad():
        model.lm_head.weight[EOS[0]] *= 3.0  # it comes up, and not at once
    samples = engine.sampler(model).sample(requests(20), SamplingParams(40))
    ended = [s for s in samples if s.finish_reason == "stop"]
    cut = [s for s in samples if s.finish_reason == "length"]
    assert ended
    assert cut
    for sample in ended:
        assert sample.token_ids[-1] == EOS[0]
    for sample in cut:
        assert len(sample.token_ids) == 40
    assert all(EOS[0] not in s.token_ids[:-1] for s in samples)


def test_other_end_tokens_than_the_models_own_end_it(engine: Engine) -> None:
    """The server's model ends with EOS; here that is a token like others, and four others end."""
    ends = (40, 41, 42, 43)
    model = servable_model()
    with torch.no_grad():
        model.lm_head.weight[EOS[0]] *= 4.0
    policy = policy_now(model, eos_token_ids=ends)
    made = engine.make(policy)
    if isinstance(made, TransformersSampler):
        made = replace(made, eos_token_ids=ends)
    samples = CheckedSampler(made, policy, TOLERANCE).sample(requests(20), SamplingParams(40))
    assert any(EOS[0] in s.token_ids[:-1] for s in samples)
    assert {s.token_ids[-1] for s in samples if s.finish_reason == "stop"} <= set(ends)
    assert any(s.finish_reason == "stop" for s in samples)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(16), SamplingParams(16, temperature=1.7, top_p=0.8, top_k=50)],
    ids=["plain", "shaped"],
)
def test_logprob_is_the_untempered_policys(engine: Engine, params: SamplingParams) -> None:
    model = servable_model(3)
    asked = requests(10)
    samples = engine.sampler(model).sample(asked, params)
    own = policy_now(model).score([r.prompt_ids for r in asked], [s.token_ids for s in samples])
    for sample, logprobs in zip(samples, own, strict=True):
        assert sample.logprob == pytest.approx(sum(logprobs), abs=TOLERANCE * len(logprobs))


@pytest.mark.parametrize("shape", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}])
def test_the_likeliest_token_is_left_over(engine: Engine, shape: dict[str, Any]) -> None:
    model = servable_model()
    samples = engine.sampler(model).sample(requests(5), SamplingParams(6, **shape))
    for request, sample in zip(requests(5), samples, strict=True):
        ids = list(request.prompt_ids)
        for token in sample.token_ids:
            assert token == int(logits_after(model, ids).argmax())
            ids.append(token)


@pytest.mark.parametrize("engine", [ENGINES[0], ENGINES[2]], indirect=True)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1),
        SamplingParams(1, temperature=1.5),
        SamplingParams(1, temperature=0.7, top_k=20),
        SamplingParams(1, top_p=0.5),
    ],
    ids=["plain", "hot", "cold_top_k", "top_p"],
)
def test_tokens_come_as_often_as_the_shaped_policy_says(
    engine: Engine, params: SamplingParams
) -> None:
    """The mean log-probability of 300 first tokens, against its expectation under the policy."""
    model = servable_model()
    asked = [SampleRequest(PROMPTS[0], seed) for seed in range(300)]
    samples = engine.sampler(model).sample(asked, params)
    logits = logits_after(model, PROMPTS[0])
    shaped = (logits / params.temperature).softmax(-1)
    ranked, order = shaped.sort(descending=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    keep &= ranked.cumsum(0) - ranked < params.top_p  # the smallest set with this probability
    q = torch.zeros_like(shaped)
    q[order[keep]] = ranked[keep]
    q /= q.sum()
    logp = logits.log_softmax(-1)
    mean = float((q * logp).sum())
    deviation = float(((q * logp**2).sum() - mean**2).sqrt()) / 300**0.5
    assert {s.token_ids[0] for s in samples} <= {int(t) for t in order[keep]}
    assert sum(s.logprob for s in samples) / 300 == pytest.approx(mean, abs=4 * deviation)


def test_each_request_keeps_to_its_own_limit(engine: Engine) -> None:
    sampler = engine.sampler(servable_model())
    asked = [SampleRequest(PROMPTS[0], 5, most) for most in (None, 1, 4, 100)]
    samples = sampler.sample(asked, SamplingParams(10))
    assert [len(s.token_ids) for s in samples] == [10, 1, 4, 10]
    # The first tokens are those of the longer one: a limit is not a shape.
    assert all(s.token_ids == samples[0].token_ids[: len(s.token_ids)] for s in samples)


def test_progress_adds_up_and_nothing_is_asked_for_nothing(engine: Engine) -> None:
    sampler, told = engine.sampler(servable_model()), list[int]()
    sampler.sample(requests(7), SamplingParams(3), progress=told.append)
    assert sum(told) == 7
    assert sampler.sample([], SamplingParams(3)) == []


# ---- weights -------------------------------------------------------------------------------------


def drawn(sampler: Sampler) -> list[tuple[int, ...]]:
    return [s.token_ids for s in sampler.sample(requests(6), SamplingParams(10))]


def test_what_is_drawn_follows_the_weights(engine: Engine) -> None:
    model = servable_model()
    before = drawn(engine.sampler(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    after = drawn(engine.sampler(model))  # its check holds the log-probabilities together
    assert before != after
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.3)
    assert drawn(engine.sampler(servable_model())) == before


def adapted(seed: int = 0, base: int = 0) -> Any:
    """A model with an adapter that is not zero."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights=False,
    )
    return get_peft_model(servable_model(base), config)


def give_base(engine: Engine) -> None:
    """A server that is shared has what an earlier test gave it."""
    if engine.client is not None:
        engine.sampler(servable_model())


def test_an_adapter_is_drawn_from_and_followed(engine: Engine) -> None:
    give_base(engine)
    model = adapted()
    with_adapter = drawn(engine.sampler(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.0)
    turned = drawn(engine.sampler(model))
    with model.disable_adapter():
        base = drawn(engine.sampler(model, which="start", adapter_is_off=True))
    assert len({str(d) for d in (with_adapter, turned, base)}) == 3
    assert base == drawn(engine.sampler(servable_model()))


def test_a_server_gets_a_version_once(server: Engine, tmp_path: Path) -> None:
    model = servable_model()
    assert server.weights is not None
    server.sampler(model)
    folders = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("current-*")}
    server.sampler(model)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("current-*")} == folders
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-6
    server.sampler(model)
    # The new one alone: the disk does not fill up.
    assert len(list(tmp_path.glob("current-*"))) == 1
    assert {p.name for p in tmp_path.glob("current-*")} != folders.keys()


def test_other_weights_on_the_server_stop_the_round(server: Engine, tmp_path: Path) -> None:
    """Another run that uses the same server, or a server that was started again."""
    model = servable_model()
    sampler = server.sampler(model)
    sampler.sample(requests(4), SamplingParams(8))
    assert server.client is not None
    other = tmp_path / "other"
    servable_model(9).save_pretrained(other)
    server.client.load_weights(str(other))
    with pytest.raises(SamplerError, match="nats apart") as caught:
        sampler.sample(requests(4), SamplingParams(8))
    assert "has log-probability -" in str(caught.value)
    assert "the trainer says -" in str(caught.value)


def test_a_row_that_is_too_long_is_refused_before_anything_is_asked(server: Engine) -> None:
    sampler = server.sampler(servable_model())
    long = SampleRequest(tuple(range(5, 305)) + tuple(range(5, 205)), 0)
    told = list[int]()
    with pytest.raises(SamplerError, match=r"takes rows of 512 tokens.*520.*--max-model-len 520"):
        sampler.sample([*requests(3), long], SamplingParams(20), progress=told.append)
    assert not told
