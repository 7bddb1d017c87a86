"""The URL of a server: what it may be, and the name of the token that it is sent."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import httpx2

from neat_align.errors import NEATError
from neat_align.network.addresses import allows_plain_http, refusal


@dataclass(frozen=True)
class ServerKind:
    """What a server is for, as its messages say it.

    Attributes:
        name: as in "the reward server".
        url: as in "a reward's URL".
        token_variable: the environment variable of its token, whose name may end in _<HOST>.
        error: raised for what will not pass.
        unavailable: raised when a server stayed down through all tries.
    """

    name: str
    url: str
    token_variable: str
    error: type[NEATError]
    unavailable: type[NEATError]


@dataclass(frozen=True)
class Target:
    """A server that may be asked: a checked URL, in parts.

    `allowed` says that the URL is http and that `allow_http_hosts` names its host.
    """

    kind: ServerKind
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
    def said(self) -> str:
        """What a message calls it: "the reward server 127.0.0.1_8000_score"."""
        return f"the {self.kind.name} {self.name}"

    @property
    def token_variable(self) -> str | None:
        """The environment variable that this host's token is in; its own before the general one.

        None when neither is set.
        """
        general = self.kind.token_variable
        own = f"{general}_{re.sub(r'[^A-Z0-9]', '_', self.host.upper())}"
        return next((v for v in (own, general) if os.environ.get(v, "").strip()), None)


def parse_url(url: str, kind: ServerKind, allow_http_hosts: Sequence[str] = ()) -> Target:
    """A server's URL in parts.

    Raises `kind.error`, which repeats nothing of the URL that could be a secret.
    """
    parts = _split(url, kind)
    host = parts.hostname or ""
    shown = f"{kind.url} {parts.scheme}://{host}"
    if parts.scheme not in ("http", "https"):
        raise kind.error(
            f"{kind.url} begins with https:// (or http:// on this machine), not with "
            f"{parts.scheme}://"
        )
    if "@" in parts.netloc:
        raise kind.error(
            f"{shown} holds a user name or password: leave it out, and put a token into "
            f"{kind.token_variable}"
        )
    if "?" in url or "#" in url:
        raise kind.error(
            f"{shown} has a query or fragment, which could hold a secret: leave it out"
        )
    if not host:
        raise kind.error(f"{kind.url} needs a host: https://host/path")
    encrypted = parts.scheme == "https"
    try:
        port = parts.port or (443 if encrypted else 80)
    except ValueError:
        raise kind.error(f"{shown} has a port that is no number below 65536") from None
    allowed = not encrypted and allows_plain_http(host, allow_http_hosts)
    _check_host(host, kind, encrypted=encrypted, allowed=allowed)
    return Target(kind, encrypted, host, port, parts.path or "/", allowed)


def _split(url: str, kind: ServerKind) -> SplitResult:
    if not re.fullmatch(r"[\x21-\x7e]+", url) or "\\" in url:
        raise kind.error(
            f"{kind.url} has printable ASCII characters only, no spaces and no backslash "
            "(write other names as xn--...)"
        )
    try:
        return urlsplit(url)
    except ValueError:
        raise kind.error(
            f"{kind.url} cannot be read: it must look like https://host/path"
        ) from None


def _check_host(host: str, kind: ServerKind, *, encrypted: bool, allowed: bool) -> None:
    """What can be said before the name is looked up; its addresses are checked when it is."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if encrypted or allowed or host == "localhost":
            return
        raise kind.error(
            f"{kind.url} http://{host} is not encrypted and names another machine (or may): "
            "use https; http is for localhost, 127.0.0.1 and [::1], and for hosts inside your own "
            f"cluster that allow_http_hosts names (allow_http_hosts: [{host}])"
        ) from None
    reason = refusal(host, encrypted=encrypted, allowed=allowed)
    if reason is not None:
        raise kind.error(f"the {kind.name} {host} is {reason}")
