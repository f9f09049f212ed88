"""One call of the memory on a GPU: the windows of SPEC.md §5 through the kernels of each step.

The keys do not depend on the values. So the windows are addressed one after the other, moving the keys; the entries of
all windows are then sorted by table row at once; and the windows read and write the values one after the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.kernels import chunk_update, lookup, parts
from fwpkm.kernels.launch import Launch
from fwpkm.kernels.room import Kept, room_for
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.sums import KeySums
from fwpkm.kernels.tokens import prepare_kernel
from fwpkm.kernels.windows import Bounds, Plan, least


class Tokens(NamedTuple):
    """The stream, contiguous; a gate, mask or pair that is None is 1 or True."""

    query: Tensor
    """``[B, n, H*Dk]``"""
    value: Tensor
    """``[B, n, Dv]``"""
    gate: Tensor | None
    """``[B, n]``"""
    mask: Tensor | None
    """``[B, n]`` bool"""
    pair: Tensor | None = None
    """``[B, n]`` bool: values are targets already, and these may be bound (``chunk_update``)."""


class Result(NamedTuple):
    """What a call gives."""

    output: Tensor
    """``[B, T, Dv]``"""
    slots: Tensor
    """``[B, T, H*k]`` int64"""
    weights: Tensor
    """``[B, T, H*k]``: NaN for dead tokens."""
    keys: Tensor
    memorization: Tensor
    """``[windows, M]``"""
    addressing: Tensor
    """``[windows, M]``"""
    kept: Kept


def forward(
    cfg: FwPKMConfig, plan: Plan, keys: Tensor, values: Tensor, tokens: Tokens, save: bool, due: Tensor | None = None,
    most: Bounds | None = None,
) -> Result:  # fmt: skip
    """Read and write all windows; ``values`` [M, N, Dv] is overwritten, ``keys`` is not.

    Args:
        cfg: the configuration.
        plan: the windows.
        keys: ``[M, H, 2, S, Dk/2]`` float32, contiguous.
        values: ``[M, N, Dv]`` float32, contiguous.
        tokens: the stream.
        save: keep what ``backward`` needs.
        due: None, or an int32 on the GPU: where it is 0, nothing is done and the result means nothing. A write goes into
            ``keys`` too.
        most: what to make room for, so that the shapes of what is kept do not depend on the position.
    """
    batch, entries, fresh_length = tokens.query.shape[0], cfg.slots_per_token, plan.room - plan.arrived
    kept, largest = room_for(cfg, plan, most or least(plan, batch), keys, batch, save, due)
    slots = kept.slots.new_empty(batch, fresh_length, entries, dtype=torch.int64)
    weights = kept.weights.new_empty(batch, fresh_length, entries)
    last, addressing = _address(cfg, plan, keys, tokens, kept, largest, slots, weights, save, due)
    kept = kept._replace(**dict(zip(("sorted_rows", "order"), sort(kept.sorted_rows, keys.shape[0], due))))
    output, squared = _read_and_write(cfg, plan, values, tokens, kept, save, due)
    memories = keys.shape[0]
    last = last.view(keys.shape)
    if due is not None:
        return Result(output, slots, weights, last, squared, addressing, kept)  # a decode step has no trace
    writes = sum(w.writes for w in plan.windows)  # all are of one length, and only the last window may not write
    written = squared[: writes * batch * plan.windows[0].length]
    memorization = written.view(writes, memories, -1).sum(2) if writes else squared.new_zeros(0, memories)
    addressing = addressing[:writes].unflatten(1, (memories, -1)).sum((2, 3))
    return Result(output, slots, weights, last.clone() if save else last, memorization, addressing, kept)


def _address(
    cfg: FwPKMConfig, plan: Plan, keys: Tensor, tokens: Tokens, kept: Kept, largest: Tensor, slots: Tensor,
    weights: Tensor, save: bool, due: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What each token picks, moving the keys; returns the last keys and the terms of the addressing loss."""
    size = shapes(cfg, tokens.query.dtype)
    batch, memories = tokens.query.shape[0], keys.shape[0]
    rows, groups, half, subkeys = batch // memories, memories * cfg.num_heads * 2, cfg.key_dim // 2, cfg.num_subkeys
    idw, number = cfg.score == "idw", len(plan.windows)
    longest = rows * max(w.length for w in plan.windows)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    addressing, norms = new(number, groups, subkeys), new(groups, subkeys)
    halves = new(groups, 2, subkeys, half, dtype=torch.bfloat16)
    listed = size.select["TILES"] * size.select["PROPOSED"]
    proposals = new(memories * longest, cfg.num_heads, 2, listed, dtype=torch.int32)
    scales, pulls = new(memories * longest, cfg.num_heads, 2), new(memories * longest, cfg.num_heads, 2, cfg.top_k)
    sums = KeySums(cfg, tokens.query, kept.ids, kept.maps, longest, due)
    Launch(
        prepare_kernel, *tokens, kept.flags, due, QUERY=cfg.num_heads * cfg.key_dim, VALUE=cfg.value_dim,
        HAS_GATE=tokens.gate is not None, HAS_MASK=tokens.mask is not None, HAS_PAIR=tokens.pair is not None,
        SHIFTED=tokens.pair is not None, **size.prepare,
    )((batch * plan.room,))  # fmt: skip
    Launch(
        parts.begin_kernel, keys, kept.keys, norms, largest, halves, due,
        SUBKEYS=subkeys, HALF=half, BLOCK=size.keys["BLOCK"], num_warps=1,
    )((subkeys, groups))  # fmt: skip
    names = {"HEADS": cfg.num_heads, "SUBKEYS": subkeys}
    scored = names | {"K": cfg.top_k, "IDW": idw, "EPSILON": cfg.score_eps, "CHUNK": cfg.chunk_size}
    select = Launch(
        lookup.select_kernel, tokens.query, kept.flags, norms, largest, halves, proposals, scales, due,
        HALF=half, IDW=idw, **names, **size.select,
    )  # fmt: skip
    rank = Launch(
        lookup.rank_kernel, tokens.query, kept.keys, proposals, scales, kept.flags, kept.ids, kept.ranks, due,
        HALF=half, K=cfg.top_k, IDW=idw, **names, **size.rank,
    )  # fmt: skip
    combines = {
        writes: Launch(
            lookup.combine_kernel, kept.ids, kept.ranks, kept.flags, kept.kinds, kept.slots, kept.weights,
            kept.sorted_rows, kept.share, kept.counts, kept.maps, slots, weights, due,
            TEMPERATURE=cfg.temperature, WRITES=writes, MAPS=writes or save, **scored, **size.combine,
        ) for writes in {w.writes for w in plan.windows}
    }  # fmt: skip
    pull = Launch(
        chunk_update.pull_kernel, kept.ids, kept.ranks, kept.kinds, kept.share, kept.counts, kept.active, pulls, due,
        LOOKAHEAD=cfg.lookahead, WEIGHT=cfg.addressing_weight, **scored, **size.pull,
    )  # fmt: skip
    key_sums = sums.of(pulls)
    step_keys = Launch(
        chunk_update.keys_kernel, kept.keys, norms, largest, halves, sums.sums, sums.totals, kept.share, kept.counts,
        kept.active, addressing, kept.moved, kept.pulled, kept.keys_unclipped, due,
        HALF=half, IDW=idw, SAVE=save, RATE=cfg.learning_rate, DECAY=cfg.weight_decay, CLIP=cfg.grad_clip,
        **names, **size.keys,
    )  # fmt: skip
    version = 0
    for i, (start, length, writes, first, fresh) in enumerate(plan.windows):
        where = (start, length, first, plan.room, rows)
        select((blocks_of(rows * length, size.select["BLOCK"]), groups, size.select["TILES"]), version, i, *where)
        rank((rows * length, groups), version, *where)
        combines[writes](
            (blocks_of(rows * length, size.combine["BLOCK"]), memories), i, memories, kept.maps.shape[-1], *where,
            fresh, plan.arrived, slots.shape[1],
        )  # fmt: skip
        if writes:
            pull((blocks_of(rows * length, size.pull["BLOCK"]), groups), i, *where)
            pieces = sums.launch(key_sums, i, first, *where)
            after = version + 1 if save else 0
            step_keys((subkeys, groups), i, version, after, pieces)
            version = after
    return kept.keys[version], addressing


