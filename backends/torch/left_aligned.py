"""Rows at positions of their own, masked or packed, as one rectangle that the kernels read (SPEC.md §5).

Every stream, a row's pending tokens and then its new unmasked ones, begins at a chunk's start. So streams that are
moved to the left, and padded to the longest, are rows at position 0 for the kernels: they read all alike, and a chunk
that a row has not completed is written by none of its tokens, as none of them may be bound. Nothing here waits for the
device, but for a position that the host keeps; and all of it can be traced, so torch.compile keeps a call in its graph.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fwpkm import schedule
from fwpkm.backends.torch import fast, operators
from fwpkm.backends.torch.tokens import filled
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State, Trace
from fwpkm.tokens import NUMBERS, Array, Tokens


def apply(
    cfg: FwPKMConfig, state: State, inputs: Tokens, cu_seqlens: Tensor | None, update: bool, owned: bool, fresh: bool
) -> tuple[Tensor, State, Trace]:
    """``ops.apply`` of such rows on the kernels: the output, the next state and the trace.

    Args:
        cfg: the configuration.
        state: where the rows stand; where nothing is updated the tables alone matter.
        inputs: as the caller passed them.
        cu_seqlens: ``[B+1]``, on the CPU unless the call is compiled, or None.
        update: False only reads.
        owned: the value table may be overwritten, unless the call is compiled.
        fresh: nothing is pending.
    """
    device, batch, compiled = inputs.query.device, state.position.shape[0], torch.compiler.is_compiling()
    num_pending = None if fresh or not update else schedule.pending(cfg, state.position)
    num_new = _num_new(cfg, inputs.mask, cu_seqlens)
    longest = _longest(cfg, batch, num_pending, num_new, inputs.length, cu_seqlens)
    passed = inputs.length if num_new is None else _later(num_new, state.position.device)
    pending = None if num_pending is None else state.pending
    here = inputs._replace(mask=None if inputs.mask is None else inputs.mask.to(device))
    ends = None if cu_seqlens is None else cu_seqlens.to(device)
    rows = left_align(cfg, pending, num_pending, here, ends, batch, longest)
    pair, columns = rows.pair if update else None, schedule.max_writes(cfg, inputs.length)
    if compiled:
        done = operators.run(cfg, state.memory, rows.tokens, pair, update, columns, inputs.query.dtype)
    else:
        from fwpkm.kernels.runtime import windows

        plan = windows.plan(cfg, 0, longest, batch, update)
        done = fast.run(cfg, plan, state.memory, rows.tokens, pair, owned, columns, inputs.query.dtype)
    writes = (rows.due * update).view(state.memory.keys.shape[0], -1)[:, 0].int()
    slots, weights = rows.of_call(done.trace.slots), rows.of_call(done.trace.weights)
    trace = done.trace._replace(slots=slots, weights=weights, writes=writes)
    if update:
        left = rows.left(cfg, (done.flags[: rows.pair.numel()].view_as(rows.pair) & fast.DEAD) != 0)
        moved = passed if isinstance(passed, int) else passed().to(state.position)
        state = State.of(done.memory, left, schedule.reduced(cfg, state.position) + moved)
    return rows.of_call(done.output), state, trace


class LeftAligned(NamedTuple):
    """The streams of a call."""

    tokens: Tokens
    """``[B, Q, ...]``, mask False past a stream's end, where any numbers stand."""
    pair: Tensor
    """``[B, Q]`` bool: the tokens that a write of this call may bind."""
    lengths: Tensor
    """``[B]`` int64: of the streams."""
    due: Tensor
    """``[B]`` int64: the chunks that they complete."""
    shape: tuple[int, int]
    """Of the call: [B, T], or packed [1, T]."""
    entries: Tensor
    """``[n]``: where in ``B·Q`` each token of the call stands; anywhere if it is gone."""
    cells: Tensor
    """``[B·Q]``: the inverse; any token where none stands."""
    gone: Tensor | None
    """``[n]`` bool: the tokens of the call that stand nowhere."""
    old: Tensor | None
    """``[B, p]`` bool: the pending tokens, with which the streams begin."""

    def of_call(self, x: Tensor) -> Tensor:
        """What the rectangle's tokens gave ``[B, Q, ...]`` for those of the call, 0 for the masked ones."""
        return _OfCall.apply(x, self.entries, self.cells, self.gone, self.old).view(*self.shape, *x.shape[2:])

    def left(self, cfg: FwPKMConfig, dead: Tensor) -> Tokens:
        """What is pending afterwards ``[B, P, ...]``; ``dead`` [B, Q] are the tokens that are not finite or masked."""
        (batch, longest), device = self.pair.shape, dead.device
        at = (self.due * cfg.chunk_size)[:, None] + torch.arange(cfg.capacity, device=device)
        first = torch.arange(0, batch * longest, longest, device=device)[:, None]
        cells = (first + at.clamp(max=longest - 1)).flatten()
        blank = (at >= self.lengths[:, None]) | dead.flatten().index_select(0, cells).view_as(at)

        def pending(x: Tensor) -> Tensor:
            x = x.flatten(0, 1).index_select(0, cells).to(torch.float32).view(*at.shape, *x.shape[2:])
            return x.masked_fill(_like(blank, x), 0)

        numbers = {name: pending(x) for name, x in self.tokens.present().items() if name in NUMBERS}
        kept = ~blank
        return Tokens(**{"gate": kept.to(torch.float32), **numbers}, mask=kept)


