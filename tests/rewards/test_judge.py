"""A judge against a real local endpoint that speaks the OpenAI protocol, well and badly."""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judge_server import by_length, completion, first_saying, judge_file, judging, question
from neat_align.errors import ConfigError, RewardError, RewardUnavailableError
from neat_align.rewards.http import check_http_hosts, check_tokens
from neat_align.rewards.judge import JudgeReward
from neat_align.rewards.judge_answers import (
    NoVerdictError,
    expected_score,
    read_order,
    read_score,
    read_verdict,
)
from neat_align.rewards.judge_forms import both_orders, place_scores, schedule, win_rates
from neat_align.rewards.protocol import ScoredRows
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score
from ports import free_port
from reward_server import RewardServer

KEY = "canary-key-77b1f0"


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)


def scored(
    spec: str, completions: Sequence[str], prompts: Sequence[Any] | None = None, **extra: Any
) -> ScoredRows:
    return score(
        resolve_rewards(spec, None),
        prompts=prompts or ["p"] * len(completions),
        completions=list(completions),
        completion_ids=[[1]] * len(completions),
        columns={},
        **extra,
    )


def always(status: int, body: bytes, **headers: str) -> RewardServer:
    return RewardServer(lambda handler, asked, number: handler.answer(status, body, **headers))


# ---- the three forms -----------------------------------------------------------------------------


def test_a_pointwise_judge_is_asked_by_its_rubric_and_gives_scores_on_its_scale(
    tmp_path: Path,
) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with RewardServer(judging(by_length)) as server:
        spec = judge_file(tmp_path, server, seed=7, prices={"input": 2.0, "output": 10.0})
        rows = scored(spec, ["four", "seven.."], [chat, "Hi?"])
    assert rows.rewards == (4.0, 7.0)
    assert rows.extra == {"strict/reasoning": ("by length", "by length")}
    assert rows.totals == {
        "judge/strict/calls": 2,
        "judge/strict/cached": 0,
        "judge/strict/failed": 0,
        "judge/strict/prompt_tokens": 200,
        "judge/strict/completion_tokens": 20,
        "judge/strict/cost": pytest.approx((200 * 2.0 + 20 * 10.0) / 1e6),
    }
    assert {a.path for a in server.asked} == {"/v1/chat/completions"}
    (asked,) = [q for q in map(question, server.asked) if q["ANSWER"] == "four"]
    assert asked["CONVERSATION"] == "SYSTEM: Be brief.\n\nUSER: Hi"
    assert "How helpful is the answer" in asked["text"]
    assert "from 1 (worst) to 10 (best)" in asked["text"]
    body = {k: v for k, v in asked["body"].items() if k not in ("messages", "response_format")}
    assert body == {"model": "judge", "temperature": 0.0, "max_tokens": 1024, "seed": 7}
    form = asked["body"]["response_format"]["json_schema"]
    assert form["strict"] is True
    assert list(form["schema"]["properties"]) == ["reasoning", "score"]
    assert form["schema"]["properties"]["score"]["enum"] == list(range(1, 11))


def test_pairs_are_judged_in_both_orders_and_win_rates_are_as_derived_by_hand(
    tmp_path: Path,
) -> None:
    with RewardServer(judging(by_length)) as server:
        spec = judge_file(tmp_path, server, form="pairwise")
        # "p": 3 beats 2 and 1, the two of length 2 tie: (0 + 0 + 0)/3 for 1, (1 + ½ + 0)/3, …
        # "q" has one answer, which meets nobody.
        rows = scored(spec, ["a", "bb", "cc", "ddd", "x"], ["p", "p", "p", "p", "q"])
    assert rows.rewards == (0.0, 0.5, 0.5, 1.0, None)
    seen = Counter((q["ANSWER A"], q["ANSWER B"]) for q in map(question, server.asked))
    assert len(seen) == 4 * 3
    assert set(seen.values()) == {1}
    assert all((b, a) in seen for a, b in seen)


def test_a_judge_that_always_prefers_the_first_gives_ties_alone(tmp_path: Path) -> None:
    with RewardServer(judging(lambda asked: {"better": "A"})) as server:
        rows = scored(judge_file(tmp_path, server, form="pairwise"), ["a", "bb", "ccc"])
    assert rows.rewards == (0.5, 0.5, 0.5)


