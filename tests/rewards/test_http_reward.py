"""The HTTP reward against a real local server that is down, slow, busy, wrong or hostile; and the
address rules.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from neat_align import NEATConfig, NEATTrainer
from neat_align.errors import ConfigError, RewardError, RewardUnavailableError
from neat_align.network import addresses as addresses_module
from neat_align.network.addresses import checked_addresses, refusal
from neat_align.network.client import RetryPolicy
from neat_align.network.server_url import parse_url
from neat_align.rewards import http
from neat_align.rewards.http import (
    CONCURRENT_REQUESTS,
    REWARD_SERVER,
    TOKEN_VARIABLE,
    HttpReward,
    check_http_hosts,
    check_tokens,
)
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score
from ports import free_port
from reward_server import Asked, Handler, RewardServer, by_length, saying
from tiny import tiny_model, tiny_tokenizer

TOKEN = "canary-5f1e77a3b0"


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


class Client:
    """A reward whose pauses are written down instead of slept."""

    def __init__(self, server: RewardServer | str, **options: Any) -> None:
        self.pauses: list[float] = []
        url = server if isinstance(server, str) else server.url
        options = {"timeout": 5.0, "retry": RetryPolicy(tries=3), **options}
        self.reward = HttpReward(url, sleep=self._pause, rng=random.Random(0), **options)

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def __call__(
        self, *completions: Any, prompts: list[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        asked = prompts or ["p"] * len(completions)
        return asyncio.run(
            self.reward(asked, list(completions), [[1]] * len(completions), **columns)
        )


# ---- the contract --------------------------------------------------------------------------------


def test_the_request_and_the_answer_are_as_documented() -> None:
    chat = [{"role": "user", "content": "Hi \U0001f600 \ud800"}]
    with RewardServer() as server:
        client = Client(server)
        answers = client(
            "four",
            [{"role": "assistant", "content": "seven.."}],
            "",
            prompts=["p", chat, "q"],
            topic=["a", "b", "c"],
        )
    assert answers == [4.0, 7.0, None]
    (asked,) = server.asked
    assert asked.path == "/score"
    assert asked.headers["content-type"] == "application/json"
    assert "authorization" not in asked.headers
    assert json.loads(asked.body) == {
        "rows": [
            {"prompt": "p", "completion": "four"},
            {"prompt": chat, "completion": "seven.."},
            {"prompt": "q", "completion": ""},
        ]
    }


def test_rows_go_in_chunks_and_come_back_in_order() -> None:
    with RewardServer() as server:
        answers = Client(server, batch_size=3)(*("x" * n for n in range(1, 8)))
    assert answers == [1, 2, 3, 4, 5, 6, 7]
    # Requests under way at once come in any order.
    assert sorted((len(a.rows) for a in server.asked), reverse=True) == [3, 3, 1]


def test_a_url_is_a_reward_with_name_and_time_limit() -> None:
    with RewardServer() as server:
        (reward,) = resolve_rewards(server.url, None, timeout=2.5)
        assert isinstance(reward.function, HttpReward)
        assert reward.function.timeout == 2.5
        assert reward.timeout is None  # tries and pauses together may take longer
        assert reward.name == f"127.0.0.1_{server.port}_score"
        rows = score(
            (reward,),
            prompts=["p"] * 2,
            completions=["ab", ""],
            completion_ids=[[1], [2]],
            columns={"url": ["http://x", "y"]},
        )
    assert rows.rewards == (2.0, None)
    assert {a.path for a in server.asked} == {"/score"}


# ---- several requests at once --------------------------------------------------------------------


class Crowd:
    """How many requests are under way at once."""

    def __init__(self, held: float) -> None:
        self.held, self.now, self.most, self.lock = held, 0, 0, threading.Lock()
        self.clients: set[Any] = set()

    def __call__(self, handler: Handler, asked: Asked, number: int) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.clients.add(handler.client_address)
        time.sleep(self.held)
        with self.lock:
            self.now -= 1
        by_length(handler, asked, number)


def test_as_many_requests_as_the_limit_says_are_under_way_at_once() -> None:
    all_here = threading.Barrier(CONCURRENT_REQUESTS, timeout=5)

    def together(handler: Handler, asked: Asked, number: int) -> None:
        all_here.wait()
        by_length(handler, asked, number)

    with RewardServer(together) as server:
        texts = ["x" * n for n in range(1, CONCURRENT_REQUESTS + 1)]
        assert Client(server, batch_size=1)(*texts) == list(range(1, CONCURRENT_REQUESTS + 1))


def test_no_more_requests_than_the_limit_are_under_way_at_once() -> None:
    crowd = Crowd(held=0.02)
    with RewardServer(crowd) as server:
        assert Client(server, batch_size=2)(*["ab"] * 50) == [2.0] * 50
    assert crowd.most == CONCURRENT_REQUESTS
    assert len(server.asked) == 25


def test_the_order_is_the_rows_and_not_that_of_the_answers() -> None:
    def first_is_last(handler: Handler, asked: Asked, number: int) -> None:
        length = len(asked.rows[0]["completion"])
        time.sleep(0.05 * (6 - length))
        by_length(handler, asked, number)

    with RewardServer(first_is_last) as server:
        assert Client(server, batch_size=1)(*("x" * n for n in range(1, 7))) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (400, RewardError, "answered 400, where 200 was needed"),
        (503, RewardUnavailableError, "answered 503: given up on rows 2 to 3 after 3 tries"),
    ],
)
def test_one_chunk_that_fails_ends_the_others(status: int, kind: type, message: str) -> None:
    under_way, over = threading.Event(), threading.Event()

    def failing(handler: Handler, asked: Asked, number: int) -> None:
        if number + 1 == CONCURRENT_REQUESTS:
            under_way.set()
        if asked.rows[0]["completion"] == "bad":
            under_way.wait(10)
            return handler.answer(status, b"")
        over.wait(10)  # the others would take this long
        return by_length(handler, asked, number)

    started = time.monotonic()
    with RewardServer(failing) as server:
        with pytest.raises(RewardError, match=message) as caught:
            Client(server, batch_size=2, timeout=30.0)("a", "b", "bad", "c", *["d"] * 60)
        over.set()
    assert type(caught.value) is kind
    assert time.monotonic() - started < 5
    asked = {row["completion"] for request in server.asked for row in request.rows}
    assert asked == {"a", "b", "bad", "c", "d"}
    assert len(server.asked) <= CONCURRENT_REQUESTS + 2  # of 32, the tries of the bad one included


def test_connections_are_used_again_and_a_queue_costs_no_time_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.1")  # connections stay open
    monkeypatch.setattr(http, "CONCURRENT_REQUESTS", 2)
    crowd = Crowd(held=0.1)
    with RewardServer(crowd) as server:
        client = Client(server, batch_size=1, timeout=0.35)
        assert client(*["ab"] * 10) == [2.0] * 10  # half a second in all
    assert client.pauses == []
    assert len(crowd.clients) == 2


def test_it_works_where_an_event_loop_runs_and_in_another_thread() -> None:
    def scored() -> Any:
        rewards = resolve_rewards(server.url, None)
        return score(
            rewards, prompts=["p"], completions=["ab"], completion_ids=[[1]], columns={}
        ).rewards

    async def in_a_notebook() -> Any:
        return scored()

    with RewardServer() as server:
        assert asyncio.run(in_a_notebook()) == (2.0,)
        with ThreadPoolExecutor(2) as pool:
            assert [f.result() for f in [pool.submit(scored) for _ in range(4)]] == [(2.0,)] * 4


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_an_interrupt_ends_the_requests(in_a_loop: bool) -> None:
    over = threading.Event()

    def stall(handler: Handler, asked: Asked, number: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        over.wait(10)

    def scored() -> Any:
        rewards = resolve_rewards(server.url, None)
        return score(rewards, prompts=["p"], completions=["a"], completion_ids=[[1]], columns={})

    async def in_a_notebook() -> Any:
        return scored()

    loop, started = asyncio.new_event_loop(), time.monotonic()
    with RewardServer(stall) as server:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(in_a_notebook()) if in_a_loop else scored()
        over.set()
    loop.close()
    assert time.monotonic() - started < 5
    assert len(server.asked) == 1


# ---- what may pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_it_is_tried_again_and_then_fine(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with (
        RewardServer(saying((status, b"no"), (status, b"no"))) as server,
        caplog.at_level(logging.WARNING, "neat_align"),
    ):
        client = Client(server)
        assert client("abc") == [3.0]
    assert len(server.asked) == 3
    rng = random.Random(0)
    assert client.pauses == [1.0 * (1 - rng.random() / 2), 2.0 * (1 - rng.random() / 2)]
    assert [r.message.partition(";")[0] for r in caplog.records] == [
        f"the reward server {client.reward.name} answered {status}"
    ] * 2


def test_pauses_double_up_to_the_longest_and_differ_between_runs() -> None:
    policy = RetryPolicy(first_pause=1, longest_pause=30)
    assert [policy.pause(n, None, _Fixed(0.0)) for n in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]
    assert [policy.pause(n, None, _Fixed(1.0)) for n in (1, 7)] == [0.5, 15]
    assert policy.pause(1, 7.0, _Fixed(0.0)) == 7.0
    assert policy.pause(5, 7.0, _Fixed(0.0)) == 16.0


class _Fixed(random.Random):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


def test_retry_after_is_kept_to() -> None:
    date = email.utils.formatdate(time.time() + 50, usegmt=True)
    with RewardServer(
        saying((429, b"", {"Retry_After": "20"}), (503, b"", {"Retry_After": date}))
    ) as server:
        client = Client(server)
        assert client("abc") == [3.0]
    assert client.pauses[0] == 20.0
    assert 45 < client.pauses[1] <= 50


def test_a_retry_after_that_cannot_be_read_is_no_pause() -> None:
    with RewardServer(
        saying((429, b"", {"Retry_After": "soon"}), (429, b"", {"Retry_After": "-5"}))
    ) as server:
        client = Client(server)
        assert client("abc") == [3.0]
    assert max(client.pauses) <= 2


def test_a_longer_pause_than_the_limit_stops_at_once() -> None:
    with RewardServer(saying((429, b"", {"Retry_After": "3600"}))) as server:
        client = Client(server)
        with pytest.raises(
            RewardUnavailableError,
            match=r"answered 429 and asks for a pause of 3600 s, for rows 0 to 0",
        ):
            client("abc")
    assert client.pauses == []
    assert len(server.asked) == 1


def test_a_server_that_stays_down_is_unavailable_and_never_a_score() -> None:
    client = Client(f"http://127.0.0.1:{free_port()}/score")
    with pytest.raises(
        RewardUnavailableError,
        match=r"cannot be asked \(ConnectionRefusedError.*given up on rows 0 to 1 after 3 tries",
    ):
        client("abc", "d")
    assert len(client.pauses) == 2
    with (
        RewardServer(saying(*[(500, b"")] * 9)) as server,
        pytest.raises(RewardUnavailableError, match="answered 500"),
    ):
        Client(server)("abc")
    assert len(server.asked) == 3


def stalling(handler: Handler, asked: Asked, number: int) -> None:
    time.sleep(0.6)


def dripping(handler: Handler, asked: Asked, number: int) -> None:
    """A byte now and then: each one starts a socket's own timeout anew."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def dripping_headers(handler: Handler, asked: Asked, number: int) -> None:
    for byte in b"HTTP/1.0 200 OK\r\nServer: slow and slower\r\n":
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("slow", [stalling, dripping, dripping_headers])
def test_a_slow_server_times_out_as_a_whole(slow: Any) -> None:
    with RewardServer(slow) as server:
        client, started = Client(server, timeout=0.25, retry=RetryPolicy(tries=2)), time.monotonic()
        with pytest.raises(RewardUnavailableError, match=r"no complete answer within 0\.25 s"):
            client("abc")
        assert time.monotonic() - started < 1.5
    assert len(server.asked) == 2
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer)]


