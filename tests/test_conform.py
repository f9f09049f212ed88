"""fwpkm conform and fwpkm vectors: what they print, their exit status, and that a case can be repeated."""

import importlib.util
import json
import math
import pickle
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from asserting import assert_same_bits
from mutants.build import build
from mutants.table import LINES
from processes import python

from fwpkm import cli, vectors
from fwpkm.conformance import command, contestants, judging, results
from fwpkm.conformance.drawing import draw, drawer, shapes
from fwpkm.conformance.processes import Verdict, Worst
from fwpkm.conformance.running import same_bits


def conform(folder, *arguments):
    """The command, run in a folder."""
    return python("-m", "fwpkm", "conform", *arguments, cwd=folder)


def rows(printed):
    """The table's cells by quantity; quantities that have a space in their name too."""
    cells = (re.split(r"\s*\|\s*|  +", line.strip(" |")) for line in printed.splitlines())
    return {row[0]: row[1:] for row in cells if row[0] in judging.QUANTITIES}


def stopped_by(printed):
    """The words of the row, and of the lines that it is folded into, that says why a backend was not judged."""
    lines = re.search(r"^  stopped by(.*\n(  .*\n)*)", printed, re.MULTILINE)
    return " ".join(lines[1].split())


def test_a_module_of_the_current_folder_passes(tmp_path):
    (tmp_path / "mine.py").write_text("print('hello')\nfrom fwpkm.reference import *\n")
    done = conform(tmp_path, "--backends", "torch", "mine", "--cases", "4")
    assert done.returncode == 0, done.stderr
    shown = rows(done.stdout)
    assert list(shown) == list(judging.QUANTITIES)
    assert shown["slots"] == ["equal", "equal", "equal"]
    assert float(shown["output"][0]) == 1e-5
    assert 0 < float(shown["output"][1]) <= 1e-5
    assert shown["grad keys"][2] == "-"
    assert float(shown["grad keys"][1]) <= 1e-4
    assert "fwpkm conform --backends mine --seed 0 --dtype float32 --case" in done.stdout
    assert "4 cases, 4 of them with gradients; 0 of 4 set aside" in done.stdout
    assert "hello" not in done.stdout


def test_a_wrong_backend_fails_and_the_case_can_be_repeated(tmp_path):
    mutant = next(mutant for mutant in LINES if mutant.name == "kappa constant under normalized")
    module = build(tmp_path, "wrong", mutant)
    done = conform(tmp_path, "--backends", "numpy", module, "--cases", "20", "--seed", "3")
    assert done.returncode == 1, done.stderr
    assert not re.search(r"numpy: [\w ]+ (off|differ)", done.stdout)
    (line,) = re.findall(rf"^{module}: values off by .*", done.stdout, re.MULTILINE)
    finding, repeat = line.rsplit(": ", 1)
    again = conform(tmp_path, *shlex.split(repeat)[2:])
    assert again.returncode == 1, again.stderr
    assert finding in again.stdout
    assert "\n1 cases" in again.stdout


def test_a_backend_that_raises_fails(tmp_path):
    lines = ["from fwpkm.reference import *", "def flush(cfg, state, *, inplace=False):", "    raise KeyError('rows')"]
    (tmp_path / "raises.py").write_text("\n".join(lines))
    done = conform(tmp_path, "--backends", "raises", "--cases", "2")
    assert done.returncode == 1
    assert "raises: 2 cases raised, first KeyError: 'rows': fwpkm conform --backends raises" in done.stdout
    assert rows(done.stdout)["output"] == ["1e-05", "-"]
    assert stopped_by(done.stdout) == "2 cases raised, first KeyError: 'rows'"
    assert "--case 0" in done.stdout
    again = conform(tmp_path, "--backends", "raises", "--case", "0")
    assert "Traceback" in again.stderr


