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
from fwpkm.conformance.strategies import FLOATS, PACKED, PADDED, cases, floating, splits, unmasked

TORCH = fwpkm.get_backend("torch")
SEQUENCE = {"memory_scope": "sequence", "batch": st.integers(2, 3)}


def count_pending(cfg, position):
    """§5, in its words."""
    size, ahead = cfg.chunk_size, cfg.lookahead
    if cfg.boundary == "drop":
        return position % size
    return position if position < size + ahead else ahead + (position - ahead) % size


def rows_of(state, chosen):
    """A NumPy state of some rows."""
    return state.map(lambda x: x[chosen])


def pending_fields(state):
    """What must keep its shape and dtype beside the tables."""
    return (*state.pending, state.position)


@given(cases(dtype=FLOATS))
def test_pending_tokens_come_first_then_zeros(be, case):
    """In sequence scope they are a row's unmasked tokens; where all rows have one clock, masked ones as zeros too."""
    cfg, state = case.cfg, start(be, case)
    room, first = cfg.chunk_size + cfg.lookahead - 1, as_numpy(be, state)
    gate = np.ones((case.batch, case.length), case.dtype) if case.tokens.gate is None else case.tokens.gate
    tokens = case.tokens._replace(gate=gate, mask=unmasked(case.tokens))
    ticks = tokens.mask if cfg.memory_scope == "sequence" else np.ones_like(tokens.mask)
    for t in range(case.length + 1):
        now = as_numpy(be, state)
        assert [(x.shape, x.dtype) for x in pending_fields(now)] == [(x.shape, x.dtype) for x in pending_fields(first)]
        assert [table.shape for table in now.memory] == [table.shape for table in first.memory]
        assert now.position.dtype == np.int32
        assert now.position.tolist() == ticks[:, :t].sum(1).tolist()
        for b, position in enumerate(now.position.tolist()):
            count = count_pending(cfg, position)
            own = np.flatnonzero(ticks[b, :t])[position - count :]
            there = tokens.mask[b, own]
            np.testing.assert_array_equal(now.pending.mask[b, :count], there)
            for name, field in now.pending._asdict().items():
                assert field.shape[:2] == (case.batch, room)
                np.testing.assert_array_equal(field[b, :count][there], getattr(tokens, name)[b, own][there])
                assert not field[b, :count][~there].any()
                assert not field[b, count:].any()
        if t < case.length:
            state = apply(be, cfg, state, case.tokens.slice(t, t + 1))[1]
    flushed = as_numpy(be, be.flush(cfg, state)[0])
    assert not any(x.any() for x in pending_fields(flushed))
    assert [x.shape for x in pending_fields(flushed)] == [x.shape for x in pending_fields(first)]


@pytest.mark.parametrize("boundary", ["drop", "wait"])
def test_a_flush_with_nothing_to_write_returns_the_same_tables(be, boundary):
    """Nothing pending; and under "wait" the L tokens that only served as targets of a chunk already written."""
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 3, 1, boundary=boundary)
    state = be.init_state(cfg, be.init_memory(cfg), batch_size=2)
    tokens = drawn(cfg, 2, 6 + (boundary == "wait"), dtype="float32", left_out=["mask"]).tokens
    for now in (state, apply(be, cfg, state, tokens)[1]):
        after, trace = be.flush(cfg, now)
        assert as_numpy(be, trace.writes).tolist() == [0, 0]
        assert all(new is old for new, old in zip(after.memory, now.memory))
        assert as_numpy(be, after.position).tolist() == [0, 0]


def test_position_lives_on_the_cpu_in_torch_unless_told():
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 3)
    memory = TORCH.init_memory(cfg)
    assert TORCH.init_state(cfg, memory, batch_size=2).position.device.type == "cpu"
    assert TORCH.init_state(cfg, memory, batch_size=2).position.dtype == torch.int32
    assert TORCH.init_state(cfg, memory, batch_size=2, position_device="meta").position.device.type == "meta"


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
        after.append((*as_numpy(be, (flushed, trace, read_on)), output))
    assert_same_bits(*after)


