"""The gradient of a stream of windows, exact through every write (SPEC.md §4).

The forward keeps what each window met, with the rows of all windows in one buffer, in the order in which they were
read. The backward walks the windows in reverse and leaves the gradient of a window's rows where the rows lay; an
earlier window finds the gradient of a row where the next window that read it left it. So time and memory do not depend
on the number of slots, but where the table itself is differentiated.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from fwpkm.backends.jax import indexing
from fwpkm.backends.jax.addressing import Selection
from fwpkm.backends.jax.indexing import gather, slice_of, update
from fwpkm.backends.jax.tokens import unpack, without
from fwpkm.backends.jax.values import Touched
from fwpkm.backends.jax.windows import (
    Plan,
    Residuals,
    Result,
    Selected,
    block_at,
    chunk_of,
    compute_window,
    num_blocks,
    picked_offset,
    picked_spec,
    read_before,
    row_offset,
    windows,
)
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(cfg: FwPKMConfig, plan: Plan, memory: Memory, tokens: Array, num_pending: Array, due: Array) -> Result:
    """What ``windows`` gives, differentiable."""
    return windows(cfg, plan, memory, tokens, num_pending, due)[0]


class Saved(NamedTuple):
    """What the backward of a call needs: ``Residuals`` of its windows, and its inputs."""

    residuals: Any
    keys: Array
    """the codebooks at the end, which the blocks read."""
    tokens: Array
    num_pending: Array
    due: Array
    dense: tuple[None, ...]
    """Whether the table is differentiated, which must be known while tracing: (None,) or () is a static mark."""


def _run_forward(cfg, plan, memory, tokens, num_pending, due):
    dense = memory.values.perturbed
    is_marked = lambda x: hasattr(x, "perturbed")  # noqa: E731
    marked = (memory, tokens, num_pending, due)
    memory, tokens, num_pending, due = jax.tree.map(lambda x: x.value, marked, is_leaf=is_marked)
    space = _empty_residuals(cfg, plan, memory, tokens)
    result, residuals = windows(cfg, plan, memory, tokens, num_pending, due, space)
    return result, Saved(residuals, result.keys, tokens, num_pending, due, (None,) if dense else ())


def _run_backward(cfg, plan, saved, gradient):
    residuals, tokens, num_pending, due = saved.residuals, saved.tokens, saved.num_pending, saved.due
    num_slots, width = gradient.values.shape[1:]
    num_rows = gradient.values.shape[0] * num_slots
    d_table = None if isinstance(gradient.values, SymbolicZero) else gradient.values.reshape(-1, width)
    ids = residuals.ids
    first, following = _occurrences(ids, num_rows)
    # What windows noted of their tokens, with its gradient; trace weights mostly have none.
    noted = {x: getattr(gradient, x) for x in ("reads", "weights")}
    noted = {
        name: update(jnp.zeros((*tokens.shape[:2], x.shape[-1]), x.dtype), x, num_pending)
        for name, x in noted.items()
        if not isinstance(x, SymbolicZero)
    }

    def load(kind, index):
        """``Picked`` of one window."""
        leaves, shapes = jax.tree.flatten(picked_spec(cfg, plan, saved.keys, tokens, kind))
        at, found = picked_offset(cfg, plan, saved.keys, tokens, kind, index), []
        for x in leaves:
            found.append(slice_of(residuals.picked, at, x.size, 0).reshape(x.shape).astype(x.dtype))
            at += x.size
        return jax.tree.unflatten(shapes, found)

    def back(carry, kind, index, start, first_new):
        """Through one window."""
        d_keys, rows, d_tokens = carry
        picked = load(kind, index)
        keys = slice_of(residuals.keys, index, 1, 0)[0] if kind == "windows" else saved.keys
        offset, size = row_offset(cfg, plan, tokens, kind, index), picked.row_index.size
        touched = Touched(slice_of(ids, offset, size, 0), picked.row_index)
        selection: Any = Selection(picked.subkeys, picked.cells, None, None)
        selected = Selected(keys, None, touched, selection, None, picked.dead)
        length = picked.dead.shape[1]
        window = slice_of(tokens, start, length)

        def forward(keys, rows, window):
            live = unpack(cfg, without(window, picked.dead))
            write = chunk_of(cfg, live) if kind == "windows" else None
            computed = compute_window(cfg, keys, rows, live, selected, write, num_slots, picked.moved)
            return {name: getattr(computed, name) for name in noted}, computed.keys, computed.rows

        after = slice_of(following, offset, size, 0)
        # One gather for both: were they separate, XLA could not tell that all reads precede the update, and would copy.
        both = jnp.concatenate([offset + jnp.arange(len(after), dtype=after.dtype), after])
        own, d_rows = jnp.split(gather(rows, both, mode="fill", fill_value=0), 2)
        if d_table is not None:
            last = gather(d_table, touched.ids, mode="fill", fill_value=0)
            d_rows = jnp.where((after < len(rows))[:, None], d_rows, last)
        old = ((start + jnp.arange(length) < first_new) | picked.dead)[..., None]
        d_noted = {name: jnp.where(old, 0, slice_of(x, start, length)) for name, x in noted.items()}
        d_keys, d_rows, d_window = jax.vjp(forward, keys, own, window)[1]((d_noted, d_keys, d_rows))
        rows = update(rows, d_rows, offset, 0)
        # Without the barrier XLA would compute the gradients within the update of a slice, in one thread.
        d_window = slice_of(d_tokens, start, length) + lax.optimization_barrier(d_window)
        return d_keys, rows, update(d_tokens, d_window, start)

    def back_block(i, carry):
        j = blocks - 1 - i
        return back(carry, "blocks", j, *block_at(cfg, plan, num_pending, due, j))

    def back_write(i, carry):
        c = due - 1 - i
        return back(carry, "windows", c, c * cfg.chunk_size, read_before(cfg, c))

    d_keys = gradient.keys
    d_keys = jnp.zeros(d_keys.shape, d_keys.dtype) if isinstance(d_keys, SymbolicZero) else d_keys
    carry = d_keys, residuals.rows, jnp.zeros_like(tokens)
    blocks = num_blocks(cfg, plan, num_pending, due)
    if plan.blocks:
        carry = lax.fori_loop(0, blocks, back_block, carry)
    if plan.writes:
        carry = lax.fori_loop(0, due, back_write, carry)
    d_keys, rows, d_tokens = carry
    d_values = None
    if saved.dense:
        total = jnp.zeros((num_rows, width), rows.dtype) if d_table is None else d_table
        d_values = indexing.put(total, jnp.where(first, ids, num_rows), rows, mode="drop").reshape(
            gradient.values.shape
        )
    return Memory(d_keys, d_values), d_tokens, None, None


run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


def _empty_residuals(cfg: FwPKMConfig, plan: Plan, memory: Memory, tokens: Array) -> Residuals:
    """Space for what the windows and blocks of a call meet; they touch nothing until one is kept there."""
    rows = row_offset(cfg, plan, tokens, "blocks", plan.blocks)
    return Residuals(
        jnp.zeros((plan.writes, *memory.keys.shape), memory.keys.dtype),
        jnp.zeros((rows, cfg.value_dim), memory.values.dtype),
        jnp.full(rows, memory.values.shape[0] * memory.values.shape[1], jnp.int32),
        jnp.zeros(picked_offset(cfg, plan, memory.keys, tokens, "blocks", plan.blocks), jnp.int32),
    )


def _occurrences(ids: Array, num_rows: int) -> tuple[Array, Array]:
    """Of ids [R]: whether each is the first of its kind, and where the next one is; R if there is none.

    Ids from ``num_rows`` on name nothing: no other follows them.
    """
    index = jnp.arange(len(ids), dtype=ids.dtype)
    ids, order = lax.sort((ids, index), num_keys=2)
    again = (ids[1:] == ids[:-1]) & (ids[1:] < num_rows)
    first = indexing.put(jnp.zeros(len(ids), bool), order, ~jnp.append(False, again), unique_indices=True)
    following = jnp.append(jnp.where(again, order[1:], len(ids)), len(ids)).astype(ids.dtype)
    return first, indexing.put(jnp.zeros_like(ids), order, following, unique_indices=True)
