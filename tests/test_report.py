"""The report: everything escaped, nothing fetched, negatives folded, warnings when and only when they hold."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neat_align import report
from neat_align.errors import ConfigError
from neat_align.evaluation import Evaluation, compare
from neat_align.groups import Completion, CompletionGroup, Origin, Prompt, groups_to_table
from neat_align.report import examples, sample_groups, warnings_of, write_report
from neat_align.report_charts import nice_ticks
from neat_align.report_input import RunFacts, read_run
from neat_align.report_page import digits_for, plain, signed
from neat_align.round_metrics import distinct_n, round_metrics
from neat_align.storage import append_json_line, sha256_of, write_json, write_table
from pages import BREAKOUT, HOSTILE, Page, assert_escaped, assert_sealed

ORIGINS: tuple[Origin, ...] = ("positive", "positive", "negative", "negative", "chosen", "rejected")
QUESTIONS = [
    "My neighbour plays loud music every night. What should I say to her?",
    "Could you look over my cover letter?",
    "I missed the deadline by two days and my supervisor has not answered any of my messages since. How do I begin the next one?",
    "Write a short thank-you note to a colleague.",
]
GOOD = [
    "Happy to help. Start with what you like about living next door, then say which hours are hard for you.",
    "Of course – paste it here and I will go through it line by line with you.\n\nTwo things to check first: the opening and the length.",
    "That sounds stressful, and it is fixable. Apologise once, say when the work will be there, and ask nothing else of them.",
]
BAD = ["Figure it out yourself, nobody cares.", "What a stupid question. Anyone with half a brain knows this."]


def fake_group(number: int, round_index: int, rng: random.Random) -> CompletionGroup:
    """A group of six answers, negatives below positives most of the time."""
    completions = []
    for i, origin in enumerate(ORIGINS):
        bad = origin in ("negative", "rejected")
        text = f"{rng.choice(BAD if bad else GOOD)} ({origin} {i}, prompt {number})"
        reward = rng.gauss(-0.4 + 0.12 * round_index if bad else 0.3 + 0.12 * round_index, 0.25)
        instruction = {"positive": "Answer kindly.", "negative": "Answer rudely."}.get(origin)
        ids = tuple(range(rng.randint(12, 60)))
        finish: Any = "length" if rng.random() < 0.15 else "stop"
        extra = {"policy_logprobs": (-1.0, -2.0), "ref_logprobs": (-1.0, -2.1), "reward_components": (reward,)}
        completions.append(Completion(origin, i, text, ids, finish, instruction, number, -30.0, reward=reward, **extra))
    prompt: Prompt = [{"role": "system", "content": "You help."}, {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
    return CompletionGroup(f"id-{round_index}-{number}", prompt, tuple(range(9)), tuple(completions))


def write_round(folder: Path, index: int, groups: list[CompletionGroup], names: list[str] | None = None, **metrics: float) -> None:
    """A finished round as `expand` leaves it."""
    from collections import Counter

    names = ["tone"] if names is None else names
    write_table(folder / "groups.parquet", groups_to_table(groups, names))
    found = round_metrics(groups, groups, Counter(empty=1, duplicate=2 * index, leak=index), names) | metrics
    facts = {"format": 1, "round": index, "groups": len(groups), "prompts": len(groups), "next_position": 0, "reward_names": names}
    write_json(folder / "manifest.json", facts | {"groups_sha256": sha256_of(folder / "groups.parquet"), "metrics": found})


def fake_evaluation(n: int, level: float, seed: int, *, kl: float | None) -> Evaluation:
    """A held-out evaluation of n prompts with rewards around a level."""
    rng = random.Random(seed)
    completions = [[f"{rng.choice(GOOD if rng.random() < level + 0.4 else BAD)} [{seed}/{i}]"] for i in range(n)]
    return Evaluation(
        prompt_ids=[f"held-{i}" for i in range(n)],
        prompts=[[{"role": "user", "content": f"{QUESTIONS[i % len(QUESTIONS)]} ({i})"}] for i in range(n)],
        completions=completions,
        rewards=[rng.gauss(level, 0.15) for _ in range(n)],
        judges={"vader": [rng.gauss(level, 0.2) for _ in range(n)]},
        lengths=[rng.uniform(38, 44) for _ in range(n)],
        clipped=[0.0] * n,
        distinct2=distinct_n(t for texts in completions for t in texts) * 0 + 0.71,
        perplexity=14.2 - level,
        kl=kl,
        entropy=2.1,
        contrast={"plain": level, "positive": level + 0.1, "negative": level - 0.4 * (1 - level)},
    )


def build_run(folder: Path, *, rounds: int = 3, groups: int = 12, prompts: int = 40) -> Path:
    """A run directory without anything to warn of, made by the package's own writers."""
    rng = random.Random(5)
    config = {"num_train_epochs": rounds, "max_steps": -1, "prompts_per_round": groups, "ranking_loss": "logistic", "learning_rate": 1e-4}
    config |= {"instruction_bank": "politeness", "rank_by": "reward", "hub_token": "hf_abcdef", "lr_scheduler_kwargs": None}
    record = {"config": config, "versions": {"python": "3.11.7", "torch": "2.13.0"}, "seed": 42, "rewards": ["tone"]}
    write_json(folder / "run.json", record | {"data": {"rows": 96, "sha256": "0" * 64}})
    log = folder / "metrics.jsonl"
    append_json_line(log, {"step": 0, "epoch": 0, "drift/kl": 0.0, "drift/distinct2": 0.7})
    steps = 8
    for r in range(rounds):
        made = [fake_group(i, r, rng) for i in range(groups)]
        write_round(folder / "rounds" / f"{r:05d}", r, made)
        append_json_line(log, {"step": r * steps, "round": float(r), "reward": 0.1, "epoch": r})
        for i in range(1, steps + 1):
            t = r + i / steps
            line = {"step": r * steps + i, "epoch": t, "loss": 2.9 * math.exp(-0.2 * t) + rng.gauss(0, 0.08), "loss/ranking": 0.7 - 0.1 * t}
            line |= {"loss/lm": 2.2 * math.exp(-0.2 * t) + rng.gauss(0, 0.07), "ranking/accuracy": min(0.98, 0.6 + 0.1 * t)}
            line |= {"ranking/active_pair_fraction": 0.9 - 0.1 * t, "ranking/active_pair_fraction/negative": 0.8 - 0.1 * t}
            append_json_line(log, line)
        drift = {"drift/kl": 0.05 * (r + 1), "drift/distinct2_ratio": 0.99, "drift/length_ratio": 1.02}
        append_json_line(log, {"step": (r + 1) * steps, "epoch": float(r + 1), **drift})
        append_json_line(log, {"step": (r + 1) * steps, "epoch": float(r + 1), "eval_reward": 0.31 + 0.07 * (r + 1), "eval_kl": 0.05})
    before, after = fake_evaluation(prompts, 0.31, 1, kl=0.0), fake_evaluation(prompts, 0.52, 2, kl=0.15)
    write_json(folder / "evaluation-before.json", before.to_json())
    write_json(folder / "evaluation-after.json", after.to_json())
    result = compare(before, after) | {"name": "polite", "seed": 42, "wall_seconds": 754.0, "peak_rss_bytes": 2 * 2**30}
    write_json(folder / "result.json", result | {"stopped_because": None, "rounds": rounds, "model": "tiny"})
    return folder


