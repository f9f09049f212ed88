"""The JAX backend: the functions of SPEC.md §8, and the layer."""

from jax import export

from fwpkm.backends.jax.decoding import decode, start_decoding
from fwpkm.backends.jax.layer import FwPKM
from fwpkm.backends.jax.ops import (
    apply,
    asarray,
    chunk_update,
    detach,
    device_name,
    flush,
    init_memory,
    lookup,
    to_numpy,
    vjp,
)
from fwpkm.backends.jax.packing import pack, unpack
from fwpkm.backends.jax.rows import concat, init_state, nbytes, pending, put, reset, select, to_device
from fwpkm.containers import LayerTrace, Memory, State, Trace

for _kind in (Memory, State, Trace, LayerTrace):  # so that what jax.export has exported can be serialized
    export.register_namedtuple_serialization(_kind, serialized_name=f"fwpkm.{_kind.__name__}")

__all__ = [
    "FwPKM",
    "apply",
    "asarray",
    "chunk_update",
    "concat",
    "decode",
    "detach",
    "device_name",
    "flush",
    "init_memory",
    "init_state",
    "lookup",
    "nbytes",
    "pack",
    "pending",
    "put",
    "reset",
    "select",
    "start_decoding",
    "to_device",
    "to_numpy",
    "unpack",
    "vjp",
]


def __dir__() -> list[str]:
    return __all__