def test_no_limit_of_the_client_is_shorter_than_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[Any] = []
    send = httpx2.AsyncHTTPTransport.handle_async_request

    async def noted(transport: Any, request: httpx2.Request) -> httpx2.Response:
        limits.extend(request.extensions["timeout"].values())
        return await send(transport, request)

    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", noted)
    with RewardServer() as server:
        assert Client(server)("abc") == [3.0]
    assert limits == [None] * 4


def closing_halfway(handler: Handler, asked: Asked, number: int) -> None:
    if number:
        return by_length(handler, asked, number)
    handler.send_response(200)
    handler.send_header("Content-Length", "50")
    handler.end_headers()
    handler.wfile.write(b'{"rewards": [1.0]}')
    return None


def closing_within_a_chunk(handler: Handler, asked: Asked, number: int) -> None:
    if number:
        return by_length(handler, asked, number)
    handler.wfile.write(
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{"rewards": [1.0]}'
    )
    return None


def closing_before_an_answer(handler: Handler, asked: Asked, number: int) -> None:
    if number:
        by_length(handler, asked, number)


@pytest.mark.parametrize(
    "closing", [closing_halfway, closing_within_a_chunk, closing_before_an_answer]
)
def test_a_broken_connection_is_tried_again_and_half_an_answer_is_none(closing: Any) -> None:
    with RewardServer(closing) as server:
        client = Client(server)
        assert client("abc") == [3.0]
    assert len(client.pauses) == 1


