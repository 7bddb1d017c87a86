"""Number type, attention and 4 bits: what is loaded, trained, refused, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import small_trainer
from neat_align import NEATConfig, NEATTrainer
from neat_align.cli.evaluate import evaluate_held_out
from neat_align.cli.expand import write_expansion
from neat_align.cli.options import options_from
from neat_align.errors import ConfigError
from neat_align.modeling.load_options import LoadOptions, held_as, read_load_options
from neat_align.modeling.loading import load_policy
from neat_align.pipeline import build_trainer, run_training
from small_trainer import ROWS, TOKENIZER, config, count_e, logged, lora
from tiny import FAMILIES, save_tiny, tiny_model

BF16 = LoadOptions(dtype="bfloat16")


def folder_with(path: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> str:
    """A tiny model's folder, its weights saved in `dtype`."""
    save_tiny(path, family)  # type: ignore[arg-type]
    if dtype != torch.float32:
        load_policy(str(path)).to(dtype).save_pretrained(path)  # type: ignore[operator]
    return str(path)


def types_of(model: torch.nn.Module, *, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad == trained}


def settings(folder: Path, model: str, **more: Any) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model_name_or_path": model,
        "dataset_name": str(rows),
        "holdout": 2,
        "reward_funcs": ["vader"],
        "output_dir": str(folder / "run"),
        "prompts_per_round": 4,
        "num_train_epochs": 1,
        "max_prompt_length": 64,
        "max_completion_length": 6,
        "drift_prompts": 0,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **more,
    }


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
def test_weights_have_the_type_that_is_asked_for(
    tmp_path: Path, asked: str, saved: torch.dtype
) -> None:
    folder = folder_with(tmp_path / "m", dtype=saved)
    model = load_policy(folder, LoadOptions(dtype=asked))
    assert {p.dtype for p in model.parameters()} == {
        saved if asked == "auto" else getattr(torch, asked)
    }


def test_the_attention_that_is_asked_for_is_the_models(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m")
    for name in ("eager", "sdpa"):
        assert held_as(load_policy(folder, LoadOptions(attn_implementation=name))) == {
            "weights": ["float32"],
            "attention": name,
        }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "bf16"}, r"dtype is 'bf16'; it must be one of auto, float32, bfloat16"),
        (
            {"attn_implementation": "fast"},
            r"attn_implementation is 'fast'; it must be one of eager",
        ),
        # A kernel of the hub is code that nobody has read.
        ({"attn_implementation": "kernels-community/flash-attn"}, r"it must be one of eager"),
        ({"attn_implementation": "neat_shared_prefix"}, r"it must be one of eager"),
        ({"load_in_4bit": True}, r"load_in_4bit is true and use_peft is false: weights of 4 bits"),
        ({"dtype": "bfloat16"}, r"dtype is bfloat16 and the weights are trained.*use_peft: true"),
        ({"dtype": "float16"}, r"dtype is float16 and the weights are trained"),
    ],
)
def test_what_cannot_be_held_so_is_refused_with_advice(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    options = settings(tmp_path, folder_with(tmp_path / "m"), **given)
    with pytest.raises(ConfigError, match=message):
        run_training(*options_from(options))
    assert not (tmp_path / "run" / "rounds").exists()


def test_4_bits_need_a_package_and_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = settings(
        tmp_path, folder_with(tmp_path / "m"), load_in_4bit=True, use_peft=True, dtype="bfloat16"
    )
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed.*dtype: bfloat16"):
        run_training(*options_from(options))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=r"sees no CUDA device.*run on a GPU"):
        LoadOptions(load_in_4bit=True).quantization()


