"""SPEC.md §2, the addressing loss of §3 and the keys of §4: which slots a query picks, and how the keys move.

M memories, R tokens a memory, d = Dk/2: query [M, H, 2, R, d], keys [M, H, 2, S, d].
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from keras import ops

from fwpkm.backends.keras.tokens import NAME, ChunkFlags, blank, outer
from fwpkm.config import FwPKMConfig
from fwpkm.rules import addressing_loss, addressing_slope, step
from fwpkm.tokens import Array

_REGISTER = 64
"""At least the numbers that a processor computes at a time."""


class Selection(NamedTuple):
    """What R tokens of each memory picked. Tokens that are not finite have query and sub-keys of zero."""

    query: Array
    """``[M, H, 2, R, 1, d]``"""
    subkeys: Array
    """``[M, H, 2, R, k, d]`` the selected sub-keys, best first."""
    row_index: Array
    """``[M, H, 2, R, k]`` where they stand, as rows of all keys ``[M*H*2*S, d]``."""
    sub_scores: Array
    """``[M, H, 2, R, k]`` their scores."""
    slots: Array
    """``[M, R, H*k]`` by head, then by descending sum."""
    weights: Array
    """``[M, R, H*k]``"""
    finite: Array
    """``[M, R]`` whether the query and all its selected scores are finite."""


def sub_scores(cfg: FwPKMConfig, query: Array, keys: Array) -> Array:
    """s = -log(ε + ‖q - K‖²) or q·K, over the last axis (§2)."""
    if cfg.score == "dot_product":
        return ops.sum(query * keys, axis=-1)
    if cfg.score == "idw":
        return -_evenly(ops.log, cfg.score_eps + ops.sum(ops.square(query - keys), axis=-1))
    return cfg.refuse("score", NAME)


def score_gradient(cfg: FwPKMConfig, query: Array, keys: Array) -> Array:
    """∂s/∂K over the last axis: 2(q - K)/(ε + ‖q - K‖²), or q (§4)."""
    if cfg.score == "dot_product":
        return query
    if cfg.score == "idw":
        difference = query - keys
        return 2 * difference / (cfg.score_eps + ops.sum(ops.square(difference), axis=-1, keepdims=True))
    return cfg.refuse("score", NAME)


def top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """The k largest of the last axis, best first, and their positions; ties go to the lower one.

    NaN is the largest (§2), and comes back as inf, since Keras' own has no order for it.
    """
    return ops.top_k(ops.where(ops.isnan(scores), ops.cast(float("inf"), scores.dtype), scores), k)


def select_slots(cfg: FwPKMConfig, query: Array, keys: Array) -> Selection:
    """Top-k of both codebooks, top-k of the k² sums, one softmax across all heads (§2).

    Integers are chosen first, without gradients. Then the chosen sub-keys are scored anew, for autodiff: tokens that
    are not finite are blanked before it meets them, since a gradient of 0 through an infinity is NaN.
    """
    k = cfg.top_k
    finite = ops.all(ops.isfinite(ops.stop_gradient(query)), axis=(1, 2, 4))
    query = _blank_tokens(query, finite)
    ranks, chosen = top_k(_ranks(cfg, ops.stop_gradient(query), ops.stop_gradient(keys)), k)
    constant = _scores_of_ranks(cfg, ranks)
    grid = constant[:, :, 0, :, :, None] + constant[:, :, 1, :, None, :]
    sums, cells = top_k(ops.reshape(grid, (*ops.shape(grid)[:-2], k * k)), k)
    finite &= ops.all(ops.isfinite(constant), axis=(1, 2, 4))
    finite &= ops.all(ops.isfinite(sums / cfg.temperature), axis=(1, 3))

    codebooks = ops.arange(ops.shape(keys)[0] * cfg.num_heads * 2, dtype=chosen.dtype)
    row_index = chosen + ops.reshape(codebooks * cfg.num_subkeys, (-1, cfg.num_heads, 2, 1, 1))
    subkeys = _blank_tokens(ops.take(_rows(keys), row_index, axis=0), finite)
    query = _blank_tokens(query[..., None, :], finite)
    scores, first, second = sub_scores(cfg, query, subkeys), cells // k, cells % k
    sums = _pick(scores[:, :, 0], first) + _pick(scores[:, :, 1], second)
    slots = _pick(chosen[:, :, 0], first) * cfg.num_subkeys + _pick(chosen[:, :, 1], second)
    weights = _softmax(_by_token(sums) / cfg.temperature)
    return Selection(query, subkeys, row_index, scores, _by_token(slots), weights, finite)


def sub_key_probabilities(chosen_scores: Array) -> Array:
    """p over the k selected sub-scores of each head and codebook, no temperature (§3): ``[M, H, 2, R, k]``."""
    return _softmax(chosen_scores)


def mean_probabilities(keys: Array, p: Array, row_index: Array, fraction: Array) -> Array:
    """p̄ ``[M*H*2*S]``, the mean of p over the chunk's unmasked tokens (§3).

    ``fraction`` ``[M, 1, 1, R, 1]`` is what each token is of its chunk: 1/n, 0 where it does not count.
    """
    return ops.segment_sum(ops.reshape(fraction * p, (-1,)), ops.reshape(row_index, (-1,)), ops.shape(_rows(keys))[0])


def key_gradient(cfg: FwPKMConfig, keys: Array, selection: Selection, p: Array, mean: Array, fraction: Array) -> Array:
    """∇_keys L_addr ``[M, H, 2, S, d]``, the closed form of §4."""
    slope = ops.take(_evenly(partial(addressing_slope, ops), mean), selection.row_index, axis=0)
    d_score = fraction * p * (slope - ops.sum(p * slope, axis=-1, keepdims=True))
    d_rows = d_score[..., None] * score_gradient(cfg, selection.query, selection.subkeys)
    flat, entries = ops.reshape(d_rows, (-1, keys.shape[-1])), ops.reshape(selection.row_index, (-1,))
    return ops.reshape(ops.segment_sum(flat, entries, ops.shape(_rows(keys))[0]), (-1, *keys.shape[1:]))


def write_keys(cfg: FwPKMConfig, keys: Array, selection: Selection, flags: ChunkFlags) -> tuple[Array, Array]:
    """Move the keys ``[M, H, 2, S, d]`` down the addressing loss ``[M]`` of a chunk (§3, §4); returns both."""
    p = sub_key_probabilities(selection.sub_scores)
    counted, active = ops.cast(flags.counted, p.dtype), flags.active
    fraction = (counted / ops.maximum(ops.sum(counted, axis=-1, keepdims=True), 1))[:, None, None, :, None]
    mean = mean_probabilities(keys, p, selection.row_index, fraction)
    terms = ops.reshape(addressing_loss(ops, mean), (ops.shape(keys)[0], -1))
    new = step(ops, cfg, keys, cfg.addressing_weight * key_gradient(cfg, keys, selection, p, mean, fraction))
    moves = outer(active, keys) & ops.all(ops.isfinite(new), axis=-1, keepdims=True)
    return ops.where(moves, new, keys), ops.sum(terms, axis=-1) * ops.cast(active, p.dtype)


def _ranks(cfg: FwPKMConfig, query: Array, keys: Array) -> Array:
    """``[M, H, 2, R, S]``: q·K, or -‖q - K‖², which orders as the score does; no gradient is asked for.

    One feature at a time: no ``[R, S, d]`` is formed, equal keys tie exactly, and near a key nothing cancels, as it
    would in ‖q‖² + ‖K‖² - 2q·K.
    """

    def add(feature: Array, total: Array) -> Array:
        q, key = ops.take(query, feature, axis=-1)[..., :, None], ops.take(keys, feature, axis=-1)[..., None, :]
        if cfg.score == "dot_product":
            return total + q * key
        if cfg.score == "idw":
            return total - ops.square(q - key)
        return cfg.refuse("score", NAME)

    nothing = ops.zeros_like(query[..., :1]) + ops.zeros_like(keys[..., None, :, 0])
    return ops.fori_loop(0, cfg.key_dim // 2, add, nothing)


def _scores_of_ranks(cfg: FwPKMConfig, ranks: Array) -> Array:
    """The sub-scores that ranks stand for; equal where they are."""
    if cfg.score == "dot_product":
        return ranks
    if cfg.score == "idw":
        return -_evenly(ops.log, cfg.score_eps - ranks)
    return cfg.refuse("score", NAME)


def _evenly(function: Callable[[Array], Array], x: Array) -> Array:
    """A function of each number, equal where they are; tensorflow rounds the last few of an array otherwise."""
    padded = ops.pad(ops.reshape(x, (-1,)), (0, _REGISTER), constant_values=1)
    return ops.reshape(function(padded)[:-_REGISTER], ops.shape(x))


def _blank_tokens(x: Array, finite: Array) -> Array:
    """``[M, H, 2, R, ...]`` with zeros where ``finite`` [M, R] is not."""
    return blank(x, ~finite[:, None, None])


def _softmax(scores: Array) -> Array:
    """Over the last axis; Keras' own warns of an axis of length 1, which is what k = 1 makes.

    Not exp(s - log Σ exp s): large scores leave few digits to a logarithm, and the weights would not sum to 1.
    """
    parts = _evenly(ops.exp, scores - ops.stop_gradient(ops.max(scores, axis=-1, keepdims=True)))
    return parts / ops.sum(parts, axis=-1, keepdims=True)


def _pick(x: Array, index: Array) -> Array:
    """``x[..., index]`` over the last axis; XLA cannot differentiate take_along_axis where a size is unknown."""
    return ops.sum(ops.one_hot(index, x.shape[-1], dtype=x.dtype) * x[..., None, :], axis=-1)


def _by_token(x: Array) -> Array:
    """``[M, H, R, k] -> [M, R, H*k]``."""
    turned = ops.transpose(x, (0, 2, 1, 3))
    return ops.reshape(turned, (*ops.shape(turned)[:2], x.shape[1] * x.shape[3]))


def _rows(keys: Array) -> Array:
    """``[M*H*2*S, d]``."""
    return ops.reshape(keys, (-1, keys.shape[-1]))
