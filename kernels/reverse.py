"""The backward of one call: its windows in reverse, first through the values, then through the keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.kernels import backward as kernels
from fwpkm.kernels.call import Tokens
from fwpkm.kernels.launch import Launch
from fwpkm.kernels.room import Kept
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.sums import KeySums
from fwpkm.kernels.windows import Plan


class Gradients(NamedTuple):
    """With respect to what the call was given; those of the tables are None where they were not asked for."""

    keys: Tensor
    values: Tensor | None
    query: Tensor
    """``[B, n, H*Dk]`` of the stream, in the query's dtype or float32."""
    value: Tensor
    gate: Tensor | None


def backward(
    cfg: FwPKMConfig,
    plan: Plan,
    tokens: Tokens,
    kept: Kept,
    d_output: Tensor | None,
    d_keys: Tensor | None,
    d_values: Tensor | None,
    table: torch.Size | None,
    d_weights: Tensor | None = None,
) -> Gradients:
    """Gradients of a call from those of its output, final keys and final values (None: zero).

    Args:
        cfg: the configuration.
        plan: the windows.
        tokens: the stream.
        kept: what the forward kept.
        d_output: ``[B, T, Dv]``, contiguous.
        d_keys: ``[M, H, 2, S, Dk/2]`` float32, contiguous.
        d_values: ``[M, N, Dv]`` float32, contiguous.
        table: the shape of the value table, if its own gradient is asked for.
        d_weights: ``[w, H*k]`` float32, of the weights themselves.
    """
    d_scores, values, value, gate = _through_values(cfg, plan, tokens, kept, d_output, d_values, table, d_weights)
    keys, query = _through_keys(cfg, plan, tokens, kept, d_scores, d_keys)
    return Gradients(keys, values, query, value, gate)


