"""The NumPy backend: the specification, written to be read beside SPEC.md §2 to §5 and §8.

The equations are in equations.py; here is what calls them: reads, writes, and the stream of chunks. The functions are
documented on ``fwpkm.protocol.Backend``.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fwpkm import equations, packing, schedule, validation
from fwpkm import rows as row_checks
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace, memories_for
from fwpkm.equations import Selection, ahead
from fwpkm.initial import initial_arrays
from fwpkm.packing import PackedState
from fwpkm.tokens import TOKEN_FIELDS, Tokens, token_specs
from fwpkm.validation import Implementation

__all__ = [
    "apply",
    "asarray",
    "chunk_update",
    "concat",
    "detach",
    "device_name",
    "flush",
    "init_memory",
    "init_state",
    "lookup",
    "nbytes",
    "pack",
    "pending",
    "put",
    "reset",
    "select",
    "to_numpy",
    "unpack",
]

Array = np.ndarray
_quiet = np.errstate(all="ignore")  # §5: non-finite numbers are expected; and no setting of the caller may stop a write

SELF = Implementation.of(
    equations.REFERENCE,
    Array,
    """
    key_dim value_dim num_heads num_subkeys top_k chunk_size lookahead boundary score score_eps temperature
    learning_rate write_scale weight_decay grad_clip addressing_weight memory_scope usage_weight query value gate mask
    """,
)


def __dir__() -> list[str]:
    return __all__


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory[Array]:
    """Fresh tables (§7), the same numbers in every backend for one seed."""
    return Memory(*initial_arrays(cfg, memories, seed))


def init_state(cfg: FwPKMConfig, memory: Memory[Array], batch_size: int) -> State[Array]:
    """A state at position 0 that owns a copy of ``memory``."""
    validation.check_initial(cfg, memory, batch_size, SELF)
    memories = memories_for(cfg, batch_size)
    tables = Memory(*(np.broadcast_to(x, (memories, *x.shape[1:])).copy() for x in memory))
    position = np.zeros(batch_size, np.int32)
    uses = np.zeros(tables.values.shape[:2], memory.keys.dtype) if cfg.usage_weight else None
    return _state(cfg, tables, [_no_tokens(cfg, batch_size, memory.keys.dtype)], position, uses)


@_quiet
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
    inplace: bool = False,
) -> tuple[Array, Any, Trace]:
    """Read T tokens and write every chunk that they complete (§5)."""
    tokens = Tokens(query, value, gate, mask)
    batch = validation.check_apply(cfg, state, tokens, cu_seqlens, update, SELF)
    if isinstance(state, Memory):
        fresh = init_state(cfg, state, batch)
        output, _, trace = apply(cfg, fresh, query, value, gate, mask, cu_seqlens, update, inplace=True)
        return output, None, trace
    validation.check_positions(cfg, state.position.tolist())
    _check_inplace(inplace, (*state.memory, state.maybe_uses))
    if cu_seqlens is not None:
        validation.check_cu_seqlens(cu_seqlens.tolist(), tokens.length)
    memory = _as_tables(state.memory, query)
    dtype, memories = memory.keys.dtype, len(memory.keys)
    uses = None if state.maybe_uses is None else state.maybe_uses.astype(dtype, copy=False)
    tokens = _filled(dtype, tokens)
    flat = tokens.map(lambda x: x.reshape(-1, *x.shape[2:]))
    trace = _empty_trace(cfg, memories, (tokens.mask.size,), schedule.max_writes(cfg, tokens.length), dtype)
    output = np.zeros((tokens.mask.size, cfg.value_dim), dtype)
    read_by = sequences(cfg, tokens.mask, cu_seqlens)
    position = schedule.reduced(cfg, state.position)
    first = position.reshape(memories, -1)[:, 0].tolist()
    due = [schedule.written(cfg, p + at.shape[1]) > schedule.written(cfg, p) for p, at in zip(first, read_by)]
    if update and any(due) and not inplace:
        memory, uses = _copies(memory, uses)
    pending = []
    for m, (at, before) in enumerate(zip(read_by, _pending(cfg, state, dtype))):
        own, own_uses, stream = *_of_memory(m, memory, uses), _at(flat, at)
        for start, stop, completes in windows(cfg, first[m], at.shape[1], update):
            part, here = stream.slice(start, stop), at[:, start:stop]
            look, finite = _look(cfg, own, part.query)
            there, dead = part.mask, ~(finite & _finite(part))
            output[here] = _blanked(look.output, there, dead)
            trace.slots[here] = _blanked(look.slots, there)
            trace.weights[here] = _blanked(look.weights, there, dead)
            before = _join(before, _without(part, dead | ~there))
            if completes:
                losses, column = _write_window(cfg, own, own_uses, before), trace.writes[m]
                trace.memorization[m, column], trace.addressing[m, column] = (x[0] for x in losses)
                trace.writes[m] += 1
                before = before.slice(cfg.chunk_size, None)
        pending.append(before)
    shape = tokens.mask.shape
    trace = trace._replace(**{x: getattr(trace, x).reshape(*shape, cfg.slots_per_token) for x in ("slots", "weights")})
    if update:
        counts = np.repeat([at.shape[1] for at in read_by], batch // memories)
        tables, uses = (memory, uses) if any(due) else (state.memory, state.maybe_uses)
        state = _state(cfg, tables, pending, position + counts, uses)
    return output.reshape(*shape, cfg.value_dim).astype(query.dtype), state, trace


def sequences(cfg: FwPKMConfig, mask: Array, cu_seqlens: Array | None) -> list[Array]:
    """Which tokens read each memory, in the order of its clock (§5): for each, indices into the B·T tokens [rows, n].

    In sequence scope they are the unmasked tokens of one row, or of one packed sequence; in batch scope the time steps
    of all rows, masked or not.
    """
    batch, length = mask.shape
    if cfg.memory_scope == "batch":
        return [np.arange(batch * length).reshape(batch, length)]
    if cfg.memory_scope == "sequence":
        ends = np.arange(batch + 1) * length if cu_seqlens is None else cu_seqlens
        return [start + np.flatnonzero(mask.ravel()[start:stop])[None] for start, stop in itertools.pairwise(ends)]
    return cfg.refuse("memory_scope", SELF.name)


def windows(cfg: FwPKMConfig, position: int, length: int, update: bool) -> Iterator[schedule.Window]:
    """Which of a call's tokens read the same tables, and whether the pending chunk is written after them (§5)."""
    return schedule.windows(cfg, position, length) if update else iter([schedule.Window(0, length, False)])


