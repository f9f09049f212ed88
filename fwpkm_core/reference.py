"""The NumPy backend: the specification, written to be read beside SPEC.md §2 to §5 and §8.

The equations are in equations.py; here is what calls them: reads, writes, and the stream of chunks. The functions are
documented on ``fwpkm.protocol.Backend``.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fwpkm import equations, schedule, validation
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace, memories_for
from fwpkm.equations import Selection, ahead
from fwpkm.initial import initial_arrays
from fwpkm.tokens import TOKEN_FIELDS, Tokens, token_specs
from fwpkm.validation import Implementation

Array = np.ndarray
_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")  # §5: non-finite numbers are expected

SELF = Implementation.of(
    equations.REFERENCE,
    Array,
    """
    key_dim value_dim num_heads num_subkeys top_k chunk_size lookahead boundary score score_eps temperature
    learning_rate write_scale weight_decay grad_clip addressing_weight memory_scope query value gate mask
    """,
)


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
    """Fresh tables (§7), the same numbers in every backend for one seed."""
    return Memory(*initial_arrays(cfg, memories, seed))


def init_state(cfg: FwPKMConfig, memory: Memory, batch_size: int) -> State:
    """A state at position 0 that owns a copy of ``memory``."""
    validation.check_initial(cfg, memory, batch_size, SELF)
    memories = memories_for(cfg, batch_size)
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
    """Read T tokens and write every chunk that they complete (§5)."""
    tokens = Tokens(query, value, gate, mask)
    validation.check_apply(cfg, state, tokens, SELF)
    batch, length = query.shape[:2]
    position = validation.check_position(state.position.tolist())
    if update:
        validation.check_length(position, length)
    memory = _as_tables(state.memory, query)
    tokens = _filled(memory.keys.dtype, tokens)
    trace = _empty_trace(cfg, len(memory.keys), batch, length, memory.keys.dtype)
    output = np.empty((batch, length, cfg.value_dim), memory.keys.dtype)
    pending, owned, writes = _pending(cfg, state, memory.keys.dtype), inplace, 0
    for start, stop, completes in windows(cfg, position, length, update):
        part = tokens.slice(start, stop)
        look, finite = _look(cfg, memory, part.query)
        dead = ~(finite & _finite(part))
        output[:, start:stop] = np.where(dead[..., None], np.nan, look.output)
        trace.slots[:, start:stop] = look.slots
        trace.weights[:, start:stop] = np.where(dead[..., None], np.nan, look.weights)
        pending = _join(pending, _without(part, dead))
        if completes:
            memory = memory if owned else Memory(*(x.copy() for x in memory))
            owned = True
            losses = _write_window(cfg, memory, pending)
            trace.memorization[:, writes], trace.addressing[:, writes] = losses
            pending, writes = pending.slice(cfg.chunk_size, None), writes + 1
    trace = trace._replace(writes=np.int32(writes))
    if update and length:
        tables = memory if writes else state.memory
        state = _state(cfg, tables, pending, position + length)
    return output.astype(query.dtype), state, trace


def windows(cfg: FwPKMConfig, position: int, length: int, update: bool) -> Iterator[schedule.Window]:
    """Which of a call's tokens read the same tables, and whether the pending chunk is written after them (§5)."""
    return schedule.windows(cfg, position, length) if update else iter([schedule.Window(0, length, False)])


@_quiet
def flush(cfg: FwPKMConfig, state: State, *, inplace: bool = False) -> tuple[State, Trace]:
    """Write the pending chunk, empty it and restart the count (§5)."""
    validation.check_state(cfg, state, None, SELF)
    validation.check_position(state.position.tolist())
    memory = state.memory
    batch, dtype = len(state.position), memory.keys.dtype
    pending = _pending(cfg, state, dtype)
    trace = _empty_trace(cfg, len(memory.keys), batch, 0, dtype, columns=1)
    count = pending.mask.shape[1]
    writes = schedule.flush_writes(cfg, count)
    if count > cfg.lookahead:  # else no token has a pair
        memory = memory if inplace else Memory(*(x.copy() for x in memory))
        losses = _write_window(cfg, memory, pending)
        trace.memorization[:, 0], trace.addressing[:, 0] = losses
    return _state(cfg, memory, _no_tokens(cfg, batch, dtype), 0), trace._replace(writes=np.int32(writes))


