"""Running tokens through a backend with NumPy on both sides, and the gradients of such a run (SPEC.md §4)."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.conformance.strategies import NUMBERS, PACKED, PADDED, UNMASKED, Case, floating, unmasked
from fwpkm.containers import Memory, State, Trace, memories_for
from fwpkm.protocol import Backend, DifferentiableBackend
from fwpkm.schedule import max_writes
from fwpkm.tokens import Tokens

INPUTS = (*NUMBERS, *Memory._fields)
"""What gradients are taken with respect to, in this order."""


class BrokenContractError(AssertionError):
    """A backend returned something of another shape than SPEC.md §8 says."""


class Reading(NamedTuple):
    """What whole sequences gave: the traces of all calls joined."""

    output: np.ndarray
    slots: np.ndarray
    weights: np.ndarray
    memorization: np.ndarray
    """``[M, most writes]``: each memory's losses in order from the first column on, then zeros."""
    addressing: np.ndarray
    """``[M, most writes]``"""
    writes: np.ndarray
    """``[M]``: the chunks that each memory completed."""
    memory: Memory


# --- Arrays ---


def native(be: Backend, tree: Any) -> Any:
    """NumPy arrays, alone or in (named) tuples, as the backend's own; None stays None.

    They are copied before: a backend that keeps what it is handed, and overwrites it, does not reach the original.
    """
    return _map(tree, lambda x: be.asarray(x.copy(), str(x.dtype)) if isinstance(x, np.ndarray) else x)


def as_numpy(be: Backend, tree: Any) -> Any:
    """The inverse, always a copy."""
    return _map(tree, lambda array: np.array(be.to_numpy(array)))


def arrays(tree: Any) -> Iterator[Any]:
    """What has a dtype among the leaves of (named) tuples."""
    for part in tree if isinstance(tree, tuple) else ():
        yield from arrays(part)
    if hasattr(tree, "dtype"):
        yield tree


