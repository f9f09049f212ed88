"""The JAX backend's functions (SPEC.md §8): pure, sparse, compiled, differentiable in reverse mode.

Each compiles once for a configuration and shapes, and works under ``jax.jit``, ``grad``, ``vmap`` and ``lax.scan``.
Where a state stands may be traced: a jitted decode step compiles once. Donate the state to update its tables in place.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fwpkm import schedule, validation
from fwpkm.backends.jax import fast
from fwpkm.backends.jax.arguments import takes_numpy
from fwpkm.backends.jax.backward import run
from fwpkm.backends.jax.checks import check_alive, check_sizes, in_64_bits
from fwpkm.backends.jax.engine import Engine, choose_engine
from fwpkm.backends.jax.indexing import gather
from fwpkm.backends.jax.rows import begin, is_traced, mask_of
from fwpkm.backends.jax.sharding import alike, dealt_as, placed
from fwpkm.backends.jax.streams import cells_after, is_legal, plan_apply, plan_flush, plan_read, streams_of
from fwpkm.backends.jax.tokens import as_table, filled, from_table, live_rows, no_uses, uses_in, without
from fwpkm.backends.jax.windows import SELF, Result, Write, compute_window, select_window
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace, memories_for
from fwpkm.initial import initial_arrays
from fwpkm.tokens import Tokens


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory[Array]:
    """Fresh tables (SPEC.md §7)."""
    return Memory(*map(jnp.asarray, initial_arrays(cfg, memories, seed)))


@takes_numpy
def apply(
    cfg: FwPKMConfig,
    state: State[Array] | Memory[Array],
    query: Array,
    value: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    cu_seqlens: Array | None = None,
    update: bool = True,
    *,
    implementation: str | None = None,
) -> tuple[Array, State[Array] | None, Trace]:
    """Read T tokens and write every chunk that they complete (SPEC.md §5).

    ``cfg`` and ``update`` are static under ``jax.jit``; all else may be traced. Positions and ``cu_seqlens`` are
    checked only where they are known; where it is known that no chunk falls due, the tables come back as the same
    arrays. ``implementation`` is None or "xla" for what XLA compiles, or "triton" for the kernels through jax-triton
    (docs/kernels.md).
    """
    tokens = Tokens(query, value, gate, mask)
    check_sizes("query", query)
    batch = validation.check_apply(cfg, state, tokens, cu_seqlens, update, SELF)
    ends = _known(cu_seqlens)
    if ends is not None:
        validation.check_cu_seqlens(ends.tolist(), tokens.length)
    memory = state if isinstance(state, Memory) else state.memory
    engine = choose_engine(implementation, cfg, memory, query, cu_seqlens)
    if cu_seqlens is None or ends is not None:
        return _apply_checked(cfg, state, batch, tokens, cu_seqlens, update, engine)
    # Traced, so that nobody can raise: the call is then one of empty sequences, whose outputs say it.
    legal, cu_seqlens = _legal_or_empty(cu_seqlens, tokens.length)
    output, after, trace = _apply_checked(cfg, state, batch, tokens, cu_seqlens, update, engine)
    output, weights = _nan_unless(output, trace.weights, legal, mask)
    return output, after, trace._replace(weights=weights)


def _apply_checked(
    cfg: FwPKMConfig, state: State | Memory, batch: int, tokens: Tokens, cu_seqlens: Array | None, update: bool,
    engine: Engine,
) -> tuple[Array, State | None, Trace]:  # fmt: skip
    """``apply`` of arguments that fit."""
    if isinstance(state, Memory):
        return _apply_from(cfg, state, batch, tokens, cu_seqlens, update, engine)
    positions, writes = _known(state.position), True
    if positions is not None:
        validation.check_positions(cfg, positions.tolist())
        positions = schedule.reduced(cfg, positions)
        after = positions + _most_tokens(cfg, batch, tokens, _known(cu_seqlens))
        writes = bool((schedule.written(cfg, after) > schedule.written(cfg, positions)).any())
    if tokens.length == 0:
        return jnp.zeros_like(tokens.value, tokens.query.dtype), state, _empty_trace(cfg, state.memory, tokens.query)
    if engine == "triton":
        return _apply_on_kernels(cfg, state, positions, writes, tokens, cu_seqlens, update)
    if not update:
        look, trace = _read_only(cfg, state.memory, tokens, cu_seqlens)
        return look.output, state, trace
    output, written, pending, position, trace = _apply(cfg, writes, state, tokens, cu_seqlens)
    # Tables that are wider than what a call computed in stay so until a write.
    memory, uses = (state.memory, state.maybe_uses) if written is None else written
    return output, State.of(memory, filled(memory.keys.dtype, pending), position, uses), trace


def _apply_on_kernels(
    cfg: FwPKMConfig, state: State, positions: np.ndarray | None, writes: bool, tokens: Tokens,
    cu_seqlens: Array | None, update: bool,
) -> tuple[Array, State, Trace]:  # fmt: skip
    """``apply`` by the Triton kernels. What is compiled depends on ``positions`` only by whether anything is pending
    or due.
    """
    ends, longest, most = _known(cu_seqlens), tokens.length, cfg.chunk_size + schedule.lag(cfg) - 1
    if ends is not None:  # the next power of two: each length compiles anew
        longest = min(longest, 1 << max(0, int(np.diff(ends).max()) - 1).bit_length())
    if not update:
        done = fast.read(cfg, state.memory, tokens, cu_seqlens, longest)
        return done.output, state, done.trace
    begins = positions is not None and not schedule.pending(cfg, positions).any()
    is_alike = begins and cu_seqlens is None and (tokens.mask is None or cfg.memory_scope == "batch")
    longest = max(1, longest if begins else longest + most)
    longest = longest if writes else max(1, min(longest, most))
    done = fast.apply(cfg, state, tokens, cu_seqlens, begins, is_alike, longest)
    memory, uses, after = state.memory, state.maybe_uses, done.state
    if after.memory is not None:
        memory, uses = after.memory, after.maybe_uses
    return done.output, State.of(memory, after.pending, after.position, uses), done.trace


def _apply_from(
    cfg: FwPKMConfig, memory: Memory, batch: int, tokens: Tokens, cu_seqlens: Array | None, update: bool,
    engine: Engine,
) -> tuple[Array, None, Trace]:  # fmt: skip
    """``apply`` of sequences that begin from a memory of M = 1 and whose state nobody wants.

    Only those longer than C + lag read what they wrote. The others read the one memory, and write nothing to it.
    """
    settled, owners = cfg.chunk_size + schedule.lag(cfg), batch
    if engine == "triton" and not update and tokens.length:
        done = fast.read(cfg, memory, tokens, cu_seqlens, tokens.length)
        return done.output, None, done.trace
    if cfg.memory_scope == "sequence" and not update:
        owners = 0
    elif cfg.memory_scope == "sequence":
        owners = min(
            batch, tokens.length // (settled + 1) if cu_seqlens is not None else batch * (tokens.length > settled)
        )
    if tokens.length == 0 or owners == batch or engine == "triton":
        start = begin(cfg, memory, batch, tokens.query)
        output, _, trace = _apply_checked(cfg, start, batch, tokens, cu_seqlens, update, engine)
    else:
        output, trace = _apply_shared(cfg, owners, batch, update, memory, tokens, cu_seqlens)
    return output, None, trace


def _most_tokens(cfg: FwPKMConfig, batch: int, tokens: Tokens, ends: np.ndarray | None) -> np.ndarray:
    """``[B]``: at most so many tokens each row reads, as far as it is known; ``ends`` is cu_seqlens where it is."""
    mask = _known(tokens.mask) if cfg.memory_scope == "sequence" else None
    if ends is not None:
        up_to = np.arange(tokens.length + 1) if mask is None else np.append(0, mask.cumsum())
        return np.diff(up_to[ends])
    if mask is not None and len(mask) == batch:
        return mask.sum(1)
    return np.full(batch, tokens.length)


@takes_numpy
def flush(
    cfg: FwPKMConfig, state: State[Array], rows: Any = None, *, implementation: str | None = None
) -> tuple[State[Array], Trace]:
    """Write the pending chunk of every row, or of ``rows``, empty it and restart the count (SPEC.md §5)."""
    batch = validation.check_state(cfg, state, SELF)
    chosen, positions, writes = mask_of(cfg, rows, batch), _known(state.position), cfg.capacity > 0
    if positions is not None:
        validation.check_positions(cfg, positions.tolist())
        due = schedule.pending(cfg, positions) > cfg.lookahead  # else no token has a pair
        writes = bool((due if is_traced(chosen) else due & chosen).any())
    engine = choose_engine(implementation, cfg, state.memory, state.pending.query)
    written, pending, position, trace = _flush(cfg, writes, engine, state, chosen)
    memory, uses = (state.memory, state.maybe_uses) if written is None else written
    return State.of(memory, pending, position, uses), trace


@takes_numpy
def lookup(cfg: FwPKMConfig, memory: Memory[Array], query: Array, *, implementation: str | None = None) -> Lookup:
    """Read the tables (SPEC.md §2)."""
    validation.check_lookup(cfg, memory, query, SELF)
    engine = choose_engine(implementation, cfg, memory, query)
    if query.shape[1] == 0:
        trace = _empty_trace(cfg, memory, query)
        return Lookup(jnp.zeros((*query.shape[:2], cfg.value_dim), query.dtype), trace.slots, trace.weights)
    if engine == "triton":
        return fast.lookup(cfg, memory, query)
    return _read_only(cfg, memory, Tokens(query, jnp.zeros((*query.shape[:2], cfg.value_dim), query.dtype)))[0]


@takes_numpy
def chunk_update(
    cfg: FwPKMConfig,
    memory: Memory[Array],
    query: Array,
    target: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    pair: Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Memory[Array], Losses]:
    """Write one chunk (SPEC.md §4) whose targets are already shifted."""
    chunk = Tokens(query, target, gate, mask)
    validation.check_chunk(cfg, memory, chunk, pair, SELF)
    engine = choose_engine(implementation, cfg, memory, query)
    if chunk.length == 0:
        return memory, Losses(*jnp.zeros((2, len(memory.keys)), call_dtype(memory, query)))
    return _chunk_update(cfg, engine, memory, chunk, pair)


@takes_numpy
def detach(state: State[Array]) -> State[Array]:
    """The state without its gradient history."""
    validation.check_is_state(state)
    return jax.lax.stop_gradient(state)


def asarray(x: Any, dtype: str) -> Array:
    """A copy of ``x`` as an array of the named dtype, such as "float32" or "bool", on JAX's default device.

    Raises:
        ValueError: a 64-bit dtype while JAX is confined to 32 bits, which would lose digits.
    """
    if jnp.dtype(dtype).itemsize == 8 and not in_64_bits():
        raise ValueError(
            f"dtype {dtype!r} needs JAX's 64-bit mode: call jax.config.update('jax_enable_x64', True) first, "
            f"or convert to 32 bits. Received: dtype={dtype!r} with jax_enable_x64=False"
        )
    return jnp.array(np.asarray(x), dtype)


def to_numpy(x: Array) -> np.ndarray:
    """The numbers of an array; bfloat16, which NumPy lacks, as float32.

    Raises:
        ValueError: the array is traced.
    """
    check_alive(x)
    if is_traced(x):
        raise ValueError(
            "a traced array holds no numbers yet: save, pack and take numbers outside of jax.jit, grad, vmap and scan. "
            f"Received: {x.aval} that is traced"
        )
    return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)


@takes_numpy
def vjp(
    fn: Callable[..., Array | tuple[Array, ...]], args: Sequence[Array], cotangents: Sequence[Array] | Array
) -> tuple[Array, ...]:
    """Gradients of Σ output · cotangent with respect to every argument; zeros where one has no influence."""
    alone = not isinstance(cotangents, Sequence)

    def outputs(*arguments: Array) -> tuple[Array, ...]:
        returned = fn(*arguments)
        return (returned,) if isinstance(returned, Array) else tuple(returned)

    return jax.vjp(outputs, *args)[1]((cotangents,) if alone else tuple(cotangents))


def device_name() -> str:
    """The device that JAX computes on here: "cpu", or the accelerator's platform and kind."""
    device = jax.devices()[0]
    return "cpu" if device.platform == "cpu" else f"{device.platform}: {device.device_kind}"