def test_answers_are_held_against_the_chosen_one(tmp_path: Path) -> None:
    with RewardServer(judging(by_length)) as server:
        spec = judge_file(tmp_path, server, form="pairwise", against="chosen")
        chosen = ["bb", "bb", "bb", None]
        answers = {"chosen": chosen, "rejected": [None] * 4}
        rows = scored(spec, ["a", "cc", "ddd", "e"], answers=answers, on_bad_row="skip")
    assert rows.rewards == (0.0, 0.5, 1.0, None)
    assert len(server.asked) == 6
    assert "has no chosen answer" in rows.left_out[0].reason
    (reward,) = resolve_rewards(spec, None)
    assert isinstance(reward.function, JudgeReward)
    assert list(reward.function.unscorable_answers(chosen)) == [3]


def test_a_group_is_ranked_in_an_order_and_its_reverse(tmp_path: Path) -> None:
    with RewardServer(judging(by_length)) as server:
        spec = judge_file(tmp_path, server, form="ranking")
        rows = scored(spec, ["a", "ccc", "bb", "x"], ["p", "p", "p", "q"])
    assert rows.rewards == (0.0, 1.0, 0.5, None)
    first, second = map(question, server.asked)
    shown = [[q[f"ANSWER {x}"] for x in "ABC"] for q in (first, second)]
    assert shown[0] == shown[1][::-1]
    assert sorted(shown[0]) == ["a", "bb", "ccc"]


def test_a_ranking_that_follows_the_position_says_that_all_are_alike(tmp_path: Path) -> None:
    with RewardServer(judging(lambda asked: {"ranking": ["A", "B", "C"]})) as server:
        rows = scored(judge_file(tmp_path, server, form="ranking"), ["a", "bb", "ccc"])
    assert rows.rewards == (0.5, 0.5, 0.5)


def test_win_rates_and_places_by_hand() -> None:
    # 0 beats 1, 0 ties 2, 1 against 2 failed.
    assert win_rates(4, {(0, 1): 1.0, (0, 2): 0.5, (1, 2): None}) == [0.75, 0.0, 0.5, None]
    # Best first: 2, 0, 1, 3 and 0, 2, 1, 3. Places of 0: 2nd and 1st, (2/3 + 3/3) / 2.
    assert place_scores([[2, 0, 1, 3], [0, 2, 1, 3]]) == pytest.approx([5 / 6, 1 / 3, 5 / 6, 0])


@pytest.mark.parametrize(
    ("there", "back", "expected"),
    [
        ("A", "B", 1.0),
        ("B", "A", 0.0),
        ("A", "A", 0.5),
        ("B", "B", 0.5),
        ("tie", "tie", 0.5),
        ("A", "tie", 0.5),
        (None, "B", None),
        ("A", None, None),
    ],
)
def test_two_orders_make_one_result(
    there: str | None, back: str | None, expected: float | None
) -> None:
    assert both_orders(there, back) == expected


@given(st.integers(2, 12), st.integers(1, 12))
def test_in_a_schedule_each_answer_meets_as_many_others(n: int, opponents: int) -> None:
    pairs = schedule(n, opponents)
    met = Counter(i for pair in pairs for i in pair)
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= i < j < n for i, j in pairs)
    assert set(met) == set(range(n))
    assert len(set(met.values())) == 1
    most = min(opponents, n - 1)
    assert met[0] in (most, most - 1, 2 if opponents == 1 and n % 2 else most)
    if most % 2 == 0 or n % 2 == 0:
        assert met[0] == most


