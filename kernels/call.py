"""One call of the memory on a GPU: the windows of SPEC.md §5 through the kernels of each step.

The keys do not depend on the values. So the windows are addressed one after the other, moving the keys; the entries of
all windows are then sorted by table row at once; and the windows read and write the values one after the other.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.kernels import chunk_update, lookup, parts
from fwpkm.kernels.launch import Launch
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.sums import KeySums, matrix_shape
from fwpkm.kernels.tokens import prepare_kernel, zero_kernel


class Window(NamedTuple):
    """Tokens [start, start + length) of the stream; whether the chunk at their beginning is written after them."""

    start: int
    length: int
    writes: bool
    first: int
    """Tokens of all sequences in the windows before."""
    fresh: int
    """Where in the stream the tokens begin that no window before has read."""


class Plan(NamedTuple):
    """What a call reads and writes."""

    windows: list[Window]
    arrived: int
    """Tokens of the stream that were pending: their reads have been output before."""
    room: int
    """n, tokens of the stream: pending ones, then new ones."""
    left: int
    """Where in the stream the tokens begin that no write has consumed."""
    total: int
    """Tokens of all windows, of all sequences."""


def plan(cfg: FwPKMConfig, position: int, length: int, batch: int, update: bool) -> Plan:
    """The windows of a call of ``length`` tokens at ``position``."""
    if not update:
        return Plan([Window(0, length, False, 0, 0)], 0, length, 0, batch * length)
    arrived = schedule.pending(cfg, position)
    windows, start, first = [], 0, 0
    fresh = arrived
    for begin, end, writes in schedule.segments(cfg, position, length):
        begin, end = begin + arrived, end + arrived
        begin = start if writes else begin  # a write reads its whole chunk again; else what is pending stays unread
        windows.append(Window(begin, end - begin, writes, first, fresh))
        first, fresh = first + batch * (end - begin), end
        start += cfg.chunk_size * writes
    return Plan(windows, arrived, fresh, start, first)


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


class Kept(NamedTuple):
    """What a call computed, by window: token w of all windows, entry e = w·H·k + j, group g of [M, H, 2]."""

    flags: Tensor
    """``[B, n]`` int8"""
    kinds: Tensor
    """``[w]`` int8: the flags as the window found them."""
    keys: Tensor
    """``[windows + 1, g, S, Dk/2]``: before each window, and after the last."""
    ids: Tensor
    """``[w, H, 2, k]`` sub-keys, best first."""
    ranks: Tensor
    """``[w, H, 2, k]``: -‖q - K‖², or q·K."""
    share: Tensor
    """``[windows, g, S]`` int64: Σ p over the chunk."""
    counts: Tensor
    """``[windows, M]``: n."""
    active: Tensor
    """``[windows, M]``: whether any token has a pair."""
    moved: Tensor
    """``[windows, g, S]`` int8: whether the sub-key moved."""
    pulled: Tensor
    """``[windows, g, S]``: Σ c."""
    keys_unclipped: Tensor
    slots: Tensor
    """``[w, H*k]``"""
    weights: Tensor
    """``[w, H*k]``"""
    strength: Tensor
    """``[w]``: κ g of the tokens that have a pair, else 0."""
    error: Tensor
    """``[w, Dv]``: v̂ - u of those, else 0."""
    order: Tensor
    """``[w*H*k]``: the entries by window, table row and token."""
    sorted_rows: Tensor
    """``[w*H*k]``: their table rows, those of the next window's tables behind those of this one's."""
    heads: Tensor
    """``[w*H*k]``: where each entry's segment begins in that order."""
    steps: Tensor
    """by segment: η/N of a row that moved, else 0."""
    rows: Tensor
    """by segment: the table row before the write, ``[Dv]``."""
    values_unclipped: Tensor


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
    cfg: FwPKMConfig, plan: Plan, keys: Tensor, values: Tensor, tokens: Tokens, save: bool, due: Tensor | None = None
) -> Result:
    """Read and write all windows; ``values`` [M, N, Dv] is overwritten, ``keys`` is not.

    Args:
        cfg: the configuration.
        plan: the windows.
        keys: ``[M, H, 2, S, Dk/2]`` float32, contiguous.
        values: ``[M, N, Dv]`` float32, contiguous.
        tokens: the stream.
        save: keep what ``backward`` needs.
        due: None, or an int32 on the GPU: where it is 0, nothing is done and the result means nothing.
    """
    batch, entries, fresh_length = tokens.query.shape[0], cfg.slots_per_token, plan.room - plan.arrived
    kept, largest, matrix = _room_for(cfg, plan, keys, batch, save, due)
    slots = kept.slots.new_empty(batch, fresh_length, entries, dtype=torch.int64)
    weights = kept.weights.new_empty(batch, fresh_length, entries)
    last, addressing = _address(cfg, plan, keys, tokens, kept, largest, matrix, slots, weights, save, due)
    kept = kept._replace(**dict(zip(("sorted_rows", "order"), sort(kept.sorted_rows, due))))
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


