"""Rows of a state, and states of rows (SPEC.md §5). Traced rows that a state does not have change nothing, and show."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fwpkm import rows as row_checks
from fwpkm import schedule, validation
from fwpkm.backends.jax.arguments import takes_numpy
from fwpkm.backends.jax.checks import check_alive
from fwpkm.backends.jax.sharding import alike, dealt_as, placed
from fwpkm.backends.jax.tokens import no_tokens, no_uses, outer
from fwpkm.backends.jax.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, memories_for
from fwpkm.tokens import Axis, Tokens


@takes_numpy
def init_state(cfg: FwPKMConfig, memory: Memory[Array], batch_size: int) -> State[Array]:
    """A state at position 0 that owns a copy of ``memory``."""
    return begin(cfg, memory, batch_size)


def begin(cfg: FwPKMConfig, memory: Memory[Array], batch_size: int, like: Array | None = None) -> State[Array]:
    """``init_state``, on the devices that the rows of ``like`` lie on."""
    validation.check_initial(cfg, memory, batch_size, SELF)
    (memory, pending, uses), _ = alike(_initial(cfg, batch_size, memory, like), like)
    with jax.ensure_compile_time_eval():  # so that a call from it under jit knows where its rows stand
        position = jnp.zeros(batch_size, jnp.int32)
    return State.of(memory, pending, position, uses)


@takes_numpy
def reset(cfg: FwPKMConfig, state: State[Array], memory: Memory[Array], rows: Any = None) -> State[Array]:
    """Make rows what ``init_state`` makes."""
    batch = row_checks.check_reset(cfg, state, memory, SELF)
    chosen = mask_of(cfg, rows, batch)
    dtype = memory.keys.dtype
    fresh: State[Array] = State.of(memory, no_tokens(cfg, 1, dtype), jnp.zeros(1, jnp.int32), no_uses(cfg, 1, dtype))
    return _blended(chosen, state, fresh)


@takes_numpy
def select(cfg: FwPKMConfig, state: State[Array], rows: Any) -> State[Array]:
    """The state of these rows, in this order."""
    if is_traced(rows):
        validation.check_state(cfg, state, SELF)
        ids: Any = _checked(rows, "int", ("n", None))
    else:
        ids = row_checks.check_select(cfg, state, rows, SELF)
    return _selected(cfg.memory_scope == "sequence", state, ids)


@takes_numpy
def concat(cfg: FwPKMConfig, states: Sequence[State[Array]]) -> State[Array]:
    """One state of the rows of all, in order."""
    row_checks.check_concat(cfg, states, SELF)
    return _joined(tuple(states))


@takes_numpy
def put(cfg: FwPKMConfig, state: State[Array], rows: Any, other: State[Array]) -> State[Array]:
    """The state with the i-th row of ``other`` at rows[i]."""
    received = row_checks.check_put(cfg, state, other, SELF)
    batch = len(state.position)
    if is_traced(rows) and rows.dtype == bool:  # how many are True is not known, so no list of them has a shape
        return _put_where(state, _checked(rows, "bool", ("B", batch)), other)
    ids = _checked(rows, "int", ("n", None)) if is_traced(rows) else row_checks.ids_of(rows, batch)
    row_checks.check_number(received, len(ids))
    return _put(state, ids, other)


@takes_numpy
def to_device(state: State[Array], device: Any) -> State[Array]:
    """The state with all its arrays on a device of JAX, or dealt out by a sharding.

    Raises:
        ValueError: neither a ``jax.Device`` nor a ``jax.sharding.Sharding``.
    """
    validation.check_is_state(state)
    if not isinstance(device, (jax.Device, jax.sharding.Sharding)):
        raise ValueError(f"device must be one of jax.devices() or a jax.sharding.Sharding. Received: {device!r}")
    moved: State = jax.device_put(state, device)
    return moved


@takes_numpy
def pending(cfg: FwPKMConfig, state: State[Array]) -> Array:
    """How many tokens of each row no write has consumed ``[B]``."""
    validation.check_state(cfg, state, SELF)
    check_alive(state)
    if not is_traced(state.position):
        validation.check_positions(cfg, state.position.tolist())
    return schedule.pending(cfg, state.position)


@takes_numpy
def nbytes(state: State[Array]) -> int:
    """The bytes that a state takes."""
    validation.check_is_state(state)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def mask_of(cfg: FwPKMConfig, rows: Any, batch_size: int) -> Any:
    """``rows`` of a reset or a flush as a bool array [B], NumPy's where they are known."""
    if not is_traced(rows):
        return row_checks.mask_of(cfg, rows, batch_size)
    if rows.dtype == bool:
        return _checked(rows, "bool", ("B", batch_size))
    return (jnp.arange(batch_size, dtype=jnp.int32)[:, None] == _checked(rows, "int", ("n", None))[None]).any(1)


