from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neat_align.errors import CollapseError, DataError, RewardError
from neat_align.modeling.logprobs import score_completions
from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair
from neat_align.prompts.loading import rows_from_dataset
from neat_align.prompts.placement import instructed
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.rows import PromptRow, TemplateInputs
from neat_align.prompts.seeds import completion_seed
from neat_align.rewards.protocol import NamedReward
from neat_align.rounds import params as round_params
from neat_align.rounds.completions import read_groups, reward_names_of
from neat_align.rounds.exports import ranked_rows
from neat_align.rounds.human_answers import answer_ids, human_completions
from neat_align.rounds.make_round import make_round
from neat_align.rounds.params import RoundParams, RoundTools
from neat_align.rounds.prompt_order import prompt_at
from neat_align.rounds.round_files import FinishedRound, read_round
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from small_rounds import files_of
from tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PLAIN = tiny_tokenizer("none")
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
BANK = InstructionBank(
    "b", "", (InstructionPair("Be very kind to them all.", "Be very rude to them all."),)
)
NO_ANSWERS: dict[str, Any] = {}


def conversations(n: int, **fields: Any) -> list[PromptRow]:
    return rows_from_dataset(
        [
            {"prompt": [{"role": "user", "content": f"Question {i}?"}], "n": i, **fields}
            for i in range(n)
        ]
    )


def params(**changes: Any) -> RoundParams:
    base = RoundParams(
        seed=7,
        num_positive=2,
        num_negative=2,
        num_plain=1,
        use_human_completions=True,
        placement="user_suffix",
        sampling=SamplingParams(max_new_tokens=6),
        rank_by="reward",
        reward_margin=0.0,
        max_prompt_length=256,
    )
    return replace(base, **changes)


def hashed(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    **columns: Any,
) -> list[float]:
    """A number of each answer's own, the same in every run."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [int.from_bytes(hashlib.sha256(t.encode()).digest()[:4], "big") / 2**32 for t in texts]


def constant(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    **columns: Any,
) -> list[float]:
    return [1.0] * len(completions)


class Counting:
    """A sampler that counts what passes through it."""

    def __init__(self, inner: Sampler) -> None:
        self.inner, self.calls, self.requests = inner, 0, list[SampleRequest]()

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        self.calls += 1
        self.requests += requests
        return self.inner.sample(requests, params, progress=progress)


class Scripted:
    """A sampler whose texts are a function of the request's number, counted over all calls."""

    def __init__(self, text_of: Callable[[int], str], tokenizer: Any = TOKENIZER) -> None:
        self.text_of, self.tokenizer, self.requests = text_of, tokenizer, list[SampleRequest]()

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        first = len(self.requests)
        self.requests += requests
        texts = [self.text_of(first + i) for i in range(len(requests))]
        return [
            Sample(
                (*self.tokenizer(t, add_special_tokens=False)["input_ids"], EOS),
                "stop",
                -float(len(t)),
            )
            for t in texts
        ]


def model_sampler(batch_size: int = 64, seed: int = 0) -> TransformersSampler:
    model = tiny_model("llama", len(TOKENIZER), seed, tokenizer=TOKENIZER)
    return TransformersSampler(model, eos_token_ids=(EOS,), pad_token_id=PAD, batch_size=batch_size)


def tools(
    sampler: Sampler,
    reward: Any = hashed,
    *,
    negative: Sampler | None = None,
    tokenizer: Any = TOKENIZER,
    **more: Any,
) -> RoundTools:
    rewards = () if reward is None else (NamedReward("r", reward, 1.0),)
    return RoundTools(tokenizer, BANK, rewards, sampler, negative or sampler, **more)


def run(
    rows: Sequence[PromptRow],
    folder: Path,
    t: RoundTools,
    p: RoundParams | None = None,
    **kwargs: Any,
) -> FinishedRound:
    options: dict[str, Any] = {"num_groups": 3, "position": 0, "round_index": 0, **kwargs}
    return make_round(rows, params=p or params(), tools=t, folder=folder, **options)


def numbered(i: int) -> str:
    return f"Answer {i}."


# ---- the same round, however it is made ----------------------------------------------------------


def test_the_batch_size_does_not_change_the_round(tmp_path: Path) -> None:
    rows = conversations(
        5,
        chosen=[{"role": "assistant", "content": "Good."}],
        rejected=[{"role": "assistant", "content": "Bad."}],
    )
    rounds = {b: run(rows, tmp_path / str(b), tools(model_sampler(b))) for b in (1, 4, 64)}
    whole = rounds[64]
    assert len(whole.groups) == 3
    counts = Counter(c.origin for g in whole.groups for c in g.completions)
    assert counts == {"positive": 6, "negative": 6, "plain": 3, "chosen": 3, "rejected": 3}
    for b in (1, 4):
        assert [(g.prompt_id, g.prompt, g.prompt_ids) for g in rounds[b].groups] == [
            (g.prompt_id, g.prompt, g.prompt_ids) for g in whole.groups
        ]
        for g, h in zip(rounds[b].groups, whole.groups, strict=True):
            for c, d in zip(g.completions, h.completions, strict=True):
                # All the same, but for fp noise in the sum of log-probabilities.
                assert replace(c, sampling_logprob=None) == replace(d, sampling_logprob=None)
                assert c.sampling_logprob == pytest.approx(d.sampling_logprob, abs=1e-4)
        assert rounds[b].metrics == pytest.approx(whole.metrics, abs=1e-4)


