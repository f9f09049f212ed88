"""Streaming (SPEC.md §5): any split equals one call, a read sees only what was written before, rows stay apart."""

import dataclasses
from operator import itemgetter

import numpy as np
from asserting import assert_close, assert_same_bits, assert_same_reading
from hypothesis import given
from hypothesis import strategies as st

from fwpkm import Memory
from fwpkm.conformance.running import apply, as_numpy, native, read, start, stream
from fwpkm.conformance.strategies import FLOATS, LEFT_OUT, cases, draw_tokens, splits, unmasked
from fwpkm.tokens import Tokens

OTHERS = st.integers(0, 2**32 - 1)
WITH_MASK = LEFT_OUT.map(lambda names: names - {"mask"})


def lag(cfg):
    """Tokens that are read between a chunk's end and its write, in §5's words (and not in the schedule's code)."""
    return cfg.lookahead if cfg.boundary == "wait" else 0


@st.composite
def split_cases(draw, **options):
    case = draw(cases(untied=True, **options))
    return case, draw(splits(case.length))


def replaced(tokens, where, seed, spoil=False):
    """Other contents for the tokens ``where`` [B, T]; with ``spoil``, some of them are not finite. The mask stays."""
    rng = np.random.default_rng(seed)
    arrays = []
    for array in tokens:
        if array is None or array.dtype == bool:
            arrays.append(array)
            continue
        fresh = rng.normal(size=array.shape).astype(array.dtype)
        if spoil:
            fresh[rng.uniform(size=fresh.shape) < 0.3] = rng.choice([np.nan, np.inf, -np.inf, 1e38])
        arrays.append(np.where(where.reshape(where.shape + (1,) * (array.ndim - 2)), fresh, array))
    return Tokens(*arrays)


@given(split_cases(flushed=True, dtype=FLOATS))
def test_any_split_equals_one_call(be, drawn):
    case, sizes = drawn
    assert_same_reading(case.cfg, read(be, case, sizes), read(be, case), case.dtype)


@given(split_cases())
def test_any_split_leaves_the_same_state(be, drawn):
    case, sizes = drawn
    whole = as_numpy(be, stream(be, case.cfg, start(be, case), case.tokens)[1])
    pieces = as_numpy(be, stream(be, case.cfg, start(be, case), case.tokens, sizes)[1])
    assert_close(pieces.memory, whole.memory, case.dtype)
    assert_same_bits(pieces[1:], whole[1:])


@given(split_cases(flushed=True, left_out=WITH_MASK), OTHERS, st.booleans())
def test_contents_of_masked_tokens_change_nothing_for_others(be, drawn, seed, spoil):
    case, sizes = drawn
    live = case.tokens.mask
    other = dataclasses.replace(case, tokens=replaced(case.tokens, ~live, seed, spoil))
    expected, received = read(be, case, sizes), read(be, other, sizes)
    for name in ("output", "slots", "weights"):
        assert_same_bits(getattr(received, name)[live], getattr(expected, name)[live])
    assert_same_bits(received[3:], expected[3:])


@given(cases(untied=True), st.integers(1, 14), OTHERS)
def test_trailing_padding_is_invisible(be, case, more, seed):
    cfg, tokens = case.cfg, case.tokens
    padding = draw_tokens(np.random.default_rng(seed), cfg, case.batch, more)
    padding = padding._replace(mask=np.zeros((case.batch, more), bool))
    gate = np.ones((case.batch, case.length)) if tokens.gate is None else tokens.gate
    full = Tokens(tokens.query, tokens.value, gate, unmasked(tokens))
    padded = Tokens(*(np.concatenate(pair, axis=1) for pair in zip(full, padding)))
    expected = read(be, case)
    received = read(be, dataclasses.replace(case, tokens=padded, length=case.length + more))
    writes = expected.memorization.shape[1]
    assert_close(received.output[:, : case.length], expected.output, case.dtype)
    assert_close(received.memory, expected.memory, case.dtype)
    for name in ("memorization", "addressing"):
        columns = getattr(received, name)
        assert_close(columns[:, :writes], getattr(expected, name)[:, : columns.shape[1]], case.dtype)
        assert not columns[:, writes:].any()


def case_of_rows(case, rows):
    memory = Memory(*(table[rows] for table in case.memory))
    return dataclasses.replace(case, memory=memory, tokens=case.tokens.map(itemgetter(rows)))


def reading_of_rows(reading, rows):
    return type(reading)(*(x[rows] for x in reading[:5]), Memory(*(x[rows] for x in reading.memory)))


@given(split_cases(memory_scope="sequence", batch=st.integers(2, 3)))
def test_a_row_alone_gives_the_same(be, drawn):
    case, sizes = drawn
    together = read(be, case, sizes)
    for row in range(case.batch):
        one = slice(row, row + 1)
        alone = read(be, dataclasses.replace(case_of_rows(case, one), batch=1), sizes)
        assert_same_reading(case.cfg, alone, reading_of_rows(together, one), case.dtype)


@given(split_cases(memory_scope="sequence", batch=st.integers(2, 3)), st.randoms(use_true_random=False))
def test_permuted_rows_permute_results(be, drawn, random):
    case, sizes = drawn
    order = list(range(case.batch))
    random.shuffle(order)
    permuted = read(be, case_of_rows(case, order), sizes)
    assert_same_reading(case.cfg, permuted, reading_of_rows(read(be, case, sizes), order), case.dtype)


