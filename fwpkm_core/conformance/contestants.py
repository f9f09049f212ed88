"""Backends by the names that ``fwpkm conform`` takes: those of this package, Keras by its backend, or any module."""

import importlib
import os
import traceback
from types import ModuleType

from fwpkm.registry import backend_names, get_backend

KERAS = ("keras-tensorflow", "keras-torch", "keras-jax")
DEFAULT = (*(name for name in backend_names() if name != "keras"), *KERAS)
"""What is judged unless names are given."""

FUNCTIONS = ("init_memory", "init_state", "apply", "flush", "lookup", "chunk_update", "reset", "asarray", "to_numpy")
"""What a module must have (SPEC.md §8); ``vjp`` as well, for its gradients to be judged."""


class CannotRunError(Exception):
    """A backend cannot be judged here; the message says why."""


def environment(name: str, dtype: str, cache: str) -> dict[str, str]:
    """The variables of a process that imports the backend's framework.

    Args:
        name: the backend's.
        dtype: "float64" switches JAX to it.
        cache: a folder for what JAX compiles, which Keras on JAX then need not compile again.
    """
    defaults = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}  # two processes at a time, on tables this small
    jax = {"JAX_ENABLE_X64": str(int(dtype == "float64")), "JAX_COMPILATION_CACHE_DIR": cache}
    jax |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    variables = defaults | os.environ | jax
    if name in KERAS:
        variables["KERAS_BACKEND"] = name.partition("-")[2]
    return variables


def load(name: str) -> ModuleType:
    """The module that a name stands for, in a process with its ``environment``.

    Raises:
        CannotRunError: it cannot be imported, or lacks functions of SPEC.md §8.
    """
    if name == "triton":
        raise CannotRunError("conform does not drive the Triton kernels yet; name torch")
    try:
        known = "keras" if name in KERAS else name
        module = get_backend(known) if known in backend_names() else importlib.import_module(name)
    except ImportError as error:
        known_names = ", ".join((*DEFAULT, "triton"))
        missing = isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0])
        hint = f". Expected one of {known_names}, or a module that can be imported from here" if missing else ""
        raise CannotRunError(f"{error}{hint}") from error
    except Exception as error:
        raise CannotRunError("importing it raised " + _one_line(error)) from error
    lacking = [function for function in FUNCTIONS if not callable(getattr(module, function, None))]
    if lacking:
        raise CannotRunError(f"the module {module.__name__} lacks these functions of SPEC.md §8: {', '.join(lacking)}")
    return module


def _one_line(error: Exception) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())
