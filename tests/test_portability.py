"""A layer trained in one framework, and a sequence half read there, go on in every other one (SPEC.md §8)."""

import os
import subprocess
import sys
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from traveller import HALF, NAMES, OPTIONS, data

import fwpkm
from fwpkm import schedule
from fwpkm.agreement import BOUNDS, relative_error

CFG = fwpkm.FwPKMConfig(**{name: x for name, x in OPTIONS.items() if name != "learn_memory"})
BOUND = BOUNDS["float32"].forward
SCRIPT = Path(__file__).with_name("traveller.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files of all frameworks, each in one process that saves, waits for the others, and finishes their work."""
    place = tmp_path_factory.mktemp("travels")
    with ExitStack() as stack:
        processes = {name: stack.enter_context(start(name, place)) for name in NAMES}
        for process in processes.values():
            stack.callback(process.kill)  # before any is waited for, should one fail
        for process in processes.values():
            process.stdout.readline()  # it has saved, or failed
        for process in processes.values():
            process.stdin.close()  # go on
        codes = {name: process.wait() for name, process in processes.items()}
    logs = "".join(f"\n{name}:\n{(place / name).read_text()}" for name, code in codes.items() if code)
    assert not logs, logs
    return place


def start(name: str, place: Path) -> subprocess.Popen:
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**os.environ, **quiet, "KERAS_BACKEND": name.removeprefix("keras-")}
    command = [sys.executable, SCRIPT, name, place]
    with (place / name).open("w") as log:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=log)


@pytest.mark.parametrize("reader", NAMES)
@pytest.mark.parametrize("author", NAMES)
def test_another_framework_goes_on(folder, author, reader):
    actual, expected = (finished(folder, author, name) for name in (reader, author))
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= BOUND, errors


def finished(folder: Path, author: str, reader: str) -> dict[str, np.ndarray]:
    """The reader's outputs for both halves, the second from the author's state, and the arrays of its last state."""
    memory, *rest = fwpkm.load_state(folder / f"{author}.{reader}.end", CFG, "numpy")
    outputs = np.load(folder / f"{author}.{reader}.npz")
    return {**outputs, **memory._asdict(), **dict(zip(fwpkm.State._fields[1:], rest))}


@pytest.mark.parametrize("author", NAMES)
def test_the_state_is_handed_over_inside_a_chunk(folder, author):
    """Else the cases above would not show that pending tokens travel, of rows at different positions."""
    half = fwpkm.load_state(folder / f"{author}.half", CFG, "numpy")
    np.testing.assert_array_equal(half.position, data()[2][:, :HALF].sum(1))
    assert len(set(half.position.tolist())) == len(half.position)
    pending = schedule.pending(CFG, half.position)
    assert (pending > 0).all()
    np.testing.assert_array_equal(half.pending_mask.sum(1), pending)


def test_authors_differ(folder):
    """Each drew weights of its own, so a reader that ignored the files would be found out."""
    firsts = [finished(folder, author, author)["first"] for author in ("torch", "jax", "keras-tensorflow")]
    assert min(relative_error(a, b) for a, b in combinations(firsts, 2)) > 0.1
