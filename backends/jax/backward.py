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
from fwpkm.backends.jax.indexing import gather
from fwpkm.backends.jax.tokens import cut, numbers, without
from fwpkm.backends.jax.windows import (
    Moved,
    Plan,
    Residuals,
    Result,
    Selected,
    block_at,
    chunk_of,
    compute_window,
    num_blocks,
    put,
    read_before,
    row_offset,
    select_window,
    slice_of,
    windows,
)
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory
from fwpkm.tokens import Tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(cfg: FwPKMConfig, plan: Plan, memory: Memory, tokens: Tokens, num_pending: Array, due: Array) -> Result:
    """What ``windows`` gives, differentiable."""
    return windows(cfg, plan, memory, tokens, num_pending, due)[0]


class Saved(NamedTuple):
    """What the backward of a call needs: ``Residuals`` of its windows, and its inputs."""

    residuals: Any
    tokens: Tokens
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
    return result, Saved(residuals, tokens, num_pending, due, (None,) if dense else ())


def _run_backward(cfg, plan, saved, gradient):
    residuals, tokens, num_pending, due = saved.residuals, saved.tokens, saved.num_pending, saved.due
    num_slots, width = gradient.values.shape[1:]
    num_rows = gradient.values.shape[0] * num_slots
    d_table = None if isinstance(gradient.values, SymbolicZero) else gradient.values.reshape(-1, width)
    buffers = filter(None, (residuals.windows, residuals.blocks))
    ids = jnp.concatenate([selected.touched.ids.ravel() for selected, _ in buffers])
    first, following = _occurrences(ids, num_rows)
    # What windows noted of their tokens, with its gradient; trace weights mostly have none.
    noted = {x: getattr(gradient, x) for x in ("reads", "weights")}
    noted = {
        name: put(jnp.zeros((*tokens.mask.shape, x.shape[-1]), x.dtype), x, num_pending)
        for name, x in noted.items()
        if not isinstance(x, SymbolicZero)
    }

    def back(carry, kind, index, start, first_new):
        """Through one window."""
        d_keys, rows, d_tokens = carry
        selected, moved = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), getattr(residuals, kind)
        )
        length = selected.dead.shape[1]
        window = cut(tokens, start, length)
        offset = row_offset(cfg, plan, tokens, kind, index)

        def forward(keys, rows, fields):
            live = without(window._replace(**fields), selected.dead)
            write = chunk_of(cfg, live) if kind == "windows" else None
            computed = compute_window(cfg, keys, rows, live, selected, write, num_slots, moved)
            return {name: getattr(computed, name) for name in noted}, computed.keys, computed.rows

        after = lax.dynamic_slice_in_dim(following, offset, len(selected.touched.ids))
        # One gather for both: were they separate, XLA could not tell that all reads precede the update, and would copy.
        both = jnp.concatenate([offset + jnp.arange(len(after), dtype=after.dtype), after])
        own, d_rows = jnp.split(gather(rows, both, mode="fill", fill_value=0), 2)
        if d_table is not None:
            last = gather(d_table, selected.touched.ids, mode="fill", fill_value=0)
            d_rows = jnp.where((after < len(rows))[:, None], d_rows, last)
        new = (start + jnp.arange(length) >= first_new)[:, None]
        d_noted = {name: jnp.where(new, slice_of(x, start, length), 0) for name, x in noted.items()}
        d_keys, d_rows, d_window = jax.vjp(forward, selected.keys, own, numbers(window))[1]((d_noted, d_keys, d_rows))
        rows = lax.dynamic_update_slice_in_dim(rows, d_rows, offset, 0)
        # A scatter, as XLA would compute the gradients within the update of a slice, in one thread.
        here = start + jnp.arange(length)
        options: Any = {"mode": "promise_in_bounds", "indices_are_sorted": True, "unique_indices": True}
        return d_keys, rows, {name: x.at[:, here].add(d_window[name], **options) for name, x in d_tokens.items()}

    def back_block(i, carry):
        j = blocks - 1 - i
        return back(carry, "blocks", j, *block_at(cfg, plan, num_pending, due, j))

    def back_write(i, carry):
        c = due - 1 - i
        return back(carry, "windows", c, c * cfg.chunk_size, read_before(cfg, c))

    d_keys = gradient.keys
    d_keys = jnp.zeros(d_keys.shape, d_keys.dtype) if isinstance(d_keys, SymbolicZero) else d_keys
    carry = d_keys, residuals.rows, jax.tree.map(jnp.zeros_like, numbers(tokens))
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
    none: Any = None
    return Memory(d_keys, d_values), tokens.map(lambda x: none)._replace(**d_tokens), none, none


run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


def _empty_residuals(cfg: FwPKMConfig, plan: Plan, memory: Memory, tokens: Tokens) -> Residuals:
    """Space for what the windows and blocks of a call meet; they touch nothing until one is kept there."""

    def space(count: int, length: int, writes: bool) -> tuple[Selected, Moved | None] | None:
        if not count:
            return None
        window = tokens.map(lambda x: jax.ShapeDtypeStruct((len(x), length, *x.shape[2:]), x.dtype))
        selected = jax.eval_shape(functools.partial(select_window, cfg), memory, window, window.mask)
        moved = [jnp.zeros((count, *shape), bool) for shape in ((*memory.keys.shape[:-1], 1), selected.rows.shape[:1])]
        empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), selected._replace(rows=None, ranks=None))
        nowhere = jnp.full_like(empty.touched.ids, memory.values.shape[0] * memory.values.shape[1])
        return empty._replace(touched=empty.touched._replace(ids=nowhere)), Moved(*moved) if writes else None

    rows = row_offset(cfg, plan, tokens, "blocks", plan.blocks)
    return Residuals(
        space(plan.writes, plan.window, True),
        space(plan.blocks, plan.block, False),
        jnp.zeros((rows, cfg.value_dim), memory.values.dtype),
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
