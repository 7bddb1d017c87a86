"""A reward that a server gives: named by its URL, `http://127.0.0.1:PORT/path` or
`https://host/path`.

The contract. neat-align sends `POST /path` with `Content-Type: application/json` and

    {"rows": [{"prompt": PROMPT, "completion": "text"}, ...]}

where PROMPT is a text, or a list of `{"role": ..., "content": ...}` messages as the data has it:
the plain prompt, never an instruction. Nothing else of the data is sent. The server answers with
status 200 and

    {"rewards": [1.5, null, ...]}

one entry a row, in order: a finite number, higher is better, or null to abstain. Other keys are
ignored. Rows come in chunks of at most `batch_size`, up to CONCURRENT_REQUESTS at once and in any
order, and the same rows may be sent again, so scoring must have no side effects.

- Again, after a growing pause: 408, 429, 5xx, a connection that fails or breaks, no answer within
  `timeout`. A `Retry-After` is kept to. When the tries are used up, or the server asks for a longer
  pause than `RetryPolicy` allows, RewardUnavailableError stops the run, which can be resumed.
- An error at once: any other status (a redirect too: none is followed), an answer that is too long,
  is not this JSON, has another number of rewards, or one that is not finite. Never a score.
- 413: the chunk is too large, and is sent as two halves; a single row is `Unscorable`.
- The first chunk that fails for good ends the others.

Security: https off this machine, or http to private hosts that the user named (`allow_http_hosts`);
the address rules of `addresses`; certificates are checked. A bearer token comes from the
environment, NEAT_ALIGN_REWARD_TOKEN_<HOST> (the host in capitals, with _ for all but letters and
digits) or NEAT_ALIGN_REWARD_TOKEN, is read when it is sent, is sent to the URL's own host only, and
stands in no file or message.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from neat_align.errors import ConfigError, RewardError, RewardUnavailableError
from neat_align.files.secrets import scrubbed
from neat_align.prompts.rows import Prompt
from neat_align.rewards.addresses import CheckedTransport, root_cause
from neat_align.rewards.output import checked_scores
from neat_align.rewards.protocol import (
    CompletionInput,
    RewardFunction,
    Score,
    Unscorable,
    completion_text,
)
from neat_align.rewards.server_url import TOKEN_VARIABLE, parse_url

logger = logging.getLogger(__name__)
DEFAULT_TIMEOUT = 60.0
# A scoring batch of 64 rows goes out at once, as four requests of 16. More than six connections at
# the same moment overflow the listen queue of Python's http.server (5), and each one over it waits
# a second for the system to try again. Browsers open six to a host as well.
CONCURRENT_REQUESTS = 6
_AGAIN = (408, 429)
_EXCERPT = 200
_ANSWER = '{"rewards": [...]}'


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


class _TransientError(Exception):
    """A failure that may pass. `retry_after` is in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _TooLargeError(Exception):
    """The server answered 413."""


