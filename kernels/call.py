"""One call of the memory on a GPU: the windows of SPEC.md §5 through the kernels of each step.

The keys do not depend on the values. So the windows are addressed one after the other, moving the keys; the entries of
all windows are then sorted by table row at once; and the windows read and write the values one after the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.kernels import chunk_update, lookup
from fwpkm.kernels.shapes import Shapes, shapes


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
    """What a call computed, by window: token w of all windows, entry e = w·H·k + j."""

    flags: Tensor
    """``[B, n]`` int8"""
    kinds: Tensor
    """``[w]`` int8: the flags as the window found them."""
    keys: Tensor
    """``[windows + 1, M, H, 2, S, Dk/2]``: before each window, and after the last."""
    ids: Tensor
    """``[w, H, 2, k]`` sub-keys, best first."""
    ranks: Tensor
    """``[w, H, 2, k]``: -‖q - K‖², or q·K."""
    share: Tensor
    """``[windows, M, H, 2, S]`` int64: Σ p over the chunk."""
    bits: list[Tensor]
    """per window ``[M, H, 2, S, words]``: which tokens chose a sub-key."""
    counts: Tensor
    """``[windows, M]``"""
    moved: Tensor
    """``[windows, M, H, 2, S]`` int8: whether the sub-key moved."""
    keys_unclipped: Tensor
    slots: Tensor
    """``[w, H*k]``"""
    weights: Tensor
    """``[w, H*k]``"""
    strength: Tensor
    """``[w]``: κ g of the tokens that have a pair, else 0."""
    error: Tensor
    """``[w, Dv]``: v̂ - u of those, else 0."""
    heads: Tensor
    """``[w*H*k]``: where each entry's segment begins in the sorted order."""
    steps: Tensor
    """by segment: η/N of a row that moved, else 0."""
    nexts: Tensor
    """by segment: that of the same row in a later window, or -1."""
    rows: Tensor
    """by segment: the table row before the write, ``[Dv]``."""
    values_unclipped: Tensor
    order: Tensor
    sorted_rows: Tensor
    place: Tensor


class Result(NamedTuple):
    """What a call gives."""

    output: Tensor
    """``[B, T, Dv]``"""
    keys: Tensor
    memorization: Tensor
    """``[windows, M]``"""
    addressing: Tensor
    """``[windows, M]``"""
    kept: Kept


