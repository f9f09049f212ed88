"""SPEC.md §4 on a GPU: one step down both losses, in place. One program owns each row; its sums run in token order."""

import triton
import triton.language as tl

from fwpkm.kernels.flags import LIVE, TARGET
from fwpkm.kernels.lists import members, pull_of, words_of
from fwpkm.kernels.lookup import PROBABILITY_UNIT, token_of

_INF = tl.constexpr(float("inf"))
_VARYING = ["start", "length", "first", "room", "rows", "words"]


@triton.jit(do_not_specialize=["length", "first", "rows"])
def tally_kernel(
    kinds, counts, active, length, first, rows,
    CHUNK: tl.constexpr, LOOKAHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """n, the chunk's unmasked tokens, and whether any has a pair, of each memory."""
    memory = tl.program_id(0)
    count, pairs = 0, 0
    for at in range(0, rows * length, BLOCK):
        r = at + tl.arange(0, BLOCK)
        here = (first + memory * rows * length + r).to(tl.int64)
        t = r % length
        counted = (r < rows * length) & (t < CHUNK)
        counted = counted & ((tl.load(kinds + here, mask=counted, other=0) & LIVE) != 0)
        bound = counted & (t + LOOKAHEAD < length)
        bound = bound & ((tl.load(kinds + here + LOOKAHEAD, mask=bound, other=0) & TARGET) != 0)
        count += tl.sum(counted.to(tl.int32), 0)
        pairs += tl.sum(bound.to(tl.int32), 0)
    tl.store(counts + memory, count)
    tl.store(active + memory, (pairs > 0).to(tl.int32))


@triton.jit(do_not_specialize=_VARYING)
def keys_kernel(
    query, keys, norms, new_keys, new_norms, ids, ranks, kinds, share, bits, counts, active,
    loss, moved, unclipped,
    start, length, first, room, rows, words,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr,
    EPSILON: tl.constexpr, CHUNK: tl.constexpr, RATE: tl.constexpr, DECAY: tl.constexpr, CLIP: tl.constexpr,
    WEIGHT: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr, ENTRIES: tl.constexpr, WORDS: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    """keys ← keys - η (clip(α ∇L_addr) + λ keys), and the sub-key's term p̄ log(p̄ + 1e-8) of the loss."""
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    row = group.to(tl.int64) * SUBKEYS + tl.program_id(0)
    d = tl.arange(0, BLOCK)
    key = tl.load(keys + row * HALF + d, mask=d < HALF, other=0.0)
    count = tl.maximum(tl.load(counts + memory), 1).to(tl.float32)
    lives = tl.load(active + memory) != 0
    gradient = tl.zeros([BLOCK], tl.float32)
    for w0 in range(0, words, WORDS):
        word, number, reached, total = words_of(bits, row, words, w0, WORDS)
        for e0 in range(0, total, ENTRIES):
            r, known = members(word, number, reached, total, e0, w0, ENTRIES)
            token, t = token_of(r, memory, start, length, room, rows)
            here = (first + memory * rows * length + r).to(tl.int64)
            live = known & (t < CHUNK) & ((tl.load(kinds + here, mask=known, other=0) & LIVE) != 0)
            at = (here * 2 * HEADS + half) * K
            chosen, _, _, _, pull = pull_of(
                ids, ranks, share, at, known, live, group, count, SUBKEYS, K, IDW, EPSILON, WEIGHT, CHOICES
            )
            pull = tl.sum(tl.where(chosen == tl.program_id(0), pull, 0.0), 1)
            q = tl.load(
                query + token[:, None] * (2 * HEADS * HALF) + half * HALF + d[None, :],
                mask=live[:, None] & (d < HALF)[None, :],
                other=0.0,
            ).to(tl.float32)
            if IDW:
                q = q - key[None, :]
            gradient += tl.sum(pull[:, None] * q, 0)
    if CLIP is not None:
        if SAVE:
            tl.store(unclipped + row * HALF + d, (tl.abs(gradient) <= CLIP).to(tl.int8), mask=d < HALF)
        gradient = tl.minimum(tl.maximum(gradient, -CLIP), CLIP)
    new = tl.where(d < HALF, key - RATE * (gradient + DECAY * key), 0.0)
    moves = lives & (tl.min((tl.abs(new) < _INF).to(tl.int32), 0) != 0)
    new = tl.where(moves, new, key)
    tl.store(new_keys + row * HALF + d, new, mask=d < HALF)
    tl.store(new_norms + row, tl.sum(new * new, 0))
    mean = tl.load(share + row).to(tl.float32) / (PROBABILITY_UNIT * count)
    tl.store(loss + row, tl.where(lives, mean * tl.log(mean + 1e-8), 0.0))
    if SAVE:
        tl.store(moved + row, moves.to(tl.int8))


@triton.jit(do_not_specialize=["length", "first", "rows", "total", "end"])
def values_kernel(
    values, sorted_rows, order, place, weights, strength, error, kinds, active,
    heads, steps, nexts, saved, unclipped,
    length, first, rows, total, end,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr,
    RATE: tl.constexpr, DECAY: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr, ENTRY_BLOCK: tl.constexpr,
    WRITES: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """values_i ← values_i - η (clip(G_i) + λ values_i), G_i = (1/N_i) Σ κ w g (v̂ - u) over the entries of slot i.

    All entries of the call lie sorted by table row, then by window and token. Those of one row and window are a
    segment, and the program of its first entry owns the row. With SAVE it keeps what the backward needs under the
    segment's place: the row, the step η/N_i, and the place of the same row's next segment, which is adjacent.
    """
    begin = (first * ENTRIES).to(tl.int64)
    at = tl.load(place + begin + tl.program_id(0)).to(tl.int64)
    row = tl.load(sorted_rows + at)
    if at > 0:
        if (tl.load(sorted_rows + at - 1) == row) & (tl.load(order + at - 1) >= begin):
            return
    d = tl.arange(0, BLOCK)
    offset = row.to(tl.int64) * WIDTH
    old = tl.load(values + offset + d, mask=d < WIDTH, other=0.0)
    gradient = tl.zeros([BLOCK], tl.float32)
    count = 0
    segment = at
    more = 1
    while more > 0:
        e = segment + tl.arange(0, ENTRY_BLOCK)
        entry = tl.load(order + e, mask=e < total, other=0).to(tl.int64)
        same = (e < total) & (tl.load(sorted_rows + e, mask=e < total, other=-1) == row)
        same = same & (entry < end.to(tl.int64) * ENTRIES)
        if SAVE:
            tl.store(heads + entry, at.to(tl.int32) + tl.zeros_like(e).to(tl.int32), mask=same)
        if WRITES:
            token = entry // ENTRIES
            t = ((token - first) % length).to(tl.int32)
            counted = same & (t < CHUNK) & ((tl.load(kinds + token, mask=same, other=0) & LIVE) != 0)
            count += tl.sum(counted.to(tl.int32), 0)
            pull = tl.load(strength + token, mask=counted, other=0.0) * tl.load(
                weights + entry, mask=counted, other=0.0
            )
            miss = tl.load(
                error + token[:, None] * WIDTH + d[None, :], mask=(pull != 0)[:, None] & (d < WIDTH)[None, :], other=0.0
            )
            gradient += tl.sum(pull[:, None] * miss, 0)
        found = tl.sum(same.to(tl.int32), 0)
        segment += found
        more = found // ENTRY_BLOCK
    if SAVE:
        tl.store(saved + at * WIDTH + d, old, mask=d < WIDTH)
        follows = tl.load(sorted_rows + segment, mask=segment < total, other=-1) == row
        tl.store(nexts + at, tl.where(follows, segment, -1).to(tl.int32))
    if WRITES:
        share = 1.0 / tl.maximum(count, 1).to(tl.float32)
        gradient = gradient * share
        if CLIP is not None:
            if SAVE:
                tl.store(unclipped + at * WIDTH + d, (tl.abs(gradient) <= CLIP).to(tl.int8), mask=d < WIDTH)
            gradient = tl.minimum(tl.maximum(gradient, -CLIP), CLIP)
        new = tl.where(d < WIDTH, old - RATE * (gradient + DECAY * old), 0.0)
        moves = (count > 0) & (tl.load(active + row // SLOTS) != 0)
        moves = moves & (tl.min((tl.abs(new) < _INF).to(tl.int32), 0) != 0)
        if moves:
            tl.store(values + offset + d, new, mask=d < WIDTH)
        if SAVE:
            tl.store(steps + at, tl.where(moves, RATE * share, 0.0))
    elif SAVE:
        tl.store(steps + at, 0.0)
