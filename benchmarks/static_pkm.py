"""Formulation (b): a static product-key memory of the same width: the same lookup, and no writes.

The whole sequence is one lookup, as nothing changes between chunks: one product per codebook, ``torch.topk``, the k × k
sums, softmax and ``embedding_bag``. Of the honest ways to write it this is the fastest measured:

- scores come from the expansion ‖q‖² + ‖K‖² − 2q·K alone, which autograd differentiates as two products; computing
  the chosen ones from differences, as SPEC.md §6 asks of the torch backend, is slower and more exact near a key;
- the value table is given flat and its gradient is sparse, so that training it touches only rows that were read.

Nothing but training writes such a memory, so the benchmark's training step asks for the gradients of both tables; a
second row leaves them frozen, which no layer in use would.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import embedding_bag

from fwpkm.config import FwPKMConfig


class Selection(NamedTuple):
    """The k sub-keys per codebook that a query selected, in order of their scores."""

    scores: torch.Tensor
    """``[B, H, 2, T, k]`` sub-scores."""
    subkeys: torch.Tensor
    """``[B, H, 2, T, k]`` their indices in [0, S)."""


def apply(cfg: FwPKMConfig, keys: torch.Tensor, rows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """SPEC.md §2: the output ``[B, T, Dv]`` for ``query [B, T, H*Dk]``.

    Args:
        cfg: the memory's config; what concerns writes is ignored.
        keys: ``[M, H, 2, S, Dk/2]`` with M = B, or M = 1 for all sequences.
        rows: ``[M*N, Dv]``, the value tables.
        query: the queries.
    """
    (first, second), (row, column) = (x.unbind(2) for x in select(cfg, keys, query))
    sums, position = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(cfg.top_k)
    slots = row.gather(-1, position // cfg.top_k) * cfg.num_subkeys + column.gather(-1, position % cfg.top_k)
    weights = (sums.transpose(1, 2).flatten(2) / cfg.temperature).softmax(-1)
    slots = slots.transpose(1, 2).flatten(2)
    if len(keys) > 1:
        slots = slots + torch.arange(0, len(rows), cfg.num_slots).view(-1, 1, 1)
    weights, slots = weights.flatten(0, 1), slots.flatten(0, 1)
    output = embedding_bag(slots, rows, per_sample_weights=weights, mode="sum", sparse=True)
    return output.view(*query.shape[:2], -1)


def select(cfg: FwPKMConfig, keys: torch.Tensor, query: torch.Tensor) -> Selection:
    """Sub-scores of ``query [B, T, H*Dk]`` against ``keys [M, H, 2, S, Dk/2]`` by one product, and their top-k."""
    halves = query.unflatten(-1, (cfg.num_heads, 2, -1)).permute(0, 2, 3, 1, 4)
    if cfg.score == "dot_product":
        return Selection(*(halves @ keys.mT).topk(cfg.top_k))
    keys = keys.expand(len(query), *keys.shape[1:]).flatten(0, 2)
    nearness = torch.baddbmm(
        keys.square().sum(-1).unsqueeze(-2), halves.flatten(0, 2), keys.mT, beta=-1, alpha=2
    )  # 2q·K − ‖K‖², the order of the distances
    nearest, subkeys = nearness.view(*halves.shape[:-1], -1).topk(cfg.top_k)
    distance = (halves.square().sum(-1, keepdim=True) - nearest).clamp(min=0)
    return Selection(-(cfg.score_eps + distance).log(), subkeys)
