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
from fwpkm.backends.jax.indexing import gather, scatter_add
from fwpkm.backends.jax.sharding import alike
from fwpkm.backends.jax.streams import Plan, Streams, of_rows
from fwpkm.backends.jax.tokens import from_table
from fwpkm.backends.jax.windows import (
    Moved,
    Residuals,
    Result,
    RoundResiduals,
    Selected,
    chunk_of,
    compute_window,
    noted,
    row_offset,
    select_window,
    windows,
)
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(cfg: FwPKMConfig, plan: Plan, memory: Memory, uses: Array | None, source: Array, streams: Streams) -> Result:
    """What ``windows`` gives, differentiable; the arrays are ``alike``. Uses are counts: no gradient passes through."""
    return windows(cfg, plan, memory, uses, source, streams)[0]


class Saved(NamedTuple):
    """What the backward of a call needs: ``Residuals`` of its rounds, and its inputs."""

    residuals: Any
    source: Array
    keys: Array
    """afterwards."""
    writes: Array
    """how many rounds wrote."""
    reads: Array
    """how many only read."""
    dense: tuple[None, ...]
    """Whether the table is differentiated, which must be known while tracing: (None,) or () is a static mark."""


def _run_forward(cfg, plan, memory, uses, source, streams):
    dense = memory.values.perturbed
    is_marked = lambda x: hasattr(x, "perturbed")  # noqa: E731
    given = memory, uses, source, streams
    memory, uses, source, streams = jax.tree.map(lambda x: x.value, given, is_leaf=is_marked)
    space = _empty_residuals(cfg, plan, memory, uses, source)
    result, residuals = windows(cfg, plan, memory, uses, source, streams, space)
    counts = streams.write_ends[-1], streams.read_ends[-1]
    return result, Saved(residuals, source, result.keys, *counts, (None,) if dense else ())


def _run_backward(cfg, plan, saved, gradient):
    residuals, num_slots = saved.residuals, cfg.num_slots
    num_rows, width = gradient.values.shape[0] * num_slots, cfg.value_dim
    d_table = None if isinstance(gradient.values, SymbolicZero) else gradient.values.reshape(-1, width)
    buffers = filter(None, (residuals.writes, residuals.reads))
    ids = jnp.concatenate([rounds.touched.ids.ravel() for rounds in buffers])
    first, following = _occurrences(ids, num_rows)
    d_noted = None if isinstance(gradient.reads, SymbolicZero) else gradient.reads

    def back(carry, kind, index):
        """Through one round."""
        d_keys, rows, d_source = carry
        one = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), getattr(residuals, kind))
        writes = kind == "writes"
        offset = row_offset(cfg, plan, kind, index)

        def forward(keys, rows, tokens):
            window = from_table(cfg, tokens)
            write = chunk_of(cfg, window) if writes else None
            selected = Selected(keys, rows, one.touched, one.selection, None, None, one.uses)
            computed = compute_window(cfg, keys, rows, window, selected, write, num_slots, one.moved)
            return noted(computed), computed.keys, computed.rows

        after = lax.dynamic_slice_in_dim(following, offset, len(one.touched.ids))
        # One gather for both: were they separate, XLA could not tell that all reads precede the update, and would copy.
        both = jnp.concatenate([offset + jnp.arange(len(after), dtype=after.dtype), after])
        own, d_rows = jnp.split(gather(rows, both, mode="fill", fill_value=0), 2)
        if d_table is not None:
            last = gather(d_table, one.touched.ids, mode="fill", fill_value=0)
            d_rows = jnp.where((after < len(rows))[:, None], d_rows, last)
        keys = one.keys if writes else of_rows(saved.keys, one.of)
        outputs, pull_back = jax.vjp(forward, keys, own, gather(saved.source, one.cells))
        d_reads = jnp.zeros_like(outputs[0]) if d_noted is None else gather(d_noted, one.new, mode="fill", fill_value=0)
        replaces = writes and not plan.is_shared
        d_own = of_rows(d_keys, one.of) if replaces else jnp.zeros_like(keys)
        d_own, d_rows, d_tokens = pull_back(alike((d_reads, d_own, d_rows), saved.source)[0])
        if replaces:
            d_keys = lax.dynamic_update_slice_in_dim(d_keys, d_own, 0 if one.of is None else one.of[0], 0)
        else:
            d_keys = d_keys + d_own if one.of is None else scatter_add(d_keys, one.of, d_own, mode="drop")
        rows = lax.dynamic_update_slice_in_dim(rows, d_rows, offset, 0)
        return d_keys, rows, scatter_add(d_source, one.cells, d_tokens)

    d_keys = gradient.keys
    d_keys = jnp.zeros(d_keys.shape, d_keys.dtype) if isinstance(d_keys, SymbolicZero) else d_keys
    carry, _ = alike((d_keys, residuals.rows, jnp.zeros_like(saved.source)), saved.source)
    if plan.reads:
        carry = lax.fori_loop(0, saved.reads, lambda i, x: back(x, "reads", saved.reads - 1 - i), carry)
    if plan.writes:
        carry = lax.fori_loop(0, saved.writes, lambda i, x: back(x, "writes", saved.writes - 1 - i), carry)
    d_keys, rows, d_source = carry
    d_values = None
    if saved.dense:
        total = jnp.zeros((num_rows, width), rows.dtype) if d_table is None else d_table
        d_values = indexing.put(total, jnp.where(first, ids, num_rows), rows, mode="drop").reshape(
            gradient.values.shape
        )
    return Memory(d_keys, d_values), None, d_source, None


run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


def _empty_residuals(cfg: FwPKMConfig, plan: Plan, memory: Memory, uses: Array | None, source: Array) -> Residuals:
    """Space for what the rounds of a call meet; they touch nothing until one is kept there."""

    def space(count: int, rows: int, length: int, writes: bool) -> RoundResiduals | None:
        if not count:
            return None

        def one(memory: Memory, uses: Array | None, source: Array) -> RoundResiduals:
            cells = jnp.zeros((rows, length), jnp.int32)
            of = jnp.zeros(rows, jnp.int32) if plan.packed or plan.is_shared else None
            selected = select_window(cfg, memory, from_table(cfg, gather(source, cells)), of, uses=uses)
            moved = Moved(jnp.zeros((*selected.keys.shape[:-1], 1), bool), jnp.zeros(len(selected.rows), bool))
            kept = (selected.keys, moved, selected.uses) if writes else (None, None, None)
            return RoundResiduals(cells, cells, selected.touched, selected.selection, of, *kept)

        shapes = jax.eval_shape(one, memory, uses, source)
        empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
        nowhere = jnp.full_like(empty.touched.ids, memory.values.shape[0] * memory.values.shape[1])
        return empty._replace(touched=empty.touched._replace(ids=nowhere))

    return Residuals(
        space(plan.writes, 1 if plan.packed else plan.batch, plan.window, True),
        space(plan.reads, plan.rows, plan.block, False),
        jnp.zeros((row_offset(cfg, plan, "reads", plan.reads), cfg.value_dim), memory.values.dtype),
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
