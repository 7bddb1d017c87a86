"""A judge over a real OpenAI-compatible server: vLLM on this machine's CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from judge_server import judge_file
from neat_align.errors import RewardError
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score
from vllm_server import TOKENIZER, RealVllm, servable_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
ANSWERS = ["Thank you, that is kind.", "no", "I like it"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealVllm]:
    folder = tmp_path_factory.mktemp("judge")
    servable_model(context=4096).save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    # A random model would go on with blanks between the brackets for ever.
    compact = '{"backend": "xgrammar", "disable_any_whitespace": true}'
    arguments = ("--served-model-name", "tiny", "--structured-outputs-config", compact)
    with RealVllm(folder / "model", folder / "log.txt", arguments) as running:
        yield running


def scores(spec: str, answers: list[str] = ANSWERS) -> tuple[float | None, ...]:
    n = len(answers)
    told = {"prompts": ["What do you say?"] * n, "completions": answers}
    rows = score(resolve_rewards(spec, None), **told, completion_ids=[[1]] * n, columns={})
    assert rows.totals["judge/strict/prompt_tokens"] > 100
    return rows.rewards


def test_a_model_of_random_weights_gives_scores_under_a_schema(
    server: RealVllm, tmp_path: Path
) -> None:
    keys = {"model": "tiny", "explain": False, "max_tokens": 64}
    url = f"{server.url}/v1"
    found = scores(judge_file(tmp_path, url, **keys))
    assert all(value is not None and 1 <= value <= 10 for value in found)
    # The same question twice, from the cache of nobody: temperature is 0.
    assert scores(judge_file(tmp_path, url, **keys)) == found
    paired = scores(judge_file(tmp_path, url, form="pairwise", **keys))
    assert all(value is not None and 0 <= value <= 1 for value in paired)
    assert sum(value or 0 for value in paired) == pytest.approx(len(ANSWERS) / 2)
    # A random model may name a letter twice: then the ranking failed, and is no number.
    ranked = scores(judge_file(tmp_path, url, form="ranking", max_failures=1.0, **keys))
    assert all(value is None for value in ranked) or sum(v or 0 for v in ranked) == 1.5


def test_without_a_schema_a_random_model_gives_no_verdict(server: RealVllm, tmp_path: Path) -> None:
    keys = {"model": "tiny", "max_tokens": 16, "response_format": "text"}
    assert scores(judge_file(tmp_path, f"{server.url}/v1", **keys)) == (None,) * len(ANSWERS)


def test_scores_are_read_from_probabilities(server: RealVllm, tmp_path: Path) -> None:
    keys = {"model": "tiny", "explain": False, "logprobs": True, "max_tokens": 1}
    rubric = {"criteria": "Is it kind?", "scale": [0, 9]}
    found = scores(judge_file(tmp_path, f"{server.url}/v1", rubric=rubric, **keys))
    # It knows no digits well: half of the mass on them is asked for, and None without.
    assert all(value is None or 0 <= value <= 9 for value in found)


def test_a_model_that_is_not_served_is_an_error_at_once(server: RealVllm, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"answered 404.*other.*does not exist"):
        scores(judge_file(tmp_path, f"{server.url}/v1", model="other"))
