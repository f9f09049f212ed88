"""The value table (SPEC.md §2 to §4), through the rows that a window touches and no others.

T tokens read K = H·k entries each, among at most E = T·K distinct rows of width D. ``read`` and ``spread`` are each
other's gradients.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fwpkm.config import FwPKMConfig


class Touched(NamedTuple):
    """The distinct rows that T tokens read."""

    rows: Array
    """``[E]`` ids, ascending; those past the last distinct row lie beyond the table, so that writes to them drop."""
    place: Array
    """``[T, K]`` where in ``rows`` each entry stands."""

    @classmethod
    def of(cls, slots: Array, num_rows: int) -> "Touched":
        """Of the entries ``slots [T, K]`` in a table of ``num_rows`` rows."""
        flat = slots.ravel()
        index = jnp.arange(flat.size, dtype=flat.dtype)
        ids, order = jax.lax.sort((flat, index), num_keys=1)
        rank = jnp.cumsum(jnp.append(True, ids[1:] != ids[:-1]), dtype=flat.dtype) - 1
        rows = (num_rows + index).at[rank].set(ids, mode="promise_in_bounds")
        place = jnp.zeros_like(flat).at[order].set(rank, mode="promise_in_bounds", unique_indices=True)
        return cls(rows, place.reshape(slots.shape))

    def take(self, table: Array) -> Array:
        """``[E, D]``: the rows of ``table [.., D]``; zeros past the last."""
        return table.at[self.rows].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)

    def put(self, table: Array, rows: Array) -> Array:
        """``table`` with these rows replaced."""
        return table.at[self.rows].set(rows, mode="drop", indices_are_sorted=True, unique_indices=True)


@jax.custom_vjp
def read(rows: Array, place: Array, weights: Array) -> Array:
    """``[T, D]``: Σ over a token's entries of weight · row; rows [P, D], place and weights [T, K]."""
    first, *others = (weights[:, j, None] * _at(rows, place[:, j]) for j in range(place.shape[1]))
    return sum(others, start=first)


@jax.custom_vjp
def spread(rows: Array, place: Array, weights: Array, tokens: Array) -> Array:
    """``[P, D]``: Σ over a row's entries of weight · token; rows gives P, place and weights [T, K], tokens [T, D]."""
    return jnp.zeros_like(rows).at[place].add(weights[..., None] * tokens[:, None], mode="promise_in_bounds")


def dot(rows: Array, place: Array, tokens: Array) -> Array:
    """``[T, K]``: ⟨row, token⟩ of each entry."""
    return jnp.stack([(_at(rows, place[:, j]) * tokens).sum(-1) for j in range(place.shape[1])], axis=1)


def _at(rows: Array, place: Array) -> Array:
    return rows.at[place].get(mode="promise_in_bounds")


def _read_backward(saved, gradient):
    rows, place, weights = saved
    return spread(rows, place, weights, gradient), None, dot(rows, place, gradient)


read.defvjp(lambda *args: (read(*args), args), _read_backward)


def _spread_backward(saved, gradient):
    place, weights, tokens = saved
    return None, None, dot(gradient, place, tokens), read(gradient, place, weights)


spread.defvjp(lambda rows, *args: (spread(rows, *args), args), _spread_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rewrite(
    cfg: FwPKMConfig, rows: Array, place: Array, pull: Array, error: Array, count: Array, may_move: Array
) -> Array:
    """The rows after a write, rows - η (clip(G) + λ rows); those that would not be finite keep their bits (§4).

    Args:
        cfg: the configuration.
        rows: ``[P, D]`` rows before the write.
        place: ``[T, K]``.
        pull: ``[T, K]``, κ g w of each entry.
        error: ``[T, D]``, v̂ - u.
        count: ``[P]``, N_i.
        may_move: ``[P]`` bool: read by a counted token, in a memory where the chunk has a pair.
    """
    return _rewrite(cfg, rows, place, pull, error, count, may_move)[0]


def _rewrite(cfg, rows, place, pull, error, count, may_move):
    """The new rows, and what the backward needs."""
    share = 1 / jnp.maximum(count, 1).astype(rows.dtype)
    gradient = spread(rows, place, pull * share[place], error)
    unclipped = None
    if cfg.grad_clip is not None:
        unclipped = jnp.abs(gradient) <= cfg.grad_clip
        gradient = jnp.clip(gradient, -cfg.grad_clip, cfg.grad_clip)
    new = rows - cfg.learning_rate * (gradient + cfg.weight_decay * rows)
    moves = may_move & jnp.isfinite(new).all(-1)
    return jnp.where(moves[:, None], new, rows), (place, pull, error, share, moves, unclipped)


def _rewrite_backward(cfg, saved, gradient):
    place, pull, error, share, moves, unclipped = saved
    step = jnp.where(moves, cfg.learning_rate * share, 0)
    reached = gradient if unclipped is None else gradient * unclipped
    step_of = step[place]
    # An error that is not finite moved nothing, and must not turn that into NaN.
    error = jnp.where(jnp.isfinite(error).all(-1, keepdims=True), error, 0)
    d_error = -read(reached, place, pull * step_of)
    d_pull = jnp.nan_to_num(jnp.where(step_of == 0, 0, -step_of * dot(reached, place, error)))
    decay = jnp.where(moves, cfg.learning_rate * cfg.weight_decay, 0).astype(gradient.dtype)
    return gradient - decay[:, None] * gradient, None, d_pull, d_error, None, None


rewrite.defvjp(_rewrite, _rewrite_backward)
