"""What only JAX has: transformations, compilation, donation, and what its compiled programs hold in memory."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_errors
from asserting import assert_close, assert_same_bits, assert_same_reading
from drawn import drawn as drawn_case
from jax import lax
from processes import python

import fwpkm
from fwpkm import FwPKMConfig, Memory, reference, rules
from fwpkm.conformance.running import as_numpy, native, read, stream
from fwpkm.conformance.strategies import Case, draw_memory, draw_tokens
from fwpkm.tokens import Tokens

BE = fwpkm.get_backend("jax")
CFG = FwPKMConfig(6, 4, 2, 5, 3, 4, 1, "wait", write_scale="normalized", score_eps=0.1)
DROP = FwPKMConfig(6, 4, 1, 5, 3, 4, 1)
BIG = FwPKMConfig(key_dim=8, value_dim=32, num_subkeys=128, top_k=2, chunk_size=4)
"""A table of 2 MiB that a call touches a few rows of."""
TABLE = 4 * BIG.num_slots * BIG.value_dim


def drawn(cfg, batch=2, length=12, seed=0, dtype="float64"):
    """Memory and tokens as JAX arrays."""
    case = drawn_case(cfg, batch, length, seed, dtype)
    return native(BE, case.memory), native(BE, tuple(case.tokens))


def cut(tokens, start, stop):
    return tuple(x[:, start:stop] for x in tokens)


def read_on(cfg, state, tokens):
    """As ``lax.scan`` takes it."""
    output, state, _ = BE.apply(cfg, state, *tokens)
    return state, output


@pytest.fixture(scope="module")
def step():
    """A jitted call of any length, and how often it was traced."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(cfg, state, *tokens):
        traces.append(tokens[0].shape[1])
        return BE.apply(cfg, state, *tokens)

    return step, traces


@pytest.mark.parametrize("cfg", [CFG, DROP], ids=["wait", "drop"])
def test_a_jitted_decode_compiles_once_and_equals_one_call(cfg, step):
    """Over three chunks, a flush and another chunk; the position is traced."""
    decode, traces = step
    traces.clear()
    memory, tokens = drawn(cfg, length=13)
    state = BE.init_state(cfg, memory, 2)
    outputs = []
    for t in range(13):
        output, state, _ = decode(cfg, state, *cut(tokens, t, t + 1))
        outputs.append(output)
    state = BE.flush(cfg, state)[0]
    for t in range(5):
        state = decode(cfg, state, *cut(tokens, t, t + 1))[1]
    assert traces == [1]

    expected = reference.init_state(cfg, as_numpy(BE, memory), 2)
    arrays = as_numpy(BE, tokens)
    whole, expected, _ = reference.apply(cfg, expected, *arrays)
    expected = reference.flush(cfg, expected)[0]
    expected = reference.apply(cfg, expected, *(x[:, :5] for x in arrays))[1]
    assert_close(as_numpy(BE, jnp.concatenate(outputs, 1)), whole, "float64")
    assert_close(as_numpy(BE, state.memory), expected.memory, "float64")
    for received, field in zip(as_numpy(BE, (*state.pending, state.position)), (*expected.pending, expected.position)):
        np.testing.assert_allclose(received, field, rtol=1e-12)


def test_a_traced_position_gives_what_a_known_one_gives(step):
    """From every place in a chunk, with and without a write."""
    memory, tokens = drawn(CFG, length=12)
    for position in range(7):
        state = BE.apply(CFG, BE.init_state(CFG, memory, 2), *cut(tokens, 0, position))[1]
        piece = cut(tokens, position, position + 3)
        known, traced = BE.apply(CFG, state, *piece), step[0](CFG, state, *piece)
        for a, b in zip(jax.tree.leaves(known), jax.tree.leaves(traced), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-300)


