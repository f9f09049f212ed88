"""Checks of what a caller passes, the same in every backend: shapes and dtypes only, no values, so they also trace.

Every failure is a ValueError that names the argument, what was expected and what was received.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State

Axis = tuple[str, int | None]
ArrayType = type | tuple[type, ...]


def check_array(name: str, array: Any, axes: Sequence[Axis], kind: str, array_type: ArrayType) -> None:
    """Raise unless ``array`` is a native array of this kind ("float", "bool" or "int32") and shape."""
    given: Any = array
    if not isinstance(array, array_type):
        types = array_type if isinstance(array_type, tuple) else (array_type,)
        names = ((t.__module__.partition(".")[0], t.__name__.rpartition(".")[2]) for t in types)  # jax's holds dots
        expected = " or ".join(".".join(name) for name in names)
        raise ValueError(f"{name} must be a {expected}. Received: {type(array).__name__}")
    shape = tuple(given.shape)
    if not _fits(shape, axes):
        expected = ", ".join(label if size is None else f"{label}={size}".removeprefix("=") for label, size in axes)
        raise ValueError(f"{name} must have shape [{expected}]. Received: shape {shape}")
    dtype = _dtype(given)
    if not (dtype == kind or (kind == "float" and kind in dtype)):
        wanted = "a floating dtype" if kind == "float" else f"dtype {kind}"
        raise ValueError(f"{name} must have {wanted}. Received: dtype {dtype}")


def _fits(shape: Sequence[int | None], axes: Sequence[Axis]) -> bool:
    """Whether a shape has these axes; None is a size that a TensorFlow graph does not know yet."""
    return len(shape) == len(axes) and all([None in (size, got) or size == got for (_, size), got in zip(axes, shape)])


def check_config(cfg: Any) -> None:
    """Raise unless ``cfg`` is an FwPKMConfig."""
    if not isinstance(cfg, FwPKMConfig):
        raise ValueError(f"cfg must be an FwPKMConfig. Received: {type(cfg).__name__}")


def check_count(name: str, value: Any) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1. Received: {name}={value!r}")


def layer_config(hidden_size: Any, config: Any, value_norm: Any, config_fields: dict[str, Any]) -> FwPKMConfig:
    """The configuration of a layer's memory: ``config``, or the defaults, with ``config_fields`` replaced (§7).

    Raises:
        ValueError: a field, the width or the norm of a layer breaks its rule.
    """
    config = FwPKMConfig() if config is None else config
    check_config(config)
    unknown = sorted(config_fields.keys() - {field.name for field in dataclasses.fields(FwPKMConfig)})
    if unknown:
        raise TypeError(f"FwPKM takes no argument {unknown[0]!r}; the fields of fwpkm.FwPKMConfig may be given by name")
    config = dataclasses.replace(config, **config_fields)
    check_count("hidden_size", hidden_size)
    if value_norm not in ("zscore", None):
        raise ValueError(f"value_norm must be 'zscore' or None. Received: value_norm={value_norm!r}")
    if value_norm == "zscore" and config.value_dim < 2:
        raise ValueError(f"value_dim must be at least 2 for value_norm='zscore'. Received: {config.value_dim}")
    return config


def check_memory(cfg: FwPKMConfig, memory: Any, memories: int | None, array_type: ArrayType) -> None:
    """Raise unless the tables fit ``cfg``; with ``memories`` there must be exactly so many."""
    check_config(cfg)
    if not isinstance(memory, Memory):
        raise ValueError(f"memory must be a fwpkm.Memory(keys, values). Received: {type(memory).__name__}")
    h, s, d = cfg.num_heads, cfg.num_subkeys, cfg.key_dim // 2
    keys_axes = [("M", memories), ("H", h), ("2", 2), ("S", s), ("Dk/2", d)]
    check_array("memory.keys", memory.keys, keys_axes, "float", array_type)
    memories = memory.keys.shape[0]
    values_axes = [("M", memories), ("N", cfg.num_slots), ("Dv", cfg.value_dim)]
    check_array("memory.values", memory.values, values_axes, "float", array_type)
    if memory.keys.dtype != memory.values.dtype:
        raise ValueError(
            f"memory.keys and memory.values must have one dtype. "
            f"Received: {_dtype(memory.keys)} and {_dtype(memory.values)}"
        )


def memories_for(cfg: FwPKMConfig, batch_size: int) -> int:
    """M, the tables that a batch of this size reads: B in "sequence" scope, 1 in "batch" scope."""
    return batch_size if cfg.memory_scope == "sequence" else 1


def check_initial(cfg: FwPKMConfig, memory: Any, batch_size: Any, array_type: ArrayType) -> None:
    """Raise unless a state of ``batch_size`` rows can start from these tables."""
    check_memory(cfg, memory, None, array_type)
    check_count("batch_size", batch_size)
    wanted = memories_for(cfg, batch_size)
    if memory.keys.shape[0] not in (1, wanted):
        allowed = "1" if wanted == 1 else f"1 or {wanted}"
        raise ValueError(
            f"memory must hold {allowed} tables for batch_size={batch_size} and memory_scope={cfg.memory_scope!r}. "
            f"Received: memory.keys with M={memory.keys.shape[0]}"
        )


def check_lookup(cfg: FwPKMConfig, memory: Any, query: Any, array_type: ArrayType) -> None:
    """Raise unless ``query`` [B, n, H*Dk] can read these tables."""
    check_config(cfg)
    _check_query(cfg, query, "n", array_type)
    check_memory(cfg, memory, memories_for(cfg, query.shape[0]), array_type)


def check_chunk(
    cfg: FwPKMConfig, memory: Any, query: Any, target: Any, gate: Any, mask: Any, pair: Any, array_type: ArrayType
) -> None:
    """Raise unless the arguments of ``chunk_update`` fit each other."""
    check_lookup(cfg, memory, query, array_type)
    b, n = query.shape[:2]
    _check_tokens({"target": target}, {"gate": gate}, {"mask": mask, "pair": pair}, cfg, ("n", b, n), array_type)


def check_apply(
    cfg: FwPKMConfig, state: Any, query: Any, value: Any, gate: Any, mask: Any, array_type: ArrayType
) -> None:
    """Raise unless the arguments of ``apply`` fit each other."""
    check_config(cfg)
    _check_query(cfg, query, "T", array_type)
    b, t = query.shape[:2]
    _check_tokens({"value": value}, {"gate": gate}, {"mask": mask}, cfg, ("T", b, t), array_type)
    check_state(cfg, state, b, array_type)


def check_is_state(state: Any) -> None:
    """Raise unless ``state`` is one."""
    if not isinstance(state, State):
        raise ValueError(f"state must be a fwpkm.State, as init_state returns. Received: {type(state).__name__}")


def check_state(cfg: FwPKMConfig, state: Any, batch_size: int | None, array_type: ArrayType) -> None:
    """Raise unless the state fits ``cfg`` and, where given, the batch size."""
    check_config(cfg)
    check_is_state(state)
    check_array("state.position", state.position, [("B", batch_size)], "int32", array_type)
    b, p = state.position.shape[0], schedule.capacity(cfg)
    check_memory(cfg, state.memory, memories_for(cfg, b), array_type)
    rows = [("B", b), ("P", p)]
    query_axes = [*rows, ("H*Dk", cfg.num_heads * cfg.key_dim)]
    check_array("state.pending_query", state.pending_query, query_axes, "float", array_type)
    check_array("state.pending_value", state.pending_value, [*rows, ("Dv", cfg.value_dim)], "float", array_type)
    check_array("state.pending_gate", state.pending_gate, rows, "float", array_type)
    check_array("state.pending_mask", state.pending_mask, rows, "bool", array_type)


def check_reset(state: Any, memory: Any, array_type: ArrayType) -> None:
    """Raise unless ``memory`` can stand in for the state's tables, row by row or as one for all."""
    check_is_state(state)
    if not isinstance(memory, Memory):
        raise ValueError(
            f"memory must be a fwpkm.Memory(keys, values); a layer's is layer.memory(). "
            f"Received: {type(memory).__name__}"
        )
    for name, fresh, current in zip(Memory._fields, memory, state.memory):
        wanted = tuple(current.shape)
        check_array(f"memory.{name}", fresh, [("M", None), *(("", n) for n in wanted[1:])], "float", array_type)
        if fresh.shape[0] not in (1, wanted[0]):
            raise ValueError(
                f"memory.{name} must hold 1 or M={wanted[0]} tables, as the state does. "
                f"Received: shape {tuple(fresh.shape)}"
            )


