"""A call in numbers, for any logger."""

from typing import Any

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.diagnostics.calls import Call, chunk_of, has_pair, read_call, to_numpy

NEAR = 0.05
"""A gate is near 0 or near 1 where it is at most this far away."""


def summarize(
    cfg: FwPKMConfig, trace: Any, *, before: Any = None, after: State | None = None, cu_seqlens: Any = None
) -> dict[str, float]:
    """What a call did, in numbers, computed on the host from arrays of any backend.

    Counts are totals over all memories of the call. A token is live when it is there and finite (SPEC.md §3).

    - ``memorization``, ``addressing``: the two losses (§3), mean over the chunks that were written; NaN where none was.
    - ``chunks``: chunks that were completed.
    - ``tokens``, ``dead_tokens``: live tokens, and those that were there but not finite (§5).
    - ``slots_used``: different slots of a memory that live tokens read; ``slots_used_share``: of all M·N.
    - ``collisions``: pairs of live tokens of one memory and chunk that read one slot, counted for each slot that both
      read; ``collision_share``: of all (token, slot) reads those whose slot another token of the chunk read too.
    - ``gate_mean``, ``gate_near_0``, ``gate_near_1``: mean of the gate over live tokens, and the fraction of them whose
      gate is at most 0.05 and at least 0.95. Only of a :class:`fwpkm.LayerTrace`.
    - ``rows_written``: rows of value tables whose bits changed. ``rows_kept``: rows that should have changed, as a
      token of this call that has a pair (§3) read them and its chunk was written, but kept their bits: the new row
      would not have been finite (§4), or the step was 0. Only with ``after``.

    Means and fractions of nothing are NaN.

    Args:
        cfg: the configuration of the memory.
        trace: the :class:`fwpkm.LayerTrace` of a layer's ``return_trace=True``, or the :class:`fwpkm.Trace` of
            ``apply`` or ``flush``.
        before: the state that the call was given, without which its tokens would be counted from position 0. None for
            a call without a state; with ``after``, then the layer's initial memory.
        after: the state that it returned, to count rows: compares whole tables, on the host.
        cu_seqlens: ``[B+1]`` as the call was given.

    Raises:
        ValueError: an argument does not fit the others, as where the call began elsewhere or ran with another config;
            or ``before`` was overwritten by ``inplace=True``.
    """
    call = read_call(cfg, trace, before, cu_seqlens)
    writes = int(call.writes.sum())
    written = np.arange(call.memorization.shape[1]) < call.writes[:, None]
    chunk, now_written = chunk_of(cfg, call)
    summary = {
        "memorization": _mean(call.memorization[written]),
        "addressing": _mean(call.addressing[written]),
        "chunks": float(writes),
        "tokens": float(call.live.sum()),
        "dead_tokens": float((~call.live).sum()),
        **_slots(cfg, call, chunk),
    }
    if call.gate is not None:
        gate = call.gate[call.live]
        summary["gate_mean"] = _mean(gate)
        summary["gate_near_0"], summary["gate_near_1"] = _mean(gate <= NEAR), _mean(gate >= 1 - NEAR)
    if after is not None:
        summary |= _rows(cfg, call, now_written, before, after)
    return summary


def _mean(numbers: np.ndarray) -> float:
    return float(np.mean(numbers, dtype=np.float64)) if numbers.size else float("nan")


def _slots(cfg: FwPKMConfig, call: Call, chunk: np.ndarray) -> dict[str, float]:
    """How many slots were read, and how often tokens of a chunk met in one."""
    memory = call.memory_of(call.row).astype(np.int64)
    _, group = np.unique(np.stack([memory, chunk]), axis=1, return_inverse=True)
    token = np.flatnonzero(call.live)[:, None]
    # A token whose heads picked one slot twice reads it once.
    reads = np.unique(np.stack(np.broadcast_arrays(token, call.slots[call.live])).reshape(2, -1), axis=1)
    token, slot = reads
    _, readers = np.unique(group.reshape(-1)[token] * cfg.num_slots + slot, return_counts=True)
    used = len(np.unique(memory[token] * cfg.num_slots + slot))
    return {
        "slots_used": float(used),
        "slots_used_share": used / (len(call.writes) * cfg.num_slots),
        "collisions": float((readers * (readers - 1) // 2).sum()),
        "collision_share": float(readers[readers > 1].sum() / readers.sum()) if readers.size else float("nan"),
    }


def _rows(cfg: FwPKMConfig, call: Call, written: np.ndarray, before: Any, after: Any) -> dict[str, float]:
    """How many rows of the value tables changed, and how many that should have did not."""
    old, new = _tables(cfg, "before", before, call), _tables(cfg, "after", after, call)
    if call.writes.any() and _overwritten(before, after):
        raise ValueError(
            "before must hold the tables from before the call, which has written. Received: the tables of after; a "
            "call with inplace=True overwrites them, so copy them before it, or leave after out"
        )
    if old.dtype != new.dtype:
        raise ValueError(f"before and after must have tables of one dtype. Received: {old.dtype} and {new.dtype}")
    bits = f"u{new.dtype.itemsize}"
    changed = np.stack(
        [(old[m % len(old)].view(bits) != new[m].view(bits)).any(-1) for m in range(len(new))]
    )  # a table at a time: the comparison takes a byte for each number
    read = np.zeros_like(changed)
    chosen = written & has_pair(cfg, call.row, call.position, call.live)
    read[call.memory_of(call.row)[chosen][:, None], call.slots[chosen]] = True
    return {"rows_written": float(changed.sum()), "rows_kept": float((read & ~changed).sum())}


def _tables(cfg: FwPKMConfig, name: str, state: Any, call: Call) -> np.ndarray:
    """The value tables ``[M, N, Dv]``; before a call from a Memory M = 1."""
    if not isinstance(state, State) and not (name == "before" and isinstance(state, Memory)):
        allowed = "a fwpkm.State" + " or a fwpkm.Memory, to be compared with after" * (name == "before")
        raise ValueError(f"{name} must be {allowed}. Received: {type(state).__name__}")
    values = to_numpy(f"{name}'s values", (state if isinstance(state, Memory) else state.memory).values)
    memories = {len(call.writes), 1} if isinstance(state, Memory) else {len(call.writes)}
    if values.ndim != 3 or len(values) not in memories or values.shape[1:] != (cfg.num_slots, cfg.value_dim):
        raise ValueError(
            f"{name} must hold M={len(call.writes)} value tables of shape [N={cfg.num_slots}, Dv={cfg.value_dim}]. "
            f"Received: shape {values.shape}"
        )
    return np.ascontiguousarray(values)


def _overwritten(before: Any, after: State) -> bool:
    old, new = (before if isinstance(before, Memory) else before.memory).values, after.memory.values
    if old is new:
        return True
    if hasattr(old, "data_ptr") and hasattr(new, "data_ptr"):
        return old.data_ptr() == new.data_ptr()
    return isinstance(old, np.ndarray) and isinstance(new, np.ndarray) and np.shares_memory(old, new)
