"""Streaming (SPEC.md §5): any split equals one call, a read sees only what was written before, rows stay apart."""

import dataclasses
from operator import itemgetter

import numpy as np
from asserting import assert_close, assert_same_bits, assert_same_reading
from hypothesis import given
from hypothesis import strategies as st

from fwpkm import Memory
from fwpkm.conformance.running import apply, as_numpy, native, read, start, stream
from fwpkm.conformance.strategies import FLOATS, LEFT_OUT, PACKED, PADDED, cases, draw_tokens, splits, unmasked
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


def layouts(case):
    """Padded or, where each row has a memory of its own, packed."""
    return st.sampled_from([PADDED, PACKED] if case.cfg.memory_scope == "sequence" else [PADDED])


@given(split_cases(flushed=True, dtype=FLOATS), st.data())
def test_any_split_equals_one_call(be, drawn, data):
    """However it is handed over: each call of a padded batch may hold another number of a row's tokens."""
    case, sizes = drawn
    split = dataclasses.replace(case, layout=data.draw(layouts(case)))
    assert_same_reading(case.cfg, read(be, split, sizes), read(be, case), case.dtype)


@given(split_cases(), st.data())
def test_any_split_leaves_the_same_state(be, drawn, data):
    case, sizes = drawn
    layout = data.draw(layouts(case))
    whole = as_numpy(be, stream(be, case.cfg, start(be, case), case.tokens)[1])
    pieces = as_numpy(be, stream(be, case.cfg, start(be, case), case.tokens, sizes, layout=layout)[1])
    assert_close(pieces.memory, whole.memory, case.dtype)
    assert_same_bits((pieces.pending, pieces.position), (whole.pending, whole.position))


@given(split_cases(flushed=True, left_out=WITH_MASK), OTHERS, st.booleans())
def test_contents_of_masked_tokens_change_nothing(be, drawn, seed, spoil):
    """Nor does a masked token read: its output, weights and slots are 0."""
    case, sizes = drawn
    masked = ~case.tokens.mask
    other = dataclasses.replace(case, tokens=replaced(case.tokens, masked, seed, spoil))
    received = read(be, other, sizes)
    assert_same_bits(received, read(be, case, sizes))
    for field in (received.output, received.slots, received.weights):
        assert not field[masked].any()
    states = [stream(be, case.cfg, start(be, x), x.tokens, sizes)[1] for x in (case, other)]
    assert_same_bits(*(as_numpy(be, state) for state in states))


@given(cases(untied=True, memory_scope="sequence"), st.integers(1, 14), st.data())
def test_padding_is_invisible_wherever_it_stands(be, case, more, data):
    """Masked steps put in anywhere, other ones in each row: all else stays, the state too."""
    length = case.length + more
    order = [data.draw(st.permutations(range(length))) for _ in range(case.batch)]
    at = np.sort(np.argsort(order, axis=1)[:, : case.length], axis=1)  # where each row's own tokens stand
    rows = np.arange(case.batch)[:, None]
    padding = draw_tokens(np.random.default_rng(data.draw(OTHERS)), case.cfg, case.batch, length)
    padded = padding._replace(mask=np.zeros((case.batch, length), bool))
    gate = np.ones((case.batch, case.length)) if case.tokens.gate is None else case.tokens.gate
    for name, own in case.tokens._replace(gate=gate, mask=unmasked(case.tokens)).present().items():
        getattr(padded, name)[rows, at] = own
    expected, state = stream(be, case.cfg, start(be, case), case.tokens)
    received, after = stream(be, case.cfg, start(be, case), padded)
    tokens = {name: getattr(received, name)[rows, at] for name in ("output", "slots", "weights")}
    assert_same_reading(case.cfg, received._replace(**tokens), expected, case.dtype)
    state, after = as_numpy(be, (state, after))
    assert_same_bits((after.pending, after.position), (state.pending, state.position))


