"""Half-read sequences whose last tokens can be taken back, and whose tables are shared until a write (SPEC.md §5)."""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm import schedule
from fwpkm.backends.torch import FwPKM
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.tokens import Tokens


class Overwritten(NamedTuple):
    """What a write replaced in one row, and the tokens that were pending one token before it."""

    keys: Tensor
    """``[H, 2, S, Dk/2]``"""
    slots: Tensor
    """``[n]`` the slots whose bits or uses the write changed."""
    values: Tensor
    """``[n, Dv]`` what they held."""
    uses: Tensor | None
    """``[n]`` how often they had been used; None where uses do not count."""
    pending: Tokens
    """``[P, ...]``"""

    @classmethod
    def between(cls, before: State, after: State, row: int) -> "Overwritten":
        """Of one row of two states, one token apart."""
        old, new = before.memory.values[row].detach(), after.memory.values[row].detach()
        bits = torch.int64 if old.dtype == torch.float64 else torch.int32
        changed, uses = (old.view(bits) != new.view(bits)).any(-1), None
        if before.maybe_uses is not None and after.maybe_uses is not None:
            uses = before.maybe_uses[row]
            changed |= uses != after.maybe_uses[row]
        slots = changed.nonzero().squeeze(1)
        pending = before.pending.map(lambda x: x[row].detach().clone())
        uses = None if uses is None else uses[slots]
        return cls(before.memory.keys[row].detach().clone(), slots, old[slots], uses, pending)


class Crop(NamedTuple):
    """What taking tokens back would do to each row."""

    tokens: int
    """How many of the cache's tokens go."""
    position: Tensor
    """``[B]`` int32, where each row then stands."""
    chunks: Tensor
    """``[B]`` how many of its chunks are unwritten again."""


