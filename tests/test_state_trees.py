"""States as trees of arrays: one without uses has no leaf in their place, in any framework (SPEC.md §11)."""

import dataclasses
import io
import pickle

import jax
import numpy as np
import pytest
import torch
from asserting import assert_same_bits
from drawn import drawn
from interpreter import DEVICE, SMALL
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fwpkm
from fwpkm import FwPKMConfig, Memory, State, reference
from fwpkm.conformance.running import as_numpy, native

TORCH, JAX = map(fwpkm.get_backend, ("torch", "jax"))
PLAIN = FwPKMConfig(4, 3, 2, 4, 2, 3, 1)
USED = dataclasses.replace(PLAIN, usage_weight=0.7)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",  # what torch's own compiler uses
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning",  # as it does while it traces
)


def begun(be, cfg=PLAIN, rows=2):
    return be.init_state(cfg, be.init_memory(cfg), rows)


@pytest.mark.parametrize("cfg", [PLAIN, USED], ids=["plain", "used"])
def test_every_leaf_is_an_array(cfg, be):
    state = begun(be, cfg)
    count = 8 if cfg is USED else 7
    assert len(state.arrays()) == count
    assert len(jax.tree.leaves(state)) == count
    assert all(hasattr(x, "dtype") for x in jax.tree.leaves(state, is_leaf=lambda x: x is None))
    assert all(hasattr(x, "dtype") for x in _pytree.tree_leaves(state))


def test_torch_maps_a_state():
    state = begun(TORCH)
    doubled = _pytree.tree_map(lambda x: x * 2, state)
    assert type(doubled) is State
    assert_same_bits(as_numpy(TORCH, doubled), as_numpy(TORCH, state.map(lambda x: x * 2)))


def test_a_scan_carries_a_state():
    case = drawn(PLAIN, 2, 8, dtype="float32", left_out=["mask", "gate"])
    query, value = (np.moveaxis(x, 1, 0)[:, :, None] for x in (case.tokens.query, case.tokens.value))

    def step(state, token):
        output, state, _ = JAX.apply(PLAIN, state, *token)
        return state, output

    after, _ = jax.lax.scan(step, begun(JAX), (query, value))
    expected = JAX.apply(PLAIN, begun(JAX), *native(JAX, (case.tokens.query, case.tokens.value)))[1]
    assert jax.tree.structure(after) == jax.tree.structure(expected)
    np.testing.assert_array_equal(after.position, expected.position)


@pytest.mark.parametrize("usage_weight", [0.0, 0.5])
def test_a_graph_takes_the_state_that_it_returned(usage_weight):
    """Without a break, and compiled once."""
    torch.compiler.reset()
    cfg = FwPKMConfig(**SMALL, usage_weight=usage_weight)
    state = TORCH.init_state(cfg, Memory(*(table.to(DEVICE) for table in TORCH.init_memory(cfg))), 2)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def read_on(state, query, value):
        return TORCH.apply(cfg, state, query, value, implementation="triton")[1]

    for _ in range(3):
        state = read_on(state, *torch.rand(2, 2, 3, 16, device=DEVICE))
    assert counter.frame_count == 1


@pytest.mark.parametrize("functions", [reference, TORCH, JAX])
def test_none_in_their_place_is_taken(functions, tmp_path):
    """As in states that were built by hand, or pickled when None stood there; what comes back has none to be a leaf."""
    be, case = functions, drawn(PLAIN, 2, 8, left_out=["gate"])
    tokens, expected = native(be, case.tokens).present(), begun(be)
    state = pickle.loads(pickle.dumps(expected._replace(uses=None)))
    assert state.uses is None
    assert state.maybe_uses is expected.maybe_uses is None
    assert state.arrays().keys() == expected.arrays().keys()
    assert be.nbytes(state) == be.nbytes(expected)
    fwpkm.save_state(tmp_path / "state", state, PLAIN)
    received = [be.select(PLAIN, state, [1]), be.flush(PLAIN, state)[0], be.apply(PLAIN, state, **tokens)[1]]
    received += [state.clone(), fwpkm.load_state(tmp_path / "state", PLAIN, be)]
    assert all(x.uses == () for x in received)
    assert_same_bits(as_numpy(be, received[2]), as_numpy(be, be.apply(PLAIN, expected, **tokens)[1]))


def test_states_pickled_before_there_were_uses_load():
    """Of 0.1: a state of six fields."""
    state = begun(reference)
    old = pickle.loads(pickle.dumps(state[:-1]))
    assert State(*old).uses == ()
    file = io.BytesIO()
    torch.save(begun(TORCH), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).uses == ()


class Copies(TorchDispatchMode):
    """The copies of tensors of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.found = shape, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.shape == self.shape and "copy" in str(function):
            self.found.append(function)
        return result


def test_a_call_that_writes_nothing_copies_no_uses():
    case = drawn(USED, 2, 4, dtype="float32", left_out=["mask", "gate"])
    state, (query, value) = begun(TORCH, USED), native(TORCH, (case.tokens.query, case.tokens.value))
    for length, count in ((2, 0), (4, 1)):  # chunks are of 3 tokens
        with Copies(state.uses.shape) as copies:
            after = TORCH.apply(USED, state, query[:, :length], value[:, :length], implementation="eager")[1]
        assert (after.uses is state.uses) == (count == 0)
        assert len(copies.found) == count
    assert not state.uses.any()