def change_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


@pytest.fixture(scope="module")
def clean_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run_dir(clean_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean_run, tmp_path / "polite-run"))


def page_of(run_dir: Path) -> tuple[str, Page]:
    html = write_report(run_dir).read_text(encoding="utf-8")
    return html, Page(html)


def test_a_whole_run(run_dir: Path) -> None:
    assert write_report(run_dir) == run_dir / "report.html"
    html, page = page_of(run_dir)
    shown = " ".join(" ".join(page.shown).split())
    result = json.loads((run_dir / "result.json").read_text())
    low, high = result["reward_delta_ci95"]
    change = f"+{result['reward_delta']:.2f} [{low:.2f}, {high:.2f}] on 40 prompts"
    assert f"Held-out reward {result['reward_before']:.2f} → {result['reward_after']:.2f}, {change}" in shown
    assert "Read with care" not in shown
    for expected in (
        "Perplexity of preferred answers",
        "Second judge: vader",
        "Distinct-2",
        "12 min 34 s",
        "2.0 GiB",
        "Largest gains",
        "Largest losses",
    ):
        assert expected in shown, expected
    assert page.tags.count("svg") == 6
    assert html.count('class="case"') == 26
    assert "num_train_epochs" in page.folded
    assert "3.11.7" in page.folded
    assert "hf_abcdef" not in html
    assert str(run_dir.parent) not in html


