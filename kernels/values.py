"""The write of the value table (SPEC.md §4), in place: one program owns each row, and its sums run in token order.

Backward: windows in reverse, from the touched rows that the forward saved. Each touched row of each window has one
gradient row, by its segment: that of the row as the window found it. ``latest`` has for every row of the table its
segment in the earliest window done, or -1: what is left of the row after a window has the gradient there, or that of
the final table.
"""

import triton
import triton.language as tl

from fwpkm.kernels.overlay import row_of
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.shapes import blocks_of
from fwpkm.kernels.runtime.windows import Call
from fwpkm.kernels.step import step
from fwpkm.kernels.tokens import LIVE, turns_of

EQUATIONS = ("value_gradient", "step", "learning_rates")


@triton.jit
def entries_of(
    at, end, row, sorted_rows, order, weights, strength, error, window_flags, segment_start, segment, length, first, d,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr, ENTRY_BLOCK: tl.constexpr,
    WRITES: tl.constexpr,
):  # fmt: skip
    """Of a row's next entries, as many as ENTRY_BLOCK: Σ κ w g (v̂ - u), how many count, and how many there are.

    None from ``end`` on.
    """
    e = at + tl.arange(0, ENTRY_BLOCK)
    inside = e < end
    same = tl.load(sorted_rows + e, mask=inside, other=-1) == row
    entry = tl.load(order + e, mask=inside, other=0).to(tl.int64)
    gradient = tl.zeros_like(d).to(tl.float32)
    count = 0
    if segment_start is not None:
        tl.store(segment_start + entry, segment.to(tl.int32) + tl.zeros_like(e).to(tl.int32), mask=same)
    if WRITES:
        token = entry // ENTRIES
        t = ((token - first) % length).to(tl.int32)
        counted = same & (t < CHUNK) & ((tl.load(window_flags + token, mask=same, other=0) & LIVE) != 0)
        count += tl.sum(counted.to(tl.int32), 0)
        coefficient = tl.load(strength + token, mask=same, other=0.0) * tl.load(weights + entry, mask=same, other=0.0)
        miss = tl.load(
            error + token[:, None] * WIDTH + d[None, :], mask=same[:, None] & (d < WIDTH)[None, :], other=0.0
        )
        gradient += tl.sum(tl.where((counted & (coefficient != 0))[:, None], coefficient[:, None] * miss, 0.0), 0)
    return gradient, count, tl.sum(same.to(tl.int32), 0)


