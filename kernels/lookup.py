"""SPEC.md §2 on a GPU: select the sub-keys, combine them into slots and weights, read the rows.

A call reads a stream of ``room`` tokens of each sequence, in windows: runs of ``length`` tokens from ``start`` on that
read the same tables. The tokens of a window are numbered by sequence, then by time, from ``first`` on; so those of one
memory, ``rows`` sequences, are consecutive.
"""

import triton
import triton.language as tl

from fwpkm.kernels.flags import DEAD, LIVE, TARGET

PROBABILITY_UNIT = tl.constexpr(float(2**40))
"""Sums of probabilities are integers in this unit, because an atomic sum of integers has no order."""
_INF = tl.constexpr(float("inf"))
_VARYING = ["start", "length", "first", "room", "rows"]  # no kernel is compiled anew for another T


@triton.jit
def not_due(due):
    """Whether a launch is to do nothing: ``due`` is None, or a number on the GPU that a captured graph asks."""
    result = False
    if due is not None:
        result = tl.load(due) == 0
    return result


@triton.jit
def prepare_kernel(
    query, value, gate, mask, pair, flags, due,
    QUERY: tl.constexpr, VALUE: tl.constexpr, QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAIR: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """The flag of each token (§5): it is dead where its query, value or gate is not finite.

    SHIFTED values are targets already (``chunk_update``): one that is not finite makes no pair, and kills nothing.
    """
    if not_due(due):
        return
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, QUERY_BLOCK)
    x = tl.load(query + token * QUERY + columns, mask=columns < QUERY, other=0.0).to(tl.float32)
    alive = tl.min((tl.abs(x) < _INF).to(tl.int32), 0)
    columns = tl.arange(0, VALUE_BLOCK)
    x = tl.load(value + token * VALUE + columns, mask=columns < VALUE, other=0.0).to(tl.float32)
    target = tl.min((tl.abs(x) < _INF).to(tl.int32), 0)
    if HAS_GATE:
        alive = alive * (tl.abs(tl.load(gate + token).to(tl.float32)) < _INF).to(tl.int32)
    if not SHIFTED:
        alive = alive * target
    live = alive
    if HAS_MASK:
        live = live * tl.load(mask + token).to(tl.int32)
    if HAS_PAIR:
        target = target * tl.load(pair + token).to(tl.int32)
    flag = live * (LIVE + TARGET * target) + (1 - alive) * DEAD
    tl.store(flags + token, flag.to(tl.int8))


