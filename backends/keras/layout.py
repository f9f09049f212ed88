"""A state as Keras passes it: a list of its arrays in the order of fwpkm.State, with the names that files give them."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, memories_for, memory_specs, state_specs
from fwpkm.tokens import Array, ArraySpec


def by_name(state: State) -> dict[str, Any]:
    """The arrays of a state, or their specs, by name; those of its memory as "memory.keys" and so on."""
    fields = state._asdict()
    memory = fields.pop("memory")
    return {f"memory.{name}": x for name, x in memory._asdict().items()} | fields


NAMES = tuple(by_name(state_specs(FwPKMConfig(), None)))


def from_names(arrays: Mapping[str, Any]) -> State:
    """The inverse of :func:`by_name`."""
    memory = Memory(**{name: arrays[f"memory.{name}"] for name in Memory._fields})
    return State(memory, **{name: arrays[name] for name in State._fields if name != "memory"})


def unflatten(arrays: Any, argument: str = "initial_state") -> State:
    """A state from the list of its arrays; a State is itself. ``argument`` is what the caller passed it as.

    Raises:
        ValueError: neither a State nor so many arrays.
    """
    if isinstance(arrays, State):
        return arrays
    if not isinstance(arrays, Sequence) or len(arrays) != len(NAMES):
        received = f"{len(arrays)} arrays" if isinstance(arrays, Sequence) else type(arrays).__name__
        raise ValueError(
            f"{argument} must be a fwpkm.State or the list of its arrays [{', '.join(NAMES)}]. Received: {received}"
        )
    return from_names(dict(zip(NAMES, arrays)))


def specs(cfg: FwPKMConfig, batch_size: Any) -> dict[str, ArraySpec]:
    """What a state of ``batch_size`` rows, None where unknown, consists of."""
    memory = memory_specs(cfg, memories_for(cfg, batch_size))  # one in batch scope, however many rows
    return by_name(state_specs(cfg, batch_size)._replace(memory=memory))


def copies_of(table: keras.Variable) -> Any:
    """An initializer: the table for every row."""

    def initialize(shape: tuple[int, ...], dtype: Any = None) -> Array:
        return ops.copy(ops.broadcast_to(ops.cast(table, dtype), shape))  # torch would write into a view

    return initialize
