"""scripts/trl_grpo.py on a tiny model: TRL's GRPOTrainer as a row of a comparison."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import yaml
from datasets.utils.logging import disable_progress_bar
from test_compare import compared, place, raw_spec, run_folder, spec

from neat_align.cli.options import options_from
from neat_align.files.atomic import read_json
from neat_align.rounds.completions import read_groups
from scripts_as_modules import script

pytest.importorskip("trl", reason="TRL's trainer needs trl: pip install -e '.[bench]'")
__all__ = ["place"]  # a fixture


@pytest.fixture(scope="module")
def grpo() -> ModuleType:
    disable_progress_bar()
    return script("trl_grpo")


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [True, False], ids=["an adapter", "all weights"])
def test_it_is_trained_on_the_same_prompts_and_enters_the_table(
    grpo: ModuleType, place: Path, tmp_path: Path, use_peft: bool
) -> None:
    settings = {
        "use_peft": use_peft,
        "lora_target_modules": ["q_proj", "v_proj"],
        "kl_weight": 0.1,
        "per_device_train_batch_size": 2,
        "prompts_per_round": 4,
    }
    raw = raw_spec(place, seeds=[3], settings=settings)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    grpo.main([str(tmp_path / "tiny.yaml"), str(tmp_path / "grpo")])
    facts = read_json(tmp_path / "grpo" / "seed3" / "training.json")
    assert (facts["prompts"], facts["answers"], facts["steps"]) == (8, 4, 4)
    assert all("kl" in line and "reward" in line for line in facts["log"] if "loss" in line)
    methods = {"grpo": {"policy": str(tmp_path / "grpo" / "seed{seed}")}, "neat-plain": None}
    given = spec(place, methods=methods, seeds=[3], settings=settings)
    result, _ = compared(given, tmp_path / "out")
    run, _ = result["runs"]
    assert run["points"][0]["kl"] > 0
    assert {r["method"] for r in result["table"]} == {"base", "grpo", "neat-plain"}
    # The prompts that a method of the comparison had, in the order of its rounds.
    _, config = options_from({**given.options(given.methods[0], {}, 3), "output_dir": "x"})
    rows = grpo.load_data(*options_from({**given.options(given.methods[0], {}, 3)})[:1])[0]
    ours = [
        group.prompt
        for number in (0, 1)
        for group in read_groups(
            run_folder(tmp_path / "out", "neat-plain", 3)
            / "rounds"
            / f"0000{number}"
            / "groups.parquet"
        )
    ]
    assert [row["prompt"] for row in grpo.in_order(rows, config)] == ours
    grpo.main([str(tmp_path / "tiny.yaml"), str(tmp_path / "grpo")])  # it is there: not again
    assert read_json(tmp_path / "grpo" / "seed3" / "training.json") == facts


@pytest.mark.slow
def test_a_length_that_it_does_not_read_is_refused(
    grpo: ModuleType, place: Path, tmp_path: Path
) -> None:
    raw = raw_spec(place, settings={"data_passes": 1})
    raw["settings"].pop("num_train_epochs")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(SystemExit, match="sets data_passes or max_steps: set num_train_epochs"):
        grpo.main([str(tmp_path / "tiny.yaml"), str(tmp_path / "grpo")])
