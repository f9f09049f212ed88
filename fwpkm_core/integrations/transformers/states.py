"""The states of one memory layer inside a cache of transformers, beside the keys and values of attention."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from fwpkm import schedule
from fwpkm.backends.torch import FwPKM
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.tokens import Tokens

DRAFT = 20
"""Tokens of a draft in assisted decoding, unless the generation config says more."""


class Overwritten(NamedTuple):
    """What a write replaced in one row, and the tokens that were pending one token before it."""

    keys: Tensor
    """``[H, 2, S, Dk/2]``"""
    slots: Tensor
    """``[n]`` the slots whose bits the write changed."""
    values: Tensor
    """``[n, Dv]`` what they held."""
    pending: Tokens
    """``[P, ...]``"""

    @classmethod
    def between(cls, before: State, after: State, row: int) -> "Overwritten":
        """Of one row of two states, one token apart."""
        old, new = before.memory.values[row].detach(), after.memory.values[row].detach()
        bits = torch.int64 if old.dtype == torch.float64 else torch.int32
        slots = (old.view(bits) != new.view(bits)).any(-1).nonzero().squeeze(1)
        pending = before.pending.map(lambda x: x[row].detach().clone())
        return cls(before.memory.keys[row].detach().clone(), slots, old[slots], pending)


class MemoryStates(LinearAttentionCacheLayerMixin):
    """The half-read sequences of one memory layer, as a layer of a cache.

    Rows that descend from one row (beams, and all rows before their first write) share its table until a chunk is
    written. While the past is recorded, each write keeps the rows that it replaces, so that :meth:`crop` can take
    tokens back across a chunk's end.

    Args:
        layer_idx: the decoder layer before which the memory stands.
        config: the memory's configuration.
        undo: how many chunks of a row :meth:`crop` can take back; None for ceil((draft + 1) / chunk_size).
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, layer_idx: int, config: FwPKMConfig, undo: int | None = None):
        """States of no sequence yet."""
        super().__init__()
        self.layer_idx, self.config, self.undo, self.draft = layer_idx, config, undo, DRAFT
        self.reset()

    def reset(self) -> None:
        """Forget every sequence; the next call begins new ones."""
        self.columns = 0
        """Tokens that the cache holds of each row, padding among them."""
        self.seen: Tensor | None = None
        """``[B, columns]`` bool, False for padding; None where there was none."""
        self.tables: Memory | None = None
        """M tables; row b reads table ``owners[b]``."""
        self.owners: list[int] = []
        self.pending: Tokens | None = None
        self.position: Tensor | None = None
        self.past: list[list[Overwritten]] = []
        """Of each row what its last writes replaced, oldest first."""

    # Reading

    @torch.compiler.disable
    def read(self, layer: FwPKM, x: Tensor, mask: Tensor | None) -> Tensor:
        """Read T more tokens of each row.

        Args:
            layer: the memory layer.
            x: ``[B, T, hidden_size]``.
            mask: ``[B, T]`` bool on the CPU, False for padding; None for True.

        Returns:
            What the layer adds to x, in its shape.

        Raises:
            ValueError: the cache holds another number of rows.
        """
        batch, length = x.shape[:2]
        self._begin(layer, batch)
        writes = self._writes(length, mask)
        kept = self._kept(length)
        recorded = _last(writes, kept) if self.record_past else []
        parts, start = [], 0
        for column in recorded:
            parts.append(self._advance(layer, x, mask, writes, start, column))
            parts.append(self._advance(layer, x, mask, writes, column, column + 1, record=True))
            start = column + 1
        parts.append(self._advance(layer, x, mask, writes, start, length))
        self._remember(batch, length, mask)
        for row in self.past:
            del row[: max(0, len(row) - kept)]
        return torch.cat([part for part in parts if part is not None], dim=1)

    def _begin(self, layer: FwPKM, batch: int) -> None:
        """One table for all rows until they write; or check that the rows are still those that began."""
        if self.tables is None:
            first = layer.init_state(1)
            self.tables, self.owners, self.past = first.memory, [0] * batch, [[] for _ in range(batch)]
            self.pending = first.pending.map(lambda x: x.repeat_interleave(batch, dim=0))
            self.position = first.position.repeat_interleave(batch)
        elif len(self.owners) != batch:
            raise ValueError(
                f"cache must be of the same rows as the call: the memory states before decoder layer {self.layer_idx} "
                f"are of {len(self.owners)} rows. Received: {batch} rows. Begin with an empty cache, or give the cache "
                "rows by batch_select_indices and batch_repeat_interleave"
            )

    def _writes(self, length: int, mask: Tensor | None) -> Tensor:
        """``[B, T]`` bool: the token completes a chunk of its row."""
        batch = len(self.owners)
        counts = torch.ones(batch, length, dtype=torch.long) if mask is None else mask.long()
        start = schedule.reduced(self.config, self.position).long()[:, None]
        clock = torch.cat([start, start + counts.cumsum(1)], dim=1)
        return schedule.written(self.config, clock).diff(dim=1) > 0

    def _kept(self, length: int) -> int:
        """How many chunks of a row stay recorded: of a later call all of its own, since it may be a draft alone."""
        chunk = self.config.chunk_size
        undo = -(-(self.draft + 1) // chunk) if self.undo is None else self.undo
        return undo if self.columns == 0 else max(undo, -(-length // chunk))

    def _advance(
        self,
        layer: FwPKM,
        x: Tensor,
        mask: Tensor | None,
        writes: Tensor,
        start: int,
        stop: int,
        record: bool = False,
    ) -> Tensor | None:
        """Read tokens start to stop of a call; with ``record`` one token, whose writes can be undone."""
        if start == stop:
            return None
        x, mask = x[:, start:stop], None if mask is None else mask[:, start:stop]
        rows = writes[:, start:stop].any(1).nonzero().squeeze(1).tolist()
        if not rows:
            return self._read_only(layer, x, mask)
        self._own()
        before = self._state()
        y, after = layer(x, before, mask, inplace=not record and _may_overwrite(before))
        for row in rows:
            if record:
                self.past[row].append(Overwritten.between(before, after, row))
            else:
                self.past[row].clear()  # what was recorded before cannot be reached any more
        self._take_state(after)
        return y

    def _read_only(self, layer: FwPKM, x: Tensor, mask: Tensor | None) -> Tensor:
        """A call in which no row writes: rows that share a table read it together."""
        if self._is_own():
            y, after = layer(x, self._state(), mask)
            self._take_state(after)
            return y
        groups: dict[int, list[int]] = {}
        for row, owner in enumerate(self.owners):
            groups.setdefault(owner, []).append(row)
        outputs, pending, position = [], [], []
        for owner, rows in groups.items():
            ids = torch.tensor(rows)
            there = ids.to(x.device)
            shared = Memory(*(t[owner : owner + 1].expand(len(rows), *t.shape[1:]) for t in self.tables))
            state = State.of(shared, self.pending.map(lambda p, ids=there: p[ids]), self.position[ids])
            y, after = layer(x[there], state, None if mask is None else mask[ids])
            outputs.append(y)
            pending.append(after.pending)
            position.append(after.position)
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
        on_device = order.to(x.device)
        self.pending = Tokens(*(torch.cat(field)[on_device] for field in zip(*pending)))
        self.position = torch.cat(position)[order]
        return torch.cat(outputs)[on_device]

    def _state(self) -> State:
        """The state of all rows, each with a table of its own."""
        return State.of(self.tables, self.pending, self.position)

    def _take_state(self, state: State) -> None:
        self.tables, self.pending, self.position = state.memory, state.pending, state.position

    def _is_own(self) -> bool:
        """Whether table b is that of row b alone."""
        return self.owners == list(range(self.tables.keys.shape[0]))

    def _own(self) -> None:
        """Give each row a table of its own."""
        if not self._is_own():
            owners = torch.tensor(self.owners, device=self.tables.keys.device)
            self.tables = Memory(*(t.index_select(0, owners) for t in self.tables))
            self.owners = list(range(len(self.owners)))

    def _remember(self, batch: int, length: int, mask: Tensor | None) -> None:
        """Which tokens were there, from the first padding on."""
        if mask is not None or self.seen is not None:
            seen = torch.ones(batch, self.columns, dtype=torch.bool) if self.seen is None else self.seen
            new = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
            self.seen = torch.cat([seen, new], dim=1)
        self.columns += length

    # Taking tokens back

    def activate_past_recording(self) -> None:
        """From now on keep what writes replace."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> tuple[Tensor, Tensor]:
        """What :meth:`crop` would do: each row's new position ``[B]``, and how many chunks it takes back ``[B]``.

        Raises:
            ValueError: a positive number.
            RuntimeError: it reaches back beyond what is recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative integer. Received: {tokens_to_remove}"
            )
        count = min(-tokens_to_remove, self.columns)
        removed = torch.full_like(self.position, count)
        if self.seen is not None:
            removed = self.seen[:, self.columns - count :].sum(1).to(removed)
        position = self.position - removed
        chunks = schedule.written(self.config, self.position) - schedule.written(self.config, position)
        for row, past in enumerate(self.past):
            if chunks[row] > len(past):
                raise RuntimeError(
                    f"the memory before decoder layer {self.layer_idx} can take back {len(past)} chunks of row {row}, "
                    f"and {count} tokens reach back over {int(chunks[row])} of {self.config.chunk_size} tokens. "
                    "Nothing was changed. Call cache.activate_past_recording() before those tokens are read, or let "
                    "more chunks be kept: insert_memory(..., undo=)"
                )
        return position, chunks

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens of every row back.

        Pending ones are dropped; across a chunk's end rows, keys, pending tokens and position come back as they were.

        Raises:
            ValueError: a positive number.
            RuntimeError: it reaches back beyond what is recorded; nothing was changed.
        """
        if self.tables is None or tokens_to_remove == 0:
            return
        position, chunks = self.check_crop(tokens_to_remove)
        if chunks.any():
            self._own()
            if not _may_overwrite(self._state()):
                self.tables = Memory(*(t.clone() for t in self.tables))
            self.pending = self.pending.map(torch.clone)
            with torch.no_grad():
                for row, count in enumerate(chunks.tolist()):
                    self._restore(row, count)
        kept = schedule.pending(self.config, position).to(self.pending.mask.device)
        gone = torch.arange(self.config.capacity, device=kept.device) >= kept[:, None]
        self.pending = self.pending.map(lambda x: x.masked_fill(gone.view(*gone.shape, *[1] * (x.ndim - 2)), 0))
        self.position = position
        self.columns = max(0, self.columns + tokens_to_remove)
        if self.seen is not None:
            self.seen = self.seen[:, : self.columns]

    def _restore(self, row: int, chunks: int) -> None:
        """Undo the last writes of a row, the newest first; its pending tokens are then those before the oldest."""
        for _ in range(chunks):
            old = self.past[row].pop()
            self.tables.keys[row] = old.keys
            self.tables.values[row].index_copy_(0, old.slots, old.values)
            for field, before in zip(self.pending, old.pending):
                field[row] = before

    # Rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from row beam_idx[i]; no table is copied before a chunk is written."""
        if self.tables is None:
            return
        ids = beam_idx.cpu()
        if ids.dtype == torch.bool:
            ids = ids.nonzero().squeeze(1)
        on_device = ids.to(self.pending.mask.device)
        self.pending = self.pending.map(lambda x: x[on_device])
        self.position = self.position[ids]
        self.seen = None if self.seen is None else self.seen[ids]
        self.owners = [self.owners[i] for i in ids.tolist()]
        self.past = [list(self.past[i]) for i in ids.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self.reorder_cache(torch.arange(len(self.owners)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows: integers, or a bool for each."""
        self.reorder_cache(torch.as_tensor(indices))

    # What a cache asks of layers with keys and values, or with convolutions

    def offload(self) -> None:
        """Tables stay where they are."""

    def prefetch(self) -> None:
        """Tables stay where they are."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """States begin when tokens are read."""

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """There is none: :meth:`read` is the one way in."""
        raise NotImplementedError("a memory layer has no convolution")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """There is none that a caller could give: :meth:`read` is the one way in."""
        raise NotImplementedError("a memory's state is written by reading tokens")


def _last(writes: Tensor, count: int) -> list[int]:
    """The columns that hold one of the last ``count`` writes of a row."""
    left = writes.long().flip(1).cumsum(1).flip(1)
    return (writes & (left <= count)).any(0).nonzero().squeeze(1).tolist()


def _may_overwrite(state: State) -> bool:
    """Whether a call may write in place: no gradient needs the tables, and they were not made for inference alone."""
    if torch.is_grad_enabled() or any(t.requires_grad for t in state.memory):
        return False
    return torch.is_inference_mode_enabled() or not any(x.is_inference() for x in (*state.memory, *state.pending))
