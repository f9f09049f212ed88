"""The stream of windows (SPEC.md §5), in place on the tables and differentiable through every write.

A call's stream is the p pending tokens, then its T new ones. Chunk c of it covers the tokens [cC, (c+1)C + lag): all of
them read the tables, then its first C are written. p may be traced, and with it how many chunks fall due; a loop with
that many rounds carries the tables, so a call without a write costs nothing but its reads, and no round copies a table.
What no chunk covers is read afterwards, in blocks of a fixed size.

The gradient is a ``custom_vjp``: the forward keeps what each window met (``Visit``), the backward walks the windows in
reverse with one gradient row for each row that the call touched, or with the whole table's gradient where the table
itself is differentiated. So time and memory do not depend on the number of slots.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from fwpkm import schedule
from fwpkm.backends.jax.tokens import Tokens
from fwpkm.backends.jax.window import Step, Visit, chunk_of, visit, walk
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory


class Plan(NamedTuple):
    """The static side of a call."""

    news: int
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
    return Plan(0, int(writes), schedule.capacity(cfg), 0, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(cfg: FwPKMConfig, plan: Plan, memory: Memory, tokens: Tokens, pending: Array, due: Array) -> Result:
    """Read a stream and perform the writes that are due.

    Args:
        cfg: the configuration.
        plan: what is static about the call.
        memory: the tables.
        tokens: the stream, Q tokens; from ``pending + T`` on they are zeros.
        pending: int scalar, p.
        due: int scalar, the chunks to write, at most ``plan.writes``.
    """
    return _forward(cfg, plan, memory, tokens, pending, due, keep=False)[0]


def _forward(
    cfg: FwPKMConfig, plan: Plan, memory: Memory, tokens: Tokens, pending: Array, due: Array, keep: bool
) -> tuple[Result, tuple[Any, Any]]:
    """The result and, to ``keep`` for the backward, the visits of all windows and of all blocks."""
    memories, num_slots, width = memory.values.shape
    batch, stream = tokens.mask.shape
    entries, dtype = (batch, stream, cfg.slots_per_token), memory.keys.dtype
    none = jnp.zeros((memories, plan.writes), dtype)
    result = Result(
        *memory,
        reads=jnp.zeros((batch, stream, width), dtype),
        slots=jnp.zeros(entries, jnp.int32),
        weights=jnp.zeros(entries, dtype),
        unread=jnp.zeros((batch, stream), bool),
        dead=~tokens.finite(),
        memorization=none,
        addressing=none,
    )

    def look(result: Result, start: Array, fresh: Array, length: int, writes: bool) -> tuple[Result, Visit, Step]:
        """Visit ``length`` tokens from ``start`` on and note what those from ``fresh`` on read. The tables stay."""
        window, dead = _window(tokens, result.dead, start, length)
        found = visit(cfg, Memory(result.keys, result.values), window, dead)
        live = window.without(found.dead)
        step = walk(cfg, found.keys, found.rows, live, found, chunk_of(cfg, live) if writes else None, num_slots)
        slots = found.choice.slots.reshape(step.weights.shape)
        fields = {"reads": step.reads, "slots": slots, "weights": step.weights, "unread": found.dead}
        noted = {name: _note(getattr(result, name), x, start, fresh) for name, x in fields.items()}
        return result._replace(dead=_note(result.dead, found.dead, start, start), **noted), found, step

    def write(c: Array, carry: tuple[Result, Any]) -> tuple[Result, Any]:
        result, kept = carry
        result, found, step = look(result, c * cfg.chunk_size, _read_before(cfg, c), plan.window, True)
        values = found.touched.put(result.values.reshape(-1, width), step.rows).reshape(result.values.shape)
        losses = {x: _put(getattr(result, x), getattr(step, x)[:, None], c) for x in ("memorization", "addressing")}
        return result._replace(keys=step.keys, values=values, **losses), _keep(kept, found, c)

    def block(j: Array, carry: tuple[Result, Any]) -> tuple[Result, Any]:
        result, kept = carry
        result, found, _ = look(result, *_block(cfg, plan, pending, due, j), plan.block, False)
        return result, _keep(kept, found, j)

    def room(count: int, length: int) -> Any:
        return _room(cfg, memory, batch, count, length) if keep else None

    windows = blocks = None
    if plan.writes:
        result, windows = lax.fori_loop(0, due, write, (result, room(plan.writes, plan.window)))
    if plan.blocks:
        count = _blocks(cfg, plan, pending, due)
        result, blocks = lax.fori_loop(0, count, block, (result, room(plan.blocks, plan.block)))
    news = {x: _slice(getattr(result, x), pending, plan.news) for x in ("reads", "slots", "weights", "unread")}
    return result._replace(**news), (windows, blocks)


def _run_forward(cfg, plan, memory, tokens, pending, due):
    dense = memory.values.perturbed
    memory, tokens, pending, due = jax.tree.map(
        lambda x: x.value, (memory, tokens, pending, due), is_leaf=lambda x: hasattr(x, "perturbed")
    )
    result, kept = _forward(cfg, plan, memory, tokens, pending, due, keep=True)
    # Whether the table is differentiated must be known while tracing: None or () is a static mark.
    return result, (kept, tokens, pending, due, (None,) if dense else ())


def _run_backward(cfg, plan, saved, gradient):
    (windows, blocks), tokens, pending, due, dense = saved
    memories = gradient.values.shape[0]
    num_slots, width = gradient.values.shape[1:]
    touched = [x.touched.rows for x in (windows, blocks) if x is not None]
    given = None if isinstance(gradient.values, SymbolicZero) else gradient.values.reshape(-1, width)
    total, locate = _gradient_rows(touched, given, (memories * num_slots, width), gradient.reads.dtype, bool(dense))
    d_keys = _materialise(gradient.keys)
    # What windows noted of their tokens, with its gradient; trace weights mostly have none.
    noted = {x: getattr(gradient, x) for x in ("reads", "weights")}
    noted = {
        name: _put(jnp.zeros((*tokens.mask.shape, x.shape[-1]), x.dtype), x, pending)
        for name, x in noted.items()
        if not isinstance(x, SymbolicZero)
    }

    def back(carry, found, d_step, start, writes):
        """Through one window, whose outputs have the gradients ``d_step`` (a function of the carry)."""
        d_keys, total, d_tokens = carry
        length = found.dead.shape[1]
        window, _ = _window(tokens, found.dead, start, length)
        place = locate(found.touched.rows)

        def forward(keys, rows, query, value, gate):
            live = Tokens(query, value, gate, window.mask).without(found.dead)
            step = walk(cfg, keys, rows, live, found, chunk_of(cfg, live) if writes else None, num_slots)
            return {name: getattr(step, name) for name in noted}, step.keys, step.rows

        pull = jax.vjp(forward, found.keys, found.rows, *window[:3])[1]
        rows = total.at[place].get(mode="fill", fill_value=0)
        d_keys, d_rows, *d_window = pull((d_step, d_keys, rows))
        total = total.at[place].set(d_rows, mode="drop", unique_indices=True)
        d_tokens = [_put(x, _slice(x, start, length) + d, start) for x, d in zip(d_tokens, d_window)]
        return d_keys, total, tuple(d_tokens)

    def noted_of(start, fresh, length):
        """The gradients of what a window noted."""
        own = (start + jnp.arange(length) >= fresh)[:, None]
        return {name: jnp.where(own, _slice(x, start, length), 0) for name, x in noted.items()}

    def back_block(j, carry):
        start, fresh = _block(cfg, plan, pending, due, j)
        return back(carry, _kept(blocks, j), noted_of(start, fresh, plan.block), start, False)

    def back_write(i, carry):
        c = due - 1 - i
        d_step = noted_of(c * cfg.chunk_size, _read_before(cfg, c), plan.window)
        return back(carry, _kept(windows, c), d_step, c * cfg.chunk_size, True)

    carry = (d_keys, total, tuple(jnp.zeros_like(x) for x in tokens[:3]))
    if plan.blocks:
        carry = lax.fori_loop(0, _blocks(cfg, plan, pending, due), back_block, carry)
    if plan.writes:
        carry = lax.fori_loop(0, due, back_write, carry)
    d_keys, total, (d_query, d_value, d_gate) = carry
    d_values = total.reshape(gradient.values.shape) if dense else None
    none: Any = None
    return Memory(d_keys, d_values), Tokens(d_query, d_value, d_gate, none), none, none


run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


def _slice(x: Array, start: Array, length: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, length, axis=1)


def _put(x: Array, part: Array, start: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, part, start, axis=1)


def _note(x: Array, part: Array, start: Array, fresh: Array) -> Array:
    """``x`` with ``part`` from token ``start`` on, but for the tokens before ``fresh``."""
    noted = (start + jnp.arange(part.shape[1]) >= fresh).reshape(-1, *[1] * (x.ndim - 2))
    return _put(x, jnp.where(noted, part, _slice(x, start, part.shape[1])), start)


def _window(tokens: Tokens, dead: Array, start: Array, length: int) -> tuple[Tokens, Array]:
    return tokens.slice(start, length), _slice(dead, start, length)


def _read_before(cfg: FwPKMConfig, c: Array) -> Array:
    """How many tokens of the stream were read before chunk c was."""
    return jnp.where(c > 0, c * cfg.chunk_size + schedule.lag(cfg), 0)


def _blocks(cfg: FwPKMConfig, plan: Plan, pending: Array, due: Array) -> Array | int:
    """How many blocks there are to read: none where the windows covered the stream."""
    return jnp.where(_read_before(cfg, due) < pending + plan.news, plan.blocks, 0) if plan.writes else plan.blocks


def _block(cfg: FwPKMConfig, plan: Plan, pending: Array, due: Array, j: Array) -> tuple[Array, Array]:
    """Where block j begins, counted from the end of the stream, and which of its tokens nothing else reads."""

    def start(j: Array) -> Array:
        return pending + jnp.maximum(plan.news - (plan.blocks - j) * plan.block, 0)

    return start(j), jnp.maximum(_read_before(cfg, due), jnp.where(j > 0, start(j - 1) + plan.block, 0))


def _room(cfg: FwPKMConfig, memory: Memory, batch: int, count: int, length: int) -> Visit:
    """Space for ``count`` visits of windows of this length; rows beyond the table, until one is kept there."""
    tokens, dtype = (batch, length), memory.keys.dtype
    wide: list[Any] = [jax.ShapeDtypeStruct((*tokens, n), dtype) for n in (cfg.num_heads * cfg.key_dim, cfg.value_dim)]
    narrow: list[Any] = [jax.ShapeDtypeStruct(tokens, kind) for kind in (dtype, bool)]
    window = Tokens(*wide, *narrow)
    shapes = jax.eval_shape(functools.partial(visit, cfg), memory, window, window.mask)
    room = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
    nowhere = jnp.full_like(room.touched.rows, memory.values.shape[0] * memory.values.shape[1])
    return room._replace(touched=room.touched._replace(rows=nowhere))


def _keep(kept: Any, found: Visit, index: Array) -> Any:
    if kept is None:
        return None
    return jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, index, 0), kept, found)


def _kept(kept: Visit, index: Array) -> Visit:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), kept)


def _gradient_rows(
    touched: list[Array], given: Array | None, shape: tuple[int, int], dtype: Any, dense: bool
) -> tuple[Array, Callable[[Array], Array]]:
    """The table's gradient as far as it is needed, and where in it a table row lies.

    That is the whole table where its own gradient is asked for, else the rows that any window touched.
    """
    if dense:
        return jnp.zeros(shape, dtype) if given is None else given, lambda rows: rows
    ids = jnp.sort(jnp.concatenate([x.ravel() for x in touched]))
    total = jnp.zeros((len(ids), shape[1]), dtype) if given is None else given.at[ids].get(mode="fill", fill_value=0)

    def locate(rows: Array) -> Array:
        beyond = len(ids) + jnp.arange(len(rows), dtype=rows.dtype)
        return jnp.where(rows < shape[0], jnp.searchsorted(ids, rows).astype(rows.dtype), beyond)

    return total, locate


def _materialise(x: Any) -> Array:
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
