"""Asking a judge: a call at a time through the `openai` client, from the cache where it was asked
before, counted, and given up on when too much fails.

- The client tries again what may pass: 408, 409, 429, 5xx, a broken connection, no answer within
  `timeout`. A `Retry-After` of up to two minutes is kept to.
- A judgement that fails for good (5xx, timeouts, an answer without a verdict, a refusal, a prompt
  that the endpoint does not take) is None, and counted by its reason. RewardUnavailableError stops
  the run, which can be resumed, when more than `max_failures` of the newest judgements failed,
  when every one of a call did at the server's hand, when the server cannot be reached, and when it
  says 429 to the last try.
- 401, 403, 404 and redirects are an error at once: no later judgement would do better.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import logging
import os
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neat_align.errors import RewardError, RewardUnavailableError
from neat_align.files.secrets import scrubbed
from neat_align.network.client import client_over
from neat_align.network.client_transport import ClientTransport, Limits
from neat_align.network.server_url import ServerKind, parse_url
from neat_align.rewards.judge_answers import NoVerdictError
from neat_align.rewards.judge_cache import JudgeCache, default_file, open_cache
from neat_align.rewards.judge_file import OPENAI_HOST, JudgeSettings
from neat_align.rewards.judge_prompts import Question

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

logger = logging.getLogger(__name__)
JUDGE_SERVER = ServerKind(
    "judge",
    "a judge's base_url",
    "the environment variable that api_key_env names",
    RewardError,
    RewardUnavailableError,
)
_MAX_RESPONSE_BYTES = 4 << 20
# How many of the newest judgements say whether too many fail, and how many are needed to say it.
_NEWEST, _ENOUGH = 200, 10
_TOP_LOGPROBS = 20
# What servers answer to a `response_format` that they do not know.
_NO_SUCH_FORMAT = (400, 415, 422, 501)
_EXCERPT = 200


@dataclass(frozen=True)
class Reply:
    """What the judge said. `first_token` are the alternatives of its first token with their
    log-probabilities in nats, where these were asked for.
    """

    text: str
    first_token: tuple[tuple[str, float], ...] = ()


@dataclass
class Counts:
    """Judgements and tokens; `failed` counts by reason. `calls` were answered by the endpoint."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)


class FailedError(Exception):
    """A judgement that failed; the message is the reason that is counted.

    `by_server`: the endpoint gave no answer, rather than one without a verdict.
    """

    def __init__(self, reason: str, *, by_server: bool = False, detail: str = "") -> None:
        super().__init__(reason)
        self.by_server, self.detail = by_server, detail