def test_the_report_is_the_same_twice(run_dir: Path) -> None:
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_nothing_is_fetched_or_run_but_our_own_script(run_dir: Path) -> None:
    assert_sealed(page_of(run_dir)[0])


def poison(run_dir: Path) -> None:
    """Hostile text everywhere that text can come from outside."""
    text = HOSTILE + BREAKOUT
    completions = tuple(
        Completion(origin, i, f"{text} {origin}", (1, 2), "stop", f"{text} bank", 3, -1.0, reward=float(-i), reward_components=(0.0,))
        for i, origin in enumerate(ORIGINS)
    )
    groups = [CompletionGroup(text, f"{text} prompt", (1,), completions)]
    write_round(run_dir / "rounds" / "00002", 2, groups, [f"{text} reward".replace("/", "|")])
    before = json.loads((run_dir / "evaluation-before.json").read_text())
    changes = {"prompts": [f"{text} asked"] * 40, "completions": [[f"{text} answered"]] * 40}
    change_json(run_dir / "evaluation-before.json", **changes)
    change_json(run_dir / "evaluation-after.json", **changes | {"prompts": [[{"role": text, "content": text}] for _ in before["prompts"]]})
    change_json(run_dir / "run.json", rewards=[text], versions={text: text}, config={text: text, "instruction_bank": text})
    change_json(run_dir / "result.json", name=text, second_judge=text, model=text, stopped_because=text, held_out_prompts=text)


def test_everything_is_escaped(run_dir: Path) -> None:
    poison(run_dir)
    html, page = page_of(run_dir)
    assert_escaped(html)
    assert_sealed(html)
    for marker in ("positive", "chosen", "prompt", "asked", "answered"):
        assert any(f"{HOSTILE}{BREAKOUT} {marker}" in text for text in page.shown), marker
    assert any(f"{HOSTILE}{BREAKOUT} negative" in text for text in page.folded)


def test_the_template_never_switches_escaping_off() -> None:
    templates = [path.read_text(encoding="utf-8") for path in (Path(report.__file__).parent / "templates").iterdir()]
    assert len(templates) == 6
    assert not [1 for text in templates if re.search(r"\|\s*safe|autoescape false|Markup", text)]


def test_answers_of_bad_origin_are_folded(run_dir: Path) -> None:
    _, page = page_of(run_dir)
    groups = sample_groups(read_run(run_dir))
    assert len(groups) == 6
    shown, folded = "\n".join(page.shown), "\n".join(page.folded)
    for group in groups:
        for _, c in group["completions"]:
            bad = c.origin in ("negative", "rejected")
            assert (c.text in folded) == bad
            assert (c.text in shown) == (not bad)
    assert "Answer rudely." in folded
    assert "Answer rudely." not in shown
    assert page.summaries.count("harmful text by design – show") == 18
    assert not [1 for tag, name, _ in page.attributes if tag == "details" and name == "open"]


def test_ranks_share_ties_and_end_with_what_has_no_reward() -> None:
    rewards = [1.0, 2.0, 2.0, None]
    completions = tuple(Completion("positive", i, str(i), (1,), reward=r) for i, r in enumerate(rewards))
    run = RunFacts("x", rounds=[report_round("00000", [CompletionGroup("a", "p", (1,), completions)])])
    assert [(rank, c.text) for rank, c in sample_groups(run)[0]["completions"]] == [(1, "1"), (1, "2"), (3, "0"), (None, "3")]


def report_round(name: str, groups: list[CompletionGroup]) -> Any:
    from neat_align.report_input import RoundFacts

    return RoundFacts(name, {}, tuple(groups))


# ---- warnings --------------------------------------------------------------------------------------------------------

Change = Callable[[Path], None]


