"""The value table (SPEC.md §2 to §4): read and rewritten through the rows that a window touches, and no others.

A window is a run of tokens that read the same table; after it the chunk at its beginning may be written. One
``torch.autograd.Function`` walks all windows of a call. Its forward keeps the touched rows of each window; its
backward walks the windows in reverse with one gradient row for each row that the call touched. So neither time nor
memory depends on the number of slots, apart from the one copy of the table that a functional call makes.

T = B·n tokens of a window read K = H·k entries each, among P distinct rows.
"""

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fwpkm.backends.torch.entries import Entries, distinct, finite_rows
from fwpkm.backends.torch.tokens import maybe_any
from fwpkm.config import FwPKMConfig


class Window(NamedTuple):
    """Tokens [start, stop) of the concatenated windows; whether a chunk is written after them."""

    start: int
    stop: int
    writes: bool


def read_and_write(
    cfg: FwPKMConfig,
    values: Tensor,
    windows: list[Window],
    slots: Tensor,
    weights: Tensor,
    strength: Tensor,
    target: Tensor,
    counted: Tensor,
    active: Tensor,
    owned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read every window and write those that end a chunk, in order.

    Args:
        cfg: the configuration.
        values: ``[M, N, Dv]``.
        windows: runs of the n tokens.
        slots: ``[B, n, K]`` ids in [0, N), K = H·k.
        weights: ``[B, n, K]``.
        strength: ``[B, n]``: κ g of the tokens that have a pair, else 0.
        target: ``[B, n, Dv]``: u of the tokens that have a pair.
        counted: ``[B, n]`` bool: the tokens whose reads count in N_i.
        active: ``[len(windows), M]`` bool: the memories in which a window's chunk has a pair.
        owned: the table may be overwritten.

    Returns:
        reads ``[B, n, Dv]``, the table afterwards (``values`` itself where nothing is written), and ‖u - v̂‖²
        ``[B, n]`` of the written windows, without gradient.
    """
    reads, squared, written = _Table.apply(
        cfg, windows, values, weights, strength, target, slots, counted, active, owned
    )
    return reads, values if written is None else written, squared


class _Table(torch.autograd.Function):
    """``read_and_write``; its gradients are those of values, weights, strength and target."""

    @staticmethod
    def forward(ctx, cfg, windows, values, weights, strength, target, slots, counted, active, owned):
        batch, (memories, num_slots, width) = slots.shape[0], values.shape
        writes = any(window.writes for window in windows)
        if writes and owned and values.is_contiguous():
            ctx.mark_dirty(values)
        elif writes:
            values = values.clone(memory_format=torch.contiguous_format)
        table = values.reshape(-1, width)
        first_row = num_slots * torch.arange(memories, device=slots.device)
        slots = slots + first_row.expand(batch)[:, None, None]
        keep, kept = any(ctx.needs_input_grad), []
        reads, squared = weights.new_empty(*weights.shape[:2], width), weights.new_zeros(weights.shape[:2])
        for i, (start, stop, write) in enumerate(windows):
            rows, entries = distinct(slots[:, start:stop].flatten(0, 1))
            w, c, u, n = (x[:, start:stop].flatten(0, 1) for x in (weights, strength, target, counted))
            local = table.index_select(0, rows)
            read = entries.read(local, w)
            reads[:, start:stop] = read.view(batch, -1, width)
            written: list[Tensor] = []
            if write:
                error = read - u
                squared[:, start:stop] = error.square().sum(-1).view(batch, -1)
                count = entries.count(n)
                may_move = active[i].index_select(0, rows // num_slots) & (count > 0)
                new, *written = _rewrite(cfg, entries, local, error, c[:, None] * w, count, may_move)
                table.index_copy_(0, rows, new)
            if keep:
                kept.append((local, rows, *entries, *written))
        ctx.save_for_backward(*(kept and (weights, strength)), *(x for tensors in kept for x in tensors))
        ctx.cfg, ctx.windows, ctx.lengths, ctx.shape = cfg, windows, [len(x) for x in kept], values.shape
        ctx.mark_non_differentiable(squared)
        ctx.set_materialize_grads(False)
        return reads, squared, values if writes else None

    @staticmethod
    @once_differentiable
    def backward(ctx, d_reads, _, d_values):
        if d_reads is None and d_values is None:
            return (None,) * 10
        weights, strength, *saved = ctx.saved_tensors
        remaining = iter(saved)
        kept = [list(islice(remaining, length)) for length in ctx.lengths]
        dense = ctx.needs_input_grad[2]
        gradient, locate = _gradient_rows(weights, [rows for _, rows, *_ in kept], d_values, ctx.shape, dense)
        d_weights, d_strength = torch.zeros_like(weights), torch.zeros_like(strength)
        d_target = weights.new_zeros(*weights.shape[:2], ctx.shape[-1])
        reached = d_values is not None  # whether anything later has read the rows: until then their gradient is 0
        for (start, stop, write), (local, rows, *fields) in zip(reversed(ctx.windows), reversed(kept)):
            entries, written = Entries(*fields[:3]), fields[3:]
            w, c = (x[:, start:stop].flatten(0, 1) for x in (weights, strength))
            d_read = None if d_reads is None else d_reads[:, start:stop].flatten(0, 1)
            place, d_w, decay = locate(rows), torch.zeros_like(w), None
            if write and reached:
                decay, d_error, d_pull = _rewrite_backward(ctx.cfg, entries, gradient, place, c[:, None] * w, *written)
                d_w += c[:, None] * d_pull
                d_strength[:, start:stop] = (w * d_pull).sum(-1).view(len(weights), -1)
                d_target[:, start:stop] = d_error.neg().view(len(weights), stop - start, -1)
                d_read = d_error if d_read is None else d_read + d_error
            if d_read is not None:
                d_w += entries.dot(local, d_read)
                reached = True
                if dense or start > 0:  # else no window before this one reads what would be added
                    _add(gradient, place, entries.spread(d_read, w), decay, dense)
            d_weights[:, start:stop] = d_w.view(len(weights), stop - start, -1)
        d_table = gradient.view(ctx.shape) if ctx.needs_input_grad[2] else None
        return None, None, d_table, d_weights, d_strength, d_target, None, None, None, None


def _rewrite(
    cfg: FwPKMConfig, entries: Entries, local: Tensor, error: Tensor, pull: Tensor, count: Tensor, may_move: Tensor
) -> tuple[Tensor, ...]:
    """The rows after a write, rows - η (clip(G) + λ rows), and what its backward needs.

    Args:
        cfg: the configuration.
        entries: which of the rows each token reads.
        local: ``[P, Dv]`` rows before the write.
        error: ``[T, Dv]``, v̂ - u.
        pull: ``[T, K]``, κ g w of each entry.
        count: ``[P]``, N_i.
        may_move: ``[P]`` bool: read by a counted token, in a memory where the chunk has a pair.

    Returns:
        the new rows ``[P, Dv]``, the error (0 where it is not finite), η / N_i of the rows that moved (else 0), and,
        where gradients are clipped, which elements were not.
    """
    share = count.clamp(min=1).to(local.dtype).reciprocal_()
    gradient = entries.spread(error, pull * share[entries.place])
    unclipped: tuple[Tensor, ...] = ()
    if cfg.grad_clip is not None:
        unclipped = (gradient.abs() <= cfg.grad_clip,)
        gradient = gradient.clamp_(-cfg.grad_clip, cfg.grad_clip)
    if cfg.weight_decay:
        gradient = gradient.add_(local, alpha=cfg.weight_decay)
    new = gradient.mul_(-cfg.learning_rate).add_(local)
    moves = may_move & finite_rows(new)
    if not moves.is_meta and maybe_any(~moves):
        new[~moves] = local[~moves]
    wild = ~finite_rows(error)
    if maybe_any(wild):
        error = error.masked_fill(wild[:, None], 0)
    return new, error, (cfg.learning_rate * share).masked_fill_(~moves, 0), *unclipped


def _rewrite_backward(
    cfg: FwPKMConfig,
    entries: Entries,
    gradient: Tensor,
    place: Tensor,
    pull: Tensor,
    error: Tensor,
    step: Tensor,
    unclipped: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Through one write, from the gradient of the rows after it, which lies at ``place`` [P] of ``gradient``.

    Returns:
        what decay adds to the gradient of the rows before (or None), and the gradients of error and pull.
    """
    rows, among = gradient, entries
    if unclipped is None:  # read the large table where it lies
        among = entries._replace(place=place[entries.place])
    else:
        rows = gradient.index_select(0, place) * unclipped
    step_of = step[entries.place]
    d_error = among.read(rows, -pull * step_of)
    # An error near the largest number may overflow here; an entry that does not pull must not turn that into NaN.
    d_pull = torch.where(step_of == 0, 0, among.dot(rows, error) * -step_of).nan_to_num_()
    if not cfg.weight_decay:
        return None, d_error, d_pull
    decay = (step != 0).to(rows.dtype) * (-cfg.learning_rate * cfg.weight_decay)
    return gradient.index_select(0, place) * decay[:, None], d_error, d_pull


def _gradient_rows(
    like: Tensor, touched: list[Tensor], d_values: Tensor | None, shape: torch.Size, dense: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The table's gradient as far as it is needed, and where in it a table row lies.

    That is the whole table where its own gradient is asked for; else the rows ``touched`` by any window; and without a
    gradient from after the call only those that two windows touched, since one passes on what another receives. Rows
    that have no place lie at the last one, which stays zero.
    """
    if dense:
        whole = like.new_zeros(shape) if d_values is None else d_values.clone(memory_format=torch.contiguous_format)
        return whole.view(-1, shape[-1]), lambda rows: rows
    ids, windows = torch.cat(touched).unique(return_counts=True)
    if d_values is None:
        ids = ids[windows > 1]
        gradient = like.new_zeros(len(ids) + 1, shape[-1])
    else:
        gradient = torch.cat([d_values.reshape(-1, shape[-1]).index_select(0, ids), like.new_zeros(1, shape[-1])])

    def locate(rows: Tensor) -> Tensor:
        place = torch.searchsorted(ids, rows)
        found = torch.cat([ids, ids.new_full((1,), -1)]).index_select(0, place) == rows
        return place.masked_fill_(~found, len(ids))

    return gradient, locate


def _add(gradient: Tensor, place: Tensor, delta: Tensor, decay: Tensor | None, dense: bool) -> None:
    """Add to the gradient what a window gives back to its rows."""
    if decay is not None:
        delta = delta.add_(decay)
    if not dense:
        kept = (place < len(gradient) - 1).nonzero().squeeze(1)
        place, delta = place.index_select(0, kept), delta.index_select(0, kept)
    gradient.index_add_(0, place, delta)
