"""Which cases a float32 run can be judged on at all."""

import numpy as np

from fwpkm import agreement, reference
from fwpkm.conformance.running import Reading, read
from fwpkm.conformance.strategies import Case

SHARE = 1 / 20
"""A rounding of the inputs may move a result by this share of the bound."""


def nudged(case: Case, dtype: str) -> Case:
    """The case with every number moved by half a unit of the dtype's rounding, up or down."""
    rng = np.random.default_rng(case.seed)
    half_unit = np.finfo(dtype).eps / 2
    return case.map(lambda array: array * (1 + rng.choice([-1, 1], array.shape) * half_unit))


def survives_rounding(case: Case, expected: Reading, dtype: str = "float32") -> bool:
    """Whether a rounding of the inputs moves the reference by far less than the bound.

    Overshooting writes (§4) multiply an error by up to κΣw² - 1 a chunk; where they do, no run of the dtype can be
    judged.

    Args:
        case: float64.
        expected: what the reference read.
        dtype: that of the runs to be judged.
    """
    got = read(reference, nudged(case, dtype))
    names = ("output", "memorization", "addressing")
    pairs = [(getattr(got, name), getattr(expected, name)) for name in names] + [*zip(got.memory, expected.memory)]
    return max(agreement.relative_error(a, b) for a, b in pairs) < agreement.BOUNDS[dtype].forward * SHARE
