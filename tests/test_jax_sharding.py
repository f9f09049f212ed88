"""JAX on several devices: what each gives is what one gives, to float64's rounding (SPEC.md §6)."""

import json

import pytest
from processes import python
from sources import ROOT

from fwpkm.agreement import BOUNDS

SCRIPT = ROOT / "tests" / "jax_sharded.py"


@pytest.fixture(scope="module")
def found() -> dict[str, float | str]:
    """By case, the largest relative error, or what was raised."""
    done = python(SCRIPT, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize(
    "case",
    [
        *("auto, in pieces", "auto, begun inside", "auto, gradient", "auto, columns"),
        *("explicit, in pieces", "explicit, decode", "explicit, gradient", "explicit, columns"),
        *("explicit, rows", "explicit, plain", "explicit, decode in place", "mapped, decode in place"),
        *("mapped, in pieces", "mapped, begun inside", "mapped, overlaid", "mapped, chunk", "mapped, decode"),
        "mapped, gradient",
        *("auto, used", "explicit, used", "mapped, used", "auto, used gradient"),
        *("auto, used columns", "explicit, used columns", "explicit, used rows"),
    ],
)
def test_devices_agree_with_one(found: dict[str, float | str], case: str) -> None:
    error = found[case]
    assert not isinstance(error, str), error
    bounds = BOUNDS["float64"]
    assert error < (bounds.gradient if "gradient" in case else bounds.forward)
