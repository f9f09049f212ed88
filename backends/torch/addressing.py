"""SPEC.md §2 and the key half of §4: which slots a query picks, and how the keys move.

Finding the k best of S sub-keys (``select``) is all that grows with S, and it is done without gradients. Everything
after works on the k chosen sub-keys.

M memories, R tokens a memory, d = Dk/2: query [M, H, 2, R, d], keys [M, H, 2, S, d].
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.backends.torch.entries import Entries, finite_rows
from fwpkm.backends.torch.subkeys import ChosenKeys, pull, sub_scores
from fwpkm.backends.torch.tokens import maybe_any
from fwpkm.config import FwPKMConfig

_MARGIN = 16  # units of rounding of a product of matrices beyond which a lower-ranked sub-key is not searched for
_BLOCK = 16  # tokens ranked in full at a time: their differences to S sub-keys stay in a few MB


class Choice(NamedTuple):
    """The k best sub-keys of each codebook, in ascending order of id."""

    subkeys: Tensor
    """``[M, H, 2, R, k]`` ids."""
    ranks: Tensor
    """``[M, H, 2, R, k]``: q·K, or -‖q - K‖²; they order sub-keys as the scores do."""
    differences: Tensor | None
    """``[M, H, 2, R, k, d]``: q - K, or None for the dot product."""


class Address(NamedTuple):
    """What R tokens of each memory picked."""

    query: Tensor
    """``[M, H, 2, R, d]``, zero for tokens that are not finite."""
    chosen: ChosenKeys
    """The chosen sub-keys as rows of ``keys.flatten(0, -2)``, for T = M·H·2·R tokens."""
    sub_scores: Tensor
    """``[M, H, 2, R, k]``, in ascending order of id."""
    slots: Tensor
    """``[M, R, H*k]`` by head, then by descending sum."""
    weights: Tensor
    """``[M, R, H*k]``"""
    finite: Tensor
    """``[M, R]`` whether the query and all its selected scores are finite."""


def address(cfg: FwPKMConfig, query: Tensor, keys: Tensor) -> Address:
    """Pick slots and weigh them (§2). Tokens that are not finite come back as if their query were zero."""
    subkeys, ranks, differences = select(cfg, query, keys)
    # A query that is not finite has no finite rank. Both are blanked before autograd sees them: a gradient of 0
    # through an infinity is NaN.
    finite = ranks.isfinite().all(-1).all(1).all(1)
    if maybe_any(~finite):
        dead = ~finite[:, None, None, :, None]
        query, ranks = query.masked_fill(dead, 0), ranks.masked_fill(dead, 0)
        differences = None if differences is None else differences.masked_fill_(dead[..., None], 0)
    groups = torch.arange(subkeys.shape[:3].numel(), device=keys.device).view(*subkeys.shape[:3], 1, 1)
    entries = Entries.of((subkeys + groups * cfg.num_subkeys).flatten(0, -2), keys.shape[:4].numel())
    chosen = ChosenKeys(entries, ranks.flatten(0, -2), None if differences is None else differences.flatten(0, 3))
    scores = sub_scores(cfg, query.flatten(0, -2), keys.flatten(0, -2), chosen).view_as(ranks)
    best = ranks.sort(dim=-1, descending=True, stable=True).indices  # ids ascend, so ties stay with the lower one
    slots, sums = _combine(cfg, subkeys.gather(-1, best), scores.gather(-1, best))
    logits = sums.transpose(1, 2).flatten(2) / cfg.temperature
    finite = finite & logits.isfinite().all(-1)
    weights = logits.masked_fill(~finite[..., None], 0).softmax(-1)
    return Address(query, chosen, scores, slots.transpose(1, 2).flatten(2), weights, finite)


@torch.no_grad()
def select(cfg: FwPKMConfig, query: Tensor, keys: Tensor) -> Choice:
    """The k best sub-keys of each codebook, ties to the lower id.

    A product of matrices proposes k sub-keys, and only theirs are computed from differences. Where the worst of them
    does not beat the next proposal by more than the product's rounding error, all S are ranked from differences. So the
    choice has the quality of differences near a key, and under any matmul precision: the error is observed on the
    chosen sub-keys, TF32 and all.
    """
    k, shape = cfg.top_k, query.shape[:-1]
    query, keys = (x.flatten(0, 2) for x in (query, keys))
    rough, origin, scale = _expanded(cfg, query, keys)
    ids = rough.topk(k).indices.sort(-1).values
    first = cfg.num_subkeys * torch.arange(len(keys), device=keys.device)[:, None, None]
    rows = keys.flatten(0, 1).index_select(0, (ids + first).flatten()).view(*ids.shape, -1)
    exact, rows = _rank(cfg, query[:, :, None], rows)
    error = ((rough.gather(-1, ids) - origin - exact).abs().amax(-1, keepdim=True) / scale).nan_to_num(0, 0, 0).amax()
    margin = scale * torch.clamp(4 * error, min=_MARGIN * torch.finfo(keys.dtype).eps / 2)
    next_best = rough.scatter_(-1, ids, -torch.inf).amax(-1, keepdim=True) - origin
    unsure = ~(exact.amin(-1, keepdim=True) > next_best + margin).squeeze(-1)
    if k < cfg.num_subkeys and not query.is_meta and maybe_any(unsure):
        _select_in_full(cfg, query, keys, unsure, ids, exact, rows)
    differences = rows.view(*shape, k, -1) if cfg.score == "idw" else None
    return Choice(ids.view(*shape, k), exact.view(*shape, k), differences)


def _expanded(cfg: FwPKMConfig, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate ranks from a product of matrices, for query [G, R, d] and keys [G, S, d].

    Returns:
        ranks plus origin ``[G, R, S]``, the origin ``[G, R, 1]``, and the scale of the error ``[G, R, 1]``.
    """
    q, key = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (query, keys))
    largest = key.amax(1, keepdim=True)
    if cfg.score == "dot_product":
        return query @ keys.mT, torch.zeros_like(q), q * largest
    return torch.baddbmm(key.square().mT, query, keys.mT, beta=-1, alpha=2), q.square(), (q + largest).square()


