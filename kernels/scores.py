"""The score of a sub-key (SPEC.md §2) and its derivatives (§4): all that depends on ``cfg.score``.

Kernels hand through SCORE, a ``Score`` of shapes.py: the name and what else the score follows from.

What orders sub-keys is their rank: -‖q - K‖² or q·K. A derivative of a score s by a key or a query is a factor times a
direction: 2 exp(s) and q - K or its negative for "idw"; 1 and q or K for "dot_product".
"""

import triton
import triton.language as tl

from fwpkm.kernels.tokens import INF

EQUATIONS = ("sub_scores",)
SCORES = ("idw", "dot_product")
"""Those that the kernels serve; any other is refused."""


@triton.jit
def multiple_of(recents, at, known, SCORE: tl.constexpr):
    """(1 + V)^γ of sub-keys, by which ε + ‖q - K‖² counts more: so their scores are less by γ log(1 + V)."""
    return tl.exp(SCORE.penalty * tl.log(1 + tl.load(recents + at, mask=known, other=0.0)))


@triton.jit
def penalised(rank, multiple, SCORE: tl.constexpr):
    """The rank whose score is that of ``rank`` less γ log(1 + V): ε less it is (ε - rank) (1 + V)^γ."""
    if SCORE.name == "idw":
        rank = rank * multiple - SCORE.epsilon * (multiple - 1)
    else:
        tl.static_assert(False, "the kernels know recent uses of no such SCORE")
    return rank


