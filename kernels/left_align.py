"""Streams moved to the left (SPEC.md §5): where each token stands, and rows of numbers brought there and back.

An index says which row a place gets: a token's number; ``NOTHING``, for zeros; or ``PENDING - i`` for row i of what was
pending.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.kernels.places import Places
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.shapes import blocks_of
from fwpkm.kernels.tokens import DEAD, takes_position

if TYPE_CHECKING:
    from torch import Tensor

EQUATIONS = ("windows",)
NOTHING = tl.constexpr(-1)
PENDING = tl.constexpr(-2)
_BLOCK = 2048
_AT_ONCE = 8
"""Places of one program: 32 numbers of a row for each of its threads."""
_MOST_TENSORS = 3
"""That one launch brings."""


@triton.jit(do_not_specialize=["length", "longest", "num_tokens"])
def left_align_kernel(
    token_mask, cu_seqlens, num_pending, pending_mask, order, begins, cells, entries, pending_entries, mask, pair,
    lengths, due, length, longest, num_tokens,
    CHUNK: tl.constexpr, LAG: tl.constexpr, SCOPE: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The places of one row's tokens: padded, ``length`` of them, or packed from one of ``cu_seqlens`` to the next.

    The packed ones may have another ``order``; and streams end where the next of ``begins`` is.
    """
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    first = row.to(tl.int64) * longest
    if begins is not None:
        first = tl.load(begins + row)
        longest = (tl.load(begins + row + 1) - first).to(tl.int32)
    begin, end = row * length, (row + 1) * length
    if cu_seqlens is not None:
        begin, end = tl.load(cu_seqlens + row).to(tl.int32), tl.load(cu_seqlens + row + 1).to(tl.int32)
    old = row * 0
    if num_pending is not None:
        old += tl.load(num_pending + row).to(tl.int32)
        for start in range(0, CAPACITY, BLOCK):
            at = start + column
            known = (at < old) & (at < longest)
            there = tl.load(pending_mask + row * CAPACITY + at, mask=known, other=0).to(tl.int32) != 0
            tl.store(cells + first + at, -(row * CAPACITY + at) + PENDING, mask=known)
            tl.store(mask + first + at, there, mask=known)
            entry = tl.where(known, first + at, NOTHING).to(tl.int32)
            tl.store(pending_entries + row * CAPACITY + at, entry, mask=at < CAPACITY)
    count = old
    for start in range(begin, end, BLOCK):
        token = start + column
        inside = token < end
        if order is not None:
            token = tl.load(order + token, mask=inside, other=0)
        there = inside
        if token_mask is not None:
            there = tl.load(token_mask + token, mask=inside, other=0).to(tl.int32) != 0
        stands = inside & takes_position(there, SCOPE)
        at = count + tl.cumsum(stands.to(tl.int32), 0) - 1
        tl.store(cells + first + at, token, mask=stands)
        tl.store(mask + first + at, there, mask=stands)
        tl.store(entries + token, tl.where(stands, first + at, NOTHING).to(tl.int32), mask=inside)
        count += tl.sum(stands.to(tl.int32), 0)
    chunks = tl.maximum(count - LAG, 0) // CHUNK
    tl.store(lengths + row, count)
    tl.store(due + row, chunks)
    for start in range(0, longest, BLOCK):
        at = start + column
        tl.store(pair + first + at, at < chunks * CHUNK + LAG, mask=at < longest)
        padding = (at >= count) & (at < longest)
        tl.store(cells + first + at, tl.zeros([BLOCK], tl.int32) + NOTHING, mask=padding)
        tl.store(mask + first + at, at < 0, mask=padding)
    if cu_seqlens is not None:
        if row == tl.num_programs(0) - 1:
            for start in range(end, num_tokens, BLOCK):  # behind the last sequence
                token = start + column
                behind = token < num_tokens
                if order is not None:
                    token = tl.load(order + token, mask=behind, other=0)
                tl.store(entries + token, tl.zeros([BLOCK], tl.int32) + NOTHING, mask=behind)


