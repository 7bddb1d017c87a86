"""`make bench-quick`: what is noise, what is a fall, and a slower step seen from start to end."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
COMMITTED = BENCHMARKS / "results" / "quick.json"


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """guard.py, quick.py, growth.py and what they share."""
    pytest.importorskip("psutil", reason="accelerate brings it")
    names = ("guard", "quick", "growth", "harness", "train_step")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def guard(scripts: SimpleNamespace) -> Any:
    return scripts.guard


# ---- noise ---------------------------------------------------------------------------------------


def test_runs_that_take_as_long_have_no_noise(guard: Any) -> None:
    assert guard.pair_noise([2.0, 2.0, 2.0]) == 0


def test_noise_is_what_runs_in_a_row_differ_by(guard: Any) -> None:
    # Logarithms of the ratios: +ln 1.1, −ln 1.1, 0.
    expected = math.sqrt(2 * math.log(1.1) ** 2 / 3)
    assert guard.pair_noise([1.0, 1.1, 1.0, 1.0]) == pytest.approx(expected)


def test_a_slow_drift_is_little_noise(guard: Any) -> None:
    """A machine that becomes twice as slow over 70 runs: in runs in a row it cancels."""
    assert guard.pair_noise([2 ** (i / 70) for i in range(71)]) == pytest.approx(math.log(2) / 70)


def test_more_pairs_make_a_smaller_error(guard: Any) -> None:
    # 2 · √(π/2) · 6 % / √4
    assert guard.error_of_median(0.06, 4) == pytest.approx(0.06 * math.sqrt(math.pi / 2))
    assert guard.error_of_median(0.06, 16) == pytest.approx(guard.error_of_median(0.06, 4) / 2)


def test_errors_of_both_figures_add_up_as_lengths_of_sides_do(guard: Any) -> None:
    assert guard.with_error_of(0.03, 0.04) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("error", "tells"),
    [(0.0, True), (0.11, True), (0.112, False), (0.5, False)],  # 1/9 = 0.111
)
def test_a_fall_is_told_where_it_and_what_holds_do_not_meet(
    guard: Any, error: float, tells: bool
) -> None:
    assert guard.can_tell(error) is tells


def test_others_have_the_cores_below_four_fifths_of_the_committed_share(guard: Any) -> None:
    assert guard.has_the_machine(0.80, 1.0)
    assert not guard.has_the_machine(0.79, 1.0)
    assert guard.has_the_machine(0.73, 0.9)


# ---- a figure ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "error", "said"),
    [
        (2.5, 0.05, "holds"),
        (2.01, 0.05, "holds"),
        (1.99, 0.05, "fallen"),
        (3.5, 0.05, "holds"),
        (1.0, 0.12, "unclear"),
        (2.5, 0.12, "unclear"),
    ],
)
def test_a_figure_falls_below_four_fifths(
    guard: Any, ratio: float, error: float, said: str
) -> None:
    assert guard.verdict(ratio, 2.5, error) == said


def test_a_ratio_is_of_runs_beside_each_other(guard: Any) -> None:
    # 3, 2, 4: the median of ratios, and not the ratio of medians (10 / 4).
    assert guard.ratio_of([3.0, 10.0, 40.0], [1.0, 5.0, 10.0]) == 3
    assert guard.ratio_of([3.0, 10.0, 40.0], [1.0, 4.0, 20.0]) == 2.5


AMD = frozenset({"avx512_bf16"})
INTEL = frozenset({"avx512_bf16", "amx_bf16"})


@pytest.mark.parametrize(
    ("dtype", "changed", "reason"),
    [
        ("fp32", {}, None),
        ("bf16", {}, None),
        ("bf16", {"model": "demo-shape"}, None),
        ("fp32", {"instructions": frozenset()}, None),
        ("bf16", {"instructions": frozenset()}, "CPU with avx512_bf16 for bf16, here is no instr"),
        ("bf16", {"instructions": INTEL}, "here is amx_bf16 and avx512_bf16"),
        ("fp32", {"model": "tiny"}, "measured on the model demo, here is tiny"),
        ("fp32", {"device": "cuda"}, "measured on cpu, here is cuda"),
        ("fp32", {"threads": 1}, "measured with 2 threads, here are 1"),
    ],
)
def test_another_kind_of_machine_is_not_compared(
    guard: Any, dtype: str, changed: dict[str, Any], reason: str | None
) -> None:
    facts = {"model": "demo", "device": "cpu", "threads": 2, "instructions": AMD}
    said = guard.why_not_compared(dtype, guard.Here(**{**facts, **changed}), guard.Here(**facts))
    assert said == reason if reason is None else reason in said


def test_instructions_are_read_by_whole_words(guard: Any) -> None:
    x86 = "model name\t: AMX bf16 machine\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n"
    arm = "Features\t: fp asimd bf16 i8mm\n"
    assert guard.instructions_in(x86 + x86) == {"avx512_bf16"}
    assert guard.instructions_in(arm) == {"bf16"}
    assert guard.instructions_in("") == frozenset()


# ---- how a step grows ----------------------------------------------------------------------------


def test_time_per_group_is_beside_the_small_steps_around(scripts: SimpleNamespace) -> None:
    """A machine that becomes slower from step to step, by as much each time."""
    # 1 s a group of the first step, 1.6 of the last: 1.3 in the middle, for each size.
    order = scripts.growth.ORDER
    row = [n * (1 + i / 10) for i, n in enumerate(order)]
    growth = scripts.growth.per_group_growth([row, row], order)
    assert growth == {n: [pytest.approx(1)] * 2 for n in (8, 32, 128)}
    row[order.index(128)] *= 1.1
    assert scripts.growth.per_group_growth([row], order)[128] == [pytest.approx(1.1)]


def test_an_exponent_is_a_slope_of_logarithms(scripts: SimpleNamespace) -> None:
    assert scripts.growth.exponent([3.0, 7.0, 48.0], [2.0, 4.0, 8.0]) == pytest.approx(2)


def test_what_goes_through_the_model_is_counted(scripts: SimpleNamespace) -> None:
    # Prompt of 2, two completions of 3, of which 2 tokens are fed: 1 + 2 pairs in the prompt; a
    # completion's tokens see 3 and 4.
    assert scripts.growth.ours(2, 3, 2) == scripts.growth.Counted(6, 3 + 2 * (3 + 4), 6)
    # Two rows of 5: 1 + 2 + 3 + 4 + 5 pairs each.
    assert scripts.growth.padded(2, 3, 2) == scripts.growth.Counted(10, 30, 6)


# ---- from start to end ---------------------------------------------------------------------------


class TokenClock:
    """A clock that ticks once a token that goes through the model's layers."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now * torch.get_num_threads()

    def watch(self, model: Any) -> Any:
        def tick(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            self.now += inputs[0].shape[0] * inputs[0].shape[1]

        model.model.layers[0].register_forward_pre_hook(tick)
        return model


@pytest.fixture
def clock(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenClock]:
    """Sides take as long as tokens go through them; a figure of each kind; nothing times out."""
    ticking, quick = TokenClock(), scripts.quick
    load = scripts.harness.load_model
    monkeypatch.setattr(scripts.harness, "load_model", lambda name: ticking.watch(load(name)))
    monkeypatch.setattr(scripts.harness, "time", ticking)
    monkeypatch.setattr(quick, "time", ticking)
    monkeypatch.setattr(quick, "STOP_AFTER", math.inf)
    monkeypatch.setattr(quick, "NOISE_SECONDS", math.inf)
    figures = (quick.Figure("train", "fp32", 24, 8, 4), quick.Figure("sample", "bf16", 24, 4, 4))
    monkeypatch.setattr(quick, "FIGURES", figures)
    monkeypatch.setattr(quick, "NOISE", quick.Figure("train", "fp32", 8, 4, 2))
    threads = torch.get_num_threads()
    yield ticking
    torch.set_num_threads(threads)


def run(quick: Any, path: Path, *more: str) -> int:
    status: int = quick.main(["--model=tiny", "--repeats=1", f"--json={path}", *more])
    return status


_WRITTEN: list[str] = []


@pytest.fixture
def written(scripts: SimpleNamespace, clock: TokenClock, tmp_path: Path) -> Path:
    """A file that --write made: once, since the clock makes it the same every time."""
    path = tmp_path / "quick.json"
    if _WRITTEN:
        path.write_text(_WRITTEN[0], encoding="utf-8")
    else:
        assert run(scripts.quick, path, "--write") == 0
        _WRITTEN.append(path.read_text(encoding="utf-8"))
    return path


TRAIN, SAMPLE = "train fp32 P24 R8 K4", "sample bf16 P24 R4 K4"


def test_a_slower_step_ends_with_1_and_says_which(
    scripts: SimpleNamespace,
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = json.loads(written.read_text(encoding="utf-8"))["figures"]
    # Padded: 4·(24 + 8) tokens; ours: 24 + 4·7. generate reads 4·24, then 3 tokens of each.
    assert figures[TRAIN]["ratio"] == pytest.approx(128 / 52)
    assert figures[SAMPLE]["seconds"]["peer"]["median"] == 96 + 12
    assert figures[SAMPLE]["ratio"] > 1.5
    assert run(scripts.quick, written) == 0
    assert "no ratio is under 80%" in capsys.readouterr().out
    once = scripts.quick.completion_logprobs

    def twice(model: Any, rows: Any) -> torch.Tensor:
        with torch.no_grad():
            once(model, rows)
        return once(model, rows)

    monkeypatch.setattr(scripts.quick, "completion_logprobs", twice)
    assert run(scripts.quick, written) == 1
    said = capsys.readouterr().err
    assert f"SLOWER: {TRAIN}: 1.23x, committed 2.46x: 50% of it, under 80%; noise ±0%" in said
    assert "src/neat_align/modeling src/neat_align/learning\n" in said
    assert "make bench-quick ARGS=--write" in said
    assert f"SLOWER: {SAMPLE}" not in said


def test_a_slower_sampler_ends_with_1(
    scripts: SimpleNamespace,
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sampler = scripts.quick.TransformersSampler

    class PromptsAgain(sampler):  # type: ignore[misc]
        def sample(self, requests: Any, params: Any) -> Any:
            return [super(PromptsAgain, self).sample([r], params)[0] for r in requests]

    monkeypatch.setattr(scripts.quick, "TransformersSampler", PromptsAgain)
    assert run(scripts.quick, written) == 1
    said = capsys.readouterr().err
    # Each completion alone is what `generate` does: as fast as that.
    assert f"SLOWER: {SAMPLE}: 1.00x, committed 3.00x" in said
    assert "src/neat_align/sampling\n" in said
    assert f"SLOWER: {TRAIN}" not in said


def test_a_noisy_machine_fails_nothing(
    scripts: SimpleNamespace,
    clock: TokenClock,
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same work takes 1 and 1.3 times as long in turn, and everything of ours ten times."""
    padded, ours, turn = scripts.quick.strong_logprobs, scripts.quick.completion_logprobs, [0]

    def uneven(model: Any, rows: Any) -> torch.Tensor:
        turn[0] += 1
        clock.now += 0.3 * rows.input_ids.numel() * (turn[0] % 2)
        return padded(model, rows)

    def slow(model: Any, rows: Any) -> torch.Tensor:
        clock.now += 1000
        return ours(model, rows)

    monkeypatch.setattr(scripts.quick, "strong_logprobs", uneven)
    monkeypatch.setattr(scripts.quick, "completion_logprobs", slow)
    assert run(scripts.quick, written) == 0
    said = capsys.readouterr()
    assert "too noisy to tell: a ratio may be off by 66%" in said.out  # 2·1.2533·ln 1.3
    assert TRAIN not in said.err, "nothing else is measured"
    assert run(scripts.quick, written.with_name("new.json"), "--write") == 1
    assert not written.with_name("new.json").exists()
    assert "not written: a ratio may be off by 66%" in capsys.readouterr().err


def test_other_programs_on_the_cores_fail_nothing(
    scripts: SimpleNamespace,
    clock: TokenClock,
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(clock, "process_time", lambda: clock.now * torch.get_num_threads() / 2)
    assert run(scripts.quick, written) == 0
    assert "too noisy to tell: other programs have the cores" in capsys.readouterr().out
    assert run(scripts.quick, written.with_name("new.json"), "--write") == 1
    assert "not written: other programs have the cores" in capsys.readouterr().err


def test_noise_is_not_waited_for_on_a_busy_machine(
    scripts: SimpleNamespace, clock: TokenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts.quick, "NOISE_SECONDS", 2 * 24)  # a run takes 24
    bench = scripts.quick.Bench("tiny")
    assert scripts.quick.noise_of(bench).pair == 0
    assert clock.now == 24 + 3 * 24


def test_a_fall_is_looked_at_again(
    scripts: SimpleNamespace,
    clock: TokenClock,
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Something else ran during the first look: all looks together hold."""
    ours, runs = scripts.quick.completion_logprobs, [0]

    def disturbed(model: Any, rows: Any) -> torch.Tensor:
        runs[0] += 1
        clock.now += 30 * (runs[0] == 2)  # 1 warms up
        return ours(model, rows)

    monkeypatch.setattr(scripts.quick, "completion_logprobs", disturbed)
    assert run(scripts.quick, written) == 0
    assert runs[0] == 4


def test_nothing_is_timed_once_three_minutes_are_near(
    scripts: SimpleNamespace,
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Noise: 9 · 2·(8 + 4) tokens; the first figure: 2 · (52 + 128).
    monkeypatch.setattr(scripts.quick, "STOP_AFTER", 9 * 24 + 2 * (52 + 128) + 1)
    assert run(scripts.quick, written) == 0
    out = capsys.readouterr().out
    assert f"not compared: {SAMPLE} (577 s had passed: others have the cores" in out
    assert "no ratio is under 80%" in out


def test_bf16_is_left_out_on_another_kind_of_cpu(
    scripts: SimpleNamespace, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(written.read_text(encoding="utf-8"))
    result["setting"]["instructions"] = ["amx_bf16"]
    result["figures"][SAMPLE]["ratio"] = 1e9
    written.write_text(json.dumps(result), encoding="utf-8")
    assert run(scripts.quick, written) == 0
    out = capsys.readouterr().out
    assert f"not compared: {SAMPLE} (measured on a CPU with amx_bf16 for bf16" in out
    assert SAMPLE not in out.split("not compared")[0]


def test_without_a_committed_file_it_says_how_to_make_one(
    scripts: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"does not exist.*make bench-quick ARGS=--write"):
        run(scripts.quick, tmp_path / "none.json")


def test_the_committed_file_has_every_figure(scripts: SimpleNamespace) -> None:
    committed = scripts.guard.from_result(json.loads(COMMITTED.read_text(encoding="utf-8")))
    assert list(committed.ratios) == [f.name for f in scripts.quick.FIGURES]
    assert committed.here.threads <= scripts.quick.THREADS
    assert committed.here.instructions
