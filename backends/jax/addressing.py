"""SPEC.md §2 and the key half of §3 and §4: which slots a query picks, and how the keys move.

``select_slots`` finds the slots; it is all that grows with S, and it has no gradient. ``address`` computes scores and
weights of what was selected, ``write_keys`` moves the keys; both are differentiable and touch the k selected sub-keys
alone.

M memories, R tokens a memory, d = Dk/2: query [M, H, 2, R, d], keys [M, H, 2, S, d]. The rank of a sub-key is q·K or
-‖q - K‖²: it orders them as the scores do.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fwpkm.backends.jax.indexing import along, gather, put, scatter_sum
from fwpkm.backends.jax.tokens import NAME, finite_rows
from fwpkm.backends.jax.values import dot, scatter_add, scatter_add_differences, squared_distance
from fwpkm.config import FwPKMConfig
from fwpkm.rules import addressing_loss, addressing_slope, step

_MARGIN = 16  # units of rounding of a product of matrices beyond which a lower-ranked sub-key is not searched for
_FEW = 32  # sub-keys that are all ranked from differences at once
_BLOCK = 4  # tokens ranked in full at a time: their differences to S sub-keys stay in a few MB


class Selection(NamedTuple):
    """What R tokens of each memory picked; integers, so that a backward pass can follow the same path."""

    subkeys: Array
    """``[M, H, 2, R, k]`` ids, best first."""
    cells: Array
    """``[M, H, R, k]`` the selected sums, best first, as positions in ``_grid(k)``."""
    slots: Array
    """``[M, R, H*k]`` by head, then by descending sum."""
    finite: Array
    """``[M, R]`` whether the query and all its selected scores are finite."""


class Found(NamedTuple):
    """What a selection computed on its way, 0 for tokens that are not finite."""

    ranks: Array
    """``[M, H, 2, R, k]``, best first."""
    sums: Array
    """``[M, H, R, k]``, best first."""


class Address(NamedTuple):
    """Scores and weights of a selection."""

    ranks: Array
    """``[M, H, 2, R, k]``, best first."""
    scores: Array
    """``[M, H, 2, R, k]`` their sub-scores."""
    weights: Array
    """``[M, R, H*k]``"""


# --- What differs from score to score ---


def sub_scores(cfg: FwPKMConfig, ranks: Array) -> Array:
    """s = -log(ε + ‖q - K‖²) or q·K (§2), from ranks."""
    if cfg.score == "idw":
        return -jnp.log(cfg.score_eps - ranks)
    if cfg.score == "dot_product":
        return ranks
    return cfg.refuse("score", NAME)


def score_slope(cfg: FwPKMConfig, ranks: Array) -> Array:
    """What ∂s/∂K (§4) is as a multiple of q - K, or of q under the dot product."""
    if cfg.score == "idw":
        return 2 / (cfg.score_eps - ranks)
    if cfg.score == "dot_product":
        return jnp.ones_like(ranks)
    return cfg.refuse("score", NAME)


def _ranks(cfg: FwPKMConfig, query: Array, keys: Array) -> Array:
    """q·K or -‖q - K‖² over the last axis."""
    if cfg.score == "idw":
        return -jnp.square(query - keys).sum(-1)
    if cfg.score == "dot_product":
        return (query * keys).sum(-1)
    return cfg.refuse("score", NAME)


def _ranks_at(cfg: FwPKMConfig, query: Array, keys: Array, ids: Array) -> Array:
    """Ranks of some sub-keys: query [..., R, d], keys [..., S, d], ids [..., R, k]. Differentiable."""
    entries = _as_table(query, keys, ids)
    if cfg.score == "idw":
        return -squared_distance(*entries).reshape(ids.shape)
    if cfg.score == "dot_product":
        return dot(*entries).reshape(ids.shape)
    return cfg.refuse("score", NAME)


def _rough_ranks(cfg: FwPKMConfig, query: Array, keys: Array) -> tuple[Array, Array, Array]:
    """Approximate ranks from a product of matrices, for query [G, R, d] and keys [G, S, d].

    Returns:
        ranks plus origin ``[G, R, S]``, the origin ``[G, R, 1]``, and the scale of the error ``[G, R, 1]``.
    """
    product = jnp.einsum("grd,gsd->grs", query, keys, precision=lax.Precision.HIGHEST)
    q, key = (jnp.square(x).sum(-1, keepdims=True) for x in (query, keys))
    largest = jnp.sqrt(key.max(1, keepdims=True))
    if cfg.score == "idw":
        return 2 * product - key.swapaxes(1, 2), q, jnp.square(jnp.sqrt(q) + largest)
    if cfg.score == "dot_product":
        return product, jnp.zeros_like(q), jnp.sqrt(q) * largest
    return cfg.refuse("score", NAME)


def _key_vjp(cfg: FwPKMConfig, query: Array, keys: Array, ids: Array, d_scores: Array, slope: Array) -> Array:
    """Σ over a sub-key's entries of d_scores · ∂s/∂K, in the shape of ``keys``."""
    rows, row_index, tokens = _as_table(query, keys, ids)
    coefficient = (d_scores * slope).reshape(row_index.shape)
    if cfg.score == "idw":
        return scatter_add_differences(rows, row_index, coefficient, tokens).reshape(keys.shape)
    if cfg.score == "dot_product":
        return scatter_add(rows, row_index, coefficient, tokens).reshape(keys.shape)
    return cfg.refuse("score", NAME)