def test_tokens_that_are_not_finite_are_stored_as_masked_zeros(be):
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 6, 1)
    case = drawn(cfg, 1, 5, left_out=["mask"])
    case.tokens.query[0, 1, 2], case.tokens.value[0, 2, 0], case.tokens.gate[0, 4] = np.nan, np.inf, -np.inf
    now = as_numpy(be, apply(be, cfg, start(be, case), case.tokens)[1])
    assert now.pending_mask.tolist() == [[True, False, False, True, False, False]]
    assert now.position.tolist() == [5]
    for field in floating(now.pending).values():
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
    memory, tokens = native(be, case.memory), native(be, case.tokens)
    before = as_numpy(be, (state, memory, tokens))
    be.apply(cfg, state, **tokens.present(), update=update)
    be.flush(cfg, state)
    be.lookup(cfg, memory, tokens.query)
    plain = dataclasses.replace(cfg, usage_weight=0.0)  # tables alone keep no uses
    be.chunk_update(plain, memory, tokens.query, tokens.value, tokens.gate, tokens.mask)
    be.reset(cfg, state, memory)
    be.select(cfg, state, list(range(case.batch)))
    if cfg.memory_scope == "sequence":
        be.concat(cfg, [state, state])
        be.put(cfg, state, [0], be.select(cfg, state, [case.batch - 1]))
        be.flush(cfg, state, [0])
    be.pending(cfg, state)
    be.nbytes(state)
    be.detach(state)
    be.init_state(cfg, memory, batch_size=case.batch)
    for received, expected in zip(as_numpy(be, (state, memory, tokens)), before):
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
    assert_same_bits(as_numpy(be, trace), as_numpy(be, expected_trace))


@given(cases(dtype=FLOATS, memory_scope="sequence"), st.sampled_from([PADDED, PACKED]), st.booleans())
def test_a_memory_in_place_of_a_state_begins_every_sequence(be, case, layout, update):
    """§5: outputs and trace as from a state that it began, no state, and the memory stays as it was."""
    one = native(be, Memory(*(table[:1] for table in case.memory)))
    before = as_numpy(be, one)
    output, none, trace = apply(be, case.cfg, one, case.tokens, layout, update=update)
    assert none is None
    assert_same_bits(as_numpy(be, one), before)
    state = be.init_state(case.cfg, one, case.batch)
    expected, _, record = apply(be, case.cfg, state, case.tokens, layout, update=update)
    assert_same_bits((output, trace), (expected, record))


@pytest.mark.parametrize("layout", [PADDED, PACKED])
def test_reading_without_writing_is_that_of_the_reference(be, layout):
    """§5: every token reads the memory as it stands, also those beyond a chunk."""
    case = drawn(FwPKMConfig(4, 2, 1, 4, 2, 2), 2, 7, dtype="float32")
    reads = [apply(each, case.cfg, start(each, case), case.tokens, layout, update=False) for each in (be, reference)]
    (output, _, trace), (expected, _, record) = reads
    np.testing.assert_array_equal(trace.slots, record.slots)
    assert_close(output, expected, case.dtype)


def test_wide_tables_take_narrow_tokens_in_pieces(be):
    """§5 and §6: computed in float32; what is pending has the dtype of the tables, which stay wide until a write."""
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4)
    memory, tokens = drawn(cfg, 1, 6).memory, drawn(cfg, 1, 6, dtype="float32").tokens
    state = be.init_state(cfg, native(be, memory), 1)
    expected, whole, _ = apply(be, cfg, state, tokens)
    outputs = []
    for t in range(6):
        output, state, _ = apply(be, cfg, state, tokens.slice(t, t + 1))
        outputs.append(output)
        assert as_numpy(be, state.pending.query).dtype == as_numpy(be, state.memory.keys).dtype
    assert_close(np.concatenate(outputs, 1), expected, "float32")
    assert_close(as_numpy(be, state.memory.values), as_numpy(be, whole.memory.values), "float32")


@given(cases(dtype=FLOATS, memory_scope="sequence"), st.data())
def test_bytes_and_pending_tokens_are_counted(be, case, data):
    """§5: a table that rows share counts once, and rows that begin alike may share theirs until a write."""
    cfg, state = case.cfg, apply(be, case.cfg, start(be, case), case.tokens)[1]
    now = as_numpy(be, state)
    size = sum(x.nbytes for x in (*now.memory, *pending_fields(now)))
    assert be.nbytes(state) == size
    counts = [count_pending(cfg, position) for position in now.position.tolist()]
    assert as_numpy(be, be.pending(cfg, state)).tolist() == counts
    row = data.draw(st.integers(0, case.batch - 1))
    several = be.select(cfg, state, [row] * 3)
    assert as_numpy(be, be.pending(cfg, several)).tolist() == [counts[row]] * 3
    own, tables = 3 * size // case.batch, sum(x[0].nbytes for x in now.memory)
    assert be.nbytes(several) in (own, own - 2 * tables)


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