@triton.jit
def note_segment(segment, row, sorted_rows, order, segment_start, last, BLOCK: tl.constexpr):
    """Store for each entry of a row, from its first on, where they begin."""
    at = segment
    found = BLOCK
    while found == BLOCK:
        e = at + tl.arange(0, BLOCK)
        same = tl.load(sorted_rows + e, mask=e < last, other=-1) == row
        entry = tl.load(order + e, mask=same, other=0).to(tl.int64)
        tl.store(segment_start + entry, segment.to(tl.int32) + tl.zeros_like(e).to(tl.int32), mask=same)
        found = tl.sum(same.to(tl.int32), 0)
        at += BLOCK


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
    sorted_rows, order, weights, strength, error, window_flags, partial, partial_counts, length, first, total,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    ENTRY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ κ w g (v̂ - u) of a row's entries in one piece of the window's, unless they are its own program's.

    Few rows have so many entries; but a token that all read alike would keep the program of its row busy alone.
    """
    begin = (first * ENTRIES).to(tl.int64)
    piece_start = begin + tl.program_id(0) * PIECE
    row, others = goes_on(sorted_rows, begin, piece_start, PIECE)
    if not others:
        return
    d = tl.arange(0, BLOCK)
    end = tl.minimum(piece_start + PIECE, total.to(tl.int64) * ENTRIES)
    gradient = tl.zeros([BLOCK], tl.float32)
    count = 0
    at = piece_start
    found = ENTRY_BLOCK
    while (found == ENTRY_BLOCK) & (at < end):
        more, counted, found = entries_of(
            at, end, row, sorted_rows, order, weights, strength, error, window_flags, None, piece_start, length, first,
            d, WIDTH, ENTRIES, CHUNK, ENTRY_BLOCK, True,
        )  # fmt: skip
        gradient += more
        count += counted
        at += ENTRY_BLOCK
    tl.store(partial + tl.program_id(0).to(tl.int64) * WIDTH + d, gradient, mask=d < WIDTH)
    tl.store(partial_counts + tl.program_id(0), count)


@triton.jit
def learning_rates(reads, before, RATE: tl.constexpr, USAGE: tl.constexpr):
    """η_i = η N_i / (N_i + β U_i) of a slot with N_i = ``reads`` > 0 and U_i = ``before``."""
    return RATE * reads / (reads + USAGE * before)


@triton.jit
def write_row(
    row, segment, begin, end, last, first_entry, follows, going_on,
    table, latest, last_windows, new_rows, uses, sorted_rows, order, weights, strength, error, window_flags, active,
    partial, partial_counts, segment_start, step_sizes, decays, old_rows, sources, values_unclipped,
    first_memory, length, first,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr,
    RATE: tl.constexpr, DECAY: tl.constexpr, CLIP: tl.constexpr, USAGE: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, ENTRY_BLOCK: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """What ``values_kernel`` does with the row whose entries begin at ``segment``; ``end`` is of ``own_end``."""
    d = tl.arange(0, BLOCK)
    row_index = row.to(tl.int64) - first_memory.to(tl.int64) * SLOTS
    offset = row_index * WIDTH
    asked = True
    if latest is None:
        old = tl.load(table + offset + d, mask=d < WIDTH, other=0.0)
    else:
        source, last_window = tl.load(latest + row_index), tl.load(last_windows + row_index)
        asked = last_window != first_memory
        if sources is not None:
            tl.store(sources + segment, source)
    if asked:
        if latest is not None:
            old = tl.load(row_of(table, new_rows, source, row_index % SLOTS, WIDTH) + d, mask=d < WIDTH, other=0.0)
        # Most rows have few entries: the first alone needs few registers.
        gradient = tl.zeros([BLOCK], tl.float32)
        count = 0
        lives = False
        if WRITES:
            if uses is not None:
                before = tl.load(uses + row_index)
            token = first_entry // ENTRIES
            miss = tl.load(error + token * WIDTH + d, mask=d < WIDTH, other=0.0)
            coefficient = tl.load(strength + token) * tl.load(weights + first_entry)
            lives = tl.load(active + first_memory + row_index // SLOTS) != 0
            counts_too = ((token - first) % length < CHUNK) & ((tl.load(window_flags + token) & LIVE) != 0)
            gradient = tl.where(counts_too & (coefficient != 0), coefficient * miss, 0.0)
            count += counts_too.to(tl.int32)
        if segment_start is not None:
            tl.store(segment_start + first_entry, segment.to(tl.int32))
        at = segment + 1
        found = follows.to(tl.int32) * ENTRY_BLOCK
        while found == ENTRY_BLOCK:
            more, counted, found = entries_of(
                at, end, row, sorted_rows, order, weights, strength, error, window_flags, segment_start, segment,
                length, first, d, WIDTH, ENTRIES, CHUNK, ENTRY_BLOCK, WRITES,
            )  # fmt: skip
            gradient += more
            count += counted
            at += ENTRY_BLOCK
        while going_on:
            if WRITES:
                piece = (end - begin) // PIECE
                gradient += tl.load(partial + piece * WIDTH + d, mask=d < WIDTH, other=0.0)
                count += tl.load(partial_counts + piece)
            if segment_start is not None:
                e = end + tl.arange(0, PIECE)
                same = tl.load(sorted_rows + e, mask=e < last, other=-1) == row
                entry = tl.load(order + e, mask=same, other=0).to(tl.int64)
                tl.store(segment_start + entry, segment.to(tl.int32) + tl.zeros_like(e).to(tl.int32), mask=same)
            end += PIECE
            going_on = tl.load(sorted_rows + end, mask=end < last, other=-1) == row
        if old_rows is not None:
            tl.store(old_rows + segment * WIDTH + d, old, mask=d < WIDTH)
        if WRITES:
            reads = tl.maximum(count, 1).to(tl.float32)
            fraction = 1.0 / reads
            gradient = gradient * fraction
            if values_unclipped is not None:
                tl.store(values_unclipped + segment * WIDTH + d, (tl.abs(gradient) <= CLIP).to(tl.int8), mask=d < WIDTH)
            if uses is not None:
                rate = learning_rates(reads, before, RATE, USAGE)
                if (count > 0) & lives:  # though the row may not be finite
                    tl.store(uses + row_index, before + reads)
            else:
                rate = RATE
            new, finite = step(old, gradient, d < WIDTH, rate, DECAY, CLIP)
            moves = (count > 0) & lives & finite
            if moves:
                if latest is None:
                    tl.store(table + offset + d, new, mask=d < WIDTH)
                else:
                    tl.store(new_rows + segment * WIDTH + d, new, mask=d < WIDTH)
                    tl.store(latest + row_index, segment.to(tl.int32))
            if step_sizes is not None:
                tl.store(step_sizes + segment, tl.where(moves, rate * fraction, 0.0))
            if decays is not None:
                tl.store(decays + segment, rate * DECAY)
        elif step_sizes is not None:
            tl.store(step_sizes + segment, 0.0)
    elif sources is not None:
        note_segment(segment, row, sorted_rows, order, segment_start, last, PIECE)
        tl.store(step_sizes + segment, 0.0)


@triton.jit(do_not_specialize=["first_memory", "length", "first", "total", "rows"])
def values_kernel(
    table, latest, last_windows, new_rows, uses, sorted_rows, order, weights, strength, error, window_flags, active,
    partial, partial_counts, segment_start, step_sizes, decays, old_rows, sources, values_unclipped, due,
    first_memory, length, first, total, rows,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr,
    RATE: tl.constexpr, DECAY: tl.constexpr, CLIP: tl.constexpr, USAGE: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, ENTRY_BLOCK: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """values_i ← values_i - η_i (clip(G_i) + λ values_i), G_i = (1/N_i) Σ κ w g (v̂ - u) over the entries of slot i.

    Then U_i ← U_i + N_i. Where nothing weighs them there are no ``uses``, and η_i = η.

    All entries of the call lie sorted by window, table row and token. Those of one row and window are a segment, and
    the program of its first entry owns the row; the sums of the pieces behind its own are there already. It
    keeps what a backward needs, where one comes, by segment: the row, the step size η_i/N_i and, where that is not one
    number for all, η_i λ; and for each entry, its segment. Laid over the one table (overlay.py), it keeps the segment
    that left the row in place of the row, and does nothing that no later window reads.
    """
    begin = (first * ENTRIES).to(tl.int64)
    last = total.to(tl.int64) * ENTRIES
    entries = rows * length * ENTRIES
    if due is not None:  # a memory's entries alone: others may not have been sorted
        begin += tl.program_id(1) * entries.to(tl.int64)
        last = begin + entries
    for turn in range(turns_of(due, tl.program_id(1), entries)):
        segment = begin + tl.program_id(0) + turn * tl.num_programs(0)
        end = own_end(begin, segment, last, PIECE)
        # Loads before each branch go out together: a row is a few in a chain, and programs wait for little else.
        row, new_row = begins_row(sorted_rows, begin, segment)
        follows = tl.load(sorted_rows + segment + 1, mask=segment + 1 < end, other=-1) == row
        going_on = tl.load(sorted_rows + end, mask=end < last, other=-1) == row
        first_entry = tl.load(order + segment).to(tl.int64)
        if new_row:
            write_row(
                row, segment, begin, end, last, first_entry, follows, going_on,
                table, latest, last_windows, new_rows, uses, sorted_rows, order, weights, strength, error, window_flags,
                active, partial, partial_counts, segment_start, step_sizes, decays, old_rows, sources, values_unclipped,
                first_memory, length, first,
                SLOTS, WIDTH, ENTRIES, CHUNK, RATE, DECAY, CLIP, USAGE, BLOCK, PIECE, ENTRY_BLOCK, WRITES,
            )  # fmt: skip


def add_values(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add the write of a window's rows, and what its backward needs of them."""
    writes, entries = call.keeps(integers["window"]), integers["tokens"] * call.cfg.slots_per_token
    constants = call.shapes.values | {"WRITES": writes}
    if call.decided:  # the program of a row sums all: a launch at each step would cost more
        constants |= {"PIECE": 2**30, "ENTRY_BLOCK": call.shapes.piece["ENTRY_BLOCK"]}
    elif writes:
        piece = call.shapes.piece
        launches.add(piece_kernel, (blocks_of(entries, piece["PIECE"]),), integers, piece)
    if writes or call.save:
        launches.add(values_kernel, call.turns(entries), integers, constants)


