"""Rows at positions, under masks and in packed calls that are all traced: one compilation, and each row is as alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserting import assert_close, assert_same_bits
from drawn import drawn as drawn_case
from test_jax import BIG as WIDE
from test_jax import TABLE, compiled, copies_of_tables

import fwpkm
from fwpkm import FwPKMConfig, Memory, reference, schedule
from fwpkm.conformance.running import as_numpy, native
from fwpkm.containers import State

BE = fwpkm.get_backend("jax")
WAIT = FwPKMConfig(4, 3, 2, 4, 2, 3, 2, "wait", write_scale="normalized", weight_decay=0.1)
DROP = FwPKMConfig(4, 3, 1, 4, 2, 4, 1)


def drawn(cfg, batch, length, seed=0):
    case = drawn_case(cfg, batch, length, seed)
    return case.memory, case.tokens


def begun_state(cfg, memory, seed=1):
    """A state of the reference whose rows stand at different places of their chunks."""
    batch = len(memory.keys)
    tokens = drawn(cfg, batch, 4 * cfg.chunk_size, seed)[1]
    mask = np.arange(tokens.length) < np.arange(batch)[:, None] * 2 % tokens.length
    return reference.apply(cfg, reference.init_state(cfg, memory, batch), *tokens._replace(mask=mask))[1]


def assert_same_call(received, expected):
    """Output, state and trace."""
    assert_close(received[0], expected[0], "float64", name="output")
    if isinstance(expected[1], State):
        assert_close(received[1].memory, expected[1].memory, "float64")
        assert_close(tuple(received[1].pending), tuple(expected[1].pending), "float64")
        np.testing.assert_array_equal(received[1].position, expected[1].position)
    assert_close(tuple(received[2][1:4]), tuple(expected[2][1:4]), "float64")
    np.testing.assert_array_equal(received[2].writes, expected[2].writes)


@pytest.mark.parametrize("cfg", [WAIT, DROP], ids=["wait", "drop"])
def test_one_compilation_serves_all_positions_and_masks(cfg):
    """Rows that begin, rows in the middle of a chunk, rows that rest; all of it traced."""
    traced = []

    @jax.jit
    def call(state, tokens):
        traced.append(tokens.length)
        return BE.apply(cfg, state, *tokens)

    memory, tokens = drawn(cfg, 5, 2 * cfg.chunk_size + 3)
    for seed in range(4):
        state, mask = begun_state(cfg, memory, seed), np.random.default_rng(seed).uniform(size=tokens.mask.shape) < 0.7
        mask[seed] = False
        far = 3 * cfg.chunk_size * (state.position >= 6)
        state = state._replace(position=(state.position + far).astype(np.int32))
        given = tokens._replace(mask=mask)
        received = as_numpy(BE, call(native(BE, state), native(BE, given)))
        assert_same_call(received, reference.apply(cfg, state, *given))
    assert traced == [tokens.length]


@pytest.mark.parametrize("cfg", [WAIT, DROP], ids=["wait", "drop"])
@pytest.mark.parametrize("masked", [False, True])
def test_one_compilation_serves_all_packings(cfg, masked):
    """64 sequences: prompts beside rows that decode, and rows that rest."""
    traced = []

    @jax.jit
    def call(state, tokens, cu_seqlens):
        traced.append(tokens.length)
        return BE.apply(cfg, state, *tokens, cu_seqlens)

    memory, _ = drawn(cfg, 64, 1)
    tokens = drawn(cfg, 1, 80)[1]
    tokens = tokens if masked else tokens._replace(mask=None)
    rng, state = np.random.default_rng(0), begun_state(cfg, memory)
    sizes = [
        np.ones(64, int),
        np.eye(64, dtype=int)[9] * 70,
        rng.multinomial(77, np.full(64, 1 / 64)),
        np.zeros(64, int),
    ]
    sizes.append((np.arange(64) % 5 == 0) + np.eye(64, dtype=int)[3] * 41)
    for each in sizes:
        cu_seqlens = np.cumsum([0, *each]).astype(np.int32)
        received = as_numpy(BE, call(native(BE, state), native(BE, tokens), jnp.asarray(cu_seqlens)))
        assert_same_call(received, reference.apply(cfg, state, *tokens, cu_seqlens))
    assert traced == [80]


ILLEGAL = {"not from 0": [3, 8, 12], "falling": [0, 8, 3], "past the end": [0, 8, 13], "negative": [0, -1, 12]}


@pytest.mark.parametrize("start", ["state", "memory", "read only"])
def test_a_traced_cu_seqlens_that_is_not_legal_reads_nan_and_writes_nothing(start):
    """Nobody can raise there, so the outputs say it; the state stays, and legal numbers read on from it."""
    memory, tokens = drawn(WAIT, 2, 1)[0], drawn(WAIT, 1, 12)[1]
    tokens.mask[0, 5], legal = False, jnp.asarray([0, 5, 11], jnp.int32)
    state = native(BE, begun_state(WAIT, memory))
    begun = native(BE, Memory(*(x[:1] for x in memory))) if start == "memory" else state

    @jax.jit
    def call(begun, query, ends):
        given = native(BE, tokens)._replace(query=query)
        return BE.apply(WAIT, begun, *given, ends, update=start != "read only")

    query = jnp.asarray(tokens.query)
    for ends in ILLEGAL.values():
        output, after, trace = as_numpy(BE, call(begun, query, jnp.asarray(ends, jnp.int32)))
        for x in (output, trace.weights):
            assert np.isnan(x[tokens.mask]).all()
            assert (x[~tokens.mask] == 0).all()
        assert not trace.writes.any()
        assert not trace.memorization.any()
        assert not trace.addressing.any()
        if after is not None:
            assert_same_bits(tuple(as_numpy(BE, tuple(after.memory))), tuple(as_numpy(BE, tuple(state.memory))))
            assert_same_bits(as_numpy(BE, after.pending), as_numpy(BE, state.pending))
            np.testing.assert_array_equal(after.position, schedule.reduced(WAIT, np.asarray(state.position)))
    assert_same_call(
        as_numpy(BE, call(begun, query, legal)),
        as_numpy(BE, BE.apply(WAIT, begun, *native(BE, tokens), legal, update=start != "read only")),
    )
    both = jax.vmap(call, (None, None, 0))(begun, query, jnp.asarray([ILLEGAL["falling"], legal], jnp.int32))[0]
    assert np.isnan(both[0, tokens.mask]).all()
    assert_same_bits(np.asarray(both[1]), np.asarray(jax.vmap(call, (None, None, 0))(begun, query, legal[None])[0][0]))


@pytest.mark.parametrize("ends", ILLEGAL.values(), ids=ILLEGAL)
def test_a_layer_shows_a_cu_seqlens_that_is_not_legal(ends):
    """In every token that is there, those behind the last sequence too; no gradient of a parameter is spoilt."""
    layer = BE.FwPKM(8, key_dim=8, value_dim=8, num_subkeys=4, top_k=2, chunk_size=3)
    variables = layer.init(jax.random.key(0))
    x, mask = jax.random.normal(jax.random.key(1), (1, 12, 8)), jnp.arange(12)[None] != 6

    @jax.jit
    def call(params, ends):
        y, state = layer.apply({**variables, "params": params}, x, mask=mask, cu_seqlens=ends)
        return jnp.square(y).sum(), (y, state)

    y, state = call(variables["params"], jnp.asarray(ends, jnp.int32))[1]
    assert jnp.isnan(y[mask]).all()
    assert (y[~mask] == 0).all()
    assert_same_bits(as_numpy(BE, state), as_numpy(BE, layer.init_state(variables, 2)))
    gradient = jax.grad(call, has_aux=True)(variables["params"], jnp.asarray(ends, jnp.int32))[0]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("cfg", [WAIT, DROP], ids=["wait", "drop"])
def test_a_packed_call_and_a_padded_one_have_the_same_gradients(cfg):
    """Of the same sequences; the one goes a row at a time, the other all rows together."""
    sizes, length = [0, 7, 1, 13, 3], 13
    memory, tokens = drawn(cfg, 5, length)
    there = np.arange(length) < np.array(sizes)[:, None]
    padded = tokens._replace(mask=there & tokens.mask)
    packed, ends = tokens.map(lambda x: x[there][None]), np.cumsum([0, *sizes]).astype(np.int32)
    weights = np.random.default_rng(3).normal(size=(5, length, cfg.value_dim))
    start = begun_state(cfg, memory)

    def gradient(tokens, weights, *cu_seqlens):
        def loss(numbers, state):
            call = native(BE, tokens)._replace(**numbers)
            output, after, trace = BE.apply(cfg, state, *call, *cu_seqlens)
            after = BE.flush(cfg, after)[0]
            return (output * weights).sum() + sum(jnp.square(x).sum() for x in after.memory), trace.writes

        numbers = {name: jnp.asarray(getattr(tokens, name)) for name in ("query", "value", "gate")}
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True, allow_int=True))(numbers, native(BE, start))

    (of_tokens, of_state), writes = gradient(padded, weights)
    (of_packed, of_packed_state), _ = gradient(packed, weights[there][None], jnp.asarray(ends))
    assert writes.max() > 1
    for name, x in of_tokens.items():
        assert_close(np.asarray(of_packed[name])[0], np.asarray(x)[there], "float64", "gradient", name)
        assert not np.asarray(x)[~padded.mask].any()
    for name in ("memory", "pending_query", "pending_value", "pending_gate"):
        received, expected = (as_numpy(BE, getattr(x, name)) for x in (of_packed_state, of_state))
        assert_close(received, expected, "float64", "gradient", name)


def test_vmap_over_packings_equals_a_loop():
    memory, tokens = drawn(WAIT, 3, 1)[0], drawn(WAIT, 1, 12)[1]
    state, tokens = native(BE, begun_state(WAIT, memory)), native(BE, tokens)
    ends = jnp.asarray([[0, 5, 5, 12], [0, 1, 11, 11], [0, 0, 2, 9]], jnp.int32)

    def call(cu_seqlens):
        return BE.apply(WAIT, state, *tokens, cu_seqlens)

    together = jax.jit(jax.vmap(call))(ends)
    for i, each in enumerate(ends):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(jax.jit(call)(each)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-12)


def test_rows_may_be_traced():
    """Of a flush, a reset, a select and a put."""
    memory, other = drawn(WAIT, 4, 1)[0], drawn(WAIT, 2, 1, seed=5)[0]
    state = begun_state(WAIT, memory)
    here, fresh = native(BE, state), native(BE, Memory(*(x[:1] for x in other)))
    chosen, ids = np.array([True, False, True, False]), np.array([3, 0], np.int32)
    joined = BE.init_state(WAIT, native(BE, other), 2)
    received = [
        jax.jit(functools.partial(BE.flush, WAIT))(here, chosen)[0],
        jax.jit(functools.partial(BE.flush, WAIT))(here, ids)[0],
        jax.jit(functools.partial(BE.reset, WAIT))(here, fresh, chosen),
        jax.jit(functools.partial(BE.select, WAIT))(here, ids),
        jax.jit(functools.partial(BE.put, WAIT))(here, ids, joined),
    ]
    expected = [
        reference.flush(WAIT, state, chosen)[0],
        reference.flush(WAIT, state, ids)[0],
        reference.reset(WAIT, state, Memory(*(x[:1] for x in other)), chosen),
        reference.select(WAIT, state, ids),
        reference.put(WAIT, state, ids, as_numpy(BE, joined)),
    ]
    for a, b in zip(received, expected, strict=True):
        assert_close(tuple(as_numpy(BE, a.memory)), tuple(b.memory), "float64")
        assert_same_bits(tuple(as_numpy(BE, (*a.pending, a.position))), (*b.pending, b.position))
    assert BE.nbytes(here) == sum(x.nbytes for x in jax.tree.leaves(here))


def test_where_the_host_sees_that_nothing_is_due_the_tables_are_the_same():
    """By a mask and by cu_seqlens; bad numbers are named wherever they are known."""
    memory, tokens = drawn(DROP, 2, 6)
    state, tokens = BE.init_state(DROP, native(BE, memory), 2), native(BE, tokens)
    few = jnp.asarray(np.arange(6) < 3)[None].repeat(2, 0)
    packed = tokens.map(lambda x: x[:1])._replace(mask=None)
    for call, same in (
        (functools.partial(BE.apply, DROP, state, *tokens._replace(mask=few)), True),
        (functools.partial(BE.apply, DROP, state, *tokens._replace(mask=None)), False),
        (functools.partial(BE.apply, DROP, state, *packed, jnp.asarray([0, 3, 6], jnp.int32)), True),
        (functools.partial(BE.apply, DROP, state, *packed, jnp.asarray([0, 2, 6], jnp.int32)), False),
    ):
        after = call()[1]
        assert all((new is old) == same for new, old in zip(after.memory, state.memory))
    for ends in ([0, 4, 3], [1, 2, 3], [0, 2, 7]):
        with pytest.raises(ValueError, match="cu_seqlens must begin with 0, never fall and end at most at T=6"):
            BE.apply(DROP, state, *packed, jnp.asarray(ends, jnp.int32))
    with pytest.raises(ValueError, match=r"state.position must hold numbers of at least 0"):
        BE.apply(DROP, state._replace(position=jnp.asarray([-1, 0], jnp.int32)), *tokens)


@pytest.mark.parametrize("cfg", [WAIT, DROP], ids=["wait", "drop"])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("kind", ["long", "short", "packed"])
def test_a_memory_in_place_of_a_state(cfg, update, kind):
    """Every sequence begins from it: outputs, losses and gradients are those of a state that does."""
    memory, tokens, cu_seqlens, batch = drawn(cfg, 1, 1)[0], drawn(cfg, 3, 13)[1], (), 3
    if kind == "short":
        tokens = tokens.slice(0, cfg.chunk_size)
    if kind == "packed":
        tokens, batch = drawn(cfg, 1, 24)[1], 4
        cu_seqlens = (jnp.cumsum(jnp.asarray([0, 15, 4, 0, 3]), dtype=jnp.int32),)
    weights = np.random.default_rng(0).normal(size=tokens.value.shape)
    numbers = {name: jnp.asarray(getattr(tokens, name)) for name in ("query", "value", "gate")}

    def loss(memory, numbers, kept):
        start = BE.init_state(cfg, memory, batch) if kept else memory
        call = native(BE, tokens)._replace(**numbers)
        output, after, trace = BE.apply(cfg, start, *call, *cu_seqlens, update=update)
        assert (after is not None) == kept
        return (output * weights).sum(), (output, trace)

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    received, expected = (jax.tree.leaves(gradient(native(BE, memory), numbers, kept)) for kept in (False, True))
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_packed_call_rewrites_donated_tables_where_they_lie():
    memory, tokens = drawn_case(WIDE, 2, 16, dtype="float32").memory, drawn_case(WIDE, 1, 16, dtype="float32").tokens
    state, tokens = BE.init_state(WIDE, native(BE, memory), 2), native(BE, tokens)

    def call(state, cu_seqlens):
        output, state, _ = BE.apply(WIDE, state, *tokens, cu_seqlens)
        return state, output

    arguments = state, jnp.asarray([0, 9, 16], jnp.int32)
    program = compiled(call, *arguments, donate_argnums=0)
    assert not copies_of_tables(program.as_text(), rows=2)
    assert program.memory_analysis().temp_size_in_bytes < TABLE / 4
    assert copies_of_tables(compiled(call, *arguments).as_text(), rows=2), "the control, which must copy"


@pytest.mark.parametrize(
    ("call", "rows"),
    [
        (lambda state, rows: BE.put(DROP, state, rows, BE.select(DROP, state, [0])), jnp.array([0, 1])),
        (lambda state, rows: BE.reset(DROP, state, state.memory, rows), jnp.array([True])),
        (lambda state, rows: BE.flush(DROP, state, rows), jnp.array([True, True, False])),
        (lambda state, rows: BE.reset(DROP, state, state.memory, rows), jnp.array([0.0])),
        (lambda state, rows: BE.select(DROP, state, rows), jnp.array([[1]])),
    ],
    ids=["put of fewer", "one flag", "three flags", "floats", "two axes"],
)
def test_traced_rows_of_wrong_shapes_are_refused(call, rows):
    """Their values are not known, their shapes and dtypes are."""
    state = native(BE, begun_state(DROP, drawn(DROP, 2, 1)[0]))
    with pytest.raises(ValueError, match="rows"):
        jax.jit(call)(state, rows)


def test_put_takes_traced_flags():
    state = native(BE, begun_state(DROP, drawn(DROP, 3, 1)[0]))
    other = BE.select(DROP, state, [2, 0])
    flags = jnp.array([True, False, True])
    received = jax.jit(functools.partial(BE.put, DROP))(state, flags, other)
    assert_same_bits(as_numpy(BE, received), as_numpy(BE, BE.put(DROP, state, flags, other)))


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("row", [-1, 5])
def test_a_traced_row_that_a_state_does_not_have_changes_nothing_or_shows(row, scope):
    """Nobody can raise: put and reset leave it out, and what select makes of it reads NaN."""
    cfg = DROP if scope == "sequence" else dataclasses.replace(DROP, memory_scope=scope)
    memory, tokens = drawn(cfg, 2, 7)
    memory = native(BE, Memory(*(x[:1] for x in memory)))
    tokens = tuple(jnp.asarray(x) for x in (tokens.query, tokens.value))
    state = BE.apply(cfg, BE.init_state(cfg, memory, 2), *tokens)[1]
    rows = jnp.array([0, row])
    selected = jax.jit(functools.partial(BE.select, cfg))(state, rows)
    output, after, _ = BE.apply(cfg, selected, *tokens)
    expected = BE.apply(cfg, BE.select(cfg, state, [0, 0]), *tokens)
    assert np.isnan(output[1]).all()
    if scope == "batch":  # one table and one clock serve all
        assert np.isnan(output[0]).all()
        return
    assert selected.position[1] == 0
    assert_same_bits(output[0], expected[0][0])
    assert np.isnan(after.memory.values[1]).all()
    left = jax.jit(functools.partial(BE.reset, cfg))(state, memory, jnp.array([row]))
    assert_same_bits(as_numpy(BE, left), as_numpy(BE, state))
    put = jax.jit(functools.partial(BE.put, cfg))(state, rows, BE.select(cfg, state, [1, 1]))
    assert_same_bits(as_numpy(BE, put), as_numpy(BE, BE.select(cfg, state, [1, 1])))


@pytest.mark.parametrize("call", ["select", "put"])
def test_traced_rows_may_be_narrow(call):
    """More rows than an int8 counts, though the ones named fit it."""
    cfg = FwPKMConfig(2, 1, 1, 2, 1, 1, 0)
    state = BE.init_state(cfg, BE.init_memory(cfg), 300)._replace(position=jnp.arange(300, dtype=jnp.int32))
    functions = {
        "select": lambda rows: BE.select(cfg, state, rows).position,
        "put": lambda rows: BE.put(cfg, state, rows, BE.init_state(cfg, BE.init_memory(cfg), 1)).position[7:8],
    }
    found = jax.jit(functions[call])(jnp.array([7], jnp.int8))
    assert found.tolist() == ([7] if call == "select" else [0])


def test_one_state_joined_is_new_arrays():
    """So that either may be donated."""
    cfg = FwPKMConfig(2, 1, 1, 2, 1, 2)
    state = BE.init_state(cfg, BE.init_memory(cfg), 1)
    joined = BE.concat(cfg, [state])
    jax.jit(lambda x: x.map(lambda y: y + 0), donate_argnums=0)(joined)
    assert np.isfinite(state.memory.values).all()
