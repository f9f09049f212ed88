"""Writes weighted by use in JAX (SPEC.md §11): beside the reference, beside torch's gradients, compiled and donated."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserting import assert_close, assert_same_bits
from drawn import drawn
from hypothesis import given as given_cases
from hypothesis import settings
from hypothesis import strategies as st
from jax import export, lax
from test_jax import BIG, TABLE, compiled
from test_jax_decode import CONFIGS, decoded, given, step

import fwpkm
from fwpkm import FwPKMConfig, Memory, agreement, reference
from fwpkm.conformance.running import as_numpy, native
from fwpkm.conformance.strategies import cases, untied_case

BE = fwpkm.get_backend("jax")
USED = {name: dataclasses.replace(cfg, usage_weight=0.7) for name, cfg in CONFIGS.items()}
USED["chunks of one"] = dataclasses.replace(USED["chunks of one"], weight_decay=0.1)
WAIT = USED["wait"]


def assert_same_state(received, expected):
    assert_close(tuple(received.memory), tuple(expected.memory), "float64", name="tables")
    np.testing.assert_array_equal(received.uses, expected.uses)
    np.testing.assert_array_equal(received.position, expected.position)


@pytest.fixture(scope="module")
def read():
    """``apply``, compiled once for a configuration and a length, whatever the positions and masks."""
    return jax.jit(BE.apply, static_argnums=0)


# Beside the reference


@pytest.mark.parametrize("cfg", USED.values(), ids=USED)
def test_calls_of_any_split_give_what_the_reference_gives_in_one(cfg, read):
    """Rows at all places of their chunks, masked and dead tokens; a flush of some rows in the middle and of all."""
    state, tokens = given(cfg, length=18)
    rows = None if cfg.memory_scope == "batch" else [2, 0]
    expected, middle, _ = reference.apply(cfg, state, *tokens.slice(0, 12))
    flushed, _ = reference.flush(cfg, middle, rows)
    after, final, _ = reference.apply(cfg, flushed, *tokens.slice(12, None))
    final, _ = reference.flush(cfg, final)
    assert len(np.unique(final.uses)) > 3, "slots that were used differently often"
    outputs, found = [], native(BE, state)
    for start, stop in ((0, 6), (6, 12)):
        output, found, _ = read(cfg, found, *native(BE, tokens.slice(start, stop)))
        outputs.append(output)
    assert_same_state(as_numpy(BE, found), middle)
    found, _ = BE.flush(cfg, found, rows)
    np.testing.assert_array_equal(found.uses, flushed.uses)
    output, found, _ = read(cfg, found, *native(BE, tokens.slice(12, None)))
    found, _ = BE.flush(cfg, found)
    received = as_numpy(BE, jnp.concatenate([*outputs, output], 1))
    assert_close(received, np.concatenate([expected, after], 1), "float64")
    assert_same_state(as_numpy(BE, found), final)


@settings(max_examples=8)
@given_cases(cases(usage_weight=st.sampled_from([0.25, 3.0]), untied=True, min_length=4), st.data())
def test_drawn_cases_of_any_split_with_a_reset(case, data):
    at, cfg = data.draw(st.integers(1, case.length - 1)), case.cfg
    rows = None if cfg.memory_scope == "batch" else [data.draw(st.integers(0, case.batch - 1))]
    results = []
    for be in (reference, BE):
        memory, outputs = native(be, case.memory), []
        state = be.init_state(cfg, memory, case.batch)
        for tokens in (case.tokens.slice(0, at), case.tokens.slice(at, None)):
            output, state, _ = be.apply(cfg, state, **native(be, tokens).present())
            outputs.append(as_numpy(be, output))
            middle = state
            state = be.reset(cfg, state, memory, rows)
        results.append((np.concatenate(outputs, 1), as_numpy(be, be.flush(cfg, middle)[0])))
    (expected, state), (received, found) = results
    assert_close(received, expected, "float64")
    assert_same_state(found, state)


def test_packed_calls_give_what_the_reference_gives(read):
    """Two packings in one compilation; the second goes on from the first."""
    state, _ = given(WAIT)
    tokens, found, programs = drawn(WAIT, 1, 40).tokens, native(BE, state), read._cache_size()
    for ends in ([0, 17, 18, 18, 39], [0, 0, 9, 33, 40]):
        ends = np.array(ends, np.int32)
        expected, state, _ = reference.apply(WAIT, state, *tokens, ends)
        output, found, _ = read(WAIT, found, *native(BE, tokens), jnp.asarray(ends))
        assert_close(np.asarray(output), expected, "float64")
        assert_same_state(as_numpy(BE, found), state)
    assert read._cache_size() == programs + 1


def test_reading_alone_leaves_the_state():
    state, tokens = (native(BE, x) for x in given(WAIT))
    assert BE.apply(WAIT, state, *tokens, update=False)[1] is state


def test_a_call_that_writes_nothing_returns_the_same_uses():
    case = drawn(WAIT, 2, 4)
    state, tokens = BE.init_state(WAIT, native(BE, case.memory), 2), native(BE, case.tokens)
    assert BE.apply(WAIT, state, *tokens)[1].uses is state.uses
    assert BE.flush(WAIT, state)[0].uses is state.uses


# Gradients


@pytest.mark.parametrize("name", ["drop", "wait", "chunks of one", "one memory"])
def test_gradients_are_those_of_torch(name):
    """Through two calls and a flush, of tokens and tables; of uses there is none."""
    cfg, torch_be = dataclasses.replace(USED[name], score_eps=0.1), fwpkm.get_backend("torch")
    case = untied_case(cfg, 0, "float64", frozenset(), 3, 11, [], None)
    cotangents = [np.random.default_rng(1).normal(size=(3, n, cfg.value_dim)) for n in (7, 4)]
    results = []
    for be in (BE, torch_be):
        mask = be.asarray(case.tokens.mask, "bool")

        def two_calls(keys, values, query, value, gate, be=be, mask=mask):
            state = be.init_state(cfg, Memory(keys, values), 3)
            arrays = (query, value, gate, mask)
            first, state, _ = be.apply(cfg, state, *(x[:, :7] for x in arrays))
            second, state, _ = be.apply(cfg, state, *(x[:, 7:] for x in arrays))
            return first, second, *be.flush(cfg, state)[0].memory

        weights = [be.asarray(x, "float64") for x in (*cotangents, *case.memory)]
        inputs = native(be, (*case.memory, case.tokens.query, case.tokens.value, case.tokens.gate))
        results.append(as_numpy(be, tuple(be.vjp(two_calls, inputs, weights))))
    for received, expected in zip(*results, strict=True):
        assert_close(received, expected, "float64", "gradient")


def test_no_gradient_passes_through_uses():
    state, tokens = (native(BE, x) for x in given(WAIT))

    def loss(uses):
        output, after, _ = BE.apply(WAIT, state._replace(uses=uses), *tokens)
        return jnp.nan_to_num(output).sum() + after.memory.values.sum() + after.uses.sum()

    uses = state.uses + 1
    assert loss(uses) != loss(2 * uses), "the control: they have an influence"
    assert not jax.grad(loss)(uses).any()


@pytest.mark.parametrize("packed", [False, True])
def test_a_memory_in_place_of_a_state_begins_without_uses(packed):
    """Outputs and gradients are those of a state that does; some rows are long enough to read what they wrote."""
    case = drawn(WAIT, 3, 13)
    tokens, cu_seqlens, batch = case.tokens, (), 3
    if packed:
        tokens, batch = drawn(WAIT, 1, 24).tokens, 4
        cu_seqlens = (jnp.asarray([0, 15, 19, 19, 22], jnp.int32),)
    memory = native(BE, Memory(*(x[:1] for x in case.memory)))
    weights = np.random.default_rng(0).normal(size=tokens.value.shape)

    def loss(memory, query, value, kept):
        start = BE.init_state(WAIT, memory, batch) if kept else memory
        call = native(BE, tokens)._replace(query=query, value=value)
        output, _, trace = BE.apply(WAIT, start, *call, *cu_seqlens)
        return (output * weights).sum(), (output, trace)

    gradient = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    inputs = memory, jnp.asarray(tokens.query), jnp.asarray(tokens.value)
    received, expected = (jax.tree.leaves(gradient(*inputs, kept)) for kept in (False, True))
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


# Compiled


@pytest.mark.parametrize("cfg", USED.values(), ids=USED)
def test_decoding_token_by_token_equals_one_call(cfg):
    programs = step._cache_size()
    state, tokens = given(cfg)
    expected, after, _ = reference.apply(cfg, state, *tokens)
    output, received = decoded(cfg, state, tokens)
    assert step._cache_size() <= programs + 1
    assert_close(output, expected, "float64")
    assert_same_state(received, after)


def test_scan_and_vmap_equal_one_call():
    state, tokens = given(WAIT, length=12)

    def read(state, tokens):
        return lax.scan(lambda s, one: BE.apply(WAIT, s, *one)[1::-1], state, tokens)[0]

    pieces = tokens.map(lambda x: x.reshape(4, 3, 4, *x.shape[2:]).swapaxes(0, 1))
    both = native(BE, pieces).map(lambda x: jnp.stack([x, x]))
    after = as_numpy(BE, jax.jit(jax.vmap(read, (None, 0)))(native(BE, state), both))
    expected = reference.apply(WAIT, state, *tokens)[1]
    for i in range(2):
        assert_same_state(after.map(lambda x, i=i: x[i]), expected)


@pytest.mark.parametrize("kind", ["apply", "packed", "decode"])
def test_donated_uses_are_rewritten_where_they_lie(kind):
    """As the tables are: no instruction copies an array as large as either."""
    cfg = dataclasses.replace(BIG, usage_weight=1.0)
    rows = 2 if kind == "packed" else 1
    memory = native(BE, drawn(cfg, rows, 1, dtype="float32").memory)
    tokens = native(BE, drawn(cfg, 1, 1 if kind == "decode" else 9, dtype="float32").tokens)
    ends = (jnp.asarray([0, 5, 9], jnp.int32),) if kind == "packed" else ()

    def call(state, *ends):
        if kind == "decode":
            return BE.decode(cfg, state, *tokens)
        return BE.apply(cfg, state, *tokens, *ends)[:2]

    def copies(program):
        lines = program.as_text().splitlines()
        one = rf"= f32\[({rows},{cfg.num_slots}|{rows * cfg.num_slots})(,{cfg.value_dim})?\]\S* copy"
        return [line for line in lines if re.search(one, line)]

    state = BE.init_state(cfg, memory, rows)
    program = compiled(call, state, *ends, donate_argnums=0)
    assert not copies(program)
    assert program.memory_analysis().temp_size_in_bytes < TABLE / 4
    if kind != "decode":  # which donates by itself
        assert copies(compiled(call, state, *ends)), "the control, which must copy"
    before = state.uses.unsafe_buffer_pointer()
    _, after = program(state, *ends)
    assert after.uses.unsafe_buffer_pointer() == before
    assert state.uses.is_deleted()


def test_float32_tables_keep_float32_uses_and_wide_ones_follow_a_write():
    """Of a call with narrower tokens; where nothing was written the state keeps its dtypes."""
    cfg = USED["drop"]
    state, tokens = (native(BE, x) for x in given(cfg))
    narrow = tokens.map(lambda x: x if x.dtype == bool else x.astype(jnp.float32))
    after = BE.apply(cfg, state, *narrow)[1]
    assert {x.dtype for x in (*after.memory, after.uses)} == {jnp.dtype("float32")}
    fresh = BE.init_state(cfg, Memory(*(x[:1] for x in state.memory)), 1)
    after = BE.apply(cfg, fresh, *narrow.slice(0, 2).map(lambda x: x[:1]))[1]
    assert {x.dtype for x in (*after.memory, after.uses)} == {jnp.dtype("float64")}


# States


def test_rows_may_be_traced():
    """Of a flush, a reset, a select and a put; a row that a state does not have has used nothing."""
    state, _ = given(WAIT)
    here, other = native(BE, state), native(BE, Memory(*(x[:1] for x in drawn(WAIT, 1, 1, seed=5).memory)))
    flags, ids = jnp.array([True, False, True, False]), jnp.array([3, 0])
    fresh = BE.init_state(WAIT, other, 2)
    for function, rows, wanted in (
        (lambda rows: BE.flush(WAIT, here, rows)[0], flags, reference.flush(WAIT, state, np.asarray(flags))[0].uses),
        (lambda rows: BE.reset(WAIT, here, other, rows), flags, np.where(flags[:, None], 0, state.uses)),
        (lambda rows: BE.select(WAIT, here, rows), ids, state.uses[np.array([3, 0])]),
        (lambda rows: BE.select(WAIT, here, rows), jnp.array([1, 9]), state.uses[[1]] * np.array([[1], [0]])),
        (lambda rows: BE.put(WAIT, here, rows, fresh), ids, state.uses * np.array([[0], [1], [1], [0]])),
        (lambda rows: BE.put(WAIT, here, rows, fresh), flags, state.uses * np.array([[0], [1], [0], [1]])),
    ):
        np.testing.assert_array_equal(jax.jit(function)(rows).uses, wanted)
    assert BE.nbytes(here) == sum(x.nbytes for x in jax.tree.leaves(here))


def test_states_are_detached_copied_moved_and_exported():
    state = native(BE, given(WAIT)[0])
    for after in (BE.detach(state), BE.start_decoding(state), BE.to_device(state, jax.devices()[0])):
        assert_same_bits(as_numpy(BE, after), as_numpy(BE, state))
    tokens = native(BE, drawn(WAIT, 4, 5).tokens)
    program = export.export(jax.jit(functools.partial(BE.apply, WAIT)))(state, *tokens)
    loaded = export.deserialize(program.serialize())
    found, expected = (call(state, *tokens)[1] for call in (loaded.call, functools.partial(BE.apply, WAIT)))
    assert_same_state(as_numpy(BE, found), as_numpy(BE, expected))


@pytest.mark.parametrize("library", ["jax", "nnx", "equinox"])
def test_layers_carry_uses(library):
    """What a layer gives in two calls it gives in one, and another weight gives something else."""
    fields = {"key_dim": 4, "value_dim": 4, "num_subkeys": 2, "top_k": 2, "chunk_size": 3}
    x = jax.random.normal(jax.random.key(1), (2, 14, 6))

    def layer(weight):
        if library == "jax":
            plain = BE.FwPKM(6, **fields, usage_weight=weight)
            return functools.partial(plain.apply, plain.init(jax.random.key(0)))
        if library == "nnx":
            from flax import nnx

            return fwpkm.integrations.nnx.FwPKM(6, **fields, usage_weight=weight, rngs=nnx.Rngs(0))
        return fwpkm.integrations.equinox.FwPKM(6, **fields, usage_weight=weight, key=jax.random.key(0))

    used, plain = layer(1.0), layer(0.0)
    y, whole = used(x)
    first, state = used(x[:, :8])
    second, state = used(x[:, 8:], state)
    bound = agreement.BOUNDS["float32"].forward
    assert agreement.relative_error(np.concatenate([first, second], 1), np.asarray(y)) < bound
    np.testing.assert_array_equal(state.uses, whole.uses)
    assert state.uses.any()
    assert agreement.relative_error(np.asarray(plain(x)[0]), np.asarray(y)) > 100 * bound


# Where it is off


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_state_and_a_program_without_it_hold_no_uses(weight):
    """Not a leaf, and no array of the program has their shape; with it, some have."""
    cfg = FwPKMConfig(4, 3, 2, 5, 2, 3, 1, usage_weight=weight)
    case = drawn(cfg, 2, 8)
    state = BE.init_state(cfg, native(BE, case.memory), 2)
    assert len(jax.tree.leaves(state)) == 7 + bool(weight)

    def loss(state, tokens):
        output, after, _ = BE.apply(cfg, state, *tokens)
        return (output**2).sum() + (BE.flush(cfg, after)[0].memory.values ** 2).sum()

    program = str(jax.make_jaxpr(jax.grad(loss, allow_int=True))(state, native(BE, case.tokens)))
    assert (f"f64[2,{cfg.num_slots}]" in program) == bool(weight)