# ---- reading answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"reasoning": "so", "score": 7}',
        '```json\n{"score": 7}\n```',
        'I looked at it. {"score": 7} is what it gets.',
        '<think>{"score": 2} or so?</think>{"score": 7.0}',
        '{"score": "7"}',
        "7",
        " 7\n",
        '{"score": 7} as said: {"score": 7}',
        'Not {this}: {"score": 7}',
    ],
)
def test_a_verdict_is_read(text: str) -> None:
    assert read_score(read_verdict(text, "score").value, (1, 10)) == 7.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty answer"),
        ("<think>hm</think>  ", "empty answer"),
        ("I would say 7 of 10.", "not the JSON"),
        ('{"score": 7', "not the JSON"),
        ('{"rating": 7}', "not the JSON"),
        ("[7]", "not the JSON"),
        ('{"score": 7} no, {"score": 3}', "several verdicts that differ"),
        ('{"score": 85}', "outside of the scale"),
        ('{"score": 0}', "outside of the scale"),
        ('{"score": null}', "no number"),
        ('{"score": true}', "no number"),
        ('{"score": "seven"}', "no number"),
        ('{"score": NaN}', "no number"),
        ('{"score": [7]}', "no number"),
        ("[" * 100_000, "not the JSON"),
    ],
)
def test_an_answer_without_a_verdict_is_never_a_number(text: str, reason: str) -> None:
    with pytest.raises(NoVerdictError, match=reason):
        read_score(read_verdict(text, "score").value, (1, 10))


@given(st.text())
def test_no_text_whatsoever_breaks_the_reader(text: str) -> None:
    try:
        number = read_score(read_verdict(text, "score").value, (1, 10))
    except NoVerdictError:
        return
    assert 1 <= number <= 10


@pytest.mark.parametrize("value", [["A", "B"], ["A", "A", "B"], ["A", "B", "D"], "ABC", None])
def test_a_ranking_names_every_answer_once(value: Any) -> None:
    with pytest.raises(NoVerdictError):
        read_order(value, 3)


def test_the_expected_score_is_the_mean_over_the_scale() -> None:
    from math import log

    tokens = [("4", log(0.5)), (" 5", log(0.25)), ("good", log(0.2)), ("9", log(0.05))]
    assert expected_score(tokens, (1, 5)) == pytest.approx((4 * 0.5 + 5 * 0.25) / 0.75)
    with pytest.raises(NoVerdictError, match="no score"):
        expected_score([("The", log(0.7)), ("4", log(0.3))], (1, 5))


def test_a_score_is_read_from_the_probabilities_of_its_token(tmp_path: Path) -> None:
    from math import log

    top = [{"token": "3", "logprob": log(0.75)}, {"token": "5", "logprob": log(0.25)}]
    said = {"logprobs": {"content": [{"token": "3", "logprob": -0.3, "top_logprobs": top}]}}
    rubric = {"criteria": "Is it good?", "scale": [1, 5]}
    with RewardServer(judging(lambda asked: completion("3", **said))) as server:
        spec = judge_file(tmp_path, server, logprobs=True, explain=False, rubric=rubric)
        rows = scored(spec, ["a"])
    assert rows.rewards == (pytest.approx(3.5),)
    asked = question(server.asked[0])
    assert asked["text"].endswith("Reply with the number only.")
    assert asked["body"]["top_logprobs"] == 20
    assert "response_format" not in asked["body"]


