"""The JAX backend's functions (SPEC.md §8): pure, sparse, compiled, differentiable in reverse mode.

Each compiles once for a configuration and shapes, and works under ``jax.jit``, ``grad``, ``vmap`` and ``lax.scan``.
Where a state stands may be traced: a jitted decode step compiles once. Donate the state to update its tables in place.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fwpkm import schedule, validation
from fwpkm.backends.jax.backward import run
from fwpkm.backends.jax.tokens import cut, filled, finite, insert, no_tokens, pad, without
from fwpkm.backends.jax.windows import (
    SELF,
    Result,
    Write,
    compute_window,
    plan_apply,
    plan_flush,
    plan_read,
    select_window,
)
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace, memories_for
from fwpkm.initial import initial_arrays
from fwpkm.tokens import Tokens

_ZERO: Any = np.int32(0)


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
    """Fresh tables (SPEC.md §7)."""
    return Memory(*map(jnp.asarray, initial_arrays(cfg, memories, seed)))


def init_state(cfg: FwPKMConfig, memory: Memory, batch_size: int) -> State:
    """A state at position 0 that owns a copy of ``memory``."""
    validation.check_initial(cfg, memory, batch_size, SELF)
    return _init_state(cfg, batch_size, memory)


def apply(
    cfg: FwPKMConfig,
    state: State,
    query: Array,
    value: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    update: bool = True,
) -> tuple[Array, State, Trace]:
    """Read T tokens and write every chunk that they complete (SPEC.md §5).

    ``cfg`` and ``update`` are static under ``jax.jit``. The values of a position are checked only where it is not
    traced; where it is known, and no chunk falls due, the tables come back as the same arrays.
    """
    tokens = Tokens(query, value, gate, mask)
    validation.check_apply(cfg, state, tokens, SELF)
    length, writes = tokens.length, True
    if not isinstance(state.position, jax.core.Tracer):
        position = validation.check_position(np.asarray(state.position).tolist())
        if update:
            validation.check_length(position, length)
        writes = schedule.written(cfg, position + length) > schedule.written(cfg, position)
    if length == 0:
        return jnp.zeros_like(value, query.dtype), state, _empty_trace(cfg, state.memory, query)
    if not update:
        output, trace = _read_only(cfg, state.memory, tokens)
        return output, state, trace
    output, tables, pending, position, trace = _apply(cfg, writes, state, tokens)
    return output, State.of(state.memory if tables is None else tables, pending, position), trace


def flush(cfg: FwPKMConfig, state: State) -> tuple[State, Trace]:
    """Write the pending chunk, empty it and restart the count (SPEC.md §5)."""
    validation.check_state(cfg, state, None, SELF)
    writes = cfg.capacity > 0
    if not isinstance(state.position, jax.core.Tracer):
        position = validation.check_position(np.asarray(state.position).tolist())
        writes = schedule.pending(cfg, position) > cfg.lookahead  # else no token has a pair
    tables, pending, position, trace = _flush(cfg, writes, state)
    return State.of(state.memory if tables is None else tables, pending, position), trace


def lookup(cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
    """Read the tables (SPEC.md §2)."""
    validation.check_lookup(cfg, memory, query, SELF)
    if query.shape[1] == 0:
        trace = _empty_trace(cfg, memory, query)
        return Lookup(jnp.zeros((*query.shape[:2], cfg.value_dim), query.dtype), trace.slots, trace.weights)
    return _lookup(cfg, memory, query)


def chunk_update(
    cfg: FwPKMConfig,
    memory: Memory,
    query: Array,
    target: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    pair: Array | None = None,
) -> tuple[Memory, Losses]:
    """Write one chunk (SPEC.md §4) whose targets are already shifted."""
    chunk = Tokens(query, target, gate, mask)
    validation.check_chunk(cfg, memory, chunk, pair, SELF)
    if chunk.length == 0:
        return memory, Losses(*jnp.zeros((2, len(memory.keys)), _dtype(memory, query)))
    return _chunk_update(cfg, memory, chunk, pair)


def detach(state: State) -> State:
    """The state without its gradient history."""
    return jax.lax.stop_gradient(state)


def reset(state: State, memory: Memory, rows: Sequence[int] | Sequence[bool] | Array | np.ndarray | int) -> State:
    """Give rows their initial memory back and mask their pending tokens; ``rows`` are static under ``jax.jit``."""
    validation.check_reset(state, memory, Array)
    batch, memories = state.position.shape[0], state.memory.keys.shape[0]
    chosen = jnp.asarray(validation.row_mask(rows, batch, memories))

    def blend(initial: Array, current: Array) -> Array:
        pick = chosen[: len(current)].reshape(-1, *[1] * (current.ndim - 1))
        return jnp.where(pick, initial.astype(current.dtype), current)

    tables = Memory(*map(blend, memory, state.memory))
    return State.of(tables, state.pending.map(lambda x: blend(jnp.zeros_like(x[:1]), x)), state.position)


def asarray(x: Any, dtype: str) -> Array:
    """A copy of ``x`` as an array of the named dtype, such as "float32" or "bool", on JAX's default device.

    Raises:
        ValueError: a 64-bit dtype while JAX is confined to 32 bits, which would lose digits.
    """
    if jnp.dtype(dtype).itemsize == 8 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"dtype {dtype!r} needs JAX's 64-bit mode: call jax.config.update('jax_enable_x64', True) first, "
            f"or convert to 32 bits. Received: dtype={dtype!r} with jax_enable_x64=False"
        )
    return jnp.array(np.asarray(x), dtype)


def to_numpy(x: Array) -> np.ndarray:
    """The numbers of an array; bfloat16, which NumPy lacks, as float32."""
    return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)


def vjp(
    fn: Callable[..., Array | tuple[Array, ...]], args: Sequence[Array], cotangents: Sequence[Array] | Array
) -> tuple[Array, ...]:
    """Gradients of Σ output · cotangent with respect to every argument; zeros where one has no influence."""
    alone = isinstance(cotangents, Array)

    def outputs(*arguments: Array) -> tuple[Array, ...]:
        returned = fn(*arguments)
        return (returned,) if isinstance(returned, Array) else tuple(returned)

    return jax.vjp(outputs, *args)[1]((cotangents,) if alone else tuple(cotangents))


def device_name() -> str:
    """The device that JAX computes on here: "cpu", or the accelerator's platform and kind."""
    device = jax.devices()[0]
    return "cpu" if device.platform == "cpu" else f"{device.platform}: {device.device_kind}"


