"""Sums over the sub-keys that tokens chose, each with a backward of a few fused sums.

Everything about distances is a sum of weighted differences q - K, which are formed once: Σ c q - (Σ c) K would lose all
accuracy near a key. T tokens choose k of P sub-keys: query [T, d], keys [P, d].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.backends.torch.derivatives import first_only
from fwpkm.backends.torch.values import Entries
from fwpkm.tokens import Array


class _Residuals(NamedTuple):
    """What a backward here needs, None where it does not need it."""

    row_index: Tensor
    order: Tensor
    starts: Tensor
    query: Array = None
    keys: Array = None
    weights: Array = None
    """``[T, k]``"""
    differences: Array = None
    """``[T, k, d]``: q - K."""

    @property
    def entries(self) -> Entries:
        """Which sub-keys each token chose."""
        return Entries(self.row_index, self.order, self.starts)


class _SquaredDistance(torch.autograd.Function):
    """‖q - K‖² of each entry [T, k], computed already."""

    @staticmethod
    def forward(ctx, query, keys, distance, differences, entries):
        ctx.save_for_backward(*_Residuals(**entries._asdict(), differences=differences))
        return distance

    @staticmethod
    @first_only
    def backward(ctx, gradient):
        residuals = _Residuals(*ctx.saved_tensors)
        entries, vectors = residuals.entries, residuals.differences.flatten(0, 1)
        d_query = entries.by_token(vectors, 2 * gradient) if ctx.needs_input_grad[0] else None
        d_keys = entries.by_row(vectors, -2 * gradient) if ctx.needs_input_grad[1] else None
        return d_query, d_keys, None, None, None


squared_distance = _SquaredDistance.apply


class _Product(torch.autograd.Function):
    """q·K of each entry [T, k], computed already."""

    @staticmethod
    def forward(ctx, query, keys, product, entries):
        ctx.save_for_backward(*_Residuals(**entries._asdict(), query=query, keys=keys))
        return product

    @staticmethod
    @first_only
    def backward(ctx, gradient):
        residuals = _Residuals(*ctx.saved_tensors)
        d_query = residuals.entries.read(residuals.keys, gradient) if ctx.needs_input_grad[0] else None
        d_keys = residuals.entries.scatter_add(residuals.query, gradient) if ctx.needs_input_grad[1] else None
        return d_query, d_keys, None, None


product = _Product.apply


class _SumOfDifferences(torch.autograd.Function):
    """``[P, d]``: Σ over a sub-key's entries of weight · (q - K)."""

    @staticmethod
    def forward(ctx, query, keys, weights, differences, entries):
        ctx.save_for_backward(*_Residuals(**entries._asdict(), weights=weights, differences=differences))
        return entries.by_row(differences.flatten(0, 1), weights)

    @staticmethod
    @first_only
    def backward(ctx, gradient):
        residuals = _Residuals(*ctx.saved_tensors)
        entries, weights = residuals.entries, residuals.weights
        columns = zip(entries.row_index.unbind(1), residuals.differences.unbind(1))
        d_weights = [gradient.index_select(0, row).mul_(toward).sum(-1) for row, toward in columns]
        d_query = entries.read(gradient, weights)
        d_keys = -entries.total(weights)[:, None] * gradient if ctx.needs_input_grad[1] else None
        return d_query, d_keys, torch.stack(d_weights, dim=1), None, None


sum_of_differences = _SumOfDifferences.apply


class _SumOfQueries(torch.autograd.Function):
    """``[P, d]``: Σ over a sub-key's entries of weight · q."""

    @staticmethod
    def forward(ctx, query, weights, entries):
        ctx.save_for_backward(*_Residuals(**entries._asdict(), query=query, weights=weights))
        return entries.scatter_add(query, weights)

    @staticmethod
    @first_only
    def backward(ctx, gradient):
        residuals = _Residuals(*ctx.saved_tensors)
        d_query = residuals.entries.read(gradient, residuals.weights)
        return d_query, residuals.entries.dot(gradient, residuals.query), None


sum_of_queries = _SumOfQueries.apply
