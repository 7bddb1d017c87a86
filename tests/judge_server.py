"""A real OpenAI-compatible endpoint on this machine, which judges as a test tells it.

`with RewardServer(judging(verdict)) as server`, and `judge_file(folder, server, ...)` writes the
file of a judge that is asked there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from reward_server import Asked, Behaviour, Handler, RewardServer

Verdict = Callable[[dict[str, Any]], Any]


def question(asked: Asked) -> dict[str, Any]:
    """What an endpoint was asked, in parts: the request's body, its text, and what is judged."""
    body = json.loads(asked.body)
    text = body["messages"][-1]["content"]
    parts = re.findall(r"\[([A-Z ]+) \w{8} BEGINS\]\n(.*?)\n\[\1 \w{8} ENDS\]", text, re.DOTALL)
    return {"body": body, "text": text, **dict(parts)}


def completion(text: str | None, **changes: Any) -> dict[str, Any]:
    """The answer of an endpoint whose model said this."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "judge",
        "choices": [choice | changes],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


def judging(verdict: Verdict) -> Behaviour:
    """Answers what `verdict` makes of a question: a text, a mapping (as JSON), or a whole
    completion.
    """

    def behaviour(handler: Handler, asked: Asked, number: int) -> None:
        said = verdict(question(asked))
        if isinstance(said, Mapping) and "choices" not in said:
            said = json.dumps(said)
        answer = completion(said) if isinstance(said, str) else said
        handler.answer(200, json.dumps(answer).encode())

    return behaviour


def first_saying(replies: Mapping[int, tuple[Any, ...]], verdict: Verdict) -> Behaviour:
    """Replies of the endpoint by number of the request, (status, body, headers); else verdicts."""

    def behaviour(handler: Handler, asked: Asked, number: int) -> None:
        if number not in replies:
            return judging(verdict)(handler, asked, number)
        status, body, *headers = replies[number]
        handler.answer(status, body, **(headers[0] if headers else {}))
        return None

    return behaviour


def by_length(asked: dict[str, Any]) -> dict[str, Any]:
    """A score that is the answer's length; the longer of two; a group ranked by length."""
    answers = {name[-1]: text for name, text in asked.items() if name.startswith("ANSWER")}
    if "ANSWER" in asked:
        return {"reasoning": "by length", "score": len(asked["ANSWER"])}
    if "rank" in asked["text"][:20]:
        return {"ranking": sorted(answers, key=lambda x: -len(answers[x]))}
    a, b = len(answers["A"]), len(answers["B"])
    return {"better": "tie" if a == b else "A" if a > b else "B"}


def judge_file(folder: Path, server: RewardServer | str, **keys: Any) -> str:
    """The name of a judge as a reward: "judge:PATH"."""
    url = server if isinstance(server, str) else server.url.replace("/score", "/v1")
    settings = {
        "base_url": url,
        "model": "judge",
        "rubric": "helpful",
        "cache": False,
        "max_retries": 0,
        "concurrency": 4,  # more at once overflow the listen queue of http.server
        **keys,
    }
    path = folder / f"{keys.get('name', 'strict')}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return f"judge:{path}"