class HttpReward:
    """A reward server, see the module's docstring.

    `timeout` is in seconds and bounds one whole request; the look-up of the host's name may outlast
    it, since only the system can end that. `max_response_bytes` bounds one answer.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        allow_http_hosts: Sequence[str] = (),
        batch_size: int = 16,
        retry: RetryPolicy | None = None,
        max_response_bytes: int = 1 << 20,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.target = parse_url(url, allow_http_hosts)
        self.name = self.target.name
        self.timeout, self.batch_size = timeout, batch_size
        self.max_response_bytes = max_response_bytes
        self.retry = retry or RetryPolicy()
        self._sleep, self._rng = sleep, rng or random.Random()

    async def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[Score]:
        """The server's reward for each row."""
        slots = asyncio.Semaphore(CONCURRENT_REQUESTS)

        async def scores(client: httpx2.AsyncClient, first: int) -> list[Score]:
            chunk = slice(first, first + self.batch_size)
            async with slots:  # also while it pauses: a busy server is asked less
                return await self._chunk(client, first, prompts[chunk], completions[chunk])

        # A client a call: its connections belong to the call's event loop.
        async with self._client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    chunks = [
                        group.create_task(scores(client, first))
                        for first in range(0, len(completions), self.batch_size)
                    ]
            except ExceptionGroup as failures:
                failure = failures.exceptions[0]
                raise failure from failure.__cause__
        return [reward for chunk in chunks for reward in chunk.result()]

    def _client(self) -> httpx2.AsyncClient:
        target = self.target
        transport = CheckedTransport(encrypted=target.encrypted, allowed=target.allowed)
        return httpx2.AsyncClient(
            transport=transport,
            trust_env=False,
            follow_redirects=False,
            timeout=None,
        )

    async def _chunk(
        self,
        client: httpx2.AsyncClient,
        first: int,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
    ) -> list[Score]:
        """The rewards of the rows from `first` on, after as many tries as it takes."""
        rows = [
            {"prompt": prompt, "completion": completion_text(completion)}
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        where = f"rows {first} to {first + len(rows) - 1}"
        retrying = AsyncRetrying(
            sleep=self._sleep,
            retry=retry_if_exception_type(_TransientError),
            stop=stop_after_attempt(self.retry.tries),
            wait=lambda state: self.retry.pause(
                state.attempt_number, _failure(state).retry_after, self._rng
            ),
            before_sleep=self._warn,
            reraise=True,
        )
        body = json.dumps({"rows": rows}).encode("ascii")
        try:
            answer: bytes = await retrying(self._post, client, body, where)
        except _TransientError as error:
            tries = retrying.statistics["attempt_number"]
            took = retrying.statistics["delay_since_first_attempt"]
            raise RewardUnavailableError(
                f"the reward server {self.name} {error}: given up on {where} after {tries} tries "
                f"in {took:.0f} s"
            ) from error
        except _TooLargeError:
            if len(rows) == 1:
                return [Unscorable(f"is too large for the reward server {self.name} (413)")]
            half = len(rows) // 2
            return [
                *await self._chunk(client, first, prompts[:half], completions[:half]),
                *await self._chunk(client, first + half, prompts[half:], completions[half:]),
            ]
        labels = [f"row {i}" for i in range(first, first + len(rows))]
        return checked_scores(self.name, self._rewards_in(answer), completions, labels)

    def _warn(self, state: RetryCallState) -> None:
        logger.warning(
            "the reward server %s %s; try %d of %d follows in %.1f s",
            self.name,
            _failure(state),
            state.attempt_number + 1,
            self.retry.tries,
            state.upcoming_sleep,
        )

    async def _post(self, client: httpx2.AsyncClient, body: bytes, where: str) -> bytes:
        """One request. _TransientError for what may pass, _TooLargeError for too many rows at once,
        RewardError for what will not pass.

        `where` names the rows in messages.
        """
        # Not `client.build_request`, which would send cookies and httpx2's own headers as well.
        request = httpx2.Request("POST", self.target.url, content=body, headers=self._headers())
        try:
            async with (
                asyncio.timeout(self.timeout),
                aclosing(await client.send(request, stream=True)) as response,
            ):
                data = await self._read(response)
        except (OSError, httpx2.TransportError) as error:
            raise self._transport_error(error) from error
        status = response.status_code
        if status == 200:
            return data
        if status == 413:
            raise _TooLargeError
        if status in _AGAIN or status >= 500:
            asked = _retry_after(response.headers.get("retry-after"))
            if asked is not None and asked > self.retry.longest_retry_after:
                raise RewardUnavailableError(
                    f"the reward server {self.name} answered {status} and asks for a pause of "
                    f"{asked:.0f} s, for {where}"
                )
            raise _TransientError(f"answered {status}", asked)
        if status == 401:
            hint = f": set the environment variable {TOKEN_VARIABLE} to its token"
        elif status == 403:
            hint = f": the token in {TOKEN_VARIABLE} may not use it"
        elif 300 <= status < 400:
            hint = ": redirects are not followed, so name the final URL"
        else:
            hint = f": {self._excerpt(data)}"
        raise RewardError(
            f"the reward server {self.name} answered {status}, where 200 was needed{hint}"
        )

    def _transport_error(self, error: Exception) -> Exception:
        """What a failed exchange means: an error for good, or one that may pass."""
        cause = root_cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RewardError(
                f"the certificate of the reward server {self.name} is not valid: "
                f"{cause.verify_message}"
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
                raise RewardError(
                    f"the environment variable {variable} holds spaces or characters that no "
                    "token has: set it to the token"
                )
            headers["Authorization"] = f"Bearer {token}"
        return headers

    async def _read(self, response: httpx2.Response) -> bytes:
        """The body as it was sent, of at most `max_response_bytes`."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise RewardError(
                f"the reward server {self.name} compressed its answer, which was not asked for"
            )
        data = b""
        async for block in response.aiter_raw():
            data += block
            if len(data) > self.max_response_bytes:
                if response.status_code == 200:
                    raise self._too_long()
                break
        return data[: self.max_response_bytes]

    def _too_long(self) -> RewardError:
        return RewardError(
            f"the reward server {self.name} sent an answer of more than {self.max_response_bytes} "
            f"bytes: it must be {_ANSWER}, one number or null a row"
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


# ---- all rewards of a run ------------------------------------------------------------------------


def check_tokens(rewards: Sequence[RewardFunction]) -> None:
    """Refuse one token for two hosts: each host would be sent the other's."""
    hosts: dict[str, str] = {}
    for reward in rewards:
        if not isinstance(reward, HttpReward) or reward.target.token_variable is None:
            continue
        variable, host = reward.target.token_variable, reward.target.host
        if hosts.setdefault(variable, host) != host:
            raise RewardError(
                f"the token in {variable} would be sent to {hosts[variable]} and to {host}: give "
                f"each host its own, in {TOKEN_VARIABLE}_<HOST>"
            )


def check_http_hosts(
    allow_http_hosts: Sequence[str] | None, rewards: Sequence[RewardFunction]
) -> None:
    """Refuse an `allow_http_hosts` that no reward needs."""
    servers = [reward.target for reward in rewards if isinstance(reward, HttpReward)]
    if allow_http_hosts is not None and not any(target.allowed for target in servers):
        raise ConfigError(
            f"allow_http_hosts is {list(allow_http_hosts)}, but no reward or judge is an http:// "
            "URL of such a host: leave it out"
        )
