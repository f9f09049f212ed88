"""SPEC.md §2 to §4 for one memory in NumPy, one small function an equation; to be read beside that page.

Shapes speak of the n tokens that read one memory: query [n, H, 2, Dk/2], keys [H, 2, S, Dk/2], values [N, Dv].
Nothing here is shared with a backend, or agreement would prove nothing.
"""

from typing import NamedTuple

import numpy as np

from fwpkm.config import FwPKMConfig

Array = np.ndarray
REFERENCE = "the NumPy reference"


class Selection(NamedTuple):
    """What n tokens chose, and how much they trust it."""

    subkeys: Array
    """``[n, H, 2, k]`` ids of the selected sub-keys, best first."""
    sub_scores: Array
    """``[n, H, 2, k]`` their scores."""
    slots: Array
    """``[n, H*k]`` by head, then by descending sum."""
    weights: Array
    """``[n, H*k]``"""
    finite: Array
    """``[n]`` whether the query and every selected score are finite."""


# --- §2 Lookup ---


def sub_scores(cfg: FwPKMConfig, query: Array, keys: Array) -> Array:
    """s = -log(ε + |q - K|²) or q·K: query [n, d], keys [S, d] -> [n, S]."""
    if cfg.score == "dot_product":  # no product of matrices, which rounds by column: equal sub-keys tie
        return np.stack([(query * key).sum(-1) for key in keys], axis=-1)
    if cfg.score == "idw":
        squared_distance = np.stack([np.square(query - key).sum(-1) for key in keys], axis=-1)
        return -np.log(query.dtype.type(cfg.score_eps) + squared_distance)
    return cfg.refuse("score", REFERENCE)