@pytest.mark.parametrize("call", ["apply", "flush", "reset", "put"])
def test_inplace_is_an_error_where_autograd_needs_the_tables(call):
    """With grad mode on; without it, or after detach, it works."""
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4)
    case = drawn(cfg, 1, 3)
    memory = Memory(*(table.requires_grad_() for table in native(TORCH, case.memory)))
    tokens = native(TORCH, case.tokens).present()
    state = TORCH.apply(cfg, TORCH.init_state(cfg, memory, batch_size=1), **tokens)[1]
    before = as_numpy(TORCH, state)
    fresh = TORCH.init_state(cfg, native(TORCH, drawn(cfg, 1, 3).memory), 1)
    function = {
        "apply": lambda state: TORCH.apply(cfg, state, **tokens, inplace=True),
        "flush": lambda state: TORCH.flush(cfg, state, inplace=True),
        "reset": lambda state: TORCH.reset(cfg, state, fresh.memory, inplace=True),
        "put": lambda state: TORCH.put(cfg, state, [0], fresh, inplace=True),
    }[call]
    with pytest.raises((ValueError, RuntimeError), match="inplace"):
        function(state)
    assert_same_bits(as_numpy(TORCH, state), before)
    function(TORCH.detach(state))
    with torch.no_grad():
        function(TORCH.init_state(cfg, memory, batch_size=1))


@pytest.mark.parametrize("call", ["apply", "flush", "reset", "put"])
def test_inplace_is_an_error_outside_the_inference_mode_that_made_the_state(call):
    """Before anything is written: torch itself would refuse the second of two tables."""
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4)
    case = drawn(cfg, 1, 7)
    with torch.inference_mode():
        memory, tokens = native(TORCH, case.memory), native(TORCH, case.tokens).present()
        state = TORCH.apply(cfg, TORCH.init_state(cfg, memory, 1), **tokens)[1]
    tokens = {name: x.clone() for name, x in tokens.items()}
    before, fresh = as_numpy(TORCH, state), TORCH.init_state(cfg, native(TORCH, case.memory), 1)
    functions = {
        "apply": lambda: TORCH.apply(cfg, state, **tokens, inplace=True),
        "flush": lambda: TORCH.flush(cfg, state, inplace=True),
        "reset": lambda: TORCH.reset(cfg, state, fresh.memory, inplace=True),
        "put": lambda: TORCH.put(cfg, state, [0], fresh, inplace=True),
    }
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"made under torch.inference_mode\(\)"):
        functions[call]()
    assert_same_bits(as_numpy(TORCH, state), before)
    with torch.inference_mode():
        functions[call]()


@pytest.mark.parametrize("call", ["apply", "flush", "reset", "put"])
@pytest.mark.parametrize("field", ["keys", "values"])
def test_inplace_is_an_error_where_numpy_may_not_write(call, field):
    """Before anything is written: a table that is read-only must not leave the other one half a chunk ahead."""
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4)
    case = drawn(cfg, 1, 7)
    tokens = case.tokens.present()
    state = reference.apply(cfg, reference.init_state(cfg, case.memory, 1), **tokens)[1]
    getattr(state.memory, field).flags.writeable = False
    before = state.map(np.copy)
    fresh = reference.init_state(cfg, case.memory, 1)
    functions = {
        "apply": lambda: reference.apply(cfg, state, **tokens, inplace=True),
        "flush": lambda: reference.flush(cfg, state, inplace=True),
        "reset": lambda: reference.reset(cfg, state, fresh.memory, inplace=True),
        "put": lambda: reference.put(cfg, state, [0], fresh, inplace=True),
    }
    with pytest.raises(ValueError, match="inplace=True would overwrite arrays of the state that are read-only"):
        functions[call]()
    assert_same_bits(state, before)