# --- §2 Lookup ---


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """The k largest of the last axis, best first, and their positions; ties go to the lower one.

    NaN is the largest (§2), and comes back as inf, since JAX's own orders it by its sign, as it does zeros.
    """
    x = jnp.where(jnp.isnan(x), jnp.inf, jnp.where(x == 0, 0, x))
    # Without the barrier XLA cannot tell a top-k from a sort that is sliced twice, and sorts everything.
    # One round both would end the process where rows are dealt to several devices.
    return tuple(map(lax.optimization_barrier, lax.top_k(x, k)))


def select_slots(cfg: FwPKMConfig, query: Array, keys: Array) -> tuple[Selection, Found]:
    """Top-k of both codebooks and of the k² sums, ties to the lower position (§2)."""
    query, keys = lax.stop_gradient((query, keys))
    ranks, subkeys = _select_subkeys(cfg, query, keys)
    scores = sub_scores(cfg, ranks)
    first, second = _grid(cfg.top_k)
    sums, cells = top_k(scores[:, :, 0][..., first] + scores[:, :, 1][..., second], cfg.top_k)
    ids = subkeys[:, :, 0][..., first] * cfg.num_subkeys + subkeys[:, :, 1][..., second]
    slots = along(ids, cells).swapaxes(1, 2)
    finite = jnp.isfinite(scores).all((1, 2, 4)) & jnp.isfinite(sums / cfg.temperature).all((1, 3))
    # Blanked, as 0 · NaN of a token that does not count would still reach the keys.
    live = finite[:, None, :, None]
    found = Found(jnp.where(live[:, None], ranks, 0), jnp.where(live, sums, 0))
    return Selection(subkeys, cells, slots.reshape(*slots.shape[:2], -1), finite), found


def address(cfg: FwPKMConfig, query: Array, keys: Array, selection: Selection, found: Found | None = None) -> Address:
    """Scores and weights of selected slots (§2); tokens that are not finite must have been blanked.

    Differentiable, unless what ``select_slots`` found is given and need not be computed again.
    """
    if found is None:
        ranks = _ranks_at(cfg, query, _readable(keys), selection.subkeys)
        ranks = jnp.where(selection.finite[:, None, None, :, None], ranks, 0)
    else:
        ranks = found.ranks
    scores = sub_scores(cfg, ranks)
    if found is None:
        first, second = (gather(jnp.asarray(axis), selection.cells) for axis in _grid(cfg.top_k))
        sums = along(scores[:, :, 0], first) + along(scores[:, :, 1], second)
    else:
        sums = found.sums
    logits = sums.swapaxes(1, 2).reshape(*selection.slots.shape) / cfg.temperature
    return Address(ranks, scores, jax.nn.softmax(logits, -1))


