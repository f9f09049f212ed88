"""What a backend makes of a passage, and what the reference makes of it."""

import dataclasses
import functools
import inspect
import sys
from typing import Any, NamedTuple

import numpy as np

from fwpkm import reference
from fwpkm.conformance import running
from fwpkm.conformance.contestants import FUNCTIONS
from fwpkm.conformance.drawing import Passage
from fwpkm.conformance.running import INPUTS, Reading, as_numpy, native, same_bits
from fwpkm.conformance.strategies import PACKED, PADDED, Case, floating, unmasked
from fwpkm.containers import Lookup, Losses, Memory, State, Trace
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
    flushed_rows: State
    """After a flush of those rows."""
    flush_trace: Trace
    """Of that flush."""
    selected: State
    """As many rows as there were, in a drawn order, some perhaps twice."""
    joined: State | None
    """Of the state with the selected one, joined; None in batch scope."""
    put: State | None
    """One row in the place of another; None in batch scope."""
    pending: np.ndarray
    """``[B]``: how many tokens each row has pending."""
    counted: bool
    """Whether ``nbytes`` is the sum of the arrays' bytes."""
    packed: bool
    """Whether ``pack`` keeps what it should, and ``unpack`` gives the bits back, beside that initial memory only."""
    from_memory: Reading
    """Of half of the first row's tokens by every row, from a memory in place of a state; its tables are those given."""
    read_only: Lookup
    """Of ``apply`` with ``update=False``, from the start."""
    unchanged: bool
    """Whether ``update=False`` left the state alone and wrote nothing, at the start and in mid-sequence."""
    apart: bool | None
    """Whether a call in place on selected rows gave what it gives otherwise, and left the state that they come from
    alone; None where there are no calls in place."""


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


WATCHED = frozenset(FUNCTIONS) - {"asarray", "to_numpy"}
"""Functions whose arguments must stay as they are."""


class _Watched:
    """A backend that compares the arrays that its functions are handed, before and after each call."""

    def __init__(self, be: Backend) -> None:
        self._be = be
        self.overwritten: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._be, name)
        return functools.wraps(function)(functools.partial(self._call, name, function)) if name in WATCHED else function

    def _call(self, name: str, function: Any, *args: Any, **options: Any) -> Any:
        arrays = tuple(running.arrays((*args, *options.values())))
        before = as_numpy(self._be, arrays)
        returned = function(*args, **options)
        if not options.get("inplace") and not same_bits(as_numpy(self._be, arrays), before):
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
    """The reference's result on the same numbers in float64, padded, with torch's gradients."""
    wide = passage._replace(case=dataclasses.replace(passage.case.widened(), layout=PADDED))
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
        reading, state = running.stream(be, case.cfg, state, tokens, part, flush=flush, layout=case.layout)
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
    fields = tokens.present()
    plain = dataclasses.replace(cfg, usage_weight=0.0)  # tables alone keep no uses
    written, losses = be.chunk_update(plain, memory, target=fields.pop("value"), **fields, pair=pair)
    starts = [running.start(be, case), native(be, middle)]
    # All tokens, which may be more than a chunk; those of all calls together may be masked between others.
    layout = PADDED if case.layout == PADDED else PACKED
    streams = [running.stream(be, cfg, state, case.tokens, layout=layout, update=False) for state in starts]
    same = [same_bits(as_numpy(be, after), as_numpy(be, before)) for before, (_, after) in zip(starts, streams)]
    readings = [reading for reading, _ in streams]
    return Calls(
        init_memory=as_numpy(be, be.init_memory(cfg, memories, case.seed)),
        init_state=as_numpy(be, be.init_state(cfg, be.init_memory(cfg, 1, case.seed), case.batch)),
        lookup=as_numpy(be, be.lookup(cfg, memory, tokens.query)),
        written=as_numpy(be, written),
        losses=as_numpy(be, losses),
        **_row_calls(be, case, middle, rng),
        packed=_is_packed(be, case, middle),
        from_memory=_from_memory(be, case),
        read_only=Lookup(**{name: getattr(readings[0], name) for name in Lookup._fields}),
        unchanged=all(same) and not any(reading.writes.any() for reading in readings),
    )


