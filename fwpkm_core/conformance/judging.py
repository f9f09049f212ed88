"""Whether two results agree: every quantity's error, the bound of SPEC.md §6 that it is held to, and rounding.

A run can be judged only on cases that a rounding of their inputs does not move.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fwpkm import agreement, reference, schedule
from fwpkm.config import FwPKMConfig
from fwpkm.conformance.drawing import Passage
from fwpkm.conformance.results import Calls, Result, expect
from fwpkm.conformance.running import INPUTS, Reading, read, same_bits
from fwpkm.conformance.strategies import PADDED, Case, floating
from fwpkm.containers import Lookup, State

QUANTITIES = (
    *("output", "slots", "weights", "memorization", "addressing", "writes", "keys", "values", "pending"),
    *("position", "uses"),
    *(f"grad {name}" for name in INPUTS),
    *("init_memory", "init_state", "lookup output", "lookup slots", "lookup weights"),
    *(f"chunk_update {name}" for name in ("keys", "values", "memorization", "addressing")),
    *(f"update=False {name}" for name in ("output", "slots", "weights", "state")),
    *("flush", "flush rows", "reset", "select", "concat", "put", "pending, nbytes", "pack", "from a memory"),
    *("arguments", "apart"),
)
"""What is judged, in the order of the table: what sequences gave, the state in mid-sequence (pending tokens, and their
mask with the position; the uses of slots), gradients, each function by itself, and whether states are values, in place
too."""

EXACT = frozenset(
    {"writes", "position", "uses", "init_memory", "init_state", "update=False state", "pending, nbytes"}
    | {"pack", "arguments", "apart"}
    | {name for name in QUANTITIES if name.endswith("slots")}
)
"""Quantities that are equal or not: their error is 0 or infinite."""

FRACTION = 1 / 20
"""A rounding of the inputs may move a result by this fraction of the bound.

