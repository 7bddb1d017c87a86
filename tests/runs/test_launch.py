"""`python -m neat_align` under torchrun: several processes, restarts, one voice, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.distributed import PrefixStore, TCPStore

from neat_align.cli.processes import check_alone, say_once
from neat_align.cli.progress import terminal_callbacks
from neat_align.errors import ConfigError, NEATError
from neat_align.pipeline import _goes_on
from neat_align.runs import launch
from neat_align.script_arguments import ScriptArguments
from ports import free_port
from small_trainer import config
from tiny import save_tiny

TESTS = Path(__file__).resolve().parents[1]
RECIPE = {
    "holdout": 2,
    "reward_funcs": ["launched:count_e"],
    "bf16": False,
    "prompts_per_round": 6,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "max_prompt_length": 200,
    "max_completion_length": 10,
    "instruction_bank": "politeness",
    "learning_rate": 1e-3,
    "num_positive": 2,
    "num_negative": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "drift_prompts": 2,
    "disable_tqdm": True,
}


# ---- quick: what a launch is told by ---------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As under torchrun; the test's own parent is the launcher."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    return monkeypatch


def begin(folder: Path) -> None:
    """What a run leaves that was killed early."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.lock").touch()


def test_a_restart_goes_on_with_what_its_launch_made_and_with_nothing_else(
    tmp_path: Path, launched: pytest.MonkeyPatch
) -> None:
    script, run = ScriptArguments(), tmp_path / "run"
    assert _goes_on(script, run) is False  # the first start, which notes the launch
    assert _goes_on(script, run) is False  # killed before the run's first file
    begin(run)
    assert _goes_on(script, run) is True
    (run / "evaluation-before.json").touch()  # work that is done: nobody else's
    assert _goes_on(script, run) is True
    launched.setenv("TORCHELASTIC_RUN_ID", "another")
    with pytest.raises(ConfigError, match="not empty"):
        _goes_on(script, run)
    launched.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(ConfigError, match="not empty"):
        _goes_on(script, run)


def test_a_restart_after_a_refusal_is_refused_again(
    tmp_path: Path, launched: pytest.MonkeyPatch
) -> None:
    begin(tmp_path)
    (tmp_path / "evaluation-before.json").touch()
    for _ in range(2):
        with pytest.raises(ConfigError, match="not empty"):
            _goes_on(ScriptArguments(), tmp_path)


def test_another_launcher_of_the_same_number_is_another(
    tmp_path: Path, launched: pytest.MonkeyPatch
) -> None:
    launch.note_launch(tmp_path)
    assert launch.is_restart(tmp_path)
    noted = json.loads((tmp_path / "launch.json").read_text())
    assert noted["launcher"] == os.getppid()
    (tmp_path / "launch.json").write_text(json.dumps({**noted, "since": "1"}))
    assert not launch.is_restart(tmp_path)


def test_without_a_launcher_nothing_is_noted_and_an_old_note_goes(tmp_path: Path) -> None:
    (tmp_path / "launch.json").write_text("{}")
    launch.note_launch(tmp_path)
    assert not (tmp_path / "launch.json").exists()


def test_auto_resume_begins_a_run_or_goes_on_with_it(tmp_path: Path) -> None:
    script, run = ScriptArguments(auto_resume=True), tmp_path / "run"
    assert _goes_on(script, run) is False
    begin(run)
    assert _goes_on(script, run) is True
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"not empty \(thesis.tex\)"):
        _goes_on(script, other)
    with pytest.raises(ConfigError, match="resume asks for a run that is there"):
        ScriptArguments(auto_resume=True, resume=True)


@pytest.mark.parametrize("command", ["expand", "compare", "demo", "probe", "inspect"])
def test_a_command_for_one_process_refuses_several(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_alone([command])
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=f"`neat-align {command}` works in one process .* 4, "):
        check_alone(["--version", command, "--config", "train"])
    for works in (["train"], ["evaluate"], ["--help"], []):
        check_alone(works)


class Replica:
    """A configuration as the second process has it."""

    process_index = 1

    def __init__(self, args: Any) -> None:
        self.args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self.args, name)


def test_only_the_first_process_shows_a_run(tmp_path: Path) -> None:
    shown = config(tmp_path, disable_tqdm=False, log_completions=True)
    assert len(terminal_callbacks(shown)) == 3
    assert terminal_callbacks(Replica(shown)) == []


def test_without_a_store_to_ask_every_process_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun, mpirun: nobody may keep an error to himself."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.store.cache_clear()
    say_once("error: it broke")
    assert capsys.readouterr().err == "error: it broke\n"


def test_a_process_is_answered_under_its_own_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start whose store holds the names, answers and thanks of a dead one."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    met = [meeting(monkeypatch, first_is_late=late) for late in (False, True, False, True)]
    assert [start for start, _ in met] == [1, 2, 3, 4]
    assert met[0][1] == 0  # the first start leaves everything as it is
    assert all(port not in (0, server.port) for _, port in met[1:])
    shared = PrefixStore("neat-align", server)
    assert shared.check(["thanks-4-1"])