@given(cases(untied=True), st.integers(1, 14), OTHERS)
def test_trailing_padding_is_invisible(be, case, more, seed):
    """In either scope: where one clock serves all rows it goes on, and what it still writes has no pair."""
    tokens = case.tokens
    padding = draw_tokens(np.random.default_rng(seed), case.cfg, case.batch, more)
    padding = padding._replace(mask=np.zeros((case.batch, more), bool))
    gate = np.ones((case.batch, case.length)) if tokens.gate is None else tokens.gate
    full = tokens._replace(gate=gate, mask=unmasked(tokens))
    parts = full.present().items()
    padded = Tokens(**{name: np.concatenate([x, getattr(padding, name)], axis=1) for name, x in parts})
    expected = read(be, case)
    received = read(be, dataclasses.replace(case, tokens=padded, length=case.length + more))
    writes = expected.memorization.shape[1]
    assert_close(received.output[:, : case.length], expected.output, case.dtype)
    assert not received.output[:, case.length :].any()
    assert_close(received.memory, expected.memory, case.dtype)
    for name in ("memorization", "addressing"):
        columns = getattr(received, name)
        assert_close(columns[:, :writes], getattr(expected, name)[:, : columns.shape[1]], case.dtype)
        assert not columns[:, writes:].any()


def case_of_rows(case, rows):
    memory = Memory(*(table[rows] for table in case.memory))
    return dataclasses.replace(case, memory=memory, tokens=case.tokens.map(itemgetter(rows)))


def reading_of_rows(reading, rows):
    """Some rows of a reading; losses up to the most writes of these."""
    fields = {name: x[rows] for name, x in reading._asdict().items() if name != "memory"}
    most = fields["writes"].max()
    losses = {name: fields[name][:, :most] for name in ("memorization", "addressing")}
    return reading._replace(memory=Memory(*(x[rows] for x in reading.memory)), **fields | losses)


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
    first = slice(0, 1)
    assert_same_bits(reading_of_rows(read(be, spoilt), first), reading_of_rows(read(be, case), first))


