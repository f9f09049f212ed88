"""Calls that keep no state: what they write is laid over the one table that all memories begin from (SPEC.md §5).

Such a call owns no table. A row that a window writes is kept by its segment, as ``new_rows``, and ``latest`` has for
every row of each memory the segment that wrote it last, or -1: then it is still the one table's. What no later window
reads is not written at all. So the copies of the table are spared, which can take longer than all else, and what is
written takes memory by tokens.
"""

import triton
import triton.language as tl

from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.windows import Call

EQUATIONS = ()


@triton.jit
def row_of(table, new_rows, source, slot, WIDTH: tl.constexpr):
    """Where rows lie: as the segments ``source`` left them, or in the one table where that is -1."""
    written = new_rows + source.to(tl.int64) * WIDTH
    return tl.where(source >= 0, written, table + slot.to(tl.int64) * WIDTH)


@triton.jit(do_not_specialize=["memories"])
def table_backward_kernel(
    latest, gradients, d_table, memories,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MEMORIES: tl.constexpr,
):  # fmt: skip
    """The gradient of a row of the table before the call, where the call touched it.

    Of a table that so many memories begin from: the sum of what the first window of each that read the row found.
    """
    slot = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    gradient = tl.zeros([BLOCK], tl.float32)
    touched = memories < 0
    for first in range(0, memories, MEMORIES):
        memory = first + tl.arange(0, MEMORIES)
        segment = tl.load(latest + memory.to(tl.int64) * SLOTS + slot, mask=memory < memories, other=-1)
        # One memory after the other, of the few that read the row.
        memory = tl.where(segment >= 0, memory, memories)
        next_memory = tl.min(memory, 0)
        touched = touched | (next_memory < memories)
        while next_memory < memories:
            at = tl.max(tl.where(memory == next_memory, segment, -1), 0).to(tl.int64)
            gradient += tl.load(gradients + at * WIDTH + d, mask=d < WIDTH, other=0.0)
            memory = tl.where(memory == next_memory, memories, memory)
            next_memory = tl.min(memory, 0)
    tl.store(d_table + slot * WIDTH + d, gradient, mask=touched & (d < WIDTH))


def add_table_backward(launches: Launches, call: Call) -> None:
    """Add the gradient of the table, or of each memory's, before the first window."""
    tables, memories = (1, call.memories) if call.overlaid else (call.memories, 1)
    constants = call.shapes.table_backward | {"MEMORIES": 32 if call.overlaid else 1}
    launches.add(table_backward_kernel, (tables * call.cfg.num_slots,), {"memories": memories}, constants)