def forward(cfg: FwPKMConfig, plan: Plan, keys: Tensor, values: Tensor, tokens: Tokens, save: bool) -> Result:
    """Read and write all windows; ``values`` [M, N, Dv] is overwritten, ``keys`` is not.

    Args:
        cfg: the configuration.
        plan: the windows.
        keys: ``[M, H, 2, S, Dk/2]`` float32, contiguous.
        values: ``[M, N, Dv]`` float32, contiguous.
        tokens: the stream.
        save: keep what ``backward`` needs.
    """
    size, like = shapes(cfg), keys
    batch, memories, entries = tokens.query.shape[0], keys.shape[0], cfg.slots_per_token
    rows, groups, half = batch // memories, memories * cfg.num_heads * 2, cfg.key_dim // 2
    idw, number, total = cfg.score == "idw", len(plan.windows), plan.total

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)

    int8, int32 = torch.int8, torch.int32
    clips = save and cfg.grad_clip is not None
    lists = [save or w.writes for w in plan.windows]
    words = [-(-rows * w.length // 32) for w in plan.windows]
    bits = list(torch.zeros(groups * cfg.num_subkeys * sum(words), dtype=int32, device=like.device).split(
        [groups * cfg.num_subkeys * n for n in words]))  # fmt: skip
    versions = number + 1 if save else min(number + 1, 3)  # two that take turns, and the caller's
    kept = Kept(
        flags=new(batch, plan.room, dtype=int8),
        kinds=new(total, dtype=int8),
        keys=new(versions, *keys.shape),
        ids=new(total, cfg.num_heads, 2, cfg.top_k, dtype=int32),
        ranks=new(total, cfg.num_heads, 2, cfg.top_k),
        share=torch.zeros(number, groups, cfg.num_subkeys, dtype=torch.int64, device=like.device),
        bits=bits,
        counts=new(number, memories, dtype=int32),
        moved=torch.zeros(number if save else 0, groups, cfg.num_subkeys, dtype=int8, device=like.device),
        keys_unclipped=new(number if clips else 0, groups, cfg.num_subkeys, half, dtype=int8),
        slots=new(total, entries, dtype=int32),
        weights=new(total, entries),
        strength=new(total),
        error=new(total, cfg.value_dim),
        heads=new(total * entries if save else 0, dtype=int32),
        steps=new(total * entries if save else 0),
        nexts=new(total * entries if save else 0, dtype=int32),
        rows=new(total * entries if save else 0, cfg.value_dim),
        values_unclipped=new(total * entries if clips else 0, cfg.value_dim, dtype=int8),
        order=keys, sorted_rows=keys, place=keys,
    )  # fmt: skip
    active = torch.zeros(number, memories, dtype=int32, device=like.device)
    addressing = torch.zeros(number, groups, cfg.num_subkeys, device=like.device)
    squared = torch.zeros(total, device=like.device)
    _prepare(cfg, tokens, kept.flags, size)

    kept.keys[0].copy_(keys)
    norms = new(versions, groups, cfg.num_subkeys)
    torch.sum(keys.square(), -1, out=norms[0].view(keys.shape[:-1]))
    common = {"HEADS": cfg.num_heads, "SUBKEYS": cfg.num_subkeys, "K": cfg.top_k, "IDW": idw}
    version = 0
    for i, (start, length, writes, first, _) in enumerate(plan.windows):
        where = (start, length, first, plan.room, rows)
        blocks = blocks_of(rows * length, size.select["BLOCK"])
        lookup.select_kernel[(blocks, groups)](
            tokens.query, kept.flags, kept.keys[version], norms[version], kept.ids, kept.ranks, *where,
            HALF=half, **common, **size.select,
        )  # fmt: skip
        lookup.combine_kernel[(blocks_of(batch * length, size.combine["BLOCK"]),)](
            kept.ids, kept.ranks, kept.flags, kept.kinds, kept.slots, kept.weights, kept.share[i], bits[i],
            *where, batch, words[i], EPSILON=cfg.score_eps, TEMPERATURE=cfg.temperature, CHUNK=cfg.chunk_size,
            WRITES=writes, LIST=lists[i], **common, **size.combine,
        )  # fmt: skip
        if not writes:
            if save:
                kept.keys[version + 1].copy_(kept.keys[version])
            continue
        chunk_update.tally_kernel[(memories,)](
            kept.kinds, kept.counts[i], active[i], length, first, rows,
            CHUNK=cfg.chunk_size, LOOKAHEAD=cfg.lookahead, BLOCK=1024,
        )  # fmt: skip
        after = version + 1 if save else 1 + version % 2
        chunk_update.keys_kernel[(cfg.num_subkeys, groups)](
            tokens.query, kept.keys[version], norms[version], kept.keys[after], norms[after], kept.ids, kept.ranks,
            kept.kinds, kept.share[i], bits[i], kept.counts[i], active[i], addressing[i],
            kept.moved[i] if save else kept.moved, kept.keys_unclipped[i] if clips else kept.moved,
            *where, words[i], HALF=half, EPSILON=cfg.score_eps, CHUNK=cfg.chunk_size, RATE=cfg.learning_rate,
            DECAY=cfg.weight_decay, CLIP=cfg.grad_clip, WEIGHT=cfg.addressing_weight, SAVE=save,
            **common, **size.keys,
        )  # fmt: skip
        version = after

    kept = sort(cfg, plan, kept, memories, batch)
    output = new(batch, plan.room - plan.arrived, cfg.value_dim, dtype=tokens.query.dtype)
    table = {"SLOTS": cfg.num_slots, "WIDTH": cfg.value_dim, "ENTRIES": entries, "CHUNK": cfg.chunk_size}
    for i, (start, length, writes, first, fresh) in enumerate(plan.windows):
        lookup.read_kernel[(batch * length,)](
            values, kept.slots, kept.weights, kept.kinds, tokens.value, tokens.gate, output, kept.error, kept.strength,
            squared, start, length, first, plan.room, rows, fresh, plan.arrived, output.shape[1],
            LOOKAHEAD=cfg.lookahead, SCALE=scale_of(cfg), HAS_GATE=tokens.gate is not None, WRITES=writes,
            **table, **size.read,
        )  # fmt: skip
        if writes or save:
            chunk_update.values_kernel[(batch * length * entries,)](
                values, kept.sorted_rows, kept.order, kept.place, kept.weights, kept.strength, kept.error, kept.kinds,
                active[i], kept.heads, kept.steps, kept.nexts, kept.rows, kept.values_unclipped,
                length, first, rows, total * entries, first + batch * length,
                RATE=cfg.learning_rate, DECAY=cfg.weight_decay, CLIP=cfg.grad_clip, WRITES=writes, SAVE=save,
                **table, **size.values,
            )  # fmt: skip
    losses = [squared[w.first : w.first + batch * w.length].view(memories, -1).sum(1) for w in plan.windows if w.writes]
    addressing = addressing[: len(losses)].unflatten(1, (memories, -1)).sum((2, 3))  # only the last may not write
    memorization = torch.stack(losses) if losses else squared.new_zeros(0, memories)
    return Result(output, kept.keys[version].clone(), memorization, addressing, kept)


def blocks_of(number: int, block: int) -> int:
    """How many blocks cover a number."""
    return -(-number // block)


def scale_of(cfg: FwPKMConfig) -> float:
    """κ of §4, or 0 where it is 1/Σw²."""
    return {"slots": float(cfg.slots_per_token), "unit": 1.0, "normalized": 0.0}[cfg.write_scale]


def _prepare(cfg: FwPKMConfig, tokens: Tokens, flags: Tensor, size: Shapes) -> None:
    lookup.prepare_kernel[(flags.numel(),)](
        tokens.query, tokens.value, tokens.gate, tokens.mask, tokens.pair, flags,
        QUERY=cfg.num_heads * cfg.key_dim, VALUE=cfg.value_dim, HAS_GATE=tokens.gate is not None,
        HAS_MASK=tokens.mask is not None, HAS_PAIR=tokens.pair is not None, SHIFTED=tokens.pair is not None,
        **size.prepare,
    )  # fmt: skip


def sort(cfg: FwPKMConfig, plan: Plan, kept: Kept, memories: int, batch: int) -> Kept:
    """All entries by table row, those of one row in the order of windows and tokens."""
    wide = memories * cfg.num_slots > 2**31 - 1
    rows = kept.slots.view(-1).to(torch.int64) if wide else kept.slots.view(-1)
    if memories > 1:
        pieces = [rows.new_empty(0)]
        for w in plan.windows:
            mine = rows[w.first * cfg.slots_per_token : (w.first + batch * w.length) * cfg.slots_per_token]
            offset = torch.arange(memories, device=rows.device, dtype=rows.dtype) * cfg.num_slots
            pieces.append((mine.view(memories, -1) + offset[:, None]).view(-1))
        rows = torch.cat(pieces)
    sorted_rows, order = rows.sort(stable=True)
    place = torch.empty_like(order)
    place.scatter_(0, order, torch.arange(len(order), device=order.device))
    return kept._replace(order=order, sorted_rows=sorted_rows, place=place)