def left_align(
    cfg: FwPKMConfig,
    pending: Tokens | None,
    num_pending: Tensor | None,
    inputs: Tokens,
    cu_seqlens: Array,
    batch: int,
    longest: int,
) -> LeftAligned:
    """Move the streams of a call to the left.

    Args:
        cfg: the configuration.
        pending: ``[B, P, ...]``, or None where nothing is pending.
        num_pending: ``[B]``, or None.
        inputs: those of the call.
        cu_seqlens: ``[B+1]`` where the tokens lie, or None.
        batch: B.
        longest: Q, at least the length of every stream.
    """
    device, shape = inputs.query.device, inputs.query.shape[:2]
    first = torch.arange(0, batch * longest, longest, device=device)
    num_pending = None if num_pending is None else num_pending.to(device, torch.int64)
    begin = first if num_pending is None else first + num_pending
    entries, there, num_new = _entries(cfg, begin, inputs, cu_seqlens)
    end, gone = batch * longest, None
    if there is not None:
        gone = ~there
        entries = entries.masked_fill_(gone, end)
    cells = entries.new_zeros(end + 1)
    cells = cells.scatter_(0, entries, torch.arange(entries.shape[0], device=device))[:end]
    entries = entries if gone is None else entries.clamp(max=end - 1)
    at, lengths, old = torch.arange(longest, device=device), num_new, None
    if pending is not None and num_pending is not None:
        inputs, pending = filled(torch.float32, inputs), filled(torch.float32, pending).slice(0, longest)
        lengths, old = lengths + num_pending, at[: pending.length] < num_pending[:, None]
    streams = {}
    for name, x in inputs.present().items():
        if name in NUMBERS:
            before = None if pending is None else getattr(pending, name)
            streams[name] = _OfStream.apply(x.flatten(0, 1), cells, entries, gone, (batch, longest), before, old)
    mask = at < lengths[:, None]
    if inputs.mask is not None and gone is None:  # of batch scope, where masked tokens stand in the streams
        mask = mask & inputs.mask.flatten().index_select(0, cells).view_as(mask)
    if pending is not None and old is not None:
        begin = torch.where(old, pending.mask, mask[:, : pending.length])
        mask = torch.cat([begin, mask[:, pending.length :]], dim=1)
    due = schedule.written(cfg, lengths)
    pair = at < (due * cfg.chunk_size + schedule.lag(cfg))[:, None]
    return LeftAligned(Tokens(**streams, mask=mask), pair, lengths, due, tuple(shape), entries, cells, gone, old)


