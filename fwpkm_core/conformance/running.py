"""Running tokens through a backend with NumPy on both sides, and the gradients of such a run (SPEC.md §4)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.conformance.strategies import Case, floating
from fwpkm.containers import Memory, State, Trace, memories_for
from fwpkm.protocol import Backend, DifferentiableBackend
from fwpkm.schedule import max_writes
from fwpkm.tokens import NUMBERS, Tokens

INPUTS = (*NUMBERS, *Memory._fields)
"""What gradients are taken with respect to, in this order."""


class BrokenContractError(AssertionError):
    """A backend returned something of another shape than SPEC.md §8 says."""


class Reading(NamedTuple):
    """What a whole sequence gave: the traces of all calls joined, columns that no write used left out."""

    output: np.ndarray
    slots: np.ndarray
    weights: np.ndarray
    memorization: np.ndarray
    addressing: np.ndarray
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


def apply(be: Backend, cfg: FwPKMConfig, state: State, tokens: Tokens, **options: Any) -> tuple[Any, State, Trace]:
    """``be.apply`` on NumPy tokens."""
    return be.apply(cfg, state, **native(be, tokens).present(), **options)


def stream(
    be: Backend,
    cfg: FwPKMConfig,
    state: State,
    tokens: Tokens,
    sizes: Sequence[int] | None = None,
    flush: bool = False,
    **options: Any,
) -> tuple[Reading, State]:
    """Feed the tokens in calls of these sizes (default: one), then perhaps flush.

    Returns:
        the reading, and the state after it as the backend's own.

    Raises:
        BrokenContractError: a trace has other shapes than §8 says, or losses in columns that no write used.
    """
    sizes = [tokens.length] if sizes is None else sizes
    if sum(sizes) != tokens.length or not (sizes or flush):
        raise ValueError(f"sizes must make up the {tokens.length} tokens, in one call or more. Received: {sizes}")
    outputs, traces, at = [], [], 0
    for size in sizes:
        output, state, trace = apply(be, cfg, state, tokens.slice(at, at + size), **options)
        traces.append(_record(be, cfg, trace, len(tokens.query), size, max_writes(cfg, size)))
        outputs.append(as_numpy(be, output))
        at += size
    if flush:
        state, trace = be.flush(cfg, state)
        traces.append(_record(be, cfg, trace, len(tokens.query), 0, 1))
    output = np.concatenate(outputs or [tokens.value[:, :0]], axis=1)
    record: dict[str, Any] = {name: np.concatenate([trace[name] for trace in traces], axis=1) for name in traces[0]}
    return Reading(output, memory=as_numpy(be, state.memory), **record), state


def read(be: Backend, case: Case, sizes: Sequence[int] | None = None, **options: Any) -> Reading:
    """A case from its start to a last flush; where it has ``flush_after``, flushed there as well, and on."""
    state = start(be, case)
    if case.flush_after is None:
        return stream(be, case.cfg, state, case.tokens, sizes, flush=True, **options)[0]
    first, second = cut_sizes(sizes or [case.length], case.flush_after)
    middle = case.flush_after
    before, state = stream(be, case.cfg, state, case.tokens.slice(0, middle), first, flush=True, **options)
    after, state = stream(be, case.cfg, state, case.tokens.slice(middle, None), second, flush=True, **options)
    return joined(before, after)


def joined(before: Reading, after: Reading) -> Reading:
    """Two readings of one sequence as one."""
    names = [name for name in Reading._fields if name != "memory"]
    arrays: dict[str, Any] = {x: np.concatenate([getattr(before, x), getattr(after, x)], axis=1) for x in names}
    return after._replace(**arrays)


def cut_sizes(sizes: Sequence[int], at: int) -> tuple[list[int], list[int]]:
    """The same calls, with a cut after ``at`` tokens: those before it and those after."""
    ends = np.cumsum(sizes).tolist()
    before = np.diff([0, *(e for e in ends if e < at), at]).tolist()
    after = np.diff([at, *(e for e in ends if e > at)]).tolist()
    return before, after or [0]


def _record(be: Backend, cfg: FwPKMConfig, trace: Trace, batch: int, length: int, columns: int) -> dict[str, Any]:
    """Slots, weights and both losses, whose columns without a write are left out."""
    record = as_numpy(be, trace)._asdict()
    writes, losses = int(record.pop("writes")), ("memorization", "addressing")
    for name, array in record.items():
        shape = (memories_for(cfg, batch), columns) if name in losses else (batch, length, cfg.slots_per_token)
        if array.shape != shape:
            raise BrokenContractError(f"trace.{name} must have shape {shape}. Received: {array.shape}")
        if name in losses and array[:, writes:].any():
            raise BrokenContractError(
                f"losses must be 0 after the {writes} columns that writes used. Received: {array}"
            )
    return record | {name: record[name][:, :writes] for name in losses}


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
    for size in sizes or [case.length]:
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
        case: what is read.
        cotangents: of the whole output and both final tables, in the case's dtype.
        sizes: of the calls; default: one.
        **options: of ``be.apply``.
    """
    inputs = (*floating(case.tokens).values(), *case.memory)
    present = [x is not None for x in inputs]

    def function(*arguments: Any) -> tuple[Any, ...]:
        rest = iter(arguments)
        return forward(be, case, [next(rest) if here else None for here in present], sizes, **options)

    output, *tables = cotangents
    ends = np.cumsum(sizes or [case.length])[:-1].tolist()
    weights = (*(np.ascontiguousarray(x) for x in np.split(output, ends, axis=1)), *tables)
    args = native(be, tuple(x for x in inputs if x is not None))
    received = iter(as_numpy(be, tuple(be.vjp(function, args, native(be, weights)))))
    return [next(received) if here else None for here in present]
