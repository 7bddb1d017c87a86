"""A run whose reward functions change their input, log, and ask for the trainer's state."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from neat_align.runs.events import RunCallback
from small_trainer import ROWS, count_e, logged, trainer, weights

ROWS_WITH_COLUMNS = [{**row, "topic": {"name": f"t{i}", "tags": [i]}} for i, row in enumerate(ROWS)]


def spoils(prompts: Any, completions: Any, completion_ids: Any, topic: Any, **rest: Any) -> Any:
    """`count_e`, which then does to its input whatever can be done to it."""
    assert all(len(p) == 1 and p[0]["content"].startswith("What do you say") for p in prompts)
    assert all(len(t["tags"]) == 1 for t in topic)
    scores = count_e(prompts, completions, completion_ids)
    for prompt, answer, ids, value in zip(prompts, completions, completion_ids, topic, strict=True):
        prompt.insert(0, {"role": "system", "content": "Answer with one e."})
        prompt[1]["content"] = "gone"
        answer[0]["content"] += "eee"
        ids.append(1)
        value["tags"].append(0)
        value.clear() if len(ids) % 2 else None
    return scores


async def spoils_later(**given: Any) -> Any:
    return spoils(**given)


class ChangesGroups(RunCallback):
    """A callback that does the same to the groups it is shown."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_round_made(self, round_index: int, groups: Sequence[Any]) -> None:
        for group in (*groups, groups[-1], *groups[:2]):
            self.seen.append(copy.deepcopy(group.prompt))
            group.prompt.insert(0, {"role": "system", "content": "new"})


def test_a_run_is_the_same_whatever_its_rewards_and_callbacks_do_to_what_they_are_given(
    tmp_path: Path,
) -> None:
    runs = {}
    for name, reward, judge, callbacks in (
        ("calm", count_e, count_e, []),
        ("wild", [spoils, spoils_later, spoils], spoils, [ChangesGroups(), ChangesGroups()]),
    ):
        t = trainer(
            tmp_path / name,
            rows=copy.deepcopy(ROWS_WITH_COLUMNS[:8]),
            reward=reward,
            reward_weights=[0.0, 0.0, 1.0] if name == "wild" else None,
            judge_funcs=judge,
            eval_dataset=copy.deepcopy(ROWS_WITH_COLUMNS[8:]),
            callbacks=list(callbacks),
            prompts_per_round=6,
            num_train_epochs=2,
        )
        data = copy.deepcopy((t.parts.data.rows, t.parts.data.eval_rows))
        key = t.parts.run_key()
        t.train()
        t.evaluate()
        assert (t.parts.data.rows, t.parts.data.eval_rows) == data
        assert t.parts.run_key() == key
        runs[name] = t
    calm, wild = runs["calm"], runs["wild"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(calm).values(), weights(wild).values(), strict=True)
    )
    assert wild.last_evaluation is not None
    assert calm.last_evaluation is not None
    assert wild.last_evaluation.rewards == calm.last_evaluation.rewards
    assert list(wild.last_evaluation.judges.values()) == list(calm.last_evaluation.judges.values())
    for callback in wild.callback_handler.callbacks:
        if isinstance(callback, ChangesGroups):
            assert callback.seen
            assert all(len(prompt) == 1 for prompt in callback.seen)


def test_trls_arguments_reach_rounds_evaluations_and_the_metrics_file(tmp_path: Path) -> None:
    steps: list[tuple[str, int]] = []

    def reward(
        completions: Any, trainer_state: Any, log_metric: Any, log_extra: Any, **columns: Any
    ) -> list[float]:
        assert isinstance(trainer_state, TrainerState)
        steps.append(("reward", trainer_state.global_step))
        trainer_state.global_step = 10**6
        log_metric("letters", sum(len(c[0]["content"]) for c in completions) / len(completions))
        log_metric("loss", 3.0)
        log_extra("length", [len(c[0]["content"]) for c in completions])
        return count_e((), completions, ())

    async def judge(completions: Any, trainer_state: Any, log_metric: Any, **_: Any) -> list[float]:
        steps.append(("judge", trainer_state.global_step))
        log_metric("judged", 1.0)
        return [0.0] * len(completions)

    t = trainer(
        tmp_path,
        reward=reward,
        rows=ROWS[:8],
        judge_funcs=judge,
        eval_dataset=ROWS[8:],
        prompts_per_round=4,
        num_train_epochs=2,
        evaluate_contrast=False,
    )
    t.train()
    metrics = t.evaluate()
    assert dict.fromkeys(steps) == dict.fromkeys(
        [("reward", 0), ("reward", 2), ("reward", 4), ("judge", 4)]
    )
    assert t.state.global_step == 4
    rounds = [line for line in logged(tmp_path) if "round" in line]
    assert [line["round"] for line in rounds] == [0.0, 1.0]
    for i, line in enumerate(rounds):
        text = (tmp_path / "rounds" / f"{i:05d}" / "reward-extra.jsonl").read_text()
        lengths = [json.loads(entry)["values"]["length"] for entry in text.splitlines()]
        assert line["letters"] > 0
        assert line["logged/loss"] == 3.0
        assert len(lengths) >= 4 * 4  # groups and answers, filtered ones left out
        assert not (tmp_path / "rounds" / f"{i:05d}" / "left-out.jsonl").exists()
    assert metrics["eval_judged"] == 1.0
    assert metrics["eval_letters"] > 0
    assert t.last_evaluation is not None
    assert t.last_evaluation.extra == {
        "length": [len(text) for texts in t.last_evaluation.completions for text in texts]
    }
