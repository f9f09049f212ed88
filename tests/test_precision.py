"""Precision (SPEC.md §6): float32 tables and scores whatever surrounds them, and rows whose bits are their own."""

import contextlib

import numpy as np
import pytest
import torch
from asserting import assert_same_bits
from drawn import drawn

import fwpkm
from fwpkm import FwPKMConfig, Memory
from fwpkm.conformance.running import apply, as_numpy, native, start, stream
from fwpkm.conformance.strategies import floating

TORCH = fwpkm.get_backend("torch")


@pytest.mark.parametrize(("query", "tables"), [("float64", "float32"), ("float16", "float32"), ("float32", "float64")])
def test_tables_are_float32_unless_queries_are_float64_too(be, query, tables):
    """Outputs come back in the query's dtype; all else is that of a float32 run on the same numbers."""
    cfg = FwPKMConfig(4, 3, 2, 4, 2, 3, 1)
    rounded = drawn(cfg, 2, 8, dtype=min(query, tables, key=lambda name: int(name.removeprefix("float"))))
    memory, runs = drawn(cfg, 2, 8, dtype="float32").memory, []
    for q, t in ((query, tables), ("float32", "float32")):
        state = be.init_state(cfg, native(be, Memory(*(table.astype(t) for table in memory))), batch_size=2)
        output, state, trace = apply(be, cfg, state, rounded.map(lambda array, q=q: array.astype(q)).tokens)
        runs.append((output, trace.weights, as_numpy(be, state.memory)))
    assert runs[0][0].dtype == query
    np.testing.assert_array_equal(runs[0][0], runs[1][0].astype(query))
    assert runs[0][1].dtype == np.float32
    assert_same_bits(runs[0][2], runs[1][2])


@contextlib.contextmanager
def globally(name, value):
    """One of torch's settings, with ``torch.get_...`` and ``torch.set_...``."""
    get, change = (getattr(torch, f"{verb}_{name}") for verb in ("get", "set"))
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


SURROUNDINGS = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: globally("default_dtype", torch.float64),
    "default bfloat16": lambda: globally("default_dtype", torch.bfloat16),
    "medium matmul precision": lambda: globally("float32_matmul_precision", "medium"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("score", ["idw", "dot_product"])
def test_torch_surroundings_change_no_bit(surrounding, score):
    """Forward everywhere; backward too where there is one."""
    cfg = FwPKMConfig(16, 6, 2, 24, 3, 4, 1, score=score, write_scale="normalized")
    case = drawn(cfg, 2, 11, dtype="float32", left_out=["mask"])
    inputs = [x.requires_grad_() for x in native(TORCH, (*case.memory, *floating(case.tokens).values()))]

    def forward(keys, values, query, value, gate):
        state = TORCH.init_state(cfg, Memory(keys, values), batch_size=2)
        output, state, trace = TORCH.apply(cfg, state, query, value, gate)
        state, last = TORCH.flush(cfg, state)
        look = TORCH.lookup(cfg, state.memory, query)
        return output, *state.memory, look.output, trace.memorization, trace.weights, last.addressing

    def backward(outputs, inputs):
        loss = sum(array.square().sum() for array in outputs[:4])
        return torch.autograd.grad(loss, inputs)

    expected = forward(*inputs)
    with SURROUNDINGS[surrounding]():
        received = forward(*inputs)
    assert_same_bits(as_numpy(TORCH, received), as_numpy(TORCH, expected))
    if received[0].requires_grad:
        assert_same_bits(as_numpy(TORCH, backward(received, inputs)), as_numpy(TORCH, backward(expected, inputs)))


@pytest.mark.parametrize("score", ["idw", "dot_product"])
@pytest.mark.parametrize("number", [0.3, 1e4, 1e20, np.nan])
def test_a_row_of_a_larger_batch_keeps_its_bits(be, score, number):
    """Wide enough for vectorised sums and for a shortlist of sub-keys, whose choice must not depend on neighbours."""
    cfg = FwPKMConfig(48, 20, 2, 24, 5, 8, 1, score=score)
    case = drawn(cfg, 3, 20, dtype="float32")
    other = case.tokens.map(np.copy)
    other.query[1, ::3] *= number
    other.value[1, 1::3] *= number
    expected, received = (stream(be, cfg, start(be, case), x, flush=True)[0] for x in (case.tokens, other))
    for a, b in zip((*received[:5], *received.memory), (*expected[:5], *expected.memory)):
        assert_same_bits(a[[0, 2]], b[[0, 2]])
    assert not np.array_equal(received.output[1], expected.output[1])
