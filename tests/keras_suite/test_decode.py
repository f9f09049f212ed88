"""``layer.decode`` on each framework: token by token what one call gives, traced once (SPEC.md §5)."""

import keras
import numpy as np
import pytest
from asserting import assert_close
from keras import ops
from keras_suite.layers import BACKEND, HIDDEN, SMALL, inputs, make, native, numpy

import fwpkm
from fwpkm import agreement
from fwpkm.backends.keras import as_state


def compiled(layer):
    """A step as users run it, and the list to which each trace of it adds."""
    traces = []

    def step(x, mask, *state):
        traces.append(x.shape)
        return layer.decode(x, list(state), mask)

    if BACKEND == "tensorflow":
        import tensorflow

        return tensorflow.function(step), traces
    if BACKEND == "jax":
        import jax

        return jax.jit(step, donate_argnums=range(2, 9)), traces
    return step, traces


def test_token_by_token_equals_one_call():
    """From rows at different positions, over chunk ends, with masks and a token that is not finite."""
    layer = make(dtype="float64", return_state=True, boundary="wait", lookahead=2, write_scale="normalized")
    x = inputs(length=16, dtype="float64")
    mask = np.random.default_rng(3).uniform(size=x.shape[:2]) < 0.8
    mask[:, :4] = np.arange(4) < np.arange(4)[:, None]
    x[1, 7, 0], mask[1, 7] = np.nan, True
    expected = numpy(layer(native(x), mask=mask))
    step, traces = compiled(layer)
    y, *state = layer(native(x[:, :4]), mask=mask[:, :4])
    assert numpy(as_state(state).position).tolist() == [0, 1, 2, 3]
    outputs = [y]
    for t in range(4, 16):
        y, *state = step(native(x[:, t : t + 1]), native(mask[:, t : t + 1]), *state)
        outputs.append(y)
    assert len(traces) == (12 if BACKEND == "torch" else 1)
    received = [np.concatenate(numpy(outputs), axis=1), *numpy(state)]
    assert np.isnan(received[0][1, 7]).all()
    for a, b in zip(received, expected, strict=True):
        assert agreement.relative_error(a.astype("float64"), b.astype("float64")) < agreement.BOUNDS["float64"].forward


def test_a_state_is_used_up_and_a_copy_of_it_is_not():
    """On torch the tables of what decode returned are overwritten, on jax those of any; tensorflow leaves them."""
    layer, x = make(return_state=True), ops.convert_to_tensor(inputs(length=4))
    state = as_state(layer(x[:, :3])[1:])
    before, copy = numpy(state), fwpkm.get_backend("keras").start_decoding(state)
    first = layer.decode(x[:, 3:], copy)
    for a, b in zip(keras.tree.flatten(numpy(state)), keras.tree.flatten(before), strict=True):
        np.testing.assert_array_equal(a, b)
    second = layer.decode(x[:, 3:], state)
    for a, b in zip(numpy(first), numpy(second), strict=True):
        np.testing.assert_array_equal(a, b)
    if BACKEND == "torch":
        assert first[2].data_ptr() == copy.memory.values.data_ptr()  # which start_decoding copied already
        assert second[2].data_ptr() != state.memory.values.data_ptr()
        assert layer.decode(x[:, 3:], second[1:])[2].data_ptr() == second[2].data_ptr()
        assert not second[0].requires_grad
    elif BACKEND == "jax":
        assert state.memory.values.is_deleted()


@pytest.mark.parametrize("begun", ["by a call", "by decode"])
@pytest.mark.parametrize("options", [{}, {"update": False}], ids=str)
def test_decoding_leaves_a_state_that_shares_its_tables(options, begun):
    """A call that completes no chunk returns the tables that it was given: both states are read on from."""
    layer, x = make(return_state=True), ops.convert_to_tensor(inputs(length=8))
    _, *older = layer(x[:, :5])
    if begun == "by decode":
        _, *older = layer.decode(x[:, 5:6], older)
    _, *newer = layer(x[:, 6:7], initial_state=older, **options)
    kept = [numpy(older), numpy(newer)]

    def read(state):
        for t in range(6):
            _, *state = layer.decode(x[:, t : t + 1], state)

    read(newer)
    if BACKEND == "jax":
        with pytest.raises((ValueError, RuntimeError), match="deleted"):
            layer(x, initial_state=older)
        return
    for a, b in zip(numpy(older), kept[0], strict=True):
        np.testing.assert_array_equal(a, b)
    _, *newer = layer(x[:, 6:7], initial_state=older, **options)
    read(older)
    for a, b in zip(numpy(newer), kept[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_mask_that_x_carries_rests_rows_as_in_a_call():
    """Through two memories joined by ``Add``, compiled too: token 0 of a ``mask_zero`` embedding is not there."""
    embed, add = keras.layers.Embedding(5, HIDDEN, mask_zero=True, dtype="float64"), keras.layers.Add(dtype="float64")
    layers = [make(return_state=True, dtype="float64") for _ in range(2)]
    tokens = np.array([[1, 2, 3, 4, 1, 2, 3], [1, 2, 0, 4, 1, 0, 3], [0, 1, 2, 3, 0, 4, 0], [0, 0, 0, 1, 2, 3, 4]])

    def read(token, *states):
        x, after = embed(token), []
        for layer, state in zip(layers, states or [None, None]):
            y, *state = layer.decode(x, state) if states else layer(x)
            x = add([x, y])
            after.append(state)
        return x, *after

    step = read
    if BACKEND == "tensorflow":
        import tensorflow

        step = tensorflow.function(read)
    elif BACKEND == "jax":
        import jax

        step = jax.jit(read, donate_argnums=(1, 2))
    _, *states = read(ops.convert_to_tensor(tokens[:, :1]))
    outputs = []
    for t in range(1, 7):
        x, *states = step(ops.convert_to_tensor(tokens[:, t : t + 1]), *states)
        outputs.append(numpy(x))
    expected, *whole = read(ops.convert_to_tensor(tokens))
    assert_close(np.concatenate(outputs, axis=1), numpy(expected)[:, 1:], "float64")
    for received, wanted in zip(states, whole):
        for a, b in zip(numpy(received), numpy(wanted), strict=True):
            assert_close(a.astype("float64"), b.astype("float64"), "float64")
        assert numpy(as_state(received).position).tolist() == (tokens != 0).sum(axis=1).tolist()


def test_a_layer_that_is_rematerialised_decodes():
    with keras.RematScope(mode="full"):
        layer = type(make())(**SMALL, return_state=True)
    _, *state = layer(inputs(length=3))
    y, *state = layer.decode(inputs(length=4)[:, 3:], state)
    plain = make(return_state=True)
    plain.set_weights(layer.get_weights())
    assert_close(numpy(y), numpy(plain(inputs(length=4))[0])[:, 3:], "float32")


def test_what_does_not_fit_is_refused():
    layer, x = make(return_state=True), inputs(length=3)
    state = layer(x)[1:]
    with pytest.raises(ValueError, match=r"x must .* Received: shape \(4, 3, 6\)"):
        layer.decode(x, state)
    with pytest.raises(
        ValueError, match=r"^state must be a fwpkm.State or the list of its arrays .* Received: 3 arrays"
    ):
        layer.decode(x[:, :1], state[:3])
    with pytest.raises(ValueError, match="mask must have dtype bool"):
        layer.decode(x[:, :1], state, np.ones((4, 1), "float32"))
    with pytest.raises(ValueError, match="build it first"):
        type(layer)().decode(np.ones((1, 1, HIDDEN), "float32"), state)