@given(cases(**SEQUENCE, untied=True, flushed=True), st.data())
def test_a_row_that_was_reset_is_a_new_one(be, case, data):
    """And all others stay as they were; a flush of rows empties these alone."""
    cfg = case.cfg
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=case.batch, max_size=case.batch)))
    memory = native(be, case.memory)
    before, after = case.tokens.slice(0, case.flush_after), case.tokens.slice(case.flush_after, None)
    state = stream(be, cfg, start(be, case), before)[1]
    by_mask = be.reset(cfg, state, memory, be.asarray(chosen, "bool"))
    by_ids = be.reset(cfg, state, memory, np.flatnonzero(chosen).tolist())
    old, new, first = (as_numpy(be, x) for x in (state, by_mask, start(be, case)))
    assert_same_bits(as_numpy(be, by_ids), new)
    assert_same_bits(rows_of(new, ~chosen), rows_of(old, ~chosen))
    assert_same_bits(rows_of(new, chosen), rows_of(first, chosen))
    # From here on a row that was reset reads and writes as if its earlier tokens had not been there.
    mask = unmasked(before) & ~chosen[:, None]
    masked = stream(be, cfg, start(be, case), before._replace(mask=mask))[1]
    expected = stream(be, cfg, masked, after, flush=True)[0]
    received = stream(be, cfg, by_mask, after, flush=True)[0]
    for name in ("output", "slots", "weights", "writes", "memory"):
        a, b = (getattr(reading, name) for reading in (received, expected))
        for x, y in zip(a, b) if name == "memory" else [(a, b)]:
            assert_close(x[chosen], y[chosen], case.dtype)
    some, every = (as_numpy(be, be.flush(cfg, state, rows)[0]) for rows in (be.asarray(chosen, "bool"), None))
    assert_same_bits(rows_of(some, ~chosen), rows_of(old, ~chosen))
    assert_same_bits(rows_of(some, chosen), rows_of(every, chosen))


@pytest.mark.parametrize("rows", [[0, 2], (2, 0), np.array([0, 2]), [True, False, True], np.array([True, False, True])])
def test_reset_and_flush_take_rows_in_any_common_form(be, rows):
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4)
    memory = be.init_memory(cfg)
    state = be.init_state(cfg, memory, batch_size=3)
    state = apply(be, cfg, state, drawn(cfg, 3, 6, dtype="float32", left_out=["mask"]).tokens)[1]
    new, flushed = as_numpy(be, (be.reset(cfg, state, memory, rows), be.flush(cfg, state, rows)[0]))
    for now in (new, flushed):
        assert now.pending_mask[:, 0].tolist() == [False, True, False]
        assert now.position.tolist() == [0, 6, 0]
    fresh = as_numpy(be, memory).values[0]
    assert [np.array_equal(table, fresh) for table in new.memory.values] == [True, False, True]


def test_reset_of_no_row_and_of_a_shared_table(be):
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4, memory_scope="batch")
    memory = be.init_memory(cfg)
    tokens = drawn(cfg, 2, 6, dtype="float32", left_out=["mask"]).tokens
    state = apply(be, cfg, be.init_state(cfg, memory, batch_size=2), tokens)[1]
    assert_same_bits(as_numpy(be, be.reset(cfg, state, memory, [])), as_numpy(be, state))
    for rows in ([0, 1], None):
        new = as_numpy(be, be.reset(cfg, state, memory, rows))
        assert_same_bits(new, as_numpy(be, be.init_state(cfg, memory, batch_size=2)))
    turned, now = as_numpy(be, be.select(cfg, state, [1, 0, 1])), as_numpy(be, state)
    assert_same_bits(turned.memory, now.memory)
    assert_same_bits(turned.pending, now.pending.map(lambda x: x[[1, 0, 1]]))


def test_detach_keeps_numbers_and_cuts_gradients(be):
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 4)
    case = drawn(cfg, 2, 6)
    memory, tokens = native(be, case.memory), native(be, case.tokens)
    if be is TORCH:
        for array in (*memory, *floating(tokens).values()):
            array.requires_grad_()
    state = be.apply(cfg, be.init_state(cfg, memory, batch_size=2), **tokens.present())[1]
    free = be.detach(state)
    assert isinstance(free, State)
    assert_same_bits(as_numpy(be, free), as_numpy(be, state))
    if be is TORCH:
        assert all(array.requires_grad for array in (*state.memory, *floating(state.pending).values()))
        assert not any(array.requires_grad for array in (*free.memory, *pending_fields(free)))


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


def test_no_setting_of_numpy_stops_a_write():
    """A caller's ``np.seterr`` would raise between two tables."""
    case = drawn(FwPKMConfig(4, 2, 1, 4, 2, 2, temperature=1e-3), 1, 5)
    with np.errstate(all="raise"):
        received = apply(reference, case.cfg, start(reference, case), case.tokens, inplace=True)
    assert_same_bits(received, apply(reference, case.cfg, start(reference, case), case.tokens, inplace=True))


def test_arrays_of_another_byte_order_are_refused():
    """NumPy takes them for another dtype, so a call would be computed in float32."""
    case = drawn(FwPKMConfig(4, 2, 1, 4, 2, 2), 1, 3)
    swapped = case.tokens._replace(query=case.tokens.query.astype(case.tokens.query.dtype.newbyteorder("S")))
    with pytest.raises(ValueError, match="query must be in this machine's byte order"):
        apply(reference, case.cfg, start(reference, case), swapped)