def _empty_trace(cfg: FwPKMConfig, memory: Memory, query: Array) -> Trace:
    """Of a call without tokens."""
    dtype = _dtype(memory, query)
    entries = jnp.zeros((len(query), 0, cfg.slots_per_token), dtype)
    none = jnp.zeros((len(memory.keys), 0), dtype)
    return Trace(entries.astype(jnp.int32), entries, none, none, jnp.zeros((), jnp.int32))


def _dtype(memory: Memory, query: Array) -> jnp.dtype:
    """float32, or float64 when queries and tables both are (§6)."""
    wide = query.dtype == memory.keys.dtype == jnp.float64
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


@partial(jax.jit, static_argnums=(0, 1))
def _init_state(cfg: FwPKMConfig, batch_size: int, memory: Memory) -> State:
    memories = memories_for(cfg, batch_size)
    tables = Memory(*(jnp.broadcast_to(x, (memories, *x.shape[1:])) for x in memory))
    return State.of(tables, no_tokens(cfg, batch_size, memory.keys.dtype), jnp.zeros(batch_size, jnp.int32))


@partial(jax.jit, static_argnums=(0, 1))
def _apply(
    cfg: FwPKMConfig, writes: bool, state: State, tokens: Tokens
) -> tuple[Array, Memory | None, Tokens, Array, Trace]:
    """``apply``: the output, the tables where a write may be due, pending tokens, the position and the trace."""
    dtype, length = _dtype(state.memory, tokens.query), tokens.length
    num_pending = schedule.pending(cfg, state.position[0])
    stream = insert(_valid(filled(dtype, state.pending), num_pending), filled(dtype, tokens), num_pending)
    due = schedule.written(cfg, num_pending + length) if writes else _ZERO
    result = run(cfg, plan_apply(cfg, length, writes), _tables(state.memory, dtype), stream, num_pending, due)
    pending = cut(pad(without(stream, result.dead), cfg.capacity), due * cfg.chunk_size, cfg.capacity)
    trace = _trace(result, schedule.max_writes(cfg, length), due)
    return _output(result, tokens.query), _written(result, writes), pending, state.position + length, trace


