"""Has training or sampling become slower? In three minutes, and only where that can be told.

    make bench-quick                        # compares with benchmarks/results/quick.json
    make bench-quick ARGS=--write           # writes that file

Ratios, not seconds: each figure is the time of padded rows (`strong` of train_step.py), or of
transformers' `generate`, over ours, the sides in turn on the same token ids in the same number
type. They are small points of one model on few threads, so that a run is short; the figures that
are published come from the other scripts.

First the noise of the machine: the same padded rows, timed again and again. (Not our side: a
slower step must not pass for noise.) Where identical work differs so much that a fall to 80 % could
not be told, or other programs have the cores, it says so and ends with 0. Else it ends with 1 when
a ratio is under 80 % of the committed one, after a second look at that ratio and at the noise. A
figure is only compared where the CPU multiplies its number type as the committed one's did.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import guard
import harness
import torch
import transformers
from guard import Committed, Here, Noise
from train_step import gradient_step, make_ids, strong_logprobs

from neat_align.modeling.demo_model import find_gguf
from neat_align.modeling.logprobs import completion_logprobs
from neat_align.modeling.packing import pack_rows, pad_rows
from neat_align.modeling.precision import autocast, half_precision_copy
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler

COMMITTED = Path(__file__).parent / "results" / "quick.json"
# New figures are of so many threads, on machines of more cores, too.
THREADS = 2
# Nothing is timed any more after so many seconds: others took the cores, or this machine is slow.
STOP_AFTER = 150
# Runs of identical work that show the noise: fewer where they take long, which others' work does.
NOISE_RUNS, FEWEST_NOISE_RUNS, NOISE_SECONDS = 8, 3, 30

Sides = Mapping[str, Callable[[], object]]


class OutOfTimeError(Exception):
    """`STOP_AFTER` has passed."""


@dataclass(frozen=True)
class Figure:
    """One ratio: forward and backward over groups of K completions, or sampling them."""

    work: str
    dtype: str
    prompt: int
    completion: int
    k: int
    groups: int = 1

    @property
    def name(self) -> str:
        """What it is called in the result file."""
        groups = f" x{self.groups}" if self.groups > 1 else ""
        return f"{self.work} {self.dtype} P{self.prompt} R{self.completion} K{self.k}{groups}"


FIGURES = (
    Figure("train", "fp32", 128, 32, 4),
    Figure("train", "bf16", 128, 32, 4),
    Figure("train", "bf16", 64, 32, 8),
    Figure("sample", "fp32", 128, 16, 8),
    Figure("sample", "bf16", 128, 16, 8, groups=2),
)
NOISE = Figure("train", "fp32", 128, 32, 2)


@dataclass
class Measured:
    """Seconds of both sides of a figure, run by run."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, seconds: Mapping[str, list[float]]) -> None:
        """More runs of the same."""
        for side, values in seconds.items():
            self.seconds.setdefault(side, []).extend(values)

    @property
    def pairs(self) -> int:
        """How many runs each side has."""
        return len(self.seconds["neat"])

    @property
    def ratio(self) -> float:
        """The peer's time over ours."""
        return guard.ratio_of(self.seconds["peer"], self.seconds["neat"])


# ---- what is timed -------------------------------------------------------------------------------