def test_scan_over_pieces_equals_one_call():
    memory, tokens = drawn(CFG, length=12)
    state = BE.init_state(CFG, memory, 2)
    pieces = tuple(x.reshape(2, 4, 3, *x.shape[2:]).swapaxes(0, 1) for x in tokens)
    after, outputs = jax.jit(functools.partial(lax.scan, functools.partial(read_on, CFG)))(state, pieces)
    whole, expected, _ = BE.apply(CFG, state, *tokens)
    assert_close(as_numpy(BE, outputs.swapaxes(0, 1).reshape(whole.shape)), as_numpy(BE, whole), "float64")
    assert_close(as_numpy(BE, after.memory), as_numpy(BE, expected.memory), "float64")


def test_vmap_over_an_outer_axis_equals_a_loop():
    """Outputs and gradients of three independent batches, tables, states and all."""
    runs = [drawn(CFG, length=9, seed=seed) for seed in range(3)]

    def loss(memory, tokens):
        output, state, _ = BE.apply(CFG, BE.init_state(CFG, memory, 2), *tokens)
        return jnp.square(output).sum() + state.memory.values.sum(), output

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    together = jax.vmap(gradient)(*jax.tree.map(lambda *x: jnp.stack(x), *runs))
    for i, run in enumerate(runs):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(gradient(*run)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-12)


def test_gradients_through_two_calls_equal_those_of_torch():
    """The state between them carries a gradient of whole tables."""
    torch_be = fwpkm.get_backend("torch")
    memory, tokens = (as_numpy(BE, x) for x in drawn(CFG, length=12))
    cotangents = [np.random.default_rng(1).normal(size=(2, n, 4)) for n in (7, 5)]
    results = []
    for be in (BE, torch_be):
        mask = be.asarray(tokens[3], "bool")

        def two_calls(keys, values, query, value, gate, be=be, mask=mask):
            state = be.init_state(CFG, Memory(keys, values), 2)
            arrays = (query, value, gate, mask)
            first, state, _ = be.apply(CFG, state, *(x[:, :7] for x in arrays))
            second, state, _ = be.apply(CFG, state, *(x[:, 7:] for x in arrays))
            return first, second, *state.memory

        weights = [be.asarray(x, "float64") for x in (*cotangents, *memory)]
        results.append(as_numpy(be, tuple(be.vjp(two_calls, native(be, (*memory, *tokens[:3])), weights))))
    for received, expected in zip(*results, strict=True):
        assert_close(received, expected, "float64", "gradient")


def compiled(function, *args, **options):
    """As users compile it: conftest.py makes all else compile fast instead."""
    as_usual = {"xla_backend_optimization_level": "3"}
    as_usual |= {"xla_cpu_use_fusion_emitters": "True"} if jax.__version_info__ < (0, 11) else {}
    return jax.jit(function, **options).lower(*args).compile(as_usual)


def big_inputs(length=8):
    memory, tokens = drawn(BIG, batch=1, length=length, dtype="float32")
    return BE.init_state(BIG, memory, 1), tokens


def copies_of_tables(text, rows=1):
    """Instructions of a compiled program that copy an array as large as the value tables."""
    shape = rf"f32\[({rows},{BIG.num_slots}|{rows * BIG.num_slots}),{BIG.value_dim}\]\S* copy"
    return [line.strip() for line in text.splitlines() if re.search(rf"= {shape}", line)]


