"""What JAX's tools do to a layer: each is served with the right numbers, or refused in words (docs/tools.md)."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserting import assert_close
from jax import export

import fwpkm
from fwpkm.backends.jax import FwPKM, apply, decode, flush, pending, select

HIDDEN = 6
SMALL = {"key_dim": 4, "value_dim": 3, "num_subkeys": 4, "top_k": 2, "chunk_size": 4, "learning_rate": 0.1}
LAYER = FwPKM(HIDDEN, **SMALL)


def variables(dtype="float32"):
    """Weights that are large enough that every term matters."""
    rng = np.random.default_rng(0)
    drawn = LAYER.init(jax.random.key(0), dtype)
    return jax.tree.map(lambda x: x + 0.5 * jnp.asarray(rng.normal(size=x.shape), x.dtype), drawn)


def inputs(length=5, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, length, HIDDEN)), dtype)


# Dtypes


def test_float64_needs_the_64_bit_mode(tmp_path):
    """And is never rounded without a word: neither in a layer nor from a file."""
    with jax.enable_x64(True):
        wide = LAYER.init(jax.random.key(0), "float64")
        assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float64")}
        fwpkm.save(tmp_path / "wide", LAYER, wide)
        loaded = fwpkm.load(tmp_path / "wide", LAYER)
        assert all(a.dtype == b.dtype and (a == b).all() for a, b in zip(*map(jax.tree.leaves, (wide, loaded))))
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="dtype float64 needs JAX's 64-bit mode"):
            LAYER.init(jax.random.key(0), jnp.float64)
        with pytest.raises(ValueError, match=r"memory.keys.* would lose digits. Expected: float32, as the layer holds"):
            fwpkm.load(tmp_path / "wide", LAYER)


@pytest.mark.parametrize("x64", [False, True])
def test_a_layer_is_float32_unless_told_in_either_mode(x64):
    with jax.enable_x64(x64):
        drawn = LAYER.init(jax.random.key(0))
        assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}
        y, state = LAYER.apply(drawn, inputs())
        assert {y.dtype, state.memory.values.dtype, state.pending_gate.dtype} == {jnp.dtype("float32")}
        assert state.position.dtype == jnp.int32


def test_tables_that_a_cast_of_all_weights_rounds_are_refused():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables())
    with pytest.raises(ValueError, match=r"narrower ones have lost digits.*a tree\.map over a whole model"):
        LAYER.apply(narrow, inputs())


def test_a_layer_whose_apply_was_replaced_is_neither_saved_nor_filled(tmp_path):
    layer = FwPKM(HIDDEN, **SMALL)
    fwpkm.save(tmp_path / "plain", layer, variables())
    layer.apply = lambda variables, x: (2 * x, None)
    with pytest.raises(ValueError, match=r"layer must compute by its own apply.* a FwPKM whose apply was replaced"):
        fwpkm.save(tmp_path / "file", layer, variables())
    with pytest.raises(ValueError, match=r"del layer.apply brings it back"):
        fwpkm.load(tmp_path / "plain", layer)


# Checkpointing


def test_rematerialised_calls_have_the_same_gradients():
    """Through a returned state too."""
    drawn, x = variables("float64"), inputs(dtype="float64")

    def loss(params, remat):
        def read(params, x, state=None):
            return LAYER.apply({**drawn, "params": params}, x, state)

        read = jax.checkpoint(read) if remat else read
        y, state = read(params, x)
        return (y**2).sum() + (read(params, x, state)[0] ** 2).sum()

    gradients = [jax.jit(jax.grad(loss), static_argnums=1)(drawn["params"], remat) for remat in (False, True)]
    for expected, received in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert_close(np.asarray(received), np.asarray(expected), "float64", "gradient", "params")


# Exporting


def test_an_exported_program_reads_on_from_a_state_and_from_a_file(tmp_path):
    drawn, x = variables(), inputs()
    _, state = LAYER.apply(drawn, x)
    read_on = jax.jit(lambda drawn, x, state, mask: LAYER.apply(drawn, x, state, mask, return_trace=True))
    mask = jnp.ones((2, 5), bool).at[1, 2].set(False)
    (tmp_path / "layer").write_bytes(export.export(read_on)(drawn, x, state, mask).serialize())
    program = export.deserialize(bytearray((tmp_path / "layer").read_bytes()))
    received, expected = program.call(drawn, x, state, mask), read_on(drawn, x, state, mask)
    assert isinstance(received[1], fwpkm.State)
    for a, b in zip(*map(jax.tree.leaves, (received, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", ["b, 5, 6", "2, t, 6"])
def test_symbolic_sizes_are_refused(shape):
    x = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
    with pytest.raises(
        ValueError, match=r"x must have sizes that are numbers.* one program for each batch size and len"
    ):
        export.export(jax.jit(LAYER.apply))(variables(), x)


# Adapters


def test_variables_that_an_adapter_or_a_quantizer_has_changed_are_refused(tmp_path):
    drawn = variables()
    wider = copy.deepcopy(drawn)
    wider["params"]["query_proj"]["lora_a"] = jnp.ones((1, HIDDEN))
    rounded = copy.deepcopy(drawn)
    rounded["params"]["query_proj"]["weight"] = jnp.ones((4, HIDDEN), jnp.int8)
    for changed, message in (
        (wider, "variables must have the form"),
        (rounded, "query_proj.weight .* a floating dtype"),
    ):
        for call in (lambda: LAYER.apply(changed, inputs()), lambda: fwpkm.save(tmp_path / "file", LAYER, changed)):  # noqa: B023
            with pytest.raises(ValueError, match=message):
                call()
    assert not (tmp_path / "file").exists()


# Copies and donation


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal(copied):
    other = copied(LAYER)
    assert other == LAYER
    assert hash(other) == hash(LAYER)
    drawn = variables()
    for a, b in zip(*map(jax.tree.leaves, (drawn, copied(drawn))), strict=True):
        np.testing.assert_array_equal(a, b)
    state = copied(LAYER.init_state(drawn, 2))
    assert isinstance(state, fwpkm.State)
    assert isinstance(state.memory, fwpkm.Memory)


def test_a_state_from_the_initial_memory_is_apart_from_it():
    """Donated, it leaves the buffers of a layer, of one row too."""
    drawn = variables()
    state = LAYER.init_state(drawn, 1)
    LAYER.decode(drawn, inputs(1)[:1], state)
    assert state.memory.values.is_deleted()
    assert not any(x.is_deleted() for x in jax.tree.leaves(drawn))


def test_a_donated_state_that_is_used_again_is_named(tmp_path):
    drawn, x, cfg = variables(), inputs(1), LAYER.config
    state = LAYER.init_state(drawn, 2)
    LAYER.decode(drawn, x, state)
    query, value = jnp.ones((2, 1, 4)), jnp.ones((2, 1, 3))
    calls = [
        lambda: LAYER.apply(drawn, x, state),
        lambda: LAYER.decode(drawn, x, state),
        lambda: apply(cfg, state, query, value),
        lambda: decode(cfg, state, query, value),
        lambda: flush(cfg, state),
        lambda: pending(cfg, state),
        lambda: select(cfg, state, [0]),
        lambda: fwpkm.save_state(tmp_path / "state", state, cfg),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"donated to an earlier call .*: go on from the state that it returned"):
            call()
    assert not list(tmp_path.iterdir())


def test_an_average_of_variables_is_a_layer(tmp_path):
    first = variables()
    second = jax.tree.map(lambda x: x + 1, first)
    average = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, first, second)
    fwpkm.save(tmp_path / "average", LAYER, average)
    loaded = fwpkm.load(tmp_path / "average", LAYER)
    np.testing.assert_allclose(loaded["buffers"]["memory"].values, first["buffers"]["memory"].values + 0.25, rtol=1e-6)
