"""A reward model behind vLLM: `vllm:URL` names a server that was started with

    vllm serve MODEL --runner pooling --convert classify

(older versions: `--task classify`). MODEL has one label (num_labels 1), and its logit is the
reward, as when the model is loaded here. Rows go to `POST /classify` as conversations that end with
the completion (a text prompt is one user turn), which the server renders with the model's chat
template. One request holds one row; vLLM puts those that are under way into one batch.

Failures, addresses and the token (NEAT_ALIGN_REWARD_TOKEN, vLLM's --api-key) are those of any
reward server (`http`). A row that is over the model's context is `Unscorable`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import httpx2

from neat_align.errors import RewardError
from neat_align.network.client import Answer, RetryPolicy, ServerClient, excerpt
from neat_align.network.event_loop import all_of
from neat_align.network.server_url import Target, parse_url
from neat_align.prompts.rows import Message, Prompt
from neat_align.rewards.http import DEFAULT_TIMEOUT, REWARD_SERVER
from neat_align.rewards.output import checked_scores
from neat_align.rewards.protocol import CompletionInput, Score, Unscorable

logger = logging.getLogger(__name__)
CONCURRENT_REQUESTS = 64
_MAX_RESPONSE_BYTES = 1 << 20
_EXPECTED = 'the answer of vLLM\'s /classify, {"data": [{"probs": [...]}]}'
# What vLLM says of a row that the model cannot read.
_TOO_LONG = (b"context length", b"longer than the maximum", b"max_model_len", b"maximum model len")


def is_vllm(spec: str) -> bool:
    """Whether a reward's name is a reward model behind vLLM: "vllm:http://..."."""
    return spec.startswith(("vllm:http://", "vllm:https://"))


class VllmReward:
    """A reward model behind vLLM, see the module's docstring. `timeout` is in seconds a request."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        allow_http_hosts: Sequence[str] = (),
        retry: RetryPolicy | None = None,
    ) -> None:
        base = url.removeprefix("vllm:").rstrip("/")
        path = base if base.endswith("/classify") else f"{base}/classify"
        self.target: Target = parse_url(path, REWARD_SERVER, allow_http_hosts)
        self.name = f"vllm_{self.target.name.removesuffix('_classify')}"
        limits = (timeout, _EXPECTED, _MAX_RESPONSE_BYTES)
        self._server = ServerClient(self.target, *limits, retry or RetryPolicy(), logger=logger)

    @property
    def token_variable(self) -> str | None:
        """The environment variable with the token that is sent."""
        return self.target.token_variable

    async def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[Score]:
        """The model's logit for each row."""
        slots = asyncio.Semaphore(CONCURRENT_REQUESTS)

        async def score(client: httpx2.AsyncClient, i: int) -> Score:
            body = {
                "messages": [*_turns(prompts[i], "user"), *_turns(completions[i], "assistant")],
                "use_activation": False,
                # Under its old name; a server ignores the one that it does not know.
                "activation": False,
            }
            async with slots:
                data = json.dumps(body).encode("ascii")
                answer = await self._server.ask(client, f"row {i}", data)
            value = self._score_in(answer)
            return checked_scores(self.name, [value], [completions[i]], [f"row {i}"])[0]

        async with self._server.connections(most=CONCURRENT_REQUESTS) as client:
            return await all_of(score(client, i) for i in range(len(completions)))

    def _score_in(self, answer: Answer) -> Any:
        said = self.target.said
        is_long = answer.status == 400 and any(words in answer.data for words in _TOO_LONG)
        if answer.status == 413 or is_long:
            return Unscorable(f"is too long for the model behind {said} ({answer.status})")
        if answer.status == 404:
            raise RewardError(
                f"{said} answered 404, so it has no /classify: start it with vllm serve MODEL "
                "--runner pooling --convert classify"
            )
        if answer.status != 200:
            raise self._server.refused(answer)
        try:
            probs = json.loads(answer.data)["data"][0]["probs"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise RewardError(
                f"{said} did not answer with {_EXPECTED}: {excerpt(answer.data)}"
            ) from error
        if not isinstance(probs, list) or len(probs) != 1:
            n = len(probs) if isinstance(probs, list) else "no"
            raise RewardError(
                f"the model behind {said} gives {n} numbers a row; a reward model has one output "
                "(num_labels 1). For a classifier, write a reward function that returns the "
                "probability of the label you want"
            )
        return probs[0]


def _turns(turn: Prompt | CompletionInput, role: str) -> list[Message]:
    return [{"role": role, "content": turn}] if isinstance(turn, str) else list(turn)
