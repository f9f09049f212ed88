"""keras.distribution on JAX: what a model learns, reads and saves on several devices is what one device gives."""

import json

import pytest
from processes import python
from sources import ROOT

from fwpkm.agreement import BOUNDS

SCRIPT = ROOT / "tests" / "keras_distributed.py"


@pytest.fixture(scope="module")
def found() -> dict[str, float | str]:
    """By case, the largest relative error, or what was raised."""
    done = python(SCRIPT, timeout=900, TF_CPP_MIN_LOG_LEVEL="3")
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("case", ["rows", "rows and columns", "stateful", "uses", "uses by rows"])
def test_devices_agree_with_one(found: dict[str, float | str], case: str) -> None:
    error = found[case]
    assert not isinstance(error, str), error
    assert error < BOUNDS["float64"].gradient


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("slots", "memory/memory_values must not be dealt out to devices by slots"),
        ("slots of a state", "memory/state_memory_values must not be dealt out to devices by slots"),
        ("slots of uses", "memory/state_uses must not be dealt out to devices by slots"),
        (
            "columns that do not divide",
            "array axis 1 is partitioned 3 times, but the dimension size is 8",
        ),
    ],
)
def test_refusals_say_what_was_wrong(found: dict[str, float | str], case: str, words: str) -> None:
    raised = found[f"refused: {case}"]
    assert isinstance(raised, str), "nothing was raised"
    assert words in raised
