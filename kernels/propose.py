"""Candidates for the top-k of SPEC.md §2: sub-keys proposed by a product of matrices, with a bound of its error.

A float32 number is split into hi + lo of bfloat16, which a GPU multiplies as matrices.
"""

import triton
import triton.language as tl

from fwpkm.kernels.lists import largest_of_rows
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.windows import Call
from fwpkm.kernels.scores import proposed_ranks
from fwpkm.kernels.tokens import DEAD, VARYING, not_due, token_of, window_of

EQUATIONS = ("top_k",)
NOTHING = tl.constexpr(-(2**31))
"""No proposal."""


@triton.jit
def dot_hi_lo(a, b, total, UPCAST: tl.constexpr):
    """total + a b of bfloat16 matrices; UPCAST for the interpreter, which has no bfloat16 arithmetic."""
    if UPCAST:  # noqa: SIM108
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def lo_of(x, hi):
    """What bfloat16 ``hi`` leaves of float32 x."""
    return x - hi.to(tl.float32)


@triton.jit
def store_key(
    key, keys, norms, largest, keys_hi_lo, version, moves, group, subkey, d, SUBKEYS: tl.constexpr, HALF: tl.constexpr
):
    """A sub-key; and for ``propose_kernel`` its square, the largest square of its codebook, and hi and lo.

    hi + lo is the sub-key up to 2^-17. ``largest`` is found as an integer, as which positive floats have the same
    order. So many codebooks lie before those of its ``version``, and of its ``moves`` among the largest.
    """
    at = (version + group).to(tl.int64) * SUBKEYS + subkey
    tl.store(keys + at * HALF + d, key, mask=d < HALF)
    square = tl.sum(key * key, 0)
    tl.store(norms + group.to(tl.int64) * SUBKEYS + subkey, square)
    tl.atomic_max(largest + moves + group, square.to(tl.int32, bitcast=True), sem="relaxed")
    hi = key.to(tl.bfloat16)
    base = keys_hi_lo + ((2 * group).to(tl.int64) * SUBKEYS + subkey) * HALF + d
    tl.store(base, hi, mask=d < HALF)
    tl.store(base + SUBKEYS * HALF, lo_of(key, hi).to(tl.bfloat16), mask=d < HALF)