# ---- an endpoint that is wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("I would rather not.", "not the JSON that was asked for"),
        ({"score": 85}, "outside of the scale"),
        (completion(None), "empty answer"),
        (completion(None) | {"choices": []}, "answer without a choice"),
        (completion("", message={"role": "assistant", "refusal": "No."}), "refused"),
        (completion("", finish_reason="content_filter"), "refused"),
        (completion('{"score": 1', finish_reason="length"), "cut off at max_tokens"),
    ],
    ids=["prose", "scale", "null", "no choice", "refusal", "filter", "cut"],
)
def test_a_judgement_that_fails_abstains_and_is_counted(
    said: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def verdict(asked: dict[str, Any]) -> Any:
        return said if asked["ANSWER"] == "bad" else by_length(asked)

    with RewardServer(judging(verdict)) as server, caplog.at_level(logging.WARNING):
        rows = scored(judge_file(tmp_path, server), ["four", "bad", "seven.."])
    assert rows.rewards == (4.0, None, 7.0)
    assert rows.totals["judge/strict/failed"] == 1
    assert f"failed on 1 of 3 judgements (1 {reason}): they abstain" in caplog.text


@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_a_prompt_that_the_endpoint_does_not_take_abstains(status: int, tmp_path: Path) -> None:
    def behaviour(handler: Any, asked: Any, number: int) -> None:
        if question(asked)["ANSWER"] == "bad":
            return handler.answer(status, b'{"error": {"message": "too long"}}')
        return judging(by_length)(handler, asked, number)

    with RewardServer(behaviour) as server:
        rows = scored(judge_file(tmp_path, server), ["four", "bad"])
    assert rows.rewards == (4.0, None)


def test_a_body_that_is_no_json_abstains(tmp_path: Path) -> None:
    replies = {0: (200, b"<html>busy</html>"), 1: (200, b'"text"')}
    with RewardServer(first_saying(replies, by_length)) as server:
        rows = scored(judge_file(tmp_path, server, concurrency=1), ["a", "bb", "ccc"])
    assert rows.rewards == (None, None, 3.0)


def test_a_judge_that_fails_too_often_stops_the_run(tmp_path: Path) -> None:
    said = iter(range(100))

    def verdict(asked: dict[str, Any]) -> Any:
        return {"score": 5} if next(said) < 18 else "Sorry!"

    with RewardServer(judging(verdict)) as server:
        spec = judge_file(tmp_path, server, concurrency=1)
        with pytest.raises(RewardUnavailableError, match="failed on 3 of the newest 21") as caught:
            scored(spec, ["x" * i for i in range(30)])
    assert "not the JSON that was asked for: 'Sorry!'" in str(caught.value)
    assert "max_failures allows 0.1" in str(caught.value)


def test_an_endpoint_that_answers_nothing_stops_the_run(tmp_path: Path) -> None:
    message = "no answer to any of 2 judgements"
    with always(503, b"down") as server, pytest.raises(RewardUnavailableError, match=message):
        scored(judge_file(tmp_path, server), ["a", "b"])


def test_an_endpoint_that_is_not_there_stops_the_run(tmp_path: Path) -> None:
    spec = judge_file(tmp_path, f"http://127.0.0.1:{free_port()}/v1")
    with pytest.raises(RewardUnavailableError, match=r"cannot be asked .*given up after 1 tries"):
        scored(spec, ["a"])


def test_a_slow_answer_is_given_up_on_even_if_it_drips(tmp_path: Path) -> None:
    def drip(handler: Any, asked: Any, number: int) -> None:
        if question(asked)["ANSWER"] != "slow":
            return judging(by_length)(handler, asked, number)
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
        return None

    with RewardServer(drip) as server:
        began = time.monotonic()
        rows = scored(judge_file(tmp_path, server, timeout=0.3), ["slow", "bb"])
    assert rows.rewards == (None, 2.0)
    assert time.monotonic() - began < 0.9


# ---- an endpoint that is rude --------------------------------------------------------------------


def test_retry_after_is_kept_to_and_broken_connections_are_tried_again(tmp_path: Path) -> None:
    def behaviour(handler: Any, asked: Any, number: int) -> None:
        if number == 0:
            return handler.answer(429, b"{}", Retry_After="1")
        if number == 1:
            return handler.connection.close()
        if number == 2:
            return handler.answer(500, b"oops", retry_after_ms="10")
        return judging(by_length)(handler, asked, number)

    with RewardServer(behaviour) as server:
        began = time.monotonic()
        rows = scored(judge_file(tmp_path, server, max_retries=3), ["four"])
    assert rows.rewards == (4.0,)
    assert len(server.asked) == 4
    assert time.monotonic() - began >= 1.0


def test_a_rate_limit_that_does_not_end_pauses_the_run(tmp_path: Path) -> None:
    quota = b'{"error": {"code": "insufficient_quota", "message": "You exceeded your quota"}}'
    message = r"429 to the last try.*your quota"
    with always(429, quota) as server, pytest.raises(RewardUnavailableError, match=message):
        scored(judge_file(tmp_path, server), ["a"])


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {}, "answered 401: it was sent no key, since api_key_env is not set"),
        (403, {}, "answered 403: look at base_url"),
        (404, {}, r"answered 404: look at base_url, the model's name \(judge\)"),
        (307, {"Location": "http://127.0.0.1:1/v1"}, "redirects are not followed"),
    ],
)
def test_what_no_try_would_change_is_an_error_at_once(
    status: int, headers: dict[str, str], message: str, tmp_path: Path
) -> None:
    with always(status, b"{}", **headers) as server, pytest.raises(RewardError) as caught:
        scored(judge_file(tmp_path, server, max_retries=2), ["a"])
    assert re.search(message, str(caught.value))
    assert not isinstance(caught.value, RewardUnavailableError)
    assert len(server.asked) == 1


