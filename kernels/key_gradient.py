"""The gradient of the addressing loss (SPEC.md §4) by token: c of each choice, such that α ∇L_addr = Σ c (q - K).

Or Σ c q, where the score is the dot product. Backward: from the keys after a write to every sub-score and query.
"""

import triton
import triton.language as tl

from fwpkm.kernels.key_sums import add_key_sums, integers_of_sums
from fwpkm.kernels.keys import count_of, key_gradients, rows_before
from fwpkm.kernels.losses import addressing_curvature, addressing_slope, mean_probabilities, sub_key_probabilities
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.windows import Call
from fwpkm.kernels.scores import (
    add_factor_vjp,
    factor_of,
    key_direction,
    query_direction,
    query_direction_vjp,
    sub_scores,
)
from fwpkm.kernels.tokens import DEAD, LIVE, VARYING, not_due, pairs, token_of, window_of

EQUATIONS = ("sub_scores", "sub_key_probabilities", "mean_probabilities", "key_gradient", "pairs")


@triton.jit
def coefficients_of(
    ids, ranks, probability_sums, at, known, counted, group, count,
    SUBKEYS: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, WEIGHT: tl.constexpr,
    CHOICES: tl.constexpr,
):  # fmt: skip
    """Of the tokens whose choices begin at ``at`` [E]: the sub-keys chosen, their scores s, p, a, and c (§4).

    All [E, CHOICES]; c is the factor of (q - K), or of q, in α ∇L_addr.
    """
    choice = tl.arange(0, CHOICES)
    picked = (choice < K)[None, :]
    use = known[:, None] & picked
    chosen = tl.load(ids + at[:, None] + choice[None, :], mask=use, other=-1)
    score = sub_scores(tl.load(ranks + at[:, None] + choice[None, :], mask=use, other=0.0), SCORE)
    p = sub_key_probabilities(score, picked)
    total = tl.load(probability_sums + group.to(tl.int64) * SUBKEYS + chosen, mask=use, other=0)
    a = addressing_slope(mean_probabilities(total, count))
    mean = tl.sum(tl.where(picked, p * a, 0.0), 1)
    d_score = tl.where(use & counted[:, None], WEIGHT / count * p * (a - mean[:, None]), 0.0)
    return chosen, score, p, a, factor_of(d_score, score, SCORE)