# --- §3 Losses and §4 Chunk update ---


def sub_key_probabilities(scores: Array) -> Array:
    """p over the k selected sub-scores of each head and codebook: ``[M, H, 2, R, k]``."""
    return jax.nn.softmax(scores, -1)


def mean_probabilities(fraction: Array, subkeys: Array, num_subkeys: int) -> Array:
    """p̄ ``[M, H, 2, S]`` from p over the number of counted tokens, 0 for the others, ``[M, H, 2, R, k]`` (§3)."""
    shape = (*subkeys.shape[:-2], num_subkeys)
    return scatter_sum(int(np.prod(shape)), _row_index(subkeys, num_subkeys), fraction).reshape(shape)


def key_gradient(
    cfg: FwPKMConfig, query: Array, keys: Array, at: Address, subkeys: Array, counted: Array
) -> tuple[Array, Array]:
    """α ∇_keys L_addr in the shape of ``keys``, the closed form of §4, and L_addr ``[M]``.

    ``counted`` [M, R] is 0, or 1 over the number of counted tokens.
    """
    p = sub_key_probabilities(at.scores)
    fraction = counted[:, None, None, :, None] * p
    mean = mean_probabilities(fraction, subkeys, cfg.num_subkeys)
    loss = addressing_loss(jnp, mean).sum((1, 2, 3))
    a = gather(addressing_slope(jnp, mean).ravel(), _row_index(subkeys, cfg.num_subkeys))
    d_scores = cfg.addressing_weight * fraction * (a - (p * a).sum(-1, keepdims=True))
    return _key_vjp(cfg, query, _readable(keys), subkeys, d_scores, score_slope(cfg, at.ranks)), loss


def write_keys(
    cfg: FwPKMConfig,
    query: Array,
    keys: Array,
    at: Address,
    subkeys: Array,
    counted: Array,
    active: Array,
    moves: Array | None,
) -> tuple[Array, Array, Array]:
    """Move the keys down the addressing loss; those that would not be finite keep their bits (§4).

    Args:
        cfg: the configuration.
        query: ``[M, H, 2, R, d]``.
        keys: ``[M, H, 2, S, d]``.
        at: scores of what the tokens of the chunk picked in these keys.
        subkeys: ``[M, H, 2, R, k]`` ids of what they picked.
        counted: ``[M, R]``, 1 over the number of the chunk's unmasked tokens for each of them, 0 for others.
        active: ``[M]``, the memories to write.
        moves: ``[M, H, 2, S, 1]``, the sub-keys that move, where that is known.

    Returns:
        the new keys, which of them moved, and the loss ``[M]`` of each memory, written or not.
    """
    gradient, loss = key_gradient(cfg, query, keys, at, subkeys, counted)
    new = step(jnp, cfg, keys, gradient)
    if moves is None:
        moves = active[:, None, None, None, None] & finite_rows(new)[..., None]
    return jnp.where(moves, new, keys), moves, loss


def _readable(keys: Array) -> Array:
    """Keys with 0 for numbers that are not finite: only dead tokens have selected those, and 0 times one is NaN."""
    return jnp.where(jnp.isfinite(keys), keys, 0)


# --- Searching the codebooks ---


