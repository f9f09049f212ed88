"""Sums over the tokens that chose a sub-key, as products of matrices: no list of them, and no crowded sub-key."""

import triton
import triton.language as tl

from fwpkm.kernels.parts import dot_halves, rest
from fwpkm.kernels.tokens import DEAD, not_due, token_of


@triton.jit(do_not_specialize=["pieces", "offset", "start", "length", "first", "room", "rows"])
def key_sums_kernel(
    query, ids, kinds, factors, sums, totals, due, pieces, offset, start, length, first, room, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
    EXACT: tl.constexpr, UPCAST: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Σ f and Σ f q of the factors f of each sub-key's choices, for each piece of PIECE tokens; adding comes later.

    The matrix F [TILE, BLOCK] of a tile of sub-keys and a block of tokens is made on the spot from the choices. Its
    product with the queries runs in bfloat16 parts, three of each float32 (a query that is EXACT has one), of which the
    pairs that matter to float32 are added. ``factors`` [., H, 2, k] begin ``offset`` tokens before the window's.
    """
    if not_due(due):
        return
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    piece = tl.program_id(0) % pieces
    subkey = tl.program_id(0) // pieces * TILE + tl.arange(0, TILE)
    d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    result = tl.zeros([TILE, COLUMNS], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for at in range(0, PIECE, BLOCK):
        r = piece * PIECE + at + tl.arange(0, BLOCK)
        inside = r < rows * length
        token, _ = token_of(r, memory, start, length, room, rows)
        here = (first + memory * rows * length + r).to(tl.int64)
        f = tl.zeros([TILE, BLOCK], tl.float32)
        for j in range(K):
            chosen = tl.load(ids + (here * 2 * HEADS + half) * K + j, mask=inside, other=-1)
            factor = tl.load(factors + ((here - offset) * 2 * HEADS + half) * K + j, mask=inside, other=0.0)
            f = tl.where(chosen[None, :] == subkey[:, None], factor[None, :], f)
        total += tl.sum(f, 1)
        if QUERIES:
            alive = inside & ((tl.load(kinds + here, mask=inside, other=DEAD) & DEAD) == 0)
            q = tl.load(
                query + token[:, None] * (2 * HEADS * HALF) + half * HALF + d[None, :],
                mask=alive[:, None] & (d < HALF)[None, :],
                other=0.0,
            )
            f1 = f.to(tl.bfloat16)
            f = rest(f, f1)
            f2 = f.to(tl.bfloat16)
            f3 = rest(f, f2).to(tl.bfloat16)
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
    row = (piece * tl.num_programs(1) + group).to(tl.int64) * SUBKEYS + subkey
    if QUERIES:
        tl.store(sums + row[:, None] * HALF + d[None, :], result, mask=(subkey < SUBKEYS)[:, None] & (d < HALF)[None, :])
    if tl.program_id(2) == 0:
        tl.store(totals + row, total, mask=subkey < SUBKEYS)


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
