"""A small Hugging Face hub on this machine: it takes commits and keeps what was sent.

`with hub(monkeypatch) as server:` points huggingface_hub at it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest


@dataclass
class Hub:
    """What the server was asked (`requests`), and the files that are on it by (repository, path).

    `denies`: it answers 401 to everything.
    """

    url: str
    requests: list[str] = field(default_factory=list)
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    received: bytes = b""
    denies: bool = False

    def of(self, repository: str) -> dict[str, bytes]:
        return {path: data for (name, path), data in self.files.items() if name == repository}


@contextlib.contextmanager
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    found = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = found  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test_alone")
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, value: Any, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        found: Hub = self.server.hub  # type: ignore[attr-defined]
        found.requests.append(f"GET {self.path}")
        if self.path == "/api/models/an-org/base":
            self._answer({"id": "an-org/base", "cardData": {"license": "mpl-2.0"}})
        else:
            self._answer({"error": "not here"}, 404)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        parts = []  # chunked
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        found: Hub = self.server.hub  # type: ignore[attr-defined]
        body = self._body()
        found.requests.append(f"POST {self.path}")
        found.received += body
        if found.denies:
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            found.made.append(asked)
            owner = asked.get("organization") or "somebody"
            self._answer({"url": f"{found.url}/{owner}/{asked['name']}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": f["path"], **plain} for f in files]})
        elif "/commit/" in self.path:
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in filter(None, body.split(b"\n")):
                said = json.loads(line)
                if said["key"] == "file":
                    content = base64.b64decode(said["value"]["content"])
                    found.files[repository, said["value"]["path"]] = content
                elif said["key"] == "header":
                    found.messages.append(said["value"]["summary"])
            url = f"{found.url}/{repository}/commit/{'0' * 40}"
            self._answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            self._answer({"errors": [], "warnings": []})
