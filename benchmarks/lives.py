"""Players of a life that ``python -m benchmarks.fuzz`` draws: backends that hold a batch, and what must come out."""

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fwpkm
from fwpkm import FwPKMConfig, Memory, State, Trace
from fwpkm.agreement import relative_error
from fwpkm.conformance import judging
from fwpkm.conformance.running import Reading, as_numpy, native, same_bits
from fwpkm.conformance.strategies import floating, unmasked
from fwpkm.schedule import max_writes
from fwpkm.tokens import Tokens


class Step(NamedTuple):
    """One thing that is done to a batch, with all numbers that it takes, as NumPy arrays."""

    name: str
    tokens: Tokens | None = None
    ends: np.ndarray | None = None
    """``cu_seqlens``"""
    rows: Any = None
    memory: Memory | None = None
    inplace: bool = False
    """Where a backend has that."""
    seed: int = 0
    """Of choices that make no difference."""


class Seen(NamedTuple):
    """What a step gave, as NumPy arrays."""

    output: np.ndarray | None
    trace: Trace | None
    state: State


class LifeError(Exception):
    """A life in which something was wrong."""


class Batch:
    """A batch in a backend. A step that reads or flushes returns its output and trace."""

    def __init__(self, be: Any, cfg: FwPKMConfig, nudged: np.random.Generator | None = None) -> None:
        """``nudged`` moves every number that it takes by half a unit of rounding."""
        self.be, self.cfg, self.nudged, self.state = be, cfg, nudged, None

    @property
    def has_inplace(self) -> bool:
        """Whether the backend has calls in place."""
        return "inplace" in inspect.signature(self.be.apply).parameters

    def taken(self, tree: Any) -> Any:
        """Arrays of a step as the backend's own."""
        if self.nudged is not None and tree is not None:
            kind = type(tree)
            tree = kind(*(x if x is None or x.dtype.kind != "f" else self._moved(x) for x in tree))
        return native(self.be, tree)

    def _moved(self, x: np.ndarray) -> np.ndarray:
        return x * (1 + self.nudged.choice([-1, 1], x.shape) * np.finfo(x.dtype).eps / 2)

    def do(self, step: Step) -> Seen:
        """Go on by one step; a state that may not be overwritten keeps its bits."""
        kept, inplace = self.state, step.inplace and self.has_inplace
        before = None if kept is None or inplace else as_numpy(self.be, kept)
        result = getattr(self, f"_{step.name}")(step, **({"inplace": True} if inplace else {}))
        if before is not None and not same_bits(as_numpy(self.be, kept), before):
            raise LifeError("the state that it was given has other bits")
        return Seen(*as_numpy(self.be, result or (None, None)), self.seen_state())

    def seen_state(self) -> State:
        """The state as NumPy arrays."""
        return as_numpy(self.be, self.state)

    def _begin(self, step: Step) -> None:
        self.state = self.be.init_state(self.cfg, self.taken(step.memory), step.rows)

    def _read(self, step: Step, **options: Any) -> tuple[Any, Any]:
        ends = native(self.be, step.ends)
        tokens = self.taken(step.tokens).present()
        output, self.state, trace = self.be.apply(self.cfg, self.state, **tokens, cu_seqlens=ends, **options)
        return output, trace

    def _read_only(self, step: Step) -> tuple[Any, Any]:
        before = self.seen_state()
        result = self._read(step, update=False)
        if not same_bits(self.seen_state(), before):
            raise LifeError("update=False changed the state")
        return result

    def _decode(self, step: Step) -> tuple[Any, Any]:
        if not hasattr(self.be, "decode"):
            return self._read(step)[0], None
        state = self.be.start_decoding(self.state)
        result = self.be.decode(self.cfg, state, **self.taken(step.tokens).present())
        output, self.state = result if isinstance(result, tuple) else (result, state)
        return output, None

    def _flush(self, step: Step, **options: Any) -> tuple[Any, Any]:
        self.state, trace = self.be.flush(self.cfg, self.state, step.rows, **options)
        return None, trace

    def _reset(self, step: Step, **options: Any) -> None:
        self.state = self.be.reset(self.cfg, self.state, self.taken(step.memory), step.rows, **options)

    def _select(self, step: Step) -> None:
        self.state = self.be.select(self.cfg, self.state, step.rows)

    def _other(self, step: Step) -> "Batch":
        """Other rows, which have read something."""
        other = type(self)(self.be, self.cfg, self.nudged)
        other._begin(step._replace(rows=len(step.memory.keys)))
        other._read(step)
        return other

    def _put(self, step: Step, **options: Any) -> None:
        self.state = self.be.put(self.cfg, self.state, step.rows, self._other(step).state, **options)

    def _concat(self, step: Step) -> None:
        self.state = self.be.concat(self.cfg, [self.state, self._other(step).state])

    def _pack(self, step: Step) -> None:
        """Packed beside an initial memory of which it has changed a few rows, whole or row by row."""
        rng, before = np.random.default_rng(step.seed), self.seen_state()
        initial = Memory(before.memory.keys, before.memory.values.copy())
        initial.values[rng.uniform(size=initial.values.shape[:2]) < 0.2] += 1
        memory, size = native(self.be, initial), len(before.position)
        if self.cfg.memory_scope == "sequence" and rng.integers(2):
            apart = [self.be.select(self.cfg, self.state, [b]) for b in range(size)]
            alone = [native(self.be, _row(initial, b)) for b in range(size)]
            packed: Any = [self.be.pack(self.cfg, row, own) for row, own in zip(apart, alone)]
        else:
            packed = self.be.pack(self.cfg, self.state, memory)
        self.state = self.be.unpack(self.cfg, packed, memory)
        if not same_bits(self.seen_state(), before):
            raise LifeError("pack and unpack gave other bits")

    # Files

    def save(self, path: Path, kind: str) -> None:
        """Write the state."""
        if kind == "state":
            fwpkm.save_state(path, self.state, self.cfg)
        elif kind == "states":
            fwpkm.save_states(path, {"a": self.state, "a.b": self.state}, self.cfg)
        else:
            fwpkm.save_packed(path, {"a": self.be.pack(self.cfg, self.state, self.state.memory)})

    def load(self, path: Path, kind: str, memory: Memory) -> State:
        """Read a state that any backend wrote; ``memory`` is that of its tables."""
        if kind == "state":
            return fwpkm.load_state(path, self.cfg, self.be)
        if kind == "states":
            return list(fwpkm.load_states(path, self.cfg, self.be).values())[-1]
        packed = next(iter(fwpkm.load_packed(path).values()))
        return self.be.unpack(self.cfg, packed, native(self.be, memory))