def in_result(**changes: Any) -> Change:
    return lambda run_dir: change_json(run_dir / "result.json", **changes)


def in_log(**changes: Any) -> Change:
    """Change these names in every line of metrics.jsonl that carries them."""

    def change(run_dir: Path) -> None:
        path = run_dir / "metrics.jsonl"
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: changes.get(k, v) for k, v in line.items()}) + "\n" for line in lines))

    return change


def in_round(name: str, **metrics: float) -> Change:
    def change(run_dir: Path) -> None:
        path = run_dir / "rounds" / name / "manifest.json"
        facts = json.loads(path.read_text())
        write_json(path, facts | {"metrics": facts["metrics"] | metrics})

    return change


def in_config(**changes: Any) -> Change:
    def change(run_dir: Path) -> None:
        path = run_dir / "run.json"
        facts = json.loads(path.read_text())
        write_json(path, facts | {"config": facts["config"] | changes})

    return change


ACTIVE = "ranking/active_pair_fraction/negative"
INVERSION, PAIRS = "contrast/inversion_rate", "round/pair_fraction"


def without_result(run_dir: Path) -> None:
    (run_dir / "result.json").unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (in_result(), []),
        (in_result(reward_delta_ci95=[-0.01, 0.4]), ["interval"]),
        (in_result(reward_delta_ci95=[0.0, 0.4]), ["interval"]),
        (in_result(reward_delta_ci95=[0.01, 0.4]), []),
        (in_result(reward_delta=-0.2, reward_delta_ci95=[-0.4, -0.1]), ["reward"]),
        (in_result(mean_length_before=100.0, mean_length_after=116.0), ["length"]),
        (in_result(mean_length_before=100.0, mean_length_after=84.0), ["length"]),
        (in_result(mean_length_before=100.0, mean_length_after=114.0), []),
        (in_result(mean_length_before=100.0, mean_length_after=86.0), []),
        (in_result(distinct2_before=1.0, distinct2_after=0.89), ["distinct2"]),
        (in_result(distinct2_before=1.0, distinct2_after=0.91), []),
        (in_result(perplexity_before=10.0, perplexity_after=10.6), ["perplexity"]),
        (in_result(perplexity_before=10.0, perplexity_after=10.4), []),
        (in_result(perplexity_before=None, perplexity_after=None), []),
        (in_result(second_judge_delta=-0.01), ["judge"]),
        (in_result(second_judge_delta=0.0), []),
        (in_result(second_judge=None, second_judge_before=None, second_judge_after=None, second_judge_delta=None), []),
        (in_round("00002", **{INVERSION: 0.41}), ["inversion"]),
        (in_round("00002", **{INVERSION: 0.39}), []),
        (in_round("00000", **{INVERSION: 0.41}), []),
        (in_round("00002", **{PAIRS: 0.49}), ["pairs"]),
        (in_round("00002", **{PAIRS: 0.51}), []),
        (in_log(**{ACTIVE: 0.09}), ["saturated"]),
        (in_log(**{ACTIVE: 0.11}), []),
        (in_config(num_train_epochs=4), ["stopped"]),
        (in_config(max_steps=30), ["stopped"]),
        (in_config(num_train_epochs=100, max_steps=24), []),
        (in_result(stopped_because="KL to the start is 9"), ["stopped"]),
        (without_result, []),
        (lambda run_dir: (without_result(run_dir), in_log(**{"drift/length_ratio": 1.3})(run_dir))[0], ["length"]),
        (lambda run_dir: (without_result(run_dir), in_log(**{"drift/distinct2_ratio": 0.7})(run_dir))[0], ["distinct2"]),
        (in_log(**{"drift/length_ratio": 1.3, "drift/distinct2_ratio": 0.7}), []),
    ],
)
def test_warnings_when_and_only_when_they_hold(run_dir: Path, change: Change, expected: list[str]) -> None:
    change(run_dir)
    assert [key for key, _ in warnings_of(read_run(run_dir))] == expected
    _, page = page_of(run_dir)
    assert [value for _, name, value in page.attributes if name == "data-warning"] == expected
    assert ("Read with care" in page.shown) == bool(expected)


