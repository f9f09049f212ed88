"""What the benchmarks compare computes the same thing, and the command runs, prints and judges."""

import importlib.metadata

import numpy as np
import pytest
import torch
from sources import ROOT

from benchmarks import baselines, compare, cpu, digests, measure, report
from benchmarks.workloads import WORKLOADS, Workload, make_inputs, make_memory
from fwpkm import FwPKMConfig, Memory, get_backend, reference
from fwpkm.agreement import BOUNDS, relative_error

SMALL = {"key_dim": 8, "value_dim": 6, "num_subkeys": 8, "top_k": 3, "chunk_size": 5}
CONFIGS = {
    "plain": {},
    "two heads, normalized": {"num_heads": 2, "write_scale": "normalized"},
    "dot product, unit": {"score": "dot_product", "write_scale": "unit", "temperature": 0.5},
    "clipped, decayed": {"grad_clip": 0.01, "weight_decay": 0.1, "addressing_weight": 2.0},
    "no lookahead": {"lookahead": 0, "learning_rate": 0.5},
    "two ahead": {"lookahead": 2},
}
BOUND = BOUNDS["float64"]


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def cfg(request):
    return FwPKMConfig(**SMALL, **request.param)


def draw(cfg, length=13):
    """A small workload in float64: ``memory, query, value, gate, cotangent``."""
    workload = Workload("small", cfg, batch=2, length=length)
    memory = Memory(*(table.double() for table in make_memory(workload)))
    return memory, *(tensor.detach().double() for tensor in make_inputs(workload, seed=1))


def arrays(tensors):
    return [tensor.detach().numpy() for tensor in tensors]


def assert_agree(actual, expected, bound):
    errors = [relative_error(a, e) for a, e in zip(arrays(actual), map(np.asarray, expected), strict=True)]
    assert max(errors) <= bound, errors


def test_dense_agrees_with_the_reference(cfg):
    memory, query, value, gate, _ = draw(cfg)
    output, written = baselines.dense(cfg, memory, query, value, gate, flush=True)

    state = reference.init_state(cfg, Memory(*arrays(memory)), batch_size=2)
    expected, state, trace = reference.apply(cfg, state, *arrays((query, value, gate)))
    state, flushed = reference.flush(cfg, state)

    assert (trace.writes == 2).all()
    assert (flushed.writes == 1).all()
    assert_agree((output, *written), (expected, *state.memory), BOUND.forward)


def test_dense_gradients_agree_with_the_torch_backend(cfg):
    be = get_backend("torch")
    memory, *inputs, cotangent = draw(cfg)

    def gradients(run):
        leaves = [tensor.clone().requires_grad_() for tensor in (*memory, *inputs)]
        output, written = run(Memory(*leaves[:2]), *leaves[2:])
        return torch.autograd.grad((output, *written), leaves, (cotangent, *memory))

    def run_torch(memory, *inputs):
        output, state, _ = be.apply(cfg, be.init_state(cfg, memory, batch_size=2), *inputs)
        return output, be.flush(cfg, state)[0].memory

    actual = gradients(lambda memory, *inputs: baselines.dense(cfg, memory, *inputs, flush=True))
    assert_agree(actual, arrays(gradients(run_torch)), BOUND.gradient)


def test_dense_leaves_a_partial_chunk_unwritten():
    cfg = FwPKMConfig(**SMALL)
    memory, query, value, gate, _ = draw(cfg, length=9)
    whole = baselines.dense(cfg, memory, query, value, gate)[1]
    first = baselines.dense(cfg, memory, query[:, :5], value[:, :5], gate[:, :5])[1]
    assert_agree(whole, arrays(first), 0.0)


@pytest.mark.parametrize("field", [{"boundary": "wait"}, {"memory_scope": "batch"}])
def test_dense_refuses_what_it_leaves_out(field):
    with pytest.raises(ValueError, match="expected boundary='drop' and memory_scope='sequence'"):
        baselines.dense(FwPKMConfig(**SMALL, **field), *draw(FwPKMConfig(**SMALL))[:4])


def test_static_agrees_with_lookups(cfg):
    be = get_backend("torch")
    memory, query, *_, cotangent = draw(cfg)
    query.requires_grad_()
    output, expected = static(cfg, memory, query), be.lookup(cfg, memory, query).output
    wanted = reference.lookup(cfg, Memory(*arrays(memory)), query.detach().numpy()).output
    assert_agree((output, expected), (wanted, wanted), BOUND.forward)
    gradient, other = (torch.autograd.grad(tensor, query, cotangent) for tensor in (output, expected))
    assert_agree(gradient, arrays(other), BOUND.gradient)


def static(cfg, memory, query):
    return baselines.static(cfg, memory.keys, memory.values.flatten(0, 1), query)


def test_static_gradients_of_the_tables_agree_with_lookups(cfg):
    memory, query, *_, cotangent = draw(cfg)
    keys, rows = memory.keys.requires_grad_(), memory.values.flatten(0, 1).requires_grad_()
    gradients = torch.autograd.grad(baselines.static(cfg, keys, rows, query), (keys, rows), cotangent)
    memory = Memory(keys, rows.detach().view_as(memory.values).requires_grad_())
    expected = torch.autograd.grad(get_backend("torch").lookup(cfg, memory, query).output, memory, cotangent)
    assert_agree((gradients[0], gradients[1].to_dense().view_as(expected[1])), arrays(expected), BOUND.gradient)


def test_static_shares_one_memory_between_sequences():
    cfg = FwPKMConfig(**SMALL)
    memory, query, *_ = draw(cfg)
    one = Memory(*(table[:1] for table in memory))
    both = Memory(*(table.repeat(2, *(1,) * (table.ndim - 1)) for table in one))
    assert_agree([static(cfg, one, query)], arrays([static(cfg, both, query)]), BOUND.forward)


