"""The value table (SPEC.md §2 to §4): read and rewritten through the rows that a window touches, and no others.

One ``torch.autograd.Function`` walks all windows of a call. Its forward keeps the touched rows of each window; its
backward walks the windows in reverse with one gradient row for each row that the call touched. So neither time nor
memory depends on the number of slots, apart from the one copy of the table that a functional call makes.

T = B·n tokens of a window read K = H·k entries each, among P distinct rows. Row ``row_index[t, j]`` of a table
``[P, D]`` is entry j of token t. ``read`` and ``scatter_add`` are adjoints, and both are one fused kernel
(embedding_bag): no ``[T, K, D]`` is ever formed, and sums run in a fixed order.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fwpkm import schedule
from fwpkm.backends.torch.column_parallel import Columns
from fwpkm.backends.torch.derivatives import first_only
from fwpkm.backends.torch.tokens import finite_rows, maybe_any
from fwpkm.config import FwPKMConfig
from fwpkm.rules import learning_rates
from fwpkm.tokens import Array


class Entries(NamedTuple):
    """T·K entries by token, and sorted by row."""

    row_index: Tensor
    """``[T, K]`` the row of each entry."""
    order: Tensor
    """``[T*K]`` entries sorted by row, those of one row in the order of the tokens."""
    starts: Tensor
    """``[P]`` where each row's entries begin in ``order``."""

    @classmethod
    def of(cls, row_index: Tensor, num_rows: int) -> "Entries":
        """Entries in a table of ``num_rows`` rows."""
        flat = row_index.flatten()
        sizes = flat.new_zeros(num_rows).scatter_add_(0, flat, torch.ones_like(flat))
        return cls(row_index, flat.sort(stable=True).indices, sizes.cumsum(0) - sizes)

    @classmethod
    def among_distinct(cls, rows: Tensor) -> tuple[Tensor, "Entries"]:
        """The distinct rows [P], ascending, that entries ``rows`` [T, K] touch, and the entries among them.

        P is not known beforehand, so an accelerator is waited for; on the meta device it is taken as T*K.
        """
        ids, order = rows.flatten().sort(stable=True)
        is_first = F.pad(ids[1:] != ids[:-1], (1, 0), value=True)
        starts = torch.arange(len(ids), device="meta") if rows.is_meta else is_first.nonzero().squeeze(1)
        row_index = torch.empty_like(ids).scatter_(0, order, is_first.cumsum(0) - 1)
        return ids.index_select(0, starts), cls(row_index.view_as(rows), order, starts)

    def count(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """``[P]``: how many entries of the chosen tokens (bool [T]) each row has."""
        entries = tokens.long()[:, None].expand_as(self.row_index)
        return torch.zeros_like(self.starts).scatter_add_(0, self.row_index.flatten(), entries.flatten())

    def total(self, weights: Tensor) -> Tensor:
        """``[P]``: the sum of each row's weights."""
        return weights.new_zeros(len(self.starts)).index_add_(0, self.row_index.flatten(), weights.flatten())

    def read(self, rows: Tensor, weights: Tensor) -> Tensor:
        """v̂ = Σ w · row over a token's entries (§2) ``[T, D]``; rows [P, D], weights [T, K]."""
        return F.embedding_bag(self.row_index, rows, mode="sum", per_sample_weights=weights)

    def scatter_add(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """``[P, D]``: Σ over a row's entries of weight · token; tokens [T, D], weights [T, K]."""
        token = self.order.div(self.row_index.shape[1], rounding_mode="floor")
        in_order = weights.flatten().index_select(0, self.order)
        return F.embedding_bag(token, tokens, self.starts, mode="sum", per_sample_weights=in_order)

    def by_row(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """``[P, D]``: Σ over a row's entries of weight · the entry's own vector; vectors [T*K, D], weights [T, K]."""
        in_order = weights.flatten().index_select(0, self.order)
        return F.embedding_bag(self.order, vectors, self.starts, mode="sum", per_sample_weights=in_order)

    def by_token(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """``[T, D]``: Σ over a token's entries of weight · the entry's own vector; vectors [T*K, D], weights [T, K]."""
        entry = torch.arange(len(vectors), device=vectors.device).view_as(weights)
        return F.embedding_bag(entry, vectors, mode="sum", per_sample_weights=weights)

    def dot(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """``[T, K]``: ⟨row, token⟩ of each entry, the gradient of ``read`` for its weights."""
        return torch.stack([rows.index_select(0, i).mul_(tokens).sum(-1) for i in self.row_index.unbind(1)], dim=1)


def read_and_write(
    cfg: FwPKMConfig,
    values: Tensor,
    spans: list[schedule.Window],
    slots: Tensor,
    weights: Tensor,
    strength: Tensor,
    target: Tensor,
    forget: Tensor | None,
    counted: Tensor,
    active: Tensor,
    uses: Tensor | None,
    initial_values: Tensor | None,
    owned: bool,
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read every window and write those that end a chunk, in order.

    Args:
        cfg: the configuration.
        values: ``[M, N, Dv]``.
        spans: the windows, counted from the first of the T tokens of all.
        slots: ``[T, K]`` ids in [0, M·N), K = H·k.
        weights: ``[T, K]``.
        strength: ``[T]``: κ g of the tokens that have a pair, else 0.
        target: ``[T, Dv]``: u of the tokens that have a pair.
        forget: ``[T]``: f of the tokens that count, else 0; None where no row is forgotten.
        counted: ``[T]`` bool: the tokens whose reads count in N_i.
        active: ``[len(spans), M]`` bool: the memories in which a window's chunk has a pair.
        uses: ``[M, N]``, contiguous: U of each slot, overwritten with what the writes make of it; None where they do
            not weigh it.
        initial_values: ``[1, N, Dv]`` that rows decay to; None where they do not.
        owned: the table may be overwritten.
        columns: of which these are one rank's, where the table does not lie whole.

    Returns:
        reads ``[T, Dv]``, the table afterwards (``values`` itself where nothing is written), and ‖u - v̂‖² ``[T]`` of
        the written windows, without gradient.
    """
    reads, squared, written = _Table.apply(
        cfg, spans, values, weights, strength, target, forget, slots, counted, active, uses, initial_values, owned,
        columns,
    )  # fmt: skip
    return reads, values if written is None else written, squared


class _Residuals(NamedTuple):
    """What the backward of one window needs; the last five are None where nothing is written."""

    rows: Tensor
    """``[P]`` ids of the rows that it touched."""
    before: Tensor
    """``[P, Dv]``: as they were read."""
    row_index: Tensor
    order: Tensor
    starts: Tensor
    error: Array
    """``[T, Dv]``: v̂ - u, 0 where it is not finite."""
    rate: Array
    """``[P]``: η_i / N_i of the rows that moved, else 0."""
    decay: Array
    """``[P]``: η_i (λ + λ⁰) + F_i of the rows that moved, else 0; None where nothing decays or is forgotten."""
    unclipped: Array
    """``[P, Dv]``: which elements were not clipped, None where none can be."""
    fraction: Array
    """``[P]``: 1 / N_i of the rows that moved, else 0; None where no row is forgotten."""

    @property
    def entries(self) -> Entries:
        """Which of the rows each token read."""
        return Entries(self.row_index, self.order, self.starts)


class _Table(torch.autograd.Function):
    """``read_and_write``; its gradients are those of values, weights, strength, target and forget."""

    @staticmethod
    def forward(
        ctx, cfg, spans, values, weights, strength, target, forget, slots, counted, active, uses, initial_values,
        owned, columns,
    ):  # fmt: skip
        _, num_slots, width = values.shape
        writes = any(span.writes for span in spans)
        if writes and owned and values.is_contiguous():
            ctx.mark_dirty(values)
        elif writes:
            values = values.clone(memory_format=torch.contiguous_format)
        table = values.reshape(-1, width)
        keep, residuals = any(ctx.needs_input_grad), []
        reads, squared = weights.new_empty(len(weights), width), weights.new_zeros(len(weights))
        for i, (start, stop, write) in enumerate(spans):
            rows, entries = Entries.among_distinct(slots[start:stop])
            w, c, u, n = (x[start:stop] for x in (weights, strength, target, counted))
            before = table.index_select(0, rows)
            read = entries.read(before, w)
            error = rate = decay = unclipped = fraction = None
            reads[start:stop] = read
            if write:
                error = read - u
                squared[start:stop] = error.square().sum(-1)
                count = entries.count(n)
                moves = active[i].index_select(0, rows // num_slots) & (count > 0)
                rates = None if uses is None else _use(cfg, uses, rows, count, moves)
                f = None if forget is None else forget[start:stop]
                initial = None if initial_values is None else initial_values[0].index_select(0, rows % num_slots)
                after, error, rate, decay, unclipped, fraction = _write(
                    cfg, entries, before, initial, error, c[:, None] * w, f, count, moves, rates, columns
                )
                table.index_copy_(0, rows, after)
            if keep:
                residuals.append(_Residuals(rows, before, *entries, error, rate, decay, unclipped, fraction))
        ctx.save_for_backward(
            *(residuals and (weights, strength, counted)), *(x for window in residuals for x in window)
        )
        ctx.cfg, ctx.spans, ctx.shape = cfg, spans, values.shape
        ctx.mark_non_differentiable(squared)
        ctx.set_materialize_grads(False)
        return reads, squared, values if writes else None

    @staticmethod
    @first_only
    def backward(ctx, d_reads, _, d_values):
        if d_reads is None and d_values is None:
            return (None,) * 14
        weights, strength, counted, *saved = ctx.saved_tensors
        residuals = [_Residuals(*fields) for fields in zip(*[iter(saved)] * len(_Residuals._fields))]
        dense = ctx.needs_input_grad[2]
        gradient, locate = _gradient_rows(weights, [window.rows for window in residuals], d_values, ctx.shape, dense)
        d_weights, d_strength = torch.zeros_like(weights), torch.zeros_like(strength)
        d_target, d_forget = weights.new_zeros(len(weights), ctx.shape[-1]), None
        if ctx.needs_input_grad[6]:
            d_forget = torch.zeros_like(strength)
        reached = d_values is not None  # whether anything later has read the rows: until then their gradient is 0
        for (start, stop, write), window in zip(reversed(ctx.spans), reversed(residuals)):
            w, c = (x[start:stop] for x in (weights, strength))
            d_read = None if d_reads is None else d_reads[start:stop]
            at, d_w, decay = locate(window.rows), torch.zeros_like(w), None
            if write and reached:
                decay, d_error, d_coefficient = _write_backward(ctx.cfg, window, gradient, at, c[:, None] * w)
                d_w += c[:, None] * d_coefficient
                d_strength[start:stop] = (w * d_coefficient).sum(-1)
                d_target[start:stop] = d_error.neg()
                if d_forget is not None:
                    d_forgotten = (gradient.index_select(0, at) * window.before).sum(-1) * -window.fraction
                    d_forget[start:stop] = d_forgotten[window.row_index].sum(-1).masked_fill(~counted[start:stop], 0)
                d_read = d_error if d_read is None else d_read + d_error
            if d_read is not None:
                d_w += window.entries.dot(window.before, d_read)
                reached = True
                if dense or start > 0:  # else no window before this one reads what would be added
                    _add(gradient, at, window.entries.scatter_add(d_read, w), decay, dense)
            d_weights[start:stop] = d_w
        d_table = gradient.view(ctx.shape) if ctx.needs_input_grad[2] else None
        return None, None, d_table, d_weights, d_strength, d_target, d_forget, *[None] * 7


def value_gradient(entries: Entries, error: Tensor, coefficient: Tensor, inverse_count: Tensor) -> Tensor:
    """G_i = (1/N_i) Σ κ g w (v̂ - u) over a row's entries (§4) ``[P, Dv]``.

    Args:
        entries: which of the rows each token reads.
        error: ``[T, Dv]``, v̂ - u.
        coefficient: ``[T, K]``, κ g w of each entry.
        inverse_count: ``[P]``, 1 / N_i.
    """
    return entries.scatter_add(error, coefficient * inverse_count[entries.row_index])


def _use(cfg: FwPKMConfig, uses: Tensor, rows: Tensor, count: Tensor, moves: Tensor) -> Tensor:
    """η_i of a write's rows ``[P]``, whose N_i = ``count`` is then added to U_i; arguments as of ``_write``.

    A row counts as used though its new value may turn out not to be finite.
    """
    uses, count = uses.view(-1), count.to(uses.dtype)
    before = uses.index_select(0, rows)
    uses.index_copy_(0, rows, torch.where(moves, before + count, before))
    return learning_rates(cfg, count.clamp(min=1), before)


def _write(
    cfg: FwPKMConfig,
    entries: Entries,
    before: Tensor,
    initial: Tensor | None,
    error: Tensor,
    coefficient: Tensor,
    forget: Tensor | None,
    count: Tensor,
    moves: Tensor,
    rates: Tensor | None,
    columns: Columns | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The rows after a write ``[P, Dv]``, then error, rate, decay, unclipped and fraction of ``_Residuals``.

    ``before`` [P, Dv] are the rows, ``initial`` those that they decay to or None, ``forget`` [T] is f of the tokens
    that count or None, ``count`` [P] is N_i, ``rates`` [P] are η_i or None where all are η, and ``moves`` [P] tells the
    rows that a counted token reads in a memory where the chunk has a pair; ``value_gradient`` explains the rest.
    """
    inverse_count = count.clamp(min=1).to(before.dtype).reciprocal_()
    gradient = value_gradient(entries, error, coefficient, inverse_count)
    unclipped = None if cfg.grad_clip is None else gradient.abs() <= cfg.grad_clip
    after = _step_in_place(cfg, before, initial, gradient, rates)
    forgotten = None
    if forget is not None:  # F_i, the mean of f over the reads that count
        forgotten = entries.total(forget[:, None].expand_as(coefficient)) * inverse_count
        after = after.addcmul_(forgotten[:, None], before, value=-1)
    finite = finite_rows(after)
    moves = moves & (finite if columns is None else columns.on_all(finite))
    if not moves.is_meta and maybe_any(~moves):
        after[~moves] = before[~moves]
    nonfinite = ~finite_rows(error)
    if maybe_any(nonfinite):
        error = error.masked_fill(nonfinite[:, None], 0)
    fraction = None if forget is None else inverse_count.masked_fill(~moves, 0)
    rate = inverse_count.mul_(cfg.learning_rate if rates is None else rates).masked_fill_(~moves, 0)
    decay = None
    if cfg.weight_decay + cfg.initial_decay:
        decay = rate.new_full((), cfg.learning_rate) if rates is None else rates
        decay = decay * (cfg.weight_decay + cfg.initial_decay) * moves
    if forgotten is not None:
        decay = forgotten * moves if decay is None else decay + forgotten * moves
    return after, error, rate, decay, unclipped, fraction


def _step_in_place(
    cfg: FwPKMConfig, rows: Tensor, initial: Tensor | None, gradient: Tensor, rates: Tensor | None
) -> Tensor:
    """``fwpkm.rules.step``, and the decay to ``initial`` rows, overwriting the gradient.

    A third of the time, since a chunk touches many rows.
    """
    if cfg.grad_clip is not None:
        gradient = gradient.clamp_(-cfg.grad_clip, cfg.grad_clip)
    if cfg.weight_decay:
        gradient = gradient.add_(rows, alpha=cfg.weight_decay)
    if initial is not None:
        gradient = gradient.add_(rows - initial, alpha=cfg.initial_decay)
    return gradient.mul_(-cfg.learning_rate if rates is None else -rates[:, None]).add_(rows)


def _write_backward(
    cfg: FwPKMConfig, window: _Residuals, gradient: Tensor, at: Tensor, coefficient: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Through one write, from the gradient of the rows after it, which lies at ``at`` [P] of ``gradient``.

    Returns:
        what decay adds to the gradient of the rows before (or None), and the gradients of error and coefficient.
    """
    rows, entries = gradient, window.entries
    rate = window.rate[entries.row_index]
    if window.unclipped is None:  # read the large table where it lies
        entries = entries._replace(row_index=at[entries.row_index])
    else:
        rows = gradient.index_select(0, at) * window.unclipped
    d_error = entries.read(rows, -coefficient * rate)
    # An error near the largest number may overflow here; an entry that moves no row must not turn that into NaN.
    d_coefficient = torch.where(rate == 0, 0, entries.dot(rows, window.error) * -rate).nan_to_num_()
    if window.decay is None:
        return None, d_error, d_coefficient
    return gradient.index_select(0, at) * -window.decay[:, None], d_error, d_coefficient


def _gradient_rows(
    like: Tensor, touched: list[Tensor], d_values: Tensor | None, shape: torch.Size, dense: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The table's gradient as far as it is needed, and where in it a table row lies.

    That is the whole table where its own gradient is asked for; else the rows ``touched`` by any window; and without a
    gradient from after the call only those that two windows touched, since one passes on what another receives. Rows
    that are not in it lie at its last one, which stays zero.
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
        at = torch.searchsorted(ids, rows)
        found = torch.cat([ids, ids.new_full((1,), -1)]).index_select(0, at) == rows
        return at.masked_fill_(~found, len(ids))

    return gradient, locate


def _add(gradient: Tensor, at: Tensor, delta: Tensor, decay: Tensor | None, dense: bool) -> None:
    """Add to the gradient what a window gives back to its rows."""
    if decay is not None:
        delta = delta.add_(decay)
    if not dense:
        found = (at < len(gradient) - 1).nonzero().squeeze(1)
        at, delta = at.index_select(0, found), delta.index_select(0, found)
    gradient.index_add_(0, at, delta)