def _read_and_write(
    cfg: FwPKMConfig, plan: Plan, values: Tensor, tokens: Tokens, kept: Kept, save: bool, due: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Read each window and write its chunk; returns the output, and ½ g ‖v̂ - u‖² [w]."""
    size, entries = shapes(cfg, tokens.query.dtype), cfg.slots_per_token
    batch, memories = tokens.query.shape[0], values.shape[0]
    output = values.new_empty(batch, plan.room - plan.arrived, cfg.value_dim, dtype=tokens.query.dtype)
    squared = values.new_empty(plan.total)
    table = {"SLOTS": cfg.num_slots, "WIDTH": cfg.value_dim, "ENTRIES": entries, "CHUNK": cfg.chunk_size}
    kinds = {w.writes for w in plan.windows}
    reads = {
        writes: Launch(
            lookup.read_kernel, values, kept.slots, kept.weights, kept.kinds, tokens.value, tokens.gate, output,
            kept.error, kept.strength, squared, due, LOOKAHEAD=cfg.lookahead, SCALE=scale_of(cfg),
            HAS_GATE=tokens.gate is not None, WRITES=writes, **table, **size.read,
        ) for writes in kinds
    }  # fmt: skip
    steps = {
        writes: Launch(
            chunk_update.values_kernel, values, kept.sorted_rows, kept.order, kept.weights, kept.strength, kept.error,
            kept.kinds, kept.active, kept.heads, kept.steps, kept.rows, kept.values_unclipped, due,
            WRITES=writes, SAVE=save, RATE=cfg.learning_rate, DECAY=cfg.weight_decay, CLIP=cfg.grad_clip,
            **table, **size.values,
        ) for writes in kinds
    }  # fmt: skip
    for i, (start, length, writes, first, fresh) in enumerate(plan.windows):
        reads[writes](
            (batch * length,), start, length, first, plan.room, batch // memories, fresh, plan.arrived, output.shape[1]
        )  # fmt: skip
        if writes or save:
            steps[writes]((batch * length * entries,), i, memories, length, first, plan.total)
    return output, squared


def scale_of(cfg: FwPKMConfig) -> float:
    """κ of §4, or 0 where it is 1/Σw²."""
    return {"slots": float(cfg.slots_per_token), "unit": 1.0, "normalized": 0.0}[cfg.write_scale]


def sort(table_rows: Tensor, memories: int, due: Tensor | None) -> tuple[Tensor, Tensor]:
    """The table rows in order, and where they were. With ``due``, those of one window."""
    if due is None:
        return table_rows.sort(stable=True)
    sorted_rows, order = torch.empty_like(table_rows), torch.empty_like(table_rows, dtype=torch.int64)
    count = len(table_rows) // memories
    rank = Launch(lookup.sort_kernel, table_rows, sorted_rows, order, due, BLOCK=64, num_warps=4)
    rank((blocks_of(count, 64), memories), count)
    return sorted_rows, order
