"""SPEC.md §2 and the key half of §4: which slots a query picks, and how the keys move.

M memories, R tokens a memory, d = Dk/2: query [M, H, 2, R, d], keys [M, H, 2, S, d].
"""

from typing import NamedTuple

from keras import ops

from fwpkm.backends.keras.tokens import blank, outer
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Array


class Address(NamedTuple):
    """What R tokens of each memory picked."""

    place: Array
    """``[M, H, 2, R, k]`` the chosen sub-keys, best first, as rows of all keys ``[M*H*2*S, d]``."""
    scores: Array
    """``[M, H, 2, R, k]`` their scores."""
    pull: Array
    """``[M, H, 2, R, k, d]``: ∂s/∂K (§4)."""
    slots: Array
    """``[M, R, H*k]`` by head, then by descending sum."""
    weights: Array
    """``[M, R, H*k]``"""
    finite: Array
    """``[M, R]`` whether the query and all its selected scores are finite."""


def address(cfg: FwPKMConfig, query: Array, keys: Array) -> Address:
    """Pick slots and weigh them (§2). Tokens that are not finite come back as if all their scores were equal."""
    k = cfg.top_k
    finite = ops.all(ops.isfinite(ops.stop_gradient(query)), axis=(1, 2, 4))
    query = _blank_tokens(query, finite)
    ranks, subkeys = ops.top_k(_ranks(cfg, ops.stop_gradient(query), ops.stop_gradient(keys)), k)
    rough = ranks if cfg.score == "dot_product" else -ops.log(cfg.score_eps - ranks)
    grid = rough[:, :, 0, :, :, None] + rough[:, :, 1, :, None, :]
    sums, cells = ops.top_k(ops.reshape(grid, (*ops.shape(grid)[:-2], k * k)), k)
    finite &= ops.all(ops.isfinite(rough), axis=(1, 2, 4)) & ops.all(ops.isfinite(sums / cfg.temperature), axis=(1, 3))

    groups = ops.arange(ops.shape(keys)[0] * cfg.num_heads * 2, dtype=subkeys.dtype)
    place = subkeys + ops.reshape(groups * cfg.num_subkeys, (-1, cfg.num_heads, 2, 1, 1))
    scores, pull = _scores(cfg, query, ops.take(_rows(keys), place, axis=0), finite)
    first, second = cells // k, cells % k
    sums = _pick(scores[:, :, 0], first) + _pick(scores[:, :, 1], second)
    slots = _pick(subkeys[:, :, 0], first) * cfg.num_subkeys + _pick(subkeys[:, :, 1], second)
    weights = _softmax(_by_token(sums) / cfg.temperature)
    return Address(place, scores, pull, _by_token(slots), weights, finite)


def write_keys(cfg: FwPKMConfig, keys: Array, chosen: Address, counted: Array, active: Array) -> tuple[Array, Array]:
    """Move the keys down the addressing loss (§3, §4).

    Args:
        cfg: the configuration.
        keys: ``[M, H, 2, S, d]``.
        chosen: what the tokens of the chunk picked in these keys.
        counted: ``[M, R]``, the chunk's unmasked tokens.
        active: ``[M]``, the memories in which the chunk has a pair.

    Returns:
        the new keys, and the loss ``[M]``.
    """
    flat, rows = ops.reshape(chosen.place, (-1,)), ops.shape(_rows(keys))[0]
    p = _softmax(chosen.scores)
    counted = ops.cast(counted, p.dtype)
    share = (counted / ops.maximum(ops.sum(counted, axis=-1, keepdims=True), 1))[:, None, None, :, None] * p
    mean = ops.segment_sum(ops.reshape(share, (-1,)), flat, rows)
    log = ops.log(mean + 1e-8)
    loss = ops.sum(ops.reshape(mean * log, (ops.shape(keys)[0], -1)), axis=-1) * ops.cast(active, p.dtype)
    slope = ops.take(log + mean / (mean + 1e-8), chosen.place, axis=0)
    d_score = cfg.addressing_weight * share * (slope - ops.sum(p * slope, axis=-1, keepdims=True))
    pulls = ops.reshape(d_score[..., None] * chosen.pull, (-1, keys.shape[-1]))
    gradient = ops.reshape(ops.segment_sum(pulls, flat, rows), (-1, *keys.shape[1:]))
    if cfg.grad_clip is not None:
        gradient = ops.clip(gradient, -cfg.grad_clip, cfg.grad_clip)
    new = keys - cfg.learning_rate * (gradient + cfg.weight_decay * keys)
    moves = outer(active, keys) & ops.all(ops.isfinite(new), axis=-1, keepdims=True)
    return ops.where(moves, new, keys), loss


def _ranks(cfg: FwPKMConfig, query: Array, keys: Array) -> Array:
    """``[M, H, 2, R, S]``: q·K, or -‖q - K‖², which orders as the score does; no gradient is asked for.

    One feature at a time: no ``[R, S, d]`` is formed, equal keys tie exactly, and near a key nothing cancels, as it
    would in ‖q‖² + ‖K‖² - 2q·K.
    """

    def add(feature: Array, total: Array) -> Array:
        q, key = ops.take(query, feature, axis=-1)[..., :, None], ops.take(keys, feature, axis=-1)[..., None, :]
        return total + q * key if cfg.score == "dot_product" else total - ops.square(q - key)

    ranks = ops.fori_loop(0, cfg.key_dim // 2, add, query[..., :1] * 0 + keys[..., None, :, 0] * 0)
    return ops.where(ops.isnan(ranks), ops.cast(-float("inf"), ranks.dtype), ranks)  # top_k has no order for NaN


def _scores(cfg: FwPKMConfig, query: Array, near: Array, finite: Array) -> tuple[Array, Array]:
    """Scores ``[M, H, 2, R, k]`` of the chosen sub-keys ``near`` [M, H, 2, R, k, d], and ∂s/∂K.

    Tokens that are not finite are blanked before they meet autodiff: a gradient of 0 through an infinity is NaN.
    """
    if cfg.score == "dot_product":
        toward = _blank_tokens(query[..., None, :] + ops.zeros_like(near), finite)
        return ops.sum(toward * near, axis=-1), toward
    difference = _blank_tokens(query[..., None, :] - near, finite)
    distance = cfg.score_eps + ops.sum(ops.square(difference), axis=-1)
    return -ops.log(distance), 2 * difference / distance[..., None]


def _blank_tokens(x: Array, finite: Array) -> Array:
    """``[M, H, 2, R, ...]`` with zeros where ``finite`` [M, R] is not."""
    shape = (ops.shape(x)[0], 1, 1, ops.shape(x)[3])
    return blank(x, ops.reshape(~finite, shape))


def _softmax(scores: Array) -> Array:
    """Over the last axis; Keras' own warns of an axis of length 1, which is what k = 1 makes."""
    return ops.exp(scores - ops.logsumexp(scores, axis=-1, keepdims=True))


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
