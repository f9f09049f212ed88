"""Running tokens through a backend with NumPy on both sides, and judging what comes back."""

from typing import NamedTuple

import numpy as np

from fwpkm import Memory, agreement
from fwpkm.schedule import max_writes


class Reading(NamedTuple):
    """What a whole sequence gave: the traces of all calls joined, columns that no write used left out."""

    output: np.ndarray
    slots: np.ndarray
    weights: np.ndarray
    memorization: np.ndarray
    addressing: np.ndarray
    memory: Memory


def native(be, tree):
    """NumPy arrays, alone or in (named) tuples, as the backend's own; None stays None."""
    return _map(tree, lambda array: be.asarray(array, str(array.dtype)) if isinstance(array, np.ndarray) else array)


def as_numpy(be, tree):
    """The inverse, always a copy."""
    return _map(tree, lambda array: np.array(be.to_numpy(array)))


def _map(tree, function):
    if tree is None:
        return None
    if isinstance(tree, tuple):
        parts = [_map(part, function) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return function(tree)


def start(be, case):
    """The state that a case begins with."""
    return be.init_state(case.cfg, native(be, case.memory), batch_size=case.batch)


def apply(be, cfg, state, tokens, **options):
    """``be.apply`` on NumPy tokens."""
    return be.apply(cfg, state, *native(be, tuple(tokens)), **options)


def stream(be, cfg, state, tokens, sizes=None, flush=False, **options):
    """Feed the tokens in calls of these sizes, then perhaps flush.

    Returns:
        the reading, and the state after it as the backend's own.
    """
    length = tokens.query.shape[1]
    sizes = [length] if sizes is None else sizes
    assert sum(sizes) == length
    outputs, traces, at = [], [], 0
    for size in sizes:
        output, state, trace = apply(be, cfg, state, tokens.cut(at, at + size), **options)
        assert trace.memorization.shape[1] == trace.addressing.shape[1] == max_writes(cfg, size)
        outputs.append(as_numpy(be, output))
        traces.append(trace)
        at += size
    if flush:
        state, trace = be.flush(cfg, state)
        assert trace.memorization.shape[1] == trace.addressing.shape[1] == 1
        assert trace.slots.shape == trace.weights.shape == (len(tokens.query), 0, cfg.slots_per_token)
        traces.append(trace)
    slots, weights = (np.concatenate([as_numpy(be, t[i]) for t in traces], axis=1) for i in (0, 1))
    losses = (np.concatenate([_used(be, t, i) for t in traces], axis=1) for i in (2, 3))
    memory = as_numpy(be, state.memory)
    return Reading(np.concatenate(outputs, axis=1), slots, weights, *losses, memory), state


def read(be, case, sizes=None, **options):
    """A case from its start to a last flush; where it has ``flush_after``, flushed there as well, and on."""
    state = start(be, case)
    if case.flush_after is None:
        return stream(be, case.cfg, state, case.tokens, sizes, flush=True, **options)[0]
    first, second = _cut_sizes(sizes or [case.length], case.flush_after)
    middle = case.flush_after
    before, state = stream(be, case.cfg, state, case.tokens.cut(0, middle), first, flush=True, **options)
    after, state = stream(be, case.cfg, state, case.tokens.cut(middle, None), second, flush=True, **options)
    return Reading(*(np.concatenate(pair, axis=1) for pair in zip(before[:5], after[:5])), after.memory)


def _cut_sizes(sizes, at):
    """The same calls, with a cut after ``at`` tokens."""
    ends = np.cumsum(sizes).tolist()
    before = np.diff([0, *(e for e in ends if e < at), at]).tolist()
    after = np.diff([at, *(e for e in ends if e > at)]).tolist()
    return before, after or [0]


def _used(be, trace, field):
    """The columns of a loss that a write has filled; the others must be 0."""
    losses, writes = as_numpy(be, trace[field]), int(trace.writes)
    assert not losses[:, writes:].any()
    return losses[:, :writes]


def assert_close(actual, expected, dtype, kind="forward", name="arrays"):
    """Arrays, or tuples of arrays, agree within the bound of §6."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for part, a, b in zip(getattr(expected, "_fields", range(len(expected))), actual, expected):
            assert_close(a, b, dtype, kind, f"{name}: {part}")
        return
    bound = getattr(agreement.BOUNDS[str(dtype)], kind)
    error = agreement.relative_error(actual, expected)
    assert error <= bound, f"{name} differ by {error:.3g}, more than {bound:.3g} ({dtype} {kind})"


def assert_same_reading(cfg, actual, expected, dtype):
    """Two readings agree; each head's entries are compared by slot id, where their number means something."""
    meaningful = np.isfinite(expected.weights).all(-1)
    slots, weights = agreement.by_slot(cfg, *actual[1:3])
    expected_slots, expected_weights = agreement.by_slot(cfg, *expected[1:3])
    np.testing.assert_array_equal(slots[meaningful], expected_slots[meaningful])
    np.testing.assert_array_equal(np.isnan(actual.weights).all(-1), ~meaningful)
    assert_close(weights[meaningful], expected_weights[meaningful], dtype, name="weights")
    for name in ("output", "memorization", "addressing", "memory"):
        assert_close(getattr(actual, name), getattr(expected, name), dtype, name=name)


def assert_same_bits(actual, expected):
    """Arrays, or tuples of arrays, are equal to the last bit, NaN included."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected):
            assert_same_bits(a, b)
        return
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
