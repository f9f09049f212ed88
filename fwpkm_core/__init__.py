"""Fast-weight Product Key Memory: an episodic memory layer for Keras, PyTorch and JAX (SPEC.md).

``get_backend(name)`` returns the module that holds the memory's functions for one framework; ``fwpkm.reference`` is
the NumPy one. Importing this package imports no framework.
"""

from importlib.metadata import version as _version

from fwpkm import reference
from fwpkm.config import FwPKMConfig
from fwpkm.containers import LayerTrace, Lookup, Losses, Memory, State, Trace
from fwpkm.diagnostics import Recorder, summarize
from fwpkm.files import load, load_state, save, save_state
from fwpkm.registry import backend_names, backend_status, get_backend

__version__ = _version("fwpkm")

__all__ = [
    "FwPKMConfig",
    "LayerTrace",
    "Lookup",
    "Losses",
    "Memory",
    "Recorder",
    "State",
    "Trace",
    "__version__",
    "backend_names",
    "backend_status",
    "get_backend",
    "load",
    "load_state",
    "reference",
    "save",
    "save_state",
    "summarize",
]
