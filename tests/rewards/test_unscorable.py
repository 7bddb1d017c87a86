"""Rows that a reward cannot score: an error that names them, or left out, counted and listed."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from neat_align import NEATTrainer
from neat_align.errors import DataError, RewardError
from neat_align.prompts.rows import PromptRow
from neat_align.rewards.hf import ModelReward
from neat_align.rewards.http import HttpReward
from neat_align.rewards.protocol import (
    ChecksPrompts,
    LeftOut,
    NamedReward,
    ScoredRows,
    Unscorable,
)
from neat_align.rewards.scoring import score, unscorable_rows
from neat_align.trainer.reward_setup import Rewards, scorable_data
from neat_align.trainer.setup import TrainingData
from reward_server import Asked, Handler, RewardServer, by_length
from small_trainer import ROWS, TOKENIZER, config, trainer
from tiny import tiny_model, tiny_tokenizer

CONTEXT = 64


def small_model(context: int = CONTEXT) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=context,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForSequenceClassification(config)


def model_reward(template: Any = "chatml", **options: Any) -> ModelReward:
    return ModelReward(small_model(), tiny_tokenizer(template), name="judge", **options)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def rows_for(completions: list[str], prompt: Any = "Hi") -> dict[str, Any]:
    n = len(completions)
    return {
        "prompts": [prompt] * n,
        "completions": completions,
        "completion_ids": [[1]] * n,
        "columns": {},
        "labels": [f"data.jsonl:{i + 1}" for i in range(n)],
    }


def gives(*values: Any, name: str = "gives", weight: float = 1.0) -> NamedReward:
    return NamedReward(name, lambda **_: list(values), weight)


# ---- scoring -------------------------------------------------------------------------------------


def test_an_unscorable_row_is_an_error_that_names_function_row_and_reason() -> None:
    bad = Unscorable("has 900 tokens, and the model takes 512")
    with pytest.raises(
        RewardError,
        match=r"'gives' cannot score data\.jsonl:2, whose completion begins 'two': it has 900 "
        r"tokens, and the model takes 512 \(and 1 more\)\. on_bad_row: skip",
    ):
        score((gives(1.0, bad, bad),), **rows_for(["one", "two", "three"]))


def test_a_skipped_row_has_no_reward_whatever_the_others_say(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = gives(1.0, Unscorable("is long"), None, name="first")
    second = gives(10.0, 20.0, 30.0, name="second")
    judge = gives(Unscorable("is odd"), 2.0, 3.0, name="judge", weight=0.0)
    with caplog.at_level(logging.WARNING, "neat_align"):
        got = score((first, second, judge), **rows_for(["one", "two", "three"]), on_bad_row="skip")
    assert got == ScoredRows(
        rewards=(11.0, None, 30.0),
        components=((1.0, 10.0, None), (None, 20.0, 2.0), (None, 30.0, 3.0)),
        left_out=(LeftOut(1, "first", "is long"), LeftOut(0, "judge", "is odd")),
    )
    assert "'first' cannot score data.jsonl:2" in caplog.text
    assert "(and 1 more). These rows have no reward" in caplog.text


# ---- reward models -------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "none"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_rows_over_a_models_context_are_told_and_the_others_scored_as_ever(
    template: Any, batch_size: int
) -> None:
    reward = model_reward(template, batch_size=batch_size)
    texts = ["fine", "much " * 60, "fine, too", "very " * 80]
    got = reward(prompts=["Hi"] * 4, completions=texts, completion_ids=[[]] * 4)
    alone = reward(prompts=["Hi"] * 2, completions=texts[::2], completion_ids=[[]] * 2)
    assert got[::2] == pytest.approx(alone, abs=1e-5)
    for value in got[1::2]:
        assert isinstance(value, Unscorable)
        assert "tokens for the reward model 'judge', which takes 64: shorten" in value.reason
    named = (NamedReward("judge", reward, 1.0),)
    with pytest.raises(RewardError, match=r"cannot score data\.jsonl:2, .* it has \d+ tokens"):
        score(named, **rows_for(texts))
    skipped = score(named, **rows_for(texts), on_bad_row="skip")
    assert [r is None for r in skipped.rewards] == [False, True, False, True]
    assert [left.row for left in skipped.left_out] == [1, 3]


def test_the_context_is_exact() -> None:
    reward, tokenizer = model_reward(), tiny_tokenizer()
    for n in range(30, 60):
        row = [*user("Hi"), {"role": "assistant", "content": "x" * n}]
        tokens = len(tokenizer.apply_chat_template(row, tokenize=True, return_dict=False))
        (got,) = reward(prompts=["Hi"], completions=["x" * n], completion_ids=[[]])
        assert isinstance(got, Unscorable) == (tokens > CONTEXT), (n, tokens)


def test_a_roberta_has_fewer_tokens_than_positions() -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=384,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT + 2,
        type_vocab_size=1,
        num_labels=1,
        pad_token_id=1,
    )
    reward = ModelReward(
        RobertaForSequenceClassification(config), tiny_tokenizer("none"), name="roberta"
    )
    room = CONTEXT - len(tiny_tokenizer("none")("Hi")["input_ids"])
    texts = ["~" * room, "~" * (room + 1)]
    got = reward(prompts=["Hi"] * 2, completions=texts, completion_ids=[[]] * 2)
    assert isinstance(got[0], float)  # and no index error
    assert isinstance(got[1], Unscorable)
    assert "has 65 tokens for the reward model 'roberta', which takes 64" in got[1].reason


def test_other_forms_that_a_model_cannot_take_are_unscorable_rows() -> None:
    dialogue = [{"role": "system", "content": "Be kind."}, *user("Hi")]
    answer = [{"role": "assistant", "content": "Hello."}]
    without_template = model_reward("none")
    got = without_template([dialogue, user("Hi")], [answer, answer], [[], []])
    assert isinstance(got[0], Unscorable)
    assert "has a prompt of 2 messages" in got[0].reason
    assert "no chat template" in got[0].reason
    assert isinstance(got[1], float)
    strict = model_reward()
    strict.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + strict.tokenizer.chat_template
    )
    got = strict([dialogue, user("Hi")], [answer, answer], [[], []])
    assert isinstance(got[0], Unscorable)
    assert "refused by the chat template of the reward model 'judge' (no system" in got[0].reason
    assert isinstance(got[1], float)


class Fits(torch.nn.Module):
    """A model that runs out of memory over so many rows at once."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        super().__init__()
        self.model, self.config, self.rows = model, model.config, rows
        self.batches: list[int] = []

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        self.batches.append(len(input_ids))
        if len(input_ids) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_a_model_that_runs_out_of_memory_takes_fewer_rows_from_then_on() -> None:
    tokenizer, texts = tiny_tokenizer(), [f"text {i}" for i in range(9)]
    whole = ModelReward(small_model(), tokenizer)(texts, texts, [[]] * 9)
    model = Fits(small_model(), 3)
    reward = ModelReward(model, tokenizer, name="big", batch_size=8)
    for _ in range(2):
        assert reward(texts, texts, [[]] * 9) == pytest.approx(whole, abs=1e-5)
    assert model.batches == [8, 4, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1]
    none = ModelReward(Fits(small_model(), 0), tokenizer, name="big")
    with pytest.raises(
        RewardError, match=r"memory ran out while .*'big' scored one row of \d+ tok"
    ):
        score((NamedReward("big", none, 1.0),), **rows_for(texts))


