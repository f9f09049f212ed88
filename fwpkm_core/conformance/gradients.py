"""Outer gradients through a whole sequence (SPEC.md §4): of Σ output · cotangent, final tables included."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from fwpkm.conformance.running import as_numpy, native
from fwpkm.conformance.strategies import Case
from fwpkm.containers import Memory

INPUTS = ("query", "value", "gate", "keys", "values")
"""What gradients are taken with respect to, in this order."""


def forward(
    be: ModuleType, case: Case, arrays: Sequence[Any], sizes: Sequence[int] | None = None, **options: Any
) -> tuple[Any, ...]:
    """The output of every call, final keys and final values, after a flush.

    Args:
        be: the backend.
        case: gives configuration, batch and mask.
        arrays: native ones by the order of ``INPUTS``, None for no gate.
        sizes: of the calls; default: one.
        **options: of ``be.apply``.
    """
    query, value, gate, keys, values = arrays
    mask = native(be, case.tokens.mask)
    state = be.init_state(case.cfg, Memory(keys, values), batch_size=case.batch)
    outputs, at = [], 0
    for size in sizes or [case.length]:
        piece = (None if x is None else x[:, at : at + size] for x in (query, value, gate, mask))
        output, state, _ = be.apply(case.cfg, state, *piece, **options)
        outputs.append(output)
        at += size
    return (*outputs, *be.flush(case.cfg, state)[0].memory)


def draw_cotangents(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """float64 numbers in the shapes of the output ``[B, T, Dv]`` and of both tables."""
    shapes = ((case.batch, case.length, case.cfg.value_dim), *(table.shape for table in case.memory))
    return tuple(rng.normal(size=shape) for shape in shapes)


def gradients(
    be: ModuleType, case: Case, cotangents: Sequence[np.ndarray], sizes: Sequence[int] | None = None, **options: Any
) -> list[np.ndarray | None]:
    """Gradients by the order of ``INPUTS``, None for a gate that is not there.

    Args:
        be: a backend with ``vjp``.
        case: what is read.
        cotangents: of the whole output and both final tables, in the case's dtype.
        sizes: of the calls; default: one.
        **options: of ``be.apply``.
    """
    arrays = (*list(case.tokens)[:3], *case.memory)
    present = [array is not None for array in arrays]

    def function(*given: Any) -> tuple[Any, ...]:
        rest = iter(given)
        return forward(be, case, [next(rest) if here else None for here in present], sizes, **options)

    ends = np.cumsum(sizes or [case.length])[:-1].tolist()
    weights = (*(np.ascontiguousarray(x) for x in np.split(cotangents[0], ends, axis=1)), *cotangents[1:])
    args = native(be, tuple(array for array in arrays if array is not None))
    received = iter(as_numpy(be, tuple(be.vjp(function, args, native(be, weights)))))
    return [next(received) if here else None for here in present]
