"""The tokens of one call, taken from its trace as NumPy arrays and put on the clocks of SPEC.md §5."""

from typing import Any, NamedTuple

import numpy as np

from fwpkm import registry, schedule, validation
from fwpkm.config import FwPKMConfig
from fwpkm.containers import LayerTrace, Memory, State, Trace, memories_for


class Call(NamedTuple):
    """What a call did. Its n tokens are those that are there, row by row in the order of their clocks."""

    row: np.ndarray
    """``[n]`` int32: the row of the state that each token belongs to; packed: its sequence."""
    position: np.ndarray
    """``[n]`` int64: its place on the row's clock."""
    flat_index: np.ndarray
    """``[n]`` int64: its place among the B·T tokens of the call, row after row."""
    slots: np.ndarray
    """``[n, H*k]`` int32: what it read; of a dead token without meaning."""
    weights: np.ndarray
    """``[n, H*k]``: NaN for a dead token."""
    gate: np.ndarray | None
    """``[n]``, or None where the trace has no gate."""
    live: np.ndarray
    """``[n]`` bool: False for a dead token."""
    start: np.ndarray
    """``[B]`` int64: where each row stood before."""
    stop: np.ndarray
    """``[B]`` int64: where it stands after its tokens, unless the call only read."""
    memorization: np.ndarray
    """``[M, W]``"""
    addressing: np.ndarray
    """``[M, W]``"""
    writes: np.ndarray
    """``[M]`` int32"""

    def memory_of(self, row: np.ndarray) -> np.ndarray:
        """The table of each row: its own, or the one that all share."""
        return row if len(self.writes) == len(self.start) else np.zeros_like(row)


def to_numpy(name: str, array: Any) -> np.ndarray:
    """The numbers of an array of any backend.

    Raises:
        ValueError: it belongs to no backend, or is traced.
    """
    if "Tracer" in type(array).__name__:
        raise ValueError(f"{name} must hold numbers, which nothing does inside jax.jit: return it. Received: {array}")
    try:
        return np.asarray(registry.backend_of(array).to_numpy(array))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_call(cfg: FwPKMConfig, trace: Any, before: Any = None, cu_seqlens: Any = None) -> Call:
    """The tokens of a call.

    Args:
        cfg: the configuration of the memory.
        trace: what the call returned, a :class:`fwpkm.LayerTrace` or a :class:`fwpkm.Trace`.
        before: the state that was passed in; None, or a Memory, for rows that stood at position 0.
        cu_seqlens: ``[B+1]`` as it was passed in.

    Raises:
        ValueError: an argument does not fit the others; names it, what was expected and what was received.
    """
    validation.check_config(cfg)
    if not isinstance(trace, (Trace, LayerTrace)):
        raise ValueError(f"trace must be a fwpkm.LayerTrace or a fwpkm.Trace. Received: {type(trace).__name__}")
    fields = {name: to_numpy(f"trace.{name}", array) for name, array in trace._asdict().items()}
    rows, length = _check_shapes(cfg, fields, cu_seqlens)
    weights = fields["weights"].reshape(rows * length, cfg.slots_per_token)
    total = weights.sum(-1, dtype=np.float64)
    there = total != 0  # the weights of a token that is not there are 0, those of a dead one NaN
    ends = None if cu_seqlens is None else _ends(cu_seqlens, length)
    start = _start(cfg, before, rows if ends is None else len(ends) - 1)
    memories = memories_for(cfg, len(start))
    _check("trace.writes", fields["writes"], (memories,), "M")
    columns = schedule.max_writes(cfg, length) or fields["memorization"].shape[-1]  # of a flush 1
    for name in ("memorization", "addressing"):
        _check(f"trace.{name}", fields[name], (memories, columns), "M, W", "pass the config of the call")
    if ends is None:
        row = np.repeat(np.arange(rows), length)
    else:  # tokens behind the last sequence are not there
        row = np.minimum(np.searchsorted(ends, np.arange(length), "right"), len(start)) - 1
    if cfg.memory_scope == "batch":  # the common clock counts masked tokens too
        position, stop = start[row] + np.tile(np.arange(length), rows), start + length
    else:
        counts = np.bincount(row[there], minlength=len(start))
        first = np.cumsum(counts) - counts  # rows are in order, packed or not
        position = start[row] + np.cumsum(there) - 1 - first[row]
        stop = start + counts
    if length:
        _check_writes(cfg, fields["writes"], start, stop)
    index = np.flatnonzero(there)
    slots = fields["slots"].reshape(rows * length, cfg.slots_per_token)[index]
    _check_slots(cfg, slots)
    gate = fields["gate"].reshape(-1)[index] if "gate" in fields else None
    live = ~np.isnan(total[index])
    records = (fields[name] for name in ("memorization", "addressing", "writes"))
    taken = row[index].astype(np.int32), position[index], index, slots.astype(np.int32), weights[index]
    return Call(*taken, gate, live, start, stop, *records)


