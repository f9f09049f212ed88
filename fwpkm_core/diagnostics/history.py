"""Who wrote what: the writers of each slot, found in a recording (SPEC.md §3 to §5)."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.diagnostics.calls import has_pair
from fwpkm.diagnostics.record import Entry

KEPT = 8
"""So many of a slot's writers are listed, the last ones; all are counted."""
QUANTILES = (0, 25, 50, 75, 100)


class Tokens(NamedTuple):
    """All tokens of one row of the states, in the order of their reading."""

    text: list[str] | None
    """None where the recording has none of some call."""
    gate: np.ndarray | None
    live: np.ndarray


class Slots(NamedTuple):
    """The slots of one memory that were written, n in all, by id."""

    slot: np.ndarray
    """``[n]``"""
    writers: np.ndarray
    """``[n]``: how many tokens wrote it: those with a pair that read it, in a chunk that was written."""
    chunks: np.ndarray
    """``[n]``: in how many chunks."""
    recent: list[list[tuple[int, int, float]]]
    """The last writers of each, latest first: row, number of the token in it, weight."""


class Norms(NamedTuple):
    """The norms of a memory's rows, over time."""

    tokens: list[int]
    """How many tokens of the recording the memory's rows had read."""
    quantiles: list[list[float]]
    """Least, quartiles and largest at each of these times."""
    last: np.ndarray
    """``[N]`` at the last."""


class History(NamedTuple):
    """What a recording tells."""

    config: FwPKMConfig
    calls: int
    rows: list[Tokens]
    memories: list[Slots]
    norms: list[Norms | None]
    chunks: int
    """Chunks that were written, over all memories."""


def read_history(cfg: FwPKMConfig, entries: Iterable[Entry]) -> History:
    """The history of the calls of a recording."""
    builder = _Builder(cfg)
    for entry in entries:
        builder.add(entry)
    return builder.history()


class _Row:
    """What is known of one row: all its tokens, and those that no write has consumed."""

    def __init__(self, cfg: FwPKMConfig) -> None:
        self.count, self.next = 0, 0
        self.text: list[str] | None = []
        self.gate: list[np.ndarray] | None = []
        self.live: list[np.ndarray] = []
        self.pending = _nothing(cfg)


def _nothing(cfg: FwPKMConfig) -> dict[str, np.ndarray]:
    reads = np.zeros((0, cfg.slots_per_token))
    empty = np.zeros(0, np.int64)
    return {
        "position": empty, "number": empty, "live": empty.astype(bool),
        "slots": reads.astype(np.int32), "weights": reads.astype(np.float32),
    }  # fmt: skip