def test_the_same_call_writes_the_same_bytes(tmp_path: Path) -> None:
    rows = conversations(4)
    for name in ("a", "b"):
        run(rows, tmp_path / name, tools(model_sampler()))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert set(files_of(tmp_path / "a")) == {"groups.parquet", "manifest.json"}


def test_what_is_read_back_is_what_was_made(tmp_path: Path) -> None:
    made = run(conversations(4), tmp_path, tools(model_sampler()), round_index=5)
    assert read_round(tmp_path) == made
    assert made.index == 5
    import pyarrow.parquet as pq

    assert reward_names_of(pq.read_table(tmp_path / "groups.parquet")) == ["r"]
    assert read_groups(tmp_path / "groups.parquet") == list(made.groups)


def test_a_finished_round_is_read_and_not_made(tmp_path: Path) -> None:
    rows, sampler = conversations(4), Counting(model_sampler())
    first = run(rows, tmp_path, tools(sampler))
    calls = sampler.calls
    assert calls > 0

    def never(**_: Any) -> list[float]:
        raise AssertionError("a finished round is not scored again")

    assert run(rows, tmp_path, tools(sampler, never)) == first
    assert sampler.calls == calls


def test_other_rounds_and_seeds_draw_other_answers(tmp_path: Path) -> None:
    rows = conversations(3)
    texts = []
    for name, index, seed in (("a", 0, 7), ("b", 1, 7), ("c", 0, 8)):
        made = run(
            rows, tmp_path / name, tools(model_sampler()), params(seed=seed), round_index=index
        )
        texts.append({c.text for g in made.groups for c in g.completions})
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]


def test_groups_that_the_manifest_does_not_match_are_an_error(tmp_path: Path) -> None:
    run(conversations(4), tmp_path, tools(model_sampler()))
    file = tmp_path / "groups.parquet"
    good = file.read_bytes()
    file.write_bytes(good[:-5] + b"x" + good[-4:])
    with pytest.raises(DataError, match=r"does not match .*delete the folder"):
        read_round(tmp_path)
    with pytest.raises(DataError, match="does not match"):
        run(conversations(4), tmp_path, tools(model_sampler()))
    file.unlink()
    with pytest.raises(DataError, match="does not match"):
        read_round(tmp_path)
    assert read_round(tmp_path / "nowhere") is None


# ---- interruptions -------------------------------------------------------------------------------


