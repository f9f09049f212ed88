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
from fwpkm.kernels.launch import Steps
from fwpkm.kernels.layouts import kept_layout, scratch_layout
from fwpkm.kernels.lookup import best_sums, bounded_scores, softmax_all
from fwpkm.kernels.parts import store_key
from fwpkm.kernels.ranks import best_of_all, exact_ranks
from fwpkm.kernels.room import Layout, Room
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.tokens import DEAD, INF, LIVE, flag_of, not_due
from fwpkm.kernels.windows import Plan, least, of_plan, write


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
    batch, memories, room = query.shape[0], keys.shape[0], cfg.chunk_size + schedule.lag(cfg)
    plan, given = write(room, batch), (gate is not None, mask is not None)
    layouts = _layouts(cfg, plan, memories, batch)
    steps = _steps(cfg, plan, query.dtype, batch, memories, *given, layouts)
    output = query.new_empty(batch, 1, cfg.value_dim)
    tensors = {
        **dict(zip(_PENDING, pending)), "keys": keys, "table": values, "position": position, "output": output,
        "token_query": query, "token_value": value, "token_gate": gate, "token_mask": mask,
    }  # fmt: skip
    steps.run(tensors, *(Room.empty(layout, keys) for layout in layouts))
    return output


@of_plan
def _layouts(cfg: FwPKMConfig, plan: Plan, memories: int, batch: int) -> tuple[Layout, ...]:
    """Of what a step needs; its queries and values are float32 once they wait."""
    kept = kept_layout(cfg, least(plan, batch), memories, batch, False, False)
    own = {
        "token_ranks": ((batch, cfg.num_heads, 2, cfg.num_subkeys), torch.float32),
        "token_flags": ((batch,), torch.int8),
        "due": ((2,), torch.int32),
        "query": ((batch, plan.room, cfg.num_heads * cfg.key_dim), torch.float32),
        "value": ((batch, plan.room, cfg.value_dim), torch.float32),
        "gate": ((batch, plan.room), torch.float32),
        "new_slots": ((0,), torch.int64),
        "new_weights": ((0,), torch.float32),
    }
    row = kept.place("sorted_rows").dtype
    return kept, scratch_layout(cfg, plan, memories, batch, torch.float32, row), Layout.of(own)


_PENDING = "pending_query", "pending_value", "pending_gate", "pending_mask"


@of_plan
def _steps(
    cfg: FwPKMConfig, plan: Plan, query: torch.dtype, batch: int, memories: int, gated: bool, masked: bool,
    layouts: tuple[Layout, ...],
) -> Steps:  # fmt: skip
    """The launches of a step, those of the write that ``plan`` is among them."""
    steps, size, room = Steps(*layouts), shapes(cfg, query), plan.room
    (zeros,) = steps.place("counted").shape
    heads, subkeys, half = cfg.num_heads, cfg.num_subkeys, cfg.key_dim // 2
    lag, capacity, groups = schedule.lag(cfg), cfg.capacity, 2 * memories * cfg.num_heads
    widths = {"QUERY": heads * cfg.key_dim, "VALUE": cfg.value_dim}
    widths |= {name: size.prepare[name] for name in ("QUERY_BLOCK", "VALUE_BLOCK")}
    scored = {"HEADS": heads, "SUBKEYS": subkeys, "IDW": cfg.score == "idw"}
    places = {"ROOM": room, "PENDING": capacity, "HAS_GATE": gated, **widths}
    token, chunk = ("token_query", "token_value", "token_gate"), ("query", "value", "gate", "flags")
    steps.of(scan_kernel, "token_query", "keys", "token_ranks", HALF=half, **scored, **size.scan)(
        (blocks_of(subkeys, size.scan["CHOICES"]), batch * heads * 2), batch // memories
    )
    steps.of(
        token_kernel, "position", *token, "token_mask", "token_ranks", "table", "largest", "token_flags", "due",
        "output", HAS_GATE=gated, HAS_MASK=masked, CHUNK=cfg.chunk_size, LAG=lag, GROUPS=groups, K=cfg.top_k,
        EPSILON=cfg.score_eps, TEMPERATURE=cfg.temperature, **widths, **scored, **size.token,
    )((batch,), batch // memories)  # fmt: skip
    steps.of(
        stage_kernel, *_PENDING, *token, "token_flags", *chunk, "keys", "norms", "largest", "halves", "counted", "due",
        TOKENS=batch * room, GROUPS=groups, SUBKEYS=subkeys, HALF=half, BLOCK=size.keys["BLOCK"], ZEROS=zeros,
        ZERO_BLOCK=1024, num_warps=1, **places,
    )((batch * room + groups * subkeys + blocks_of(zeros, 1024),))  # fmt: skip
    call.add_address(steps, cfg, plan, torch.float32, batch, memories, shown=0, save=False)
    count = batch * room * cfg.slots_per_token // memories
    steps.of(sort_kernel, "table_rows", "sorted_rows", "order", "due", BLOCK=64, num_warps=4)(
        (blocks_of(count, 64), memories), count
    )
    call.add_write(steps, cfg, plan, torch.float32, batch, memories, shown=0, save=False, gated=True)
    steps.of(settle_kernel, *_PENDING, *token, "token_flags", *chunk, "due", LAG=lag, num_warps=1, **places)(
        (batch, capacity)
    )
    return steps
