"""A torch state's own ``to``, ``detach`` and ``clone``: what users of tensors expect of them."""

import copy

import pytest
import torch
from asserting import assert_same_bits

import fwpkm
from fwpkm import State
from fwpkm.backends.torch import FwPKM, select, to_device
from fwpkm.conformance.running import as_numpy

BE = fwpkm.get_backend("torch")
LAYER = FwPKM(6, key_dim=4, value_dim=3, num_subkeys=4, top_k=2, chunk_size=3)
NUMBERS = ("pending_query", "pending_value", "pending_gate")


@pytest.fixture
def state():
    """Two rows, half read, with a gradient history."""
    return LAYER(torch.randn(2, 5, 6))[1]


def arrays(state):
    return [
        *state.memory,
        *(getattr(state, f"pending_{name}") for name in ("query", "value", "gate", "mask")),
        state.position,
    ]


def test_detach_cuts_the_history_and_keeps_the_numbers(state):
    assert state.memory.values.requires_grad
    cut = state.detach()
    assert not any(x.requires_grad for x in arrays(cut))
    assert_same_bits(as_numpy(BE, cut), as_numpy(BE, state))
    LAYER(torch.randn(2, 5, 6), cut)[0].sum().backward()


def test_a_compiled_function_holds_a_detach(state):
    cut = torch.compile(lambda state: state.detach().memory.values + 0, backend="eager", fullgraph=True)
    assert torch.equal(cut(state.detach()), state.memory.values)


def test_clone_shares_nothing_and_passes_gradients(state):
    copy = state.clone()
    assert type(copy) is State
    assert_same_bits(as_numpy(BE, copy.detach()), as_numpy(BE, state.detach()))
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(arrays(copy), arrays(state)))
    assert copy.memory.values.grad_fn is not None
    kept, read = state.detach().clone(), state.detach()
    LAYER(torch.randn(2, 9, 6), read.clone(), inplace=True)
    assert_same_bits(as_numpy(BE, read), as_numpy(BE, kept))


def test_clones_of_rows_that_share_a_table_have_their_own(state):
    shared = select(LAYER.config, select(LAYER.config, state.detach(), [1]), [0, 0])
    assert shared.clone().memory.values.is_contiguous()
    assert shared.clone().memory.values.untyped_storage().nbytes() == 2 * 16 * 3 * 4


@pytest.mark.parametrize(
    ("where", "device"),
    [(("meta",), "meta"), ((torch.device("meta"),), "meta"), (("cpu",), "cpu"), ((), "cpu"), ((None,), "cpu")],
)
def test_to_moves_tables_and_pending_tokens(state, where, device):
    """A position on the CPU stays there, where calls can know it."""
    moved = state.to(*where)
    assert {x.device.type for x in arrays(moved)[:-1]} == {device}
    assert moved.position.device.type == "cpu"
    assert moved.memory.values.dtype == torch.float32


def test_a_position_on_a_device_goes_along(state):
    on_meta = state._replace(position=state.position.to("meta"))
    assert on_meta.to("meta").position.is_meta
    with pytest.raises(NotImplementedError):  # torch copies nothing out of meta: so it was asked to
        on_meta.to("cpu")


@pytest.mark.parametrize("where", [(torch.float64,), ("cpu", torch.float64)])
def test_to_widens_what_is_floating(state, where):
    wide = state.to(*where)
    assert {x.dtype for x in arrays(wide)} == {torch.float64, torch.bool, torch.int32}
    assert_same_bits(as_numpy(BE, wide.to(torch.float32).detach()), as_numpy(BE, state.detach()))
    copy.deepcopy(LAYER).double()(torch.randn(2, 5, 6, dtype=torch.float64), wide)


def test_to_takes_what_trainers_pass(state):
    for moved in (state.to("meta", non_blocking=True), state.to(device="meta"), to_device(state, "meta")):
        assert moved.memory.keys.is_meta


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ((torch.bfloat16,), "dtype must be float32 or float64.*Received: torch.bfloat16"),
        ((torch.int32,), "dtype must be float32 or float64"),
        (("nowhere",), "device must be one that torch.device takes. Received: 'nowhere'"),
        ((torch.zeros(1),), "device must be one that torch.device takes"),
        (("cpu", "cuda"), "dtype must be float32 or float64"),
    ],
)
def test_to_names_what_does_not_fit(state, where, message):
    with pytest.raises(ValueError, match=message):
        state.to(*where)


def test_states_of_other_frameworks():
    cfg = LAYER.config
    states = {
        name: (be := fwpkm.get_backend(name)).init_state(cfg, be.init_memory(cfg), 1) for name in ("numpy", "jax")
    }
    for name, state in states.items():
        for other in (state.clone(), state.detach()):
            assert_same_bits(as_numpy(fwpkm.get_backend(name), other), as_numpy(fwpkm.get_backend(name), state))
    assert states["numpy"].clone().memory.values is not states["numpy"].memory.values
    device = states["jax"].memory.values.devices().pop()
    assert states["jax"].to(device).memory.values.devices() == {device}
    with pytest.raises(ValueError, match="only torch and JAX place states"):
        states["numpy"].to("cpu")


@pytest.mark.parametrize(
    ("argument", "field"), [("mask", "mask"), ("cu_seqlens", "cu_seqlens"), ("state", "state.memory.keys")]
)
@pytest.mark.parametrize("carried", [False, True])
def test_an_argument_of_a_layer_on_another_device_is_named(argument, field, carried):
    layer, x = FwPKM(6, key_dim=4, value_dim=4, num_subkeys=4, top_k=2), torch.ones(1, 3, 6)
    state = layer.init_state(1)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    given = {"mask": torch.ones(1, 3, dtype=torch.bool), "cu_seqlens": ends, "state": state}[argument]
    elsewhere = given.map(lambda part: part.to("meta")) if argument == "state" else given.to("meta")
    with pytest.raises(ValueError, match=f"{field} must be on the tokens' device, cpu. Received: {field} on meta"):
        layer(x, **({"state": state} if carried else {}) | {argument: elsewhere})
    with pytest.raises(ValueError, match="x must be on the layer's device, meta"):
        layer.to("meta")(x)
