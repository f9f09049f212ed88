"""``return_trace`` of the torch and JAX layers; Keras's stands in keras_suite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from traces import as_numpy, expected_trace, same_trace

import fwpkm
from fwpkm import LayerTrace
from fwpkm.agreement import BOUNDS
from fwpkm.backends import jax as jax_backend
from fwpkm.backends import torch as torch_backend

HIDDEN = 6
SMALL = {"key_dim": 8, "value_dim": 5, "num_heads": 2, "num_subkeys": 5, "top_k": 2, "chunk_size": 4}
BOUND = BOUNDS["float64"].forward
X = np.random.default_rng(2).normal(size=(2, 11, HIDDEN))
X[1, 6, 2] = np.nan
MASK = np.ones((2, 11), bool)
MASK[0, :3] = MASK[1, 5] = False
ENDS = np.array([0, 7, 7, 10], np.int32)


class TorchLayer:
    """The torch layer, called with NumPy arrays."""

    def __init__(self, **options):
        torch.manual_seed(1)
        self.layer = torch_backend.FwPKM(HIDDEN, **SMALL, **options, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
        self.config, self.weights = self.layer.config, self.layer.export_tensors()

    def __call__(self, x, *, mask=None, cu_seqlens=None, **options):
        arrays = {"mask": mask, "cu_seqlens": cu_seqlens}
        given = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
        return self.layer(torch.from_numpy(x), **given, **options)


class JaxLayer:
    """The JAX layer under ``jax.jit``, called with NumPy arrays."""

    def __init__(self, **options):
        self.layer = jax_backend.FwPKM(HIDDEN, **SMALL, **options)
        drawn = self.layer.init(jax.random.key(0), "float64")
        self.variables = jax.tree.map(lambda x: x + 0.5 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), drawn)
        self.config, self.weights = self.layer.config, self.layer.export_tensors(self.variables)

    def __call__(self, x, **options):
        arrays = {name: jnp.asarray(v) for name, v in options.items() if isinstance(v, np.ndarray)}
        flags = {name: v for name, v in options.items() if name not in arrays}
        call = jax.jit(lambda variables, x, arrays: self.layer.apply(variables, x, **arrays, **flags))
        return call(self.variables, jnp.asarray(x), arrays)


LAYERS = {"torch": TorchLayer, "jax": JaxLayer}
both = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@both
@pytest.mark.parametrize("options", [{"mask": MASK}, {"cu_seqlens": ENDS}], ids=["mask", "packed"])
def test_a_trace_is_the_references_with_the_gate(make, options):
    layer, x = make(), X if "mask" in options else X[1:]
    _, _, trace = layer(x, **options, return_trace=True)
    assert isinstance(trace, LayerTrace)
    expected = expected_trace(layer.config, layer.weights, x, True, **options)
    if "mask" not in options:  # tokens behind the last sequence are not there
        expected.gate[:, ENDS[-1] :] = 0
    same_trace(trace, expected, BOUND)
    ends = options.get("cu_seqlens")
    found, wanted = (fwpkm.summarize(layer.config, t, cu_seqlens=ends) for t in (trace, expected))
    assert found == pytest.approx(wanted)


def test_torch_gives_the_same_y_and_state_with_it():
    layer = TorchLayer()
    plain, traced = layer(X), layer(X, return_trace=True)
    assert len(plain) == 2
    assert torch.equal(plain[0].nan_to_num(), traced[0].nan_to_num())
    assert torch.equal(plain[1].memory.values, traced[1].memory.values)


@both
def test_without_a_gate_it_is_one_and_without_a_state_nothing_else_changes(make):
    layer = make(gated=False)
    _, state, trace = layer(X, return_trace=True, return_state=False)
    assert state is None
    same_trace(trace, expected_trace(layer.config, layer.weights, X, False), BOUND)
    assert set(as_numpy(trace).gate[~np.isnan(X).any(-1)]) == {1}


@both
def test_switches_are_true_or_false(make):
    with pytest.raises(ValueError, match=r"return_trace must be True or False\. Received: 1"):
        make()(X, return_trace=1)


def test_torch_passes_no_gradient_through_it():
    _, _, trace = TorchLayer()(X, return_trace=True)
    assert not any(array.requires_grad for array in trace)


def test_jax_passes_no_gradient_through_it():
    layer = JaxLayer()

    def total(params):
        variables, options = {**layer.variables, "params": params}, {"update": False, "return_trace": True}
        _, _, trace = layer.layer.apply(variables, jnp.asarray(X[:1, :3]), **options)
        return trace.weights.sum() + trace.gate.sum()

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(layer.variables["params"])))


def test_torch_keeps_the_trace_in_lower_precision():
    layer = TorchLayer().layer.to(torch.bfloat16)
    y, _, trace = layer(torch.from_numpy(X).bfloat16(), return_trace=True)
    assert y.dtype == torch.bfloat16
    assert trace.weights.dtype == trace.gate.dtype == torch.float32
