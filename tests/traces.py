"""What a layer's trace must be: SPEC.md §7 in NumPy around the reference; and summaries counted by hand."""

from typing import Any

import numpy as np

import fwpkm
from fwpkm import FwPKMConfig, LayerTrace, Memory, reference


def expected_trace(
    cfg: FwPKMConfig, weights: dict[str, np.ndarray], x: np.ndarray, gated: bool, **options: Any
) -> LayerTrace:
    """The trace of a layer with these exported weights; ``options`` are those of ``apply``."""

    def project(name: str) -> np.ndarray:
        normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}_norm.weight"]
        return normed @ weights[f"{name}_proj.weight"].T + weights[f"{name}_proj.bias"]

    query, value = project("query"), project("value")
    value = (value - value.mean(-1, keepdims=True)) / (value.std(-1, ddof=1, keepdims=True) + 1e-6)
    gate = 1 / (1 + np.exp(-project("gate")[..., 0])) if gated else None
    memory = Memory(weights["memory.keys"][None], weights["memory.values"][None])
    _, _, trace = reference.apply(cfg, memory, query, value, gate, **options)
    shown = np.ones(x.shape[:2]) if gate is None else gate
    dead, mask = np.isnan(x).any(-1), options.get("mask")
    shown = np.where(dead, np.nan, shown)
    return LayerTrace(*trace, gate=shown if mask is None else np.where(mask, shown, 0))


def as_numpy(trace: Any) -> LayerTrace:
    """A trace of any backend."""
    be = fwpkm.registry.backend_of(trace.slots)
    return LayerTrace(*(be.to_numpy(x) for x in trace))


def same_trace(actual: Any, expected: LayerTrace, bound: float) -> None:
    """Equal slots where they mean something, other numbers to a relative ``bound``."""
    actual = as_numpy(actual)
    dead = np.isnan(expected.weights)
    np.testing.assert_array_equal(np.where(dead, 0, actual.slots), np.where(dead, 0, expected.slots))
    np.testing.assert_array_equal(actual.writes, expected.writes)
    for name in ("weights", "memorization", "addressing", "gate"):
        found, wanted = getattr(actual, name), getattr(expected, name)
        assert found.shape == wanted.shape, name
        error = fwpkm.agreement.relative_error(found, wanted)
        assert error < bound, (name, error)
