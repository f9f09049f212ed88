"""Which windows a call reads (SPEC.md §5), what its launches follow from, and what any call of its length needs."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.kernels.runtime.shapes import blocks_of, keys_move, shapes


class Window(NamedTuple):
    """Tokens [start, start + length) of the stream; whether the chunk at their beginning is written after them."""

    start: int
    length: int
    writes: bool
    first: int
    """Tokens of all sequences in the windows before."""
    first_new: int
    """Where in the stream the tokens begin that no window before has read."""
    batch: int
    """The sequences that read it: the first so many of all."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a call reads and writes. Each is made once and equal to itself alone, so that it is a quick key."""

    windows: tuple[Window, ...]
    num_pending: int
    """Tokens at the beginning of the stream that were pending: their reads have been output before."""
    num_tokens: int
    """n, tokens of the stream: pending ones, then new ones; or of all streams, where they have ``begins``."""
    first_unwritten: int
    """Where in the stream the tokens begin that no write has consumed."""
    shifted: bool = False
    """Whether values are targets already, of their own tokens (``chunk_update``)."""
    begins: tuple[int, ...] | None = None
    """Where each sequence's stream begins, and the last one ends, if they lie end to end; each has a memory."""

    @property
    def batch(self) -> int:
        """B: all read the first window."""
        return self.windows[0].batch

    @property
    def num_new(self) -> int:
        """T, tokens of the stream that are output."""
        return self.num_tokens - self.num_pending

    @property
    def num_streamed(self) -> int:
        """Tokens of all streams."""
        return self.num_tokens * (1 if self.begins else self.batch)

    @functools.cached_property
    def total(self) -> int:
        """Tokens of all windows, of all sequences."""
        return sum(w.batch * w.length for w in self.windows)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of a sequence in the longest window."""
        return max(w.length for w in self.windows)

    @functools.cached_property
    def num_writes(self) -> int:
        """How many windows write: all, or all but the last; those are of one length."""
        return sum(w.writes for w in self.windows)

    def rows(self, windows: int) -> int:
        """Sequences of the first so many windows."""
        return sum(w.batch for w in self.windows[:windows])


def plan(cfg: FwPKMConfig, position: int, length: int, batch: int, update: bool) -> Plan:
    """The windows of a call of ``length`` tokens at ``position``."""
    return _plan(cfg, schedule.pending(cfg, position) if update else None, length, batch)


@functools.lru_cache(1024)
def write(length: int, batch: int, shifted: bool = False) -> Plan:
    """The one window of pending tokens, to be written."""
    return Plan((Window(0, length, True, 0, length, batch),), length, length, length, shifted)


@functools.lru_cache(1024)
def _plan(cfg: FwPKMConfig, num_pending: int | None, length: int, batch: int) -> Plan:
    """The plan where so many tokens are pending, on which alone it depends; None only reads."""
    if num_pending is None:
        return Plan((Window(0, length, False, 0, 0, batch),), 0, length, 0)
    windows = _windows(cfg, num_pending, length, itertools.repeat(batch))
    return Plan(windows, num_pending, num_pending + length, sum(w.writes for w in windows) * cfg.chunk_size)


@functools.lru_cache(1024)
def ragged(cfg: FwPKMConfig, length: int, batches: tuple[int, ...]) -> Plan:
    """The windows of a call of up to ``length`` tokens of sequences that begin, those with most windows first.

    As many read each window as ``batches`` says, so the launches are those of one sequence. A stream has all tokens of
    the last window that its sequence reads.
    """
    windows = _windows(cfg, 0, length, batches)
    lengths = [w.start + w.length for w, after in zip(windows, (*batches[1:], 0)) for _ in range(w.batch - after)]
    begins = tuple(itertools.accumulate(reversed(lengths), initial=0))
    return Plan(windows, 0, begins[-1], begins[-1], begins=begins)


def _windows(cfg: FwPKMConfig, num_pending: int, length: int, batches: Iterable[int]) -> tuple[Window, ...]:
    """Those of a stream with so many pending tokens and ``length`` new ones, which so many sequences read."""
    windows, start, first, first_new = [], 0, 0, num_pending
    for (begin, end, writes), batch in zip(schedule.windows(cfg, num_pending, length), batches):
        begin, end = begin + num_pending, end + num_pending
        begin = start if writes else begin  # a write reads its whole chunk again; else what is pending stays unread
        windows.append(Window(begin, end - begin, writes, first, first_new, batch))
        first, first_new = first + batch * (end - begin), end
        start += cfg.chunk_size * writes
    return tuple(windows)


class Call(NamedTuple):
    """What the launches of a call follow from."""

    cfg: FwPKMConfig
    plan: Plan
    dtype: Any
    """Of the queries, as their framework has it."""
    memories: int
    """M"""
    save: bool
    """Whether the forward keeps what its backward needs."""
    overlaid: bool = False
    """Whether what is written is laid over one table (overlay.py), of which nothing outlives the call."""
    decided: bool = False
    """Whether the GPU decides which memories take part, by the tensor ``due``, int32: those of which it is 1."""

    @property
    def shapes(self) -> SimpleNamespace:
        """The compile-time arguments of every kernel."""
        return shapes(self.cfg, self.dtype)

    @property
    def rows(self) -> int:
        """The sequences that share a memory."""
        return self.plan.batch // self.memories

    @property
    def groups(self) -> int:
        """The codebooks of all memories: M·H·2."""
        return self.memories * self.cfg.num_heads * 2

    def keeps(self, number: int) -> bool:
        """Whether anyone reads the rows that a window writes."""
        return self.plan.windows[number].writes and not (self.overlaid and number == len(self.plan.windows) - 1)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Windows of one size that read the same keys, as (the first one's number, how many): none before a write
        that moves them, so where keys are at rest all that write and are of as many sequences, and what is left.
        """
        alike = [(i * keys_move(self.cfg), w.writes, w.batch) for i, w in enumerate(self.plan.windows)]
        sizes = [len([*run]) for _, run in itertools.groupby(alike)]
        return [*zip(itertools.accumulate(sizes, initial=0), sizes)]

    @property
    def most_at_once(self) -> int:
        """How many tokens the largest run has."""
        return max(sum(w.batch * w.length for w in self.plan.windows[i : i + n]) for i, n in self.runs)

    def programs(self, number: int, memories: int) -> int:
        """How many programs take the ``number`` items of each of so many memories, or codebooks: one each.

        Where nothing is due at most steps, a few that take turns: a program that only begins takes time too.
        """
        return min(number, max(32, min(256, 1024 // memories))) if self.decided else number

    def turns(self, number: int) -> tuple[int, int]:
        """The grid of ``number`` items of all memories: where each may be due apart, those of each stand alone."""
        memories = self.memories if self.decided else 1
        return self.programs(number // memories, memories), memories

    def blocks(self, integers: dict[str, int], block: int) -> int:
        """How many blocks of a memory's tokens cover the windows of a launch; each is of one window (``window_of``)."""
        return integers["windows"] * blocks_of(self.rows * integers["length"], block)

    def integers(self, number: int, windows: int = 1) -> dict[str, int]:
        """What kernels ask of a window, and of so many from it on, by the names that they have for it."""
        plan, window = self.plan, self.plan.windows[number]
        first_memory, memories = plan.rows(number) // self.rows, window.batch // self.rows
        # A version of the keys has as many as the window before it, which writes it.
        moves = self.memories + plan.rows(number - 1) // self.rows if number and keys_move(self.cfg) else 0
        after = self.memories + first_memory
        return {
            "window": number, "windows": windows, "memories": memories, "first_memory": first_memory,
            "groups": memories * self.cfg.num_heads * 2, "moves": moves, "version": moves * self.save,
            "moves_after": after, "version_after": after * self.save, "d_before": number % 2 * self.memories,
            "d_after": (number + windows) % 2 * self.memories, "start": window.start, "length": window.length,
            "first": window.first, "first_new": window.first_new, "num_tokens": plan.num_tokens,
            "num_pending": plan.num_pending, "total": plan.total, "rows": self.rows,
            "tokens": window.batch * window.length,
        }  # fmt: skip


def of_call(make: Callable[..., Any]) -> Callable[..., Any]:
    """Remember what ``make(call, ...)`` gives: of many short plans, as a token a call has one for each position in
    a chunk, and of few long ones, as their lists of launches are long.
    """
    many, few = functools.lru_cache(1024)(make), functools.lru_cache(64)(make)

    @functools.wraps(make)
    def remembered(call: Call, *rest: Any) -> Any:
        return (many if len(call.plan.windows) <= 2 else few)(call, *rest)

    return remembered


class Bounds(NamedTuple):
    """What a call needs at most."""

    memories: int
    """Memories of all windows, each counted in all that it reads."""
    total: int
    """Tokens of all windows, of all sequences."""
    num_streamed: int
    """Tokens of all streams."""
    longest: int
    """Tokens of a sequence in the longest window."""
    followed: int
    """Tokens of all windows that another follows, of all sequences."""
    ragged: bool
    """Whether streams are of unequal length."""


def bounds(cfg: FwPKMConfig, length: int, batch: int, memories: int, update: bool) -> Bounds:
    """The bounds of ``plan`` at position 0, of plain integers or of symbols."""
    if not update:
        return Bounds(memories, batch * length, batch * length, length, 0, False)
    windows, lag = schedule.max_writes(cfg, length), schedule.lag(cfg)
    total = batch * (length + lag * windows)
    return Bounds(windows * memories, total, batch * length, cfg.chunk_size + lag, total, False)


def least(plan: Plan, rows: int) -> Bounds:
    """What one plan needs, of whose sequences so many share a memory."""
    memories, followed = plan.rows(len(plan.windows)) // rows, plan.windows[-1].first
    return Bounds(memories, plan.total, plan.num_streamed, plan.longest, followed, plan.begins is not None)
