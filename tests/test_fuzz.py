"""Random lives (benchmarks/fuzz.py): they pass, find what is wrong, and a number repeats them."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fwpkm
from benchmarks import fuzz
from fwpkm import reference, tensor_files
from fwpkm.conformance import judging


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """The exit status, and what was printed."""
    status = fuzz.main([str(x) for x in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_planted_bugs_are_found_and_lives_pass(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = run(capsys, "--seed", 1, "--lives", 3)
    assert status == 0, said
    assert said.count("planted and found") == len(fuzz.PLANTED) == 4
    assert re.search(r"3 lives, \d{2,} steps, \d{2,} tokens", said)
    assert "no failure" in said


def test_jax_lives_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "PLANTED", {})
    monkeypatch.setattr(fuzz, "MOST_STEPS", 5)
    status, said = run(capsys, "--seed", 1, "--lives", 1, "--backends", "numpy", "jax")
    assert status == 0, said


def test_it_ends_with_2_where_a_planted_bug_is_not_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "PLANTED", {"what is no bug": {"flush": reference.flush}})
    monkeypatch.setattr(fuzz, "PLANTED_LIVES", 3)
    status, said = run(capsys, "--lives", 1)
    assert status == 2
    assert "NOT found in 3 lives: what is no bug" in said
    assert "1 lives" not in said


def put_that_forgets_the_position(cfg: Any, state: Any, rows: Any, other: Any, **options: Any) -> Any:
    return reference.put(cfg, state, rows, other, **options)._replace(position=state.position)


def test_a_failure_is_repeated_by_its_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "PLANTED", {})
    wrong = SimpleNamespace(**vars(reference) | {"put": put_that_forgets_the_position})
    monkeypatch.setattr(fwpkm, "get_backend", lambda _: wrong)
    status, said = run(capsys, "--seed", 0, "--lives", 100, "--backends", "numpy")
    assert status == 1
    command = re.search(r"python -m benchmarks\.fuzz (.*)", said)
    assert command is not None
    again = run(capsys, *command[1].split())
    assert again[0] == 1
    failures = [re.search(r"life \d+ FAILED: step \d+ \(.*put\): numpy: .*", text) for text in (said, again[1])]
    assert failures[0] is not None
    assert failures[1] is not None
    assert failures[0][0] == failures[1][0]


def test_a_life_ends_where_rounding_moves_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "PLANTED", {})
    monkeypatch.setattr(judging, "FRACTION", 0)  # every rounding moves something
    status, said = run(capsys, "--seed", 0, "--lives", 5, "--backends", "numpy")
    assert status == 0
    assert "5 lives ended early" in said


def test_damaged_files_that_are_read_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_digest", lambda tensor: "")  # as if nobody checked
    monkeypatch.setattr(fuzz, "_damaged", lambda rng, data: data[:-1] + bytes([data[-1] ^ 1]))
    life = fuzz.Life(0, {"numpy": reference}, tmp_path)
    life._is_judged(life._begin())
    life._is_judged(fuzz.Step("read", life._drawn(life.size, 3)))
    with pytest.raises(fuzz.LifeError, match=r"damaged file of kind .* was read, with other bits"):
        life._is_judged(fuzz.Step("save", seed=0))


def test_a_state_that_is_overwritten_is_noticed(tmp_path: Path) -> None:
    def flush(cfg: Any, state: Any, rows: Any = None, **options: Any) -> Any:
        state.memory.values[...] += 1
        return reference.flush(cfg, state, rows, **options)

    life = fuzz.Life(0, {"numpy": SimpleNamespace(**vars(reference) | {"flush": flush})}, tmp_path)
    life._is_judged(life._begin())
    with pytest.raises(fuzz.LifeError, match="the state that it was given has other bits"):
        life._is_judged(fuzz.Step("flush"))
    assert np.isfinite(life.expected.seen_state().memory.values).all()
