"""Sums over the tokens that chose a sub-key (SPEC.md §4), of which it has a map: a bit for each token of the window."""

import triton
import triton.language as tl

from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.shapes import blocks_of
from fwpkm.kernels.runtime.windows import Call
from fwpkm.kernels.scores import key_direction
from fwpkm.kernels.tokens import VARYING, not_due, token_of

EQUATIONS = ("key_gradient",)
_WORDS = 16
"""A map has a multiple of so many words of 32 bits."""
_PROGRAMS = 8192
"""About how many fill a GPU: of fewer sub-keys the tokens are cut into more pieces, at most 16."""
_FEW = 2
"""So few rounds are one piece: it takes less time than a launch that adds two."""


def words_for(tokens: int) -> int:
    """How many words a map of so many tokens has."""
    return blocks_of(tokens, 32 * _WORDS) * _WORDS


@triton.jit
def rows_before(memories, HEADS: tl.constexpr, SUBKEYS: tl.constexpr):
    """How many sub-keys so many memories have."""
    return memories.to(tl.int64) * 2 * HEADS * SUBKEYS


@triton.jit
def lowest_bit(word):
    """The number of the lowest bit that is set; without meaning where none is."""
    bit = (word & -word).to(tl.uint32, bitcast=True).to(tl.float32)  # a power of two, which a float holds exactly
    return (bit.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def sums_over_tokens(
    query, ids, maps, factors, key, group, subkey, begins, first_memory, begin, end, offset, words,
    start, length, first, num_tokens, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    CHUNK: tl.constexpr, AT_REST: tl.constexpr, QUERIES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    CHOICES: tl.constexpr,
):  # fmt: skip
    """Σ f (q - K), or Σ f q, and Σ f of the factors f of a sub-key's choices, over some rounds through its maps.

    Each round takes one token of each word of a map, the first that is left. ``factors`` [., H, 2, k] begin ``offset``
    tokens before the windows'.
    """
    memory, half, memories = group // (2 * HEADS), group % (2 * HEADS), tl.num_programs(1) // (2 * HEADS)
    of_window = tl.cdiv(rows * length, 32 * WORDS)
    d, choice = tl.arange(0, BLOCK), tl.arange(0, CHOICES)
    result = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([WORDS], tl.float32)
    for at_round in range(begin, end):
        number = 0
        if AT_REST:  # else there is one window, and its number would cost registers
            number = at_round // of_window
        index = (at_round - number * of_window) * WORDS + tl.arange(0, WORDS)
        row = rows_before(first_memory + number * memories, HEADS, SUBKEYS) + group.to(tl.int64) * SUBKEYS + subkey
        word = tl.load(maps + row * words + index)
        while tl.max((word != 0).to(tl.int32), 0) > 0:
            known = word != 0
            r = tl.where(known, index * 32 + lowest_bit(word), 0)
            here = (first + (number * memories + memory) * rows * length + r).to(tl.int64)
            at = (here * 2 * HEADS + half) * K
            use = known[:, None] & (choice < K)[None, :]
            chosen = tl.load(ids + at[:, None] + choice[None, :], mask=use, other=-1)
            at -= offset.to(tl.int64) * 2 * HEADS * K
            f = tl.load(factors + at[:, None] + choice[None, :], mask=use, other=0.0)
            f = tl.sum(tl.where(chosen == subkey, f, 0.0), 1)
            total += f
            if QUERIES:
                token, _ = token_of(r, memory, start + number * CHUNK, length, num_tokens, rows, begins)
                q = tl.load(
                    query + token[:, None] * (2 * HEADS * HALF) + half * HALF + d[None, :],
                    mask=known[:, None] & (d < HALF)[None, :],
                    other=0.0,
                )
                result += tl.sum(f[:, None] * key_direction(q.to(tl.float32), key[None, :], SCORE), 0)
            word = word & (word - 1)
    return result, tl.sum(total, 0)


@triton.jit
def rounds_over(windows, length, rows, WORDS: tl.constexpr):
    """How many rounds go through the maps of windows."""
    return windows * tl.cdiv(rows * length, 32 * WORDS)


@triton.jit(do_not_specialize=["first_memory", "windows", "version", "offset", "words", "pieces", "rounds", *VARYING])
def key_sums_kernel(
    query, keys, ids, maps, factors, sums, totals, due, begins,
    first_memory, windows, version, offset, words, pieces, rounds, start, length, first, num_tokens, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    CHUNK: tl.constexpr, AT_REST: tl.constexpr, QUERIES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    CHOICES: tl.constexpr,
):  # fmt: skip
    """``sums_over_tokens`` of one piece of the tokens of windows; the pieces are added later."""
    group, subkey = tl.program_id(1), tl.program_id(0) // pieces
    piece, groups = tl.program_id(0) % pieces, tl.num_programs(1)
    if not_due(due, group // (2 * HEADS)):
        return
    row = group.to(tl.int64) * SUBKEYS + subkey
    d = tl.arange(0, BLOCK)
    key = tl.zeros([BLOCK], tl.float32)
    if QUERIES:
        key = tl.load(keys + (rows_before(version, HEADS, SUBKEYS) + row) * HALF + d, mask=d < HALF, other=0.0)
    end = tl.minimum(piece * rounds + rounds, rounds_over(windows, length, rows, WORDS))
    result, total = sums_over_tokens(
        query, ids, maps, factors, key, group, subkey, begins, first_memory, piece * rounds, end, offset, words,
        start, length, first, num_tokens, rows,
        HEADS, SUBKEYS, HALF, K, SCORE, CHUNK, AT_REST, QUERIES, WORDS, BLOCK, CHOICES,
    )  # fmt: skip
    row += piece * groups.to(tl.int64) * SUBKEYS
    if QUERIES:
        tl.store(sums + row * HALF + d, result, mask=d < HALF)
    tl.store(totals + row, total)


def integers_of_sums(launches: Launches, call: Call, integers: dict[str, int], offset: int = 0) -> dict[str, int]:
    """What sums over the tokens of windows ask: also in how many pieces, and of how many rounds, they are.

    Args:
        launches: knows the maps.
        call: what it follows from.
        integers: of the windows; ``version`` of the keys among them.
        offset: how many tokens before the windows' own the factors begin.
    """
    rounds = call.blocks(integers, 32 * call.shapes.key_sums["WORDS"])
    pieces, rounds = pieces_of(rounds, integers["groups"] * call.cfg.num_subkeys)
    words = launches.spec("maps").shape[-1]
    return integers | {"offset": offset, "words": words, "pieces": pieces, "rounds": rounds}


def add_key_sums(launches: Launches, call: Call, integers: dict[str, int], factors: str, queries: bool = True) -> None:
    """Add the sums of ``factors`` [., H, 2, k] over the tokens of windows, in pieces that whoever reads them adds.

    Args:
        launches: receives the launch.
        call: what it follows from.
        integers: ``integers_of_sums``.
        factors: the name of their tensor.
        queries: whether Σ f (q - K), or Σ f q, is asked for, beside Σ f.
    """
    constants = call.shapes.key_sums | {"QUERIES": queries}
    grid = call.cfg.num_subkeys * integers["pieces"], integers["groups"]
    launches.add(key_sums_kernel, grid, integers, constants, factors=factors)


def most_pieces(rounds: int, rows: int) -> int:
    """In how many pieces at most so many rounds over a map, or fewer, are cut where so many rows have one."""
    return 1 if rounds <= _FEW else max(1, min(rounds, 16, _PROGRAMS // rows))


def pieces_of(rounds: int, rows: int) -> tuple[int, int]:
    """In how many pieces so many rounds are cut, and how many a piece has."""
    per_piece = blocks_of(rounds, most_pieces(rounds, rows))
    return blocks_of(rounds, per_piece), per_piece


@triton.jit
def sum_of_pieces(sums, totals, pieces, groups, row, subkeys, d, HALF: tl.constexpr):
    """The pieces of one sub-key's sums, added in their order."""
    result = tl.zeros_like(d).to(tl.float32)
    total = 0.0
    for piece in range(pieces):
        at = piece * groups.to(tl.int64) * subkeys + row
        result += tl.load(sums + at * HALF + d, mask=d < HALF, other=0.0)
        total += tl.load(totals + at)
    return result, total
