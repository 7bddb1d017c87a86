"""One exchange with a server, tried again where a failure may pass.

- Again, after a growing pause: 408, 429, 5xx, a connection that fails or breaks, no answer within
  `timeout`. A `Retry-After` is kept to. When the tries are used up, or the server asks for a longer
  pause than `RetryPolicy` allows, the kind's `unavailable` error is raised.
- An error at once: an answer that is too long or compressed, a certificate that is not valid.
- Any other answer is given back: what a status means depends on the server. `refused` says it.

No redirect is followed, no proxy of the environment is used, and no cookie is kept. A bearer token
comes from the environment, is read when it is sent, is sent to the URL's own host only, and stands
in no file or message.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from neat_align.files.secrets import scrubbed
from neat_align.network.addresses import CheckedTransport, root_cause
from neat_align.network.server_url import Target

_AGAIN = (408, 429)
_EXCERPT = 200


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request is tried, and the pauses between, in seconds.

    The pauses begin with `first_pause` and double up to `longest_pause`, each shortened by up to
    half at random, so that many runs do not come back to a server at once. A `Retry-After` of up to
    `longest_retry_after` is waited for; a longer one ends the tries.
    """

    tries: int = 6
    first_pause: float = 1.0
    longest_pause: float = 30.0
    longest_retry_after: float = 120.0

    def pause(self, failed: int, asked: float | None, rng: random.Random) -> float:
        """Seconds to wait after so many failed tries; `asked` is the server's `Retry-After`."""
        doubled = min(self.longest_pause, self.first_pause * 2.0 ** (failed - 1))
        return max(doubled * (1 - rng.random() / 2), asked or 0.0)


@dataclass(frozen=True)
class Answer:
    """What a server answered: a status that no later try would change, and the body."""

    status: int
    data: bytes


