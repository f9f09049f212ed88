"""The read v̂ = Σ w · values[slot] (SPEC.md §2), and before a write what each token that has a pair will write (§3)."""

import triton
import triton.language as tl

from fwpkm.kernels.losses import memorization_loss
from fwpkm.kernels.overlay import row_of
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.windows import Call
from fwpkm.kernels.tokens import DEAD, GONE, INF, LIVE, VARYING, gate_of, pairs, token_of, turns_of

EQUATIONS = ("read", "pairs", "memorization_loss", "write_scale")
_VARYING = [*VARYING, "first_new", "num_pending"]


@triton.jit
def write_scale(power, ENTRIES: tl.constexpr, WRITE_SCALE: tl.constexpr):
    """κ of a token, ``power`` = Σ w² (§4)."""
    if WRITE_SCALE == "slots":
        scale = ENTRIES * 1.0
    elif WRITE_SCALE == "unit":
        scale = 1.0
    elif WRITE_SCALE == "normalized":
        scale = 1 / power
    else:
        tl.static_assert(False, "the kernels do not know this WRITE_SCALE")
    return scale


@triton.jit
def write_scale_vjp(d_strength, g, power, WRITE_SCALE: tl.constexpr):
    """What the gradient of κ g gives to each weight, in units of the weight."""
    if WRITE_SCALE == "slots":
        d_power = 0.0
    elif WRITE_SCALE == "normalized":
        d_power = -2 * g * d_strength / (power * power)
    elif WRITE_SCALE == "unit":
        d_power = 0.0
    else:
        tl.static_assert(False, "the kernels do not know this WRITE_SCALE")
    return d_power