def test_a_huge_or_compressed_answer_is_an_error_at_once(tmp_path: Path) -> None:
    def huge(handler: Any, asked: Any, number: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" " * (1 << 20))

    with RewardServer(huge) as server, pytest.raises(RewardError, match="more than 4194304 bytes"):
        scored(judge_file(tmp_path, server), ["a"])
    zipped = {0: (200, b"x", {"Content_Encoding": "gzip"})}
    with RewardServer(first_saying(zipped, by_length)) as server:
        assert server.asked == []
        with pytest.raises(RewardError, match="compressed its answer"):
            scored(judge_file(tmp_path, server), ["a"])
    assert server.asked[0].headers["accept-encoding"] == "identity"


def test_an_endpoint_without_schemas_is_asked_in_words(tmp_path: Path) -> None:
    def behaviour(handler: Any, asked: Any, number: int) -> None:
        if "response_format" in question(asked)["body"]:
            return handler.answer(400, b'{"error": {"message": "unknown response_format"}}')
        return judging(by_length)(handler, asked, number)

    with RewardServer(behaviour) as server:
        spec = judge_file(tmp_path, server, concurrency=1)
        rows = scored(spec, ["four", "seven..", "a"])
        assert rows.rewards == (4.0, 7.0, 1.0)
        assert len(server.asked) == 4  # it has learnt from the first
        must = judge_file(tmp_path, server, response_format="json_schema")
        assert scored(must, ["four"]).rewards == (None,)


def test_no_more_requests_are_under_way_than_were_allowed(tmp_path: Path) -> None:
    now: list[int] = []
    most: list[int] = []

    def verdict(asked: dict[str, Any]) -> Any:
        now.append(1)
        most.append(len(now))
        time.sleep(0.02)
        now.pop()
        return {"score": 5}

    with RewardServer(judging(verdict)) as server:
        scored(judge_file(tmp_path, server, concurrency=3), ["x" * i for i in range(12)])
    assert max(most) == 3


# ---- the cache -----------------------------------------------------------------------------------


def test_a_judgement_is_paid_for_once(tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "judgements.sqlite"

    def verdict(asked: dict[str, Any]) -> Any:
        return "Sorry!" if asked["ANSWER"] == "bad" else by_length(asked)

    with RewardServer(judging(verdict)) as server:
        spec = judge_file(tmp_path, server, cache=str(cache))
        first = scored(spec, ["four", "bad", "seven.."])
        again = scored(spec, ["four", "bad", "seven..", "xx"])
        assert first.rewards == (4.0, None, 7.0)
        assert again.rewards == (4.0, None, 7.0, 2.0)
        assert again.extra["strict/reasoning"] == ("by length", None, "by length", "by length")
        # A failure is not kept.
        texts = [question(a)["ANSWER"] for a in server.asked]
        assert Counter(texts) == {"four": 1, "bad": 2, "seven..": 1, "xx": 1}
        assert again.totals["judge/strict/cached"] == 2
        for changed in ({"model": "other"}, {"seed": 1}, {"rubric": "polite"}, {"explain": False}):
            scored(judge_file(tmp_path, server, cache=str(cache), **changed), ["four"])
        assert len(server.asked) == 9  # all of them are other judgements
    raw = b"".join(p.read_bytes() for p in cache.parent.iterdir())
    assert b"seven.." not in raw


def test_equal_answers_to_a_prompt_are_judged_once(tmp_path: Path) -> None:
    with RewardServer(judging(by_length)) as server:
        rows = scored(judge_file(tmp_path, server), ["four", "four", "x", "four"])
    assert rows.rewards == (4.0, 4.0, 1.0, 4.0)
    assert len(server.asked) == 2
    assert rows.totals["judge/strict/cached"] == 2


def test_several_judges_share_a_cache_at_once(tmp_path: Path) -> None:
    cache = str(tmp_path / "judgements.sqlite")
    from neat_align.rewards.judge_cache import open_cache

    def fill(worker: int) -> None:
        for i in range(200):
            with open_cache(Path(cache)) as found:
                assert found is not None
                key = (i % 50).to_bytes(4, "big")
                found.put(key, {"text": str(i % 50)})
                assert found.get(key) == {"text": str(i % 50)}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(4)))
    with sqlite3.connect(cache) as connection:
        assert connection.execute("SELECT count(*) FROM judgements").fetchone() == (50,)


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("these are my notes, and no database\n" * 100)
    with RewardServer(judging(by_length)) as server:
        spec = judge_file(tmp_path, server, cache=str(file))
        with pytest.raises(RewardError, match=r"notes\.txt cannot be used .*set cache: false"):
            scored(spec, ["a"])
    assert server.asked == []
    assert file.read_text().startswith("these are my notes")