# ---- servers -------------------------------------------------------------------------------------


def at_most(rows: int, longest: int) -> Any:
    def behaviour(handler: Handler, asked: Asked, number: int) -> None:
        long = any(len(row["completion"]) > longest for row in asked.rows)
        if long or len(asked.rows) > rows:
            return handler.answer(413, b"too large")
        return by_length(handler, asked, number)

    return behaviour


def test_a_request_that_is_too_large_is_halved_down_to_the_row_at_fault() -> None:
    texts = ["x" * n for n in (1, 2, 99, 4, 5, 6, 7, 8, 9)]
    with RewardServer(at_most(rows=3, longest=50)) as server:
        named = (NamedReward("server", HttpReward(server.url, batch_size=8), 1.0),)
        got = score(named, **rows_for(texts), on_bad_row="skip")
        sizes = sorted(len(asked.rows) for asked in server.asked)
        with pytest.raises(
            RewardError, match=r"data\.jsonl:3, .* it is too large for the reward s"
        ):
            score(named, **rows_for(texts))
    assert got.rewards == (1, 2, None, 4, 5, 6, 7, 8, 9)
    # 8 → 4 and 4 → 2, 2, 2, 2, of which the one with the long row → 1, 1; and the ninth row.
    assert sizes == [1, 1, 1, 2, 2, 2, 2, 4, 4, 8]


