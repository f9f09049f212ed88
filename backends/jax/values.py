"""Rows of the value table (SPEC.md §2 to §4): those that a window touches, and no others.

T tokens read K = H·k entries each, among at most E = T·K distinct rows of width D. ``read`` and ``scatter_add`` are
each other's gradients. All entries are one gather or one scatter: a loop over K that is unrolled runs no faster and
compiles five times as long.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fwpkm.backends.jax.indexing import gather, put, scatter_sum
from fwpkm.backends.jax.tokens import finite_rows
from fwpkm.config import FwPKMConfig
from fwpkm.rules import step, step_vjp


class Touched(NamedTuple):
    """The distinct rows that T tokens read."""

    ids: Array
    """``[E]`` ascending; those past the last distinct row lie beyond the table, so that writes to them drop and reads
    give its last row, which no entry asks for."""
    row_index: Any
    """``[T, K]`` where in ``ids`` each entry stands; None where they are the entries as they come."""

    @classmethod
    def of(cls, slots: Array, num_rows: int) -> "Touched":
        """Of the entries ``slots [T, K]`` in a table of ``num_rows`` rows."""
        flat = slots.ravel()
        index = jnp.arange(flat.size, dtype=flat.dtype)
        ids, order = jax.lax.sort((flat, index), num_keys=1)
        rank = jnp.cumsum(jnp.append(True, ids[1:] != ids[:-1]), dtype=flat.dtype) - 1
        distinct = put(num_rows + index, rank, ids)
        row_index = put(jnp.zeros_like(flat), order, rank, unique_indices=True)
        return cls(distinct, row_index.reshape(slots.shape))

    def gather(self, table: Array) -> Array:
        """``[E, D]``: the rows of ``table [.., D]``."""
        return gather(table, self.ids, mode="clip", indices_are_sorted=True)

    def put(self, table: Array, rows: Array) -> Array:
        """``table`` with these rows replaced."""
        return put(table, self.ids, rows, mode="drop", indices_are_sorted=True, unique_indices=True)


@jax.custom_vjp
def read(rows: Array, row_index: Array, weights: Array) -> Array:
    """v̂ ``[T, D]``: Σ over a token's entries of weight · row; rows [E, D], row_index and weights [T, K]."""
    return (weights[..., None] * gather(rows, row_index)).sum(1)


@jax.custom_vjp
def scatter_add(rows: Array, row_index: Array, weights: Array, tokens: Array) -> Array:
    """``[E, D]``: Σ over a row's entries of weight · token; rows [E, D], weights [T, K], tokens [T, D]."""
    return scatter_sum(len(rows), row_index, weights[..., None] * tokens[:, None])


@jax.custom_vjp
def dot(rows: Array, row_index: Array, tokens: Array) -> Array:
    """``[T, K]``: ⟨row, token⟩ of each entry."""
    return (gather(rows, row_index) * tokens[:, None]).sum(-1)


@jax.custom_vjp
def squared_distance(rows: Array, row_index: Array, tokens: Array) -> Array:
    """``[T, K]``: ‖token - row‖² of each entry."""
    return jnp.square(tokens[:, None] - gather(rows, row_index)).sum(-1)


@jax.custom_vjp
def scatter_add_differences(rows: Array, row_index: Array, weights: Array, tokens: Array) -> Array:
    """``[E, D]``: Σ over a row's entries of weight · (token - row)."""
    return scatter_sum(len(rows), row_index, weights[..., None] * (tokens[:, None] - gather(rows, row_index)))


def value_gradient(rows: Array, row_index: Array, coefficient: Array, error: Array, fraction: Array) -> Array:
    """G ``[E, D]`` = (1/N) Σ κ g w (v̂ - u) (§4): coefficient κ g w [T, K], error v̂ - u [T, D], fraction 1/N [E]."""
    return scatter_add(rows, row_index, coefficient * gather(fraction, row_index), error)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def write_rows(
    cfg: FwPKMConfig,
    rows: Array,
    row_index: Array,
    coefficient: Array,
    error: Array,
    count: Array,
    rates: Array | None,
    may_move: Array,
    moves: Array | None,
) -> tuple[Array, Array]:
    """The rows after a write; those that would not be finite keep their bits (§4).

    Args:
        cfg: the configuration.
        rows: ``[E, D]`` rows before the write.
        row_index: ``[T, K]``.
        coefficient: ``[T, K]``, κ g w of each entry.
        error: ``[T, D]``, v̂ - u.
        count: ``[E]``, N_i.
        rates: ``[E]``, η_i; None where all are η.
        may_move: ``[E]`` bool: read by a counted token, in a memory where the chunk has a pair.
        moves: ``[E]`` bool: the rows that move, where that is known.

    Returns:
        the rows, and which of them moved.
    """
    return _write_rows(cfg, rows, row_index, coefficient, error, count, rates, may_move, moves)[0]


