"""A reward that a server gives: named by its URL, `http://127.0.0.1:PORT/path` or
`https://host/path`.

The contract. neat-align sends `POST /path` with `Content-Type: application/json` and

    {"rows": [{"prompt": PROMPT, "completion": "text"}, ...]}

where PROMPT is a text, or a list of `{"role": ..., "content": ...}` messages as the data has it:
the plain prompt, never an instruction. Nothing else of the data is sent. The server answers with
status 200 and

    {"rewards": [1.5, null, ...]}

one entry a row, in order: a finite number, higher is better, or null to abstain. Other keys are
ignored. Rows come in chunks of at most `batch_size`, one request at a time, and the same rows may
be sent again, so scoring must have no side effects.

- Again, after a growing pause: 408, 429, 5xx, a connection that fails or breaks, no answer within
  `timeout`. A `Retry-After` is kept to. When the tries are used up, or the server asks for a longer
  pause than `RetryPolicy` allows, RewardUnavailableError stops the run, which can be resumed.
- An error at once: any other status (a redirect too: none is followed), an answer that is too long,
  is not this JSON, has another number of rewards, or one that is not finite. Never a score.

Security: https off this machine; the address rules of `addresses`; certificates are checked. A
bearer token comes from the environment, NEAT_ALIGN_REWARD_TOKEN_<HOST> (the host in capitals, with
_ for all but letters and digits) or NEAT_ALIGN_REWARD_TOKEN, is read when it is sent, is sent to
the URL's own host only, and stands in no file or message.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import SplitResult, urlsplit

from neat_align.errors import RewardError, RewardUnavailableError
from neat_align.files.secrets import scrubbed
from neat_align.prompts.rows import Prompt
from neat_align.rewards.addresses import CheckedConnection, CheckedTLSConnection, refusal
from neat_align.rewards.protocol import CompletionInput, completion_text
from neat_align.rewards.scoring import checked_scores

logger = logging.getLogger(__name__)
TOKEN_VARIABLE = "NEAT_ALIGN_REWARD_TOKEN"  # noqa: S105 - the variable's name
DEFAULT_TIMEOUT = 60.0
_AGAIN = (408, 429)
_BLOCK = 1 << 16
_EXCERPT = 200
_ANSWER = '{"rewards": [...]}'


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request is tried, and the pauses between, in seconds: `first_pause`, doubling up
    to `longest_pause`, each shortened by up to half at random, so that many runs do not come back
    to a server at once. A `Retry-After` of up to `longest_retry_after` is waited for; a longer one
    ends the tries.
    """

    tries: int = 6
    first_pause: float = 1.0
    longest_pause: float = 30.0
    longest_retry_after: float = 120.0

    def pause(self, failed: int, asked: float | None, rng: random.Random) -> float:
        """Seconds to wait after so many failed tries; `asked` is the server's `Retry-After`."""
        backoff = min(self.longest_pause, self.first_pause * 2.0 ** (failed - 1)) * (
            1 - rng.random() / 2
        )
        return max(backoff, asked or 0.0)


@dataclass(frozen=True)
class Target:
    """Where rows are sent: a checked URL, in parts."""

    encrypted: bool
    host: str
    port: int
    path: str

    @property
    def name(self) -> str:
        """Host, port and path as one word, for metrics and messages."""
        standard = self.port == (443 if self.encrypted else 80)
        return re.sub(
            r"[^A-Za-z0-9.-]+", "_", f"{self.host}{'' if standard else f':{self.port}'}{self.path}"
        ).strip("_")

    @property
    def token_variable(self) -> str | None:
        """The environment variable that this host's token is in; its own before the general one.

        None when neither is set.
        """
        own = f"{TOKEN_VARIABLE}_{re.sub(r'[^A-Z0-9]', '_', self.host.upper())}"
        return next((v for v in (own, TOKEN_VARIABLE) if os.environ.get(v, "").strip()), None)