Overshooting writes (§4) multiply an error by up to κΣw² - 1 a chunk, and scores are steep near keys. Where that moves a
result by more, no run of the dtype can be judged.
"""


def bound(quantity: str, dtype: str) -> float:
    """The largest error of a quantity that still counts as agreement (§6)."""
    if quantity in EXACT:
        return 0.0
    bounds = agreement.BOUNDS[dtype]
    return bounds.gradient if quantity.startswith("grad ") else bounds.forward


def errors(cfg: FwPKMConfig, actual: Result, expected: Result) -> Iterator[tuple[str, float]]:
    """Each quantity of a result and its error; gradients only where the backend has them."""
    yield from reading_errors(cfg, actual.reading, expected.reading)
    yield "pending", _pending_error(actual.state, expected.state)
    yield "position", _position_error(cfg, actual.state, expected.state)
    yield "uses", uses_error(actual.state, expected.state)
    for name, gradient in actual.gradients.items():
        yield f"grad {name}", agreement.relative_error(gradient, expected.gradients[name])
    yield from _call_errors(cfg, actual.calls, expected.calls)
    yield "flush", _state_error(cfg, actual.flushed, expected.flushed)
    yield "arguments", _exact_error(not actual.overwritten)


def reading_errors(cfg: FwPKMConfig, actual: Reading, expected: Reading) -> Iterator[tuple[str, float]]:
    """Each quantity of a reading and its error."""
    yield from _lookup_errors(cfg, actual, expected)
    for name in ("memorization", "addressing"):
        yield name, agreement.relative_error(getattr(actual, name), getattr(expected, name))
    yield "writes", _exact_error(np.array_equal(actual.writes, expected.writes))
    yield from _field_errors(actual.memory, expected.memory)


def _lookup_errors(
    cfg: FwPKMConfig, actual: Reading | Lookup, expected: Reading | Lookup, prefix: str = ""
) -> Iterator[tuple[str, float]]:
    """Output, slots and weights.

    Each head's entries are compared by slot id, where their number means something: a token that is not finite has
    slots without meaning, and NaN for weights.
    """
    live = np.isfinite(expected.weights).all(-1)
    slots, weights = agreement.by_slot(cfg, actual.slots, actual.weights)
    expected_slots, expected_weights = agreement.by_slot(cfg, expected.slots, expected.weights)
    valid = ((actual.slots >= 0) & (actual.slots < cfg.num_slots)).all()
    yield f"{prefix}output", agreement.relative_error(actual.output, expected.output)
    yield f"{prefix}slots", _exact_error(valid and np.array_equal(slots[live], expected_slots[live]))
    same_tokens = np.array_equal(np.isnan(weights).all(-1), ~live)
    error = agreement.relative_error(weights[live], expected_weights[live]) if same_tokens else float("inf")
    yield f"{prefix}weights", error


def _call_errors(cfg: FwPKMConfig, actual: Calls, expected: Calls) -> Iterator[tuple[str, float]]:
    for name in ("init_memory", "init_state"):
        yield name, _exact_error(same_bits(getattr(actual, name), getattr(expected, name)))
    yield from _lookup_errors(cfg, actual.lookup, expected.lookup, "lookup ")
    yield from _field_errors(actual.written, expected.written, "chunk_update ")
    yield from _field_errors(actual.losses, expected.losses, "chunk_update ")
    yield from _lookup_errors(cfg, actual.read_only, expected.read_only, "update=False ")
    yield "update=False state", _exact_error(actual.unchanged)
    yield from _row_errors(cfg, actual, expected)
    yield "from a memory", max(error for _, error in reading_errors(cfg, actual.from_memory, expected.from_memory))


def _row_errors(cfg: FwPKMConfig, actual: Calls, expected: Calls) -> Iterator[tuple[str, float]]:
    losses = [agreement.relative_error(a, b) for a, b in zip(actual.flush_trace, expected.flush_trace)]
    yield "flush rows", max(*losses, _state_error(cfg, actual.flushed_rows, expected.flushed_rows))
    states = {"reset": "reset", "select": "selected", "concat": "joined", "put": "put"}
    for quantity, field in states.items():
        state = getattr(expected, field)
        if state is not None:
            yield quantity, _state_error(cfg, getattr(actual, field), state)
    yield "pending, nbytes", _exact_error(actual.counted and np.array_equal(actual.pending, expected.pending))
    yield "pack", _exact_error(actual.packed)
    if actual.apart is not None:
        yield "apart", _exact_error(actual.apart)


def _field_errors(actual: Any, expected: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, array in expected._asdict().items():
        yield f"{prefix}{name}", agreement.relative_error(getattr(actual, name), array)


def _state_error(cfg: FwPKMConfig, actual: State, expected: State) -> float:
    tables = [error for _, error in _field_errors(actual.memory, expected.memory)]
    others = _pending_error(actual, expected), _position_error(cfg, actual, expected), uses_error(actual, expected)
    return max(*tables, *others)


def _pending_error(actual: State, expected: State) -> float:
    pairs = zip(floating(actual.pending).values(), floating(expected.pending).values())
    return max(agreement.relative_error(a, b) for a, b in pairs)


def _position_error(cfg: FwPKMConfig, actual: State, expected: State) -> float:
    """Positions that differ by a multiple of C are the same clock, once a chunk was written (§5)."""
    same_mask = np.array_equal(actual.pending.mask, expected.pending.mask)
    settled = cfg.chunk_size + schedule.lag(cfg)
    early, same = np.minimum(actual.position, expected.position) < settled, actual.position == expected.position
    same_place = (actual.position - expected.position) % cfg.chunk_size == 0
    same_dtype = actual.position.dtype == np.int32
    return _exact_error(same_mask and same_dtype and np.where(early, same, same_place).all())


def uses_error(actual: State, expected: State) -> float:
    """Counts, in the tables' dtype; none where they are not weighed."""
    uses, wanted = actual.maybe_uses, expected.maybe_uses
    if uses is None or wanted is None:
        return _exact_error(uses is wanted)
    return _exact_error(uses.dtype == actual.memory.values.dtype and np.array_equal(uses, wanted))


def _exact_error(equal: Any) -> float:
    return 0.0 if equal else float("inf")


# --- Rounding ---


def nudged(case: Case, dtype: str) -> Case:
    """The case with every number moved by half a unit of the dtype's rounding, up or down."""
    rng = np.random.default_rng(case.seed)
    half_unit = np.finfo(dtype).eps / 2
    return case.map(lambda array: array * (1 + rng.choice([-1, 1], array.shape) * half_unit))


def expect_unmoved(passage: Passage) -> Result | None:
    """What the reference and torch's gradients give for a passage, in float64.

    None where a rounding of the inputs to the passage's dtype would not move it by far less than the bounds.
    """
    expected, dtype = expect(passage), passage.case.dtype
    moved = expect(passage._replace(case=nudged(passage.case.widened(), dtype)))
    return expected if _unmoved(errors(passage.case.cfg, moved, expected), dtype) else None


def is_steady(case: Case) -> bool:
    """Whether a rounding of a padded case's inputs moves what the reference reads in one call by far less than the
    bounds; packed ones are taken as they are.
    """
    wide = case.widened()
    return case.layout != PADDED or survives_rounding(wide, read(reference, wide), case.dtype)


def survives_rounding(case: Case, expected: Reading, dtype: str = "float32") -> bool:
    """Whether a rounding of a float64 case, read in one call, moves the reference by far less than the bounds."""
    return _unmoved(reading_errors(case.cfg, read(reference, nudged(case, dtype)), expected), dtype)


def _unmoved(moves: Iterable[tuple[str, float]], dtype: str) -> bool:
    return all(error <= FRACTION * bound(quantity, dtype) for quantity, error in moves)
