"""What Keras's tools do to a layer: each is served with the right numbers, or refused in words (docs/tools.md)."""

import copy
import pickle

import keras
import numpy as np
import pytest
from asserting import assert_close
from keras import ops
from keras_suite.layers import BACKEND, HIDDEN, SMALL, inputs, make, memory_model, native, numpy

import fwpkm
from fwpkm.backends.keras import FwPKM

LABELS = np.ones((4, 11, 1), "float32")


def same(received, expected):
    assert_close(numpy(received), numpy(expected), "float32")


# Dtypes


@pytest.mark.parametrize(
    ("policy", "default", "tables"),
    [("float64", False, "float64"), ("bfloat16", False, "float32"), ("mixed_float16", True, "float32")],
)
def test_tables_are_float32_or_float64_whatever_the_policy(policy, default, tables):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy if default else "float32")
    try:
        layer = FwPKM(**SMALL, return_state=True, **({} if default else {"dtype": policy}))
        y, *state = layer(native(inputs(dtype=layer.compute_dtype if layer.compute_dtype == "float64" else "float32")))
    finally:
        keras.config.set_dtype_policy(before)
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    found = [layer.memory_keys, layer.memory_values, *state[:5]]
    assert {keras.backend.standardize_dtype(x.dtype) for x in found} - {"bool"} == {tables}


def test_floatx_is_the_dtype_of_a_layer_that_names_it():
    keras.config.set_floatx("float64")
    try:
        assert make(dtype=keras.config.floatx()).table_dtype() == "float64"
    finally:
        keras.config.set_floatx("float32")


def test_float64_on_a_jax_of_32_bits_is_refused():
    if BACKEND == "jax":
        import jax

        with jax.enable_x64(False), pytest.raises(ValueError, match="dtype float64 needs JAX's 64-bit mode"):
            make(dtype="float64")
    assert make(dtype="float64").table_dtype() == "float64"


def test_a_layer_whose_call_was_replaced_is_neither_saved_nor_filled(tmp_path):
    layer = make()
    fwpkm.save(tmp_path / "plain", layer)
    layer.call = lambda x: 2 * x
    with pytest.raises(ValueError, match=r"layer must compute by its own call.* a FwPKM whose call was replaced"):
        fwpkm.save(tmp_path / "file", layer)
    with pytest.raises(ValueError, match=r"del layer.call brings it back"):
        fwpkm.load(tmp_path / "plain", layer)
    del layer.call
    fwpkm.load(tmp_path / "plain", layer)


def test_a_file_in_float64_is_not_rounded_into_float32(tmp_path):
    fwpkm.save(tmp_path / "wide", make(dtype="float64"))
    layer = make()
    before = numpy(layer.weights)
    with pytest.raises(ValueError, match=r"memory.keys.* would lose digits. Expected: float32, as the layer holds"):
        fwpkm.load(tmp_path / "wide", layer)
    for a, b in zip(before, numpy(layer.weights)):
        np.testing.assert_array_equal(a, b)


# Rematerialisation


def test_a_rematerialised_layer_trains_as_it_would_without(monkeypatch):
    """``list_of_layers``: in mode "full" Keras on tensorflow cannot run its own functional models."""
    mask, losses, calls = np.ones((4, 11), bool), [], []
    mask[1, 2:5] = False
    wrapped = FwPKM.rematerialized_call
    monkeypatch.setattr(FwPKM, "rematerialized_call", lambda *a, **k: calls.append(1) or wrapped(*a, **k))
    for names in ([], ["memory"]):
        keras.utils.set_random_seed(1)
        x, there = keras.Input((None, HIDDEN)), keras.Input((None,), dtype="bool")
        with keras.RematScope(mode="list_of_layers", layer_names=names):
            y = FwPKM(**SMALL | {"learning_rate": 0.1}, name="memory")(x, mask=there)
        model = keras.Model([x, there], keras.layers.Dense(1)(y))
        model.compile("sgd", "mse")
        losses.append(model.fit([inputs(), mask], LABELS, epochs=3, verbose=0).history["loss"])
    assert calls
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[0][0] != losses[0][1]


def test_what_cannot_be_rematerialised_is_refused():
    with keras.RematScope(mode="full"):
        stateful, reading_on = FwPKM(**SMALL, stateful=True), FwPKM(**SMALL, return_state=True)
    with pytest.raises(ValueError, match=r"RematScope computes a layer twice.*: make this layer outside of the scope"):
        stateful(inputs())
    _, *state = reading_on(inputs())
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match=r"RematScope .* Received: initial_state given"):
            reading_on(inputs(), initial_state=state)
    else:
        plain = make(return_state=True)
        plain.set_weights(reading_on.get_weights())
        same(reading_on(inputs(), initial_state=state)[0], plain(inputs(), initial_state=state)[0])


# Adapters and quantization


def test_the_layer_holds_no_dense_layers_and_wrappers_say_so():
    layer = make()
    assert not hasattr(layer, "enable_lora")
    with pytest.raises(NotImplementedError, match="does not have a `quantize` method"):
        layer.quantize("int8")
    with pytest.raises(NotImplementedError, match="_int8_call"):
        make(dtype="int8_from_float32")(inputs())
    with pytest.raises(ValueError, match="no attribute 'kernel'"):
        keras.layers.SpectralNormalization(FwPKM(**SMALL))(inputs())
    with pytest.raises(TypeError, match=r"no argument 'go_backwards' in Keras: it reads forwards\. In place of Bidir"):
        keras.layers.Bidirectional(FwPKM(**SMALL))


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
def test_a_quantized_model_leaves_the_layer_as_it_is():
    model = memory_model()
    layer = model.layers[1]
    expected = layer(inputs())
    model.quantize("int8")
    assert model.layers[2].dtype_policy.name.startswith("int8")
    same(layer(inputs()), expected)