def _entries(
    cfg: FwPKMConfig, begin: Tensor, inputs: Tokens, cu_seqlens: Array
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Where the tokens of a call stand ``[n]``, from ``begin`` [B] on; which stand anywhere, None is all; ``[B]`` how
    many of each row.
    """
    length, device = inputs.length, begin.device
    if cu_seqlens is None and (inputs.mask is None or cfg.memory_scope == "batch"):
        at = torch.arange(length, device=device)
        return (begin[:, None] + at).flatten(), None, torch.full_like(begin, length)
    if cu_seqlens is None:
        count = inputs.mask.cumsum(1)
        return (begin[:, None] + (count - 1)).flatten(), inputs.mask.flatten(), count[:, -1]
    ends = cu_seqlens.long()
    row = torch.searchsorted(ends[1:], torch.arange(length, device=device), right=True)
    there = row < begin.shape[0]
    if inputs.mask is not None:
        there = there & inputs.mask.flatten()
    before = F.pad(there.cumsum(0), (1, 0))
    of_rows = before[ends]
    row = row.clamp(max=begin.shape[0] - 1)
    return (begin - of_rows[:-1])[row] + before[:-1], there, of_rows.diff()


def _num_new(cfg: FwPKMConfig, mask: Array, cu_seqlens: Array) -> Tensor | None:
    """``[B]``: the tokens of the call that take a position in each row, where the masks lie; None is all T."""
    if cu_seqlens is None:
        return None if mask is None or cfg.memory_scope == "batch" else mask.sum(1)
    if mask is None:
        return cu_seqlens.diff()
    return F.pad(mask.flatten().cumsum(0), (1, 0))[cu_seqlens.to(mask.device).long()].diff()


def _longest(cfg: FwPKMConfig, batch: int, num_pending: Array, num_new: Array, length: int, cu_seqlens: Array) -> int:
    """Q: the length of the longest stream, or as long as it can be where the host does not know."""
    if torch.compiler.is_compiling():
        return length + (0 if num_pending is None else cfg.chunk_size + schedule.lag(cfg) - 1)
    num_pending = torch.zeros(batch, dtype=torch.int64) if num_pending is None else num_pending
    if cu_seqlens is not None:
        length = int(cu_seqlens.diff().max())
    num_new = torch.full((batch,), length) if num_new is None else num_new
    if num_pending.device.type == num_new.device.type == "cpu":
        return max(1, int((num_pending + num_new).max()))
    most_pending = cfg.chunk_size + schedule.lag(cfg) - 1
    if num_pending.device.type == "cpu":
        most_pending = int(num_pending.max())
    return max(1, most_pending + (int(num_new.max()) if num_new.device.type == "cpu" else length))


def _later(x: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """x on a device: the copy begins now, and the host waits for it when it asks, but for nothing launched since."""
    if torch.compiler.is_compiling() or not x.is_cuda or device.type != "cpu":
        return lambda: x.to(device)
    copy, done = x.to(device, non_blocking=True), torch.cuda.Event()
    done.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait


class _OfStream(torch.autograd.Function):
    """Tokens of a call ``[n, ...]`` in streams ``[B, Q, ...]``, behind the pending ones that are ``old`` [B, p]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cells: Tensor, entries: Tensor, gone: Array, shape: tuple, pending: Array, old: Array
    ) -> Tensor:
        ctx.save_for_backward(entries, gone, old)
        stream = x.index_select(0, cells).view(*shape, *x.shape[1:])
        if pending is not None:
            begin = stream[:, : pending.shape[1]]
            begin.copy_(torch.where(_like(old, begin), pending, begin))
        return stream

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        entries, gone, old = ctx.saved_tensors
        d_pending = None
        if old is not None:
            begin = gradient[:, : old.shape[1]]
            d_pending = torch.where(_like(old, begin), begin, 0)
        return _rows_at(gradient.flatten(0, 1), entries, gone), None, None, None, None, d_pending, None


class _OfCall(torch.autograd.Function):
    """Of streams ``[B, Q, ...]`` what stands for the tokens of the call ``[n, ...]``, 0 for those that are ``gone``.

    The gradient of pending tokens is 0, and that of masked ones any: the kernels do not look at it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, entries: Tensor, cells: Tensor, gone: Array, old: Array) -> Tensor:
        ctx.save_for_backward(cells, old)
        ctx.shape = x.shape
        return _rows_at(x.flatten(0, 1), entries, gone)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cells, old = ctx.saved_tensors
        stream = gradient.index_select(0, cells).view(ctx.shape)
        if old is not None:
            begin = stream[:, : old.shape[1]]
            begin.masked_fill_(_like(old, begin), 0)
        return stream, None, None, None, None


def _rows_at(x: Tensor, index: Tensor, blank: Array) -> Tensor:
    rows = x.index_select(0, index)
    return rows if blank is None else rows.masked_fill_(_like(blank, rows), 0)


def _like(flags: Tensor, x: Tensor) -> Tensor:
    """Flags of tokens as x has them."""
    return flags.view(*flags.shape, *[1] * (x.ndim - flags.ndim))
