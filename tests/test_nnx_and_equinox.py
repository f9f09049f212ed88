"""The layer as a module of Flax NNX and of Equinox: the JAX layer's bits, and each library's own ways."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from asserting import assert_close, assert_same_bits
from flax import nnx
from processes import python

import fwpkm
from fwpkm.backends.jax import FwPKM, start_decoding
from fwpkm.integrations import equinox as of_equinox
from fwpkm.integrations import nnx as of_nnx

HIDDEN = 6
SMALL = {"key_dim": 4, "value_dim": 3, "num_subkeys": 4, "top_k": 2, "chunk_size": 3}
LAYER = FwPKM(HIDDEN, **SMALL)
VARIABLES = LAYER.init(jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (2, 7, HIDDEN))
MASK = jnp.asarray([[True] * 7, [False, True, True, False, True, True, True]])


def made(library, **options):
    """A layer of LAYER's arguments but for these."""
    if library == "nnx":
        return of_nnx.FwPKM(HIDDEN, **SMALL | options, rngs=nnx.Rngs(0))
    return of_equinox.FwPKM(HIDDEN, **SMALL | options, key=jax.random.key(0))


def assert_same(received, expected):
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        assert_same_bits(np.asarray(x), np.asarray(y))


both = pytest.mark.parametrize("library", ["nnx", "equinox"])


@both
def test_every_call_has_the_bits_of_the_jax_layer(library):
    """With a mask, packed, from a state, without update or state, with a trace, and token by token."""
    layer = made(library)
    variables = layer.variables()
    state = layer.init_state(2)
    assert_same(state, LAYER.init_state(variables, 2))
    ends = jnp.asarray([0, 2, 7], jnp.int32)
    for x, arguments in (
        (X, {"state": state, "mask": MASK, "return_trace": True}),
        (X[:1], {"cu_seqlens": ends}),
        (X, {"update": False}),
        (X, {"state": state, "update": False, "return_state": False}),
    ):
        assert_same(layer(x, **arguments), LAYER.apply(variables, x, **arguments))
    _, state = layer(X, state)
    copy = start_decoding(state)
    assert_same(layer.decode(X[:, :1], state, MASK[:, :1]), LAYER.decode(variables, X[:, :1], copy, MASK[:, :1]))
    assert layer.config == LAYER.config


@both
def test_a_drawn_layer_is_the_jax_layers_draw(library):
    layer = made(library)
    key = nnx.Rngs(0).params() if library == "nnx" else jax.random.key(0)
    assert_same(layer.variables(), LAYER.init(key))
    narrow = made(library, **{"param_dtype" if library == "nnx" else "dtype": jnp.bfloat16})
    assert {x.dtype for x in jax.tree.leaves(narrow.variables()["params"])} == {jnp.dtype("bfloat16")}
    assert narrow.variables()["buffers"]["memory"].values.dtype == jnp.float32


@both
@pytest.mark.parametrize("learn_memory", [False, True])
def test_weights_return_from_a_file_of_any_framework(library, learn_memory, tmp_path):
    """Equinox returns another layer, NNX fills this one; both keep their dtypes."""
    twin = FwPKM(HIDDEN, **SMALL)
    fwpkm.save(tmp_path / "jax", twin, VARIABLES)
    layer = made(library, learn_memory=learn_memory)
    loaded = fwpkm.load(tmp_path / "jax", layer)
    assert (loaded is None) == (library == "nnx")
    layer = layer if loaded is None else loaded
    fwpkm.save(tmp_path / "again", layer)
    assert_same(fwpkm.load(tmp_path / "again", twin), VARIABLES)
    narrow = made(library, **{"param_dtype" if library == "nnx" else "dtype": jnp.bfloat16})
    narrow = fwpkm.load(tmp_path / "jax", narrow) or narrow
    assert narrow.variables()["params"]["query_proj"]["weight"].dtype == jnp.bfloat16


@both
def test_a_file_of_another_layer_changes_nothing(library, tmp_path):
    other = FwPKM(HIDDEN, **SMALL, gated=False)
    fwpkm.save(tmp_path / "other", other, other.init(jax.random.key(0)))
    layer = made(library)
    before = layer.variables()
    with pytest.raises(ValueError, match="gated"):
        fwpkm.load(tmp_path / "other", layer)
    assert_same(layer.variables(), before)