def test_an_attention_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m")
    with pytest.raises(
        ConfigError, match=r"attn_implementation is flash_attention_2, which cannot be used"
    ):
        load_policy(folder, LoadOptions(attn_implementation="flash_attention_2"))


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "bf16"), [("bfloat16", True), ("float16", False), ("auto", True)]
)
def test_under_an_adapter_the_base_is_half_and_the_adapter_learns_in_fp32(
    tmp_path: Path, asked: str, bf16: bool
) -> None:
    folder = folder_with(tmp_path / "m", dtype=torch.bfloat16)
    script, args = options_from(settings(tmp_path, folder, dtype=asked, use_peft=True, bf16=bf16))
    trainer = build_trainer(script, args)
    half = torch.float16 if asked == "float16" else torch.bfloat16
    assert types_of(trainer.policy, trained=False) == {half}
    assert types_of(trainer.policy, trained=True) == {torch.float32}
    before = small_trainer.weights(trainer)
    with trainer.writing():
        trainer.train()
    after = small_trainer.weights(trainer)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert types_of(trainer.policy, trained=True) == {torch.float32}
    said = json.loads((tmp_path / "run" / "run.json").read_text())["model"]
    assert said == {
        "weights": sorted([str(half)[6:], "float32"]),
        "attention": "sdpa",
        "name": str(folder),
        "adapter": "LORA",
    }


