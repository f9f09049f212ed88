"""The k best sub-keys of one token in one codebook, decided by ranks of float32 quality: -‖q - K‖², or q·K."""

import triton
import triton.language as tl

from fwpkm.kernels.tokens import INF

NOTHING = tl.constexpr(-(2**31))
"""No proposal."""


@triton.jit
def exact_ranks(
    query, keys, chosen, wanted, alive,
    HALF: tl.constexpr, IDW: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """-‖q - K‖² from differences, or q·K, of the ``chosen`` [CHOICES]; -inf where not ``wanted``.

    The sum of each has the same order wherever it stands, so equal sub-keys tie.
    """
    rank = tl.zeros([CHOICES], tl.float32)
    for at in range(0, HALF, STEP):
        d = at + tl.arange(0, STEP)
        inside = (d < HALF) & alive
        q = tl.load(query + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        k = tl.load(keys + chosen[:, None] * HALF + d[None, :], mask=wanted[:, None] & inside[None, :], other=0.0)
        if IDW:
            rank -= tl.sum((q - k) * (q - k), 1)
        else:
            rank += tl.sum(q * k, 1)
    return tl.where(wanted & (rank == rank), rank, -INF)


@triton.jit
def ahead_of(rank, chosen, other_rank, other_chosen):
    """How many of the others stand before each: by rank, then by id."""
    before = other_rank[None, :] > rank[:, None]
    before = before | ((other_rank[None, :] == rank[:, None]) & (other_chosen[None, :] < chosen[:, None]))
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def placed(x, place, choice):
    """x, each at its place; 0 where none has that place."""
    return tl.sum(tl.where(place[:, None] == choice[None, :], x[:, None], 0), 0)


@triton.jit
def merged(rank, chosen, more_rank, more, choice):
    """The best of both lists, in order. All ids differ."""
    place = ahead_of(rank, chosen, rank, chosen) + ahead_of(rank, chosen, more_rank, more)
    more_place = ahead_of(more_rank, more, rank, chosen) + ahead_of(more_rank, more, more_rank, more)
    return (
        placed(rank, place, choice) + placed(more_rank, more_place, choice),
        placed(chosen, place, choice) + placed(more, more_place, choice),
    )


@triton.jit
def best_proposed(
    query, keys, proposals, scale, alive,
    SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr,
    TILES: tl.constexpr, PROPOSED: tl.constexpr, LISTED: tl.constexpr, BITS: tl.constexpr, ERROR: tl.constexpr,
    CHOICES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The k best from what ``select_kernel`` proposed, as (ranks, ids) [CHOICES].

    Proposals are off by up to ERROR · scale. So if the next one, were it better by that much, could be among the k
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
    rank = exact_ranks(query, keys, chosen, wanted, alive, HALF, IDW, CHOICES, STEP)
    if PROPOSED > K:
        worst = tl.min(tl.where(wanted, rank, INF), 0)
        # A level is rounded by less than one; the scale is not finite where products are not.
        level = (spare >> BITS).to(tl.float32) + 2
        bound = level * (scale / (2 ** (31 - BITS))) + ERROR * scale
        unsure = alive & ~((tl.max(tl.where(possible, bound, -INF), 0) < worst) & (scale < INF))
        if unsure:
            more = tl.where(possible, mask - (spare & mask), SUBKEYS + CHOICES + choice)
            more_rank = exact_ranks(query, keys, more, possible, alive, HALF, IDW, CHOICES, STEP)
            rank, chosen = merged(rank, chosen, more_rank, more, choice)
            if PROPOSED < SUBKEYS:
                worst = tl.min(tl.where(wanted, rank, INF), 0)
                unsure = ~((tl.min(tl.where(choice < PROPOSED - K, bound, INF), 0) < worst) & (scale < INF))
                if unsure:
                    for at in range(0, SUBKEYS, CHOICES):
                        more = at + choice
                        known = tl.max((more[:, None] == chosen[None, :]).to(tl.int32), 1) > 0
                        fresh = (more < SUBKEYS) & ~known
                        more_rank = exact_ranks(query, keys, more, fresh, alive, HALF, IDW, CHOICES, STEP)
                        more = tl.where(fresh, more, SUBKEYS + 2 * CHOICES + more)
                        rank, chosen = merged(rank, chosen, more_rank, more, choice)
    return rank, chosen


@triton.jit
def best_of_all(ranks, SUBKEYS: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, LISTED: tl.constexpr):
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
