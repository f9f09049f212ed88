"""Whether two results agree: every quantity's error, and the bound of SPEC.md §6 that it is held to."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fwpkm import agreement
from fwpkm.config import FwPKMConfig
from fwpkm.conformance.gradients import INPUTS
from fwpkm.conformance.results import Result
from fwpkm.conformance.running import Reading
from fwpkm.containers import State

EXACT = ("slots", "writes", "position")
"""Quantities that are equal or not: their error is 0 or infinite."""

QUANTITIES = (
    *("output", "slots", "weights", "memorization", "addressing", "writes", "keys", "values", "pending", "position"),
    *(f"grad {name}" for name in INPUTS),
)
"""What is judged, in the order of the table: what was read, a state in mid-sequence (tokens that are pending, and what
stands where), and gradients."""


def bound(quantity: str, dtype: str) -> float:
    """The largest error of a quantity that still counts as agreement (§6)."""
    if quantity in EXACT:
        return 0.0
    bounds = agreement.BOUNDS[dtype]
    return bounds.gradient if quantity.startswith("grad ") else bounds.forward


def errors(cfg: FwPKMConfig, actual: Result, expected: Result) -> Iterator[tuple[str, float]]:
    """Each quantity of a result and its error; gradients only where the backend has them."""
    yield from reading_errors(cfg, actual.reading, expected.reading)
    yield from _state_errors(actual.state, expected.state)
    for name, gradient in actual.gradients.items():
        yield f"grad {name}", agreement.relative_error(gradient, expected.gradients[name])


def reading_errors(cfg: FwPKMConfig, actual: Reading, expected: Reading) -> Iterator[tuple[str, float]]:
    """Each quantity of a reading and its error.

    Each head's entries are compared by slot id, where their number means something: a token that is not finite has
    slots without meaning, and NaN for weights.
    """
    live = np.isfinite(expected.weights).all(-1)
    slots, weights = agreement.by_slot(cfg, actual.slots, actual.weights)
    expected_slots, expected_weights = agreement.by_slot(cfg, expected.slots, expected.weights)
    valid = ((actual.slots >= 0) & (actual.slots < cfg.num_slots)).all()
    yield "output", agreement.relative_error(actual.output, expected.output)
    yield "slots", _exact_error(slots[live], expected_slots[live]) if valid else float("inf")
    same_tokens = np.array_equal(np.isnan(weights).all(-1), ~live)
    yield "weights", agreement.relative_error(weights[live], expected_weights[live]) if same_tokens else float("inf")
    for name in ("memorization", "addressing"):
        yield name, agreement.relative_error(getattr(actual, name), getattr(expected, name))
    yield "writes", _exact_error(actual.memorization.shape[1], expected.memorization.shape[1])
    for name, table, expected_table in zip(("keys", "values"), actual.memory, expected.memory):
        yield name, agreement.relative_error(table, expected_table)


def _state_errors(actual: State, expected: State) -> Iterator[tuple[str, float]]:
    pairs = [(getattr(actual, name), getattr(expected, name)) for name in State._fields[1:4]]
    yield "pending", max(agreement.relative_error(a, b) for a, b in pairs)
    exact = [_exact_error(actual.pending_mask, expected.pending_mask), _exact_error(actual.position, expected.position)]
    yield "position", max(exact)


def _exact_error(actual: Any, expected: Any) -> float:
    return 0.0 if np.array_equal(actual, expected) else float("inf")
