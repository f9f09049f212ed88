"""The streams of a call: for each row its pending tokens, then its new ones that are not masked (SPEC.md §5).

A stream begins at a chunk's start, whatever the row's position: write j of a row covers the tokens [jC, (j+1)C + lag)
of its stream, and what no write covers is read afterwards. ``Aligned`` is for rows at one position without a mask: its
parts are slices. ``Ragged`` is for every other call: it finds each part by an index, and a write takes just the rows
that are due, so padding is neither read nor written.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fwpkm import schedule
from fwpkm.backends.torch.tokens import filled, join, maybe_any, pad, without
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State
from fwpkm.tokens import Array, Tokens


class Part(NamedTuple):
    """Tokens of some rows that read the same tables."""

    tokens: Tokens
    """``[r, n, ...]``"""
    writes: bool
    """A chunk is written after them."""
    rows: Array = None
    """``[r]`` ids of the rows; None is all."""
    cells: Array = None
    """``[r, n]``: where in ``Ragged`` they come from."""
    first_new: int = 0
    """Of ``Aligned``: the tokens before it are read again, only to be written."""


class Aligned:
    """Rows at one position, and the tokens of a call as they are."""

    def __init__(self, cfg: FwPKMConfig, pending: Tokens, tokens: Tokens, runs: Iterable[schedule.Window]):
        """``pending`` [B, p, ...] are valid entries alone; ``runs`` the schedule of the tokens [B, T, ...]."""
        self.cfg, self.pending, self.tokens, self.runs = cfg, pending, tokens, runs
        self.parts: list[Part] = []

    def __iter__(self) -> Iterator[Part]:
        """The parts in order; each is to be noted before the next one is asked for."""
        for start, stop, writes in self.runs:
            new = self.tokens.slice(start, stop)
            # The chunk's earlier tokens are read again, now to write them.
            part = Part(join(self.pending, new), True, first_new=self.pending.length) if writes else Part(new, False)
            self.parts.append(part)
            yield part

    def note(self, part: Part, tokens: Tokens, dead: Tensor) -> None:
        """Take back a part's tokens, the dead ones blanked; in batch scope the masked ones are stored as zeros too."""
        tokens = without(tokens, ~tokens.mask) if self.cfg.memory_scope == "batch" else tokens
        self.pending = tokens.slice(self.cfg.chunk_size, None) if part.writes else join(self.pending, tokens)

    def position(self, before: Tensor) -> Tensor:
        """``[B]``: where the rows stand afterwards."""
        return schedule.reduced(self.cfg, before) + self.tokens.length

    def left(self) -> Tokens:
        """What is pending afterwards ``[B, P, ...]``."""
        return pad(self.pending, self.cfg.capacity)

    def writes(self, memories: int) -> Tensor:
        """``[M]`` int32: the chunks that each memory completed."""
        return torch.full((memories,), sum(part.writes for part in self.parts), dtype=torch.int32)

    def of_call(self, arrays: list[Tensor]) -> Tensor:
        """Arrays of the parts ``[B, n, ...]`` as one of the call's tokens ``[B, T, ...]``."""
        return torch.cat([x[:, part.first_new :] for x, part in zip(arrays, self.parts)], dim=1)


