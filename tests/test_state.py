"""States (SPEC.md §5): what they hold, that calls leave them alone, reset, detach and inplace."""

import dataclasses

import numpy as np
import pytest
import torch
from asserting import assert_close, assert_same_bits
from drawn import drawn
from hypothesis import given
from hypothesis import strategies as st

import fwpkm
from fwpkm import FwPKMConfig, Memory, State, reference
from fwpkm.conformance.running import apply, as_numpy, native, start, stream
from fwpkm.conformance.strategies import FLOATS, cases, splits, unmasked

TORCH = fwpkm.get_backend("torch")
SEQUENCE = {"memory_scope": "sequence", "batch": st.integers(2, 3)}


def count_pending(cfg, position):
    """§5, in its words."""
    size, ahead = cfg.chunk_size, cfg.lookahead
    if cfg.boundary == "drop":
        return position % size
    return position if position < size + ahead else ahead + (position - ahead) % size


def table_rows(state, chosen):
    """The fields of a NumPy state at some rows."""
    return Memory(*(table[chosen] for table in state.memory)), *(field[chosen] for field in state[1:])


@given(cases(dtype=FLOATS))
def test_pending_tokens_come_first_then_zeros(be, case):
    cfg, state = case.cfg, start(be, case)
    room, first = cfg.chunk_size + cfg.lookahead - 1, as_numpy(be, state)
    gate = np.ones((case.batch, case.length), case.dtype) if case.tokens.gate is None else case.tokens.gate
    given_tokens = (case.tokens.query, case.tokens.value, gate, unmasked(case.tokens))
    for t in range(case.length + 1):
        now = as_numpy(be, state)
        assert [field.shape for field in now[1:]] == [field.shape for field in first[1:]]
        assert [table.shape for table in now.memory] == [table.shape for table in first.memory]
        assert [field.dtype for field in now[1:]] == [field.dtype for field in first[1:]]
        assert now.position.dtype == np.int32
        assert now.position.tolist() == [t] * case.batch
        count = count_pending(cfg, t)
        for field, tokens in zip(now[1:5], given_tokens):
            assert field.shape[:2] == (case.batch, room)
            assert not field[:, count:].any()
            live = given_tokens[3][:, t - count : t]
            np.testing.assert_array_equal(field[:, :count][live], tokens[:, t - count : t][live])
        np.testing.assert_array_equal(now.pending_mask[:, :count], given_tokens[3][:, t - count : t])
        if t < case.length:
            state = apply(be, cfg, state, case.tokens.slice(t, t + 1))[1]
    flushed = as_numpy(be, be.flush(cfg, state)[0])
    assert not any(field.any() for field in flushed[1:])
    assert [field.shape for field in flushed[1:]] == [field.shape for field in first[1:]]


@pytest.mark.parametrize("boundary", ["drop", "wait"])
def test_a_flush_with_nothing_to_write_returns_the_same_tables(be, boundary):
    """Nothing pending; and under "wait" the L tokens that only served as targets of a chunk already written."""
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 3, 1, boundary=boundary)
    state = be.init_state(cfg, be.init_memory(cfg), batch_size=2)
    tokens = drawn(cfg, 2, 6 + (boundary == "wait"), dtype="float32", left_out=["mask"]).tokens
    for now in (state, apply(be, cfg, state, tokens)[1]):
        after, trace = be.flush(cfg, now)
        assert int(trace.writes) == 0
        assert all(new is old for new, old in zip(after.memory, now.memory))
        assert as_numpy(be, after.position).tolist() == [0, 0]


def test_position_lives_on_the_cpu_in_torch():
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 3)
    assert TORCH.init_state(cfg, TORCH.init_memory(cfg), batch_size=2).position.device.type == "cpu"
    assert TORCH.init_state(cfg, TORCH.init_memory(cfg), batch_size=2).position.dtype == torch.int32


