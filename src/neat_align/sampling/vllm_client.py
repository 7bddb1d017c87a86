"""What is said to a vLLM server, and what it answers: completions, weights, adapters.

Of vLLM's OpenAI-compatible server: `/v1/models` and `/v1/completions`; for whole weights
`/collective_rpc` and `/reset_prefix_cache`, which it has with VLLM_SERVER_DEV_MODE=1, or the steps
of its weight-transfer engine (`vllm_nccl`); for adapters
`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, which it has with --enable-lora and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. Which URLs, which tokens, what is tried again: `network`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from neat_align.errors import CollapseError, SamplerError, SamplerUnavailableError
from neat_align.network.client import Answer, RetryPolicy, ServerClient, excerpt
from neat_align.network.event_loop import background_loop
from neat_align.network.server_url import ServerKind, parse_url
from neat_align.sampling.protocol import FinishReason, Sample, SampleRequest, SamplingParams

T = TypeVar("T")
TOKEN_VARIABLE = "NEAT_ALIGN_VLLM_TOKEN"  # noqa: S105 - the variable's name
VLLM_SERVER = ServerKind(
    "vLLM server", "vllm_server", TOKEN_VARIABLE, SamplerError, SamplerUnavailableError
)
# A completion is answered in its tokens three times over: as text, as ids, and with numbers.
_LONGEST_ANSWER = 1 << 26
# vLLM writes this in place of a log-probability that JSON has no number for.
_NO_NUMBER = -9999.0


@dataclass(frozen=True)
class ServedModel:
    """The base model of a server, the longest row that it takes, and its adapters by name."""

    name: str
    max_model_len: int
    adapters: frozenset[str]


class VllmClient:
    """Asks one vLLM server.

    `url` is the server's, without /v1; `timeout` is in seconds and bounds one request, so one
    completion, its wait in the server's queue included.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        allow_http_hosts: Sequence[str] = (),
        retry: RetryPolicy | None = None,
    ) -> None:
        self.target = parse_url(url, VLLM_SERVER, allow_http_hosts)
        self._prefix = self.target.path.rstrip("/")
        if self._prefix.endswith("/v1"):
            raise SamplerError(f"vllm_server is {url}: leave out /v1, which is added where needed")
        self._server = ServerClient(
            self.target,
            timeout,
            "the answer of vLLM's API",
            _LONGEST_ANSWER,
            retry or RetryPolicy(),
            logger=logging.getLogger(__name__),
        )

    @property
    def said(self) -> str:
        """What a message calls it."""
        return self.target.said

    def run(
        self,
        work: Callable[[httpx2.AsyncClient], Awaitable[T]],
        *,
        most: int = 1,
        meanwhile: Callable[[], None] | None = None,
    ) -> T:
        """Do some work with connections to the server, at most so many at once, and wait for it.

        `meanwhile` is called about once a second, in the caller's thread.
        """

        async def main() -> T:
            async with self._server.connections(most) as connections:
                return await work(connections)

        return background_loop().run(main(), meanwhile=meanwhile)

    def model(self) -> ServedModel:
        """What it serves. Raises SamplerError, where nothing or something else answers too."""
        answer = self._ask("the list of its models", "/v1/models")
        if answer.status != 200:
            raise self._server.refused(answer)
        listed = _read(answer, "data")
        if not isinstance(listed, list) or not all(isinstance(m, dict) for m in listed):
            raise SamplerError(f"{self.said} does not answer as vLLM: {excerpt(answer.data)}")
        bases = [m for m in listed if m.get("parent") is None]
        longest = bases[0].get("max_model_len") if bases else None
        if not isinstance(longest, int):
            raise SamplerError(
                f"{self.said} lists no model with its max_model_len: {excerpt(answer.data)}. Is it "
                "a server of vLLM (python -m vllm.entrypoints.openai.api_server --model ...)?"
            )
        adapters = frozenset(str(m.get("id")) for m in listed if m.get("parent") is not None)
        return ServedModel(str(bases[0].get("id")), longest, adapters)

    def load_weights(self, folder: str) -> None:
        """Have it read all weights from a folder that it sees under this path."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        answer = self._ask(f"weights from {folder}", "/collective_rpc", body)
        if answer.status == 404:
            raise SamplerError(
                f"{self.said} has no /collective_rpc, which gives it new weights: start it with "
                "VLLM_SERVER_DEV_MODE=1 in its environment (for nobody but you: bind it to "
                "127.0.0.1 or to your cluster's own network), or train an adapter (use_peft)"
            )
        if answer.status != 200:
            raise SamplerError(
                f"{self.said} could not read the weights in {folder} ({answer.status}: "
                f"{excerpt(answer.data, 400)}): it needs to see that folder under the same path "
                "(vllm_sync_folder), and to serve the same model. It may have ended: look at its "
                "log, and start it again"
            )
        self.reset_cache()

    def reset_cache(self) -> None:
        """Nothing that was computed with the old weights is used again."""
        for _ in range(3):
            answer = self._ask("an empty prefix cache", "/reset_prefix_cache", {})
            # Before 0.14 it answers nothing.
            if answer.status == 200 and (not answer.data or _read(answer, "success") is not False):
                return
        raise SamplerError(
            f"{self.said} keeps what it computed with the old weights ({answer.status}: "
            f"{excerpt(answer.data)}): something else is asking it at the same time; a server "
            "that is given a run's weights serves that run alone"
        )

    def check_takes_nccl(self) -> None:
        """Raises SamplerError where the server was not started to get weights by NCCL."""
        path = "/init_weight_transfer_engine"
        # An engine refuses what lacks all that it needs, and says its name.
        answer = self._ask("which engine gets it weights", path, {"init_info": {}})
        if b"NCCLWeightTransferEngine" not in answer.data:
            raise SamplerError(
                f"{self.said} takes no weights by NCCL ({answer.status}: "
                f"{excerpt(answer.data, 300)}): start it with "
                '--weight-transfer-config \'{"backend": "nccl"}\', and with '
                "VLLM_SERVER_DEV_MODE=1 in its environment (for nobody but you: bind it to "
                "127.0.0.1 or to your cluster's own network), or set vllm_sync_backend: folder"
            )

    def workers(self) -> int:
        """How many processes hold a part of its weights each."""
        found = _read(self._ask("how many processes it has", "/get_world_size"), "world_size")
        if not isinstance(found, int) or found < 1:
            raise SamplerError(f"{self.said} does not say how many processes it has: {found!r}")
        return found

    def transfer(self, path: str, body: dict[str, Any] | None = None) -> None:
        """A step of giving it weights by NCCL."""
        answer = self._ask(f"{path} (weights by NCCL)", path, body or {})
        if answer.status != 200:
            raise SamplerError(
                f"{self.said} answers {path} with {answer.status}: {excerpt(answer.data, 400)}. "
                "While weights are on their way it does not sample: look at its log, and start it "
                "again"
            )

    def load_adapter(self, name: str, folder: str) -> None:
        """Have it serve an adapter under this name, from a folder that it sees under this path."""
        body = {"lora_name": name, "lora_path": folder}
        answer = self._ask(f"an adapter from {folder}", "/v1/load_lora_adapter", body)
        if answer.status in (404, 405):
            missing = b"adapter" in answer.data.lower()  # the folder, not the endpoint
            raise SamplerError(
                f"{self.said} found no adapter in {folder}: it needs to see that folder under the "
                "same path (vllm_sync_folder)"
                if missing
                else f"{self.said} takes no adapters at run time: start it with --enable-lora, and "
                "with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment (for nobody but "
                "you: bind it to 127.0.0.1 or to your cluster's own network)"
            )
        if answer.status != 200:
            raise SamplerError(
                f"{self.said} did not take the adapter in {folder} ({answer.status}: "
                f"{excerpt(answer.data, 400)}): start it with --enable-lora and a --max-lora-rank "
                "of at least the adapter's (lora_r)"
            )

    def unload_adapter(self, name: str) -> None:
        """Have it forget an adapter, if it has it."""
        self._ask(f"that {name} is unloaded", "/v1/unload_lora_adapter", {"lora_name": name})

    def _ask(self, where: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        """GET is tried again; what changes the server is sent once."""

        async def ask(connections: httpx2.AsyncClient) -> Answer:
            data = None if body is None else json.dumps(body).encode("ascii")
            return await self._server.ask(
                connections, where, data, self._prefix + path, retry=body is None
            )

        return self.run(ask)

    async def completion(
        self,
        connections: httpx2.AsyncClient,
        model: str,
        request: SampleRequest,
        params: SamplingParams,
        eos_token_ids: Sequence[int],
    ) -> Sample:
        """One completion. Raises CollapseError, SamplerError and SamplerUnavailableError."""
        body = json.dumps(_completion_request(model, request, params, eos_token_ids))
        answer = await self._server.ask(
            connections,
            f"a completion of {len(request.prompt_ids)} tokens",
            body.encode("ascii"),
            self._prefix + "/v1/completions",
        )
        if answer.status == 404:
            raise SamplerError(
                f"{self.said} does not serve {model}, which this run gave it: it was started "
                "again, or something else unloaded it. Start the run again, which gives it the "
                "weights again; finished answers are kept"
            )
        if answer.status != 200:
            raise self._server.refused(answer)
        return self._sample_in(answer)

    def _sample_in(self, answer: Answer) -> Sample:
        choices = _read(answer, "choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        tokens = choice.get("token_ids") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(tokens, list):
            raise SamplerError(
                f"{self.said} answered without token_ids, which vLLM gives from 0.10.2 on: "
                f"{excerpt(answer.data)}"
            )
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
            raise SamplerError(
                f"{self.said} answered with {len(tokens)} tokens and not as many log-probabilities"
            )
        if any(p is None or p <= _NO_NUMBER for p in logprobs):
            raise CollapseError(
                f"{self.said} drew a token from logits that are not finite: the weights or the "
                "number type are broken"
            )
        reason: FinishReason = "stop" if choice.get("finish_reason") == "stop" else "length"
        if choice.get("finish_reason") not in ("stop", "length"):
            raise SamplerError(
                f"{self.said} ended a completion because of {choice.get('finish_reason')!r}, where "
                '"stop" or "length" was needed: look at its log'
            )
        return Sample(tuple(int(t) for t in tokens), reason, float(sum(logprobs)))


def _completion_request(
    model: str,
    request: SampleRequest,
    params: SamplingParams,
    eos_token_ids: Sequence[int],
) -> dict[str, Any]:
    """All that shapes a draw is said: what is not, a server fills from the model's own
    generation_config or from its command line.
    """
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        "seed": request.seed,
        "n": 1,
        "max_tokens": request.limit(params),
        "min_tokens": 0,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # The model's own end tokens are ignored, ours are not; the text is not looked at.
        "ignore_eos": True,
        "stop_token_ids": list(eos_token_ids),
        "stop": [],
        "skip_special_tokens": False,
        "logprobs": 0,  # of the token that was drawn, and no other
        "return_token_ids": True,
        "stream": False,
    }


def _read(answer: Answer, key: str) -> Any:
    """A value of an answer in JSON; None where there is none."""
    try:
        value = json.loads(answer.data)
    except (ValueError, RecursionError):
        return None
    return value.get(key) if isinstance(value, dict) else None
