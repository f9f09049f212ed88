"""Which cases a run can be judged on at all: those that a rounding of the inputs does not move (SPEC.md §6)."""

from collections.abc import Iterable

import numpy as np

from fwpkm import reference
from fwpkm.conformance.judging import bound, errors, reading_errors
from fwpkm.conformance.results import Result, expect
from fwpkm.conformance.running import Reading, read
from fwpkm.conformance.shapes import Passage
from fwpkm.conformance.strategies import Case

SHARE = 1 / 20
"""A rounding of the inputs may move a result by this share of the bound.

Overshooting writes (§4) multiply an error by up to κΣw² - 1 a chunk, and scores are steep near keys. Where that moves a
result by more, no run of the dtype can be judged.
"""


def nudged(case: Case, dtype: str) -> Case:
    """The case with every number moved by half a unit of the dtype's rounding, up or down."""
    rng = np.random.default_rng(case.seed)
    half_unit = np.finfo(dtype).eps / 2
    return case.map(lambda array: array * (1 + rng.choice([-1, 1], array.shape) * half_unit))


def expect_unmoved(passage: Passage) -> Result | None:
    """What the reference and torch's gradients give for a passage, in float64.

    None where a rounding of the inputs to the passage's dtype would not move it by far less than the bounds.
    """
    expected, dtype = expect(passage), passage.case.dtype
    moved = expect(passage._replace(case=nudged(passage.case.widened(), dtype)))
    return expected if _unmoved(errors(passage.case.cfg, moved, expected), dtype) else None


def survives_rounding(case: Case, expected: Reading, dtype: str = "float32") -> bool:
    """Whether a rounding of a float64 case, read in one call, moves the reference by far less than the bounds."""
    return _unmoved(reading_errors(case.cfg, read(reference, nudged(case, dtype)), expected), dtype)


def _unmoved(moves: Iterable[tuple[str, float]], dtype: str) -> bool:
    return all(error <= SHARE * bound(quantity, dtype) for quantity, error in moves)
