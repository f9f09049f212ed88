"""Scores of chosen sub-keys and the pull that they exert on the keys, with backwards that form no ``[T, k, d]``.

Both work on differences q - K. Sums of weighted differences, Σ c (q - K) = (Σ c) q - Σ c K, are taken in float64, where
the subtraction of two nearly equal float32 vectors loses nothing that they had.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fwpkm.backends.torch.entries import Entries
from fwpkm.config import FwPKMConfig


def sub_scores(cfg: FwPKMConfig, query: Tensor, keys: Tensor, entries: Entries, ranks: Tensor) -> Tensor:
    """The scores of SPEC.md §2 from ranks that were computed already: query [T, d], keys [P, d], ranks [T, k]."""
    if cfg.score == "dot_product":
        return _Product.apply(query, keys, ranks, *entries)
    return -torch.log(cfg.score_eps + _SquaredDistance.apply(query, keys, ranks.neg(), *entries))


def pull(cfg: FwPKMConfig, query: Tensor, keys: Tensor, entries: Entries, scores: Tensor, d_scores: Tensor) -> Tensor:
    """``[P, d]``: Σ over a sub-key's entries of d_score · ∂s/∂K (§4): 2(q - K)/(ε + ‖q - K‖²), or q."""
    if cfg.score == "dot_product":
        return _Pull.apply(query, keys, d_scores, False, *entries)
    return _Pull.apply(query, keys, 2 * d_scores * scores.exp(), True, *entries)  # e^s = 1/(ε + ‖q - K‖²)


def _differences_by_token(query: Tensor, keys: Tensor, entries: Entries, weights: Tensor) -> Tensor:
    """``[T, d]``: Σ over a token's entries of weight · (q - K)."""
    weights = weights.double()
    return (weights.sum(1, keepdim=True) * query - entries.read(keys.double(), weights)).to(query.dtype)


def _differences_by_key(query: Tensor, keys: Tensor, entries: Entries, weights: Tensor) -> Tensor:
    """``[P, d]``: Σ over a sub-key's entries of weight · (q - K)."""
    weights = weights.double()
    return (entries.spread(query.double(), weights) - entries.total(weights)[:, None] * keys).to(keys.dtype)


class _SquaredDistance(torch.autograd.Function):
    """‖q - K‖² of each entry [T, k]."""

    @staticmethod
    def forward(ctx, query, keys, distance, place, order, starts):
        ctx.save_for_backward(query, keys, place, order, starts)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, keys, *entries = ctx.saved_tensors
        entries = Entries(*entries)
        by_token = _differences_by_token(query, keys, entries, 2 * gradient) if ctx.needs_input_grad[0] else None
        by_key = _differences_by_key(query, keys, entries, -2 * gradient) if ctx.needs_input_grad[1] else None
        return by_token, by_key, None, None, None, None


class _Product(torch.autograd.Function):
    """q·K of each entry [T, k]."""

    @staticmethod
    def forward(ctx, query, keys, product, place, order, starts):
        ctx.save_for_backward(query, keys, place, order, starts)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, keys, *entries = ctx.saved_tensors
        entries = Entries(*entries)
        by_token = entries.read(keys, gradient) if ctx.needs_input_grad[0] else None
        by_key = entries.spread(query, gradient) if ctx.needs_input_grad[1] else None
        return by_token, by_key, None, None, None, None


class _Pull(torch.autograd.Function):
    """``[P, d]``: Σ over a sub-key's entries of weight · (q - K), or of weight · q."""

    @staticmethod
    def forward(ctx, query, keys, weights, differences, place, order, starts):
        ctx.save_for_backward(query, keys, weights, place, order, starts)
        ctx.differences = differences
        entries = Entries(place, order, starts)
        return (_differences_by_key if differences else _tokens_by_key)(query, keys, entries, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, keys, weights, *entries = ctx.saved_tensors
        entries = Entries(*entries)
        # ⟨gradient of a sub-key, q - K⟩ entry by entry, so that no ⟨·, q⟩ - ⟨·, K⟩ cancels.
        d_weights = []
        for place in entries.place.unbind(1):
            toward = query - keys.index_select(0, place) if ctx.differences else query
            d_weights.append((gradient.index_select(0, place) * toward).sum(-1))
        d_keys = -entries.total(weights)[:, None] * gradient if ctx.differences else None
        return entries.read(gradient, weights), d_keys, torch.stack(d_weights, dim=1), None, None, None, None


def _tokens_by_key(query: Tensor, keys: Tensor, entries: Entries, weights: Tensor) -> Tensor:
    return entries.spread(query, weights)
