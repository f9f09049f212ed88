"""The streams of a call: for each row its pending tokens, then its new ones that are not masked (SPEC.md §5).

A stream begins at a chunk's start, whatever the row's position: window c of every row holds the tokens from cC up to
(c+1)C + lag of its stream. Tokens are found by cells: the pending tokens ``[B*P]``, then the n of the call, then one
that is empty. A call is read in rounds: those that end in a write, then those that read what no write covered. Padded
calls take all rows in a round. Packed ones take a row and a chunk in a round that writes, and a tile of some rows in
one that reads, so they never cost B times T. All counts are arrays: nothing here depends on where a row stands.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from fwpkm import schedule
from fwpkm.backends.jax.indexing import gather, put
from fwpkm.config import FwPKMConfig

_TILE = 8, 64
"""Rows and tokens that a round of a packed call reads at once."""
_FAR = 2**30


class Plan(NamedTuple):
    """What is static about a call."""

    batch: int
    """B, the rows."""
    capacity: int
    """the pending tokens of each."""
    new: int
    """n, the tokens of the call."""
    packed: bool
    writes: int
    """the most rounds that write."""
    window: int
    """tokens that such a round takes of each row."""
    reads: int
    """the most rounds that only read."""
    block: int
    """tokens that such a round takes of each row."""
    rows: int
    """rows that such a round takes."""
    columns: int
    """the most writes of one memory."""
    is_one_loop: bool = False
    """What no write covers is read as a last window that is not due: one loop compiles in half the time of two."""
    is_shared: bool = False
    """No row ever reads what it wrote, so that all read one memory and nothing is written to it."""

    @property
    def write_size(self) -> int:
        """Tokens that a round takes that writes."""
        return self.window * (1 if self.packed else self.batch)

    @property
    def read_size(self) -> int:
        """Tokens that a round takes that only reads."""
        return self.block * self.rows

    @property
    def first_cell(self) -> int:
        """Of the call's tokens."""
        return self.batch * self.capacity

    @property
    def empty(self) -> int:
        """The cell of no token."""
        return self.first_cell + self.new


class Streams(NamedTuple):
    """Of B rows, by one call; all int32."""

    num_pending: Array
    """``[B]``: p, the tokens of a stream before its first new one."""
    lengths: Array
    """``[B]``: of the streams."""
    due: Array
    """``[B]``: the chunks that a row completes."""
    first_new: Array
    """``[B]``: where among the call's tokens that are there a row begins."""
    new_tokens: Any
    """``[n]``: the call's tokens that are there, in order; None where all are."""
    write_ends: Array
    """``[B]``, or ``[1]`` for all rows at once: the rounds up to the last write of each."""
    tail: Array
    """``[B + 1]``: where in each stream the tokens begin that no write covers; past every end for row B, of none."""
    groups: Any
    """``[G, rows]``: rows that are read together, ascending; None where all are."""
    read_ends: Array
    """``[G]``: the rounds up to the last read of each group."""
    tables: Any = None
    """``[B]``: which memory a row reads, 0 for one that nobody writes; None where each has its own, or all the one."""


class Round(NamedTuple):
    """Where a round reads."""

    rows: Any
    """``[R]`` ids of its rows, B for none; None is all."""
    start: Array
    """``[R]``: its first token in their streams."""
    first: Array
    """``[R]``: the first token that no round has read before."""
    chunk: Array
    """the chunk that it writes, if it does."""