@triton.jit
def toward_of(
    at, end, row, sorted_rows, order, weights, d_read, first, d,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, ENTRY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a row's next entries, as many as ENTRY_BLOCK: Σ w d v̂, and how many there are before ``end``."""
    e = at + tl.arange(0, ENTRY_BLOCK)
    known = e < end
    entries = tl.load(order + e, mask=known, other=0).to(tl.int64)
    same = tl.load(sorted_rows + e, mask=known, other=-1) == row
    w = tl.load(weights + entries, mask=same, other=0.0)
    tokens = entries // ENTRIES - first
    towards = tl.load(
        d_read + tokens[:, None] * WIDTH + d[None, :], mask=same[:, None] & (d < WIDTH)[None, :], other=0.0
    )
    return tl.sum(w[:, None] * towards, 0), tl.sum(same.to(tl.int32), 0)


@triton.jit(do_not_specialize=["first", "total"])
def piece_backward_kernel(
    sorted_rows, order, weights, d_read, partial, first, total,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, ENTRY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ w d v̂ of a row's entries in one piece of the window's, unless they are its own program's."""
    begin = (first * ENTRIES).to(tl.int64)
    piece_start = begin + tl.program_id(0) * PIECE
    row, others = goes_on(sorted_rows, begin, piece_start, PIECE)
    if not others:
        return
    d = tl.arange(0, BLOCK)
    end = tl.minimum(piece_start + PIECE, total.to(tl.int64) * ENTRIES)
    gradient = tl.zeros([BLOCK], tl.float32)
    at = piece_start
    found = ENTRY_BLOCK
    while (found == ENTRY_BLOCK) & (at < end):
        more, found = toward_of(
            at, end, row, sorted_rows, order, weights, d_read, first, d, WIDTH, ENTRIES, ENTRY_BLOCK
        )
        gradient += more
        at += ENTRY_BLOCK
    tl.store(partial + tl.program_id(0).to(tl.int64) * WIDTH + d, gradient, mask=d < WIDTH)


@triton.jit(do_not_specialize=["first_memory", "first", "total"])
def rows_backward_kernel(
    sorted_rows, order, weights, step_sizes, decays, needed_by, latest, gradients, d_values, d_read, partial,
    first_memory, first, total,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, RATE: tl.constexpr, DECAY: tl.constexpr,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, ENTRY_BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of each row as the window found it: what decay leaves of that after, and Σ w d v̂.

    Where only a segment that left the row asks for it, ``needed_by`` has that by segment, or -1 for nobody.
    """
    begin = (first * ENTRIES).to(tl.int64)
    segment = begin + tl.program_id(0)
    last = total.to(tl.int64) * ENTRIES
    end = own_end(begin, segment, last, PIECE)
    row, new_row = begins_row(sorted_rows, begin, segment)  # loads go out together, as in values_kernel
    follows = tl.load(sorted_rows + segment + 1, mask=segment + 1 < end, other=-1) == row
    entry = tl.load(order + segment).to(tl.int64)
    if needed_by is not None:
        new_row = new_row & (tl.load(needed_by + segment) >= 0)
    if not new_row:
        return
    d = tl.arange(0, BLOCK)
    row_index = row.to(tl.int64) - first_memory.to(tl.int64) * SLOTS
    next_segment = tl.load(latest + row_index).to(tl.int64)
    left = 1 - RATE * DECAY
    if decays is not None:
        left = 1 - tl.load(decays + segment)
    left = tl.where(tl.load(step_sizes + segment) != 0, left, 1.0)
    # Most rows have few entries: the first alone needs few registers.
    toward = tl.load(d_read + (entry // ENTRIES - first) * WIDTH + d, mask=d < WIDTH, other=0.0)
    toward = tl.load(weights + entry) * toward
    gradient = tl.zeros([BLOCK], tl.float32)
    if next_segment >= 0:
        gradient += tl.load(gradients + next_segment * WIDTH + d, mask=d < WIDTH, other=0.0)
    elif d_values is not None:
        gradient += tl.load(d_values + row_index * WIDTH + d, mask=d < WIDTH, other=0.0)
    gradient = gradient * left + toward
    at = segment + 1
    found = follows.to(tl.int32) * ENTRY_BLOCK
    while found == ENTRY_BLOCK:
        more, found = toward_of(
            at, end, row, sorted_rows, order, weights, d_read, first, d, WIDTH, ENTRIES, ENTRY_BLOCK
        )
        gradient += more
        at += ENTRY_BLOCK
    while tl.load(sorted_rows + end, mask=end < last, other=-1) == row:
        piece = (end - begin) // PIECE
        gradient += tl.load(partial + piece * WIDTH + d, mask=d < WIDTH, other=0.0)
        end += PIECE
    tl.store(gradients + segment * WIDTH + d, gradient, mask=d < WIDTH)
    tl.store(latest + row_index, segment.to(tl.int32))


def add_values_backward(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add the gradients of the rows that a window found."""
    entries = integers["tokens"] * call.cfg.slots_per_token
    constants = call.shapes.piece_backward
    launches.add(piece_backward_kernel, (blocks_of(entries, constants["PIECE"]),), integers, constants)
    launches.add(rows_backward_kernel, (entries,), integers, call.shapes.rows_backward)
