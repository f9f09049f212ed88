"""SPEC.md §2 and the key half of §4: which slots a query picks, and how the keys move.

Finding the k best of S sub-keys is all that grows with S, and it is done without gradients. Everything after works on
the k chosen sub-keys, recomputed from differences, and is left to autograd.

M memories, R tokens a memory, d = Dk/2: query [M, H, 2, R, d], keys [M, H, 2, S, d].
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.config import FwPKMConfig

_SPARE = 8  # candidates beyond k: enough that the error of the expanded form seldom reaches the k-th place


class Address(NamedTuple):
    """What R tokens of each memory picked."""

    subkeys: Tensor
    """``[M, H, 2, R, k]`` sub-key ids, best first."""
    sub_scores: Tensor
    """``[M, H, 2, R, k]``"""
    toward: Tensor
    """``[M, H, 2, R, k, d]`` (or ``[..., 1, d]``): ∂s/∂K is ``pull · toward``."""
    pull: Tensor | None
    """``[M, H, 2, R, k]``, or None for 1."""
    slots: Tensor
    """``[M, R, H*k]`` by head, then by descending sum."""
    weights: Tensor
    """``[M, R, H*k]``"""
    finite: Tensor
    """``[M, R]`` whether the query and all its selected scores are finite."""


def address(cfg: FwPKMConfig, query: Tensor, keys: Tensor) -> Address:
    """Pick slots and weigh them (§2). Tokens that are not finite come back as if their query were zero."""
    finite = query.isfinite().all(-1).all(1).all(1)
    query = query.masked_fill(~finite[:, None, None, :, None], 0)
    subkeys, scores = select(cfg, query, keys)
    # Scores that overflow are found before autograd sees them: a gradient of 0 through an infinity is NaN.
    finite = finite & scores.isfinite().all(-1).all(1).all(1)
    query = query.masked_fill(~finite[:, None, None, :, None], 0)
    sub_scores, toward, pull = _sub_scores(cfg, query, _chosen_rows(keys, subkeys))
    slots, sums = _combine(cfg, subkeys, sub_scores)
    logits = sums.transpose(1, 2).flatten(2) / cfg.temperature
    finite = finite & logits.isfinite().all(-1) & sub_scores.isfinite().all(-1).all(1).all(1)
    weights = logits.masked_fill(~finite[..., None], 0).softmax(-1)
    return Address(subkeys, sub_scores, toward, pull, slots.transpose(1, 2).flatten(2), weights, finite)


@torch.no_grad()
def select(cfg: FwPKMConfig, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The k best sub-keys of each codebook, best first, ties to the lower id: ids and ranks ``[M, H, 2, R, k]``.

    Ranks order sub-keys as their scores do: q·K, or -‖q - K‖². A product of matrices proposes k + 8 candidates; the
    candidates are ranked by differences. Its rounding error, bounded below and checked against the candidates' own,
    decides whether a better sub-key could have been missed; such tokens are ranked in full. So the choice has true
    float32 quality near a key, and under any matmul precision.
    """
    s, k = keys.shape[-2], cfg.top_k
    m = min(s, k + _SPARE)
    rough, scale = _expanded(cfg, query, keys)
    best = rough.topk(m)
    candidates = best.indices.sort(-1).values  # in order of id, so that a stable sort gives ties to the lower one
    exact = _rank(cfg, query[..., None, :], _chosen_rows(keys, candidates))
    order = exact.sort(dim=-1, descending=True, stable=True)
    ids, ranks = candidates.gather(-1, order.indices[..., :k]), order.values[..., :k]
    if m < s and not query.is_meta:
        # γ = (d + 8) u bounds the error of a d-term product in units of its scale; TF32 shows in `observed`.
        error = (rough.gather(-1, candidates) - exact).abs().amax(-1)
        observed = (error / scale).nan_to_num(0, 0, 0).amax()
        gamma = (keys.shape[-1] + 8) * torch.finfo(keys.dtype).eps / 2
        margin = scale * torch.clamp(4 * observed, min=gamma)
        sure = ranks[..., -1] > best.values[..., -1] + margin
        if not bool(sure.all()):
            _rank_in_full(cfg, query, keys, ~sure, ids, ranks)
    return ids, ranks


