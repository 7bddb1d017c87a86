"""An exported data set on the hub: only when it is asked for, private unless it is asked for."""

from __future__ import annotations

from pathlib import Path

from neat_align.errors import ConfigError, one_line
from neat_align.reporting.data_card import HUB_NAME


def check_push(repo: str) -> None:
    """Refuse what cannot be sent, before anything is written."""
    from huggingface_hub import constants

    if HUB_NAME.fullmatch(repo) is None:
        raise ConfigError(f"push_to_hub is {repo!r}; it must be a hub name, such as me/my-pairs")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "push_to_hub is given and HF_HUB_OFFLINE is set, which lets nothing out: unset it, or "
            "leave push_to_hub out"
        )


def push(repo: str, file: Path, texts: dict[str, str], *, public: bool) -> str:
    """Send the file, and the texts that go beside it by name, in one commit; gives the address.

    A data set that is not there yet is made, private unless `public`; one that is keeps what it is.
    Raises ConfigError where the hub refuses: the file on the disk stays.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        made = api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True)
        beside = [CommitOperationAdd(n, t.encode("utf-8")) for n, t in texts.items()]
        api.create_commit(
            made.repo_id,
            operations=[CommitOperationAdd(file.name, file), *beside],
            commit_message=f"Add {file.name}",
            repo_type="dataset",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise ConfigError(
            f"{file} is written and was not sent to {repo} ({one_line(error, 300)}): log in with "
            "`hf auth login` as somebody who may write there"
        ) from error
    return str(made)
