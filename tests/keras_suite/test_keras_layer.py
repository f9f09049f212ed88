"""The Keras layer against SPEC.md §7, the torch layer, and what Keras users expect of a layer."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import torch
from keras import ops
from keras_suite.layers import BACKEND, HIDDEN, SMALL, gradients, inputs, make, native, numpy

import fwpkm
from fwpkm import FwPKMConfig, agreement, config
from fwpkm.backends.keras import FwPKM, as_state
from fwpkm.backends.keras.layout import NAMES
from fwpkm.rules import zscore

FORWARD = agreement.BOUNDS["float32"].forward
STATE_SHAPES = [(4, 2, 2, 4, 2), (4, 16, 3), (4, 4, 8), (4, 4, 3), (4, 4), (4, 4), (4,)]


def twin(layer, tmp_path, options):
    """The torch layer with the same weights, by way of a file."""
    fwpkm.save(tmp_path / "layer.safetensors", layer)
    other = fwpkm.get_backend("torch").FwPKM(HIDDEN, **SMALL | options, dtype=getattr(torch, layer.variable_dtype))
    fwpkm.load(tmp_path / "layer.safetensors", other)
    return other


def error(actual, expected):
    return agreement.relative_error(numpy(actual), expected.detach().numpy())


@pytest.mark.parametrize(
    "options", [{"learn_memory": True}, {"gated": False, "score": "dot_product"}, {"value_norm": None}], ids=str
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_layer_is_the_torch_layer(dtype, options, tmp_path):
    """Which is what §7 says, as its own tests prove. Outputs, states and gradients."""
    bounds, layer, x = agreement.BOUNDS[dtype], make(dtype=dtype, return_state=True, **options), inputs(dtype=dtype)
    torch_layer, torch_x = twin(layer, tmp_path, options), torch.from_numpy(x.copy()).requires_grad_()
    expected, expected_state = torch_layer(torch_x)
    y, *state = layer(x)
    assert error(y, expected) < bounds.forward
    for actual, wanted in zip(state, expected_state.arrays().values(), strict=True):
        assert keras.backend.standardize_dtype(actual.dtype) == str(wanted.dtype).removeprefix("torch.")
        assert error(actual, wanted) < bounds.forward
    cotangent = inputs(dtype=dtype)[..., ::-1].copy()
    (expected * torch.from_numpy(cotangent)).sum().backward()
    plain = make(dtype=dtype, **options)
    plain.set_weights(layer.get_weights())
    found = gradients(plain, x, cotangent)
    wanted = {name.replace(".", "_"): p.grad.numpy() for name, p in [("x", torch_x), *torch_layer.named_parameters()]}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert agreement.relative_error(gradient, wanted[name]) < bounds.gradient, name


def test_files_go_to_the_torch_layer_and_back(tmp_path):
    layer = make()
    torch_layer = twin(layer, tmp_path, {})
    with torch.no_grad():
        torch_layer.value_proj.weight.mul_(2)
    fwpkm.save(tmp_path / "back.safetensors", torch_layer)
    assert fwpkm.load(tmp_path / "back.safetensors", layer) is None
    assert error(layer(inputs()), torch_layer(torch.from_numpy(inputs()))[0]) < FORWARD
    with pytest.raises(ValueError, match="learning_rate"):
        fwpkm.load(tmp_path / "back.safetensors", make(learning_rate=0.5))
    for call in (fwpkm.save, fwpkm.load):
        with pytest.raises(ValueError, match="the layer has no weights yet: build it first"):
            call(tmp_path / "back.safetensors", FwPKM(**SMALL))


def test_states_go_to_the_torch_layer_in_files(tmp_path):
    layer, x = make(return_state=True), inputs()
    torch_layer = twin(layer, tmp_path, {})
    _, *state = layer(x[:, :6])
    fwpkm.save_state(tmp_path / "state.safetensors", as_state(state), layer.config)
    y, _ = torch_layer(
        torch.from_numpy(x[:, 6:]), fwpkm.load_state(tmp_path / "state.safetensors", layer.config, "torch")
    )
    mine = fwpkm.load_state(tmp_path / "state.safetensors", layer.config, "keras")
    assert error(layer(x[:, 6:], initial_state=mine)[0], y) < FORWARD


def test_pieces_equal_the_whole():
    layer, x = make(return_state=True), inputs()
    whole, *final = layer(x)
    state, pieces = None, []
    for piece in np.split(x, [3, 4, 9], axis=1):
        y, *state = layer(piece, initial_state=state)
        pieces.append(numpy(y))
    assert agreement.relative_error(np.concatenate(pieces, axis=1), numpy(whole)) < FORWARD
    assert [tuple(array.shape) for array in state] == STATE_SHAPES
    for a, b in zip(numpy(state), numpy(final)):
        assert agreement.relative_error(a, b) < FORWARD
    frozen, *same = layer(x, initial_state=state, update=False)
    assert not np.allclose(numpy(frozen), numpy(whole))
    for a, b in zip(numpy(same), numpy(state)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(numpy(layer(x)[0]), numpy(whole))  # nothing leaks between calls


def test_a_mask_hides_padding_and_goes_on():
    layer, x = make(), inputs()
    mask = np.arange(11) >= np.array([2, 0, 0, 0])[:, None]  # in front: others in its chunk are written, and read later
    spoiled = np.where(mask[..., None], x, 100.0).astype("float32")
    np.testing.assert_array_equal(numpy(layer(spoiled, mask=mask))[mask], numpy(layer(x, mask=mask))[mask])
    assert layer.compute_mask(x, mask) is mask
    returning = make(return_state=True)
    assert returning.compute_mask(x, mask) == [mask, *[None] * len(STATE_SHAPES)]


def test_the_mask_of_an_embedding_arrives_also_beside_a_state():
    tokens = np.array([[3, 1, 2, 1, 4, 2, 0, 0, 3, 1, 0]] * 4)
    embedding, layer = keras.layers.Embedding(5, HIDDEN, mask_zero=True), make(return_state=True)
    x = embedding(tokens)
    y, *state = layer(x)
    expected, *_ = layer(ops.copy(x), mask=tokens != 0)
    np.testing.assert_array_equal(numpy(y), numpy(expected))
    np.testing.assert_array_equal(numpy(y._keras_mask), tokens != 0)
    beside, *_ = layer(x, initial_state=state)
    expected, *_ = layer(ops.copy(x), mask=tokens != 0, initial_state=state)
    np.testing.assert_array_equal(numpy(beside), numpy(expected))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_tables_stay_float32_under_any_policy(policy):
    layer, x = make(dtype=policy, return_state=True), inputs()
    y, *state = layer(x)
    dtypes = [keras.backend.standardize_dtype(array.dtype) for array in (y, *state)]
    assert dtypes == [layer.compute_dtype, *["float32"] * 5, "bool", "int32"]
    assert layer.memory_keys.dtype == layer.memory_values.dtype == "float32"
    assert layer.query_proj_weight.dtype == layer.variable_dtype
    assert np.isfinite(numpy(y)).all()
    again, *_ = layer(x[:, :2], initial_state=state)
    frozen, *_ = layer(x[:, :2], initial_state=[ops.cast(ops.cast(a, layer.compute_dtype), a.dtype) for a in state])
    assert not np.array_equal(numpy(again), numpy(frozen))  # a passed state is not rounded


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_the_initial_tables_are_not_rounded_on_their_way_into_a_state(policy):
    for options in ({}, {"stateful": True}):
        layer = make(batch=4, dtype=policy, return_state=True, **options)
        _, *state = layer(inputs(1))
        for table, weight in zip(as_state(state).memory, (layer.memory_keys, layer.memory_values)):
            np.testing.assert_array_equal(numpy(table), np.broadcast_to(numpy(weight), table.shape))


def test_a_token_that_is_not_finite_spoils_neither_others_nor_gradients(tmp_path):
    """It takes its position, and is nobody's partner: as in the torch layer."""
    layer, x = make(dtype="float64"), inputs(dtype="float64")
    x[0, 6], x[1, 0, 2] = np.inf, np.nan
    torch_layer, torch_x = twin(layer, tmp_path, {}), torch.from_numpy(x.copy()).requires_grad_()
    expected, _ = torch_layer(torch_x)
    y, live = numpy(layer(x)), np.isfinite(x).all(axis=-1)
    assert np.isnan(y[~live]).all()
    assert agreement.relative_error(y[live], expected.detach().numpy()[live]) < agreement.BOUNDS["float64"].forward
    cotangent = inputs(dtype="float64")
    torch.where(torch.from_numpy(live)[..., None], expected * torch.from_numpy(cotangent), 0).sum().backward()
    found = gradients(layer, x, cotangent)
    assert not found["x"][~live].any()
    for name, p in [("x", torch_x), *torch_layer.named_parameters()]:
        error = agreement.relative_error(found[name.replace(".", "_")], p.grad.numpy())
        assert error < agreement.BOUNDS["float64"].gradient, name


