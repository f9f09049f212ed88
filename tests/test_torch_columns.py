"""Value tables in columns over 2 and 4 processes agree with one process that has them whole (SPEC.md §6)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sources import ROOT

from fwpkm.agreement import BOUNDS

SCRIPT = ROOT / "tests" / "torch_columns.py"
CONFIGS = ("plain", "wait, one table", "dot product, clipped", "normalized")
EAGER = [f"eager, {name}" for name in CONFIGS]
KERNELS = [f"kernels, {name}" for name in CONFIGS[1:3]]
OTHERS = [
    *("packed rows", "overlaid", "a row that overflows in one column keeps its bits in all", "the layer", "compiled"),
    *("by distribute tensor", "drawn in columns"),
]


def run(ranks: int, folder: Path, *cases: str) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    line = [sys.executable, "-W", "error", SCRIPT]
    started = [
        subprocess.Popen(
            [*map(str, line), str(rank), str(ranks), str(folder), *cases],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        for rank in range(ranks)
    ]
    try:
        ended = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * ranks, [error[-1500:] for _, error in ended]
    return [dict(map(json.loads, printed.splitlines())) for printed, _ in ended]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("columns")


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict[str, Any]]:
    """Two ranks, which also save what four then load."""
    cases = [*EAGER, *KERNELS, *OTHERS, "overflow on the kernels gives nan", "refusals", "bad files", "save"]
    return run(2, folder, *cases)


@pytest.fixture(scope="module")
def of_four(folder: Path, of_two: Any) -> list[dict[str, Any]]:
    return run(4, folder, "load", EAGER[2], "packed rows", "the layer", "refusals", "save")


def check(found: list[dict[str, Any]], case: str) -> None:
    bound = BOUNDS["float32" if "kernels" in case else "float64"].forward
    for of_rank in found:
        assert of_rank[case] is True or of_rank[case] < bound, of_rank[case]


@pytest.mark.parametrize("case", [*EAGER, *KERNELS, *OTHERS, "overflow on the kernels gives nan"])
def test_two_ranks_agree_with_one(of_two: list[dict[str, Any]], case: str) -> None:
    check(of_two, case)


@pytest.mark.parametrize("case", [EAGER[2], "packed rows", "the layer", "load"])
def test_four_ranks_agree_with_one(of_four: list[dict[str, Any]], case: str) -> None:
    """``load`` reads what two ranks have saved."""
    check(of_four, case)
