"""SPEC.md §2 on a GPU: propose sub-keys, rank them and combine them into slots and weights, read the rows."""

import triton
import triton.language as tl

from fwpkm.kernels.parts import dot_halves, rest
from fwpkm.kernels.ranks import NOTHING, best_proposed
from fwpkm.kernels.tokens import DEAD, INF, LIVE, TARGET, VARYING, not_due, token_of

PROBABILITY_UNIT = tl.constexpr(float(2**40))
"""Sums of probabilities are integers in this unit, because an atomic sum of integers has no order."""


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
    # In a loop of its own: of an operand that is also used as numbers Triton 3.6 pipelines one buffer too few,
    # and a copy overwrites what a product still reads.
    square = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(0, HALF, DEPTH, num_stages=1):
        d = at + tl.arange(0, DEPTH)
        q = tl.load(
            query + token[:, None] * (2 * HEADS * HALF) + d[None, :],
            mask=live[:, None] & (d < HALF)[None, :],
            other=0.0,
        ).to(tl.float32)
        square += tl.sum(q * q, 1)
    product = tl.zeros([BLOCK, COLUMNS], tl.float32)
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
        if not EXACT:
            product = dot_halves(rest(q.to(tl.float32), q_high).to(tl.bfloat16), k_high, product, UPCAST)
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


@triton.jit
def bounded_scores(rank, choice, K: tl.constexpr, EPSILON: tl.constexpr, IDW: tl.constexpr):
    """Sub-scores [BLOCK, CHOICES] of the first K, and whether all of them are finite."""
    bounded = tl.abs(rank) < INF
    picked = (choice < K)[None, :]
    score = tl.where(picked, sub_scores(tl.where(bounded, rank, 0.0), EPSILON, IDW), -INF)
    return score, tl.min((bounded | ~picked).to(tl.int32), 1) > 0


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
def softmax_all(logits, valid, alive):
    """One softmax over all heads [BLOCK, HEAD_BLOCK, CHOICES], and whether a token is ``alive`` and all are finite."""
    bad = tl.max(tl.max((valid & ~(tl.abs(logits) < INF)).to(tl.int32), 2), 1)
    alive = alive & (bad == 0)
    logits = tl.where(valid, tl.where(alive[:, None, None], logits, 0.0), -INF)
    e = tl.exp(logits - tl.max(tl.max(logits, 2), 1)[:, None, None])
    return e / tl.sum(tl.sum(e, 2), 1)[:, None, None], alive


