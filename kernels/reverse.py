"""The backward of one call: its windows in reverse, first through the values, then through the keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.kernels import backward as kernels
from fwpkm.kernels.call import Kept, Plan, Tokens, blocks_of, scale_of
from fwpkm.kernels.shapes import shapes


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
    size, entries, width = shapes(cfg), cfg.slots_per_token, cfg.value_dim
    batch, memories = tokens.query.shape[0], kept.keys.shape[1]
    after, clip = d_values is not None, cfg.grad_clip is not None
    d_weights, gradients = torch.empty_like(kept.weights), torch.empty_like(kept.rows)
    longest = max(w.length for w in plan.windows)
    d_read = kept.rows.new_empty(batch * longest, width)
    d_value = torch.zeros_like(tokens.value)
    d_gate = None if tokens.gate is None else torch.zeros_like(tokens.gate)
    new = plan.room - plan.arrived
    for i in reversed(range(len(plan.windows))):
        start, length, writes, first, fresh = plan.windows[i]
        count = batch * length
        kernels.read_backward_kernel[(count,)](
            kept.slots, kept.weights, kept.kinds, tokens.gate, kept.error, kept.strength, kept.heads, kept.steps,
            kept.nexts, kept.rows, kept.values_unclipped, gradients, d_values, d_output, d_weights, d_read, d_value,
            d_gate, start, length, first, plan.room, batch // memories, fresh, plan.arrived, new,
            SLOTS=cfg.num_slots, WIDTH=width, ENTRIES=entries, CHUNK=cfg.chunk_size, LOOKAHEAD=cfg.lookahead,
            SCALE=scale_of(cfg), HAS_GATE=tokens.gate is not None, OUTPUT=d_output is not None, AFTER=after, CLIP=clip,
            WRITES=writes, **size.read_backward,
        )  # fmt: skip
        if i > 0 or table is not None:
            kernels.rows_backward_kernel[(count * entries,)](
                kept.sorted_rows, kept.order, kept.place, kept.weights, kept.heads, kept.steps, kept.nexts, gradients,
                d_values, d_read, first, count, plan.total * entries, WIDTH=width, ENTRIES=entries,
                RATE=cfg.learning_rate, DECAY=cfg.weight_decay, AFTER=after, **size.values,
            )  # fmt: skip
    if of_weights is not None:
        d_weights += of_weights
    d_table = None
    if table is not None:
        d_table = torch.zeros(table, device=gradients.device) if d_values is None else d_values.clone()
        kernels.table_backward_kernel[(plan.total * entries,)](
            kept.sorted_rows, gradients, d_table, WIDTH=width, BLOCK=size.values["BLOCK"], num_warps=4
        )
    d_scores = torch.empty_like(kept.ranks)
    kernels.combine_backward_kernel[(blocks_of(plan.total, size.combine["BLOCK"]),)](
        kept.ids, kept.slots, kept.weights, kept.kinds, d_weights, d_scores, plan.total,
        HEADS=cfg.num_heads, SUBKEYS=cfg.num_subkeys, K=cfg.top_k, TEMPERATURE=cfg.temperature, **size.combine,
    )  # fmt: skip
    return d_scores, d_table, d_value, d_gate


def _through_keys(
    cfg: FwPKMConfig, plan: Plan, tokens: Tokens, kept: Kept, d_scores: Tensor, d_keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of the keys before the call, and of the stream's queries."""
    size, half = shapes(cfg), cfg.key_dim // 2
    batch, memories = tokens.query.shape[0], kept.keys.shape[1]
    rows, groups = batch // memories, memories * cfg.num_heads * 2
    clip = cfg.grad_clip is not None
    overlap = any(a.start + a.length > b.start for a, b in zip(plan.windows, plan.windows[1:]))
    d_query = torch.zeros_like(tokens.query, dtype=torch.float32 if overlap else None)
    d_pulls, d_slopes, d_ranks = (torch.empty_like(kept.ranks) for _ in range(3))
    d_share = kept.ranks.new_empty(groups, cfg.num_subkeys)
    d_keys = torch.zeros_like(kept.keys[0]) if d_keys is None else d_keys
    common = {"HEADS": cfg.num_heads, "SUBKEYS": cfg.num_subkeys, "K": cfg.top_k}
    scored = common | {
        "HALF": half, "IDW": cfg.score == "idw", "EPSILON": cfg.score_eps, "CHUNK": cfg.chunk_size,
        "RATE": cfg.learning_rate, "CLIP": clip, "WEIGHT": cfg.addressing_weight,
    }  # fmt: skip
    for i in reversed(range(len(plan.windows))):
        start, length, writes, first, _ = plan.windows[i]
        where = (start, length, first, plan.room, rows)
        words = -(-rows * length // 32)
        unclipped = kept.keys_unclipped[i] if clip else kept.moved
        by_token = (blocks_of(rows * length, size.pull_backward["BLOCK"]), groups)
        by_row = (cfg.num_subkeys, groups)
        if writes:
            kernels.pull_backward_kernel[by_token](
                tokens.query, kept.keys[i], d_keys, kept.ids, kept.ranks, kept.kinds, kept.share[i], kept.counts[i],
                kept.moved[i], unclipped, d_pulls, d_slopes, *where, **scored, **size.pull_backward,
            )  # fmt: skip
            kernels.share_backward_kernel[by_row](
                kept.ids, kept.share[i], kept.bits[i], kept.counts[i], d_slopes, d_share, length, first, rows, words,
                **common, **size.share_backward,
            )  # fmt: skip
        kernels.scores_backward_kernel[by_token](
            tokens.query, kept.keys[i], d_keys, kept.ids, kept.ranks, kept.kinds, kept.share[i], kept.counts[i],
            kept.moved[i], unclipped, d_pulls, d_share, d_scores, d_ranks, d_query, *where,
            WRITES=writes, ADD=overlap, **scored, **size.pull_backward,
        )  # fmt: skip
        before = torch.empty_like(kept.keys[0])
        kernels.keys_backward_kernel[by_row](
            tokens.query, kept.keys[i], d_keys, before, kept.ids, kept.ranks, kept.kinds, kept.share[i], kept.bits[i],
            kept.counts[i], kept.moved[i], unclipped, d_ranks, *where, words,
            DECAY=cfg.weight_decay, WRITES=writes, **scored, **size.keys,
        )  # fmt: skip
        d_keys = before
    return d_keys, d_query
