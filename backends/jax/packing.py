"""States that cost what they hold (SPEC.md §10): ``fwpkm.packing`` on JAX's arrays, outside of what is traced."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fwpkm import packing
from fwpkm.backends.jax.arguments import from_numpy, takes_numpy
from fwpkm.backends.jax.ops import to_numpy
from fwpkm.backends.jax.rows import init_state, is_traced
from fwpkm.backends.jax.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.packing import PackedState


@takes_numpy
def pack(cfg: FwPKMConfig, state: State[Array], memory: Memory[Array], dtype: str | None = None) -> PackedState:
    """What a state holds that the initial ``memory`` does not; its tables are looked at on the host."""
    _refuse_traced("pack", state, memory)
    return packing.pack(cfg, state, memory, dtype, SELF, to_numpy)


def unpack(cfg: FwPKMConfig, packed: PackedState | Sequence[PackedState], memory: Memory[Array]) -> State[Array]:
    """The state that was packed, dealt out as ``init_state`` of ``memory`` deals it."""
    memory = jax.tree.map(
        functools.partial(from_numpy, "memory"), memory
    )  # of ``packed`` NumPy's arrays are what is wanted
    _refuse_traced("unpack", memory)
    whole = packing.prepare(cfg, packed, memory, SELF, to_numpy)
    fresh = init_state(cfg, memory, whole.batch_size)
    state = packing.unpack(cfg, whole, Memory(*map(to_numpy, memory)))

    def placed(x: np.ndarray, like: jax.Array) -> jax.Array:
        return jax.device_put(jnp.array(x), like.sharding)  # a copy: device_put alone may share NumPy's

    return state.map(placed, fresh)


def _refuse_traced(function: str, *trees: Any) -> None:
    if any(is_traced(x) for x in jax.tree.leaves(trees)):
        raise ValueError(
            f"{function} needs arrays whose values are known, since what it returns has a size that depends on them: "
            "call it outside of jax.jit, grad, vmap and scan. Received: traced arrays"
        )
