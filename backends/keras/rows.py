"""Rows of a state, and states of rows, in keras.ops (SPEC.md §5)."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import keras
from keras import ops

from fwpkm import rows as row_checks
from fwpkm import schedule, validation
from fwpkm.backends.keras.tokens import blank, nan_where, no_tokens, outer
from fwpkm.backends.keras.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, memories_for
from fwpkm.tokens import Array, Axis


def init_state(cfg: FwPKMConfig, memory: Memory, batch_size: int | Array) -> State:
    """A state at position 0; ``batch_size`` may be an int32 scalar tensor, for one table."""
    if ops.is_tensor(batch_size):
        validation.check_memory(cfg, memory, 1, implementation())
    else:
        validation.check_initial(cfg, memory, batch_size, implementation())
    memories = memories_for(cfg, batch_size)
    tables = Memory(*(ops.broadcast_to(x, (memories, *x.shape[1:])) for x in memory))
    dtype = keras.backend.standardize_dtype(memory.keys.dtype)
    uses = ops.zeros((memories, cfg.num_slots), dtype) if cfg.usage_weight else None
    return State.of(tables, no_tokens(cfg, batch_size, dtype), ops.zeros((batch_size,), "int32"), uses)


def reset(cfg: FwPKMConfig, state: State, memory: Memory, rows: Any = None) -> State:
    """Make rows what ``init_state`` makes."""
    batch = row_checks.check_reset(cfg, state, memory, implementation())
    state = fitted(cfg, state, num_rows(state))
    chosen = mask_of(cfg, rows, state)
    fresh = init_state(cfg, memory, batch)

    def blend(current: Array, initial: Array) -> Array:
        pick = chosen if current.shape[0] == batch else chosen[:1]
        return ops.where(outer(pick, current), ops.cast(initial, current.dtype), current)

    return state.map(blend, fresh)


def select(cfg: FwPKMConfig, state: State, rows: Any) -> State:
    """The state of these rows, in this order."""
    if _is_traced(rows):
        validation.check_state(cfg, state, implementation())
        return _shown(cfg, state, _checked(rows, "int", ("n", None)))
    ids = row_checks.check_select(cfg, state, _on_host(rows), implementation())

    def take(x: Array) -> Array:
        return ops.take(x, ids, axis=0)

    if cfg.memory_scope == "sequence":
        return state.map(take)
    return State.of(state.memory, state.pending.map(take), take(state.position), state.maybe_uses)


def _shown(cfg: FwPKMConfig, state: State, ids: Array) -> State:
    """``select`` of traced rows: those that the state does not have get tables of NaN, and nothing else."""
    legal = (ids >= 0) & (ids < num_rows(state))

    def take(x: Array) -> Array:
        return ops.take(x, ops.where(legal, ids, 0), axis=0)

    own = cfg.memory_scope == "sequence"
    wrong = ~legal if own else ops.any(~legal)[None]
    memory = Memory(*(nan_where(wrong, take(x) if own else x) for x in state.memory))
    position, uses = take(state.position), state.maybe_uses
    if own:  # else the one clock is that of all rows
        position, uses = blank(position, ~legal), None if uses is None else blank(take(uses), ~legal)
    return State.of(memory, state.pending.map(lambda x: blank(take(x), ~legal)), position, uses)


def concat(cfg: FwPKMConfig, states: Sequence[State]) -> State:
    """One state of the rows of all, in order."""
    row_checks.check_concat(cfg, states, implementation())
    return states[0].map(lambda *x: ops.concatenate(x), *states[1:])


def put(cfg: FwPKMConfig, state: State, rows: Any, other: State) -> State:
    """The state with the i-th row of ``other`` at rows[i]."""
    received = row_checks.check_put(cfg, state, other, implementation())
    batch = state.position.shape[0]
    if _is_traced(rows):
        return _put_traced(state, rows, other)
    ids = row_checks.ids_of(_on_host(rows), batch)
    row_checks.check_number(received, ids.shape[0])
    index = ops.cast(ids, "int32")[:, None]

    def replaced(x: Array, y: Array) -> Array:
        if 0 in x.shape:  # P = 0 where C = 1 and L = 0, which tensorflow cannot scatter into
            return x
        return ops.scatter_update(x, index, ops.cast(y, x.dtype))

    return state.map(replaced, other)


def _put_traced(state: State, rows: Array, other: State) -> State:
    """``put`` where only those of the traced rows that the state has take something."""
    batch, received = num_rows(state), num_rows(other)
    if _is_bool(rows):  # how many are True is not known, so no list of them has a shape
        chosen = with_rows(_checked(rows, "bool", ("B", state.position.shape[0])), batch)
        number = ops.cumsum(ops.cast(chosen, "int32")) - 1
        chosen &= number < received
    else:
        ids = _checked(rows, "int", ("n", None))
        row_checks.check_number(other.position.shape[0], ids.shape[0])
        meets = ops.arange(batch, dtype="int32")[:, None] == ids[None]
        chosen, number = ops.any(meets, axis=1), ops.cast(ops.argmax(meets, axis=1), "int32")

    def put(x: Array, y: Array) -> Array:
        return ops.where(outer(chosen, x), ops.cast(ops.take(y, ops.clip(number, 0, received - 1), axis=0), x.dtype), x)

    return state.map(put, other)


def pending(cfg: FwPKMConfig, state: State) -> Array:
    """How many tokens of each row no write has consumed ``[B]``."""
    validation.check_state(cfg, state, implementation())
    if not _is_traced(state.position):
        validation.check_positions(cfg, ops.convert_to_numpy(state.position).tolist())
    return schedule.pending(cfg, state.position)


def nbytes(state: State) -> int:
    """The bytes that a state takes."""
    validation.check_is_state(state)
    return sum(math.prod(x.shape) * _itemsize(x) for x in state.arrays().values())


def fitted(cfg: FwPKMConfig, state: State, rows: int | Array) -> State:
    """The state of so many ``rows``: a graph that did not know its shapes fails where they differ, under XLA too."""

    def fit(rows: int | Array) -> Callable[[Array], Array]:
        return lambda x: with_rows(x, rows)

    if isinstance(rows, int) and None not in {x.shape[0] for x in state.arrays().values()}:
        return state  # they were compared
    of_memory = fit(memories_for(cfg, rows))
    memory, uses = Memory(*map(of_memory, state.memory)), state.maybe_uses
    uses = None if uses is None else of_memory(uses)
    return State.of(memory, state.pending.map(fit(rows)), with_rows(state.position, rows), uses)


def with_rows(x: Array, rows: int | Array) -> Array:
    """``x`` of so many rows, as :func:`fitted`."""
    if x.shape[0] is not None and isinstance(rows, int):  # they were compared
        return x
    import tensorflow  # keras.ops has no check that runs inside a graph

    # XLA leaves the assertion out, and TensorFlow a reshape that another one follows.
    message = "a state, and rows as a bool array, must have a row for each of what is read"
    with tensorflow.control_dependencies([tensorflow.debugging.assert_equal(ops.shape(x)[0], rows, message)]):
        return tensorflow.reshape(x, (rows, *ops.shape(x)[1:]))


def num_rows(state: State) -> int | Array:
    """B, as far as it is known."""
    return ops.shape(state.position)[0]


def mask_of(cfg: FwPKMConfig, rows: Any, state: State) -> Array:
    """``rows`` of a reset or a flush as a bool tensor [B]; traced ones are taken as they are."""
    if rows is None:
        return ops.ones_like(state.position, dtype="bool")
    if not _is_traced(rows):
        return ops.convert_to_tensor(row_checks.mask_of(cfg, _on_host(rows), state.position.shape[0]))
    if _is_bool(rows):
        return with_rows(_checked(rows, "bool", ("B", state.position.shape[0])), num_rows(state))
    at = ops.arange(ops.shape(state.position)[0], dtype="int32")
    return ops.any(at[:, None] == _checked(rows, "int", ("n", None))[None], axis=1)


def _checked(rows: Array, kind: str, axis: Axis) -> Array:
    """Rows whose values are not known, once their shape and dtype are right."""
    name = "rows as a bool array" if kind == "bool" else "rows"
    validation.check_array(name, rows, [axis], kind, object)
    return rows if kind == "bool" else ops.cast(rows, "int32")  # tensorflow gathers by few integer dtypes


def _is_bool(rows: Array) -> bool:
    return keras.backend.standardize_dtype(rows.dtype) == "bool"


def _is_traced(rows: Any) -> bool:
    return ops.is_tensor(rows) and not hasattr(rows, "numpy")


def _on_host(rows: Any) -> Any:
    return ops.convert_to_numpy(rows) if ops.is_tensor(rows) else rows


def _itemsize(x: Array) -> int:
    dtype = keras.backend.standardize_dtype(x.dtype)
    return 1 if dtype == "bool" else int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8


@cache
def implementation() -> validation.Implementation:
    """What serves here, with the type of Keras' tensors."""
    return SELF._replace(arrays=_tensor())


def _tensor() -> type:
    import tensorflow  # Keras has no name for the type of its tensors

    return tensorflow.Tensor
