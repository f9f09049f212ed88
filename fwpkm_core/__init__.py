"""Fast-weight Product Key Memory: an episodic memory layer for Keras, PyTorch and JAX (SPEC.md).

The layer is ``fwpkm.backends.torch.FwPKM``, ``fwpkm.backends.jax.FwPKM`` or ``fwpkm.backends.keras.FwPKM``, in Flax
NNX and Equinox that of ``fwpkm.integrations``. ``get_backend(name)`` returns the module that holds the memory's
functions for one framework; ``fwpkm.reference`` is the NumPy one. Importing this package imports no framework.
"""

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from fwpkm import reference
from fwpkm.config import FwPKMConfig
from fwpkm.containers import LayerTrace, Lookup, Losses, Memory, State, Trace
from fwpkm.diagnostics import Recorder, summarize
from fwpkm.files import load, load_state, load_states, save, save_state, save_states
from fwpkm.installation.found import backend_status
from fwpkm.packed_files import load_packed, save_packed
from fwpkm.packing import PackedState
from fwpkm.registry import FwPKM, backend_names, get_backend

if TYPE_CHECKING:
    from fwpkm import backends as backends
    from fwpkm import integrations as integrations

__version__ = _version("fwpkm")

__all__ = [
    "FwPKM",
    "FwPKMConfig",
    "LayerTrace",
    "Lookup",
    "Losses",
    "Memory",
    "PackedState",
    "Recorder",
    "State",
    "Trace",
    "__version__",
    "backend_names",
    "backend_status",
    "get_backend",
    "load",
    "load_packed",
    "load_state",
    "load_states",
    "reference",
    "save",
    "save_packed",
    "save_state",
    "save_states",
    "summarize",
]

_PACKAGES = ("backends", "integrations")
"""Imported when asked for, and found by completion before that."""


def __getattr__(name: str) -> Any:
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
