"""What a backend makes of a passage, and what the reference makes of it."""

import functools
import sys
from typing import Any, NamedTuple

import numpy as np

from fwpkm import reference
from fwpkm.conformance import running
from fwpkm.conformance.drawing import Passage
from fwpkm.conformance.running import INPUTS, Reading, as_numpy, native, same_bits
from fwpkm.conformance.strategies import floating
from fwpkm.containers import Lookup, Losses, Memory, State
from fwpkm.protocol import Backend, DifferentiableBackend
from fwpkm.registry import get_backend


class Calls(NamedTuple):
    """What functions gave when they were called alone: on a case's first chunk, or on its state in mid-sequence."""

    init_memory: Memory
    init_state: State
    """Of one memory for the whole batch."""
    lookup: Lookup
    written: Memory
    """The tables of ``chunk_update``."""
    losses: Losses
    reset: State
    """Of one row, or of all that share a memory."""
    read_only: Lookup
    """Of ``apply`` with ``update=False``, from the start."""
    unchanged: bool
    """Whether ``update=False`` left the state alone and wrote nothing, at the start and in mid-sequence."""


class Result(NamedTuple):
    """One passage through one backend, as NumPy arrays."""

    reading: Reading
    state: State
    """In mid-sequence, where it passed through NumPy."""
    flushed: State
    """After the last flush."""
    calls: Calls
    gradients: dict[str, np.ndarray]
    """By the names of ``INPUTS``; empty where none were asked for, or the backend has no ``vjp``."""
    overwritten: tuple[str, ...] = ()
    """The functions that changed an argument."""


class _Watched:
    """A backend that compares the arrays that its functions are handed, before and after each call."""

    def __init__(self, be: Backend) -> None:
        self._be = be
        self.overwritten: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._be, name)
        return function if name in ("asarray", "to_numpy") else functools.partial(self._call, name, function)

    def _call(self, name: str, function: Any, *args: Any, **options: Any) -> Any:
        arrays = tuple(running.arrays((*args, *options.values())))
        before = as_numpy(self._be, arrays)
        returned = function(*args, **options)
        if not same_bits(as_numpy(self._be, arrays), before):
            print(f"{name} has overwritten an argument", file=sys.stderr)
            self.overwritten.add(name)
        return returned


def run(be: Any, passage: Passage) -> Result:
    """Read a passage and call every function; gradients where it asks for them and the backend has ``vjp``."""
    derived = passage.with_gradients and callable(getattr(be, "vjp", None))
    watched: Any = _Watched(be)
    gradients = _gradients(be, passage) if derived else {}
    return _values(watched, passage)._replace(gradients=gradients, overwritten=tuple(sorted(watched.overwritten)))


def expect(passage: Passage) -> Result:
    """The reference's result on the same numbers in float64, with torch's gradients."""
    wide = passage._replace(case=passage.case.widened())
    gradients = _gradients(get_backend("torch"), wide) if passage.with_gradients else {}
    return _values(reference, wide)._replace(gradients=gradients)


def _values(be: Any, passage: Passage) -> Result:
    """All but gradients."""
    reading, state, flushed = _read(be, passage)
    calls = _calls(be, passage, state)
    arrays = {"output": reading.output, "lookup.output": calls.lookup.output} | reading.memory._asdict()
    arrays |= {f"chunk_update {name}": table for name, table in calls.written._asdict().items()}
    for name, array in arrays.items():
        if str(array.dtype) != passage.case.dtype:
            dtype = passage.case.dtype
            raise running.BrokenContractError(f"{name} must have dtype {dtype}. Received: {array.dtype}")
    return Result(reading, state, flushed, calls, gradients={})


def _read(be: Backend, passage: Passage) -> tuple[Reading, State, State]:
    """In calls of the passage's sizes, flushed where the case says and at the end, handed over in the middle."""
    case, sizes, parts = passage.case, passage.sizes, []
    state, at, call = running.start(be, case), 0, 0
    stops = [(passage.handed, False), (len(sizes), True)]
    if case.flush_after is not None:
        flushed = np.cumsum(sizes).tolist().index(case.flush_after) + 1
        stops = [(flushed, True), *stops]
    for stop, flush in stops:
        part = sizes[call:stop]
        tokens = case.tokens.slice(at, at + sum(part))
        reading, state = running.stream(be, case.cfg, state, tokens, part, flush=flush)
        parts.append(reading)
        at, call = at + sum(part), stop
        if stop == passage.handed and not flush:
            middle = as_numpy(be, state)
            state = native(be, middle)
    return functools.reduce(running.joined, parts), middle, as_numpy(be, state)


def _calls(be: Any, passage: Passage, middle: State) -> Calls:
    case, cfg, rng = passage.case, passage.case.cfg, np.random.default_rng(passage.case.seed)
    chunk, memories = case.tokens.slice(0, cfg.chunk_size), len(case.memory.keys)
    memory, tokens = native(be, case.memory), native(be, chunk)
    pair = native(be, rng.uniform(size=chunk.query.shape[:2]) < 0.75)
    rows = np.full(case.batch, memories == 1)
    rows[rng.integers(case.batch)] = True
    ids = rows.tolist() if rng.integers(2) else np.flatnonzero(rows).tolist()
    fields = tokens.present()
    written, losses = be.chunk_update(cfg, memory, target=fields.pop("value"), **fields, pair=pair)
    starts = [running.start(be, case), native(be, middle)]
    streams = [running.stream(be, cfg, state, chunk, update=False) for state in starts]
    same = [same_bits(as_numpy(be, after), as_numpy(be, before)) for before, (_, after) in zip(starts, streams)]
    readings = [reading for reading, _ in streams]
    return Calls(
        init_memory=as_numpy(be, be.init_memory(cfg, memories, case.seed)),
        init_state=as_numpy(be, be.init_state(cfg, be.init_memory(cfg, 1, case.seed), case.batch)),
        lookup=as_numpy(be, be.lookup(cfg, memory, tokens.query)),
        written=as_numpy(be, written),
        losses=as_numpy(be, losses),
        reset=as_numpy(be, be.reset(native(be, middle), memory, ids)),
        read_only=Lookup(**{name: getattr(readings[0], name) for name in Lookup._fields}),
        unchanged=all(same) and not any(reading.memorization.size for reading in readings),
    )


def _gradients(be: DifferentiableBackend, passage: Passage) -> dict[str, np.ndarray]:
    case = passage.case
    output, keys, values = running.draw_cotangents(case, np.random.default_rng(case.seed))
    numbers = [x for x in floating(case.tokens).values() if x is not None]
    # Drawn scores never overflow, so these are the tokens whose output is not NaN.
    finite = np.all([np.isfinite(x).all(tuple(range(2, x.ndim))) for x in numbers], axis=0)
    output = np.where(finite[..., None], output, 0)
    cotangents = [array.astype(case.dtype) for array in (output, keys, values)]
    received = running.gradients(be, case, cotangents, passage.gradient_sizes)
    return {name: gradient for name, gradient in zip(INPUTS, received) if gradient is not None}
