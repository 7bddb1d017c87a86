"""Loading runs no code and unpickles nothing.

Safetensors only, no remote code without a pinned commit, safe YAML.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import neat_align
from neat_align.cli.options import parse_options
from neat_align.errors import ConfigError, RewardError
from neat_align.modeling.loading import load_policy, load_tokenizer
from neat_align.rewards.resolve import resolve_rewards
from neat_align.script_arguments import ScriptArguments
from tiny import save_tiny, tiny_model, tiny_tokenizer

SOURCE = Path(neat_align.__file__).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FORBIDDEN = (
    r"yaml\.(?:full_|unsafe_)?load(?:_all)?\(",
    r"weights_only\s*=\s*False",
    r"(?:import|from) pickle\b|\bpickle\.",
    r"trust_remote_code\s*=\s*True",
    r"(?<![\w.])eval\(",
    r"(?<![\w.])exec\(",
    r"\bos\.system\(",
    r"shell\s*=\s*True",
    r"torch\.load\(",
)


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_no_forbidden_call_in_the_source(pattern: str) -> None:
    lines = [
        (p.name, n, line)
        for p in SOURCE.rglob("*.py")
        for n, line in enumerate(p.read_text("utf-8").splitlines(), 1)
    ]
    found = [f"{name}:{n}" for name, n, line in lines if re.search(pattern, line)]
    assert not found


def test_every_model_is_loaded_from_safetensors_only() -> None:
    """GGUF, which the demo converts, has no pickles either."""
    calls = [
        (p.name, call)
        for p in SOURCE.rglob("*.py")
        for call in re.findall(
            r"AutoModel\w*\.from_pretrained\((.*?)\)\n", p.read_text("utf-8"), flags=re.DOTALL
        )
    ]
    assert calls
    for name, call in calls:
        assert "use_safetensors=True" in call or "gguf_file=" in call, (name, call)


def pickled(folder: Path) -> Path:
    """A model folder whose weights are the pickle that older releases wrote."""
    save_tiny(folder, "llama")
    (folder / "model.safetensors").unlink()
    tokenizer = tiny_tokenizer()
    torch.save(
        tiny_model("llama", len(tokenizer), tokenizer=tokenizer).state_dict(),
        folder / "pytorch_model.bin",
    )
    return folder


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"holds pickled weights \(pytorch_model\.bin\).*safetensors only: load it once .* "
        r"save_pretrained",
    ):
        load_policy(str(pickled(tmp_path / "old")))


def test_a_pickled_reward_model_is_refused(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "old")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(settings | {"num_labels": 1, "id2label": {"0": "r"}, "label2id": {"r": 0}})
    )
    with pytest.raises(RewardError, match="safetensors"):
        resolve_rewards([str(folder)], None)


def test_a_pickled_adapter_is_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    model: Any = get_peft_model(
        load_policy(str(base)), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    assert load_policy(str(tmp_path / "adapter")) is not None
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(
        tmp_path / "adapter" / "adapter_model.bin"
    )
    with pytest.raises(
        ConfigError,
        match=r"adapter has no adapter_model\.safetensors.*write it again with save_pretrained",
    ):
        load_policy(str(tmp_path / "adapter"))


def test_a_damaged_or_half_a_model_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "model", "llama")
    weights = folder / "model.safetensors"
    whole = load_file(weights)
    save_file(
        {k: v for k, v in whole.items() if "lm_head" not in k}, weights, metadata={"format": "pt"}
    )
    with pytest.raises(
        ConfigError, match=r"has no weights for lm_head\.weight: they would be random"
    ):
        load_policy(str(folder))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*download the model again"):
        load_policy(str(folder))


def with_code(folder: Path, reference: str = "evil.Evil") -> tuple[Path, Path]:
    """A model folder with Python of its own, and the file that this Python writes when it runs."""
    save_tiny(folder, "llama")
    ran = folder / "ran"
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Evil: pass\n"
    )
    settings = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": reference, "AutoModelForCausalLM": reference}
    (folder / "config.json").write_text(
        json.dumps(settings | {"model_type": "evil", "auto_map": auto})
    )
    return folder, ran


def test_code_beside_a_model_is_not_run_and_nobody_is_asked(tmp_path: Path) -> None:
    folder, ran = with_code(tmp_path / "model")
    with pytest.raises(
        ConfigError,
        match="comes with Python of its own, which is not run unless trust_remote_code is true",
    ):
        load_policy(str(folder))
    with pytest.raises(RewardError, match="trust_remote_code"):
        resolve_rewards([str(folder)], None)
    assert not ran.exists()


def test_code_of_another_repository_is_not_pinned(tmp_path: Path) -> None:
    folder, ran = with_code(tmp_path / "model", "somebody/else--evil.Evil")
    with pytest.raises(
        ConfigError, match="lies in somebody/else, which model_revision does not pin"
    ):
        load_policy(str(folder), trust_remote_code=True)
    assert not ran.exists()


@pytest.mark.parametrize(
    "revision", [None, "main", COMMIT[:7], COMMIT.upper().replace("0", "G"), COMMIT + "0"]
)
def test_trusted_code_from_the_hub_needs_a_full_commit(
    tmp_path: Path, revision: str | None
) -> None:
    message = (
        "trust_remote_code is true for org/model, and model_revision is .* set "
        "model_revision to the full commit"
    )
    with pytest.raises(ConfigError, match=message):
        ScriptArguments(
            model_name_or_path="org/model", trust_remote_code=True, model_revision=revision
        )
    with pytest.raises(ConfigError, match=message):
        load_policy("org/model", revision=revision, trust_remote_code=True)
    if revision is not None:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(
            "seed: 1\ntrust_remote_code: true\nmodel_name_or_path: org/model\nmodel_revision: "
            f"'{revision}'\n"
        )
        with pytest.raises(ConfigError, match=rf"r\.yaml:2: {message}"):
            parse_options(["--output_dir", str(tmp_path)], recipe)


def test_a_pinned_commit_reaches_transformers_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fake(name: str, **options: Any) -> Any:
        asked.append({"name": name, **options})
        raise OSError("offline")

    monkeypatch.setattr(
        transformers.PreTrainedConfig, "get_config_dict", lambda name, **options: ({}, {})
    )
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fake)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fake)
    ScriptArguments(model_name_or_path="org/model", trust_remote_code=True, model_revision=COMMIT)
    with pytest.raises(ConfigError, match="offline"):
        load_policy("org/model", revision=COMMIT, trust_remote_code=True)
    model = tiny_model("llama", 8)
    model.config.name_or_path = "org/model"
    with pytest.raises(ConfigError, match="the tokenizer of org/model cannot be loaded"):
        load_tokenizer(model, revision=COMMIT, trust_remote_code=True)
    assert asked == [{"name": "org/model", "revision": COMMIT, "trust_remote_code": True}] * 2


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder and has no revisions: remove it"):
        ScriptArguments(model_name_or_path=str(tmp_path), model_revision=COMMIT)
