"""The JAX layer against SPEC.md §7: it is the torch layer, number by number, as pure functions of pytrees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from asserting import assert_close

import fwpkm
from fwpkm.backends import jax as backend
from fwpkm.backends.jax import FwPKM
from fwpkm.backends.torch import FwPKM as TorchFwPKM
from fwpkm.tokens import NUMBERS

HIDDEN = 6
SMALL = {"key_dim": 8, "value_dim": 5, "num_heads": 2, "num_subkeys": 5, "top_k": 2, "chunk_size": 4}
OPTIONS = {
    "plain": {},
    "no gate": {"gated": False},
    "no zscore": {"value_norm": None},
    "learned memory": {"learn_memory": True},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def pair(request, tmp_path):
    """A JAX layer, its variables, and a torch layer of the same weights, all in float64."""
    torch.manual_seed(1)
    twin = TorchFwPKM(HIDDEN, **SMALL, **request.param, dtype=torch.float64)
    with torch.no_grad():  # weights large enough that every term matters, norms and biases that are not 1 and 0
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    fwpkm.save(tmp_path / "weights", twin)
    layer = FwPKM(HIDDEN, **SMALL, **request.param)
    return layer, fwpkm.load(tmp_path / "weights", layer), twin


def inputs(length=11, batch=2):
    rng = np.random.default_rng(2)
    x, mask = rng.normal(size=(batch, length, HIDDEN)), rng.uniform(size=(batch, length)) < 0.8
    x[0, 6, 1], mask[0, 6] = np.nan, True
    return x, mask


def test_outputs_state_and_gradients_are_those_of_torch(pair):
    """With a mask, a token that is not finite, and a state carried from one call to the next."""
    layer, variables, twin = pair
    x, mask = inputs()
    cut = [(jnp.asarray(z[:, :5]), jnp.asarray(z[:, 5:])) for z in (x, mask)]

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        everything = {**variables, "params": params}
        first, state = layer.apply(everything, cut[0][0], mask=cut[1][0])
        second, state = layer.apply(everything, cut[0][1], state, cut[1][1])
        y = jnp.concatenate([first, second], 1)
        return jnp.square(jnp.where(jnp.isnan(y), 0, y)).sum(), (y, state)

    (_, (y, state)), gradients = jax.jit(loss)(variables["params"])
    given = [torch.from_numpy(z) for z in (x, mask)]
    expected, expected_state = twin(given[0], mask=given[1])
    expected.nan_to_num(0).square().sum().backward()
    assert np.isnan(y[0, 6]).all()
    assert_close(np.asarray(y), expected.detach().numpy(), "float64")
    assert_close(np.asarray(state.memory.values), expected_state.memory.values.detach().numpy(), "float64")
    received = layer.export_tensors({**variables, "params": gradients})
    for name, parameter in twin.named_parameters():
        assert_close(received[name], parameter.grad.numpy(), "float64", "gradient", name)


def test_weights_return_unchanged_from_a_file(pair, tmp_path):
    layer, variables, _ = pair
    fwpkm.save(tmp_path / "again", layer, variables)
    loaded = fwpkm.load(tmp_path / "again", layer)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_init_draws_as_section_7_says():
    layer = FwPKM(64, key_dim=64, value_dim=64, num_subkeys=64)
    first, second = (layer.init(jax.random.key(seed)) for seed in (0, 1))
    params, memory = first["params"], first["buffers"]["memory"]
    for name in ("query", "value", "gate", "output"):
        assert (params[f"{name}_norm"]["weight"] == 1).all()
        assert not params[f"{name}_proj"]["bias"].any()
    for array, std in (
        (params["query_proj"]["weight"], 0.02),
        (memory.values, 64**-0.5),
        (memory.keys, 64**-0.5 / 3**0.5),
    ):
        assert array.dtype == jnp.float32
        assert abs(array.std() / std - 1) < 0.05
        assert abs(array.mean()) < 0.1 * std
    assert abs(memory.keys).max() <= 64**-0.5
    assert not np.array_equal(second["buffers"]["memory"].values, memory.values)
    assert not np.array_equal(params["query_proj"]["weight"], params["value_proj"]["weight"])


def test_learned_memory_is_among_the_params():
    variables = FwPKM(HIDDEN, **SMALL, learn_memory=True).init(jax.random.key(0))
    assert variables["buffers"] == {}
    assert variables["params"]["memory"].values.shape == (25, 5)


def test_update_false_leaves_the_state():
    layer = FwPKM(HIDDEN, **SMALL)
    variables, x = layer.init(jax.random.key(0)), jnp.asarray(inputs()[0], jnp.float32)
    _, state = layer.apply(variables, x)
    again, same = layer.apply(variables, x, state, update=False)
    assert same is state
    assert again.shape == x.shape


def test_the_layer_is_a_static_argument_and_a_state_is_donated():
    layer, x = FwPKM(HIDDEN, **SMALL), jnp.ones((2, 4, HIDDEN))
    variables = layer.init(jax.random.key(0))
    assert layer == FwPKM(HIDDEN, fwpkm.FwPKMConfig(**SMALL)) != FwPKM(HIDDEN, **SMALL, gated=False)
    assert hash(layer) == hash(FwPKM(HIDDEN, **SMALL))
    traces = []

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def step(layer, variables, x, state):
        traces.append(x.shape)
        return layer.apply(variables, x, state)

    state = layer.init_state(variables, 2)
    for _ in range(3):
        before, (_, state) = state, step(FwPKM(HIDDEN, **SMALL), variables, x, state)
    assert len(traces) == 1
    assert before.memory.values.is_deleted()


def test_low_precision_weights_leave_the_tables_in_float32():
    layer = FwPKM(HIDDEN, **SMALL)
    variables = layer.init(jax.random.key(0), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(variables["params"])} == {jnp.dtype("bfloat16")}
    y, state = layer.apply(variables, jnp.asarray(inputs()[0], jnp.float32))
    assert y.dtype == jnp.bfloat16
    stored = [*state.memory, *(getattr(state.pending, name) for name in NUMBERS)]
    assert {x.dtype for x in stored} == {jnp.dtype("float32")}


def test_a_float64_layer_has_float64_tables():
    variables = FwPKM(HIDDEN, **SMALL).init(jax.random.key(0), jnp.float64)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float64")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1. Received: hidden_size=0"),
        ({"value_norm": "layer"}, "value_norm must be 'zscore' or None. Received: value_norm='layer'"),
        ({"value_dim": 1}, "value_dim must be at least 2"),
        ({"top_k": 9}, "top_k must be at most num_subkeys"),
        ({"gated": "no"}, "gated must be True or False. Received: 'no'"),
        ({"learn_memory": 1}, "learn_memory must be True or False. Received: 1"),
        ({"config": 3}, "cfg must be an FwPKMConfig. Received: int"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FwPKM(**{"hidden_size": HIDDEN} | SMALL | options)


def test_wrong_inputs_are_named():
    layer = FwPKM(HIDDEN, **SMALL)
    variables, x = layer.init(jax.random.key(0)), jnp.ones((2, 3, HIDDEN))

    def replaced(name, change):
        params = variables["params"]
        query = params["query_proj"]
        return {**variables, "params": params | {"query_proj": query | {name: change(query[name])}}}

    for arguments, message in (
        ((variables["params"], x), "variables must have the form that layer.init"),
        ((None, x), "variables must have the form that layer.init"),
        ((variables, x[0]), r"x must have shape \[B, T, hidden_size=6\]"),
        ((variables, x[:0]), r"x must have at least one row \(B >= 1\)"),
        ((variables, x.tolist()), "x must be a jax.Array or numpy.ndarray"),
        ((variables, x, backend.init_state(layer.config, backend.init_memory(layer.config), 3)), "B=2"),
        ((variables, x, None, jnp.ones((1, 3), bool)), r"mask must have shape \[B=2, T=3\]"),
        ((variables, x, None, jnp.ones((2, 3))), "mask must have dtype bool"),
        ((variables, x, None, None, None, "no"), "update must be True or False"),
        ((variables, x, None, None, None, True, 0), "return_state must be True or False"),
        ((replaced("bias", lambda a: a[:1]), x), r"query_proj.bias of the variables must have shape \(16,\)"),
        ((replaced("weight", lambda a: a.astype(int)), x), "query_proj.weight of the variables must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.apply(*arguments)
    with pytest.raises(ValueError, match=r"update must be True or False.*static_argnames"):
        jax.jit(layer.apply)(variables, x, update=True)
    with pytest.raises(ValueError, match="variables must have the form"):
        layer.export_tensors()


@pytest.mark.parametrize("pair", [OPTIONS["plain"]], ids=["plain"], indirect=True)
@pytest.mark.parametrize("packed", [False, True])
def test_padding_changes_nothing_whatever_it_holds(pair, packed):
    """Outputs, states and gradients are those of each row's tokens alone, NaN in the padding and past the last row."""
    layer, variables, _ = pair
    rng, sizes = np.random.default_rng(4), [5, 1, 9]
    rows = [rng.normal(size=(1, n, HIDDEN)) for n in sizes]
    rows[2][0, 3, 1] = np.inf  # dead: it takes its position
    there = np.zeros((1, 17) if packed else (3, 11), bool)
    arguments = {}
    if packed:  # a token between that is masked, and one at the end that is in no sequence
        at = [(0, np.arange(5)), (0, np.array([5])), (0, np.setdiff1d(np.arange(6, 16), [8]))]
        arguments["cu_seqlens"] = jnp.asarray([0, 5, 6, 16], jnp.int32)
    else:  # left, right and between
        at = [(0, np.arange(6, 11)), (1, np.array([0])), (2, np.setdiff1d(np.arange(11), [2, 7]))]
    for row, tokens in at:
        there[row, tokens] = True
    x = np.full((*there.shape, HIDDEN), np.nan)
    for (row, tokens), own in zip(at, rows, strict=True):
        x[row, tokens] = own[0]
    weights = rng.normal(size=x.shape)

    def loss(params, x, state, weights, **arguments):
        y, state = layer.apply({**variables, "params": params}, x, state, **arguments)
        return (jnp.where(jnp.isnan(y), 0, y) * weights).sum() + jnp.square(state.memory.values).sum(), (y, state)

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    params, mask = variables["params"], jnp.asarray(there)
    received, (y, state) = gradient(
        params, jnp.asarray(x), layer.init_state(variables, 3), weights, mask=mask, **arguments
    )
    assert not np.asarray(y)[~there].any()
    assert not np.asarray(received[1])[~there].any()
    total = jax.tree.map(jnp.zeros_like, params)
    for b, ((row, tokens), own) in enumerate(zip(at, rows, strict=True)):
        start = layer.init_state(variables, 1)
        expected, (alone, after) = gradient(params, jnp.asarray(own), start, weights[row, tokens][None])
        assert_close(np.asarray(y)[row, tokens], np.asarray(alone)[0], "float64")
        assert np.isnan(alone).any() == (b == 2)
        assert_close(np.asarray(state.memory.values)[b], np.asarray(after.memory.values)[0], "float64")
        np.testing.assert_array_equal(state.position[b], after.position[0])
        assert_close(np.asarray(received[1])[row, tokens], np.asarray(expected[1])[0], "float64", "gradient")
        total = jax.tree.map(jnp.add, total, expected[0])
    for a, b in zip(jax.tree.leaves(received[0]), jax.tree.leaves(total), strict=True):
        assert_close(np.asarray(a), np.asarray(b), "float64", "gradient")


