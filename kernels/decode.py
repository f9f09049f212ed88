"""SPEC.md §5 one token at a time, decided on the GPU: every launch is made at every step, whatever the position.

So a CUDA graph can hold a step. What a write needs is launched too, and does nothing until a chunk is complete.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State
from fwpkm.kernels import call
from fwpkm.kernels.launch import Launch
from fwpkm.kernels.lookup import best_sums, bounded_scores, softmax_all
from fwpkm.kernels.parts import store_key
from fwpkm.kernels.ranks import best_of_all, exact_ranks
from fwpkm.kernels.room import room_for
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.tokens import DEAD, INF, LIVE, flag_of, not_due
from fwpkm.kernels.windows import least, write


@triton.jit(do_not_specialize=["rows"])
def scan_kernel(
    query, keys, ranks, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, IDW: tl.constexpr,
    CHOICES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The ranks of all sub-keys for one token and codebook."""
    b, half = tl.program_id(1) // (2 * HEADS), tl.program_id(1) % (2 * HEADS)
    subkey = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    group = (b // rows) * 2 * HEADS + half
    rank = exact_ranks(
        query + tl.program_id(1).to(tl.int64) * HALF, keys + group.to(tl.int64) * SUBKEYS * HALF,
        subkey, subkey < SUBKEYS, True, HALF, IDW, CHOICES, STEP,
    )  # fmt: skip
    tl.store(ranks + tl.program_id(1) * SUBKEYS + subkey, rank, mask=subkey < SUBKEYS)


@triton.jit(do_not_specialize=["rows"])
def token_kernel(
    position, query, value, gate, mask, ranks, values, largest, flags, due, output, rows,
    QUERY: tl.constexpr, VALUE: tl.constexpr, QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, CHUNK: tl.constexpr, LAG: tl.constexpr, GROUPS: tl.constexpr,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr, EPSILON: tl.constexpr,
    TEMPERATURE: tl.constexpr, CHOICES: tl.constexpr, LISTED: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A token arrives and reads: from the ranks of all sub-keys to v̂, NaN where it is dead.

    Also its flag, whether it completes a chunk (``due`` [0]) and how many were pending ([1]); and for the write of that
    chunk, zeros in ``largest``.
    """
    b = tl.program_id(0)
    at = tl.load(position + b)
    waiting = at - tl.maximum((at - LAG) // CHUNK, 0) * CHUNK
    tl.store(position + b, at + 1)
    if b == 0:
        tl.store(due, (waiting + 1 == CHUNK + LAG).to(tl.int32))
        tl.store(due + 1, waiting)
        for group in range(2 * GROUPS):
            tl.store(largest + group, 0)
    flag = flag_of(
        query, value, gate, mask, None, b.to(tl.int64),
        QUERY, VALUE, QUERY_BLOCK, VALUE_BLOCK, HAS_GATE, HAS_MASK, False, False,
    )  # fmt: skip
    choice, head = tl.arange(0, CHOICES), tl.arange(0, HEAD_BLOCK)
    alive = ((flag & DEAD) == 0) & (tl.zeros([1], tl.int32) == 0)
    logits = tl.full([1, HEAD_BLOCK, CHOICES], -INF, tl.float32)
    slots = tl.zeros([1, HEAD_BLOCK, CHOICES], tl.int32)
    for h in tl.static_range(HEADS):
        place = (b * HEADS + h).to(tl.int64) * 2
        rank1, id1 = best_of_all(ranks + place * SUBKEYS, SUBKEYS, K, CHOICES, LISTED)
        rank2, id2 = best_of_all(ranks + (place + 1) * SUBKEYS, SUBKEYS, K, CHOICES, LISTED)
        s1, bounded1 = bounded_scores(rank1[None, :], choice, K, EPSILON, IDW)
        s2, bounded2 = bounded_scores(rank2[None, :], choice, K, EPSILON, IDW)
        alive = alive & bounded1 & bounded2
        sums, slot = best_sums(s1, s2, id1[None, :], id2[None, :], choice, SUBKEYS, K, 1, CHOICES)
        logits = tl.where((head == h)[None, :, None], (sums / TEMPERATURE)[:, None, :], logits)
        slots = tl.where((head == h)[None, :, None], slot[:, None, :], slots)
    valid = (head < HEADS)[None, :, None] & (choice < K)[None, None, :]
    w, alive = softmax_all(logits, valid, alive)
    w = tl.reshape(tl.where(valid, w, 0.0), [HEAD_BLOCK * CHOICES])
    row = (b // rows).to(tl.int64) * SUBKEYS * SUBKEYS + tl.reshape(slots, [HEAD_BLOCK * CHOICES])
    lives = tl.max(alive.to(tl.int32), 0) > 0
    tl.store(flags + b, tl.where(lives, flag, DEAD).to(tl.int8))
    for d0 in range(0, VALUE, STEP):
        d = d0 + tl.arange(0, STEP)
        rows_read = tl.load(
            values + row[:, None] * VALUE + d[None, :], mask=(w > 0)[:, None] & (d < VALUE)[None, :], other=0.0
        )
        read = tl.where(lives, tl.sum(w[:, None] * rows_read, 0), float("nan"))
        tl.store(output + b.to(tl.int64) * VALUE + d, read.to(output.dtype.element_ty), mask=d < VALUE)


@triton.jit
def move(source, into, width: tl.constexpr, blank, BLOCK: tl.constexpr):
    """Copy one row, or zeros where ``blank``."""
    d = tl.arange(0, BLOCK)
    x = tl.load(source + d, mask=(d < width) & (blank == 0), other=0.0)
    tl.store(into + d, x.to(into.dtype.element_ty), mask=d < width)


@triton.jit
def stage_kernel(
    pending_query, pending_value, pending_gate, pending_mask, query, value, gate, flags,
    all_query, all_value, all_gate, all_flags, keys, norms, largest, parts, zeros, due,
    TOKENS: tl.constexpr, ROOM: tl.constexpr, PENDING: tl.constexpr, QUERY: tl.constexpr, VALUE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, HAS_GATE: tl.constexpr, GROUPS: tl.constexpr,
    SUBKEYS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ZEROS: tl.constexpr, ZERO_BLOCK: tl.constexpr,
):  # fmt: skip
    """What the write of a complete chunk begins with.

    Its tokens end to end, the pending ones and the one that has arrived, with their flags; the keys in parts; zeros.
    """
    if not_due(due):
        return
    i = tl.program_id(0)
    if i < TOKENS:
        b, j, into = (i // ROOM).to(tl.int64), i % ROOM, i.to(tl.int64)
        if j < ROOM - 1:
            old = b * PENDING + j
            move(pending_query + old * QUERY, all_query + into * QUERY, QUERY, False, QUERY_BLOCK)
            move(pending_value + old * VALUE, all_value + into * VALUE, VALUE, False, VALUE_BLOCK)
            tl.store(all_gate + into, tl.load(pending_gate + old).to(all_gate.dtype.element_ty))
            flag = flag_of(
                pending_query, pending_value, pending_gate, pending_mask, None, old,
                QUERY, VALUE, QUERY_BLOCK, VALUE_BLOCK, True, True, False, False,
            )  # fmt: skip
            tl.store(all_flags + into, flag.to(tl.int8))
        else:
            move(query + b * QUERY, all_query + into * QUERY, QUERY, False, QUERY_BLOCK)
            move(value + b * VALUE, all_value + into * VALUE, VALUE, False, VALUE_BLOCK)
            g = 1.0
            if HAS_GATE:
                g = tl.load(gate + b).to(tl.float32)
            tl.store(all_gate + into, g)
            tl.store(all_flags + into, tl.load(flags + b))
    elif i < TOKENS + GROUPS * SUBKEYS:
        row = i - TOKENS
        group, subkey = row // SUBKEYS, row % SUBKEYS
        d = tl.arange(0, BLOCK)
        key = tl.load(keys + row.to(tl.int64) * HALF + d, mask=d < HALF, other=0.0)
        store_key(key, keys, norms, largest, parts, 0, 0, group * 0 + GROUPS, group, subkey, d, SUBKEYS, HALF)
    else:
        at = (i - TOKENS - GROUPS * SUBKEYS).to(tl.int64) * ZERO_BLOCK + tl.arange(0, ZERO_BLOCK)
        tl.store(zeros + at, tl.zeros([ZERO_BLOCK], tl.int32), mask=at < ZEROS)


@triton.jit(do_not_specialize=["count"])
def sort_kernel(table_rows, sorted_rows, order, due, count, BLOCK: tl.constexpr):
    """A stable sort of few numbers: the place of each is how many are smaller, or equal and before it.

    Those of each memory, ``count``, are consecutive and below those of the next.
    """
    if not_due(due):
        return
    begin = tl.program_id(1).to(tl.int64) * count
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(table_rows + begin + mine, mask=mine < count, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    for at in range(0, count, BLOCK):
        other = at + tl.arange(0, BLOCK)
        rows = tl.load(table_rows + begin + other, mask=other < count, other=0)
        less = rows[None, :] < row[:, None]
        ahead = (less | ((rows[None, :] == row[:, None]) & (other[None, :] < mine[:, None]))) & (other < count)[None, :]
        place += tl.sum(ahead.to(tl.int32), 1)
    tl.store(sorted_rows + begin + place, row, mask=mine < count)
    tl.store(order + begin + place, begin + mine, mask=mine < count)


@triton.jit
def settle_kernel(
    pending_query, pending_value, pending_gate, pending_mask, query, value, gate, flags,
    all_query, all_value, all_gate, all_flags, due,
    ROOM: tl.constexpr, PENDING: tl.constexpr, LAG: tl.constexpr, QUERY: tl.constexpr, VALUE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """What is pending after the step: the token too; or after a write the chunk's last LAG tokens, and zeros."""
    b, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    into = b * PENDING + j
    if tl.load(due) != 0:
        old = b * ROOM + ROOM - LAG + j
        flag = tl.load(all_flags + old, mask=j < LAG, other=DEAD).to(tl.int32)
        blank = (flag & DEAD) != 0
        move(all_query + old * QUERY, pending_query + into * QUERY, QUERY, blank, QUERY_BLOCK)
        move(all_value + old * VALUE, pending_value + into * VALUE, VALUE, blank, VALUE_BLOCK)
        tl.store(pending_gate + into, tl.load(all_gate + old, mask=blank == 0, other=0.0))
        tl.store(pending_mask + into, (flag & LIVE) != 0)
    elif j == tl.load(due + 1):
        flag = tl.load(flags + b).to(tl.int32)
        blank = (flag & DEAD) != 0
        move(query + b * QUERY, pending_query + into * QUERY, QUERY, blank, QUERY_BLOCK)
        move(value + b * VALUE, pending_value + into * VALUE, VALUE, blank, VALUE_BLOCK)
        g = 1.0
        if HAS_GATE:
            g = tl.load(gate + b).to(tl.float32)
        tl.store(pending_gate + into, tl.where(blank, 0.0, g))
        tl.store(pending_mask + into, (flag & LIVE) != 0)


def decode(
    cfg: FwPKMConfig, state: State, query: Tensor, value: Tensor, gate: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Read one token of each sequence, and write the chunk that it completes; everything in ``state`` is overwritten.

    Args:
        cfg: the configuration.
        state: contiguous, float32, its position on the GPU.
        query: ``[B, 1, H*Dk]``, contiguous.
        value: ``[B, 1, Dv]``, contiguous.
        gate: ``[B, 1]``, contiguous, or None.
        mask: ``[B, 1]`` bool, contiguous, or None.

    Returns:
        output ``[B, 1, Dv]`` in the query's dtype.
    """
    (keys, values), *pending, position = state
    batch, memories, size = query.shape[0], keys.shape[0], shapes(cfg, query.dtype)
    rows, heads, subkeys, half = batch // memories, cfg.num_heads, cfg.num_subkeys, cfg.key_dim // 2
    lag, capacity, groups = schedule.lag(cfg), schedule.capacity(cfg), 2 * memories * cfg.num_heads
    room = cfg.chunk_size + lag

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    plan = write(room, batch)
    kept, scratch = room_for(cfg, plan, least(plan, batch), keys, batch, save=False, in_keys=True)
    flags, due, ranks = new(batch, dtype=torch.int8), new(2, dtype=torch.int32), new(batch, heads, 2, subkeys)
    widths = {"QUERY": heads * cfg.key_dim, "VALUE": cfg.value_dim}
    widths |= {name: size.prepare[name] for name in ("QUERY_BLOCK", "VALUE_BLOCK")}
    scored = {"HEADS": heads, "SUBKEYS": subkeys, "IDW": cfg.score == "idw"}
    gated, output = {"HAS_GATE": gate is not None}, query.new_empty(batch, 1, cfg.value_dim)
    Launch(scan_kernel, query, keys, ranks, HALF=half, **scored, **size.scan)(
        (blocks_of(subkeys, size.scan["CHOICES"]), batch * heads * 2), rows
    )
    Launch(
        token_kernel, position, query, value, gate, mask, ranks, values, scratch.largest, flags, due, output,
        HAS_MASK=mask is not None, CHUNK=cfg.chunk_size, LAG=lag, GROUPS=groups, K=cfg.top_k, EPSILON=cfg.score_eps,
        TEMPERATURE=cfg.temperature, **gated, **widths, **scored, **size.token,
    )((batch,), rows)  # fmt: skip

    stream = new(batch, room, heads * cfg.key_dim), new(batch, room, cfg.value_dim), new(batch, room)
    places = {"ROOM": room, "PENDING": capacity, **gated, **widths}
    zeros = scratch.zeros[: scratch.largest.storage_offset()]  # which come before it
    Launch(
        stage_kernel, *pending, query, value, gate, flags, *stream, kept.flags, keys, scratch.norms, scratch.largest,
        scratch.halves, zeros, due, TOKENS=batch * room, GROUPS=groups, SUBKEYS=subkeys, HALF=half,
        BLOCK=size.keys["BLOCK"], ZEROS=len(zeros), ZERO_BLOCK=1024, num_warps=1, **places,
    )((batch * room + groups * subkeys + blocks_of(len(zeros), 1024),))  # fmt: skip
    tokens = call.Tokens(*stream, None)
    none = kept.ids.new_empty(batch, 0, heads * cfg.top_k, dtype=torch.int64), new(batch, 0, heads * cfg.top_k)
    call.address(cfg, plan, tokens, kept, scratch, *none, save=False, due=due)
    table_rows, count = kept.sorted_rows, batch * room * cfg.slots_per_token // memories
    kept = kept._replace(
        sorted_rows=torch.empty_like(table_rows), order=torch.empty_like(table_rows, dtype=torch.int64)
    )
    Launch(sort_kernel, table_rows, kept.sorted_rows, kept.order, due, BLOCK=64, num_warps=4)(
        (blocks_of(count, 64), memories), count
    )
    call.read_and_write(cfg, plan, values, tokens, kept, save=False, dtype=query.dtype, due=due)
    Launch(
        settle_kernel, *pending, query, value, gate, flags, *stream, kept.flags, due, LAG=lag, num_warps=1, **places
    )((batch, capacity))  # fmt: skip
    return output