def test_backends_that_cannot_run_are_explained_and_the_others_judged(tmp_path):
    (tmp_path / "lacks.py").write_text("from fwpkm.reference import *\ndel flush, reset\n")
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    (tmp_path / "dies.py").write_text("import os, sys\nprint('out of luck', file=sys.stderr)\nos._exit(3)\n")
    (tmp_path / "quits.py").write_text("import os\nfrom fwpkm.reference import *\nlookup = lambda *_: os._exit(0)\n")
    (tmp_path / "needs.py").write_text("import nowhere\n")
    names = ("numpy", "lacks", "breaks", "dies", "quits", "needs", "no.such")
    done = conform(tmp_path, "--backends", *names, "--cases", "1")
    assert done.returncode == 2, done.stderr
    assert rows(done.stdout)["writes"] == ["equal", "equal", *"------"]
    assert {"module", "importing", "process"} <= set(stopped_by(done.stdout).split())
    for expected in (
        "lacks cannot run: the module lacks lacks these functions of SPEC.md §8: flush, reset",
        "breaks cannot run: importing it raised ZeroDivisionError: division by zero",
        "dies cannot run: its process ended with status 3 after 0 of 1 cases: ... out of luck",
        "quits cannot run: its process ended with status 0 after 0 of 1 cases: ... it printed nothing",
        "needs cannot run: No module named 'nowhere'\n",
        "no.such cannot run: No module named 'no'. Expected one of numpy, torch, jax,",
    ):
        assert expected in done.stdout


def test_where_nothing_ran_the_reason_comes_first(tmp_path):
    """A table would hold dashes alone."""
    (tmp_path / "dies.py").write_text("import os\nos._exit(3)\n")
    done = conform(tmp_path, "--backends", "dies", "--cases", "1")
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("dies cannot run: its process ended with status 3")


def test_names_that_are_not_there_are_one_line_before_a_case_is_drawn(capsys, monkeypatch):
    monkeypatch.setattr(command, "drawer", lambda *_: pytest.fail("a case is drawn"))
    assert cli.main(["conform", "--backends", "no.such", "nothing"]) == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("fwpkm: error: argument --backends: No module named 'no'. Expected one of numpy, torch, ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("case", [0, 2, 3])
def test_the_kernels_pass(tmp_path, case):
    """Both boundaries, scopes and scores, one head and two, clipping, decay, masks; gradients of each."""
    done = conform(tmp_path, "--backends", "triton", "--seed", "38", "--case", str(case))
    assert done.returncode == 0, done.stdout + done.stderr
    shown = rows(done.stdout)
    assert shown["slots"] == ["equal", "equal"]
    assert 0 < float(shown["grad keys"][1]) <= 1e-4
    assert "1 cases, 1 of them with gradients; 0 of 1 set aside" in done.stdout


def test_the_kernels_say_that_they_are_not_float64(tmp_path):
    done = conform(tmp_path, "--backends", "numpy", "triton", "--cases", "1", "--dtype", "float64")
    assert done.returncode == 2, done.stderr
    assert "triton cannot run: the kernels cannot serve float64 here: query must be float32" in done.stdout
    assert "numpy: worst" in done.stdout
    assert "fwpkm conform --backends numpy triton --seed 0 --dtype float64 --case" in done.stdout


def test_the_kernels_interpret_only_where_there_is_no_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for found in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert contestants.environment("triton", "float32", "").get("TRITON_INTERPRET") == (None if found else "1")
        assert "TRITON_INTERPRET" not in contestants.environment("torch", "float32", "")


def test_without_triton_the_kernels_name_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    with pytest.raises(contestants.CannotRunError, match=r"triton is not installed: pip install 'fwpkm\[triton\]'"):
        contestants.load("triton", "float32")


def test_markdown_is_the_table_alone(tmp_path):
    done = conform(tmp_path, "--backends", "numpy", "--cases", "2", "--dtype", "float64", "--markdown")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert all(line.startswith("|") and line.rstrip().endswith("|") for line in lines)
    assert len(lines) == 2 + len(judging.QUANTITIES)
    assert rows(done.stdout)["output"] == ["1e-10", "0.0e+00"]
    assert "0 of 2 set aside" in done.stderr


def test_json_is_one_object(tmp_path):
    done = conform(tmp_path, "--backends", "numpy", "nosuch", "--cases", "1", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_status"] == 2
    assert list(found) == ["fwpkm", "dtype", "seed", "judged", "set_aside", "exit_status", "backends"]
    numpy, other = found["backends"]
    assert list(numpy) == ["name", "cannot_run", "raised", "worst"]
    assert numpy["worst"]["slots"] == {"error": 0.0, "bound": 0.0, "holds": True, "case": 0}
    assert 0 < numpy["worst"]["output"]["error"] < numpy["worst"]["output"]["bound"] == 1e-5
    assert "nosuch" in other["cannot_run"]
    assert other["worst"] == {}


def test_json_has_no_infinity_and_tells_what_raised():
    worst = {"output": Worst(math.inf, 3), "keys": Worst(math.nan, 4), "values": Worst(2e-5, 5)}
    verdict = Verdict("mine", "", worst, {7: "ValueError: no"}, "")
    (found,) = command.as_object([verdict], {"dtype": "float32"})["backends"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [found["worst"][name]["error"] for name in worst] == [None, None, 2e-5]
    assert not any(found["worst"][name]["holds"] for name in worst)
    assert found["raised"] == {"7": "ValueError: no"}


def test_a_missing_extra_is_named(tmp_path):
    code = "import sys; sys.modules['hypothesis'] = None; from fwpkm.cli import main; sys.exit(main(['conform']))"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'fwpkm[conform]'" in done.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--cases", "0"), ("--seed", "-1"), ("--case", "x"), ("--dtype", "half")]
)
def test_wrong_arguments_are_named(option, value, capsys):
    assert cli.main(["conform", option, value]) == 2
    assert option in capsys.readouterr().err


