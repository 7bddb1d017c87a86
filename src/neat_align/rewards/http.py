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
import json
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2

from neat_align.errors import ConfigError, RewardError, RewardUnavailableError
from neat_align.network.client import RetryPolicy, ServerClient, excerpt
from neat_align.network.event_loop import all_of
from neat_align.network.server_url import ServerKind, Target, parse_url
from neat_align.prompts.rows import Prompt
from neat_align.rewards.output import checked_scores
from neat_align.rewards.protocol import (
    AsksServer,
    CompletionInput,
    RewardFunction,
    Score,
    Unscorable,
    completion_text,
)

logger = logging.getLogger(__name__)
TOKEN_VARIABLE = "NEAT_ALIGN_REWARD_TOKEN"  # noqa: S105 - the variable's name
REWARD_SERVER = ServerKind(
    "reward server", "a reward's URL", TOKEN_VARIABLE, RewardError, RewardUnavailableError
)
DEFAULT_TIMEOUT = 60.0
# A scoring batch of 64 rows goes out at once, as four requests of 16. More than six connections at
# the same moment overflow the listen queue of Python's http.server (5), and each one over it waits
# a second for the system to try again. Browsers open six to a host as well.
CONCURRENT_REQUESTS = 6
_ANSWER = '{"rewards": [...]}'


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
        self.target = parse_url(url, REWARD_SERVER, allow_http_hosts)
        self.name = self.target.name
        self.timeout, self.batch_size = timeout, batch_size
        self._server = ServerClient(
            self.target,
            timeout,
            f"{_ANSWER}, one number or null a row",
            max_response_bytes,
            retry or RetryPolicy(),
            sleep,
            rng or random.Random(),
            logger,
        )

    @property
    def token_variable(self) -> str | None:
        """The environment variable with the token that is sent."""
        return self.target.token_variable

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
        async with self._server.connections() as client:
            firsts = range(0, len(completions), self.batch_size)
            chunks = await all_of(scores(client, first) for first in firsts)
        return [reward for chunk in chunks for reward in chunk]

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
        body = json.dumps({"rows": rows}).encode("ascii")
        answer = await self._server.ask(client, where, body)
        if answer.status == 413:
            if len(rows) == 1:
                return [Unscorable(f"is too large for {self.target.said} (413)")]
            half = len(rows) // 2
            return [
                *await self._chunk(client, first, prompts[:half], completions[:half]),
                *await self._chunk(client, first + half, prompts[half:], completions[half:]),
            ]
        if answer.status != 200:
            raise self._server.refused(answer)
        labels = [f"row {i}" for i in range(first, first + len(rows))]
        return checked_scores(self.name, self._rewards_in(answer.data), completions, labels)

    def _rewards_in(self, data: bytes) -> list[Any]:
        try:
            answer = json.loads(data, parse_constant=float)
        except (ValueError, RecursionError) as error:
            raise RewardError(
                f"the reward server {self.name} did not answer with JSON ({_ANSWER}): "
                f"{excerpt(data)}"
            ) from error
        if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
            raise RewardError(
                f"the reward server {self.name} must answer {_ANSWER}, but it said {excerpt(data)}"
            )
        rewards: list[Any] = answer["rewards"]
        return rewards


# ---- all rewards of a run ------------------------------------------------------------------------


def check_tokens(rewards: Sequence[RewardFunction]) -> None:
    """Refuse one token for two hosts: each host would be sent the other's."""
    hosts: dict[str, str] = {}
    for reward in rewards:
        if not isinstance(reward, AsksServer) or not reward.token_variable:
            continue
        variable, host = reward.token_variable, reward.target.host
        if hosts.setdefault(variable, host) != host:
            raise RewardError(
                f"the token in {variable} would be sent to {hosts[variable]} and to {host}: give "
                f"each host its own, in {TOKEN_VARIABLE}_<HOST>, or by api_key_env in a judge's "
                "file"
            )


def check_http_hosts(
    allow_http_hosts: Sequence[str] | None,
    rewards: Sequence[RewardFunction],
    others: Sequence[Target] = (),
) -> None:
    """Refuse an `allow_http_hosts` that neither a reward nor one of the other servers needs."""
    servers = [reward.target for reward in rewards if isinstance(reward, AsksServer)] + [*others]
    if allow_http_hosts is not None and not any(target.allowed for target in servers):
        raise ConfigError(
            f"allow_http_hosts is {list(allow_http_hosts)}, but no reward or judge is an http:// "
            "URL of such a host: leave it out"
        )
