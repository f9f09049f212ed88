"""The stream of windows (SPEC.md §5), in place on the tables and differentiable through every write.

A call's stream is the p pending tokens, then its T new ones. Chunk c of it covers the tokens [cC, (c+1)C + lag): all of
them read the tables, then its first C are written. p may be traced, and with it how many chunks fall due; a loop with
that many rounds carries the tables, so a call without a write costs nothing but its reads, and no round copies a table.
What no chunk covers is read afterwards, in blocks of a fixed size.

The gradient is a ``custom_vjp``: the forward keeps what each window met (``Visit``), with the rows of all
windows in one buffer, in the order in which they were read. The backward walks the windows in reverse and leaves the
gradient of a window's rows where the rows lay; an earlier window finds the gradient of a row where the next window that
read it left it. So time and memory do not depend on the number of slots, but where the table itself is differentiated.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from fwpkm import schedule
from fwpkm.backends.jax.tokens import Tokens
from fwpkm.backends.jax.window import Moved, Step, Visit, chunk_of, visit, walk
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
    return Plan(0, int(writes), cfg.capacity, 0, 0)


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


class Kept(NamedTuple):
    """What the backward needs, or Nones."""

    windows: Any
    """Visit, but for its rows, and Moved of each window that ended in a write, ``[W, ..]``."""
    blocks: Any
    """the same of the blocks after them, which moved nothing."""
    rows: Any
    """``[R, Dv]`` the rows that each of them read."""


def _forward(
    cfg: FwPKMConfig, plan: Plan, memory: Memory, tokens: Tokens, pending: Array, due: Array, keep: bool
) -> tuple[Result, Kept]:
    """The result and, to ``keep`` for the backward, what each window met."""
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

    def write(c: Array, carry: tuple[Result, Kept]) -> tuple[Result, Kept]:
        result, kept = carry
        result, found, step = look(result, c * cfg.chunk_size, _read_before(cfg, c), plan.window, True)
        values = found.touched.put(result.values.reshape(-1, width), step.rows).reshape(result.values.shape)
        losses = {x: _put(getattr(result, x), getattr(step, x)[:, None], c) for x in ("memorization", "addressing")}
        result = result._replace(keys=step.keys, values=values, **losses)
        return result, keep_visit(kept, "windows", c, found, step.moved)

    def block(j: Array, carry: tuple[Result, Kept]) -> tuple[Result, Kept]:
        result, kept = carry
        result, found, _ = look(result, *_block(cfg, plan, pending, due, j), plan.block, False)
        return result, keep_visit(kept, "blocks", j, found, None)

    def keep_visit(kept: Kept, kind: str, index: Array, found: Visit, moved: Moved | None) -> Kept:
        if not keep:
            return kept
        start = _rows_before(cfg, plan, batch, kind, index)
        rows = lax.dynamic_update_slice_in_dim(kept.rows, found.rows, start, 0)
        visits = jax.tree.map(
            lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, index, 0),
            getattr(kept, kind),
            (_without_rows(found), moved),
        )
        return kept._replace(rows=rows, **{kind: visits})

    kept = Kept(None, None, None)
    if keep:
        rooms = [(plan.writes, plan.window, True), (plan.blocks, plan.block, False)]
        windows, blocks = (_room(cfg, memory, batch, *room) if room[0] else None for room in rooms)
        rows = _rows_before(cfg, plan, batch, "blocks", plan.blocks)
        kept = Kept(windows, blocks, jnp.zeros((rows, width), dtype))
    if plan.writes:
        result, kept = lax.fori_loop(0, due, write, (result, kept))
    if plan.blocks:
        result, kept = lax.fori_loop(0, _blocks(cfg, plan, pending, due), block, (result, kept))
    news = {x: _slice(getattr(result, x), pending, plan.news) for x in ("reads", "slots", "weights", "unread")}
    return result._replace(**news), kept


def _run_forward(cfg, plan, memory, tokens, pending, due):
    dense = memory.values.perturbed
    memory, tokens, pending, due = jax.tree.map(
        lambda x: x.value, (memory, tokens, pending, due), is_leaf=lambda x: hasattr(x, "perturbed")
    )
    result, kept = _forward(cfg, plan, memory, tokens, pending, due, keep=True)
    # Whether the table is differentiated must be known while tracing: None or () is a static mark.
    return result, (kept, tokens, pending, due, (None,) if dense else ())


def _run_backward(cfg, plan, saved, gradient):
    kept, tokens, pending, due, dense = saved
    batch = tokens.mask.shape[0]
    num_slots, width = gradient.values.shape[1:]
    num_rows = gradient.values.shape[0] * num_slots
    given = None if isinstance(gradient.values, SymbolicZero) else gradient.values.reshape(-1, width)
    ids = jnp.concatenate([met[0].touched.rows.ravel() for met in kept[:2] if met])
    first, following = _occurrences(ids, num_rows)
    d_keys = _materialise(gradient.keys)
    # What windows noted of their tokens, with its gradient; trace weights mostly have none.
    noted = {x: getattr(gradient, x) for x in ("reads", "weights")}
    noted = {
        name: _put(jnp.zeros((*tokens.mask.shape, x.shape[-1]), x.dtype), x, pending)
        for name, x in noted.items()
        if not isinstance(x, SymbolicZero)
    }

    def back(carry, kind, index, d_step, start):
        """Through one window, whose outputs have the gradients ``d_step``."""
        d_keys, rows, d_tokens = carry
        met = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), getattr(kept, kind))
        found, moved = met
        length = found.dead.shape[1]
        window, _ = _window(tokens, found.dead, start, length)
        place = _rows_before(cfg, plan, batch, kind, index)

        def forward(keys, rows, query, value, gate):
            live = Tokens(query, value, gate, window.mask).without(found.dead)
            write = chunk_of(cfg, live) if kind == "windows" else None
            step = walk(cfg, keys, rows, live, found, write, num_slots, moved)
            return {name: getattr(step, name) for name in noted}, step.keys, step.rows

        after = lax.dynamic_slice_in_dim(following, place, len(found.touched.rows))
        # One gather for both: were they separate, XLA could not tell that all reads precede the update, and would copy.
        both = jnp.concatenate([place + jnp.arange(len(after), dtype=after.dtype), after])
        own, d_rows = jnp.split(rows.at[both].get(mode="fill", fill_value=0), 2)
        if given is not None:
            last = given.at[found.touched.rows].get(mode="fill", fill_value=0)
            d_rows = jnp.where((after < len(rows))[:, None], d_rows, last)
        pull = jax.vjp(forward, found.keys, own, *window[:3])[1]
        d_keys, d_rows, *d_window = pull((d_step, d_keys, d_rows))
        rows = lax.dynamic_update_slice_in_dim(rows, d_rows, place, 0)
        # A scatter, as XLA would compute the gradients within the update of a slice, in one thread.
        here = start + jnp.arange(length)
        d_tokens = [
            x.at[:, here].add(d, mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True)
            for x, d in zip(d_tokens, d_window)
        ]
        return d_keys, rows, tuple(d_tokens)

    def noted_of(start, fresh, length):
        """The gradients of what a window noted."""
        own = (start + jnp.arange(length) >= fresh)[:, None]
        return {name: jnp.where(own, _slice(x, start, length), 0) for name, x in noted.items()}

    def back_block(i, carry):
        j = blocks - 1 - i
        start, fresh = _block(cfg, plan, pending, due, j)
        return back(carry, "blocks", j, noted_of(start, fresh, plan.block), start)

    def back_write(i, carry):
        c = due - 1 - i
        start = c * cfg.chunk_size
        return back(carry, "windows", c, noted_of(start, _read_before(cfg, c), plan.window), start)

    carry = (d_keys, kept.rows, tuple(jnp.zeros_like(x) for x in tokens[:3]))
    blocks = _blocks(cfg, plan, pending, due)
    if plan.blocks:
        carry = lax.fori_loop(0, blocks, back_block, carry)
    if plan.writes:
        carry = lax.fori_loop(0, due, back_write, carry)
    d_keys, rows, (d_query, d_value, d_gate) = carry
    d_values = None
    if dense:
        total = jnp.zeros((num_rows, width), rows.dtype) if given is None else given
        d_values = total.at[jnp.where(first, ids, num_rows)].set(rows, mode="drop").reshape(gradient.values.shape)
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


def _rows_before(cfg: FwPKMConfig, plan: Plan, batch: int, kind: str, index: Any) -> Any:
    """Where the rows of a window or block begin among those of the call."""
    each = batch * cfg.slots_per_token
    if kind == "windows":
        return index * plan.window * each
    return (plan.writes * plan.window + index * plan.block) * each


def _room(
    cfg: FwPKMConfig, memory: Memory, batch: int, count: int, length: int, writes: bool
) -> tuple[Visit, Moved | None]:
    """Space for what ``count`` windows of this length met; they touch nothing until one is kept there."""
    tokens, dtype = (batch, length), memory.keys.dtype
    wide: list[Any] = [jax.ShapeDtypeStruct((*tokens, n), dtype) for n in (cfg.num_heads * cfg.key_dim, cfg.value_dim)]
    narrow: list[Any] = [jax.ShapeDtypeStruct(tokens, kind) for kind in (dtype, bool)]
    window = Tokens(*wide, *narrow)
    found = jax.eval_shape(functools.partial(visit, cfg), memory, window, window.mask)
    room = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), _without_rows(found))
    moved = [jnp.zeros((count, *shape), bool) for shape in ((*memory.keys.shape[:-1], 1), found.rows.shape[:1])]
    nowhere = jnp.full_like(room.touched.rows, memory.values.shape[0] * memory.values.shape[1])
    return room._replace(touched=room.touched._replace(rows=nowhere)), Moved(*moved) if writes else None


def _without_rows(found: Visit) -> Any:
    """A visit of the same structure whose rows are no leaf: those of a call lie together."""
    nothing: Any = None
    return found._replace(rows=nothing)


def _occurrences(ids: Array, num_rows: int) -> tuple[Array, Array]:
    """Of ids [R]: whether each is the first of its kind, and where the next one is; R if there is none.

    Ids from ``num_rows`` on name nothing: no other follows them.
    """
    place = jnp.arange(len(ids), dtype=ids.dtype)
    ids, order = lax.sort((ids, place), num_keys=2)
    again = (ids[1:] == ids[:-1]) & (ids[1:] < num_rows)
    first = jnp.zeros(len(ids), bool).at[order].set(~jnp.append(False, again), unique_indices=True)
    following = jnp.append(jnp.where(again, order[1:], len(ids)), len(ids)).astype(ids.dtype)
    return first, jnp.zeros_like(ids).at[order].set(following, unique_indices=True)


def _materialise(x: Any) -> Array:
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
