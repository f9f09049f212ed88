"""The torch backend on its Triton kernels, as a module with the functions of SPEC.md §8.

On the GPU, or on the CPU in Triton's interpreter, which the tests of the benchmarks use.
"""

import functools
import os
from typing import Any

import torch

from fwpkm.backends import torch as be
from fwpkm.backends.torch import detach, init_state, reset, to_numpy, vjp

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

apply = functools.partial(be.apply, implementation="triton")
flush = functools.partial(be.flush, implementation="triton")
lookup = functools.partial(be.lookup, implementation="triton")
chunk_update = functools.partial(be.chunk_update, implementation="triton")

__all__ = [
    "DEVICE",
    "INTERPRETED",
    "apply",
    "asarray",
    "chunk_update",
    "detach",
    "flush",
    "init_state",
    "lookup",
    "reset",
    "to_numpy",
    "vjp",
]


def asarray(x: Any, dtype: str) -> torch.Tensor:
    """A copy on the device; of int32, which only positions are, on the CPU."""
    return be.asarray(x, dtype).to("cpu" if dtype == "int32" else DEVICE)
