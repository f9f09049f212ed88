"""The NumPy backend: the specification, written to be read beside SPEC.md §2 to §5 and §8.

The equations are in equations.py; here is what calls them: reads, writes, and the stream of chunks.
"""

from typing import Any, NamedTuple

import numpy as np

from fwpkm import equations, schedule, validation
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace
from fwpkm.initial import initial_arrays

Array = np.ndarray
_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")  # §5: non-finite numbers are expected


class Tokens(NamedTuple):
    """n tokens of B sequences, in the tables' dtype."""

    query: Array
    """``[B, n, H*Dk]``"""
    value: Array
    """``[B, n, Dv]``: what a token offers as a target."""
    gate: Array
    """``[B, n]``"""
    mask: Array
    """``[B, n]`` bool"""

    def slice(self, start: int, stop: int | None) -> "Tokens":
        """Tokens start to stop of every row."""
        return Tokens(*(x[:, start:stop] for x in self))

    def join(self, later: "Tokens") -> "Tokens":
        """These tokens, then the later ones."""
        return Tokens(*(np.concatenate(pair, axis=1) for pair in zip(self, later)))

    def without(self, dead: Array) -> "Tokens":
        """The dead ones [B, n] stored as zeros with mask False (§5)."""
        return Tokens(*(np.where(dead.reshape(dead.shape + (1,) * (x.ndim - 2)), x.dtype.type(0), x) for x in self))


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
    """Fresh tables (§7), the same numbers in every backend for one seed.

    Returns:
        float32 keys ``[M, H, 2, S, Dk/2]`` and values ``[M, N, Dv]``.

    Raises:
        ValueError: ``memories`` is not an integer of at least 1.
    """
    return Memory(*initial_arrays(cfg, memories, seed))


def init_state(cfg: FwPKMConfig, memory: Memory, batch_size: int) -> State:
    """A state at position 0 that owns a copy of ``memory``; M = 1 is broadcast to B rows in "sequence" scope.

    Raises:
        ValueError: the tables fit neither ``cfg`` nor ``batch_size``.
    """
    validation.check_initial(cfg, memory, batch_size, Array)
    memories = validation.memories_for(cfg, batch_size)
    tables = Memory(*(np.broadcast_to(x, (memories, *x.shape[1:])).copy() for x in memory))
    return _state(cfg, tables, _no_tokens(cfg, batch_size, memory.keys.dtype), 0)


@_quiet
def apply(
    cfg: FwPKMConfig,
    state: State,
    query: Array,
    value: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    update: bool = True,
    *,
    inplace: bool = False,
) -> tuple[Array, State, Trace]:
    """Read T tokens and write every chunk that they complete (§5).

    Args:
        cfg: the configuration.
        state: where the sequence stands; left as it was, unless ``inplace``.
        query: ``[B, T, H*Dk]``, any floating dtype.
        value: ``[B, T, Dv]``.
        gate: ``[B, T]`` in [0, 1], or None for 1.
        mask: ``[B, T]`` bool, False for tokens that never write, or None for True.
        update: False only reads: no write, nothing pending, position unchanged.
        inplace: the state's tables may be overwritten.

    Returns:
        output ``[B, T, Dv]`` in the query's dtype, the next state, and the trace.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what was received.
    """
    validation.check_apply(cfg, state, query, value, gate, mask, Array)
    batch, length = query.shape[:2]
    position = validation.check_position(state.position.tolist())
    memory = _as_tables(state.memory, query)
    tokens = _tokens(memory.keys.dtype, query, value, gate, mask)
    trace = _empty_trace(cfg, len(memory.keys), batch, length, memory.keys.dtype)
    output = np.empty((batch, length, cfg.value_dim), memory.keys.dtype)
    runs = schedule.segments(cfg, position, length) if update else [schedule.Segment(0, length, False)]
    if update:
        validation.check_length(position, length)
    waiting, owned, writes = _pending(cfg, state, memory.keys.dtype), inplace, 0
    for start, stop, completes in runs:
        part = tokens.slice(start, stop)
        look, finite = _look(cfg, memory, part.query)
        dead = ~(finite & _finite(part))
        output[:, start:stop] = np.where(dead[..., None], np.nan, look.output)
        trace.slots[:, start:stop] = look.slots
        trace.weights[:, start:stop] = np.where(dead[..., None], np.nan, look.weights)
        waiting = waiting.join(part.without(dead))
        if completes:
            memory = memory if owned else Memory(*(x.copy() for x in memory))
            owned = True
            losses = _write_window(cfg, memory, waiting)
            trace.memorization[:, writes], trace.addressing[:, writes] = losses
            waiting, writes = waiting.slice(cfg.chunk_size, None), writes + 1
    trace = trace._replace(writes=np.int32(writes))
    if update and length:
        tables = memory if writes else state.memory
        state = _state(cfg, tables, waiting, position + length)
    return output.astype(query.dtype), state, trace


