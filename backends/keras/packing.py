"""States that cost what they hold (SPEC.md §10): ``fwpkm.packing`` on tensors of tensorflow, outside of its graphs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from fwpkm import packing
from fwpkm.backends.keras.rows import implementation
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.packing import PackedState
from fwpkm.tokens import Array


def pack(cfg: FwPKMConfig, state: State, memory: Memory, dtype: str | None = None) -> PackedState:
    """What a state holds that the initial ``memory`` does not."""
    return packing.pack(cfg, state, memory, dtype, implementation(), _to_numpy)


def unpack(cfg: FwPKMConfig, packed: PackedState | Sequence[PackedState], memory: Memory) -> State:
    """The state that was packed."""
    whole = packing.prepare(cfg, packed, memory, implementation(), _to_numpy)
    state = packing.unpack(cfg, whole, Memory(*map(_to_numpy, memory)))
    return state.map(ops.convert_to_tensor)


def _to_numpy(x: Array) -> np.ndarray:
    if not hasattr(x, "numpy"):
        raise ValueError(
            "pack and unpack need tensors whose values are known, since the size of what is packed depends on them: "
            "call them outside of tf.function. Received: a tensor of a graph"
        )
    known: Any = ops.convert_to_numpy(x)
    return known