def _room_for(
    cfg: FwPKMConfig, plan: Plan, keys: Tensor, batch: int, save: bool, due: Tensor | None
) -> tuple[Kept, Tensor, Tensor]:
    """Memory for all that a call computes by window; with ``due`` the keys are written where they stand.

    And zeros: for the largest ‖K‖² before each window [windows + 1, g], as the integer that has its bits; and for the
    matrix of ``KeySums``.
    """
    memories, entries, number, total = keys.shape[0], cfg.slots_per_token, len(plan.windows), plan.total
    groups, half, subkeys = memories * cfg.num_heads * 2, cfg.key_dim // 2, cfg.num_subkeys

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    def saved(*shape: int, dtype: torch.dtype = torch.float32, also: bool = True) -> Tensor | None:
        return new(*shape, dtype=dtype) if save and also else None

    int8, int32, clips = torch.int8, torch.int32, cfg.grad_clip is not None
    share, matrix, counts, active, largest = zeros(
        keys.device, due,
        ((number, groups, subkeys), torch.int64),
        (matrix_shape(cfg, memories, batch // memories * max(w.length for w in plan.windows)), torch.bfloat16),
        ((number, memories), int32), ((number, memories), int32), ((number + 1, groups), int32),
    )  # fmt: skip
    wide = number * memories * cfg.num_slots > 2**31 - 1
    table_rows = new(total * entries, dtype=torch.int64 if wide else int32)
    kept = Kept(
        flags=new(batch, plan.room, dtype=int8),
        kinds=new(total, dtype=int8),
        keys=new(number + 1 if save else 1, groups, subkeys, half) if due is None else keys.view(1, groups, subkeys, half),
        ids=new(total, cfg.num_heads, 2, cfg.top_k, dtype=int32),
        ranks=new(total, cfg.num_heads, 2, cfg.top_k),
        share=share, counts=counts, active=active,
        moved=saved(number, groups, subkeys, dtype=int8),
        pulled=saved(number, groups, subkeys),
        keys_unclipped=saved(number, groups, subkeys, half, dtype=int8, also=clips),
        slots=new(total, entries, dtype=int32),
        weights=new(total, entries),
        strength=new(total),
        error=new(total, cfg.value_dim),
        order=table_rows, sorted_rows=table_rows,
        heads=saved(total * entries, dtype=int32),
        steps=saved(total * entries),
        rows=saved(total * entries, cfg.value_dim),
        values_unclipped=saved(total * entries, cfg.value_dim, dtype=int8, also=clips),
    )  # fmt: skip
    return kept, largest, matrix


def _address(
    cfg: FwPKMConfig, plan: Plan, keys: Tensor, tokens: Tokens, kept: Kept, largest: Tensor, matrix: Tensor,
    slots: Tensor, weights: Tensor, save: bool, due: Tensor | None,
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
    sums = KeySums(cfg, tokens.query, kept.ids, kept.kinds, matrix, longest, due)
    Launch(
        prepare_kernel, *tokens, kept.flags, due, QUERY=cfg.num_heads * cfg.key_dim, VALUE=cfg.value_dim,
        HAS_GATE=tokens.gate is not None, HAS_MASK=tokens.mask is not None, HAS_PAIR=tokens.pair is not None,
        SHIFTED=tokens.pair is not None, **size.prepare,
    )((kept.flags.numel(),))  # fmt: skip
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
            kept.sorted_rows, kept.share, kept.counts, slots, weights, due,
            TEMPERATURE=cfg.temperature, WRITES=writes, **scored, **size.combine,
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
            (blocks_of(rows * length, size.combine["BLOCK"]), memories), i, memories, *where,
            fresh, plan.arrived, slots.shape[1],
        )  # fmt: skip
        if writes:
            pull((blocks_of(rows * length, size.pull["BLOCK"]), groups), i, *where)
            pieces = sums.launch(key_sums, first, *where, again=i + 1 < number)
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


def zeros(device: torch.device, due: Tensor | None, *parts: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Zeros of these shapes and dtypes, at the price of one launch."""
    sizes = [blocks_of(math.prod(shape) * dtype.itemsize, 16) * 16 for shape, dtype in parts]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    if due is None:
        buffer.zero_()
    else:
        number = len(buffer) // 4
        Launch(zero_kernel, buffer.view(torch.int32), due, BLOCK=1024, num_warps=4)((blocks_of(number, 1024),), number)
    taken = [x[: math.prod(shape) * dtype.itemsize] for x, (shape, dtype) in zip(buffer.split(sizes), parts)]
    return [x.view(dtype).view(shape) for x, (shape, dtype) in zip(taken, parts)]


def scale_of(cfg: FwPKMConfig) -> float:
    """κ of §4, or 0 where it is 1/Σw²."""
    return {"slots": float(cfg.slots_per_token), "unit": 1.0, "normalized": 0.0}[cfg.write_scale]


def sort(table_rows: Tensor, due: Tensor | None) -> tuple[Tensor, Tensor]:
    """The table rows in order, and where they were."""
    if due is None:
        return table_rows.sort(stable=True)
    sorted_rows, order = torch.empty_like(table_rows), torch.empty_like(table_rows, dtype=torch.int64)
    count = len(table_rows)
    rank = Launch(lookup.sort_kernel, table_rows, sorted_rows, order, due, BLOCK=64, num_warps=4)
    rank((blocks_of(count, 64),), count)
    return sorted_rows, order
