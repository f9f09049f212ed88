"""Sums over the tokens that chose a sub-key, as products of matrices: no list of them, and no crowded sub-key."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.kernels.launch import Launch
from fwpkm.kernels.parts import dot_halves, rest
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.tokens import DEAD, not_due, token_of

_SLAB = 8192
"""The most tokens of a memory that are summed at once: their matrix takes 6·S bytes of each for a codebook."""
_PIECES = 16
"""Into how many sums a slab is cut, so that there are programs for all multiprocessors."""


@triton.jit(do_not_specialize=["offset", "start", "stop", "length", "first", "rows", "stride"])
def spread_kernel(
    ids, factors, matrix, due, offset, start, stop, length, first, rows, stride,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, CLEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put the factors of the window's tokens [start, stop) of each memory into a matrix of zeros, or zeros again (CLEAR).

    ``matrix`` is [M, H, 2, 3, S, 16 stride]: by sub-key and token, the three bfloat16 parts whose sum is a factor.
    ``factors`` [., H, 2, k] begin ``offset`` tokens before the window's.
    """
    if not_due(due):
        return
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = start + entry // K
    inside = r < stop
    here = (first + memory * rows * length + r).to(tl.int64)
    chosen = tl.load(ids + (here * 2 * HEADS + half) * K + entry % K, mask=inside, other=0)
    factor = tl.zeros([BLOCK], tl.float32)
    if not CLEAR:
        factor = tl.load(factors + ((here - offset) * 2 * HEADS + half) * K + entry % K, mask=inside, other=0.0)
    place = matrix + (group.to(tl.int64) * 3 * SUBKEYS + chosen) * stride * 16 + r - start
    part = SUBKEYS * stride * 16
    for i in tl.static_range(3):
        high = factor.to(tl.bfloat16)
        tl.store(place + i * part, high, mask=inside)
        factor = rest(factor, high)


