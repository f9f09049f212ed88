"""SPEC.md §2, and the keys of §3 and §4: which slots a query selects, and how the keys move.

Finding the k best of S sub-keys (``select_subkeys``) is all that grows with S, and it is done without gradients.
Everything after works on the k chosen sub-keys.

M memories, R tokens a memory, d = Dk/2: query [M, H, 2, R, d], keys [M, H, 2, S, d].
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.backends.torch.subkeys import product, squared_distance, sum_of_differences, sum_of_queries
from fwpkm.backends.torch.tokens import NAME, finite_rows, maybe_any
from fwpkm.backends.torch.values import Entries
from fwpkm.config import FwPKMConfig
from fwpkm.rules import addressing_loss, addressing_slope, step

_MARGIN = 16  # units of rounding of a product of matrices beyond which a lower-ranked sub-key is not searched for
_BLOCK = 16  # tokens ranked in full at a time: their differences to S sub-keys stay in a few MB


class ChosenKeys(NamedTuple):
    """The sub-keys that T = M·H·2·R queries [T, d] chose among the P rows of ``keys.flatten(0, -2)``."""

    entries: Entries
    """which rows."""
    ranks: Tensor
    """``[T, k]``: q·K, or -‖q - K‖²; they order sub-keys as the scores do."""
    differences: Tensor | None
    """``[T, k, d]``: q - K, or None for a score that has no use for them."""


class Selection(NamedTuple):
    """What R tokens of each memory selected."""

    query: Tensor
    """``[M, H, 2, R, d]``, zero for tokens that are not finite."""
    chosen: ChosenKeys
    sub_scores: Tensor
    """``[M, H, 2, R, k]``, in ascending order of id."""
    slots: Tensor
    """``[M, R, H*k]`` by head, then by descending sum."""
    weights: Tensor
    """``[M, R, H*k]``"""
    finite: Tensor
    """``[M, R]`` whether the query and all its selected scores are finite."""
    penalties: Tensor | None = None
    """``[M, H, 2, R, k]``: what sub-scores count less, recent_penalty * log(1 + V); None where nothing is recent."""


# --- §2 Lookup ---


def sub_scores(cfg: FwPKMConfig, query: Tensor, keys: Tensor, chosen: ChosenKeys) -> Tensor:
    """s = -log(ε + ‖q - K‖²) or q·K ``[T, k]``, for query [T, d] and keys [P, d], from ranks computed already."""
    if cfg.score == "idw":
        distance = squared_distance(query, keys, chosen.ranks.neg(), chosen.differences, chosen.entries)
        return -torch.log(cfg.score_eps + distance)
    if cfg.score == "dot_product":
        return product(query, keys, chosen.ranks, chosen.entries)
    return cfg.refuse("score", NAME)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest of the last axis, best first; ties go to the lower position."""
    return scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def select_slots(cfg: FwPKMConfig, query: Tensor, keys: Tensor, recent: Tensor | None = None) -> Selection:
    """Top-k of both codebooks, top-k of the k² sums, one softmax across all heads.

    ``recent`` [M, H, 2, S] is V, by which sub-keys that were used lately score less, or None.
    Tokens that are not finite come back as if their query were zero.
    """
    penalties = None
    if recent is None:
        subkeys, ranks, differences = select_subkeys(cfg, query, keys)
    else:
        of_all = cfg.recent_penalty * recent.log1p()[..., None, :]
        subkeys, ranks, differences = select_penalised(cfg, query, keys, of_all)
        penalties = of_all.expand(*subkeys.shape[:-1], cfg.num_subkeys).gather(-1, subkeys)
    # A query that is not finite has no finite rank. Both are blanked before autograd sees them: a gradient of 0
    # through an infinity is NaN.
    finite = ranks.isfinite().all(-1).all(1).all(1)
    if maybe_any(~finite):
        dead = ~finite[:, None, None, :, None]
        query, ranks = query.masked_fill(dead, 0), ranks.masked_fill(dead, 0)
        differences = None if differences is None else differences.masked_fill_(dead[..., None], 0)
    codebook = torch.arange(subkeys.shape[:3].numel(), device=keys.device).view(*subkeys.shape[:3], 1, 1)
    entries = Entries.of((subkeys + codebook * cfg.num_subkeys).flatten(0, -2), keys.shape[:4].numel())
    chosen = ChosenKeys(entries, ranks.flatten(0, -2), None if differences is None else differences.flatten(0, 3))
    scores = sub_scores(cfg, query.flatten(0, -2), keys.flatten(0, -2), chosen).view_as(ranks)
    counted, order = (scores, ranks) if penalties is None else (scores - penalties, scores - penalties)
    best = top_k(order, cfg.top_k)  # ids ascend, so ties stay with the lower one
    slots, sums = _combine(cfg, subkeys.gather(-1, best), counted.gather(-1, best))
    logits = sums.transpose(1, 2).flatten(2) / cfg.temperature
    finite = finite & logits.isfinite().all(-1)
    weights = logits.masked_fill(~finite[..., None], 0).softmax(-1)
    return Selection(query, chosen, scores, slots.transpose(1, 2).flatten(2), weights, finite, penalties)


