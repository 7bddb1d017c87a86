"""The URL of a reward server: what it may be, and the name of the token that `http` sends it."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import httpx2

from neat_align.errors import RewardError
from neat_align.rewards.addresses import allows_plain_http, refusal

TOKEN_VARIABLE = "NEAT_ALIGN_REWARD_TOKEN"  # noqa: S105 - the variable's name


@dataclass(frozen=True)
class Target:
    """Where rows are sent: a checked URL, in parts.

    `allowed` says that the URL is http and that `allow_http_hosts` names its host.
    """

    encrypted: bool
    host: str
    port: int
    path: str
    allowed: bool = False

    @property
    def url(self) -> httpx2.URL:
        """Built from the checked parts, so that no second parser reads the URL in its own way."""
        scheme = "https" if self.encrypted else "http"
        return httpx2.URL(scheme=scheme, host=self.host, port=self.port, path=self.path)

    @property
    def name(self) -> str:
        """Host, port and path as one word, for metrics and messages."""
        is_standard = self.port == (443 if self.encrypted else 80)
        port = "" if is_standard else f":{self.port}"
        return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{self.host}{port}{self.path}").strip("_")

    @property
    def token_variable(self) -> str | None:
        """The environment variable that this host's token is in; its own before the general one.

        None when neither is set.
        """
        own = f"{TOKEN_VARIABLE}_{re.sub(r'[^A-Z0-9]', '_', self.host.upper())}"
        return next((v for v in (own, TOKEN_VARIABLE) if os.environ.get(v, "").strip()), None)


def parse_url(url: str, allow_http_hosts: Sequence[str] = ()) -> Target:
    """A reward's URL in parts.

    Raises RewardError, which repeats nothing of the URL that could be a secret.
    """
    parts = _split(url)
    host = parts.hostname or ""
    shown = f"the reward URL {parts.scheme}://{host}"
    if parts.scheme not in ("http", "https"):
        raise RewardError(
            "a reward's URL begins with https:// (or http:// on this machine), not with "
            f"{parts.scheme}://"
        )
    if "@" in parts.netloc:
        raise RewardError(
            f"{shown} holds a user name or password: leave it out, and put a token into "
            f"{TOKEN_VARIABLE}"
        )
    if "?" in url or "#" in url:
        raise RewardError(
            f"{shown} has a query or fragment, which could hold a secret: leave it out"
        )
    if not host:
        raise RewardError("a reward's URL needs a host: https://host/path")
    encrypted = parts.scheme == "https"
    try:
        port = parts.port or (443 if encrypted else 80)
    except ValueError:
        raise RewardError(f"{shown} has a port that is no number below 65536") from None
    allowed = not encrypted and allows_plain_http(host, allow_http_hosts)
    _check_host(host, encrypted=encrypted, allowed=allowed)
    return Target(encrypted, host, port, parts.path or "/", allowed)


def _split(url: str) -> SplitResult:
    if not re.fullmatch(r"[\x21-\x7e]+", url) or "\\" in url:
        raise RewardError(
            "a reward's URL has printable ASCII characters only, no spaces and no backslash "
            "(write other names as xn--...)"
        )
    try:
        return urlsplit(url)
    except ValueError:
        raise RewardError(
            "a reward's URL cannot be read: it must look like https://host/path"
        ) from None


def _check_host(host: str, *, encrypted: bool, allowed: bool) -> None:
    """What can be said before the name is looked up; its addresses are checked when it is."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if encrypted or allowed or host == "localhost":
            return
        raise RewardError(
            f"the reward URL http://{host} is not encrypted and names another machine (or may): "
            "use https; http is for localhost, 127.0.0.1 and [::1], and for hosts inside your own "
            f"cluster that allow_http_hosts names (allow_http_hosts: [{host}])"
        ) from None
    reason = refusal(host, encrypted=encrypted, allowed=allowed)
    if reason is not None:
        raise RewardError(f"the reward server {host} is {reason}")