def test_too_many_cases_set_aside_fail(monkeypatch, capsys):
    expect = judging.expect_unmoved
    monkeypatch.setattr(judging, "expect_unmoved", lambda passage: None if passage.number else expect(passage))
    assert command.run(["numpy"], cases=3) == 1
    assert "2 of 3 set aside" in capsys.readouterr().out


def test_a_case_follows_from_seed_and_number():
    for number in (3, 17):
        one, other, another = (drawer(seed, "float32")(number) for seed in (5, 5, 6))
        assert_same_bits(tuple(one.case.memory), tuple(other.case.memory))
        assert_same_bits(one.case.tokens.query, other.case.tokens.query)
        assert one[2:] == other[2:]
        assert one.case.seed != another.case.seed


def test_passages_and_results_survive_their_way_between_processes():
    passages = [drawer(1, "float32")(number) for number in range(10)]
    for passage, loaded in zip(passages, pickle.loads(pickle.dumps(passages))):
        assert same_bits((passage.case.memory, passage.case.tokens), (loaded.case.memory, loaded.case.tokens))
        assert loaded.case.cfg == passage.case.cfg
        assert (loaded.number, loaded.sizes, loaded.handed) == (passage.number, passage.sizes, passage.handed)
        assert loaded.case.flush_after == passage.case.flush_after
    result = results.expect(passages[0])
    loaded = pickle.loads(pickle.dumps(result))
    assert same_bits(tuple(loaded), tuple(result))
    assert loaded.calls.unchanged is result.calls.unchanged is True
    assert set(loaded.gradients) == {"query", "value", "gate", "keys", "values"}
    assert same_bits(tuple(loaded.gradients.values()), tuple(result.gradients.values()))