@both
def test_a_file_in_float64_is_refused_where_tables_are_float32(library, tmp_path):
    """In JAX's 64-bit mode too, in which all tests run: it rounds nothing, but tables that are narrower would."""
    twin = FwPKM(HIDDEN, **SMALL)
    wide = jax.tree.map(lambda x: x.astype("float64"), twin.init(jax.random.key(0)))
    fwpkm.save(tmp_path / "wide", twin, wide)
    layer = made(library)
    before = layer.variables()
    with pytest.raises(ValueError, match="would lose digits"):
        fwpkm.load(tmp_path / "wide", layer)
    assert_same(layer.variables(), before)
    layer = jax.tree.map(lambda x: x.astype("float64"), layer)
    layer = fwpkm.load(tmp_path / "wide", layer) or layer
    assert_same(layer.variables(), wide)


@both
def test_a_state_returns_from_a_file_to_where_it_stood(library, tmp_path):
    layer = made(library)
    _, state = layer(X, layer.init_state(2), MASK)
    fwpkm.save_state(tmp_path / "state", state, layer.config)
    assert_same(layer(X, fwpkm.load_state(tmp_path / "state", layer.config, "jax")), layer(X, state))


@both
@pytest.mark.parametrize("name", ["hidden_size", "config", "gated", "value_norm", "learn_memory"])
def test_arguments_are_chosen_when_the_layer_is_made(library, name):
    with pytest.raises(AttributeError):
        setattr(made(library), name, None)


@both
def test_wrong_arguments_are_named(library):
    layer = made(library)
    with pytest.raises(ValueError, match=r"state must be a fwpkm\.State"):
        layer(X, jnp.ones(3))
    with pytest.raises(ValueError, match=r"x must have shape \[B, T, hidden_size=6\]"):
        layer(X[0])
    with pytest.raises(ValueError, match="mask must have dtype bool"):
        layer(X, mask=MASK.astype(int))
    with pytest.raises(ValueError, match="top_k must be at most num_subkeys"):
        made(library, num_subkeys=1)


@both
@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_weights_are_floating(library, dtype):
    with pytest.raises(ValueError, match=f"dtype must be a floating one.* Received: {dtype}"):
        made(library, **{"param_dtype" if library == "nnx" else "dtype": dtype})


@both
def test_a_missing_library_names_the_extra(library):
    module = {"nnx": "flax", "equinox": "equinox"}[library]
    done = python("-c", f"import sys\nsys.modules[{module!r}] = None\nimport fwpkm.integrations.{library}")
    assert f"pip install 'fwpkm[{library}]'" in done.stderr


# Flax NNX


class Reader(nnx.Module):
    """A module that keeps where it stands."""

    def __init__(self, **options):
        self.memory = made("nnx", **options)
        self.state = of_nnx.MemoryState(self.memory.init_state(2))

    def __call__(self, x):
        return x + self.memory(x, self.state)[0]


def test_kinds_of_variables_are_picked_by_type():
    kinds = nnx.Param, of_nnx.InitialMemory, of_nnx.MemoryState
    for learn_memory, tables in ((False, 2), (True, 0)):
        _, params, initial, states = nnx.split(Reader(learn_memory=learn_memory), *kinds)  # and nothing is left over
        leaves = [len(jax.tree.leaves(x)) for x in (params, initial, states)]
        assert leaves == [12 + 2 - tables, tables, 7]


@pytest.mark.parametrize("learn_memory", [False, True])
def test_an_optimizer_trains_params_and_a_held_state_goes_on(learn_memory):
    """Over nnx.jit and nnx.grad; weight decay too leaves initial tables as they are, unless they are learned."""
    model = Reader(learn_memory=learn_memory)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)
    before, expected = model.memory.variables(), model.memory.init_state(2)

    @nnx.jit
    def step(model, optimizer, x):
        gradient = nnx.grad(lambda model: jnp.square(model(x)).mean())(model)
        optimizer.update(model, gradient)

    step(model, optimizer, X)
    held, after = model.state.get_value(), model.memory.variables()
    _, expected = LAYER.apply(before, X, expected) if not learn_memory else (None, held)
    assert_close(np.asarray(held.memory.values), np.asarray(expected.memory.values), "float32")
    assert held.position.tolist() == [7, 7]
    kept = "buffers" if not learn_memory else "params"
    moved = np.asarray(after[kept]["memory"].values != before[kept]["memory"].values)
    assert moved.all() == learn_memory
    assert moved.any() == learn_memory
    assert (after["params"]["query_proj"]["weight"] != before["params"]["query_proj"]["weight"]).any()


def test_reading_alone_and_a_plain_state_leave_a_held_one():
    model = Reader()
    before = model.state.get_value()
    read, same = model.memory(X, model.state, update=False)
    y, after = model.memory(X, before)
    for state in (same, model.state.get_value()):
        assert_same(state, before)
    again, none = model.memory(X, model.state, return_state=False)
    assert none is None
    assert_same(again, y)
    assert_same(model.state.get_value(), after)
    assert not np.array_equal(read, y)


