"""An adapter merged into a folder: what plain transformers loads says what the adapter said."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import IDS, TASK, base_folder, logprobs, trained
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from neat_align import ConfigError
from neat_align.cli import main
from neat_align.modeling import merged_folder
from neat_align.modeling.merged_folder import write_merged
from tiny import CHATML
from vllm_server import RealVllm, save_servable


def saved_adapter(folder: Path, config: Any, *, tied: bool = False) -> tuple[Path, torch.Tensor]:
    """An adapter's folder as a run leaves it, and what the model says."""
    base = base_folder(folder, tied=tied)
    GenerationConfig(temperature=0.7, do_sample=True, max_new_tokens=9).save_pretrained(base)
    model = trained(base, config)
    expected = logprobs(model)
    model.save_pretrained(folder / "run" / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "run" / "model")
    (folder / "run" / "run.json").write_text(json.dumps({"rewards": ["tone"], "config": {}}))
    return folder / "run" / "model", expected


def plainly_loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("target", "parts"),
    [("all-linear", False), (["q_proj", "lm_head"], True), (["q_proj", "embed_tokens"], True)],
    ids=["linear", "head", "embeddings"],
)
def test_plain_transformers_loads_what_the_adapter_said(
    tmp_path: Path, target: Any, parts: bool, tied: bool
) -> None:
    adapter, expected = saved_adapter(
        tmp_path, peft.LoraConfig(**TASK, target_modules=target), tied=tied
    )
    done = write_merged(adapter, tmp_path / "merged")
    model = plainly_loaded(tmp_path / "merged")
    assert not isinstance(model, peft.PeftModel)
    torch.testing.assert_close(logprobs(model), expected, rtol=0, atol=1e-4)
    assert done.is_worst
    assert done.difference < 1e-4
    assert done.parted == (tied and parts)
    assert model.config.tie_word_embeddings == (tied and not parts)
    assert done.dtype == "float32"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == CHATML
    assert model.generation_config.temperature == 0.7
    assert not [p for p in (tmp_path / "merged").iterdir() if "adapter" in p.name]


def test_it_is_saved_in_the_bases_type_unless_another_is_asked_for(tmp_path: Path) -> None:
    adapter, expected = saved_adapter(
        tmp_path, peft.LoraConfig(**TASK, target_modules="all-linear")
    )
    base = tmp_path / "base"
    plainly_loaded(base).to(torch.bfloat16).save_pretrained(base)
    half = write_merged(adapter, tmp_path / "half")
    assert (half.dtype, half.is_worst) == ("bfloat16", False)
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(k).dtype for k in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert float((logprobs(plainly_loaded(tmp_path / "half")) - expected).abs().mean()) < 0.1
    assert write_merged(adapter, tmp_path / "whole", dtype="float32").dtype == "float32"


def test_the_command_says_what_it_proved_and_writes_a_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_adapter(tmp_path, peft.LoraConfig(**TASK, target_modules="all-linear"))
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "merged LORA into" in shown
    assert "read back, it says what the adapter said" in shown
    assert max(map(len, shown.replace(str(tmp_path), "").splitlines())) <= 80
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "merged into the base" in card
    for path in (tmp_path / "merged").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["merge", *arguments])
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_merged_is_told_what_to_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    virtual = peft.PromptTuningConfig(**TASK, num_virtual_tokens=4)
    adapter, _ = saved_adapter(tmp_path, virtual)
    out = tmp_path / "merged"
    said = refused(capsys, str(adapter), "--output", str(out))
    assert "adds virtual tokens" in said
    assert "use it as it is, with peft's AutoPeftModelForCausalLM" in said
    biased = peft.LoraConfig(**TASK, target_modules=["q_proj"], lora_bias=True)
    other, _ = saved_adapter(tmp_path / "other", biased)
    assert "cannot be merged into" in refused(capsys, str(other), "--output", str(out))
    assert "no adapter" in refused(capsys, str(tmp_path / "base"), "--output", str(out))
    assert "it must be one of" in refused(
        capsys, str(adapter), "--output", str(out), "--dtype", "int8"
    )
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text("{}")
    assert "has no model/ yet" in refused(
        capsys, str(tmp_path / "unfinished"), "--output", str(out)
    )
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("mine")
    assert "not an empty folder" in refused(capsys, str(adapter), "--output", str(out))


def test_a_merged_model_that_says_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = saved_adapter(tmp_path, peft.LoraConfig(**TASK, target_modules="all-linear"))

    def without_a_layer(path: Path, trust_remote_code: bool) -> Any:
        """Something goes wrong on the way to the disk."""
        (file,) = tmp_path.glob(".merged-new/model.safetensors")
        weights = load_file(file)
        weights["model.layers.0.mlp.up_proj.weight"] *= 0.5
        save_file(weights, file, metadata={"format": "pt"})
        return AutoTokenizer.from_pretrained(path)

    monkeypatch.setattr(merged_folder, "_tokenizer", without_a_layer)
    with pytest.raises(ConfigError, match=r"says something else than the adapter .*was written"):
        write_merged(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert IDS.numel()


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_real_server_serves_the_merged_model(tmp_path: Path) -> None:
    save_servable(tmp_path / "base")
    linear = peft.LoraConfig(**TASK, target_modules="all-linear")
    model = trained(tmp_path / "base", linear)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    write_merged(tmp_path / "adapter", tmp_path / "merged")
    prompt = IDS[0].tolist()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits[0, -1].log_softmax(-1)
    with RealVllm(tmp_path / "merged", tmp_path / "log", ("--dtype", "float32")) as server:
        asked = {"model": str(tmp_path / "merged"), "prompt": prompt, "max_tokens": 1}
        asked |= {"temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True}
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            said = json.load(answer)["choices"][0]["logprobs"]
    assert said["tokens"] == [f"token_id:{int(expected.argmax())}"]
    assert said["token_logprobs"][0] == pytest.approx(float(expected.max()), abs=1e-3)
