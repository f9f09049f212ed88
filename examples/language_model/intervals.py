"""How sure a mean over books is: intervals over writers and over seeds.

Books of one writer resemble each other, so the writer is the unit: a writer's value is the mean of their documents'
values, and what is reported is the mean over writers with Student's t interval of 95%. Two models are compared in
pairs: writer by writer, on the same documents. Over seeds the unit is the run, whose value is its mean over writers.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean, its 95% interval, and of how many units it is; one unit alone has no interval: NaN."""

    mean: float
    low: float
    high: float
    units: int


class Measured(NamedTuple):
    """One number of each document, for example its bits per byte."""

    values: Mapping[str, float]
    """by the document's id"""
    writers: Mapping[str, str]
    """by the document's id"""

    def by_writer(self) -> dict[str, float]:
        """Each writer's mean over documents, by name."""
        found: dict[str, list[float]] = {}
        for document, value in sorted(self.values.items()):
            found.setdefault(self.writers[document], []).append(value)
        return {writer: float(np.mean(values)) for writer, values in found.items()}


def bits(path: Path, mode: str, start: int = 0) -> Measured:
    """The bits per byte of each document, from a file of by_position.py.

    Args:
        path: the file.
        mode: "reset", "carried", "frozen" or "no memory".
        start: bytes at a document's beginning to leave out, a multiple of the bin.

    Raises:
        ValueError: the file has no such mode, or lacks the writers.
    """
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    if mode not in data["bits"] or len(data.get("writers", ())) != len(data["documents"]):
        raise ValueError(f"{path} has bits of {', '.join(data['bits'])} and must name writers. Received: {mode!r}")
    means = np.array(data["bits"][mode])[:, start // data["bin"] :].mean(1).tolist()
    return Measured(dict(zip(data["documents"], means)), dict(zip(data["documents"], data["writers"])))


def over_writers(measured: Measured) -> Interval:
    """The mean over writers of their documents' means, with its interval over writers."""
    return interval(measured.by_writer().values())


def difference(measured: Measured, base: Measured) -> Interval:
    """The mean over writers of ``measured`` less ``base``, in pairs, with its interval over writers.

    Raises:
        ValueError: they are of different documents.
    """
    _check(measured, base)
    own, other = measured.by_writer(), base.by_writer()
    return interval(own[writer] - other[writer] for writer in own)


def relative(measured: Measured, base: Measured) -> Interval:
    """The mean over writers of how much more ``measured`` is than ``base``, as a share of ``base``, in pairs.

    -0.06 is 6% fewer bits. Interval over writers.

    Raises:
        ValueError: they are of different documents.
    """
    _check(measured, base)
    own, other = measured.by_writer(), base.by_writer()
    return interval(own[writer] / other[writer] - 1 for writer in own)


def over_seeds(runs: Iterable[Interval]) -> Interval:
    """The mean of several seeds' means, each from one of the functions above, with its interval over seeds."""
    return interval(run.mean for run in runs)


def interval(values: Iterable[float]) -> Interval:
    """The mean of values that are independent of each other, and Student's t interval of 95%.

    Raises:
        ValueError: there are none.
    """
    found = np.array(list(values), float)
    if not found.size:
        raise ValueError("there must be one value or more. Received: none")
    mean, number = float(found.mean()), len(found)
    if number == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = student(number - 1) * float(found.std(ddof=1)) / math.sqrt(number)
    return Interval(mean, mean - half, mean + half, number)


def student(freedom: int, share: float = 0.95) -> float:
    """The t that a variable with ``freedom`` degrees of freedom stays within, on both sides, with this probability."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < share else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t) (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine, odd = math.sin(angle), math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for i in range(odd + 2, freedom + 1, 2):
        total += term
        term *= cosine**2 * (i - 1) / i
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _check(measured: Measured, base: Measured) -> None:
    apart = sorted(set(measured.values) ^ set(base.values))
    if apart or any(measured.writers[x] != base.writers[x] for x in measured.values):
        raise ValueError(
            "pairs must be of the same documents, by the same writers. "
            f"Received: {len(measured.values)} and {len(base.values)}, {len(apart)} only on one side {apart[:3]}"
        )
