from __future__ import annotations

import contextlib
import copy
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from neat_align.errors import RewardError, RewardTimeoutError
from neat_align.evaluation.before_after import before_after
from neat_align.evaluation.held_out import EvalTools, Evaluation, evaluate_policy
from neat_align.evaluation.statistics import mean_of
from neat_align.files.atomic import read_json, write_json
from neat_align.modeling.kl import exact_divergence
from neat_align.modeling.requirements import context_of
from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair
from neat_align.prompts.loading import rows_from_dataset
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.rows import PromptRow
from neat_align.rewards.protocol import NamedReward, Unscorable
from neat_align.sampling.policies import Policies
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PLAIN = tiny_tokenizer("none")
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
BANK = InstructionBank(
    "b", "", (InstructionPair("Be very kind to them all.", "Be very rude to them all."),)
)


def rows(n: int = 4) -> list[PromptRow]:
    return rows_from_dataset(
        [
            {
                "prompt": [{"role": "user", "content": f"Question {i}?"}],
                "chosen": [{"role": "assistant", "content": "Hi " * i + "."}],
            }
            for i in range(n)
        ]
    )


def model(seed: int = 0) -> PreTrainedModel:
    return tiny_model("llama", len(TOKENIZER), seed, tokenizer=TOKENIZER)