class _TransientError(Exception):
    """A failure that may pass. `retry_after` is in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class HttpReward:
    """A reward server, see the module's docstring. `timeout` is in seconds and bounds one whole
    request (but for the look-up of the name, which only the system bounds); `max_response_bytes`
    bounds one answer.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        batch_size: int = 128,
        retry: RetryPolicy | None = None,
        max_response_bytes: int = 1 << 20,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.target = parse_url(url)
        self.name = self.target.name
        self.timeout, self.batch_size, self.max_response_bytes = (
            timeout,
            batch_size,
            max_response_bytes,
        )
        self.retry = retry or RetryPolicy()
        self._sleep, self._rng = sleep, rng or random.Random()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        """The server's reward for each row."""
        rewards: list[float | None] = []
        for first in range(0, len(completions), self.batch_size):
            mine = completions[first : first + self.batch_size]
            asked = prompts[first : first + self.batch_size]
            rows = [
                {"prompt": p, "completion": completion_text(c)}
                for p, c in zip(asked, mine, strict=True)
            ]
            answer = self._answer(
                json.dumps({"rows": rows}).encode("ascii"),
                f"rows {first} to {first + len(mine) - 1}",
            )
            labels = [f"row {i}" for i in range(first, first + len(mine))]
            rewards += checked_scores(self.name, self._rewards_in(answer), mine, labels)
        return rewards

    def _answer(self, body: bytes, rows: str) -> bytes:
        """The body of a good answer, after as many tries as it takes."""
        started, tried = time.monotonic(), 0
        while True:
            tried += 1
            try:
                return self._post(body)
            except _TransientError as error:
                asked = error.retry_after
                reason = f"the reward server {self.name} {error}"
                if asked is not None and asked > self.retry.longest_retry_after:
                    raise RewardUnavailableError(
                        f"{reason} and asks for a pause of {asked:.0f} s, for {rows}"
                    ) from error
                if tried >= self.retry.tries:
                    took = time.monotonic() - started
                    raise RewardUnavailableError(
                        f"{reason}: given up on {rows} after {tried} tries in {took:.0f} s"
                    ) from error
                pause = self.retry.pause(tried, asked, self._rng)
                logger.warning(
                    "%s; try %d of %d follows in %.1f s", reason, tried + 1, self.retry.tries, pause
                )
                self._sleep(pause)

    def _post(self, body: bytes) -> bytes:
        """One request. _TransientError for what may pass, RewardError for what will not."""
        try:
            status, headers, data = self._exchange(body)
        except ssl.SSLCertVerificationError as error:
            raise RewardError(
                f"the certificate of the reward server {self.name} is not valid: "
                f"{error.verify_message}"
            ) from error
        except (OSError, HTTPException) as error:
            raise _TransientError(
                f"cannot be asked ({type(error).__name__}: {scrubbed(str(error))[:_EXCERPT]})"
            ) from error
        if status == 200:
            return data
        if status in _AGAIN or status >= 500:
            raise _TransientError(f"answered {status}", _retry_after(headers.get("retry-after")))
        hint = {
            401: f": set the environment variable {TOKEN_VARIABLE} to its token",
            403: f": the token in {TOKEN_VARIABLE} may not use it",
        }.get(
            status,
            ": redirects are not followed, so name the final URL"
            if 300 <= status < 400
            else f": {self._excerpt(data)}",
        )
        raise RewardError(
            f"the reward server {self.name} answered {status}, where 200 was needed{hint}"
        )

    def _exchange(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Send and receive within `timeout` seconds. Gives status, headers in small letters, and
        the body.
        """
        t = self.target
        connection = (CheckedTLSConnection if t.encrypted else CheckedConnection)(
            t.host, t.port, self.timeout
        )
        expired = threading.Event()

        def expire() -> None:
            # A socket's own timeout starts anew with every byte, so that a slow answer would never
            # run into it.
            expired.set()
            if connection.opened is not None:
                _shut(connection.opened)

        clock = threading.Timer(self.timeout, expire)
        clock.daemon = True
        clock.start()
        try:
            connection.request("POST", t.path, body, self._headers())
            if expired.is_set():  # while there was no socket yet
                raise TimeoutError
            with connection.getresponse() as response:
                headers = {k.lower(): v for k, v in response.getheaders()}
                data = self._read(response, headers)
            if expired.is_set():  # what was read may be cut
                raise TimeoutError
        except (OSError, HTTPException) as error:
            if expired.is_set() or isinstance(error, TimeoutError):
                raise TimeoutError(f"no complete answer within {self.timeout:g} s") from error
            raise
        finally:
            clock.cancel()
            connection.close()
        return response.status, headers, data

    def _headers(self) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
        }
        variable = self.target.token_variable
        if variable is not None:
            token = os.environ[variable].strip()
            if not re.fullmatch(r"[\x21-\x7e]+", token):
                raise RewardError(
                    f"the environment variable {variable} holds spaces or characters that no "
                    "token has: set it to the token"
                )
            headers["Authorization"] = f"Bearer {token}"
        return headers

    def _read(self, response: HTTPResponse, headers: Mapping[str, str]) -> bytes:
        if headers.get("content-encoding", "identity") != "identity":
            raise RewardError(
                f"the reward server {self.name} compressed its answer, which was not asked for"
            )
        length = headers.get("content-length", "")
        # Unknown where the answer ends with the connection, or comes in chunks (http.client finds
        # those that are cut).
        announced = (
            int(length[:20]) if length.isdecimal() and "transfer-encoding" not in headers else None
        )
        data = b""
        while len(data) <= self.max_response_bytes and (announced or 0) <= self.max_response_bytes:
            block = response.read(_BLOCK)
            if not block:
                if announced is not None and len(data) < announced:
                    raise ConnectionResetError(
                        f"the connection ended after {len(data)} of {announced} bytes"
                    )
                return data
            data += block
        if response.status != 200:
            return data[: self.max_response_bytes]
        raise RewardError(
            f"the reward server {self.name} sent an answer of more than {self.max_response_bytes} "
            f"bytes: it must be {_ANSWER}, one "
            "number or null a row"
        )

    def _rewards_in(self, data: bytes) -> list[Any]:
        try:
            answer = json.loads(data, parse_constant=float)
        except (ValueError, RecursionError) as error:
            raise RewardError(
                f"the reward server {self.name} did not answer with JSON ({_ANSWER}): "
                f"{self._excerpt(data)}"
            ) from error
        if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
            raise RewardError(
                f"the reward server {self.name} must answer {_ANSWER}, but it said "
                f"{self._excerpt(data)}"
            )
        rewards: list[Any] = answer["rewards"]
        return rewards

    def _excerpt(self, data: bytes) -> str:
        # A server may say back what it was sent, the token too.
        return repr(scrubbed(data[: 4 * _EXCERPT].decode("utf-8", "replace"))[:_EXCERPT])


def _shut(sock: socket.socket) -> None:
    """End what another thread waits for on this socket. TLS's own shutdown would wait for
    the peer.
    """
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        return  # closed already


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a `Retry-After` in seconds or as a date; None where there is none that
    can be read.
    """
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


# ---- URLs ----------------------------------------------------------------------------------------


def parse_url(url: str) -> Target:
    """A reward's URL in parts.

    Raises RewardError, which repeats nothing of the URL that could be a secret.
    """
    parts = _split(url)
    host = parts.hostname or ""
    shown = f"{parts.scheme}://{host}"
    if parts.scheme not in ("http", "https"):
        raise RewardError(
            "a reward's URL begins with https:// (or http:// on this machine), not with "
            f"{parts.scheme}://"
        )
    if "@" in parts.netloc:
        raise RewardError(
            f"the reward URL {shown} holds a user name or password: leave it out, and put a token "
            f"into {TOKEN_VARIABLE}"
        )
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise RewardError(
            f"the reward URL {shown} has a query or fragment, which could hold a secret: leave it "
            "out"
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise RewardError(
            f"the reward URL {shown} has a port that is no number below 65536"
        ) from None
    if not host:
        raise RewardError("a reward's URL needs a host: https://host/path")
    encrypted = parts.scheme == "https"
    _check_host(host, encrypted=encrypted)
    return Target(encrypted, host, port, parts.path or "/")


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


def _check_host(host: str, *, encrypted: bool) -> None:
    """What can be said before the name is looked up; the addresses that it has are checked when it
    is.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not encrypted and host != "localhost":
            raise RewardError(
                f"the reward URL http://{host} is not encrypted and names another machine (or "
                "may): use https; http is for "
                "localhost, 127.0.0.1 and [::1]"
            ) from None
        return
    reason = refusal(host, encrypted=encrypted)
    if reason is not None:
        raise RewardError(f"the reward server {host} is {reason}")


def check_tokens(rewards: Sequence[Any]) -> None:
    """Refuse one token for two hosts: each host would be sent the other's.

    `rewards` are reward functions of any kind.
    """
    hosts: dict[str, str] = {}
    for reward in rewards:
        if not isinstance(reward, HttpReward) or reward.target.token_variable is None:
            continue
        variable, host = reward.target.token_variable, reward.target.host
        if hosts.setdefault(variable, host) != host:
            raise RewardError(
                f"the token in {variable} would be sent to {hosts[variable]} and to {host}: give "
                "each host its own, in "
                f"{TOKEN_VARIABLE}_<HOST>"
            )
