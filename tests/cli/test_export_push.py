"""Nothing goes to the hub unless it is asked for; what is asked for goes there, private.

The hub is a server on this machine that speaks as much of its API as one commit needs.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reward_server import Asked, Handler, RewardServer
from run_files import build_run

pytestmark = pytest.mark.slow


def hub(handler: Handler, asked: Asked, _: int) -> None:
    """Makes a data set, takes every file as it is, and commits."""
    where = f"http://{handler.headers['Host']}/datasets/me/pairs"
    answers: dict[str, Any] = {"/api/repos/create": {"url": where}}
    if asked.path.endswith("/preupload/main"):
        files = json.loads(asked.body)["files"]
        modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
        answers[asked.path] = {"files": modes}
    if asked.path.endswith("/commit/main"):
        answers[asked.path] = {"commitUrl": f"{where}/commit/1", "commitOid": "1", "success": True}
    if asked.path == "/api/validate-yaml":
        answers[asked.path] = {"errors": [], "warnings": []}
    body = json.dumps(answers.get(asked.path, {"error": "no such thing"})).encode()
    handler.answer(200 if asked.path in answers else 404, body, Content_Type="application/json")


def refusing(handler: Handler, asked: Asked, _: int) -> None:
    handler.answer(403, b'{"error": "you may not"}', Content_Type="application/json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "demo", rounds=1, groups=4)


def exported(server: RewardServer, run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, for which the server is the hub."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url.rsplit("/", 1)[0],
        "HF_TOKEN": "hf_" + "a" * 20,
        "HF_HOME": str(run.parent / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "neat_align", "export", str(run), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=60
    )


def committed(server: RewardServer) -> dict[str, bytes]:
    """The files of the only commit, by their names on the hub."""
    (commit,) = (a for a in server.asked if a.path == "/api/datasets/me/pairs/commit/main")
    lines = [json.loads(line) for line in commit.body.splitlines()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }


def test_nothing_is_sent_without_the_option(run: Path) -> None:
    with RewardServer(hub) as server:
        done = exported(server, run, "--output", f"{run.parent}/out/")
    assert done.returncode == 0, done.stderr
    assert not server.asked


@pytest.mark.parametrize("public", [False, True])
def test_the_file_and_its_card_are_sent_in_one_commit(run: Path, *, public: bool) -> None:
    output = run.parent / "pairs.jsonl"
    with RewardServer(hub) as server:
        words = ["--output", str(output), "--push-to-hub", "me/pairs"]
        done = exported(server, run, *words, *(["--public"] if public else []))
    assert done.returncode == 0, done.stderr
    assert "/datasets/me/pairs" in done.stdout.splitlines()[-1]
    made = json.loads(server.asked[0].body)
    assert made["type"] == "dataset"
    assert made["visibility"] == ("public" if public else "private")
    files = committed(server)
    assert set(files) == {"pairs.jsonl", "README.md"}
    assert files["pairs.jsonl"] == output.read_bytes()
    assert b"Content warning" in files["README.md"]
    assert str(run.parent).encode() not in files["README.md"]


def test_a_hub_that_refuses_is_told_and_the_file_stays(run: Path) -> None:
    output = run.parent / "pairs.jsonl"
    with RewardServer(refusing) as server:
        done = exported(server, run, "--output", str(output), "--push_to_hub", "me/pairs")
    assert done.returncode == 2
    assert "is written and was not sent to me/pairs" in done.stderr
    assert "hf auth login" in done.stderr
    assert output.is_file()
    assert len(server.asked) == 1
