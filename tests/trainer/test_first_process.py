"""Weights that the first process alone has loaded: what the others make in their place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError, OtherProcessError
from neat_align.modeling.load_options import FP32, LoadOptions
from neat_align.modeling.loading import _without_weights, load_policy
from neat_align.trainer.first_process import found_by_first, give_room, start_fingerprint
from small_trainer import TOKENIZER, config
from tiny import Family, tiny_model


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def form(model: Any) -> list[Any]:
    return [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]


def once(folder: Path) -> NEATConfig:
    """A configuration of a run whose first process loads alone: this one."""
    args = config(folder)
    args.loads_once = True  # type: ignore[misc]
    return args


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_others_make_the_same_model_without_its_numbers(
    tmp_path: Path, family: Family, dtype: str
) -> None:
    saved = tiny_model(family, len(TOKENIZER), tokenizer=TOKENIZER).to(torch.bfloat16)
    saved.generation_config = GenerationConfig(eos_token_id=[2, 7], do_sample=True)
    saved.save_pretrained(tmp_path)
    options = LoadOptions(dtype=dtype)
    loaded: Any = load_policy(str(tmp_path), options)
    made: Any = _without_weights(str(tmp_path), options, None, False)
    assert all(weight.is_meta for weight in made.parameters())
    assert form(made) == form(loaded)
    assert made.training == loaded.training
    assert made.generation_config.eos_token_id == [2, 7]
    assert made.config.name_or_path == loaded.config.name_or_path
    assert made.config._attn_implementation == loaded.config._attn_implementation
    buffers = dict(made.named_buffers())
    for name, buffer in loaded.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    assert form(get_peft_model(made, lora)) == form(get_peft_model(loaded, lora))


def test_room_for_weights_takes_none_until_it_is_written_into() -> None:
    """400 MB, with an optimizer over them; each at a place of its own, by which accelerate goes."""
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(5000, 5000) for _ in range(4)))
        model.append(torch.nn.Linear(5000, 5000))
        model[4].weight = model[0].weight  # tied
        model[1].weight.requires_grad_(False)
    model.register_buffer("scale", torch.ones(3))
    before = resident()
    give_room(model)
    torch.optim.AdamW(model.parameters())
    assert resident() - before < 20e6
    weights = list(model.parameters())
    assert len({w.data_ptr() for w in weights}) == len(weights) == 9
    assert model[4].weight is model[0].weight
    assert [w.requires_grad for w in weights[:4]] == [True, True, False, True]
    assert torch.equal(model.get_buffer("scale"), torch.ones(3))


def test_the_first_process_finds_and_says_what_it_found(tmp_path: Path) -> None:
    args = once(tmp_path)
    assert found_by_first(args, lambda: {"way": 3}, "in a test") == {"way": 3}

    def fail() -> None:
        raise ConfigError("the model is no model")

    with pytest.raises(ConfigError, match="the model is no model"):
        found_by_first(args, fail, "in a test")
    args.local_rank = 1
    other = _Second(args)
    with pytest.raises(OtherProcessError, match="another process failed while it looked"):
        found_by_first(other, fail, "while it looked")  # type: ignore[arg-type]


class _Second:
    """The configuration on the second process, which hears nothing from the first."""

    loads_once, process_index = True, 1

    def __init__(self, args: NEATConfig) -> None:
        self.args = args


def test_what_is_saved_and_is_no_weight_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    assert len(start_fingerprint(once(tmp_path), model)) == 64
    model.register_buffer("statistics", torch.ones(3))
    with pytest.raises(ConfigError, match=r"the model saves statistics, which is no weight.*false"):
        start_fingerprint(once(tmp_path), model)


def test_adapters_and_4_bits_are_loaded_by_every_process(tmp_path: Path) -> None:
    base = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ConfigError, match=r"is an adapter, which every process has to merge.*false"
    ):
        load_policy(str(tmp_path / "adapter"), FP32, once=True)
    with pytest.raises(ConfigError, match="load_in_4bit is: the first process cannot give weights"):
        load_policy(str(tmp_path / "base"), LoadOptions(load_in_4bit=True), once=True)
