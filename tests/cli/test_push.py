"""`neat-align push`: a model's files, its card, and nothing else of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub_server import hub
from neat_align.cli import main
from neat_align.reporting.model_card import write_model_card
from run_files import build_run
from tiny import save_tiny


def pushed(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["push", *arguments])
    return int(str(ended.value.code))


def test_a_finished_run_is_pushed_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(tmp_path / "run")
    save_tiny(run / "model", "llama")
    write_model_card(run / "model", run)
    (run / "model" / "training_args.bin").write_bytes(b"a pickle with paths")
    (run / "model" / "[x].json").write_text("{}")
    with hub(monkeypatch) as server:
        assert pushed(str(run), "--repo", "me/mine") == 0
        assert server.made[0].get("visibility") == "private"
        assert pushed(str(run / "model"), "--repo", "me/open", "--public") == 0
        assert server.made[1].get("visibility") != "private"
    assert set(server.of("me/mine")) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert b"hub_token" not in server.received
    assert "pushing 7 files" in capsys.readouterr().out
    (run / "model").rename(tmp_path / "moved")
    assert pushed(str(run), "--repo", "me/mine") == 2
    assert "has no model/ yet" in capsys.readouterr().err
    monkeypatch.undo()  # offline again
    assert pushed(str(tmp_path / "moved"), "--repo", "me/mine") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the hub does not make the repository me/mine" in said
