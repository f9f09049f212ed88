"""Which functions Keras runs on: the native backend's on torch and jax, keras.ops on tensorflow."""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import keras
from keras import ops

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, Trace
from fwpkm.tokens import Array, Tokens

_MODULES = {
    "tensorflow": "fwpkm.backends.keras.ops",
    "jax": "fwpkm.backends.jax",
    "torch": "fwpkm.backends.torch",
}


@cache
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


def apply(
    cfg: FwPKMConfig,
    state: State | Memory,
    tokens: Tokens,
    update: bool,
    *,
    cu_seqlens: Array | None = None,
    owned: bool = False,
) -> tuple[Array, State | None, Trace]:
    """``apply``; torch may overwrite the table of a state that the caller owns."""
    options: dict[str, Any] = dict(tokens.present(), cu_seqlens=cu_seqlens, update=update)
    if keras.backend.backend() == "torch" and isinstance(state, State):
        options["inplace"] = owned and not state.memory.values.requires_grad
    return functions().apply(cfg, state, **options)


def decode(cfg: FwPKMConfig, state: State, tokens: Tokens) -> tuple[Array, State]:
    """Read one token of each row; jax may overwrite the state, and torch one that it may have for itself."""
    if keras.backend.backend() == "tensorflow":
        output, after, _ = functions().apply(cfg, state, **tokens.present())
        return output, after
    if keras.backend.backend() == "jax":
        return functions().decode(cfg, state, **tokens.present())
    device, owned = state.memory.keys.device, all(getattr(x, _OWNED, False) for x in state.arrays().values())
    state = functions().detach(state).map(lambda x: x.to(device).contiguous())
    state = _owned(state if owned else state.map(lambda x: x.clone()))
    return functions().decode(cfg, state, **tokens.present()), state


def start_decoding(state: State) -> State:
    """A copy of a state for the layer's ``decode`` to overwrite; on tensorflow, which overwrites nothing, the state.

    Raises:
        ValueError: not a state.
    """
    copy = functions().start_decoding(state)
    return _owned(copy) if keras.backend.backend() == "torch" else copy


_OWNED = "_fwpkm_owned"
"""What torch tensors are marked by whose memory no other state shares, so that decode may overwrite them."""


def _owned(state: State) -> State:
    for x in state.arrays().values():
        setattr(x, _OWNED, True)
    return state


def share(state: State) -> None:
    """Take the marks of a state: a call that reads on from it may return the same tables."""
    for x in state.arrays().values():
        if hasattr(x, _OWNED):
            delattr(x, _OWNED)


def check_distribution(variables: Sequence[keras.Variable]) -> None:
    """Raise where a layer's variables are not dealt out as ``keras.distribution`` says, or tables would be by slots.

    Raises:
        ValueError: a distribution that Keras carries out on jax alone, or a layout of a table by slots or sub-keys.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    if keras.backend.backend() != "jax":
        raise ValueError(
            "keras.distribution must be left out on tensorflow and torch, where Keras deals nothing out to devices: "
            "set KERAS_BACKEND to jax, or call keras.distribution.set_distribution(None). "
            f"Received: {distribution} on {keras.backend.backend()}"
        )
    for variable in variables:
        layout = distribution.get_variable_layout(variable)
        if layout is not None and variable.name.endswith(("memory_keys", "memory_values")):
            _check_layout(variable, layout)


def _check_layout(variable: keras.Variable, layout: Any) -> None:
    """Raise where a layout splits a table by slots or sub-keys. That axes divide what they split JAX has seen to."""
    rows, columns = variable.name.startswith("state_"), variable.name.endswith("values")
    allowed = [0] * rows + [len(variable.shape) - 1] * columns
    if any(axis is not None for i, axis in enumerate(layout.axes) if i not in allowed):
        raise ValueError(
            f"{variable.path} must not be dealt out to devices by slots: a token may write any of them. A layout may "
            "name the last axis of values, the columns, and the first axis of a state, its rows. "
            f"Received: {tuple(layout.axes)}"
        )


def count(flags: Array, at_most: int | Array) -> int | Array:
    """How many flags are set, where the values are known; else the most that can be, and at least one."""
    if hasattr(flags, "numpy"):
        return int(ops.sum(ops.cast(flags, "int32")))
    return at_most if isinstance(at_most, int) else ops.maximum(at_most, 1)


def whole_batch(x: Array, batch_size: int) -> Array:
    """``x`` with a known batch size; a TensorFlow graph, which may not know it yet, fails where another one comes."""
    if x.shape[0] is None:
        import tensorflow  # keras.ops has no check that runs inside a graph

        return tensorflow.ensure_shape(x, (batch_size, *x.shape[1:]), name=f"stateful_layer_needs_{batch_size}_rows")
    return x


def as_many_rows(mask: Array, x: Array) -> Array:
    """The mask; a TensorFlow graph that does not know its rows fails where they are not those of x."""
    if keras.backend.backend() != "tensorflow":
        return mask
    from fwpkm.backends.keras.rows import with_rows

    return with_rows(mask, ops.shape(x)[0])


def after(read: Array, state: State) -> State:
    """The state once all that a call computes is there; a TensorFlow graph else assigns some of it before it fails."""
    if keras.backend.backend() != "tensorflow":
        return state
    import tensorflow

    with tensorflow.control_dependencies([read, *state.arrays().values()]):
        return state.map(tensorflow.identity)


def without_names(layer: Any, layer_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Array], Any]:
    """``layer_call`` as a function of x alone, which TensorFlow can compute anew inside a graph.

    Raises:
        ValueError: the layer is stateful, or on tensorflow there is an initial state.
    """
    names = list(inspect.signature(layer_call).parameters)
    given = dict(zip(names, args)) | kwargs
    state = given.get("initial_state")
    if layer.stateful or (state is not None and keras.backend.backend() == "tensorflow"):
        raise ValueError(
            "keras.RematScope computes a layer twice, which one that keeps a state, or on tensorflow is given one, "
            "cannot be: make this layer outside of the scope. Received: "
            f"{'stateful=True' if layer.stateful else 'initial_state given'}"
        )
    given.pop(names[0])
    return functools.partial(layer_call, **given)


def check_dtype(dtype: str) -> None:
    """Raise a ValueError for float64 on JAX that is confined to 32 bits."""
    if keras.backend.backend() == "jax":
        importlib.import_module(f"{_MODULES['jax']}.checks").check_dtype(dtype)


def check_sizes(x: Array) -> None:
    """Raise a ValueError where a dimension is a symbol of JAX, as ``model.export`` makes them there."""
    if keras.backend.backend() == "jax" and not all(isinstance(size, int | None) for size in x.shape):
        raise ValueError(
            "x must have sizes that are numbers, as the memory decides by them how much is written: on jax export one "
            "program for each batch size and length, by model.export(path, input_signature=[keras.InputSpec(shape="
            "(B, T), dtype=...)]) with the shape and dtype of the model's input, and pad the last piece under a mask. "
            f"Received: shape {tuple(x.shape)}"
        )


def is_exporting() -> bool:
    """Whether torch.export traces the call."""
    if keras.backend.backend() != "torch":
        return False
    return bool(importlib.import_module(f"{_MODULES['torch']}.exporting").is_exporting())