# ---- before anything is sampled ------------------------------------------------------------------


def test_a_prompt_that_is_too_long_already_is_found_without_an_answer() -> None:
    reward = model_reward()
    assert isinstance(reward, ChecksPrompts)
    long, emoji = "word " * 40, "\U0001f600" * 14  # 56 bytes, 56 tokens
    prompts = [
        "Hi",
        user(long),
        user("Hi"),
        [*user("Hi"), *user(long)],
        user(emoji),
        user("x" * 34),
    ]
    rows = data(*prompts, "held out").rows
    bad = unscorable_rows((NamedReward("judge", reward, 1.0), gives(1.0)), rows)
    assert [left.row for left in bad] == [1, 3, 4]
    assert all(left.reward == "judge" and "which takes 64" in left.reason for left in bad)


def test_the_cheap_look_tells_of_every_prompt_that_is_too_long() -> None:
    reward, all_of_them = model_reward(), model_reward()
    all_of_them._may_be_unscorable = lambda prompt: True  # type: ignore[method-assign]
    prompts: list[Any] = [
        user(text * n) for text in ("x", "é ", "the ", "😀", "\n") for n in range(70)
    ]
    assert reward.unscorable_prompts(prompts) == all_of_them.unscorable_prompts(prompts) != {}


def data(*prompts: Any) -> TrainingData:
    rows = [PromptRow(str(i), p, None, None, {}, f"d.jsonl:{i}") for i, p in enumerate(prompts)]
    return TrainingData(rows[:-1], rows[-1:], conversational=True)


def test_rows_that_no_answer_can_save_are_refused_or_taken_out_at_start() -> None:
    rewards = Rewards((NamedReward("judge", model_reward(), 1.0),), ())
    fine = data(user("a"), user("b"), user("c"))
    assert scorable_data(fine, rewards, "error") is fine
    given = data(user("a"), user("long " * 60), user("b"), user("c"))
    with pytest.raises(
        DataError,
        match=(
            r"d\.jsonl:1: no answer can be scored, "
            r"since it has \d+ tokens [\s\S]*on_bad_row: skip"
        ),
    ):
        scorable_data(given, rewards, "error")
    given = replace(given, prompt_lengths=[3, 60, 3])
    kept = scorable_data(given, rewards, "skip")
    assert [row.id for row in kept.rows] == ["0", "2"]
    assert list(kept.prompt_lengths) == [3, 3]
    assert [row.id for row in kept.eval_rows] == ["3"]
    assert [line["where"] for line in kept.skipped] == ["d.jsonl:1"]
    with pytest.raises(DataError, match="no row is left"):
        scorable_data(data(user("long " * 60), user("a")), rewards, "skip")


def test_held_out_rows_are_those_that_the_evaluations_reward_can_score() -> None:
    """Whatever is trained on: runs with rewards of their own are compared on the same prompts."""
    strict, lenient = NamedReward("judge", model_reward(), 1.0), gives(1.0)
    long = user("long " * 60)
    given = replace(
        data(user("a"), long, user("b")), eval_rows=data(long, user("c"), user("d")).rows
    )
    trains_on_it = scorable_data(given, Rewards((strict,), (), (lenient,)), "skip")
    assert [row.id for row in trains_on_it.rows] == ["0"]
    assert trains_on_it.eval_rows == given.eval_rows
    judged_by_it = scorable_data(given, Rewards((lenient,), (), (strict,)), "skip")
    both = scorable_data(given, Rewards((strict,), ()), "skip")
    assert judged_by_it.rows == both.rows == given.rows[:1]
    assert judged_by_it.eval_rows == both.eval_rows == given.eval_rows[1:]