def test_scan_carries_a_module_and_vmap_runs_over_rows():
    """Pieces in a scan are one call; rows under vmap are a batch."""
    model, pieces = Reader(), jnp.moveaxis(X[:, :6].reshape(2, 3, 2, HIDDEN), 1, 0)
    expected, _ = model.memory(X[:, :6], model.memory.init_state(2))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def read(model, piece):
        return model, model(piece) - piece

    model, outputs = read(model, pieces)
    assert_close(np.asarray(jnp.moveaxis(outputs, 0, 1).reshape(2, 6, HIDDEN)), np.asarray(expected), "float32")
    assert model.state.get_value().position.tolist() == [6, 6]

    rows = nnx.vmap(lambda layer, row: layer(row[None], return_state=False)[0][0], in_axes=(None, 0))
    assert_close(np.asarray(rows(model.memory, X[:, :6])), np.asarray(expected), "float32")


@pytest.mark.parametrize("rngs", [None, jax.random.key(0)], ids=["None", "a key"])
def test_other_generators_are_named(rngs):
    with pytest.raises(ValueError, match=r"rngs must be a flax\.nnx\.Rngs, such as"):
        of_nnx.FwPKM(HIDDEN, **SMALL, rngs=rngs)


def test_an_abstract_or_traced_layer_says_that_it_has_no_numbers(tmp_path):
    layer, abstract = made("nnx"), nnx.eval_shape(lambda: made("nnx"))
    for call in (lambda: abstract(X), lambda: abstract.init_state(2), lambda: fwpkm.save(tmp_path / "file", abstract)):
        with pytest.raises(ValueError, match="an abstract layer holds no numbers"):
            call()
    with pytest.raises(ValueError, match="a traced array holds no numbers yet"):
        nnx.jit(lambda layer: fwpkm.save(tmp_path / "file", layer))(layer)
    fwpkm.save(tmp_path / "file", layer)
    fwpkm.load(tmp_path / "file", abstract)
    assert_same(abstract.variables(), layer.variables())


# Equinox


def test_a_file_is_loaded_into_a_whole_layer(tmp_path):
    layer = made("equinox")
    fwpkm.save(tmp_path / "file", layer)
    with pytest.raises(
        ValueError, match=r"layer must hold its weights and tables.* Received: 12 arrays in place of 14"
    ):
        fwpkm.load(tmp_path / "file", eqx.partition(layer, of_equinox.trainable(layer))[0])


def test_a_whole_gradient_leaves_initial_tables_and_a_partition_keeps_them_from_decay():
    layer = made("equinox")
    optimizer = optax.adamw(1e-2, weight_decay=0.1)

    @eqx.filter_jit
    def step(params, rest, state, x):
        def loss(params):
            y, after = eqx.combine(params, rest)(x, state)
            return jnp.square(y).mean(), after

        gradient, after = eqx.filter_grad(loss, has_aux=True)(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return eqx.apply_updates(params, updates), after, gradient

    params, rest = eqx.partition(layer, of_equinox.trainable(layer))
    trained, state, _ = step(params, rest, layer.init_state(2), X)
    assert_same(eqx.combine(trained, rest).buffers, layer.buffers)
    assert (trained.params["query_proj"]["weight"] != layer.params["query_proj"]["weight"]).any()
    assert_close(*(np.asarray(s.memory.values) for s in (state, layer(X)[1])), "float32")

    gradient = eqx.filter_grad(lambda layer: jnp.square(layer(X, return_state=False)[0]).mean())(layer)
    assert not any(x.any() for x in jax.tree.leaves(gradient.buffers))
    assert all(x.any() for x in jax.tree.leaves(gradient.params))


def test_what_is_trainable_is_every_floating_array_but_initial_tables():
    model = {"memory": made("equinox"), "learned": made("equinox", learn_memory=True), "other": [jnp.ones(2), 3, None]}
    marks = of_equinox.trainable(model)
    assert jax.tree.structure(marks) == jax.tree.structure(model)
    assert jax.tree.leaves(marks["memory"].buffers) == [False, False]
    assert set(jax.tree.leaves((marks["memory"].params, marks["learned"].params))) == {True}
    assert len(jax.tree.leaves(marks["learned"].params)) == 12 + 2
    assert marks["other"] == [True, False, None]
    assert not any(jax.tree.leaves(of_equinox.trainable([model["memory"].init_state(2)])))


def test_a_vmapped_layer_reads_single_examples():
    layer = made("equinox")
    rows = jax.vmap(lambda x: layer(x[None])[0][0])(X)
    assert_close(np.asarray(rows), np.asarray(layer(X)[0]), "float32")