@pytest.mark.parametrize("boundary", ["drop", "wait"])
def test_what_lies_behind_the_pending_tokens_means_nothing(be, boundary):
    """§5: valid entries come first; a state that holds something after them is read as if it did not."""
    case = drawn(FwPKMConfig(4, 2, 1, 4, 2, 4, 1, boundary=boundary), 2, 9, left_out=["mask"])
    _, state, _ = apply(be, case.cfg, start(be, case), case.tokens.slice(0, 6))
    count = count_pending(case.cfg, 6)
    filled = as_numpy(be, state.pending)
    for x in filled:
        assert x[:, count:].size
        x[:, count:] = 1
    after = []
    for now in (state, state.replace_pending(native(be, filled))):
        flushed, trace = be.flush(case.cfg, now)
        output, read_on, _ = apply(be, case.cfg, now, case.tokens.slice(6, 9))
        after.append(as_numpy(be, (flushed, trace, output, read_on)))
    assert_same_bits(*after)


def test_tokens_that_are_not_finite_are_stored_as_masked_zeros(be):
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 6, 1)
    case = drawn(cfg, 1, 5, left_out=["mask"])
    case.tokens.query[0, 1, 2], case.tokens.value[0, 2, 0], case.tokens.gate[0, 4] = np.nan, np.inf, -np.inf
    now = as_numpy(be, apply(be, cfg, start(be, case), case.tokens)[1])
    assert now.pending_mask.tolist() == [[True, False, False, True, False, False]]
    for field in now[1:4]:
        assert np.isfinite(field).all()
        assert not field[~now.pending_mask].any()


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("seed", [0, 7])
def test_fresh_memories_are_the_same_numbers_in_every_backend(be, scope, seed):
    cfg = FwPKMConfig(key_dim=64, value_dim=16, num_heads=2, num_subkeys=32, memory_scope=scope)
    expected = reference.init_memory(cfg, memories=2, seed=seed)
    memory = as_numpy(be, be.init_memory(cfg, memories=2, seed=seed))
    assert_same_bits(memory, expected)
    assert memory.keys.shape == (2, 2, 2, 32, 32)
    assert memory.values.shape == (2, 1024, 16)
    assert memory.keys.dtype == memory.values.dtype == np.float32
    bound = 64**-0.5
    assert np.abs(memory.keys).max() <= bound
    assert 0.99 * bound < np.abs(memory.keys).max()
    assert abs(memory.keys.mean()) < 0.02 * bound
    assert abs(memory.values.std() * 16**0.5 - 1) < 0.02
    assert not np.array_equal(memory.keys[0], memory.keys[1])
    assert not np.array_equal(memory.keys, as_numpy(be, be.init_memory(cfg, memories=2, seed=seed + 1)).keys)


def test_one_memory_is_broadcast_to_rows_in_sequence_scope(be):
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 2)
    memory = be.init_memory(cfg)
    state = as_numpy(be, be.init_state(cfg, memory, batch_size=3))
    for table, one in zip(state.memory, as_numpy(be, memory)):
        assert_same_bits(table, np.repeat(one, 3, axis=0))
    shared = be.init_state(dataclasses.replace(cfg, memory_scope="batch"), memory, batch_size=3)
    assert len(as_numpy(be, shared).memory.keys) == 1


@pytest.mark.eager
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_that_start_from_one_memory_part_ways(be, inplace):
    """Also in place: a table that rows shared by stride would be written by all of them."""
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 2)
    memory, tokens = drawn(cfg, 1, 7).memory, drawn(cfg, 3, 7).tokens
    repeated = Memory(*(np.repeat(table, 3, axis=0) for table in memory))
    runs = []
    for tables in (memory, repeated):
        state = be.init_state(cfg, native(be, tables), batch_size=3)
        runs.append(stream(be, cfg, state, tokens, [3, 4], inplace=inplace and tables is memory)[0])
    assert_same_bits(runs[0], runs[1])
    assert not np.array_equal(runs[0].memory.values[0], runs[0].memory.values[1])