class Rows:
    """B sequences, half read by one memory layer.

    Rows that descend from one row (beams, and all rows before their first write) share its table until a chunk is
    written.

    Attributes:
        tables: M tables.
        uses: ``[M, N]`` of their slots; None where the configuration does not weigh them.
        owners: row b reads table ``owners[b]``.
        pending: ``[B, P, ...]``
        position: ``[B]`` int32, on the CPU.
        columns: the tokens that were read of each row, padding among them.
        seen: ``[B, columns]`` bool, False for padding; None where there was none.
        past: of each row what its last recorded writes replaced, oldest first.
    """

    def __init__(self, config: FwPKMConfig, state: State[Tensor]):
        """Sequences that stand where ``state`` says; its tables may be overwritten."""
        self.config = config
        self.tables, self.pending, self.uses = state.memory, state.pending, state.maybe_uses
        self.position: Tensor = state.position
        self.owners = list(range(len(state.position)))
        self.columns, self.seen = 0, None
        self.past: list[list[Overwritten]] = [[] for _ in self.owners]

    columns: int
    seen: Tensor | None

    def __len__(self) -> int:
        """B."""
        return len(self.owners)

    def state(self) -> State:
        """The state of all rows, each with a table of its own."""
        if not self._is_own():
            owners = torch.tensor(self.owners, device=self.tables.keys.device)
            self.tables = Memory(*(t.index_select(0, owners) for t in self.tables))
            self.uses = None if self.uses is None else self.uses.index_select(0, owners)
            self.owners = list(range(len(self)))
        return State.of(self.tables, self.pending, self.position, self.uses)

    def _is_own(self) -> bool:
        """Whether table b is that of row b alone."""
        return self.owners == list(range(self.tables.keys.shape[0]))

    # Reading

    def read(self, layer: FwPKM, x: Tensor, mask: Tensor | None, kept: int) -> Tensor:
        """Read T more tokens of each row, and keep what the last ``kept`` writes of each row replaced.

        Args:
            layer: the memory layer.
            x: ``[B, T, hidden_size]``.
            mask: ``[B, T]`` bool on the CPU, False for padding; None for True.
            kept: how many writes of a row :meth:`crop` can undo; with 0 calls are not cut at writes.

        Returns:
            y ``[B, T, hidden_size]``.
        """
        length = x.shape[1]
        writes = self._writes(length, mask)
        parts, start = [], 0
        for column in _last(writes, kept):
            parts.append(self._read_part(layer, x, mask, writes, start, column))
            parts.append(self._read_part(layer, x, mask, writes, column, column + 1, record=True))
            start = column + 1
        parts.append(self._read_part(layer, x, mask, writes, start, length))
        if mask is not None or self.seen is not None:
            seen = torch.ones(len(self), self.columns, dtype=torch.bool) if self.seen is None else self.seen
            new = torch.ones(len(self), length, dtype=torch.bool) if mask is None else mask
            self.seen = torch.cat([seen, new], dim=1)
        self.columns += length
        for past in self.past:
            del past[: max(0, len(past) - kept)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _writes(self, length: int, mask: Tensor | None) -> Tensor:
        """``[B, T]`` bool: the token completes a chunk of its row."""
        counts = torch.ones(len(self), length, dtype=torch.long) if mask is None else mask.long()
        start = schedule.reduced(self.config, self.position).long()[:, None]
        clock = torch.cat([start, start + counts.cumsum(1)], dim=1)
        return schedule.written(self.config, clock).diff(dim=1) > 0

    def _read_part(
        self, layer: FwPKM, x: Tensor, mask: Tensor | None, writes: Tensor, start: int, stop: int, record: bool = False
    ) -> Tensor:
        """Read tokens start to stop of a call; with ``record`` one token, whose writes can be undone."""
        x, mask = x[:, start:stop], None if mask is None else mask[:, start:stop]
        writing = writes[:, start:stop].any(1).nonzero().squeeze(1).tolist()
        if not writing and not self._is_own():
            return self._read_shared(layer, x, mask)
        before = self.state()
        y, after = layer(x, before, mask, inplace=bool(writing) and not record and _may_overwrite(before))
        for row in writing:
            if record:
                self.past[row].append(Overwritten.between(before, after, row))
            else:
                self.past[row].clear()  # what was recorded before cannot be reached any more
        self.tables, self.uses = after.memory, after.maybe_uses
        self.pending, self.position = after.pending, after.position
        return y

    def _read_shared(self, layer: FwPKM, x: Tensor, mask: Tensor | None) -> Tensor:
        """A call in which no row writes: rows that share a table read it together."""
        outputs, states, order = [], [], []
        for owner in dict.fromkeys(self.owners):
            ids = torch.tensor([row for row, own in enumerate(self.owners) if own == owner])
            there = ids.to(x.device)
            tables = Memory(*(_repeated(t, owner, len(ids)) for t in self.tables))
            uses = None if self.uses is None else _repeated(self.uses, owner, len(ids))
            state: State[Tensor] = State.of(tables, _rows_of(self.pending, there), self.position[ids], uses)
            y, after = layer(x[there], state, None if mask is None else mask[ids])
            outputs.append(y)
            states.append(after)
            order.append(ids)
        back = torch.cat(order).argsort()
        there = back.to(x.device)
        self.pending = Tokens(*(torch.cat(parts)[there] for parts in zip(*(state.pending for state in states))))
        self.position = torch.cat([state.position for state in states])[back]
        return torch.cat(outputs)[there]

    # Taking tokens back

    def check_crop(self, tokens: int) -> Crop:
        """What taking back the last tokens of every row would do.

        Raises:
            RuntimeError: it reaches back beyond what is recorded.
        """
        tokens = min(tokens, self.columns)
        removed = torch.full_like(self.position, tokens)
        if self.seen is not None:
            removed = self.seen[:, self.columns - tokens :].sum(1).to(removed)
        position = self.position - removed
        chunks = schedule.written(self.config, self.position) - schedule.written(self.config, position)
        for row, past in enumerate(self.past):
            if chunks[row] > len(past):
                raise RuntimeError(
                    f"crop of {tokens} tokens reaches back over the ends of {int(chunks[row])} chunks of row {row}, of "
                    f"{self.config.chunk_size} tokens each, and the memory has kept what {len(past)} of them "
                    "overwrote. Nothing was changed. Call cache.activate_past_recording() before those tokens are "
                    "read, and let enough chunks be kept: insert_memory(..., undo=)"
                )
        return Crop(tokens, position, chunks)

    def crop(self, tokens: int) -> None:
        """Take the last tokens of every row back: pending ones are dropped, written chunks come back as they were.

        Raises:
            RuntimeError: it reaches back beyond what is recorded; nothing was changed.
        """
        crop = self.check_crop(tokens)
        if crop.chunks.any():
            state = self.state()
            if not _may_overwrite(state):
                self.tables = Memory(*(t.clone() for t in self.tables))
                self.uses = None if self.uses is None else self.uses.clone()
            self.pending = self.pending.map(torch.clone)
            with torch.no_grad():
                for row, count in enumerate(crop.chunks.tolist()):
                    self._restore(row, count)
        kept = schedule.pending(self.config, crop.position).to(self.pending.mask.device)
        gone = torch.arange(self.config.capacity, device=kept.device) >= kept[:, None]
        self.pending = self.pending.map(lambda x: x.masked_fill(gone.view(*gone.shape, *[1] * (x.ndim - 2)), 0))
        self.position = crop.position
        self.columns -= crop.tokens
        self.seen = None if self.seen is None else self.seen[:, : self.columns]

    def _restore(self, row: int, chunks: int) -> None:
        """Undo the last writes of a row, the newest first; its pending tokens are then those before the oldest."""
        for _ in range(chunks):
            old = self.past[row].pop()
            self.tables.keys[row] = old.keys
            self.tables.values[row].index_copy_(0, old.slots, old.values)
            if self.uses is not None and old.uses is not None:
                self.uses[row].index_copy_(0, old.slots, old.uses)
            for field, before in zip(self.pending, old.pending):
                field[row] = before

    def select(self, rows: Tensor) -> None:
        """Row i goes on from row rows[i]; no table is copied before a chunk is written."""
        ids = rows.cpu()
        self.pending = _rows_of(self.pending, ids.to(self.pending.mask.device))
        self.position = self.position[ids]
        self.seen = None if self.seen is None else self.seen[ids]
        self.owners = [self.owners[row] for row in ids.tolist()]
        self.past = [list(self.past[row]) for row in ids.tolist()]


def _repeated(x: Tensor, owner: int, times: int) -> Tensor:
    """What belongs to one of M tables, as of so many rows that share it."""
    return x[owner : owner + 1].expand(times, *x.shape[1:])


def _rows_of(tokens: Tokens, rows: Tensor) -> Tokens:
    return tokens.map(lambda x: x[rows])


def _last(writes: Tensor, count: int) -> list[int]:
    """The columns that hold one of the last ``count`` writes of a row."""
    if count == 0:
        return []
    left = writes.long().flip(1).cumsum(1).flip(1)
    return (writes & (left <= count)).any(0).nonzero().squeeze(1).tolist()


def _may_overwrite(state: State) -> bool:
    """Whether a call may write in place: no gradient needs the tables, and they were not made for inference alone."""
    if torch.is_grad_enabled() or any(t.requires_grad for t in state.memory):
        return False
    return torch.is_inference_mode_enabled() or not any(x.is_inference() for x in state.arrays().values())
