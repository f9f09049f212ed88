"""Running tokens through a backend with NumPy on both sides."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.conformance.strategies import Case, Tokens
from fwpkm.containers import Memory, State, Trace
from fwpkm.schedule import max_writes


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


def native(be: ModuleType, tree: Any) -> Any:
    """NumPy arrays, alone or in (named) tuples, as the backend's own; None stays None."""
    return _map(tree, lambda array: be.asarray(array, str(array.dtype)) if isinstance(array, np.ndarray) else array)


def as_numpy(be: ModuleType, tree: Any) -> Any:
    """The inverse, always a copy."""
    return _map(tree, lambda array: np.array(be.to_numpy(array)))


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    if tree is None:
        return None
    if isinstance(tree, tuple):
        parts = [_map(part, function) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return function(tree)


def start(be: ModuleType, case: Case) -> State:
    """The state that a case begins with."""
    return be.init_state(case.cfg, native(be, case.memory), batch_size=case.batch)


def apply(be: ModuleType, cfg: FwPKMConfig, state: State, tokens: Tokens, **options: Any) -> tuple[Any, State, Trace]:
    """``be.apply`` on NumPy tokens."""
    return be.apply(cfg, state, *native(be, tuple(tokens)), **options)


def stream(
    be: ModuleType,
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
    length = tokens.query.shape[1]
    sizes = [length] if sizes is None else sizes
    if sum(sizes) != length or not (sizes or flush):
        raise ValueError(f"sizes must make up the {length} tokens, in one call or more. Received: {sizes}")
    outputs, traces, at = [], [], 0
    for size in sizes:
        output, state, trace = apply(be, cfg, state, tokens.cut(at, at + size), **options)
        _check_shapes(cfg, trace, len(tokens.query), size, max_writes(cfg, size))
        outputs.append(as_numpy(be, output))
        traces.append(trace)
        at += size
    if flush:
        state, trace = be.flush(cfg, state)
        _check_shapes(cfg, trace, len(tokens.query), 0, 1)
        traces.append(trace)
    slots, weights = (np.concatenate([as_numpy(be, t[i]) for t in traces], axis=1) for i in (0, 1))
    memorization, addressing = (np.concatenate([_used(be, t, i) for t in traces], axis=1) for i in (2, 3))
    memory = as_numpy(be, state.memory)
    output = np.concatenate(outputs or [tokens.value[:, :0]], axis=1)
    return Reading(output, slots, weights, memorization, addressing, memory), state


def read(be: ModuleType, case: Case, sizes: Sequence[int] | None = None, **options: Any) -> Reading:
    """A case from its start to a last flush; where it has ``flush_after``, flushed there as well, and on."""
    state = start(be, case)
    if case.flush_after is None:
        return stream(be, case.cfg, state, case.tokens, sizes, flush=True, **options)[0]
    first, second = cut_sizes(sizes or [case.length], case.flush_after)
    middle = case.flush_after
    before, state = stream(be, case.cfg, state, case.tokens.cut(0, middle), first, flush=True, **options)
    after, state = stream(be, case.cfg, state, case.tokens.cut(middle, None), second, flush=True, **options)
    return joined(before, after)


def joined(before: Reading, after: Reading) -> Reading:
    """Two readings of one sequence as one."""
    arrays = {name: np.concatenate([getattr(x, name) for x in (before, after)], axis=1) for name in Reading._fields[:5]}
    return Reading(**arrays, memory=after.memory)


def cut_sizes(sizes: Sequence[int], at: int) -> tuple[list[int], list[int]]:
    """The same calls, with a cut after ``at`` tokens: those before it and those after."""
    ends = np.cumsum(sizes).tolist()
    before = np.diff([0, *(e for e in ends if e < at), at]).tolist()
    after = np.diff([at, *(e for e in ends if e > at)]).tolist()
    return before, after or [0]


def _check_shapes(cfg: FwPKMConfig, trace: Trace, batch: int, length: int, columns: int) -> None:
    for name in ("slots", "weights"):
        _check(name, getattr(trace, name), (batch, length, cfg.slots_per_token))
    memories = batch if cfg.memory_scope == "sequence" else 1
    for name in ("memorization", "addressing"):
        _check(name, getattr(trace, name), (memories, columns))


def _check(name: str, array: Any, expected: tuple[int, ...]) -> None:
    if tuple(array.shape) != expected:
        raise BrokenContractError(f"trace.{name} must have shape {expected}. Received: {tuple(array.shape)}")


def _used(be: ModuleType, trace: Trace, field: int) -> np.ndarray:
    """The columns of a loss that a write has filled; the others must be 0."""
    losses, writes = as_numpy(be, trace[field]), int(as_numpy(be, trace.writes))
    if losses[:, writes:].any():
        raise BrokenContractError(f"losses must be 0 after the {writes} columns that writes used. Received: {losses}")
    return losses[:, :writes]
