"""What a check of agreement found."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Finding(NamedTuple):
    """One quantity of one comparison."""

    what: str
    error: float
    bound: float

    @property
    def agrees(self) -> bool:
        """Whether the error keeps the bound; NaN does not."""
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """The error in bounds; of what must be equal, 0 or infinite."""
        if self.bound == 0:
            return 0.0 if self.agrees else float("inf")
        return float("inf") if np.isnan(self.error) else self.error / self.bound

    def __str__(self) -> str:
        """One line."""
        if self.bound == 0:
            return f"{self.what}: {'equal' if self.agrees else 'DIFFERS'}"
        return f"{self.what}: {self.error:.1e} of {self.bound:.0e}" + " DISAGREES" * (not self.agrees)


class Report(NamedTuple):
    """The findings of one task, and what else it has to say."""

    findings: Sequence[Finding]
    notes: Sequence[str] = ()
    digest: str = ""
    """A hash of results, to be compared with another process's."""

    @property
    def agrees(self) -> bool:
        """Whether there is anything, and all of it agrees."""
        return bool(self.findings) and all(finding.agrees for finding in self.findings)

    @property
    def worst(self) -> Finding | None:
        """The finding nearest to its bound, or farthest beyond it."""
        return max(self.findings, key=lambda finding: finding.share, default=None)


def equal(what: str, same: bool) -> Finding:
    """Of something that is equal or not."""
    return Finding(what, 0.0 if same else float("inf"), 0.0)


def same_bits(actual: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> bool:
    """Whether arrays are equal to the last bit, NaN included."""
    pairs = list(zip(actual, expected, strict=True))
    return all(a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)