@torch.no_grad()
def select_penalised(
    cfg: FwPKMConfig, query: Tensor, keys: Tensor, penalties: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``select_subkeys`` where scores count ``penalties`` [M, H, 2, 1, S] less: all S distances, from differences."""
    shape = query.shape[:-1]
    query, keys, penalties = (x.flatten(0, 2) for x in (query, keys, penalties))
    distance = torch.cdist(query, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
    ids = top_k(-torch.log(cfg.score_eps + distance) - penalties, cfg.top_k).sort(-1).values
    first = cfg.num_subkeys * torch.arange(len(keys), device=keys.device)[:, None, None]
    rows = keys.flatten(0, 1).index_select(0, (ids + first).flatten()).view(*ids.shape, -1)
    ranks, differences = _rank(cfg, query[:, :, None], rows)
    differences = None if differences is None else differences.view(*shape, cfg.top_k, -1)
    return ids.view(*shape, -1), ranks.view(*shape, -1), differences


@torch.no_grad()
def select_subkeys(cfg: FwPKMConfig, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k best sub-keys of each codebook, ties to the lower id.

    A product of matrices proposes k sub-keys, and only theirs are computed from differences. Where the worst of them
    does not beat the next proposal by more than the product's rounding error, all S are ranked from differences. So the
    choice has the quality of differences near a key, and under any matmul precision: the error is observed on the
    chosen sub-keys, TF32 and all.

    Returns:
        ids ``[M, H, 2, R, k]`` in ascending order, their ranks, and their differences ``[M, H, 2, R, k, d]``, as
        ``ChosenKeys`` has them.
    """
    k, shape = cfg.top_k, query.shape[:-1]
    query, keys = (x.flatten(0, 2) for x in (query, keys))
    rough, origin, scale = _expanded(cfg, query, keys)
    ids = rough.topk(k).indices.sort(-1).values
    first = cfg.num_subkeys * torch.arange(len(keys), device=keys.device)[:, None, None]
    rows = keys.flatten(0, 1).index_select(0, (ids + first).flatten()).view(*ids.shape, -1)
    exact, differences = _rank(cfg, query[:, :, None], rows)
    error = ((rough.gather(-1, ids) - origin - exact).abs().amax(-1, keepdim=True) / scale).nan_to_num(0, 0, 0).amax()
    margin = scale * torch.clamp(4 * error, min=_MARGIN * torch.finfo(keys.dtype).eps / 2)
    next_best = rough.scatter_(-1, ids, -torch.inf).amax(-1, keepdim=True) - origin
    unsure = ~(exact.amin(-1, keepdim=True) > next_best + margin).squeeze(-1)
    if k < cfg.num_subkeys and not query.is_meta and maybe_any(unsure):
        _select_in_full(cfg, query, keys, unsure, ids, exact, differences)
    differences = None if differences is None else differences.view(*shape, k, -1)
    return ids.view(*shape, k), exact.view(*shape, k), differences


def _expanded(cfg: FwPKMConfig, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate ranks from a product of matrices, for query [G, R, d] and keys [G, S, d].

    Returns:
        ranks plus origin ``[G, R, S]``, the origin ``[G, R, 1]``, and the scale of the error ``[G, R, 1]``.
    """
    q, key = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (query, keys))
    largest = key.amax(1, keepdim=True)
    if cfg.score == "dot_product":
        return query @ keys.mT, torch.zeros_like(q), q * largest
    if cfg.score == "idw":
        return torch.baddbmm(key.square().mT, query, keys.mT, beta=-1, alpha=2), q.square(), (q + largest).square()
    return cfg.refuse("score", NAME)


def _rank(cfg: FwPKMConfig, query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ranks over the last axis of the sub-keys ``rows``, which are overwritten, and the differences or None."""
    if cfg.score == "dot_product":
        return rows.mul_(query).sum(-1), None
    if cfg.score == "idw":
        differences = torch.sub(query, rows, out=rows)
        return torch.linalg.vector_norm(differences, dim=-1).square_().neg_(), differences
    return cfg.refuse("score", NAME)


def _select_in_full(
    cfg: FwPKMConfig, query: Tensor, keys: Tensor, which: Tensor, ids: Tensor, ranks: Tensor, differences: Tensor | None
) -> None:
    """Overwrite what was selected for the tokens ``which`` [G, R] by ranking all S sub-keys from differences."""
    for group, token in (x.unbind(1) for x in which.nonzero().split(_BLOCK)):
        q = query[group, token, None]
        full, _ = _rank(cfg, q, keys[group])
        best = top_k(full, cfg.top_k).sort(-1).values
        ids[group, token] = best
        ranks_of_best, near = _rank(cfg, q, keys[group[:, None], best])
        ranks[group, token] = ranks_of_best
        if differences is not None and near is not None:
            differences[group, token] = near


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
    order = top_k(sums, cfg.top_k)
    ids = subkeys[:, :, 0].index_select(-1, first) * cfg.num_subkeys + subkeys[:, :, 1].index_select(-1, second)
    return ids.gather(-1, order), sums.gather(-1, order)


# --- §3 The addressing loss ---


def sub_key_probabilities(selection: Selection) -> Tensor:
    """p over the k selected sub-scores of each head and codebook, no temperature: [M, H, 2, R, k]."""
    if selection.penalties is None:
        return selection.sub_scores.softmax(-1)
    return (selection.sub_scores - selection.penalties).softmax(-1)


def mean_probabilities(selection: Selection, p: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """p̄ of each sub-key [P], the mean of p over the ``counted`` tokens [M, R], and the terms p/n that it sums."""
    counted = counted.to(p.dtype)
    terms = (counted / counted.sum(-1, keepdim=True).clamp(min=1))[:, None, None, :, None] * p
    entries = selection.chosen.entries
    return p.new_zeros(len(entries.starts)).index_add(0, entries.row_index.flatten(), terms.flatten()), terms


# --- §4 The keys' step ---


def key_vjp(
    cfg: FwPKMConfig, query: Tensor, keys: Tensor, chosen: ChosenKeys, scores: Tensor, d_scores: Tensor
) -> Tensor:
    """Σ over a sub-key's entries of d_score · ∂s/∂K ``[P, d]``, where ∂s/∂K is 2(q - K)/(ε + ‖q - K‖²), or q."""
    if cfg.score == "idw":  # e^s = 1/(ε + ‖q - K‖²)
        weights = 2 * d_scores * scores.exp()
        return sum_of_differences(query, keys, weights, chosen.differences, chosen.entries)
    if cfg.score == "dot_product":
        return sum_of_queries(query, d_scores, chosen.entries)
    return cfg.refuse("score", NAME)


def key_gradient(
    cfg: FwPKMConfig, keys: Tensor, selection: Selection, p: Tensor, mean: Tensor, terms: Tensor
) -> Tensor:
    """α ∇_keys L_addr in closed form, in the keys' shape; p, mean and terms are those of ``mean_probabilities``."""
    chosen = selection.chosen
    slope = addressing_slope(torch, mean).index_select(0, chosen.entries.row_index.flatten()).view_as(p)
    d_scores = cfg.addressing_weight * terms * (slope - (p * slope).sum(-1, keepdim=True))
    scores, d_scores = selection.sub_scores.flatten(0, -2), d_scores.flatten(0, -2)
    return key_vjp(cfg, selection.query.flatten(0, -2), keys.flatten(0, -2), chosen, scores, d_scores).view_as(keys)


def write_keys(
    cfg: FwPKMConfig, keys: Tensor, selection: Selection, counted: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """Move the keys down the addressing loss.

    Args:
        cfg: the configuration.
        keys: ``[M, H, 2, S, d]``.
        selection: what the tokens of the chunk selected with these keys.
        counted: ``[M, R]``, the chunk's unmasked tokens.
        active: ``[M]``, the memories in which the chunk has a pair.

    Returns:
        the new keys, and the loss ``[M]``, without gradient.
    """
    p = sub_key_probabilities(selection)
    mean, terms = mean_probabilities(selection, p, counted)
    loss = addressing_loss(torch, mean.detach()).view(keys.shape[0], -1).sum(-1) * active
    new = step(torch, cfg, keys, key_gradient(cfg, keys, selection, p, mean, terms))
    finite = finite_rows(new.flatten(0, -2)).view(*keys.shape[:-1], 1)
    return torch.where(active[:, None, None, None, None] & finite, new, keys), loss


def recent_after(recent: Tensor, selection: Selection, counted: Tensor, active: Tensor) -> Tensor:
    """V ``[M, H, 2, S]`` after a chunk: half of what it was and how often ``counted`` tokens [M, R] chose a sub-key.

    Where the chunk has no pair (``active`` [M] is False) it stays.
    """
    tokens = counted[:, None, None, :].expand(*selection.sub_scores.shape[:-1]).flatten()
    uses = selection.chosen.entries.count(tokens).view(recent.shape).to(recent.dtype)
    return torch.where(active[:, None, None, None], (recent + uses) / 2, recent)