def test_a_trainer_refuses_such_a_prompt_before_it_samples(tmp_path: Path) -> None:
    long = {"prompt": user("Tell me " * 20)}
    with pytest.raises(DataError, match=r"no answer can be scored.*which takes 64"):
        NEATTrainer(
            tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER),
            small_model(),
            config(tmp_path),
            [*ROWS, long],
            processing_class=TOKENIZER,
            reward_processing_classes=TOKENIZER,
        )


# ---- a round, an evaluation ----------------------------------------------------------------------


def test_a_round_counts_and_lists_what_could_not_be_scored(tmp_path: Path) -> None:
    """Also when it is interrupted and taken up, with other batches."""

    def judge(completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[Any]:
        texts = [c[0]["content"] for c in completions]
        if calls and len(calls) == calls[0]:
            calls.clear()
            raise ConnectionError("away")
        if calls:
            calls.append(1)
        log_metric("judge/share_of_e", sum("e" in text for text in texts) / len(texts))
        log_metric("reward", 5.0)
        log_metric("empty", float("nan"))
        log_extra("words", [len(text.split()) for text in texts])
        return [
            Unscorable(f"has {len(text)} letters") if len(text) > 14 else float(len(text))
            for text in texts
        ]

    def made(folder: Path, batch: int) -> Any:
        t = trainer(folder, reward=judge, num_positive=3, generation_batch_size=batch)
        tools = t.parts.round_maker._tools
        t.parts.round_maker._tools = lambda *a, **k: _skipping(tools(*a, **k))  # type: ignore[method-assign]
        return t.make_round(0)

    calls: list[int] = []
    whole = made(tmp_path / "whole", 21)
    calls.append(3)
    with pytest.raises(RewardError, match="away"):
        made(tmp_path / "cut", 21)
    again = made(tmp_path / "cut", 21)
    assert again.groups == whole.groups
    assert again.metrics == whole.metrics

    folder = tmp_path / "whole" / "rounds" / "00000"
    left_out = [json.loads(line) for line in (folder / "left-out.jsonl").read_text().splitlines()]
    extra = [json.loads(line) for line in (folder / "reward-extra.jsonl").read_text().splitlines()]
    for name in ("left-out.jsonl", "reward-extra.jsonl"):
        cut = tmp_path / "cut" / "rounds" / "00000" / name
        assert cut.read_bytes() == (folder / name).read_bytes()
    assert whole.metrics["removed/unscorable"] == len(left_out) > 0
    assert set(left_out[0]) == {"prompt_id", "origin", "index", "reward", "reason"}
    assert left_out[0]["reason"].startswith("has ")
    answers = {(g.prompt_id, c.origin, c.index): c for g in whole.groups for c in g.completions}
    unscored = {key for key, c in answers.items() if len(c.text) > 14}
    listed = {(line["prompt_id"], line["origin"], line["index"]) for line in left_out}
    assert unscored == listed & answers.keys()
    assert all((answers[key].reward is None) == (key in listed) for key in answers)
    by_key = {(line["prompt_id"], line["origin"], line["index"]): line["values"] for line in extra}
    assert all(by_key[key] == {"words": len(c.text.split())} for key, c in answers.items())
    assert 0 <= whole.metrics["judge/share_of_e"] <= 1
    assert whole.metrics["logged/reward"] == 5.0 != whole.metrics["reward"]
    assert "empty" not in whole.metrics


def _skipping(tools: Any) -> Any:
    return replace(tools, on_bad_row="skip")


def test_an_evaluation_on_other_rows_leaves_out_what_no_answer_can_save(tmp_path: Path) -> None:
    def made(word: str) -> NEATTrainer:
        return NEATTrainer(
            tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER),
            small_model(100),
            config(tmp_path / word, on_bad_row=word, evaluate_contrast=False),
            ROWS,
            processing_class=TOKENIZER,
            reward_processing_classes=TOKENIZER,
        )

    rows = [ROWS[0], {"prompt": user("Tell me " * 20), "id": "long"}]
    with pytest.raises(DataError, match=r"eval_dataset.*no answer can be scored"):
        made("error").evaluate(rows)
    t = made("skip")
    t.evaluate(rows)
    assert t.last_evaluation is not None
    assert len(t.last_evaluation.prompt_ids) == 1
    assert [line["id"] for line in t.parts.data.skipped] == ["long"]
