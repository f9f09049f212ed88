"""The k best sub-keys of one token in one codebook (SPEC.md §2), by ranks of float32 quality (scores.py)."""

import triton
import triton.language as tl

from fwpkm.kernels.propose import NOTHING
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.windows import Call
from fwpkm.kernels.scores import exact_ranks, proposal_error
from fwpkm.kernels.tokens import DEAD, INF, VARYING, token_of, turns_of, window_of

EQUATIONS = ("top_k",)


@triton.jit
def ahead_of(rank, chosen, other_rank, other_chosen):
    """How many of the others stand before each: by rank, then by id."""
    before = other_rank[None, :] > rank[:, None]
    before = before | ((other_rank[None, :] == rank[:, None]) & (other_chosen[None, :] < chosen[:, None]))
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def moved_to(x, index, choice):
    """x, each at its index; 0 where none has that index."""
    return tl.sum(tl.where(index[:, None] == choice[None, :], x[:, None], 0), 0)


@triton.jit
def merged(rank, chosen, more_rank, more, choice):
    """The best of both lists, in order. All ids differ."""
    index = ahead_of(rank, chosen, rank, chosen) + ahead_of(rank, chosen, more_rank, more)
    more_index = ahead_of(more_rank, more, rank, chosen) + ahead_of(more_rank, more, more_rank, more)
    return (
        moved_to(rank, index, choice) + moved_to(more_rank, more_index, choice),
        moved_to(chosen, index, choice) + moved_to(more, more_index, choice),
    )


@triton.jit
def top_k_proposed(
    query, keys, proposals, scale, alive,
    SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    TILES: tl.constexpr, PROPOSED: tl.constexpr, LISTED: tl.constexpr, BITS: tl.constexpr, EXACT: tl.constexpr,
    CHOICES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The k best from what ``propose_kernel`` proposed, as (ranks, ids) [CHOICES].

    Proposals are off by up to ``proposal_error``. So if the next one, were it better by that much, could be among the k
    best, the rest of the list is ranked too; and if what is not listed could be, all sub-keys are. The choice has the
    quality of differences near a key too, where the product of matrices has none.
    """
    choice = tl.arange(0, CHOICES)
    if TILES == 1:
        mine = tl.load(proposals + choice, mask=choice < K, other=NOTHING)
        spare = tl.load(proposals + K + choice, mask=choice < PROPOSED - K, other=NOTHING)
    else:
        listed = tl.arange(0, LISTED)
        listed = tl.load(proposals + listed, mask=listed < TILES * PROPOSED, other=NOTHING)
        mine, spare = tl.full([CHOICES], NOTHING, tl.int32), tl.full([CHOICES], NOTHING, tl.int32)
        for j in range(PROPOSED):
            best = tl.max(listed, 0)
            mine = tl.where((choice == j) & (j < K), best, mine)
            spare = tl.where(choice == j - K, best, spare)
            listed = tl.where(listed == best, NOTHING, listed)
    mask: tl.constexpr = 2**BITS - 1
    wanted, possible = choice < K, spare != NOTHING
    chosen = tl.where(wanted, mask - (mine & mask), SUBKEYS + choice)
    rank = exact_ranks(query, keys, chosen, wanted, alive, HALF, SCORE, CHOICES, DEPTH)
    if PROPOSED > K:
        worst = tl.min(tl.where(wanted, rank, INF), 0)
        # A level is rounded by less than one; the scale is not finite where products are not.
        level = (spare >> BITS).to(tl.float32) + 2
        bound = level * (scale / (2 ** (31 - BITS))) + proposal_error(scale, EXACT, SCORE)
        unsure = alive & ~((tl.max(tl.where(possible, bound, -INF), 0) < worst) & (scale < INF))
        if unsure:
            more = tl.where(possible, mask - (spare & mask), SUBKEYS + CHOICES + choice)
            more_rank = exact_ranks(query, keys, more, possible, alive, HALF, SCORE, CHOICES, DEPTH)
            rank, chosen = merged(rank, chosen, more_rank, more, choice)
            if PROPOSED < SUBKEYS:
                worst = tl.min(tl.where(wanted, rank, INF), 0)
                unsure = ~((tl.min(tl.where(choice < PROPOSED - K, bound, INF), 0) < worst) & (scale < INF))
                if unsure:
                    for at in range(0, SUBKEYS, CHOICES):
                        more = at + choice
                        known = tl.max((more[:, None] == chosen[None, :]).to(tl.int32), 1) > 0
                        unknown = (more < SUBKEYS) & ~known
                        more_rank = exact_ranks(query, keys, more, unknown, alive, HALF, SCORE, CHOICES, DEPTH)
                        more = tl.where(unknown, more, SUBKEYS + 2 * CHOICES + more)
                        rank, chosen = merged(rank, chosen, more_rank, more, choice)
    return rank, chosen


@triton.jit
def top_k(ranks, SUBKEYS: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, LISTED: tl.constexpr):
    """The k best of the ranks of all sub-keys, best first, as (ranks, ids) [CHOICES]."""
    choice, column = tl.arange(0, CHOICES), tl.arange(0, LISTED)
    left = tl.load(ranks + column, mask=column < SUBKEYS, other=-INF)
    # What is out of the running must be below any rank, also below -inf.
    free = column < SUBKEYS
    rank, chosen = tl.full([CHOICES], -INF, tl.float32), SUBKEYS + choice
    for j in range(K):
        best = tl.max(left, 0)
        at = tl.min(tl.where(free & (left == best), column, LISTED), 0)
        rank, chosen = tl.where(choice == j, best, rank), tl.where(choice == j, at, chosen)
        free = free & (column != at)
        left = tl.where(free, left, -INF)
    return rank, chosen


@triton.jit(do_not_specialize=["version", *VARYING])
def rank_kernel(
    query, keys, proposals, scales, flags, ids, ranks, due, begins, version, start, length, first, num_tokens, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    TILES: tl.constexpr, PROPOSED: tl.constexpr, BITS: tl.constexpr,
    LISTED: tl.constexpr, EXACT: tl.constexpr, CHOICES: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The k best sub-keys of one token and codebook, in any order, and their ranks, of float32 quality."""
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    for turn in range(turns_of(due, memory, rows * length)):
        index = tl.program_id(0) + turn * tl.num_programs(0)
        number, r, before = window_of(index, length, rows, tl.num_programs(1) // (2 * HEADS), 1)
        token, _ = token_of(r, memory, start + number * CHUNK, length, num_tokens, rows, begins)
        local = (before + memory * rows * length + r).to(tl.int64)
        row_index = local * 2 * HEADS + half
        alive = (tl.load(flags + token).to(tl.int32) & DEAD) == 0
        rank, chosen = top_k_proposed(
            query + token * (2 * HEADS * HALF) + half * HALF,
            keys + (version * 2 * HEADS + group).to(tl.int64) * SUBKEYS * HALF,
            proposals + row_index * TILES * PROPOSED, tl.load(scales + row_index), alive,
            SUBKEYS, HALF, K, SCORE, TILES, PROPOSED, LISTED, BITS, EXACT, CHOICES, DEPTH,
        )  # fmt: skip
        choice = tl.arange(0, CHOICES)
        at = ((first + local) * 2 * HEADS + half) * K + choice
        tl.store(ids + at, chosen, mask=choice < K)
        tl.store(ranks + at, rank, mask=choice < K)


def add_rank(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add the top-k of the proposals of windows, ranked by ``version`` of the keys."""
    grid = call.programs(call.blocks(integers, 1), integers["groups"]), integers["groups"]
    launches.add(rank_kernel, grid, integers, call.shapes.rank)
