"""The JAX backend: the functions of SPEC.md §8, and the layer."""

from fwpkm.backends.jax.layer import FwPKM
from fwpkm.backends.jax.ops import (
    apply,
    asarray,
    chunk_update,
    detach,
    device_name,
    flush,
    init_memory,
    init_state,
    lookup,
    reset,
    to_numpy,
    vjp,
)

__all__ = [
    "FwPKM",
    "apply",
    "asarray",
    "chunk_update",
    "detach",
    "device_name",
    "flush",
    "init_memory",
    "init_state",
    "lookup",
    "reset",
    "to_numpy",
    "vjp",
]
