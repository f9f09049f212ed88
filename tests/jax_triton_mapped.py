"""Rows dealt out to two devices, on the kernels and by XLA: prints the largest errors, forward and gradient."""

import importlib
import os
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from quick_interpreter import quicken

from fwpkm import FwPKMConfig
from fwpkm.agreement import relative_error
from fwpkm.backends import jax as be
from fwpkm.containers import Memory

CFG = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=5, top_k=3, chunk_size=4)


def step(implementation: str | None, memory: Memory, query: Any, value: Any) -> Any:
    """Outputs and tables, and gradients of the initial memory too, which every device has whole."""

    def rows(memory: Memory, query: Any, value: Any) -> Any:
        state = be.init_state(CFG, memory, len(query))
        output, state, _ = be.apply(CFG, state, query, value, implementation=implementation)
        return output, state.memory

    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    dealt = jax.shard_map(rows, mesh=mesh, in_specs=(P(), P("rows"), P("rows")), out_specs=P("rows"))

    def total(*given: Any) -> Any:
        output, tables = dealt(*given)
        return (output**2).sum() + (tables.values**2).sum(), (output, tables)

    return jax.jit(jax.value_and_grad(total, range(3), has_aux=True))(memory, query, value)


def main() -> None:
    """Print both."""
    quicken(importlib.import_module("triton.runtime.interpreter"))
    rng = np.random.default_rng(0)
    given = be.init_memory(CFG, seed=1), *(jnp.asarray(rng.random((2, 6, 16), np.float32) - 0.5) for _ in range(2))
    received, expected = (step(implementation, *given) for implementation in ("triton", None))
    for one, other in zip(received, expected):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        print(max(relative_error(x, y) for x, y in pairs))


if __name__ == "__main__":
    main()
