"""Rows at positions of their own, masked or packed, as one rectangle that the kernels read (SPEC.md §5).

Every stream, a row's pending tokens and then its new unmasked ones, begins at a chunk's start. So streams that are
moved to the left, and padded to the longest, are rows at position 0 for the kernels: they read all alike, and a chunk
that a row has not completed is written by none of its tokens, as none of them may be bound. Nothing here waits for the
device.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fwpkm import schedule
from fwpkm.backends.torch.tokens import filled
from fwpkm.config import FwPKMConfig
from fwpkm.tokens import Array, Tokens


class LeftAligned(NamedTuple):
    """The streams of a call."""

    tokens: Tokens
    """``[B, Q, ...]``, mask False past a stream's end."""
    pair: Tensor
    """``[B, Q]`` bool: the tokens that a write of this call may bind."""
    entries: Tensor
    """``[n]``: where in ``B·Q`` each token of the call stands; B·Q for masked ones."""
    cells: Tensor
    """``[B·Q]``: the inverse, n where no token of the call stands."""
    num_new: Tensor
    """``[B]`` int64: the unmasked tokens of the call."""
    due: Tensor
    """``[B]`` int64: the chunks that they complete."""
    lengths: Tensor
    """``[B]`` int64: of the streams."""

    def left(self, cfg: FwPKMConfig, dead: Tensor) -> Tokens:
        """What is pending afterwards ``[B, P, ...]``; ``dead`` [B, Q] are the tokens that are not finite."""
        batch, longest = self.pair.shape
        at = torch.arange(longest, device=dead.device)
        first = (self.due * cfg.chunk_size)[:, None]
        row = torch.arange(batch, device=dead.device)[:, None]
        kept = (at >= first) & (at < self.lengths[:, None]) & ~dead
        entries = torch.where(kept, row * cfg.capacity + at - first, batch * cfg.capacity).flatten()
        cells = entries.new_full((batch * cfg.capacity + 1,), batch * longest)
        cells = cells.scatter_(0, entries, torch.arange(batch * longest, device=dead.device))[:-1]

        def kept_of(x: Tensor) -> Tensor:
            return moved(x.flatten(0, 1), cells, entries).view(batch, cfg.capacity, *x.shape[2:])

        left = filled(torch.float32, self.tokens.map(kept_of))
        return left if self.tokens.gate is not None else left._replace(gate=left.mask.to(left.gate.dtype))


def left_align(
    cfg: FwPKMConfig, pending: Tokens | None, num_pending: Tensor, inputs: Tokens, cu_seqlens: Array, longest: int
) -> LeftAligned:
    """Move the streams of a call to the left.

    Args:
        cfg: the configuration.
        pending: ``[B, P, ...]``, or None where nothing is pending.
        num_pending: ``[B]``, where the tokens lie.
        inputs: those of the call.
        cu_seqlens: ``[B+1]`` where the tokens lie, or None.
        longest: Q, at least the length of every stream.
    """
    device, batch = inputs.query.device, len(num_pending)
    there = inputs.query.new_ones(inputs.query.shape[:2], dtype=torch.bool) if inputs.mask is None else inputs.mask
    row, rank, there, num_new = _ranks(there, cu_seqlens, batch)
    num_tokens, end = there.numel(), batch * longest
    entries = torch.where(there, row * longest + num_pending[row] + rank, end)
    cells = entries.new_full((end + 1,), num_tokens)
    cells = cells.scatter_(0, entries, torch.arange(num_tokens, device=device))[:end]
    flat = inputs._replace(mask=None).map(lambda x: x.flatten(0, 1))
    tokens = flat.map(lambda x: moved(x, cells, entries).view(batch, longest, *x.shape[1:]))
    at = torch.arange(longest, device=device)
    lengths = num_pending + num_new
    tokens = tokens._replace(mask=at < lengths[:, None])
    if pending is not None:
        tokens = _after(tokens, pending, num_pending)
    due = schedule.written(cfg, lengths)
    pair = at < (due * cfg.chunk_size + schedule.lag(cfg))[:, None]
    return LeftAligned(tokens, pair, entries, cells, num_new, due, lengths)


def _ranks(there: Tensor, cu_seqlens: Array, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of flat tokens: their row, their number in it, and whether they are there, unmasked; and how many are ``[B]``."""
    if cu_seqlens is None:
        rank = there.long().cumsum(1) - 1
        row = torch.arange(batch, device=there.device)[:, None].expand_as(there)
        return row.flatten(), rank.flatten(), there.flatten(), rank[:, -1] + 1
    ends, there = cu_seqlens.long(), there.flatten()
    at = torch.arange(len(there), device=there.device)
    row = torch.searchsorted(ends[1:], at, right=True)
    there = there & (row < batch)
    before = torch.nn.functional.pad(there.long().cumsum(0), (1, 0))
    first = before[ends]
    return row.clamp(max=batch - 1), before[:-1] - first[:-1][row.clamp(max=batch - 1)], there, first.diff()


def _after(tokens: Tokens, pending: Tokens, num_pending: Tensor) -> Tokens:
    """Streams ``[B, Q, ...]`` whose first entries, that are empty so far, are the pending tokens ``[B, P, ...]``."""
    tokens, width = filled(torch.float32, tokens), min(pending.length, tokens.length)
    pending = filled(torch.float32, pending).slice(0, width)
    old = torch.arange(width, device=num_pending.device) < num_pending[:, None]

    def join(new: Tensor, before: Tensor) -> Tensor:
        flags = old.view(*old.shape, *[1] * (new.ndim - 2))
        return torch.cat([torch.where(flags, before, new[:, :width]), new[:, width:]], dim=1)

    return Tokens(*map(join, tokens, pending))


class _Moved(torch.autograd.Function):
    """Rows of ``x`` at ``index``, zeros past its last; ``inverse`` is the same of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows_at(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _rows_at(gradient, inverse), None, None


moved = _Moved.apply


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    rows = x.index_select(0, index.clamp(max=len(x) - 1))
    return rows.masked_fill_((index == len(x)).view(-1, *[1] * (x.ndim - 1)), 0)
