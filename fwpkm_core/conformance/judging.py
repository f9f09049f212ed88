"""Whether two results agree: every quantity's error, and the bound of SPEC.md §6 that it is held to."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fwpkm import agreement
from fwpkm.config import FwPKMConfig
from fwpkm.conformance.running import Reading

EXACT = ("slots",)
"""Quantities that are either equal or not: their error is 0 or infinite."""


def bound(quantity: str, dtype: str) -> float:
    """The largest error of a quantity that still counts as agreement (§6); "grad ..." are gradients."""
    if quantity in EXACT:
        return 0.0
    bounds = agreement.BOUNDS[dtype]
    return bounds.gradient if quantity.startswith("grad ") else bounds.forward


def exact_error(actual: Any, expected: Any) -> float:
    """0 where two arrays are equal, else infinite."""
    return 0.0 if np.array_equal(actual, expected) else float("inf")


def reading_errors(cfg: FwPKMConfig, actual: Reading, expected: Reading) -> Iterator[tuple[str, float]]:
    """Each quantity of a reading and its error.

    Each head's entries are compared by slot id, where their number means something: a token that is not finite has
    slots without meaning, and NaN for weights.
    """
    if actual.slots.shape != expected.slots.shape or actual.weights.shape != expected.weights.shape:
        raise ValueError(f"readings must have equal shapes. Received: {actual.slots.shape}, {expected.slots.shape}")
    live = np.isfinite(expected.weights).all(-1)
    slots, weights = agreement.by_slot(cfg, actual.slots, actual.weights)
    expected_slots, expected_weights = agreement.by_slot(cfg, expected.slots, expected.weights)
    valid = ((actual.slots >= 0) & (actual.slots < cfg.num_slots)).all()
    yield "output", agreement.relative_error(actual.output, expected.output)
    yield "slots", exact_error(slots[live], expected_slots[live]) if valid else float("inf")
    same_tokens = np.array_equal(np.isnan(weights).all(-1), ~live)
    yield "weights", agreement.relative_error(weights[live], expected_weights[live]) if same_tokens else float("inf")
    for name in ("memorization", "addressing"):
        yield name, agreement.relative_error(getattr(actual, name), getattr(expected, name))
    for name, table, expected_table in zip(("keys", "values"), actual.memory, expected.memory):
        yield name, agreement.relative_error(table, expected_table)