# ---- secrets and hosts ---------------------------------------------------------------------------


def test_the_key_goes_to_the_named_host_alone_and_stands_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_JUDGE_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "another-canary-key")
    monkeypatch.setenv("OPENAI_ORG_ID", "canary-organisation")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Canary: canary-header")
    cache = tmp_path / "c.sqlite"
    echo = f"you sent {KEY}".encode()
    with RewardServer(first_saying({1: (401, echo)}, by_length)) as server:
        spec = judge_file(tmp_path, server, api_key_env="MY_JUDGE_API_KEY", cache=str(cache))
        scored(spec, ["four"])
        with pytest.raises(RewardError, match="it was sent the key in MY_JUDGE_API_KEY") as caught:
            scored(spec, ["five."])
        without = judge_file(tmp_path, server, name="open")
        scored(without, ["four"])
    first, _, third = server.asked
    assert first.headers["authorization"] == f"Bearer {KEY}"
    assert "authorization" not in third.headers
    for asked in server.asked:
        assert "canary" not in str({k: v for k, v in asked.headers.items() if k != "authorization"})
    assert KEY not in str(caught.value) + caplog.text + str(resolve_rewards(spec, None))
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes()


def test_a_key_that_is_not_set_is_missed_before_anything_is_sent(tmp_path: Path) -> None:
    with RewardServer(judging(by_length)) as server:
        spec = judge_file(tmp_path, server, api_key_env="MY_JUDGE_API_KEY")
        with pytest.raises(RewardError, match=r"MY_JUDGE_API_KEY, which should .*is not set"):
            resolve_rewards(spec, None)
    assert server.asked == []


def test_hosts_are_those_that_the_user_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = judge_file(tmp_path, "http://10.0.0.5:8000/v1")
    with pytest.raises(RewardError, match=r"a judge's base_url|the judge 10.0.0.5 is"):
        resolve_rewards(spec, None)
    rewards = resolve_rewards(spec, None, allow_http_hosts=["10.0.0.5"])
    check_http_hosts(["10.0.0.5"], [r.function for r in rewards])
    local = resolve_rewards(judge_file(tmp_path, "http://localhost:1/v1"), None)
    with pytest.raises(ConfigError, match="leave it out"):
        check_http_hosts(["10.0.0.5"], [r.function for r in local])
    with pytest.raises(RewardError, match=r"169.254.169.254 is a link-local"):
        resolve_rewards(judge_file(tmp_path, "https://169.254.169.254/v1"), None)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://10.9.9.9/v1")
    ours = judge_file(tmp_path, "https://api.openai.com/v1", name="one")
    evil = judge_file(tmp_path, "https://api.openai.com.example/v1", name="two")
    first, second = resolve_rewards([ours, evil], None)
    assert isinstance(first.function, JudgeReward)
    assert isinstance(second.function, JudgeReward)
    assert first.function.settings.api_key_env == "OPENAI_API_KEY"
    assert second.function.settings.api_key_env == ""
    both = judge_file(
        tmp_path, "https://judge.example/v1", name="three", api_key_env="OPENAI_API_KEY"
    )
    with pytest.raises(RewardError, match=r"would be sent to api.openai.com and to judge.example"):
        check_tokens([r.function for r in resolve_rewards([ours, both], None)])