class _WriteResiduals(NamedTuple):
    """What the backward of a write needs, as its arguments and as ``value_gradient`` name it."""

    row_index: Array
    coefficient: Array
    error: Array
    fraction: Array
    rates: Array | None
    moves: Array
    unclipped: Array | None


def _write_rows(cfg, rows, row_index, coefficient, error, count, rates, may_move, moves):
    """The result, and its residuals."""
    fraction = 1 / jnp.maximum(count, 1).astype(rows.dtype)
    gradient = value_gradient(rows, row_index, coefficient, error, fraction)
    new = step(jnp, cfg, rows, gradient, rates)
    if moves is None:
        moves = may_move & finite_rows(new)
    unclipped = None if cfg.grad_clip is None else jnp.abs(gradient) <= cfg.grad_clip
    residuals = _WriteResiduals(row_index, coefficient, error, fraction, rates, moves, unclipped)
    return (jnp.where(moves[:, None], new, rows), moves), residuals


def _write_rows_backward(cfg, saved, gradients):
    row_index, moves = saved.row_index, saved.moves[:, None]
    d_after, _ = gradients
    unclipped = None if saved.unclipped is None else saved.unclipped.astype(d_after.dtype)
    d_rows, d_gradient = step_vjp(jnp, cfg, jnp.where(moves, d_after, 0), unclipped, saved.rates)
    d_rows = jnp.where(moves, d_rows, d_after)
    # An error that is not finite moved nothing, and must not turn that into NaN.
    error = jnp.where(finite_rows(saved.error)[:, None], saved.error, 0)
    fraction = gather(saved.fraction, row_index)
    d_error = read(d_gradient, row_index, saved.coefficient * fraction)
    d_coefficient = jnp.nan_to_num(fraction * dot(d_gradient, row_index, error))
    return d_rows, None, d_coefficient, d_error, None, None, None, None


write_rows.defvjp(_write_rows, _write_rows_backward)


class _Residuals(NamedTuple):
    """What the backward of a sum over entries needs of its arguments."""

    row_index: Array
    rows: Any = None
    weights: Any = None
    tokens: Any = None


def _read_forward(rows, row_index, weights):
    return read(rows, row_index, weights), _Residuals(row_index, rows=rows, weights=weights)


def _read_backward(saved, gradient):
    d_rows = scatter_add(saved.rows, saved.row_index, saved.weights, gradient)
    return d_rows, None, dot(saved.rows, saved.row_index, gradient)


read.defvjp(_read_forward, _read_backward)


def _scatter_add_forward(rows, row_index, weights, tokens):
    return scatter_add(rows, row_index, weights, tokens), _Residuals(row_index, weights=weights, tokens=tokens)


def _scatter_add_backward(saved, gradient):
    d_weights = dot(gradient, saved.row_index, saved.tokens)
    return None, None, d_weights, read(gradient, saved.row_index, saved.weights)


scatter_add.defvjp(_scatter_add_forward, _scatter_add_backward)


def _dot_forward(rows, row_index, tokens):
    return dot(rows, row_index, tokens), _Residuals(row_index, rows=rows, tokens=tokens)


def _dot_backward(saved, gradient):
    d_rows = scatter_add(saved.rows, saved.row_index, gradient, saved.tokens)
    return d_rows, None, read(saved.rows, saved.row_index, gradient)


dot.defvjp(_dot_forward, _dot_backward)


def _squared_distance_forward(rows, row_index, tokens):
    return squared_distance(rows, row_index, tokens), _Residuals(row_index, rows=rows, tokens=tokens)


def _squared_distance_backward(saved, gradient):
    rows, row_index, tokens = saved.rows, saved.row_index, saved.tokens
    weights = 2 * gradient
    d_rows = -scatter_add_differences(rows, row_index, weights, tokens)
    return d_rows, None, (weights[..., None] * (tokens[:, None] - gather(rows, row_index))).sum(1)


squared_distance.defvjp(_squared_distance_forward, _squared_distance_backward)


def _scatter_add_differences_forward(rows, row_index, weights, tokens):
    result = scatter_add_differences(rows, row_index, weights, tokens)
    return result, _Residuals(row_index, rows=rows, weights=weights, tokens=tokens)


def _scatter_add_differences_backward(saved, gradient):
    row_index, weights, tokens = saved.row_index, saved.weights, saved.tokens
    total = scatter_sum(len(saved.rows), row_index, weights)
    d_weights = ((tokens[:, None] - gather(saved.rows, row_index)) * gather(gradient, row_index)).sum(-1)
    return -total[:, None] * gradient, None, d_weights, read(gradient, row_index, weights)


scatter_add_differences.defvjp(_scatter_add_differences_forward, _scatter_add_differences_backward)
