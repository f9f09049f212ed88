"""Slots and weights of SPEC.md §2, from the chosen sub-keys of both codebooks; and what a write asks of the choices."""

import triton
import triton.language as tl

from fwpkm.kernels.listed_slots import MOST_LISTED, listed_select_slots_kernel
from fwpkm.kernels.losses import PROBABILITY_UNIT, sub_key_probabilities
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.shapes import blocks_of
from fwpkm.kernels.runtime.windows import Call
from fwpkm.kernels.scores import bounded_scores, sub_scores
from fwpkm.kernels.tokens import DEAD, GONE, INF, LIVE, VARYING, not_due, token_of, window_of

EQUATIONS = ("select_slots", "sub_key_probabilities")


@triton.jit
def best_sums(
    s1, s2, id1, id2, choice, SUBKEYS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr
):  # fmt: skip
    """The k best of the k² sums of sub-scores [BLOCK, CHOICES], best first, and their slots."""
    cells = tl.arange(0, CHOICES * CHOICES)
    grid = tl.reshape(s1[:, :, None] + s2[:, None, :], [BLOCK, CHOICES * CHOICES])
    sums = tl.full([BLOCK, CHOICES], -INF, tl.float32)
    pick = tl.zeros([BLOCK, CHOICES], tl.int32)
    for j in range(K):
        best, cell = tl.max(grid, 1, return_indices=True)
        sums = tl.where((choice == j)[None, :], best[:, None], sums)
        pick = tl.where((choice == j)[None, :], cell[:, None], pick)
        grid = tl.where(cells[None, :] == cell[:, None], -INF, grid)
    one = tl.sum(tl.where((pick // CHOICES)[:, :, None] == choice[None, None, :], id1[:, None, :], 0), 2)
    two = tl.sum(tl.where((pick % CHOICES)[:, :, None] == choice[None, None, :], id2[:, None, :], 0), 2)
    return sums, one * SUBKEYS + two


@triton.jit
def softmax_over_heads(logits, valid, alive):
    """One softmax over all heads [BLOCK, HEAD_BLOCK, CHOICES], and whether a token is ``alive`` and all are finite."""
    bad = tl.max(tl.max((valid & ~(tl.abs(logits) < INF)).to(tl.int32), 2), 1)
    alive = alive & (bad == 0)
    logits = tl.where(valid, tl.where(alive[:, None, None], logits, 0.0), -INF)
    e = tl.exp(logits - tl.max(tl.max(logits, 2), 1)[:, None, None])
    return e / tl.sum(tl.sum(e, 2), 1)[:, None, None], alive


@triton.jit
def in_order(rank, chosen, choice, K: tl.constexpr):
    """Ranks and ids [BLOCK, CHOICES] of the first K, by rank, then by id."""
    before = rank[:, None, :] > rank[:, :, None]
    before = before | ((rank[:, None, :] == rank[:, :, None]) & (chosen[:, None, :] < chosen[:, :, None]))
    index = tl.sum((before & (choice < K)[None, None, :]).to(tl.int32), 2)
    index = tl.where((choice < K)[None, :], index, choice[None, :])
    here = index[:, :, None] == choice[None, None, :]
    return tl.sum(tl.where(here, rank[:, :, None], 0.0), 1), tl.sum(tl.where(here, chosen[:, :, None], 0), 1)


@triton.jit(do_not_specialize=["first_memory", "words", *VARYING, "first_new", "num_pending"])
def select_slots_kernel(
    ids, ranks, flags, window_flags, slots, weights, table_rows, last_windows, probability_sums, counts, maps, due,
    new_slots, new_weights, begins, first_memory, words, start, length, first, num_tokens, rows, first_new, num_pending,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    TEMPERATURE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, CHOICES: tl.constexpr, WRITES: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """Sort the sub-keys; the k best of the k² sums of each head, and one softmax over all heads' (§2).

    ``table_rows`` numbers the rows of all memories window by window, for the sort; ``last_windows`` is the largest
    ``first_memory`` of those that read each row. And what the write asks of each token (§3): its probability of each
    sub-key, to be summed for p̄, and one in n; with MAPS, its bit in the map of each, unless it is dead.
    """
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
    choice, head = tl.arange(0, CHOICES), tl.arange(0, HEAD_BLOCK)
    picked = choice < K
    known = inside[:, None] & picked[None, :]
    logits = tl.full([BLOCK, HEAD_BLOCK, CHOICES], -INF, tl.float32)
    alive = (flag & DEAD) == 0
    for h in tl.static_range(HEADS):
        at = ((here * HEADS + h) * 2 * K)[:, None] + choice[None, :]
        id1, id2 = tl.load(ids + at, mask=known, other=0), tl.load(ids + at + K, mask=known, other=0)
        r1, r2 = tl.load(ranks + at, mask=known, other=0.0), tl.load(ranks + at + K, mask=known, other=0.0)
        r1, id1 = in_order(r1, id1, choice, K)
        r2, id2 = in_order(r2, id2, choice, K)
        tl.store(ids + at, id1, mask=known)
        tl.store(ids + at + K, id2, mask=known)
        tl.store(ranks + at, r1, mask=known)
        tl.store(ranks + at + K, r2, mask=known)
        s1, bounded1 = bounded_scores(r1, choice, K, SCORE)
        s2, bounded2 = bounded_scores(r2, choice, K, SCORE)
        alive = alive & bounded1 & bounded2
        sums, slot = best_sums(s1, s2, id1, id2, choice, SUBKEYS, K, BLOCK, CHOICES)
        entry = (here * HEADS * K + h * K)[:, None] + choice[None, :]
        tl.store(slots + entry, slot, mask=known)
        tl.store(table_rows + entry, (table + slot).to(table_rows.dtype.element_ty), mask=known)
        if last_windows is not None:
            row = memory.to(tl.int64) * SUBKEYS * SUBKEYS + slot
            tl.atomic_max(last_windows + row, tl.zeros_like(slot) + first_memory, mask=known, sem="relaxed")
        slot = tl.where(((flag & GONE) == 0)[:, None], slot, 0).to(tl.int64)
        tl.store(new_slots + out[:, None] + h * K + choice[None, :], slot, mask=known & shown[:, None])
        logits = tl.where((head == h)[None, :, None], (sums / TEMPERATURE)[:, None, :], logits)
    valid = (head < HEADS)[None, :, None] & picked[None, None, :]
    w, alive = softmax_over_heads(logits, valid, alive)
    of_head = head[None, :, None] * K + choice[None, None, :]
    tl.store(weights + (here * HEADS * K)[:, None, None] + of_head, w, mask=inside[:, None, None] & valid)
    w = tl.where(alive[:, None, None], w, tl.where((flag & GONE) == 0, float("nan"), 0.0)[:, None, None])
    tl.store(new_weights + out[:, None, None] + of_head, w, mask=shown[:, None, None] & valid)
    flag = tl.where(alive, flag, DEAD | flag & GONE)
    tl.store(flags + token, flag.to(tl.int8), mask=inside)
    tl.store(window_flags + here, flag.to(tl.int8), mask=inside)

    if WRITES or MAPS:
        tl.debug_barrier()  # other threads of this program have stored the sorted choices
        counted = inside & ((flag & LIVE) != 0) & (t < CHUNK)
        if WRITES:
            tl.atomic_add(counts + first_memory + memory, tl.sum(counted.to(tl.int32), 0), sem="relaxed")
        for half in tl.static_range(2 * HEADS):
            at = ((here * 2 * HEADS + half) * K)[:, None] + choice[None, :]
            asked = (inside & alive)[:, None] & picked[None, :]
            subkey = tl.load(ids + at, mask=asked, other=0)
            row = ((first_memory + memory) * 2 * HEADS + half).to(tl.int64) * SUBKEYS + subkey
            if MAPS:
                bit = (tl.zeros_like(subkey) + 1) << (r % 32)[:, None]
                tl.atomic_or(maps + row * words + (r // 32)[:, None], bit, mask=asked, sem="relaxed")
            if WRITES:
                score = sub_scores(tl.load(ranks + at, mask=asked, other=0.0), SCORE)
                p = sub_key_probabilities(score, picked[None, :])
                p = (p * PROBABILITY_UNIT).to(tl.int64)
                tl.atomic_add(probability_sums + row, p, mask=asked & counted[:, None], sem="relaxed")


def add_select_slots(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add the slots and weights of windows; for a backward, and before a write of keys, maps of who chose what."""
    constants, writes = call.shapes.select_slots, call.plan.windows[integers["window"]].writes
    kernel = select_slots_kernel
    if call.cfg.slots_per_token <= MOST_LISTED:
        kernel, constants = listed_select_slots_kernel, call.shapes.listed_select_slots
    launches.add(
        kernel,
        (call.blocks(integers, constants["BLOCK"]), integers["memories"]),
        integers | {"words": launches.spec("maps").shape[-1]},
        constants | {"WRITES": writes, "MAPS": call.save or (writes and call.cfg.addressing_weight > 0)},
    )


@triton.jit(do_not_specialize=["total"])
def select_slots_backward_kernel(
    ids, slots, weights, window_flags, d_weights, d_scores, total,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """From the weights through the softmax and the sums to the sub-scores."""
    here = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = here < total
    alive = inside & ((tl.load(window_flags + here, mask=inside, other=DEAD) & DEAD) == 0)
    choice, head = tl.arange(0, CHOICES), tl.arange(0, HEAD_BLOCK)
    use = alive[:, None, None] & (head < HEADS)[None, :, None] & (choice < K)[None, None, :]
    at = (here * HEADS * K)[:, None, None] + head[None, :, None] * K + choice[None, None, :]
    weighted = tl.load(weights + at, mask=use, other=0.0) * tl.load(d_weights + at, mask=use, other=0.0)
    mean = tl.sum(tl.sum(weighted, 2), 1)
    for h in tl.static_range(HEADS):
        known = inside[:, None] & (choice < K)[None, :]
        at = (here * HEADS * K + h * K)[:, None] + choice[None, :]
        slot = tl.load(slots + at, mask=known, other=-1)
        w = tl.load(weights + at, mask=known & alive[:, None], other=0.0)
        d_sum = w * (tl.load(d_weights + at, mask=known & alive[:, None], other=0.0) - mean[:, None]) / TEMPERATURE
        base = ((here * HEADS + h) * 2 * K)[:, None] + choice[None, :]
        for codebook in tl.static_range(2):
            mine = tl.load(ids + base + codebook * K, mask=known, other=-2)
            chosen = slot // SUBKEYS if codebook == 0 else slot % SUBKEYS
            hit = mine[:, :, None] == chosen[:, None, :]
            tl.store(d_scores + base + codebook * K, tl.sum(tl.where(hit, d_sum[:, None, :], 0.0), 2), mask=known)


def add_select_slots_backward(launches: Launches, call: Call) -> None:
    """Add the gradients of all windows' sub-scores from those of their weights."""
    constants, total = call.shapes.select_slots_backward, call.plan.total
    launches.add(select_slots_backward_kernel, (blocks_of(total, constants["BLOCK"]),), {"total": total}, constants)
