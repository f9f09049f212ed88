"""One token of each row at a time, overwriting a donated state (SPEC.md §5).

A step gathers the rows of the table that its tokens read, and puts the tokens behind those that are pending. A loop
over the chunks that are due then writes them, in place on the tables: where none is, nothing of their size is touched.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fwpkm import schedule, validation
from fwpkm.backends.jax import fast
from fwpkm.backends.jax.arguments import takes_numpy
from fwpkm.backends.jax.checks import check_alive
from fwpkm.backends.jax.engine import Engine, choose_engine
from fwpkm.backends.jax.indexing import put
from fwpkm.backends.jax.ops import call_dtype, tables_in
from fwpkm.backends.jax.rows import is_traced
from fwpkm.backends.jax.sharding import alike, dealt_alike, placed
from fwpkm.backends.jax.tokens import as_table, filled, from_table, live_rows, uses_in, without
from fwpkm.backends.jax.windows import SELF, chunk_of, compute_window, put_uses, select_window
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.tokens import Tokens


@takes_numpy
def start_decoding(state: State[Array]) -> State[Array]:
    """A copy of a state for :func:`decode` to overwrite.

    Raises:
        ValueError: not a state.
    """
    validation.check_is_state(state)
    check_alive(state)
    return state.map(jnp.copy)


@takes_numpy
def decode(
    cfg: FwPKMConfig,
    state: State[Array],
    query: Array,
    value: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Array, State[Array]]:
    """Read one token of each row and write the chunks that are completed; ``state`` is donated. No gradient.

    It compiles once for all positions and masks, and what a step takes does not depend on the number of slots. Under
    ``jax.jit`` donate the state there: else the tables are copied in every step.

    Args:
        cfg: the configuration.
        state: of :func:`start_decoding`, or any that nobody needs any more: its arrays are deleted.
        query: ``[B, 1, H*Dk]``, any floating dtype.
        value: ``[B, 1, Dv]``.
        gate: ``[B, 1]`` in [0, 1], or None for 1.
        mask: ``[B, 1]`` bool, False for rows that rest, or None for True.
        implementation: as in :func:`fwpkm.backends.jax.apply`.

    Returns:
        output ``[B, 1, Dv]`` in the query's dtype, and the next state, in the shapes and dtypes of ``state``.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what was received.
        TypeError: a gradient through it is asked for.
    """
    tokens = Tokens(query, value, gate, mask)
    validation.check_is_state(state)
    validation.check_apply(cfg, state, tokens, None, True, SELF)
    validation.check_one_token(query)
    check_alive(state)
    if not is_traced(state.position):
        validation.check_positions(cfg, state.position.tolist())
    return _undifferentiated(cfg, choose_engine(implementation, cfg, state.memory, query), state, tokens)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _undifferentiated(cfg: FwPKMConfig, engine: Engine, state: State, tokens: Tokens) -> tuple[Array, State]:
    return _decode(cfg, engine, state, tokens)


@_undifferentiated.defjvp
def _refuse(*_: Any) -> Any:
    raise TypeError("decode has no gradient: call apply with T=1 where one is wanted")


class _Step(NamedTuple):
    """What the chunks that are due are written to."""

    memory: Memory
    uses: Any
    """``[M, N]``; None where nothing weighs them."""
    pending: Tokens
    """``[B, P, ...]``"""
    reads: Array
    """``[B, 1, Dv]``: what the new tokens read."""


@placed
@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _decode(cfg: FwPKMConfig, engine: Engine, state: State, tokens: Tokens) -> tuple[Array, State]:
    if engine == "triton":
        return fast.decode(cfg, *alike(state, tokens))
    dtype = call_dtype(state.memory, tokens.query)
    memory, pending = tables_in(state.memory, dtype), filled(dtype, state.pending)
    new = from_table(cfg, live_rows(as_table(filled(dtype, tokens)), tokens.mask)[:, None])
    selected = select_window(cfg, memory, new, distinct=False)
    new = without(new, selected.dead)
    reads = compute_window(cfg, selected.keys, selected.rows, new, selected, None, cfg.num_slots).reads
    # In batch scope the one clock of all rows counts masked tokens too.
    counts = tokens.mask is not None and cfg.memory_scope == "sequence"
    there = tokens.mask[:, 0] if counts else jnp.ones_like(state.position, bool)
    num_pending = schedule.pending(cfg, state.position)
    ticks = there.astype(jnp.int32)
    due = schedule.written(cfg, num_pending + ticks) > 0
    pending = _stored(pending, new, jnp.where(there & ~due, num_pending, cfg.capacity))
    begun = _Step(memory, uses_in(state.maybe_uses, dtype), pending, reads)
    step = _write_due(cfg, *alike(begun, new, due))
    output = jnp.where(new.mask[..., None], step.reads, jnp.nan)
    output = output if tokens.mask is None else jnp.where(tokens.mask[..., None], output, 0)
    position = schedule.reduced(cfg, state.position) + ticks
    after: State[Array] = State.of(step.memory, step.pending, position, step.uses)
    after = dealt_alike(after.map(lambda x, before: x.astype(before.dtype), state), state)
    return output.astype(tokens.query.dtype), after


def _stored(pending: Tokens, new: Tokens, at: Array) -> Tokens:
    """The pending tokens with the new one of each row ``at`` [B] its place; none where that is P."""
    batch, capacity = pending.mask.shape
    cell = jnp.where(at < capacity, jnp.arange(batch, dtype=jnp.int32) * capacity + at, batch * capacity)

    def put_one(x: Array, y: Array) -> Array:
        flat = x.reshape(batch * capacity, *x.shape[2:])
        return put(flat, cell, y[:, 0], mode="drop").reshape(x.shape)

    return Tokens(*map(put_one, pending, new))


def _write_due(cfg: FwPKMConfig, step: _Step, new: Tokens, due: Array) -> _Step:
    """Write the chunks that the new tokens complete in the rows that are ``due`` [B], a row a round.

    Rows that stand at different places complete theirs in different steps, so a round of all would do B times the work.
    In batch scope one round writes the chunk of all.
    """
    own = cfg.memory_scope == "sequence"
    size, behind = 1 if own else len(due), cfg.chunk_size + schedule.lag(cfg) - 1
    rank = jnp.cumsum(due, dtype=jnp.int32)

    def write(index: Array, step: _Step) -> _Step:
        row = (rank <= index * size).sum(dtype=jnp.int32)
        cut = partial(lax.dynamic_slice_in_dim, start_index=row, slice_size=size)
        pending = step.pending.map(cut)
        both = zip(pending, new.map(cut))
        window = Tokens(*(jnp.concatenate([x[:, :behind], y], axis=1) for x, y in both))
        selected = select_window(cfg, step.memory, window, row[None] if own else None, uses=step.uses)
        live = without(window, selected.dead)
        computed = compute_window(
            cfg, selected.keys, selected.rows, live, selected, chunk_of(cfg, live), cfg.num_slots, first=row
        )
        table = selected.touched.put(step.memory.values.reshape(-1, cfg.value_dim), computed.rows)
        keys = lax.dynamic_update_slice_in_dim(step.memory.keys, computed.keys, row, 0)
        left = Tokens(*map(partial(_left, cfg), pending, window))
        paste = partial(lax.dynamic_update_slice_in_dim, start_index=row, axis=0)
        # What the new token reads is found again with its window. It is passed on for the sake of order alone: the
        # first reads must precede the writes, or XLA would copy the table for them.
        return _Step(
            Memory(keys, table.reshape(step.memory.values.shape)),
            put_uses(step.uses, selected, computed),
            Tokens(*map(paste, step.pending, left)),
            paste(step.reads, computed.reads[:, -1:]),
        )

    return lax.fori_loop(0, rank[-1] // size, write, step)


def _left(cfg: FwPKMConfig, pending: Array, window: Array) -> Array:
    """What is pending once a window is written, in the shape of ``pending``: its tokens behind the chunk."""
    rest = window[:, cfg.chunk_size :]
    return jnp.zeros_like(pending).at[:, : rest.shape[1]].set(rest)