def test_auto_is_fp32_where_all_weights_learn(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", dtype=torch.bfloat16)
    trainer = build_trainer(*options_from(settings(tmp_path, folder, dtype="auto")))
    assert types_of(trainer.policy, trained=True) == {torch.float32}


@pytest.mark.slow
def test_a_run_does_not_go_on_with_weights_of_another_type_or_another_attention(
    tmp_path: Path,
) -> None:
    folder = folder_with(tmp_path / "m", dtype=torch.bfloat16)
    base = {"use_peft": True, "dtype": "bfloat16", "attn_implementation": "sdpa"}
    run_training(*options_from(settings(tmp_path, folder, **base)))
    for changed, said in (
        ({"dtype": "float32"}, r"weights was \['bfloat16', 'float32'\] and is \['float32'\]"),
        ({"attn_implementation": "eager"}, r"attention was 'sdpa' and is 'eager'"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_training(
                *options_from(settings(tmp_path, folder, **{**base, **changed}, resume=True))
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager"])  # sdpa is what all other tests have
def test_prompts_are_shared_whatever_the_models_own_attention_is(
    tmp_path: Path, family: str, attention: str
) -> None:
    """Packed rows bring their own: layout and numbers are the same."""
    folder = folder_with(tmp_path / "m", family)
    args = config(tmp_path / "run", model_init_kwargs={"attn_implementation": attention})
    trainer = NEATTrainer(folder, count_e, args, ROWS)
    assert held_as(trainer.policy)["attention"] == attention
    assert trainer.parts.policies.layout == "packed"
    trainer.train()
    assert held_as(trainer.policy)["attention"] == attention
    assert all(line["loss"] > 0 for line in logged(tmp_path / "run") if "loss" in line)


# ---- a model given by name -----------------------------------------------------------------------


def test_a_trainer_loads_a_named_model_as_model_init_kwargs_say(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m")
    args = config(
        tmp_path / "run", model_init_kwargs='{"dtype": "bfloat16", "attn_implementation": "eager"}'
    )
    trainer = NEATTrainer(folder, count_e, args, ROWS, peft_config=lora())
    assert types_of(trainer.policy, trained=False) == {torch.bfloat16}
    assert types_of(trainer.policy, trained=True) == {torch.float32}
    named = config(tmp_path / "ref", model_init_kwargs={"dtype": torch.bfloat16}, kl_weight=1.0)
    trainer = NEATTrainer(folder, count_e, named, ROWS, peft_config=lora(), ref_model=folder)
    with trainer.parts.setup.reference() as start:
        assert {p.dtype for p in start.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device_map": "auto"}, r"model_init_kwargs has 'device_map'; it may have dtype, "),
        ({"quantization_config": None}, r"load_in_4bit: true is bitsandbytes' NF4"),
        ({"dtype": "half"}, r"model_init_kwargs: dtype is 'half'; it must be one of"),
        ({"load_in_4bit": "yes"}, r"load_in_4bit: 'yes'; it must be true or false"),
        ({"revision": 3}, r"revision: 3; it must be text"),
        ({"dtype": "bfloat16"}, r"dtype is bfloat16 and the weights are trained"),
    ],
)
def test_other_model_init_kwargs_are_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    folder = folder_with(tmp_path / "m")
    with pytest.raises(ConfigError, match=message):
        NEATTrainer(folder, count_e, config(tmp_path / "run", model_init_kwargs=given), ROWS)


def test_model_init_kwargs_of_a_loaded_model_are_refused(tmp_path: Path) -> None:
    args = config(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"the model was passed as an object"):
        NEATTrainer(tiny_model("llama", len(TOKENIZER)), count_e, args, ROWS)


def test_a_revision_and_code_of_a_named_model_are_pinned() -> None:
    named = read_load_options({"revision": "abc", "trust_remote_code": True, "dtype": "auto"})
    assert (named.revision, named.trust_remote_code) == ("abc", True)
    assert named.options == LoadOptions(dtype="auto")
    args = NEATConfig(output_dir="x", model_init_kwargs={"trust_remote_code": True})
    with pytest.raises(ConfigError, match=r"set model_revision to the full commit"):
        NEATTrainer("org/model", count_e, args, ROWS)


# ---- without training ----------------------------------------------------------------------------


def test_what_is_only_sampled_from_may_be_half_and_cannot_be_trained(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m")
    script, args = options_from(settings(tmp_path, folder, dtype="bfloat16"))
    evaluate_held_out(script, args)
    assert (tmp_path / "run" / "evaluation.json").is_file()
    trainer = build_trainer(script, args, trains=False)
    assert types_of(trainer.policy, trained=False) == {torch.bfloat16}
    assert not types_of(trainer.policy, trained=True)
    with trainer.parts.setup.reference() as start:
        assert start is trainer.policy  # frozen, it is its own start
    with pytest.raises(ConfigError, match="no weight of the model is trainable"):
        trainer.train()
    assert not (tmp_path / "run" / "run-key.json").exists()
    (tmp_path / "more").mkdir()
    script, args = options_from(settings(tmp_path / "more", folder, dtype="bfloat16", holdout=0))
    write_expansion(script, args, tmp_path / "out.jsonl", "ranked")
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 4


def test_an_adapters_folder_is_merged_into_a_base_in_bf16(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m")
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    get_peft_model(load_policy(folder), adapter).save_pretrained(tmp_path / "adapter")
    exact, half = (load_policy(str(tmp_path / "adapter"), o) for o in (LoadOptions(), BF16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        apart = (exact(ids).logits.log_softmax(-1) - half(ids).logits.float().log_softmax(-1)).abs()
    assert apart.mean() < 0.1


# ---- an attention that knows half precision only -------------------------------------------------


@pytest.fixture
def no_fp32_attention(monkeypatch: pytest.MonkeyPatch) -> str:
    """Stands in for FlashAttention's kernels, which are for GPUs: it refuses fp32 as they do."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **others: Any,
    ) -> Any:
        if torch.is_autocast_enabled("cpu"):  # as transformers' function in front of the kernel
            query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
        if query.dtype == torch.float32:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        rows, _, queries, _ = query.shape
        keys = key.shape[2]
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        mask = seen.expand(rows, 1, queries, keys)
        if attention_mask is not None:  # which rows are padded where, as the kernels take it
            mask = mask & attention_mask[:, None, None, -keys:].bool()
        mask = mask | ~mask.any(-1, keepdim=True)
        return sdpa_attention_forward(module, query, key, value, mask, **others)

    name = "flash_attention_2"
    monkeypatch.setitem(AttentionInterface._global_mapping, name, attend)
    return name


@pytest.mark.parametrize("sharing", ["auto", "off"])
def test_fp32_weights_under_flash_attention_compute_in_bf16_also_in_the_checks(
    tmp_path: Path, no_fp32_attention: str, sharing: str
) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    model.config._attn_implementation = no_fp32_attention
    t = small_trainer.trainer(tmp_path / "run", model=model, bf16=True, prefix_sharing=sharing)
    assert t.parts.policies.layout == ("packed" if sharing == "auto" else "padded")
    t.train()
    assert held_as(t.policy) == {"weights": ["float32"], "attention": no_fp32_attention}


def test_flash_attention_without_autocast_is_refused(
    tmp_path: Path, no_fp32_attention: str
) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    model.config._attn_implementation = no_fp32_attention
    with pytest.raises(ConfigError, match=r"know bf16 and fp16 only, and bf16 and fp16 are false"):
        small_trainer.trainer(tmp_path, model=model)
