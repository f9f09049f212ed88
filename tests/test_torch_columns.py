"""Value tables in columns over 2 and 4 processes agree with one process that has them whole (SPEC.md §6)."""

import json
import os
import re
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
KERNELS = ["kernels, wait, one table", "in place on the kernels", "overflow on the kernels gives nan"]
OTHERS = [
    *("packed rows", "overlaid", "a row that overflows in one column keeps its bits in all", "the layer", "compiled"),
    *("by distribute tensor", "drawn in columns", "through a state that was made for the call"),
]


def run(ranks: int, folder: Path, *cases: str) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    path = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    lines = [[sys.executable, "-W", "error", SCRIPT, rank, ranks, folder, *cases] for rank in range(ranks)]
    pipe = subprocess.PIPE
    started = [subprocess.Popen([*map(str, x)], stdout=pipe, stderr=pipe, text=True, env=environment) for x in lines]
    try:
        ended = [process.communicate(timeout=550) for process in started]
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
    return run(2, folder, *EAGER, *KERNELS, *OTHERS, "refusals", "bad files", "save")


@pytest.fixture(scope="module")
def of_four(folder: Path, of_two: Any) -> list[dict[str, Any]]:
    return run(4, folder, "load", EAGER[2], "packed rows", "the layer", "beside data parallel", "refusals", "save")


def check(found: list[dict[str, Any]], case: str) -> None:
    bound = BOUNDS["float32" if "kernels" in case else "float64"].forward
    for of_rank in found:
        assert of_rank[case] is True or of_rank[case] < bound, of_rank[case]


@pytest.mark.parametrize("case", [*EAGER, *KERNELS, *OTHERS])
def test_two_ranks_agree_with_one(of_two: list[dict[str, Any]], case: str) -> None:
    check(of_two, case)


@pytest.mark.parametrize("case", [EAGER[2], "packed rows", "the layer", "beside data parallel", "load"])
def test_four_ranks_agree_with_one(of_four: list[dict[str, Any]], case: str) -> None:
    """``load`` reads what two ranks have saved."""
    check(of_four, case)


def test_two_ranks_load_what_four_have_saved(folder: Path, of_four: Any) -> None:
    """And no less when a rank is killed while it saves anew: the older save is whole."""
    error = run(2, folder, "killed")[0]["killed"]
    assert re.match(r"RuntimeError: rank 0 of the 2 that hold a table's columns did not hear from all others", error)
    check(run(2, folder, "load"), "load")


