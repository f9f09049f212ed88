"""python -m benchmarks.gpu where there is no GPU: what it compares, counts and judges."""

import dataclasses
import os
import re
import sys

import numpy as np
import pytest
import torch
from processes import python
from sources import ROOT

from benchmarks import findings, gpu, gpu_agreement, gpu_report
from benchmarks.findings import Finding, Report, equal
from benchmarks.gpu_speed import by_kernel, drawn_lengths, touched_rows, traffic_floor
from benchmarks.worker import Outcome, Task
from benchmarks.workloads import WORKLOADS, Workload, make_inputs, make_memory, staggered
from fwpkm import FwPKMConfig, Memory, agreement
from fwpkm.tokens import Tokens

SMALL = FwPKMConfig(16, 16, 1, 64, 4, 4, memory_scope="batch")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_kernels_are_compared_and_timed_in_the_interpreter():
    sections = ("agreement", "speed", "rows", "stateless", "layer", "decode")
    line = (ROOT / "tests" / "tiny_gpu_benchmark.py", "--only", *sections, "--workers", "2", "--markdown")
    done = python(
        *line, cwd=ROOT, timeout=500, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join((str(ROOT), *sys.path))
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ([^|]+) \| (\d) \| (\d+) \| [^|]+ \| agrees \|$", done.stdout, re.MULTILINE)
    assert [(name, cases, int(found) >= least) for (name, cases, found), least in zip(rows, (12, 12, 16, 12, 60))] == [
        ("eager at tiny-kernels, float32", "1", True),
        ("float64 at small shapes", "1", True),
        ("decode, against eager", "2", True),
        ("from a memory, against eager", "1", True),
        ("ragged streams, against eager", "2", True),
    ]
    for title in ("Time", "Traffic; a device copy", "Memory", "Decoding"):
        assert f"**{title}" in done.stdout
    assert "| layer: ours/train |" in done.stdout


def test_jax_is_compared_with_torch_before_it_is_timed():
    line = (ROOT / "tests" / "tiny_gpu_benchmark.py", "--only", "jax", "--workers", "2", "--markdown")
    done = python(
        *line, cwd=ROOT, timeout=500, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join((str(ROOT), *sys.path))
    )
    assert done.returncode == 0, done.stderr
    for line in (r"jax beside torch \| 2 \| 29", r"bits in JAX \| 3 \| 5"):
        assert re.search(rf"^\| {line} \| [^|]+ \| agrees \|$", done.stdout, re.MULTILINE)
    for step in ("forward", "train"):
        assert f"| jax: tiny-kernels/{step} |" in done.stdout


def test_a_task_that_dies_takes_no_other_with_it():
    code = """
import math, operator, os
from benchmarks.worker import Task, run_all
if __name__ == "__main__":
    functions = (os._exit, (3,)), (operator.truediv, (1, 0)), (math.sqrt, (4,))
    for outcome in run_all([Task("", function.__name__, function, given) for function, given in functions], 1, 60):
        print(outcome.task.name, outcome.result, outcome.error.strip().splitlines()[-1:])
"""
    done = python("-c", code, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "_exit None ['the process that ran _exit ended with status 3']",
        "truediv None ['ZeroDivisionError: division by zero']",
        "sqrt 2.0 []",
    ], done.stderr


def test_memory_that_nobody_has_written_shows():
    before = torch.empty
    with findings.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
        assert (torch.zeros(2).new_empty(2, dtype=torch.int32) == 2**31 - 1).all()
        assert torch.empty(2, requires_grad=True).is_leaf
    assert torch.empty is before


def test_the_floor_counts_each_touched_row_once_a_chunk():
    cfg = FwPKMConfig(4, 8, 1, 3, 2, 2)
    workload = Workload("", cfg, batch=2, length=3)
    # Chunks [0, 2) and [2, 3): sequence 0 touches 2 rows, then 1; sequence 1 touches 3, then 2.
    slots = torch.tensor([[[0, 1], [1, 0], [4, 4]], [[0, 1], [0, 2], [5, 6]]])
    assert touched_rows(workload, slots) == (8, 5)
    tokens, row = 6, 4 * 8
    inputs, output = tokens * 2 * (4 + 8 + 1), tokens * 2 * 8
    forward = inputs + output + (8 + 5) * row
    train = forward + 2 * inputs + output + 4 * 8 * row
    assert traffic_floor(workload, slots, item=2) == {"forward": forward, "train": train}


def test_the_floor_of_one_table_counts_rows_that_sequences_share_once():
    workload = Workload("", FwPKMConfig(4, 8, 1, 3, 1, 2, memory_scope="batch"), batch=2, length=2)
    assert touched_rows(workload, torch.tensor([[[0], [1]], [[1], [2]]])) == (3, 3)


@pytest.mark.parametrize(
    "fields",
    [{}, {"score": "dot_product", "num_heads": 2}, {"top_k": 1, "num_subkeys": 1}, {"memory_scope": "sequence"}],
    ids=str,
)
def test_gaps_on_the_device_are_those_of_the_rule(fields):
    cfg = dataclasses.replace(SMALL, **fields)
    workload = Workload("", cfg, batch=3, length=7)
    keys = make_memory(workload).keys
    query = make_inputs(workload, seed=1).query.detach()
    expected = agreement.deciding_gap(cfg, Memory(keys.numpy(), None), query.numpy())
    np.testing.assert_allclose(gpu_agreement.deciding_gap(cfg, keys, query), expected, rtol=1e-9, atol=1e-12)


def test_drawn_inputs_are_comparable_to_the_end(monkeypatch):
    monkeypatch.setattr(gpu_agreement, "_CLEAR", 3e-3)  # as dense in ties as the paper's shape
    workload = Workload("", SMALL, batch=2, length=11)
    memory = Memory(*(table.numpy() for table in gpu_agreement.draw_memory(workload, seed=5)))
    inputs = [x.detach().numpy() for x in gpu_agreement.untied_inputs(workload, "float32", seed=5)]
    tied = make_inputs(workload, seed=5).query.detach().numpy()
    assert agreement.comparable_tokens(SMALL, memory, Tokens(tied, *inputs[1:3]), gap=2.9e-3) < 11
    assert agreement.comparable_tokens(SMALL, memory, Tokens(*inputs[:3]), gap=2.9e-3) == 11


def test_an_error_on_the_device_is_that_of_the_rule():
    a, b = torch.randn(2, 5, 4)
    assert findings.error(a, b) == pytest.approx(agreement.relative_error(a, b), rel=1e-12)
    assert findings.error(a * 1e-9, b * 0) == pytest.approx(agreement.relative_error(a * 1e-9, b * 0), rel=1e-12)
    assert findings.error(a / 0, b) == findings.error(a, a[:1]) == np.inf


def test_a_wrong_row_of_the_table_is_seen():
    """One row that should not have been written, and one that should be another, in a table of many."""
    workload = Workload("", SMALL, batch=2, length=8)
    inputs = make_inputs(workload, seed=2)
    expected, written, unwritten = (gpu_agreement.compute(workload, inputs, "eager", seed=3) for _ in range(3))
    touched = gpu_agreement.written_rows(workload, expected["slots"])
    outside = next(row for row in range(SMALL.num_slots) if row not in touched.tolist())
    written["values"][0, outside, 1] += 1e-7
    unwritten["values"][0, touched[3], 1] += 1e-2

    def wrong(actual):
        return [f.what for f in gpu_agreement.judge(workload, actual, expected) if not f.agrees]

    assert wrong(expected) == []
    assert wrong(written) == ["rows not written"]
    assert wrong(unwritten) == ["values"]
    assert not findings.same_bits(written, expected)
    assert findings.digest(written) != findings.digest(expected)


def timings(**seconds):
    """The same seconds for each step of a workload."""
    found = {"copy bandwidth/copy": [1e12]}
    for name, steps in seconds.items():
        for step, x, size in zip(("forward", "train"), steps, (2**30, 2**31)):
            name = name.replace("_", "-")
            found |= {f"{name}/{step}": [x] * 3, f"{name}/extra: {step}": [size], f"{name}/least: {step}": [10**9]}
    return found


def test_packed_documents_have_lengths_that_are_drawn():
    lengths = drawn_lengths(32768, 20, 4096)
    assert lengths.sum().item() == pytest.approx(32768, rel=1e-9)
    assert lengths.max() == 4096
    assert lengths.min() < 400
    assert torch.equal(lengths, drawn_lengths(32768, 20, 4096))


def test_rows_that_decode_stand_at_positions_over_a_whole_chunk():
    workload = Workload("", dataclasses.replace(SMALL, memory_scope="sequence"), batch=4, length=10)
    tokens = [x.detach() for x in make_inputs(workload, seed=1).tokens]
    state, left = staggered(workload.config, make_memory(workload), tokens, "eager")
    assert state.position.tolist() == [0, 1, 2, 3]
    for x, of_row in zip(left, tokens, strict=True):
        assert torch.equal(x, torch.stack([of_row[b, b : b + 7] for b in range(4)]))


def test_targets_are_judged_and_what_was_not_measured_is_missed():
    found = timings(shared_512=(1.1e-3, 6e-3), shared_256=(1e-3, 1e-3), shared_1024=(1.4e-3, 2e-3))
    found["decode: decode-512/graph"] = [27e-6]
    claims = {claim.text: claim.verdict for claim in gpu_report.targets(found, {"speed", "decode"})}
    assert claims["B=8 T=4096 N=512², one table: forward, ms"] == "holds"
    assert claims["B=8 T=4096 N=512², one table: forward + backward, ms"] == "FAILS"
    assert claims["B=8 T=4096 N=512², one table: extra GiB, forward"] == "holds"
    assert claims["B=8 T=4096 N=512², one table: extra GiB, forward + backward"] == "FAILS"
    assert claims["B=8 T=4096 N=512², one table, from a CUDA graph: forward, ms"] == "not measured"
    assert claims["B=8 T=4096, N=1024² / N=256²: forward"] == "holds"
    assert claims["B=8 T=4096, N=1024² / N=256²: forward + backward"] == "FAILS"
    assert claims["B=1 T=131072 N=512², memory / attention: forward"] == "not measured"
    assert claims["decode B=1 in a CUDA graph, µs a token"] == "holds"
    assert len(claims) == 23
    assert len([*gpu_report.targets(found, {"stateless"})]) == 14
    assert not list(gpu_report.targets(found, {"agreement"}))


def test_growth_without_scoring_leaves_the_scoring_kernels_out():
    found = {}
    for name, scoring in (("shared-256", 1.0), ("shared-1024", 9.0)):
        kernels = {"propose_kernel": scoring, "select_slots_kernel": scoring, "values_kernel": 2.0}
        found |= {f"kernels: {name}/{x}": samples for x, samples in by_kernel("forward", kernels).items()}
    claims = {claim.text: claim for claim in gpu_report.targets(found, {"speed"})}
    name = "the same without scoring, device time (the least traffic grows by 1.23): forward"
    assert claims[name].measured.median == 1
    assert gpu_report.kernels_table(found).rows[0] == ("all", "4000000.0", "20000000.0")


def test_no_time_is_taken_of_what_did_not_agree():
    workload, other = WORKLOADS["shared-512"], WORKLOADS["shared-256"]
    check = Task("agreement", "eager", gpu_agreement.agree, (workload, gpu.DTYPE, 0))
    timed, untested = (Task("speed", w.name, print, (w, gpu.DTYPE)) for w in (workload, other))

    def admitted(report, error=""):
        checks = [Outcome(check, report, error, 1.0)]
        tasks = (timed, untested, Task("speed", "attention", print, (8, 4096)))
        return [gpu_report.agreed(checks, task) for task in tasks]

    assert admitted(Report([equal("slots", True)])) == [True, False, True]
    assert admitted(Report([equal("slots", True), Finding("output", float("nan"), 1e-5)])) == [False, False, True]
    assert admitted(None, "Traceback") == [False, False, True]
    assert admitted(Report([])) == [False, False, True]


def test_tables_hold_what_was_measured():
    checks = [
        Outcome(Task("agreement", "vectors: a", print), Report([Finding("output", 1e-6, 1e-5)]), "", 1.0),
        Outcome(Task("agreement", "vectors: b", print), Report([Finding("keys", 2e-5, 1e-5)]), "", 1.0),
        Outcome(Task("bits", "bits", print), None, "Traceback", 1.0),
    ]
    agreement_, times, floors, memory = gpu_report.tables(checks, timings(shared_512=(2e-3, 6e-3)), [])
    assert agreement_.rows == [
        ("vectors", "2", "2", "keys: 2.0e-05 of 1e-05 DISAGREES", "DISAGREES"),
        ("bits", "1", "0", "-", "RAISED in 1"),
    ]
    assert times.rows[0][:3] == ("B=8 T=4096 N=512², one table", "2 (2 to 2)", "6 (6 to 6)")
    assert floors.rows[0][1:4] == ("1", "1", "2 (2 to 2)")
    assert memory.rows[0][1:3] == ("1", "2")


def test_every_section_has_its_tasks():
    checks, timings = gpu.checks(seed=0), gpu.timings()
    for section in gpu.SECTIONS:
        assert gpu.chosen({section}, checks + timings)
    names = [task.name for task in checks]
    assert len(set(names)) == len(names) > 60
    outcomes = [Outcome(task, Report([equal("", True)]), "", 0.0) for task in checks]
    assert all(gpu_report.agreed(outcomes, task) for task in timings)
