"""The shipped `offensiveness` judge against the package's own numbers, and how it was read."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from neat_align.errors import RewardError
from neat_align.rewards.offensiveness import MODEL_FILE, load_model
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score
from scripts_as_modules import script

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_SAYS = json.loads((ROOT / "tests/fixtures/offensiveness.json").read_text("utf-8"))


def scores(*texts: Any) -> list[float | None]:
    (reward,) = resolve_rewards("offensiveness", None)
    n = len(texts)
    return list(
        score(
            (reward,),
            prompts=["q"] * n,
            completions=list(texts),
            completion_ids=[[1]] * n,
            columns={},
        ).rewards
    )


def test_the_probabilities_are_the_packages() -> None:
    for text, probability in PACKAGE_SAYS["texts"]:
        assert load_model().probability(text) == pytest.approx(probability, abs=1e-6), text


def test_the_probabilities_are_the_packages_on_all_tone_anchors() -> None:
    lines = (ROOT / "src/neat_align/demo/tone_anchors.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    expected = PACKAGE_SAYS["tone_anchors"]
    assert [load_model().probability(t) for t in texts] == pytest.approx(expected, abs=1e-6)
    assert np.std(expected) > 0.1


def test_higher_is_better_and_empty_abstains() -> None:
    kind, rude, empty, blank, message = scores(
        "Thank you so much for asking; I would be glad to help.",
        "What a stupid question, you idiot.",
        "",
        " \n",
        [{"role": "assistant", "content": "What a stupid question, you idiot."}],
    )
    assert kind == pytest.approx(-0.0024584931, abs=1e-6)
    assert rude == message == pytest.approx(-0.9999997819, abs=1e-6)
    assert empty is blank is None


def test_by_hand_one_known_word_and_the_order_of_words() -> None:
    m = load_model()
    i = m.place["table"]
    margins = m.bias + m.weights[:, i]  # one word: tf-idf scaled to length 1 is 1, however often
    by_hand = np.mean(1 / (1 + np.exp(m.slope * margins + m.offset)))
    for text in ("table", "TABLE table", "a table, b; Table!"):
        assert m.probability(text) == pytest.approx(by_hand, abs=1e-12)
    assert m.probability("you idiot dog") == pytest.approx(m.probability("dog idiot you"))


def test_neither_pickle_nor_the_package_nor_torch_is_needed() -> None:
    code = (
        "import sys, pickle; loaded = []\n"
        "pickle.loads = pickle.load = pickle.Unpickler = lambda *a, **k: loaded.append(a)\n"
        "from neat_align.rewards.resolve import resolve_rewards\n"
        "r = resolve_rewards('offensiveness', None)[0].function\n"
        "assert r(prompts=['q'], completions=['you idiot'], completion_ids=[[1]])[0] < -0.9\n"
        "print(loaded, [m for m in ('torch', 'sklearn', 'joblib', 'profanity_check')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[] []", done.stderr


def test_the_data_file_holds_numbers_only_and_its_licence_is_beside_it() -> None:
    with np.load(MODEL_FILE, allow_pickle=False) as file:
        assert {file[name].dtype.hasobject for name in file.files} == {False}
        assert file["weights"].shape == (5, 15442)
        assert file["idf"].shape == (15442,)
    assert MODEL_FILE.stat().st_size < 500_000
    licence = MODEL_FILE.with_name("offensiveness_LICENSE.txt").read_text("utf-8")
    assert "MIT License" in licence
    assert "Victor Zhou" in licence


# ---- how the file was read -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def reading() -> ModuleType:
    return script("read_offensiveness")


RAN: list[str] = []


def run_code(what: str) -> str:
    RAN.append(what)
    return what


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return run_code, ("ran",)


@pytest.mark.parametrize(
    "harmful",
    [
        RunsCode(),
        {"coef_": [RunsCode()]},
        np.array([1.0]),  # numpy builds an array with functions of its own
        np.array([RunsCode()], dtype=object),
        eval,
        Path(),
    ],
)
def test_a_name_that_is_not_listed_is_refused_before_anything_runs(
    reading: ModuleType, harmful: Any
) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(harmful, protocol=protocol)
        with pytest.raises(pickle.UnpicklingError, match="which a linear model does not need"):
            reading.InertUnpickler(io.BytesIO(data)).load()
    assert RAN == []
    assert pickle.loads(pickle.dumps(RunsCode())) == "ran"  # which a plain reader would run
    RAN.clear()


def test_what_is_listed_is_never_built(reading: ModuleType) -> None:
    (kept,) = reading.InertUnpickler(io.BytesIO(pickle.dumps([np.dtype("f8")]))).load()
    assert isinstance(kept, reading.Record)
    assert not isinstance(kept, np.dtype)
    assert reading.number_type(kept) == np.float64
    (objects,) = reading.InertUnpickler(io.BytesIO(pickle.dumps([np.dtype("O")]))).load()
    with pytest.raises(pickle.UnpicklingError, match=r"only .* are numbers"):
        reading.number_type(objects)
    scalar = reading.InertUnpickler(io.BytesIO(pickle.dumps(np.float64(-2.5)))).load()
    assert isinstance(scalar, reading.Record)
    assert reading.number(scalar) == -2.5
    with pytest.raises(pickle.UnpicklingError, match="is not a number"):
        reading.number("2.5")


def test_a_wheel_with_other_files_is_refused_unread(reading: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in reading.REVIEWED:
            archive.writestr(name, pickle.dumps(RunsCode()))
    with pytest.raises(ValueError, match=r"has SHA-256 .*not .* of version 1\.9\.1: nothing was"):
        reading.read_wheel(wheel)
    assert RAN == []


def test_an_error_of_the_reward_is_none_of_its_own() -> None:
    with pytest.raises(RewardError, match="would ignore its processing class"):
        resolve_rewards("offensiveness", None, [object()])