@given(cases(memory_scope="sequence", batch=st.just(2)), OTHERS)
def test_a_row_keeps_its_bits_whatever_another_holds(be, case, seed):
    other_row = np.arange(2)[:, None] == np.ones((1, case.length))
    spoilt = dataclasses.replace(case, tokens=replaced(case.tokens, other_row, seed, spoil=True))
    expected, received = read(be, case), read(be, spoilt)
    for a, b in zip((*received[:5], *received.memory), (*expected[:5], *expected.memory)):
        assert_same_bits(a[0], b[0])


@given(cases(), st.data())
def test_no_later_token_changes_an_output(be, case, data):
    """Nor do the earlier ones that no finished write has read: those of its own chunk, and under "wait" a few more."""
    at = data.draw(st.integers(0, case.length - 1))
    written = max(0, (at - lag(case.cfg)) // case.cfg.chunk_size)
    visible = written * case.cfg.chunk_size + lag(case.cfg) if written else 0
    index = np.arange(case.length)
    hidden = np.broadcast_to((index >= visible) & (index != at), (case.batch, case.length))
    tokens = replaced(case.tokens, hidden, data.draw(OTHERS), spoil=True)
    if tokens.mask is not None:
        tokens = tokens._replace(mask=tokens.mask ^ (hidden & data.draw(st.booleans())))
    expected, received = read(be, case), read(be, dataclasses.replace(case, tokens=tokens))
    for a, b in zip(received[:3], expected[:3]):
        assert_same_bits(a[:, at], b[:, at])


@given(cases(untied=True))
def test_each_token_reads_the_tables_in_force_and_writes_fall_due_on_schedule(be, case):
    cfg, state = case.cfg, start(be, case)
    size = cfg.chunk_size
    for t in range(case.length):
        token = case.tokens.slice(t, t + 1)
        look = be.lookup(cfg, state.memory, native(be, token.query))
        output, after, trace = apply(be, cfg, state, token)
        for received, expected in ((output, look.output), (trace.slots, look.slots), (trace.weights, look.weights)):
            assert_same_bits(as_numpy(be, received), as_numpy(be, expected))
        read = t + 1 - lag(cfg)
        due = read >= size and read % size == 0
        assert int(trace.writes) == due
        if not due:  # a call that writes nothing returns the same table objects
            assert all(new is old for new, old in zip(after.memory, state.memory))
        state = after


@given(cases(left_out=WITH_MASK))
def test_a_memory_without_a_pair_keeps_its_bits(be, case):
    """Whole sequences, with weight decay and all: only memories whose rows hold a pair in some chunk may change."""
    cfg, live = case.cfg, case.tokens.mask
    index = np.arange(case.length)
    target = index + cfg.lookahead
    arrived = target < case.length
    if cfg.boundary == "drop":
        arrived &= target // cfg.chunk_size == index // cfg.chunk_size
    pair = live & arrived & live[:, np.minimum(target, case.length - 1)]
    chunks = -(-case.length // cfg.chunk_size)
    in_chunk = np.stack([(pair & (index // cfg.chunk_size == c)).any(1) for c in range(chunks)], axis=1)
    if cfg.memory_scope == "batch":
        in_chunk = in_chunk.any(0, keepdims=True)
    received = read(be, case)
    columns = in_chunk[:, : received.memorization.shape[1]]
    assert not received.memorization[:, :chunks][~columns].any()
    assert not received.addressing[:, :chunks][~columns].any()
    for row in np.flatnonzero(~in_chunk.any(1)):
        for table, initial in zip(received.memory, case.memory):
            assert_same_bits(table[row], initial[row])


@given(cases(flushed=True), st.booleans())
def test_no_tokens_change_nothing(be, case, update):
    first = case.tokens.slice(0, case.flush_after)
    state = stream(be, case.cfg, start(be, case), first)[1]
    output, after, trace = apply(be, case.cfg, state, case.tokens.slice(0, 0), update=update)
    assert after is state
    assert tuple(output.shape) == (case.batch, 0, case.cfg.value_dim)
    assert as_numpy(be, output).dtype == case.dtype
    assert tuple(trace.slots.shape) == tuple(trace.weights.shape) == (case.batch, 0, case.cfg.slots_per_token)
    assert tuple(trace.memorization.shape) == (len(case.memory.keys), 0)
    assert int(trace.writes) == 0


@given(cases(flushed=True, untied=True))
def test_update_false_only_reads(be, case):
    cfg = case.cfg
    state = stream(be, cfg, start(be, case), case.tokens.slice(0, case.flush_after))[1]
    before = as_numpy(be, state)
    output, after, trace = apply(be, cfg, state, case.tokens, update=False)
    assert_same_bits(as_numpy(be, after), before)
    assert all(new is old for new, old in zip(after.memory, state.memory))
    assert int(trace.writes) == 0
    assert not as_numpy(be, trace.memorization).any()
    assert not as_numpy(be, trace.addressing).any()
    look = as_numpy(be, be.lookup(cfg, state.memory, native(be, case.tokens.query)))
    assert_same_bits(as_numpy(be, (output, trace.slots, trace.weights)), tuple(look))
