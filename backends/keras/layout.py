"""A state as Keras passes it: a list of its arrays in the order of fwpkm.State, with the names that files give them."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import KerasTensor, ops

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.containers import LayerTrace, Memory, State, memories_for, memory_specs, state_specs
from fwpkm.tokens import Array, ArraySpec

NAMES = tuple(state_specs(FwPKMConfig(), None).arrays())


def from_names(arrays: Mapping[str, Any]) -> State:
    """The inverse of ``State.arrays``."""
    memory = Memory(**{name: arrays[f"memory.{name}"] for name in Memory._fields})
    return State(memory, **{name: arrays[name] for name in NAMES if not name.startswith("memory.")})


def as_state(arrays: Any, argument: str = "initial_state") -> State:
    """The state whose arrays a layer with ``return_state=True`` returns, for files and the functions of SPEC.md §8.

    Args:
        arrays: the list of a state's arrays, in the order of :class:`fwpkm.State`; a State is returned as it is.
        argument: what an error calls them.

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
    return state_specs(cfg, batch_size)._replace(memory=memory).arrays()


def trace_spec(cfg: FwPKMConfig, shape: Sequence[int | None], dtype: str) -> LayerTrace:
    """What the trace of a call on x ``[B, T, hidden_size]`` consists of, as KerasTensors; sizes may be unknown."""
    batch, length = shape[:2]
    memories: Any = memories_for(cfg, batch)  # type: ignore[arg-type]
    reads = (batch, length, cfg.slots_per_token)
    losses = (memories, None if length is None else schedule.max_writes(cfg, length))
    return LayerTrace(
        slots=KerasTensor(reads, dtype="int32"),
        weights=KerasTensor(reads, dtype=dtype),
        memorization=KerasTensor(losses, dtype=dtype),
        addressing=KerasTensor(losses, dtype=dtype),
        writes=KerasTensor((memories,), dtype="int32"),
        gate=KerasTensor((batch, length), dtype=dtype),
    )


def copies_of(table: keras.Variable) -> Any:
    """An initializer: the table for every row."""

    def initialize(shape: tuple[int, ...], dtype: Any = None) -> Array:
        return ops.copy(ops.broadcast_to(ops.cast(table, dtype), shape))  # torch would write into a view

    return initialize


def fill(weights: Sequence[keras.Variable], state: Sequence[keras.Variable], store: Any) -> bool:
    """Assign what Keras saved of a layer, weights and then perhaps a state; whether that filled ``state`` too.

    Raises:
        ValueError: neither so many arrays as weights, nor those and a state's; or weights of other shapes.
    """
    found = [store[f"{i}"] for i in range(len(store.keys()))]
    if len(found) not in (len(weights), len(weights) + len(NAMES)):
        raise ValueError(
            f"the file must hold the {len(weights)} weights of the layer, with or without the {len(NAMES)} arrays of a "
            f"state behind them. Received: {len(found)} arrays"
        )
    wrong = [(x.name, tuple(x.shape), tuple(y.shape)) for x, y in zip(weights, found) if not _fits(x, y)]
    if wrong:
        wanted, received = (", ".join(f"{x[0]} {x[i]}" for x in wrong) for i in (1, 2))
        raise ValueError(f"the file must hold weights of the layer's shapes: {wanted}. Received: {received}")
    saved = found[len(weights) :]
    has_state = bool(state and saved) and all([_fits(x, y) for x, y in zip(state, saved)])
    for weight, x in zip([*weights, *state] if has_state else weights, found):
        weight.assign(x)
    return has_state


def _fits(weight: keras.Variable, x: Any) -> bool:
    return tuple(weight.shape) == tuple(x.shape)
