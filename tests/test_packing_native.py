"""Packed states where one framework is another than the others: histories, devices, tracing, donation."""

import jax
import numpy as np
import pytest
from asserting import assert_same_bits
from layer_files import CFG
from test_packing import half, initial, message, numbers, own_memories

import fwpkm
from fwpkm import Memory, packing, reference
from fwpkm.backends.torch import packing as torch_packing
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


def test_digests_that_are_remembered_are_those_of_the_tables_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: taken once, and anew after any change, one that torch does not count among them."""
    be = fwpkm.get_backend("torch")
    remembered = torch_packing.remembered_digests
    memory = Memory(*(x.clone() for x in initial(be)))
    taken = []
    monkeypatch.setattr(packing, "digests", lambda m, digests=packing.digests: (taken.append(1), digests(m))[1])

    def check(memory: Memory, count: int) -> None:
        for _ in range(2):
            np.testing.assert_array_equal(remembered(memory), packing.digests(as_numpy(be, memory)))
        assert len(taken) == count

    check(memory, 3)  # once by it, twice by the test
    memory.values.data[0, 3, 1] += 1
    check(memory, 6)
    memory.values.data[0, [1, 2]] = memory.values[0, [2, 1]]
    check(memory, 9)
    memory.keys.data[0, 0, 1, 2] *= 2
    check(memory, 12)
    known = len(torch_packing._KNOWN)
    del memory
    assert len(torch_packing._KNOWN) == known - 1