@pytest.mark.parametrize("packed", [False, True])
def test_without_a_state_in_return_nothing_else_changes(packed):
    layer, x = FwPKM(HIDDEN, **SMALL), jnp.asarray(inputs()[0])
    variables = layer.init(jax.random.key(0), jnp.float64)
    arguments = {"mask": jnp.asarray(inputs()[1])}
    if packed:
        x, arguments = x[:1], {"cu_seqlens": jnp.asarray([0, 6, 6, 9], jnp.int32)}
    y, state = layer.apply(variables, x, **arguments)
    same, nothing = layer.apply(variables, x, return_state=False, **arguments)
    assert nothing is None
    assert_close(np.asarray(same), np.asarray(y), "float64")
    again, nothing = layer.apply(variables, x, state, **arguments, return_state=False)
    assert nothing is None
    assert_close(np.asarray(again), np.asarray(layer.apply(variables, x, state, **arguments)[0]), "float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_needs_no_implicit_promotion(dtype):
    layer = FwPKM(HIDDEN, **SMALL | {"grad_clip": 0.1, "weight_decay": 0.1})
    variables = layer.init(jax.random.key(0), jnp.dtype(dtype))
    x = jnp.asarray(inputs()[0], dtype)

    def loss(params):
        y, _ = layer.apply({**variables, "params": params}, x, mask=x[..., 0] > 0)
        return jnp.nan_to_num(y).astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("strict"):
        gradients = jax.grad(loss)(variables["params"])
    assert any(jnp.abs(g).sum() > 0 for g in jax.tree.leaves(gradients))


def test_a_state_is_not_rounded_on_its_way_into_a_layer():
    """Who only reads rounds nothing that lasts."""
    layer, (x, _) = FwPKM(HIDDEN, **SMALL), inputs()
    variables = layer.init(jax.random.key(0), "float64")
    _, wide = layer.apply(variables, x)
    narrow = jax.tree.map(lambda z: z.astype("float32"), variables)
    row = x.astype("float32")
    words = r"state must not hold float64 tables.*Received: float64 tables, and queries of float32"
    for call in (layer.apply, functools.partial(layer.apply, return_trace=True), jax.jit(layer.apply)):
        with pytest.raises(ValueError, match=words):
            call(narrow, row, wide)
    with pytest.raises(ValueError, match=words):
        layer.decode(narrow, row[:, :1], wide)
    assert layer.apply(narrow, row, wide, update=False)[1] is wide
    rounded = wide.map(lambda z: z.astype("float32") if z.dtype == jnp.float64 else z)
    assert layer.apply(narrow, row, rounded)[1].memory.values.dtype == jnp.float32


@pytest.mark.parametrize("name", ["hidden_size", "config", "gated", "value_norm", "learn_memory"])
def test_arguments_are_chosen_when_the_layer_is_made(name):
    """What is hashed by them, such as a call that ``jax.jit`` compiled, would go on with the old ones."""
    layer = FwPKM(HIDDEN, **SMALL)
    before = hash(layer)
    with pytest.raises(AttributeError, match=rf"{name} is chosen when a layer is made: FwPKM\("):
        setattr(layer, name, None)
    assert hash(layer) == before
