"""Reward models behind vLLM's /classify: a stand-in that speaks its protocol, and a real server
beside the same model here; and reward models in few bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from neat_align.errors import ConfigError, RewardError, RewardUnavailableError
from neat_align.network.client import RetryPolicy
from neat_align.rewards.hf import ModelReward
from neat_align.rewards.http import check_http_hosts
from neat_align.rewards.protocol import ScoredRows
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score
from neat_align.rewards.vllm_reward import VllmReward
from reward_server import Asked, Handler, RewardServer
from small_trainer import trainer
from tiny import tiny_tokenizer
from vllm_server import TOKENIZER, RealVllm, servable_config

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
PROMPTS: list[Any] = ["What do you say?", CHAT, CHAT]
ANSWERS: list[Any] = ["thank you", [{"role": "assistant", "content": "no, I hate it"}], "good day"]


def classify(*numbers: float) -> bytes:
    data = [{"index": 0, "label": "LABEL_0", "probs": list(numbers), "num_classes": len(numbers)}]
    return json.dumps({"object": "list", "data": data}).encode()


def by_length(handler: Handler, asked: Asked, number: int) -> None:
    messages = json.loads(asked.body)["messages"]
    handler.answer(200, classify(float(len(messages[-1]["content"]))))


def spec_of(server: RewardServer) -> str:
    return "vllm:" + server.url.removesuffix("/score")


def scored(spec: Any, answers: Sequence[Any] = ANSWERS, **extra: Any) -> ScoredRows:
    return score(
        resolve_rewards(spec, None),
        prompts=PROMPTS[: len(answers)],
        completions=answers,
        completion_ids=[[1]] * len(answers),
        columns={},
        **extra,
    )


def test_rows_go_as_conversations_and_logits_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEAT_ALIGN_REWARD_TOKEN", "canary-token")
    with RewardServer(by_length) as server:
        assert scored(spec_of(server)).rewards == (9.0, 13.0, 8.0)
        (reward,) = resolve_rewards(spec_of(server), None, timeout=3.0)
    assert reward.name == f"vllm_127.0.0.1_{server.port}"
    assert reward.timeout is None
    bodies = [json.loads(a.body) for a in server.asked]
    assert {a.path for a in server.asked} == {"/classify"}
    assert {a.headers["authorization"] for a in server.asked} == {"Bearer canary-token"}
    assert all(body["use_activation"] is False for body in bodies)
    by_answer = {body["messages"][-1]["content"]: body["messages"] for body in bodies}
    assert by_answer["thank you"] == [
        {"role": "user", "content": "What do you say?"},
        {"role": "assistant", "content": "thank you"},
    ]
    assert by_answer["no, I hate it"] == [*CHAT, *ANSWERS[1]]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, classify(0.1, 0.9), "gives 2 numbers a row; a reward model has one output"),
        (200, classify(), "gives 0 numbers a row"),
        (200, b'{"rewards": [1.0]}', "did not answer with the answer of vLLM's /classify"),
        (200, b"<html>", "did not answer with"),
        (200, classify(float("nan")), "returned nan"),
        (404, b"{}", "has no /classify: start it with vllm serve MODEL --runner pooling"),
        (400, b'{"error": {"message": "no chat template"}}', "answered 400.*no chat template"),
        (307, b"", "redirects are not followed"),
        (401, b"", "set the environment variable NEAT_ALIGN_REWARD_TOKEN"),
    ],
    ids=range(9),
)
def test_what_is_no_reward_model_is_an_error(status: int, body: bytes, message: str) -> None:
    with (
        RewardServer(lambda handler, asked, number: handler.answer(status, body)) as server,
        pytest.raises(RewardError, match=message) as caught,
    ):
        scored(spec_of(server), ["a"])
    assert not isinstance(caught.value, RewardUnavailableError)


@pytest.mark.parametrize("status", [413, 400])
def test_a_row_over_the_context_cannot_be_scored(status: int) -> None:
    said = b'{"error": {"message": "This model\'s maximum context length is 512 tokens."}}'

    def behaviour(handler: Handler, asked: Asked, number: int) -> None:
        if "hate" in asked.body.decode():
            return handler.answer(status, said)
        return by_length(handler, asked, number)

    with RewardServer(behaviour) as server:
        rows = scored(spec_of(server), on_bad_row="skip")
    assert rows.rewards == (9.0, None, 8.0)
    assert f"is too long for the model behind the reward server 127.0.0.1_{server.port}" in (
        rows.left_out[0].reason
    )


def test_a_server_that_stays_down_pauses_the_run() -> None:
    message = "answered 503: given up on row 0"
    with (
        RewardServer(lambda handler, asked, number: handler.answer(503, b"")) as server,
        pytest.raises(RewardUnavailableError, match=message),
    ):
        scored(VllmReward(spec_of(server), retry=RetryPolicy(tries=2, first_pause=0.01)), ["a"])
    assert len(server.asked) == 2


def test_hosts_and_tokens_are_checked_as_those_of_reward_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RewardError, match="is not encrypted and names another machine"):
        resolve_rewards("vllm:http://rm.svc:8000", None)
    named = resolve_rewards("vllm:http://rm.svc:8000", None, allow_http_hosts=["*.svc"])
    check_http_hosts(["*.svc"], [r.function for r in named])
    monkeypatch.setenv("NEAT_ALIGN_REWARD_TOKEN", "canary-token")
    two = ["vllm:http://rm.svc:8000", "https://one.example/score"]
    with pytest.raises(RewardError, match=r"would be sent to rm\.svc and to one\.example"):
        resolve_rewards(two, None, allow_http_hosts=["*.svc"])


# ---- few bits ------------------------------------------------------------------------------------


def classifier(context: int = 512) -> LlamaForSequenceClassification:
    """A tiny reward model that vLLM serves on a CPU: heads of 32."""
    torch.manual_seed(0)
    return LlamaForSequenceClassification(servable_config(context, num_labels=1)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    classifier().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU is told")
@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_are_refused_by_name_where_they_cannot_be(
    bits: int, saved: Path, tmp_path: Path
) -> None:
    option = f"reward_load_in_{bits}bit"
    message = f"{option} is true and .*(bitsandbytes is not installed|sees no CUDA device).*leave"
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, reward=str(saved), **{option: True})
    with pytest.raises(ConfigError, match=f"{option} is true, but no reward or judge is a seq"):
        trainer(tmp_path, **{option: True})
    model = ModelReward(classifier(), tiny_tokenizer())
    with pytest.raises(ConfigError, match="give the name in place of the model"):
        trainer(tmp_path, reward=model, **{option: True})


def test_a_weight_is_held_one_way(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a weight is held one way"):
        trainer(tmp_path, reward_load_in_4bit=True, reward_load_in_8bit=True)


# ---- the real one --------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_served_reward_model_gives_what_it_gives_here(saved: Path, tmp_path: Path) -> None:
    arguments = ("--runner", "pooling", "--convert", "classify", "--dtype", "float32")
    with RealVllm(saved, tmp_path / "log.txt", arguments) as server:
        served = scored(f"vllm:{server.url}").rewards
        here = scored(str(saved)).rewards
        assert served == pytest.approx(here, abs=1e-4)
        assert len(set(served)) == len(ANSWERS)
        long = ["word " * 600, ANSWERS[1]]
        rows = scored(f"vllm:{server.url}", long, on_bad_row="skip")
        assert rows.rewards == (None, pytest.approx(here[1], abs=1e-4))
        assert "is too long for the model behind" in rows.left_out[0].reason
