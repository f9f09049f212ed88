"""The backward of one call: its windows in reverse, first through the values, then through the keys."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.kernels import backward as kernels
from fwpkm.kernels.call import Tokens
from fwpkm.kernels.launch import Steps
from fwpkm.kernels.layouts import backward_layout
from fwpkm.kernels.room import Layout, Room
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.sums import KeySums
from fwpkm.kernels.windows import Plan, of_plan


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
    kept: Room,
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
    query, memories = tokens.query.dtype, kept.layout.place("counts").shape[1]
    scratch = Room.empty(backward_layout(cfg, plan, memories, tokens.query.shape[0], query), tokens.query)
    new = functools.partial(torch.empty, dtype=torch.float32, device=tokens.query.device)
    overlap = any(a.start + a.length > b.start for a, b in zip(plan.windows, plan.windows[1:]))
    both = new(2, *kept.layout.place("keys").shape[1:])  # after a window and before it, in turns
    after = both[len(plan.windows) % 2]
    after.zero_() if d_keys is None else after.copy_(d_keys.view_as(after))
    d_table = None
    if table is not None:
        d_table = new(table).zero_() if d_values is None else d_values.clone()
    d_value = torch.zeros_like(tokens.value)
    d_gate = None if tokens.gate is None else torch.zeros_like(tokens.gate)
    d_query = torch.zeros_like(tokens.query, dtype=torch.float32 if overlap else None)
    tensors = {
        **tokens._asdict(), "latest": new(memories * cfg.num_slots, dtype=torch.int32).fill_(-1), "d_keys": both,
        "d_values": d_values, "d_output": d_output, "d_table": d_table, "d_value": d_value, "d_gate": d_gate,
        "d_query": d_query, "due": None,
    }  # fmt: skip
    given = tokens.gate is not None, d_output is not None, d_values is not None, table is not None
    through_values, through_keys = _steps(
        cfg, plan, query, tokens.query.shape[0], memories, overlap, given, kept.layout, scratch.layout
    )
    through_values.run(tensors, kept, scratch)
    if d_weights is not None:
        scratch["d_weights"].add_(d_weights)
    through_keys.run(tensors, kept, scratch)
    keys = both[0].unflatten(0, (memories, cfg.num_heads, 2))
    return Gradients(keys, d_table, d_query, d_value, d_gate)


@of_plan
def _steps(
    cfg: FwPKMConfig, plan: Plan, query: torch.dtype, batch: int, memories: int, overlap: bool,
    given: tuple[bool, ...], kept: Layout, scratch: Layout,
) -> tuple[Steps, Steps]:  # fmt: skip
    """The launches of a backward, through the values and through the keys.

    ``given``: whether there are gates, and gradients of the output and of the final table, and whether the gradient of
    the table before the call is asked for.
    """
    values, keys = Steps(kept, scratch), Steps(kept, scratch)
    _add_values(values, cfg, plan, query, batch, memories, *given)
    size = shapes(cfg, query).combine_backward
    keys.of(kernels.combine_backward_kernel, "ids", "slots", "weights", "kinds", "d_weights", "d_scores", **size)(
        (blocks_of(plan.total, size["BLOCK"]),), plan.total
    )
    _add_keys(keys, cfg, plan, query, batch, memories, overlap)
    return values, keys


def _add_values(
    steps: Steps, cfg: FwPKMConfig, plan: Plan, query: torch.dtype, batch: int, memories: int, gated: bool,
    output: bool, after: bool, table: bool,
) -> None:  # fmt: skip
    """Add what gives the gradients of weights, of rows, and of the stream's values and gates."""
    size, entries = shapes(cfg, query), cfg.slots_per_token
    reads = {
        writes: steps.of(
            kernels.read_backward_kernel, "slots", "weights", "kinds", "gate", "error", "strength", "heads", "steps",
            "latest", "rows", "values_unclipped", "gradients", "d_values", "d_output", "d_weights", "d_read",
            "d_value", "d_gate",
            HAS_GATE=gated, OUTPUT=output, AFTER=after, WRITES=writes, **size.read_backward,
        ) for writes in plan.kinds
    }  # fmt: skip
    sum_pieces = steps.of(
        kernels.piece_backward_kernel, "sorted_rows", "order", "weights", "d_read", "partial", **size.piece_backward
    )
    rows = steps.of(
        kernels.rows_backward_kernel, "sorted_rows", "order", "weights", "steps", "latest", "gradients", "d_values",
        "d_read", "partial", AFTER=after, **size.rows_backward,
    )  # fmt: skip
    for i in reversed(range(len(plan.windows))):
        start, length, writes, first, fresh = plan.windows[i]
        number = batch * length
        reads[writes](
            (number,), start, length, first, plan.room, batch // memories, fresh, plan.arrived,
            plan.room - plan.arrived,
        )  # fmt: skip
        if i > 0 or table:
            sum_pieces((blocks_of(number * entries, size.piece_backward["PIECE"]),), first, plan.total)
            rows((number * entries,), i, memories, first, plan.total)
    if table:
        steps.of(kernels.table_backward_kernel, "latest", "gradients", "d_table", **size.table_backward)(
            (memories * cfg.num_slots,)
        )


def _add_keys(
    steps: Steps, cfg: FwPKMConfig, plan: Plan, query: torch.dtype, batch: int, memories: int, overlap: bool,
) -> None:  # fmt: skip
    """Add what gives the gradients of the keys before each window, and of the stream's queries."""
    size, rows, groups = shapes(cfg, query), batch // memories, memories * cfg.num_heads * 2
    sums = KeySums(cfg, query, memories, steps.place("maps").shape[-1])
    sum_slopes, sum_ranks = sums.of(steps, "d_slopes", queries=False), sums.of(steps, "d_ranks")
    chosen = "ids", "ranks", "kinds", "share", "counts", "moved", "keys_unclipped"
    pull = steps.of(
        kernels.pull_backward_kernel, "query", "keys", "d_keys", *chosen, "d_pulls", "d_slopes", **size.by_token
    )
    scores = {
        writes: steps.of(
            kernels.scores_backward_kernel, "query", "keys", "d_keys", *chosen, "d_pulls", "totals", "d_scores",
            "d_ranks", "d_query", WRITES=writes, ADD=overlap, **size.by_token,
        ) for writes in plan.kinds
    }  # fmt: skip
    keys = {
        writes: steps.of(
            kernels.keys_backward_kernel, "d_keys", "sums", "totals", "moved", "pulled", "keys_unclipped",
            WRITES=writes, **size.keys_backward,
        ) for writes in plan.kinds
    }  # fmt: skip
    for i in reversed(range(len(plan.windows))):
        start, length, writes, first, _ = plan.windows[i]
        where = (start, length, first, plan.room, rows)
        by_token = (blocks_of(rows * length, size.by_token["BLOCK"]), groups)
        pieces = 0
        if writes:
            pull(by_token, i, *where)
            pieces = sum_slopes(i, i, 0, *where)
        scores[writes](by_token, i, pieces, *where)
        pieces = sum_ranks(i, i, 0, *where)
        keys[writes]((cfg.num_subkeys, groups), i, pieces)