def check_position(positions: list[int]) -> int:
    """Where a state stands: the one position of all its rows."""
    if len(set(positions)) != 1 or positions[0] < 0:
        raise ValueError(
            f"state.position must hold one number of at least 0, the same for all rows. Received: {positions}"
        )
    return positions[0]


def check_length(position: int, length: int) -> None:
    """Raise where a call would take the position past int32."""
    if position + length > schedule.MAX_POSITION:
        raise ValueError(
            f"position must stay at most {schedule.MAX_POSITION}, since it is int32: flush the state first. "
            f"Received: position={position} and {length} more tokens"
        )


def row_mask(rows: Any, batch_size: int, memories: int) -> np.ndarray:
    """``rows`` of a reset, given as ids or as a bool mask, as a bool mask [B].

    Raises:
        ValueError: not integers or bools, out of range, or some but not all rows that share one table.
    """
    array = np.atleast_1d(np.asarray(rows))
    chosen = np.zeros(batch_size, bool)
    if array.dtype == bool:
        if array.shape != (batch_size,):
            raise ValueError(f"rows as a mask must have shape [B={batch_size}]. Received: shape {array.shape}")
        chosen = array.copy()
    elif array.size:
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"rows must be integers or a bool mask [B={batch_size}]. Received: rows={rows!r}")
        if array.min() < -batch_size or array.max() >= batch_size:
            raise ValueError(f"rows must lie in [{-batch_size}, {batch_size}). Received: rows={rows!r}")
        chosen[array] = True
    if memories == 1 and chosen.any() and not chosen.all():
        raise ValueError(
            f"rows must name all {batch_size} rows, because they share one table (memory_scope='batch'). "
            f"Received: rows={rows!r}"
        )
    return chosen


