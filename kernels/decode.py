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
from fwpkm.kernels import call, lookup
from fwpkm.kernels.launch import Launch
from fwpkm.kernels.ranks import best_of_all, exact_ranks
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.tokens import DEAD, LIVE, flag_of, not_due
from fwpkm.kernels.windows import Plan, Window


@triton.jit
def arrive_kernel(
    position, query, value, gate, mask, flags, due,
    QUERY: tl.constexpr, VALUE: tl.constexpr, QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, CHUNK: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    """A token arrives: its flag, whether it completes a chunk (``due`` [0]), and how many were pending ([1])."""
    b = tl.program_id(0)
    at = tl.load(position + b)
    waiting = at - tl.maximum((at - LAG) // CHUNK, 0) * CHUNK
    tl.store(position + b, at + 1)
    if b == 0:
        tl.store(due, (waiting + 1 == CHUNK + LAG).to(tl.int32))
        tl.store(due + 1, waiting)
    flag = flag_of(
        query, value, gate, mask, None, b.to(tl.int64),
        QUERY, VALUE, QUERY_BLOCK, VALUE_BLOCK, HAS_GATE, HAS_MASK, False, False,
    )  # fmt: skip
    tl.store(flags + b, flag.to(tl.int8))


@triton.jit(do_not_specialize=["rows"])
def scan_kernel(
    query, keys, flags, ranks, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, IDW: tl.constexpr,
    CHOICES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The ranks of all sub-keys for one token and codebook."""
    b, half = tl.program_id(1) // (2 * HEADS), tl.program_id(1) % (2 * HEADS)
    subkey = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    alive = (tl.load(flags + b).to(tl.int32) & DEAD) == 0
    group = (b // rows) * 2 * HEADS + half
    rank = exact_ranks(
        query + tl.program_id(1).to(tl.int64) * HALF, keys + group.to(tl.int64) * SUBKEYS * HALF,
        subkey, subkey < SUBKEYS, alive, HALF, IDW, CHOICES, STEP,
    )  # fmt: skip
    tl.store(ranks + tl.program_id(1) * SUBKEYS + subkey, rank, mask=subkey < SUBKEYS)


@triton.jit
def pick_kernel(
    all_ranks, ids, ranks, SUBKEYS: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, LISTED: tl.constexpr
):
    """The k best of them."""
    at = tl.program_id(0)
    choice = tl.arange(0, CHOICES)
    rank, chosen = best_of_all(all_ranks + at * SUBKEYS, SUBKEYS, K, CHOICES, LISTED)
    tl.store(ids + at * K + choice, chosen, mask=choice < K)
    tl.store(ranks + at * K + choice, rank, mask=choice < K)


@triton.jit
def move(source, into, width: tl.constexpr, blank, BLOCK: tl.constexpr):
    """Copy one row, or zeros where ``blank``."""
    d = tl.arange(0, BLOCK)
    x = tl.load(source + d, mask=(d < width) & (blank == 0), other=0.0)
    tl.store(into + d, x.to(into.dtype.element_ty), mask=d < width)


@triton.jit
def stage_kernel(
    pending_query, pending_value, pending_gate, pending_mask, query, value, gate, mask,
    all_query, all_value, all_gate, all_mask, due,
    ROOM: tl.constexpr, PENDING: tl.constexpr, QUERY: tl.constexpr, VALUE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The tokens of a complete chunk end to end: the pending ones, then the one that has arrived."""
    if not_due(due):
        return
    b, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    into = b * ROOM + j
    if j < ROOM - 1:
        old = b * PENDING + j
        move(pending_query + old * QUERY, all_query + into * QUERY, QUERY, False, QUERY_BLOCK)
        move(pending_value + old * VALUE, all_value + into * VALUE, VALUE, False, VALUE_BLOCK)
        tl.store(all_gate + into, tl.load(pending_gate + old))
        tl.store(all_mask + into, tl.load(pending_mask + old))
    else:
        move(query + b * QUERY, all_query + into * QUERY, QUERY, False, QUERY_BLOCK)
        move(value + b * VALUE, all_value + into * VALUE, VALUE, False, VALUE_BLOCK)
        g = 1.0
        if HAS_GATE:
            g = tl.load(gate + b).to(tl.float32)
        tl.store(all_gate + into, g)
        m = 1
        if HAS_MASK:
            m = tl.load(mask + b).to(tl.int32)
        tl.store(all_mask + into, m != 0)


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
        tl.store(pending_gate + into, tl.load(all_gate + old, mask=~blank, other=0.0))
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
    room, capacity, lag = cfg.chunk_size + schedule.lag(cfg), schedule.capacity(cfg), schedule.lag(cfg)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    flags, due = new(batch, dtype=torch.int8), new(2, dtype=torch.int32)
    widths = {"QUERY": cfg.num_heads * cfg.key_dim, "VALUE": cfg.value_dim, **size.prepare}
    given = {"HAS_GATE": gate is not None, "HAS_MASK": mask is not None}
    Launch(
        arrive_kernel, position, query, value, gate, mask, flags, due,
        CHUNK=cfg.chunk_size, LAG=lag, **given, **widths,
    )((batch,))  # fmt: skip
    output = _read(cfg, keys, values, query, value, flags)

    stream = [new(batch, room, x.shape[-1]) for x in (query, value)]
    stream += [new(batch, room), new(batch, room, dtype=torch.bool)]
    places = {"ROOM": room, "PENDING": capacity}
    Launch(stage_kernel, *pending, query, value, gate, mask, *stream, due, **places, **given, **widths)((batch, room))
    whole = Plan([Window(0, room, True, 0, room)], room, room, room, batch * room)
    written = call.forward(cfg, whole, keys, values, call.Tokens(*stream), save=False, due=due)
    Launch(
        settle_kernel, *pending, query, value, gate, flags, *stream[:3], written.kept.flags, due,
        LAG=lag, HAS_GATE=gate is not None, **places, **widths,
    )((batch, capacity))  # fmt: skip
    return output


def _read(cfg: FwPKMConfig, keys: Tensor, values: Tensor, query: Tensor, value: Tensor, flags: Tensor) -> Tensor:
    """v̂ of one token of each sequence; its flag is DEAD too where a selected score is not finite."""
    batch, rows, entries, size = query.shape[0], query.shape[0] // keys.shape[0], cfg.slots_per_token, shapes(cfg, query.dtype)
    groups, half, subkeys, k = 2 * cfg.num_heads, cfg.key_dim // 2, cfg.num_subkeys, cfg.top_k

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    int32 = torch.int32
    all_ranks, ids, ranks = new(batch, groups, subkeys), new(batch, groups, k, dtype=int32), new(batch, groups, k)
    slots, table_rows, weights = new(batch, entries, dtype=int32), new(batch, entries, dtype=int32), new(batch, entries)
    kinds, out_slots, out_weights = new(batch, dtype=torch.int8), new(batch, entries, dtype=torch.int64), new(batch, entries)
    names = {"HEADS": cfg.num_heads, "SUBKEYS": subkeys}
    idw = {"IDW": cfg.score == "idw"}
    Launch(scan_kernel, query, keys, flags, all_ranks, HALF=half, **idw, **names, **size.scan)(
        (blocks_of(subkeys, size.scan["CHOICES"]), batch * groups), rows
    )
    Launch(pick_kernel, all_ranks, ids, ranks, SUBKEYS=subkeys, K=k, **size.pick)((batch * groups,))
    # A window of one token; nothing is written after it, so what a write asks is not touched.
    one = (0, 1, 0, 1, rows)
    Launch(
        lookup.combine_kernel, ids, ranks, flags, kinds, slots, weights, table_rows, out_slots, ids, ids,
        out_slots, out_weights, None, K=k, EPSILON=cfg.score_eps, TEMPERATURE=cfg.temperature, CHUNK=cfg.chunk_size, WRITES=False,
        MAPS=False, **idw, **names, **size.combine,
    )((blocks_of(rows, size.combine["BLOCK"]), keys.shape[0]), 0, keys.shape[0], 0, *one, 0, 0, 1)  # fmt: skip
    output = query.new_empty(batch, 1, cfg.value_dim)
    Launch(
        lookup.read_kernel, values, slots, weights, kinds, value, None, output, weights, weights, weights, None,
        SLOTS=cfg.num_slots, WIDTH=cfg.value_dim, ENTRIES=entries, CHUNK=cfg.chunk_size, LOOKAHEAD=cfg.lookahead,
        SCALE=0.0, HAS_GATE=False, WRITES=False, **size.read,
    )((batch,), *one, 0, 0, 1)  # fmt: skip
    return output
