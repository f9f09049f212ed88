"""The contestant "triton": the torch backend held to its kernels, on a GPU where there is one (docs/kernels.md).

Without a GPU they run in Triton's interpreter, which ``contestants.environment`` switches on.
"""

import functools
import importlib
from typing import Any

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory
from fwpkm.registry import get_backend

_be: Any = get_backend("torch")
_DEVICE = "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"

init_state, reset, to_numpy, vjp = _be.init_state, _be.reset, _be.to_numpy, _be.vjp
apply, flush, lookup, chunk_update = (
    functools.partial(function, implementation="triton")
    for function in (_be.apply, _be.flush, _be.lookup, _be.chunk_update)
)


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
    """Fresh tables where the kernels run (SPEC.md §7)."""
    return Memory(*(table.to(_DEVICE) for table in _be.init_memory(cfg, memories, seed)))


def asarray(x: Any, dtype: str) -> Any:
    """A tensor where the kernels run; integers, which are positions, stay on the CPU (SPEC.md §5)."""
    return _be.asarray(x, dtype).to("cpu" if dtype.startswith("int") else _DEVICE)


def why_unsupported(dtype: str) -> str | None:
    """Why the kernels cannot serve any case of a dtype here, or None where they can."""
    cfg = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=4, top_k=1)
    query = asarray(np.zeros((1, 1, cfg.key_dim)), dtype)
    return importlib.import_module("fwpkm.kernels").why_unsupported(cfg, init_memory(cfg), query)
