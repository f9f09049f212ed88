"""Which tokens read one memory, and what is written after them (SPEC.md §5), in place on the tables.

Chunk c of a row's stream (streams.py) covers the tokens from cC up to (c+1)C + lag: all of them read the tables, then
the first C are written. A loop over the rounds that write carries the tables, so a call without a write costs nothing
but its reads, and no round copies a table. What no write covers is read by a second loop.

``select_window`` finds what the tokens of a window pick, without gradients. ``compute_window`` computes what follows
from that, given the rows that they touch; it is differentiable, so a backward pass (backward.py) needs to keep no more
than a ``Selected``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fwpkm import schedule
from fwpkm.backends.jax.addressing import Selection, address, select_slots, write_keys
from fwpkm.backends.jax.indexing import gather, put, scatter_sum
from fwpkm.backends.jax.sharding import alike
from fwpkm.backends.jax.streams import Plan, Round, Streams, cells_of, of_rows, read_round, write_round
from fwpkm.backends.jax.tokens import NAME, ahead, by_memory, from_table, halves, outer, without
from fwpkm.backends.jax.values import Touched, read, write_rows
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Losses, Memory, memories_for
from fwpkm.rules import learning_rates, write_scale
from fwpkm.tokens import Tokens
from fwpkm.validation import Implementation

SELF = Implementation.of(
    NAME,
    (Array, np.ndarray),
    """
    key_dim value_dim num_heads num_subkeys top_k chunk_size lookahead boundary score score_eps temperature
    learning_rate write_scale weight_decay grad_clip addressing_weight memory_scope usage_weight query value gate mask
    """,
)
"""The fields of a configuration and of a token that this backend computes with."""


class Selected(NamedTuple):
    """What the n tokens of a window met."""

    keys: Array
    """``[M, H, 2, S, d]`` the codebooks that they read."""
    rows: Array
    """``[E, Dv]`` the rows of the value table that they read, distinct."""
    touched: Touched
    """where those rows stand."""
    selection: Selection
    """what they picked."""
    found: Any
    """``Found`` on the way; None where it is to be computed, to be differentiated."""
    dead: Any
    """``[B, n]`` bool: some selected score is not finite; None once such tokens are blanked."""
    uses: Any = None
    """``[E]`` U_i of those rows; None where nothing weighs them, or nothing is written."""


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
    uses: Any = None
    """``[E]`` U_i of the touched rows afterwards; None where nothing weighs them, or nothing is written."""
    memorization: Any = None
    """``[M]`` loss; None where nothing is written, as are the next two."""
    addressing: Any = None
    """``[M]`` loss."""
    moved: Moved | None = None
    """what the write moved."""


class Result(NamedTuple):
    """What a call gives. Differentiable in keys, values and reads."""

    keys: Array
    """``[M, H, 2, S, d]`` afterwards."""
    values: Array
    """``[M, N, Dv]`` afterwards."""
    reads: Array
    """``[n, Dv + H*k]``: output and weights of the call's tokens; NaN for dead ones, 0 for those in no stream."""
    slots: Array
    """``[n, H*k]``"""
    losses: Losses
    """``[M, W]`` each."""
    uses: Any = None
    """``[M, N]`` afterwards; None where nothing weighs them."""


class RoundResiduals(NamedTuple):
    """What the backward needs of a round, but for the rows that it read; of all rounds of a kind, side by side."""

    cells: Array
    """``[R, n]`` where its tokens stand; the empty cell for dead ones."""
    new: Array
    """``[R, n]`` which of the call's tokens it is the first to read; past them for others, and for dead ones."""
    touched: Touched
    selection: Selection
    of: Any
    """``[R]`` the memories that its rows read; None is all."""
    keys: Any
    """the codebooks that it read; None where those are what the call gives, as nothing is written after it."""
    moved: Any
    """``Moved``, likewise."""
    uses: Any
    """``[E]`` U_i of the rows that it wrote, before; None where nothing weighs them, or nothing is written."""