class Bench:
    """The model, and both sides of a figure."""

    def __init__(self, model: str) -> None:
        self.model = harness.load_model(model).to(harness.device()).train()
        # Made once: a round samples from such a copy, and generate gets the same one.
        self._copies: dict[str, Any] = {}

    def sides(self, figure: Figure) -> Sides:
        """Ours and the peer's: functions that do the figure's work once."""
        return self._train(figure) if figure.work == "train" else self._sample(figure)

    def _train(self, figure: Figure) -> Sides:
        prompt, completions = make_ids(figure.prompt, figure.completion, figure.k)
        n, device = figure.groups, harness.device()
        packed = pack_rows([prompt] * n, [completions] * n).to(device)
        padded = pad_rows([prompt] * n * figure.k, completions * n, 0).to(device)

        def step(logprobs: Callable[[Any, Any], torch.Tensor], rows: Any) -> None:
            def under_autocast() -> torch.Tensor:
                with autocast(device.type, harness.DTYPES[figure.dtype]):
                    return logprobs(self.model, rows)

            self.model.zero_grad(set_to_none=False)
            gradient_step(under_autocast)

        return {
            "neat": lambda: step(completion_logprobs, packed),
            "peer": lambda: step(strong_logprobs, padded),
        }

    def _sample(self, figure: Figure) -> Sides:
        policy, length = self._policy(figure.dtype), figure.completion
        prompts = [
            ids.tolist()
            for ids in torch.randint(
                *(1000, 40_000, (figure.groups, figure.prompt)),
                generator=torch.Generator().manual_seed(0),
            )
        ]
        requests = [
            SampleRequest(tuple(ids), 1000 * i + k)
            for i, ids in enumerate(prompts)
            for k in range(figure.k)
        ]
        sampler = TransformersSampler(policy, (), 0, len(requests))
        rows = torch.tensor([r.prompt_ids for r in requests], device=harness.device())
        # What a user writes; no end token, no filter, so that both draw as many from the same.
        asked = transformers.GenerationConfig(
            max_new_tokens=length, do_sample=True, top_k=0, pad_token_id=0
        )
        policy.generation_config = asked

        def neat() -> int:
            samples = sampler.sample(requests, SamplingParams(length))
            return _checked(sum(len(s.token_ids) for s in samples), len(requests) * length)

        def peer() -> int:
            torch.manual_seed(0)
            mask = torch.ones_like(rows)
            made = policy.generate(input_ids=rows, attention_mask=mask)
            return _checked((made.shape[1] - figure.prompt) * len(rows), len(requests) * length)

        return {"neat": neat, "peer": peer}

    def _policy(self, dtype: str) -> Any:
        if dtype not in self._copies:
            self._copies[dtype] = half_precision_copy(
                self.model, harness.DTYPES[dtype] or torch.float32
            )
        return self._copies[dtype]


def _checked(sampled: int, wanted: int) -> int:
    assert sampled == wanted, f"sampled {sampled} tokens instead of {wanted}"
    return sampled


def noise_of(bench: Bench) -> Noise:
    """Identical work, again and again: padded rows, which our code has no part in."""
    work = bench.sides(NOISE)["peer"]
    work()
    seconds = []
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(NOISE_RUNS):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
        if len(seconds) >= FEWEST_NOISE_RUNS and time.perf_counter() - start > NOISE_SECONDS:
            break
    wall = time.perf_counter() - start
    share = (time.process_time() - cpu) / (wall * torch.get_num_threads())
    return Noise(guard.pair_noise(seconds), share)


