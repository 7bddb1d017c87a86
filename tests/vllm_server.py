"""vLLM servers for tests: a stand-in that speaks the same API, and a real one from its own venv.

The stand-in draws with the transformers sampler from the weights that it was given, so it is quick
and behaves as a test tells it; it proves nothing about vLLM. The real one is started from the
Python that NEAT_ALIGN_VLLM_PYTHON names (`make test-vllm`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from neat_align.sampling.batch_check import KnownWay
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from ports import free_port
from tiny import alone, random_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
REAL_PYTHON = "NEAT_ALIGN_VLLM_PYTHON"


def servable_config(context: int = 512, **more: Any) -> LlamaConfig:
    """A tiny llama that vLLM serves on a CPU: heads of 32."""
    return LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
        **more,
    )


def servable_model(seed: int = 0, context: int = 512) -> PreTrainedModel:
    """A tiny llama that vLLM serves on a CPU, its output weights not tied.

    With tied ones vLLM 0.32 on a CPU goes on with the old output weights after a reload.
    """
    return random_model(servable_config(context, tie_word_embeddings=False), seed)


def save_servable(path: Path, seed: int = 0) -> Path:
    """Write such a model and its tokenizer into a folder."""
    servable_model(seed).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


# ---- the stand-in --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(json.loads(data) if data else {})

    def _answer(self, body: dict[str, Any]) -> None:
        server: StandIn = self.server.owner  # type: ignore[attr-defined]
        asked = Asked(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        reply = server.reply(asked)
        if reply is None:  # as a process that died
            self.close_connection = True
            return
        data = json.dumps(reply[1]).encode()
        self.send_response(reply[0])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what some tests are about."""


Reply = tuple[int, Any] | None


@dataclass
class StandIn:
    """Listens on a free port of 127.0.0.1 while it is open; serves one model and its adapters.

    `before(asked)` may answer in its place, with (status, JSON), or None for a connection that
    breaks; it returns ... to let the stand-in answer. `changed` changes a completion's choice.
    """

    model: PreTrainedModel
    before: Callable[[Asked], Any] = lambda asked: ...
    changed: Callable[[dict[str, Any]], dict[str, Any]] = lambda choice: choice
    max_model_len: int = 512
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    adapters: dict[str, Any] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    under_way: int = 0
    most_under_way: int = 0
    lock: Any = field(default_factory=threading.Lock)
    drawing: Any = field(default_factory=threading.Lock)
    name: str = "base"

    def __enter__(self) -> StandIn:
        self.model = _copy(self.model)
        self._server = _Quiet(("127.0.0.1", self.port), _Handler)
        self._server.owner = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def paths(self) -> list[str]:
        return [a.path for a in self.asked]

    def completions(self) -> list[dict[str, Any]]:
        return [a.body for a in self.asked if a.path == "/v1/completions"]

    def reply(self, asked: Asked) -> Reply:
        with self.lock:
            self.asked.append(asked)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            reply = self.before(asked)
            return self._own(asked) if reply is ... else reply
        finally:
            with self.lock:
                self.under_way -= 1

    def _own(self, asked: Asked) -> Reply:
        answers = {
            "/v1/models": self._models,
            "/v1/completions": self._complete,
            "/collective_rpc": self._reload,
            "/reset_prefix_cache": lambda body: (200, {"success": True}),
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
        }
        if asked.path not in answers:
            return 404, {"detail": "Not Found"}
        return answers[asked.path](asked.body)

    def _models(self, body: dict[str, Any]) -> Reply:
        base = {"id": self.name, "parent": None, "max_model_len": self.max_model_len}
        loaded = [{"id": n, "parent": self.name, "max_model_len": None} for n in self.adapters]
        return 200, {"object": "list", "data": [base, *loaded]}

    def _complete(self, body: dict[str, Any]) -> Reply:
        model = self.adapters.get(body["model"]) if body["model"] != self.name else self.model
        if model is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return 400, {"error": {"message": "max_tokens cannot be greater than max_model_len"}}
        params = SamplingParams(
            body["max_tokens"], body["temperature"], body["top_p"], body["top_k"]
        )
        with self.drawing:
            sampler = TransformersSampler(
                model,
                tuple(body["stop_token_ids"]),
                TOKENIZER.pad_token_id,
                known_way=KnownWay("together"),  # as it is with every model here
            )
            request = SampleRequest(tuple(body["prompt"]), body["seed"])
            sample = sampler.sample([request], params)[0]
            logprobs = alone(model, request.prompt_ids, sample.token_ids)  # a second opinion
        choice = {
            "token_ids": list(sample.token_ids),
            "logprobs": {"token_logprobs": logprobs},
            "finish_reason": sample.finish_reason,
        }
        return 200, {"choices": [self.changed(choice)]}

    def _reload(self, body: dict[str, Any]) -> Reply:
        path = Path(body["kwargs"]["weights_path"])
        if not path.is_dir():
            return 500, {"error": {"message": f"Repo id must be in the form ... '{path}'"}}
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return 200, {"results": [None]}

    def _load(self, body: dict[str, Any]) -> Reply:
        if body["lora_name"] in self.adapters:
            return 400, {"error": {"message": "has already been loaded"}}
        if not Path(body["lora_path"]).is_dir():
            return 404, {"error": {"message": "No adapter found for path"}}
        loaded = PeftModel.from_pretrained(_copy(self.model), body["lora_path"]).eval()
        self.adapters[body["lora_name"]] = loaded
        return 200, "Success"

    def _unload(self, body: dict[str, Any]) -> Reply:
        found = self.adapters.pop(body["lora_name"], None)
        return (404, {"error": {"message": "not found"}}) if found is None else (200, "Success")


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    import copy

    return copy.deepcopy(model).eval()


# ---- the real one --------------------------------------------------------------------------------


@dataclass
class RealVllm:
    """A server of vLLM on this machine's CPU while it is open."""

    model: Path
    log: Path
    arguments: tuple[str, ...] = ()
    port: int = 0

    def __enter__(self) -> RealVllm:
        if REAL_PYTHON not in os.environ:
            raise RuntimeError(f"set {REAL_PYTHON} to a Python with vLLM, as make test-vllm does")
        if not self.port:
            self.port = free_port()
        environment = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "OMP_WAIT_POLICY": "passive",
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("PYTHONPATH", None)
        command = [os.environ[REAL_PYTHON], "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--enforce-eager", "--max-num-seqs", "64", *self.arguments]
        # vLLM 0.32 on a CPU ends when it reads a prompt in parts for a request with a seed.
        command += ["--no-enable-chunked-prefill"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._wait(300.0)
        return self

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"vLLM did not start: {self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """End it and its workers at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"