class JudgeClient:
    """Asks one judge. It lives as long as the run, and is used from one event loop at a time."""

    def __init__(self, settings: JudgeSettings, allow_http_hosts: Sequence[str] = ()) -> None:
        self.settings = settings
        self.target = parse_url(settings.base_url, JUDGE_SERVER, allow_http_hosts)
        _check_ready(settings, self.target.host)
        self._newest: deque[bool] = deque(maxlen=_NEWEST)
        # Whether the endpoint takes a JSON schema: None until one of the two has been seen.
        self._takes_schema: bool | None = None
        self._limits = Limits(settings.timeout, _MAX_RESPONSE_BYTES, settings.concurrency)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Connections and cache for one piece of work, in the event loop that runs it."""
        settings = self.settings
        from openai import AsyncOpenAI

        transport = ClientTransport(self.target, self._limits, settings.api_key_env)
        file = default_file() if settings.cache is True else Path(str(settings.cache))
        with open_cache(file if settings.cache else None) as cache:
            async with client_over(transport) as http:
                # The transport sends the key; the package would take any from the environment.
                client = AsyncOpenAI(
                    api_key="sent by the transport",
                    base_url=str(self.target.url),
                    http_client=http,
                    max_retries=settings.max_retries,
                    timeout=None,
                )
                yield Session(self, client, cache)

    # ---- what a request holds ----

    def body(self, question: Question, *, schema: bool) -> dict[str, Any]:
        """The request's JSON."""
        s = self.settings
        # OpenAI's own models know only the new name, and many servers only the old one.
        limit = "max_completion_tokens" if self.target.host == OPENAI_HOST else "max_tokens"
        body: dict[str, Any] = {
            "model": s.model,
            "messages": [{"role": "user", "content": question.text}],
            limit: s.max_tokens,
        }
        if s.temperature is not None:
            body["temperature"] = s.temperature
        if s.seed is not None:
            body["seed"] = s.seed
        if s.logprobs:
            body |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        elif schema and question.schema:
            form = {"name": question.key, "strict": True, "schema": dict(question.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        elif s.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body | s.extra_body

    def key(self, question: Question) -> bytes:
        """The judgement's place in the cache: all that decides it."""
        schema = self.settings.response_format in ("auto", "json_schema")
        told = [1, str(self.target.url), self.settings.response_format]
        content = json.dumps([*told, self.body(question, schema=schema)], sort_keys=True)
        return hashlib.sha256(content.encode("ascii")).digest()

    @property
    def asks_for_schema(self) -> bool:
        """Whether the next request has a JSON schema."""
        form = self.settings.response_format
        return form == "json_schema" or (form == "auto" and self._takes_schema is not False)

    def saw_schema(self, *, taken: bool) -> None:
        """Whether the endpoint took a JSON schema; the first answer to one decides."""
        if self._takes_schema is None and not taken:
            logger.info(
                "%s takes no JSON schema: from now on it is asked for JSON in words",
                self.target.said,
            )
        if self._takes_schema is None:
            self._takes_schema = taken

    @property
    def may_lack_schema(self) -> bool:
        """Whether a refused request may be asked again without a schema."""
        return self.settings.response_format == "auto" and self._takes_schema is not True

    # ---- what fails ----

    def note(self, *, failed: bool, reason: str = "") -> None:
        """One more judgement. Raises RewardUnavailableError when too many of the newest failed."""
        self._newest.append(failed)
        n, bad = len(self._newest), sum(self._newest)
        most = self.settings.max_failures
        if failed and (n >= _ENOUGH or most == 0) and bad > most * n:
            raise RewardUnavailableError(
                f"{self.target.said} failed on {bad} of the newest {n} judgements, the last time "
                f"with: {reason}. max_failures allows {most:g} of them; look at the judge's model, "
                "rubric and max_tokens"
            )


class Session:
    """A judge that is being asked."""

    def __init__(self, client: JudgeClient, api: AsyncOpenAI, cache: JudgeCache | None) -> None:
        self._client, self._api, self._cache = client, api, cache
        self._slots = asyncio.Semaphore(client.settings.concurrency)
        self.counts = Counts()
        self._asked = 0
        self._under_way: dict[bytes, asyncio.Future[Any]] = {}
        self._failures: list[FailedError] = []

    async def judgement(self, question: Question, read: Callable[[Reply], Any]) -> Any:
        """What `read` makes of the judge's answer; None where the judgement failed.

        `read` raises NoVerdictError for an answer without a verdict. Raises RewardUnavailableError
        and RewardError, see the module's docstring.
        """
        key = self._client.key(question)
        if key in self._under_way:  # equal answers to one prompt
            self.counts.cached += 1
            return await self._under_way[key]
        task = asyncio.ensure_future(self._judged(key, question, read))
        self._under_way[key] = task
        return await task

    async def _judged(self, key: bytes, question: Question, read: Callable[[Reply], Any]) -> Any:
        known = None if self._cache is None else self._cache.get(key)
        if known is not None:
            self.counts.cached += 1
            first = tuple((token, logprob) for token, logprob in known["first_token"])
            return read(Reply(known["text"], first))
        self._asked += 1
        try:
            async with self._slots:
                reply = await self._ask(question)
                verdict = _read(read, reply)
        except FailedError as error:
            self._failures.append(error)
            self.counts.failed[str(error)] += 1
            self._client.note(failed=True, reason=error.detail or str(error))
            return None
        self._client.note(failed=False)
        if self._cache is not None:
            self._cache.put(key, {"text": reply.text, "first_token": reply.first_token})
        return verdict

    def close(self) -> None:
        """The judgements are done: warn of those that failed.

        Raises RewardUnavailableError where the endpoint answered none of them.
        """
        failures, asked = self._failures, self._asked
        if not failures:
            return
        said = self._client.target.said
        if len(failures) == asked and all(error.by_server for error in failures):
            raise RewardUnavailableError(
                f"{said} gave no answer to any of {asked} judgements, the last time: "
                f"{failures[-1].detail or failures[-1]}"
            )
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.counts.failed.most_common())
        logger.warning(
            "%s failed on %d of %d judgements (%s): they abstain",
            said,
            len(failures),
            asked,
            reasons,
        )

    async def _ask(self, question: Question) -> Reply:
        """The judge's answer. FailedError for a judgement that failed."""
        import openai

        client, schema = self._client, self._client.asks_for_schema
        try:
            try:
                answer = await self._send(client.body(question, schema=schema))
            except openai.APIStatusError as error:
                if not (schema and client.may_lack_schema and error.status_code in _NO_SUCH_FORMAT):
                    raise
                answer = await self._send(client.body(question, schema=False))
                client.saw_schema(taken=False)
            else:
                if schema:
                    client.saw_schema(taken=True)
        except openai.APITimeoutError as error:
            seconds = client.settings.timeout
            raise FailedError(f"no answer within {seconds:g} s", by_server=True) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise RewardUnavailableError(
                f"{client.target.said} cannot be asked ({scrubbed(str(cause))[:_EXCERPT]}): given "
                f"up after {client.settings.max_retries + 1} tries"
            ) from error
        except openai.APIStatusError as error:
            raise self._refused(error) from error
        except (openai.APIError, ValueError) as error:
            if isinstance(error, RewardError):
                raise
            raise FailedError("answer that is no JSON", detail=_said(str(error))) from error
        return self._reply(answer)

    async def _send(self, body: Mapping[str, Any]) -> Any:
        """The endpoint's answer as JSON; the client's own types would fill in what is missing."""
        raw = await self._api.chat.completions.with_raw_response.create(
            model=body["model"],
            messages=body["messages"],
            extra_body={k: v for k, v in body.items() if k not in ("model", "messages")},
        )
        return json.loads(raw.content)

    def _refused(self, error: APIStatusError) -> Exception:
        """What a status means that no further try changed."""
        status, target = error.status_code, self._client.target
        said, variable = _said(error.response.text), self._client.settings.api_key_env
        answered = f"{target.said} answered {status}"
        if status == 401:
            key = f"the key in {variable}" if variable else "no key, since api_key_env is not set"
            return RewardError(f"{answered}: it was sent {key}; {said}")
        if status in (403, 404):
            return RewardError(
                f"{answered}: look at base_url, the model's name ({self._client.settings.model}) "
                f"and what the key may use; {said}"
            )
        if 300 <= status < 400:
            return RewardError(f"{answered}: redirects are not followed; give the final base_url")
        if status == 429:
            return RewardUnavailableError(f"{answered} to the last try: {said}")
        return FailedError(f"answered {status}", by_server=status >= 500, detail=f"{status} {said}")

    def _reply(self, answer: Any) -> Reply:
        """The text in an answer. FailedError where there is none."""
        usage = answer.get("usage") if isinstance(answer, dict) else None
        self.counts.calls += 1
        if isinstance(usage, dict):
            self.counts.prompt_tokens += _count(usage.get("prompt_tokens"))
            self.counts.completion_tokens += _count(usage.get("completion_tokens"))
        choices = answer.get("choices") if isinstance(answer, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            raise FailedError("answer without a choice", detail=_said(json.dumps(answer)))
        if message.get("refusal") or choice.get("finish_reason") == "content_filter":
            raise FailedError("refused", detail=_said(f"refused: {message.get('refusal')}"))
        if choice.get("finish_reason") == "length" and not self._client.settings.logprobs:
            raise FailedError("cut off at max_tokens")
        text = message.get("content")
        if not isinstance(text, str):
            raise FailedError("empty answer")
        return Reply(text, _first_token(choice.get("logprobs")))


def _check_ready(settings: JudgeSettings, host: str) -> None:
    """Before anything is paid for: the package is there, and the key."""
    if importlib.util.find_spec("openai") is None:
        raise RewardError(
            f"the judge {settings.name!r} is asked with the openai package, which is not "
            'installed: pip install "neat-align[judge]"'
        )
    variable = settings.api_key_env
    if variable and not os.environ.get(variable, "").strip():
        raise RewardError(
            f"the environment variable {variable}, which should hold the API key of {host} for the "
            f"judge {settings.name!r}, is not set: set it, or name another one (api_key_env)"
        )


def _read(read: Callable[[Reply], Any], reply: Reply) -> Any:
    try:
        return read(reply)
    except NoVerdictError as error:
        raise FailedError(str(error), detail=f"{error}: {_said(reply.text)}") from error


def _first_token(logprobs: Any) -> tuple[tuple[str, float], ...]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    top = first.get("top_logprobs") if isinstance(first, dict) else None
    entries = [e for e in top or () if isinstance(e, dict)]
    return tuple(
        (str(e["token"]), float(e["logprob"])) for e in entries if "token" in e and "logprob" in e
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _said(text: str) -> str:
    """What a server said, for a message: a line, without secrets."""
    return repr(scrubbed(" ".join(text.split()))[:_EXCERPT])