class Alone(Batch):
    """What must come out in "sequence" scope: the reference, with a state of its own for each row."""

    rows: list[Any]
    has_inplace = False

    def seen_state(self) -> State:
        """The rows as one state."""
        return self.rows[0].map(lambda *x: np.concatenate(x), *self.rows[1:])

    def _begin(self, step: Step) -> None:
        self.rows = [None] * step.rows
        self._reset(step._replace(rows=None))

    def _read(self, step: Step, **options: Any) -> tuple[Any, Any]:
        tokens: Tokens = self.taken(step.tokens)
        there, cfg, rows = unmasked(tokens), self.cfg, len(self.rows)
        ends = np.arange(rows + 1) * tokens.length if step.ends is None else step.ends
        trace = self._no_trace(there.shape, max_writes(cfg, tokens.length))
        output = np.zeros((*there.shape, cfg.value_dim))
        flat = tokens._replace(mask=None).map(lambda x: x.reshape(-1, *x.shape[2:]))
        wholes = [x.reshape(there.size, x.shape[-1]) for x in (output, trace.slots, trace.weights)]  # views
        for b, (start, stop) in enumerate(itertools.pairwise(ends)):
            at = start + np.flatnonzero(there.ravel()[start:stop])
            own = flat.map(lambda x, at=at: x[at][None]).present()
            result, self.rows[b], record = self.be.apply(cfg, self.rows[b], **own, **options)
            for whole, part in zip(wholes, (result, record.slots, record.weights)):
                whole[at] = part[0]
            _keep_losses(trace, b, record)
        return output, trace

    def _flush(self, step: Step) -> tuple[Any, Any]:
        trace = self._no_trace((len(self.rows), 0), 1)
        for b in self._chosen(step):
            self.rows[b], record = self.be.flush(self.cfg, self.rows[b])
            _keep_losses(trace, b, record)
        return None, trace

    def _no_trace(self, tokens: tuple[int, ...], columns: int) -> Trace:
        entries, losses = (*tokens, self.cfg.slots_per_token), np.zeros((2, len(self.rows), columns))
        return Trace(np.zeros(entries, np.int64), np.zeros(entries), *losses, np.zeros(len(self.rows), np.int32))

    def _reset(self, step: Step) -> None:
        memory = self.taken(step.memory)
        for b in self._chosen(step):
            self.rows[b] = self.be.init_state(self.cfg, _row(memory, min(b, len(memory.keys) - 1)), 1)

    def _chosen(self, step: Step) -> list[int]:
        """Ids of rows, however they were named."""
        return np.arange(len(self.rows))[slice(None) if step.rows is None else step.rows].tolist()

    def _select(self, step: Step) -> None:
        self.rows = [self.rows[b] for b in step.rows]

    def _put(self, step: Step) -> None:
        for b, row in zip(step.rows, self._other(step).rows):
            self.rows[b] = row

    def _concat(self, step: Step) -> None:
        self.rows = [*self.rows, *self._other(step).rows]

    def _pack(self, step: Step) -> None:
        """Changes nothing."""


def _row(memory: Memory, m: int) -> Memory:
    return Memory(*(x[m : m + 1] for x in memory))


def _keep_losses(trace: Trace, b: int, record: Trace) -> None:
    """Of a row that was read alone, in the batch's trace."""
    trace.writes[b] = record.writes[0]
    for name in ("memorization", "addressing"):
        getattr(trace, name)[b, : getattr(record, name).shape[1]] = getattr(record, name)[0]


def errors(cfg: FwPKMConfig, actual: Seen, expected: Seen) -> Iterator[tuple[str, float]]:
    """Each quantity and its error."""
    if actual.trace is not None and expected.trace is not None:
        nothing = np.zeros((len(expected.state.position), 0, cfg.value_dim))
        both = (
            Reading(nothing if x.output is None else x.output, *x.trace, memory=x.state.memory)
            for x in (actual, expected)
        )
        yield from judging.reading_errors(cfg, *both)
    else:
        if actual.output is not None:
            yield "output", relative_error(actual.output, expected.output)
        for name, x in actual.state.memory._asdict().items():
            yield name, relative_error(x, getattr(expected.state.memory, name))
    for name, x in floating(actual.state.pending).items():
        yield "pending", relative_error(x, floating(expected.state.pending)[name])
    same = np.array_equal(actual.state.pending.mask, expected.state.pending.mask)
    same &= np.array_equal(actual.state.position, expected.state.position)
    yield "position", 0.0 if same else float("inf")
    yield "uses", judging.uses_error(actual.state, expected.state)
