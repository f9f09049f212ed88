"""Packed sequences that begin and keep no state, as streams of unequal length end to end (SPEC.md §5).

A sequence that completes no chunk reads the one initial table and nothing else, so it makes no difference where it
ends: such sequences share rows of less than a chunk, one behind the other. Every other has a row of its own, the
longest first, up to the last window that it reads. So as many launches are made as the longest asks for, and about as
many tokens are read as there are.
"""

import bisect
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm import schedule
from fwpkm.backends.torch import fast
from fwpkm.backends.torch.column_parallel import by_columns
from fwpkm.backends.torch.left_aligned import left_align, rounded
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Losses, Memory, Trace
from fwpkm.tokens import Tokens

_PARTS = 8
"""Of a chunk, up to a multiple of which the last window is rounded: so more calls have one plan."""


class Rows(NamedTuple):
    """The rows as which packed sequences are read."""

    writers: list[int]
    """The sequences that have a row each."""
    others: list[int]
    """Those that share the rows behind."""
    ends: list[int]
    """``cu_seqlens`` of the rows, of tokens in the order of these sequences."""
    plan: Any


def rows_of(cfg: FwPKMConfig, ends: list[int], update: bool) -> Rows:
    """The rows of sequences that end at ``ends``."""
    from fwpkm.kernels.runtime import windows

    chunk, lag = cfg.chunk_size, schedule.lag(cfg)
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    num_writers = sum(length >= chunk + lag for length in lengths) if update else 0
    writers, others = order[:num_writers], order[num_writers:]
    if not writers:
        return Rows([], others, [0, ends[-1]], windows.plan(cfg, 0, rounded(ends[-1]), 1, False))
    row_ends = [*itertools.accumulate((lengths[i] for i in writers), initial=0)]
    if row_ends[-1] < ends[-1]:
        row_ends = [*row_ends[:-1], *range(row_ends[-1], ends[-1], chunk + lag - 1), ends[-1]]
    longest = lengths[writers[0]]
    tail = (longest - lag) % chunk
    longest += min(-tail % -(-chunk // _PARTS), chunk - 1 - tail)
    firsts = [window.start for window in schedule.windows(cfg, 0, longest)]
    reached = (bisect.bisect_left(writers, -first, key=lambda i: -lengths[i]) for first in firsts[1:])
    return Rows(writers, others, row_ends, windows.ragged(cfg, longest, (len(row_ends) - 1, *reached)))


def apply(
    cfg: FwPKMConfig, memory: Memory, inputs: Tokens, cu_seqlens: Tensor, update: bool
) -> tuple[Tensor, None, Trace]:
    """``ops.begin`` of a packed row on the kernels, whose ``cu_seqlens`` lie on the CPU; no state is kept."""
    ends, length, device = cu_seqlens.tolist(), inputs.length, inputs.query.device
    writers, others, row_ends, plan = rows_of(cfg, ends, update)
    batch, written = plan.batch, plan.windows[: plan.num_writes]
    columns, sequences = schedule.max_writes(cfg, length), len(ends) - 1
    # Where the trace has the losses of each window's rows; those of the rows that sequences share are 0, and left out.
    cells = [
        writers[row] * columns + i if row < len(writers) else sequences * columns
        for i, w in enumerate(written)
        for row in range(w.batch)
    ]
    spans = [*((ends[i], ends[i + 1]) for i in (*writers, *others)), (ends[-1], length)]  # and what is behind the last
    lengths = [stop - start for start, stop in spans]
    shifts = [start - before for (start, _), before in zip(spans, itertools.accumulate(lengths, initial=0))]
    sent = _sent(device, shifts, lengths, row_ends, plan.begins or (), writers, cells)
    shift, number, row_end, begin, writer, cell = sent
    order = torch.arange(length, device=device) + shift.repeat_interleave(number, output_size=length)
    here = inputs._replace(mask=None if inputs.mask is None else inputs.mask.to(device))
    ragged = {"order": order.int(), "begins": begin if plan.begins else None}
    streams = left_align(cfg, None, None, here, row_end, batch, plan.num_tokens, **ragged)
    started = Memory(*map(by_columns(lambda x: x.expand(batch, *x.shape[1:])), memory))
    uses = memory.keys.new_zeros(1, cfg.num_slots).expand(batch, -1) if cfg.usage_weight else None  # copied by a write
    pair, dtype = streams.places.pair if written else None, inputs.query.dtype
    done = fast.run(cfg, plan, started, streams.tokens, pair, False, len(cells), dtype, uses, memory.values)
    output, slots, weights = streams.of_call(done.output, done.trace.slots, done.trace.weights)
    zeros = done.trace.memorization.new_zeros(sequences * columns + 1)
    losses = {
        name: zeros.index_copy(0, cell, getattr(done.trace, name)[0])[:-1].view(sequences, columns)
        for name in Losses._fields
    }
    due = streams.places.due[: len(writers)]
    writes = due.new_zeros(sequences).index_copy(0, writer, due)
    return output, None, Trace(slots, weights.detach(), **losses, writes=writes)


def _sent(device: torch.device, *parts: Any) -> list[Tensor]:
    """Lists of integers on a device, each at 16 bytes, as which kernels are compiled. The host waits for nothing."""
    sizes = [len(part) + len(part) % 2 for part in parts]
    numbers = [x for part in parts for x in (*part, *[0] * (len(part) % 2))]
    # A graph would read pinned memory again when it is replayed, which is others' by then: so torch refuses the copy.
    pinned = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    sent = torch.tensor(numbers, device="cpu", pin_memory=pinned).to(device, non_blocking=True).split(sizes)
    return [x[: len(part)] for x, part in zip(sent, parts)]