def test_each_time_step_of_a_time_distributed_layer_is_a_call():
    layer, x = FwPKM(**SMALL), inputs()
    together = keras.layers.TimeDistributed(layer)(np.stack([x, 2 * x], axis=1))
    same(together[:, 1], layer(2 * x))


# Exporting


@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter:DeprecationWarning")
def test_an_exported_model_is_the_model(tmp_path):
    model, longer = memory_model(), inputs(length=23, batch=3)
    if BACKEND == "tensorflow":
        model.export(tmp_path / "exported", verbose=False)
        loaded = _saved_model(tmp_path / "exported")
        for x in (inputs(), longer):
            same(loaded.serve(x), model(x))
    elif BACKEND == "torch":
        import torch

        sizes = {0: torch.export.Dim("b"), 1: torch.export.Dim("t")}
        model.export(str(tmp_path / "exported.pt2"), format="torch", verbose=False, dynamic_shapes=sizes)
        loaded = torch.export.load(tmp_path / "exported.pt2").module()
        for x in (inputs(), longer):
            same(loaded(native(x)), model(x))
    else:
        for refused in (model, memory_model(batch_size=4, stateful=True)):  # Keras forgets the size of the batch
            with pytest.raises(ValueError, match=r"x must have sizes that are numbers.*input_signature="):
                refused.export(tmp_path / "exported", verbose=False)
        from jax import export, jit

        frozen = [
            [weight.value for weight in kind] for kind in (model.trainable_variables, model.non_trainable_variables)
        ]
        program = export.export(jit(lambda x: model.stateless_call(*frozen, x)[0]))(inputs())
        same(export.deserialize(program.serialize()).call(inputs()), model(inputs()))


def test_an_exported_stateful_model_goes_on_or_is_refused(tmp_path):
    model = memory_model(batch_size=4, stateful=True)
    signature = [keras.InputSpec(shape=(4, 11, HIDDEN), dtype="float32")]
    if BACKEND == "tensorflow":
        model.export(tmp_path / "exported", verbose=False, input_signature=signature)
        loaded = _saved_model(tmp_path / "exported")
        model.layers[1].reset_state()
        for _ in range(3):
            same(loaded.serve(inputs()), model(inputs()))
    elif BACKEND == "torch":
        with pytest.raises(RuntimeError, match=r"stateful must be False in a program of torch.export"):
            model.export(str(tmp_path / "x.pt2"), format="torch", verbose=False, input_signature=signature)


@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter:DeprecationWarning")
@pytest.mark.parametrize("stateful", [False, True])
def test_jax_exports_fixed_sizes_to_a_tensorflow_that_can_read_them(tmp_path, stateful):
    """TensorFlow 2.21 reads what JAX up to 0.10.0 writes, and not the top-k of 0.10.2 (docs/tools.md)."""
    if BACKEND != "jax":
        return
    import jax
    import tensorflow

    model = memory_model(batch_size=4, stateful=stateful)
    signature = [keras.InputSpec(shape=(4, 11, HIDDEN), dtype="float32")]
    model.export(tmp_path / "exported", verbose=False, input_signature=signature)
    loaded = _saved_model(tmp_path / "exported")
    if jax.__version_info__ > (0, 10, 0):
        with pytest.raises(tensorflow.errors.InvalidArgumentError, match="Cannot deserialize computation"):
            loaded.serve(inputs())
        return
    for _ in range(3 if stateful else 1):
        same(loaded.serve(inputs()), model(inputs()))


def _saved_model(path):
    import tensorflow

    return tensorflow.saved_model.load(path)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_a_saved_model_keeps_its_dtypes_and_state(tmp_path, policy):
    model = memory_model(batch_size=4, stateful=True, dtype=policy)
    x = native(inputs(dtype="float64" if policy == "float64" else "float32"))
    model(x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[1].table_dtype() == model.layers[1].table_dtype()
    same(loaded(x), model(x))


# Copies


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), keras.models.clone_model]
)
def test_copies_of_a_model_share_no_state(copied):
    model = memory_model(batch_size=4, stateful=True)
    model(inputs())
    before = numpy(model.layers[1].state.memory.values)
    copied(model)(2 * inputs())
    np.testing.assert_array_equal(numpy(model.layers[1].state.memory.values), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_layer_are_equal_and_share_nothing(copied):
    layer = make()
    other = copied(layer)
    same(other(inputs()), layer(inputs()))
    other.memory_values.assign(0 * other.memory_values)
    assert ops.convert_to_numpy(layer.memory_values).any()


def test_averages_of_weights_by_an_optimizer():
    """It averages what is trained, and leaves the initial memory and the state alone."""
    model = memory_model(batch_size=4, stateful=True)
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=None)
    model.compile(optimizer, "mse")
    layer = model.layers[1]
    table, weights = numpy(layer.memory_values), []
    for _ in range(2):
        model.train_on_batch(inputs(), LABELS)
        weights.append(numpy(layer.value_proj_weight))
    state = numpy(layer.state.memory.values)
    optimizer.finalize_variable_values(model.trainable_variables)
    assert not np.array_equal(*weights)
    np.testing.assert_allclose(numpy(layer.value_proj_weight), sum(weights) / 2, rtol=1e-5)
    np.testing.assert_array_equal(numpy(layer.memory_values), table)
    np.testing.assert_array_equal(numpy(layer.state.memory.values), state)
