"""A state as Keras passes it: a list of its seven arrays, in the order of fwpkm.State."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Array, Memory, State
from fwpkm.validation import memories_for

NAMES = ("memory.keys", "memory.values", *State._fields[1:])


class Form(NamedTuple):
    """The shape and dtype of one array of a state."""

    shape: tuple[int | None, ...]
    dtype: str


def forms(cfg: FwPKMConfig, batch_size: Any, dtype: str) -> list[Form]:
    """What a state of ``batch_size`` rows, None where unknown, consists of; ``dtype`` is that of the tables."""
    memories, tokens = memories_for(cfg, batch_size), (batch_size, cfg.capacity)
    floats = [
        (memories, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2),
        (memories, cfg.num_slots, cfg.value_dim),
        (*tokens, cfg.num_heads * cfg.key_dim),
        (*tokens, cfg.value_dim),
        tokens,
    ]
    return [*(Form(shape, dtype) for shape in floats), Form(tokens, "bool"), Form((batch_size,), "int32")]


def flatten(state: State) -> list[Array]:
    """The arrays of a state."""
    return [*state.memory, *state[1:]]


def unflatten(arrays: Any) -> State:
    """The inverse of :func:`flatten`; a State is itself.

    Raises:
        ValueError: neither a State nor seven arrays.
    """
    if isinstance(arrays, State):
        return arrays
    if not isinstance(arrays, Sequence) or len(arrays) != len(NAMES):
        received = f"{len(arrays)} arrays" if isinstance(arrays, Sequence) else type(arrays).__name__
        raise ValueError(
            f"initial_state must be a fwpkm.State or the list of its arrays [{', '.join(NAMES)}]. Received: {received}"
        )
    return State(Memory(*arrays[:2]), *arrays[2:])


def copies_of(table: keras.Variable) -> Any:
    """An initializer: the table for every row."""

    def initialize(shape: tuple[int, ...], dtype: Any = None) -> Array:
        return ops.copy(ops.broadcast_to(ops.cast(table, dtype), shape))  # torch would write into a view

    return initialize
