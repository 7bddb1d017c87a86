"""`neat-align doctor`: what is there is told as it is, and nothing is asked that is not said."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from neat_align.cli import doctor_checks
from neat_align.cli.app import main
from neat_align.cli.doctor_checks import (
    Finding,
    _judged,
    check_disk,
    check_extras,
    check_hub,
    check_packages,
    check_python,
    check_threads,
    check_vllm,
    examine,
)

MODELS = {"data": [{"id": "mine", "max_model_len": 4096, "parent": None}]}


class Server(BaseHTTPRequestHandler):
    """The hub's start page, and a vLLM server's list of models."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        body = json.dumps(MODELS if self.path == "/v1/models" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Server) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.fixture
def nobody_connects(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    asked: list[object] = []

    def refused(self: object, address: object) -> None:
        asked.append(address)
        raise OSError("nothing may be asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket.socket, "connect_ex", refused)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: refused(host, host))
    return asked


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_it_reads_well_on_a_terminal_and_ends_with_0_where_nothing_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nobody_connects: list[object]
) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--output-dir", str(tmp_path)])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    heads = [line.split()[:2] for line in lines if not line.startswith(" ")]
    names = {name for name, _ in heads}
    assert names >= {"neat-align", "packages", "extras", "bf16", "threads", "disk", "hub"}
    assert {word for _, word in heads} <= {"ok", "warn"}
    assert nobody_connects == []
    assert "not asked: HF_HUB_OFFLINE is set" in " ".join(" ".join(lines).split())


def test_a_failure_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--output_dir", str(tmp_path / "file")])
    assert end.value.code == 1
    assert re.search(r"^disk        fail .*", capsys.readouterr().out, re.MULTILINE)


def test_versions_are_held_against_their_ranges() -> None:
    assert _judged(Requirement("numpy>=1")) is None
    newer = _judged(Requirement("numpy>=1,<1.5"))
    assert newer is not None
    assert newer.word == "warn"
    assert re.fullmatch(
        r"[\d.]+ is newer than what is tested \(<1.5,>=1\): pip install 'numpy<1.5,>=1'",
        newer.text,
    )
    older = _judged(Requirement("numpy>=99"))
    assert older is not None
    assert older.word == "fail"
    assert "is older than what is tested" in older.text
    absent = _judged(Requirement("no-such-package>=1,<2"))
    assert absent == Finding(
        "no-such-package", "fail", "is not installed: pip install 'no-such-package<2,>=1'"
    )


def test_the_installed_package_says_what_it_needs() -> None:
    assert only(check_python()).word == "ok"
    *problems, whole = check_packages()
    count = re.match(r"(\d+) of (\d+) in their tested ranges", whole.text)
    assert count is not None
    assert int(count[2]) - int(count[1]) == len(problems)
    said = " ".join(f.text for f in check_extras())
    assert "demo" in said
    assert not re.search(r"\b(dev|audit|bench)\b", said)


def test_nothing_is_imported_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an environment without any of the packages: they are named, and no check raises."""
    monkeypatch.setattr(doctor_checks, "_version", lambda name: None)
    found = list(examine(tmp_path, None, ()))
    assert {f.name for f in found if f.word == "fail"} >= {"torch", "transformers", "peft"}
    assert not {f.name for f in found} & {"device", "bf16", "threads", "memory"}
    code = (
        "import sys; import neat_align.cli.app\n"
        "print([m for m in ('torch', 'packaging') if m in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout == "[]\n"


def test_the_hub_is_asked_where_it_is_not_switched_off(
    monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "ENDPOINT", server)
    finding = only(check_hub())
    assert finding.word == "ok"
    assert finding.text.startswith(f"{server} answers (200), with")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    finding = only(check_hub())
    assert finding.word == "warn"
    assert re.fullmatch(
        r"http://127.0.0.1:9 does not answer \(.*\): use local folders, and set HF_HUB_OFFLINE=1",
        finding.text,
    )


def test_a_vllm_server_is_asked_what_it_serves(server: str) -> None:
    assert only(check_vllm(server, ())) == Finding(
        "vllm", "ok", "serves mine, rows of 4,096 tokens"
    )
    for url, said in (
        ("http://127.0.0.1:9", "cannot be asked"),
        (f"{server}/v1", "leave out /v1"),
        ("http://example.com:8000", "http"),
        (f"{server}/other", "is no JSON|does not answer as vLLM|lists no model"),
    ):
        finding = only(check_vllm(url, ()))
        assert finding.word == "fail"
        assert re.search(said, finding.text)


def test_threads_that_are_in_each_others_way_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for times, word in (([0.2, 0.1], "warn"), ([0.1, 0.19], "ok")):
            monkeypatch.setattr(doctor_checks, "_typical", lambda _, left=times: left.pop(0))
            finding = only(check_threads())
            assert finding.word == word
            assert torch.get_num_threads() == 2
            told = "2 threads take 2.0 times as long as one for small steps. Others use the cores"
            assert (told in finding.text) == (word == "warn")
        torch.set_num_threads(1)
        assert only(check_threads()).text.startswith("1 of torch, ")
    finally:
        torch.set_num_threads(before)


def test_the_disk_is_looked_at_where_runs_would_go(tmp_path: Path) -> None:
    finding = only(check_disk(tmp_path / "not" / "yet"))
    assert finding.name == "disk"
    assert finding.text.endswith(f"free for {tmp_path / 'not' / 'yet'}")
    (tmp_path / "file").touch()
    assert only(check_disk(tmp_path / "file" / "run")).text == (
        f"{tmp_path / 'file'} is a file: choose another --output_dir"
    )
