"""Data parallel in PyTorch: ranks give what one process gives, in float64 to its rounding (SPEC.md §6)."""

import json

import pytest
from processes import python
from sources import ROOT

SCRIPT = ROOT / "tests" / "torch_ranks.py"
CASES = (
    *("ddp", "ddp, learned", "ddp, learned, carried", "ddp, traffic"),
    *("fsdp", "fsdp, learned", "fsdp, learned, carried", "fsdp, bfloat16", "fsdp, bfloat16, learned", "fsdp, meta"),
    *("to fewer", "to more", "language model", "bad input"),
)
ONLY_TWO = ("ddp, no_sync", "ddp, compiled", "fsdp, one group", "fsdp, compiled", "killed")


@pytest.fixture(scope="module")
def found() -> dict[str, float | str]:
    """By case and ranks, the worst error over its bound, or what was raised."""
    done = python(SCRIPT, OMP_NUM_THREADS="1", timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(map(json.loads, filter(None, done.stdout.splitlines())))


@pytest.mark.parametrize(
    "case",
    [*(f"{case}, {ranks} ranks" for ranks in (2, 4) for case in CASES), *(f"{case}, 2 ranks" for case in ONLY_TWO)],
)
def test_ranks_agree_with_one_process(found: dict[str, float | str], case: str) -> None:
    error = found[case]
    assert not isinstance(error, str), error
    assert error < 1