@triton.jit(do_not_specialize=["first_memory", *VARYING])
def coefficients_kernel(
    ids, ranks, window_flags, probability_sums, counts, active, coefficients, due,
    first_memory, start, length, first, num_tokens, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    CHUNK: tl.constexpr, LOOKAHEAD: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Whether any token of a memory has a pair; and c of every choice of the window, from p̄, if it has a WEIGHT."""
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    if not_due(due, memory):
        return
    memories = tl.num_programs(1) // (2 * HEADS)
    number, block, before = window_of(tl.program_id(0), length, rows, memories, BLOCK)
    first_memory, first = first_memory + number * memories, first + before
    r = block * BLOCK + tl.arange(0, BLOCK)
    here = (first + memory * rows * length + r).to(tl.int64)
    t = r % length
    live = (r < rows * length) & (t < CHUNK)
    live = live & ((tl.load(window_flags + here, mask=live, other=0) & LIVE) != 0)
    if half == 0:
        pair = pairs(window_flags, here, t, length, live, LOOKAHEAD)
        tl.atomic_or(active + first_memory + memory, tl.max(pair.to(tl.int32), 0), sem="relaxed")
    if WEIGHT > 0:
        count = count_of(counts, first_memory + memory)
        probability_sums += rows_before(first_memory, HEADS, SUBKEYS)
        at = (here * 2 * HEADS + half) * K
        _, _, _, _, c = coefficients_of(
            ids, ranks, probability_sums, at, live, live, group, count, SUBKEYS, K, SCORE, WEIGHT, CHOICES
        )
        choice = tl.arange(0, CHOICES)
        out = ((memory * rows * length + r).to(tl.int64) * 2 * HEADS + half) * K
        inside = (r < rows * length)[:, None] & (choice < K)[None, :]
        tl.store(coefficients + out[:, None] + choice[None, :], c, mask=inside)


def add_coefficients(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add the coefficients of windows that are written."""
    constants = call.shapes.coefficients
    grid = call.blocks(integers, constants["BLOCK"]), integers["groups"]
    launches.add(coefficients_kernel, grid, integers, constants)


@triton.jit(do_not_specialize=["first_memory", "version", "d_after", *VARYING])
def coefficients_backward_kernel(
    query, keys, d_keys, ids, ranks, window_flags, probability_sums, counts, moved, keys_unclipped,
    d_coefficients, d_slopes, begins, first_memory, version, d_after, start, length, first, num_tokens, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    CHUNK: tl.constexpr, RATE: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr, CHOICES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """From the keys after to each choice's coefficient c, and on to a of its sub-key."""
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, t = token_of(r, memory, start, length, num_tokens, rows, begins)
    here = (first + memory * rows * length + r).to(tl.int64)
    live = (r < rows * length) & (t < CHUNK)
    live = live & ((tl.load(window_flags + here, mask=live, other=0) & LIVE) != 0)
    before = rows_before(first_memory, HEADS, SUBKEYS)
    count = count_of(counts, first_memory + memory)
    d_keys += rows_before(d_after, HEADS, SUBKEYS) * HALF
    keys += rows_before(version, HEADS, SUBKEYS) * HALF
    probability_sums += before
    at = (here * 2 * HEADS + half) * K
    chosen, score, p, _, _ = coefficients_of(
        ids, ranks, probability_sums, at, live, live, group, count, SUBKEYS, K, SCORE, WEIGHT, CHOICES
    )
    choice = tl.arange(0, CHOICES)
    use = live[:, None] & (choice < K)[None, :]
    row = group * SUBKEYS + chosen
    d_coefficient = tl.zeros([BLOCK, CHOICES], tl.float32)
    for d0 in range(0, HALF, DEPTH):
        d = d0 + tl.arange(0, DEPTH)
        q = tl.load(
            query + token[:, None] * (2 * HEADS * HALF) + half * HALF + d[None, :],
            mask=live[:, None] & (d < HALF)[None, :],
            other=0.0,
        ).to(tl.float32)[:, None, :]
        key = tl.load(
            keys + row.to(tl.int64)[:, :, None] * HALF + d[None, None, :],
            mask=use[:, :, None] & (d < HALF)[None, None, :],
            other=0.0,
        )
        after = key_gradients(d_keys, moved, keys_unclipped, before, row, use, d, HALF, RATE)
        d_coefficient += tl.sum(key_direction(q, key, SCORE) * after, 2)
    slope = tl.where(use, factor_of(d_coefficient, score, SCORE), 0.0)
    mean = tl.sum(tl.where(use, p * slope, 0.0), 1)
    inside = (r < rows * length)[:, None] & (choice < K)[None, :]
    tl.store(d_coefficients + at[:, None] + choice[None, :], tl.where(use, d_coefficient, 0.0), mask=inside)
    d_slope = tl.where(use, WEIGHT / count * p * (slope - mean[:, None]), 0.0)
    tl.store(d_slopes + at[:, None] + choice[None, :], d_slope, mask=inside)


@triton.jit(do_not_specialize=["first_memory", "version", "d_after", "pieces", *VARYING])
def scores_backward_kernel(
    query, keys, d_keys, ids, ranks, window_flags, probability_sums, counts, moved, keys_unclipped,
    d_coefficients, totals, d_scores, d_ranks, d_query, begins,
    first_memory, version, d_after, pieces, start, length, first, num_tokens, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    CHUNK: tl.constexpr, RATE: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr, CHOICES: tl.constexpr, DEPTH: tl.constexpr, WRITES: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """All of a sub-score's gradient, and what it and the coefficients give to the query.

    ``totals`` are the pieces of the slopes' gradients, summed over the tokens that chose each sub-key.
    """
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    memories = tl.num_programs(1) // (2 * HEADS)
    number, block, earlier = window_of(tl.program_id(0), length, rows, memories, BLOCK)
    first_memory, start, first = first_memory + number * memories, start + number * CHUNK, first + earlier
    r = block * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows * length
    token, t = token_of(r, memory, start, length, num_tokens, rows, begins)
    here = (first + memory * rows * length + r).to(tl.int64)
    flag = tl.load(window_flags + here, mask=inside, other=DEAD).to(tl.int32)
    alive = inside & ((flag & DEAD) == 0)
    live = alive & (t < CHUNK) & ((flag & LIVE) != 0)
    before = rows_before(first_memory, HEADS, SUBKEYS)
    count = count_of(counts, first_memory + memory)
    d_keys += rows_before(d_after, HEADS, SUBKEYS) * HALF
    keys += rows_before(version, HEADS, SUBKEYS) * HALF
    probability_sums += before
    choice = tl.arange(0, CHOICES)
    use = alive[:, None] & (choice < K)[None, :]
    at = (here * 2 * HEADS + half) * K
    choices = at[:, None] + choice[None, :]
    d_score = tl.load(d_scores + choices, mask=use, other=0.0)
    if WRITES:
        chosen, score, p, a, c = coefficients_of(
            ids, ranks, probability_sums, at, alive, live, group, count, SUBKEYS, K, SCORE, WEIGHT, CHOICES
        )
        d_coefficient = tl.load(d_coefficients + choices, mask=use, other=0.0)
        slope = factor_of(d_coefficient, score, SCORE)
        d_score = add_factor_vjp(d_score, c, d_coefficient, SCORE)
        counted = live[:, None] & (choice < K)[None, :]
        mean_a = tl.sum(tl.where(counted, p * a, 0.0), 1)
        mean_slope = tl.sum(tl.where(counted, p * slope, 0.0), 1)
        d_p = WEIGHT / count * (slope * (a - mean_a[:, None]) - mean_slope[:, None] * a)
        d_slope = tl.zeros([BLOCK, CHOICES], tl.float32)
        for piece in range(pieces):
            summed = (piece * tl.num_programs(1) + group).to(tl.int64) * SUBKEYS + chosen
            d_slope += tl.load(totals + summed, mask=counted, other=0.0)
        total = tl.load(probability_sums + group.to(tl.int64) * SUBKEYS + chosen, mask=counted, other=0)
        d_p += d_slope * addressing_curvature(mean_probabilities(total, count)) / count
        d_p = tl.where(counted, d_p, 0.0)
        d_score += tl.where(counted, p * (d_p - tl.sum(tl.where(counted, p * d_p, 0.0), 1)[:, None]), 0.0)
    else:
        chosen = tl.load(ids + choices, mask=use, other=0)
        score = sub_scores(tl.load(ranks + choices, mask=use, other=0.0), SCORE)
        c = tl.zeros([BLOCK, CHOICES], tl.float32)
    d_rank = tl.where(use, factor_of(tl.where(use, d_score, 0.0), score, SCORE), 0.0)
    tl.store(d_ranks + choices, d_rank, mask=inside[:, None] & (choice < K)[None, :])
    row = group * SUBKEYS + chosen
    for d0 in range(0, HALF, DEPTH):
        d = d0 + tl.arange(0, DEPTH)
        stream = token[:, None] * (2 * HEADS * HALF) + half * HALF + d[None, :]
        within = inside[:, None] & (d < HALF)[None, :]
        key = tl.load(
            keys + row.to(tl.int64)[:, :, None] * HALF + d[None, None, :],
            mask=use[:, :, None] & (d < HALF)[None, None, :],
            other=0.0,
        )
        q = tl.load(query + stream, mask=alive[:, None] & (d < HALF)[None, :], other=0.0).to(tl.float32)
        result = tl.sum(d_rank[:, :, None] * query_direction(q[:, None, :], key, SCORE), 1)
        if WRITES:
            after = key_gradients(d_keys, moved, keys_unclipped, before, row, use & live[:, None], d, HALF, RATE)
            result += tl.sum(query_direction_vjp(c[:, :, None], after, SCORE), 1)
        if ADD:  # a token is in two windows at most, and of two sums to 0 the order makes no difference
            tl.atomic_add(d_query + stream, result, mask=within, sem="relaxed")
        else:
            tl.store(d_query + stream, result.to(d_query.dtype.element_ty), mask=within)


def add_scores_backward(launches: Launches, call: Call, integers: dict[str, int], add: bool) -> None:
    """Add the gradients of ranks and queries of windows, the latter to float32 that is there where ``add``."""
    constants, integers = call.shapes.by_token, integers | {"pieces": 0}
    writes = call.plan.windows[integers["window"]].writes and call.cfg.addressing_weight > 0  # nothing to pass on else
    grid = call.blocks(integers, constants["BLOCK"]), integers["groups"]
    if writes:
        launches.add(coefficients_backward_kernel, grid, integers, constants)
        integers = integers_of_sums(launches, call, integers)
        add_key_sums(launches, call, integers, "d_slopes", queries=False)
    constants = constants | {"WRITES": writes, "ADD": add}
    launches.add(scores_backward_kernel, grid, integers, constants)
