"""Entries: which rows of a table each token reads, and the sums over them that everything here is made of.

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
    """``[P]`` where each row's entries begin in ``order``."""

    @classmethod
    def of(cls, place: Tensor, num_rows: int) -> "Entries":
        """Entries in a table of ``num_rows`` rows."""
        flat = place.flatten()
        sizes = flat.new_zeros(num_rows).scatter_add_(0, flat, torch.ones_like(flat))
        return cls(place, flat.sort(stable=True).indices, sizes.cumsum(0) - sizes)

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

    def by_row(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """``[P, D]``: Σ over a row's entries of weight · the entry's own vector; vectors [T*K, D], weights [T, K]."""
        in_order = weights.flatten().index_select(0, self.order)
        return F.embedding_bag(self.order, vectors, self.starts, mode="sum", per_sample_weights=in_order)

    def by_token(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """``[T, D]``: Σ over a token's entries of weight · the entry's own vector; vectors [T*K, D], weights [T, K]."""
        entry = torch.arange(len(vectors), device=vectors.device).view_as(weights)
        return F.embedding_bag(entry, vectors, mode="sum", per_sample_weights=weights)

    def dot(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """``[T, K]``: ⟨row, token⟩ of each entry, the gradient of ``read`` for its weights."""
        return torch.stack([rows.index_select(0, p).mul_(tokens).sum(-1) for p in self.place.unbind(1)], dim=1)


def distinct(rows: Tensor) -> tuple[Tensor, Entries]:
    """The distinct rows [P], ascending, that entries ``rows`` [T, K] touch, and the entries among them.

    P is not known beforehand, so an accelerator is waited for; on the meta device it is taken as T*K.
    """
    ids, order = rows.flatten().sort(stable=True)
    fresh = F.pad(ids[1:] != ids[:-1], (1, 0), value=True)
    starts = torch.arange(len(ids), device="meta") if rows.is_meta else fresh.nonzero().squeeze(1)
    place = torch.empty_like(ids).scatter_(0, order, fresh.cumsum(0) - 1)
    return ids.index_select(0, starts), Entries(place.view_as(rows), order, starts)


def finite_rows(x: Tensor) -> Tensor:
    """``[P]``: whether all of a row of [P, D] is finite, from its sum, scaled so that finite terms do not overflow it.

    A fraction of the time of ``isfinite().all(-1)``, which passes over memory several times.
    """
    x = x.detach()
    return x.mv(x.new_full((x.shape[1],), 2.0**-20)).isfinite()
