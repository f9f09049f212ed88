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
from fwpkm import tokens as token_fields
from fwpkm.backends.jax.stream import Result, plan_apply, plan_flush, plan_read, run
from fwpkm.backends.jax.tokens import Tokens
from fwpkm.backends.jax.window import Write, visit, walk
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace
from fwpkm.initial import initial_arrays

SELF = validation.Implementation.of(
    "the JAX backend",
    Array,
    """
    key_dim value_dim num_heads num_subkeys top_k chunk_size lookahead boundary score score_eps temperature
    learning_rate write_scale weight_decay grad_clip addressing_weight memory_scope
    """,
)
_ZERO: Any = np.int32(0)


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
    """Fresh tables (SPEC.md §7), the same numbers in every backend for one seed.

    Returns:
        float32 keys ``[M, H, 2, S, Dk/2]`` and values ``[M, N, Dv]``.

    Raises:
        ValueError: ``memories`` is not an integer of at least 1.
    """
    return Memory(*map(jnp.asarray, initial_arrays(cfg, memories, seed)))


def init_state(cfg: FwPKMConfig, memory: Memory, batch_size: int) -> State:
    """A state at position 0 that owns a copy of ``memory``; M = 1 is broadcast to B rows in "sequence" scope.

    Raises:
        ValueError: the tables fit neither ``cfg`` nor ``batch_size``.
    """
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

    Args:
        cfg: the configuration; static under ``jax.jit``.
        state: where the sequence stands; left as it was, unless the caller donates it.
        query: ``[B, T, H*Dk]``, any floating dtype.
        value: ``[B, T, Dv]``.
        gate: ``[B, T]`` in [0, 1], or None for 1.
        mask: ``[B, T]`` bool, False for tokens that never write, or None for True.
        update: False only reads: no write, nothing pending, position unchanged. Static.

    Returns:
        output ``[B, T, Dv]`` in the query's dtype, the next state, and the trace.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what was received. Of the position, only
            where it is not traced.
    """
    validation.check_apply(cfg, state, token_fields.Tokens(query, value, gate, mask), SELF)
    length, writes = query.shape[1], True
    if not isinstance(state.position, jax.core.Tracer):
        position = validation.check_position(np.asarray(state.position).tolist())
        if update:
            validation.check_length(position, length)
        writes = schedule.written(cfg, position + length) > schedule.written(cfg, position)
    if length == 0:
        return jnp.zeros_like(value, query.dtype), state, _empty_trace(cfg, state.memory, query)
    output, tables, rest, trace = _apply(cfg, update, update and writes, state, query, value, gate, mask)
    if update:
        state = State(state.memory if tables is None else tables, *rest)
    return output, state, trace


def flush(cfg: FwPKMConfig, state: State) -> tuple[State, Trace]:
    """Write the pending chunk, empty it and restart the count (SPEC.md §5).

    Returns:
        the state at position 0, and the trace of that write: losses ``[M, 1]``, slots and weights ``[B, 0, H*k]``.

    Raises:
        ValueError: the state does not fit ``cfg``.
    """
    validation.check_state(cfg, state, None, SELF)
    writes = cfg.capacity > 0
    if not isinstance(state.position, jax.core.Tracer):
        position = validation.check_position(np.asarray(state.position).tolist())
        writes = schedule.pending(cfg, position) > cfg.lookahead  # else no token has a pair
    tables, rest, trace = _flush(cfg, writes, state)
    return State(state.memory if tables is None else tables, *rest), trace


def lookup(cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
    """Read the tables (SPEC.md §2): query ``[B, n, H*Dk]`` -> output ``[B, n, Dv]``, slots, weights ``[B, n, H*k]``.

    A token whose query or selected scores are not finite reads NaN.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
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
    """Write one chunk (SPEC.md §4) whose targets are already shifted.

    Args:
        cfg: the configuration; static under ``jax.jit``.
        memory: the tables to be written; left as they were.
        query: ``[B, n, H*Dk]``.
        target: ``[B, n, Dv]``, u_t.
        gate: ``[B, n]``, or None for 1.
        mask: ``[B, n]`` bool, or None for True.
        pair: ``[B, n]`` bool, which tokens have a target; None for all unmasked ones.

    Returns:
        the new tables and the losses ``[M]``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    validation.check_chunk(cfg, memory, token_fields.Tokens(query, target, gate, mask), pair, SELF)
    if query.shape[1] == 0:
        return memory, Losses(*jnp.zeros((2, len(memory.keys)), _dtype(memory, query)))
    return _chunk_update(cfg, memory, query, target, gate, mask, pair)


def detach(state: State) -> State:
    """The state without its gradient history: truncated backpropagation between calls."""
    return jax.lax.stop_gradient(state)


def reset(state: State, memory: Memory, rows: Sequence[int] | Sequence[bool] | Array | np.ndarray | int) -> State:
    """Give rows their initial memory back and mask their pending tokens; the count goes on (SPEC.md §5).

    Args:
        state: left as it was.
        memory: the initial tables, M = 1 or that of the state.
        rows: integers, or a bool mask ``[B]``; all of them where one table serves the batch. Static under ``jax.jit``.

    Raises:
        ValueError: rows out of range, some of the rows that share one table, or tables of other shapes.
    """
    validation.check_reset(state, memory, Array)
    batch, memories = state.position.shape[0], state.memory.keys.shape[0]
    chosen = jnp.asarray(validation.row_mask(rows, batch, memories))

    def blend(fresh: Array, current: Array) -> Array:
        pick = chosen[: len(current)].reshape(-1, *[1] * (current.ndim - 1))
        return jnp.where(pick, fresh.astype(current.dtype), current)

    tables = Memory(*map(blend, memory, state.memory))
    pending = Tokens(*(blend(jnp.zeros_like(x[:1]), x) for x in state.pending))
    return State(tables, *pending, state.position)


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
    """Gradients of Σ output · cotangent with respect to every argument; zeros where one has no influence.

    Args:
        fn: takes the arguments one by one, returns an array or a tuple of arrays.
        args: floating arrays.
        cotangents: one for each output, in its shape.

    Returns:
        a gradient for each argument, in its shape.
    """
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
    memories = validation.memories_for(cfg, batch_size)
    tables = Memory(*(jnp.broadcast_to(x, (memories, *x.shape[1:])) for x in memory))
    return State(tables, *_no_tokens(cfg, batch_size, memory.keys.dtype), jnp.zeros(batch_size, jnp.int32))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _apply(
    cfg: FwPKMConfig,
    update: bool,
    writes: bool,
    state: State,
    query: Array,
    value: Array,
    gate: Array | None,
    mask: Array | None,
) -> tuple[Array, Memory | None, tuple[Array, ...] | None, Trace]:
    """``apply``; the tables only where a write may be due, and the other fields of the state only with ``update``."""
    dtype, length = _dtype(state.memory, query), query.shape[1]
    memory, news = _tables(state.memory, dtype), Tokens.of(dtype, query, value, gate, mask)
    columns = schedule.max_writes(cfg, length)
    if not update:
        result = run(cfg, plan_read(cfg, length), memory, news, _ZERO, _ZERO)
        return _output(result, query), None, None, _trace(result, columns, _ZERO)
    pending = schedule.pending(cfg, state.position[0])
    stream = Tokens.of(dtype, *state.pending).insert(news, pending)
    due = schedule.written(cfg, pending + length) if writes else _ZERO
    result = run(cfg, plan_apply(cfg, length, writes), memory, stream, pending, due)
    rest = stream.without(result.dead).rest(due * cfg.chunk_size, cfg.capacity)
    tables = Memory(result.keys, result.values) if writes else None
    return _output(result, query), tables, (*rest, state.position + length), _trace(result, columns, due)


@partial(jax.jit, static_argnums=(0, 1))
def _flush(cfg: FwPKMConfig, writes: bool, state: State) -> tuple[Memory | None, tuple[Array, ...], Trace]:
    """``flush``; the tables only where a chunk may be pending, and the other fields of the state."""
    dtype = state.memory.keys.dtype
    waiting = Tokens.of(dtype, *state.pending)
    result = run(cfg, plan_flush(cfg, writes), state.memory, waiting, _ZERO, _ZERO + writes)
    empty = _no_tokens(cfg, len(waiting.mask), dtype)
    count = schedule.flush_writes(cfg, schedule.pending(cfg, state.position[0]))
    tables = Memory(result.keys, result.values) if writes else None
    return tables, (*empty, jnp.zeros_like(state.position)), _trace(result, 1, jnp.asarray(count, jnp.int32))


@partial(jax.jit, static_argnums=(0,))
def _lookup(cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
    dtype = _dtype(memory, query)
    tokens = Tokens.of(dtype, query, jnp.zeros((*query.shape[:2], cfg.value_dim), dtype), None, None)
    result = run(cfg, plan_read(cfg, query.shape[1]), _tables(memory, dtype), tokens, _ZERO, _ZERO)
    return Lookup(_output(result, query), result.slots, _weights(result))


@partial(jax.jit, static_argnums=(0,))
def _chunk_update(
    cfg: FwPKMConfig,
    memory: Memory,
    query: Array,
    target: Array,
    gate: Array | None,
    mask: Array | None,
    pair: Array | None,
) -> tuple[Memory, Losses]:
    dtype = _dtype(memory, query)
    memory, chunk = _tables(memory, dtype), Tokens.of(dtype, query, target, gate, mask)
    finite_target = jnp.isfinite(chunk.value).all(-1)  # those that are not finite make no pair, but are read
    chunk = chunk._replace(value=jnp.where(finite_target[..., None], chunk.value, 0))
    found = visit(cfg, memory, chunk, ~chunk.finite())
    chunk = chunk.without(found.dead)
    pairs = chunk.mask & finite_target & (True if pair is None else pair)
    step = walk(cfg, found.keys, found.rows, chunk, found, Write(chunk.value, pairs, chunk.mask), cfg.num_slots)
    values = found.touched.put(memory.values.reshape(-1, cfg.value_dim), step.rows)
    return Memory(step.keys, values.reshape(memory.values.shape)), Losses(step.memorization, step.addressing)


def _tables(memory: Memory, dtype: jnp.dtype) -> Memory:
    return Memory(*(x.astype(dtype) for x in memory))


def _no_tokens(cfg: FwPKMConfig, batch_size: int, dtype: jnp.dtype) -> Tokens:
    """The buffers of a state with nothing pending."""
    tokens = (batch_size, cfg.capacity)
    query = jnp.zeros((*tokens, cfg.num_heads * cfg.key_dim), dtype)
    value = jnp.zeros((*tokens, cfg.value_dim), dtype)
    return Tokens(query, value, jnp.zeros(tokens, dtype), jnp.zeros(tokens, bool))


def _output(result: Result, query: Array) -> Array:
    return jnp.where(result.unread[..., None], jnp.nan, result.reads).astype(query.dtype)


def _weights(result: Result) -> Array:
    return jnp.where(result.unread[..., None], jnp.nan, result.weights)


def _trace(result: Result, columns: int, writes: Array) -> Trace:
    """The record of a stream, its losses filled up with zeros to this many columns."""
    weights = jax.lax.stop_gradient(_weights(result))
    room = [(0, 0), (0, columns - result.memorization.shape[1])]
    memorization, addressing = (jnp.pad(x, room) for x in (result.memorization, result.addressing))
    return Trace(result.slots, weights, memorization, addressing, writes)
