"""Which windows a call reads (SPEC.md §5), what its launches follow from, and what any call of its length needs."""

import dataclasses
import functools
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


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a call reads and writes. Each is made once and equal to itself alone, so that it is a quick key."""

    windows: tuple[Window, ...]
    num_pending: int
    """Tokens at the beginning of the stream that were pending: their reads have been output before."""
    num_tokens: int
    """n, tokens of the stream: pending ones, then new ones."""
    first_unwritten: int
    """Where in the stream the tokens begin that no write has consumed."""
    total: int
    """Tokens of all windows, of all sequences."""
    longest: int
    """Tokens of a sequence in the longest window."""
    num_writes: int
    """How many windows write: all, or all but the last; those are of one length."""
    shifted: bool = False
    """Whether values are targets already, of their own tokens (``chunk_update``)."""

    @classmethod
    def of(
        cls, windows: Iterable[Window], num_pending: int, num_tokens: int, first_unwritten: int, total: int
    ) -> "Plan":
        """With what follows from the windows."""
        windows = tuple(windows)
        longest, writes = max(w.length for w in windows), sum(w.writes for w in windows)
        return cls(windows, num_pending, num_tokens, first_unwritten, total, longest, writes)

    @property
    def num_new(self) -> int:
        """T, tokens of the stream that are output."""
        return self.num_tokens - self.num_pending


def plan(cfg: FwPKMConfig, position: int, length: int, batch: int, update: bool) -> Plan:
    """The windows of a call of ``length`` tokens at ``position``."""
    return _plan(cfg, schedule.pending(cfg, position) if update else None, length, batch)


@functools.lru_cache(1024)
def write(length: int, batch: int, shifted: bool = False) -> Plan:
    """The one window of pending tokens, to be written."""
    plan = Plan.of([Window(0, length, True, 0, length)], length, length, length, batch * length)
    return dataclasses.replace(plan, shifted=shifted)


@functools.lru_cache(1024)
def _plan(cfg: FwPKMConfig, num_pending: int | None, length: int, batch: int) -> Plan:
    """The plan where so many tokens are pending, on which alone it depends; None only reads."""
    if num_pending is None:
        return Plan.of([Window(0, length, False, 0, 0)], 0, length, 0, batch * length)
    windows, start, first = [], 0, 0
    first_new = num_pending
    for begin, end, writes in schedule.windows(cfg, num_pending, length):
        begin, end = begin + num_pending, end + num_pending
        begin = start if writes else begin  # a write reads its whole chunk again; else what is pending stays unread
        windows.append(Window(begin, end - begin, writes, first, first_new))
        first, first_new = first + batch * (end - begin), end
        start += cfg.chunk_size * writes
    return Plan.of(windows, num_pending, first_new, start, first)


class Call(NamedTuple):
    """What the launches of a call follow from."""

    cfg: FwPKMConfig
    plan: Plan
    dtype: Any
    """Of the queries, as their framework has it."""
    batch: int
    """B"""
    memories: int
    """M"""
    save: bool
    """Whether the forward keeps what its backward needs."""
    overlaid: bool = False
    """Whether what is written is laid over one table (overlay.py), of which nothing outlives the call."""

    @property
    def shapes(self) -> SimpleNamespace:
        """The compile-time arguments of every kernel."""
        return shapes(self.cfg, self.dtype)

    @property
    def rows(self) -> int:
        """The sequences that share a memory."""
        return self.batch // self.memories

    @property
    def groups(self) -> int:
        """The codebooks of all memories: M·H·2."""
        return self.memories * self.cfg.num_heads * 2

    def keeps(self, number: int) -> bool:
        """Whether anyone reads the rows that a window writes."""
        return self.plan.windows[number].writes and not (self.overlaid and number == len(self.plan.windows) - 1)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Windows of one length that read the same keys, as (the first one's number, how many): none before a write
        that moves them, so where keys are at rest all that write, and what is left.
        """
        number, writes = len(self.plan.windows), self.plan.num_writes
        if keys_move(self.cfg) or self.cfg.recent_penalty:
            return [(i, 1) for i in range(number)]
        return [run for run in ((0, writes), (writes, number - writes)) if run[1]]

    @property
    def most_windows(self) -> int:
        """How many windows the longest run has."""
        return max(windows for _, windows in self.runs)

    def blocks(self, integers: dict[str, int], block: int) -> int:
        """How many blocks of a memory's tokens cover the windows of a launch; each is of one window (``window_of``)."""
        return integers["windows"] * blocks_of(self.rows * integers["length"], block)

    def integers(self, number: int, windows: int = 1) -> dict[str, int]:
        """What kernels ask of a window, and of so many from it on, by the names that they have for it."""
        plan, window = self.plan, self.plan.windows[number]
        moves = number * keys_move(self.cfg)  # each window before has written
        return {
            "window": number, "windows": windows, "moves": moves, "version": moves * self.save,
            "start": window.start, "length": window.length, "first": window.first,
            "first_new": window.first_new, "num_tokens": plan.num_tokens, "num_pending": plan.num_pending,
            "num_new": plan.num_new, "total": plan.total, "rows": self.rows, "memories": self.memories,
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

    windows: int
    total: int
    """Tokens of all windows, of all sequences."""
    num_tokens: int
    longest: int
    """Tokens of a sequence in the longest window."""
    followed: int
    """Tokens of all windows that another follows, of all sequences."""


def bounds(cfg: FwPKMConfig, length: int, batch: int, update: bool) -> Bounds:
    """The bounds of ``plan`` at position 0, of plain integers or of symbols."""
    if not update:
        return Bounds(1, batch * length, length, length, 0)
    windows, lag = schedule.max_writes(cfg, length), schedule.lag(cfg)
    total = batch * (length + lag * windows)
    return Bounds(windows, total, length, cfg.chunk_size + lag, total)


def least(plan: Plan, batch: int) -> Bounds:
    """What one plan needs."""
    return Bounds(len(plan.windows), plan.total, plan.num_tokens, plan.longest, plan.windows[-1].first)