@partial(jax.jit, static_argnums=(0,))
def _read_only(cfg: FwPKMConfig, memory: Memory, tokens: Tokens) -> tuple[Array, Trace]:
    """``apply`` with ``update=False``."""
    dtype = _dtype(memory, tokens.query)
    plan = plan_read(cfg, tokens.length)
    result = run(cfg, plan, _tables(memory, dtype), filled(dtype, tokens), _ZERO, _ZERO)
    return _output(result, tokens.query), _trace(result, schedule.max_writes(cfg, tokens.length), _ZERO)


@partial(jax.jit, static_argnums=(0, 1))
def _flush(cfg: FwPKMConfig, writes: bool, state: State) -> tuple[Memory | None, Tokens, Array, Trace]:
    """``flush``: the tables where a chunk may be pending, no pending tokens, the position and the trace."""
    dtype, batch_size = state.memory.keys.dtype, len(state.position)
    num_pending = schedule.pending(cfg, state.position[0])
    pending = _valid(filled(dtype, state.pending), num_pending)
    result = run(cfg, plan_flush(cfg, writes), state.memory, pending, _ZERO, _ZERO + writes)
    count = schedule.flush_writes(cfg, num_pending)
    trace = _trace(result, 1, jnp.asarray(count, jnp.int32))
    return _written(result, writes), no_tokens(cfg, batch_size, dtype), jnp.zeros_like(state.position), trace


@partial(jax.jit, static_argnums=(0,))
def _lookup(cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
    dtype = _dtype(memory, query)
    tokens = filled(dtype, Tokens(query, jnp.zeros((*query.shape[:2], cfg.value_dim), dtype)))
    result = run(cfg, plan_read(cfg, query.shape[1]), _tables(memory, dtype), tokens, _ZERO, _ZERO)
    return Lookup(_output(result, query), result.slots, _weights(result))


@partial(jax.jit, static_argnums=(0,))
def _chunk_update(cfg: FwPKMConfig, memory: Memory, chunk: Tokens, pair: Array | None) -> tuple[Memory, Losses]:
    dtype = _dtype(memory, chunk.query)
    memory, chunk = _tables(memory, dtype), filled(dtype, chunk)
    finite_target = jnp.isfinite(chunk.value).all(-1)  # those that are not finite make no pair, but are read
    chunk = chunk._replace(value=jnp.where(finite_target[..., None], chunk.value, 0))
    selected = select_window(cfg, memory, chunk, ~finite(chunk))._replace(ranks=None)
    chunk = without(chunk, selected.dead)
    write = Write(chunk.value, chunk.mask & finite_target & (True if pair is None else pair), chunk.mask)
    computed = compute_window(cfg, selected.keys, selected.rows, chunk, selected, write, cfg.num_slots)
    values = selected.touched.put(memory.values.reshape(-1, cfg.value_dim), computed.rows)
    losses = Losses(computed.memorization, computed.addressing)
    return Memory(computed.keys, values.reshape(memory.values.shape)), losses


def _valid(pending: Tokens, num_pending: Array) -> Tokens:
    """The pending tokens ``[B, P, ...]``, with zeros for whatever lies behind the last of them."""
    return without(pending, (jnp.arange(pending.length) >= num_pending)[None])


def _tables(memory: Memory, dtype: jnp.dtype) -> Memory:
    return Memory(*(x.astype(dtype) for x in memory))


def _written(result: Result, writes: bool) -> Memory | None:
    """The tables where something may have been written, else None: the caller then keeps its own."""
    return Memory(result.keys, result.values) if writes else None


def _output(result: Result, query: Array) -> Array:
    return jnp.where(result.unread[..., None], jnp.nan, result.reads).astype(query.dtype)


def _weights(result: Result) -> Array:
    return jnp.where(result.unread[..., None], jnp.nan, result.weights)


def _trace(result: Result, columns: int, writes: Array) -> Trace:
    """The record of a stream, its losses filled up with zeros to this many columns."""
    weights = jax.lax.stop_gradient(_weights(result))
    padding = [(0, 0), (0, columns - result.memorization.shape[1])]
    memorization, addressing = (jnp.pad(x, padding) for x in (result.memorization, result.addressing))
    return Trace(result.slots, weights, memorization, addressing, writes)