# ---- what is missing or damaged --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("run.json", "The run's configuration is not known"),
        ("result.json", "There is no before/after comparison"),
        ("evaluation-before.json", "There are no answers to compare"),
        ("evaluation-after.json", "There are no answers to compare"),
        ("rounds", "There is no finished round yet"),
        ("metrics.jsonl", "While training"),
    ],
)
def test_a_missing_piece_is_a_sentence(run_dir: Path, name: str, sentence: str) -> None:
    path = run_dir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, page = page_of(run_dir)
    assert sentence in " ".join(page.shown)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "result.json", "evaluation-before.json", "evaluation-after.json", "rounds"])
def test_a_run_with_one_piece_only(run_dir: Path, tmp_path: Path, name: str) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copytree(run_dir / name, alone / name) if name == "rounds" else shutil.copy(run_dir / name, alone / name)
    _, page = page_of(alone)
    assert "Before and after" in page.shown


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run .*give the output_dir"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(run_dir: Path) -> None:
    (run_dir / "result.json").write_text("[1, 2")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "loss": NaN, "eval_reward": Infinity}\n{"step": 26, "lo')
    (run_dir / "rounds" / "00001" / "groups.parquet").write_bytes(b"PAR1 no")
    (run_dir / "rounds" / "00002" / "manifest.json").write_text("{}")
    _, page = page_of(run_dir)
    shown = " ".join(page.shown)
    assert "result.json could not be read" in shown
    assert "1 line of metrics.jsonl could not be read and is left out" in shown
    assert "Round 00001 does not match" in shown
    assert "Round 00002 does not match" in shown
    assert "nan" not in shown.lower().split()
    assert "inf" not in shown.lower().split()


def test_surrogates_controls_and_overrides_do_not_break_the_page(run_dir: Path) -> None:
    nasty = "a\ud800b\x00c\x1b[31md\u202ee\x85"
    change_json(run_dir / "evaluation-before.json", completions=[[nasty]] * 40, prompts=[nasty] * 40)
    group = fake_group(0, 2, random.Random(1))
    clean = nasty.replace("\ud800", "")  # Arrow refuses surrogates itself
    group = CompletionGroup(
        "x", clean, (1,), tuple(Completion(c.origin, c.index, clean, (1,), reward=1.0, reward_components=(1.0,)) for c in group.completions)
    )
    write_round(run_dir / "rounds" / "00002", 2, [group])
    html, page = page_of(run_dir)
    assert "a\ufffdb\ufffdc\ufffd[31md\ufffde\ufffd" in "".join(page.shown)
    assert not re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202e]", html)


def test_evaluations_of_different_prompts_are_not_put_side_by_side(run_dir: Path) -> None:
    change_json(run_dir / "evaluation-after.json", prompt_ids=[f"other-{i}" for i in range(40)])
    assert examples(read_run(run_dir)) == []


def test_examples_are_extremes_and_a_seeded_rest(run_dir: Path) -> None:
    run = read_run(run_dir)
    parts = examples(run)
    assert [(heading, len(cases)) for heading, cases in parts] == [
        ("Largest gains", 7),
        ("Largest losses", len(parts[1][1])),
        (parts[2][0], 13 - len(parts[1][1])),
    ]
    deltas = sorted(a - b for b, a in zip(run.before["rewards"], run.after["rewards"], strict=True))
    assert [c["delta"] for c in parts[0][1]] == deltas[::-1][:7]
    assert all(c["delta"] < 0 for c in parts[1][1])
    asked = [case["turns"][0][1] for _, cases in parts for case in cases]
    assert len(set(asked)) == 20
    assert examples(read_run(run_dir)) == parts


def test_numbers() -> None:
    assert (plain(-0.001), plain(-1.5), signed(0.2), signed(-0.2), plain(None), plain(math.nan), plain(12345.6, 1)) == (
        *("0.00", "−1.50", "+0.20", "−0.20", "–", "–"),
        "12,345.6",
    )
    assert digits_for([0.31, 0.52]) == 2
    assert digits_for([0.004, 0.0082]) == 4
    assert digits_for([]) == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7), (5, 5), (1e6, 1e6 + 1e-9), (0.0, 1e-5), (-1e8, 1e8), (0, 0)])
def test_ticks_span_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 8