@triton.jit
def exact_ranks(
    query, keys, recents, chosen, wanted, alive,
    HALF: tl.constexpr, SCORE: tl.constexpr, CHOICES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """-‖q - K‖² from differences, or q·K, of the ``chosen`` [CHOICES]; -inf where not ``wanted``.

    ``penalised`` where V of the codebook's sub-keys is in ``recents``. What is no number is +inf, which is first, and
    kills the token (§2). The sum of each has the same order wherever it stands, so equal sub-keys tie.
    """
    # Line by line of 128 bytes, whose sums are added last: so a warp loads four sub-keys at once, and adds across eight
    # lanes, once. Each lane loads the numbers of the query that it needs: broadcast ones would cross lanes.
    width: tl.constexpr = min(32, DEPTH)
    total = tl.zeros([CHOICES, width], tl.float32)
    for at in range(0, HALF, DEPTH):
        for line in tl.static_range(0, DEPTH, width):
            d = (at + line + tl.arange(0, width))[None, :] + tl.zeros_like(chosen)[:, None]
            inside = (d < HALF) & alive
            q = tl.load(query + d, mask=inside, other=0.0).to(tl.float32)
            k = tl.load(keys + chosen[:, None] * HALF + d, mask=wanted[:, None] & inside, other=0.0)
            if SCORE.name == "idw":
                total -= (q - k) * (q - k)
            elif SCORE.name == "dot_product":
                total += q * k
            else:
                tl.static_assert(False, "the kernels do not know this SCORE")
    rank = tl.sum(total, 1)
    if recents is not None:
        rank = penalised(rank, multiple_of(recents, chosen, wanted, SCORE), SCORE)
    return tl.where(wanted, tl.where(rank == rank, rank, INF), -INF)


@triton.jit
def proposed_ranks(product, square, norms, longest, recents, column, SUBKEYS: tl.constexpr, SCORE: tl.constexpr):
    """Ranks [R, N] from the products q·K, and their unit [R], which none exceeds: (‖q‖ + max ‖K‖)² or ‖q‖ max ‖K‖.

    ``square`` [R] is ‖q‖², ``norms`` hold ‖K‖² of the codebook, ``longest`` is its largest ‖K‖. With V in ``recents``
    ranks are ``penalised``, and their unit and error are as many times larger as those of the sub-key used most.
    """
    if SCORE.name == "idw":
        norm = tl.load(norms + column, mask=column < SUBKEYS, other=0.0)
        product = 2 * product - norm[None, :] - square[:, None]
        unit = tl.sqrt(square) + longest
        unit = unit * unit
    elif SCORE.name == "dot_product":
        unit = tl.sqrt(square) * longest
    else:
        tl.static_assert(False, "the kernels do not know this SCORE")
    if recents is not None:
        multiple = multiple_of(recents, column, column < SUBKEYS, SCORE)
        product = penalised(product, multiple[None, :], SCORE)
        largest = tl.max(multiple, 0)
        for at in range(0, SUBKEYS, 64):
            every = at + tl.arange(0, 64)
            largest = tl.maximum(largest, tl.max(multiple_of(recents, every, every < SUBKEYS, SCORE), 0))
        unit = (unit + SCORE.epsilon) * largest
    return product, unit


@triton.jit
def proposal_error(unit, EXACT: tl.constexpr, SCORE: tl.constexpr):
    """What hi, lo and sums leave out of a proposed rank, at worst; EXACT queries are without lo."""
    if SCORE.name == "idw":
        error = (1 if EXACT else 2) * 2.0**-17 * unit
    elif SCORE.name == "dot_product":
        error = (1 if EXACT else 2) * 2.0**-16 * unit
    else:
        tl.static_assert(False, "the kernels do not know this SCORE")
    return error


@triton.jit
def sub_scores(rank, SCORE: tl.constexpr):
    """s of §2 from ranks: -log(ε + ‖q - K‖²), or q·K."""
    if SCORE.name == "idw":
        score = -tl.log(SCORE.epsilon - rank)
    elif SCORE.name == "dot_product":
        score = rank
    else:
        tl.static_assert(False, "the kernels do not know this SCORE")
    return score


@triton.jit
def bounded_scores(rank, choice, K: tl.constexpr, SCORE: tl.constexpr):
    """Sub-scores [BLOCK, CHOICES] of the first K, and whether all of them are finite."""
    bounded = tl.abs(rank) < INF
    picked = (choice < K)[None, :]
    score = tl.where(picked, sub_scores(tl.where(bounded, rank, 0.0), SCORE), -INF)
    return score, tl.min((bounded | ~picked).to(tl.int32), 1) > 0


@triton.jit
def factor_of(d_score, score, multiple, SCORE: tl.constexpr):
    """What a score's gradient makes of the directions of its key and its query; ``multiple`` is (1 + V)^γ, or 1."""
    if SCORE.name == "idw":
        factor = 2 * d_score * tl.exp(score) * multiple
    elif SCORE.name == "dot_product":
        factor = d_score
    else:
        tl.static_assert(False, "the kernels do not know this SCORE")
    return factor


@triton.jit
def key_direction(q, key, SCORE: tl.constexpr):
    """q - K from a difference, since of q and K apart no digit is left near a key; or q."""
    if SCORE.name == "idw":
        direction = q - key
    elif SCORE.name == "dot_product":
        direction = q
    else:
        tl.static_assert(False, "the kernels do not know this SCORE")
    return direction


@triton.jit
def query_direction(q, key, SCORE: tl.constexpr):
    """K - q, or K."""
    if SCORE.name == "idw":
        direction = key - q
    elif SCORE.name == "dot_product":
        direction = key
    else:
        tl.static_assert(False, "the kernels do not know this SCORE")
    return direction


@triton.jit
def add_factor_vjp(d_score, coefficient, d_coefficient, SCORE: tl.constexpr):
    """A score's gradient, and what its ``factor_of``, the ``coefficient``, passes on: 2 exp(s) is its own slope."""
    if SCORE.name == "idw":
        d_score += coefficient * d_coefficient
    elif SCORE.name == "dot_product":
        pass
    else:
        tl.static_assert(False, "the kernels do not know this SCORE")
    return d_score


@triton.jit
def add_direction_vjp(d_key, coefficient_sum, d_key_gradient, SCORE: tl.constexpr):
    """A key's gradient, and what the directions of its own gradient Σ c (q - K), or Σ c q, pass on."""
    if SCORE.name == "idw":
        d_key -= coefficient_sum * d_key_gradient
    elif SCORE.name == "dot_product":
        pass
    else:
        tl.static_assert(False, "the kernels do not know this SCORE")
    return d_key


@triton.jit
def query_direction_vjp(coefficient, after, SCORE: tl.constexpr):
    """What the directions of a key's gradient pass to a query: their derivative by q is 1 under both scores."""
    if SCORE.name == "idw" or SCORE.name == "dot_product":
        result = coefficient * after
    else:
        tl.static_assert(False, "the kernels do not know this SCORE")
    return result