@given(cases(flushed=True, dtype=FLOATS), st.booleans())
def test_a_call_leaves_its_arguments_as_they_were(be, case, update):
    cfg = case.cfg
    state = stream(be, cfg, start(be, case), case.tokens.slice(0, case.flush_after))[1]
    memory, tokens = native(be, case.memory), native(be, tuple(case.tokens))
    held = (state, memory, tokens)
    before = as_numpy(be, held)
    be.apply(cfg, state, *tokens, update=update)
    be.flush(cfg, state)
    be.lookup(cfg, memory, tokens[0])
    be.chunk_update(cfg, memory, *tokens)
    be.reset(state, memory, list(range(case.batch)))
    be.detach(state)
    be.init_state(cfg, memory, batch_size=case.batch)
    for received, expected in zip(as_numpy(be, held), before):
        assert_same_bits(tuple(x for x in received if x is not None), tuple(x for x in expected if x is not None))


@given(cases(dtype=FLOATS), st.data())
def test_inplace_gives_the_same_numbers(be, case, data):
    """Also after states that alias one another: a call that writes nothing hands its tables on."""
    sizes = data.draw(splits(case.length))
    expected, plain = stream(be, case.cfg, start(be, case), case.tokens, sizes)
    received, state = stream(be, case.cfg, start(be, case), case.tokens, sizes, inplace=True)
    assert_same_bits(received, expected)
    assert_same_bits(as_numpy(be, state), as_numpy(be, plain))
    flushed, trace = be.flush(case.cfg, state, inplace=True)
    expected_flushed, expected_trace = be.flush(case.cfg, plain)
    assert_same_bits(as_numpy(be, flushed), as_numpy(be, expected_flushed))
    assert_same_bits(as_numpy(be, trace[:4]), as_numpy(be, expected_trace[:4]))


@pytest.mark.eager
def test_inplace_leaves_the_initial_memory_alone(be):
    """A state owns its tables: the memory it started from serves the next sequence too."""
    for scope, rows in (("sequence", 1), ("sequence", 2), ("batch", 2)):
        cfg = FwPKMConfig(4, 2, 1, 4, 2, 2, memory_scope=scope)
        case = drawn(cfg, rows, 6)
        memory = native(be, case.memory)
        before = as_numpy(be, memory)
        apply(be, cfg, be.init_state(cfg, memory, batch_size=rows), case.tokens, inplace=True)
        assert_same_bits(as_numpy(be, memory), before)


@pytest.mark.parametrize("call", ["apply", "flush"])
def test_inplace_is_an_error_where_autograd_needs_the_tables(call):
    """With grad mode on; without it, or after detach, it works."""
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4)
    case = drawn(cfg, 1, 3)
    memory = Memory(*(table.requires_grad_() for table in native(TORCH, case.memory)))
    tokens = native(TORCH, tuple(case.tokens))
    state = TORCH.apply(cfg, TORCH.init_state(cfg, memory, batch_size=1), *tokens)[1]
    before = as_numpy(TORCH, state)
    arguments = tokens if call == "apply" else ()
    function = getattr(TORCH, call)
    with pytest.raises((ValueError, RuntimeError), match="inplace"):
        function(cfg, state, *arguments, inplace=True)
    assert_same_bits(as_numpy(TORCH, state), before)
    function(cfg, TORCH.detach(state), *arguments, inplace=True)
    with torch.no_grad():
        function(cfg, TORCH.init_state(cfg, memory, batch_size=1), *arguments, inplace=True)