@given(cases(untied=True), st.data())
def test_no_later_token_changes_an_output(be, case, data):
    """Nor do the earlier ones that no finished write has read: those of its own chunk, and under "wait" a few more."""
    at, index = data.draw(st.integers(0, case.length - 1)), np.arange(case.length)
    own_clocks = case.cfg.memory_scope == "sequence"
    live = unmasked(case.tokens)
    clock = np.cumsum(live, axis=1) - live if own_clocks else np.broadcast_to(index, live.shape)
    written = np.maximum(0, (clock[:, [at]] - lag(case.cfg)) // case.cfg.chunk_size)
    visible = np.where(written, written * case.cfg.chunk_size + lag(case.cfg), 0)
    hidden = (clock >= visible) & (index != at)
    tokens = replaced(case.tokens, hidden, data.draw(OTHERS), spoil=True)
    flips = tokens.mask is not None and data.draw(st.booleans())
    if flips:
        flipped = hidden & (index > at) if own_clocks else hidden  # an earlier one counts in the position of this one
        tokens = tokens._replace(mask=tokens.mask ^ flipped)
    expected, received = read(be, case), read(be, dataclasses.replace(case, tokens=tokens))
    received, expected = ((x.output[:, at], x.slots[:, at], x.weights[:, at]) for x in (received, expected))
    if flips:  # other numbers of tokens in a call: a matrix product may round otherwise
        assert_close(received, expected, case.dtype)
    else:
        assert_same_bits(received, expected)


@given(cases(untied=True))
def test_each_token_reads_the_tables_in_force_and_writes_fall_due_on_schedule(be, case):
    cfg, state = case.cfg, start(be, case)
    live, size = unmasked(case.tokens), cfg.chunk_size
    ticks = live if cfg.memory_scope == "sequence" else np.ones((1, case.length), bool)
    for t in range(case.length):
        token, here = case.tokens.slice(t, t + 1), live[:, t]
        look = as_numpy(be, be.lookup(cfg, state.memory, native(be, token.query)))
        output, after, trace = apply(be, cfg, state, token)
        for received, expected in ((output, look.output), (trace.slots, look.slots), (trace.weights, look.weights)):
            assert_same_bits(received[here], expected[here])
            assert not received[~here].any()
        read = ticks[:, : t + 1].sum(1) - lag(cfg)
        due = ticks[:, t] & (read >= size) & (read % size == 0)
        np.testing.assert_array_equal(trace.writes, due)
        if not due.any():  # a call that writes nothing returns the same table objects
            assert all(new is old for new, old in zip(after.memory, state.memory))
        state = after


def has_pairs(cfg, live):
    """``[M, chunks]`` bool: whether a chunk of a memory holds a pair, given the live tokens [B, T]."""
    index = np.arange(live.shape[1])
    if cfg.memory_scope == "sequence":
        live = np.flip(np.sort(live, axis=1), axis=1)  # a row's own tokens, and then none
    target = index + cfg.lookahead
    arrived = target < live.shape[1]
    if cfg.boundary == "drop":
        arrived &= target // cfg.chunk_size == index // cfg.chunk_size
    pair = live & arrived & live[:, np.minimum(target, live.shape[1] - 1)]
    chunks = -(-live.shape[1] // cfg.chunk_size)
    in_chunk = np.stack([(pair & (index // cfg.chunk_size == c)).any(1) for c in range(chunks)], axis=1)
    return in_chunk if cfg.memory_scope == "sequence" else in_chunk.any(0, keepdims=True)


@given(cases(left_out=WITH_MASK))
def test_a_memory_without_a_pair_keeps_its_bits(be, case):
    """Whole sequences, with weight decay and all: only memories whose rows hold a pair in some chunk may change."""
    in_chunk, received = has_pairs(case.cfg, case.tokens.mask), read(be, case)
    without = ~in_chunk[:, : received.memorization.shape[1]]
    for losses in (received.memorization, received.addressing):
        assert not losses[without].any()
    for row in np.flatnonzero(~in_chunk.any(1)):
        for table, initial in zip(received.memory, case.memory):
            assert_same_bits(table[row], initial[row])


@given(cases(flushed=True), st.booleans())
def test_no_tokens_change_nothing(be, case, update):
    """Whether a call holds none, or none that are not masked."""
    first = case.tokens.slice(0, case.flush_after)
    state = stream(be, case.cfg, start(be, case), first)[1]
    calls = [case.tokens.slice(0, 0)]
    if case.cfg.memory_scope == "sequence":
        calls.append(case.tokens._replace(mask=np.zeros((case.batch, case.length), bool)))
    for tokens in calls:
        output, after, trace = apply(be, case.cfg, state, tokens, update=update)
        assert all(new is old for new, old in zip(after.memory, state.memory))
        assert_same_bits(as_numpy(be, after), as_numpy(be, state))
        assert output.dtype == case.dtype
        assert not any(x.any() for x in (output, *trace))


@given(cases(flushed=True, untied=True))
def test_update_false_only_reads(be, case):
    cfg = case.cfg
    state = stream(be, cfg, start(be, case), case.tokens.slice(0, case.flush_after))[1]
    before = as_numpy(be, state)
    output, after, trace = apply(be, cfg, state, case.tokens, update=False)
    assert_same_bits(as_numpy(be, after), before)
    assert all(new is old for new, old in zip(after.memory, state.memory))
    assert not any(x.any() for x in (trace.writes, trace.memorization, trace.addressing))
    look, live = as_numpy(be, be.lookup(cfg, state.memory, native(be, case.tokens.query))), unmasked(case.tokens)
    np.testing.assert_array_equal(trace.slots[live], look.slots[live])
    for received, expected in ((output, look.output), (trace.weights, look.weights)):  # of fewer tokens: rounded apart
        assert_close(received[live], expected[live], case.dtype)
    assert not any(x[~live].any() for x in (output, trace.slots, trace.weights))