@triton.jit(do_not_specialize=["pieces", "piece_length", "begin", "stop", "stride", "start", "length", "first", "room", "rows"])
def key_sums_kernel(
    query, kinds, matrix, sums, totals, due,
    pieces, piece_length, begin, stop, stride, start, length, first, room, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, QUERIES: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Σ f and Σ f q of the factors f of each sub-key's choices, for each piece of the tokens; adding comes later.

    The product of ``matrix`` with the queries runs in bfloat16 parts (a query that is EXACT has one, else three), of
    which the pairs that matter to float32 are added; Σ f is the product with ones. Tokens [begin, stop) of the window;
    from ``begin`` > 0 on the sums of those before are added to.
    """
    if not_due(due):
        return
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    piece = tl.program_id(0) % pieces
    subkey = tl.program_id(0) // pieces * TILE + tl.arange(0, TILE)
    d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    result = tl.zeros([TILE, COLUMNS], tl.float32)
    totals_16 = tl.zeros([TILE, 16], tl.float32)
    ones = tl.full([BLOCK, 16], 1.0, tl.float32).to(tl.bfloat16)
    part = SUBKEYS * stride * 16
    matrix += group.to(tl.int64) * 3 * part
    for at in range(0, piece_length, BLOCK):
        column = piece * piece_length + at + tl.arange(0, BLOCK)
        r = begin + column
        inside = r < stop
        place = matrix + subkey.to(tl.int64)[:, None] * (stride * 16) + column[None, :]
        known = (subkey < SUBKEYS)[:, None] & inside[None, :]
        f1 = tl.load(place, mask=known, other=0.0)
        f2 = tl.load(place + part, mask=known, other=0.0)
        f3 = tl.load(place + 2 * part, mask=known, other=0.0)
        totals_16 = dot_halves(f1, ones, totals_16, UPCAST)
        totals_16 = dot_halves(f2, ones, totals_16, UPCAST)
        totals_16 = dot_halves(f3, ones, totals_16, UPCAST)
        if QUERIES:
            token, _ = token_of(r, memory, start, length, room, rows)
            here = (first + memory * rows * length + r).to(tl.int64)
            alive = inside & ((tl.load(kinds + here, mask=inside, other=DEAD) & DEAD) == 0)
            q = tl.load(
                query + token[:, None] * (2 * HEADS * HALF) + half * HALF + d[None, :],
                mask=alive[:, None] & (d < HALF)[None, :],
                other=0.0,
            )
            q1 = q.to(tl.bfloat16)
            result = dot_halves(f1, q1, result, UPCAST)
            result = dot_halves(f2, q1, result, UPCAST)
            result = dot_halves(f3, q1, result, UPCAST)
            if not EXACT:
                q = rest(q.to(tl.float32), q1)
                q2 = q.to(tl.bfloat16)
                q3 = rest(q, q2).to(tl.bfloat16)
                result = dot_halves(f1, q2, result, UPCAST)
                result = dot_halves(f2, q2, result, UPCAST)
                result = dot_halves(f1, q3, result, UPCAST)
    total = tl.sum(totals_16, 1) / 16
    row = (piece * tl.num_programs(1) + group).to(tl.int64) * SUBKEYS + subkey
    known = (subkey < SUBKEYS)[:, None] & (d < HALF)[None, :]
    if QUERIES:
        place = sums + row[:, None] * HALF + d[None, :]
        if begin > 0:
            result += tl.load(place, mask=known, other=0.0)
        tl.store(place, result, mask=known)
    if tl.program_id(2) == 0:
        if begin > 0:
            total += tl.load(totals + row, mask=subkey < SUBKEYS, other=0.0)
        tl.store(totals + row, total, mask=subkey < SUBKEYS)


def matrix_shape(cfg: FwPKMConfig, memories: int, longest: int) -> tuple[int, ...]:
    """Of the matrix for windows of at most ``longest`` tokens a memory."""
    return memories * 2 * cfg.num_heads, 3, cfg.num_subkeys, 16 * blocks_of(min(longest, _SLAB), 16)


class KeySums:
    """Room for the sums over each sub-key's tokens, and the launches that fill it."""

    def __init__(
        self, cfg: FwPKMConfig, query: Tensor, ids: Tensor, kinds: Tensor, matrix: Tensor, longest: int,
        due: Tensor | None = None,
    ) -> None:  # fmt: skip
        """For windows of at most ``longest`` tokens a memory, whose sub-keys ``ids`` and flags ``kinds`` are given.

        ``matrix`` holds zeros in the shape of ``matrix_shape``, and does so again after each launch.
        """
        self.cfg, self.query, self.ids, self.kinds, self.matrix, self.due = cfg, query, ids, kinds, matrix, due
        self.size, self.half = shapes(cfg, query.dtype), cfg.key_dim // 2
        self.groups, self.stride = matrix.shape[0], matrix.shape[-1] // 16
        pieces = self._pieces(min(longest, 16 * self.stride))[0]
        self.sums = torch.empty(pieces, self.groups, cfg.num_subkeys, self.half, device=query.device)
        self.totals = torch.empty(pieces, self.groups, cfg.num_subkeys, device=query.device)

    def _pieces(self, tokens: int) -> tuple[int, int]:
        block = self.size.key_sums["BLOCK"]
        length = max(blocks_of(blocks_of(tokens, block), _PIECES) * block, 2 * block)
        return blocks_of(tokens, length), length

    def of(self, factors: Tensor, queries: bool = True) -> tuple[Launch, Launch, Launch]:
        """The launches that sum ``factors`` [., H, 2, k], and with ``queries`` their products with those."""
        cfg = self.cfg
        names = {"HEADS": cfg.num_heads, "SUBKEYS": cfg.num_subkeys}
        spread, clear = (
            Launch(
                spread_kernel, self.ids, factors, self.matrix, self.due, K=cfg.top_k, CLEAR=clear,
                **names, **self.size.spread,
            ) for clear in (False, True)
        )  # fmt: skip
        add = Launch(
            key_sums_kernel, self.query, self.kinds, self.matrix, self.sums, self.totals, self.due,
            HALF=self.half, QUERIES=queries, **names, **self.size.key_sums,
        )  # fmt: skip
        return spread, add, clear

    def launch(
        self, launches: tuple[Launch, Launch, Launch], offset: int, start: int, length: int, first: int, room: int,
        rows: int, again: bool = True,
    ) -> int:  # fmt: skip
        """Sum over a window; returns in how many pieces. Not ``again``: this is the last."""
        spread, add, clear = launches
        tiles = blocks_of(self.cfg.num_subkeys, self.size.key_sums["TILE"])
        columns = blocks_of(self.half, self.size.key_sums["COLUMNS"])
        tokens, slab = rows * length, 16 * self.stride
        for begin in range(0, tokens, slab):
            stop = min(begin + slab, tokens)
            entries = (blocks_of((stop - begin) * self.cfg.top_k, self.size.spread["BLOCK"]), self.groups)
            # Later slabs are cut as the first, whose sums they are added to.
            pieces, piece_length = self._pieces(min(slab, tokens))
            spread(entries, offset, begin, stop, length, first, rows, self.stride)
            add(
                (pieces * tiles, self.groups, columns),
                pieces, piece_length, begin, stop, self.stride, start, length, first, room, rows,
            )  # fmt: skip
            if again or stop < tokens:
                clear(entries, offset, begin, stop, length, first, rows, self.stride)
        return pieces


@triton.jit
def gathered(sums, totals, pieces, groups, row, subkeys, d, HALF: tl.constexpr):
    """The pieces of one sub-key's sums, added in their order."""
    result = tl.zeros_like(d).to(tl.float32)
    total = 0.0
    for piece in range(pieces):
        at = piece * groups.to(tl.int64) * subkeys + row
        result += tl.load(sums + at * HALF + d, mask=d < HALF, other=0.0)
        total += tl.load(totals + at)
    return result, total
