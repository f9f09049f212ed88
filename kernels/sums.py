"""Sums over the tokens that chose a sub-key: each has a map of them, a bit for each token of the window."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from fwpkm.config import FwPKMConfig
from fwpkm.kernels.launch import Steps
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.tokens import VARYING, not_due, token_of

_WORDS = 16
"""A map has a multiple of so many words of 32 bits."""
_PROGRAMS = 8192
"""About how many fill a GPU: of fewer sub-keys the tokens are cut into more pieces, at most 16."""


def words_for(tokens: int) -> int:
    """How many words a map of so many tokens has."""
    return blocks_of(tokens, 32 * _WORDS) * _WORDS


@triton.jit
def lowest_bit(word):
    """The place of the lowest bit that is set; without meaning where none is."""
    bit = (word & -word).to(tl.uint32, bitcast=True).to(tl.float32)  # a power of two, which a float holds exactly
    return (bit.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit(do_not_specialize=["window", "version", "offset", "words", "pieces", "steps", *VARYING])
def key_sums_kernel(
    query, keys, ids, maps, factors, sums, totals, due,
    window, version, offset, words, pieces, steps, start, length, first, room, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, QUERIES: tl.constexpr,
    CENTRED: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Σ f and Σ f q, or Σ f (q - K), of the factors f of a sub-key's choices, for one piece of the tokens.

    From differences (CENTRED), since Σ f q - K Σ f would keep no digit near a key; the pieces are added later.

    Each step takes one token of each word of the map, the first that is left. ``factors`` [., H, 2, k] begin ``offset``
    tokens before the window's.
    """
    if not_due(due):
        return
    group, subkey = tl.program_id(1), tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    row = group.to(tl.int64) * SUBKEYS + subkey
    maps += (window * tl.num_programs(1).to(tl.int64) * SUBKEYS + row) * words
    d = tl.arange(0, BLOCK)
    choice = tl.arange(0, CHOICES)
    result = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([WORDS], tl.float32)
    key = tl.zeros([BLOCK], tl.float32)
    if QUERIES and CENTRED:
        at = version * tl.num_programs(1).to(tl.int64) * SUBKEYS + row
        key = tl.load(keys + at * HALF + d, mask=d < HALF, other=0.0)
    for step in range(piece * steps, piece * steps + steps):
        place = step * WORDS + tl.arange(0, WORDS)
        word = tl.load(maps + place, mask=place < words, other=0)
        while tl.max((word != 0).to(tl.int32), 0) > 0:
            known = word != 0
            r = tl.where(known, place * 32 + lowest_bit(word), 0)
            here = (first + memory * rows * length + r).to(tl.int64)
            place_of = (here * 2 * HEADS + half) * K
            use = known[:, None] & (choice < K)[None, :]
            chosen = tl.load(ids + place_of[:, None] + choice[None, :], mask=use, other=-1)
            place_of -= offset.to(tl.int64) * 2 * HEADS * K
            f = tl.load(factors + place_of[:, None] + choice[None, :], mask=use, other=0.0)
            f = tl.sum(tl.where(chosen == subkey, f, 0.0), 1)
            total += f
            if QUERIES:
                token, _ = token_of(r, memory, start, length, room, rows)
                q = tl.load(
                    query + token[:, None] * (2 * HEADS * HALF) + half * HALF + d[None, :],
                    mask=known[:, None] & (d < HALF)[None, :],
                    other=0.0,
                )
                result += tl.sum(f[:, None] * (q.to(tl.float32) - key[None, :]), 0)
            word = word & (word - 1)
    row += piece * tl.num_programs(1).to(tl.int64) * SUBKEYS
    if QUERIES:
        tl.store(sums + row * HALF + d, result, mask=d < HALF)
    tl.store(totals + row, tl.sum(total, 0))


class KeySums:
    """The launches that sum over each sub-key's tokens, in pieces that whoever reads the sums adds."""

    def __init__(self, cfg: FwPKMConfig, query: torch.dtype, memories: int, words: int) -> None:
        """For maps of so many words."""
        self.size, self.words = shapes(cfg, query).key_sums, words
        self.groups, self.subkeys = 2 * memories * cfg.num_heads, cfg.num_subkeys

    def of(self, steps: Steps, factors: str, queries: bool = True) -> Callable[..., int]:
        """What adds the sum of ``factors`` [., H, 2, k] over a window, and with ``queries`` Σ f q, or Σ f (q - K).

        It takes the window, the version of the keys, where the factors' tokens begin, then ``VARYING``; and returns in
        how many pieces the sum is.
        """
        launch = steps.of(
            key_sums_kernel, "query", "keys", "ids", "maps", factors, "sums", "totals", "due",
            QUERIES=queries, **self.size,
        )  # fmt: skip

        def add(window: int, version: int, offset: int, start: int, length: int, first: int, room: int, rows: int):
            pieces, per_piece = pieces_of(steps_over(rows * length, self.size["WORDS"]), self.groups * self.subkeys)
            launch(
                (self.subkeys * pieces, self.groups),
                window, version, offset, self.words, pieces, per_piece, start, length, first, room, rows,
            )  # fmt: skip
            return pieces

        return add


def steps_over(tokens: int, words: int) -> int:
    """How many steps of so many words a map of so many tokens takes."""
    return blocks_of(tokens, 32 * words)


def most_pieces(number: int, rows: int) -> int:
    """In how many pieces at most so many steps over a map, or fewer, are cut where so many rows have one."""
    return max(1, min(number, 16, _PROGRAMS // rows))


def pieces_of(number: int, rows: int) -> tuple[int, int]:
    """In how many pieces so many steps are cut, and how many a piece has."""
    per_piece = blocks_of(number, most_pieces(number, rows))
    return blocks_of(number, per_piece), per_piece


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