def _row_calls(be: Any, case: Case, middle: State, rng: np.random.Generator) -> dict[str, Any]:
    """What the functions of rows make of the state in mid-sequence."""
    cfg, batch = case.cfg, case.batch
    shared = len(case.memory.keys) < batch
    chosen = np.full(batch, shared)
    chosen[rng.integers(batch)] = True
    rows = [chosen.tolist(), np.flatnonzero(chosen).tolist(), native(be, chosen)][rng.integers(3)]
    ids, (at, source) = rng.integers(batch, size=batch).tolist(), rng.integers(batch, size=2).tolist()
    state = native(be, middle)
    flushed, trace = be.flush(cfg, state, rows)
    selected = be.select(cfg, state, ids)
    joined = None if shared else as_numpy(be, be.concat(cfg, [state, selected]))
    put = None if shared else as_numpy(be, be.put(cfg, state, [at], be.select(cfg, state, [source])))
    apart = None
    if "inplace" in inspect.signature(be.apply).parameters:
        chunk = case.tokens.slice(0, cfg.chunk_size)
        calls = [running.stream(be, cfg, be.select(cfg, state, ids), chunk, inplace=x) for x in (False, True)]
        pairs = [same_bits(*(as_numpy(be, after) for _, after in calls)), same_bits(as_numpy(be, state), middle)]
        apart = all(pairs) and same_bits(calls[0][0].output, calls[1][0].output)
    return {
        "reset": as_numpy(be, be.reset(cfg, state, native(be, case.memory), rows)),
        "flushed_rows": as_numpy(be, flushed),
        "flush_trace": as_numpy(be, trace),
        "selected": as_numpy(be, selected),
        "joined": joined,
        "put": put,
        "pending": as_numpy(be, be.pending(cfg, state)),
        "counted": be.nbytes(state) == sum(x.nbytes for x in running.arrays(middle)),
        "apart": apart,
    }


def _is_packed(be: Any, case: Case, middle: State) -> bool:
    """Whether a state in mid-sequence is packed and unpacked by its bits.

    Its first row of values differs from the initial one in a zero's sign alone, its last one is NaN in both.
    """
    cfg, initial, state = case.cfg, as_numpy(reference, case.memory), as_numpy(reference, middle)
    for values, zero in ((initial.values, 0.0), (state.memory.values, -0.0)):
        values[:, 0], values[:, -1] = 1, np.nan
        values[:, 0, 0] = zero
    packed = be.pack(cfg, native(be, state), native(be, initial))
    rows = zip(state.memory.values.reshape(-1, cfg.value_dim), np.vstack(initial.values))
    kept = sum(row.tobytes() != other.tobytes() for row, other in rows)
    tokens = int(reference.pending(cfg, state).sum())
    twice = cfg.memory_scope == "sequence"
    memory = native(be, Memory(*(np.concatenate([x, x] if twice else [x]) for x in initial)))
    unpacked = as_numpy(be, be.unpack(cfg, [packed, packed] if twice else packed, memory))
    expected = reference.concat(cfg, [state, state]) if twice else state
    initial.values[0, -1, 0] = 2
    try:
        be.unpack(cfg, packed, native(be, initial))
    except ValueError:
        right = (len(packed.slots), len(packed.pending.query)) == (kept, tokens)
        return right and same_bits(unpacked, expected)
    return False  # another initial memory was not refused


def _from_memory(be: Any, case: Case) -> Reading:
    memory = native(be, Memory(*(x[:1] for x in case.memory)))
    tokens = case.tokens.slice(0, case.length // 2).map(lambda x: np.repeat(x[:1], case.batch, axis=0))
    output, state, trace = running.apply(be, case.cfg, memory, tokens, case.layout)
    if state is not None:
        raise running.BrokenContractError(f"apply of a Memory must return None for the state. Received: {type(state)}")
    return Reading(output, **running.joined_traces([trace]), memory=as_numpy(be, memory))


def _gradients(be: DifferentiableBackend, passage: Passage) -> dict[str, np.ndarray]:
    case = passage.case
    output, keys, values = running.draw_cotangents(case, np.random.default_rng(case.seed))
    numbers = [x for x in floating(case.tokens).values() if x is not None]
    # Drawn scores never overflow, so the output of these tokens is not NaN, nor that of masked ones.
    finite = np.all([np.isfinite(x).all(tuple(range(2, x.ndim))) for x in numbers], axis=0)
    output = np.where((finite | ~unmasked(case.tokens))[..., None], output, 0)
    cotangents = [array.astype(case.dtype) for array in (output, keys, values)]
    received = running.gradients(be, case, cotangents, passage.gradient_sizes)
    return {name: gradient for name, gradient in zip(INPUTS, received) if gradient is not None}