def _select_subkeys(cfg: FwPKMConfig, query: Array, keys: Array) -> tuple[Array, Array]:
    """The k best sub-keys of each codebook, best first, ties to the lower id: ranks and ids ``[M, H, 2, R, k]``.

    A product of matrices proposes k sub-keys, and only theirs are computed from differences. Where the worst of them
    does not beat the next proposal by more than the product's rounding error, all S are ranked from differences. So the
    selection has the quality of differences near a key. Queries must be finite.
    """
    shape = (*query.shape[:-1], cfg.top_k)
    query, keys = (x.reshape(-1, *x.shape[-2:]) for x in (query, keys))
    if cfg.num_subkeys <= _FEW or query.shape[1] <= _BLOCK:
        ranks, ids = top_k(_ranks(cfg, query[:, :, None], keys[:, None]), cfg.top_k)
    else:
        ranks, ids = _proposed(cfg, query, keys)
    return ranks.reshape(shape), ids.reshape(shape)


def _proposed(cfg: FwPKMConfig, query: Array, keys: Array) -> tuple[Array, Array]:
    """``_select_subkeys`` among many, for query [G, R, d] and keys [G, S, d]."""
    k, tokens = cfg.top_k, query.shape[1]
    rough, origin, scale = _rough_ranks(cfg, query, keys)
    best, ids = top_k(rough, min(k + 1, cfg.num_subkeys))
    next_best, ids = best[..., k:] - origin, ids[..., :k]
    ranks = _ranks_at(cfg, query, keys, ids)
    ranks = jnp.where(jnp.isnan(ranks), jnp.inf, ranks)
    if k < cfg.num_subkeys:
        error = jnp.abs(best[..., :k] - origin - ranks).max(-1, keepdims=True) / scale
        error = jnp.nan_to_num(error, nan=0, posinf=0).max()
        margin = scale * jnp.maximum(4 * error, _MARGIN * jnp.finfo(keys.dtype).eps / 2)
        unsure = ~(ranks.min(-1, keepdims=True) > next_best + margin)[..., 0]

        flat_query = query.reshape(-1, query.shape[-1])

        def in_full(found: Any) -> Any:
            """Rank all S sub-keys from differences for a few tokens that are unsure, and find the next ones."""
            flags, at, unsure, ranks, ids = found
            better = top_k(_ranks(cfg, gather(flat_query, at)[:, None], gather(keys, at // tokens)), k)
            at = jnp.where(flags > 0, at, unsure.size)  # those that are sure keep their bits: dropped
            new = jnp.zeros_like(flags), *better
            unsure, ranks, ids = (put(x, at, y, mode="drop") for x, y in zip((unsure, ranks, ids), new))
            return *top_k(unsure, _BLOCK), unsure, ranks, ids

        # top_k finds them, as nonzero and any would compile ten times as long.
        flat = unsure.astype(jnp.float32).ravel(), ranks.reshape(-1, k), ids.reshape(-1, k)
        *_, ranks, ids = lax.while_loop(lambda found: found[0][0] > 0, in_full, (*top_k(flat[0], _BLOCK), *flat))
    negated, ids = lax.sort((-ranks.reshape(*query.shape[:2], k), ids.reshape(*query.shape[:2], k)), num_keys=2)
    return -negated, ids


def _as_table(query: Array, keys: Array, ids: Array) -> tuple[Array, Array, Array]:
    """Keys as one table of rows, the rows of each token's sub-keys, and the tokens."""
    rows, tokens = (x.reshape(-1, x.shape[-1]) for x in (keys, query))
    return rows, _row_index(ids, keys.shape[-2]).reshape(len(tokens), -1), tokens


def _row_index(ids: Array, size: int) -> Array:
    """``[..., R, k]`` ids among ``size`` rows of each group as ids among the rows of all groups."""
    groups = ids.shape[:-2]
    first = size * jnp.arange(int(np.prod(groups)), dtype=ids.dtype)
    return ids + first.reshape(*groups, 1, 1)


@cache
def _grid(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells (i, j) of the k × k sums that can be among the k largest, in order of position.

    Both axes descend, so (i+1)(j+1) - 1 cells are at least as large as (i, j) and come before it.
    """
    cells = [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]
    return np.array([i for i, _ in cells], np.int32), np.array([j for _, j in cells], np.int32)