def _dtype(array: Any) -> str:
    """The name that all frameworks share: torch's dtypes have a prefix, TensorFlow's a description."""
    return (getattr(array.dtype, "name", None) or str(array.dtype)).removeprefix("torch.")


def _check_query(cfg: FwPKMConfig, query: Any, time: str, array_type: ArrayType) -> None:
    axes = [("B", None), (time, None), ("H*Dk", cfg.num_heads * cfg.key_dim)]
    check_array("query", query, axes, "float", array_type)
    if query.shape[0] == 0:
        raise ValueError(f"query must have at least one row (B >= 1). Received: shape {tuple(query.shape)}")


def _check_tokens(
    wide: dict[str, Any],
    scalar: dict[str, Any],
    flags: dict[str, Any],
    cfg: FwPKMConfig,
    axes: tuple[str, int, int],
    array_type: ArrayType,
) -> None:
    """Check per-token arguments against the query's [B, time]; gate and flags may be None."""
    time, b, n = axes
    tokens = [("B", b), (time, n)]
    for name, array in wide.items():
        check_array(name, array, [*tokens, ("Dv", cfg.value_dim)], "float", array_type)
    for kind, arrays in (("float", scalar), ("bool", flags)):
        for name, array in arrays.items():
            if array is not None:
                check_array(name, array, tokens, kind, array_type)