@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize("seed", range(5))
def test_every_run_covers_the_branches_of_the_equations(seed, unit):
    drawn = draw(shapes(unit), seed)
    assert len(drawn) == 10
    cfgs = [shape.cfg for shape in drawn]
    for field, values in {
        "boundary": {"drop", "wait"},
        "memory_scope": {"sequence", "batch"},
        "score": {"idw", "dot_product"},
        "write_scale": {"slots", "unit", "normalized"},
        "num_heads": {1, 2, 3},
        "lookahead": {0, 1, 2, 3},
    }.items():
        assert {getattr(cfg, field) for cfg in cfgs} == values
    for name in ("gate", "mask"):
        assert {name in shape.left_out for shape in drawn} == {True, False}
    assert any(cfg.chunk_size == 1 for cfg in cfgs)
    assert {cfg.grad_clip is None for cfg in cfgs} == {cfg.weight_decay == 0 for cfg in cfgs} == {True, False}
    assert {(cfg.usage_weight > 0, cfg.memory_scope) for cfg in cfgs} == {
        (weighted, scope) for weighted in (True, False) for scope in ("sequence", "batch")
    }
    for field in ("key_dim", "value_dim"):
        widths = {getattr(cfg, field) for cfg in cfgs}
        assert len(widths) > 1
        assert all(width % unit == 0 for width in widths)
    for cfg, batch, length, *_ in drawn:
        assert batch > 1
        assert length >= 2 * cfg.chunk_size, "at least two writes"
        assert cfg.chunk_size == 1 or (length // 2) % cfg.chunk_size, "a half ends within a chunk"


def test_readings_of_dead_tokens_are_judged():
    """Their outputs and weights must be NaN, their slots valid; the slots' numbers do not matter."""
    draw_case = drawer(0, "float64")
    passage = next(p for p in map(draw_case, range(100)) if "nonfinite" in p.case.twists)
    right = results.expect(passage)
    dead = np.isnan(right.reading.weights).all(-1)
    assert dead.any()

    def quantities(**changed):
        wrong = right._replace(reading=right.reading._replace(**changed))
        return {name for name, error in judging.errors(passage.case.cfg, wrong, right) if error}

    assert quantities() == set()
    slots = right.reading.slots.copy()
    slots[dead] = 0
    assert quantities(slots=slots) == set()
    slots[dead] = passage.case.cfg.num_slots
    assert quantities(slots=slots) == {"slots"}
    assert quantities(output=np.nan_to_num(right.reading.output)) == {"output"}
    assert quantities(weights=np.nan_to_num(right.reading.weights)) == {"weights"}


# Vectors


def test_vectors_are_written_once(tmp_path, capsys):
    target = tmp_path / "a" / "vectors"
    assert cli.main(["vectors", str(target)]) == 0
    assert f"53 vectors in {target}" in capsys.readouterr().out
    assert sorted(path.name for path in target.iterdir()) == vectors.names()
    with np.load(target / "base.npz") as file:
        assert file["out_output"].shape == (2, 20, 16)
    before = (target / "base.npz").stat().st_mtime_ns
    assert cli.main(["vectors", str(target)]) == 2
    assert "DIR must be a new or an empty folder. Received: " in capsys.readouterr().err
    assert (target / "base.npz").stat().st_mtime_ns == before


def test_vectors_fill_an_empty_folder_or_leave_it_alone(tmp_path, monkeypatch):
    names = vectors.names()
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "names", lambda: [*names[:3], "missing.npz"])
        with pytest.raises(FileNotFoundError):
            vectors.write(str(tmp_path / "vectors"))
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "vectors").mkdir()
        with pytest.raises(FileNotFoundError):
            vectors.write(str(tmp_path / "vectors"))
        assert list((tmp_path / "vectors").iterdir()) == []
    place = (tmp_path / "vectors").stat().st_ino  # of a mount point, say, which cannot be replaced
    vectors.write(str(tmp_path / "vectors"))
    assert (tmp_path / "vectors").stat().st_ino == place
    assert len(list((tmp_path / "vectors").iterdir())) == 53
    assert len(list(tmp_path.iterdir())) == 1


def test_a_choice_that_nothing_would_draw_is_noticed(monkeypatch):
    """A score that is added to the configuration's list must be judged too."""
    from fwpkm import config
    from fwpkm.conformance import drawing

    monkeypatch.setitem(config.CHOICES, "score", (*config.CHOICES["score"], "novel"))
    with pytest.raises(RuntimeError, match=r"each score.*'novel'"):
        drawing.shapes()