# ---- what will not pass --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, b"bad rows"), r"answered 400, where 200 was needed: 'bad rows'"),
        ((401, b"who"), r"answered 401.*set the environment variable NEAT_ALIGN_REWARD_TOKEN"),
        ((403, b"no"), r"answered 403.*may not use it"),
        ((404, b"<html>"), r"answered 404.*<html>"),
        ((204, b""), r"answered 204"),
        ((200, b"<!doctype html><title>Sign in</title>"), r"did not answer with JSON.*Sign in"),
        ((200, b""), r"did not answer with JSON"),
        ((200, b'{"rewards": [1.0, 2.0'), r"did not answer with JSON"),
        ((200, b"\xff\xfe"), r"did not answer with JSON"),
        ((200, b"[" * 100_000), r"did not answer with JSON"),
        (
            (200, b"[1.0, 2.0]"),
            r"must answer \{.rewards.: \[\.\.\.\]\}, but it said '\[1\.0, 2\.0\]'",
        ),
        ((200, b'{"rewards": {"a": 1}}'), r"must answer"),
        ((200, b'{"scores": [1, 2]}'), r"must answer"),
        ((200, b'{"rewards": [1.0]}'), r"returned 1 scores for 2 completions"),
        ((200, b'{"rewards": [1.0, 2.0, 3.0]}'), r"returned 3 scores for 2 completions"),
        (
            (200, b'{"rewards": [1.0, NaN]}'),
            r"returned nan, for row 1, whose completion begins 'second'",
        ),
        ((200, b'{"rewards": [1.0, -Infinity]}'), r"returned -inf, for row 1"),
        ((200, b'{"rewards": [1e999, 1.0]}'), r"returned inf, for row 0"),
        ((200, b'{"rewards": [1.0, "2.0"]}'), r"returned str '2.0', which is not a number"),
        ((200, b'{"rewards": [1.0, true]}'), r"which is not a number"),
        ((200, b'{"rewards": [1.0, 2.0]}', {"Content_Encoding": "gzip"}), r"compressed its answer"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(reply: Any, message: str) -> None:
    with RewardServer(saying(reply)) as server:
        client = Client(server)
        with pytest.raises(RewardError, match=message) as caught:
            client("first", "second")
    assert not isinstance(caught.value, RewardUnavailableError)
    assert len(server.asked) == 1
    assert client.pauses == []


def test_each_chunk_has_its_own_number_of_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too few here and one too many there would give the right number, and each row another's
    reward.
    """
    one, three = b'{"rewards": [1.0]}', b'{"rewards": [1.0, 2.0, 3.0]}'
    monkeypatch.setattr(http, "CONCURRENT_REQUESTS", 1)  # in this order
    with (
        RewardServer(saying((200, one), (200, three))) as server,
        pytest.raises(RewardError, match="1 scores for 2 completions"),
    ):
        Client(server, batch_size=2)("a", "b", "c", "d")


@pytest.mark.parametrize("announced", ["1000000000000", "9" * 5000, None])
def test_a_huge_answer_is_not_read(announced: str | None) -> None:
    sent = 0

    def huge(handler: Handler, asked: Asked, number: int) -> None:
        nonlocal sent
        handler.send_response(200)
        if announced:
            handler.send_header("Content-Length", announced)
        handler.end_headers()
        for _ in range(2_000):
            handler.wfile.write(b" " * 65_536)
            sent += 65_536

    with (
        RewardServer(huge) as server,
        pytest.raises(RewardError, match=r"an answer of more than 100000 bytes"),
    ):
        Client(server, max_response_bytes=100_000)("abc")
    assert sent < 30_000_000


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_token_goes_nowhere(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    refused = pytest.raises(RewardError, match=rf"answered {status}.*redirects are not followed")
    with (
        RewardServer() as other,
        RewardServer(saying((status, b"", {"Location": other.url}))) as server,
        refused,
    ):
        Client(server)("abc")
    assert other.asked == []
    assert len(server.asked) == 1


# ---- tokens --------------------------------------------------------------------------------------


def test_the_token_of_the_host_goes_before_the_general_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with RewardServer() as server:
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        Client(server)("abc")
        monkeypatch.setenv(f"{TOKEN_VARIABLE}_127_0_0_1", "its-own")
        Client(server)("abc")
    assert [a.headers["authorization"] for a in server.asked] == [
        f"Bearer {TOKEN}",
        "Bearer its-own",
    ]


def test_a_server_that_says_the_token_back_does_not_put_it_into_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)

    def echoing(handler: Handler, asked: Asked, number: int) -> None:
        handler.answer(400 if number % 2 else 200, json.dumps(asked.headers).encode())

    with RewardServer(echoing) as server:
        for _ in range(2):
            with pytest.raises(RewardError) as caught:
                Client(server, retry=RetryPolicy(tries=1))("abc")
            assert "[redacted]" in str(caught.value)
            assert TOKEN not in str(caught.value)
    assert TOKEN not in repr(vars(Client(server).reward))


@pytest.mark.parametrize("bad", [f"{TOKEN}\nX-Injected: 1", f"{TOKEN} more", f"{TOKEN}\N{SNOWMAN}"])
def test_a_token_that_is_none_is_refused_and_not_shown(
    bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, bad)
    with (
        RewardServer() as server,
        pytest.raises(RewardError, match=f"variable {TOKEN_VARIABLE} holds") as caught,
    ):
        Client(server)("abc")
    assert TOKEN not in str(caught.value)
    assert server.asked == []


def test_one_token_is_not_for_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [
        "https://a.example/score",
        "https://a.example/other",
        "https://b-c.example",
        "https://b.c.example",
    ]
    resolve_rewards(urls, None)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    resolve_rewards(urls[:2], None)
    with pytest.raises(RewardError, match=r"would be sent to a\.example and to b-c\.example"):
        resolve_rewards(urls, None)
    monkeypatch.setenv(f"{TOKEN_VARIABLE}_A_EXAMPLE", "1")
    resolve_rewards(urls[:3], None)
    with pytest.raises(RewardError, match=r"to b-c\.example and to b\.c\.example"):
        check_tokens([HttpReward(u) for u in urls])


# ---- URLs and addresses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/score", "is not encrypted"),
        ("http://10.0.0.5/score", "http is not encrypted"),
        ("http://2130706433/", "is not encrypted"),
        ("http://localhost.example.com/", "is not encrypted"),
        ("https://169.254.169.254/latest/meta-data", "link-local or cloud metadata"),
        ("https://[fd00:ec2::254]/", "link-local or cloud metadata"),
        ("https://[fe80::1%25eth0]/", "link-local"),
        ("https://[::ffff:169.254.169.254]/", "link-local"),
        ("https://0.0.0.0/", "unspecified"),
        ("http://0.0.0.0:8000/", "unspecified"),
        ("https://[::]/", "unspecified"),
        ("ftp://example.com/", "begins with https://"),
        ("file:///etc/passwd", "begins with https://"),
        (f"https://user:{TOKEN}@example.com/", "user name or password"),
        (f"https://{TOKEN}@example.com/", "user name or password"),
        (f"ftp://user:{TOKEN}@example.com/", "begins with https://"),
        (f"https://example.com/?key={TOKEN}", "query or fragment"),
        (f"https://example.com/#{TOKEN}", "query or fragment"),
        (f"https://example.com:{TOKEN}/", "port that is no number"),
        ("https://example.com:99999/", "port that is no number"),
        ("https:///score", "needs a host"),
        (f"https://[{TOKEN}/", "cannot be read"),
        ("https://example.com/a b", "printable ASCII"),
        ("https://example.com\\@evil.example/", "printable ASCII"),
        ("https://bücher.example/", "printable ASCII"),
        ("https://example.com/\r\nHost: evil", "printable ASCII"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        resolve_rewards(url, None)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:80/",
        "http://127.0.0.1/s",
        "http://127.8.8.8:1/",
        "http://[::1]:8000/s",
        "https://10.1.2.3",
    ],
)
def test_urls_that_are_taken(url: str) -> None:
    assert parse_url(url, REWARD_SERVER).path.startswith("/")


# fmt: off
REFUSED = [
    "169.254.169.254", "169.254.170.2", "169.254.0.1", "fe80::1", "fe80::1%2", "fd00:ec2::254",
    "fd00:ec2::23", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192",
    "0.0.0.0", "0.1.2.3", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "240.0.0.1",
    "::ffff:169.254.169.254", "::ffff:0.0.0.0", "64:ff9b::169.254.169.254",
    "2002:a9fe:a9fe::1", "::ffff:100.100.100.200",
]
# fmt: on


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_that_are_never_asked(address: str) -> None:
    assert refusal(address, encrypted=True) is not None
    assert refusal(address, encrypted=False) is not None


def test_what_is_asked_with_and_without_encryption() -> None:
    for address in (
        "93.184.216.34",
        "10.0.0.5",
        "192.168.1.1",
        "2606:4700::1111",
        "fd12::1",
        "64:ff9b::8.8.8.8",
    ):
        assert refusal(address, encrypted=True) is None
        assert "use https" in (refusal(address, encrypted=False) or "")
    for address in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert refusal(address, encrypted=True) is None
        assert refusal(address, encrypted=False) is None


def answering(*addresses: str) -> Callable[..., Any]:
    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    return getaddrinfo


def test_a_name_is_refused_for_any_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        addresses_module.socket, "getaddrinfo", answering("93.184.216.34", "169.254.169.254")
    )
    with pytest.raises(RewardError, match=r"judge\.example \(169\.254\.169\.254\) is a link-local"):
        asyncio.run(
            checked_addresses("judge.example", 443, "reward server", RewardError, encrypted=True)
        )
    with pytest.raises(RewardError, match="nothing was sent there"):
        Client("https://judge.example/")("abc")
    monkeypatch.setattr(addresses_module.socket, "getaddrinfo", answering("192.168.1.7"))
    with pytest.raises(
        RewardError, match=r"localhost \(192\.168\.1\.7\) is not this machine's own"
    ):
        Client("http://localhost:1/")("abc")


def test_the_connection_goes_to_the_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that changes its answer after the check (DNS rebinding) is asked for once a
    connection.
    """
    asked: list[str] = []
    connected: list[Any] = []
    real_connect = BaseSelectorEventLoop.sock_connect

    def getaddrinfo(host: str | bytes, port: int, *_: Any, **__: Any) -> list[Any]:
        host = host.decode() if isinstance(host, bytes) else host  # asyncio and anyio differ
        asked.append(host)
        first = asked.count("localhost") == 1
        return answering("127.0.0.1" if first else "169.254.169.254")(host, port)

    async def connect(loop: Any, sock: socket.socket, address: Any) -> None:
        connected.append(address)
        await real_connect(loop, sock, ("127.0.0.1", address[1]))

    monkeypatch.setattr(addresses_module.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(BaseSelectorEventLoop, "sock_connect", connect)
    with RewardServer() as server:
        assert Client(f"http://localhost:{server.port}/score")("abc") == [3.0]
        assert server.asked[0].headers["host"] == f"localhost:{server.port}"
    assert connected == [("127.0.0.1", server.port)]
    assert asked.count("localhost") == 1


def test_the_next_address_is_tried_when_one_takes_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses_module.socket, "getaddrinfo", answering("127.0.0.2", "127.0.0.1"))
    with RewardServer() as server:
        client = Client(f"http://localhost:{server.port}/score")
        assert client("abc") == [3.0]
    assert client.pauses == []


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with RewardServer() as server:
        assert Client(server)("abc") == [3.0]


# ---- plain http inside a cluster -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "patterns"),
    [
        ("http://judge.svc/score", []),
        ("http://judge.svc/score", ["*.svc.cluster.local"]),
        ("http://judge.svc.evil.example/", ["*.svc"]),
        ("http://notsvc/", ["*.svc"]),
        ("http://10.0.0.5/score", []),
        ("http://10.0.0.55/score", ["10.0.0.5"]),
    ],
)
def test_plain_http_to_a_cluster_is_refused_with_advice(url: str, patterns: list[str]) -> None:
    with pytest.raises(RewardError, match="is not encrypted") as caught:
        resolve_rewards(url, None, allow_http_hosts=patterns)
    assert "use https" in str(caught.value)
    assert "allow_http_hosts" in str(caught.value)


