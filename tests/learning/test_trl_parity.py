"""Our `dpo` loss against another library:

TRL's DPOTrainer gives the same losses, step by step, on the same pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets.utils.logging import disable_progress_bar

from tiny import tiny_model, tiny_tokenizer

for _name in ("trl", "psutil"):
    pytest.importorskip(
        _name, reason=f"the comparison with TRL needs {_name}: pip install -e '.[bench]'"
    )

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOKENIZER = tiny_tokenizer()
PAIRS = 8


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """benchmarks/trl_dpo_parity.py, whose own machinery the tests run on a tiny model."""
    disable_progress_bar()
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import trl_dpo_parity

        yield trl_dpo_parity
    finally:
        sys.path.remove(str(BENCHMARKS))


def count_e(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    **columns: Any,
) -> list[float]:
    return [float(c[0]["content"].count("e")) + 0.01 * len(c[0]["content"]) for c in completions]


@pytest.fixture(scope="module")
def pairs(script: Any) -> list[Any]:
    rows = [
        {"prompt": [{"role": "user", "content": f"What do you say to number {i}?"}]}
        for i in range(PAIRS)
    ]
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    groups = script.sampled_groups(
        *(model, TOKENIZER, rows, count_e),
        prompts_per_round=PAIRS,
        max_prompt_length=200,
        max_completion_length=12,
        instruction_bank="politeness",
    )
    found = script.text_pairs(groups, TOKENIZER)
    assert len(found) == PAIRS
    return list(found)


def found_with(script: Any, pairs: list[Any], **changes: Any) -> dict[str, Any]:
    setting = replace(script.Setting(1e-2), **changes)
    return dict(
        script.parity(
            tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER), TOKENIZER, pairs, setting
        )
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"pairs_per_batch": 2, "accumulation": 2}, {"lora": True}],
    ids=["full", "accumulated", "lora"],
)
def test_dpo_trains_as_trl_trains_it(
    script: Any, pairs: list[Any], changes: dict[str, Any]
) -> None:
    found = found_with(script, pairs, **changes)
    losses = found["losses"]["trl"]
    assert found["steps"] == 4
    assert abs(losses[0] - 0.6931) < 1e-3, "the first step is at the reference"
    assert max(losses) - min(losses) > 0.02, "the runs have to move, or equal losses say nothing"
    for pair in ("packed_and_trl", "padded_and_trl"):
        assert script.within(found["differences"][pair]), found["differences"]
    assert found["within_tolerance"]


def test_another_beta_is_seen(script: Any, pairs: list[Any]) -> None:
    found = found_with(script, pairs, trl_beta=0.2)
    assert not found["within_tolerance"]
    assert found["differences"]["packed_and_trl"]["loss_max"] > 10 * script.LOSS_TOLERANCE


def test_other_token_ids_are_refused(script: Any, pairs: list[Any]) -> None:
    groups = script.pair_groups(pairs, TOKENIZER, 512)
    rows = [
        {
            "prompt_ids": list(g.prompt_ids),
            "chosen_ids": list(g.completions[0].token_ids),
            "rejected_ids": list(g.completions[1].token_ids),
        }
        for g in groups
    ]
    script.check_same_ids(groups, rows)
    rows[3]["rejected_ids"] = rows[3]["rejected_ids"][:-1]
    with pytest.raises(SystemExit, match="pair 3: the token ids differ"):
        script.check_same_ids(groups, rows)
