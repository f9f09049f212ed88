"""Weights move between layers of other batch sizes, and between stateful and stateless ones."""

import keras
import numpy as np
import pytest
from keras_suite.layers import inputs, make, memory_model, numpy

KINDS = {"4 rows": 4, "2 rows": 2, "stateless": None}


def model(kind, seed):
    """A model with weights of its own, whose layer, if stateful, has a state like no other."""
    found = memory_model(KINDS[kind], stateful=KINDS[kind] is not None)
    rng = np.random.default_rng(seed)
    for x in found.variables:
        x.assign(0.3 * rng.normal(size=x.shape).astype(x.dtype) if "float" in x.dtype else np.ones(x.shape, x.dtype))
    return found


def by_file(source, target, folder):
    source.save_weights(folder / "model.weights.h5")
    target.load_weights(folder / "model.weights.h5")


def by_list(source, target, folder):
    target.set_weights(source.get_weights())


def check_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("move", [by_file, by_list])
@pytest.mark.parametrize(("source", "target"), [("4 rows", "2 rows"), ("4 rows", "stateless"), ("stateless", "2 rows")])
def test_weights_move(source, target, move, tmp_path):
    """A file makes a stateful layer start anew, from the initial memory that came; a list leaves its state alone."""
    first, second = model(source, 1), model(target, 2)
    layer, before = second.layers[1], numpy([x.value for x in second.variables])
    move(first, second, tmp_path)
    check_same(first.get_weights(), second.get_weights())
    if layer.stateful and move is by_file:
        check_same(numpy(keras.tree.flatten(layer.state)), numpy(keras.tree.flatten(layer.init_state(2))))
    elif layer.stateful:
        state = {id(x) for x in layer.variables} - {id(x) for x in layer.weights}
        pairs = [(x, old) for x, old in zip(second.variables, before, strict=True) if id(x) in state]
        assert len(pairs) == 7
        check_same(*zip(*((numpy(x.value), old) for x, old in pairs)))


def test_a_state_of_the_same_batch_size_comes_along(tmp_path):
    x = inputs(5)
    first, second = memory_model(4, stateful=True), model("4 rows", 2)
    first(x)
    by_file(first, second, tmp_path)
    check_same(*(numpy(keras.tree.flatten(one.layers[1].state)) for one in (first, second)))
    np.testing.assert_array_equal(numpy(second(x)), numpy(first(x)))


def test_the_state_is_a_variable_and_no_weight():
    """So compiled steps see it, and get_weights does not."""
    stateful, stateless = make(batch=4, stateful=True), make()
    assert len(stateful.weights) == len(stateless.weights) == len(stateless.variables)
    state = stateful.variables[len(stateful.weights) :]
    assert [x.shape[0] for x in state] == [4] * 7
    assert {id(x) for x in state} <= {id(x) for x in stateful.non_trainable_variables}


@pytest.mark.filterwarnings("ignore:Skipping nested container")  # which Keras says wherever a layer does not load
@pytest.mark.parametrize("options", [{"gated": False}, {"num_subkeys": 5}])
def test_other_files_are_refused(tmp_path, options):
    """Before anything is filled."""
    first = model("4 rows", 1)
    before = numpy([x.value for x in first.layers[1].variables])
    memory_model(4, stateful=True, **options).save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(ValueError, match="could not be loaded"):
        first.load_weights(tmp_path / "other.weights.h5")
    check_same(numpy([x.value for x in first.layers[1].variables]), before)