class Residuals(NamedTuple):
    """What the backward needs of a call's rounds."""

    writes: Any
    """``RoundResiduals`` ``[W, ...]`` of those that write; None where none can."""
    reads: Any
    """the same of those that only read."""
    rows: Array
    """``[.., Dv]`` the rows that each of them read, in order."""


# --- One window ---


def pairs(cfg: FwPKMConfig, counted: Array, live: Array) -> Array:
    """Which counted tokens of a window ``[B, n]`` have a pair: their partner, L tokens later, is live (§3)."""
    return counted & ahead(live, cfg.lookahead)


def memorization_loss(error: Array, gate: Array, pair: Array, memories: int) -> Array:
    """L_mem ``[M]`` = Σ over tokens with a pair of ½ g ‖u - v̂‖²; error v̂ - u [T, Dv], gate and pair [T] (§3)."""
    terms = jnp.where(pair, 0.5 * gate * jnp.square(error).sum(-1), 0)
    return terms.reshape(memories, -1).sum(1)


def select_window(
    cfg: FwPKMConfig,
    memory: Memory,
    window: Tokens,
    of: Array | None = None,
    distinct: bool = True,
    uses: Array | None = None,
) -> Selected:
    """Find what a window's tokens pick, all of them finite: in the memories ``of`` [R], or in all.

    Rows that are neither written nor differentiated need not be ``distinct``, which takes a sort. ``uses`` [M, N] are
    for a write that weighs them.
    """
    memories, slots, width = memory.values.shape
    keys, of = of_rows(memory.keys, of), jnp.arange(memories, dtype=jnp.int32) if of is None else of
    selection, found = select_slots(cfg, halves(cfg, window.query, len(keys)), keys)
    entries = (selection.slots + slots * of[:, None, None]).reshape(-1, cfg.slots_per_token)
    finite, table = selection.finite.reshape(window.mask.shape), memory.values.reshape(-1, width)
    if not distinct:
        touched = Touched(entries.ravel(), None)
        return Selected(keys, gather(table, touched.ids, mode="clip"), touched, selection, found, ~finite)
    touched = Touched.of(entries, memories * slots)
    # Without the barrier XLA may read the tables again where these are used, after a write, and so copies them first.
    before = None if uses is None else touched.gather(uses.ravel())
    keys, rows, before = lax.optimization_barrier((keys, touched.gather(table), before))
    return Selected(keys, rows, touched, selection, found, ~finite, before)


def chunk_of(cfg: FwPKMConfig, window: Tokens, may_write: Array | bool = True) -> Write:
    """The first C tokens of a window, in rows that ``may_write`` [B]; those after serve only as targets (§5)."""
    counted = window.mask & (jnp.arange(window.length)[None] < cfg.chunk_size)
    pair = pairs(cfg, counted, window.mask) & outer(jnp.asarray(may_write), counted)
    return Write(ahead(window.value, cfg.lookahead), pair, counted)


