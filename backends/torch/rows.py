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
from fwpkm.backends.torch.tokens import no_tokens
from fwpkm.backends.torch.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, memories_for


@engine.outside_graphs
def init_state(cfg: FwPKMConfig, memory: Memory, batch_size: int, position_device: Any = None) -> State:
    """A state at position 0 that owns a copy of ``memory``, on its device; the position is on the CPU unless told."""
    validation.check_initial(cfg, memory, batch_size, SELF)
    memories = memories_for(cfg, batch_size)
    tables = (x.expand(memories, *x.shape[1:]).clone(memory_format=torch.contiguous_format) for x in memory)
    return start_state(cfg, Memory(*tables), batch_size, position_device)


def start_state(cfg: FwPKMConfig, memory: Memory, batch_size: int, position_device: Any = None) -> State:
    """A state at position 0 of these tables."""
    device = "cpu" if position_device is None else position_device
    position = torch.full((batch_size,), 0, dtype=torch.int32, device=device)
    return State.of(memory, no_tokens(cfg, memory.keys, batch_size), position)


def reset(cfg: FwPKMConfig, state: State, memory: Memory, rows: Any = None, *, inplace: bool = False) -> State:
    """Make rows what ``init_state`` makes."""
    batch = row_checks.check_reset(cfg, state, memory, SELF)
    ids = torch.from_numpy(np.flatnonzero(row_checks.mask_of(cfg, _on_host(rows), batch)))
    if not len(ids):
        return state
    own = memory.keys.shape[0] > 1
    tables = Memory(*(_rows_of(x, ids) for x in memory)) if own else memory
    fresh = init_state(cfg, tables, len(ids), state.position.device)
    return _put(state, ids, fresh, inplace)


def select(cfg: FwPKMConfig, state: State, rows: Any) -> State:
    """The state of these rows, in this order; copies of a state's only row share its table until a write."""
    ids = torch.from_numpy(row_checks.check_select(cfg, state, _on_host(rows), SELF))
    beams = len(ids) > 1 and state.position.shape[0] == 1

    def tables(x: Tensor) -> Tensor:
        if cfg.memory_scope != "sequence":
            return x.clone()  # or a call in place on one of the states would write the other
        return x[ids[:1]].expand(len(ids), *x.shape[1:]) if beams else _rows_of(x, ids)

    memory = Memory(*map(tables, state.memory))
    return State.of(memory, state.pending.map(lambda x: _rows_of(x, ids)), _rows_of(state.position, ids))


def concat(cfg: FwPKMConfig, states: Sequence[State]) -> State:
    """One state of the rows of all, in order."""
    row_checks.check_concat(cfg, states, SELF)
    tables, clock = states[0].memory.keys.device, states[0].position.device
    for i, state in enumerate(states):
        if state.memory.keys.device != tables:
            raise ValueError(f"states[{i}] must lie on {tables}. Received: one on {state.memory.keys.device}")
    moved = [state._replace(position=state.position.to(clock)) for state in states]
    return moved[0].map(lambda *x: torch.cat(x), *moved[1:])


def put(cfg: FwPKMConfig, state: State, rows: Any, other: State, *, inplace: bool = False) -> State:
    """The state with the i-th row of ``other`` at rows[i]."""
    received = row_checks.check_put(cfg, state, other, SELF)
    ids = torch.from_numpy(row_checks.ids_of(_on_host(rows), state.position.shape[0]))
    row_checks.check_number(received, len(ids))
    return _put(state, ids, other, inplace)


def _put(state: State, ids: Tensor, other: State, inplace: bool) -> State:
    """``put``; in batch scope ``ids`` are all rows, and the one memory is that of ``other``."""
    batch = state.position.shape[0]

    def replaced(x: Tensor, y: Tensor) -> Tensor:
        at = (ids if x.shape[0] == batch else torch.arange(len(x))).to(x.device)
        y = y.to(x)
        if inplace and y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            y = y.clone()
        # In place each row needs a table of its own.
        return x.index_copy_(0, at, y) if inplace and _is_own(x) else x.index_copy(0, at, y)

    check_inplace(inplace, *state.memory, *state.pending.present().values(), state.position)
    return state.map(replaced, other)


def to_device(state: State, device: Any) -> State:
    """The state with its tables and pending tokens on a device; the position stays where it is (SPEC.md §5).

    Raises:
        ValueError: torch knows no such device.
    """
    validation.check_is_state(state)
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that torch.device takes. Received: {device!r} ({error})") from None
    check_present(device)
    return state.map(lambda x: x.to(device))._replace(position=state.position)


def pending(cfg: FwPKMConfig, state: State) -> Tensor:
    """How many tokens of each row no write has consumed ``[B]``."""
    validation.check_state(cfg, state, SELF)
    if state.position.device.type == "cpu":  # else it would wait for the device
        validation.check_positions(cfg, state.position.tolist())
    return schedule.pending(cfg, state.position)


def nbytes(state: State) -> int:
    """The bytes that a state takes, those of a table that rows share counted once."""
    validation.check_is_state(state)
    arrays = (*state.memory, *state.pending, state.position)
    return sum(x.element_size() * math.prod(n for n, by in zip(x.shape, x.stride()) if by) for x in arrays if x.numel())


def mask_of(cfg: FwPKMConfig, rows: Any, batch_size: int) -> Tensor:
    """``rows`` of a reset or a flush as a bool tensor [B] on the CPU."""
    return torch.from_numpy(row_checks.mask_of(cfg, _on_host(rows), batch_size))


def _on_host(rows: Any) -> Any:
    return rows.detach().cpu().numpy() if isinstance(rows, Tensor) else rows


def _rows_of(x: Tensor, ids: Tensor) -> Tensor:
    return x.index_select(0, ids.to(x.device))


def _is_own(x: Tensor) -> bool:
    """Whether no two rows share memory."""
    return x.stride(0) != 0 or x.shape[0] == 1
