"""The PyTorch backend: the functions of SPEC.md §8, and the layer."""

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
    "decode",
    "detach",
    "device_name",
    "flush",
    "init_memory",
    "init_state",
    "lookup",
    "reset",
    "start_decoding",
    "to_numpy",
    "vjp",
]
