"""Under somebody else's HTTP client (the `openai` package): what it may send, and what it may be
sent.

Such a client reads headers, keys and organisations of its own from the environment, and follows
whatever a server says. Here a request keeps only the headers that HTTP needs and gets the one
bearer token that was named for its host; addresses are checked (`addresses`); an answer has a time
and a size.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx2

from neat_align.files.secrets import scrubbed
from neat_align.network.client import checked_transport
from neat_align.network.server_url import Target

logger = logging.getLogger(__name__)
# Seconds between two warnings of a server that fails: a hundred requests fail together.
_WARN_EVERY = 15.0
_SENT_HEADERS = ("host", "content-type", "content-length", "accept")


@dataclass(frozen=True)
class Limits:
    """`timeout` in seconds bounds one whole request, `max_response_bytes` its answer, and
    `connections` how many are open at once.
    """

    timeout: float
    max_response_bytes: int
    connections: int


class ClientTransport(httpx2.AsyncBaseTransport):
    """Sends to the target's host alone; `token_variable` names the environment variable with the
    bearer token ("": none is sent).

    What may pass is raised as httpx2's own errors, which the client tries again, or given back as
    the status that it is; both are warned of now and then. An answer that is too long or compressed
    is the target's `error`.
    """

    def __init__(self, target: Target, limits: Limits, token_variable: str = "") -> None:
        self._target, self._limits, self._variable = target, limits, token_variable
        self._warned = -_WARN_EVERY
        self._inner = checked_transport(target, limits.connections)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """One request. Raises httpx2.TransportError for what may pass."""
        if (request.url.host, request.url.scheme) != (self._target.host, self._target.url.scheme):
            raise self._target.kind.error(
                f"{self._target.said} is not {request.url.host}: nothing was sent there"
            )
        kept = [(k, v) for k, v in request.headers.items() if k.lower() in _SENT_HEADERS]
        headers = httpx2.Headers([*kept, ("accept-encoding", "identity")])
        if self._variable:
            headers["authorization"] = f"Bearer {self._token()}"
        plain = httpx2.Request(
            request.method,
            request.url,
            headers=headers,
            stream=request.stream,
            extensions=request.extensions,
        )
        deadline = asyncio.get_running_loop().time() + self._limits.timeout
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._inner.handle_async_request(plain)
        except TimeoutError as error:
            raise self._late(request) from error
        except OSError as error:  # the host's name cannot be looked up
            self._warn(str(error))
            raise httpx2.ConnectError(str(error), request=request) from error
        except httpx2.TransportError as error:
            self._warn(str(error) or type(error).__name__)
            raise
        if response.status_code in (408, 409, 429) or response.status_code >= 500:
            self._warn(f"answered {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise self._target.kind.error(
                f"{self._target.said} compressed its answer, which was not asked for"
            )
        body = _Bounded(response, self, request, deadline)
        return httpx2.Response(response.status_code, headers=response.headers, stream=body)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._inner.aclose()

    def _token(self) -> str:
        token = os.environ.get(self._variable, "").strip()
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise self._target.kind.error(
                f"the environment variable {self._variable} is not set, or holds spaces or "
                f"characters that no API key has: set it to the key of {self._target.host}"
            )
        return token

    def _warn(self, what: str) -> None:
        now = time.monotonic()
        if now - self._warned >= _WARN_EVERY:
            self._warned = now
            logger.warning("a request to %s failed: %s", self._target.said, scrubbed(what))

    def _late(self, request: httpx2.Request) -> httpx2.ReadTimeout:
        said = f"no complete answer within {self._limits.timeout:g} s"
        self._warn(said)
        return httpx2.ReadTimeout(said, request=request)

    async def read(
        self, response: httpx2.Response, request: httpx2.Request, deadline: float
    ) -> AsyncIterator[bytes]:
        """The body, within its time and size."""
        size, blocks = 0, response.aiter_raw()
        while True:
            try:
                # Not around the whole: while a generator rests, its time limit would end others.
                async with asyncio.timeout_at(deadline):
                    block = await anext(blocks, None)
            except TimeoutError as error:
                raise self._late(request) from error
            if block is None:
                return
            size += len(block)
            if size > self._limits.max_response_bytes:
                raise self._target.kind.error(
                    f"{self._target.said} sent an answer of more than "
                    f"{self._limits.max_response_bytes} bytes: is base_url the address of an "
                    "OpenAI-compatible endpoint?"
                )
            yield block


class _Bounded(httpx2.AsyncByteStream):
    """The body of a response, within the limits of its transport."""

    def __init__(
        self,
        response: httpx2.Response,
        transport: ClientTransport,
        request: httpx2.Request,
        deadline: float,
    ) -> None:
        self._response, self._transport = response, transport
        self._request, self._deadline = request, deadline

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._transport.read(self._response, self._request, self._deadline)

    async def aclose(self) -> None:
        await self._response.aclose()
