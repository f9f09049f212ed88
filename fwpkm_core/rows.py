"""Rows of a state (SPEC.md §5): which ones a caller means, and whether a state can give or take them.

The same checks in every backend; each raises a ValueError that names the argument, what was expected and what was
received. ``rows`` that are traced are taken as they are: their values are not known.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fwpkm import validation
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.validation import Implementation


def ids_of(rows: Any, batch_size: int, *, repeats: bool = False) -> np.ndarray:
    """``rows`` as ids in the order that they were named; None is all, a bool array [B] those that are True.

    Raises:
        ValueError: not integers from 0 on or a bool array, out of range, or one named twice without ``repeats``.
    """
    if rows is None:
        return np.arange(batch_size)
    try:
        array = np.asarray(rows)
    except (TypeError, ValueError):  # lists of unequal lengths, or of what is no number
        array = np.empty((0, 0))
    mixed = isinstance(rows, (list, tuple)) and len({isinstance(row, (bool, np.bool_)) for row in rows}) > 1
    if array.dtype == bool:
        if array.shape != (batch_size,):
            raise ValueError(f"rows as a bool array must have shape [B={batch_size}]. Received: shape {array.shape}")
        return np.flatnonzero(array)
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.int64)
    if array.ndim != 1 or mixed or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"rows must be None, a list of integers or a bool array [B={batch_size}]. Received: {rows!r}")
    if array.size and (array.min() < 0 or array.max() >= batch_size):
        raise ValueError(f"rows must lie in [0, {batch_size}), the rows of the state. Received: {array.tolist()}")
    if not repeats and len(np.unique(array)) < len(array):
        raise ValueError(f"rows must be distinct. Received: {array.tolist()}")
    return array.astype(np.int64)


def mask_of(cfg: FwPKMConfig, rows: Any, batch_size: int) -> np.ndarray:
    """``rows`` of a reset or a flush as a bool array [B].

    Raises:
        ValueError: as ``ids_of``, or some but not all rows of one table.
    """
    chosen = np.zeros(batch_size, bool)
    chosen[ids_of(rows, batch_size)] = True
    if cfg.memory_scope == "batch" and chosen.any() and not chosen.all():
        raise ValueError(
            f"rows must be all {batch_size} rows, or None, because they share one table (memory_scope='batch'). "
            f"Received: {rows!r}"
        )
    return chosen


def check_reset(cfg: FwPKMConfig, state: Any, memory: Any, implementation: Implementation) -> int:
    """The rows of a state, which ``memory`` can start anew: with the tables of one row, or of each."""
    batch = validation.check_state(cfg, state, implementation)
    validation.check_initial(cfg, memory, batch, implementation)
    _check_same_dtype("memory", memory, state.memory)
    return batch


def check_select(cfg: FwPKMConfig, state: Any, rows: Any, implementation: Implementation) -> np.ndarray:
    """The ids of ``rows``, of which there must be at least one."""
    ids = ids_of(rows, validation.check_state(cfg, state, implementation), repeats=True)
    if not len(ids):
        raise ValueError(f"rows must name at least one row: a state has B >= 1. Received: {rows!r}")
    return ids


def check_concat(cfg: FwPKMConfig, states: Any, implementation: Implementation) -> None:
    """Raise unless the states' rows can stand in one state."""
    validation.check_served(cfg, implementation)
    _refuse_shared(cfg, "concat")
    if isinstance(states, State) or not isinstance(states, Sequence) or not states:
        received = "none" if isinstance(states, Sequence) and not states else type(states).__name__
        raise ValueError(f"states must be a list of at least one fwpkm.State. Received: {received}")
    for i, state in enumerate(states):
        try:
            validation.check_state(cfg, state, implementation)
        except ValueError as error:
            raise ValueError(f"states[{i}]: {error}") from None
        _check_same_dtype(f"states[{i}]", state.memory, states[0].memory)


def check_put(cfg: FwPKMConfig, state: Any, other: Any, implementation: Implementation) -> int:
    """The rows of ``other``, which can take the place of rows of ``state``."""
    validation.check_served(cfg, implementation)
    _refuse_shared(cfg, "put")
    validation.check_state(cfg, state, implementation)
    try:
        received = validation.check_state(cfg, other, implementation)
    except ValueError as error:
        raise ValueError(f"other: {error}") from None
    _check_same_dtype("other", other.memory, state.memory)
    return received


def check_number(received: int, named: int) -> None:
    """Raise unless a ``put`` of ``received`` rows names as many."""
    if not named:
        raise ValueError(f"rows must name the {received} rows whose place those of other take. Received: none")
    if received != named:
        raise ValueError(f"other must have a row for each of rows, {named}. Received: a state of {received} rows")


def _check_same_dtype(name: str, memory: Memory, wanted: Memory) -> None:
    if memory.keys.dtype != wanted.keys.dtype:
        raise ValueError(
            f"{name} must have tables of dtype {validation.dtype_name(wanted.keys)}, as the rows beside it. "
            f"Received: {validation.dtype_name(memory.keys)}"
        )


def _refuse_shared(cfg: FwPKMConfig, function: str) -> None:
    if cfg.memory_scope != "sequence":
        raise ValueError(
            f"{function} needs memory_scope='sequence', where each row has tables of its own. "
            f"Received: memory_scope={cfg.memory_scope!r}"
        )