@_quiet
def flush(
    cfg: FwPKMConfig, state: State[Array], rows: Any = None, *, inplace: bool = False
) -> tuple[State[Array], Trace]:
    """Write the pending chunk of every sequence, or of ``rows``, empty it and restart the count (§5)."""
    batch, memories = validation.check_state(cfg, state, SELF), len(state.memory.keys)
    validation.check_positions(cfg, state.position.tolist())
    _check_inplace(inplace, (*state.memory, state.maybe_uses))
    chosen = row_checks.mask_of(cfg, rows, batch)
    memory, uses, dtype = state.memory, state.maybe_uses, state.memory.keys.dtype
    trace = _empty_trace(cfg, memories, (batch, 0), 1, dtype)
    pending = _pending(cfg, state, dtype)
    of_memory = chosen.reshape(memories, -1)[:, 0]
    due = [of_memory[m] and before.length > cfg.lookahead for m, before in enumerate(pending)]  # else no pair
    if any(due) and not inplace:
        memory, uses = _copies(memory, uses)
    for m, before in enumerate(pending):
        if of_memory[m]:
            trace.writes[m] = schedule.flush_writes(cfg, before.length)
            pending[m] = before.slice(0, 0)
        if due[m]:
            losses = _write_window(cfg, *_of_memory(m, memory, uses), before)
            trace.memorization[m], trace.addressing[m] = losses
    return _state(cfg, memory, pending, np.where(chosen, 0, state.position), uses), trace


@_quiet
def lookup(cfg: FwPKMConfig, memory: Memory[Array], query: Array) -> Lookup:
    """Read the tables (§2); a token whose query or selected scores are not finite reads NaN."""
    validation.check_lookup(cfg, memory, query, SELF)
    memory = _as_tables(memory, query)
    look, finite = _look(cfg, memory, query.astype(memory.keys.dtype))
    output, weights = (np.where(finite[..., None], x, np.nan) for x in (look.output, look.weights))
    return Lookup(output.astype(query.dtype), look.slots, weights)


