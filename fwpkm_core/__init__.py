"""Fast-weight Product Key Memory: an episodic memory layer for Keras, PyTorch and JAX (SPEC.md).

``get_backend(name)`` returns the module that holds the memory's functions for one framework; ``fwpkm.reference`` is
the NumPy one. Importing this package imports no framework.
"""

from importlib.metadata import version as _version

from fwpkm import reference
from fwpkm.config import FwPKMConfig
from fwpkm.containers import LayerTrace, Lookup, Losses, Memory, State, Trace
from fwpkm.diagnostics import Recorder, summarize
from fwpkm.files import load, load_state, load_states, save, save_state, save_states
from fwpkm.installation.found import backend_status
from fwpkm.packed_files import load_packed, save_packed
from fwpkm.packing import PackedState
from fwpkm.registry import backend_names, get_backend

__version__ = _version("fwpkm")

__all__ = [
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
