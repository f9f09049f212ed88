"""Time and memory, of single calls and of contestants in interleaved rounds, and what they were measured on."""

import ctypes
import gc
import itertools
import math
import os
import pathlib
import platform
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

ROOT = pathlib.Path(__file__).resolve().parents[1]
"""Where ``python -m benchmarks...`` runs."""
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
"""Where kernels run: without a GPU, in Triton's interpreter, for tests of the benchmarks."""
_AGREEMENT = 1e-5  # of the median token's output; a near tie moves single tokens, a wrong equation moves all

Contestant = Callable[[int], Mapping[str, Callable[[], Any]]]
"""From the number of a round to what it runs, by part. A part returns its output, or a tuple that begins with it; None
stands for one that cannot be compared."""
Samples = dict[tuple[str, str, str], list[float]]
"""By workload, contestant and part; sample i of every list belongs to round i. Seconds, or bytes."""


# --- Statistics ---


class Summary(NamedTuple):
    """A median of ``size`` samples, with its spread: quartiles, or an interval of the median."""

    median: float
    low: float
    high: float
    size: int


def summarize(samples: Iterable[float]) -> Summary | None:
    """Median and quartiles, or None where nothing was measured."""
    array = np.asarray(list(samples))
    return Summary(*np.percentile(array, (50, 25, 75)).tolist(), len(array)) if len(array) else None


def ratio(samples: Iterable[float], others: Iterable[float]) -> Summary | None:
    """Of samples over others, pair by pair."""
    return summarize(a / b for a, b in zip(samples, others))


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Summary:
    """The median and an interval that holds the true one, whatever the distribution: two order statistics.

    How many of n samples lie below the true median is binomial with p = 1/2. Fewer than six give all samples' range,
    with less confidence.
    """
    array, n = np.sort(np.asarray(samples)), len(samples)
    at_most = itertools.accumulate(math.comb(n, rank) / 2**n for rank in range(n))  # P(so many lie below)
    cut = max(0, sum(p <= (1 - confidence) / 2 for p in at_most) - 1)
    return Summary(float(np.median(array)), float(array[cut]), float(array[n - 1 - cut]), n)


# --- Single calls ---


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Wall-clock seconds of one call and its result, which is thus not freed while the clock runs. Python's garbage
    collector waits meanwhile, as in :mod:`timeit`.
    """
    gc.disable()
    try:
        start = time.perf_counter()
        result = function(*args)
        return time.perf_counter() - start, result
    finally:
        gc.enable()


def device_timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds of one call on a CUDA device, by its own clock, until all that it launched has run; and its result.

    Without such a device, by the wall clock.
    """
    if not torch.cuda.is_available():
        return timed(function, *args)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> Any:
        before.record()
        result = function(*args)
        after.record()
        torch.cuda.synchronize()
        return result

    torch.cuda.synchronize()
    _, result = timed(run)
    return before.elapsed_time(after) / 1e3, result


def free_device_memory() -> None:
    """Give back what no tensor holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_extra_bytes(function: Callable[..., Any], *args: Any) -> int | None:
    """How far the process's resident memory rose above its start while ``function`` ran, results included.

    The kernel's own count of resident pages (VmHWM, reset before the call), so a page written for the first time counts
    and one that the caller had touched does not. None where the system keeps no such count (not Linux).
    Set MALLOC_MMAP_THRESHOLD_ before the process starts, so that the C library gives freed blocks back.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = read_bytes("/proc/self/status", "VmRSS")
        result = function(*args)
        peak = read_bytes("/proc/self/status", "VmHWM")
    except (OSError, AttributeError):  # no /proc, no permission, or a C library without malloc_trim
        return None
    del result
    return max(0, peak - before)


def available_bytes() -> float:
    """Memory that can be had without swapping; infinite where the system does not say (not Linux)."""
    return read_bytes("/proc/meminfo", "MemAvailable") if os.path.exists("/proc/meminfo") else math.inf


def read_bytes(path: str, field: str) -> int:
    """A field of a file of ``/proc``."""
    return 1024 * int(re.findall(rf"^{field}:\s*(\d+) kB", pathlib.Path(path).read_text(), re.MULTILINE)[0])


def environment() -> dict[str, str]:
    """Device and versions, for the head of every table; of those that are loaded."""
    packages = ("fwpkm", "torch", "numpy", "jax", "jaxlib", "keras", "triton")
    cuda = f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() else ""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    cpu = names[0] if names else platform.machine()
    return {
        "device": f"{cuda}{cpu}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} torch threads",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {sys.modules[name].__version__}" for name in packages if name in sys.modules),
    }


# --- Rounds ---


def output_of(result: Any) -> np.ndarray | None:
    """The output of a part, as NumPy has it."""
    while isinstance(result, tuple):
        result = result[0]
    if isinstance(result, torch.Tensor):
        result = result.detach().float().cpu()
    return None if result is None else np.asarray(result)


def agree(received: np.ndarray, expected: np.ndarray, err_msg: str) -> None:
    """Raise RuntimeError where the median token differs."""
    error = np.median(np.linalg.norm(received - expected, axis=-1) / np.linalg.norm(expected, axis=-1))
    if not error <= _AGREEMENT:
        raise RuntimeError(f"{err_msg}. Received: a relative difference of {error:.1e}")


def interleaved(
    workloads: Mapping[str, Mapping[str, Contestant]],
    rounds: int,
    *,
    warm_up: int = 1,
    budget: float = math.inf,
    alternate: bool = False,
    timer: Callable[..., tuple[float, Any]] = timed,
    agree: Callable[..., None] = agree,
) -> Samples:
    """Time every part of every contestant at every workload, in rounds.

    Args:
        workloads: the contestants of each.
        rounds: after those that warm up.
        warm_up: rounds that are not counted; the first round has number 0.
        budget: seconds; a contestant whose parts took longer in all sits out the rounds that remain.
        alternate: every other round runs the contestants in the opposite order.
        timer: from a part to its seconds and its result.
        agree: raises where an output differs from the first one of its workload, part and round: times of different
            results prove nothing.
    """
    samples: Samples = defaultdict(list)
    spent: Counter[tuple[str, str]] = Counter()
    shown = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
    for number in track(range(warm_up + rounds), "rounds", **shown):
        for workload, contestants in workloads.items():
            expected: dict[str, np.ndarray] = {}
            for name in list(contestants)[:: -1 if alternate and number % 2 else 1]:
                parts = contestants[name](number) if spent[workload, name] <= budget else {}
                for part, run in parts.items():
                    seconds, result = timer(run)
                    output = output_of(result)
                    del result  # all else that it made is freed before the next part
                    if output is not None:
                        message = f"{name} computes something else at {workload}"
                        agree(output, expected.setdefault(part, output), err_msg=message)
                    if number >= warm_up:
                        samples[workload, name, part].append(seconds)
                        spent[workload, name] += seconds
    for workload, name, part in list(samples):  # and the rest of a step whose scoring was timed, by round
        scoring = samples.get((workload, name, "scoring"))
        if scoring and part != "scoring":
            rest = [whole - alone for whole, alone in zip(samples[workload, name, part], scoring)]
            samples[workload, name, f"{part} without scoring"] = rest
    return samples
