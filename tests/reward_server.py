"""A real reward server on this machine, which behaves as a test tells it.

`with RewardServer(behaviour) as server`.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def rows(self) -> list[dict[str, Any]]:
        return json.loads(self.body)["rows"]


class Handler(BaseHTTPRequestHandler):
    """Reads the request and leaves the answer to the test."""

    # As real servers: else a second answer on one connection waits 40 ms for the client's ACK.
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        server: RewardServer = self.server.owner  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = Asked(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        with server.lock:
            number = len(server.asked)
            server.asked.append(asked)
        server.behaviour(self, asked, number)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


Behaviour = Callable[[Handler, Asked, int], None]


def by_length(handler: Handler, asked: Asked, number: int) -> None:
    """The good server: a reward is the completion's length, and an empty one abstains."""
    rewards = [float(len(row["completion"])) or None for row in asked.rows]
    handler.answer(200, json.dumps({"rewards": rewards}).encode())


def saying(*replies: tuple[int, bytes] | tuple[int, bytes, dict[str, str]]) -> Behaviour:
    """These answers one after the other, then good ones."""

    def behaviour(handler: Handler, asked: Asked, number: int) -> None:
        if number >= len(replies):
            return by_length(handler, asked, number)
        status, body, *headers = replies[number]
        handler.answer(status, body, **(headers[0] if headers else {}))
        return None

    return behaviour


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what some tests are about."""


@dataclass
class RewardServer:
    """Listens on a free port of 127.0.0.1 while it is open, and remembers what it was asked."""

    behaviour: Behaviour = by_length
    port: int = 0
    certificate: Sequence[str] = ()
    asked: list[Asked] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> RewardServer:
        self._server = _Quiet(("127.0.0.1", self.port), Handler)
        self._server.owner = self  # type: ignore[attr-defined]
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}/score"
