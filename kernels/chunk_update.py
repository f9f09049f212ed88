"""SPEC.md §4 on a GPU: one step down both losses, in place. One program owns each row; its sums run in token order."""

import triton
import triton.language as tl

from fwpkm.kernels.lookup import PROBABILITY_UNIT, softmax_rows, sub_scores
from fwpkm.kernels.parts import store_key
from fwpkm.kernels.sums import gathered
from fwpkm.kernels.tokens import INF, LIVE, TARGET, VARYING, not_due


@triton.jit
def slope(share, count):
    """a_i = log(p̄_i + 1e-8) + p̄_i / (p̄_i + 1e-8), from the sum of probabilities in its unit (§4)."""
    mean = share.to(tl.float32) / (PROBABILITY_UNIT * count)
    return tl.log(mean + 1e-8) + mean / (mean + 1e-8)


@triton.jit
def pull_of(
    ids, ranks, share, at, known, counted, group, count,
    SUBKEYS: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr, EPSILON: tl.constexpr, WEIGHT: tl.constexpr,
    CHOICES: tl.constexpr,
):  # fmt: skip
    """Of the tokens whose choices begin at ``at`` [E]: the sub-keys chosen, their scores s, p, a, and c (§4).

    All [E, CHOICES]; c is the factor of (q - K), or of q, in α ∇L_addr.
    """
    choice = tl.arange(0, CHOICES)
    picked = (choice < K)[None, :]
    use = known[:, None] & picked
    chosen = tl.load(ids + at[:, None] + choice[None, :], mask=use, other=-1)
    score = sub_scores(tl.load(ranks + at[:, None] + choice[None, :], mask=use, other=0.0), EPSILON, IDW)
    p = softmax_rows(tl.where(picked, score, -float("inf")))
    a = slope(tl.load(share + group.to(tl.int64) * SUBKEYS + chosen, mask=use, other=0), count)
    mean = tl.sum(tl.where(picked, p * a, 0.0), 1)
    pull = tl.where(use & counted[:, None], WEIGHT / count * p * (a - mean[:, None]), 0.0)
    if IDW:
        pull = 2 * pull * tl.exp(score)
    return chosen, score, p, a, pull