def _known(x: Any) -> np.ndarray | None:
    """The numbers of an array; None where it is None or traced."""
    check_alive(x)
    return None if x is None or is_traced(x) else np.asarray(x)


def _empty_trace(cfg: FwPKMConfig, memory: Memory, query: Array) -> Trace:
    """Of a call without tokens."""
    dtype = call_dtype(memory, query)
    entries = jnp.zeros((len(query), 0, cfg.slots_per_token), dtype)
    none = jnp.zeros((len(memory.keys), 0), dtype)
    return Trace(entries.astype(jnp.int32), entries, none, none, jnp.zeros(len(none), jnp.int32))


def call_dtype(memory: Memory[Array], query: Array) -> jnp.dtype:
    """float32, or float64 when queries and tables both are (§6)."""
    wide = query.dtype == memory.keys.dtype == jnp.float64
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


@placed
@partial(jax.jit, static_argnums=1)
def _legal_or_empty(cu_seqlens: Array, length: int) -> tuple[Array, Array]:
    """Whether these offsets are legal; they, or else those of sequences without a token."""
    legal = is_legal(cu_seqlens, length)
    return legal, jnp.where(legal, cu_seqlens, 0)


@placed
@jax.jit
def _nan_unless(output: Array, weights: Array, legal: Array, mask: Array | None) -> tuple[Array, Array]:
    """What a packed call read, or NaN in all tokens that are there."""
    wrong = ~legal if mask is None else (~legal & mask)[..., None]
    output, weights = (jnp.where(wrong, jnp.nan, x) for x in (output, weights))
    return output, weights


