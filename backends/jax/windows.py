"""Which tokens read one memory, and what is written after them (SPEC.md §5), in place on the tables.

A call's stream is the p pending tokens, then its T new ones. Chunk c of it covers the tokens [cC, (c+1)C + lag): all of
them read the tables, then its first C are written. p may be traced, and with it how many chunks fall due; a loop with
that many rounds carries the tables, so a call without a write costs nothing but its reads, and no round copies a table.
What no chunk covers is read afterwards, in blocks of a fixed size.

``select_window`` finds what the tokens of a window pick, without gradients. ``compute_window`` computes what follows
from that, given the rows that they touch; it is differentiable, so a backward pass (backward.py) needs to keep no more
than a ``Selected``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fwpkm import schedule
from fwpkm.backends.jax.addressing import Selection, address, select_slots, write_keys
from fwpkm.backends.jax.indexing import scatter_sum
from fwpkm.backends.jax.tokens import NAME, ahead, by_memory, cut, finite, halves, without
from fwpkm.backends.jax.values import Touched, read, write_rows
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory
from fwpkm.rules import write_scale
from fwpkm.tokens import Tokens
from fwpkm.validation import Implementation

SELF = Implementation.of(
    NAME,
    Array,
    """
    key_dim value_dim num_heads num_subkeys top_k chunk_size lookahead boundary score score_eps temperature
    learning_rate write_scale weight_decay grad_clip addressing_weight memory_scope query value gate mask
    """,
)
"""The fields of a configuration and of a token that this backend computes with."""


class Selected(NamedTuple):
    """What the n tokens of a window met."""

    keys: Array
    """``[M, H, 2, S, d]`` the codebooks that they read."""
    rows: Any
    """``[E, Dv]`` the rows of the value table that they read, distinct; None where those of a call lie together."""
    touched: Touched
    """where those rows stand."""
    selection: Selection
    """what they picked."""
    ranks: Any
    """``[M, H, 2, R, k]`` of that; None where they are to be computed, to be differentiated."""
    dead: Array
    """``[B, n]`` bool: some input or selected score is not finite."""


class Write(NamedTuple):
    """What a chunk writes."""

    target: Array
    """``[B, n, Dv]``: u, for the tokens that have a pair."""
    pair: Array
    """``[B, n]`` bool"""
    counted: Array
    """``[B, n]`` bool: the tokens whose reads count in N_i."""


class Moved(NamedTuple):
    """What a write moved: all that it could, but for what would not be finite."""

    keys: Array
    """``[M, H, 2, S, 1]`` bool"""
    rows: Array
    """``[E]`` bool: of the touched rows."""


class Computed(NamedTuple):
    """What a window gives."""

    reads: Array
    """``[B, n, Dv]``"""
    weights: Array
    """``[B, n, H*k]``"""
    keys: Array
    """the codebooks afterwards."""
    rows: Array
    """the touched rows afterwards."""
    memorization: Any = None
    """``[M]`` loss; None where nothing is written, as are the next two."""
    addressing: Any = None
    """``[M]`` loss."""
    moved: Moved | None = None
    """what the write moved."""


class Plan(NamedTuple):
    """The static side of a call."""

    length: int
    """T, the new tokens, which stand at the end of the stream."""
    writes: int
    """W, the most chunks that can fall due."""
    window: int
    """tokens of a window that ends in a write."""
    blocks: int
    """how many blocks of tokens are read after the last write."""
    block: int
    """tokens of a block."""


class Result(NamedTuple):
    """What a stream gives. Differentiable in keys, values, reads and weights."""

    keys: Array
    """``[M, H, 2, S, d]`` afterwards."""
    values: Array
    """``[M, N, Dv]`` afterwards."""
    reads: Array
    """``[B, T, Dv]`` of the new tokens."""
    slots: Array
    """``[B, T, H*k]``"""
    weights: Array
    """``[B, T, H*k]``"""
    unread: Array
    """``[B, T]`` bool: the tokens that were not finite when they were read."""
    dead: Array
    """``[B, Q]`` bool: the tokens of the stream that must never be written."""
    memorization: Array
    """``[M, W]``"""
    addressing: Array
    """``[M, W]``"""


class Residuals(NamedTuple):
    """What the backward needs of the windows, all of which are kept in one buffer of their kind."""

    windows: Any
    """``Selected``, but for its rows, and ``Moved`` of each window that ended in a write, ``[W, ..]``; or None."""
    blocks: Any
    """the same of the blocks after them, which moved nothing."""
    rows: Array
    """``[R, Dv]`` the rows that each of them read."""


# --- One window ---


def pairs(cfg: FwPKMConfig, counted: Array, live: Array) -> Array:
    """Which counted tokens of a window ``[B, n]`` have a pair: their partner, L tokens later, is live (§3)."""
    return counted & ahead(live, cfg.lookahead)


def memorization_loss(error: Array, gate: Array, pair: Array, memories: int) -> Array:
    """L_mem ``[M]`` = Σ over tokens with a pair of ½ g ‖u - v̂‖²; error v̂ - u [T, Dv], gate and pair [T] (§3)."""
    terms = jnp.where(pair, 0.5 * gate * jnp.square(error).sum(-1), 0)
    return terms.reshape(memories, -1).sum(1)


def select_window(cfg: FwPKMConfig, memory: Memory, window: Tokens, dead: Array) -> Selected:
    """Find what a window's tokens pick; ``dead`` [B, n] are those known not to be finite."""
    memories, slots, width = memory.values.shape
    query = halves(cfg, without(window, dead).query, memories)
    selection, ranks = select_slots(cfg, query, memory.keys)
    first = slots * jnp.arange(memories, dtype=selection.slots.dtype)[:, None, None]
    touched = Touched.of((selection.slots + first).reshape(-1, cfg.slots_per_token), memories * slots)
    # Without the barrier XLA may read the table again where the rows are used, after a write, and so copies it first.
    rows = lax.optimization_barrier(touched.gather(memory.values.reshape(-1, width)))
    return Selected(memory.keys, rows, touched, selection, ranks, dead | ~selection.finite.reshape(dead.shape))