def test_initial_numbers():
    keras.utils.set_random_seed(0)
    layers = [FwPKM(key_dim=64, value_dim=48, num_subkeys=32) for _ in range(2)]
    for layer in layers:
        layer.build((None, None, 64))
    tensors, others = (layer.export_tensors() for layer in layers)
    assert 0.95 * 64**-0.5 < np.abs(tensors["memory.keys"]).max() <= 64**-0.5
    assert tensors["memory.values"].std() == pytest.approx(48**-0.5, rel=0.02)
    assert tensors["query_proj.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert all((x == 0).all() for name, x in tensors.items() if name.endswith("bias"))
    assert all((x == 1).all() for name, x in tensors.items() if "norm" in name)
    drawn = [name for name in tensors if name.endswith("proj.weight") or name.startswith("memory")]
    assert not any(np.array_equal(tensors[name], others[name]) for name in drawn)  # stacked layers differ
    assert [w.name for w in layers[0].non_trainable_weights] == ["memory_keys", "memory_values"]


def test_the_config_is_flat_and_makes_the_same_layer():
    options = {"gated": False, "value_norm": None, "return_state": True, "stateful": True, "chunk_size": 7}
    layer = FwPKM(**SMALL | options, name="store", dtype="mixed_bfloat16")
    again = FwPKM.from_config(json.loads(json.dumps(layer.get_config())))
    assert again.get_config() == layer.get_config()
    assert again.config == FwPKMConfig(**SMALL | {"chunk_size": 7})
    assert (again.name, again.dtype_policy.name, again.stateful) == ("store", "mixed_bfloat16", True)
    assert keras.saving.get_registered_object("fwpkm>FwPKM") is FwPKM


def test_shapes_are_known_without_running():
    layer = FwPKM(**SMALL, return_state=True)
    outputs = layer(keras.Input((None, HIDDEN)))
    unknown = [(None, None, HIDDEN), *((None, *shape[1:]) for shape in STATE_SHAPES)]
    assert [tuple(output.shape) for output in outputs] == unknown
    assert layer.compute_output_shape((None, None, HIDDEN)) == unknown
    assert [shape for shape in layer.compute_output_shape((4, 11, HIDDEN))] == [(4, 11, HIDDEN), *STATE_SHAPES]
    assert FwPKM(**SMALL).compute_output_shape((4, 11, HIDDEN)) == (4, 11, HIDDEN)
    _, *state = FwPKM(**SMALL, return_state=True, memory_scope="batch")(keras.Input((None, HIDDEN)))
    assert tuple(as_state(state).memory.keys.shape) == (1, 2, 2, 4, 2)


def test_a_constant_row_of_values_gives_zero():
    z = np.array([[0.1] * 7, [0.0] * 7, [1.0, 2, 3, 4, 5, 6, 7]], "float32")
    out = numpy(zscore(ops, ops.convert_to_tensor(z)))
    assert (out[:2] == 0).all()
    assert out[2] == pytest.approx((np.arange(7) - 3) / np.std(np.arange(7), ddof=1), rel=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("form", [list, as_state, numpy], ids=["list", "State", "NumPy"])
def test_a_state_is_not_rounded_on_its_way_into_a_layer(form, policy):
    """Not by Keras either, which makes float32 of NumPy's float64."""
    layer, wide = make(dtype=policy, return_state=True), make(dtype="float64", return_state=True)
    x, state = native(inputs()), form(wide(native(inputs(dtype="float64")))[1:])
    words = r"state must not hold float64 tables.*Received: float64 tables, and queries of "
    for call in (
        lambda: layer(x, initial_state=state),
        lambda: layer(x, None, None, state),
        lambda: layer.decode(x[:, :1], state),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    rounded = layer(x, initial_state=layer(x)[1:])[2]
    assert keras.backend.standardize_dtype(rounded.dtype) == "float32"


def test_a_state_that_a_model_of_ones_own_has_cast_is_refused():
    class Reader(keras.Model):
        def __init__(self, **options):
            super().__init__(dtype="mixed_bfloat16", **options)
            self.memory = make(return_state=True)

        def call(self, x, state):
            return self.memory(x, initial_state=state)

    x, state = native(inputs()), make(return_state=True)(inputs())[1:]
    with pytest.raises(ValueError, match=r"narrower ones.*in a model of your own.*Received: bfloat16"):
        Reader()(x, state=state)
    assert len(Reader(autocast=False)(x, state=state)) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_norm": "batch"}, "value_norm must be 'zscore' or None. Received: value_norm='batch'"),
        ({"value_dim": 1}, "value_dim must be at least 2"),
        ({"key_dim": 3}, "key_dim must be even"),
        *(
            ({name: "no"}, f"{name} must be True or False. Received: 'no'")
            for name in ("gated", "learn_memory", "return_state", "stateful")
        ),
        ({"learn_memory": True, "stateful": True}, "learn_memory must be False with stateful=True"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FwPKM(**options)


def test_arguments_are_chosen_when_the_layer_is_made():
    """Later they would say what the weights are not, or what a compiled function does not do."""
    layer, other = make(), make(learn_memory=True)
    for name in ("gated", "value_norm", "learn_memory", "return_state", "stateful"):
        with pytest.raises(AttributeError, match=rf"{name} is chosen when a layer is made: FwPKM\("):
            setattr(layer, name, None)
    assert layer.get_config()["learn_memory"] is layer.learn_memory is False
    other.set_weights(layer.get_weights())
    assert (numpy(other(inputs())) == numpy(layer(inputs()))).all()
    assert len(other.trainable_weights) == len(layer.trainable_weights) + 2


def test_a_call_updates_or_not():
    with pytest.raises(ValueError, match=r"update must be True or False\. Received: 'no'"):
        make()(inputs(), update="no")


@pytest.mark.parametrize("field", config.CHOICES)
def test_a_choice_that_is_not_implemented_is_refused(field, monkeypatch):
    """By the functions that the layer calls, on whichever framework."""
    monkeypatch.setitem(config.CHOICES, field, (*config.CHOICES[field], "novel"))
    layer = make(**{field: "novel"})
    with pytest.raises(ValueError, match=rf"{field}='novel' is not implemented by"):
        layer(inputs())


def test_a_field_that_the_layer_does_not_serve_must_be_at_its_default(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class WiderConfig(FwPKMConfig):
        forget: float = 0.0

    monkeypatch.setattr(fwpkm.validation, "FwPKMConfig", WiderConfig)
    layer = make()
    assert np.isfinite(numpy(layer(inputs()))).all()
    assert layer.get_config()["forget"] == 0.0
    with pytest.raises(ValueError, match=r"forget must be 0\.0: the Keras backend does not serve it.*forget=0\.5"):
        FwPKM(**SMALL, forget=0.5)


def test_wrong_inputs():
    layer = make()
    for x, message in (
        (np.zeros((2, 11, 5), "float32"), r"x must have shape \[B, T, hidden_size=6\]. Received: shape \(2, 11, 5\)"),
        (np.zeros((0, 11, 6), "float32"), r"x must have at least one row \(B >= 1\). Received: shape \(0, 11, 6\)"),
        (np.zeros((11, 6), "float32"), r"x must have shape \[B, T, hidden_size=6\]"),
        (np.zeros((0, 3, 6), "float32"), r"x must have at least one row \(B >= 1\)"),
        (np.zeros((2, 3, 6), "int32"), "x must have a floating dtype. Received: dtype int32"),
        (keras.Input((None, 5)), r"x must have shape \[B, T, hidden_size=6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x)
    with pytest.raises(ValueError, match=r"x must have shape \[B, T, hidden_size\] with a known hidden_size"):
        FwPKM(**SMALL).build((None, 6))
    with pytest.raises(ValueError, match=r"initial_state must be a fwpkm.State or .*memory.keys.* Received: 2 arrays"):
        layer(inputs(), initial_state=[inputs(), inputs()])
    with pytest.raises(ValueError, match="reset_state needs a layer with stateful=True"):
        layer.reset_state()
    with pytest.raises(ValueError, match="mask must have shape"):
        layer(inputs(), mask=np.ones((4, 10), bool))


def test_a_state_is_passed_by_name_and_a_list_is_no_state():
    layer, x = make(return_state=True), inputs()
    state = layer(x)[1:]
    for passed in (state, as_state(state)):
        with pytest.raises(
            ValueError, match=r"mask, the second argument, .*initial_state=\.\.\. Received: (list|State)"
        ):
            layer(x, passed)
    with pytest.raises(ValueError, match=r"as_state makes one of the list that a Keras layer returns\. Received: list"):
        fwpkm.get_backend("keras").flush(layer.config, state)


# stateful


def test_a_stateful_layer_goes_on_until_it_is_reset():
    layer, x = make(batch=4, stateful=True, return_state=True), inputs()
    stateless = make(return_state=True)
    whole, *final = stateless(x)
    first, *_ = layer(x[:, :6])
    second, *state = layer(x[:, 6:])
    outputs = np.concatenate([numpy(first), numpy(second)], axis=1)
    assert agreement.relative_error(outputs, numpy(whole)) < FORWARD
    for actual, held, expected in zip(state, layer.state.arrays().values(), final, strict=True):
        assert agreement.relative_error(numpy(actual), numpy(expected)) < FORWARD
        np.testing.assert_array_equal(numpy(held), numpy(actual))
    layer(x, update=False)
    np.testing.assert_array_equal(numpy(layer.state.memory.values), numpy(as_state(state).memory.values))
    layer.reset_state()
    np.testing.assert_array_equal(numpy(layer(x)[0]), numpy(whole))


def test_the_state_is_float32_variables_that_no_optimizer_sees():
    layer = make(batch=4, stateful=True, dtype="mixed_bfloat16")
    held = {w.name: w for w in layer.non_trainable_variables if w.name.startswith("state_")}
    assert list(held) == [f"state_{name.replace('.', '_')}" for name in NAMES[:-1]]
    assert [w.dtype for w in held.values()] == [*["float32"] * 5, "bool", "int32"]
    assert not any(w.name.startswith(("state_", "memory_")) for w in layer.trainable_variables)


def test_a_stateful_layer_keeps_no_gradient_between_batches():
    layer, x = make(batch=4, stateful=True), inputs()
    first = gradients(layer, x, inputs())
    layer.reset_state()
    layer(x)
    second = gradients(layer, x, inputs())
    assert all(np.isfinite(gradient).all() for gradient in second.values())
    assert not np.array_equal(first["query_proj_weight"], second["query_proj_weight"])


def test_a_stateful_layer_needs_whole_batches():
    with pytest.raises(ValueError, match="a stateful layer must know its batch size"):
        FwPKM(**SMALL, stateful=True)(keras.Input((None, HIDDEN)))
    with pytest.raises(ValueError, match=r"x must have B=4 rows.*Received: shape \(3, 11, 6\)"):
        make(batch=4, stateful=True)(inputs(batch=3))


def test_files_reset_a_stateful_layer(tmp_path):
    layer, other, x = make(batch=4, stateful=True), make(), inputs()
    fwpkm.save(tmp_path / "layer.safetensors", other)
    layer(x)
    fwpkm.load(tmp_path / "layer.safetensors", layer)
    np.testing.assert_array_equal(numpy(layer(x)), numpy(other(x)))


def test_the_backend_of_its_arrays_is_known():
    array = fwpkm.get_backend("keras").asarray(np.zeros(3), "float32")
    expected = {"tensorflow": "keras"}.get(BACKEND, BACKEND)
    assert fwpkm.registry.backend_of(array) is fwpkm.get_backend(expected)