def test_an_interrupted_round_takes_up_its_samples(tmp_path: Path) -> None:
    rows = conversations(5)
    expected = run(rows, tmp_path / "whole", tools(model_sampler()))
    sampler, calls = Counting(model_sampler()), []

    def flaky(**kwargs: Any) -> list[float]:
        calls.append(len(kwargs["completions"]))
        if len(calls) == 1:
            raise ConnectionError("the reward server is away")
        return hashed(**kwargs)

    with pytest.raises(Exception, match="the reward server is away"):
        run(rows, tmp_path / "cut", tools(sampler, flaky))
    assert read_round(tmp_path / "cut") is None
    assert list((tmp_path / "cut").rglob("sampled.parquet"))
    sampled = sampler.calls
    again = run(rows, tmp_path / "cut", tools(sampler, flaky))
    assert sampler.calls == sampled  # nothing was sampled again
    assert again == expected
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_finished_batches_of_scores_are_kept_and_not_paid_for_twice(tmp_path: Path) -> None:
    rows = conversations(40)  # 5 answers each: batches of 12 groups, the last of four
    expected = run(rows, tmp_path / "whole", tools(Scripted(numbered)), num_groups=40)
    sampler, paid = Counting(Scripted(numbered)), list[list[str]]()

    def dies_in_the_third(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        if len(paid) == 2:
            raise ConnectionError("the judge is away")
        paid.append([c[0]["content"] for c in completions])
        return hashed(completions=completions, **kwargs)

    with pytest.raises(
        RewardError,
        match=r"raised ConnectionError on a batch of 60 rows \(.*row \d+; .*row \d+ and 4 more\): "
        r"the judge",
    ):
        run(rows, tmp_path / "cut", tools(sampler, dies_in_the_third), num_groups=40)
    assert [len(batch) for batch in paid] == [60, 60]
    drawn = sampler.calls
    again: list[list[str]] = []

    def alive(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        again.append([c[0]["content"] for c in completions])
        return hashed(completions=completions, **kwargs)

    assert run(rows, tmp_path / "cut", tools(sampler, alive), num_groups=40) == expected
    assert sampler.calls == drawn
    assert [len(batch) for batch in again] == [60, 20]
    texts = [text for batch in (*paid, *again) for text in batch]
    assert len(texts) == len(set(texts)) == 200
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "digit", "other", "emptied", "weights"])
def test_kept_scores_that_are_damaged_or_of_something_else_are_not_used(
    tmp_path: Path, damage: str
) -> None:
    rows, calls = conversations(24), list[int]()

    def dies_in_the_second(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 2:
            raise ConnectionError("away")
        return hashed(completions=completions, **kwargs)

    t = tools(Scripted(numbered), dies_in_the_second)
    with pytest.raises(RewardError, match="away"):
        run(rows, tmp_path, t, num_groups=24)
    (kept,) = tmp_path.rglob("scored-*.parquet")
    if damage == "cut":
        kept.write_bytes(kept.read_bytes()[:-20])
    elif damage == "other":
        for file in tmp_path.rglob("sample*.parquet"):  # lost, and drawn again as other texts
            file.unlink()
        t = replace(
            t,
            sampler=Scripted(lambda i: f"Other {i}."),
            negative_sampler=Scripted(lambda i: f"Bad {i}."),
        )
    elif damage == "digit":
        whole = bytearray(kept.read_bytes())
        whole[len(whole) // 3] ^= 1
        kept.write_bytes(whole)
    elif damage == "emptied":
        kept.write_bytes(b"")
    else:
        t = replace(t, rewards=(replace(t.rewards[0], weight=2.0),))
    made = run(rows, tmp_path, t, num_groups=24)
    assert calls == [60, 60, 60, 60]
    assert all(
        c.reward == (2.0 if damage == "weights" else 1.0) * c.reward_components[0]
        for g in made.groups
        for c in g.completions
    )


def test_a_batch_holds_whole_groups(tmp_path: Path) -> None:
    """A reward that compares the completions of one prompt sees all of them."""
    seen: list[list[int]] = []

    def centred(n: Sequence[int], **kwargs: Any) -> list[float]:
        seen.append(list(n))
        return hashed(**kwargs)

    run(conversations(40), tmp_path, tools(Scripted(numbered), centred), num_groups=40)
    assert len(seen) == 4
    assert all(batch.count(i) == 5 for batch in seen for i in batch)


def test_an_interruption_in_a_later_slice_keeps_the_finished_ones(tmp_path: Path) -> None:
    rows = conversations(6)

    def some(prompts: Sequence[Any], **kwargs: Any) -> list[float]:
        # Half of the prompts get one score for all their answers, and make no pair.
        scores = hashed(prompts, kwargs["completions"], kwargs["completion_ids"])
        return [s if n % 2 else 0.5 for s, n in zip(scores, kwargs["n"], strict=True)]

    expected = run(rows, tmp_path / "whole", tools(model_sampler(), some))
    assert expected.metrics["round/prompts"] > 3  # there was a second slice
    calls = 0

    def flaky(**kwargs: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ConnectionError("away")
        return some(**kwargs)

    sampler = Counting(model_sampler())
    with pytest.raises(Exception, match="away"):
        run(rows, tmp_path / "cut", tools(sampler, flaky))
    before = sampler.calls
    assert run(rows, tmp_path / "cut", tools(sampler, flaky)) == expected
    whole = Counting(model_sampler())
    run(rows, tmp_path / "counted", tools(whole, some))
    assert sampler.calls == whole.calls
    assert sampler.calls > before or calls == 3
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("what", ["rows", "seed", "sampling"])
def test_samples_of_other_prompts_or_settings_are_not_taken_up(tmp_path: Path, what: str) -> None:
    def away(**_: Any) -> list[float]:
        raise ConnectionError("away")

    rows, p = conversations(3), params()
    with pytest.raises(Exception, match="away"):
        run(rows, tmp_path / "cut", tools(model_sampler(), away), p)
    if what == "rows":
        rows = rows_from_dataset(
            [{"prompt": [{"role": "user", "content": f"Another {i}?"}], "n": i} for i in range(3)]
        )
    elif what == "seed":
        p = params(seed=8)
    else:
        p = params(sampling=SamplingParams(max_new_tokens=6, temperature=0.3))
    expected = run(rows, tmp_path / "fresh", tools(model_sampler()), p)
    try:
        again = run(rows, tmp_path / "cut", tools(model_sampler()), p)
    except DataError:  # to refuse would do as well
        return
    assert again == expected


def test_samples_under_other_inputs_of_the_template_are_not_taken_up(tmp_path: Path) -> None:
    def away(**_: Any) -> list[float]:
        raise ConnectionError("away")

    rows = conversations(3)
    with pytest.raises(Exception, match="away"):
        run(rows, tmp_path, tools(model_sampler(), away))
    thinking = TemplateInputs(kwargs={"enable_thinking": True})
    sampler = Counting(model_sampler())
    run([replace(row, template_inputs=thinking) for row in rows], tmp_path, tools(sampler))
    assert sampler.calls > 0


# ---- what is filtered ----------------------------------------------------------------------------


def test_blanks_repeats_and_leaks_are_removed_and_counted(tmp_path: Path) -> None:
    good = Scripted(
        lambda i: ["Fine.", "  \n ", "Fine.", "Be very kind to them, it said.", "Plain.", "Fine."][
            i
        ]
    )
    bad = Scripted(lambda i: ["Fine.", "As an evil AI, I say no.", "No!"][i])
    p = params(num_positive=4, num_plain=2, num_negative=3)
    made = run(conversations(1), tmp_path, tools(good, negative=bad), p, num_groups=1)
    (g,) = made.groups
    assert [(c.origin, c.index, c.text) for c in g.completions] == [
        ("positive", 0, "Fine."),
        ("plain", 0, "Plain."),
        ("negative", 2, "No!"),
    ]
    removed = {k: v for k, v in made.metrics.items() if k.startswith("removed/")}
    assert removed == {"removed/empty": 1, "removed/duplicate": 3, "removed/leak": 2}
    assert len(good.requests) == 6
    assert len(bad.requests) == 3


def test_what_was_removed_is_counted_once_after_an_interruption(tmp_path: Path) -> None:
    calls = 0

    def flaky(**kwargs: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ConnectionError("away")
        return hashed(**kwargs)

    sampler = Scripted(lambda i: ["Fine.", "Fine.", "A plain one.", " ", "No."][i])
    with pytest.raises(Exception, match="away"):
        run(conversations(1), tmp_path, tools(sampler, flaky), num_groups=1)
    made = run(conversations(1), tmp_path, tools(sampler, flaky), num_groups=1)
    assert (
        made.metrics["removed/empty"],
        made.metrics["removed/duplicate"],
        made.metrics["removed/leak"],
    ) == (1, 1, 0)


# ---- which prompts -------------------------------------------------------------------------------


def test_prompts_without_a_pair_give_their_place_to_the_next(tmp_path: Path) -> None:
    rows = conversations(12)
    order = [prompt_at(12, 7, 2 + i) for i in range(6)]  # as many as may be tried: twice three
    without_pair = {order[0], order[3]}

    def reward(completions: Sequence[Any], n: Sequence[int], **_: Any) -> list[float]:
        return [0.0 if row in without_pair else float(i) for i, row in enumerate(n)]

    made = run(rows, tmp_path, tools(Scripted(numbered), reward), position=2)
    kept = [next(i for i, row in enumerate(rows) if row.id == g.prompt_id) for g in made.groups]
    assert kept == [order[1], order[2], order[4]]
    assert made.next_position == 2 + 5
    assert read_round(tmp_path) == made
    assert made.metrics["round/prompts"] == 5
    assert made.metrics["round/groups"] == 3
    assert made.metrics["round/pair_fraction"] == pytest.approx(3 / 5)
    # The next round goes on where this one stopped.
    following = run(
        rows,
        tmp_path / "next",
        tools(Scripted(numbered), hashed),
        position=made.next_position,
        num_groups=1,
    )
    assert following.groups[0].prompt_id == rows[prompt_at(12, 7, 7)].id


def test_no_more_than_twice_the_groups_are_tried(tmp_path: Path) -> None:
    rows = conversations(20)
    tried: list[int] = []

    def reward(completions: Sequence[Any], n: Sequence[int], **_: Any) -> list[float]:
        tried.extend(n)
        return [float(i) if row == prompt_at(20, 7, 0) else 0.0 for i, row in enumerate(n)]

    made = run(rows, tmp_path, tools(Scripted(numbered), reward))
    assert len(made.groups) == 1
    assert made.next_position == 6
    assert len(set(tried)) == 6


def test_a_round_of_more_groups_than_prompts_uses_each_prompt_once(tmp_path: Path) -> None:
    made = run(conversations(4), tmp_path, tools(Scripted(numbered)), num_groups=10)
    assert len({g.prompt_id for g in made.groups}) == len(made.groups) == 4
    assert made.next_position == 4


def test_a_prompt_that_a_new_pass_brings_again_is_used_once_a_round(tmp_path: Path) -> None:
    # Position 2 of four: the round goes over the end of a pass, and may meet a prompt twice.
    for position in range(8):
        made = run(
            conversations(4),
            tmp_path / str(position),
            tools(Scripted(numbered)),
            num_groups=4,
            position=position,
        )
        ids = [g.prompt_id for g in made.groups]
        assert len(set(ids)) == len(ids)
        assert made.next_position == position + 4


@pytest.mark.parametrize("n", [1, 5, 32])
def test_the_stream_brings_every_prompt_once_a_pass(n: int) -> None:
    passes = [[prompt_at(n, 3, c * n + i) for i in range(n)] for c in range(3)]
    assert all(sorted(p) == list(range(n)) for p in passes)
    if n > 4:
        assert passes[0] != passes[1]  # shuffled anew
        assert passes[0] != [prompt_at(n, 4, i) for i in range(n)]


def test_nothing_that_ranks_is_a_collapse(tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match=r"0 of 5 prompts .* reward_margin=0\.0"):
        run(conversations(5), tmp_path, tools(Scripted(numbered), constant))
    assert read_round(tmp_path) is None


def test_too_few_that_rank_are_a_collapse(tmp_path: Path) -> None:
    def reward(n: Sequence[int], **_: Any) -> list[float]:
        return [float(i) if row == 0 else 0.0 for i, row in enumerate(n)]

    args = conversations(4), tools(Scripted(numbered), reward)
    assert (
        len(
            run(
                args[0], tmp_path / "a", args[1], params(min_pair_fraction=0.25), num_groups=4
            ).groups
        )
        == 1
    )
    with pytest.raises(CollapseError, match="1 of 4 prompts"):
        run(args[0], tmp_path / "b", args[1], params(min_pair_fraction=0.26), num_groups=4)


def test_the_margin_decides_what_is_a_pair(tmp_path: Path) -> None:
    def reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [0.5 * (i % 2) for i in range(len(completions))]

    assert run(
        conversations(2),
        tmp_path / "a",
        tools(Scripted(numbered), reward),
        params(reward_margin=0.4),
    ).groups
    with pytest.raises(CollapseError):
        run(
            conversations(2),
            tmp_path / "b",
            tools(Scripted(numbered), reward),
            params(reward_margin=0.5),
        )


# ---- what is sampled, and what is stored ---------------------------------------------------------


@pytest.mark.parametrize("placement", ["system", "user_suffix", "affix"])
def test_the_instruction_is_sampled_with_and_never_stored_with_the_prompt(
    tmp_path: Path, placement: str
) -> None:
    rows, good, bad = (
        conversations(1),
        Scripted(lambda i: f"Good {i}."),
        Scripted(lambda i: f"Bad {i}."),
    )
    made = run(rows, tmp_path, tools(good, negative=bad), params(placement=placement), num_groups=1)
    (g,) = made.groups
    plain = tuple(prompt_ids(TOKENIZER, rows[0].prompt))
    assert g.prompt == rows[0].prompt
    assert g.prompt_ids == plain
    assert "Be very" not in TOKENIZER.decode(g.prompt_ids)
    pair = BANK.pairs[0]
    positive, negative = (
        tuple(prompt_ids(TOKENIZER, *instructed(rows[0].prompt, i, placement)))
        for i in (pair.positive, pair.negative)
    )
    assert [r.prompt_ids for r in good.requests] == [positive, positive, plain]
    assert [r.prompt_ids for r in bad.requests] == [negative, negative]
    assert "very rude" in TOKENIZER.decode(negative)
    assert [(c.origin, c.index, c.instruction) for c in g.completions] == [
        ("positive", 0, pair.positive),
        ("positive", 1, pair.positive),
        ("plain", 0, None),
        ("negative", 0, pair.negative),
        ("negative", 1, pair.negative),
    ]
    for c, request in zip(g.completions, [*good.requests, *bad.requests], strict=True):
        assert c.seed == request.seed == completion_seed(7, 0, rows[0].id, c.origin, c.index)
    assert len({c.seed for c in g.completions}) == 5


def test_the_negative_sampler_writes_the_negatives_and_nothing_else(tmp_path: Path) -> None:
    rows = conversations(3)
    good, bad = Scripted(lambda i: f"Good {i}."), Scripted(lambda i: f"Bad {i}.")
    made = run(rows, tmp_path, tools(good, negative=bad))
    for g in made.groups:
        for c in g.completions:
            assert c.text.startswith("Bad" if c.origin == "negative" else "Good")
    assert len(bad.requests) == 6
    assert len(good.requests) == 9


def test_tokens_are_kept_as_sampled_and_text_as_read(tmp_path: Path) -> None:
    made = run(
        conversations(1), tmp_path, tools(Scripted(lambda i: f"  Answer {i}. ")), num_groups=1
    )
    c = made.groups[0].completions[0]
    assert c.text == "Answer 0."
    assert c.token_ids == (*TOKENIZER("  Answer 0. ")["input_ids"], EOS)
    assert c.sampling_logprob == -12.0


def test_rewards_get_the_plain_prompt_the_answer_as_messages_and_the_rows_columns(
    tmp_path: Path,
) -> None:
    seen: dict[str, list[Any]] = {}

    def reward(**kwargs: Any) -> list[float]:
        for name, values in kwargs.items():
            seen.setdefault(name, []).extend(values)
        return hashed(**kwargs)

    rows = conversations(2)
    made = run(rows, tmp_path, tools(Scripted(numbered), reward), num_groups=2)
    by_id = {row.id: row for row in rows}
    flat = [(by_id[g.prompt_id], c) for g in made.groups for c in g.completions]
    assert seen["prompts"] == [row.prompt for row, _ in flat]
    assert seen["completions"] == [[{"role": "assistant", "content": c.text}] for _, c in flat]
    assert [tuple(ids) for ids in seen["completion_ids"]] == [c.token_ids for _, c in flat]
    assert seen["n"] == [row.columns["n"] for row, _ in flat]


def test_several_rewards_are_weighted_and_an_abstention_is_none(tmp_path: Path) -> None:
    def length(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    def shy(completions: Sequence[Any], **_: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    t = replace(
        tools(Scripted(lambda i: "word " * (i + 1))),
        rewards=(NamedReward("length", length, 0.5), NamedReward("shy", shy, 2.0)),
    )
    made = run(conversations(1), tmp_path, t, num_groups=1)
    for i, c in enumerate(made.groups[0].completions):
        n, s = float(len(c.token_ids)), None if i % 2 else 1.0
        assert c.reward_components == (n, s)
        assert c.reward == 0.5 * n + 2.0 * (s or 0.0)
    assert made.metrics["rewards/shy/mean"] == 1.0


# ---- ranking by origin ---------------------------------------------------------------------------


def test_ranking_by_origin_needs_no_reward(tmp_path: Path) -> None:
    made = run(
        conversations(3), tmp_path, tools(Scripted(numbered), None), params(rank_by="origin")
    )
    assert len(made.groups) == 3
    assert {c.reward for g in made.groups for c in g.completions} == {None}
    assert not any(k.startswith("reward") for k in made.metrics)
    assert read_round(tmp_path) == made
    with pytest.raises(CollapseError):
        run(conversations(3), tmp_path / "reward", tools(Scripted(numbered), None))
    with pytest.raises(CollapseError):  # one origin alone has nothing below it
        run(
            conversations(3),
            tmp_path / "one",
            tools(Scripted(numbered), None),
            params(rank_by="origin", num_negative=0, num_plain=0),
        )


# ---- negatives from other prompts ----------------------------------------------------------------

OTHERS: dict[str, Any] = {
    "negative_source": "other_prompts",
    "rank_by": "origin_then_reward",
    "num_plain": 0,
    "use_human_completions": False,
}


def test_negatives_from_other_prompts_are_the_next_rows_further_good_answers(
    tmp_path: Path,
) -> None:
    """Row r's negatives are what row r + 1 would have said as its third and fourth positive."""
    rows, sampler, wide = conversations(3), Counting(model_sampler()), Counting(model_sampler())
    made = run(rows, tmp_path / "others", tools(sampler), params(**OTHERS))
    more = run(
        rows,
        tmp_path / "wide",
        tools(wide),
        params(num_positive=4, num_negative=0, num_plain=0, use_human_completions=False),
    )
    assert len(sampler.requests) == len(wide.requests) == 3 * 4
    assert [g.prompt_id for g in made.groups] == [g.prompt_id for g in more.groups]
    for r, g in enumerate(made.groups):
        donor = more.groups[(r + 1) % 3]
        negatives = [c for c in g.completions if c.origin == "negative"]
        assert [c.index for c in negatives] == [0, 1]
        for c, d in zip(negatives, donor.completions[2:], strict=True):
            assert replace(c, origin="positive", index=d.index, sampling_logprob=None) == replace(
                d, sampling_logprob=None
            )
            assert c.sampling_logprob == pytest.approx(d.sampling_logprob, abs=1e-4)
            assert c.instruction == BANK.pairs[0].positive
        assert [c for c in g.completions if c.origin == "positive"] == list(
            more.groups[r].completions[:2]
        )
        assert g.prompt_ids == tuple(
            prompt_ids(TOKENIZER, next(row for row in rows if row.id == g.prompt_id).prompt)
        )
    asked = [TOKENIZER.decode(r.prompt_ids) for r in sampler.requests]
    assert all("very kind" in text for text in asked)
    assert len({r.seed for r in sampler.requests}) == 12


def test_negatives_from_other_prompts_come_last(tmp_path: Path) -> None:
    # The reward likes the others' answers best of all.
    later_is_better = tools(
        Scripted(numbered), lambda completions, **_: [float(i) for i in range(len(completions))]
    )
    made = run(conversations(3), tmp_path, later_is_better, params(**OTHERS))
    for row, g in zip(
        ranked_rows(made.groups, rank_by="origin_then_reward"), made.groups, strict=True
    ):
        assert row["origins"] == ["positive", "positive", "negative", "negative"]
        assert max(row["rewards"][:2]) < max(row["rewards"][2:])
        assert g.prompt == row["prompt"]


def test_a_prompt_that_is_alone_has_nobody_to_take_negatives_from(tmp_path: Path) -> None:
    sampler = Counting(model_sampler())
    made = run(conversations(1), tmp_path, tools(sampler), params(**OTHERS), num_groups=1)
    assert [c.origin for g in made.groups for c in g.completions] == ["positive", "positive"]
    assert len(sampler.requests) == 2


def test_an_interrupted_round_of_others_negatives_is_taken_up_and_never_mixed_with_ones_own(
    tmp_path: Path,
) -> None:
    rows, p = conversations(3), params(**OTHERS)
    expected = run(rows, tmp_path / "whole", tools(model_sampler()), p)

    def away(**_: Any) -> list[float]:
        raise ConnectionError("away")

    for folder in ("cut", "changed"):
        sampler = Counting(model_sampler())
        with pytest.raises(Exception, match="away"):
            run(
                rows,
                tmp_path / folder,
                tools(sampler, away),
                p if folder == "cut" else replace(p, negative_source="instruction"),
            )
        calls = sampler.calls
        assert run(rows, tmp_path / folder, tools(sampler), p) == expected
        assert (sampler.calls == calls) == (folder == "cut")
        assert files_of(tmp_path / folder) == files_of(tmp_path / "whole")


# ---- human answers -------------------------------------------------------------------------------


def text_row(prompt: str, chosen: str | None, rejected: str | None) -> PromptRow:
    return PromptRow("id", prompt, chosen, rejected, NO_ANSWERS, "data.jsonl:3")


def test_a_human_answer_after_assistant_begins_with_a_space_and_ends_the_turn() -> None:
    row = text_row("\n\nHuman: Hi\n\nAssistant:", "Hello.", "Go.")
    chosen, rejected = human_completions(row, PLAIN, 20)
    assert PLAIN.decode(chosen.token_ids) == " Hello.<|im_end|>"
    assert chosen.token_ids == (*PLAIN(" Hello.")["input_ids"], EOS)
    assert (chosen.origin, chosen.text, chosen.finish_reason, chosen.instruction, chosen.seed) == (
        "chosen",
        "Hello.",
        "stop",
        None,
        None,
    )
    assert (rejected.origin, rejected.text) == ("rejected", "Go.")
    assert chosen.sampling_logprob is None


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("Assistant:", "Hi", " Hi"),
        ("Assistant:", " Hi", " Hi"),
        ("Assistant: ", "Hi", "Hi"),
        ("Answer\n", "Hi", "Hi"),
        ([{"role": "user", "content": "Q"}], "Hi", "Hi"),
    ],
)
def test_where_the_space_goes(prompt: Any, answer: str, expected: str) -> None:
    ids, reason = answer_ids(replace(text_row("", None, None), prompt=prompt), answer, PLAIN, 20)
    assert PLAIN.decode(ids[:-1]) == expected
    assert reason == "stop"


def test_a_human_answer_that_is_too_long_is_cut_without_an_end() -> None:
    text = "The answer is that it depends on the weather."
    n = len(PLAIN(" " + text)["input_ids"])
    row = text_row("Assistant:", text, None)
    (fits,) = human_completions(row, PLAIN, n + 1)
    assert fits.finish_reason == "stop"
    assert len(fits.token_ids) == n + 1
    for limit in (n, 3):
        (cut,) = human_completions(row, PLAIN, limit)
        assert cut.finish_reason == "length"
        assert len(cut.token_ids) == limit
        assert EOS not in cut.token_ids
        # What is rewarded is what is trained on.
        assert cut.text == PLAIN.decode(cut.token_ids).strip()
        assert text.startswith(cut.text)
    assert human_completions(text_row("Assistant:", None, None), PLAIN, 5) == []


def test_human_answers_can_be_left_out(tmp_path: Path) -> None:
    rows = [text_row("Assistant:", "Yes.", "No.")]
    t = tools(Scripted(numbered, PLAIN), tokenizer=PLAIN)
    with_human = run(rows, tmp_path / "with", t, num_groups=1)
    without = run(rows, tmp_path / "without", t, params(use_human_completions=False), num_groups=1)
    origins = [c.origin for c in with_human.groups[0].completions]
    assert origins == [
        "positive",
        "positive",
        "plain",
        "negative",
        "negative",
        "chosen",
        "rejected",
    ]
    assert [c.origin for c in without.groups[0].completions] == origins[:5]


def test_a_prompt_that_is_too_long_is_named_and_nothing_is_sampled(tmp_path: Path) -> None:
    rows = [text_row("One two three:", None, None)]
    n = len(prompt_ids(PLAIN, "One two three:"))
    sampler = Scripted(numbered, PLAIN)
    with pytest.raises(
        DataError,
        match=rf"data\.jsonl:3: the prompt is {n} tokens and max_prompt_length is {n - 1}",
    ):
        run(rows, tmp_path, tools(sampler, tokenizer=PLAIN), params(max_prompt_length=n - 1))
    assert not sampler.requests
    assert run(rows, tmp_path, tools(sampler, tokenizer=PLAIN), params(max_prompt_length=n)).groups


# ---- log-probabilities ---------------------------------------------------------------------------


def test_log_probabilities_are_under_the_plain_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_params, "MEASURED_SHARE", 1.0)
    policy, start = (tiny_model("llama", len(TOKENIZER), seed).eval() for seed in (0, 1))

    def of(model: torch.nn.Module) -> Callable[..., list[tuple[float, ...]]]:
        return lambda prompts, completions: score_completions(
            model, prompts, completions, layout="packed", pad_token_id=PAD, autocast_dtype=None
        )

    made = run(
        conversations(2),
        tmp_path,
        tools(model_sampler(), policy_logprobs=of(policy), ref_logprobs=of(start)),
        num_groups=2,
    )
    assert read_round(tmp_path) == made
    flat = [(g, c) for g in made.groups for c in g.completions]
    assert flat
    for model, field in ((policy, "policy_logprobs"), (start, "ref_logprobs")):
        for g, c in flat:
            with torch.no_grad():
                logps = (
                    model(input_ids=torch.tensor([g.prompt_ids + c.token_ids]))
                    .logits[0]
                    .log_softmax(-1)
                )
            expected = [
                float(logps[len(g.prompt_ids) - 1 + t, token])
                for t, token in enumerate(c.token_ids)
            ]
            assert getattr(c, field) == pytest.approx(expected, abs=1e-4)
    # The policy sampled these: under its own instruction they are likelier, and where there is none
    # the numbers agree.
    plain = [c for _, c in flat if c.origin == "plain"]
    assert [c.sampling_logprob for c in plain] == pytest.approx(
        [sum(c.policy_logprobs) for c in plain], abs=1e-3
    )
    assert made.metrics["sampling/instruction_gap/plain"] == pytest.approx(0, abs=1e-4)
    gaps = [
        (c.sampling_logprob - sum(c.policy_logprobs)) / len(c.token_ids)
        for _, c in flat
        if c.origin == "negative"
    ]  # type: ignore[operator]
    assert made.metrics["sampling/instruction_gap/negative"] == pytest.approx(
        sum(gaps) / len(gaps), abs=1e-5
    )
    ks = [
        math.exp(r - p) - (r - p) - 1
        for _, c in flat
        if c.origin == "negative"
        for p, r in zip(c.policy_logprobs, c.ref_logprobs, strict=True)
    ]
    assert made.metrics["kl/negative"] == pytest.approx(sum(ks) / len(ks), rel=1e-4)


def test_before_the_first_step_the_start_policy_is_scored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_params, "MEASURED_SHARE", 1.0)
    calls = 0

    def once(
        prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        nonlocal calls
        calls += 1
        return [tuple(-float(t % 5) for t in c) for c in completions]

    made = run(
        conversations(2),
        tmp_path,
        tools(Scripted(numbered), policy_logprobs=once, ref_logprobs=once),
        num_groups=2,
    )
    assert calls == 1
    for c in (c for g in made.groups for c in g.completions):
        assert c.policy_logprobs == c.ref_logprobs == tuple(-float(t % 5) for t in c.token_ids)


# ---- the round's metrics -------------------------------------------------------------------------


def test_metrics_by_hand(tmp_path: Path) -> None:
    def reward(completions: Sequence[Any], **_: Any) -> list[float | None]:
        # Two prompts, each: positive, positive, plain, negative, negative.
        return [3.0, 1.0, 0.0, 2.0, -2.0, 1.0, 1.0, None, 1.0, 0.0]

    made = run(conversations(2), tmp_path, tools(Scripted(numbered), reward), num_groups=2)
    m = made.metrics
    assert m["reward"] == pytest.approx(7 / 9)
    assert m["reward/positive"] == 1.5
    assert m["reward/negative"] == 0.25
    assert m["rewards/abstained"] == pytest.approx(0.1)
    assert m["contrast/reward_gap"] == pytest.approx(((2 - 0) + (1 - 0.5)) / 2)
    # Negative above positive once (2 > 1), level twice (1 = 1), of eight pairs.
    assert m["contrast/inversion_rate"] == pytest.approx((1 + 0.5 * 2) / 8)
    assert m["completions/clipped_ratio"] == 0
    assert "reward/chosen" not in m
    assert not any(math.isnan(v) for v in m.values())


def test_progress_reports_what_is_done(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    run(conversations(3), tmp_path, tools(model_sampler(4)), progress=lambda *now: said.append(now))
    sample = [(done, total) for stage, done, total in said if stage == "sample"]
    assert sample[-1] == (15, 15)
    assert [d for d, _ in sample] == sorted(d for d, _ in sample)
    assert ("score", 3, 3) in said


def test_a_prompt_whose_answers_are_all_removed_makes_no_pair(tmp_path: Path) -> None:
    # Three answers a prompt, in order of prompts: the first prompt's are all blank, and so is every
    # negative.
    made = run(
        conversations(3),
        tmp_path,
        tools(
            Scripted(lambda i: " " if i < 3 else f"Answer {i}."), negative=Scripted(lambda i: "")
        ),
    )
    assert made.metrics["round/prompts"] == 3
    assert made.metrics["removed/empty"] == 9
    assert [[c.origin for c in g.completions] for g in made.groups] == [
        ["positive", "positive", "plain"]
    ] * 2
    assert conversations(3)[prompt_at(3, 7, 0)].id not in {g.prompt_id for g in made.groups}