def plan_apply(cfg: FwPKMConfig, batch: int, new: int, packed: bool, writes: bool, fresh: bool = False) -> Plan:
    """n tokens after at most P pending ones of each row, or none in ``fresh`` ones.

    ``writes`` is False where it is known that no chunk falls due.
    """
    length, window = new if packed else new // batch, cfg.chunk_size + schedule.lag(cfg)
    most = columns = schedule.max_writes(cfg, length)
    if fresh:
        most = length // cfg.chunk_size
    elif packed:  # the sum of ceil(n_b / C) over rows with tokens
        most = (new + min(batch, new) * (cfg.chunk_size - 1)) // cfg.chunk_size
    most = most if writes or window == 1 else 0
    capacity, longest = 0 if fresh else cfg.capacity, min(length, window - 1)
    plan = Plan(batch, capacity, new, packed, most, window, 0, 0, batch, columns)
    if most and not packed and longest == window - 1:  # as long as a window
        return plan._replace(writes=most + 1, is_one_loop=True)
    return _reading(plan, longest, longest)


def plan_read(cfg: FwPKMConfig, batch: int, new: int, packed: bool) -> Plan:
    """n tokens that write nothing."""
    length = new if packed else new // batch
    plan = Plan(batch, 0, new, packed, 0, 0, 0, 0, batch, schedule.max_writes(cfg, length))
    return _reading(plan, length, cfg.chunk_size)


def plan_flush(cfg: FwPKMConfig, batch: int) -> Plan:
    """At most P pending tokens of each row, whose chunk may be due."""
    return Plan(batch, cfg.capacity, 0, False, 1, cfg.capacity, 0, 0, batch, 1)


