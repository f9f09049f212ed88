"""Packed states where one framework is another than the others: histories, devices, tracing, donation."""

import jax
import numpy as np
import pytest
from asserting import assert_same_bits
from layer_files import CFG
from test_packing import half, initial, message, numbers, own_memories

import fwpkm
from fwpkm import Memory, packing, reference
from fwpkm.conformance.running import as_numpy, native


def test_large_tables_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, state = own_memories(CFG, 3)
    whole = reference.pack(CFG, state, memory)
    monkeypatch.setattr(packing, "_BLOCK", 7)  # two rows of three, and a last one alone
    for be in (reference, fwpkm.get_backend("torch")):
        parts = be.pack(CFG, native(be, state), native(be, memory))
        np.testing.assert_array_equal(parts.slots, whole.slots)
        np.testing.assert_array_equal(parts.values, whole.values)


def test_a_state_with_a_history_is_packed_without_it() -> None:
    be = fwpkm.get_backend("torch")
    memory = Memory(*(x.requires_grad_() for x in initial(be)))
    query, value = native(be, numbers(CFG, 2, 7))
    state = be.apply(CFG, be.init_state(CFG, memory, 2), query, value)[1]
    assert state.memory.values.requires_grad
    unpacked = be.unpack(CFG, be.pack(CFG, state, memory), memory)
    assert not any(x.requires_grad for x in (*unpacked.memory, *unpacked.pending))
    assert_same_bits(as_numpy(be, unpacked), as_numpy(be, be.detach(state)))


def test_what_is_traced_is_refused() -> None:
    be = fwpkm.get_backend("jax")
    state, memory = half(be), initial(be)
    packed = be.pack(CFG, state, memory)
    for function in (lambda m: be.pack(CFG, state, m), lambda m: be.unpack(CFG, packed, m)):
        assert "call it outside of jax.jit" in message(jax.jit(function), memory)


def test_an_unpacked_state_may_be_donated() -> None:
    """It owns its arrays: NumPy's behind the packed state are neither overwritten nor in the way."""
    be = fwpkm.get_backend("jax")
    state, memory = half(be), initial(be)
    packed, expected = be.pack(CFG, state, memory), as_numpy(be, state)
    unpacked = be.unpack(CFG, packed, memory)
    query, value = native(be, numbers(CFG, 2, 3))
    read = jax.jit(lambda state, *tokens: be.apply(CFG, state, *tokens)[1], donate_argnums=0)
    read(unpacked, query, value)
    assert unpacked.memory.values.is_deleted()
    assert_same_bits(as_numpy(be, be.unpack(CFG, packed, memory)), expected)