@given(cases(**SEQUENCE, untied=True, flushed=True), st.data())
def test_reset_gives_rows_their_memory_back_and_masks_their_pending_tokens(be, case, data):
    cfg = case.cfg
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=case.batch, max_size=case.batch)))
    memory = native(be, case.memory)
    before, after = case.tokens.slice(0, case.flush_after), case.tokens.slice(case.flush_after, None)
    state = stream(be, cfg, start(be, case), before)[1]
    by_mask = be.reset(state, memory, be.asarray(chosen, "bool"))
    by_ids = be.reset(state, memory, np.flatnonzero(chosen).tolist())
    old, new = as_numpy(be, state), as_numpy(be, by_mask)
    assert_same_bits(as_numpy(be, by_ids), new)
    assert_same_bits(table_rows(new, ~chosen), table_rows(old, ~chosen))
    assert_same_bits(Memory(*(t[chosen] for t in new.memory)), Memory(*(t[chosen] for t in case.memory)))
    assert not new.pending_mask[chosen].any()
    assert_same_bits(new.position, old.position)
    # From here on a row that was reset reads and writes as if its earlier tokens had been masked from the start.
    mask = unmasked(before) & ~chosen[:, None]
    masked = stream(be, cfg, start(be, case), before._replace(mask=mask))[1]
    expected = stream(be, cfg, masked, after, flush=True)[0]
    received = stream(be, cfg, by_mask, after, flush=True)[0]
    for a, b in zip((*received[:3], *received.memory), (*expected[:3], *expected.memory)):
        assert_close(a[chosen], b[chosen], case.dtype)


@pytest.mark.parametrize("rows", [[0, 2], (2, 0), np.array([0, 2]), [True, False, True], np.array([True, False, True])])
def test_reset_takes_rows_in_any_common_form(be, rows):
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4)
    memory = be.init_memory(cfg)
    state = be.init_state(cfg, memory, batch_size=3)
    state = apply(be, cfg, state, drawn(cfg, 3, 6, dtype="float32", left_out=["mask"]).tokens)[1]
    new = as_numpy(be, be.reset(state, memory, rows))
    assert new.pending_mask[:, 0].tolist() == [False, True, False]
    fresh = as_numpy(be, memory).values[0]
    assert [np.array_equal(table, fresh) for table in new.memory.values] == [True, False, True]


def test_reset_of_no_row_and_of_a_shared_table(be):
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4, memory_scope="batch")
    memory = be.init_memory(cfg)
    tokens = drawn(cfg, 2, 6, dtype="float32", left_out=["mask"]).tokens
    state = apply(be, cfg, be.init_state(cfg, memory, batch_size=2), tokens)[1]
    assert_same_bits(as_numpy(be, be.reset(state, memory, [])), as_numpy(be, state))
    new = as_numpy(be, be.reset(state, memory, [0, 1]))
    assert_same_bits(new.memory, as_numpy(be, memory))
    assert not new.pending_mask.any()
    assert new.position.tolist() == [6, 6]


def test_detach_keeps_numbers_and_cuts_gradients(be):
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4)
    case = drawn(cfg, 2, 6)
    memory, tokens = native(be, case.memory), native(be, tuple(case.tokens))
    if be is TORCH:
        for array in (*memory, *tokens[:3]):
            array.requires_grad_()
    state = be.apply(cfg, be.init_state(cfg, memory, batch_size=2), *tokens)[1]
    free = be.detach(state)
    assert isinstance(free, State)
    assert_same_bits(as_numpy(be, free), as_numpy(be, state))
    if be is TORCH:
        held = (*state.memory, *state[1:4])
        assert all(array.requires_grad for array in held)
        assert not any(array.requires_grad for array in (*free.memory, *free[1:]))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bool", "int32"])
def test_arrays_go_to_a_backend_and_back(be, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    there = be.asarray(array, dtype)
    back = be.to_numpy(there)
    assert isinstance(back, np.ndarray)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, array)
    assert be.to_numpy(be.asarray(array.tolist(), dtype)).dtype == dtype


def test_bfloat16_comes_back_as_float32():
    array = TORCH.asarray(np.array([1.0, 1.00390625, -2.5]), "bfloat16")
    assert array.dtype == torch.bfloat16
    assert TORCH.to_numpy(array).dtype == np.float32
    assert TORCH.to_numpy(array).tolist() == [1.0, 1.0, -2.5]