# ---- the judge's file ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modle": "x"}, r"unknown key 'modle': did you mean 'model'\?"),
        ({"api_key": KEY}, "api_key would be a secret in a file: put it into an environment"),
        ({"model": ""}, "model is ''; it must be text that is not empty"),
        ({"model": 7}, "model is 7; it must be text"),
        ({"form": "pair"}, r"one of pointwise, pairwise, ranking \(did you mean pairwise\?\)"),
        ({"temperature": 3}, "temperature is 3; it must be a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"timeout": 0}, "timeout is 0; it must be a number of seconds above 0"),
        ({"concurrency": 0}, "concurrency is 0; it must be a whole number of 1 or more"),
        ({"concurrency": 2.5}, "concurrency is 2.5; it must be a whole number"),
        ({"explain": "yes"}, "explain is 'yes'; it must be true or false"),
        ({"max_failures": 2}, "max_failures is 2; it must be a number from 0 to 1"),
        ({"prices": {"input": -1}}, "prices: input is -1; it must be what a million tokens cost"),
        ({"prices": {"inputs": 1}}, r"unknown key 'inputs': did you mean 'input'\?"),
        ({"orders": 1}, "orders is read only with form: ranking, and form is pointwise"),
        ({"against": "chosen"}, "against is read only with form: pairwise"),
        (
            {"form": "pairwise", "against": "chosen", "opponents": 2},
            "opponents is set, but against is chosen",
        ),
        ({"logprobs": True}, r"needs explain: false and a scale within 0 to 9; explain is true"),
        ({"api_key_env": "sk-123"}, "use a variable whose name ends in _API_KEY"),
        ({"rubric": "helpfull"}, "there is no rubric 'helpfull'. Did you mean 'helpful'"),
        ({"rubric": "my/own.yaml"}, r"own\.yaml: cannot be read"),
        ({"rubric": {"criteria": " "}}, "criteria is missing"),
        ({"rubric": {"criteria": "x", "scale": [5, 1]}}, r"scale is \[5, 1\]; it must be the low"),
        ({"rubric": {"criteria": "x", "levels": {11: "y"}}}, "levels has the score 11"),
        ({"rubric": {"criteria": "x", "level": {}}}, r"unknown key 'level': did you mean 'levels'"),
        ({"rubric": 7}, "a rubric is a mapping with keys such as"),
    ],
    ids=range(26),
)
def test_a_file_that_is_wrong_says_where_and_what_to_change(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    spec = judge_file(tmp_path, "http://127.0.0.1:1/v1", **keys)
    with pytest.raises(RewardError, match=message) as caught:
        resolve_rewards(spec, None)
    assert "strict.yaml" in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text("model: x\nrubric: helpful\n")
    with pytest.raises(RewardError, match="base_url is missing"):
        resolve_rewards(f"judge:{path}", None)
    with pytest.raises(RewardError, match=r"none\.yaml: cannot be read"):
        resolve_rewards("judge:none.yaml", None)


def test_a_judge_without_its_file_is_told_of_it() -> None:
    with pytest.raises(RewardError, match=r"a judge is named by its file, judge:helpful\.yaml"):
        resolve_rewards("judge:helpful", None)


def test_a_rubric_of_ones_own_is_found_beside_the_judge(tmp_path: Path) -> None:
    levels = "{0: 'no', 5: 'yes, it is'}"
    (tmp_path / "short.yaml").write_text(f"criteria: Short?\nscale: [0, 5]\nlevels: {levels}\n")
    with RewardServer(judging(lambda asked: {"score": 5})) as server:
        rows = scored(judge_file(tmp_path, server, rubric="short.yaml"), ["a"])
    assert rows.rewards == (5.0,)
    assert "0: no\n5: yes, it is" in question(server.asked[0])["text"]
    form = question(server.asked[0])["body"]["response_format"]["json_schema"]["schema"]
    assert form["properties"]["score"]["enum"] == [0, 1, 2, 3, 4, 5]
