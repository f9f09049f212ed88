"""Models: compiled, trained, saved and loaded, with stateful layers and the callback that resets them."""

import keras
import numpy as np
import pytest
from keras_suite.layers import BACKEND, HIDDEN, SMALL, inputs, memory_model, numpy

from fwpkm import agreement
from fwpkm.backends.keras import FwPKM, ResetState

# torch.compile takes minutes for a model on a slow machine: "auto" is eager there. Measured in docs/guide.md.
JIT = [False, "auto"] if BACKEND == "torch" else [False, True]
X = inputs(batch=8)
TARGET = X[..., :1]


@pytest.mark.parametrize("jit_compile", JIT)
def test_fit_evaluate_predict(jit_compile, tmp_path):
    model = memory_model()
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
    before = numpy(model.layers[1].memory_values)
    losses = model.fit(X, TARGET, batch_size=4, epochs=3, verbose=0, shuffle=False).history["loss"]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(numpy(model.layers[1].memory_values), before)
    prediction = model.predict(X, batch_size=4, verbose=0)
    assert prediction.shape == (8, 11, 1)
    assert model.evaluate(X, TARGET, batch_size=4, verbose=0) == pytest.approx(np.square(prediction - TARGET).mean())
    assert agreement.relative_error(prediction, numpy(model(X))) < agreement.BOUNDS["float32"].forward
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(X)), numpy(model(X)))


def test_a_stateful_model_reads_on_and_the_callback_resets_it(tmp_path):
    """With a learning rate of 0 every epoch is the same once it is reset; the batches are one text in pieces."""
    inner = memory_model(batch_size=4, stateful=True)
    x = keras.Input((None, HIDDEN), batch_size=4)
    model = keras.Model(x, inner(x))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=JIT[-1])
    layer = inner.layers[1]
    whole = memory_model()
    whole.set_weights(weights_of(inner))
    expected = numpy(whole(np.concatenate([X[:4], X[4:]], axis=1)))
    prediction = model.predict(X, batch_size=4, verbose=0)
    pieces = np.concatenate([prediction[:4], prediction[4:]], axis=1)
    assert agreement.relative_error(pieces, expected) < agreement.BOUNDS["float32"].forward
    assert (numpy(layer.state.position) == 22).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(X[:4])), numpy(model(X[:4])))

    settings = {"batch_size": 4, "epochs": 2, "verbose": 0, "shuffle": False}
    validation = {"validation_data": (X, TARGET), "validation_batch_size": 4}
    history = model.fit(X, TARGET, **settings, **validation, callbacks=[ResetState()]).history
    loss = np.square(np.concatenate([expected[:, :11], expected[:, 11:]]) - TARGET).mean()
    assert history["loss"] == pytest.approx([loss] * 2, rel=1e-4)
    assert history["val_loss"] == pytest.approx([loss] * 2, rel=1e-4)
    with pytest.raises(Exception, match=r"B=4 rows|needs_4_rows"):
        model.predict(X[:3], batch_size=4, verbose=0)


def test_a_state_of_another_configuration_is_left_in_its_file(tmp_path):
    """As one of another batch size: the layer begins anew. Before, files did not tell the configuration."""
    model, path = memory_model(batch_size=4, stateful=True), tmp_path / "model.weights.h5"
    model(X[:4, :6])
    model.save_weights(path)
    same, other = (memory_model(batch_size=4, stateful=True, **options) for options in ({}, {"temperature": 2.0}))
    for loaded, position in ((same, 6), (other, 0)):
        loaded(X[:4, :5])
        loaded.load_weights(path)
        assert numpy(loaded.layers[1].state.position).tolist() == [position] * 4
    np.testing.assert_array_equal(numpy(same(X[:4])), numpy(model(X[:4])))
    layer, arrays = model.layers[1], {}
    layer.save_own_variables(arrays)
    del arrays["config"]  # as 0.2 wrote it
    other.layers[1].load_own_variables({name: numpy(x) for name, x in arrays.items()})
    assert numpy(other.layers[1].state.position).tolist() == [17] * 4


def test_a_batch_that_is_refused_leaves_the_state_as_it_was():
    """On jax Keras takes the values of every variable away where a batch fails, as it does with its own layers."""
    if BACKEND == "jax":
        return
    model = memory_model(batch_size=4, stateful=True)
    model.compile(jit_compile=False)
    model.predict(X, batch_size=4, verbose=0)
    before = [numpy(x).copy() for x in model.layers[1].state.arrays().values()]
    with pytest.raises(Exception, match=r"B=4 rows|needs_4_rows"):
        model.predict(X[:3], batch_size=4, verbose=0)
    for a, b in zip(before, model.layers[1].state.arrays().values(), strict=True):
        np.testing.assert_array_equal(a, numpy(b))


def weights_of(inner):
    return [numpy(w) for w in inner.weights if not w.name.startswith("state_")]


def test_a_subclassed_model_over_an_embedding():
    class Reader(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = keras.layers.Embedding(5, HIDDEN, mask_zero=True)
            self.memories = [FwPKM(**SMALL), FwPKM(**SMALL | {"chunk_size": 3})]
            self.head = keras.layers.Dense(5, activation="softmax")

        def call(self, tokens):
            x = self.embedding(tokens)
            for memory in self.memories:
                x = x + memory(x)
            return self.head(x)

    tokens = np.array([[3, 1, 2, 1, 4, 2, 0, 0, 0, 0, 0]] * 4)
    model = Reader()
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=JIT[0])
    assert np.isfinite(model.fit(tokens, tokens, verbose=0).history["loss"]).all()
    first, second = (numpy(memory.memory_values) for memory in model.memories)
    assert not np.array_equal(first, second)


def test_packed_texts_in_a_model(tmp_path):
    """Batch and time are unknown while it is traced; compiled, trained and loaded it is what it is eagerly."""
    keras.utils.set_random_seed(1)
    tokens, ids = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(5, HIDDEN, mask_zero=True)(tokens)
    memory = FwPKM(**SMALL | {"learning_rate": 0.1})(embedded, segment_ids=ids)
    model = keras.Model([tokens, ids], keras.layers.Dense(5, activation="softmax")(memory + embedded))
    model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy", jit_compile=JIT[-1])
    rng = np.random.default_rng(0)
    words, texts = rng.integers(0, 5, (4, 20)), np.sort(rng.integers(0, 4, (4, 20)))
    losses = model.fit([words, texts], words, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = numpy(loaded([keras.ops.convert_to_tensor(x, "int32") for x in (words, texts)]))
    prediction = model.predict([words, texts], verbose=0)
    assert agreement.relative_error(prediction, expected) < agreement.BOUNDS["float32"].forward


def test_any_length_of_time():
    model = memory_model()
    for length in (1, 4, 11):
        assert model.predict(X[:, :length], verbose=0).shape == (8, length, 1)


def test_states_pass_through_a_functional_model():
    x = keras.Input((None, HIDDEN))
    first, *state = FwPKM(**SMALL, return_state=True)(x)
    second = FwPKM(**SMALL)(first, initial_state=state)
    model = keras.Model(x, second)
    again = keras.Model.from_config(model.get_config())
    again.set_weights(model.get_weights())
    np.testing.assert_array_equal(numpy(again(X)), numpy(model(X)))


def test_every_argument_survives_a_file(tmp_path):
    options = {"gated": False, "value_norm": None, "learn_memory": True, "boundary": "wait", "score": "dot_product"}
    model = memory_model(**options, dtype="mixed_bfloat16")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[1].get_config() == model.layers[1].get_config()
    np.testing.assert_array_equal(numpy(loaded(X)), numpy(model(X)))