def _expanded(cfg: FwPKMConfig, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate ranks ``[M, H, 2, R, S]`` from one product of matrices, and the scale of their error [M, H, 2, R]."""
    product = query @ keys.mT
    q, key = (torch.linalg.vector_norm(x, dim=-1) for x in (query, keys))
    largest = key.amax(-1, keepdim=True)
    if cfg.score == "dot_product":
        return product, q * largest
    return product.mul_(2).sub_(key.square()[..., None, :]).sub_(q.square()[..., None]), (q + largest).square()


def _rank(cfg: FwPKMConfig, query: Tensor, keys: Tensor) -> Tensor:
    """q·K or -‖q - K‖² over the last axis."""
    if cfg.score == "dot_product":
        return (query * keys).sum(-1)
    return (query - keys).square_().sum(-1).neg_()


def _rank_in_full(cfg: FwPKMConfig, query: Tensor, keys: Tensor, which: Tensor, ids: Tensor, ranks: Tensor) -> None:
    """Overwrite ids and ranks where ``which`` [M, H, 2, R] by ranking all S sub-keys from differences."""
    for group in which.any(-1).nonzero().tolist():
        rows = which[tuple(group)]
        q, codebook = query[tuple(group)][rows], keys[tuple(group)]
        # Sub-key by sub-key: the differences of all at once would take rows × S × d numbers.
        full = torch.stack([_rank(cfg, q, key) for key in codebook], dim=-1)
        order = full.sort(dim=-1, descending=True, stable=True)
        ids[tuple(group)][rows] = order.indices[..., : cfg.top_k]
        ranks[tuple(group)][rows] = order.values[..., : cfg.top_k]


def _flat_ids(subkeys: Tensor, num_subkeys: int) -> Tensor:
    """Sub-key ids ``[M, H, 2, R, k]`` as rows of ``keys.flatten(0, -2)``."""
    groups = torch.arange(subkeys.shape[:3].numel(), device=subkeys.device)
    return subkeys + num_subkeys * groups.view(*subkeys.shape[:3], 1, 1)


def _chosen_rows(keys: Tensor, subkeys: Tensor) -> Tensor:
    """``[M, H, 2, R, k, d]``"""
    flat = _flat_ids(subkeys, keys.shape[-2])
    return keys.flatten(0, -2).index_select(0, flat.flatten()).view(*subkeys.shape, keys.shape[-1])


def _sub_scores(cfg: FwPKMConfig, query: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The chosen scores, and ∂s/∂K as ``pull · toward``."""
    query = query[..., None, :]
    if cfg.score == "dot_product":
        return (query * chosen).sum(-1), query, None
    difference = query - chosen
    distance = cfg.score_eps + difference.square().sum(-1)
    return -distance.log(), difference, 2 / distance


@cache
def _grid(k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cells (i, j) of the k × k sums that can be among the k largest, in order of position.

    Both axes descend, so (i+1)(j+1) - 1 cells are at least as large as (i, j) and come before it.
    """
    cells = [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]
    first, second = zip(*cells)
    return first, second


def _combine(cfg: FwPKMConfig, subkeys: Tensor, sub_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k of the k² sums: slots and sums ``[M, H, R, k]``, best first, ties to the lower position."""
    first, second = (torch.tensor(axis, device=subkeys.device) for axis in _grid(cfg.top_k))
    sums = sub_scores[:, :, 0].index_select(-1, first) + sub_scores[:, :, 1].index_select(-1, second)
    order = sums.detach().sort(dim=-1, descending=True, stable=True).indices[..., : cfg.top_k]
    ids = subkeys[:, :, 0].index_select(-1, first) * cfg.num_subkeys + subkeys[:, :, 1].index_select(-1, second)
    return ids.gather(-1, order), sums.gather(-1, order)


def write_keys(
    cfg: FwPKMConfig, keys: Tensor, chosen: Address, counted: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
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
    flat = _flat_ids(chosen.subkeys, cfg.num_subkeys)
    p = chosen.sub_scores.softmax(-1)
    counted = counted.to(p.dtype)
    share = (counted / counted.sum(-1, keepdim=True).clamp(min=1))[:, None, None, :, None] * p
    mean = keys.new_zeros(keys.shape[:4].numel()).index_add(0, flat.flatten(), share.flatten())
    log = (mean + 1e-8).log()
    loss = (mean * log).view(keys.shape[0], -1).sum(-1) * active
    slope = (log + mean / (mean + 1e-8)).index_select(0, flat.flatten()).view_as(p)
    d_score = share * (slope - (p * slope).sum(-1, keepdim=True))
    if chosen.pull is not None:
        d_score = d_score * chosen.pull
    contributions = (cfg.addressing_weight * d_score)[..., None] * chosen.toward
    gradient = torch.zeros_like(keys).flatten(0, -2).index_add(0, flat.flatten(), contributions.flatten(0, -2))
    gradient = gradient.view_as(keys)
    if cfg.grad_clip is not None:
        gradient = gradient.clamp(-cfg.grad_clip, cfg.grad_clip)
    new = keys - cfg.learning_rate * (gradient + cfg.weight_decay * keys)
    moves = active[:, None, None, None, None] & new.isfinite().all(-1, keepdim=True)
    return torch.where(moves, new, keys), loss
