"""Rows of a state, and states of rows (SPEC.md §5)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fwpkm import rows as row_checks
from fwpkm import schedule, validation
from fwpkm.backends.torch import engine
from fwpkm.backends.torch.checks import check_inplace, check_present
from fwpkm.backends.torch.column_parallel import by_columns, is_sharded, refuse_uses
from fwpkm.backends.torch.tokens import no_tokens
from fwpkm.backends.torch.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, memories_for


@engine.outside_graphs
def init_state(cfg: FwPKMConfig, memory: Memory[Tensor], batch_size: int, position_device: Any = None) -> State[Tensor]:
    """A state at position 0 that owns a copy of ``memory``, on its device; the position is on the CPU unless told."""
    validation.check_initial(cfg, memory, batch_size, SELF)
    if position_device is not None:
        check_present(position_device, "position_device")
    memories = memories_for(cfg, batch_size)

    @by_columns
    def copies(x: Tensor) -> Tensor:
        return x.expand(memories, *x.shape[1:]).clone(memory_format=torch.contiguous_format)

    return start_state(cfg, Memory(*map(copies, memory)), batch_size, position_device)


def start_state(
    cfg: FwPKMConfig, memory: Memory[Tensor], batch_size: int, position_device: Any = None, kept: bool = True
) -> State[Tensor]:
    """A state at position 0 of these tables; one that is not ``kept`` holds the zeros of one row."""
    device = "cpu" if position_device is None else position_device
    position = torch.full((batch_size,), 0, dtype=torch.int32, device=device)
    refuse_uses(cfg, memory.values)
    memories, slots = memory.values.shape[:2]
    uses = memory.values.new_zeros(memories if kept else 1, slots).expand(memories, -1) if cfg.usage_weight else None
    nothing = no_tokens(cfg, memory.keys, batch_size if kept else 1)
    return State.of(memory, nothing.map(lambda x: x.expand(batch_size, *x.shape[1:])), position, uses)


def own_uses(uses: Tensor | None, dtype: torch.dtype, owned: bool) -> Tensor | None:
    """``[M, N]`` in a dtype, for writes to overwrite: a copy, unless the caller's may be."""
    if uses is None or (owned and uses.dtype == dtype and uses.is_contiguous()):
        return uses
    return uses.to(dtype, copy=True, memory_format=torch.contiguous_format)


def reset(
    cfg: FwPKMConfig, state: State[Tensor], memory: Memory[Tensor], rows: Any = None, *, inplace: bool = False
) -> State[Tensor]:
    """Make rows what ``init_state`` makes."""
    batch = row_checks.check_reset(cfg, state, memory, SELF)
    ids = torch.from_numpy(np.flatnonzero(row_checks.mask_of(cfg, _on_host(rows), batch)))
    if not len(ids):
        return state
    own = memory.keys.shape[0] > 1
    tables = Memory(*(_rows_of(x, ids) for x in memory)) if own else memory
    fresh = init_state(cfg, tables, len(ids), state.position.device)
    return _put(state, ids, fresh, inplace)


def select(cfg: FwPKMConfig, state: State[Tensor], rows: Any) -> State[Tensor]:
    """The state of these rows, in this order; copies of a state's only row share its table until a write."""
    ids = torch.from_numpy(row_checks.check_select(cfg, state, _on_host(rows), SELF))
    beams = len(ids) > 1 and state.position.shape[0] == 1

    @by_columns
    def tables(x: Tensor) -> Tensor:
        if cfg.memory_scope != "sequence":
            return x.clone()  # or a call in place on one of the states would write the other
        return x[ids[:1]].expand(len(ids), *x.shape[1:]) if beams else _rows_of(x, ids)

    memory, uses = Memory(*map(tables, state.memory)), state.maybe_uses
    if uses is not None:
        uses = _rows_of(uses, ids) if cfg.memory_scope == "sequence" else uses.clone()
    return State.of(memory, state.pending.map(lambda x: _rows_of(x, ids)), _rows_of(state.position, ids), uses)


def concat(cfg: FwPKMConfig, states: Sequence[State[Tensor]]) -> State[Tensor]:
    """One state of the rows of all, in order."""
    row_checks.check_concat(cfg, states, SELF)
    tables, clock = states[0].memory.keys.device, states[0].position.device
    for i, state in enumerate(states):
        if state.memory.keys.device != tables:
            raise ValueError(f"states[{i}] must lie on {tables}. Received: one on {state.memory.keys.device}")
    moved = [state._replace(position=state.position.to(clock)) for state in states]
    return moved[0].map(by_columns(lambda *x: torch.cat(x)), *moved[1:])