def length(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def letters(completions: Sequence[Any], **_: Any) -> list[float]:
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def tools(
    policy: PreTrainedModel, *, reference: Any = None, layout: Any = "packed", **changes: Any
) -> EvalTools:
    sampler = TransformersSampler(policy, eos_token_ids=(EOS,), pad_token_id=PAD, batch_size=5)
    policies = Policies(policy, reference, layout, (EOS,), PAD, 5, None, None)
    base = EvalTools(
        tokenizer=TOKENIZER,
        sampler=sampler,
        rewards=(NamedReward("length", length, 2.0),),
        judges=(),
        bank=BANK,
        placement="user_suffix",
        sampling=SamplingParams(max_new_tokens=6),
        logprobs=policies.logprobs,
        context=context_of(policy),
        divergence=None if reference is None else policies.divergence,
    )
    return replace(base, **changes)


def reference_to(start: torch.nn.Module) -> Callable[[], Any]:
    @contextlib.contextmanager
    def opened() -> Iterator[torch.nn.Module]:
        yield start

    return opened


class Scripted:
    """Gives each request the text that a function of its decoded prompt says."""

    def __init__(self, text_of: Callable[[str], str]) -> None:
        self.text_of, self.requests = text_of, list[SampleRequest]()

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        self.requests += requests
        texts = [self.text_of(TOKENIZER.decode(r.prompt_ids)) for r in requests]
        return [
            Sample((*TOKENIZER(t, add_special_tokens=False)["input_ids"], EOS), "stop", -1.0)
            for t in texts
        ]


def an_evaluation(**changes: Any) -> Evaluation:
    base = Evaluation(
        prompt_ids=["a", "b", "c", "d"],
        prompts=["A", "B", "C", "D"],
        completions=[["x"], ["y"], ["z"], ["w"]],
        rewards=[1.0, 2.0, None, 4.0],
        judges={"judge": [0.0, 0.5, 1.0, None]},
        lengths=[1.0, 2.0, 3.0, 4.0],
        clipped=[0.0, 1.0, 0.0, 0.0],
        distinct2=0.5,
        perplexity=10.0,
        kl=None,
        entropy=None,
        contrast={"plain": 1.0, "positive": 2.0, "negative": 0.0},
    )
    return replace(base, **changes)


# ---- comparing -----------------------------------------------------------------------------------


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    before = an_evaluation()
    after = an_evaluation(
        rewards=[3.0, 2.0, 9.0, 5.0],
        judges={"judge": [1.0, 0.5, 0.5, 1.0]},
        lengths=[2.0, 2.0, 2.0, 4.0],
        clipped=[1.0, 1.0, 0.0, 0.0],
        distinct2=0.25,
        perplexity=12.0,
        kl=0.125,
        contrast={"plain": 3.0},
    )
    result = before_after(before, after)
    assert {k: v for k, v in result.items() if not k.endswith("ci95")} == {
        "reward_before": pytest.approx(7 / 3),
        "reward_after": 4.75,
        "reward_delta": 1.0,  # +2, 0, +1
        "win_rate": pytest.approx({"win": 2 / 3, "tie": 1 / 3, "lose": 0.0}),
        "second_judge": "judge",
        "second_judge_before": 0.5,
        "second_judge_after": 0.75,
        "second_judge_delta": pytest.approx(0.5 / 3),  # +1, 0, −0.5
        "perplexity_before": 10.0,
        "perplexity_after": 12.0,
        "distinct2_before": 0.5,
        "distinct2_after": 0.25,
        "kl_per_token": 0.125,
        "mean_length_before": 2.5,
        "mean_length_after": 2.5,
        "clipped_before": 0.25,
        "clipped_after": 0.5,
        "contrast_before": {"plain": 1.0, "positive": 2.0, "negative": 0.0},
        "contrast_after": {"plain": 3.0},
        "held_out_prompts": 4,
        "by_reward": {},  # there is one
        "by_judge": {
            "judge": {
                "before": 0.5,
                "after": 0.75,
                "delta": result["second_judge_delta"],
                "delta_ci95": result["second_judge_delta_ci95"],
            }
        },
    }
    low, high = result["reward_delta_ci95"]
    assert 0 <= low < 1.0 < high <= 2
    write_json(tmp_path / "result.json", result)
    assert read_json(tmp_path / "result.json") == result
    assert before_after(before, after) == result
    backwards = before_after(after, before)
    assert backwards["reward_delta"] == -1.0
    assert backwards["win_rate"] == pytest.approx({"win": 0.0, "tie": 1 / 3, "lose": 2 / 3})


def test_a_comparison_without_rewards_or_judges_says_so() -> None:
    nothing = an_evaluation(rewards=[None] * 4, judges={})
    result = before_after(nothing, nothing)
    for key in (
        "reward_before",
        "reward_after",
        "reward_delta",
        "reward_delta_ci95",
        "win_rate",
        "second_judge",
        "second_judge_delta",
    ):
        assert result[key] is None


@pytest.mark.parametrize("ids", [["a", "b", "c", "e"], ["b", "a", "c", "d"], ["a", "b", "c"]])
def test_evaluations_of_other_prompts_are_not_compared(ids: list[str]) -> None:
    with pytest.raises(ValueError, match="different prompts"):
        before_after(an_evaluation(), an_evaluation(prompt_ids=ids))


# ---- evaluating ----------------------------------------------------------------------------------


def test_the_same_policy_gives_the_same_evaluation_before_and_after(tmp_path: Path) -> None:
    policy = model()
    first = evaluate_policy(rows(), tools(policy), seed=3, samples_per_prompt=2)
    again = evaluate_policy(
        rows()[::-1], tools(copy.deepcopy(policy)), seed=3, samples_per_prompt=2
    )
    assert again.completions[::-1] == first.completions  # whatever the order
    assert len({text for texts in first.completions for text in texts}) > 4
    third = evaluate_policy(
        rows(),
        tools(policy, sampler=replace(tools(policy).sampler, batch_size=1)),
        seed=3,
        samples_per_prompt=2,
    )
    assert third.completions == first.completions
    result = before_after(first, third)
    assert result["reward_delta"] == 0
    assert result["win_rate"] == {"win": 0, "tie": 1, "lose": 0}
    assert (
        evaluate_policy(rows(), tools(policy), seed=4, samples_per_prompt=2).completions
        != first.completions
    )
    write_json(tmp_path / "e.json", first.to_json())
    assert Evaluation(**read_json(tmp_path / "e.json")) == first


def test_numbers_are_means_over_a_prompts_samples() -> None:
    texts = iter(["one", "one two", "three", "four five six"])
    # Rows come in order, and each row's samples side by side.
    found = evaluate_policy(
        rows(2),
        tools(model(), sampler=Scripted(lambda _: next(texts))),
        seed=0,
        samples_per_prompt=2,
        contrast=False,
    )
    assert found.completions == [["one", "one two"], ["three", "four five six"]]
    n = [len(TOKENIZER(t)["input_ids"]) + 1 for t in ("one", "one two", "three", "four five six")]
    assert found.lengths == [(n[0] + n[1]) / 2, (n[2] + n[3]) / 2]
    assert found.rewards == [float(n[0] + n[1]), float(n[2] + n[3])]  # weight 2
    assert found.clipped == [0.0, 0.0]
    assert found.distinct2 == 1.0
    assert found.contrast == {"plain": pytest.approx(sum(n) / 2)}


def test_judges_are_reported_and_never_in_the_reward() -> None:
    policy = model()
    without = evaluate_policy(rows(), tools(policy), seed=0, samples_per_prompt=2)
    judged = evaluate_policy(
        rows(),
        tools(policy, judges=(NamedReward("letters", letters, 100.0),)),
        seed=0,
        samples_per_prompt=2,
    )
    assert judged.rewards == without.rewards
    assert judged.contrast == without.contrast
    assert judged.judges == {
        "letters": [sum(len(t) for t in texts) / 2 for texts in judged.completions]
    }
    assert judged.summary()["judges/letters"] == pytest.approx(mean_of(judged.judges["letters"]))
    only = evaluate_policy(
        rows(),
        tools(policy, rewards=(), judges=(NamedReward("letters", letters, 1.0),)),
        seed=0,
        samples_per_prompt=2,
    )
    assert only.judges == judged.judges
    assert only.rewards == [None] * 4
    assert only.contrast == {}


def test_each_of_several_rewards_is_reported_unweighted() -> None:
    given = (NamedReward("length", length, 2.0), NamedReward("letters", letters, 0.5))
    found = evaluate_policy(rows(), tools(model(), rewards=given), seed=3, samples_per_prompt=2)
    assert list(found.by_reward) == ["length", "letters"]
    for of_sum, tokens, characters in zip(found.rewards, *found.by_reward.values(), strict=True):
        assert of_sum == pytest.approx(2.0 * (tokens or 0.0) + 0.5 * (characters or 0.0))
    # As long as the completions are, a mean over a prompt's two; judges do not come among them.
    assert found.by_reward["length"] == pytest.approx(found.lengths)
    summary = found.summary()
    assert summary["rewards/length/mean"] == pytest.approx(sum(found.lengths) / len(found.lengths))
    alone = evaluate_policy(rows(), tools(model(), rewards=given[:1]), seed=3)
    assert alone.by_reward == {}
    assert not any(name.startswith("rewards/") for name in alone.summary())


def test_a_judge_keeps_its_time_limit() -> None:
    def slow(completions: Sequence[Any], **_: Any) -> list[float]:
        never.wait(10)
        return [0.0] * len(completions)

    never = threading.Event()
    judge = NamedReward("slow", slow, 1.0, timeout=0.05)
    with pytest.raises(RewardTimeoutError, match="'slow' did not return"):
        evaluate_policy(rows(), tools(model(), judges=(judge,)), seed=0)
    never.set()


def test_what_a_judge_cannot_score_and_what_rewards_log_is_in_the_evaluation() -> None:
    def rewarded(completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("mine", 0.25)
        log_metric("reward", 7.0)
        log_extra("number", list(range(len(completions))))
        return [1.0] * len(completions)

    def judge(completions: Any, **_: Any) -> list[Any]:
        bad = Unscorable("is too long")
        return [bad if i in (1, 2, 3) else 1.0 for i in range(len(completions))]

    found = evaluate_policy(
        rows(),
        tools(
            model(),
            rewards=(NamedReward("rewarded", rewarded, 1.0),),
            judges=(NamedReward("judge", judge, 1.0),),
            on_bad_row="skip",
        ),
        seed=0,
        samples_per_prompt=2,
        contrast=False,
    )
    ids = found.prompt_ids
    assert found.left_out == [
        {"prompt_id": ids[p], "sample": s, "reward": "judge", "reason": "is too long"}
        for p, s in ((0, 1), (1, 0), (1, 1))
    ]
    assert found.judges == {"judge": [1.0, None, 1.0, 1.0]}
    assert found.rewards == [1.0] * 4  # a judge has no say in the reward
    assert found.extra == {"number": list(range(8))}
    summary = found.summary()
    assert (summary["unscorable"], summary["mine"], summary["logged/reward"]) == (3.0, 0.25, 7.0)
    assert summary["reward"] == 1.0
    assert Evaluation(**json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(RewardError, match=r"'judge' cannot score .*: it is too long .and 2 more"):
        evaluate_policy(rows(), tools(model(), judges=(NamedReward("judge", judge, 1.0),)), seed=0)


def test_an_evaluations_prompts_are_the_readers_own() -> None:
    given = rows()
    before = copy.deepcopy([row.prompt for row in given])
    found = evaluate_policy(given, tools(model()), seed=0, contrast=False)
    assert found.prompts == before
    for prompt in found.prompts:
        assert isinstance(prompt, list)
        prompt[0]["content"] = ""
        prompt.clear()
    assert [row.prompt for row in given] == before


def test_the_contrast_is_the_reward_under_each_instruction() -> None:
    def answer(prompt: str) -> str:
        return "aaaa" if "very kind" in prompt else "a" if "very rude" in prompt else "aa"

    sampler = Scripted(answer)
    found = evaluate_policy(
        rows(),
        tools(model(), sampler=sampler, rewards=(NamedReward("letters", letters, 1.0),)),
        seed=0,
    )
    assert found.contrast == {"plain": 2.0, "positive": 4.0, "negative": 1.0}
    assert found.completions == [["aa"]] * 4  # the plain prompt's answers are what is evaluated
    assert found.rewards == [2.0] * 4
    assert len(sampler.requests) == 12
    assert len({r.seed for r in sampler.requests}) == 12


def test_drift_is_on_the_plain_samples_and_only_with_a_start_policy() -> None:
    policy, start = model(0), model(1)
    without = evaluate_policy(rows(), tools(policy), seed=0, contrast=False)
    assert without.kl is None
    assert without.entropy is None
    found = evaluate_policy(
        rows(), tools(policy, reference=reference_to(start)), seed=0, contrast=False
    )
    sampler = tools(policy).sampler
    drawn: list[Sample] = []

    class Kept:
        def sample(
            self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Any = None
        ) -> list[Sample]:
            drawn.extend(sampler.sample(requests, params, progress=progress))
            return drawn

    evaluate_policy(rows(), tools(policy, sampler=Kept()), seed=0, contrast=False)
    prompts = [prompt_ids(TOKENIZER, row.prompt) for row in rows()]
    expected = exact_divergence(
        policy,
        reference_to(start),
        prompts,
        [s.token_ids for s in drawn],
        layout="padded",
        pad_token_id=PAD,
        autocast_dtype=None,
    )
    assert expected.kl_per_token > 0.1
    assert (found.kl, found.entropy) == pytest.approx(
        (expected.kl_per_token, expected.entropy_per_token), rel=1e-4
    )
    assert found.kl_by_prompt == pytest.approx(
        [kl / n for kl, n in zip(expected.kl, expected.tokens, strict=True)], rel=1e-4
    )
    same = evaluate_policy(
        rows(), tools(policy, reference=reference_to(policy)), seed=0, contrast=False
    )
    assert same.kl == 0
    assert same.kl_by_prompt == [0.0] * 4
    assert without.kl_by_prompt == []


def test_kl_is_of_each_prompts_first_answer_and_every_token_counts_alike() -> None:
    policy, start, texts = model(0), model(1), ["one", "one two three four", "five six", "seven"]
    given = iter(texts)
    t = tools(policy, sampler=Scripted(lambda _: next(given)), reference=reference_to(start))
    found = evaluate_policy(rows(2), t, seed=0, samples_per_prompt=2, contrast=False)
    prompts = [prompt_ids(TOKENIZER, row.prompt) for row in rows(2)]
    answers = [
        [*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS]
        for text in (texts[0], texts[2])
    ]
    d = exact_divergence(
        policy,
        reference_to(start),
        prompts,
        answers,
        layout="padded",
        pad_token_id=PAD,
        autocast_dtype=None,
    )
    assert found.kl_by_prompt == pytest.approx(
        [kl / len(ids) for kl, ids in zip(d.kl, answers, strict=True)], rel=1e-4
    )
    assert found.kl == pytest.approx(sum(d.kl) / sum(map(len, answers)), rel=1e-4)


def test_what_answers_say_of_themselves_is_a_mean_over_a_prompts_samples() -> None:
    texts = iter(["a b c a b c", "I\u2019m sorry, but no.", "one two three", "As an AI I pass."])
    found = evaluate_policy(
        rows(2),
        tools(model(), sampler=Scripted(lambda _: next(texts))),
        seed=0,
        samples_per_prompt=2,
        contrast=False,
    )
    # Trigrams of the first: abc bca cab abc, one of four repeats.
    assert found.repetition == [0.125, 0.0]
    assert found.refusals == [0.5, 0.5]
    assert (found.summary()["repetition"], found.summary()["refusals"]) == (0.0625, 0.5)


# ---- the data's own answers ----------------------------------------------------------------------


def answer_logprobs(policy: torch.nn.Module, row: PromptRow, text: str) -> list[float]:
    """Log-probabilities of an answer and its end, one row alone."""
    prompt = prompt_ids(TOKENIZER, row.prompt)
    answer = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS]
    with torch.no_grad():
        logps = policy(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return [float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(answer)]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_preferred_answer_is_the_likelier_one_a_token(layout: Any) -> None:
    policy = model().eval()
    pairs = [
        ("Good.", "No"),
        ("No", "Good."),
        ("Same.", "Same."),
        ("Alone.", None),
        (None, "Alone."),
    ]
    given = [replace(row, chosen=c, rejected=r) for row, (c, r) in zip(rows(5), pairs, strict=True)]
    found = evaluate_policy(given, tools(policy, layout=layout), seed=0, contrast=False)
    means = [fmean(answer_logprobs(policy, given[0], text)) for text in ("Good.", "No")]
    sums = [sum(answer_logprobs(policy, given[0], text)) for text in ("Good.", "No")]
    assert (means[0] > means[1]) != (sums[0] > sums[1]), (
        "the test needs a pair that means and sums order differently"
    )
    first = float(means[0] > means[1])
    assert found.pair_accuracy[:2] == [first, 1 - first]
    assert found.pair_accuracy[2:] == [0.5, None, None]
    assert found.summary()["pair_accuracy"] == pytest.approx(0.5)
    chosen_alone = evaluate_policy(given[:4], tools(policy), seed=0, contrast=False)
    assert found.perplexity == pytest.approx(chosen_alone.perplexity)


# ---- perplexity ----------------------------------------------------------------------------------


def perplexity(given: list[PromptRow], t: EvalTools) -> float | None:
    return evaluate_policy(
        given, replace(t, sampler=Scripted(lambda _: "Hello.")), seed=0, contrast=False
    ).perplexity


def test_perplexity_is_over_all_tokens_of_the_chosen_answers_and_their_end() -> None:
    policy = model().eval()
    nll = [-v for row in rows() for v in answer_logprobs(policy, row, str(row.chosen))]
    assert perplexity(rows(), tools(policy)) == pytest.approx(
        math.exp(sum(nll) / len(nll)), rel=1e-4
    )


def test_rows_without_a_chosen_answer_are_left_out_of_perplexity() -> None:
    policy, all_rows = model(), rows()
    some = [replace(row, chosen=None) if i % 2 else row for i, row in enumerate(all_rows)]
    assert perplexity(some, tools(policy)) == pytest.approx(
        perplexity(all_rows[::2], tools(policy))
    )
    assert (
        perplexity([replace(row, chosen=None, rejected="Bad.") for row in all_rows], tools(policy))
        is None
    )


def test_a_long_answer_is_not_cut_in_perplexity() -> None:
    row = rows(1)[0]
    policy = model()
    long = replace(row, chosen="I am glad to help. " * 10)  # far beyond max_new_tokens
    cut = replace(row, chosen="I am glad")
    assert perplexity([long], tools(policy)) != pytest.approx(
        perplexity([cut], tools(policy)), rel=1e-3
    )


def test_text_prompts_have_a_space_before_the_answer() -> None:
    policy = model()
    row = PromptRow("a", "Human: Hi\n\nAssistant:", "Hello.", None, {}, "x:1")
    written = replace(row, chosen=" Hello.")
    t = tools(policy, tokenizer=PLAIN)
    assert perplexity([row], t) == perplexity([written], t)
    assert perplexity([replace(row, prompt="Human: Hi\n\nAssistant: ")], t) != perplexity([row], t)


# ---- summary -------------------------------------------------------------------------------------


def test_the_summary_leaves_out_what_was_not_measured() -> None:
    bare = an_evaluation(
        rewards=[None] * 4,
        judges={"judge": [None] * 4},
        distinct2=None,
        perplexity=None,
        contrast={},
    )
    assert bare.summary() == {"completions/mean_length": 2.5, "completions/clipped_ratio": 0.25}
    measured = {
        "kl": 0.0,
        "entropy": 1.0,
        "repetition": [0.0, 0.5],
        "refusals": [1.0, 0.0],
        "pair_accuracy": [1.0, None, 0.0, 1.0],
    }
    full = an_evaluation(**measured).summary()
    assert full == {
        "reward": pytest.approx(7 / 3),
        "judges/judge": 0.5,
        "completions/mean_length": 2.5,
        "completions/clipped_ratio": 0.25,
        "distinct2": 0.5,
        "repetition": 0.25,
        "refusals": 0.5,
        "pair_accuracy": pytest.approx(2 / 3),
        "perplexity": 10.0,
        "kl": 0.0,
        "entropy": 1.0,
        "contrast/reward/plain": 1.0,
        "contrast/reward/positive": 2.0,
        "contrast/reward/negative": 0.0,
    }


@pytest.mark.parametrize("text", ["", "No."])
def test_answers_of_no_two_words_can_still_be_written_down(tmp_path: Path, text: str) -> None:
    found = evaluate_policy(rows(), tools(model(), sampler=Scripted(lambda _: text)), seed=0)
    assert found.distinct2 is None
    assert "distinct2" not in found.summary()
    write_json(tmp_path / "e.json", found.to_json())
    assert Evaluation(**read_json(tmp_path / "e.json")) == found
    write_json(tmp_path / "r.json", before_after(found, found))
    assert read_json(tmp_path / "r.json")["distinct2_after"] is None


def test_an_evaluation_file_of_an_earlier_version_is_still_read() -> None:
    new = {"kl_by_prompt", "repetition", "refusals", "pair_accuracy"}
    old = {k: v for k, v in an_evaluation().to_json().items() if k not in new}
    assert new & set(an_evaluation().summary()) == set()
    assert Evaluation(**old) == an_evaluation()