@triton.jit(do_not_specialize=_VARYING)
def read_kernel(
    table, latest, new_rows, slots, weights, window_flags, value, gate, output, error, strength, squared, due,
    begins, start, length, first, num_tokens, rows, first_new, num_pending,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr, LOOKAHEAD: tl.constexpr,
    WRITE_SCALE: tl.constexpr, BLOCK: tl.constexpr, ENTRY_BLOCK: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """v̂ = Σ w · values[slot]; before a write also v̂ - u, κ g and ½ g ‖v̂ - u‖² of the tokens that have a pair.

    The stream's tokens from ``first_new`` on have not been read before: they are output, NaN where they are dead, or 0
    where they are masked.
    """
    for turn in range(turns_of(due, tl.program_id(1), rows * length)):
        r = tl.program_id(1) * rows * length + tl.program_id(0) + turn * tl.num_programs(0)
        b, memory = r // length, r // (rows * length)
        stream, t = token_of(r % (rows * length), memory, start, length, num_tokens, rows, begins)
        memory = memory.to(tl.int64)
        here = (first + r).to(tl.int64)
        flag = tl.load(window_flags + here).to(tl.int32)
        alive = (flag & DEAD) == 0
        d = tl.arange(0, BLOCK)
        read = tl.zeros([BLOCK], tl.float32)
        power = 0.0
        for at in range(0, ENTRIES, ENTRY_BLOCK):
            e = at + tl.arange(0, ENTRY_BLOCK)
            row = memory * SLOTS + tl.load(slots + here * ENTRIES + e, mask=e < ENTRIES, other=0)
            w = tl.load(weights + here * ENTRIES + e, mask=e < ENTRIES, other=0.0)
            known = (alive & (e < ENTRIES))[:, None] & (d < WIDTH)[None, :]
            place = table + row[:, None] * WIDTH
            if latest is not None:
                source = tl.load(latest + row, mask=e < ENTRIES, other=-1)
                place = row_of(table, new_rows, source, row - memory * SLOTS, WIDTH)[:, None]
            read += tl.sum(w[:, None] * tl.load(place + d[None, :], mask=known, other=0.0), 0)
            power += tl.sum(w * w, 0)
        if start + t >= first_new:
            out = stream - (b + 1) * num_pending
            shown = tl.where(alive | ((flag & GONE) != 0), read, float("nan"))
            tl.store(output + out * WIDTH + d, shown.to(output.dtype.element_ty), mask=d < WIDTH)
        if WRITES:
            pair = ((flag & LIVE) != 0) & pairs(window_flags, here, t, length, t < CHUNK, LOOKAHEAD)
            u = tl.load(value + (stream + LOOKAHEAD) * WIDTH + d, mask=pair & (d < WIDTH), other=0.0).to(tl.float32)
            miss = tl.where(pair & (d < WIDTH), read - u, 0.0)
            g = gate_of(gate, stream)
            scale = write_scale(power, ENTRIES, WRITE_SCALE)
            tl.store(error + here * WIDTH + d, miss, mask=d < WIDTH)
            tl.store(strength + here, tl.where(pair, scale * g, 0.0))
            tl.store(squared + here, tl.where(pair, memorization_loss(miss, g), 0.0))


def add_read(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add the reads of a window, and what it will write."""
    constants = call.shapes.read | {"WRITES": call.plan.windows[integers["window"]].writes}
    launches.add(read_kernel, call.turns(integers["tokens"]), integers, constants)


@triton.jit
def gradient_after(gradients, d_values, values_unclipped, next_segment, segment, row, known, d, WIDTH: tl.constexpr):
    """Gradients [E, D] of rows as a window left them; those that clipping passes."""
    inside = (d < WIDTH)[None, :]
    later = known & (next_segment >= 0)
    at = next_segment.to(tl.int64)[:, None] * WIDTH + d[None, :]
    after = tl.load(gradients + at, mask=later[:, None] & inside, other=0.0)
    if d_values is not None:
        at = row.to(tl.int64)[:, None] * WIDTH + d[None, :]
        after += tl.load(d_values + at, mask=(known & (next_segment < 0))[:, None] & inside, other=0.0)
    if values_unclipped is not None:
        at = segment.to(tl.int64)[:, None] * WIDTH + d[None, :]
        after = after * tl.load(values_unclipped + at, mask=known[:, None] & inside, other=0).to(tl.float32)
    return after


@triton.jit(do_not_specialize=_VARYING)
def read_backward_kernel(
    slots, weights, window_flags, gate, error, strength, segment_start, step_sizes, latest, old_rows, table, new_rows,
    sources, values_unclipped, gradients, d_values, d_output, d_weights, d_read, d_value, d_gate,
    begins, start, length, first, num_tokens, rows, first_new, num_pending,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr, LOOKAHEAD: tl.constexpr,
    WRITE_SCALE: tl.constexpr, BLOCK: tl.constexpr, ENTRY_BLOCK: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Through the write into v̂, u, κ g; then through the read into w."""
    r = tl.program_id(0)
    here = (first + r).to(tl.int64)
    b, memory = r // length, r // (rows * length)
    stream, t = token_of(r % (rows * length), memory, start, length, num_tokens, rows, begins)
    memory = memory.to(tl.int64)
    flag = tl.load(window_flags + here).to(tl.int32)
    d = tl.arange(0, BLOCK)
    toward = tl.zeros([BLOCK], tl.float32)
    power = 0.0
    d_power = 0.0
    if WRITES:
        c = tl.load(strength + here)
        miss = tl.load(error + here * WIDTH + d, mask=d < WIDTH, other=0.0)
        nonfinite = tl.max((~(tl.abs(miss) < INF)).to(tl.int32), 0) != 0
        miss = tl.where(nonfinite, 0.0, miss)
        d_strength = 0.0
        for at in range(0, ENTRIES, ENTRY_BLOCK):
            e = at + tl.arange(0, ENTRY_BLOCK)
            known = e < ENTRIES
            w = tl.load(weights + here * ENTRIES + e, mask=known, other=0.0)
            segment = tl.load(segment_start + here * ENTRIES + e, mask=known, other=0)
            step_size = tl.load(step_sizes + segment, mask=known, other=0.0)
            row = memory * SLOTS + tl.load(slots + here * ENTRIES + e, mask=known, other=0)
            next_segment = tl.load(latest + row, mask=known, other=-1)
            after = gradient_after(
                gradients, d_values, values_unclipped, next_segment, segment, row, known & (step_size != 0), d, WIDTH
            )
            toward -= tl.sum((c * w * step_size)[:, None] * after, 0)
            d_coefficient = -step_size * tl.sum(after * miss[None, :], 1)
            d_coefficient = tl.where(d_coefficient == d_coefficient, d_coefficient, 0.0)
            d_strength += tl.sum(w * d_coefficient, 0)
            power += tl.sum(w * w, 0)
            tl.store(d_weights + here * ENTRIES + e, c * d_coefficient, mask=known)
        tl.debug_barrier()  # other threads of this program load them below
        pair = pairs(window_flags, here, t, length, t < CHUNK, LOOKAHEAD) & ((flag & LIVE) != 0)
        if pair:
            tl.store(d_value + (stream + LOOKAHEAD) * WIDTH + d, (-toward).to(d_value.dtype.element_ty), mask=d < WIDTH)
            if gate is not None:
                scale = write_scale(power, ENTRIES, WRITE_SCALE)
                tl.store(d_gate + stream, (scale * d_strength).to(d_gate.dtype.element_ty))
            d_power = write_scale_vjp(d_strength, gate_of(gate, stream), power, WRITE_SCALE)
    if d_output is not None:
        if start + t >= first_new:
            out = stream - (b + 1) * num_pending
            toward += tl.load(d_output + out * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    alive = (flag & DEAD) == 0
    toward = tl.where(alive, toward, 0.0)
    tl.store(d_read + r.to(tl.int64) * WIDTH + d, toward, mask=d < WIDTH)
    for at in range(0, ENTRIES, ENTRY_BLOCK):
        e = at + tl.arange(0, ENTRY_BLOCK)
        known = e < ENTRIES
        w = tl.load(weights + here * ENTRIES + e, mask=known, other=0.0)
        segment = tl.load(segment_start + here * ENTRIES + e, mask=known, other=0).to(tl.int64)
        if sources is None:
            place = old_rows + segment[:, None] * WIDTH
        else:
            source = tl.load(sources + segment, mask=known, other=-1)
            slot = tl.load(slots + here * ENTRIES + e, mask=known, other=0)
            place = row_of(table, new_rows, source, slot, WIDTH)[:, None]
        row = tl.load(place + d[None, :], mask=(alive & known)[:, None] & (d < WIDTH)[None, :], other=0.0)
        d_w = tl.sum(row * toward[None, :], 1) + d_power * w
        if WRITES:
            d_w += tl.load(d_weights + here * ENTRIES + e, mask=known, other=0.0)
        tl.store(d_weights + here * ENTRIES + e, d_w, mask=known)


def add_read_backward(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add the gradients of a window's weights, and of the values and gates that it wrote."""
    constants = call.shapes.read_backward | {"WRITES": call.keeps(integers["window"])}
    launches.add(read_backward_kernel, (integers["tokens"],), integers, constants)