def _through_values(
    cfg: FwPKMConfig,
    plan: Plan,
    tokens: Tokens,
    kept: Kept,
    d_output: Tensor | None,
    d_values: Tensor | None,
    table: torch.Size | None,
    of_weights: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The gradients of sub-scores [w, H, 2, k], of the table, and of the stream's values and gates."""
    size, entries, width = shapes(cfg, tokens.query.dtype), cfg.slots_per_token, cfg.value_dim
    batch, memories, after = tokens.query.shape[0], kept.counts.shape[1], d_values is not None
    latest = kept.slots.new_full((memories * cfg.num_slots,), -1)
    d_weights, gradients = torch.empty_like(kept.weights), torch.empty_like(kept.rows)
    d_read = kept.rows.new_empty(batch * plan.longest, width)
    d_value = torch.zeros_like(tokens.value)
    d_gate = None if tokens.gate is None else torch.zeros_like(tokens.gate)
    new = plan.room - plan.arrived
    reads = {
        writes: Launch(
            kernels.read_backward_kernel, kept.slots, kept.weights, kept.kinds, tokens.gate, kept.error, kept.strength,
            kept.heads, kept.steps, latest, kept.rows, kept.values_unclipped, gradients, d_values, d_output, d_weights,
            d_read, d_value, d_gate,
            HAS_GATE=tokens.gate is not None, OUTPUT=d_output is not None, AFTER=after,
            WRITES=writes, **size.read_backward,
        ) for writes in plan.kinds
    }  # fmt: skip
    partial = kept.rows.new_empty(blocks_of(batch * plan.longest * entries, size.piece_backward["PIECE"]), width)
    sum_pieces = Launch(
        kernels.piece_backward_kernel, kept.sorted_rows, kept.order, kept.weights, d_read, partial,
        **size.piece_backward,
    )  # fmt: skip
    rows = Launch(
        kernels.rows_backward_kernel, kept.sorted_rows, kept.order, kept.weights, kept.steps, latest, gradients,
        d_values, d_read, partial, AFTER=after, **size.rows_backward,
    )  # fmt: skip
    for i in reversed(range(len(plan.windows))):
        start, length, writes, first, fresh = plan.windows[i]
        count = batch * length
        reads[writes]((count,), start, length, first, plan.room, batch // memories, fresh, plan.arrived, new)
        if i > 0 or table is not None:
            sum_pieces((blocks_of(count * entries, size.piece_backward["PIECE"]),), first, plan.total)
            rows((count * entries,), i, memories, first, plan.total)
    if of_weights is not None:
        d_weights += of_weights
    d_table = None
    if table is not None:
        d_table = torch.zeros(table, device=gradients.device) if d_values is None else d_values.clone()
        Launch(kernels.table_backward_kernel, latest, gradients, d_table, **size.table_backward)((len(latest),))
    d_scores = torch.empty_like(kept.ranks)
    combine_backward = Launch(
        kernels.combine_backward_kernel, kept.ids, kept.slots, kept.weights, kept.kinds, d_weights, d_scores,
        **size.combine_backward,
    )  # fmt: skip
    combine_backward((blocks_of(plan.total, size.combine_backward["BLOCK"]),), plan.total)
    return d_scores, d_table, d_value, d_gate


def _through_keys(
    cfg: FwPKMConfig, plan: Plan, tokens: Tokens, kept: Kept, d_scores: Tensor, d_keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of the keys before the call, and of the stream's queries."""
    size, half, subkeys = shapes(cfg, tokens.query.dtype), cfg.key_dim // 2, cfg.num_subkeys
    batch, memories = tokens.query.shape[0], kept.counts.shape[1]
    rows, groups, number = batch // memories, memories * cfg.num_heads * 2, len(plan.windows)
    overlap = any(a.start + a.length > b.start for a, b in zip(plan.windows, plan.windows[1:]))
    d_query = torch.zeros_like(tokens.query, dtype=torch.float32 if overlap else None)
    d_pulls, d_slopes, d_ranks = (torch.empty_like(kept.ranks) for _ in range(3))
    both = kept.ranks.new_empty(2, groups, subkeys, half)  # after a window and before it, in turns
    after = both[number % 2]
    after.zero_() if d_keys is None else after.copy_(d_keys.view_as(after))
    sums = KeySums(cfg, tokens.query, kept, rows * plan.longest)
    sum_slopes, sum_ranks = sums.of(d_slopes, queries=False), sums.of(d_ranks)
    chosen = kept.ids, kept.ranks, kept.kinds, kept.share, kept.counts, kept.moved, kept.keys_unclipped
    pull = Launch(
        kernels.pull_backward_kernel, tokens.query, kept.keys, both, *chosen, d_pulls, d_slopes,
        **size.by_token,
    )  # fmt: skip
    scores = {
        writes: Launch(
            kernels.scores_backward_kernel, tokens.query, kept.keys, both, *chosen, d_pulls, sums.totals, d_scores,
            d_ranks, d_query, WRITES=writes, ADD=overlap, **size.by_token,
        ) for writes in plan.kinds
    }  # fmt: skip
    keys = {
        writes: Launch(
            kernels.keys_backward_kernel, both, sums.sums, sums.totals, kept.moved, kept.pulled,
            kept.keys_unclipped, WRITES=writes, **size.keys_backward,
        ) for writes in plan.kinds
    }  # fmt: skip
    for i in reversed(range(number)):
        start, length, writes, first, _ = plan.windows[i]
        where = (start, length, first, plan.room, rows)
        by_token = (blocks_of(rows * length, size.by_token["BLOCK"]), groups)
        pieces = 0
        if writes:
            pull(by_token, i, *where)
            pieces = sums.launch(sum_slopes, i, i, 0, *where)
        scores[writes](by_token, i, pieces, *where)
        pieces = sums.launch(sum_ranks, i, i, 0, *where)
        keys[writes]((subkeys, groups), i, pieces)
    return both[0].unflatten(0, (memories, cfg.num_heads, 2)), d_query
