"""Backends by the names that ``fwpkm conform`` takes: those of this package, Keras by its backend, or any module."""

import importlib
import importlib.util
import os
import traceback
from collections.abc import Sequence
from functools import partial
from importlib.machinery import PathFinder
from types import SimpleNamespace
from typing import Any

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory
from fwpkm.registry import backend_names, get_backend

KERAS = ("keras-tensorflow", "keras-torch", "keras-jax")
DEFAULT = (*(name for name in backend_names() if name != "keras"), *KERAS)
"""What is judged unless names are given: not the kernels, which take minutes without a GPU."""
KERNELS = ("triton", "jax-triton")
"""Torch's and JAX's on them."""

FUNCTIONS = (
    *("init_memory", "init_state", "apply", "flush", "lookup", "chunk_update"),
    *("reset", "select", "concat", "put", "pending", "nbytes", "pack", "unpack", "asarray", "to_numpy"),
)
"""What a module must have (SPEC.md §8); ``vjp`` as well, for its gradients to be judged."""


def found(name: str) -> bool:
    """Whether a name is one of these, or its top package can be found from the current folder; imports nothing."""
    top = name.partition(".")[0]
    if name in (*DEFAULT, "keras", *KERNELS) or not top:
        return bool(top)
    return bool(importlib.util.find_spec(top) or PathFinder.find_spec(top, [os.getcwd()]))


class CannotRunError(Exception):
    """A backend cannot be judged here; the message says why."""


def unit(names: Sequence[str]) -> int:
    """What Dk and Dv of every case are multiples of, so that all these backends can be judged on the same ones."""
    return 16 if {*KERNELS}.intersection(names) else 1


def environment(name: str, dtype: str, cache: str) -> dict[str, str]:
    """The variables of a process that imports the backend's framework.

    Args:
        name: the backend's; "triton" goes to Triton's interpreter where torch finds no GPU.
        dtype: "float64" switches JAX to it.
        cache: a folder for what JAX compiles, which Keras on JAX then need not compile again.
    """
    defaults = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}  # two processes at a time, on tables this small
    jax = {"JAX_ENABLE_X64": str(int(dtype == "float64")), "JAX_COMPILATION_CACHE_DIR": cache}
    jax |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    variables = defaults | os.environ | jax
    if name in KERAS:
        variables["KERAS_BACKEND"] = name.partition("-")[2]
    if name == "triton" and not importlib.import_module("torch").cuda.is_available():
        variables["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    return variables


def load(name: str, dtype: str) -> Any:
    """The module, or the functions, that a name stands for, in a process with its ``environment``.

    Raises:
        CannotRunError: it cannot be imported, lacks functions of SPEC.md §8, or is of the kernels and cannot serve the
            dtype.
    """
    try:
        if name in KERNELS:
            return _kernels(dtype) if name == "triton" else _jax_kernels(dtype)
        known = "keras" if name in KERAS else name
        module: Any = get_backend(known) if known in backend_names() else importlib.import_module(known)
    except ImportError as error:
        known_names = ", ".join((*DEFAULT, *KERNELS))
        missing = isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0])
        hint = f". Expected one of {known_names}, or a module that can be imported from here" if missing else ""
        raise CannotRunError(f"{error}{hint}") from error
    except CannotRunError:
        raise
    except Exception as error:
        words = "".join(traceback.format_exception_only(error)).split()
        raise CannotRunError(f"importing it raised {' '.join(words)}") from error
    lacking = [function for function in FUNCTIONS if not callable(getattr(module, function, None))]
    if lacking:
        raise CannotRunError(f"the module {module.__name__} lacks these functions of SPEC.md §8: {', '.join(lacking)}")
    return module


def _kernels(dtype: str) -> Any:
    """The torch backend held to its kernels, on a GPU where there is one, else in Triton's interpreter.

    Raises:
        CannotRunError: they cannot serve any case of the dtype here.
    """
    be: Any = get_backend("torch")
    device = "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"

    def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
        return Memory(*(table.to(device) for table in be.init_memory(cfg, memories, seed)))

    def asarray(x: Any, dtype: str) -> Any:
        return be.asarray(x, dtype).to("cpu" if dtype.startswith("int") else device)  # positions stay there (§5)

    cfg = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=4, top_k=1)
    query = asarray(np.zeros((1, 1, cfg.key_dim)), dtype)
    if reason := importlib.import_module("fwpkm.kernels").why_unsupported(cfg, init_memory(cfg), query):
        raise CannotRunError(f"the kernels cannot serve {dtype} here: {reason}")
    return SimpleNamespace(**vars(be) | _held(be) | {"init_memory": init_memory, "asarray": asarray})


def _jax_kernels(dtype: str) -> Any:
    """The JAX backend held to the kernels, on a GPU where there is one, else in Triton's interpreter.

    Raises:
        CannotRunError: they cannot serve any case of the dtype here.
    """
    be: Any = get_backend("jax")
    if importlib.import_module("jax").default_backend() == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    cfg = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=4, top_k=1)
    try:
        be.lookup(cfg, be.init_memory(cfg), be.asarray(np.zeros((1, 1, cfg.key_dim)), dtype), implementation="triton")
    except ValueError as error:
        raise CannotRunError(f"the kernels cannot serve {dtype} here: {error}") from error
    return SimpleNamespace(**vars(be) | _held(be))


def _held(be: Any) -> dict[str, Any]:
    names = ("apply", "flush", "lookup", "chunk_update")
    return {name: partial(getattr(be, name), implementation="triton") for name in names}