@_quiet
def lookup(cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
    """Read the tables (§2); a token whose query or selected scores are not finite reads NaN."""
    validation.check_lookup(cfg, memory, query, SELF)
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
    """Write one chunk (§4) whose targets are already shifted."""
    chunk = Tokens(query, target, gate, mask)
    validation.check_chunk(cfg, memory, chunk, pair, SELF)
    tables = _as_tables(memory, query)
    chunk = _filled(tables.keys.dtype, chunk)
    finite_target = np.isfinite(target).all(-1)
    chunk = chunk._replace(value=np.where(finite_target[..., None], chunk.value, 0))  # they are read, and have no pair
    selections = _select(cfg, tables, chunk.query)
    finite = np.stack([s.finite for s in selections]) & _finite(chunk)
    chunk = _without(chunk, ~finite)
    has_target = finite_target & (True if pair is None else pair)
    tables = Memory(*(x.copy() for x in tables))
    losses = _write(cfg, tables, selections, chunk, chunk.value, chunk.mask, chunk.mask & has_target)
    return tables, losses


def detach(state: State) -> State:
    """The state itself: NumPy keeps no gradients."""
    return state


def reset(state: State, memory: Memory, rows: Any) -> State:
    """Give rows their initial memory back and mask their pending tokens; the count goes on (§5)."""
    validation.check_reset(state, memory, Array)
    batch, memories = len(state.position), len(state.memory.keys)
    chosen = validation.row_mask(rows, batch, memories)
    tables = chosen if memories == batch else chosen[:1]
    fresh = (np.where(_outer(tables, x), y.astype(x.dtype), x) for x, y in zip(state.memory, memory))
    return State.of(Memory(*fresh), _without(state.pending, chosen), state.position)


def asarray(x: Any, dtype: str) -> Array:
    """``x`` as an array of the named dtype."""
    return np.asarray(x, dtype)


def to_numpy(x: Array) -> Array:
    """``x`` itself."""
    return np.asarray(x)


def device_name() -> str:
    """Where this backend runs."""
    return "cpu"


# --- Tokens and tables ---


def _outer(flags: Array, like: Array) -> Array:
    """``flags`` with axes of length 1 behind its own, so that it broadcasts against ``like``."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def _dtype(query: Array, memory: Memory) -> np.dtype:
    """float32, or a wider dtype that queries and tables share (§6)."""
    shared = query.dtype == memory.keys.dtype and query.dtype.itemsize > 4
    return query.dtype if shared else np.dtype(np.float32)


def _as_tables(memory: Memory, query: Array) -> Memory:
    dtype = _dtype(query, memory)
    return Memory(*(x.astype(dtype, copy=False) for x in memory))


def _filled(dtype: np.dtype, tokens: Tokens) -> Tokens:
    """The tokens of a call in the tables' dtype, with defaults for what was left out."""
    shape, arrays = tokens.query.shape[:2], []
    for field, x in zip(TOKEN_FIELDS, tokens):
        wanted = dtype if field.kind == "float" else np.dtype(bool)
        arrays.append(np.full(shape, field.default, wanted) if x is None else x.astype(wanted, copy=False))
    return Tokens(*arrays)


def _no_tokens(cfg: FwPKMConfig, batch: int, dtype: np.dtype) -> Tokens:
    specs = token_specs(cfg, batch, ("P", 0))
    return specs.map(lambda spec: np.zeros(spec.shape, dtype if spec.kind == "float" else bool))


def _join(before: Tokens, after: Tokens) -> Tokens:
    return Tokens(*(np.concatenate(two, axis=1) for two in zip(before, after)))


def _finite(tokens: Tokens) -> Array:
    """``[B, n]``: every number of a token is finite."""
    numbers = [x for field, x in zip(TOKEN_FIELDS, tokens) if field.kind == "float"]
    return np.all([np.isfinite(x).all(tuple(range(2, x.ndim))) for x in numbers], axis=0)


def _without(tokens: Tokens, dead: Array) -> Tokens:
    """The dead ones [B, n], or [B], stored as zeros with mask False (§5)."""
    return tokens.map(lambda x: np.where(_outer(dead, x), x.dtype.type(0), x))


def _pending(cfg: FwPKMConfig, state: State, dtype: np.dtype) -> Tokens:
    """The valid entries of the state's buffers."""
    count = schedule.pending(cfg, int(state.position[0]))
    return _filled(dtype, state.pending).slice(0, count)


def _state(cfg: FwPKMConfig, memory: Memory, pending: Tokens, position: int) -> State:
    """Pad the pending tokens to P, so that shapes never change."""
    batch, count = pending.mask.shape
    padding = (0, cfg.capacity - count)
    padded = pending.map(lambda x: np.pad(x, [(0, 0), padding] + [(0, 0)] * (x.ndim - 2)))
    return State.of(memory, padded, np.full(batch, position, np.int32))


def _empty_trace(
    cfg: FwPKMConfig, memories: int, batch: int, length: int, dtype: np.dtype, columns: int | None = None
) -> Trace:
    entries = (batch, length, cfg.slots_per_token)
    losses = (memories, schedule.max_writes(cfg, length) if columns is None else columns)
    return Trace(
        np.zeros(entries, np.int64), np.zeros(entries, dtype), np.zeros(losses, dtype), np.zeros(losses, dtype), 0
    )


# --- Reads and writes ---


def _halves(cfg: FwPKMConfig, query: Array) -> Array:
    """[..., H*Dk] -> [..., H, 2, Dk/2]."""
    return query.reshape(*query.shape[:-1], cfg.num_heads, 2, cfg.key_dim // 2)


def _look(cfg: FwPKMConfig, memory: Memory, query: Array) -> tuple[Lookup, Array]:
    """Reads of B sequences, and which of them are finite [B, n]."""
    chosen = _select(cfg, memory, query)
    reads = [equations.read(memory.values[_memory_of(b, memory)], c.slots, c.weights) for b, c in enumerate(chosen)]
    slots, weights, finite = (np.stack([getattr(c, name) for c in chosen]) for name in ("slots", "weights", "finite"))
    return Lookup(np.stack(reads), slots, weights), finite


def _select(cfg: FwPKMConfig, memory: Memory, query: Array) -> list[Selection]:
    """What each row of a batch selects in its own memory, or in the one that all share."""
    rows = enumerate(_halves(cfg, query))
    return [equations.select_slots(cfg, row, memory.keys[_memory_of(b, memory)]) for b, row in rows]


def _memory_of(row: int, memory: Memory) -> int:
    return min(row, len(memory.keys) - 1)


def _write_window(cfg: FwPKMConfig, memory: Memory, window: Tokens) -> Losses:
    """Write, in place, the chunk that begins a window; tokens after its first C serve only as targets (§5)."""
    selections = _select(cfg, memory, window.query)
    live = window.mask & np.stack([s.finite for s in selections])
    counted = live & (np.arange(live.shape[1]) < cfg.chunk_size)
    pair = equations.pairs(cfg, counted, live)
    return _write(cfg, memory, selections, window, ahead(cfg, window.value), counted, pair)


def _write(
    cfg: FwPKMConfig,
    memory: Memory,
    selections: list[Selection],
    tokens: Tokens,
    target: Array,
    counted: Array,
    pair: Array,
) -> Losses:
    """Write the counted tokens, those with a pair moving their slots towards their targets, in place (§4)."""
    memories, batch = len(memory.keys), len(selections)
    query = _halves(cfg, tokens.query)
    losses = Losses(*np.zeros((2, memories), memory.keys.dtype))
    for m in range(memories):
        rows = [m] if memories == batch else list(range(batch))
        if not pair[rows].any():
            continue
        chosen = Selection(*(np.concatenate(x) for x in zip(*(selections[b] for b in rows))))
        q, u, g, n, has = (np.concatenate(x[rows]) for x in (query, target, tokens.gate, counted, pair))
        keys, values = memory.keys[m], memory.values[m]
        error = equations.read(values, chosen.slots, chosen.weights) - u
        p = equations.sub_key_probabilities(chosen.sub_scores)
        losses.memorization[m] = equations.memorization_loss(error, g, has)
        losses.addressing[m] = equations.addressing_loss(equations.mean_probabilities(cfg, p, chosen.subkeys, n))
        touched, gradient = equations.value_gradient(cfg, chosen, error, g, has, n)
        values[touched] = equations.step(cfg, values[touched], gradient)
        weighted = keys.dtype.type(cfg.addressing_weight) * equations.key_gradient(cfg, keys, q, chosen, n)
        keys[...] = equations.step(cfg, keys, weighted)
    return losses