class _TransientError(Exception):
    """A failure that may pass. `retry_after` is in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True)
class ServerClient:
    """Asks one server.

    `timeout` is in seconds and bounds one whole request; the look-up of the host's name may outlast
    it, since only the system can end that. `max_response_bytes` bounds one answer, and `expected`
    says in messages what one is.
    """

    target: Target
    timeout: float
    expected: str
    max_response_bytes: int
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    rng: random.Random = field(default_factory=random.Random)
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger(__name__))

    def connections(self, most: int | None = None) -> httpx2.AsyncClient:
        """Connections for one piece of work, in the event loop that runs it; `most` at once."""
        return client_over(checked_transport(self.target, most))

    async def ask(
        self,
        client: httpx2.AsyncClient,
        where: str,
        body: bytes | None = None,
        path: str | None = None,
        *,
        retry: bool = True,
    ) -> Answer:
        """POST a body of JSON, or GET without one; `path`, with a query, in place of the URL's.

        `where` says in messages what is asked for. Not `retry`: sent once, and whatever status it
        is answered with is given back.
        """
        tries = self.retry.tries if retry else 1
        retrying = AsyncRetrying(
            sleep=self.sleep,
            retry=retry_if_exception_type(_TransientError),
            stop=stop_after_attempt(tries),
            wait=lambda state: self.retry.pause(
                state.attempt_number, _failure(state).retry_after, self.rng
            ),
            before_sleep=self._warn,
            reraise=True,
        )
        try:
            answer: Answer = await retrying(self._send, client, where, body, path, retry)
        except _TransientError as error:
            made = retrying.statistics["attempt_number"]
            took = retrying.statistics["delay_since_first_attempt"]
            raise self.target.kind.unavailable(
                f"{self.target.said} {error}: given up on {where} after {made} tries in "
                f"{took:.0f} s"
            ) from error
        return answer

    def refused(self, answer: Answer) -> Exception:
        """The error for a status that was not asked for."""
        status, variable = answer.status, self.target.kind.token_variable
        if status == 401:
            hint = f": set the environment variable {variable} to its token"
        elif status == 403:
            hint = f": the token in {variable} may not use it"
        elif 300 <= status < 400:
            hint = ": redirects are not followed, so name the final URL"
        else:
            hint = f": {excerpt(answer.data)}"
        return self.target.kind.error(
            f"{self.target.said} answered {status}, where 200 was needed{hint}"
        )

    def _warn(self, state: RetryCallState) -> None:
        self.logger.warning(
            "%s %s; try %d of %d follows in %.1f s",
            self.target.said,
            _failure(state),
            state.attempt_number + 1,
            self.retry.tries,
            state.upcoming_sleep,
        )

    async def _send(
        self,
        client: httpx2.AsyncClient,
        where: str,
        body: bytes | None,
        path: str | None,
        retry: bool,
    ) -> Answer:
        """One request. _TransientError for what may pass."""
        own = self.target.url
        url = own if path is None else own.copy_with(raw_path=path.encode("ascii"))
        # Not `client.build_request`, which would send cookies and httpx2's own headers as well.
        request = httpx2.Request(
            "GET" if body is None else "POST", url, content=body, headers=self._headers()
        )
        try:
            async with (
                asyncio.timeout(self.timeout),
                aclosing(await client.send(request, stream=True)) as response,
            ):
                data = await self._read(response)
        except (OSError, httpx2.TransportError) as error:
            raise self._transport_error(error) from error
        status = response.status_code
        if retry and (status in _AGAIN or status >= 500):
            asked = _retry_after(response.headers.get("retry-after"))
            if asked is not None and asked > self.retry.longest_retry_after:
                raise self.target.kind.unavailable(
                    f"{self.target.said} answered {status} and asks for a pause of "
                    f"{asked:.0f} s, for {where}"
                )
            raise _TransientError(f"answered {status}", asked)
        return Answer(status, data)

    def _transport_error(self, error: Exception) -> Exception:
        """What a failed exchange means: an error for good, or one that may pass."""
        cause = root_cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return self.target.kind.error(
                f"the certificate of {self.target.said} is not valid: {cause.verify_message}"
            )
        if isinstance(error, httpx2.RemoteProtocolError) and "Content-Length" in str(error):
            return self._too_long()  # h11 reads at most 20 digits
        said = scrubbed(str(cause))[:_EXCERPT]
        reason = f"{type(cause).__name__}: {said}" if said else type(error).__name__
        if isinstance(error, TimeoutError) or isinstance(cause, TimeoutError):
            reason = f"TimeoutError: no complete answer within {self.timeout:g} s"
        return _TransientError(f"cannot be asked ({reason})")

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
                raise self.target.kind.error(
                    f"the environment variable {variable} holds spaces or characters that no "
                    "token has: set it to the token"
                )
            headers["Authorization"] = f"Bearer {token}"
        return headers

    async def _read(self, response: httpx2.Response) -> bytes:
        """The body as it was sent, of at most `max_response_bytes`."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self.target.kind.error(
                f"{self.target.said} compressed its answer, which was not asked for"
            )
        data = b""
        async for block in response.aiter_raw():
            data += block
            if len(data) > self.max_response_bytes:
                if response.status_code == 200:
                    raise self._too_long()
                break
        return data[: self.max_response_bytes]

    def _too_long(self) -> Exception:
        return self.target.kind.error(
            f"{self.target.said} sent an answer of more than {self.max_response_bytes} "
            f"bytes: it must be {self.expected}"
        )


def checked_transport(target: Target, most: int | None = None) -> CheckedTransport:
    """Connections to a server whose addresses are checked; `most` at once."""
    return CheckedTransport(
        target.kind.name,
        target.kind.error,
        encrypted=target.encrypted,
        allowed=target.allowed,
        most=most,
    )


def client_over(transport: httpx2.AsyncBaseTransport) -> httpx2.AsyncClient:
    """A client without proxies, redirects and time limits of its own."""
    return httpx2.AsyncClient(
        transport=transport, trust_env=False, follow_redirects=False, timeout=None
    )


def excerpt(data: bytes, most: int = _EXCERPT) -> str:
    """The beginning of an answer, for a message."""
    # A server may say back what it was sent, the token too.
    return repr(scrubbed(data[: 4 * most].decode("utf-8", "replace"))[:most])


def _failure(state: RetryCallState) -> _TransientError:
    """What the last try raised; only these are tried again."""
    failure = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(failure, _TransientError)
    return failure


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
