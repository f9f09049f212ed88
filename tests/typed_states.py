"""What type checkers know of states and layers; ``make types`` reads it, nothing runs it."""

from typing import Any, assert_type

import jax
import numpy as np
import torch

import fwpkm
from fwpkm import State
from fwpkm.backends.jax import FwPKM as JaxLayer
from fwpkm.backends.torch import FwPKM as TorchLayer
from fwpkm.integrations.equinox import FwPKM as EquinoxLayer
from fwpkm.integrations.nnx import FwPKM as NnxLayer


def of_torch(layer: TorchLayer, x: torch.Tensor) -> None:
    y, state = layer(x)
    assert_type(y, torch.Tensor)
    assert_type(state, State[torch.Tensor])
    assert_type(state.memory.values, torch.Tensor)
    assert_type(state.detach().to("cuda").clone().position, torch.Tensor)
    assert_type(layer(x, state, return_trace=True), tuple[Any, ...])
    assert_type(fwpkm.FwPKM("torch", 64), TorchLayer)
    assert_type(fwpkm.backends.torch.flush(layer.config, state)[0], State[torch.Tensor])


def of_jax(layer: JaxLayer, variables: dict[str, Any], x: jax.Array) -> None:
    y, state = layer.apply(variables, np.asarray(x))
    assert_type(y, jax.Array)
    assert_type(state.pending_query, jax.Array)
    assert_type(layer.decode(variables, x, state), tuple[jax.Array, State[jax.Array]])
    assert_type(fwpkm.backends.jax.select(layer.config, state, [0]).position, jax.Array)


def of_modules(flax: NnxLayer, equinox: EquinoxLayer, x: jax.Array) -> None:
    for layer in (flax, equinox):
        y, state = layer(x, layer.init_state(2))
        assert_type(y, jax.Array)
        assert_type(state.memory.keys, jax.Array)


def of_numpy(cfg: fwpkm.FwPKMConfig) -> None:
    memory = fwpkm.reference.init_memory(cfg)
    assert_type(fwpkm.reference.init_state(cfg, memory, 1).memory.keys, np.ndarray)