@_quiet
def chunk_update(
    cfg: FwPKMConfig,
    memory: Memory[Array],
    query: Array,
    target: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    pair: Array | None = None,
) -> tuple[Memory[Array], Losses]:
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
    losses = _write(cfg, tables, None, selections, chunk, chunk.value, chunk.mask, chunk.mask & has_target)
    return tables, losses


def detach(state: State[Array]) -> State[Array]:
    """The state itself: NumPy keeps no gradients."""
    validation.check_is_state(state)
    return state


def reset(
    cfg: FwPKMConfig, state: State[Array], memory: Memory[Array], rows: Any = None, *, inplace: bool = False
) -> State[Array]:
    """Make rows what ``init_state`` makes (§5)."""
    batch = row_checks.check_reset(cfg, state, memory, SELF)
    ids = np.flatnonzero(row_checks.mask_of(cfg, rows, batch))
    if not len(ids):
        return state
    own = len(memory.keys) > 1
    fresh = init_state(cfg, Memory(*(x[ids] for x in memory)) if own else memory, len(ids))
    return _put(state, ids, fresh, inplace)


def select(cfg: FwPKMConfig, state: State[Array], rows: Any) -> State[Array]:
    """The state of these rows, in this order (§5)."""
    ids = row_checks.check_select(cfg, state, rows, SELF)
    tables = ids if cfg.memory_scope == "sequence" else [0]
    memory = Memory(*(x[tables] for x in state.memory))
    uses = None if state.maybe_uses is None else state.maybe_uses[tables]
    return State.of(memory, state.pending.map(lambda x: x[ids]), state.position[ids], uses)


def concat(cfg: FwPKMConfig, states: Sequence[State[Array]]) -> State[Array]:
    """One state of the rows of all, in order (§5)."""
    row_checks.check_concat(cfg, states, SELF)
    return states[0].map(lambda *x: np.concatenate(x), *states[1:])


def put(
    cfg: FwPKMConfig, state: State[Array], rows: Any, other: State[Array], *, inplace: bool = False
) -> State[Array]:
    """The state with the i-th row of ``other`` at rows[i] (§5)."""
    received = row_checks.check_put(cfg, state, other, SELF)
    ids = row_checks.ids_of(rows, len(state.position))
    row_checks.check_number(received, len(ids))
    return _put(state, ids, other, inplace)


def _put(state: State, ids: Array, other: State, inplace: bool) -> State:
    """``put``; in batch scope ``ids`` are all rows, and the one memory is that of ``other``."""

    def replaced(x: Array, y: Array) -> Array:
        x = x if inplace else x.copy()
        x[ids if len(x) == len(state.position) else slice(None)] = y
        return x

    _check_inplace(inplace, tuple(state.arrays().values()))
    return state.map(replaced, other)


def _check_inplace(inplace: bool, overwritten: Sequence[Array | None]) -> None:
    validation.check_flag("inplace", inplace)
    if inplace and not all(x is None or x.flags.writeable for x in overwritten):
        raise ValueError(
            "inplace=True would overwrite arrays of the state that are read-only: pass copies, or inplace=False. "
            "Received: a state with an array whose flags.writeable is False"
        )


def pending(cfg: FwPKMConfig, state: State[Array]) -> Array:
    """How many tokens of each row no write has consumed ``[B]`` (§5)."""
    validation.check_state(cfg, state, SELF)
    validation.check_positions(cfg, state.position.tolist())
    return schedule.pending(cfg, state.position)


def nbytes(state: State[Array]) -> int:
    """The bytes that a state takes, those of a table that rows share counted once (§5)."""
    validation.check_is_state(state)
    arrays = state.arrays().values()
    return sum(x.itemsize * math.prod(n for n, stride in zip(x.shape, x.strides) if stride) for x in arrays if x.size)


def pack(cfg: FwPKMConfig, state: State[Array], memory: Memory[Array], dtype: str | None = None) -> PackedState:
    """What a state holds that the initial ``memory`` does not (§10)."""
    return packing.pack(cfg, state, memory, dtype, SELF)


def unpack(cfg: FwPKMConfig, packed: PackedState | Sequence[PackedState], memory: Memory[Array]) -> State[Array]:
    """The state that was packed (§10)."""
    return packing.unpack(cfg, packing.prepare(cfg, packed, memory, SELF), memory)


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


def _copies(memory: Memory, uses: Array | None) -> tuple[Memory, Array | None]:
    """What a write may overwrite."""
    return Memory(*(x.copy() for x in memory)), None if uses is None else uses.copy()


