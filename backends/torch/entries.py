"""Entries: which rows of a table each token reads, and the three sums over them that everything here is made of.

T tokens read K entries each; row ``place[t, j]`` of a table ``[P, D]`` is entry j of token t. ``read`` and ``spread``
are adjoints, and both are one fused kernel (embedding_bag): no ``[T, K, D]`` is ever formed, and sums run in a fixed
order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Entries(NamedTuple):
    """T·K entries by token, and sorted by row."""

    place: Tensor
    """``[T, K]`` the row of each entry."""
    order: Tensor
    """``[T*K]`` entries sorted by row, those of one row in the order of the tokens."""
    starts: Tensor
    """``[P]`` where each row's entries begin in ``order``; T·K for the empty rows after the last."""

    @classmethod
    def of(cls, place: Tensor, num_rows: int) -> "Entries":
        """Entries in a table of ``num_rows`` rows."""
        return cls(place, place.flatten().sort(stable=True).indices, _starts(place.flatten(), num_rows))

    def count(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """``[P]``: how many entries of the chosen tokens (bool [T]) each row has."""
        entries = tokens.long()[:, None].expand_as(self.place)
        return torch.zeros_like(self.starts).scatter_add_(0, self.place.flatten(), entries.flatten())

    def total(self, weights: Tensor) -> Tensor:
        """``[P]``: the sum of each row's weights."""
        return weights.new_zeros(len(self.starts)).index_add_(0, self.place.flatten(), weights.flatten())

    def read(self, rows: Tensor, weights: Tensor) -> Tensor:
        """``[T, D]``: Σ over a token's entries of weight · row; rows [P, D], weights [T, K]."""
        return F.embedding_bag(self.place, rows, mode="sum", per_sample_weights=weights)

    def spread(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """``[P, D]``: Σ over a row's entries of weight · token; tokens [T, D], weights [T, K]."""
        token = self.order.div(self.place.shape[1], rounding_mode="floor")
        in_order = weights.flatten().index_select(0, self.order)
        return F.embedding_bag(token, tokens, self.starts, mode="sum", per_sample_weights=in_order)

    def dot(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """``[T, K]``: ⟨row, token⟩ of each entry, the gradient of ``read`` for its weights."""
        return torch.stack([(rows.index_select(0, p) * tokens).sum(-1) for p in self.place.unbind(1)], dim=1)


def distinct(rows: Tensor) -> tuple[Tensor, Entries]:
    """The distinct rows [P = T*K] that entries ``rows`` [T, K] touch, ascending, and the entries among them.

    The number of places is fixed, so that nothing waits for the device: places past the last distinct row repeat it,
    and no entry lies there.
    """
    ids, order = rows.flatten().sort(stable=True)
    fresh = F.pad((ids[1:] != ids[:-1]).long(), (1, 0))
    rank = fresh.cumsum(0)
    place = torch.empty_like(rank).scatter_(0, order, rank)
    starts = _starts(rank, len(rank))
    return ids.index_select(0, starts.clamp(max=len(ids) - 1)), Entries(place.view_as(rows), order, starts)


def _starts(flat: Tensor, num_rows: int) -> Tensor:
    sizes = flat.new_zeros(num_rows).scatter_add_(0, flat, torch.ones_like(flat))
    return sizes.cumsum(0) - sizes
