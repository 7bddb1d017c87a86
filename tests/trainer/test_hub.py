"""A model leaves its run with its card; what is pushed is the model and nothing else of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from hub_server import hub
from neat_align import ConfigError, HubError
from neat_align.config import NEATConfig
from neat_align.network.hub import push_folder
from neat_align.pipeline import build_trainer, run_training
from neat_align.script_arguments import ScriptArguments
from small_trainer import ROWS, config, lora, trainer
from tiny import save_tiny


def write_rows(path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def script(folder: Path, **changes: Any) -> ScriptArguments:
    settings: dict[str, Any] = {
        "model_name_or_path": str(save_tiny(folder / "base", "llama")),
        "dataset_name": write_rows(folder / "mine.jsonl"),
        "reward_funcs": ["small_trainer:count_e"],
        "holdout": 3,
    }
    return ScriptArguments(**{**settings, **changes})


def test_a_run_pushes_its_model_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(monkeypatch) as server:
        asked = config(
            tmp_path / "run", push_to_hub=True, hub_model_id="me/aligned", hub_private_repo=True
        )
        run_training(script(tmp_path), asked)
    assert server.made[0] == {**server.made[0], "name": "aligned", "organization": "me"}
    assert server.made[0].get("visibility") == "private"
    pushed = server.of("me/aligned")
    wanted = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert wanted <= set(pushed)
    assert not [name for name in pushed if "/" in name or name.endswith((".bin", ".parquet"))]
    assert server.messages == ["The finished model"]
    written = {p.name for p in (tmp_path / "run" / "rounds").rglob("*")}
    assert written, "there are rounds that must not go"
    sent = server.received.decode("utf-8", "replace")
    assert str(tmp_path) not in sent + "".join(
        d.decode("utf-8", "replace") for d in pushed.values()
    )
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.to_dict()["library_name"] == "transformers"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"On {result['held_out_prompts']} held-out prompts" in card.text
    assert "# aligned" in card.text
    assert (tmp_path / "run" / "model" / "README.md").read_bytes() == pushed["README.md"]


def test_a_script_pushes_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(monkeypatch) as server:
        t = trainer(tmp_path / "mine", save_strategy="no")
        t.train()
        assert server.requests == []  # not unless it is asked for
        (tmp_path / "mine" / "model" / "rounds").mkdir(parents=True)
        (tmp_path / "mine" / "model" / "rounds" / "x.json").write_text("harm")
        (tmp_path / "mine" / "model" / "notes.json").write_text("harm")
        t.push_to_hub("Mine", tags="mine", dataset_name="org/prompts", license="mit")
    pushed = server.of("somebody/mine")
    assert not [name for name in pushed if "rounds" in name or name == "notes.json"]
    assert b"harm" not in b"".join(pushed.values())
    card = ModelCard(pushed["README.md"].decode())
    assert (card.data.datasets, card.data.license) == (["org/prompts"], "mit")
    assert "mine" in card.data.tags


def test_the_hub_is_asked_before_anything_is_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(monkeypatch) as server:
        server.denies = True
        with pytest.raises(HubError, match=r"does not make the repository me/x .*HF_TOKEN"):
            trainer(tmp_path, push_to_hub=True, hub_model_id="me/x")
    monkeypatch.undo()
    with pytest.raises(HubError, match="me/x"):  # offline
        trainer(tmp_path, push_to_hub=True, hub_model_id="me/x")


def test_an_adapter_on_a_folder_of_this_machine_is_not_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(save_tiny(tmp_path / "base", "llama"))
    with hub(monkeypatch) as server:
        with pytest.raises(ConfigError, match=r"belongs to .*base.*neat-align merge"):
            trainer(tmp_path / "run", model=base, peft_config=lora(), push_to_hub=True)
        t = trainer(tmp_path / "run", model=base, peft_config=lora())
        t.save_model(str(tmp_path / "saved"))
        with pytest.raises(ConfigError, match=r"neat-align merge"):
            push_folder(tmp_path / "saved", "me/x", message="no")
    assert [r for r in server.requests if "commit" in r] == []
    card = ModelCard.load(tmp_path / "saved" / "README.md")  # not PEFT's blank one
    assert (card.data.to_dict()["library_name"], card.data.base_model) == ("peft", None)
    assert str(tmp_path) not in (tmp_path / "saved" / "README.md").read_text()


def test_a_push_that_fails_after_training_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama")
    with hub(monkeypatch) as server:
        server.denies = True
        with pytest.raises(HubError, match=r"Nothing is lost.*neat-align push .* --repo me/x"):
            push_folder(tmp_path / "model", "me/x", message="no")
    with pytest.raises(ConfigError, match="holds no model"):
        push_folder(tmp_path, "me/x", message="no")


class SeesPushes(TrainerCallback):
    """A logger that uploads what it has when a model is pushed, as trackio's does."""

    def __init__(self) -> None:
        self.pushes = 0

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pushes += 1


def test_a_push_does_not_publish_what_trackio_logged_of_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sees = SeesPushes()
    with hub(monkeypatch) as server:
        t = trainer(tmp_path / "mine", callbacks=[sees])
        t.push_to_hub(finetuned_from="an-org/base")
        assert sees.pushes == 1
        t.args.report_to, t.args.log_completions = ["trackio"], True
        t.push_to_hub(finetuned_from="an-org/unknown")
        assert sees.pushes == 1
        assert "trackio's log is not uploaded with the model" in caplog.text
        unlicensed = ModelCard(server.of("somebody/mine")["README.md"].decode())
        t.args.trackio_static_space_id = "me/space"
        t.push_to_hub(finetuned_from="an-org/base")
        assert sees.pushes == 2
    card = ModelCard(server.of("somebody/mine")["README.md"].decode())
    assert (card.data.license, unlicensed.data.license) == ("mpl-2.0", None)


def test_only_train_pushes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="push_to_hub is read by `neat-align train` only"):
        build_trainer(script(tmp_path), config(tmp_path / "run", push_to_hub=True), trains=False)
    with pytest.raises(ConfigError, match="hub_model_id is read only with push_to_hub"):
        build_trainer(script(tmp_path), config(tmp_path / "run", hub_model_id="me/x"))
    with pytest.raises(ConfigError, match="hub_strategy asks for checkpoints on the hub"):
        NEATConfig(output_dir="x", push_to_hub=True, hub_strategy="every_save")


def test_a_checkpoint_has_the_card_and_an_interrupted_run_can_be_carded(tmp_path: Path) -> None:
    t = trainer(tmp_path / "run", peft_config=lora())
    t.train()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    text = (checkpoint / "README.md").read_text()
    assert "There is no comparison of before and after" in text
    assert "count_e" in text  # the reward
    shutil.rmtree(tmp_path / "run" / "rounds")
    t.create_model_card(model_name="Named", finetuned_from="an-org/base")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "# Named" in card.text
    assert card.data.base_model == "an-org/base"
