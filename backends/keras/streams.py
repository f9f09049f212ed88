"""The streams of a call: for each row its pending tokens, then its new ones that are not masked (SPEC.md §5).

A stream begins at a chunk's start, whatever the row's position: window w of every row holds the tokens from w·C on of
its stream. Tokens are found by cells: the pending tokens ``[B*P]``, then the n of the call, then one that is empty. All
counts are arrays, so nothing here depends on where a row stands, how long it is or what is masked.
"""

from typing import NamedTuple

from keras import ops

from fwpkm import schedule
from fwpkm.backends.keras.tokens import outer, without
from fwpkm.config import FwPKMConfig
from fwpkm.tokens import Array, Tokens


class Streams(NamedTuple):
    """Of B rows, by one call."""

    source: Tokens
    """``[cells, ...]``"""
    num_pending: Array
    """``[B]`` int32: p, the tokens of a stream before its first new one."""
    lengths: Array
    """``[B]`` int32: of the streams."""
    due: Array
    """``[B]`` int32: the chunks that a row completes."""
    row: Array
    """``[n]`` int32: the row of each token of the call."""
    index: Array
    """``[n]`` int32: where it stands in its stream; negative for one that is not there."""
    new_cells: Array
    """``[n + 1]`` int32: the cells of new tokens, those of a row together and in order; the rest have no meaning."""
    first_new: Array
    """``[B]`` int32: where in ``new_cells`` a row begins."""

    @property
    def num_old(self) -> Array:
        """B·P, the cells before those of the call."""
        return ops.shape(self.source.mask)[0] - 1 - ops.shape(self.index)[0]

    def position(self, cfg: FwPKMConfig, before: Array) -> Array:
        """``[B]``: where rows stand afterwards that stood at ``before``."""
        return schedule.reduced(cfg, before) + self.lengths - self.num_pending

    def cells(self, start: Array, length: int | Array) -> Array:
        """``[B, length]``: those of the tokens of every stream from ``start`` [B] on."""
        rows, capacity = ops.shape(self.num_pending)[0], self.num_old // ops.shape(self.num_pending)[0]
        at = start[:, None] + ops.arange(length, dtype="int32")
        old = ops.arange(rows, dtype="int32")[:, None] * capacity + at
        last = ops.shape(self.new_cells)[0] - 1
        new = self.first_new[:, None] + at - self.num_pending[:, None]
        new = ops.take(self.new_cells, ops.clip(new, 0, last), axis=0)
        empty = ops.shape(self.source.mask)[0] - 1
        found = ops.where(at < self.num_pending[:, None], old, new)
        return ops.where(at < self.lengths[:, None], found, empty)

    def tokens(self, cells: Array, dead: Array) -> Tokens:
        """Those in the cells ``[B, length]``; the ``dead`` [n] of the call are blanked."""
        found = self.source.map(lambda x: ops.take(x, cells, axis=0))
        return without(found, ops.take(self._flags(dead), cells, axis=0))

    def _flags(self, of_call: Array) -> Array:
        old = ops.zeros((self.num_old,), "bool")
        return ops.concatenate([old, of_call, ops.zeros((1,), "bool")])

    def merge(self, read: Array, here: Array, start: Array, first: Array) -> Array:
        """What the tokens of the call read ``[n, ...]``, with a window's ``here`` [B, length, ...] where it is theirs.

        ``start`` [B] is where the window begins in each stream, ``first`` [n] which tokens it is the first to read.
        """
        length = ops.shape(here)[1]
        at = ops.clip(self.index - ops.take(start, self.row, axis=0), 0, length - 1) + self.row * length
        flat = ops.reshape(here, (-1, *here.shape[2:]))
        return ops.where(outer(first, read), ops.take(flat, at, axis=0), read)


def is_legal(cu_seqlens: Array, length: int | Array) -> Array:
    """Whether these are where sequences begin and end among T tokens (SPEC.md §5), for offsets that are traced."""
    rising = ops.all(cu_seqlens[1:] >= cu_seqlens[:-1])
    return (cu_seqlens[0] == 0) & rising & (cu_seqlens[-1] <= length)


def streams_of(cfg: FwPKMConfig, pending: Tokens, position: Array, tokens: Tokens, cu_seqlens: Array | None) -> Streams:
    """The streams of a call.

    Args:
        cfg: the configuration.
        pending: ``[B, P, ...]``
        position: ``[B]`` int32.
        tokens: those of the call ``[B, T, ...]``, or packed ``[1, T, ...]``; filled.
        cu_seqlens: ``[B+1]`` int32 for packed ones, legal; or None.
    """
    rows, shape = ops.shape(position)[0], ops.shape(tokens.mask)
    num_new = shape[0] * shape[1]
    # In batch scope the one clock of all rows counts masked tokens too.
    there = ops.reshape(tokens.mask, (-1,)) if cfg.memory_scope == "sequence" else ops.ones((num_new,), "bool")
    at = ops.arange(num_new, dtype="int32")
    if cu_seqlens is None:
        ends, row = ops.arange(rows + 1, dtype="int32") * shape[1], at // shape[1]
    else:
        ends = cu_seqlens
        row = ops.sum(ops.cast(at[:, None] >= ends[None, 1:], "int32"), axis=1)
        there &= row < rows
        row = ops.minimum(row, rows - 1)
    before = ops.concatenate([ops.zeros((1,), "int32"), ops.cumsum(ops.cast(there, "int32"))])
    first_new, num_pending = ops.take(before, ends, axis=0), schedule.pending(cfg, position)
    lengths = num_pending + first_new[1:] - first_new[:-1]
    index = ops.take(num_pending, row, axis=0) + before[:-1] - ops.take(first_new, row, axis=0)
    capacity = cfg.capacity
    old = rows * capacity
    # Where the k-th token that is there stands; others are sent past the last.
    spare = ops.zeros((num_new + 1,), "int32")
    sent = ops.where(there, before[:-1], num_new)
    new_cells = ops.scatter_update(spare, sent[:, None], old + at)
    source = Tokens(*(_cells(x, y) for x, y in zip(pending, tokens)))
    due = schedule.written(cfg, lengths)
    return Streams(source, num_pending, lengths, due, row, ops.where(there, index, -1), new_cells, first_new[:-1])


def _cells(pending: Array, new: Array) -> Array:
    """``[cells, ...]`` of a field."""
    flat = [ops.reshape(x, (-1, *x.shape[2:])) for x in (pending, new)]
    return ops.concatenate([*flat, ops.zeros((1, *pending.shape[2:]), pending.dtype)])