# ---- a run ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is measured, and against what."""

    bench: Bench
    here: Here
    repeats: int
    committed: Committed | None
    began: float
    noise: Noise = field(default_factory=lambda: Noise(0.0, 1.0))
    measured: dict[str, Measured] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def measure(self) -> None:
        """The noise, then every figure that there is time for and that can be compared.

        Nothing more than the noise on a machine that is too noisy: it would be slow besides.
        """
        self.look_at_noise()
        if self.is_too_noisy:
            return
        for figure in FIGURES:
            why = self.why_left_out(figure)
            if why is None:
                why = self.look_at(figure)
            if why is not None:
                self.left_out[figure.name] = why
        again = [f for f in FIGURES if self.verdict(f.name) == "fallen"]
        for figure in again:
            self.look_at(figure)
        if again:
            self.look_at_noise()

    def look_at_noise(self) -> None:
        self.say("noise")
        found = noise_of(self.bench)
        self.noise = self.noise.worse(found) if self.measured else found

    def look_at(self, figure: Figure) -> str | None:
        """More runs of a figure; why there are none, where time ran out."""
        self.say(figure.name)
        sides = {side: self.in_time(work) for side, work in self.bench.sides(figure).items()}
        try:
            found = harness.in_turn(sides, self.repeats)
        except OutOfTimeError:
            return f"{STOP_AFTER} s had passed: others have the cores, or this machine is slow"
        self.measured.setdefault(figure.name, Measured()).add(found)
        return None

    def in_time(self, work: Callable[[], object]) -> Callable[[], object]:
        """The same work, unless time ran out. What will be committed has all the time it takes."""

        def run() -> object:
            if self.committed is not None and time.perf_counter() - self.began > STOP_AFTER:
                raise OutOfTimeError
            return work()

        return run

    def say(self, what: str) -> None:
        """That this is measured now."""
        print(f"[{time.perf_counter() - self.began:3.0f} s] {what}", file=sys.stderr, flush=True)

    def why_left_out(self, figure: Figure) -> str | None:
        """Why a figure is not measured; None where it is."""
        if self.committed is None:
            return None
        if figure.name not in self.committed.ratios:
            return "no such figure is committed"
        return guard.why_not_compared(figure.dtype, self.here, self.committed.here)

    def error(self, name: str) -> float:
        """How far the figure may be off, as a share of what is committed."""
        return self.error_of(self.measured[name].pairs)

    def error_of(self, pairs: int) -> float:
        """How far the median of so many pairs may be off."""
        now = guard.error_of_median(self.noise.pair, pairs)
        if self.committed is None:
            return now
        then = guard.error_of_median(self.committed.noise.pair, self.committed.repeats)
        return guard.with_error_of(then, now)

    @property
    def has_the_machine(self) -> bool:
        """Whether no other programs have the cores. What will be committed wants all of them."""
        known = self.committed.noise.cpu_share if self.committed else 1.0
        return guard.has_the_machine(self.noise.cpu_share, known)

    @property
    def is_too_noisy(self) -> bool:
        """Whether no figure could be told from a fallen one."""
        error = self.error_of(self.repeats)
        # Whoever compares with what is written has an error of their own.
        error = error if self.committed else guard.with_error_of(error, error)
        return not (self.has_the_machine and guard.can_tell(error))

    @property
    def why_too_noisy(self) -> str:
        """What is too noisy, in words."""
        if not self.has_the_machine:
            known = f", {self.committed.noise.cpu_share:.0%} committed" if self.committed else ""
            return f"other programs have the cores (this one had {self.noise.cpu_share:.0%}{known})"
        error = self.error_of(self.repeats)
        return f"a ratio may be off by {error:.0%}, too much to tell a fall to {guard.FALL:.0%} by"

    def verdict(self, name: str) -> guard.Verdict | None:
        """None for a figure that was not measured, or has nothing beside it."""
        if name not in self.measured or self.committed is None:
            return None
        if not self.has_the_machine:
            return "unclear"
        ratio, committed = self.measured[name].ratio, self.committed.ratios[name]
        return guard.verdict(ratio, committed, self.error(name))


# ---- what is said --------------------------------------------------------------------------------


def show(run: Run) -> None:
    """The ratios, and the noise that they have."""
    rows: list[list[str]] = []
    for name, found in run.measured.items():
        ours, peer = (harness.spread(found.seconds[s])["median"] for s in ("neat", "peer"))
        row = [name, f"{ours:.2f}", f"{peer:.2f}", f"{found.ratio:.2f}x"]
        if run.committed is not None:
            committed = run.committed.ratios[name]
            row += [f"{committed:.2f}x", f"{found.ratio / committed:.0%}"]
        rows.append([*row, f"{run.error(name):.0%}"])
    columns = ["figure", "ours, s", "peer, s", "ratio"]
    columns += ["committed", "of it"] if run.committed is not None else []
    if rows:
        harness.show("padded rows or generate, over ours", [*columns, "±"], rows)
    for why in dict.fromkeys(run.left_out.values()):
        names = [name for name, said in run.left_out.items() if said == why]
        print(f"not compared: {', '.join(names)} ({why})")
    print(
        f"noise: identical work in a row differs by {run.noise.pair:.1%} (standard deviation); "
        f"this process had {run.noise.cpu_share:.0%} of {run.here.threads} cores"
    )