def _reading(plan: Plan, longest: int, block: int) -> Plan:
    """The plan with rounds that read at most ``longest`` tokens of a row, in blocks."""
    rows = min(plan.batch, _TILE[0]) if plan.packed else plan.batch
    block = min(block, longest, _TILE[1] if plan.packed else longest)
    reads = -(-longest // block) if block else 0
    if plan.packed and reads:  # the longest of a group is at most the mean of the group before it
        reads += plan.new // (rows * block) + -(-plan.batch // rows) - 1
    return plan._replace(reads=reads, block=block, rows=rows)


def is_legal(cu_seqlens: Array, length: int) -> Array:
    """Whether these are where sequences begin and end among T tokens (SPEC.md §5), for offsets that are traced."""
    return (cu_seqlens[0] == 0) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all() & (cu_seqlens[-1] <= length)


def inside(cu_seqlens: Any, length: int) -> Array:
    """``[1, T]``: the tokens that are not behind the last sequence; all of them where these offsets are not legal."""
    within = jnp.arange(length, dtype=jnp.int32) < cu_seqlens[-1]
    return (within | ~is_legal(cu_seqlens, length))[None]


def streams_of(
    cfg: FwPKMConfig,
    plan: Plan,
    num_pending: Array,
    mask: Array | None,
    cu_seqlens: Array | None,
    due: Array | None = None,
) -> Streams:
    """The streams of a call.

    Args:
        cfg: the configuration.
        plan: what is static about it.
        num_pending: ``[B]`` int32.
        mask: of the tokens of the call, ``[B, T]`` or packed ``[1, T]``; None for True.
        cu_seqlens: ``[B+1]`` int32 for packed ones; legal.
        due: ``[B]``, where the schedule does not say it.
    """
    ends: Any = np.arange(plan.batch + 1, dtype=np.int32) * (plan.new // plan.batch)
    ends, new_tokens = ends if cu_seqlens is None else cu_seqlens, None
    # In batch scope the one clock of all rows counts masked tokens too.
    if mask is not None and cfg.memory_scope == "sequence":
        there = mask.ravel()
        up_to = jnp.cumsum(there, dtype=jnp.int32)
        at = jnp.arange(plan.new, dtype=jnp.int32)
        new_tokens = put(jnp.zeros_like(at), jnp.where(there, up_to - 1, plan.new), at, mode="drop")
        ends = gather(jnp.append(jnp.int32(0), up_to), jnp.asarray(ends))
    first_new = jnp.asarray(ends[:-1])
    lengths = num_pending + ends[1:] - first_new
    if due is None:
        due = schedule.written(cfg, lengths) if plan.writes else jnp.zeros_like(lengths)
    last = due if plan.packed else due.max()
    tail = jnp.maximum(num_pending, read_before(cfg, last))
    unread = lengths - tail
    groups = None
    if plan.packed:
        order = jnp.argsort(-unread).astype(jnp.int32)
        num_groups = -(-plan.batch // plan.rows)
        order = jnp.append(order, jnp.full(num_groups * plan.rows - plan.batch, plan.batch, jnp.int32))
        groups = order.reshape(num_groups, plan.rows)
        longest, groups = gather(unread, groups[:, 0]), jnp.sort(groups)
    else:
        longest = unread.max()[None]
    steps = -(-jnp.maximum(longest, 0) // max(plan.block, 1))
    write_ends, read_ends = jnp.atleast_1d(last), steps
    if plan.packed:
        write_ends, read_ends = (jnp.cumsum(x, dtype=jnp.int32) for x in (write_ends, read_ends))
    elif plan.is_one_loop:
        write_ends += (longest > 0).astype(jnp.int32)
    tail = jnp.append(tail, jnp.int32(_FAR))
    return Streams(num_pending, lengths, due, first_new, new_tokens, write_ends, tail, groups, read_ends)


def read_before(cfg: FwPKMConfig, chunk: Array) -> Array:
    """How many tokens of a stream were read before its window of this chunk was."""
    return jnp.where(chunk > 0, chunk * cfg.chunk_size + schedule.lag(cfg), 0)


def of_rows(x: Array, rows: Array | None) -> Array:
    """``[R, ...]`` of ``x [B, ...]``; of row B, which is none, that of the last."""
    return x if rows is None else gather(x, rows, mode="clip")


def write_round(cfg: FwPKMConfig, plan: Plan, streams: Streams, index: Array) -> Round:
    """The window of one chunk: of one row of a packed call, else of all rows."""
    rows, chunk = None, index
    if plan.packed:
        row = (index >= streams.write_ends).sum(dtype=jnp.int32)
        rows, chunk = row[None], index - gather(streams.write_ends - streams.due, row)
    num_pending = of_rows(streams.num_pending, rows)
    start = jnp.full_like(num_pending, chunk * cfg.chunk_size)
    return Round(rows, start, jnp.maximum(num_pending, read_before(cfg, chunk)), chunk)


def read_round(plan: Plan, streams: Streams, index: Array) -> Round:
    """A block of what no write covers: of one group of rows of a packed call, else of all rows."""
    if streams.groups is None:
        start = streams.tail[:-1] + index * plan.block
        return Round(None, start, start, index)
    group = (index >= streams.read_ends).sum(dtype=jnp.int32)
    before = gather(jnp.append(jnp.int32(0), streams.read_ends), group)
    rows = gather(streams.groups, group)
    start = gather(streams.tail, rows) + (index - before) * plan.block
    return Round(rows, start, start, index)


def cells_of(plan: Plan, streams: Streams, rows: Array | None, start: Array, length: int) -> tuple[Array, Array]:
    """Cells ``[R, length]`` of tokens of some rows' streams from ``start`` [R] on, and where in these they stand."""
    at = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    row = jnp.arange(plan.batch, dtype=jnp.int32) if rows is None else rows
    num_pending, lengths, first_new = (
        of_rows(x, rows)[:, None] for x in (streams.num_pending, streams.lengths, streams.first_new)
    )
    new = first_new + at - num_pending
    if streams.new_tokens is not None:
        new = gather(streams.new_tokens, new, mode="clip")
    cells = jnp.where(at < num_pending, row[:, None] * plan.capacity + at, plan.first_cell + new)
    return jnp.where(at < lengths, cells, plan.empty), at


def cells_after(cfg: FwPKMConfig, plan: Plan, streams: Streams) -> Array:
    """``[B, P]``: cells of what is pending afterwards."""
    return cells_of(plan, streams, None, streams.due * cfg.chunk_size, cfg.capacity)[0]