REFUSALS = {
    "a state with uses": r"ValueError: what must be a state without uses \(usage_weight=0\).*Received: uses of shape",
    "uses from columns": r"ValueError: usage_weight must be 0 where a table lies in columns.*usage_weight=0.5",
    "uses by hand": r"ValueError: usage_weight must be 0 where a table lies in columns.*usage_weight=0.5",
    "uses by hand in a flush": r"ValueError: usage_weight must be 0 where a table lies in columns.*usage_weight=0.5",
    "uses by hand in a file": r"ValueError: usage_weight must be 0 where a table lies in columns.*usage_weight=0.5",
    "a file of uses": r"ValueError: usage_weight must be 0 where a table lies in columns.*usage_weight=0.5",
    "a layer that weighs them": r"ValueError: usage_weight must be 0 where a table lies in columns. Received: .*0.5",
    "rows": r"ValueError: values must be placed by Shard\(2\).*in rows \(Shard\(0\)\), a rank would drop every write",
    "rows of a layer": r"ValueError: values must be placed by Shard\(1\).*Received: placements \(Shard\(dim=0\),\)",
    "replicated": r"ValueError: values must be placed by Shard\(2\).*Received: placements \(Replicate\(\),\)",
    "odd": r"ValueError: value_dim must be a multiple of the ranks .* Received: value_dim=7 on \d ranks",
    "odd, by torch": r"ValueError: value_dim must be a multiple of the ranks .* Received: value_dim=7 on \d ranks",
    "few columns for kernels": r'ValueError: implementation="triton" cannot .* value_dim must be a multiple of 16',
    "mesh": r"ValueError: mesh must be a DeviceMesh of one dimension",
    "other tokens": r"ValueError: value must be the same on all ranks.* Received: value on ranks \[1",
    "other shape": r"ValueError: every rank must make the same call .* Received: another call on ranks \[",
    "wider tokens": r"ValueError: value must be the same on all ranks.* Received: value on ranks \[1",
    "no number on one": r"ValueError: value must be the same on all ranks.* Received: value on ranks \[1",
    "other pending tokens": r"ValueError: pending_value must be the same on all ranks",
    "wider pending tokens": r"ValueError: pending_query must be the same on all ranks",
    "other pending mask": r"ValueError: pending_mask must be the same on all ranks",
    "wider weights": r"ValueError: the layer's weights must be the same on all ranks",
    "other norm": r"ValueError: the layer's weights must be the same on all ranks",
    "other readout": r"ValueError: the layer's weights must be the same on all ranks",
    "other readout in decode": r"ValueError: the layer's weights must be the same on all ranks",
    "other mask": r"ValueError: mask must be the same on all ranks",
    "other weights": r"ValueError: keys must be the same on all ranks",
    "whole meets columns": r"ValueError: value tables that meet must lie in columns alike",
    "whole file": r"ValueError: a table must lie whole here: .*columns.save",
    "pack": r"ValueError: a table must lie whole here: .*gather",
    "to device": r"ValueError: state must lie whole",
    "twice": r"ValueError: what is dealt out must lie whole",
    "gather": r"ValueError: what is gathered must lie in columns",
    "mesh of others": r"ValueError: mesh must hold this rank.* Received: a mesh without rank",
    "nothing": r"ValueError: what must be a State, a Memory or a module with FwPKM layers. Received: Linear",
}
"""What every rank raises; after each, the ranks make a call together."""
ON_FIRST = {
    "bad on one rank": r"ValueError: query must have shape \[B, T, H\*Dk=8\]",
    "bad x on one rank": r"ValueError: x must have shape \[B, T, hidden_size=8\]",
}
GIVEN_UP = r"RuntimeError: \w+ was given up on every rank.* Received: failures of ranks \[0\] of the \d"


@pytest.mark.parametrize("ranks", ["of_two", "of_four"])
def test_what_cannot_be_is_refused_on_every_rank(ranks: str, request: pytest.FixtureRequest) -> None:
    for rank, found in enumerate(request.getfixturevalue(ranks)):
        messages = dict(message.split(": ", 1) for message in found["refusals"])
        expected = {**REFUSALS, **(ON_FIRST if rank == 0 else dict.fromkeys(ON_FIRST, GIVEN_UP))}
        assert messages.keys() == expected.keys()
        for name, pattern in expected.items():
            assert re.match(pattern, messages[name]), (rank, name, messages[name])


def test_a_rank_that_does_not_come_is_named_after_the_timeout(folder: Path) -> None:
    first, last = run(2, folder, "late")
    assert last["late"] == "absent"
    assert "within the process group's timeout (timeout= of init_process_group)" in first["late"]
    assert "Timed out" in first["late"]  # what gloo says


def test_bad_files_are_refused_on_every_rank(of_two: list[dict[str, Any]]) -> None:
    patterns = [
        "ValueError: .* saved with another configuration, which differs in temperature",
        "ValueError: .* not the save of a layer",
        "FileNotFoundError: .* no save of tables in columns is here",
        "FileNotFoundError: .* Create it first",
        "FileNotFoundError: .* Create it first",
        "ValueError: the value table must lie in columns",
        "TypeError: ",
        "ValueError: cfg must be",
        "ValueError: value_dim must be a multiple of the ranks",
        "FileNotFoundError: .* all ranks must write into one folder .* Not there: columns-.*-1-of-2",
        "ValueError: query_proj must be a Linear, .* whose forward was replaced",
        "ValueError: .* would lose digits",
        "RuntimeError: load_state was given up on every rank",
        "ValueError: .* not an index of tables in columns",
    ]
    by_rank = [list(patterns), list(patterns)]
    by_rank[1][4] = by_rank[1][6] = "RuntimeError: save was given up on every rank"
    by_rank[1][7] = by_rank[1][8] = "RuntimeError: load_state was given up on every rank"
    by_rank[1][9] = "RuntimeError: save was given up on every rank"
    by_rank[1][12] = "ValueError: .* the contents of memory.values do not match their sha256"
    for found, expected in zip(of_two, by_rank):
        for message, pattern in zip(found["bad files"], expected, strict=True):
            assert re.match(pattern, message), message