@triton.jit
def token_of(r, memory, start, length, room, rows):
    """Where token r of a memory's window lies in the stream, as (stream index, time within the window)."""
    return (memory * rows + r // length).to(tl.int64) * room + start + r % length, r % length


@triton.jit
def exact_ranks(
    query, token, live, keys, ids, wanted,
    QUERY: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr,
    IDW: tl.constexpr,
):  # fmt: skip
    """-‖q - K‖² from differences, or q·K, of ids [BLOCK, CHOICES]."""
    rank = tl.zeros([BLOCK, CHOICES], tl.float32)
    for at in range(0, HALF, STEP):
        d = at + tl.arange(0, STEP)
        inside = d < HALF
        q = tl.load(query + token[:, None] * QUERY + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        k = tl.load(
            keys + ids[:, :, None] * HALF + d[None, None, :],
            mask=wanted[:, :, None] & inside[None, None, :],
            other=0.0,
        )
        q = q.to(tl.float32)[:, None, :]
        if IDW:
            rank -= tl.sum((q - k) * (q - k), 2)
        else:
            rank += tl.sum(q * k, 2)
    return tl.where(rank == rank, rank, -_INF)


@triton.jit
def can_be_better(best, at_best, margin, worst, last):
    """Whether a proposal may rank above the worst choice, whose id is ``last``; ties go to the lower id."""
    bound = best + margin
    return (best > -_INF) & ((bound > worst) | ((bound == worst) & (at_best < last)))


@triton.jit
def dot_halves(a, b, total, UPCAST: tl.constexpr):
    """total + a b of bfloat16 matrices; UPCAST for the interpreter, which has no bfloat16 arithmetic."""
    if UPCAST:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def rest(x, part):
    """What bfloat16 ``part`` leaves of float32 x."""
    return x - part.to(tl.float32)


@triton.jit
def store_key(key, keys, norms, parts, version, groups, group, subkey, d, SUBKEYS: tl.constexpr, HALF: tl.constexpr):
    """A sub-key, its square, and the two bfloat16 parts whose sum it is up to 2^-18, for ``select_kernel``."""
    row = group.to(tl.int64) * SUBKEYS + subkey
    at = version * groups.to(tl.int64) * SUBKEYS + row
    tl.store(keys + at * HALF + d, key, mask=d < HALF)
    tl.store(norms + row, tl.sum(key * key, 0))
    high = key.to(tl.bfloat16)
    base = parts + ((2 * group).to(tl.int64) * SUBKEYS + subkey) * HALF + d
    tl.store(base, high, mask=d < HALF)
    tl.store(base + SUBKEYS * HALF, rest(key, high).to(tl.bfloat16), mask=d < HALF)


@triton.jit
def begin_kernel(
    given, keys, norms, parts, due, SUBKEYS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Version 0 of the keys: those of the caller."""
    if not_due(due):
        return
    subkey, group = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    key = tl.load(given + (group.to(tl.int64) * SUBKEYS + subkey) * HALF + d, mask=d < HALF, other=0.0)
    store_key(key, keys, norms, parts, 0, tl.num_programs(1), group, subkey, d, SUBKEYS, HALF)


@triton.jit(do_not_specialize=["version", *_VARYING])
def select_kernel(
    query, flags, keys, norms, parts, ids, ranks, due, version, start, length, first, room, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr,
    ERROR: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The k best sub-keys of each token and codebook, best first: s = -log(ε + ‖q - K‖²), or q·K.

    A product of matrices proposes, ‖q‖² + ‖K‖² - 2 q·K; only ranks from differences decide. Candidates are drawn until
    the next one, were it better than proposed by the whole error, could no longer be among the k best. So the choice
    has the quality of differences near a key too, where the product has none. The product is one of bfloat16 parts:
    two of a key, and of a query one (EXACT, it is given in bfloat16) or two.
    """
    if not_due(due):
        return
    group = tl.program_id(1)
    memory, half = group // (2 * HEADS), group % (2 * HEADS)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, _ = token_of(r, memory, start, length, room, rows)
    inside = r < rows * length
    live = inside & ((tl.load(flags + token, mask=inside, other=DEAD) & DEAD) == 0)
    query += half * HALF
    keys += (version * tl.num_programs(1) + group).to(tl.int64) * SUBKEYS * HALF
    parts += (2 * group).to(tl.int64) * SUBKEYS * HALF
    column = tl.arange(0, COLUMNS)
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
    norm = tl.load(norms + group * SUBKEYS + column, mask=column < SUBKEYS, other=0.0)
    largest = tl.sqrt(tl.max(norm, 0))
    if IDW:
        product = 2 * product - norm[None, :] - square[:, None]
        scale = tl.sqrt(square) + largest
        scale = scale * scale
    else:
        scale = tl.sqrt(square) * largest
    product = tl.where((column < SUBKEYS)[None, :] & (product == product), product, -_INF)

    choice = tl.arange(0, CHOICES)
    wanted = (choice < K)[None, :] & live[:, None]
    chosen = tl.zeros([BLOCK, CHOICES], tl.int32) + (COLUMNS + choice)[None, :]
    proposed = tl.zeros([BLOCK, CHOICES], tl.float32)
    for j in range(K):
        best, at_best = tl.max(product, 1, return_indices=True)
        chosen = tl.where((choice == j)[None, :], at_best[:, None], chosen)
        proposed = tl.where((choice == j)[None, :], best[:, None], proposed)
        product = tl.where(column[None, :] == at_best[:, None], -_INF, product)
    rank = exact_ranks(query, token, live, keys, chosen, wanted, 2 * HEADS * HALF, HALF, BLOCK, CHOICES, STEP, IDW)
    seen = tl.abs(proposed - rank) / scale[:, None]
    seen = tl.max(tl.where(wanted & (seen < _INF), seen, 0.0))
    margin = scale * tl.maximum(4 * seen, ERROR)
    # The places past k hold what is better than anything, so that they are never the worst.
    rank = tl.where((choice < K)[None, :], rank, _INF)

    if K < SUBKEYS:
        worst = tl.min(rank, 1)
        best, at_best = tl.max(product, 1, return_indices=True)
        last = tl.max(tl.where(rank == worst[:, None], chosen, -1), 1)  # of equal ones, the one that goes
        unsure = can_be_better(best, at_best, margin, worst, last) & live
        while tl.max(unsure.to(tl.int32), 0) > 0:
            # In the same tile as the first ones: another order of summation would part equal sub-keys.
            again = tl.zeros_like(chosen) + at_best[:, None]
            asked = tl.zeros_like(chosen) + unsure[:, None].to(tl.int32) > 0
            fresh = exact_ranks(
                query, token, live, keys, again, asked, 2 * HEADS * HALF, HALF, BLOCK, CHOICES, STEP, IDW
            )
            fresh = tl.max(fresh, 1)[:, None]
            better = (fresh > worst[:, None]) | ((fresh == worst[:, None]) & (at_best < last)[:, None])
            goes = (chosen == last[:, None]) & better & unsure[:, None]
            chosen = tl.where(goes, at_best[:, None], chosen)
            rank = tl.where(goes, fresh, rank)
            product = tl.where((column[None, :] == at_best[:, None]) & unsure[:, None], -_INF, product)
            worst = tl.min(rank, 1)
            best, at_best = tl.max(product, 1, return_indices=True)
            last = tl.max(tl.where(rank == worst[:, None], chosen, -1), 1)
            unsure = can_be_better(best, at_best, margin, worst, last) & live

    mine, other = rank[:, :, None], rank[:, None, :]
    ahead = (other > mine) | ((other == mine) & (chosen[:, None, :] < chosen[:, :, None]))
    place = tl.sum((ahead & (choice < K)[None, None, :]).to(tl.int32), 2)
    out = ((first + memory * rows * length + r).to(tl.int64) * 2 * HEADS + half) * K
    keep = inside[:, None] & (choice < K)[None, :]
    tl.store(ids + out[:, None] + place, chosen, mask=keep)
    tl.store(ranks + out[:, None] + place, rank, mask=keep)


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


@triton.jit(do_not_specialize=["window", "memories", *_VARYING])
def combine_kernel(
    ids, ranks, flags, kinds, slots, weights, table_rows, share, counts, due,
    window, memories, start, length, first, room, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr, EPSILON: tl.constexpr,
    TEMPERATURE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, CHOICES: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """The k best of the k² sums of each head, and one softmax over all heads' (§2).

    ``table_rows`` numbers the rows of all memories window by window, for the sort. And what the write asks of each token
    (§3): its share in p̄ of each sub-key, and one in n.
    """
    if not_due(due):
        return
    memory = tl.program_id(1)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows * length
    token, t = token_of(r, memory, start, length, room, rows)
    flag = tl.load(flags + token, mask=inside, other=DEAD).to(tl.int32)
    here = (first + memory * rows * length + r).to(tl.int64)
    table = (window * memories + memory).to(tl.int64) * SUBKEYS * SUBKEYS
    choice, head = tl.arange(0, CHOICES), tl.arange(0, HEAD_BLOCK)
    picked = choice < K
    logits = tl.full([BLOCK, HEAD_BLOCK, CHOICES], -_INF, tl.float32)
    cells = tl.arange(0, CHOICES * CHOICES)
    alive = (flag & DEAD) == 0
    for h in tl.static_range(HEADS):
        at = ((here * HEADS + h) * 2 * K)[:, None] + choice[None, :]
        known = inside[:, None] & picked[None, :]
        id1, id2 = tl.load(ids + at, mask=known, other=0), tl.load(ids + at + K, mask=known, other=0)
        r1, r2 = tl.load(ranks + at, mask=known, other=0.0), tl.load(ranks + at + K, mask=known, other=0.0)
        bounded = (tl.abs(r1) < _INF) & (tl.abs(r2) < _INF)
        alive = alive & (tl.min(bounded.to(tl.int32), 1) > 0)
        s1, s2 = sub_scores(r1, EPSILON, IDW), sub_scores(r2, EPSILON, IDW)
        s1 = tl.where(picked[None, :], tl.where(bounded, s1, 0.0), -_INF)
        s2 = tl.where(picked[None, :], tl.where(bounded, s2, 0.0), -_INF)
        grid = tl.reshape(s1[:, :, None] + s2[:, None, :], [BLOCK, CHOICES * CHOICES])
        sums = tl.full([BLOCK, CHOICES], -_INF, tl.float32)
        pick = tl.zeros([BLOCK, CHOICES], tl.int32)
        for j in range(K):
            best, cell = tl.max(grid, 1, return_indices=True)
            sums = tl.where((choice == j)[None, :], best[:, None], sums)
            pick = tl.where((choice == j)[None, :], cell[:, None], pick)
            grid = tl.where(cells[None, :] == cell[:, None], -_INF, grid)
        one = tl.sum(tl.where((pick // CHOICES)[:, :, None] == choice[None, None, :], id1[:, None, :], 0), 2)
        two = tl.sum(tl.where((pick % CHOICES)[:, :, None] == choice[None, None, :], id2[:, None, :], 0), 2)
        slot = one * SUBKEYS + two
        out = (here * HEADS * K + h * K)[:, None] + choice[None, :]
        tl.store(slots + out, slot, mask=known)
        tl.store(table_rows + out, (table + slot).to(table_rows.dtype.element_ty), mask=known)
        logits = tl.where((head == h)[None, :, None], (sums / TEMPERATURE)[:, None, :], logits)
    valid = (head < HEADS)[None, :, None] & picked[None, None, :]
    bad = tl.max(tl.max((valid & ~(tl.abs(logits) < _INF)).to(tl.int32), 2), 1)
    alive = alive & (bad == 0)
    logits = tl.where(alive[:, None, None] | ~valid, logits, 0.0)
    e = tl.exp(logits - tl.max(tl.max(logits, 2), 1)[:, None, None])
    w = e / tl.sum(tl.sum(e, 2), 1)[:, None, None]
    at = (here * HEADS * K)[:, None, None] + head[None, :, None] * K + choice[None, None, :]
    tl.store(weights + at, w, mask=inside[:, None, None] & valid)
    flag = tl.where(alive, flag, DEAD)
    tl.store(flags + token, flag.to(tl.int8), mask=inside)
    tl.store(kinds + here, flag.to(tl.int8), mask=inside)

    if WRITES:
        counted = inside & ((flag & LIVE) != 0) & (t < CHUNK)
        tl.atomic_add(counts + window * memories + memory, tl.sum(counted.to(tl.int32), 0))
        for half in tl.static_range(2 * HEADS):
            at = ((here * 2 * HEADS + half) * K)[:, None] + choice[None, :]
            known = counted[:, None] & picked[None, :]
            subkey = tl.load(ids + at, mask=known, other=0)
            score = sub_scores(tl.load(ranks + at, mask=known, other=0.0), EPSILON, IDW)
            p = softmax_rows(tl.where(picked[None, :], score, -_INF))
            row = ((window * memories + memory) * 2 * HEADS + half).to(tl.int64) * SUBKEYS + subkey
            tl.atomic_add(share + row, (p * PROBABILITY_UNIT).to(tl.int64), mask=known)


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


@triton.jit(do_not_specialize=[*_VARYING, "fresh", "arrived", "length_out"])
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