@triton.jit(do_not_specialize=["version", *VARYING])
def rank_kernel(
    query, keys, proposals, scales, flags, ids, ranks, due, version, start, length, first, room, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr,
    TILES: tl.constexpr, PROPOSED: tl.constexpr, BITS: tl.constexpr,
    LISTED: tl.constexpr, ERROR: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The k best sub-keys of one token and codebook, in any order, and their ranks, of float32 quality."""
    if not_due(due):
        return
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    r = tl.program_id(0)
    token, _ = token_of(r, memory, start, length, room, rows)
    local = (memory * rows * length + r).to(tl.int64)
    place = local * 2 * HEADS + half
    alive = (tl.load(flags + token).to(tl.int32) & DEAD) == 0
    rank, chosen = best_proposed(
        query + token * (2 * HEADS * HALF) + half * HALF,
        keys + (version * tl.num_programs(1) + group).to(tl.int64) * SUBKEYS * HALF,
        proposals + place * TILES * PROPOSED, tl.load(scales + place), alive,
        SUBKEYS, HALF, K, IDW, TILES, PROPOSED, LISTED, BITS, ERROR, CHOICES, STEP,
    )  # fmt: skip
    choice = tl.arange(0, CHOICES)
    at = ((first + local) * 2 * HEADS + half) * K + choice
    tl.store(ids + at, chosen, mask=choice < K)
    tl.store(ranks + at, rank, mask=choice < K)


@triton.jit
def in_order(rank, chosen, choice, K: tl.constexpr):
    """Ranks and ids [BLOCK, CHOICES] of the first K, by rank, then by id."""
    before = rank[:, None, :] > rank[:, :, None]
    before = before | ((rank[:, None, :] == rank[:, :, None]) & (chosen[:, None, :] < chosen[:, :, None]))
    place = tl.sum((before & (choice < K)[None, None, :]).to(tl.int32), 2)
    place = tl.where((choice < K)[None, :], place, choice[None, :])
    here = place[:, :, None] == choice[None, None, :]
    return tl.sum(tl.where(here, rank[:, :, None], 0.0), 1), tl.sum(tl.where(here, chosen[:, :, None], 0), 1)


@triton.jit(do_not_specialize=["window", "memories", "words", *VARYING, "fresh", "arrived", "length_out"])
def combine_kernel(
    ids, ranks, flags, kinds, slots, weights, table_rows, share, counts, maps, out_slots, out_weights, due,
    window, memories, words, start, length, first, room, rows, fresh, arrived, length_out,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr, EPSILON: tl.constexpr,
    TEMPERATURE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, CHOICES: tl.constexpr, WRITES: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """Sort the sub-keys; the k best of the k² sums of each head, and one softmax over all heads' (§2).

    ``table_rows`` numbers the rows of all memories window by window, for the sort. And what the write asks of each
    token (§3): its share in p̄ of each sub-key, and one in n; with MAPS, its bit in the map of each, unless it is dead.
    """
    if not_due(due):
        return
    memory = tl.program_id(1)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows * length
    token, t = token_of(r, memory, start, length, room, rows)
    flag = tl.load(flags + token, mask=inside, other=DEAD).to(tl.int32)
    here = (first + memory * rows * length + r).to(tl.int64)
    out = ((token // room) * length_out + start + t - arrived) * HEADS * K
    shown = inside & (start + t >= fresh)
    table = (window * memories + memory).to(tl.int64) * SUBKEYS * SUBKEYS
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
        s1, bounded1 = bounded_scores(r1, choice, K, EPSILON, IDW)
        s2, bounded2 = bounded_scores(r2, choice, K, EPSILON, IDW)
        alive = alive & bounded1 & bounded2
        sums, slot = best_sums(s1, s2, id1, id2, choice, SUBKEYS, K, BLOCK, CHOICES)
        entry = (here * HEADS * K + h * K)[:, None] + choice[None, :]
        tl.store(slots + entry, slot, mask=known)
        tl.store(table_rows + entry, (table + slot).to(table_rows.dtype.element_ty), mask=known)
        tl.store(out_slots + out[:, None] + h * K + choice[None, :], slot.to(tl.int64), mask=known & shown[:, None])
        logits = tl.where((head == h)[None, :, None], (sums / TEMPERATURE)[:, None, :], logits)
    valid = (head < HEADS)[None, :, None] & picked[None, None, :]
    w, alive = softmax_all(logits, valid, alive)
    of_head = head[None, :, None] * K + choice[None, None, :]
    tl.store(weights + (here * HEADS * K)[:, None, None] + of_head, w, mask=inside[:, None, None] & valid)
    w = tl.where(alive[:, None, None], w, float("nan"))
    tl.store(out_weights + out[:, None, None] + of_head, w, mask=shown[:, None, None] & valid)
    flag = tl.where(alive, flag, DEAD)
    tl.store(flags + token, flag.to(tl.int8), mask=inside)
    tl.store(kinds + here, flag.to(tl.int8), mask=inside)

    if MAPS:
        tl.debug_barrier()  # other threads of this program have stored the sorted choices
        counted = inside & ((flag & LIVE) != 0) & (t < CHUNK)
        if WRITES:
            tl.atomic_add(counts + window * memories + memory, tl.sum(counted.to(tl.int32), 0))
        for half in tl.static_range(2 * HEADS):
            at = ((here * 2 * HEADS + half) * K)[:, None] + choice[None, :]
            asked = (inside & alive)[:, None] & picked[None, :]
            subkey = tl.load(ids + at, mask=asked, other=0)
            row = ((window * memories + memory) * 2 * HEADS + half).to(tl.int64) * SUBKEYS + subkey
            bit = (tl.zeros_like(subkey) + 1) << (r % 32)[:, None]
            tl.atomic_or(maps + row * words + (r // 32)[:, None], bit, mask=asked)
            if WRITES:
                score = sub_scores(tl.load(ranks + at, mask=asked, other=0.0), EPSILON, IDW)
                p = softmax_rows(tl.where(picked[None, :], score, -INF))
                tl.atomic_add(share + row, (p * PROBABILITY_UNIT).to(tl.int64), mask=asked & counted[:, None])


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
