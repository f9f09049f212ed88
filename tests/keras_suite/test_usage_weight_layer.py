"""The layer whose writes are weighed by use (SPEC.md §11): its state has one array more, wherever it goes."""

import json

import keras
import numpy as np
import pytest
import torch
from asserting import assert_close
from keras import ops
from keras_suite.layers import BACKEND, HIDDEN, SMALL, gradients, inputs, make, memory_model, native, numpy
from keras_suite.test_keras_layer import twin

import fwpkm
from fwpkm import FwPKMConfig
from fwpkm.backends.keras import FwPKM, as_state
from fwpkm.backends.keras.layout import NAMES

USED = {"usage_weight": 0.7, "weight_decay": 0.05}
LABELS = np.ones((4, 11, 1), "float32")


def check_same(one, other):
    for a, b in zip(numpy(list(one)), numpy(list(other)), strict=True):
        np.testing.assert_array_equal(a, b)


def state_of(model):
    return model.layers[1].state.arrays().values()


# One call


@pytest.mark.parametrize("options", [{"boundary": "wait", "grad_clip": 0.3}, {"memory_scope": "batch"}], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_layer_is_the_torch_layer(dtype, options, tmp_path):
    """Outputs, states and gradients, under a mask."""
    options, x, mask = options | USED, inputs(dtype=dtype), np.arange(11) >= np.array([2, 0, 0, 0])[:, None]
    layer = make(dtype=dtype, return_state=True, **options)
    torch_layer, torch_x = twin(layer, tmp_path, options), torch.from_numpy(x.copy()).requires_grad_()
    expected, expected_state = torch_layer(torch_x, mask=torch.from_numpy(mask))
    y, *state = layer(x, mask=mask)
    assert_close(numpy(y), expected.detach().numpy(), dtype)
    for name, actual, wanted in zip(NAMES, state, expected_state.arrays().values(), strict=True):
        assert keras.backend.standardize_dtype(actual.dtype) == str(wanted.dtype).removeprefix("torch.")
        assert_close(numpy(actual).astype("f8"), wanted.detach().numpy().astype("f8"), dtype, name=name)
    np.testing.assert_array_equal(numpy(state[-1]), expected_state.uses.numpy())
    cotangent = inputs(dtype=dtype)[..., ::-1].copy()
    (expected * torch.from_numpy(cotangent)).sum().backward()
    plain = make(dtype=dtype, **options)
    plain.set_weights(layer.get_weights())
    found = gradients(plain, x, cotangent, mask=mask)
    for name, p in [("x", torch_x), *torch_layer.named_parameters()]:
        assert_close(found[name.replace(".", "_")], p.grad.numpy(), dtype, "gradient", name=name)
    unweighed = make(dtype=dtype, return_state=True, **options | {"usage_weight": 0.0})
    assert not np.allclose(numpy(unweighed(x, mask=mask)[0])[:, -1], numpy(y)[:, -1])


def test_pieces_of_rows_at_different_positions_equal_the_whole():
    layer, x = make(dtype="float64", return_state=True, **USED), native(inputs(dtype="float64"))
    mask = np.arange(11) >= np.arange(4)[:, None]
    whole, *final = layer(x, mask=mask)
    state, pieces = None, []
    for start, stop in ((0, 3), (3, 4), (4, 9), (9, 11)):
        y, *state = layer(x[:, start:stop], mask=mask[:, start:stop], initial_state=state)
        pieces.append(numpy(y))
    assert_close(np.concatenate(pieces, axis=1), numpy(whole), "float64")
    assert_close(tuple(numpy(state[:2])), tuple(numpy(final[:2])), "float64")
    check_same(state[-1:], final[-1:])
    assert numpy(state[-1]).sum() == 8 * 4 * 4  # 8 chunks were written, of 4 tokens with 4 slots
    _, *after = layer(x, initial_state=state, update=False)
    check_same(after, state)


def test_each_packed_text_begins_without_uses():
    layer, x = make(dtype="float64", **USED), native(inputs(20, 1, "float64"))
    ids = np.array([[1] * 11 + [0] + [2] * 8])
    y = numpy(layer(x, segment_ids=ids))
    assert_close(y[:, :11], numpy(layer(x[:, :11])), "float64")
    assert_close(y[:, 12:], numpy(layer(x[:, 12:])), "float64")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_uses_have_the_dtype_of_the_tables(policy):
    layer = make(batch=4, dtype=policy, stateful=True, return_state=True, **USED)
    found = layer(native(inputs(dtype="float64" if policy == "float64" else "float32")))[-1]
    tables = "float64" if policy == "float64" else "float32"
    assert {keras.backend.standardize_dtype(x.dtype) for x in (found, layer.state.uses)} == {tables}
    assert numpy(found).sum() == 2 * 4 * 4 * 4


def test_token_by_token_equals_one_call():
    layer = make(dtype="float64", return_state=True, **USED)
    x, mask = native(inputs(dtype="float64")), np.random.default_rng(3).uniform(size=(4, 11)) < 0.8
    expected, *final = layer(x, mask=mask)
    y, *state = layer(x[:, :2], mask=mask[:, :2])
    outputs, before = [numpy(y)], numpy(state)

    def decode(x, mask, *state):
        return layer.decode(x, list(state), mask)

    if BACKEND == "tensorflow":
        import tensorflow

        decode = tensorflow.function(decode)
    begun = state = fwpkm.get_backend("keras").start_decoding(as_state(state)).arrays().values()
    for t in range(2, 11):
        y, *state = decode(x[:, t : t + 1], native(mask[:, t : t + 1]), *state)
        outputs.append(numpy(y))
    assert_close(np.concatenate(outputs, axis=1), numpy(expected), "float64")
    assert_close(tuple(numpy(state[:2])), tuple(numpy(final[:2])), "float64")
    check_same(state[-1:], final[-1:])
    if BACKEND == "tensorflow":
        check_same(begun, before)


def test_an_array_more_or_less_is_refused():
    used, plain, x = make(return_state=True, **USED), make(return_state=True), ops.convert_to_tensor(inputs())
    with_uses, without = used(x)[1:], plain(x)[1:]
    assert (len(with_uses), len(without)) == (8, 7)
    for call in (lambda s: used(x, initial_state=s), lambda s: used.decode(x[:, :1], s)):
        with pytest.raises(ValueError, match=r"state\.uses must be an array \[M, N\].*0\.7.*Received: \(\)"):
            call(without)
    for call in (lambda s: plain(x, initial_state=s), lambda s: plain.decode(x[:, :1], s)):
        with pytest.raises(ValueError, match=r"state\.uses must be \(\), since usage_weight is 0\.0"):
            call(with_uses)
    words = r"initial_state must be .*position, uses\], without the last where usage_weight is 0\. Received: 6 arrays"
    with pytest.raises(ValueError, match=words):
        used(x, initial_state=without[:6])


def test_shapes_and_masks_are_known_without_running():
    layer = FwPKM(**SMALL, **USED, return_state=True)
    outputs = layer(keras.Input((None, HIDDEN)))
    assert len(outputs) == 9
    assert tuple(outputs[-1].shape) == (None, 16)
    assert layer.compute_output_shape((4, 11, HIDDEN))[-1] == (4, 16)
    assert layer.compute_mask(None, "a mask") == ["a mask", *[None] * 8]
    shared = FwPKM(**SMALL, **USED, return_state=True, memory_scope="batch")(keras.Input((None, HIDDEN)))
    assert tuple(shared[-1].shape) == (1, 16)


def test_the_config_tells_it():
    layer = FwPKM(**SMALL, **USED)
    again = FwPKM.from_config(json.loads(json.dumps(layer.get_config())))
    assert again.config == layer.config == FwPKMConfig(**SMALL, **USED)
    older = layer.get_config()
    del older["usage_weight"]
    assert FwPKM.from_config(older).config.usage_weight == 0


# Stateful


def test_a_stateful_layer_goes_on_until_it_is_reset():
    layer, x = make(batch=4, stateful=True, return_state=True, **USED), inputs()
    whole, *final = make(return_state=True, **USED)(x)
    first, *_ = layer(x[:, :6])
    second, *state = layer(x[:, 6:])
    assert_close(np.concatenate([numpy(first), numpy(second)], axis=1), numpy(whole), "float32")
    check_same(layer.state.arrays().values(), state)
    check_same([layer.state.uses], final[-1:])
    layer(x, update=False)
    check_same([layer.state.uses], final[-1:])
    layer.reset_state()
    assert not numpy(layer.state.uses).any()
    check_same(layer(x)[:1], [whole])


def test_it_is_one_variable_more_where_it_weighs():
    """Which neither an optimizer nor ``get_weights`` sees."""
    for options, names in (({}, NAMES[:-1]), (USED, NAMES)):
        layer = make(batch=4, stateful=True, **options)
        held = [w.name for w in layer.non_trainable_variables if w.name.startswith("state_")]
        assert held == [f"state_{name.replace('.', '_')}" for name in names]
        assert len(layer.weights) == len(make(**options).variables) == len(make().variables)
    assert layer.state_uses.dtype == "float32"


@pytest.mark.parametrize("jit_compile", [False, "auto"] if BACKEND == "torch" else [False, True])
def test_a_compiled_model_reads_on(jit_compile, tmp_path):
    """Two batches are one text in pieces; what fit, predict and files keep of it are its uses too."""
    x = np.concatenate([inputs(), 2 * inputs()])
    model, whole = memory_model(4, stateful=True, **USED), memory_model(**USED)
    whole.set_weights(model.get_weights())
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    expected = numpy(whole(np.concatenate([x[:4], x[4:]], axis=1)))
    received = model.predict(x, batch_size=4, verbose=0)
    assert_close(np.concatenate([received[:4], received[4:]], axis=1), expected, "float32")
    uses = numpy(model.layers[1].state.uses)
    assert uses.sum() == 4 * 5 * 4 * 4
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    check_same(state_of(loaded), state_of(model))
    check_same([loaded(x[:4])], [model(x[:4])])
    model.fit(x, np.concatenate([LABELS] * 2), batch_size=4, verbose=0)
    assert numpy(model.layers[1].state.uses).sum() > uses.sum()


# Files


def test_weights_and_states_move_between_batch_sizes_and_weights_of_use(tmp_path):
    """The state comes along where it is that of the layer; else the layer begins anew."""
    first, path = memory_model(4, stateful=True, **USED), tmp_path / "model.weights.h5"
    first(inputs())
    first.save_weights(path)
    plain = {"weight_decay": USED["weight_decay"]}
    for rows, options, comes in (
        (4, USED, True),
        (2, USED, False),
        (4, USED | {"usage_weight": 0.5}, False),
        (4, plain, False),
        (None, USED, False),
    ):
        other = memory_model(rows, stateful=rows is not None, **options)
        other(3 * inputs(batch=rows or 4))
        other.load_weights(path)
        check_same(other.get_weights(), first.get_weights())
        if rows is not None:
            begun = other.layers[1].init_state(rows).arrays().values()
            check_same(state_of(other), state_of(first) if comes else begun)


def test_a_file_without_uses_makes_a_layer_begin_anew(tmp_path):
    """One of 0.2 too, which does not tell its configuration."""
    layer, older = make(batch=4, stateful=True, **USED), {}
    layer(inputs())
    plain = make(batch=4, stateful=True)
    plain(inputs())
    plain.save_own_variables(older)
    arrays = {name: numpy(x) if name != "config" else x for name, x in older.items()}
    del arrays["config"]
    layer.load_own_variables(arrays)
    assert not numpy(layer.state.uses).any()
    check_same([layer.state.memory.values[0]], [layer.memory_values])


def test_a_configuration_of_before_is_known_in_a_file():
    """It lacks the field, which then has its default: the state comes along."""
    layer, other, store = make(batch=4, stateful=True), make(batch=4, stateful=True), {}
    layer(inputs())
    layer.save_own_variables(store)
    fields = json.loads(bytes(store["config"]).decode())
    del fields["usage_weight"]
    arrays = {name: numpy(x) for name, x in store.items() if name != "config"}
    other.load_own_variables(arrays | {"config": np.frombuffer(json.dumps(fields).encode(), np.uint8)})
    check_same(other.state.arrays().values(), layer.state.arrays().values())


def test_states_go_to_the_torch_layer_in_files(tmp_path):
    layer, x = make(return_state=True, **USED), inputs()
    torch_layer = twin(layer, tmp_path, USED)
    _, *state = layer(x[:, :6])
    fwpkm.save_state(tmp_path / "state.safetensors", as_state(state), layer.config)
    loaded = fwpkm.load_state(tmp_path / "state.safetensors", layer.config, "torch")
    y, _ = torch_layer(torch.from_numpy(x[:, 6:]), loaded)
    mine = fwpkm.load_state(tmp_path / "state.safetensors", layer.config, "keras")
    assert_close(numpy(layer(x[:, 6:], initial_state=mine)[0]), y.detach().numpy(), "float32")
    check_same([mine.uses], state[-1:])