@triton.jit
def begin_keys_kernel(
    initial_keys, keys, norms, largest, keys_hi_lo, SUBKEYS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Version 0 of the keys: those of the caller."""
    subkey, group = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    key = tl.load(initial_keys + (group.to(tl.int64) * SUBKEYS + subkey) * HALF + d, mask=d < HALF, other=0.0)
    store_key(key, keys, norms, largest, keys_hi_lo, 0, 0, group, subkey, d, SUBKEYS, HALF)


def add_begin_keys(launches: Launches, call: Call) -> None:
    """Add the keys before the first window."""
    launches.add(begin_keys_kernel, (call.cfg.num_subkeys, call.groups), {}, call.shapes.begin_keys)


@triton.jit(do_not_specialize=["moves", *VARYING])
def propose_kernel(
    query, flags, norms, largest, keys_hi_lo, proposals, scales, due, begins, moves, start, length, num_tokens, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, SCORE: tl.constexpr,
    TILES: tl.constexpr, PROPOSED: tl.constexpr, BITS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Propose the PROPOSED best sub-keys of each token, codebook and tile of sub-keys.

    From q·K, a product of matrices: of a key hi and lo, of a query hi (EXACT, it is bfloat16 already) or both. A
    proposal is one integer: the rank in units of its bound ``scales`` above BITS bits that count the sub-keys down. So
    the largest is the best, and of equal ones the lowest.
    """
    group, tile = tl.program_id(1), tl.program_id(2)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    if not_due(due, memory):
        return
    number, block, before = window_of(tl.program_id(0), length, rows, tl.num_programs(1) // (2 * HEADS), BLOCK)
    r = block * BLOCK + tl.arange(0, BLOCK)
    token, _ = token_of(r, memory, start + number * CHUNK, length, num_tokens, rows, begins)
    inside = r < rows * length
    live = inside & ((tl.load(flags + token, mask=inside, other=DEAD) & DEAD) == 0)
    query += half * HALF
    keys_hi_lo += (2 * group).to(tl.int64) * SUBKEYS * HALF
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    # In a loop of its own: of an operand that is also used as numbers Triton 3.6 pipelines one buffer too few,
    # and a copy overwrites what a product still reads.
    squares = tl.zeros([BLOCK, DEPTH], tl.float32)
    for at in tl.static_range(0, HALF, DEPTH):  # all loads in flight, and lanes are added across once
        d = at + tl.arange(0, DEPTH)
        x = tl.load(
            query + token[:, None] * (2 * HEADS * HALF) + d[None, :],
            mask=live[:, None] & (d < HALF)[None, :],
            other=0.0,
        ).to(tl.float32)
        squares += x * x
    square = tl.sum(squares, 1)
    product = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for at in range(0, HALF, DEPTH):
        d = at + tl.arange(0, DEPTH)
        q = tl.load(
            query + token[:, None] * (2 * HEADS * HALF) + d[None, :],
            mask=live[:, None] & (d < HALF)[None, :],
            other=0.0,
        )
        address = keys_hi_lo + column[None, :] * HALF + d[:, None]
        known = (column < SUBKEYS)[None, :] & (d < HALF)[:, None]
        k_hi = tl.load(address, mask=known, other=0.0)
        k_lo = tl.load(address + SUBKEYS * HALF, mask=known, other=0.0)
        q_hi = q.to(tl.bfloat16)
        product = dot_hi_lo(q_hi, k_hi, product, UPCAST)
        product = dot_hi_lo(q_hi, k_lo, product, UPCAST)
        if not EXACT:
            product = dot_hi_lo(lo_of(q.to(tl.float32), q_hi).to(tl.bfloat16), k_hi, product, UPCAST)
    longest = tl.sqrt(tl.load(largest + moves * 2 * HEADS + group).to(tl.float32, bitcast=True))
    product, scale = proposed_ranks(product, square, norms + group * SUBKEYS, longest, column, SUBKEYS, SCORE)
    unit: tl.constexpr = 2 ** (31 - BITS)
    level = product * (unit / tl.maximum(scale, 1e-30))[:, None]
    level = tl.where(level > 1 - unit, level, 1 - unit)  # also what is not a number
    # 1.5 · 2^23 more is a float whose last bits are the integer: so it is added as fast as any number.
    level = (tl.minimum(level, unit - 1) + 1.5 * 2**23).to(tl.int32, bitcast=True)
    packed = (level - 0x4B400000) * (2**BITS) + (2**BITS - 1 - column)[None, :]
    if SUBKEYS % COLUMNS:
        packed = tl.where((column < SUBKEYS)[None, :], packed, NOTHING)
    at = ((before + memory * rows * length + r).to(tl.int64) * 2 * HEADS + half) * TILES + tile
    if PROPOSED <= 16:
        best = largest_of_rows(packed, BLOCK, COLUMNS, PROPOSED)
        for j in tl.static_range(PROPOSED):
            tl.store(proposals + at * PROPOSED + j, tl.reshape(best[j], [BLOCK]), mask=inside)
    else:  # whose lists would take minutes to compile
        for j in range(PROPOSED):
            best = tl.max(packed, 1)
            tl.store(proposals + at * PROPOSED + j, best, mask=inside)
            packed = tl.where(packed == best[:, None], NOTHING, packed)
    if tile == 0:
        tl.store(scales + at // TILES, scale, mask=inside)


def add_propose(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add the proposals of windows, from the keys after so many ``moves``."""
    constants = call.shapes.propose
    grid = call.blocks(integers, constants["BLOCK"]), integers["groups"], constants["TILES"]
    launches.add(propose_kernel, grid, integers, constants)