def put(
    cfg: FwPKMConfig, state: State[Tensor], rows: Any, other: State[Tensor], *, inplace: bool = False
) -> State[Tensor]:
    """The state with the i-th row of ``other`` at rows[i]."""
    received = row_checks.check_put(cfg, state, other, SELF)
    ids = torch.from_numpy(row_checks.ids_of(_on_host(rows), state.position.shape[0]))
    row_checks.check_number(received, len(ids))
    return _put(state, ids, other, inplace)


def _put(state: State, ids: Tensor, other: State, inplace: bool) -> State:
    """``put``; in batch scope ``ids`` are all rows, and the one memory is that of ``other``."""
    batch = state.position.shape[0]

    @by_columns
    def replaced(x: Tensor, y: Tensor) -> Tensor:
        at = (ids if x.shape[0] == batch else torch.arange(len(x))).to(x.device)
        y = y.to(x)
        if inplace and y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            y = y.clone()
        # In place each row needs a table of its own.
        return x.index_copy_(0, at, y) if inplace and _is_own(x) else x.index_copy(0, at, y)

    check_inplace(inplace, *state.arrays().values())
    return state.map(replaced, other)


def to_device(
    state: State[Tensor], device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False
) -> State[Tensor]:
    """The state with its tables and pending tokens on a device, or in a dtype; also ``state.to(device)``.

    A position on the CPU stays there, where it lets calls know what falls due (SPEC.md §5); any other goes along.

    Args:
        state: where the B rows stand.
        device: one that ``torch.device`` takes, or None to stay. A dtype may stand here, as in ``Tensor.to``.
        dtype: ``torch.float32`` or ``torch.float64`` for what is floating, or None to keep it.
        non_blocking: as of ``Tensor.to``.

    Raises:
        ValueError: torch knows no such device, or another dtype.
    """
    validation.check_is_state(state)
    if is_sharded(state.memory.values):
        raise ValueError(
            "state must lie whole: the device of a table in columns is that of its mesh. Received: a state in columns, "
            f"on {state.memory.values.device_mesh}"
        )
    if isinstance(device, torch.dtype):
        device, dtype = None, device
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64: narrower tables would lose digits. Received: {dtype}")
    try:
        device = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that torch.device takes. Received: {device!r} ({error})") from None
    if device is not None:
        check_present(device)

    def moved(x: Tensor) -> Tensor:
        return x.to(device, dtype if x.is_floating_point() else None, non_blocking=non_blocking)

    position = state.position
    return state.map(moved)._replace(position=position if position.device.type == "cpu" else moved(position))


def pending(cfg: FwPKMConfig, state: State[Tensor]) -> Tensor:
    """How many tokens of each row no write has consumed ``[B]``."""
    validation.check_state(cfg, state, SELF)
    if state.position.device.type == "cpu":  # else it would wait for the device
        validation.check_positions(cfg, state.position.tolist())
    return schedule.pending(cfg, state.position)


def nbytes(state: State[Tensor]) -> int:
    """The bytes that a state takes on this rank, those of a table that rows share counted once."""
    validation.check_is_state(state)
    arrays = [x.to_local() if is_sharded(x) else x for x in state.arrays().values()]
    return sum(x.element_size() * math.prod(n for n, by in zip(x.shape, x.stride()) if by) for x in arrays if x.numel())


def mask_of(cfg: FwPKMConfig, rows: Any, batch_size: int) -> Tensor:
    """``rows`` of a reset or a flush as a bool tensor [B] on the CPU."""
    return torch.from_numpy(row_checks.mask_of(cfg, _on_host(rows), batch_size))


def _on_host(rows: Any) -> Any:
    return rows.detach().cpu().numpy() if isinstance(rows, Tensor) else rows


@by_columns
def _rows_of(x: Tensor, ids: Tensor) -> Tensor:
    return x.index_select(0, ids.to(x.device))


def _is_own(x: Tensor) -> bool:
    """Whether no two rows share memory."""
    return x.stride(0) != 0 or x.shape[0] == 1
