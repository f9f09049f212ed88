"""``select_slots`` where a token's choices are few: a thread has a token to itself, and nothing crosses lanes.

So a warp serves 32 tokens with about as many instructions as the kernel of slots.py takes for four.
"""

# A tuple that grows has another type each time.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from fwpkm.kernels.lists import indices_of, inserted, loaded, numbers_of, softmax, with_index
from fwpkm.kernels.losses import PROBABILITY_UNIT
from fwpkm.kernels.scores import sub_scores
from fwpkm.kernels.tokens import DEAD, GONE, INF, LIVE, VARYING, not_due, token_of, window_of

EQUATIONS = ("select_slots", "sub_key_probabilities")
MOST_LISTED = 8
"""H·k at most; more take the compiler minutes."""


@triton.jit
def in_order(ranks, ids):
    """Tuples of ranks and ids by rank, then by id."""
    best = ()
    for i in tl.static_range(len(ranks)):
        best = inserted(best, with_index(ranks[i], ids[i], 0), 0, len(ranks))
    return numbers_of(best), indices_of(best)


@triton.jit
def finite_numbers(x):
    """A tuple with 0 for what is not finite, and whether all of it is."""
    result, bounded = (), tl.abs(x[0]) < INF
    for i in tl.static_range(len(x)):
        finite = tl.abs(x[i]) < INF
        result, bounded = result + (tl.where(finite, x[i], 0.0),), bounded & finite
    return result, bounded


@triton.jit
def scores_of(ranks, SCORE: tl.constexpr):
    """Sub-scores of a tuple of ranks."""
    result = ()
    for i in tl.static_range(len(ranks)):
        result = result + (sub_scores(ranks[i], SCORE),)
    return result


@triton.jit
def best_sums(s1, s2, id1, id2, SUBKEYS: tl.constexpr, K: tl.constexpr):
    """The k best of the k² sums of sub-scores that are in order, best first, and their slots: tuples of k.

    A sum at (i, j), from 0, has the (i + 1)(j + 1) - 1 others up to its row and column before it. So it can be among
    the k best only where (i + 1)(j + 1) <= k.
    """
    best = ()
    for i in tl.static_range(K):
        for j in tl.static_range(K // (i + 1)):
            cell = with_index(s1[i] + s2[j], id1[i] * SUBKEYS + id2[j], i * K + j)
            best = inserted(best, cell, (i + 1) * (j + 1) - 1, K)
    return numbers_of(best), indices_of(best)


@triton.jit(do_not_specialize=["first_memory", "words", *VARYING, "first_new", "num_pending"])
def listed_select_slots_kernel(
    ids, ranks, flags, window_flags, slots, weights, table_rows, last_windows, probability_sums, counts, maps, due,
    new_slots, new_weights, begins, first_memory, words, start, length, first, num_tokens, rows, first_new, num_pending,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    TEMPERATURE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WRITES: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """What ``select_slots_kernel`` computes (slots.py), of a BLOCK of tokens; ids and ranks stay in their order."""
    memory = tl.program_id(1)
    if not_due(due, memory):
        return
    number, block, before = window_of(tl.program_id(0), length, rows, tl.num_programs(1), BLOCK)
    first_memory += number * tl.num_programs(1)
    start, first = start + number * CHUNK, first + before
    r = block * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows * length
    token, t = token_of(r, memory, start, length, num_tokens, rows, begins)
    flag = tl.load(flags + token, mask=inside, other=DEAD).to(tl.int32)
    here = (first + memory * rows * length + r).to(tl.int64)
    out = (token - (token // num_tokens + 1) * num_pending) * HEADS * K
    shown = inside & (start + t >= first_new)
    table = (first_memory + memory).to(tl.int64) * SUBKEYS * SUBKEYS
    gone, alive = (flag & GONE) != 0, (flag & DEAD) == 0
    chosen, scores, logits = (), (), ()
    for half in tl.static_range(2 * HEADS):
        at = (here * 2 * HEADS + half) * K
        rank, subkey = in_order(loaded(ranks + at, inside, K), loaded(ids + at, inside, K))
        rank, bounded = finite_numbers(rank)
        alive = alive & bounded
        chosen, scores = chosen + (subkey,), scores + (scores_of(rank, SCORE),)
    for h in tl.static_range(HEADS):
        sums, slot = best_sums(scores[2 * h], scores[2 * h + 1], chosen[2 * h], chosen[2 * h + 1], SUBKEYS, K)
        for j in tl.static_range(K):
            entry = here * HEADS * K + (h * K + j)
            tl.store(slots + entry, slot[j], mask=inside)
            tl.store(table_rows + entry, (table + slot[j]).to(table_rows.dtype.element_ty), mask=inside)
            if last_windows is not None:
                row = memory.to(tl.int64) * SUBKEYS * SUBKEYS + slot[j]
                tl.atomic_max(last_windows + row, tl.zeros_like(slot[j]) + first_memory, mask=inside, sem="relaxed")
            tl.store(new_slots + out + (h * K + j), tl.where(gone, 0, slot[j]).to(tl.int64), mask=shown)
            logits = logits + (sums[j] / TEMPERATURE,)
    logits, bounded = finite_numbers(logits)
    alive = alive & bounded
    weight = softmax(logits)
    for i in tl.static_range(HEADS * K):
        tl.store(weights + here * HEADS * K + i, weight[i], mask=inside)
        w = tl.where(alive, weight[i], tl.where(gone, 0.0, float("nan")))
        tl.store(new_weights + out + i, w, mask=shown)
    flag = tl.where(alive, flag, DEAD | flag & GONE)
    tl.store(flags + token, flag.to(tl.int8), mask=inside)
    tl.store(window_flags + here, flag.to(tl.int8), mask=inside)

    if WRITES or MAPS:
        asked = inside & alive
        counted = asked & ((flag & LIVE) != 0) & (t < CHUNK)
        if WRITES:
            tl.atomic_add(counts + first_memory + memory, tl.sum(counted.to(tl.int32), 0), sem="relaxed")
        bit = (tl.zeros_like(r) + 1) << (r % 32)
        for half in tl.static_range(2 * HEADS):
            row = ((first_memory + memory) * 2 * HEADS + half).to(tl.int64) * SUBKEYS
            for j in tl.static_range(K if MAPS else 0):
                tl.atomic_or(maps + (row + chosen[half][j]) * words + r // 32, bit, mask=asked, sem="relaxed")
            if WRITES:
                p = softmax(scores[half])
                for j in tl.static_range(K):
                    share = (p[j] * PROBABILITY_UNIT).to(tl.int64)
                    tl.atomic_add(probability_sums + row + chosen[half][j], share, mask=counted, sem="relaxed")