class _Written(NamedTuple):
    """What writes change."""

    memory: Memory
    uses: Array | None


@placed
@partial(jax.jit, static_argnums=(0, 1))
def _apply(
    cfg: FwPKMConfig, writes: bool, state: State, tokens: Tokens, cu_seqlens: Array | None
) -> tuple[Array, _Written | None, Tokens, Array, Trace]:
    """``apply``: the output, what is written where a write may be due, pending tokens, the position and the trace."""
    dtype, batch = call_dtype(state.memory, tokens.query), len(state.position)
    plan = plan_apply(cfg, batch, tokens.query[..., 0].size, cu_seqlens is not None, writes)
    streams = streams_of(cfg, plan, schedule.pending(cfg, state.position), tokens.mask, cu_seqlens)
    source = _source(dtype, tokens, state.pending)
    given = tables_in(state.memory, dtype), uses_in(state.maybe_uses, dtype), source, streams
    result = run(cfg, plan, *alike(*given))
    left = cells_after(cfg, plan, streams)
    weight = gather(result.reads[:, cfg.value_dim], left - plan.first_cell, mode="fill", fill_value=0)
    pending = from_table(cfg, gather(source, jnp.where(jnp.isnan(weight), plan.empty, left)))
    position = schedule.reduced(cfg, state.position) + streams.lengths - streams.num_pending
    look, trace = _reading(cfg, result, tokens, streams.due)
    written = _Written(Memory(result.keys, result.values), result.uses) if writes else None
    like = tokens.query if cu_seqlens is None else state.pending.query
    return look.output, *dealt_as(like, (written, pending, position)), trace