class Ragged:
    """Rows at positions of their own, under a mask or packed.

    Cells are the pending tokens ``[B*P]``, then those of the call, then one that is empty.
    """

    def __init__(
        self, cfg: FwPKMConfig, pending: Tokens, num_pending: list[int], tokens: Tokens, ends: Tensor, update: bool
    ):
        """See the arguments of ``windows``: ``ends`` [B+1] bound the rows among the flat tokens of the call."""
        self.cfg, self.shape, self.update = cfg, tokens.mask.shape, update
        self.device, batch = tokens.query.device, len(num_pending)
        new = tokens.mask.flatten().nonzero().squeeze(1)
        first_new = torch.searchsorted(new, ends.to(new))
        num_new = first_new.diff()
        self.num_pending = torch.tensor(num_pending if update else [0] * batch)
        self.first_call = batch * pending.length if update else 0  # cell
        of_call = tokens.map(lambda x: F.pad(x.flatten(0, 1), (0, 0) * (x.ndim - 2) + (0, 1)))
        self.source = of_call
        if update:
            self.source = Tokens(*(torch.cat([x.flatten(0, 1), y]) for x, y in zip(pending, of_call)))
        self.empty = self.first_call + tokens.mask.numel()
        lengths = self.num_pending + num_new.cpu()
        due = schedule.written(cfg, lengths) if update else torch.zeros_like(lengths)
        self.lengths, self.due = lengths, due
        # The cells of every stream, one after the other.
        self.first = self._put(lengths.cumsum(0) - lengths)
        num_pending_here = self._put(self.num_pending)
        self.stream = new.new_empty(int(lengths.sum()))
        row, within = _count_up(num_pending_here)
        self.stream[self.first[row] + within] = row * pending.length + within
        row, within = _count_up(num_new)
        self.stream[self.first[row] + num_pending_here[row] + within] = self.first_call + new[: len(row)]
        self.dead = torch.zeros(self.empty + 1, dtype=torch.bool, device=self.device)
        self.parts: list[Part] = []

    def _put(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def __iter__(self) -> Iterator[Part]:
        """The parts in order; each is to be noted before the next one is asked for."""
        chunk, lag = self.cfg.chunk_size, schedule.lag(self.cfg)
        for j in range(int(self.due.max())):
            rows = (self.due > j).nonzero().squeeze(1)
            start = torch.full_like(rows, j * chunk)
            yield self._part(rows, start, start + chunk + lag, True)
        read = torch.maximum(self.num_pending, torch.where(self.due > 0, self.due * chunk + lag, 0))
        unread = (self.lengths - read).clamp(min=0)
        # Rows of like lengths together, or one long row would pad all others to its length.
        longest = int(unread.max())
        while longest:
            rows = ((unread <= longest) & (unread > longest // 2)).nonzero().squeeze(1)
            if len(rows):
                yield self._part(rows, read[rows], self.lengths[rows], False)
            longest //= 2

    def _part(self, rows: Tensor, start: Tensor, stop: Tensor, writes: bool) -> Part:
        """The tokens [start, stop) of the streams of some rows; all arguments on the CPU."""
        every = len(rows) == len(self.lengths)
        cells = self.cells(rows, start, stop, int((stop - start).max()))
        part = Part(self._tokens(cells), writes, None if every else self._put(rows), cells)
        self.parts.append(part)
        return part

    def cells(self, rows: Tensor, start: Tensor, stop: Tensor, length: int) -> Tensor:
        """``[r, length]``: of the tokens of some streams from ``start`` on, the empty one from ``stop`` on."""
        at = self._put(start)[:, None] + torch.arange(length, device=self.device)
        if not len(self.stream):
            return torch.full_like(at, self.empty)
        inside = at < self._put(stop)[:, None]
        found = self.stream[(self.first[self._put(rows)][:, None] + at).clamp(max=len(self.stream) - 1)]
        return torch.where(inside, found, self.empty)

    def _tokens(self, cells: Tensor) -> Tokens:
        flat = cells.flatten()
        tokens = self.source.map(lambda x: x.index_select(0, flat).view(*cells.shape, *x.shape[1:]))
        return without(tokens, self.dead[cells])

    def note(self, part: Part, tokens: Tokens, dead: Tensor) -> None:
        """Remember which of a part's tokens are dead: that is decided when they are read first."""
        if maybe_any(dead):
            self.dead[part.cells] |= dead & (part.cells != self.empty)

    def position(self, before: Tensor) -> Tensor:
        """``[B]``: where the rows stand afterwards."""
        return schedule.reduced(self.cfg, before) + (self.lengths - self.num_pending).to(before)

    def left(self) -> Tokens:
        """What is pending afterwards ``[B, P, ...]``."""
        rows = torch.arange(len(self.lengths))
        cells = self.cells(rows, self.due * self.cfg.chunk_size, self.lengths, self.cfg.capacity)
        return self._tokens(cells)

    def writes(self, memories: int) -> Tensor:
        """``[M]`` int32: the chunks that each memory completed."""
        return self.due.int()

    def of_call(self, arrays: list[Tensor]) -> Tensor:
        """Arrays of the parts ``[r, n, ...]`` as one of the call's tokens ``[B, T, ...]``, 0 for masked ones."""
        flat = [x.flatten(0, 1) for x in arrays]
        entries = torch.cat([*flat, flat[0].new_zeros(1, *flat[0].shape[1:])])
        return entries.index_select(0, self._entry_of_token()).view(*self.shape, *entries.shape[1:])

    def _entry_of_token(self) -> Tensor:
        """``[B*T]``: which entry of all parts was the first read of each token of the call; one past them if none."""
        cells = torch.cat([part.cells.flatten() for part in self.parts])
        entry = torch.full_like(self.dead, len(cells), dtype=torch.long)
        # Under wait a chunk's first tokens are read again by its write: the first entry is the read.
        at = torch.arange(len(cells), device=self.device)
        entry.scatter_reduce_(0, cells, at, "amin")
        return entry[self.first_call : self.empty]


Streams: TypeAlias = Aligned | Ragged


def is_legal(cu_seqlens: Tensor, length: int) -> Tensor:
    """Whether these are where sequences begin and end among T tokens (SPEC.md §5), for offsets that are traced."""
    return (cu_seqlens[0] == 0) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all() & (cu_seqlens[-1] <= length)


def together(cfg: FwPKMConfig, positions: list[int] | None, mask: Array, cu_seqlens: Array) -> bool:
    """Whether the host can tell that all rows go through a call alike; it may not know their positions."""
    if positions is None or len(set(positions)) > 1:
        return False
    return cfg.memory_scope == "batch" or (mask is None and cu_seqlens is None)


def streams_of(
    cfg: FwPKMConfig, state: State, tokens: Tokens, mask: Array, cu_seqlens: Array, update: bool, dtype: torch.dtype
) -> Streams:
    """The streams of a call: slices where rows are known to be equal, else found by an index.

    Args:
        cfg: the configuration.
        state: where the rows stand.
        tokens: those of the call, filled.
        mask: as the caller passed it, or None.
        cu_seqlens: as the caller passed it, or None.
        update: False only reads, so nothing that is pending matters.
        dtype: of the tables.
    """
    positions, length = state.position.tolist(), tokens.length
    pending = filled(dtype, state.pending)
    if together(cfg, positions, mask, cu_seqlens):
        position = schedule.reduced(cfg, positions[0])
        runs = (
            schedule.windows(cfg, position, length) if update else [schedule.Window(0, length, False)] if length else []
        )
        return Aligned(cfg, pending.slice(0, schedule.pending(cfg, position)), tokens, runs)
    batch = len(positions)
    ends = length * torch.arange(batch + 1, device=tokens.query.device) if cu_seqlens is None else cu_seqlens
    return Ragged(cfg, pending, [schedule.pending(cfg, p) for p in positions], tokens, ends, update)


def pending_of(cfg: FwPKMConfig, pending: Tokens, counts: Tensor, rows: Tensor | None) -> Tokens:
    """The first ``counts`` [B] pending tokens of some rows, or of all ``[r, n, ...]``; what is past them is masked."""
    if rows is not None:
        pending, counts = pending.map(lambda x: x.index_select(0, rows)), counts[rows.cpu()]
    pending = pending.slice(0, int(counts.max()))
    at = torch.arange(pending.length)
    return without(pending, (at >= counts[:, None]).to(pending.mask.device))


def _count_up(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """For groups of these sizes, one after the other: the group of each member, and its number within the group."""
    group = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    return group, torch.arange(len(group), device=sizes.device) - first[group]