@triton.jit(do_not_specialize=["window", *VARYING])
def pull_kernel(
    ids, ranks, kinds, share, counts, active, pulls, due, window, start, length, first, room, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr, EPSILON: tl.constexpr,
    CHUNK: tl.constexpr, LOOKAHEAD: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """c of every choice of the window, from p̄; and whether any token of a memory has a pair."""
    if not_due(due):
        return
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    memories = tl.num_programs(1) // (2 * HEADS)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = (first + memory * rows * length + r).to(tl.int64)
    t = r % length
    live = (r < rows * length) & (t < CHUNK)
    live = live & ((tl.load(kinds + here, mask=live, other=0) & LIVE) != 0)
    if half == 0:
        bound = live & (t + LOOKAHEAD < length)
        bound = bound & ((tl.load(kinds + here + LOOKAHEAD, mask=bound, other=0) & TARGET) != 0)
        tl.atomic_or(active + window * memories + memory, tl.max(bound.to(tl.int32), 0))
    count = tl.maximum(tl.load(counts + window * memories + memory), 1).to(tl.float32)
    share += window * tl.num_programs(1).to(tl.int64) * SUBKEYS
    at = (here * 2 * HEADS + half) * K
    _, _, _, _, pull = pull_of(
        ids, ranks, share, at, live, live, group, count, SUBKEYS, K, IDW, EPSILON, WEIGHT, CHOICES
    )
    choice = tl.arange(0, CHOICES)
    out = ((memory * rows * length + r).to(tl.int64) * 2 * HEADS + half) * K
    tl.store(
        pulls + out[:, None] + choice[None, :], pull, mask=(r < rows * length)[:, None] & (choice < K)[None, :]
    )  # fmt: skip


@triton.jit(do_not_specialize=["window", "before", "after", "pieces"])
def keys_kernel(
    keys, norms, largest, parts, sums, totals, share, counts, active, loss, moved, pulled, unclipped, due,
    window, before, after, pieces,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr,
    RATE: tl.constexpr, DECAY: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """keys ← keys - η (clip(α ∇L_addr) + λ keys), and the sub-key's term p̄ log(p̄ + 1e-8) of the loss.

    ∇ = Σ c (q - K), or Σ c q.
    """
    if not_due(due):
        return
    subkey, group = tl.program_id(0), tl.program_id(1)
    groups = tl.num_programs(1)
    memory, memories = group // (2 * HEADS), groups // (2 * HEADS)
    row = group.to(tl.int64) * SUBKEYS + subkey
    here = window * groups.to(tl.int64) * SUBKEYS + row
    d = tl.arange(0, BLOCK)
    key = tl.load(keys + (before * groups.to(tl.int64) * SUBKEYS + row) * HALF + d, mask=d < HALF, other=0.0)
    count = tl.maximum(tl.load(counts + window * memories + memory), 1).to(tl.float32)
    lives = tl.load(active + window * memories + memory) != 0
    gradient, total = gathered(sums, totals, pieces, groups, row, SUBKEYS, d, HALF)
    if CLIP is not None:
        if SAVE:
            tl.store(unclipped + here * HALF + d, (tl.abs(gradient) <= CLIP).to(tl.int8), mask=d < HALF)
        gradient = tl.minimum(tl.maximum(gradient, -CLIP), CLIP)
    new = tl.where(d < HALF, key - RATE * (gradient + DECAY * key), 0.0)
    moves = lives & (tl.min((tl.abs(new) < INF).to(tl.int32), 0) != 0)
    new = tl.where(moves, new, key)
    store_key(new, keys, norms, largest, parts, after, window + 1, groups, group, subkey, d, SUBKEYS, HALF)
    mean = tl.load(share + here).to(tl.float32) / (PROBABILITY_UNIT * count)
    tl.store(loss + here, tl.where(lives, mean * tl.log(mean + 1e-8), 0.0))
    if SAVE:
        tl.store(moved + here, moves.to(tl.int8))
        tl.store(pulled + here, total)


@triton.jit
def entries_of(
    segment, end, row, sorted_rows, order, weights, strength, error, kinds, heads, at, length, first, d,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr, ENTRY_BLOCK: tl.constexpr,
    WRITES: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Of the next entries of a row, as many as ENTRY_BLOCK: Σ κ w g (v̂ - u), how many count, and how many there are.

    None from ``end`` on.
    """
    e = segment + tl.arange(0, ENTRY_BLOCK)
    inside = e < end
    same = tl.load(sorted_rows + e, mask=inside, other=-1) == row
    entry = tl.load(order + e, mask=inside, other=0).to(tl.int64)
    gradient = tl.zeros_like(d).to(tl.float32)
    count = 0
    if SAVE:
        tl.store(heads + entry, at.to(tl.int32) + tl.zeros_like(e).to(tl.int32), mask=same)
    if WRITES:
        token = entry // ENTRIES
        t = ((token - first) % length).to(tl.int32)
        counted = same & (t < CHUNK) & ((tl.load(kinds + token, mask=same, other=0) & LIVE) != 0)
        count += tl.sum(counted.to(tl.int32), 0)
        pull = tl.load(strength + token, mask=same, other=0.0) * tl.load(weights + entry, mask=same, other=0.0)
        miss = tl.load(
            error + token[:, None] * WIDTH + d[None, :], mask=same[:, None] & (d < WIDTH)[None, :], other=0.0
        )
        gradient += tl.sum(tl.where((counted & (pull != 0))[:, None], pull[:, None] * miss, 0.0), 0)
    return gradient, count, tl.sum(same.to(tl.int32), 0)


@triton.jit
def begins_row(sorted_rows, begin, at):
    """The row of an entry, and whether it is the first of that row's."""
    row = tl.load(sorted_rows + at)
    return row, row != tl.load(sorted_rows + at - 1, mask=at > begin, other=-1)


@triton.jit
def own_end(begin, at, last, PIECE: tl.constexpr):
    """Where those entries of a row end that its own program sums: with the first piece that begins within the row.

    Pieces have PIECE entries and are counted from the window's first. So few rows have any that another sums.
    """
    return tl.minimum(begin + (tl.cdiv(at - begin, PIECE) + 1) * PIECE, last)


@triton.jit
def goes_on(sorted_rows, begin, at, PIECE: tl.constexpr):
    """The row of the entry that a piece begins with, and whether the piece before it begins with that row too."""
    row = tl.load(sorted_rows + at)
    return row, row == tl.load(sorted_rows + at - PIECE, mask=at > begin, other=-1)


@triton.jit(do_not_specialize=["length", "first", "total"])
def piece_kernel(
    sorted_rows, order, weights, strength, error, kinds, partial, counts, due, length, first, total,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    ENTRY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ κ w g (v̂ - u) of a row's entries in one piece of the window's, unless they are its own program's.

    Few rows have so many entries; but a token that all read alike would keep the program of its row busy alone.
    """
    if not_due(due):
        return
    begin = (first * ENTRIES).to(tl.int64)
    at = begin + tl.program_id(0) * PIECE
    row, others = goes_on(sorted_rows, begin, at, PIECE)
    if not others:
        return
    d = tl.arange(0, BLOCK)
    end = tl.minimum(at + PIECE, total.to(tl.int64) * ENTRIES)
    gradient = tl.zeros([BLOCK], tl.float32)
    count = 0
    segment = at
    found = ENTRY_BLOCK
    while (found == ENTRY_BLOCK) & (segment < end):
        more, counted, found = entries_of(
            segment, end, row, sorted_rows, order, weights, strength, error, kinds, None, at, length, first, d,
            WIDTH, ENTRIES, CHUNK, ENTRY_BLOCK, True, False,
        )  # fmt: skip
        gradient += more
        count += counted
        segment += ENTRY_BLOCK
    tl.store(partial + tl.program_id(0).to(tl.int64) * WIDTH + d, gradient, mask=d < WIDTH)
    tl.store(counts + tl.program_id(0), count)


@triton.jit(do_not_specialize=["window", "memories", "length", "first", "total"])
def values_kernel(
    values, sorted_rows, order, weights, strength, error, kinds, active, partial, counts,
    heads, steps, saved, unclipped, due, window, memories, length, first, total,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr,
    RATE: tl.constexpr, DECAY: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    ENTRY_BLOCK: tl.constexpr, WRITES: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """values_i ← values_i - η (clip(G_i) + λ values_i), G_i = (1/N_i) Σ κ w g (v̂ - u) over the entries of slot i.

    All entries of the call lie sorted by window, table row and token. Those of one row and window are a segment, and
    the program of its first entry owns the row; the sums of the pieces behind its own are there already. With SAVE it
    keeps what the backward needs under the segment's place: the row and the step η/N_i; and for each entry, that place.
    """
    if not_due(due):
        return
    begin = (first * ENTRIES).to(tl.int64)
    at = begin + tl.program_id(0)
    last = total.to(tl.int64) * ENTRIES
    end = own_end(begin, at, last, PIECE)
    # Loads before each branch go out together: a row is a few of them in a chain, and programs wait for little else.
    row, new = begins_row(sorted_rows, begin, at)
    follows = tl.load(sorted_rows + at + 1, mask=at + 1 < end, other=-1) == row
    going_on = tl.load(sorted_rows + end, mask=end < last, other=-1) == row
    mine = tl.load(order + at).to(tl.int64)
    if not new:
        return
    d = tl.arange(0, BLOCK)
    place = row.to(tl.int64) - window * memories.to(tl.int64) * SLOTS
    offset = place * WIDTH
    old = tl.load(values + offset + d, mask=d < WIDTH, other=0.0)
    # Most rows have few entries: the first alone needs few registers.
    gradient = tl.zeros([BLOCK], tl.float32)
    count = 0
    lives = False
    if WRITES:
        token = mine // ENTRIES
        miss = tl.load(error + token * WIDTH + d, mask=d < WIDTH, other=0.0)
        pull = tl.load(strength + token) * tl.load(weights + mine)
        lives = tl.load(active + window * memories + place // SLOTS) != 0
        counts_too = ((token - first) % length < CHUNK) & ((tl.load(kinds + token) & LIVE) != 0)
        gradient = tl.where(counts_too & (pull != 0), pull * miss, 0.0)
        count += counts_too.to(tl.int32)
    if SAVE:
        tl.store(heads + mine, at.to(tl.int32))
    segment = at + 1
    found = follows.to(tl.int32) * ENTRY_BLOCK
    while found == ENTRY_BLOCK:
        more, counted, found = entries_of(
            segment, end, row, sorted_rows, order, weights, strength, error, kinds, heads, at, length, first, d,
            WIDTH, ENTRIES, CHUNK, ENTRY_BLOCK, WRITES, SAVE,
        )  # fmt: skip
        gradient += more
        count += counted
        segment += ENTRY_BLOCK
    while going_on:
        if WRITES:
            piece = (end - begin) // PIECE
            gradient += tl.load(partial + piece * WIDTH + d, mask=d < WIDTH, other=0.0)
            count += tl.load(counts + piece)
        if SAVE:
            e = end + tl.arange(0, PIECE)
            same = tl.load(sorted_rows + e, mask=e < last, other=-1) == row
            entry = tl.load(order + e, mask=same, other=0).to(tl.int64)
            tl.store(heads + entry, at.to(tl.int32) + tl.zeros_like(e).to(tl.int32), mask=same)
        end += PIECE
        going_on = tl.load(sorted_rows + end, mask=end < last, other=-1) == row
    if SAVE:
        tl.store(saved + at * WIDTH + d, old, mask=d < WIDTH)
    if WRITES:
        share = 1.0 / tl.maximum(count, 1).to(tl.float32)
        gradient = gradient * share
        if CLIP is not None:
            if SAVE:
                tl.store(unclipped + at * WIDTH + d, (tl.abs(gradient) <= CLIP).to(tl.int8), mask=d < WIDTH)
            gradient = tl.minimum(tl.maximum(gradient, -CLIP), CLIP)
        new = tl.where(d < WIDTH, old - RATE * (gradient + DECAY * old), 0.0)
        moves = (count > 0) & lives & (tl.min((tl.abs(new) < INF).to(tl.int32), 0) != 0)
        if moves:
            tl.store(values + offset + d, new, mask=d < WIDTH)
        if SAVE:
            tl.store(steps + at, tl.where(moves, RATE * share, 0.0))
    elif SAVE:
        tl.store(steps + at, 0.0)