@placed
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _apply_shared(
    cfg: FwPKMConfig,
    owners: int,
    batch: int,
    update: bool,
    memory: Memory,
    tokens: Tokens,
    cu_seqlens: Array | None,
) -> tuple[Array, Trace]:
    """``apply`` from a memory, of which at most so many rows need one of their own."""
    dtype, size, packed = call_dtype(memory, tokens.query), tokens.query[..., 0].size, cu_seqlens is not None
    plan = plan_apply(cfg, batch, size, packed, True, fresh=True) if update else plan_read(cfg, batch, size, packed)
    plan = plan._replace(is_shared=owners == 0)
    streams = streams_of(cfg, plan, jnp.zeros(batch, jnp.int32), tokens.mask, cu_seqlens)
    is_owner = streams.lengths > cfg.chunk_size + schedule.lag(cfg)
    owned = jnp.where(is_owner, jnp.cumsum(is_owner, dtype=jnp.int32), 0) if owners else jnp.zeros(batch, jnp.int32)
    tables = Memory(*(jnp.broadcast_to(x, (1 + owners, *x.shape[1:])) for x in tables_in(memory, dtype)))
    given = tables, no_uses(cfg, 1 + owners, dtype), _source(dtype, tokens), streams._replace(tables=owned)
    result = run(cfg, plan, *alike(*given))
    look, trace = _reading(cfg, result, tokens, streams.due)
    return look.output, trace


@placed
@partial(jax.jit, static_argnums=(0,))
def _read_only(
    cfg: FwPKMConfig, memory: Memory, tokens: Tokens, cu_seqlens: Array | None = None
) -> tuple[Lookup, Trace]:
    """``apply`` with ``update=False``."""
    dtype, batch = call_dtype(memory, tokens.query), len(tokens.query) if cu_seqlens is None else len(cu_seqlens) - 1
    plan = plan_read(cfg, batch, tokens.query[..., 0].size, cu_seqlens is not None)
    streams = streams_of(cfg, plan, jnp.zeros(batch, jnp.int32), tokens.mask, cu_seqlens)
    result = run(cfg, plan, *alike(tables_in(memory, dtype), None, _source(dtype, tokens), streams))
    return _reading(cfg, result, tokens, streams.due)


