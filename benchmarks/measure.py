"""Time, memory, and what they were measured on."""

import ctypes
import gc
import math
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
"""Where ``python -m benchmarks...`` runs."""
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
"""Where kernels run: without a GPU, in Triton's interpreter, for tests of the benchmarks."""


class Summary(NamedTuple):
    """A median of ``size`` samples, with its spread: quartiles, or an interval of the median."""

    median: float
    low: float
    high: float
    size: int

    def scaled(self, factor: float) -> "Summary":
        """In another unit."""
        return Summary(factor * self.median, factor * self.low, factor * self.high, self.size)


def summarize(samples: Iterable[float]) -> Summary | None:
    """Median and quartiles, or None where nothing was measured."""
    array = np.asarray(list(samples))
    if not len(array):
        return None
    median, low, high = np.percentile(array, (50, 25, 75)).tolist()
    return Summary(median, low, high, len(array))


def ratio(samples: Iterable[float], others: Iterable[float]) -> Summary | None:
    """Of samples over others, pair by pair."""
    return summarize(a / b for a, b in zip(samples, others))


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Summary:
    """The median and an interval that holds the true one, whatever the distribution: two order statistics.

    How many of n samples lie below the true median is binomial with p = 1/2. Fewer than six give all samples' range,
    with less confidence.
    """
    array, n = np.sort(np.asarray(samples)), len(samples)
    below, rank = 1 / 2**n, 0  # P(at most `rank` samples lie below)
    while below <= (1 - confidence) / 2:
        rank += 1
        below += math.comb(n, rank) / 2**n
    cut = max(0, rank - 1)
    return Summary(float(np.median(array)), float(array[cut]), float(array[n - 1 - cut]), n)


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


def peak_device_bytes(function: Callable[..., Any], *args: Any) -> tuple[int | None, Any]:
    """How far the memory of tensors rose above its start while ``function`` ran, results included, and its result.

    None without a CUDA device.
    """
    if not torch.cuda.is_available():
        return None, function(*args)
    free_device_memory()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*args)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def free_device_memory() -> None:
    """Give back what no tensor holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def environment() -> dict[str, str]:
    """Device and versions, for the head of every table; of those that are loaded."""
    packages = ("fwpkm", "torch", "numpy", "jax", "jaxlib", "keras", "triton")
    versions = (f"{name} {sys.modules[name].__version__}" for name in packages if name in sys.modules)
    cuda = f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() else ""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    cpu = names[0] if names else platform.machine()
    return {
        "device": f"{cuda}{cpu}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} torch threads",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(versions),
    }


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
        before = _read_bytes("/proc/self/status", "VmRSS")
        result = function(*args)
        peak = _read_bytes("/proc/self/status", "VmHWM")
    except (OSError, AttributeError):  # no /proc, no permission, or a C library without malloc_trim
        return None
    del result
    return max(0, peak - before)


def available_bytes() -> float:
    """Memory that can be had without swapping; infinite where the system does not say (not Linux)."""
    return _read_bytes("/proc/meminfo", "MemAvailable") if os.path.exists("/proc/meminfo") else math.inf


def _read_bytes(path: str, field: str) -> int:
    return 1024 * int(re.findall(rf"^{field}:\s*(\d+) kB", pathlib.Path(path).read_text(), re.MULTILINE)[0])
