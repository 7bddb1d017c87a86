"""Which addresses a reward server may have, and a connection to exactly the address that was
checked.

A name is resolved once, every address that it has is checked, and the socket is opened to one of
those: a name that answers differently the second time (DNS rebinding) changes nothing. Proxies of
the environment are not used, since a proxy would resolve the name again.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from http.client import HTTPConnection, HTTPSConnection
from typing import TypeAlias

from neat_align.errors import RewardError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
# Where clouds serve a machine's own credentials outside of the link-local ranges.
_METADATA = frozenset(
    ipaddress.ip_address(a)
    for a in (
        "100.100.100.200",  # Alibaba Cloud
        "168.63.129.16",  # Azure's host
        "192.0.0.192",  # Oracle Cloud
        "fd00:ec2::254",  # AWS
        "fd00:ec2::23",  # AWS, the containers' credentials
        "fd20:ce::254",  # Google Cloud
    )
)
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def refusal(address: str, *, encrypted: bool) -> str | None:
    """Why no reward is asked at an IP address, in a few words; None when it may be. `encrypted` is
    whether the URL is https.
    """
    found = ipaddress.ip_address(address)
    for a in (found, *_embedded(found)):
        if a in _METADATA or a.is_link_local:
            return "a link-local or cloud metadata address"
        if a.is_unspecified or (a.version == 4 and a in _THIS_NETWORK):
            return "an unspecified address"
        if a.is_multicast or (a.version == 4 and a.is_reserved):
            return "a multicast or reserved address"
    if not encrypted and not _innermost(found).is_loopback:
        return (
            "not this machine's own (loopback), and http is not encrypted: use https, or an "
            "address like 127.0.0.1"
        )
    return None


def _embedded(a: Address) -> list[Address]:
    """The IPv4 addresses that an IPv6 address stands for (mapped, 6to4, Teredo, NAT64): the
    connection would go there.
    """
    if isinstance(a, ipaddress.IPv4Address):
        return []
    found: list[Address | None] = [a.ipv4_mapped, a.sixtofour, *(a.teredo or ())]
    if a in _NAT64:
        found.append(ipaddress.IPv4Address(int(a) & 0xFFFFFFFF))
    return [b for b in found if b is not None]


def _innermost(a: Address) -> Address:
    return a.ipv4_mapped or a if isinstance(a, ipaddress.IPv6Address) else a


def checked_addresses(host: str, port: int, *, encrypted: bool) -> list[str]:
    """The addresses of a host, in the system's order.

    RewardError when one of them is refused; OSError when there is none.
    """
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    for address in addresses:
        reason = refusal(address, encrypted=encrypted)
        if reason is not None:
            shown = address if address == host else f"{host} ({address})"
            raise RewardError(f"the reward server {shown} is {reason}; nothing was sent there")
    return addresses


def open_socket(host: str, port: int, timeout: float, *, encrypted: bool) -> socket.socket:
    """A connected socket to the first checked address that takes it.

    `timeout` is in seconds, for each address.
    """
    last: OSError | None = None
    for address in checked_addresses(host, port, encrypted=encrypted):
        try:
            return socket.create_connection((address, port), timeout)
        except OSError as error:
            last = error
    raise last or OSError(f"{host} has no address")


class CheckedConnection(HTTPConnection):
    """http.client's connection, to a checked address.

    `opened` is its socket, also while only the response holds it.
    """

    def __init__(self, host: str, port: int, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._seconds = timeout
        self.opened: socket.socket | None = None

    def connect(self) -> None:
        """Open the socket."""
        self.sock = self.opened = open_socket(self.host, self.port, self._seconds, encrypted=False)


class CheckedTLSConnection(HTTPSConnection):
    """The same with TLS: the certificate is checked against the name in the URL and the system's
    authorities.
    """

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self._tls, self._seconds = ssl.create_default_context(), timeout
        super().__init__(host, port, timeout=timeout, context=self._tls)
        self.opened: socket.socket | None = None

    def connect(self) -> None:
        """Open the socket and shake hands."""
        plain = open_socket(self.host, self.port, self._seconds, encrypted=True)
        # The handshake comes after `opened` is set, so that who watches the clock can end it.
        self.sock = self.opened = tls = self._tls.wrap_socket(
            plain, server_hostname=self.host, do_handshake_on_connect=False
        )
        tls.do_handshake()
