"""Read the linear model of alt-profanity-check 1.9.1 into a plain data file, running no pickle.

    pip download --no-deps alt-profanity-check==1.9.1
    python scripts/read_offensiveness.py alt_profanity_check-1.9.1-py3-none-any.whl

The package loads two joblib files when it is imported. joblib files are pickles: who can change
them runs code in the reader's process. This script opens the wheel as a zip file, compares both
files with the SHA-256 that was reviewed, and walks through them with an unpickler in which a class
is only a name: whatever a pickle asks to build becomes a `Record` of what it would have been built
from, any name outside of the list is an error, and arrays are read as numbers. What is needed of
it (words, weights, calibration) is written to `src/neat_align/rewards/offensiveness.npz`, which
numpy reads with `allow_pickle=False`. The file's texts and numbers are the package's (MIT licence,
`offensiveness_LICENSE.txt`); weights are rounded to fp32.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

OUT = Path(__file__).parents[1] / "src" / "neat_align" / "rewards" / "offensiveness.npz"
# The two files of alt-profanity-check 1.9.1.
REVIEWED = {
    "profanity_check/data/vectorizer.joblib": (
        "19c5200dc6a41f026e0558e2f164f5fe8d8f58e502b46b37e4385037fcfa4831"
    ),
    "profanity_check/data/model.joblib": (
        "aeafc04849d4d93db4721cf30a86ebf22085595294b8a07d51918e7fa98f538b"
    ),
}
# What the two files name. None of it is imported.
NAMES = frozenset(
    {
        "joblib.numpy_pickle.NumpyArrayWrapper",
        "numpy.ndarray",
        "numpy.dtype",
        "numpy.float64",
        "numpy._core.multiarray.scalar",
        "sklearn.calibration.CalibratedClassifierCV",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.feature_extraction.text.TfidfTransformer",
        "sklearn.feature_extraction.text.TfidfVectorizer",
        "sklearn.svm._classes.LinearSVC",
    }
)
NUMBERS = ("f8", "i8")


class Record:
    """What a pickle would have built: the class's name, its arguments and its state; inert."""

    what = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        """Keep the state as it is in the file."""
        self.state = state


class InertUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Python's own unpickler, to which every class is a `Record` and every array is numbers."""

    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]  # noqa: RUF012

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._file = file
        self._classes: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> type[Record]:
        """A class of that name that does nothing. Raises UnpicklingError for a name not listed."""
        full = f"{module}.{name}"
        if full not in NAMES:
            raise pickle.UnpicklingError(
                f"the file names {full}, which a linear model does not need: nothing was run; read "
                "the file before this list grows"
            )
        if full not in self._classes:
            self._classes[full] = type(name, (Record,), {"what": full})
        return self._classes[full]

    def load_build(self) -> None:
        """Set a record's state; joblib writes an array's numbers right behind its wrapper."""
        super().load_build()
        top = self.stack[-1]
        if isinstance(top, Record) and top.what == "joblib.numpy_pickle.NumpyArrayWrapper":
            self.stack[-1] = self._array(top.state)

    dispatch[pickle.BUILD[0]] = load_build

    def _array(self, wrapper: dict[str, Any]) -> np.ndarray:
        kind = number_type(wrapper["dtype"])
        shape, order = tuple(int(n) for n in wrapper["shape"]), str(wrapper["order"])
        if wrapper.get("numpy_array_alignment_bytes") is not None:
            self._file.read(self._file.read(1)[0])  # padding, and how much of it
        count = int(np.prod(shape, dtype=np.int64))
        data = self._file.read(count * kind.itemsize)
        return np.frombuffer(data, dtype=kind, count=count).reshape(shape, order=order)  # type: ignore[call-overload]


def number_type(dtype: Record) -> np.dtype:
    """The numpy type that a record of one stands for; only plain numbers pass."""
    if dtype.what != "numpy.dtype" or dtype.arguments[0] not in NUMBERS:
        raise pickle.UnpicklingError(
            f"the file has an array of {dtype.arguments or dtype.what}; only {NUMBERS} are numbers"
        )
    order = dtype.state[1] if dtype.state else "="
    return np.dtype(dtype.arguments[0]).newbyteorder(order if order in "<>" else "=")


def number(value: Any) -> float:
    """A number, or the number that a record of a numpy scalar holds."""
    if isinstance(value, Record) and value.what == "numpy._core.multiarray.scalar":
        dtype, data = value.arguments
        return float(np.frombuffer(data, dtype=number_type(dtype))[0])
    if isinstance(value, int | float):
        return float(value)
    raise pickle.UnpicklingError(f"{value!r} is not a number")


def read_wheel(wheel: Path) -> dict[str, Record]:
    """The records of both files, by name. Raises ValueError where one is not the reviewed one."""
    records = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, reviewed in REVIEWED.items():
            data = archive.read(name)
            found = hashlib.sha256(data).hexdigest()
            if found != reviewed:
                raise ValueError(
                    f"{name} in {wheel} has SHA-256 {found}, not {reviewed} of version 1.9.1: "
                    "nothing was read"
                )
            records[Path(name).stem] = InertUnpickler(io.BytesIO(data)).load()
    return records


def linear_model(vectorizer: Record, model: Record) -> dict[str, np.ndarray]:
    """What `neat_align.rewards.offensiveness` computes with.

    Raises ValueError for a model of another form.
    """
    settings, idf = vectorizer.state, vectorizer.state["_tfidf"].state
    wanted = {
        "analyzer": "word", "lowercase": True, "token_pattern": r"(?u)\b\w\w+\b",
        "ngram_range": (1, 1), "binary": False, "norm": "l2", "use_idf": True,
        "sublinear_tf": False, "strip_accents": None, "preprocessor": None, "tokenizer": None,
    }  # fmt: skip
    other = {k: settings[k] for k, v in wanted.items() if settings[k] != v}
    classifiers = [c.state for c in model.state["calibrated_classifiers_"]]
    if other or {c["method"] for c in classifiers} != {"sigmoid"}:
        raise ValueError(f"the vectorizer has {other}: the scorer does not compute that")
    places = {word: int(number(place)) for word, place in settings["vocabulary_"].items()}
    words = sorted(places, key=places.__getitem__)
    if [places[word] for word in words] != list(range(len(words))):
        raise ValueError("the vocabulary does not number its words from 0")
    sigmoids = [c["calibrators"][0].state for c in classifiers]
    return {
        "words": np.frombuffer("\n".join(words).encode(), dtype=np.uint8),
        "idf": inverse_frequencies(idf, len(words)).astype(np.float32),
        "weights": np.stack([c["estimator"].state["coef_"][0] for c in classifiers]).astype(
            np.float32
        ),
        "bias": np.array([number(c["estimator"].state["intercept_"][0]) for c in classifiers]),
        "slope": np.array([number(s["a_"]) for s in sigmoids]),
        "offset": np.array([number(s["b_"]) for s in sigmoids]),
    }


def inverse_frequencies(tfidf: dict[str, Any], n_words: int) -> np.ndarray:
    """The weight of one occurrence of each word."""
    idf = np.asarray(tfidf["idf_"])
    if idf.shape != (n_words,):
        raise ValueError(f"there are {idf.shape} inverse frequencies for {n_words} words")
    return idf


def main() -> None:
    """Read the wheel and write the data file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    arrays = linear_model(**read_wheel(args.wheel))
    np.savez_compressed(args.out, allow_pickle=False, **arrays)
    size = args.out.stat().st_size
    print(f"{args.out}: {arrays['weights'].shape[1]} words, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