def outcome(run: Run) -> int:
    """The exit status, with a line that says why."""
    assert run.committed is not None
    if run.is_too_noisy:
        print(f"too noisy to tell: {run.why_too_noisy}. Run it again when nothing else runs here")
        return 0
    found = {name: run.verdict(name) for name in run.measured}
    if not found:
        print("nothing compared: the lines above say why")
        return 0
    fallen = [name for name, said in found.items() if said == "fallen"]
    if fallen:
        print(_advice(run, fallen), file=sys.stderr)
        return 1
    print(f"no ratio is under {guard.FALL:.0%} of the committed one")
    return 0


def _advice(run: Run, fallen: list[str]) -> str:
    assert run.committed is not None
    lines = []
    for name in fallen:
        ratio, committed = run.measured[name].ratio, run.committed.ratios[name]
        lines.append(
            f"SLOWER: {name}: {ratio:.2f}x, committed {committed:.2f}x: {ratio / committed:.0%} of "
            f"it, under {guard.FALL:.0%}; noise ±{run.error(name):.0%}"
        )
    rooms = {"train": "modeling src/neat_align/learning", "sample": "sampling"}
    where = " ".join(
        f"src/neat_align/{rooms[w]}" for w in dict.fromkeys(n.split()[0] for n in fallen)
    )
    since = run.committed.commit.removesuffix("-dirty")
    return "\n".join(
        [
            *lines,
            f"What changed since: git log --oneline {since}.. -- {where}",
            "Run `make bench-quick` again to be sure. If the change is meant, commit new figures:",
            "make bench-quick ARGS=--write",
        ]
    )


def read_committed(path: Path) -> Committed:
    """The committed figures. SystemExit where there are none."""
    if not path.is_file():
        raise SystemExit(
            f"{path} does not exist, so there is nothing to compare with: write it with "
            "make bench-quick ARGS=--write"
        )
    return guard.from_result(json.loads(path.read_text(encoding="utf-8")))


def write(run: Run, path: Path) -> int:
    """Write the figures, where the machine was quiet enough for them to be compared with."""
    if run.is_too_noisy:
        print(
            f"not written: {run.why_too_noisy}. Stop what else runs here, or give more --repeats",
            file=sys.stderr,
        )
        return 1
    figures = {
        name: {
            "ratio": found.ratio,
            "ratios": harness.speedup(found.seconds["peer"], found.seconds["neat"]),
            "seconds": {side: harness.spread(v) for side, v in found.seconds.items()},
            "error": run.error(name),
        }
        for name, found in run.measured.items()
    }
    harness.save(path, guard.as_result(figures, run.repeats, run.noise, run.here))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Measure, and compare or write."""
    parser: argparse.ArgumentParser = harness.parser(__doc__)
    default = "demo" if find_gguf() is not None else "demo-shape"
    parser.set_defaults(repeats=3, model=default, json=COMMITTED)
    parser.add_argument("--write", action="store_true", help="write the result file (--json)")
    parser.add_argument(
        "--threads",
        type=int,
        help=f"at most so many; else the committed file's, and {THREADS} to --write. One is "
        "slower, and less disturbed by what else runs",
    )
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    committed = None if args.write else read_committed(args.json)
    threads = args.threads or (committed.here.threads if committed else THREADS)
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    here = Here(
        args.model, harness.device().type, torch.get_num_threads(), guard.instructions_here()
    )
    run = Run(Bench(args.model), here, args.repeats, committed, began)
    run.measure()
    show(run)
    return write(run, args.json) if args.write else outcome(run)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    sys.exit(main())
