"""Two workers of a real Ray on this machine: equal to one process, whoever is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import small_rounds
from ray_driver import BATCH, DATA, PROMPTS, SHARDS
from small_rounds import files_of
from small_trainer import ROWS
from tiny import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed: pip install 'neat-align[ray]'",
    ),
]
TESTS = Path(__file__).parents[1]
ANSWERS = SHARDS * PROMPTS * 3
SECONDS = 250


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def start(*words: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=folder,
    )


def drive(folder: Path) -> subprocess.Popen[str]:
    return start(str(TESTS / "ray_driver.py"), str(folder), folder=folder)


def end(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    return said


def lines(folder: Path, kind: str = "") -> list[list[str]]:
    """What workers have said that they begin: [pid, …] of this kind, or [kind, pid, …]."""
    log = folder / "log"
    words = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [w[1:] for w in words if w[0] == kind] if kind else words


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert process.poll() is None, process.communicate()[0]
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"nothing of it in {SECONDS} seconds: {process.communicate()[0]}")
        time.sleep(0.02)


def finished(folder: Path) -> set[str]:
    return {p.parent.name for p in (folder / "round" / "work").glob("*/finished.json")}


def written(folder: Path, name: str) -> tuple[int, int]:
    """Which file a finished shard's mark is, and since when."""
    found = (folder / "round/work" / name / "finished.json").stat()
    return found.st_ino, found.st_mtime_ns


def drawn(folder: Path) -> Counter[str]:
    return Counter(seed for words in lines(folder, "sample") for seed in words[1:])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the round that one process makes."""
    folder = tmp_path_factory.mktemp("own")
    small_rounds.run(
        folder,
        small_rounds.tools(small_rounds.Seeded(), batch_size=BATCH),
        p=small_rounds.PARAMS,
        data=DATA,
        slice_prompts=PROMPTS,
    )
    return files_of(folder)


def listeners(process: subprocess.Popen[str]) -> set[str]:
    """The addresses at which a process and those below it listen."""
    parents = psutil.Process(process.pid)
    found = set()
    for one in [parents, *parents.children(recursive=True)]:
        try:
            found |= {c.laddr.ip for c in one.net_connections("tcp") if c.status == "LISTEN"}
        except psutil.Error:
            continue
    return found


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray's processes below this one, which end with it; its two agents look now and then."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [p for p in below if not p.name().endswith("Agent")]


def test_two_workers_share_the_shards_and_nothing_listens_outside(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    process = drive(tmp_path)
    until(lambda: len(lines(tmp_path, "sample")) > 3, process)
    assert {ip.removeprefix("::ffff:") for ip in listeners(process)} == {"127.0.0.1"}
    said = end(process)
    assert files_of(tmp_path / "round") == expected
    assert len({words[0] for words in lines(tmp_path, "sample")}) == 2
    assert len({words[0] for words in lines(tmp_path, "score")}) == 1
    assert set(drawn(tmp_path).values()) == {1}
    assert len(drawn(tmp_path)) == ANSWERS
    # Ray's one line about how little it is to say.
    assert [line for line in said.splitlines() if "RAY_BACKEND_LOG_LEVEL" not in line] == []


def test_a_worker_that_is_killed_loses_nothing_and_doubles_nothing(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    process = drive(tmp_path)
    until(lambda: len(lines(tmp_path, "sample")) >= 5, process)
    killed = lines(tmp_path, "sample")[-1][0]
    os.kill(int(killed), signal.SIGKILL)
    end(process)
    assert files_of(tmp_path / "round") == expected
    seeds = drawn(tmp_path)
    assert len(seeds) == ANSWERS
    # What was finished of the killed shard was taken up: one batch at most is drawn again.
    assert sum(seeds.values()) - ANSWERS in (0, BATCH)
    assert lines(tmp_path, "sample")[-1][0] != killed


def test_a_reward_worker_that_is_killed_pays_for_one_batch_at_most_again(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    process = drive(tmp_path)
    until(lambda: len(lines(tmp_path, "score")) >= 2, process)
    os.kill(int(lines(tmp_path, "score")[-1][0]), signal.SIGKILL)
    end(process)
    assert files_of(tmp_path / "round") == expected
    assert set(drawn(tmp_path).values()) == {1}


def test_a_killed_driver_begins_no_finished_shard_again(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    process = drive(tmp_path)
    until(lambda: len(finished(tmp_path)) >= 2, process)
    family = family_of(process)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=60)[1]
    before, kept = len(lines(tmp_path)), finished(tmp_path)
    assert len(kept) < SHARDS
    marks = {name: written(tmp_path, name) for name in kept}
    process = drive(tmp_path)
    until(lambda: len(lines(tmp_path)) > before, process)
    for name, mark in marks.items():
        assert written(tmp_path, name) == mark
    end(process)
    assert files_of(tmp_path / "round") == expected
    seeds = drawn(tmp_path)
    assert len(seeds) == ANSWERS
    assert sum(seeds.values()) - ANSWERS <= 2 * BATCH  # one batch a worker


def expand(folder: Path, output: str, *options: str) -> subprocess.Popen[str]:
    return start(
        *("-m", "neat_align.cli", "expand", "--output", output, "--model_name_or_path", "model"),
        *("--dataset_name", "data.jsonl", "--reward_funcs", "vowels:count", "contrast"),
        *("--bf16", "false", "--instruction_bank", "politeness", "--max_completion_length", "8"),
        *("--max_prompt_length", "200", "--num_plain", "1", "--disable_tqdm", "true"),
        *("--prompts_per_round", "12", *options),
        folder=folder,
    )


def test_the_command_gives_the_local_engines_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real (tiny) model, a reward from a file beside it, and the policy's own opinion."""
    save_tiny(tmp_path / "model", "llama")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "vowels.py").write_text(
        "def count(completions, **_):\n"
        "    return [float(sum(map(c[0]['content'].count, 'aeiou'))) for c in completions]\n"
    )
    ray = expand(tmp_path, "ray.jsonl", "--engine", "ray", "--num_workers", "2")
    end(ray)
    end(expand(tmp_path, "local.jsonl"))
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()
    assert files_of(tmp_path / "ray-run" / "rounds") == files_of(tmp_path / "local-run" / "rounds")
    # Finished, it is read again without Ray's workers, in another form.
    again = expand(
        tmp_path, "ray.parquet", "--engine", "ray", "--num-workers", "2", "--resume", "true",
        "--form", "groups", "--output_dir", "ray-run",
    )  # fmt: skip
    assert "12 rows (groups)" in end(again)


def test_a_signal_stops_the_workers_and_says_how_to_go_on(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "vowels.py").write_text(
        "import time\n"
        "def count(completions, **_):\n"
        "    open('asked', 'w').close()\n"
        "    time.sleep(300)\n"
    )
    process = expand(tmp_path, "out.jsonl", "--engine", "ray", "--num_workers", "1")
    until((tmp_path / "asked").exists, process)
    family = family_of(process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM in the expansion" in said
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert len(list(Path("/tmp/ray").glob(f"session_*_{process.pid}"))) == 1  # no second Ray