@pytest.mark.parametrize(
    ("host", "pattern", "address"),
    [
        ("judge.team.svc", "*.svc", "10.96.0.7"),
        ("Judge.team.svc.cluster.local", "*.SVC.cluster.local", "fd12::7"),
        ("judge", "judge", "192.168.3.4"),
        ("172.20.0.5", "172.20.0.*", "172.20.0.5"),
    ],
)
def test_a_named_host_is_asked_over_plain_http(
    host: str, pattern: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[Any] = []
    real_connect = BaseSelectorEventLoop.sock_connect

    async def connect(loop: Any, sock: socket.socket, to: Any) -> None:
        connected.append(to[0])
        if sock.family == socket.AF_INET6:  # this machine may have no IPv6
            raise ConnectionRefusedError(to)
        await real_connect(loop, sock, ("127.0.0.1", server.port))

    monkeypatch.setattr(addresses_module.socket, "getaddrinfo", answering(address))
    monkeypatch.setattr(BaseSelectorEventLoop, "sock_connect", connect)
    with RewardServer() as server:
        client = Client(f"http://{host}:8000/score", allow_http_hosts=["other", pattern])
        if ":" in address:
            with pytest.raises(RewardUnavailableError):
                client("abc")
        else:
            assert client("abc") == [3.0]
            assert server.asked[0].headers["host"] == f"{host}:8000"
    assert set(connected) == {address}


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_that_are_never_asked_whoever_names_them(address: str) -> None:
    assert refusal(address, encrypted=False, allowed=True) == refusal(address, encrypted=True)


def test_a_named_host_must_have_private_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("10.0.0.5", "192.168.1.1", "172.31.0.1", "100.64.0.1", "fd12::1", "127.0.0.1"):
        assert refusal(address, encrypted=False, allowed=True) is None
    for address in ("93.184.216.34", "172.32.0.1", "2606:4700::1111", "64:ff9b::10.0.0.5"):
        assert "not a private address" in (refusal(address, encrypted=False, allowed=True) or "")
    for address, message in (
        ("169.254.169.254", r"judge\.svc \(169\.254\.169\.254\) is a link-local or cloud metadata"),
        ("93.184.216.34", r"judge\.svc \(93\.184\.216\.34\) is not a private address.*use https"),
    ):
        monkeypatch.setattr(addresses_module.socket, "getaddrinfo", answering("10.0.0.5", address))
        with pytest.raises(RewardError, match=message):
            Client("http://judge.svc/", allow_http_hosts=["*.svc"])("abc")
    with pytest.raises(RewardError, match="link-local or cloud metadata"):
        Client("http://169.254.169.254/", allow_http_hosts=["169.254.169.254"])


@pytest.mark.parametrize(
    "pattern",
    ["", "*", "*.*", "http://judge.svc", "judge.svc/score", "10.0.0.0/8", "a b", "*.s[v]c"],
)
def test_a_pattern_that_names_no_host_or_every_host_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="allow_http_hosts has the entry"):
        resolve_rewards("http://judge.svc/", None, allow_http_hosts=["*.svc", pattern])


