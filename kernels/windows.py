"""Which windows a call reads (SPEC.md §5), and what any call of its length needs room for."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fwpkm import schedule
from fwpkm.config import FwPKMConfig


class Window(NamedTuple):
    """Tokens [start, start + length) of the stream; whether the chunk at their beginning is written after them."""

    start: int
    length: int
    writes: bool
    first: int
    """Tokens of all sequences in the windows before."""
    fresh: int
    """Where in the stream the tokens begin that no window before has read."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a call reads and writes. Each is made once and equal to itself alone, so that it is a quick key."""

    windows: tuple[Window, ...]
    arrived: int
    """Tokens of the stream that were pending: their reads have been output before."""
    room: int
    """n, tokens of the stream: pending ones, then new ones."""
    left: int
    """Where in the stream the tokens begin that no write has consumed."""
    total: int
    """Tokens of all windows, of all sequences."""
    longest: int
    """Tokens of a sequence in the longest window."""
    kinds: frozenset[bool]
    """Whether windows write, and whether any does not."""

    @classmethod
    def of(cls, windows: Iterable[Window], arrived: int, room: int, left: int, total: int) -> "Plan":
        """With what follows from the windows."""
        windows = tuple(windows)
        kinds = frozenset(w.writes for w in windows)
        return cls(windows, arrived, room, left, total, max(w.length for w in windows), kinds)


def plan(cfg: FwPKMConfig, position: int, length: int, batch: int, update: bool) -> Plan:
    """The windows of a call of ``length`` tokens at ``position``."""
    return _plan(cfg, schedule.pending(cfg, position) if update else None, length, batch)


@functools.lru_cache(1024)
def write(length: int, batch: int) -> Plan:
    """The one window of tokens that wait, to be written."""
    return Plan.of([Window(0, length, True, 0, length)], length, length, length, batch * length)


@functools.lru_cache(1024)
def _plan(cfg: FwPKMConfig, arrived: int | None, length: int, batch: int) -> Plan:
    """The plan where so many tokens are pending, on which alone it depends; None only reads."""
    if arrived is None:
        return Plan.of([Window(0, length, False, 0, 0)], 0, length, 0, batch * length)
    windows, start, first = [], 0, 0
    fresh = arrived
    for begin, end, writes in schedule.windows(cfg, arrived, length):
        begin, end = begin + arrived, end + arrived
        begin = start if writes else begin  # a write reads its whole chunk again; else what is pending stays unread
        windows.append(Window(begin, end - begin, writes, first, fresh))
        first, fresh = first + batch * (end - begin), end
        start += cfg.chunk_size * writes
    return Plan.of(windows, arrived, fresh, start, first)


def of_plan(make: Callable[..., Any]) -> Callable[..., Any]:
    """Remember what ``make(cfg, plan, ...)`` gives: of many short plans, as a token a call has one for each place in a
    chunk, and of few long ones, as their lists of launches are long.
    """
    many, few = functools.lru_cache(1024)(make), functools.lru_cache(64)(make)

    @functools.wraps(make)
    def remembered(cfg: FwPKMConfig, plan: Plan, *rest: Any) -> Any:
        return (many if len(plan.windows) <= 2 else few)(cfg, plan, *rest)

    return remembered


class Bounds(NamedTuple):
    """What any call of a length needs room for, wherever it begins."""

    windows: int
    tokens: int
    """Of all windows, of all sequences."""
    room: int
    longest: int
    """Tokens of a sequence in the longest window."""


def bounds(cfg: FwPKMConfig, length: int, batch: int, update: bool) -> Bounds:
    """The bounds of ``plan`` over all positions."""
    if not update:
        return Bounds(1, batch * length, length, length)
    writes, room = schedule.max_writes(cfg, length), cfg.capacity + length
    longest = min(room, cfg.chunk_size + schedule.lag(cfg))
    return Bounds(writes + 1, batch * (room + schedule.lag(cfg) * writes), room, longest)


def least(plan: Plan, batch: int) -> Bounds:
    """What one plan needs room for."""
    return Bounds(len(plan.windows), plan.total, plan.room, plan.longest)