def compute_window(
    cfg: FwPKMConfig,
    keys: Array,
    rows: Array,
    window: Tokens,
    selected: Selected,
    write: Write | None,
    num_slots: int,
    moved: Moved | None = None,
    first: Array | int = 0,
    may_write: Array | bool = True,
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
        first: the first of the memories, all others following it.
        may_write: ``[M]``; elsewhere losses are all that a write gives.
    """
    memories, shape, row_index = len(keys), window.mask.shape, selected.touched.row_index
    query = halves(cfg, window.query, memories)
    at = address(cfg, query, keys, selected.selection, selected.found)
    weights = at.weights.reshape(-1, cfg.slots_per_token)
    if row_index is None:
        reads = (weights[..., None] * rows.reshape(*weights.shape, -1)).sum(1)
    else:
        reads = read(rows, row_index, weights)
    computed = Computed(reads.reshape(*shape, -1), weights.reshape(*shape, -1), keys, rows)
    if write is None:
        return computed
    # Floats in one sum, as an any of each window's flags would compile for a fifth of a second.
    is_counted, is_pair = (by_memory(x, memories).astype(keys.dtype) for x in (write.counted, write.pair))
    counted, has_pair = is_counted / jnp.maximum(is_counted.sum(-1), 1)[:, None], is_pair.sum(-1) > 0
    active = has_pair & may_write
    keys_move, rows_move = (None, None) if moved is None else (moved.keys, moved.rows)
    keys, keys_move, addressing = write_keys(
        cfg, query, keys, at, selected.selection.subkeys, counted, active, keys_move
    )
    gate, pair = window.gate.ravel(), write.pair.ravel()
    error = reads - jnp.where(write.pair[..., None], write.target, 0).reshape(reads.shape)
    coefficient = jnp.where(pair, write_scale(jnp, cfg, weights) * gate, 0)[:, None] * weights
    entries = jnp.broadcast_to(write.counted.reshape(-1, 1), row_index.shape).astype(jnp.int32)
    count = scatter_sum(len(rows), row_index, entries)
    owner = jnp.minimum(selected.touched.ids // num_slots - first, memories - 1)
    may_move = active[owner] & (count > 0)
    rates, uses = None, selected.uses
    if uses is not None:
        reads = count.astype(uses.dtype)
        rates = learning_rates(cfg, jnp.maximum(reads, 1), uses)
        uses = uses + jnp.where(may_move, reads, 0)  # though the new value may not be finite
    rows, rows_move = write_rows(cfg, rows, row_index, coefficient, error, count, rates, may_move, rows_move)
    memorization = lax.stop_gradient(memorization_loss(error, gate, pair, memories))
    return computed._replace(
        keys=keys,
        rows=rows,
        uses=uses,
        memorization=memorization,
        addressing=lax.stop_gradient(jnp.where(has_pair, addressing, 0)),
        moved=Moved(keys_move, rows_move),
    )


def put_uses(uses: Array | None, selected: Selected, computed: Computed) -> Array | None:
    """``[M, N]``: U with those of the touched rows replaced."""
    return None if uses is None else selected.touched.put(uses.ravel(), computed.uses).reshape(uses.shape)


# --- The rounds of a call ---


def windows(
    cfg: FwPKMConfig,
    plan: Plan,
    memory: Memory,
    uses: Array | None,
    source: Array,
    streams: Streams,
    residuals: Residuals | None = None,
) -> tuple[Result, Residuals | None]:
    """Read the streams of a call and perform the writes that are due.

    Args:
        cfg: the configuration.
        plan: what is static about the call.
        memory: the tables.
        uses: ``[M, N]`` U, or None where nothing weighs them.
        source: ``[cells, D]`` the tokens; zeros for those that are not finite or masked.
        streams: where they stand.
        residuals: space for what each round met, or None to keep nothing.

    Returns:
        the result, and the residuals filled.
    """
    num_slots, width = memory.values.shape[1:]

    def read_window(result: Result, at: Round, length: int, writes: bool) -> tuple[Result, Computed, Any]:
        """Read ``length`` tokens and note what the call's own read for the first time. The tables stay."""
        cells, place = cells_of(plan, streams, at.rows, at.start, length)
        new = cells - plan.first_cell
        if schedule.lag(cfg) and plan.new:  # tokens may be read again, and then be dead already
            weight = gather(result.reads[:, width], new, mode="fill", fill_value=0)
            cells = jnp.where(jnp.isnan(weight), plan.empty, cells)
        window = from_table(cfg, gather(source, cells))
        of = at.rows if streams.tables is None else of_rows(streams.tables, at.rows)
        distinct = writes or residuals is not None
        weighed = result.uses if writes else None
        selected = select_window(cfg, Memory(result.keys, result.values), window, of, distinct, weighed)
        live = without(window, selected.dead)
        write = chunk_of(cfg, live, of_rows(streams.due, at.rows) > at.chunk) if writes else None
        computed = compute_window(
            cfg, selected.keys, selected.rows, live, selected, write, num_slots,
            first=0 if of is None else of[0], may_write=True if streams.tables is None else of > 0,
        )  # fmt: skip
        new = jnp.where((place >= at.first[:, None]) & (new < plan.new), new, plan.new)
        if plan.new:
            reads = jnp.where(live.mask[..., None], noted(computed), jnp.nan)
            slots = selected.selection.slots.reshape(computed.weights.shape)
            reads, slots = (put(x, new, y, mode="drop") for x, y in ((result.reads, reads), (result.slots, slots)))
            result = result._replace(reads=reads, slots=slots)
        if residuals is None:
            return result, computed, (selected, None)
        one = RoundResiduals(
            jnp.where(selected.dead, plan.empty, cells),
            jnp.where(live.mask, new, plan.new),
            selected.touched,
            selected.selection,
            of,
            selected.keys if writes else None,
            computed.moved,
            selected.uses,
        )
        return result, computed, (selected, one)

    def write(index: Array, carry: tuple[Result, Residuals | None]) -> tuple[Result, Residuals | None]:
        result, residuals = carry
        at = write_round(cfg, plan, streams, index)
        result, computed, (selected, one) = read_window(result, at, plan.window, True)
        row: Any = np.int32(0) if at.rows is None else at.rows[0]
        both = zip(result.losses, (computed.memorization, computed.addressing))
        losses = Losses(*(lax.dynamic_update_slice(x, y[:, None], (row, at.chunk)) for x, y in both))
        result = result._replace(losses=losses)
        if not plan.is_shared:
            values = selected.touched.put(result.values.reshape(-1, width), computed.rows).reshape(result.values.shape)
            of = row if streams.tables is None else gather(streams.tables, row)
            keys = lax.dynamic_update_slice_in_dim(result.keys, computed.keys, of, 0)
            result = result._replace(keys=keys, values=values, uses=put_uses(result.uses, selected, computed))
        return result, keep(residuals, "writes", index, selected, one)

    def read_only(index: Array, carry: tuple[Result, Residuals | None]) -> tuple[Result, Residuals | None]:
        result, residuals = carry
        result, _, (selected, one) = read_window(result, read_round(plan, streams, index), plan.block, False)
        return result, keep(residuals, "reads", index, selected, one)

    def keep(residuals: Residuals | None, kind: str, index: Array, selected: Selected, one: Any) -> Residuals | None:
        if residuals is None:
            return None
        offset = row_offset(cfg, plan, kind, index)
        rows = lax.dynamic_update_slice_in_dim(residuals.rows, selected.rows, offset, 0)
        every = getattr(residuals, kind)
        every = jax.tree.map(lambda all_, x: lax.dynamic_update_index_in_dim(all_, x, index, 0), every, one)
        return residuals._replace(rows=rows, **{kind: every})

    carry, _ = alike((_nothing_read(cfg, plan, memory, uses), residuals), source)
    if plan.writes:
        carry = lax.fori_loop(0, streams.write_ends[-1], write, carry)
    if plan.reads:
        carry = lax.fori_loop(0, streams.read_ends[-1], read_only, carry)
    result, residuals = carry
    return result._replace(losses=Losses(*(x[:, : plan.columns] for x in result.losses))), residuals


def noted(computed: Computed) -> Array:
    """``[B, n, Dv + H*k]``: what a token read, and its weights."""
    return jnp.concatenate([computed.reads, computed.weights], axis=-1)


def _nothing_read(cfg: FwPKMConfig, plan: Plan, memory: Memory, uses: Array | None) -> Result:
    """The result of a call of which nothing has been read yet."""
    entries, dtype = cfg.slots_per_token, memory.keys.dtype
    losses = jnp.zeros((memories_for(cfg, plan.batch), plan.columns + plan.is_one_loop), dtype)
    reads = jnp.zeros((plan.new, cfg.value_dim + entries), dtype)
    return Result(*memory, reads, jnp.zeros((plan.new, entries), jnp.int32), Losses(losses, losses), uses)


def row_offset(cfg: FwPKMConfig, plan: Plan, kind: str, index: Any) -> Any:
    """Where the rows that a round read begin among those of the call."""
    before = index * plan.write_size if kind == "writes" else plan.writes * plan.write_size + index * plan.read_size
    return before * cfg.slots_per_token