def _rank(cfg: FwPKMConfig, query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """q·K or -‖q - K‖² over the last axis, and what they are the sums of: ``rows`` overwritten by q·K or q - K."""
    if cfg.score == "dot_product":
        return rows.mul_(query).sum(-1), rows
    return torch.linalg.vector_norm(torch.sub(query, rows, out=rows), dim=-1).square_().neg_(), rows


def _select_in_full(
    cfg: FwPKMConfig, query: Tensor, keys: Tensor, which: Tensor, ids: Tensor, ranks: Tensor, rows: Tensor
) -> None:
    """Overwrite what was selected for the tokens ``which`` [G, R] by ranking all S sub-keys from differences."""
    for group, token in (x.unbind(1) for x in which.nonzero().split(_BLOCK)):
        q = query[group, token, None]
        full, _ = _rank(cfg, q, keys[group])
        best = full.sort(dim=-1, descending=True, stable=True).indices[..., : cfg.top_k].sort(-1).values
        ids[group, token] = best
        ranks[group, token], rows[group, token] = _rank(cfg, q, keys[group[:, None], best])


@cache
def _grid(k: int) -> tuple[list[int], list[int]]:
    """Cells (i, j) of the k × k sums that can be among the k largest, in order of position.

    Both axes descend, so (i+1)(j+1) - 1 cells are at least as large as (i, j) and come before it.
    """
    cells = [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]
    return [i for i, _ in cells], [j for _, j in cells]


def _combine(cfg: FwPKMConfig, subkeys: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k of the k² sums: slots and sums ``[M, H, R, k]``, best first, ties to the lower position."""
    first, second = (torch.tensor(axis, device=subkeys.device) for axis in _grid(cfg.top_k))
    sums = scores[:, :, 0].index_select(-1, first) + scores[:, :, 1].index_select(-1, second)
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
    p = chosen.sub_scores.softmax(-1)
    counted = counted.to(p.dtype)
    share = (counted / counted.sum(-1, keepdim=True).clamp(min=1))[:, None, None, :, None] * p
    flat = chosen.chosen.entries.place.flatten()
    mean = keys.new_zeros(keys.shape[:4].numel()).index_add(0, flat, share.flatten())
    log = (mean + 1e-8).log()
    loss = (mean * log).view(keys.shape[0], -1).sum(-1) * active
    slope = (log + mean / (mean + 1e-8)).index_select(0, flat).view_as(p)
    d_score = (cfg.addressing_weight * share * (slope - (p * slope).sum(-1, keepdim=True))).flatten(0, -2)
    scores = chosen.sub_scores.flatten(0, -2)
    gradient = pull(cfg, chosen.query.flatten(0, -2), keys.flatten(0, -2), chosen.chosen, scores, d_score)
    gradient = gradient.view_as(keys)
    if cfg.grad_clip is not None:
        gradient = gradient.clamp(-cfg.grad_clip, cfg.grad_clip)
    if cfg.weight_decay:
        gradient = gradient + cfg.weight_decay * keys
    new = keys - cfg.learning_rate * gradient
    finite = finite_rows(new.flatten(0, -2)).view(*keys.shape[:-1], 1)
    return torch.where(active[:, None, None, None, None] & finite, new, keys), loss
