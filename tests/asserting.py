"""The judgements of fwpkm.conformance as assertions."""

import numpy as np

from fwpkm import agreement
from fwpkm.conformance import judging


def assert_close(actual, expected, dtype, kind="forward", name="arrays"):
    """Arrays, or tuples of arrays, agree within the bound of §6."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for part, a, b in zip(getattr(expected, "_fields", range(len(expected))), actual, expected):
            assert_close(a, b, dtype, kind, f"{name}: {part}")
        return
    bound = getattr(agreement.BOUNDS[str(dtype)], kind)
    error = agreement.relative_error(actual, expected)
    assert error <= bound, f"{name} differ by {error:.3g}, more than {bound:.3g} ({dtype} {kind})"


def assert_same_reading(cfg, actual, expected, dtype):
    """Two readings agree; each head's entries are compared by slot id, where their number means something."""
    for name, error in judging.reading_errors(cfg, actual, expected):
        bound = judging.bound(name, dtype)
        assert error <= bound, f"{name} differ by {error:.3g}, more than {bound:.3g} ({dtype})"


def assert_same_bits(actual, expected):
    """Arrays, or tuples of arrays, are equal to the last bit, NaN included."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected):
            assert_same_bits(a, b)
        return
    if expected is None:
        assert actual is None
        return
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
