"""Which addresses a server may have, and a transport that connects only to an address that
was checked.

For each request the name is resolved once, every address that it has is checked, and the
connection goes to one of those: a name that answers differently the second time (DNS rebinding)
changes nothing. Proxies of the environment are not used, since a proxy would resolve the name
again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import httpx2

from neat_align.errors import ConfigError, NEATError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def _networks(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


_REFUSED = {
    "a link-local or cloud metadata address": _networks(
        "169.254.0.0/16",
        "fe80::/10",
        # Where clouds serve a machine's own credentials outside of the link-local ranges.
        "100.100.100.200",  # Alibaba Cloud
        "168.63.129.16",  # Azure's host
        "192.0.0.192",  # Oracle Cloud
        "fd00:ec2::254",  # AWS
        "fd00:ec2::23",  # AWS, the containers' credentials
        "fd20:ce::254",  # Google Cloud
    ),
    "an unspecified address": _networks("0.0.0.0/8", "::"),
    "a multicast or reserved address": _networks("224.0.0.0/4", "240.0.0.0/4", "ff00::/8"),
}
# Where the hosts and services of a cluster live: RFC 1918, RFC 6598 and RFC 4193.
_PRIVATE = _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def allows_plain_http(host: str, patterns: Sequence[str]) -> bool:
    """Whether one of the `allow_http_hosts` names a host; `*` stands for any characters.

    ConfigError for a pattern that is no host name or address, or that names every host.
    """
    for pattern in patterns:
        if not re.fullmatch(r"[\w.:*-]*[A-Za-z0-9][\w.:*-]*", pattern, re.ASCII):
            raise ConfigError(
                f"allow_http_hosts has the entry {pattern!r}: each entry must be a host such as "
                "10.0.0.5, or a pattern with a part of its name such as *.svc, without http:// "
                "and without a path"
            )
    return any(fnmatchcase(host, pattern.lower()) for pattern in patterns)


def refusal(address: str, *, encrypted: bool, allowed: bool = False) -> str | None:
    """Why no server is asked at an IP address, in a few words; None when it may be.

    `encrypted` is whether the URL is https, `allowed` whether `allow_http_hosts` names its host.
    """
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    for a in (parsed, *_embedded(parsed)):
        for reason, networks in _REFUSED.items():
            if any(a in network for network in networks):
                return reason
    connected = mapped or parsed
    if encrypted or connected.is_loopback:
        return None
    if not allowed:
        return (
            "not this machine's own (loopback), and http is not encrypted: use https, or an "
            "address like 127.0.0.1, or name the host in allow_http_hosts if it is inside your "
            "own cluster"
        )
    if not any(connected in network for network in _PRIVATE):
        return "not a private address, and http is not encrypted: use https"
    return None


def _embedded(a: Address) -> list[Address]:
    """The IPv4 addresses that an IPv6 address stands for (mapped, 6to4, Teredo, NAT64): the
    connection would go there.
    """
    if isinstance(a, ipaddress.IPv4Address):
        return []
    nat64 = ipaddress.IPv4Address(int(a) & 0xFFFFFFFF) if a in _NAT64 else None
    embedded = (a.ipv4_mapped, a.sixtofour, nat64, *(a.teredo or ()))
    return [b for b in embedded if b is not None]


async def checked_addresses(
    host: str,
    port: int,
    server: str,
    error: type[NEATError],
    *,
    encrypted: bool,
    allowed: bool = False,
) -> list[str]:
    """The addresses of a host, in the system's order.

    `error` when one of them is refused, in which `server` says what it is; OSError when there is
    none.
    """
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    for address in addresses:
        reason = refusal(address, encrypted=encrypted, allowed=allowed)
        if reason is not None:
            shown = address if address == host else f"{host} ({address})"
            raise error(f"the {server} {shown} is {reason}; nothing was sent there")
    return addresses


class CheckedTransport(httpx2.AsyncBaseTransport):
    """httpx2's transport, given an address that was checked in place of the host's name.

    The `Host` header stays, and the certificate is checked against the name in the URL and the
    system's authorities. `allowed` is whether `allow_http_hosts` names the host. `server` and
    `error` are those of `checked_addresses`; `most` connections are open at once (None: 100,
    of which 20 are kept).
    """

    def __init__(
        self,
        server: str,
        error: type[NEATError],
        *,
        encrypted: bool,
        allowed: bool,
        most: int | None = None,
    ) -> None:
        self._server, self._error = server, error
        self._encrypted, self._allowed = encrypted, allowed
        # Reading the system's authorities takes 20 ms, and http needs none; a context without
        # authorities would trust nobody.
        tls = ssl.create_default_context() if encrypted else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        limits = httpx2.Limits(max_connections=most or 100, max_keepalive_connections=most or 20)
        self._pool = httpx2.AsyncHTTPTransport(verify=tls, trust_env=False, limits=limits)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send to the first address that takes the connection."""
        url = request.url
        addresses = await checked_addresses(
            url.host,
            url.port or (443 if self._encrypted else 80),
            self._server,
            self._error,
            encrypted=self._encrypted,
            allowed=self._allowed,
        )
        failure: httpx2.ConnectError | None = None
        for address in addresses:
            pinned = httpx2.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,  # they hold the Host of the URL
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": url.host},
            )
            try:
                return await self._pool.handle_async_request(pinned)
            except httpx2.ConnectError as error:
                if isinstance(root_cause(error), ssl.SSLError):
                    raise  # a server is there: another address would hide what is wrong with it
                failure = error
        raise failure or OSError(f"{url.host} has no address")

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


def root_cause(error: BaseException) -> BaseException:
    """What the system said, below the errors of httpx2 and httpcore2."""
    # httpcore2's pool raises `from None`, so that the context alone leads on from there.
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return error
