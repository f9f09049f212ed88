"""SPEC.md §2 and the key half of §4: which slots a query picks, and how the keys move.

``choose`` finds the slots; it is all that grows with S, and it has no gradient. ``address`` computes scores and weights
of what was chosen, ``write_keys`` moves the keys; both are differentiable and touch the k chosen sub-keys alone.

M memories, R tokens a memory, d = Dk/2: query [M, H, 2, R, d], keys [M, H, 2, S, d].
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fwpkm.backends.jax.table import dot, spread, spread_differences, squared_distance
from fwpkm.config import FwPKMConfig

_MARGIN = 16  # units of rounding of a product of matrices beyond which a lower-ranked sub-key is not searched for
_FEW = 32  # sub-keys that are all ranked from differences at once
_BLOCK = 4  # tokens ranked in full at a time: their differences to S sub-keys stay in a few MB


class Choice(NamedTuple):
    """What R tokens of each memory picked; integers, so that a backward pass can follow the same path."""

    subkeys: Array
    """``[M, H, 2, R, k]`` ids, best first."""
    cells: Array
    """``[M, H, R, k]`` the chosen sums, best first, as positions in ``_grid(k)``."""
    slots: Array
    """``[M, R, H*k]`` by head, then by descending sum."""
    finite: Array
    """``[M, R]`` whether the query and all its selected scores are finite."""


class Address(NamedTuple):
    """Scores and weights of a choice."""

    scores: Array
    """``[M, H, 2, R, k]`` sub-scores, best first."""
    slope: Array
    """``[M, H, 2, R, k]``: ∂s/∂K of an entry (§4) is slope · (q - K), or slope · q under the dot product."""
    weights: Array
    """``[M, R, H*k]``"""


def choose(cfg: FwPKMConfig, query: Array, keys: Array) -> Choice:
    """Top-k of both codebooks and of the k² sums, ties to the lower position (§2)."""
    query, keys = lax.stop_gradient((query, keys))
    subkeys, ranks = _select(cfg, query, keys)
    order = lax.top_k(ranks, cfg.top_k)[1]  # ids ascend, so ties stay with the lower one
    subkeys, ranks = (_along(x, order) for x in (subkeys, ranks))
    scores = ranks if cfg.score == "dot_product" else -jnp.log(cfg.score_eps - ranks)
    first, second = _grid(cfg.top_k)
    sums, cells = lax.top_k(scores[:, :, 0][..., first] + scores[:, :, 1][..., second], cfg.top_k)
    ids = subkeys[:, :, 0][..., first] * cfg.num_subkeys + subkeys[:, :, 1][..., second]
    slots = _along(ids, cells).swapaxes(1, 2)
    finite = jnp.isfinite(scores).all((1, 2, 4)) & jnp.isfinite(sums / cfg.temperature).all((1, 3))
    return Choice(subkeys, cells, slots.reshape(*slots.shape[:2], -1), finite)


def address(cfg: FwPKMConfig, query: Array, keys: Array, choice: Choice) -> Address:
    """Scores and weights of chosen slots (§2). Differentiable; tokens that are not finite must have been blanked."""
    scores = _measure(cfg, query, keys, choice.subkeys)
    slope = jnp.ones_like(scores)
    if cfg.score != "dot_product":
        distance = cfg.score_eps + scores
        scores, slope = -jnp.log(distance), 2 / distance
    first, second = (jnp.asarray(axis)[choice.cells] for axis in _grid(cfg.top_k))
    sums = _along(scores[:, :, 0], first) + _along(scores[:, :, 1], second)
    logits = sums.swapaxes(1, 2).reshape(*choice.slots.shape) / cfg.temperature
    return Address(scores, slope, jax.nn.softmax(logits, -1))


def write_keys(
    cfg: FwPKMConfig,
    query: Array,
    keys: Array,
    chosen: Address,
    subkeys: Array,
    counted: Array,
    active: Array,
    moves: Array | None,
) -> tuple[Array, Array, Array]:
    """Move the keys down the addressing loss (§3, §4).

    Args:
        cfg: the configuration.
        query: ``[M, H, 2, R, d]``.
        keys: ``[M, H, 2, S, d]``.
        chosen: what the tokens of the chunk picked in these keys.
        subkeys: ``[M, H, 2, R, k]`` ids of what they picked.
        counted: ``[M, R]``, the chunk's unmasked tokens.
        active: ``[M]``, the memories in which the chunk has a pair.
        moves: ``[M, H, 2, S, 1]``, the sub-keys that move, where that is known.

    Returns:
        the new keys, which of them moved, and the loss ``[M]``.
    """
    p = jax.nn.softmax(chosen.scores, -1)
    counted = counted.astype(p.dtype)
    share = (counted / jnp.maximum(counted.sum(-1, keepdims=True), 1))[:, None, None, :, None] * p
    mean = _spread(jnp.zeros(keys.shape[:-1], p.dtype), subkeys, share)
    log = jnp.log(mean + 1e-8)
    loss = (mean * log).sum((1, 2, 3)) * active
    slope = _chosen_rows(log + mean / (mean + 1e-8), subkeys)
    d_score = cfg.addressing_weight * share * (slope - (p * slope).sum(-1, keepdims=True))
    gradient = _push(cfg, query, keys, subkeys, d_score * chosen.slope)
    if cfg.grad_clip is not None:
        gradient = jnp.clip(gradient, -cfg.grad_clip, cfg.grad_clip)
    new = keys - cfg.learning_rate * (gradient + cfg.weight_decay * keys)
    if moves is None:
        moves = active[:, None, None, None, None] & jnp.isfinite(lax.stop_gradient(new)).all(-1, keepdims=True)
    return jnp.where(moves, new, keys), moves, loss


def _select(cfg: FwPKMConfig, query: Array, keys: Array) -> tuple[Array, Array]:
    """The k best sub-keys of each codebook, ties to the lower id: ids, ascending, and ranks ``[M, H, 2, R, k]``.

    A product of matrices proposes k sub-keys, and only theirs are computed from differences. Where the worst of them
    does not beat the next proposal by more than the product's rounding error, all S are ranked from differences. So the
    choice has the quality of differences near a key.
    """
    shape = (*query.shape[:-1], cfg.top_k)
    query, keys = (x.reshape(-1, *x.shape[-2:]) for x in (query, keys))
    finite = jnp.isfinite(query).all(-1)
    query = jnp.where(finite[..., None], query, 0)
    if cfg.num_subkeys <= _FEW:
        ids, ranks = _best(_rank(cfg, query[:, :, None], keys[:, None]), cfg.top_k)
    else:
        ids, ranks = _proposed(cfg, query, keys, finite)
    return ids.reshape(shape), jnp.where(finite[..., None], ranks, jnp.nan).reshape(shape)


def _proposed(cfg: FwPKMConfig, query: Array, keys: Array, finite: Array) -> tuple[Array, Array]:
    """``_select`` among many, for query [G, R, d] and keys [G, S, d]."""
    k, tokens = cfg.top_k, query.shape[1]
    rough, origin, scale = _expanded(cfg, query, keys)
    # Without the barrier XLA cannot tell a top-k from a sort that is sliced twice, and sorts everything.
    best, ids = lax.optimization_barrier(lax.top_k(rough, min(k + 1, cfg.num_subkeys)))
    next_best, ids = best[..., k:] - origin, jnp.sort(ids[..., :k], -1)
    ranks = _measure(cfg, query, keys, ids)
    if cfg.score != "dot_product":
        ranks = -ranks
    if k == cfg.num_subkeys:
        return ids, ranks
    error = jnp.abs(_along(rough, ids) - origin - ranks).max(-1, keepdims=True) / scale
    error = jnp.nan_to_num(error, nan=0, posinf=0).max()
    margin = scale * jnp.maximum(4 * error, _MARGIN * jnp.finfo(keys.dtype).eps / 2)
    unsure = ~(ranks.min(-1, keepdims=True) > next_best + margin)[..., 0] & finite

    def in_full(found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Rank all S sub-keys from differences for the next few tokens that are unsure."""
        unsure, ids, ranks = found
        at = jnp.nonzero(unsure, size=_BLOCK, fill_value=unsure.size)[0]  # past the last one: dropped below
        group, token = jnp.minimum(at // tokens, len(keys) - 1), at % tokens
        better = _best(_rank(cfg, query[group, token][:, None], keys[group]), k)
        ids, ranks = (x.at[at].set(new, mode="drop") for x, new in zip((ids, ranks), better))
        return unsure.at[at].set(False, mode="drop"), ids, ranks

    flat = unsure.ravel(), ids.reshape(-1, k), ranks.reshape(-1, k)
    _, best_ids, best_ranks = lax.while_loop(lambda found: found[0].any(), in_full, flat)
    return best_ids.reshape(ids.shape), best_ranks.reshape(ids.shape)


def _best(ranks: Array, k: int) -> tuple[Array, Array]:
    """The k largest of the last axis, by position; ties go to the lower one."""
    ids = jnp.sort(lax.top_k(ranks, k)[1], -1)
    return ids, _along(ranks, ids)


def _along(x: Array, index: Array) -> Array:
    """Entries of the last axis."""
    return jnp.take_along_axis(x, index, -1, mode="promise_in_bounds")


def _expanded(cfg: FwPKMConfig, query: Array, keys: Array) -> tuple[Array, Array, Array]:
    """Approximate ranks from a product of matrices, for query [G, R, d] and keys [G, S, d].

    Returns:
        ranks plus origin ``[G, R, S]``, the origin ``[G, R, 1]``, and the scale of the error ``[G, R, 1]``.
    """
    product = jnp.einsum("grd,gsd->grs", query, keys, precision=lax.Precision.HIGHEST)
    q, key = (jnp.square(x).sum(-1, keepdims=True) for x in (query, keys))
    largest = jnp.sqrt(key.max(1, keepdims=True))
    if cfg.score == "dot_product":
        return product, jnp.zeros_like(q), jnp.sqrt(q) * largest
    return 2 * product - key.swapaxes(1, 2), q, jnp.square(jnp.sqrt(q) + largest)


def _rank(cfg: FwPKMConfig, query: Array, rows: Array) -> Array:
    """q·K or -‖q - K‖² over the last axis; they order sub-keys as the scores do."""
    return (query * rows).sum(-1) if cfg.score == "dot_product" else -jnp.square(query - rows).sum(-1)


def _measure(cfg: FwPKMConfig, query: Array, keys: Array, ids: Array) -> Array:
    """q·K or ‖q - K‖² of chosen sub-keys: query [..., R, d], keys [..., S, d], ids [..., R, k]. Differentiable."""
    measure = dot if cfg.score == "dot_product" else squared_distance
    return measure(*_as_table(query, keys, ids)).reshape(ids.shape)


def _push(cfg: FwPKMConfig, query: Array, keys: Array, ids: Array, amount: Array) -> Array:
    """Σ over a sub-key's entries of amount · (q - K), or amount · q under the dot product, in the shape of ``keys``."""
    push = spread if cfg.score == "dot_product" else spread_differences
    rows, place, tokens = _as_table(query, keys, ids)
    return push(rows, place, amount.reshape(place.shape), tokens).reshape(keys.shape)


def _as_table(query: Array, keys: Array, ids: Array) -> tuple[Array, Array, Array]:
    """Keys as one table of rows, the places in it of each token's sub-keys, and the tokens."""
    rows, tokens = (x.reshape(-1, x.shape[-1]) for x in (keys, query))
    return rows, _flat(ids, keys.shape[-2]).reshape(len(tokens), -1), tokens


def _flat(ids: Array, size: int) -> Array:
    """``[..., R, k]`` ids among ``size`` rows of each group as ids among the rows of all groups."""
    groups = ids.shape[:-2]
    first = size * jnp.arange(int(np.prod(groups)), dtype=ids.dtype)
    return ids + first.reshape(*groups, 1, 1)


def _chosen_rows(table: Array, ids: Array) -> Array:
    """Rows of ``table [..., S, (d)]`` at ``ids [..., R, k]``: ``[..., R, k, (d)]``."""
    lead = ids.ndim - 2
    rows = table.reshape(-1, *table.shape[lead + 1 :])
    return rows.at[_flat(ids, table.shape[lead])].get(mode="promise_in_bounds")


def _spread(table: Array, ids: Array, entries: Array) -> Array:
    """``table [..., S, (d)]`` plus ``entries [..., R, k, (d)]`` at their ids."""
    lead = ids.ndim - 2
    rows = table.reshape(-1, *table.shape[lead + 1 :])
    return rows.at[_flat(ids, table.shape[lead])].add(entries, mode="promise_in_bounds").reshape(table.shape)


@cache
def _grid(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells (i, j) of the k × k sums that can be among the k largest, in order of position.

    Both axes descend, so (i+1)(j+1) - 1 cells are at least as large as (i, j) and come before it.
    """
    cells = [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]
    return np.array([i for i, _ in cells], np.int32), np.array([j for _, j in cells], np.int32)