def _checked(rows: Array, kind: str, axis: Axis) -> Array:
    """Rows whose values are not known, once their shape and dtype are right."""
    name = "rows as a bool array" if kind == "bool" else "rows"
    validation.check_array(name, rows, [axis], kind, Array)
    return rows if kind == "bool" else rows.astype(jnp.int32)  # narrow ones may not count all rows


def is_traced(x: Any) -> bool:
    """Whether its numbers are not known."""
    return isinstance(x, jax.core.Tracer)


@placed
@partial(jax.jit, static_argnums=(0, 1))
def _initial(
    cfg: FwPKMConfig, batch_size: int, memory: Memory, like: Array | None
) -> tuple[Memory, Tokens, Array | None]:
    memories = memories_for(cfg, batch_size)
    tables = Memory(*(jnp.broadcast_to(x, (memories, *x.shape[1:])) for x in memory))
    dtype = memory.keys.dtype
    begun = tables, no_tokens(cfg, batch_size, dtype), no_uses(cfg, memories, dtype)
    return begun if like is None or len(like) != batch_size else dealt_as(like, begun)


@placed
def _selected(own: bool, state: State, ids: Any) -> State:
    """``select``; where rows do not have tables of their ``own``, all of them have the one.

    Rows that are traced, and that the state does not have, get tables of NaN and nothing else.
    """
    uses = state.maybe_uses
    if not is_traced(ids):
        memory = Memory(*(x[ids] for x in state.memory)) if own else state.memory
        uses = uses[ids] if own and uses is not None else uses
        return State.of(memory, state.pending.map(lambda x: x[ids]), state.position[ids], uses)
    legal = (ids >= 0) & (ids < len(state.position))
    known, shown = jnp.where(legal, ids, 0), legal if own else legal.all()[None]

    def taken(x: Array) -> Array:
        return jnp.where(outer(legal, x), x[known], jnp.zeros((), x.dtype))

    tables = Memory(*(x[known] for x in state.memory)) if own else state.memory
    memory = Memory(*(jnp.where(outer(shown, x), x, jnp.nan) for x in tables))
    position = taken(state.position) if own else state.position[known]  # whose one clock is that of all rows
    uses = taken(uses) if own and uses is not None else uses
    return State.of(memory, state.pending.map(taken), position, uses)


@placed
def _joined(states: tuple[State, ...]) -> State:
    # Of one state too the arrays are new: either may be donated.
    return states[0].map(lambda *x: jnp.concatenate(x) if states[1:] else x[0].copy(), *states[1:])


@placed
def _put(state: State, ids: Any, other: State) -> State:
    if is_traced(ids):  # a negative one would count from the end
        ids = jnp.where(ids < 0, len(state.position), ids)
    return state.map(lambda x, y: x.at[ids].set(y, mode="drop"), other)


@placed
def _put_where(state: State, chosen: Array, other: State) -> State:
    """``put`` where ``chosen [B]`` is True."""
    number = jnp.cumsum(chosen) - 1
    chosen = chosen & (number < len(other.position))
    return state.map(lambda x, y: jnp.where(outer(chosen, x), y[jnp.clip(number, 0, len(y) - 1)], x), other)


@placed
@jax.jit
def _blended(chosen: Array, state: State, fresh: State) -> State:
    """``fresh`` in rows that are chosen ``[B]``; its arrays have one row, or all."""

    def blend(current: Array, initial: Array) -> Array:
        return jnp.where(outer(chosen[: len(current)], current), initial.astype(current.dtype), current)

    return state.map(blend, fresh)