def same_bits(one: Any, other: Any) -> bool:
    """Whether two trees of NumPy arrays are equal to the last bit."""
    pairs = list(zip(arrays(one), arrays(other), strict=True))
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    if tree is None:
        return None
    if isinstance(tree, tuple):
        parts = [_map(part, function) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return function(tree)


# --- Readings ---


def start(be: Backend, case: Case) -> State:
    """The state that a case begins with."""
    return be.init_state(case.cfg, native(be, case.memory), batch_size=case.batch)


def apply(
    be: Backend, cfg: FwPKMConfig, state: State | Memory, tokens: Tokens, layout: str = PADDED, **options: Any
) -> tuple[Any, Any, Trace]:
    """``be.apply`` on NumPy tokens ``[B, n, ...]``, in a layout; output and trace are NumPy arrays ``[B, n, ...]``.

    Raises:
        BrokenContractError: the output or the trace has other shapes than §8 says, or losses in unused columns.
    """
    batch, columns = len(tokens.query), max_writes(cfg, tokens.length)
    packed = None if layout == PADDED else Packed.of(tokens, layout)
    if packed is not None:
        tokens, columns = packed.tokens, max_writes(cfg, packed.tokens.length)
        options["cu_seqlens"] = native(be, packed.cu_seqlens)
    output, state, trace = be.apply(cfg, state, **native(be, tokens).present(), **options)
    output, trace = as_numpy(be, output), as_numpy(be, trace)
    _check_shape("output", output, (*tokens.query.shape[:2], cfg.value_dim))
    _check_trace(cfg, trace, batch, tokens.query.shape[:2], columns)
    if packed is not None:
        output, slots, weights = map(packed.unpack, (output, trace.slots, trace.weights))
        trace = trace._replace(slots=slots, weights=weights)
    return output, state, trace


def stream(
    be: Backend,
    cfg: FwPKMConfig,
    state: State,
    tokens: Tokens,
    sizes: Sequence[int] | None = None,
    flush: bool = False,
    layout: str = PADDED,
    **options: Any,
) -> tuple[Reading, State]:
    """Feed the tokens in calls of these sizes (default: one), then perhaps flush.

    Returns:
        the reading, and the state after it as the backend's own.

    Raises:
        BrokenContractError: as ``apply``.
    """
    sizes = [tokens.length] if sizes is None else sizes
    if sum(sizes) != tokens.length or not (sizes or flush):
        raise ValueError(f"sizes must make up the {tokens.length} tokens, in one call or more. Received: {sizes}")
    outputs, traces, at = [tokens.value[:, :0]], [], 0
    for size in sizes:
        output, state, trace = apply(be, cfg, state, tokens.slice(at, at + size), layout, **options)
        outputs.append(output)
        traces.append(trace)
        at += size
    if flush:
        state, trace = be.flush(cfg, state)
        traces.append(as_numpy(be, trace))
        _check_trace(cfg, traces[-1], len(tokens.query), (len(tokens.query), 0), 1)
    outputs = outputs[len(sizes) > 0 :]
    return Reading(np.concatenate(outputs, axis=1), **joined_traces(traces), memory=as_numpy(be, state.memory)), state


def read(be: Backend, case: Case, sizes: Sequence[int] | None = None, **options: Any) -> Reading:
    """A case from its start to a last flush; where it has ``flush_after``, flushed there as well, and on."""
    state, options = start(be, case), {"layout": case.layout, **options}
    if case.flush_after is None:
        return stream(be, case.cfg, state, case.tokens, sizes, flush=True, **options)[0]
    first, second = cut_sizes(sizes or [case.length], case.flush_after)
    middle = case.flush_after
    before, state = stream(be, case.cfg, state, case.tokens.slice(0, middle), first, flush=True, **options)
    after, state = stream(be, case.cfg, state, case.tokens.slice(middle, None), second, flush=True, **options)
    return joined(before, after)


def joined(before: Reading, after: Reading) -> Reading:
    """Two readings of the same sequences as one."""
    output = np.concatenate([before.output, after.output], axis=1)
    return after._replace(output=output, **joined_traces([before, after]))


def joined_traces(traces: Sequence[Trace | Reading]) -> dict[str, Any]:
    """The fields of a trace, of several; each memory's losses in order, columns that none used left out."""

    def cat(name: str) -> np.ndarray:
        return np.concatenate([getattr(trace, name) for trace in traces], axis=1)

    used = [np.arange(trace.memorization.shape[1]) < trace.writes[:, None] for trace in traces]
    writes = np.sum([trace.writes for trace in traces], axis=0, dtype=np.int32)
    order = np.argsort(~np.concatenate(used, axis=1), axis=1, kind="stable")[:, : writes.max()]
    losses = {name: np.take_along_axis(cat(name), order, axis=1) for name in ("memorization", "addressing")}
    return {name: cat(name) for name in ("slots", "weights")} | losses | {"writes": writes}


def cut_sizes(sizes: Sequence[int], at: int) -> tuple[list[int], list[int]]:
    """The same calls, with a cut after ``at`` tokens: those before it and those after."""
    ends = np.cumsum(sizes).tolist()
    before = np.diff([0, *(e for e in ends if e < at), at]).tolist()
    after = np.diff([at, *(e for e in ends if e > at)]).tolist()
    return before, after or [0]


def _check_trace(cfg: FwPKMConfig, trace: Trace, batch: int, tokens: tuple[int, ...], columns: int) -> None:
    memories = memories_for(cfg, batch)
    entries, losses = (*tokens, cfg.slots_per_token), (memories, columns)
    for name, x in trace._asdict().items():
        shape = {"slots": entries, "weights": entries, "writes": (memories,)}.get(name, losses)
        _check_shape(f"trace.{name}", x, shape)
    unused = np.arange(columns) >= trace.writes[:, None]
    for x in (trace.memorization, trace.addressing):
        if x[unused].any():
            raise BrokenContractError(f"losses must be 0 past the writes {trace.writes.tolist()}. Received: {x}")


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise BrokenContractError(f"{name} must have shape {shape}. Received: {array.shape}")


# --- Layouts ---


class Packed(NamedTuple):
    """Padded tokens as one row (§5): those of each sequence up to its last unmasked one, then all others as a tail."""

    tokens: Tokens
    """``[1, B*n, ...]``"""
    cu_seqlens: np.ndarray
    """``[B+1]`` int32"""
    order: np.ndarray
    """``[B*n]``: which of the padded tokens, row by row, stands at each place."""
    padded: tuple[int, int]
    """B and n."""

    @classmethod
    def of(cls, tokens: Tokens, layout: str) -> Self:
        """Padded tokens ``[B, n, ...]`` in one of the packed ``LAYOUTS``; the tail's mask says True, as it may."""
        mask = unmasked(tokens)
        within = np.flip(np.logical_or.accumulate(np.flip(mask, 1), axis=1), 1)
        order = np.argsort(~within.ravel(), kind="stable")
        ends = np.cumsum([0, *within.sum(1)]).astype(np.int32)
        packed = cls(tokens, ends, order, mask.shape)
        given = (mask | ~within) if layout == PACKED else None
        if layout == UNMASKED and (mask != within).any():
            raise ValueError("a layout without a mask needs rows that are masked at their end alone")
        return packed._replace(tokens=tokens._replace(mask=given).map(packed.pack))

    def pack(self, x: np.ndarray) -> np.ndarray:
        """``[B, n, ...] -> [1, B*n, ...]``."""
        return x.reshape(-1, *x.shape[2:])[self.order][None]

    def unpack(self, x: np.ndarray) -> np.ndarray:
        """``[1, B*n, ...] -> [B, n, ...]``."""
        padded = np.empty_like(x[0])
        padded[self.order] = x[0]
        return padded.reshape(*self.padded, *x.shape[2:])


# --- Gradients of Σ output · cotangent, final tables included ---


def forward(
    be: Backend, case: Case, inputs: Sequence[Any], sizes: Sequence[int] | None = None, **options: Any
) -> tuple[Any, ...]:
    """The output of every call, final keys and final values, after a flush.

    Args:
        be: the backend.
        case: gives configuration, batch and mask.
        inputs: native arrays by the order of ``INPUTS``, None for a token field that is left out.
        sizes: of the calls; default: one.
        **options: of ``be.apply``.
    """
    fields = dict(zip(INPUTS, inputs, strict=True))
    memory = Memory(**{name: fields.pop(name) for name in Memory._fields})
    tokens = Tokens(**fields, mask=native(be, case.tokens.mask))
    state = be.init_state(case.cfg, memory, batch_size=case.batch)
    outputs, at = [], 0
    for size in sizes or [case.tokens.length]:
        output, state, _ = be.apply(case.cfg, state, **tokens.slice(at, at + size).present(), **options)
        outputs.append(output)
        at += size
    return (*outputs, *be.flush(case.cfg, state)[0].memory)


def draw_cotangents(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """float64 numbers in the shapes of the output ``[B, T, Dv]`` and of both tables."""
    shapes = ((case.batch, case.length, case.cfg.value_dim), *(table.shape for table in case.memory))
    return tuple(rng.normal(size=shape) for shape in shapes)


def gradients(
    be: DifferentiableBackend,
    case: Case,
    cotangents: Sequence[np.ndarray],
    sizes: Sequence[int] | None = None,
    **options: Any,
) -> list[np.ndarray | None]:
    """Gradients by the order of ``INPUTS``, None for a token field that is left out.

    Args:
        be: a backend with ``vjp``.
        case: what is read; packed, in one call.
        cotangents: of the whole output and both final tables, in the case's dtype.
        sizes: of the calls; default: one.
        **options: of ``be.apply``.
    """
    output, *tables = cotangents
    packed = None if case.layout == PADDED else Packed.of(case.tokens, case.layout)
    if packed is not None:
        case, sizes = dataclasses.replace(case, tokens=packed.tokens), None
        output, options["cu_seqlens"] = packed.pack(output), native(be, packed.cu_seqlens)
    inputs = (*floating(case.tokens).values(), *case.memory)
    present = [x is not None for x in inputs]

    def function(*arguments: Any) -> tuple[Any, ...]:
        rest = iter(arguments)
        return forward(be, case, [next(rest) if here else None for here in present], sizes, **options)

    ends = np.cumsum(sizes or [case.tokens.length])[:-1].tolist()
    weights = (*(np.ascontiguousarray(x) for x in np.split(output, ends, axis=1)), *tables)
    args = native(be, tuple(x for x in inputs if x is not None))
    received = iter(as_numpy(be, tuple(be.vjp(function, args, native(be, weights)))))
    gradients = [next(received) if here else None for here in present]
    if packed is None:
        return gradients
    return [x if name in Memory._fields or x is None else packed.unpack(x) for name, x in zip(INPUTS, gradients)]