def test_allow_http_hosts_that_no_reward_needs_is_refused() -> None:
    needed = [
        r.function for r in resolve_rewards("http://a.svc/", None, allow_http_hosts=["*.svc"])
    ]
    others = [
        r.function
        for r in resolve_rewards(
            ["vader", "https://b.svc/", "http://localhost/"], None, allow_http_hosts=["*.svc"]
        )
    ]
    check_http_hosts(None, [])
    check_http_hosts(None, others)
    check_http_hosts(["*.svc"], [*needed, *others])
    for rewards in ([], others):
        with pytest.raises(ConfigError, match=r"allow_http_hosts is \['\*\.svc'\], but no reward"):
            check_http_hosts(["*.svc"], rewards)


def test_the_trainer_passes_allow_http_hosts_on_and_refuses_it_where_nothing_reads_it(
    tmp_path: Path,
) -> None:
    tokenizer = tiny_tokenizer()

    def trainer(reward: Any, judge: Any = None) -> NEATTrainer:
        args = NEATConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_prompt_length=300,
            max_completion_length=8,
            allow_http_hosts=["*.svc"],
        )
        return NEATTrainer(
            tiny_model("llama", len(tokenizer), tokenizer=tokenizer),
            reward,
            args,
            train_dataset=[{"prompt": [{"role": "user", "content": "Hi"}]}],
            processing_class=tokenizer,
            judge_funcs=judge,
        )

    def longest(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [float(len(c)) for c in completions]

    with pytest.raises(ConfigError, match="no reward or judge is an http"):
        trainer(longest)
    assert trainer("http://a.svc/").parts.scored_by.rewards[0].function.target.allowed
    assert trainer(longest, "http://a.svc/").parts.scored_by.judges[0].function.target.allowed


@pytest.mark.skipif(
    shutil.which("openssl") is None, reason="needs the openssl command to make a certificate"
)
def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    made = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {cert} -days 2"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*made.split(), *subject], check=True, capture_output=True)
    with RewardServer(certificate=(cert, key)) as server:
        client = Client(f"https://localhost:{server.port}/score")
        with pytest.raises(RewardError, match=r"certificate .* is not valid: self-signed"):
            client("abc")
        with monkeypatch.context() as patched:  # no other address hides what is wrong
            patched.setattr(
                addresses_module.socket, "getaddrinfo", answering("127.0.0.1", "127.0.0.2")
            )
            with pytest.raises(RewardError, match=r"certificate .* is not valid: self-signed"):
                client("abc")
        assert client.pauses == []
        monkeypatch.setenv("SSL_CERT_FILE", cert)
        assert client("abc") == [3.0]
        with pytest.raises(RewardError, match=r"certificate .* is not valid: IP address mismatch"):
            Client(server)("abc")
    assert len(server.asked) == 1
