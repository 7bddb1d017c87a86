"""Keeping secrets out of what is written and shown: run.json, results, pages, error messages.

Secrets come from the environment only, so two things have to be masked: what stands under a
secret's name or inside a URL, and any copy of a secret of this process's environment (a library's
error message may quote the header that it sent).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "[redacted]"
# What the name of a secret ends in.
_WORDS = (
    r"(?:token|secret|password|passwd|passphrase|authorization|credentials?"
    r"|(?:api|access|secret|private|auth)[_-]?keys?)"
)
# Only at the end: `include_num_input_tokens_seen` holds such a word too, and is a setting.
_SECRET = re.compile(_WORDS + r"$", re.IGNORECASE)
# The environment has more names than a configuration: NEAT_ALIGN_REWARD_TOKEN_HOST names a secret
# in its middle.
_SECRET_VARIABLE = re.compile(_WORDS + r"(?:$|_)|_KEY$", re.IGNORECASE)
# "//user:password@": up to the last "@" before the path, as URL parsers read it.
_USERINFO = re.compile(r"(?<=://)[^\s/?#'\"<>]*@")
_QUERY = re.compile(
    r"(?<=[?&])([\w.-]*(?:" + _WORDS + r"|key|sig|signature))=[^\s&#'\"<>]+", re.IGNORECASE
)
# Shorter values ("1", "true", "none") are settings, and words of their own in any text.
_SHORTEST = 8


def redacted(value: Any) -> Any:
    """A copy of plain data without secrets.

    Masked are texts under a key that ends like a secret's name, and secrets inside of other texts.
    """
    if isinstance(value, Mapping):
        return {k: _masked(v) if _SECRET.search(str(k)) else redacted(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(v) for v in value]
    return scrubbed(value) if isinstance(value, str) else value


def scrubbed(text: str) -> str:
    """The text without secrets.

    Masked are names and passwords in URLs, secret query parameters, and secrets of this process's
    environment.
    """
    for secret in _environment_secrets():
        text = text.replace(secret, MASK)
    return _QUERY.sub(rf"\1={MASK}", _USERINFO.sub(f"{MASK}@", text))


def _environment_secrets() -> list[str]:
    """Longest first, so that a secret that holds another one is masked whole.

    A path ("/run/secrets/token") is no secret.
    """
    values = {v.strip() for k, v in os.environ.items() if _SECRET_VARIABLE.search(k)}
    secrets = [v for v in values if len(v) >= _SHORTEST and not v.startswith("/")]
    return sorted(secrets, key=len, reverse=True)


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _masked(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(v) for v in value]
    return MASK if isinstance(value, str) and value else value


def names_secret(name: str, *, of_environment: bool = False) -> bool:
    """Whether what stands under this name is masked: a key of a configuration, or a variable of
    the environment.
    """
    return (_SECRET_VARIABLE if of_environment else _SECRET).search(name) is not None
