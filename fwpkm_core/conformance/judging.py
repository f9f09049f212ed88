"""Whether two results agree: every quantity's error, the bound of SPEC.md §6 that it is held to, and rounding.

A run can be judged only on cases that a rounding of their inputs does not move.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fwpkm import agreement, reference
from fwpkm.config import FwPKMConfig
from fwpkm.conformance.drawing import Passage
from fwpkm.conformance.results import Calls, Result, expect
from fwpkm.conformance.running import INPUTS, Reading, read, same_bits
from fwpkm.conformance.strategies import Case, floating
from fwpkm.containers import Lookup, State

QUANTITIES = (
    *("output", "slots", "weights", "memorization", "addressing", "writes", "keys", "values", "pending", "position"),
    *(f"grad {name}" for name in INPUTS),
    *("init_memory", "init_state", "lookup output", "lookup slots", "lookup weights"),
    *(f"chunk_update {name}" for name in ("keys", "values", "memorization", "addressing")),
    *(f"update=False {name}" for name in ("output", "slots", "weights", "state")),
    *("flush", "reset", "arguments"),
)
"""What is judged, in the order of the table: what a sequence gave, the state in mid-sequence (pending tokens, and their
mask with the position), gradients, and each function by itself."""

EXACT = frozenset(
    {"writes", "position", "init_memory", "init_state", "update=False state", "arguments"}
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
    yield "position", _position_error(actual.state, expected.state)
    for name, gradient in actual.gradients.items():
        yield f"grad {name}", agreement.relative_error(gradient, expected.gradients[name])
    yield from _call_errors(cfg, actual.calls, expected.calls)
    yield "flush", _state_error(actual.flushed, expected.flushed)
    yield "arguments", _exact_error(not actual.overwritten)


def reading_errors(cfg: FwPKMConfig, actual: Reading, expected: Reading) -> Iterator[tuple[str, float]]:
    """Each quantity of a reading and its error."""
    yield from _lookup_errors(cfg, actual, expected)
    for name in ("memorization", "addressing"):
        yield name, agreement.relative_error(getattr(actual, name), getattr(expected, name))
    yield "writes", _exact_error(actual.memorization.shape[1] == expected.memorization.shape[1])
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
    yield "reset", _state_error(actual.reset, expected.reset)


def _field_errors(actual: Any, expected: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, array in expected._asdict().items():
        yield f"{prefix}{name}", agreement.relative_error(getattr(actual, name), array)


def _state_error(actual: State, expected: State) -> float:
    tables = [error for _, error in _field_errors(actual.memory, expected.memory)]
    return max(*tables, _pending_error(actual, expected), _position_error(actual, expected))


def _pending_error(actual: State, expected: State) -> float:
    pairs = zip(floating(actual.pending).values(), floating(expected.pending).values())
    return max(agreement.relative_error(a, b) for a, b in pairs)


def _position_error(actual: State, expected: State) -> float:
    same_mask = np.array_equal(actual.pending.mask, expected.pending.mask)
    return _exact_error(same_mask and np.array_equal(actual.position, expected.position))


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


def survives_rounding(case: Case, expected: Reading, dtype: str = "float32") -> bool:
    """Whether a rounding of a float64 case, read in one call, moves the reference by far less than the bounds."""
    return _unmoved(reading_errors(case.cfg, read(reference, nudged(case, dtype)), expected), dtype)


def _unmoved(moves: Iterable[tuple[str, float]], dtype: str) -> bool:
    return all(error <= FRACTION * bound(quantity, dtype) for quantity, error in moves)