def meeting(monkeypatch: pytest.MonkeyPatch, *, first_is_late: bool) -> tuple[int, int]:
    """Both processes of one start; what each of them learns is the same."""

    def store() -> PrefixStore:
        port = int(os.environ["MASTER_PORT"])
        return PrefixStore("neat-align", TCPStore("127.0.0.1", port, is_master=False))

    monkeypatch.setenv("RANK", "1")
    work = [lambda: launch._gather_all(store()), lambda: launch._report(store())]
    found: list[tuple[int, int]] = []
    threads = [threading.Thread(target=lambda w=w: found.append(w()), daemon=True) for w in work]
    for thread in reversed(threads) if first_is_late else threads:
        thread.start()
        time.sleep(0.1)  # long enough to read, or to answer, what a dead process left
    for thread in threads:
        thread.join(timeout=20)
    assert len(found) == 2
    assert found[0] == found[1]
    return found[0]


def test_a_process_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(launch, "_MEETING_TIMEOUT", timedelta(seconds=0.1))
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(NEATError, match=r"2 of 3 processes were not heard of .* rank 1\)"):
        launch._gather_all(PrefixStore("neat-align", server))


# ---- slow: under torchrun ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_tiny(folder / "model", "llama")
    prompts = [[{"role": "user", "content": f"What of number {i}?"}] for i in range(12)]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "recipe.yaml").write_text(
        json.dumps(
            {
                "model_name_or_path": str(folder / "model"),
                "dataset_name": str(folder / "rows.jsonl"),
                **RECIPE,
            }
        )
    )
    return folder / "recipe.yaml"


def command(recipe: Path, run: Path, *launcher: str, verb: str = "train") -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *(*launcher, "-m", "neat_align", verb),
        *("--config", str(recipe), "--output_dir", str(run)),
    ]


def start(words: list[str], run: Path, fail: str = "") -> subprocess.Popen[str]:
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "FAIL_ONCE": fail,
        "RUN_FOLDER": str(run),
    }
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=environment, text=True, **pipes)


def done(words: list[str], run: Path, fail: str = "") -> tuple[int, str, str]:
    process = start(words, run, fail)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.distributed
@pytest.mark.slow
def test_a_launch_that_loses_a_process_ends_with_the_same_weights_by_itself(
    recipe: Path, tmp_path: Path
) -> None:
    """An error of a reward in the second round, and a process killed in the middle of training."""
    code, out, err = done(command(recipe, tmp_path / "whole", "--standalone"), tmp_path / "whole")
    assert code == 0, err[-3000:]
    assert out.count("held-out prompts, plain") == 1  # one process prints
    assert out.count("plan: 3 rounds") == 1
    whole = weights(tmp_path / "whole")
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["processes"] == 2
    for fail, launcher in {
        "raise": ("--standalone", "--max-restarts=1"),
        "kill": ("--master-port", str(free_port()), "--max-restarts=1"),
    }.items():
        run = tmp_path / fail
        code, out, err = done(command(recipe, run, *launcher), run, fail)
        assert code == 0, err[-3000:]
        assert (tmp_path / f"{fail}-failed").is_dir()
        assert err.count("error: reward function") == (fail == "raise")
        assert re.search(r"optimizer steps \([246] done\)", out), out
        assert whole.keys() == weights(run).keys()
        for name, weight in whole.items():
            assert weight.equal(weights(run)[name]), name
        again = json.loads((run / "result.json").read_text())
        differing = {name for name, value in result.items() if again[name] != value}
        assert differing <= {"wall_seconds", "peak_rss_bytes"}


@pytest.mark.distributed
@pytest.mark.slow
def test_several_processes_say_an_error_once_and_never_take_what_is_there(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run-key.json").write_text("{}")
    code, _, err = done(command(recipe, run, "--standalone", "--max-restarts=1"), run)
    assert code == 1  # torchrun's own
    assert len(re.findall(r"exitcode\s*: 2 ", err)) >= 1
    assert err.count("is not empty (run-key.json)") == 2  # a start and a restart
    assert [p.name for p in run.iterdir()] == ["run-key.json"]
    code, _, err = done([*command(recipe, run, "--standalone"), "--learning_rat", "1"], run)
    assert code == 1
    assert err.count("did you mean 'learning_rate'?") == 1
    code, _, err = done(command(recipe, run, "--standalone", verb="expand"), run)
    assert code == 1
    assert err.count("`neat-align expand` works in one process and was launched in 2") == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_a_launcher_that_is_asked_to_stop_leaves_a_run_to_go_on_with(
    recipe: Path, tmp_path: Path
) -> None:
    """SIGTERM to torchrun, as schedulers send it; `auto_resume` begins and goes on."""
    run = tmp_path / "run"
    words = [*command(recipe, run, "--standalone"), "--auto_resume", "--num_train_epochs", "40"]
    process = start(words, run)
    while not list(run.glob("checkpoint-*/COMPLETE.json")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("stopped by SIGTERM") == 1, err[-3000:]
    steps = max(int(p.parent.name[11:]) for p in run.glob("checkpoint-*/COMPLETE.json"))
    rounds = str(-(-steps // 2) + 1)
    last = [*command(recipe, run, "--standalone"), "--auto_resume", "--num_train_epochs", rounds]
    code, out, err = done([*last, "--allow_changes"], run)
    assert code == 0, err[-3000:]
    assert f"({steps} done)" in out
