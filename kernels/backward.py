"""The exact gradients of SPEC.md §4 on a GPU: windows in reverse, from the touched rows that the forward kept.

Each touched row of each window has one gradient row, at the place of its segment: that of the row as the window found
it. ``latest`` has for every row of the table the place of its segment in the earliest window done, or -1: what is left
of the row after a window has the gradient there, or that of the final table.
"""

import triton
import triton.language as tl

from fwpkm.kernels.chunk_update import begins_row, goes_on, own_end, pull_of
from fwpkm.kernels.lookup import PROBABILITY_UNIT, sub_scores
from fwpkm.kernels.sums import gathered
from fwpkm.kernels.tokens import DEAD, INF, LIVE, TARGET, VARYING, token_of

_WINDOW = ["window", "memories", "count", "pieces", "fresh", "arrived", "length_out", "total", *VARYING]


@triton.jit
def gradient_after(
    gradients, d_values, unclipped, next_place, place, row, known, d,
    WIDTH: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Gradients [E, D] of rows as a window left them; those that clipping passes."""
    inside = (d < WIDTH)[None, :]
    later = known & (next_place >= 0)
    at = next_place.to(tl.int64)[:, None] * WIDTH + d[None, :]
    after = tl.load(gradients + at, mask=later[:, None] & inside, other=0.0)
    if AFTER:
        at = row.to(tl.int64)[:, None] * WIDTH + d[None, :]
        after += tl.load(d_values + at, mask=(known & (next_place < 0))[:, None] & inside, other=0.0)
    if unclipped is not None:
        at = place.to(tl.int64)[:, None] * WIDTH + d[None, :]
        after = after * tl.load(unclipped + at, mask=known[:, None] & inside, other=0).to(tl.float32)
    return after


@triton.jit(do_not_specialize=_WINDOW)
def read_backward_kernel(
    slots, weights, kinds, gate, error, strength, heads, steps, latest, saved, unclipped, gradients, d_values, d_output,
    d_weights, d_read, d_target, d_gate,
    start, length, first, room, rows, fresh, arrived, length_out,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr, LOOKAHEAD: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, ENTRY_BLOCK: tl.constexpr, HAS_GATE: tl.constexpr, OUTPUT: tl.constexpr,
    AFTER: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Through the write into v̂, u, κ g; then through the read into w."""
    r = tl.program_id(0)
    here = (first + r).to(tl.int64)
    b, t = r // length, r % length
    flag = tl.load(kinds + here).to(tl.int32)
    memory = (b // rows).to(tl.int64)
    d = tl.arange(0, BLOCK)
    toward = tl.zeros([BLOCK], tl.float32)
    power = 0.0
    for at in range(0, ENTRIES, ENTRY_BLOCK):
        e = at + tl.arange(0, ENTRY_BLOCK)
        w = tl.load(weights + here * ENTRIES + e, mask=e < ENTRIES, other=0.0)
        power += tl.sum(w * w, 0)
    d_scale = 0.0
    if WRITES:
        c = tl.load(strength + here)
        miss = tl.load(error + here * WIDTH + d, mask=d < WIDTH, other=0.0)
        wild = tl.max((~(tl.abs(miss) < INF)).to(tl.int32), 0) != 0
        miss = tl.where(wild, 0.0, miss)
        d_strength = 0.0
        for at in range(0, ENTRIES, ENTRY_BLOCK):
            e = at + tl.arange(0, ENTRY_BLOCK)
            known = e < ENTRIES
            w = tl.load(weights + here * ENTRIES + e, mask=known, other=0.0)
            place = tl.load(heads + here * ENTRIES + e, mask=known, other=0)
            step = tl.load(steps + place, mask=known, other=0.0)
            row = memory * SLOTS + tl.load(slots + here * ENTRIES + e, mask=known, other=0)
            following = tl.load(latest + row, mask=known, other=-1)
            after = gradient_after(
                gradients, d_values, unclipped, following, place, row, known & (step != 0), d, WIDTH, AFTER
            )
            toward -= tl.sum((c * w * step)[:, None] * after, 0)
            d_pull = -step * tl.sum(after * miss[None, :], 1)
            d_pull = tl.where(d_pull == d_pull, d_pull, 0.0)
            d_strength += tl.sum(w * d_pull, 0)
            tl.store(d_weights + here * ENTRIES + e, c * d_pull, mask=known)
        tl.debug_barrier()  # other threads of this program load them below
        bound = (t < CHUNK) & (t + LOOKAHEAD < length)
        partner = tl.load(kinds + here + LOOKAHEAD, mask=bound, other=0).to(tl.int32)
        pair = bound & ((flag & LIVE) != 0) & ((partner & TARGET) != 0)
        stream = b.to(tl.int64) * room + start + t
        if pair:
            tl.store(
                d_target + (stream + LOOKAHEAD) * WIDTH + d, (-toward).to(d_target.dtype.element_ty), mask=d < WIDTH
            )
            scale = SCALE
            if SCALE == 0:
                scale = 1 / power
            if HAS_GATE:
                tl.store(d_gate + stream, (scale * d_strength).to(d_gate.dtype.element_ty))
            if SCALE == 0:
                g = 1.0
                if HAS_GATE:
                    g = tl.load(gate + stream).to(tl.float32)
                d_scale = -2 * g * d_strength / (power * power)
    if OUTPUT:
        if start + t >= fresh:
            out = b.to(tl.int64) * length_out + start + t - arrived
            toward += tl.load(d_output + out * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    if (flag & DEAD) != 0:
        toward = tl.zeros([BLOCK], tl.float32)
    tl.store(d_read + r.to(tl.int64) * WIDTH + d, toward, mask=d < WIDTH)
    for at in range(0, ENTRIES, ENTRY_BLOCK):
        e = at + tl.arange(0, ENTRY_BLOCK)
        known = e < ENTRIES
        w = tl.load(weights + here * ENTRIES + e, mask=known, other=0.0)
        place = tl.load(heads + here * ENTRIES + e, mask=known, other=0).to(tl.int64)
        row = tl.load(
            saved + place[:, None] * WIDTH + d[None, :], mask=known[:, None] & (d < WIDTH)[None, :], other=0.0
        )
        d_w = tl.sum(row * toward[None, :], 1) + d_scale * w
        if WRITES:
            d_w += tl.load(d_weights + here * ENTRIES + e, mask=known, other=0.0)
        tl.store(d_weights + here * ENTRIES + e, d_w, mask=known)


@triton.jit
def toward_of(
    segment, end, row, sorted_rows, order, weights, d_read, first, d,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, ENTRY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the next entries of a row, as many as ENTRY_BLOCK: Σ w d v̂, and how many there are before ``end``."""
    e = segment + tl.arange(0, ENTRY_BLOCK)
    known = e < end
    entries = tl.load(order + e, mask=known, other=0).to(tl.int64)
    same = tl.load(sorted_rows + e, mask=known, other=-1) == row
    w = tl.load(weights + entries, mask=same, other=0.0)
    tokens = entries // ENTRIES - first
    towards = tl.load(
        d_read + tokens[:, None] * WIDTH + d[None, :], mask=same[:, None] & (d < WIDTH)[None, :], other=0.0
    )
    return tl.sum(w[:, None] * towards, 0), tl.sum(same.to(tl.int32), 0)


@triton.jit(do_not_specialize=_WINDOW)
def piece_backward_kernel(
    sorted_rows, order, weights, d_read, partial, first, total,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, ENTRY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ w d v̂ of a row's entries in one piece of the window's, unless they are its own program's."""
    begin = (first * ENTRIES).to(tl.int64)
    at = begin + tl.program_id(0) * PIECE
    row, others = goes_on(sorted_rows, begin, at, PIECE)
    if not others:
        return
    d = tl.arange(0, BLOCK)
    end = tl.minimum(at + PIECE, total.to(tl.int64) * ENTRIES)
    gradient = tl.zeros([BLOCK], tl.float32)
    segment = at
    found = ENTRY_BLOCK
    while (found == ENTRY_BLOCK) & (segment < end):
        more, found = toward_of(
            segment, end, row, sorted_rows, order, weights, d_read, first, d, WIDTH, ENTRIES, ENTRY_BLOCK
        )
        gradient += more
        segment += ENTRY_BLOCK
    tl.store(partial + tl.program_id(0).to(tl.int64) * WIDTH + d, gradient, mask=d < WIDTH)


@triton.jit(do_not_specialize=_WINDOW)
def rows_backward_kernel(
    sorted_rows, order, weights, steps, latest, gradients, d_values, d_read, partial, window, memories, first, total,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, RATE: tl.constexpr, DECAY: tl.constexpr,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, ENTRY_BLOCK: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """The gradient of each row as the window found it: what decay leaves of that after, and Σ w d v̂."""
    begin = (first * ENTRIES).to(tl.int64)
    at = begin + tl.program_id(0)
    last = total.to(tl.int64) * ENTRIES
    end = own_end(begin, at, last, PIECE)
    row, new = begins_row(sorted_rows, begin, at)  # loads go out together, as in values_kernel
    follows = tl.load(sorted_rows + at + 1, mask=at + 1 < end, other=-1) == row
    entry = tl.load(order + at).to(tl.int64)
    if not new:
        return
    d = tl.arange(0, BLOCK)
    place = row.to(tl.int64) - window * memories.to(tl.int64) * SLOTS
    following = tl.load(latest + place).to(tl.int64)
    left = tl.where(tl.load(steps + at) != 0, 1 - RATE * DECAY, 1.0)
    # Most rows have few entries: the first alone needs few registers.
    toward = tl.load(d_read + (entry // ENTRIES - first) * WIDTH + d, mask=d < WIDTH, other=0.0)
    toward = tl.load(weights + entry) * toward
    gradient = tl.zeros([BLOCK], tl.float32)
    if following >= 0:
        gradient += tl.load(gradients + following * WIDTH + d, mask=d < WIDTH, other=0.0)
    elif AFTER:
        gradient += tl.load(d_values + place * WIDTH + d, mask=d < WIDTH, other=0.0)
    gradient = gradient * left + toward
    segment = at + 1
    found = follows.to(tl.int32) * ENTRY_BLOCK
    while found == ENTRY_BLOCK:
        more, found = toward_of(
            segment, end, row, sorted_rows, order, weights, d_read, first, d, WIDTH, ENTRIES, ENTRY_BLOCK
        )
        gradient += more
        segment += ENTRY_BLOCK
    while tl.load(sorted_rows + end, mask=end < last, other=-1) == row:
        piece = (end - begin) // PIECE
        gradient += tl.load(partial + piece * WIDTH + d, mask=d < WIDTH, other=0.0)
        end += PIECE
    tl.store(gradients + at * WIDTH + d, gradient, mask=d < WIDTH)
    tl.store(latest + place, at.to(tl.int32))


@triton.jit
def table_backward_kernel(latest, gradients, d_table, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of the table before the call, where the call touched it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(latest + row).to(tl.int64)
    if at >= 0:
        d = tl.arange(0, BLOCK)
        gradient = tl.load(gradients + at * WIDTH + d, mask=d < WIDTH, other=0.0)
        tl.store(d_table + row * WIDTH + d, gradient, mask=d < WIDTH)


@triton.jit(do_not_specialize=["total"])
def combine_backward_kernel(
    ids, slots, weights, kinds, d_weights, d_scores, total,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """From the weights through the softmax and the sums to the sub-scores."""
    here = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = here < total
    alive = inside & ((tl.load(kinds + here, mask=inside, other=DEAD) & DEAD) == 0)
    choice, head = tl.arange(0, CHOICES), tl.arange(0, HEAD_BLOCK)
    use = alive[:, None, None] & (head < HEADS)[None, :, None] & (choice < K)[None, None, :]
    at = (here * HEADS * K)[:, None, None] + head[None, :, None] * K + choice[None, None, :]
    share = tl.load(weights + at, mask=use, other=0.0) * tl.load(d_weights + at, mask=use, other=0.0)
    mean = tl.sum(tl.sum(share, 2), 1)
    for h in tl.static_range(HEADS):
        known = inside[:, None] & (choice < K)[None, :]
        at = (here * HEADS * K + h * K)[:, None] + choice[None, :]
        slot = tl.load(slots + at, mask=known, other=-1)
        w = tl.load(weights + at, mask=known & alive[:, None], other=0.0)
        d_sum = w * (tl.load(d_weights + at, mask=known & alive[:, None], other=0.0) - mean[:, None]) / TEMPERATURE
        base = ((here * HEADS + h) * 2 * K)[:, None] + choice[None, :]
        for codebook in tl.static_range(2):
            mine = tl.load(ids + base + codebook * K, mask=known, other=-2)
            part = slot // SUBKEYS if codebook == 0 else slot % SUBKEYS
            hit = mine[:, :, None] == part[:, None, :]
            tl.store(d_scores + base + codebook * K, tl.sum(tl.where(hit, d_sum[:, None, :], 0.0), 2), mask=known)


@triton.jit
def key_gradients(d_keys, moved, unclipped, before, row, known, d, HALF: tl.constexpr, RATE: tl.constexpr):
    """The gradient [..., D] of α ∇L_addr at rows [...] of the keys: -η of that of the keys after, where they moved.

    ``moved`` and ``unclipped`` have those of all windows; the window's own begin at row ``before``.
    """
    inside = known[:, :, None] & (d < HALF)[None, None, :]
    at = row.to(tl.int64)[:, :, None] * HALF + d[None, None, :]
    gradient = tl.load(d_keys + at, mask=inside, other=0.0) * -RATE
    gradient *= tl.load(moved + before + row, mask=known, other=0).to(tl.float32)[:, :, None]
    if unclipped is not None:
        gradient *= tl.load(unclipped + before * HALF + at, mask=inside, other=0).to(tl.float32)
    return gradient


@triton.jit
def rows_before(window, groups, SUBKEYS: tl.constexpr):
    """How many sub-keys lie before a window's own where each window has them all."""
    return window * groups.to(tl.int64) * SUBKEYS


@triton.jit
def tokens_of(counts, window, memory, memories):
    """n of a window and memory, at least 1."""
    return tl.maximum(tl.load(counts + window * memories + memory), 1).to(tl.float32)


@triton.jit
def key_gradients_after(d_keys, window, groups, SUBKEYS: tl.constexpr, HALF: tl.constexpr):
    """Where the gradients of the keys after a window begin: the buffer holds those before it and after it in turns."""
    return d_keys + ((window + 1) % 2) * groups.to(tl.int64) * SUBKEYS * HALF


@triton.jit(do_not_specialize=_WINDOW)
def pull_backward_kernel(
    query, keys, d_keys, ids, ranks, kinds, share, counts, moved, unclipped, d_pulls, d_slopes,
    window, start, length, first, room, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr,
    EPSILON: tl.constexpr, CHUNK: tl.constexpr, RATE: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """From the keys after to each entry's pull c, and on to a of its sub-key."""
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, t = token_of(r, memory, start, length, room, rows)
    here = (first + memory * rows * length + r).to(tl.int64)
    live = (r < rows * length) & (t < CHUNK)
    live = live & ((tl.load(kinds + here, mask=live, other=0) & LIVE) != 0)
    groups = tl.num_programs(1)
    before = rows_before(window, groups, SUBKEYS)
    count = tokens_of(counts, window, memory, groups // (2 * HEADS))
    d_keys = key_gradients_after(d_keys, window, groups, SUBKEYS, HALF)
    keys += before * HALF
    share += before
    at = (here * 2 * HEADS + half) * K
    chosen, score, p, _, _ = pull_of(
        ids, ranks, share, at, live, live, group, count, SUBKEYS, K, IDW, EPSILON, WEIGHT, CHOICES
    )
    choice = tl.arange(0, CHOICES)
    use = live[:, None] & (choice < K)[None, :]
    row = group * SUBKEYS + chosen
    d_pull = tl.zeros([BLOCK, CHOICES], tl.float32)
    for d0 in range(0, HALF, STEP):
        d = d0 + tl.arange(0, STEP)
        q = tl.load(
            query + token[:, None] * (2 * HEADS * HALF) + half * HALF + d[None, :],
            mask=live[:, None] & (d < HALF)[None, :],
            other=0.0,
        ).to(tl.float32)[:, None, :]
        if IDW:
            q = q - tl.load(
                keys + row.to(tl.int64)[:, :, None] * HALF + d[None, None, :],
                mask=use[:, :, None] & (d < HALF)[None, None, :],
                other=0.0,
            )
        d_pull += tl.sum(q * key_gradients(d_keys, moved, unclipped, before, row, use, d, HALF, RATE), 2)
    slope = d_pull
    if IDW:
        slope = 2 * tl.exp(score) * d_pull
    slope = tl.where(use, slope, 0.0)
    mean = tl.sum(tl.where(use, p * slope, 0.0), 1)
    inside = (r < rows * length)[:, None] & (choice < K)[None, :]
    tl.store(d_pulls + at[:, None] + choice[None, :], tl.where(use, d_pull, 0.0), mask=inside)
    d_slope = tl.where(use, WEIGHT / count * p * (slope - mean[:, None]), 0.0)
    tl.store(d_slopes + at[:, None] + choice[None, :], d_slope, mask=inside)


@triton.jit(do_not_specialize=_WINDOW)
def scores_backward_kernel(
    query, keys, d_keys, ids, ranks, kinds, share, counts, moved, unclipped,
    d_pulls, d_share, d_scores, d_ranks, d_query,
    window, pieces, start, length, first, room, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr,
    EPSILON: tl.constexpr, CHUNK: tl.constexpr, RATE: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr, WRITES: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """All of a sub-score's gradient, and what it and the pulls give to the query."""
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows * length
    token, t = token_of(r, memory, start, length, room, rows)
    here = (first + memory * rows * length + r).to(tl.int64)
    flag = tl.load(kinds + here, mask=inside, other=DEAD).to(tl.int32)
    alive = inside & ((flag & DEAD) == 0)
    live = alive & (t < CHUNK) & ((flag & LIVE) != 0)
    groups = tl.num_programs(1)
    before = rows_before(window, groups, SUBKEYS)
    count = tokens_of(counts, window, memory, groups // (2 * HEADS))
    d_keys = key_gradients_after(d_keys, window, groups, SUBKEYS, HALF)
    keys += before * HALF
    share += before
    choice = tl.arange(0, CHOICES)
    use = alive[:, None] & (choice < K)[None, :]
    at = (here * 2 * HEADS + half) * K
    spread = at[:, None] + choice[None, :]
    d_score = tl.load(d_scores + spread, mask=use, other=0.0)
    if WRITES:
        chosen, score, p, a, pull = pull_of(
            ids, ranks, share, at, alive, live, group, count, SUBKEYS, K, IDW, EPSILON, WEIGHT, CHOICES
        )
        d_pull = tl.load(d_pulls + spread, mask=use, other=0.0)
        slope = d_pull
        if IDW:
            slope = 2 * tl.exp(score) * d_pull
            d_score += pull * d_pull
        counted = live[:, None] & (choice < K)[None, :]
        mean_a = tl.sum(tl.where(counted, p * a, 0.0), 1)
        mean_slope = tl.sum(tl.where(counted, p * slope, 0.0), 1)
        d_p = WEIGHT / count * (slope * (a - mean_a[:, None]) - mean_slope[:, None] * a)
        d_slope = tl.zeros([BLOCK, CHOICES], tl.float32)  # of a, over all tokens: the pieces that were summed
        for piece in range(pieces):
            summed = (piece * tl.num_programs(1) + group).to(tl.int64) * SUBKEYS + chosen
            d_slope += tl.load(d_share + summed, mask=counted, other=0.0)
        mean = tl.load(share + group.to(tl.int64) * SUBKEYS + chosen, mask=counted, other=0).to(tl.float32)
        mean = mean / (PROBABILITY_UNIT * count) + 1e-8
        d_p += d_slope * (1 / mean + 1e-8 / (mean * mean)) / count
        d_p = tl.where(counted, d_p, 0.0)
        d_score += tl.where(counted, p * (d_p - tl.sum(tl.where(counted, p * d_p, 0.0), 1)[:, None]), 0.0)
    else:
        chosen = tl.load(ids + spread, mask=use, other=0)
        score = sub_scores(tl.load(ranks + spread, mask=use, other=0.0), EPSILON, IDW)
        pull = tl.zeros([BLOCK, CHOICES], tl.float32)
    d_rank = tl.where(use, d_score, 0.0)
    if IDW:
        d_rank = -2 * tl.exp(score) * d_rank
    d_rank = tl.where(use, d_rank, 0.0)
    tl.store(d_ranks + spread, d_rank, mask=inside[:, None] & (choice < K)[None, :])
    row = group * SUBKEYS + chosen
    for d0 in range(0, HALF, STEP):
        d = d0 + tl.arange(0, STEP)
        stream = token[:, None] * (2 * HEADS * HALF) + half * HALF + d[None, :]
        held = inside[:, None] & (d < HALF)[None, :]
        key = tl.load(
            keys + row.to(tl.int64)[:, :, None] * HALF + d[None, None, :],
            mask=use[:, :, None] & (d < HALF)[None, None, :],
            other=0.0,
        )
        if IDW:
            q = tl.load(query + stream, mask=alive[:, None] & (d < HALF)[None, :], other=0.0).to(tl.float32)
            key = q[:, None, :] - key
        result = tl.sum(d_rank[:, :, None] * key, 1)
        if WRITES:
            after = key_gradients(d_keys, moved, unclipped, before, row, use & live[:, None], d, HALF, RATE)
            result += tl.sum(pull[:, :, None] * after, 1)
        if ADD:
            result += tl.load(d_query + stream, mask=held, other=0.0).to(tl.float32)
        tl.store(d_query + stream, result.to(d_query.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=_WINDOW)
def keys_backward_kernel(
    d_keys, sums, totals, moved, pulled, unclipped, window, pieces,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, IDW: tl.constexpr,
    RATE: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """The gradient of each sub-key as the window found it, from Σ f (q - K), or Σ f q, of its ranks' gradients f."""
    subkey, group = tl.program_id(0), tl.program_id(1)
    groups = tl.num_programs(1)
    before = rows_before(window, groups, SUBKEYS)
    after = key_gradients_after(d_keys, window, groups, SUBKEYS, HALF)
    row = group.to(tl.int64) * SUBKEYS + subkey
    d = tl.arange(0, BLOCK)
    gradient = tl.load(after + row * HALF + d, mask=d < HALF, other=0.0)
    toward, _ = gathered(sums, totals, pieces, groups, row, SUBKEYS, d, HALF)
    if IDW:
        toward = -toward
    if WRITES:
        moves = tl.load(moved + before + row).to(tl.float32)
        passed = gradient * -RATE * moves
        if unclipped is not None:
            passed *= tl.load(unclipped + (before + row) * HALF + d, mask=d < HALF, other=0).to(tl.float32)
        gradient = gradient * (1 - RATE * DECAY * moves)
        if IDW:
            gradient -= tl.load(pulled + before + row) * passed
    into = key_gradients_after(d_keys, window + 1, groups, SUBKEYS, HALF)
    tl.store(into + row * HALF + d, gradient + toward, mask=d < HALF)
