"""TRL's trainers read what `export` writes, as the lines that it prints tell them to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from neat_align.cli import main
from neat_align.prompts.rows import Prompt
from neat_align.rounds.completions import Completion, CompletionGroup
from tiny import save_tiny

pytest.importorskip("trl", reason="TRL's trainers need trl: pip install -e '.[trl]'")
pytestmark = pytest.mark.slow

TRAINERS = {"preference": "DPO", "kto": "KTO", "sft": "SFT", "reward": "Reward"}


def a_group(i: int, *, conversational: bool) -> CompletionGroup:
    asked = f"What do you say to number {i}?"
    prompt: Prompt = [{"role": "user", "content": asked}] if conversational else f"{asked}\n"
    made = [
        Completion("positive", 0, f"thank you {i}", (1,), "stop", "Be kind.", 3, reward=1.0),
        Completion("chosen", 0, f"glad to help {i}", (1,), reward=2.0),
        Completion("plain", 0, f"it depends {i}", (1,), seed=4, reward=0.5),
        Completion("negative", 0, f"I hate {i}", (1,), "stop", "Be rude.", 2**60, reward=-1.0),
    ]
    return CompletionGroup(f"id-{i}", prompt, (1,), tuple(made))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.parametrize("form", TRAINERS)
@pytest.mark.parametrize(("conversational", "suffix"), [(True, "parquet"), (False, "jsonl")])
def test_a_trainer_takes_a_step(
    model: Path, tmp_path: Path, capsys: Any, form: str, suffix: str, *, conversational: bool
) -> None:
    from neat_align.rounds.group_file import write_groups

    with (tmp_path / "groups.parquet").open("wb") as file:
        write_groups(file, [a_group(i, conversational=conversational) for i in range(4)], ["r"])
    output = tmp_path / f"rows.{suffix}"
    words = ["export", str(tmp_path / "groups.parquet"), "--format", form, "--output", str(output)]
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0
    told = capsys.readouterr().out
    name = TRAINERS[form]
    lines = told[told.index("from datasets import") :]
    settings = (
        f'{name}Config(output_dir="{tmp_path}/trained", max_steps=1, use_cpu=True, bf16=False, '
        'report_to="none", per_device_train_batch_size=4, learning_rate=0.1, disable_tqdm=True, '
        'save_strategy="no", gradient_checkpointing=False)'
    )
    last = f'{name}Trainer(model="MODEL", args=args, train_dataset=data).train()'
    assert lines.strip().endswith(last)
    script = lines.replace(f'{name}Config(output_dir="trained")', settings)
    script = script.replace(last, last.removesuffix(".train()")).replace("MODEL", str(model))
    script = script.replace(f"{name}Trainer(", f"trainer = {name}Trainer(")
    found: dict[str, Any] = {}
    exec(script, found)
    trainer = found["trainer"]
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.isfinite(v).all() for v in after.values())
    # What is beside the columns that it learns from did not reach the model.
    seen = set(next(iter(trainer.get_train_dataloader())))
    assert not seen & {"score", "score_margin", "margin", "origin", "seed", "prompt_id"}
    if form in ("preference", "kto"):
        text = trainer.processing_class.decode(trainer.train_dataset[0]["prompt_ids"])
        assert "What do you say to number 0?" in text
        assert "Be kind." not in text
    if form == "kto":  # its KL is estimated with the row before's answer: another prompt's
        asked = [row["prompt_ids"] for row in trainer.train_dataset]
        assert all(a != b for a, b in pairwise(asked))
        assert len({row["label"] for row in trainer.train_dataset.select(range(4))}) == 2