@triton.jit(do_not_specialize=["longest"])
def left_over_kernel(
    flags, lengths, due, index, inverse, mask, longest,
    CHUNK: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What of a row's stream is pending after the call, if it is alive: its place, and the inverse."""
    row = tl.program_id(0)
    first, start, length = row.to(tl.int64) * longest, tl.load(due + row) * CHUNK, tl.load(lengths + row)
    for j in range(0, CAPACITY, BLOCK):
        column = j + tl.arange(0, BLOCK)
        known = (column < CAPACITY) & (start + column < length)
        cell = first + start + column
        alive = known & ((tl.load(flags + cell, mask=known, other=DEAD).to(tl.int32) & DEAD) == 0)
        at = row * CAPACITY + column
        tl.store(index + at, tl.where(alive, cell, NOTHING).to(tl.int32), mask=column < CAPACITY)
        tl.store(mask + at, alive, mask=column < CAPACITY)
    for j in range(0, longest, BLOCK):
        at = j + tl.arange(0, BLOCK)
        known = (at >= start) & (at < length)
        flag = tl.load(flags + first + at, mask=known, other=DEAD).to(tl.int32)
        back = tl.where(known & ((flag & DEAD) == 0), row * CAPACITY + at - start, NOTHING)
        tl.store(inverse + first + at, back.to(tl.int32), mask=at < longest)


@triton.jit
def bring(source, pending, into, place, row, known, width: tl.constexpr, BLOCK: tl.constexpr):
    """The rows [R] that places get, or zeros."""
    new, old = known & (row >= 0), known & (row <= PENDING)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        column = (d < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + d[None, :]
        x = tl.load(source + at, mask=new[:, None] & column, other=0).to(into.dtype.element_ty)
        if pending is not None:
            at = (-row + PENDING).to(tl.int64)[:, None] * width + d[None, :]
            y = tl.load(pending + at, mask=old[:, None] & column, other=0).to(into.dtype.element_ty)
            x = tl.where(old[:, None], y, x)
        at = place.to(tl.int64)[:, None] * width + d[None, :]
        tl.store(into + at, x, mask=known[:, None] & column)


@triton.jit(do_not_specialize=["places"])
def rows_kernel(
    index, source0, source1, source2, pending0, pending1, pending2, into0, into1, into2, places,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    BLOCK0: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of up to three tensors at ROWS places of the index."""
    place, tensor = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    known = place < places
    row = tl.load(index + place, mask=known, other=NOTHING)
    if tensor == 0:
        bring(source0, pending0, into0, place, row, known, WIDTH0, BLOCK0)
    if into1 is not None:
        if tensor == 1:
            bring(source1, pending1, into1, place, row, known, WIDTH1, BLOCK1)
    if into2 is not None:
        if tensor == 2:
            bring(source2, pending2, into2, place, row, known, WIDTH2, BLOCK2)


_TOLD = ("token_mask", "cu_seqlens", "num_pending", "pending_mask", "order", "begins")
_SOURCES, _PENDING, _TARGETS = ([f"{name}{i}" for i in range(_MOST_TENSORS)] for name in ("source", "pending", "into"))
_NO_ROWS: "dict[str, Tensor | None]" = dict.fromkeys((*_SOURCES, *_PENDING, *_TARGETS))


@functools.lru_cache(1024)
def left_align_launches(cfg: FwPKMConfig, batch: int, length: int, longest: int, num_tokens: int) -> Launches:
    """The launches of ``left_align``."""
    launches = Launches(inputs=(*_TOLD, *Places._fields))
    constants = {**_constants(cfg), "LAG": schedule.lag(cfg), "SCOPE": cfg.memory_scope}
    integers = {"length": length, "longest": longest, "num_tokens": num_tokens}
    launches.add(left_align_kernel, (batch,), integers, constants)
    return launches


@functools.lru_cache(1024)
def left_over_launches(cfg: FwPKMConfig, batch: int, longest: int) -> Launches:
    """The launches of ``left_over``."""
    launches = Launches(inputs=("flags", "lengths", "due", "index", "inverse", "mask"))
    launches.add(left_over_kernel, (batch,), {"longest": longest}, _constants(cfg))
    return launches


def _constants(cfg: FwPKMConfig) -> dict:
    return {"CHUNK": cfg.chunk_size, "CAPACITY": cfg.capacity, "BLOCK": _BLOCK, "num_warps": 8}


@functools.lru_cache(1024)
def rows_launches(places: int, widths: tuple[int, ...]) -> Launches:
    """The launches of ``rows``, of tensors whose rows have so many numbers."""
    launches = Launches(inputs=("index", *_NO_ROWS))
    constants = {"ROWS": _AT_ONCE, "num_warps": 4}
    for i, width in enumerate((*widths, *[1] * (_MOST_TENSORS - len(widths)))):
        constants |= {f"WIDTH{i}": width, f"BLOCK{i}": min(512, triton.next_power_of_2(width))}
    launches.add(rows_kernel, (blocks_of(places, _AT_ONCE), len(widths)), {"places": places}, constants)
    return launches


def left_align(cfg: FwPKMConfig, query: "Tensor", batch: int, longest: int, **told: "Tensor | None") -> Places:
    """The places of a call's tokens; all tensors lie where ``query`` does.

    Args:
        cfg: the configuration.
        query: ``[B, T, H*Dk]``, or packed ``[1, T, H*Dk]``; its shape alone is looked at.
        batch: B.
        longest: Q, at least the length of every stream; or of streams that lie end to end, ``[1, Q]``, of all.
        told: what there is of ``token_mask``, bool ``[B, T]`` or ``[1, T]``; ``cu_seqlens`` ``[B+1]``, of which others
            than legal ones would write outside of the places; ``num_pending`` ``[B]`` and ``pending_mask``, bool
            ``[B, P]``; ``order`` ``[T]`` int32, the tokens of a packed row in another order; and ``begins`` ``[B+1]``
            int64, where each stream begins, and the last one ends, that lie end to end.
    """
    import torch  # here, so that who only lists launches needs none

    rows, length = query.shape[:2]
    new = functools.partial(query.new_empty, dtype=torch.int32)
    flags = functools.partial(query.new_empty, dtype=torch.bool)
    told = {name: None if (x := told.get(name)) is None else x.contiguous() for name in _TOLD}
    shape = (batch if told["begins"] is None else 1), longest
    places = Places(
        new(math.prod(shape)), new(rows * length), new(0 if told["num_pending"] is None else batch * cfg.capacity),
        flags(shape), flags(shape), new(batch), new(batch),
    )  # fmt: skip
    inputs = told | places._asdict()
    left_align_launches(cfg, batch, length, longest, rows * length).run(inputs)
    return places


def left_over(cfg: FwPKMConfig, places: Places, flags: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
    """What is pending after a call: an index among the places ``[B·P]``, its inverse ``[B·Q]``, the mask ``[B, P]``.

    Args:
        cfg: the configuration.
        places: of the call.
        flags: at least ``[B·Q]`` int8: the flags of what stood there.
    """
    batch, longest = places.mask.shape
    index, inverse = places.cells.new_empty(batch * cfg.capacity), places.cells.new_empty(batch * longest)
    mask = places.mask.new_empty(batch, cfg.capacity)
    inputs = {
        "flags": flags, "lengths": places.lengths, "due": places.due, "index": index, "inverse": inverse, "mask": mask,
    }  # fmt: skip
    left_over_launches(cfg, batch, longest).run(inputs)
    return index, inverse, mask


def rows(
    index: "Tensor", sources: "Sequence[Tensor]", pending: "Sequence[Tensor]", wide: bool, batch: int, length: int
) -> "list[Tensor]":
    """The rows that an index says ``[batch, length, ...]``, of up to three contiguous tensors ``[b, m, ...]``.

    Args:
        index: int32, one for each place.
        sources: the tensors.
        pending: as many ``[B, P, ...]``, or none: places that ask for their rows then get zeros.
        wide: floating numbers become float32.
        batch: of the result.
        length: of the result.
    """
    import torch

    inputs, into, widths = dict(_NO_ROWS, index=index), [], []
    for x, source, target in zip(sources, _SOURCES, _TARGETS):
        dtype = torch.float32 if wide and x.is_floating_point() else x.dtype
        into.append(x.new_empty(batch, length, *x.shape[2:], dtype=dtype))
        widths.append(math.prod(x.shape[2:]))
        inputs[source], inputs[target] = x, into[-1]
    inputs.update(zip(_PENDING, pending))
    if index.shape[0]:
        rows_launches(index.shape[0], tuple(widths)).run(inputs)
    return into