def test_a_donated_state_is_rewritten_where_it_lies():
    state, tokens = big_inputs()
    call = functools.partial(read_on, BIG)
    program = compiled(call, state, tokens, donate_argnums=0)
    assert not copies_of_tables(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < TABLE / 4
    assert copies_of_tables(compiled(call, state, tokens).as_text()), "the control, which must copy"
    before = state.memory.values.unsafe_buffer_pointer()
    after, _ = program(state, tokens)
    assert after.memory.values.unsafe_buffer_pointer() == before
    assert state.memory.values.is_deleted()


def test_a_scan_over_chunks_stays_in_place():
    state, tokens = big_inputs(16)
    pieces = tuple(x.reshape(1, 4, 4, *x.shape[2:]).swapaxes(0, 1) for x in tokens)
    program = compiled(functools.partial(lax.scan, functools.partial(read_on, BIG)), state, pieces, donate_argnums=0)
    assert not copies_of_tables(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < TABLE / 4


def test_gradients_keep_touched_rows_and_no_tables():
    """Unless the table itself is differentiated, whose gradient is as large as it."""
    state, tokens = big_inputs()

    def loss(tables, tokens, state):
        state = state._replace(memory=tables)
        output, after, _ = BE.apply(BIG, state, *tokens)
        return jnp.square(output).sum(), after

    def of_tokens(state, tokens):
        function = lambda tokens: loss(state.memory, (*tokens, None), state)  # noqa: E731
        return jax.grad(function, has_aux=True)(tokens[:3])

    def of_tables(state, tokens):
        return jax.grad(loss, has_aux=True)(state.memory, tokens, state)

    rows, whole = (
        compiled(function, state, tokens, donate_argnums=0).memory_analysis() for function in (of_tokens, of_tables)
    )
    assert rows.temp_size_in_bytes < TABLE / 4
    assert whole.temp_size_in_bytes + whole.output_size_in_bytes > rows.output_size_in_bytes + TABLE, "the control"


def test_a_call_that_writes_nothing_returns_the_same_tables():
    memory, tokens = drawn(DROP)
    state = BE.init_state(DROP, memory, 2)
    for count, same in ((3, True), (4, False)):
        after = BE.apply(DROP, state, *cut(tokens, 0, count))[1]
        assert all((new is old) == same for new, old in zip(after.memory, state.memory))


@pytest.mark.parametrize("function", ["apply", "flush", "lookup", "chunk_update"])
def test_errors_are_raised_while_tracing_with_the_messages_of_the_reference(function):
    """Every bad array that test_errors.py knows, traced together with the good ones."""
    tried = 0
    for name, argument, bad, _ in test_errors.CALLS:
        arguments = test_errors.arguments(function) | {argument: bad}
        given = {key: native(BE, value) for key, value in arguments.items()}
        traced = {key: x for key, x in given.items() if all(isinstance(y, jax.Array) for y in jax.tree.leaves(x))}
        if name != function or argument not in traced:
            continue
        known = {key: x for key, x in given.items() if key not in traced}
        with pytest.raises(ValueError, match="Received: ") as raised:
            jax.eval_shape(functools.partial(getattr(BE, function), **known), **traced)
        assert test_errors.plain(str(raised.value)) == test_errors.plain(
            test_errors.message(reference, function, arguments)
        )
        tried += 1
    assert tried >= 20


def test_64_bits_must_be_allowed():
    code = """
import fwpkm
be = fwpkm.get_backend("jax")
try:
    be.asarray([1.0], "float64")
except ValueError as error:
    print(error)
print(be.asarray([1.0], "float32").dtype)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "jax.config.update('jax_enable_x64', True)" in done.stdout
    assert done.stdout.endswith("float32\n")


def many(cfg, twist, rng):
    """Tokens and tables for which a product of matrices alone would pick wrong sub-keys."""
    memory, tokens = draw_memory(rng, cfg, 2), draw_tokens(rng, cfg, 2, 7, left_out=["mask"])
    keys, query = memory.keys, tokens.query
    halves = query.reshape(2, 7, cfg.num_heads, 2, -1).copy()
    if twist == "equal keys":  # ties go to the lower id, whatever proposed it
        keys = np.broadcast_to(keys[..., :3, :][..., np.arange(cfg.num_subkeys) % 3, :], keys.shape)
    if twist in ("at keys", "near keys, far out"):
        at = keys[:, None, :, :, np.arange(7) * 5]  # [M, 1, H, 2, 7, d]
        halves = np.moveaxis(at[:, 0], 3, 1) + (1e-3 if twist == "at keys" else 3e-3) * rng.normal(size=halves.shape)
    shift = 30.0 if twist == "near keys, far out" else 0.0
    memory = Memory(keys + shift, memory.values)
    return memory, Tokens((halves + shift).reshape(query.shape), *list(tokens)[1:])


@pytest.mark.parametrize("score", ["idw", "dot_product"])
@pytest.mark.parametrize("num_subkeys", [33, 100])
def test_many_subkeys(num_subkeys, score):
    """More than are ranked at once: proposals of a product of matrices, and a full ranking where those are unsure."""
    cfg = FwPKMConfig(8, 3, 2, num_subkeys, 3, 4, 1, score=score)
    for twist in ("plain", "equal keys", "at keys", "near keys, far out"):
        # Equal keys move apart by rounding alone: all of their tokens read them before that.
        cfg = dataclasses.replace(cfg, chunk_size=7 if twist == "equal keys" else 4)
        memory, tokens = many(cfg, twist, np.random.default_rng(num_subkeys))
        case = Case(cfg, 0, "float64", frozenset(), 2, 7, memory, tokens)
        assert_same_reading(cfg, read(BE, case), read(reference, case), "float64")


@pytest.mark.parametrize("twist", ["at keys", "near keys, far out"])
def test_float32_picks_by_differences(twist):
    """Where a product of matrices in float32 has lost all digits that tell keys apart."""
    cfg = FwPKMConfig(8, 3, 1, 40, 3, 8, 1)
    memory, tokens = many(cfg, twist, np.random.default_rng(0))
    memory = Memory(*(x.astype(np.float32) for x in memory))
    query = tokens.query.astype(np.float32)
    received = BE.lookup(cfg, native(BE, memory), native(BE, query))
    expected = reference.lookup(cfg, Memory(*(x.astype(np.float64) for x in memory)), query.astype(np.float64))
    assert_same_bits(np.asarray(received.slots), expected.slots.astype(np.int32))
    assert_close(np.asarray(received.output), expected.output, "float32")


def test_a_reading_of_no_tokens_and_of_one_chunk_too_few():
    """update=False in blocks that do not divide the tokens."""
    cfg = FwPKMConfig(4, 3, 1, 4, 2, 3, 1)
    memory, tokens = drawn(cfg, length=8)
    state = BE.init_state(cfg, memory, 2)
    output, after, _ = BE.apply(cfg, state, *tokens, update=False)
    assert after is state
    plain, there = as_numpy(BE, tokens), np.asarray(tokens[3])[..., None]
    expected = reference.lookup(cfg, as_numpy(BE, memory), plain[0])
    assert_close(as_numpy(BE, output), np.where(there, expected.output, 0), "float64")
    gradient = jax.grad(lambda q: BE.apply(cfg, state, q, *tokens[1:], update=False)[0].sum())(tokens[0])
    by_lookup = jax.grad(lambda q: (BE.lookup(cfg, memory, q[:, 3:]).output * there[:, 3:]).sum())(tokens[0])
    assert_close(as_numpy(BE, gradient)[:, 3:], as_numpy(BE, by_lookup)[:, 3:], "float64", "gradient")
    assert not by_lookup[:, :3].any()


def test_streams_end_where_they_should():
    """Chunks of one token, lookahead 0: nothing is ever pending."""
    cfg = FwPKMConfig(4, 3, 1, 4, 2, 1, 0)
    memory, tokens = drawn(cfg, length=4)
    state = BE.init_state(cfg, memory, 2)
    plain = Tokens(*as_numpy(BE, tokens))
    received, _ = stream(BE, cfg, state, plain, [3, 1], flush=True)
    expected, _ = stream(reference, cfg, reference.init_state(cfg, as_numpy(BE, memory), 2), plain, flush=True)
    assert_same_reading(cfg, received, expected, "float64")


@pytest.mark.parametrize("rates", [None, np.linspace(0.1, 1, 8)], ids=["one rate", "a rate for each row"])
def test_the_derivative_of_a_step_is_that_of_jax(rates):
    """With decay and clipping, as the hand-written backward of a write uses it."""
    cfg = FwPKMConfig(6, 4, 2, 5, 3, learning_rate=0.7, weight_decay=0.1, grad_clip=0.5)
    rows, gradient, d_new = np.random.default_rng(0).normal(size=(3, 8, 4))
    expected = jax.vjp(functools.partial(rules.step, jnp, cfg, rates=rates), rows, gradient)[1](jnp.asarray(d_new))
    received = rules.step_vjp(jnp, cfg, d_new, np.abs(gradient) <= cfg.grad_clip, rates)
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
