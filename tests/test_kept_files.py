"""Files that earlier versions wrote, kept as they were (tests/data): they load, and reading goes on as it did there.

Each folder was written by the code of its version: ``layer.safetensors`` of a torch layer of 5 features, a state of two
rows that have read ten tokens, some of them masked, and in ``read_on.npz`` the next six and what the layer made of
them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from asserting import assert_same_bits
from layer_files import arrays, same_bits

import fwpkm
from fwpkm import FwPKMConfig, State
from fwpkm.agreement import BOUNDS, relative_error
from fwpkm.conformance.running import as_numpy

DATA = Path(__file__).with_name("data")
VERSIONS = sorted(folder.name for folder in DATA.iterdir())
FIELDS = {"num_heads": 2, "num_subkeys": 4, "top_k": 2, "chunk_size": 4, "learning_rate": 0.5, "boundary": "wait"}
CFG = FwPKMConfig(key_dim=4, value_dim=3, **FIELDS)


def read_on(layer, state: State, version: str) -> None:
    kept = np.load(DATA / version / "read_on.npz")
    with torch.no_grad():
        y, _ = layer(torch.from_numpy(kept["x"]), state)
        other, _ = layer(torch.from_numpy(kept["x"]))
    assert relative_error(y.numpy(), kept["y"]) <= BOUNDS["float32"].forward
    assert relative_error(other.numpy(), kept["y"]) > 0.01  # the state makes a difference


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def layer(version: str):
    layer = fwpkm.get_backend("torch").FwPKM(hidden_size=5, config=CFG)
    fwpkm.load(DATA / version / "layer.safetensors", layer)
    return layer


def test_the_kept_versions() -> None:
    assert VERSIONS == ["0.1", "0.2"]


def test_layers_and_states_of_earlier_versions_go_on(layer, version: str) -> None:
    read_on(layer, fwpkm.load_state(DATA / version / "state.safetensors", CFG, "torch"), version)


def test_a_state_of_0_1_counts_its_masked_tokens() -> None:
    """There they took positions; they stand in the pending tokens as such that nobody reads."""
    state = fwpkm.load_state(DATA / "0.1" / "state.safetensors", CFG, "numpy")
    assert state.position.tolist() == [10, 10]
    assert state.pending_mask.tolist() == [[True, False, False, False], [True, True, False, False]]


def test_states_and_packed_states_of_0_2_go_on() -> None:
    be = fwpkm.get_backend("torch")
    layer = be.FwPKM(hidden_size=5, config=CFG)
    fwpkm.load(DATA / "0.2" / "layer.safetensors", layer)
    alone = fwpkm.load_state(DATA / "0.2" / "state.safetensors", CFG, "torch")
    states = fwpkm.load_states(DATA / "0.2" / "states.safetensors", CFG, "torch")
    assert list(states) == ["first", "second"]
    assert same_bits(arrays(states["first"], be), arrays(alone, be))
    assert_same_bits(as_numpy(be, states["second"]), as_numpy(be, be.select(CFG, alone, [1])))
    packed = fwpkm.load_packed(DATA / "0.2" / "packed.safetensors")
    both = be.unpack(CFG, packed["both"], layer.memory())
    assert_same_bits(as_numpy(be, both), as_numpy(be, alone))
    read_on(layer, both, "0.2")
    rounded = be.unpack(CFG, packed["rounded"], layer.memory()).memory.values
    assert 0 < (rounded[0] - alone.memory.values[0]).abs().max() <= 2**-8 * alone.memory.values[0].abs().max()