def top_k(scores: Array, k: int) -> Array:
    """Positions of the k largest of the last axis, best first; NaN is the largest, ties go to the lower position."""
    return np.argsort(np.where(np.isnan(scores), -np.inf, -scores), axis=-1, kind="stable")[..., :k]


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def select_slots(cfg: FwPKMConfig, query: Array, keys: Array) -> Selection:
    """Top-k of both codebooks, top-k of the k² sums, one softmax across all heads."""
    n, k = len(query), cfg.top_k
    finite = np.isfinite(query).all((1, 2, 3))
    query = np.where(finite[:, None, None, None], query, 0)
    subkeys = np.empty((n, cfg.num_heads, 2, k), np.int64)
    chosen = np.empty((n, cfg.num_heads, 2, k), query.dtype)
    slots = np.empty((n, cfg.num_heads, k), np.int64)
    sums = np.empty((n, cfg.num_heads, k), query.dtype)
    for h in range(cfg.num_heads):
        for codebook in (0, 1):
            scores = sub_scores(cfg, query[:, h, codebook], keys[h, codebook])
            subkeys[:, h, codebook] = top_k(scores, k)
            chosen[:, h, codebook] = np.take_along_axis(scores, subkeys[:, h, codebook], -1)
        grid = (chosen[:, h, 0, :, None] + chosen[:, h, 1, None, :]).reshape(n, k * k)
        cell = top_k(grid, k)
        sums[:, h] = np.take_along_axis(grid, cell, -1)
        first = np.take_along_axis(subkeys[:, h, 0], cell // k, -1)
        second = np.take_along_axis(subkeys[:, h, 1], cell % k, -1)
        slots[:, h] = first * cfg.num_subkeys + second
    logits = sums.reshape(n, cfg.slots_per_token) / query.dtype.type(cfg.temperature)
    finite = finite & np.isfinite(chosen).all((1, 2, 3)) & np.isfinite(logits).all(1)
    return Selection(subkeys, chosen, slots.reshape(n, cfg.slots_per_token), softmax(logits), finite)


def read(values: Array, slots: Array, weights: Array) -> Array:
    """v̂ = Σ w · values[slot]: [n, Dv]."""
    return np.einsum("ne,ned->nd", weights, values[slots])


# --- §3 Losses ---


def ahead(cfg: FwPKMConfig, x: Array) -> Array:
    """x at t + L, the time axis being the second; zeros where that has not arrived."""
    shifted = np.zeros_like(x)
    shifted[:, : max(0, x.shape[1] - cfg.lookahead)] = x[:, cfg.lookahead :]
    return shifted


def pairs(cfg: FwPKMConfig, counted: Array, live: Array) -> Array:
    """Which counted tokens of a window [B, n] have a pair: their partner, L tokens later, is live."""
    return counted & ahead(cfg, live)


def memorization_loss(error: Array, gate: Array, pair: Array) -> Array:
    """L_mem = Σ over tokens with a pair of ½ g |u - v̂|², error = v̂ - u [n, Dv]."""
    return (0.5 * gate[pair] * np.square(error[pair]).sum(-1)).sum()


def sub_key_probabilities(chosen_scores: Array) -> Array:
    """p over the k selected sub-scores of each head and codebook, no temperature: [n, H, 2, k]."""
    return softmax(chosen_scores)


def mean_probabilities(cfg: FwPKMConfig, p: Array, subkeys: Array, counted: Array) -> Array:
    """p̄ [H, 2, S], the mean of p over the chunk's unmasked tokens."""
    mean = np.zeros((cfg.num_heads, 2, cfg.num_subkeys), p.dtype)
    h, codebook = np.ogrid[: cfg.num_heads, :2]
    np.add.at(mean, (h[..., None], codebook[..., None], subkeys[counted]), p[counted])
    return mean / max(1, counted.sum())


def addressing_loss(mean: Array) -> Array:
    """L_addr = Σ p̄ log(p̄ + 1e-8) over heads, codebooks and sub-keys."""
    return (mean * np.log(mean + mean.dtype.type(1e-8))).sum()


# --- §4 Chunk update ---


def write_scale(cfg: FwPKMConfig, weights: Array) -> Array:
    """κ of each token: [n]."""
    if cfg.write_scale == "slots":
        return np.full(len(weights), cfg.slots_per_token, weights.dtype)
    if cfg.write_scale == "unit":
        return np.ones(len(weights), weights.dtype)
    if cfg.write_scale == "normalized":
        return 1 / np.square(weights).sum(-1)
    return cfg.refuse("write_scale", REFERENCE)


def value_gradient(
    cfg: FwPKMConfig, selection: Selection, error: Array, gate: Array, pair: Array, counted: Array
) -> tuple[Array, Array, Array]:
    """The slots with N_i > 0 [r], these N_i [r] and G_i = (1/N_i) Σ κ w g (v̂ - u) [r, Dv]."""
    strength = np.where(pair, write_scale(cfg, selection.weights) * gate, 0)
    flat = selection.slots[counted].ravel()
    order = np.argsort(flat, kind="stable")
    touched, first, reads = np.unique(flat[order], return_index=True, return_counts=True)
    coefficient = (strength[:, None] * selection.weights)[counted].ravel()[order]
    token = np.repeat(np.flatnonzero(counted), cfg.slots_per_token)[order]
    # A token without a pair contributes nothing, even where its own error would overflow.
    terms = coefficient[:, None] * np.where(pair[:, None], error, 0)[token]
    reads = reads.astype(terms.dtype)
    return touched, reads, np.add.reduceat(terms, first, axis=0) / reads[:, None]


def key_gradient(cfg: FwPKMConfig, keys: Array, query: Array, selection: Selection, counted: Array) -> Array:
    """∇_keys L_addr [H, 2, S, Dk/2], the closed form of §4."""
    p = sub_key_probabilities(selection.sub_scores)
    mean = mean_probabilities(cfg, p, selection.subkeys, counted)
    eps = mean.dtype.type(1e-8)
    slope = np.log(mean + eps) + mean / (mean + eps)
    h, codebook = np.ogrid[: cfg.num_heads, :2]
    where = (h[..., None], codebook[..., None], selection.subkeys[counted])
    p, a = p[counted], slope[where]
    d_score = p / counted.sum() * (a - (p * a).sum(-1, keepdims=True))
    gradient = np.zeros_like(keys)
    np.add.at(gradient, where, d_score[..., None] * score_gradient(cfg, query[counted][..., None, :], keys[where]))
    return gradient


def score_gradient(cfg: FwPKMConfig, query: Array, keys: Array) -> Array:
    """∂s/∂K of chosen sub-keys, over the last axis: 2(q - K)/(ε + |q - K|²), or q."""
    if cfg.score == "dot_product":
        return np.broadcast_to(query, keys.shape)
    if cfg.score == "idw":
        difference = query - keys
        squared_distance = np.square(difference).sum(-1, keepdims=True)
        return 2 * difference / (keys.dtype.type(cfg.score_eps) + squared_distance)
    return cfg.refuse("score", REFERENCE)


def learning_rates(cfg: FwPKMConfig, reads: Array, uses: Array) -> Array:
    """η_i = η N_i / (N_i + β U_i) of slots with N_i = ``reads`` > 0 and U_i = ``uses``: [r]."""
    return uses.dtype.type(cfg.learning_rate) * reads / (reads + uses.dtype.type(cfg.usage_weight) * uses)


def step(cfg: FwPKMConfig, rows: Array, gradient: Array, rates: Array | None = None) -> Array:
    """rows - η (clip(gradient) + λ rows), η_i = ``rates`` [r] where given; a row that would not be finite stays."""
    if cfg.grad_clip is not None:
        gradient = np.clip(gradient, -cfg.grad_clip, cfg.grad_clip)
    rate = rows.dtype.type(cfg.learning_rate) if rates is None else rates[:, None]
    new = rows - rate * (gradient + rows.dtype.type(cfg.weight_decay) * rows)
    return np.where(np.isfinite(new).all(-1, keepdims=True), new, rows)
