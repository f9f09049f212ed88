"""States through what frameworks save with, and onto devices: torch.save, flax.serialization, Orbax, device=."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from asserting import assert_same_bits
from flax import serialization
from layer_files import CFG, half_read_state
from processes import python

import fwpkm
from fwpkm import Memory, State, reference
from fwpkm.conformance.running import as_numpy, native

TORCH, JAX = fwpkm.get_backend("torch"), fwpkm.get_backend("jax")


def test_torch_loads_states_with_weights_only(tmp_path: Path) -> None:
    """In a process that has only imported the backend; a dict of states and a memory too."""
    state = native(TORCH, half_read_state())
    torch.save({"layers.0": state, "memory": state.memory}, tmp_path / "states.pt")
    loaded = torch.load(tmp_path / "states.pt", weights_only=True)
    assert type(loaded["layers.0"]) is State
    assert_same_bits(as_numpy(TORCH, loaded["layers.0"]), half_read_state())
    code = """
import sys, torch, fwpkm.backends.torch
loaded = torch.load(sys.argv[1], weights_only=True)
print(type(loaded["layers.0"]).__name__, type(loaded["memory"]).__name__, loaded["layers.0"].position.tolist())
"""
    done = python("-c", code, tmp_path / "states.pt", cwd=tmp_path)
    assert done.stdout == "State Memory [6, 7]\n", done.stderr


def fresh() -> State:
    """A state of the same shapes, with other numbers."""
    return native(JAX, reference.init_state(CFG, reference.init_memory(CFG), 2))


def test_flax_serialization() -> None:
    states = {"a": native(JAX, half_read_state()), "b": fresh()}
    loaded = serialization.from_bytes({"a": fresh(), "b": fresh()}, serialization.to_bytes(states))
    assert type(loaded["a"]) is State
    assert type(loaded["a"].memory) is Memory
    assert_same_bits(as_numpy(JAX, jax.tree.map(jnp.asarray, loaded["a"])), half_read_state())
    assert_same_bits(as_numpy(JAX, jax.tree.map(jnp.asarray, loaded["b"])), as_numpy(JAX, fresh()))


def test_orbax(tmp_path: Path) -> None:
    states = {"a": native(JAX, half_read_state()), "b": fresh()}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "states", states)
        saver.wait_until_finished()
        loaded = saver.restore(tmp_path / "states", {"a": fresh(), "b": fresh()})
    assert type(loaded["a"]) is State
    assert_same_bits(as_numpy(JAX, loaded["a"]), half_read_state())
    assert_same_bits(as_numpy(JAX, loaded["b"]), as_numpy(JAX, fresh()))


# device=


def test_torch_loads_onto_a_device(state_file: Path) -> None:
    """The position stays on the CPU, as ``init_state`` leaves it; meta shows where the others went."""
    state = fwpkm.load_state(state_file, CFG, "torch", device="cpu")
    assert_same_bits(as_numpy(TORCH, state), half_read_state())
    for device in ("meta", torch.device("meta")):
        state = fwpkm.load_state(state_file, CFG, "torch", device=device)
        assert {x.device.type for x in (*state.memory, *state.pending)} == {"meta"}
        assert state.position.tolist() == [6, 7]


def test_jax_loads_onto_a_device_or_a_mesh(state_file: Path, tmp_path: Path) -> None:
    device = jax.devices()[0]
    mesh = jax.sharding.Mesh(np.array([device]), "rows")
    dealt = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    fwpkm.save_states(tmp_path / "states", {"a": half_read_state()}, CFG)
    for wanted in (device, dealt):
        state = fwpkm.load_state(state_file, CFG, "jax", device=wanted)
        states = fwpkm.load_states(tmp_path / "states", CFG, JAX, device=wanted)
        for found in (state, states["a"]):
            assert_same_bits(as_numpy(JAX, found), half_read_state())
            sharding = wanted if wanted is dealt else jax.sharding.SingleDeviceSharding(device)
            assert {x.sharding for x in jax.tree.leaves(found)} == {sharding}


@pytest.mark.parametrize(
    ("backend", "device", "words"),
    [
        ("torch", "nowhere", "device must be one that torch.device takes. Received: 'nowhere'"),
        ("torch", 1.5, "device must be one that torch.device takes"),
        ("jax", "cpu", "device must be one of jax.devices() or a jax.sharding.Sharding. Received: 'cpu'"),
        ("numpy", "cpu", "device must be None: fwpkm.reference does not place states. Received: 'cpu'"),
    ],
)
def test_unknown_devices(state_file: Path, backend: str, device: Any, words: str) -> None:
    with pytest.raises(ValueError, match="device") as caught:
        fwpkm.load_state(state_file, CFG, backend, device=device)
    assert words in str(caught.value)