@placed
@partial(jax.jit, static_argnums=(0, 1, 2))
def _flush(
    cfg: FwPKMConfig, writes: bool, engine: Engine, state: State, chosen: Array
) -> tuple[_Written | None, Tokens, Array, Trace]:
    """``flush``: what is written where a chunk may be pending, pending tokens, the position and the trace."""
    dtype, memories, batch = state.memory.keys.dtype, len(state.memory.keys), len(state.position)
    num_pending, written = schedule.pending(cfg, state.position), None
    losses = Losses(*jnp.zeros((2, memories, 1), dtype))
    if writes and engine == "triton":
        behind = jnp.arange(cfg.capacity) >= jnp.where(chosen, num_pending, 0)[:, None]
        result: Any = fast.write(cfg, state.memory, state.maybe_uses, without(state.pending, behind), None, False)
        written, losses = _Written(Memory(result.keys, result.values), result.uses), result.losses
    elif writes:
        plan = plan_flush(cfg, batch)
        due = (chosen & (num_pending > cfg.lookahead)).astype(jnp.int32)
        streams = streams_of(cfg, plan, num_pending, None, None, due)
        result = run(cfg, plan, *alike(state.memory, state.maybe_uses, _source(dtype, None, state.pending), streams))
        written, losses = _Written(Memory(result.keys, result.values), result.uses), result.losses
    entries = jnp.zeros((batch, 0, cfg.slots_per_token), dtype)
    count = schedule.flush_writes(cfg, jnp.where(chosen, num_pending, 0)).reshape(memories, -1)[:, 0]
    trace = Trace(entries.astype(jnp.int32), entries, *losses, count)
    return written, without(state.pending, chosen), jnp.where(chosen, 0, state.position), trace


@placed
@partial(jax.jit, static_argnums=(0, 1))
def _chunk_update(
    cfg: FwPKMConfig, engine: Engine, memory: Memory, chunk: Tokens, pair: Array | None
) -> tuple[Memory, Losses]:
    if engine == "triton":
        pair = jnp.ones(chunk.query.shape[:2], bool) if pair is None else pair
        result: Any = fast.write(cfg, memory, None, chunk, pair, True)
        return Memory(result.keys, result.values), Losses(*(lax.stop_gradient(x[:, 0]) for x in result.losses))
    dtype = call_dtype(memory, chunk.query)
    memory, chunk = tables_in(memory, dtype), filled(dtype, chunk)
    finite_target = jnp.isfinite(chunk.value).all(-1)  # those that are not finite make no pair, but are read
    table = as_table(chunk._replace(value=jnp.where(finite_target[..., None], chunk.value, 0)))
    chunk = from_table(cfg, live_rows(table, chunk.mask).reshape(*chunk.mask.shape, -1))
    selected = select_window(cfg, memory, chunk)._replace(found=None)
    chunk = without(chunk, selected.dead)
    write = Write(chunk.value, chunk.mask & finite_target & (True if pair is None else pair), chunk.mask)
    computed = compute_window(cfg, selected.keys, selected.rows, chunk, selected, write, cfg.num_slots)
    values = selected.touched.put(memory.values.reshape(-1, cfg.value_dim), computed.rows)
    losses = Losses(computed.memorization, computed.addressing)
    return Memory(computed.keys, values.reshape(memory.values.shape)), losses


def tables_in(memory: Memory[Array], dtype: jnp.dtype) -> Memory[Array]:
    """The tables in the dtype that a call computes in."""
    return Memory(*(x.astype(dtype) for x in memory))


def _source(dtype: jnp.dtype, tokens: Tokens | None, pending: Tokens | None = None) -> Array:
    """``[cells, D]``: pending tokens, those of a call, and the empty cell (streams.py)."""
    tables = [] if pending is None else [as_table(filled(dtype, pending))]
    if tokens is not None:
        tables.append(live_rows(as_table(filled(dtype, tokens)), tokens.mask))
    return jnp.concatenate([*tables, jnp.zeros((1, tables[0].shape[1]), dtype)])


def _reading(cfg: FwPKMConfig, result: Result, tokens: Tokens, due: Array) -> tuple[Lookup, Trace]:
    """What the tokens of a call read, and its record."""
    reads, slots = (x.reshape(*tokens.query.shape[:2], -1) for x in (result.reads, result.slots))
    if tokens.mask is not None and cfg.memory_scope == "batch":  # there they are read, as they take a tick
        reads, slots = (jnp.where(tokens.mask[..., None], x, 0) for x in (reads, slots))
    output, weights = jnp.split(reads, [cfg.value_dim], axis=-1)
    writes = due.reshape(memories_for(cfg, len(due)), -1)[:, 0]
    trace = Trace(slots, jax.lax.stop_gradient(weights), *result.losses, writes)
    return Lookup(output.astype(tokens.query.dtype), slots, weights), trace
