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
    """A batch in a backend."""

    def __init__(self, be: Any, cfg: FwPKMConfig, nudged: np.random.Generator | None = None) -> None:
        """``nudged`` moves every number that it takes by half a unit of rounding."""
        self.be, self.cfg, self.nudged = be, cfg, nudged
        self.has_inplace = "inplace" in inspect.signature(be.apply).parameters
        self.state: Any = None

    def taken(self, tree: Any) -> Any:
        """Arrays of a step as the backend's own."""
        if self.nudged is not None and tree is not None:
            kind = type(tree)
            tree = kind(*(x if x is None or x.dtype.kind != "f" else self._moved(x) for x in tree))
        return native(self.be, tree)

    def _moved(self, x: np.ndarray) -> np.ndarray:
        assert self.nudged is not None
        return x * (1 + self.nudged.choice([-1, 1], x.shape) * np.finfo(x.dtype).eps / 2)

    def do(self, step: Step) -> Seen:
        """Go on by one step; a state that may not be overwritten keeps its bits."""
        kept, inplace = self.state, step.inplace and self.has_inplace
        before = None if kept is None or inplace else as_numpy(self.be, kept)
        output, trace = getattr(self, f"_{step.name}")(step, {"inplace": True} if inplace else {})
        if before is not None and not same_bits(as_numpy(self.be, kept), before):
            raise LifeError("the state that it was given has other bits")
        return Seen(*as_numpy(self.be, (output, trace)), self.seen_state())

    def seen_state(self) -> State:
        """The state as NumPy arrays."""
        return as_numpy(self.be, self.state)

    def _begin(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        assert step.memory is not None
        self.state = self.be.init_state(self.cfg, self.taken(step.memory), step.rows)
        return None, None

    def _read(self, step: Step, options: dict[str, Any], **others: Any) -> tuple[Any, Any]:
        assert step.tokens is not None
        ends = None if step.ends is None else native(self.be, step.ends)
        tokens = self.taken(step.tokens).present()
        output, self.state, trace = self.be.apply(self.cfg, self.state, **tokens, cu_seqlens=ends, **options, **others)
        return output, trace

    def _read_only(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        before = self.seen_state()
        result = self._read(step, {}, update=False)
        if not same_bits(self.seen_state(), before):
            raise LifeError("update=False changed the state")
        return result

    def _decode(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        if not hasattr(self.be, "decode"):
            return self._read(step, options)[0], None
        assert step.tokens is not None
        state = self.be.start_decoding(self.state)
        result = self.be.decode(self.cfg, state, **self.taken(step.tokens).present())
        output, self.state = result if isinstance(result, tuple) else (result, state)
        return output, None

    def _flush(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        self.state, trace = self.be.flush(self.cfg, self.state, step.rows, **options)
        return None, trace

    def _reset(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        self.state = self.be.reset(self.cfg, self.state, self.taken(step.memory), step.rows, **options)
        return None, None

    def _select(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        self.state = self.be.select(self.cfg, self.state, step.rows)
        return None, None

    def _other(self, step: Step) -> Any:
        """A state of other rows that have read something."""
        assert step.memory is not None
        assert step.tokens is not None
        state = self.be.init_state(self.cfg, self.taken(step.memory), len(step.memory.keys))
        return self.be.apply(self.cfg, state, **self.taken(step.tokens).present())[1]

    def _put(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        self.state = self.be.put(self.cfg, self.state, step.rows, self._other(step), **options)
        return None, None

    def _concat(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        self.state = self.be.concat(self.cfg, [self.state, self._other(step)])
        return None, None

    def _pack(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        """Packed beside an initial memory of which it has changed a few rows, whole or row by row."""
        rng, before = np.random.default_rng(step.seed), self.seen_state()
        initial = Memory(before.memory.keys, before.memory.values.copy())
        initial.values[rng.uniform(size=initial.values.shape[:2]) < 0.2] += 1
        memory, size = native(self.be, initial), len(before.position)
        if self.cfg.memory_scope == "sequence" and rng.integers(2):
            apart = [self.be.select(self.cfg, self.state, [b]) for b in range(size)]
            alone = [native(self.be, Memory(*(x[b : b + 1] for x in initial))) for b in range(size)]
            packed: Any = [self.be.pack(self.cfg, row, own) for row, own in zip(apart, alone)]
        else:
            packed = self.be.pack(self.cfg, self.state, memory)
        self.state = self.be.unpack(self.cfg, packed, memory)
        if not same_bits(self.seen_state(), before):
            raise LifeError("pack and unpack gave other bits")
        return None, None

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

    rows: list[State]

    def seen_state(self) -> State:
        """The rows as one state."""
        return self.rows[0].map(lambda *x: np.concatenate(x), *self.rows[1:])

    def _begin(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        assert step.memory is not None
        memory = self.taken(step.memory)
        own = [min(b, len(memory.keys) - 1) for b in range(step.rows)]
        self.rows = [self.be.init_state(self.cfg, Memory(*(x[m : m + 1] for x in memory)), 1) for m in own]
        return None, None

    def _read(self, step: Step, options: dict[str, Any], **others: Any) -> tuple[Any, Any]:
        tokens: Tokens = self.taken(step.tokens)
        there, cfg, rows = unmasked(tokens), self.cfg, len(self.rows)
        (size, length), columns = there.shape, max_writes(self.cfg, tokens.length)
        ends = np.arange(size + 1) * length if step.ends is None else step.ends
        entries = (size * length, cfg.slots_per_token)
        output, losses = np.zeros((size * length, cfg.value_dim)), np.zeros((2, rows, columns))
        trace = Trace(np.zeros(entries, np.int64), np.zeros(entries), *losses, np.zeros(rows, np.int32))
        flat = tokens._replace(mask=None).map(lambda x: x.reshape(-1, *x.shape[2:]))
        for b, (start, stop) in enumerate(itertools.pairwise(ends)):
            at = start + np.flatnonzero(there.ravel()[start:stop])
            own = flat.map(lambda x, at=at: x[at][None]).present()
            output[at], self.rows[b], record = self.be.apply(cfg, self.rows[b], **own, **others)
            trace.slots[at], trace.weights[at], trace.writes[b] = record.slots[0], record.weights[0], record.writes[0]
            for name in ("memorization", "addressing"):
                getattr(trace, name)[b, : getattr(record, name).shape[1]] = getattr(record, name)[0]
        shape = (size, length, cfg.slots_per_token)
        trace = trace._replace(slots=trace.slots.reshape(shape), weights=trace.weights.reshape(shape))
        return output.reshape(size, length, cfg.value_dim), trace

    def _flush(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        size = len(self.rows)
        shape = (size, 0, self.cfg.slots_per_token)
        trace = Trace(np.zeros(shape, np.int64), np.zeros(shape), *np.zeros((2, size, 1)), np.zeros(size, np.int32))
        for b in _chosen(step.rows, size):
            self.rows[b], record = self.be.flush(self.cfg, self.rows[b])
            trace.writes[b] = record.writes[0]
            trace.memorization[b], trace.addressing[b] = record.memorization[0], record.addressing[0]
        return None, trace

    def _reset(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        memory = self.taken(step.memory)
        for b in _chosen(step.rows, len(self.rows)):
            m = min(b, len(memory.keys) - 1)
            self.rows[b] = self.be.init_state(self.cfg, Memory(*(x[m : m + 1] for x in memory)), 1)
        return None, None

    def _select(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        self.rows = [self.rows[b] for b in step.rows]
        return None, None

    def _other_rows(self, step: Step) -> list[State]:
        other = Alone(self.be, self.cfg, self.nudged)
        assert step.memory is not None
        other.do(step._replace(name="begin", rows=len(step.memory.keys)))
        other.do(step._replace(name="read"))
        return other.rows

    def _put(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        for b, row in zip(step.rows, self._other_rows(step)):
            self.rows[b] = row
        return None, None

    def _concat(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        self.rows = [*self.rows, *self._other_rows(step)]
        return None, None

    def _pack(self, step: Step, options: dict[str, Any]) -> tuple[Any, Any]:
        return None, None


def _chosen(rows: Any, size: int) -> list[int]:
    """Ids of rows, however they were named."""
    return np.arange(size)[slice(None) if rows is None else rows].tolist()


def errors(cfg: FwPKMConfig, actual: Seen, expected: Seen) -> Iterator[tuple[str, float]]:
    """Each quantity and its error."""
    tables = actual.state.memory
    if actual.trace is not None and expected.trace is not None:
        nothing = np.zeros((len(expected.state.position), 0, cfg.value_dim))
        both = (
            Reading(nothing if x.output is None else x.output, *x.trace, memory=x.state.memory)  # type: ignore[misc]
            for x in (actual, expected)
        )
        yield from judging.reading_errors(cfg, *both)
    else:
        if actual.output is not None:
            yield "output", relative_error(actual.output, expected.output)
        for name, x in tables._asdict().items():
            yield name, relative_error(x, getattr(expected.state.memory, name))
    for name, x in floating(actual.state.pending).items():
        yield "pending", relative_error(x, floating(expected.state.pending)[name])
    same = np.array_equal(actual.state.pending.mask, expected.state.pending.mask)
    same &= np.array_equal(actual.state.position, expected.state.position)
    yield "position", 0.0 if same else float("inf")