@_quiet
def flush(cfg: FwPKMConfig, state: State, *, inplace: bool = False) -> tuple[State, Trace]:
    """Write the pending chunk, empty it and restart the count (§5).

    Returns:
        the state at position 0, and the trace of that write: losses ``[M, 1]``, slots and weights ``[B, 0, H*k]``.

    Raises:
        ValueError: the state does not fit ``cfg``.
    """
    validation.check_state(cfg, state, None, Array)
    validation.check_position(state.position.tolist())
    memory = state.memory
    batch, dtype = len(state.position), memory.keys.dtype
    waiting = _pending(cfg, state, dtype)
    trace = _empty_trace(cfg, len(memory.keys), batch, 0, dtype, columns=1)
    count = waiting.mask.shape[1]
    writes = schedule.flush_writes(cfg, count)
    if count > cfg.lookahead:  # else no token has a pair
        memory = memory if inplace else Memory(*(x.copy() for x in memory))
        losses = _write_window(cfg, memory, waiting)
        trace.memorization[:, 0], trace.addressing[:, 0] = losses
    return _state(cfg, memory, _no_tokens(cfg, batch, dtype), 0), trace._replace(writes=np.int32(writes))


@_quiet
def lookup(cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
    """Read the tables (§2): query ``[B, n, H*Dk]`` -> output ``[B, n, Dv]``, slots and weights ``[B, n, H*k]``.

    A token whose query or selected scores are not finite reads NaN.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    validation.check_lookup(cfg, memory, query, Array)
    memory = _as_tables(memory, query)
    look, finite = _look(cfg, memory, query.astype(memory.keys.dtype))
    output, weights = (np.where(finite[..., None], x, np.nan) for x in (look.output, look.weights))
    return Lookup(output.astype(query.dtype), look.slots, weights)


@_quiet
def chunk_update(
    cfg: FwPKMConfig,
    memory: Memory,
    query: Array,
    target: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    pair: Array | None = None,
) -> tuple[Memory, Losses]:
    """Write one chunk (§4) whose targets are already shifted.

    Args:
        cfg: the configuration.
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
    validation.check_chunk(cfg, memory, query, target, gate, mask, pair, Array)
    tables = _as_tables(memory, query)
    tokens = _tokens(tables.keys.dtype, query, target, gate, mask)
    selections = _select(cfg, tables, tokens.query)
    finite = np.stack([s.finite for s in selections]) & np.isfinite(tokens.gate)
    tokens = tokens.without(~finite)
    has_target = np.isfinite(target).all(-1) & (True if pair is None else pair)
    tables = Memory(*(x.copy() for x in tables))
    losses = _write(cfg, tables, selections, tokens, tokens.value, tokens.mask, tokens.mask & has_target)
    return tables, losses


def detach(state: State) -> State:
    """The state itself: NumPy keeps no gradients."""
    return state


def reset(state: State, memory: Memory, rows: Any) -> State:
    """Give rows their initial memory back and mask their pending tokens; the count goes on (§5).

    Args:
        state: left as it was.
        memory: the initial tables, M = 1 or that of the state.
        rows: integers, or a bool mask ``[B]``; all of them where one table serves the batch.

    Raises:
        ValueError: rows out of range, some of the rows that share one table, or tables of other shapes.
    """
    validation.check_reset(state, memory, Array)
    batch, memories = len(state.position), len(state.memory.keys)
    chosen = validation.row_mask(rows, batch, memories)
    tables = chosen if memories == batch else chosen[:1]
    fresh = (np.where(_rows(tables, x), y.astype(x.dtype), x) for x, y in zip(state.memory, memory))
    zeroed = Tokens(*(np.where(_rows(chosen, x), x.dtype.type(0), x) for x in state[1:5]))
    return State(Memory(*fresh), *zeroed, position=state.position)


def asarray(x: Any, dtype: str) -> Array:
    """``x`` as an array of the named dtype."""
    return np.asarray(x, dtype)


def to_numpy(x: Array) -> Array:
    """``x`` itself."""
    return np.asarray(x)


def device_name() -> str:
    """Where this backend runs."""
    return "cpu"


def _rows(chosen: Array, like: Array) -> Array:
    return chosen.reshape((-1,) + (1,) * (like.ndim - 1))


def _dtype(query: Array, memory: Memory) -> np.dtype:
    """float32, or a wider dtype that queries and tables share (§6)."""
    shared = query.dtype == memory.keys.dtype and query.dtype.itemsize > 4
    return query.dtype if shared else np.dtype(np.float32)


def _as_tables(memory: Memory, query: Array) -> Memory:
    dtype = _dtype(query, memory)
    return Memory(*(x.astype(dtype, copy=False) for x in memory))


def _tokens(dtype: np.dtype, query: Array, value: Array, gate: Array | None, mask: Array | None) -> Tokens:
    shape = query.shape[:2]
    gate = np.ones(shape, dtype) if gate is None else gate.astype(dtype)
    mask = np.ones(shape, bool) if mask is None else mask
    return Tokens(query.astype(dtype), value.astype(dtype), gate, mask)


def _no_tokens(cfg: FwPKMConfig, batch: int, dtype: np.dtype) -> Tokens:
    query = np.zeros((batch, 0, cfg.num_heads * cfg.key_dim), dtype)
    return _tokens(dtype, query, np.zeros((batch, 0, cfg.value_dim), dtype), None, None)


def _pending(cfg: FwPKMConfig, state: State, dtype: np.dtype) -> Tokens:
    """The valid entries of the state's buffers."""
    count = schedule.pending(cfg, int(state.position[0]))
    return _tokens(dtype, *state[1:5]).slice(0, count)


def _state(cfg: FwPKMConfig, memory: Memory, waiting: Tokens, position: int) -> State:
    """Pad the waiting tokens to P, so that shapes never change."""
    batch, count = waiting.mask.shape
    room = schedule.capacity(cfg) - count
    padded = Tokens(*(np.pad(x, [(0, 0), (0, room)] + [(0, 0)] * (x.ndim - 2)) for x in waiting))
    return State(memory, *padded, position=np.full(batch, position, np.int32))


def _empty_trace(
    cfg: FwPKMConfig, memories: int, batch: int, length: int, dtype: np.dtype, columns: int | None = None
) -> Trace:
    entries = (batch, length, cfg.slots_per_token)
    losses = (memories, schedule.max_writes(cfg, length) if columns is None else columns)
    return Trace(
        np.zeros(entries, np.int64), np.zeros(entries, dtype), np.zeros(losses, dtype), np.zeros(losses, dtype), 0
    )


def _finite(tokens: Tokens) -> Array:
    """``[B, n]``: query, value and gate are all finite."""
    return np.isfinite(tokens.query).all(-1) & np.isfinite(tokens.value).all(-1) & np.isfinite(tokens.gate)


def _halves(cfg: FwPKMConfig, query: Array) -> Array:
    """[..., H*Dk] -> [..., H, 2, Dk/2]."""
    return query.reshape(*query.shape[:-1], cfg.num_heads, 2, cfg.key_dim // 2)


def _look(cfg: FwPKMConfig, memory: Memory, query: Array) -> tuple[Lookup, Array]:
    """Reads of B sequences, and which of them are finite [B, n]."""
    chosen = _select(cfg, memory, query)
    reads = [equations.read(memory.values[_memory_of(b, memory)], c.slots, c.weights) for b, c in enumerate(chosen)]
    slots, weights, finite = (np.stack([getattr(c, name) for c in chosen]) for name in ("slots", "weights", "finite"))
    return Lookup(np.stack(reads), slots, weights), finite


def _select(cfg: FwPKMConfig, memory: Memory, query: Array) -> list[equations.Selection]:
    """What each row of a batch selects in its own memory, or in the one that all share."""
    return [equations.select(cfg, row, memory.keys[_memory_of(b, memory)]) for b, row in enumerate(_halves(cfg, query))]


def _memory_of(row: int, memory: Memory) -> int:
    return min(row, len(memory.keys) - 1)


def _write_window(cfg: FwPKMConfig, memory: Memory, window: Tokens) -> Losses:
    """Write, in place, the chunk that begins a window; tokens after its first C serve only as targets (§5)."""
    if cfg.boundary == "drop":
        window = window.slice(0, cfg.chunk_size)
    selections = _select(cfg, memory, window.query)
    live = window.mask & np.stack([s.finite for s in selections])
    counted = live & (np.arange(live.shape[1]) < cfg.chunk_size)
    pair = counted & _ahead(live, cfg.lookahead)
    return _write(cfg, memory, selections, window, _ahead(window.value, cfg.lookahead), counted, pair)


def _ahead(x: Array, lookahead: int) -> Array:
    """x[:, t + L] at t; zeros where that has not arrived."""
    shifted = np.zeros_like(x)
    shifted[:, : max(0, x.shape[1] - lookahead)] = x[:, lookahead:]
    return shifted


def _write(
    cfg: FwPKMConfig,
    memory: Memory,
    selections: list[equations.Selection],
    tokens: Tokens,
    target: Array,
    counted: Array,
    pair: Array,
) -> Losses:
    """Write the counted tokens, those with a pair pulling towards their targets, into every memory in place (§4)."""
    memories, batch = len(memory.keys), len(selections)
    query = _halves(cfg, tokens.query)
    losses = Losses(*np.zeros((2, memories), memory.keys.dtype))
    for m in range(memories):
        rows = [m] if memories == batch else list(range(batch))
        if not pair[rows].any():
            continue
        chosen = equations.Selection(*(np.concatenate(x) for x in zip(*(selections[b] for b in rows))))
        q, u, g, n, has = (np.concatenate(x[rows]) for x in (query, target, tokens.gate, counted, pair))
        keys, values = memory.keys[m], memory.values[m]
        error = equations.read(values, chosen.slots, chosen.weights) - u
        p = equations.sub_key_probabilities(chosen.sub_scores)
        losses.memorization[m] = equations.memorization_loss(error, g, has)
        losses.addressing[m] = equations.addressing_loss(equations.mean_probabilities(cfg, p, chosen.subkeys, n))
        touched, pull = equations.value_gradient(cfg, chosen, error, g, has, n)
        values[touched] = equations.step(cfg, values[touched], pull)
        spread = keys.dtype.type(cfg.addressing_weight) * equations.key_gradient(cfg, keys, q, chosen, n)
        keys[...] = equations.step(cfg, keys, spread)
    return losses
