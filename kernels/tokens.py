"""The tokens of a call as every kernel numbers them, and what each is to the memory (SPEC.md §3 and §5).

A call reads a stream of ``num_tokens`` tokens of each sequence, in windows: runs of ``length`` tokens from ``start`` on
that read the same tables. The tokens of a window are numbered by sequence, then by time, from ``first`` on; so those of
one memory, ``rows`` sequences, are consecutive.
"""

import triton
import triton.language as tl

from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.shapes import blocks_of
from fwpkm.kernels.runtime.windows import Call

EQUATIONS = ("pairs",)
LIVE = tl.constexpr(1)
"""A flag's bit: unmasked and finite, so it counts and may write."""
DEAD = tl.constexpr(2)
"""Its query, value, gate or a selected score is not finite (SPEC.md §5)."""
GONE = tl.constexpr(8)
"""It is masked, and so dead too: its output and weights are 0, not NaN."""
TARGET = tl.constexpr(4)
"""Its value may be bound to a query."""
INF = tl.constexpr(float("inf"))
VARYING = ["start", "length", "first", "num_tokens", "rows"]
"""Arguments of a window: no kernel is compiled anew for another T."""


@triton.jit
def not_due(due, memory):
    """Whether a program is to do nothing: ``due`` is None, or has a number of each memory that a graph asks."""
    result = False
    if due is not None:
        result = tl.load(due + memory) == 0
    return result


@triton.jit
def turns_of(due, memory, number):
    """How many of a memory's ``number`` items a program takes in turns: one where ``due`` is None, none where not due.

    A loop of so many is none for the compiler where it is one.
    """
    turns = 1
    if due is not None:
        turns = tl.load(due + memory) * tl.cdiv(number - tl.program_id(0), tl.num_programs(0))
    return turns


@triton.jit
def takes_position(there, SCOPE: tl.constexpr):
    """Whether the clock of a row's memory goes on (§5): in batch scope with any token, else if it is ``there``."""
    if SCOPE == "sequence":
        takes = there
    elif SCOPE == "batch":
        takes = True
    else:
        tl.static_assert(False, "the kernels do not know this SCOPE")
    return takes


@triton.jit
def token_of(r, memory, start, length, num_tokens, rows, begins):
    """Where token r of a memory's window lies in the stream, as (stream index, time within the window)."""
    begin = (memory * rows + r // length).to(tl.int64) * num_tokens
    if begins is not None:  # every sequence has a memory of its own
        begin = tl.load(begins + memory)
    return begin + start + r % length, r % length


@triton.jit
def window_of(program, length, rows, memories, BLOCK: tl.constexpr):
    """Which of the windows of a launch a program is of, which block of a memory's tokens there; and the tokens before.

    A launch of several has the blocks of each, one after the other; ``start`` of each is a chunk further.
    """
    blocks = tl.cdiv(rows * length, BLOCK)
    number = program // blocks
    return number, program % blocks, number * memories * rows * length


@triton.jit
def pairs(window_flags, here, t, length, counted, LOOKAHEAD: tl.constexpr):
    """Which ``counted`` tokens at time t have a partner, L tokens later in their window, that may be bound (§3)."""
    has_partner = counted & (t + LOOKAHEAD < length)
    partner = tl.load(window_flags + here + LOOKAHEAD, mask=has_partner, other=0).to(tl.int32)
    return has_partner & ((partner & TARGET) != 0)


@triton.jit
def gate_of(gate, token):
    """g of a token, 1 where there is none."""
    g = 1.0
    if gate is not None:
        g = tl.load(gate + token).to(tl.float32)
    return g


@triton.jit
def flag_of(
    query, value, gate, mask, pair, token,
    QUERY: tl.constexpr, VALUE: tl.constexpr, QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """The flag of a token (§5): it is dead where its query, value or gate is not finite, or where it is masked."""
    columns = tl.arange(0, QUERY_BLOCK)
    x = tl.load(query + token * QUERY + columns, mask=columns < QUERY, other=0.0).to(tl.float32)
    alive = tl.min((tl.abs(x) < INF).to(tl.int32), 0)
    columns = tl.arange(0, VALUE_BLOCK)
    x = tl.load(value + token * VALUE + columns, mask=columns < VALUE, other=0.0).to(tl.float32)
    target = tl.min((tl.abs(x) < INF).to(tl.int32), 0)
    if gate is not None:
        alive = alive * (tl.abs(tl.load(gate + token).to(tl.float32)) < INF).to(tl.int32)
    if not SHIFTED:
        alive = alive * target
    there = 1
    if mask is not None:
        there = tl.load(mask + token).to(tl.int32)
    alive = alive * there
    if pair is not None:
        target = target * tl.load(pair + token).to(tl.int32)
    return alive * (LIVE + TARGET * target) + (1 - alive) * DEAD + (1 - there) * GONE


@triton.jit(do_not_specialize=["num_flags", "num_zeros"])
def prepare_kernel(
    query, value, gate, mask, pair, flags, zeros, num_flags, num_zeros,
    QUERY: tl.constexpr, VALUE: tl.constexpr, QUERY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SHIFTED: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """The flag of each token; and ZEROS of the zeros by each program behind theirs.

    SHIFTED values are targets already (``chunk_update``): one that is not finite makes no pair, and kills nothing.
    """
    token = tl.program_id(0).to(tl.int64)
    if token < num_flags:
        flag = flag_of(query, value, gate, mask, pair, token, QUERY, VALUE, QUERY_BLOCK, VALUE_BLOCK, SHIFTED)
        tl.store(flags + token, flag.to(tl.int8))
    else:
        at = (token - num_flags) * ZEROS + tl.arange(0, ZEROS)
        tl.store(zeros + at, tl.zeros([ZEROS], tl.int32), mask=at < num_zeros)


def add_prepare(launches: Launches, call: Call) -> None:
    """Add the flags of the stream, and the zeros that the residuals begin with."""
    constants = call.shapes.prepare | {"SHIFTED": call.plan.shifted}
    (zeros,), flags = launches.spec("zeros").shape, call.plan.num_streamed
    grid = (flags + blocks_of(zeros, constants["ZEROS"]),)
    launches.add(prepare_kernel, grid, {"num_flags": flags, "num_zeros": zeros}, constants)