def _of_memory(m: int, memory: Memory, uses: Array | None) -> tuple[Memory, Array | None]:
    """Views of one memory's tables and uses, M = 1."""
    return Memory(*(x[m : m + 1] for x in memory)), None if uses is None else uses[m : m + 1]


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


def _at(tokens: Tokens, index: Any) -> Tokens:
    """Of their first axis."""
    return tokens.map(lambda x: x[index])


def _join(before: Tokens, after: Tokens) -> Tokens:
    return Tokens(*(np.concatenate(two, axis=1) for two in zip(before, after)))


def _finite(tokens: Tokens) -> Array:
    """``[B, n]``: every number of a token is finite."""
    numbers = [x for field, x in zip(TOKEN_FIELDS, tokens) if field.kind == "float"]
    return np.all([np.isfinite(x).all(tuple(range(2, x.ndim))) for x in numbers], axis=0)


def _without(tokens: Tokens, dead: Array) -> Tokens:
    """The dead ones [B, n], or [B], stored as zeros with mask False (§5)."""
    return tokens.map(lambda x: np.where(_outer(dead, x), x.dtype.type(0), x))


def _pending(cfg: FwPKMConfig, state: State, dtype: np.dtype) -> list[Tokens]:
    """The valid entries of the state's buffers, of the rows of each memory [rows, p, ...]."""
    memories, batch = len(state.memory.keys), len(state.position)
    tokens, counts = _filled(dtype, state.pending), schedule.pending(cfg, state.position).tolist()
    shares = [slice(m * batch // memories, (m + 1) * batch // memories) for m in range(memories)]
    return [_at(tokens, rows).slice(0, counts[rows.start]) for rows in shares]


def _state(cfg: FwPKMConfig, memory: Memory, pending: list[Tokens], position: Array, uses: Array | None) -> State:
    """Of the pending tokens of each memory, padded to P, so that shapes never change."""

    def padded(x: Array) -> Array:
        return np.pad(x, [(0, 0), (0, cfg.capacity - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    rows = Tokens(*(np.concatenate([padded(x) for x in field]) for field in zip(*pending)))
    rows = _filled(memory.keys.dtype, rows)  # tables that are wider than what a call computed in stay so until a write
    return State.of(memory, rows, position.astype(np.int32), uses)


def _blanked(x: Array, there: Array, dead: Array | None = None) -> Array:
    """``x`` [rows, n, D] of tokens: NaN for the dead ones, 0 for those that are not there."""
    if dead is not None:
        x = np.where(dead[..., None], np.nan, x)
    return np.where(there[..., None], x, 0)


def _empty_trace(cfg: FwPKMConfig, memories: int, shape: tuple[int, ...], columns: int, dtype: np.dtype) -> Trace:
    """Of tokens [shape]."""
    entries = (*shape, cfg.slots_per_token)
    memorization, addressing = np.zeros((2, memories, columns), dtype)
    slots, weights, writes = np.zeros(entries, np.int64), np.zeros(entries, dtype), np.zeros(memories, np.int32)
    return Trace(slots, weights, memorization, addressing, writes)


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


def _write_window(cfg: FwPKMConfig, memory: Memory, uses: Array | None, window: Tokens) -> Losses:
    """Write, in place, the chunk that begins a window; tokens after its first C serve only as targets (§5)."""
    selections = _select(cfg, memory, window.query)
    live = window.mask & np.stack([s.finite for s in selections])
    counted = live & (np.arange(live.shape[1]) < cfg.chunk_size)
    pair = equations.pairs(cfg, counted, live)
    return _write(cfg, memory, uses, selections, window, ahead(cfg, window.value), counted, pair)


def _write(
    cfg: FwPKMConfig,
    memory: Memory,
    uses: Array | None,
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
        touched, reads, gradient = equations.value_gradient(cfg, chosen, error, g, has, n)
        rates = None if uses is None else equations.learning_rates(cfg, reads, uses[m, touched])
        values[touched] = equations.step(cfg, values[touched], gradient, rates)
        if uses is not None:
            uses[m, touched] += reads
        weighted = keys.dtype.type(cfg.addressing_weight) * equations.key_gradient(cfg, keys, q, chosen, n)
        keys[...] = equations.step(cfg, keys, weighted)
    return losses