class _Builder:
    """Follows the clocks of all rows through the calls."""

    def __init__(self, cfg: FwPKMConfig) -> None:
        self.cfg, self.calls, self.chunks = cfg, 0, 0
        self.rows: list[_Row] = []
        self.events: list[list[dict[str, np.ndarray]]] = []
        self.norms: list[list[tuple[int, list[float], np.ndarray]]] = []

    def add(self, entry: Entry) -> None:
        """Take in one call."""
        call = entry.call
        self.calls += 1
        self.rows += [_Row(self.cfg) for _ in range(len(call.start) - len(self.rows))]
        for _ in range(len(call.writes) - len(self.events)):
            self.events.append([])
            self.norms.append([])
        memory = call.memory_of(np.arange(len(call.start)))
        for number, start in enumerate(call.start):
            self._read(self.rows[number], entry, number, int(start))
        self.chunks += int(call.writes.sum())
        for m, writes in enumerate(call.writes):
            rows = np.flatnonzero(memory == m)
            first = int(schedule.written(self.cfg, int(call.start[rows[0]])))
            for chunk in range(first, first + int(writes)):
                events = [self._written(int(row), chunk) for row in rows]
                self.events[m].append({name: np.concatenate([e[name] for e in events]) for name in events[0]})
        for number, row in enumerate(self.rows[: len(call.start)]):
            self._go_on(row, int(call.start[number]), int(call.stop[number]), int(entry.end[number]))
        if entry.norms is not None:
            for m, norms in enumerate(entry.norms):
                read = sum(self.rows[int(row)].count for row in np.flatnonzero(memory == m))
                self.norms[m].append((read, np.percentile(norms, QUANTILES).tolist(), norms))

    def _read(self, row: _Row, entry: Entry, number: int, start: int) -> None:
        """Number the row's new tokens, and put them behind its pending ones."""
        call, mine = entry.call, np.flatnonzero(entry.call.row == number)
        if start != row.next:  # another sequence has taken the row, or calls were left out
            row.pending = _nothing(self.cfg)
        new = {name: getattr(call, name)[mine] for name in ("position", "live", "slots", "weights")}
        new["number"] = row.count + np.arange(len(mine))
        row.count += len(mine)
        row.pending = {name: np.concatenate([array, new[name]]) for name, array in row.pending.items()}
        row.live.append(new["live"])
        if len(mine):
            row.text = None if row.text is None or entry.text is None else row.text + [entry.text[i] for i in mine]
            row.gate = None if row.gate is None or call.gate is None else [*row.gate, call.gate[mine]]

    def _written(self, number: int, chunk: int) -> dict[str, np.ndarray]:
        """What the row's tokens of a chunk wrote: slot, row, number, weight for each slot that one with a pair read."""
        cfg, pending = self.cfg, self.rows[number].pending
        position = pending["position"]
        paired = has_pair(cfg, np.zeros_like(position), position, pending["live"])
        paired &= position // cfg.chunk_size == chunk
        slots = pending["slots"][paired]
        token = np.broadcast_to(pending["number"][paired][:, None], slots.shape)
        # Two heads of a token that picked one slot write it once, with both weights.
        pairs, which = np.unique(np.stack([token, slots]).reshape(2, -1), axis=1, return_inverse=True)
        weight = np.bincount(which.reshape(-1), pending["weights"][paired].reshape(-1), minlength=pairs.shape[1])
        return {"number": pairs[0], "slot": pairs[1], "weight": weight, "row": np.full(pairs.shape[1], number)}

    def _go_on(self, row: _Row, start: int, stop: int, end: int) -> None:
        """Keep the tokens that a later write will consume, if the row goes on from where it stands."""
        if end == start != stop:  # the call only read
            keep = row.pending["position"] < start
        else:
            settled = int(schedule.written(self.cfg, stop)) * self.cfg.chunk_size
            keep = (row.pending["position"] >= settled) & (end >= start)
        row.pending = {name: array[keep] for name, array in row.pending.items()}
        row.next = end

    def history(self) -> History:
        """What all calls tell."""
        tokens = [
            Tokens(
                row.text,
                np.concatenate([np.zeros(0), *row.gate]) if row.gate is not None else None,
                np.concatenate([np.zeros(0, bool), *row.live]),
            )
            for row in self.rows
        ]
        norms = [Norms([x[0] for x in n], [x[1] for x in n], n[-1][2]) if n else None for n in self.norms]
        return History(self.cfg, self.calls, tokens, [_slots(events) for events in self.events], norms, self.chunks)


def _slots(events: list[dict[str, np.ndarray]]) -> Slots:
    """The writers of each slot from those of each chunk, in order."""
    if not events:
        empty = np.zeros(0, np.int64)
        return Slots(empty, empty, empty, [])
    every: dict[str, Any] = {name: np.concatenate([e[name] for e in events]) for name in events[0]}
    chunk = np.repeat(np.arange(len(events)), [len(e["slot"]) for e in events])
    order = np.lexsort((np.arange(len(chunk)), every["slot"]))
    slot, first, writers = np.unique(every["slot"][order], return_index=True, return_counts=True)
    chunks = np.unique(np.stack([every["slot"], chunk]), axis=1)[0]
    recent = []
    for begin, count in zip(first, writers):
        last = order[begin : begin + count][::-1][:KEPT]
        recent.append([(int(every["row"][i]), int(every["number"][i]), float(every["weight"][i])) for i in last])
    return Slots(slot, writers, np.unique(chunks, return_counts=True)[1], recent)
