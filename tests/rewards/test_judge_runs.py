"""Runs that judges rank and evaluate: what they log, that they pause and go on, and what a run may
not change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from judge_server import by_length, first_saying, judge_file, judging, question
from neat_align.cli.options import options_from
from neat_align.cli.probe_options import ProbeSettings
from neat_align.cli.probe_run import _rewards
from neat_align.cli.tables import print_result
from neat_align.comparison.before_runs import checked_settings, own_options
from neat_align.comparison.spec import CompareSpec, parse_spec
from neat_align.errors import ConfigError, RewardUnavailableError
from neat_align.pipeline import evaluation_before
from neat_align.reporting.run_files import read_run
from neat_align.reporting.run_report import run_facts
from neat_align.rewards.judge_totals import judge_totals, total_line
from reward_server import RewardServer
from small_trainer import ROWS, logged, trainer


def pointwise(asked: dict[str, Any]) -> dict[str, Any]:
    """A score on the scale, by the answer's length."""
    if "ANSWER" in asked:
        return {"reasoning": "so", "score": 1 + len(asked["ANSWER"]) % 10}
    return by_length(asked)


def test_a_run_is_ranked_by_one_judge_and_evaluated_by_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with RewardServer(judging(pointwise)) as server:
        ranks = judge_file(tmp_path, server, form="pairwise", name="ranker")
        held_out = judge_file(tmp_path, server, name="strict", prices={"output": 1000.0})
        t = trainer(run, reward=ranks, judge_funcs=[held_out], eval_dataset=ROWS[:3])
        with t.writing():
            t.open_run(None)
            before = evaluation_before(t)
            t.train()
    assert set(before.judges) == {"strict"}
    assert all(1 <= score <= 10 for score in before.judges["strict"] if score is not None)
    assert before.rewards == [None] * 3  # ranks say nothing of how good they are
    assert before.extra["strict/reasoning"] == ["so"] * 3
    lines = logged(run)
    calls = [line["judge/ranker/calls"] for line in lines if "judge/ranker/calls" in line]
    pairs = [q for q in map(question, server.asked) if "ANSWER A" in q]
    assert sum(calls) == len(pairs) > 0
    totals = judge_totals(run / "metrics.jsonl")
    assert totals["strict"]["calls"] == 3  # the one evaluation
    assert totals["strict"]["cost"] == pytest.approx(3 * 10 * 1000.0 / 1e6)
    assert total_line(totals["strict"]) == "3 calls, 330 tokens, cost 0.03"
    record = json.loads((run / "run.json").read_text())
    assert record["rewards"] == ["ranker"]
    assert record["judge strict"].startswith("judge, pointwise, rubric helpful, ")
    result = {"judges_used": totals, "stopped_because": None, "wall_seconds": 1.0}
    (run / "result.json").write_text(json.dumps(result))
    facts = dict(run_facts(read_run(run)))
    assert facts["Judge strict"] == (
        "judge, pointwise, rubric helpful; 3 calls, 330 tokens, cost 0.03"
    )
    print_result(result | {"peak_rss_bytes": None, "rounds": 1, "steps": 1}, run)
    assert "judge   strict: 3 calls, 330 tokens, cost 0.03" in capsys.readouterr().out


def test_a_run_pauses_when_the_judge_is_down_and_goes_on_without_paying_twice(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    cache = {"cache": str(tmp_path / "cache.sqlite"), "concurrency": 1}
    down = dict.fromkeys(range(20, 40), (503, b"down"))
    with RewardServer(first_saying(down, pointwise)) as server:
        spec = judge_file(tmp_path, server, **cache)
        with pytest.raises(RewardUnavailableError, match="failed on 3 of the newest 23"):
            trainer(run, reward=spec).train()
        asked = [question(a)["text"] for a in server.asked[:20]]
        t = trainer(run, reward=spec)
        server.behaviour = judging(pointwise)
        t.train(resume_from_checkpoint=True)
        later = [question(a)["text"] for a in server.asked[23:]]
        assert not set(asked) & set(later)
        assert t.state.global_step == len(t.rounds) // 2
        for group in t.parts.round_maker.make(0, is_start=True, start_is_current=True).groups:
            for c in group.completions:
                assert c.reward == 1 + len(c.text.strip()) % 10 or not c.text.strip()
        changed = judge_file(tmp_path, server, rubric="polite", **cache)
        with pytest.raises(ConfigError, match=r"judge strict was '.*rubric helpful.* and is '"):
            trainer(run, reward=changed).train(resume_from_checkpoint=True)
        # How fast it is asked, and where the endpoint is, may change.
        moved = judge_file(tmp_path, server, timeout=5.0, **cache)
        trainer(run, reward=moved).train(resume_from_checkpoint=True)


def compared(spec: str, **methods: Any) -> CompareSpec:
    settings = {"model_name_or_path": "demo", "dataset_name": "demo", "reward_funcs": spec}
    return parse_spec({"settings": settings, "methods": {"dpo": None, **methods}}, "c.yaml")


def test_a_comparison_knows_its_judges_and_takes_none_that_cannot_compare(tmp_path: Path) -> None:
    url = "http://127.0.0.1:1/v1"
    spec = judge_file(tmp_path, url)
    own = judge_file(tmp_path, url, name="own", form="ranking")
    read = compared(spec, mine={"like": "dpo", "reward_funcs": [own]})
    mine = next(m for m in read.methods if m.name == "mine")
    before = own_options(read, mine, {}, 0)["judges' files"]
    assert list(before) == [spec, own]
    judge_file(tmp_path, url, rubric="polite")
    after = own_options(read, mine, {}, 0)["judges' files"]
    assert (after[own], after[spec] != before[spec]) == (before[own], True)
    checked_settings(read, options_from, set())
    with pytest.raises(ConfigError, match="its mean is ½ for every method"):
        checked_settings(compared(own), options_from, set())


def test_a_judge_of_groups_cannot_compare_policies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = judge_file(tmp_path, "http://127.0.0.1:1/v1", form="ranking")
    with pytest.raises(ConfigError, match="judge_funcs has the judge 'strict', which holds a pro"):
        trainer(tmp_path / "run", judge_funcs=[spec], eval_dataset=ROWS[:2])
    with pytest.raises(ConfigError, match="reward is the judge 'strict', which holds a prompt's"):
        _rewards(ProbeSettings("politeness", "demo", reward=spec))
    trainer(tmp_path / "run", reward=spec)
    assert "evaluations go without it; add another one to judge_funcs" in caplog.text
    judge_file(tmp_path, "http://127.0.0.1:1/v1", form="pairwise", against="chosen")
    trainer(tmp_path / "run", judge_funcs=[spec], eval_dataset=ROWS[:2])
