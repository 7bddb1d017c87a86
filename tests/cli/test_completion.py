"""What a shell completes, asked as bash asks: names of options and values, without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from neat_align.cli import main


def completed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> list[str]:
    words = line.split()
    monkeypatch.setenv("_NEAT_ALIGN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - (not line.endswith(" "))))
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("neat-align tr", ["train"]),
        ("neat-align train --model", ["--model_name_or_path", "--model", "--model_revision"]),
        ("neat-align train --max-comp", ["--max-completion-length"]),
        ("neat-align train --lr_s", ["--lr_scheduler_type", "--lr_scheduler_kwargs"]),
        ("neat-align expand --num_w", ["--num_workers"]),
        ("neat-align expand --distil_alp", ["--distil_alpha"]),
        ("neat-align compare --meth", ["--methods"]),
        ("neat-align probe --ban", ["--bank"]),
        ("neat-align train --bank pol", ["politeness"]),
        ("neat-align train --instruction-bank pol", ["politeness"]),
        ("neat-align probe --bank pol", ["politeness"]),
        ("neat-align train --data d", ["demo"]),
        ("neat-align train --data ./d", []),
        ("neat-align train --reward_funcs vader min", ["minilm_tone"]),
        ("neat-align train --seed 1 v", []),
        ("neat-align train --rank_by o", ["origin", "origin_then_reward"]),
        ("neat-align train --eval_strategy e", ["epoch"]),
        ("neat-align train --use_peft ", ["true", "false"]),
        ("neat-align train --config quick", ["quickstart"]),
        ("neat-align compare --config compare-q", ["compare-quickstart"]),
        ("neat-align compare --config quick", []),
    ],
)
def test_completion(
    line: str,
    offered: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert completed(monkeypatch, capsys, line) == offered


def test_completion_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from neat_align.cli import main\n"
        "try:\n"
        "    main([])\n"
        "except SystemExit:\n"
        "    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    asked = {
        "_NEAT_ALIGN_COMPLETE": "complete_bash",
        "COMP_WORDS": "neat-align train --reward_funcs vad",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | asked,
    )
    assert done.stdout.split() == ["vader", "[]"]


def test_the_script_for_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--show-completion", "bash"])
    script = capsys.readouterr().out
    assert "neat-align" in script
