"""Which functions Keras runs on: the native backend's on torch and jax, keras.ops on tensorflow."""

import importlib
from types import ModuleType
from typing import Any

import keras

from fwpkm.config import FwPKMConfig
from fwpkm.containers import State
from fwpkm.tokens import Array, Tokens

_MODULES = {
    "tensorflow": "fwpkm.backends.keras.ops",
    "jax": "fwpkm.backends.jax",
    "torch": "fwpkm.backends.torch",
}


def functions() -> ModuleType:
    """The module that holds the functions of SPEC.md §8 for the framework that Keras runs on in this process.

    Raises:
        ImportError: Keras runs on another one.
    """
    name = keras.backend.backend()
    if name not in _MODULES:
        raise ImportError(
            f"the 'keras' backend runs on Keras with {', '.join(map(repr, _MODULES))}: set KERAS_BACKEND to one of "
            f"them before keras is imported. Received: keras.backend.backend()={name!r}"
        )
    return importlib.import_module(_MODULES[name])


def apply(cfg: FwPKMConfig, state: State, tokens: Tokens, update: bool, *, owned: bool) -> tuple[Array, State]:
    """``apply`` without its trace; torch may overwrite the table of a state that the caller owns."""
    options: dict[str, Any] = {name: x for name, x in tokens._asdict().items() if x is not None}
    if keras.backend.backend() == "torch":
        options["inplace"] = owned and not state.memory.values.requires_grad
    output, state, _ = functions().apply(cfg, on_host(state), update=update, **options)
    return output, state


def on_host(state: State) -> State:
    """The state with its position where the native functions want it: on the CPU in torch (SPEC.md §5)."""
    return state._replace(position=state.position.cpu()) if keras.backend.backend() == "torch" else state


def whole_batch(x: Array, batch_size: int) -> Array:
    """``x`` with a known batch size; a TensorFlow graph, which may not know it yet, fails where another one comes."""
    if x.shape[0] is None:
        import tensorflow  # keras.ops has no check that runs inside a graph

        return tensorflow.ensure_shape(x, (batch_size, *x.shape[1:]), name=f"stateful_layer_needs_{batch_size}_rows")
    return x