def _check_shapes(cfg: FwPKMConfig, fields: dict[str, np.ndarray], cu_seqlens: Any) -> tuple[int, int]:
    """B (1 where packed) and T, once slots, weights and gate fit each other."""
    slots = fields["slots"]
    if slots.ndim != 3 or slots.shape[2] != cfg.slots_per_token or slots.dtype.kind not in "iu":
        raise ValueError(
            f"trace.slots must be integers of shape [B, T, H*k={cfg.slots_per_token}]: pass the config of the layer "
            f"that made the trace. Received: shape {slots.shape}, dtype {slots.dtype}"
        )
    if cu_seqlens is not None and slots.shape[0] != 1:
        raise ValueError(f"trace.slots must be one packed row beside cu_seqlens. Received: shape {slots.shape}")
    _check("trace.weights", fields["weights"], slots.shape, "B, T, H*k")
    if "gate" in fields:
        _check("trace.gate", fields["gate"], slots.shape[:2], "B, T")
    return slots.shape[0], slots.shape[1]


def _check(name: str, array: np.ndarray, shape: tuple[int, ...], axes: str, what_to_do: str = "") -> None:
    if array.shape != shape:
        what_to_do = what_to_do and f": {what_to_do}"
        raise ValueError(f"{name} must have shape [{axes}] = {shape}{what_to_do}. Received: shape {array.shape}")


def _check_writes(cfg: FwPKMConfig, writes: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
    """Raise unless rows that went from ``start`` to ``stop`` wrote what they completed, or a call only read."""
    completed = np.asarray(schedule.written(cfg, stop) - schedule.written(cfg, start))[: len(writes)]
    wrong = np.flatnonzero(writes != completed)
    if not writes.any() or not wrong.size:
        return
    row = wrong[0]
    raise ValueError(
        "trace.writes must be the chunks that its tokens complete: pass the state that the call was given as before=, "
        f"and the config that it ran with. Received: writes {writes.tolist()}, where row {row} read "
        f"{stop[row] - start[row]} tokens from position {start[row]}, which completes {completed[row]} chunks of "
        f"{cfg.chunk_size}"
    )


def _check_slots(cfg: FwPKMConfig, slots: np.ndarray) -> None:
    if slots.size and not 0 <= slots.min() <= slots.max() < cfg.num_slots:
        raise ValueError(
            f"trace.slots must be ids of the N={cfg.num_slots} slots of this config. "
            f"Received: ids from {slots.min()} to {slots.max()}"
        )


def _ends(cu_seqlens: Any, length: int) -> np.ndarray:
    ends = to_numpy("cu_seqlens", cu_seqlens)
    if ends.ndim != 1 or len(ends) < 2 or ends.dtype.kind not in "iu":
        raise ValueError(f"cu_seqlens must be integers of shape [B+1], B >= 1. Received: shape {ends.shape}")
    validation.check_cu_seqlens(ends.tolist(), length)
    return ends


def _start(cfg: FwPKMConfig, before: Any, rows: int) -> np.ndarray:
    """``[B]``: where the rows stood."""
    if before is None or isinstance(before, Memory):
        return np.zeros(rows, np.int64)
    if not isinstance(before, State):
        raise ValueError(
            "before must be the fwpkm.State that the call was given, a fwpkm.Memory that its rows began from, or None. "
            f"Received: {type(before).__name__}"
        )
    start = to_numpy("before.position", before.position).astype(np.int64)
    _check("before.position", start, (rows,), "B")
    validation.check_positions(cfg, start.tolist())
    return start


def has_pair(cfg: FwPKMConfig, row: np.ndarray, position: np.ndarray, live: np.ndarray) -> np.ndarray:
    """``[n]`` bool: the live tokens whose partner is among these tokens, live, and where §3 wants it."""
    partner = position + cfg.lookahead
    if cfg.boundary == "drop":
        near = partner // cfg.chunk_size == position // cfg.chunk_size
    elif cfg.boundary == "wait":
        near = np.ones_like(live)
    else:
        cfg.refuse("boundary", "fwpkm.diagnostics")
    stride = int(partner.max(initial=0)) + 1
    row = row.astype(np.int64) * stride
    return live & near & np.isin(row + partner, (row + position)[live])


def chunk_of(cfg: FwPKMConfig, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """``[n]`` the chunk of each token, counted from its row's position 0; ``[n]`` bool: the call has written it."""
    chunk = call.position // cfg.chunk_size
    first = np.asarray(schedule.written(cfg, call.start))
    writes = call.writes[call.memory_of(np.arange(len(call.start)))]
    return chunk, (chunk >= first[call.row]) & (chunk < (first + writes)[call.row])
