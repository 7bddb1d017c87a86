"""A model's folder on the Hugging Face hub: what of it goes, and only where that was asked for.

Files go by name, from a list of what a model is made of: whatever else lies in the folder (rounds,
whose negatives are harmful text; pickled arguments, which hold paths of the machine) stays here.
"""

from __future__ import annotations

import json
import logging
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from neat_align.errors import ConfigError, HubError, one_line
from neat_align.files.secrets import scrubbed

logger = logging.getLogger(__name__)
# What `save_pretrained` writes of models, adapters and tokenizers, and what lies beside them.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("adapter_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template*"),
    *("processor_config.json", "preprocessor_config.json"),
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py"),
    *("README.md", "LICENSE*", "NOTICE*"),
)
# What the hub's client has been seen to raise: no token, no network, no such owner, a wrong name.
HUB_ERRORS = (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError)


def model_files(folder: Path) -> list[str]:
    """The names of a folder's files that make a model. Raises ConfigError where there is none."""
    names = sorted(p.name for p in folder.glob("*") if p.is_file()) if folder.is_dir() else []
    chosen = [name for name in names if any(fnmatchcase(name, form) for form in MODEL_FILES)]
    if not any(name.endswith(".safetensors") for name in chosen):
        raise ConfigError(
            f"{folder} holds no model (no .safetensors file): give the output_dir of a finished "
            "run, or the folder of a model"
        )
    left = sorted({*names} - {*chosen})
    if left:
        logger.info("not pushed, being no part of the model: %s", ", ".join(left))
    return chosen


def check_base_is_known(folder: Path) -> None:
    """Refuse to push an adapter whose base is a folder of this machine. Raises ConfigError."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = str(json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    check_base(base)


def check_base(base: str) -> None:
    """Raise ConfigError where an adapter's base is nothing that anybody else could load."""
    if not base or Path(base).exists() or base.count("/") != 1:
        raise ConfigError(
            f"the adapter belongs to {base or 'a model without a name'}, which is no name on the "
            "hub: nobody else could load it, and the path would be published. Merge it (neat-align "
            "merge RUN --output DIR) and push DIR, or train from the base's hub name"
        )


def make_repository(
    name: str, *, token: str | None, private: bool | None, repo_type: str = "model"
) -> str:
    """Make a repository, or find that it is there; its full name, owner included.

    Raises HubError.
    """
    try:
        made = HfApi(library_name="neat-align").create_repo(
            name, token=token, private=private, repo_type=repo_type, exist_ok=True
        )
    except HUB_ERRORS as error:
        raise HubError(
            f"the hub does not make the repository {name} ({_said(error)}): log in (hf auth login, "
            "or HF_TOKEN with a token that may write), check the name (OWNER/NAME), or push later"
        ) from error
    return str(made.repo_id)


def license_on_hub(model: str, token: str | None) -> str | None:
    """The license that a model's own card names on the hub; None where it names or answers none."""
    try:
        card = HfApi(library_name="neat-align").model_info(model, token=token).card_data
    except HUB_ERRORS as error:
        logger.info("the license of %s is not known (%s)", model, _said(error))
        return None
    return card.license if card is not None and isinstance(card.license, str) else None


def push_folder(
    folder: Path,
    repository: str,
    *,
    message: str,
    token: str | None = None,
    revision: str | None = None,
    blocking: bool = True,
    files: list[str] | None = None,
    repo_type: str = "model",
) -> Any:
    """Upload a folder's files, by name (None: those that make a model).

    Gives the commit, or where it is not `blocking` a future of it. Raises HubError, ConfigError.
    """
    if files is None:
        files = model_files(folder)
        check_base_is_known(folder)
    upload: Any = HfApi(library_name="neat-align").upload_folder
    try:
        return upload(
            repo_id=repository,
            repo_type=repo_type,
            folder_path=folder,
            allow_patterns=[_literal(name) for name in files],
            commit_message=message,
            token=token,
            revision=revision,
            run_as_future=not blocking,
        )
    except HUB_ERRORS as error:
        raise HubError(
            f"{folder} was not pushed to {repository} ({_said(error)}). Nothing is lost: when the "
            f"hub can be reached, run: neat-align push {folder} --repo {repository}"
        ) from error


def _literal(name: str) -> str:
    """A file's name as a pattern that means itself alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _said(error: BaseException) -> str:
    return scrubbed(one_line(error, 300)) or type(error).__name__
