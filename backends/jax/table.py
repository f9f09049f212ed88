"""The value table (SPEC.md §2 to §4), through the rows that a window touches and no others.

T tokens read K = H·k entries each, among at most E = T·K distinct rows of width D. ``read`` and ``spread`` are each
other's gradients.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fwpkm.config import FwPKMConfig


class Touched(NamedTuple):
    """The distinct rows that T tokens read."""

    rows: Array
    """``[E]`` ids, ascending; those past the last distinct row lie beyond the table, so that writes to them drop and
    reads give its last row, which no entry asks for."""
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
        """``[E, D]``: the rows of ``table [.., D]``."""
        return table.at[self.rows].get(mode="clip", indices_are_sorted=True)

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
    return _add(jnp.zeros_like(rows), place, lambda j: weights[:, j, None] * tokens)


@jax.custom_vjp
def dot(rows: Array, place: Array, tokens: Array) -> Array:
    """``[T, K]``: ⟨row, token⟩ of each entry."""
    return jnp.stack([(_at(rows, place[:, j]) * tokens).sum(-1) for j in range(place.shape[1])], axis=1)


@jax.custom_vjp
def squared_distance(rows: Array, place: Array, tokens: Array) -> Array:
    """``[T, K]``: ‖token - row‖² of each entry."""
    return jnp.stack([jnp.square(tokens - _at(rows, place[:, j])).sum(-1) for j in range(place.shape[1])], axis=1)


@jax.custom_vjp
def spread_differences(rows: Array, place: Array, weights: Array, tokens: Array) -> Array:
    """``[P, D]``: Σ over a row's entries of weight · (token - row)."""
    return _add(jnp.zeros_like(rows), place, lambda j: weights[:, j, None] * (tokens - _at(rows, place[:, j])))


def _add(rows: Array, place: Array, entry: Callable[[int], Array]) -> Array:
    """``rows`` with ``entry(j) [T, D]`` added at ``place[:, j]`` for each j: one after the other, none is kept."""
    for j in range(place.shape[1]):
        rows = rows.at[place[:, j]].add(entry(j), mode="promise_in_bounds")
    return rows


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


def _dot_backward(saved, gradient):
    rows, place, tokens = saved
    return spread(rows, place, gradient, tokens), None, read(rows, place, gradient)


dot.defvjp(lambda *args: (dot(*args), args), _dot_backward)


def _squared_distance_backward(saved, gradient):
    rows, place, tokens = saved
    weights = 2 * gradient
    entries = (weights[:, j, None] * (tokens - _at(rows, place[:, j])) for j in range(place.shape[1]))
    return -spread_differences(rows, place, weights, tokens), None, sum(entries, start=jnp.zeros_like(tokens))


squared_distance.defvjp(lambda *args: (squared_distance(*args), args), _squared_distance_backward)


def _spread_differences_backward(saved, gradient):
    rows, place, weights, tokens = saved
    total = jnp.zeros(len(rows), weights.dtype).at[place].add(weights, mode="promise_in_bounds")
    d_weights = [
        ((tokens - _at(rows, place[:, j])) * _at(gradient, place[:, j])).sum(-1) for j in range(place.shape[1])
    ]
    return -total[:, None] * gradient, None, jnp.stack(d_weights, axis=1), read(gradient, place, weights)


spread_differences.defvjp(lambda *args: (spread_differences(*args), args), _spread_differences_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rewrite(
    cfg: FwPKMConfig,
    rows: Array,
    place: Array,
    pull: Array,
    error: Array,
    count: Array,
    may_move: Array,
    moves: Array | None,
) -> tuple[Array, Array]:
    """The rows after a write, rows - η (clip(G) + λ rows); those that would not be finite keep their bits (§4).

    Args:
        cfg: the configuration.
        rows: ``[P, D]`` rows before the write.
        place: ``[T, K]``.
        pull: ``[T, K]``, κ g w of each entry.
        error: ``[T, D]``, v̂ - u.
        count: ``[P]``, N_i.
        may_move: ``[P]`` bool: read by a counted token, in a memory where the chunk has a pair.
        moves: ``[P]`` bool: the rows that move, where that is known.

    Returns:
        the rows, and which of them moved.
    """
    return _rewrite(cfg, rows, place, pull, error, count, may_move, moves)[0]


def _rewrite(cfg, rows, place, pull, error, count, may_move, moves):
    """The result, and what the backward needs."""
    share = 1 / jnp.maximum(count, 1).astype(rows.dtype)
    gradient = spread(rows, place, pull * share[place], error)
    unclipped = None
    if cfg.grad_clip is not None:
        unclipped = jnp.abs(gradient) <= cfg.grad_clip
        gradient = jnp.clip(gradient, -cfg.grad_clip, cfg.grad_clip)
    if cfg.weight_decay:  # XLA keeps a pass over all rows for a product with 0
        gradient += cfg.weight_decay * rows
    new = rows - cfg.learning_rate * gradient
    if moves is None:
        moves = may_move & jnp.isfinite(new).all(-1)
    return (jnp.where(moves[:, None], new, rows), moves), (place, pull, error, share, moves, unclipped)


def _rewrite_backward(cfg, saved, gradient):
    place, pull, error, share, moves, unclipped = saved
    gradient, _ = gradient
    step = jnp.where(moves, cfg.learning_rate * share, 0)
    reached = gradient if unclipped is None else gradient * unclipped
    step_of = step[place]
    # An error that is not finite moved nothing, and must not turn that into NaN.
    error = jnp.where(jnp.isfinite(error).all(-1, keepdims=True), error, 0)
    d_error = -read(reached, place, pull * step_of)
    d_pull = jnp.nan_to_num(jnp.where(step_of == 0, 0, -step_of * dot(reached, place, error)))
    if cfg.weight_decay:
        decay = jnp.where(moves, cfg.learning_rate * cfg.weight_decay, 0).astype(gradient.dtype)
        gradient -= decay[:, None] * gradient
    return gradient, None, d_pull, d_error, None, None, None


rewrite.defvjp(_rewrite, _rewrite_backward)
