"""SPEC.md §2 on a GPU: propose sub-keys, rank them and combine them into slots and weights, read the rows."""

import triton
import triton.language as tl

from fwpkm.kernels.parts import dot_halves, rest
from fwpkm.kernels.ranks import best_of_all, best_proposed
from fwpkm.kernels.tokens import DEAD, INF, LIVE, TARGET, VARYING, not_due, token_of

PROBABILITY_UNIT = tl.constexpr(float(2**40))
"""Sums of probabilities are integers in this unit, because an atomic sum of integers has no order."""
NOTHING = tl.constexpr(-(2**31))
"""No proposal."""


@triton.jit(do_not_specialize=["version", "window", *VARYING])
def select_kernel(
    query, flags, norms, largest, parts, proposals, scales, due, version, window, start, length, first, room, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, IDW: tl.constexpr,
    TILES: tl.constexpr, PROPOSED: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Propose the PROPOSED best sub-keys of each token, codebook and tile of sub-keys: ‖q - K‖², or q·K.

    A product of matrices, ‖q‖² + ‖K‖² - 2 q·K in bfloat16 parts: two of a key, and of a query one (EXACT, it is given
    in bfloat16) or two. A proposal is one integer: the rank in units of its bound ``scales``, (‖q‖ + max ‖K‖)² or
    ‖q‖ max ‖K‖, above BITS bits that count the sub-keys down. So the largest is the best, and of equal ones the lowest.
    """
    if not_due(due):
        return
    group, tile = tl.program_id(1), tl.program_id(2)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, _ = token_of(r, memory, start, length, room, rows)
    inside = r < rows * length
    live = inside & ((tl.load(flags + token, mask=inside, other=DEAD) & DEAD) == 0)
    query += half * HALF
    parts += (2 * group).to(tl.int64) * SUBKEYS * HALF
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros([BLOCK, COLUMNS], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for at in range(0, HALF, DEPTH):
        d = at + tl.arange(0, DEPTH)
        q = tl.load(
            query + token[:, None] * (2 * HEADS * HALF) + d[None, :],
            mask=live[:, None] & (d < HALF)[None, :],
            other=0.0,
        )
        place = parts + column[None, :] * HALF + d[:, None]
        known = (column < SUBKEYS)[None, :] & (d < HALF)[:, None]
        k_high = tl.load(place, mask=known, other=0.0)
        k_low = tl.load(place + SUBKEYS * HALF, mask=known, other=0.0)
        q_high = q.to(tl.bfloat16)
        product = dot_halves(q_high, k_high, product, UPCAST)
        product = dot_halves(q_high, k_low, product, UPCAST)
        q = q.to(tl.float32)
        if not EXACT:
            product = dot_halves(rest(q, q_high).to(tl.bfloat16), k_high, product, UPCAST)
        square += tl.sum(q * q, 1)
    reach = tl.sqrt(tl.load(largest + window * tl.num_programs(1) + group).to(tl.float32, bitcast=True))
    scale = tl.sqrt(square) * reach
    if IDW:
        norm = tl.load(norms + group * SUBKEYS + column, mask=column < SUBKEYS, other=0.0)
        product = 2 * product - norm[None, :] - square[:, None]
        scale = tl.sqrt(square) + reach
        scale = scale * scale
    unit: tl.constexpr = 2 ** (31 - BITS)
    level = product * (unit / tl.maximum(scale, 1e-30))[:, None]
    level = tl.where(level > 1 - unit, level, 1 - unit)  # also what is not a number
    packed = tl.minimum(level, unit - 1).to(tl.int32) * (2**BITS) + (2**BITS - 1 - column)[None, :]
    packed = tl.where((column < SUBKEYS)[None, :], packed, NOTHING)
    at = ((memory * rows * length + r).to(tl.int64) * 2 * HEADS + half) * TILES + tile
    for j in range(PROPOSED):
        best = tl.max(packed, 1)
        tl.store(proposals + at * PROPOSED + j, best, mask=inside)
        packed = tl.where(packed == best[:, None], NOTHING, packed)
    if tile == 0:
        tl.store(scales + at // TILES, scale, mask=inside)


@triton.jit
def sub_scores(rank, EPSILON: tl.constexpr, IDW: tl.constexpr):
    """s of §2, from -‖q - K‖² or q·K."""
    if IDW:
        rank = -tl.log(EPSILON - rank)
    return rank


@triton.jit
def softmax_rows(scores):
    """Over the last axis; -inf has no share."""
    e = tl.exp(scores - tl.max(scores, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit(do_not_specialize=["version", "window", "memories", *VARYING, "fresh", "arrived", "length_out"])
def combine_kernel(
    query, keys, proposals, scales, flags, ids, ranks, kinds, slots, weights, table_rows, share, counts,
    out_slots, out_weights, due,
    version, window, memories, start, length, first, room, rows, fresh, arrived, length_out,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr,
    EPSILON: tl.constexpr, TEMPERATURE: tl.constexpr, CHUNK: tl.constexpr,
    TILES: tl.constexpr, PROPOSED: tl.constexpr, LISTED: tl.constexpr, BITS: tl.constexpr, ERROR: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr, WRITES: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    """The k best sub-keys, the k best of the k² sums of each head, and one softmax over all heads' (§2); for one token.

    ``table_rows`` numbers the rows of all memories window by window, for the sort. And what the write asks of each token
    (§3): its share in p̄ of each sub-key, and one in n. SCANNED: ``scales`` holds the ranks of all sub-keys, and no
    proposals are needed.
    """
    if not_due(due):
        return
    r, memory = tl.program_id(0), tl.program_id(1)
    token, t = token_of(r, memory, start, length, room, rows)
    local = (memory * rows * length + r).to(tl.int64)
    here = first + local
    flag = tl.load(flags + token).to(tl.int32)
    alive = (flag & DEAD) == 0
    choice, head = tl.arange(0, CHOICES), tl.arange(0, HEAD_BLOCK)
    picked = choice < K
    logits = tl.full([HEAD_BLOCK, CHOICES], -INF, tl.float32)
    all_slots = tl.zeros([HEAD_BLOCK, CHOICES], tl.int32)
    half = tl.arange(0, 2 * HEAD_BLOCK)
    all_ids = tl.zeros([2 * HEAD_BLOCK, CHOICES], tl.int32)
    all_scores = tl.zeros([2 * HEAD_BLOCK, CHOICES], tl.float32)
    cells = tl.arange(0, CHOICES * CHOICES)
    groups = tl.num_programs(1) * 2 * HEADS
    for h in tl.static_range(HEADS):
        s1, s2 = tl.zeros([CHOICES], tl.float32), tl.zeros([CHOICES], tl.float32)
        id1, id2 = tl.zeros([CHOICES], tl.int32), tl.zeros([CHOICES], tl.int32)
        for codebook in tl.static_range(2):
            g = 2 * h + codebook
            group = memory * 2 * HEADS + g
            place = local * 2 * HEADS + g
            if SCANNED:
                rank, chosen = best_of_all(scales + place * SUBKEYS, SUBKEYS, K, CHOICES, LISTED)
            else:
                rank, chosen = best_proposed(
                    query + token * (2 * HEADS * HALF) + g * HALF,
                    keys + (version * groups + group).to(tl.int64) * SUBKEYS * HALF,
                    proposals + place * TILES * PROPOSED, tl.load(scales + place), alive,
                    SUBKEYS, HALF, K, IDW, TILES, PROPOSED, LISTED, BITS, ERROR, CHOICES, STEP,
                )  # fmt: skip
            at = (here * 2 * HEADS + g) * K + choice
            tl.store(ids + at, chosen, mask=picked)
            tl.store(ranks + at, rank, mask=picked)
            bounded = tl.abs(rank) < INF
            alive = alive & (tl.min((bounded | (choice >= K)).to(tl.int32), 0) > 0)
            score = sub_scores(tl.where(bounded, rank, 0.0), EPSILON, IDW)
            if codebook == 0:
                s1, id1 = tl.where(picked, score, -INF), chosen
            else:
                s2, id2 = tl.where(picked, score, -INF), chosen
            if WRITES:
                all_ids = tl.where((half == g)[:, None], chosen[None, :], all_ids)
                all_scores = tl.where((half == g)[:, None], score[None, :], all_scores)
        grid = tl.reshape(s1[:, None] + s2[None, :], [CHOICES * CHOICES])
        sums = tl.full([CHOICES], -INF, tl.float32)
        pick = tl.zeros([CHOICES], tl.int32)
        for j in range(K):
            best, cell = tl.max(grid, 0, return_indices=True)
            sums = tl.where(choice == j, best, sums)
            pick = tl.where(choice == j, cell, pick)
            grid = tl.where(cells == cell, -INF, grid)
        one = tl.sum(tl.where((pick // CHOICES)[:, None] == choice[None, :], id1[None, :], 0), 1)
        two = tl.sum(tl.where((pick % CHOICES)[:, None] == choice[None, :], id2[None, :], 0), 1)
        slot = one * SUBKEYS + two
        all_slots = tl.where((head == h)[:, None], slot[None, :], all_slots)
        out = here * HEADS * K + h * K + choice
        tl.store(slots + out, slot, mask=picked)
        table = (window * memories + memory).to(tl.int64) * SUBKEYS * SUBKEYS
        tl.store(table_rows + out, (table + slot).to(table_rows.dtype.element_ty), mask=picked)
        logits = tl.where((head == h)[:, None], (sums / TEMPERATURE)[None, :], logits)
    valid = (head < HEADS)[:, None] & picked[None, :]
    bad = tl.max(tl.max((valid & ~(tl.abs(logits) < INF)).to(tl.int32), 1), 0)
    alive = alive & (bad == 0)
    logits = tl.where(valid, tl.where(alive, logits, 0.0), -INF)
    e = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
    w = e / tl.sum(tl.sum(e, 1), 0)
    at = here * HEADS * K + head[:, None] * K + choice[None, :]
    tl.store(weights + at, w, mask=valid)
    flag = tl.where(alive, flag, DEAD)
    tl.store(flags + token, flag.to(tl.int8))
    tl.store(kinds + here, flag.to(tl.int8))
    if start + t >= fresh:
        out = ((token // room) * length_out + start + t - arrived) * HEADS * K + head[:, None] * K + choice[None, :]
        tl.store(out_weights + out, tl.where(alive, w, float("nan")), mask=valid)
        tl.store(out_slots + out, all_slots.to(tl.int64), mask=valid)

    if WRITES:
        counted = ((flag & LIVE) != 0) & (t < CHUNK)
        tl.atomic_add(counts + window * memories + memory, counted.to(tl.int32))
        p = softmax_rows(tl.where(picked[None, :], all_scores, -INF))
        row = ((window * memories + memory) * 2 * HEADS + half).to(tl.int64)[:, None] * SUBKEYS + all_ids
        known = counted & (half < 2 * HEADS)[:, None] & picked[None, :]
        tl.atomic_add(share + row, (p * PROBABILITY_UNIT).to(tl.int64), mask=known)


@triton.jit(do_not_specialize=[*VARYING, "fresh", "arrived", "length_out"])
def read_kernel(
    values, slots, weights, kinds, value, gate, output, error, strength, squared, due,
    start, length, first, room, rows, fresh, arrived, length_out,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr, LOOKAHEAD: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, ENTRY_BLOCK: tl.constexpr,
    HAS_GATE: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """v̂ = Σ w · values[slot]; before a write also v̂ - u, κ g and ‖v̂ - u‖² of the tokens that have a pair (§3).

    The stream's tokens from ``fresh`` on have not been read before: they are output, NaN where they are dead.
    """
    if not_due(due):
        return
    r = tl.program_id(0)
    here = (first + r).to(tl.int64)
    b, t = r // length, r % length
    flag = tl.load(kinds + here).to(tl.int32)
    d = tl.arange(0, BLOCK)
    read = tl.zeros([BLOCK], tl.float32)
    power = 0.0
    memory = (b // rows).to(tl.int64)
    for at in range(0, ENTRIES, ENTRY_BLOCK):
        e = at + tl.arange(0, ENTRY_BLOCK)
        row = memory * SLOTS + tl.load(slots + here * ENTRIES + e, mask=e < ENTRIES, other=0)
        w = tl.load(weights + here * ENTRIES + e, mask=e < ENTRIES, other=0.0)
        known = (e < ENTRIES)[:, None] & (d < WIDTH)[None, :]
        read += tl.sum(w[:, None] * tl.load(values + row[:, None] * WIDTH + d[None, :], mask=known, other=0.0), 0)
        power += tl.sum(w * w, 0)
    if start + t >= fresh:
        out = b.to(tl.int64) * length_out + start + t - arrived
        shown = tl.where((flag & DEAD) != 0, float("nan"), read)
        tl.store(output + out * WIDTH + d, shown.to(output.dtype.element_ty), mask=d < WIDTH)
    if WRITES:
        pair = (flag & LIVE) != 0
        bound = t + LOOKAHEAD
        has = (t < CHUNK) & (bound < length)
        partner = tl.load(kinds + here + LOOKAHEAD, mask=has, other=0).to(tl.int32)
        pair = pair & has & ((partner & TARGET) != 0)
        stream = b.to(tl.int64) * room + start + t
        u = tl.load(value + (stream + LOOKAHEAD) * WIDTH + d, mask=pair & (d < WIDTH), other=0.0).to(tl.float32)
        miss = tl.where(pair & (d < WIDTH), read - u, 0.0)
        g = 1.0
        if HAS_GATE:
            g = tl.load(gate + stream).to(tl.float32)
        scale = SCALE
        if SCALE == 0:
            scale = 1 / power
        tl.store(error + here * WIDTH + d, miss, mask=d < WIDTH)
        tl.store(strength + here, tl.where(pair, scale * g, 0.0))
        tl.store(squared + here, tl.where(pair, 0.5 * g * tl.sum(miss * miss, 0), 0.0))


@triton.jit(do_not_specialize=["count"])
def rank_kernel(table_rows, sorted_rows, order, due, count, BLOCK: tl.constexpr):
    """A stable sort of few numbers: the place of each is how many are smaller, or equal and before it."""
    if not_due(due):
        return
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(table_rows + mine, mask=mine < count, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    for at in range(0, count, BLOCK):
        other = at + tl.arange(0, BLOCK)
        rows = tl.load(table_rows + other, mask=other < count, other=0)
        less = rows[None, :] < row[:, None]
        ahead = (less | ((rows[None, :] == row[:, None]) & (other[None, :] < mine[:, None]))) & (other < count)[None, :]
        place += tl.sum(ahead.to(tl.int32), 1)
    tl.store(sorted_rows + place, row, mask=mine < count)
    tl.store(order + place, mine.to(tl.int64), mask=mine < count)