def test_extra_memory_counts_new_pages_only():
    size = 64 * 2**20
    touched = np.ones(size, dtype=np.uint8)
    assert size <= measure.peak_extra_bytes(np.ones, size, np.uint8) < 1.25 * size
    assert measure.peak_extra_bytes(touched.fill, 2) < size / 4


def test_the_interval_of_a_median_is_one_of_order_statistics():
    """Of 30 samples the 10th and the 21st: 1 - 2 P(Bin(30, 1/2) <= 9) = 0.957, and without them 0.901."""
    shuffled = np.random.default_rng(0).permutation(30) + 1.0
    assert measure.median_interval(shuffled) == (15.5, 10, 21, 30)
    assert measure.median_interval([3.0, 1.0]) == (2, 1, 3, 2)


def test_a_tree_beside_itself_computes_the_same(monkeypatch, capsys):
    names = ("training step, in place", "decode, a token")
    monkeypatch.setitem(compare.CASES, "cpu", {name: compare.CASES["cpu"][name] for name in names})
    options = ["--against", str(ROOT), "--pairs", "3", "--workload", "tiny", "--markdown"]
    assert cpu.main(options) == 0
    printed, errors = capsys.readouterr()
    rows = [line for line in printed.splitlines() if "| tiny |" in line]
    assert len(rows) == errors.count("\n") == 2
    assert all(row.endswith(("| holds |", "| SLOWER |")) for row in rows)


def test_another_package_than_the_chosen_one_is_seen(tmp_path):
    with pytest.raises(RuntimeError, match=f"expected the package of {tmp_path}"):
        compare.measure_pairs("cpu", "decode, a token", "tiny", tmp_path, 1)


@pytest.mark.parametrize(("option", "value"), [("--against", "nowhere"), ("--pairs", "0"), ("--repeats", "-1")])
def test_options_that_make_no_sense_are_refused(option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        cpu.main([option, value])
    assert f"argument {option}: must be a" in capsys.readouterr().err


def test_digests_that_have_nothing_to_compare_differ():
    one, other = {"output": np.ones(3)}, {"slots": np.ones(3)}
    assert digests.compared(one, dict(one)) == "same bits"
    assert digests.compared(one, {"output": np.ones(3) + 1e-3}).startswith("differs: 1.0e-03 in output")
    assert digests.compared(one, {}) == "differs: 0 arrays there, 1 here, 0 of one name"
    assert digests.compared(one, one | other) == "differs: 2 arrays there, 1 here, 1 of one name"


def test_a_bound_that_was_not_measured_is_broken():
    ratio = measure.summarize([2.0, 3.0, 4.0])
    assert report.Claim("", ratio, at_least=3, at_most=3).verdict == "holds"
    assert report.Claim("", ratio, at_least=3.1).verdict == "FAILS"
    assert report.Claim("", ratio, at_most=2.9).broken
    assert report.Claim("", measure.summarize([]), at_most=1).broken
    assert not report.Claim("", None).broken


LAX = {"at_least": 0}, {"at_most": 1e9}, {"at_most": 1e9}


@pytest.fixture(scope="module")
def samples():
    return cpu.measure_all([WORKLOADS["tiny"], WORKLOADS["tiny-wide"]], repeats=2)


@pytest.fixture
def run(samples, monkeypatch, capsys):
    """``main`` on one shared measurement: its exit status, what it printed, and its errors."""

    def run(bounds=LAX, growth=1e9):
        claims = [(*claim[:3], bound) for claim, bound in zip(cpu.CLAIMS, (*bounds, {}, {}, {}))]
        monkeypatch.setattr(cpu, "CLAIMS", claims)
        monkeypatch.setattr(cpu, "GROWTH", growth)
        sizes = [WORKLOADS["tiny"], WORKLOADS["tiny-wide"]]
        monkeypatch.setattr(cpu, "measure_all", lambda workloads, _: samples if workloads == sizes else None)
        status = cpu.main(["--workload", "tiny-wide", "tiny", "--check", "--markdown"])
        return status, *capsys.readouterr()

    return run


def test_the_command_prints_what_it_measured(run, samples):
    status, printed, errors = run()
    assert (status, errors) == (0, "")
    assert f"torch {importlib.metadata.version('torch')}" in printed
    for title in ("**tiny: B=1 T=128 N=16²", "| extra memory, MiB |", "**Ratios at tiny-wide**"):
        assert title in printed
    assert {len(samples["tiny-wide", name, "time without scoring"]) for name in cpu.CONTESTANTS} == {2}
    assert samples["tiny-wide", "dense", "extra memory"][0] > 2 * WORKLOADS["tiny-wide"].table_bytes


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ({"bounds": ({"at_least": 1e9}, *LAX[1:])}, "FAILS: time: dense / torch: "),
        ({"bounds": (LAX[0], {"at_most": 0}, LAX[2])}, "FAILS: extra memory: torch / dense: "),
        ({"bounds": (*LAX[:2], {"at_most": 0})}, "FAILS: time: torch / static: "),
        ({"growth": -1e9}, "FAILS: torch, time without scoring: N=128² / N=16²: "),
    ],
    ids=("dense time", "dense memory", "static time", "growth"),
)
def test_the_command_fails_where_a_bound_does_not_hold(run, broken, line):
    status, printed, errors = run(**broken)
    assert status == 1
    assert errors.startswith(line)
    assert errors.count("\n") == 1
    assert "tiny-wide: B=1 T=128 N=128²" in printed
