"""Scores of chosen sub-keys and the pull that they exert on the keys, with backwards of a few fused sums.

Everything is a sum of weighted differences q - K, which are formed once: Σ c q - (Σ c) K would lose all accuracy near a
key. T tokens choose k of P sub-keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fwpkm.backends.torch.entries import Entries
from fwpkm.config import FwPKMConfig


class ChosenKeys(NamedTuple):
    """The sub-keys that each token chose."""

    entries: Entries
    """which rows of the keys ``[P, d]``."""
    ranks: Tensor
    """``[T, k]``: q·K, or -‖q - K‖²."""
    differences: Tensor | None
    """``[T, k, d]``: q - K, or None for the dot product."""


def sub_scores(cfg: FwPKMConfig, query: Tensor, keys: Tensor, chosen: ChosenKeys) -> Tensor:
    """The scores of SPEC.md §2 ``[T, k]``, for query [T, d] and keys [P, d], from ranks that were computed already."""
    if chosen.differences is None:
        return _Product.apply(query, keys, chosen.ranks, *chosen.entries)
    distance = _SquaredDistance.apply(query, keys, chosen.ranks.neg(), chosen.differences, *chosen.entries)
    return -torch.log(cfg.score_eps + distance)


def pull(cfg: FwPKMConfig, query: Tensor, keys: Tensor, chosen: ChosenKeys, scores: Tensor, d_scores: Tensor) -> Tensor:
    """``[P, d]``: Σ over a sub-key's entries of d_score · ∂s/∂K (§4): 2(q - K)/(ε + ‖q - K‖²), or q."""
    if chosen.differences is None:
        return _Spread.apply(query, d_scores, *chosen.entries)
    # e^s = 1/(ε + ‖q - K‖²)
    return _Pull.apply(query, keys, 2 * d_scores * scores.exp(), chosen.differences, *chosen.entries)


class _SquaredDistance(torch.autograd.Function):
    """‖q - K‖² of each entry [T, k]."""

    @staticmethod
    def forward(ctx, query, keys, distance, differences, *entries):
        ctx.save_for_backward(differences, *entries)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        differences, *entries = ctx.saved_tensors
        entries, vectors = Entries(*entries), differences.flatten(0, 1)
        d_query = entries.by_token(vectors, 2 * gradient) if ctx.needs_input_grad[0] else None
        d_keys = entries.by_row(vectors, -2 * gradient) if ctx.needs_input_grad[1] else None
        return d_query, d_keys, *[None] * 5


class _Product(torch.autograd.Function):
    """q·K of each entry [T, k]."""

    @staticmethod
    def forward(ctx, query, keys, product, *entries):
        ctx.save_for_backward(query, keys, *entries)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, keys, *entries = ctx.saved_tensors
        entries = Entries(*entries)
        d_query = entries.read(keys, gradient) if ctx.needs_input_grad[0] else None
        d_keys = entries.spread(query, gradient) if ctx.needs_input_grad[1] else None
        return d_query, d_keys, *[None] * 4


class _Pull(torch.autograd.Function):
    """``[P, d]``: Σ over a sub-key's entries of weight · (q - K)."""

    @staticmethod
    def forward(ctx, query, keys, weights, differences, *entries):
        ctx.save_for_backward(weights, differences, *entries)
        return Entries(*entries).by_row(differences.flatten(0, 1), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        weights, differences, *entries = ctx.saved_tensors
        entries = Entries(*entries)
        columns = zip(entries.place.unbind(1), differences.unbind(1))
        d_weights = [gradient.index_select(0, place).mul_(toward).sum(-1) for place, toward in columns]
        d_query = entries.read(gradient, weights)
        d_keys = -entries.total(weights)[:, None] * gradient if ctx.needs_input_grad[1] else None
        return d_query, d_keys, torch.stack(d_weights, dim=1), *[None] * 4


class _Spread(torch.autograd.Function):
    """``[P, d]``: Σ over a sub-key's entries of weight · q."""

    @staticmethod
    def forward(ctx, query, weights, *entries):
        ctx.save_for_backward(query, weights, *entries)
        return Entries(*entries).spread(query, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, weights, *entries = ctx.saved_tensors
        entries = Entries(*entries)
        return entries.read(gradient, weights), entries.dot(gradient, query), None, None, None
