"""Decoding in JAX: token by token what one call gives, compiled once, tables written where they lie (SPEC.md §5)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserting import assert_close
from drawn import drawn as drawn_case
from jax import lax
from test_jax import BIG, TABLE, compiled

import fwpkm
from fwpkm import FwPKMConfig, Memory, State, reference
from fwpkm.backends.jax import FwPKM
from fwpkm.conformance.running import as_numpy, native

BE = fwpkm.get_backend("jax")
CONFIGS = {
    "drop, no lookahead": FwPKMConfig(4, 3, 1, 4, 2, 3, 0, write_scale="normalized"),
    "drop": FwPKMConfig(4, 3, 2, 5, 3, 4, 1, grad_clip=0.5),
    "drop, two ahead": FwPKMConfig(4, 3, 1, 4, 2, 3, 2, score="dot_product"),
    "wait": FwPKMConfig(4, 3, 2, 4, 2, 3, 2, "wait", write_scale="normalized", weight_decay=0.1),
    "chunks of one": FwPKMConfig(4, 3, 1, 4, 2, 1, 0),
    "one memory": FwPKMConfig(4, 3, 1, 4, 2, 3, 1, "wait", memory_scope="batch"),
}


def drawn(cfg, batch, length, dtype="float64"):
    case = drawn_case(cfg, batch, length, dtype=dtype)
    return case.memory, case.tokens


def given(cfg, batch=4, length=11):
    """A state of the reference, and tokens: some masked, some dead, chunks that end in different steps."""
    memory, tokens = drawn(cfg, batch, length)
    if cfg.memory_scope == "batch":
        begun = reference.init_state(cfg, Memory(*(x[:1] for x in memory)), batch)
    else:
        read = np.arange(length) < 4 + np.arange(batch)[:, None]
        begun = reference.apply(cfg, reference.init_state(cfg, memory, batch), *tokens._replace(mask=read))[1]
    query = tokens.query.copy()
    mask = np.random.default_rng(3).uniform(size=(batch, length)) < 0.8
    mask[1:3, 5] = True
    query[1, 5, 0] = np.nan
    if cfg.score == "idw":  # finite itself, but no score of it is
        query[2, 5] = 1e200
    tokens = tokens._replace(query=query, mask=mask)
    return begun, tokens


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(cfg, state, tokens):
    return BE.decode(cfg, state, *tokens)


def decoded(cfg, state, tokens):
    """Outputs ``[B, T, Dv]`` of a step for each token, and the state afterwards."""
    state, tokens, outputs = native(BE, state), native(BE, tokens), []
    for t in range(tokens.length):
        output, state = step(cfg, state, tokens.slice(t, t + 1))
        outputs.append(output)
    return as_numpy(BE, jnp.concatenate(outputs, 1)), as_numpy(BE, state)


def assert_same_state(received, expected):
    assert_close(received.memory, expected.memory, "float64")
    for name, x, y in zip(received.pending._fields, received.pending, expected.pending):
        np.testing.assert_allclose(x, y, rtol=1e-12, err_msg=name)
    np.testing.assert_array_equal(received.position, expected.position)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_token_by_token_equals_one_call(cfg):
    """Rows at all places of their chunks, which end in different steps, while some rest; one compilation for all."""
    compilations = step._cache_size()
    state, tokens = given(cfg)
    expected, after, trace = reference.apply(cfg, state, *tokens)
    assert (trace.writes >= 2).all()
    output, received = decoded(cfg, state, tokens)
    assert step._cache_size() <= compilations + 1
    assert np.isnan(output[1:3, 5]).all(-1).tolist() == [True, cfg.score == "idw"]
    assert_close(output, expected, "float64")
    assert_same_state(received, after)


def test_ties_go_to_the_lower_slot_in_reads_and_writes():
    """All keys of a codebook are equal until the first chunk moves them apart."""
    cfg = CONFIGS["drop"]
    memory, tokens = drawn(cfg, 4, cfg.chunk_size)
    memory = memory._replace(keys=np.repeat(memory.keys[:, :, :, :1], cfg.num_subkeys, axis=3))
    state = reference.init_state(cfg, memory, 4)
    expected, after, _ = reference.apply(cfg, state, *tokens)
    output, received = decoded(cfg, state, tokens)
    assert_close(output, expected, "float64")
    assert_same_state(received, after)


def test_a_scan_and_a_vmap_over_steps():
    """Two batches side by side, each of them in a scan."""
    cfg = CONFIGS["wait"]
    state, tokens = given(cfg)

    def read(state, tokens):
        state, output = lax.scan(lambda s, one: BE.decode(cfg, s, *one)[::-1], state, tokens)
        return output, state

    one_by_one = tokens.map(lambda x: x[:, :, None].swapaxes(0, 1))
    both = [tokens, tokens._replace(mask=~tokens.mask)]
    pairs = native(BE, one_by_one).map(lambda x: jnp.stack([x, x]))
    pairs = pairs._replace(mask=jnp.asarray(np.stack([x.mask[:, :, None].swapaxes(0, 1) for x in both])))
    output, after = as_numpy(BE, jax.jit(jax.vmap(read, (None, 0)))(native(BE, state), pairs))
    for i, each in enumerate(both):
        expected, expected_after, _ = reference.apply(cfg, state, *each)
        assert_close(output[i][:, :, 0].swapaxes(0, 1), expected, "float64")
        assert_same_state(after.map(lambda x, i=i: x[i]), expected_after)


def test_tables_are_written_where_they_lie():
    """Of two rows, over a chunk's end; a copy of a table would show in the program's memory."""
    memory, tokens = drawn(BIG, 2, 1, dtype="float32")
    state = native(BE, reference.init_state(BIG, memory, 2))
    program = compiled(functools.partial(BE.decode, BIG), state, *native(BE, tokens), donate_argnums=0)
    assert program.memory_analysis().temp_size_in_bytes < TABLE / 4
    before = state.memory.values.unsafe_buffer_pointer()
    for _ in range(BIG.chunk_size):
        _, state = program(state, *native(BE, tokens))
    assert state.memory.values.unsafe_buffer_pointer() == before


def test_the_layer_decodes_what_it_applies():
    """With a mask, and tokens that are not finite, of which one is masked."""
    layer = FwPKM(6, CONFIGS["drop"])
    variables = layer.init(jax.random.key(0), "float64")
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(3, 14, 6)), rng.uniform(size=(3, 14)) < 0.8
    x[0, 7, 1], mask[0, 7], x[1, 7, 1], mask[1, 7] = np.nan, True, np.nan, False
    x, mask = jnp.asarray(x), jnp.asarray(mask)
    expected, after = jax.jit(layer.apply)(variables, x, mask=mask)
    state, outputs = layer.init_state(variables, 3), []
    one = jax.jit(layer.decode, donate_argnums=2)
    for t in range(14):
        y, state = one(variables, x[:, t : t + 1], state, mask[:, t : t + 1])
        outputs.append(y)
    assert np.isnan(outputs[7][0]).all()
    assert not outputs[7][1].any()
    assert_close(np.asarray(jnp.concatenate(outputs, 1)), np.asarray(expected), "float64")
    assert_same_state(as_numpy(BE, state), as_numpy(BE, after))


def test_the_state_of_a_call_that_is_not_compiled_is_donated_too():
    """And a copy of it is not."""
    cfg = CONFIGS["chunks of one"]
    state, tokens = (native(BE, x) for x in given(cfg))
    kept = BE.start_decoding(state)
    BE.decode(cfg, state, *tokens.slice(0, 1))
    assert state.memory.values.is_deleted()
    assert not kept.memory.values.is_deleted()


def test_a_state_keeps_its_dtypes():
    """Float64 tables under float32 tokens, too: another dtype would compile the next step anew."""
    cfg = CONFIGS["drop"]
    state, tokens = (native(BE, x) for x in given(cfg))
    narrow = tokens.slice(0, 1).map(lambda x: x if x.dtype == bool else x.astype(jnp.float32))
    output, after = jax.eval_shape(functools.partial(BE.decode, cfg), state, *narrow)
    assert output.dtype == jnp.float32
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]


def test_what_does_not_fit_is_refused():
    cfg = CONFIGS["drop"]
    state, tokens = (native(BE, x) for x in given(cfg))
    with pytest.raises(ValueError, match=r"query must be \[B, 1, H\*Dk\]: .* Received: \(4, 2, 8\)"):
        BE.decode(cfg, state, *tokens.slice(0, 2))
    with pytest.raises(ValueError, match=r"state must be a fwpkm.State"):
        BE.decode(cfg, state.memory, *tokens.slice(0, 1))
    with pytest.raises(ValueError, match=r"state must be a fwpkm.State"):
        BE.start_decoding(tuple(state))
    with pytest.raises(ValueError, match="position"):
        BE.decode(cfg, state._replace(position=state.position - 9), *tokens.slice(0, 1))
    one = tokens.slice(0, 1)
    with pytest.raises(TypeError, match="decode has no gradient: call apply"):
        jax.grad(lambda value: BE.decode(cfg, state, one.query, value)[0].sum())(one.value)
    layer = FwPKM(6, cfg)
    with pytest.raises(ValueError, match=r"x must .* Received: shape \(4, 2, 6\)"):
        layer.decode(layer.init(jax.random.key(0), "float64"), jnp.ones((4, 2, 6)), state)
    assert isinstance(state, State)
