"""Contestants in interleaved rounds, and what is made of their times: tables, ratios within rounds, and growth."""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.measure import ratio, summarize, timed
from benchmarks.report import Claim, Table, spread
from benchmarks.workloads import Workload

_AGREEMENT = 1e-5  # of the median token's output; a near tie moves single tokens, a wrong equation moves all
LEGEND = "medians with their quartiles; rounds are interleaved, and ratios of times are taken within rounds"

Contestant = Callable[[int], Mapping[str, Callable[[], Any]]]
"""From the number of a round to what it runs, by part. A part returns its output, or a tuple that begins with it; None
stands for one that cannot be compared."""
Samples = dict[tuple[str, str, str], list[float]]
"""By workload, contestant and part; sample i of every list belongs to round i. Seconds, or bytes."""


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
    console = Console(stderr=True)
    numbers = range(warm_up + rounds)
    for number in track(numbers, "rounds", console=console, transient=True, disable=not sys.stderr.isatty()):
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
    return samples


def subtract_scoring(samples: Samples) -> None:
    """Add, beside each part of a contestant whose scoring was timed, the part "... without scoring", by round."""
    for workload, name, part in list(samples):
        scoring = samples.get((workload, name, "scoring"))
        if scoring and part != "scoring":
            rest = [whole - alone for whole, alone in zip(samples[workload, name, part], scoring)]
            samples[workload, name, f"{part} without scoring"] = rest


def growth(samples: Samples, workloads: Sequence[Workload], name: str, part: str, at_most: float) -> Claim:
    """The ratio of a part at the largest of several tables to the same at the smallest."""
    ends = (workloads[-1], workloads[0]) if len(workloads) > 1 else ()
    sizes = " / ".join(f"N={workload.config.num_subkeys}²" for workload in ends)
    measured = ratio(*(samples[workload.name, name, part] for workload in ends)) if ends else None
    return Claim(f"{name}, {part}: {sizes}", measured, at_most=at_most)


def table(
    workload: Workload, samples: Samples, rows: Mapping[str, str], columns: Mapping[str, tuple[str, float]]
) -> Table:
    """What one workload gave: contestants with their titles, and parts with theirs and the factor to its unit."""

    def cell(name: str, part: str, factor: float) -> str:
        measured = summarize(samples[workload.name, name, part])
        return spread(measured and measured.scaled(factor), "{:.1f}")

    first, cells = next(iter(columns)), []
    for name, text in rows.items():
        parts = (cell(name, part, factor) for part, (_, factor) in columns.items())
        cells.append((text, str(len(samples[workload.name, name, first])), *parts))
    title = f"{workload.name}: {workload}, value table {workload.table_bytes >> 20} MiB"
    return Table(title, ("", "rounds", *(text for text, _ in columns.values())), cells)
