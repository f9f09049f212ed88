"""The PyTorch backend: the functions of SPEC.md §8, and the layer."""

from torch import serialization

from fwpkm.backends.torch.decoding import decode, start_decoding
from fwpkm.backends.torch.layer import FwPKM
from fwpkm.backends.torch.ops import (
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
from fwpkm.backends.torch.packing import pack, unpack
from fwpkm.backends.torch.rows import concat, init_state, nbytes, pending, put, reset, select, to_device
from fwpkm.containers import Memory, State

serialization.add_safe_globals([Memory, State])  # so that torch.load(weights_only=True) reads states

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
