"""SPEC.md §5 one token at a time, decided on the GPU: every launch is made at every step, whatever the position.

So a CUDA graph can hold a step. What a write needs is launched too, and does nothing for a memory whose chunk is not
complete.
"""

import triton
import triton.language as tl

from fwpkm.kernels.propose import store_key
from fwpkm.kernels.ranks import top_k
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.shapes import blocks_of
from fwpkm.kernels.runtime.windows import Call
from fwpkm.kernels.scores import bounded_scores, exact_ranks
from fwpkm.kernels.slots import best_sums, softmax_over_heads
from fwpkm.kernels.tokens import DEAD, GONE, INF, LIVE, flag_of, gate_of, not_due, takes_position, turns_of

EQUATIONS = ("sub_scores", "top_k", "select_slots", "read", "windows")


@triton.jit(do_not_specialize=["rows"])
def scan_kernel(
    token_query, keys, token_ranks, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, SCORE: tl.constexpr,
    CHOICES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The ranks of all sub-keys for one token and codebook."""
    b, half = tl.program_id(1) // (2 * HEADS), tl.program_id(1) % (2 * HEADS)
    subkey = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    group = (b // rows) * 2 * HEADS + half
    rank = exact_ranks(
        token_query + tl.program_id(1).to(tl.int64) * HALF, keys + group.to(tl.int64) * SUBKEYS * HALF,
        subkey, subkey < SUBKEYS, True, HALF, SCORE, CHOICES, DEPTH,
    )  # fmt: skip
    tl.store(token_ranks + tl.program_id(1) * SUBKEYS + subkey, rank, mask=subkey < SUBKEYS)


@triton.jit(do_not_specialize=["rows"])
def token_kernel(
    position, token_query, token_value, token_gate, token_mask, token_ranks, table, largest, token_flags, due,
    pending_index, output, rows,
    QUERY: tl.constexpr, VALUE: tl.constexpr, QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, LAG: tl.constexpr, SCOPE: tl.constexpr,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    TEMPERATURE: tl.constexpr, CHOICES: tl.constexpr, LISTED: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    DEPTH: tl.constexpr, VERSIONS: tl.constexpr,
):  # fmt: skip
    """A new token reads: from the ranks of all sub-keys to v̂, NaN where it is dead, or 0 where it is masked.

    Also its flag, whether it completes its memory's chunk (``due``), and where it will be pending, -1 if nowhere
    (``pending_index``); and for the write of that chunk, zeros in ``largest``.
    """
    b = tl.program_id(0)
    flag = flag_of(
        token_query, token_value, token_gate, token_mask, None, b.to(tl.int64),
        QUERY, VALUE, QUERY_BLOCK, VALUE_BLOCK, False,
    )  # fmt: skip
    at = tl.load(position + b)
    settled = CHUNK + LAG  # from here on only the place modulo CHUNK matters, so the position need not overflow
    num_pending = at - tl.maximum((at - LAG) // CHUNK, 0) * CHUNK
    takes = takes_position((flag & GONE) == 0, SCOPE)
    near = tl.where(at < 2**30, at, settled + (at - settled) % CHUNK)
    tl.store(position + b, tl.where(takes, near + 1, at))
    tl.store(pending_index + b, tl.where(takes, num_pending, -1))
    if b % rows == 0:
        tl.store(due + b // rows, (takes & (num_pending + 1 == settled)).to(tl.int32))
        for version in tl.static_range(VERSIONS):  # before the write and after it, where it moves keys
            for group in range(2 * HEADS):
                tl.store(largest + (version * tl.num_programs(0) + b) // rows * 2 * HEADS + group, 0)
    choice, head = tl.arange(0, CHOICES), tl.arange(0, HEAD_BLOCK)
    alive = ((flag & DEAD) == 0) & (tl.zeros([1], tl.int32) == 0)
    logits = tl.full([1, HEAD_BLOCK, CHOICES], -INF, tl.float32)
    slots = tl.zeros([1, HEAD_BLOCK, CHOICES], tl.int32)
    for h in tl.static_range(HEADS):
        row_index = (b * HEADS + h).to(tl.int64) * 2
        rank1, id1 = top_k(token_ranks + row_index * SUBKEYS, SUBKEYS, K, CHOICES, LISTED)
        rank2, id2 = top_k(token_ranks + (row_index + 1) * SUBKEYS, SUBKEYS, K, CHOICES, LISTED)
        s1, bounded1 = bounded_scores(rank1[None, :], choice, K, SCORE)
        s2, bounded2 = bounded_scores(rank2[None, :], choice, K, SCORE)
        alive = alive & bounded1 & bounded2
        sums, slot = best_sums(s1, s2, id1[None, :], id2[None, :], choice, SUBKEYS, K, 1, CHOICES)
        logits = tl.where((head == h)[None, :, None], (sums / TEMPERATURE)[:, None, :], logits)
        slots = tl.where((head == h)[None, :, None], slot[:, None, :], slots)
    valid = (head < HEADS)[None, :, None] & (choice < K)[None, None, :]
    w, alive = softmax_over_heads(logits, valid, alive)
    w = tl.reshape(tl.where(valid, w, 0.0), [HEAD_BLOCK * CHOICES])
    row = (b // rows).to(tl.int64) * SUBKEYS * SUBKEYS + tl.reshape(slots, [HEAD_BLOCK * CHOICES])
    lives = tl.max(alive.to(tl.int32), 0) > 0
    tl.store(token_flags + b, tl.where(lives, flag, DEAD).to(tl.int8))
    for d0 in range(0, VALUE, DEPTH):
        d = d0 + tl.arange(0, DEPTH)
        rows_read = tl.load(
            table + row[:, None] * VALUE + d[None, :], mask=(w > 0)[:, None] & (d < VALUE)[None, :], other=0.0
        )
        read = tl.where(lives, tl.sum(w[:, None] * rows_read, 0), tl.where((flag & GONE) == 0, float("nan"), 0.0))
        tl.store(output + b.to(tl.int64) * VALUE + d, read.to(output.dtype.element_ty), mask=d < VALUE)


@triton.jit
def move(source, into, width: tl.constexpr, blank, BLOCK: tl.constexpr):
    """Copy one row, or zeros where ``blank``."""
    d = tl.arange(0, BLOCK)
    x = tl.load(source + d, mask=(d < width) & (blank == 0), other=0.0)
    tl.store(into + d, x.to(into.dtype.element_ty), mask=d < width)


@triton.jit(do_not_specialize=["rows"])
def stage_kernel(
    pending_query, pending_value, pending_gate, pending_mask, token_query, token_value, token_gate, token_flags,
    query, value, gate, flags, keys, norms, largest, keys_hi_lo, counters, due, rows,
    TOKENS: tl.constexpr, CAPACITY: tl.constexpr, QUERY: tl.constexpr, VALUE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ZEROS: tl.constexpr,
    ZERO_BLOCK: tl.constexpr, MEMORY_BLOCK: tl.constexpr,
):  # fmt: skip
    """What the write of a complete chunk begins with.

    Its tokens end to end, the pending ones and the new one, with their flags; the keys as hi and lo; zeros.
    """
    part, parts, memory = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    for turn in range(turns_of(due, memory, rows * TOKENS)):
        i = part + turn * parts
        b, j = (memory * rows + i // TOKENS).to(tl.int64), i % TOKENS
        into = b * TOKENS + j
        if j < TOKENS - 1:
            old = b * CAPACITY + j
            move(pending_query + old * QUERY, query + into * QUERY, QUERY, False, QUERY_BLOCK)
            move(pending_value + old * VALUE, value + into * VALUE, VALUE, False, VALUE_BLOCK)
            tl.store(gate + into, tl.load(pending_gate + old).to(gate.dtype.element_ty))
            flag = flag_of(
                pending_query, pending_value, pending_gate, pending_mask, None, old,
                QUERY, VALUE, QUERY_BLOCK, VALUE_BLOCK, False,
            )  # fmt: skip
            tl.store(flags + into, flag.to(tl.int8))
        else:
            move(token_query + b * QUERY, query + into * QUERY, QUERY, False, QUERY_BLOCK)
            move(token_value + b * VALUE, value + into * VALUE, VALUE, False, VALUE_BLOCK)
            tl.store(gate + into, gate_of(token_gate, b))
            tl.store(flags + into, tl.load(token_flags + b))
    d = tl.arange(0, BLOCK)
    for turn in range(turns_of(due, memory, 2 * HEADS * SUBKEYS)):
        i = part + turn * parts
        group, subkey = memory * 2 * HEADS + i // SUBKEYS, i % SUBKEYS
        at = group.to(tl.int64) * SUBKEYS + subkey
        key = tl.load(keys + at * HALF + d, mask=d < HALF, other=0.0)
        store_key(key, keys, norms, largest, keys_hi_lo, 0, 0, group, subkey, d, SUBKEYS, HALF)
    others = tl.arange(0, MEMORY_BLOCK)
    any_due = tl.max(tl.load(due + others, mask=others < tl.num_programs(1), other=0), 0)
    first = (memory * parts + part).to(tl.int64)
    for i in range(first, any_due * tl.cdiv(ZEROS, ZERO_BLOCK), parts * tl.num_programs(1)):
        at = i * ZERO_BLOCK + tl.arange(0, ZERO_BLOCK)
        tl.store(counters + at, tl.zeros([ZERO_BLOCK], tl.int32), mask=at < ZEROS)


@triton.jit(do_not_specialize=["count"])
def sort_kernel(table_rows, sorted_rows, order, due, count, BLOCK: tl.constexpr):
    """A stable sort of few numbers: the index of each is how many are smaller, or equal and before it.

    Those of each memory, ``count``, are consecutive and below those of the next.
    """
    begin = tl.program_id(1).to(tl.int64) * count
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if not_due(due, tl.program_id(1)):
        return
    row = tl.load(table_rows + begin + mine, mask=mine < count, other=0)
    index = tl.zeros([BLOCK], tl.int32)
    for at in range(0, count, BLOCK):
        other = at + tl.arange(0, BLOCK)
        rows = tl.load(table_rows + begin + other, mask=other < count, other=0)
        less = rows[None, :] < row[:, None]
        ahead = (less | ((rows[None, :] == row[:, None]) & (other[None, :] < mine[:, None]))) & (other < count)[None, :]
        index += tl.sum(ahead.to(tl.int32), 1)
    tl.store(sorted_rows + begin + index, row, mask=mine < count)
    tl.store(order + begin + index, begin + mine, mask=mine < count)


@triton.jit(do_not_specialize=["rows"])
def store_pending_kernel(
    pending_query, pending_value, pending_gate, pending_mask, token_query, token_value, token_gate, token_flags,
    query, value, gate, flags, due, pending_index, rows,
    TOKENS: tl.constexpr, CAPACITY: tl.constexpr, LAG: tl.constexpr, QUERY: tl.constexpr, VALUE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """What is pending after the step: the token too; or after a write the chunk's last LAG tokens, and zeros."""
    b = tl.program_id(0).to(tl.int64)
    index, moves = tl.load(pending_index + b), tl.load(due + b // rows) != 0
    # After a write every token; else at most the new one.
    first, end = tl.where(moves, 0, index), tl.where(moves, CAPACITY, index + 1)
    for j in range(tl.maximum(first, 0) + tl.program_id(1), end, tl.num_programs(1)):
        into = b * CAPACITY + j
        if moves:
            old = b * TOKENS + TOKENS - LAG + j
            flag = tl.load(flags + old, mask=j < LAG, other=DEAD).to(tl.int32)
            blank = (flag & DEAD) != 0
            move(query + old * QUERY, pending_query + into * QUERY, QUERY, blank, QUERY_BLOCK)
            move(value + old * VALUE, pending_value + into * VALUE, VALUE, blank, VALUE_BLOCK)
            tl.store(pending_gate + into, tl.load(gate + old, mask=blank == 0, other=0.0))
            tl.store(pending_mask + into, (flag & LIVE) != 0)
        else:
            flag = tl.load(token_flags + b).to(tl.int32)
            blank = (flag & DEAD) != 0
            move(token_query + b * QUERY, pending_query + into * QUERY, QUERY, blank, QUERY_BLOCK)
            move(token_value + b * VALUE, pending_value + into * VALUE, VALUE, blank, VALUE_BLOCK)
            tl.store(pending_gate + into, tl.where(blank, 0.0, gate_of(token_gate, b)))
            tl.store(pending_mask + into, (flag & LIVE) != 0)


def add_read_token(launches: Launches, call: Call) -> None:
    """Add the read of one token of each sequence."""
    cfg, size = call.cfg, call.shapes
    grid = blocks_of(cfg.num_subkeys, size.scan["CHOICES"]), call.plan.batch * cfg.num_heads * 2
    launches.add(scan_kernel, grid, {"rows": call.rows}, size.scan)
    launches.add(token_kernel, (call.plan.batch,), {"rows": call.rows}, size.token | {"SCOPE": cfg.memory_scope})


def add_stage(launches: Launches, call: Call) -> None:
    """Add what the write of a complete chunk begins with."""
    (zeros,), size = launches.spec("counters").shape, call.shapes.stage
    block = triton.next_power_of_2(call.memories)
    constants = size | {"HEADS": call.cfg.num_heads, "MEMORY_BLOCK": block, "ZEROS": zeros}
    launches.add(stage_kernel, call.turns(call.plan.batch * size["TOKENS"]), {"rows": call.rows}, constants)


def add_sort(launches: Launches, call: Call) -> None:
    """Add the sort of a chunk's entries by table row."""
    count, block = call.rows * call.plan.num_tokens * call.cfg.slots_per_token, 64
    constants = {"BLOCK": block, "num_warps": 4}
    launches.add(sort_kernel, (blocks_of(count, block), call.memories), {"count": count}, constants)


def add_store_pending(launches: Launches, call: Call) -> None:
    """Add what is pending after the step."""
    grid = call.plan.batch, call.programs(call.cfg.capacity, call.plan.batch)
    launches.add(store_pending_kernel, grid, {"rows": call.rows}, call.shapes.store_pending)