def chunk_of(cfg: FwPKMConfig, window: Tokens) -> Write:
    """The first C tokens of a window; those after serve only as targets (§5)."""
    counted = window.mask & (jnp.arange(window.length) < cfg.chunk_size)
    return Write(ahead(window.value, cfg.lookahead), pairs(cfg, counted, window.mask), counted)


def compute_window(
    cfg: FwPKMConfig,
    keys: Array,
    rows: Array,
    window: Tokens,
    selected: Selected,
    write: Write | None,
    num_slots: int,
    moved: Moved | None = None,
) -> Computed:
    """Read a window and perform its write, if it has one.

    Args:
        cfg: the configuration.
        keys: those of ``selected``, as an argument to differentiate by.
        rows: those of ``selected``, for the same.
        window: its tokens, the dead ones blanked.
        selected: what they met.
        write: what to write, or None.
        num_slots: N.
        moved: what the write moves, where an earlier pass has found it.
    """
    memories, shape, row_index = len(keys), window.mask.shape, selected.touched.row_index
    query = halves(cfg, window.query, memories)
    at = address(cfg, query, keys, selected.selection, selected.ranks)
    weights = at.weights.reshape(-1, cfg.slots_per_token)
    reads = read(rows, row_index, weights)
    computed = Computed(reads.reshape(*shape, -1), weights.reshape(*shape, -1), keys, rows)
    if write is None:
        return computed
    # Floats in one sum, as an any of each window's flags would compile for a fifth of a second.
    flags = jnp.stack([by_memory(x, memories) for x in (write.counted, write.pair)]).astype(keys.dtype)
    num_counted, num_pairs = flags.sum(-1)
    counted, active = flags[0] / jnp.maximum(num_counted, 1)[:, None], num_pairs > 0
    keys_move, rows_move = (None, None) if moved is None else (moved.keys, moved.rows)
    keys, keys_move, addressing = write_keys(
        cfg, query, keys, at, selected.selection.subkeys, counted, active, keys_move
    )
    gate, pair = window.gate.ravel(), write.pair.ravel()
    error = reads - jnp.where(write.pair[..., None], write.target, 0).reshape(reads.shape)
    coefficient = jnp.where(pair, write_scale(jnp, cfg, weights) * gate, 0)[:, None] * weights
    entries = jnp.broadcast_to(write.counted.reshape(-1, 1), row_index.shape).astype(jnp.int32)
    count = scatter_sum(len(rows), row_index, entries)
    owner = jnp.minimum(selected.touched.ids // num_slots, memories - 1)
    may_move = active[owner] & (count > 0)
    rows, rows_move = write_rows(cfg, rows, row_index, coefficient, error, count, may_move, rows_move)
    memorization = lax.stop_gradient(memorization_loss(error, gate, pair, memories))
    return computed._replace(
        keys=keys,
        rows=rows,
        memorization=memorization,
        addressing=lax.stop_gradient(addressing),
        moved=Moved(keys_move, rows_move),
    )


# --- The windows of a call ---


def plan_apply(cfg: FwPKMConfig, length: int, writes: bool) -> Plan:
    """T tokens after at most P pending ones; ``writes`` is False where it is known that no chunk falls due."""
    window = cfg.chunk_size + schedule.lag(cfg)
    block = min(length, window - 1)
    return Plan(length, schedule.max_writes(cfg, length) if writes else 0, window, min(block, 1), block)


def plan_read(cfg: FwPKMConfig, length: int) -> Plan:
    """T tokens that write nothing."""
    block = min(length, cfg.chunk_size)
    return Plan(length, 0, 0, -(-length // block), block)


def plan_flush(cfg: FwPKMConfig, writes: bool) -> Plan:
    """At most P pending tokens, whose chunk is due."""
    return Plan(0, int(writes), cfg.capacity, 0, 0)


def windows(
    cfg: FwPKMConfig,
    plan: Plan,
    memory: Memory,
    tokens: Tokens,
    num_pending: Array,
    due: Array,
    residuals: Residuals | None = None,
) -> tuple[Result, Residuals | None]:
    """Read a stream and perform the writes that are due.

    Args:
        cfg: the configuration.
        plan: what is static about the call.
        memory: the tables.
        tokens: the stream, Q tokens; from ``num_pending + T`` on they are zeros.
        num_pending: int scalar, p.
        due: int scalar, the chunks to write, at most ``plan.writes``.
        residuals: space for what each window met, or None to keep nothing.

    Returns:
        the result, and the residuals filled.
    """
    num_slots, width = memory.values.shape[1:]

    def read_window(
        result: Result, start: Array, first_new: Array, length: int, writes: bool
    ) -> tuple[Result, Selected, Computed]:
        """Read ``length`` tokens from ``start`` on and note what those from ``first_new`` on read. The tables stay."""
        window, dead = cut(tokens, start, length), slice_of(result.dead, start, length)
        selected = select_window(cfg, Memory(result.keys, result.values), window, dead)
        live = without(window, selected.dead)
        write = chunk_of(cfg, live) if writes else None
        computed = compute_window(cfg, selected.keys, selected.rows, live, selected, write, num_slots)
        slots = selected.selection.slots.reshape(computed.weights.shape)
        fields = {"reads": computed.reads, "slots": slots, "weights": computed.weights, "unread": selected.dead}
        noted = {name: _note(getattr(result, name), x, start, first_new) for name, x in fields.items()}
        return result._replace(dead=put(result.dead, selected.dead, start), **noted), selected, computed

    def write(c: Array, carry: tuple[Result, Residuals | None]) -> tuple[Result, Residuals | None]:
        result, residuals = carry
        start = c * cfg.chunk_size
        result, selected, computed = read_window(result, start, read_before(cfg, c), plan.window, True)
        values = selected.touched.put(result.values.reshape(-1, width), computed.rows).reshape(result.values.shape)
        losses = {x: put(getattr(result, x), getattr(computed, x)[:, None], c) for x in ("memorization", "addressing")}
        result = result._replace(keys=computed.keys, values=values, **losses)
        return result, keep(residuals, "windows", c, selected, computed.moved)

    def block(j: Array, carry: tuple[Result, Residuals | None]) -> tuple[Result, Residuals | None]:
        result, residuals = carry
        result, selected, _ = read_window(result, *block_at(cfg, plan, num_pending, due, j), plan.block, False)
        return result, keep(residuals, "blocks", j, selected, None)

    def keep(
        residuals: Residuals | None, kind: str, index: Array, selected: Selected, moved: Moved | None
    ) -> Residuals | None:
        if residuals is None:
            return None
        offset = row_offset(cfg, plan, tokens, kind, index)
        rows = lax.dynamic_update_slice_in_dim(residuals.rows, selected.rows, offset, 0)
        one, every = (selected._replace(rows=None, ranks=None), moved), getattr(residuals, kind)
        every = jax.tree.map(lambda all_, x: lax.dynamic_update_index_in_dim(all_, x, index, 0), every, one)
        return residuals._replace(rows=rows, **{kind: every})

    carry = _nothing_read(cfg, plan, memory, tokens), residuals
    if plan.writes:
        carry = lax.fori_loop(0, due, write, carry)
    if plan.blocks:
        carry = lax.fori_loop(0, num_blocks(cfg, plan, num_pending, due), block, carry)
    result, residuals = carry
    new = {x: slice_of(getattr(result, x), num_pending, plan.length) for x in ("reads", "slots", "weights", "unread")}
    return result._replace(**new), residuals


def _nothing_read(cfg: FwPKMConfig, plan: Plan, memory: Memory, tokens: Tokens) -> Result:
    """The result of a stream ``[B, Q, ...]`` of which nothing has been read yet."""
    tokens_shape, dtype = tokens.mask.shape, memory.keys.dtype
    losses = jnp.zeros((len(memory.keys), plan.writes), dtype)
    return Result(
        *memory,
        reads=jnp.zeros((*tokens_shape, cfg.value_dim), dtype),
        slots=jnp.zeros((*tokens_shape, cfg.slots_per_token), jnp.int32),
        weights=jnp.zeros((*tokens_shape, cfg.slots_per_token), dtype),
        unread=jnp.zeros(tokens_shape, bool),
        dead=~finite(tokens),
        memorization=losses,
        addressing=losses,
    )


def slice_of(x: Array, start: Array, length: int) -> Array:
    """``length`` entries of the second axis."""
    return lax.dynamic_slice_in_dim(x, start, length, axis=1)


def put(x: Array, part: Array, start: Array) -> Array:
    """``x`` with ``part`` from entry ``start`` of the second axis on."""
    return lax.dynamic_update_slice_in_dim(x, part, start, axis=1)


def _note(x: Array, part: Array, start: Array, first_new: Array) -> Array:
    """``x`` with ``part`` from token ``start`` on, but for the tokens before ``first_new``."""
    new = (start + jnp.arange(part.shape[1]) >= first_new).reshape(-1, *[1] * (x.ndim - 2))
    return put(x, jnp.where(new, part, slice_of(x, start, part.shape[1])), start)


def read_before(cfg: FwPKMConfig, c: Array) -> Array:
    """How many tokens of the stream were read before chunk c was."""
    return jnp.where(c > 0, c * cfg.chunk_size + schedule.lag(cfg), 0)


def num_blocks(cfg: FwPKMConfig, plan: Plan, num_pending: Array, due: Array) -> Array | int:
    """How many blocks there are to read: none where the windows covered the stream."""
    if not plan.writes:
        return plan.blocks
    return jnp.where(read_before(cfg, due) < num_pending + plan.length, plan.blocks, 0)


def block_at(cfg: FwPKMConfig, plan: Plan, num_pending: Array, due: Array, j: Array) -> tuple[Array, Array]:
    """Where block j begins, counted from the end of the stream, and which of its tokens nothing else reads."""

    def start(j: Array) -> Array:
        return num_pending + jnp.maximum(plan.length - (plan.blocks - j) * plan.block, 0)

    return start(j), jnp.maximum(read_before(cfg, due), jnp.where(j > 0, start(j - 1) + plan.block, 0))


def row_offset(cfg: FwPKMConfig, plan: Plan, tokens: Tokens, kind: str, index: Any) -> Any:
    """Where the rows of a window or block begin among those of the call."""
    before = index * plan.window if kind == "windows" else plan.writes * plan.window + index * plan.block
    return before * len(tokens.mask) * cfg.slots_per_token
