"""States that cost what they hold (SPEC.md §10): ``fwpkm.packing`` on tensors."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fwpkm import packing
from fwpkm.backends.torch.column_parallel import refuse_columns
from fwpkm.backends.torch.ops import to_numpy
from fwpkm.backends.torch.rows import init_state
from fwpkm.backends.torch.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.packing import PackedState

_BITS = {4: torch.int32, 8: torch.int64}


@torch.no_grad()
def pack(cfg: FwPKMConfig, state: State[Tensor], memory: Memory[Tensor], dtype: str | None = None) -> PackedState:
    """What a state holds that the initial ``memory`` does not; of a GPU's tables only rows that differ are copied."""
    return packing.pack(cfg, state, memory, dtype, SELF, to_numpy, _changed_rows, _digests)


@torch.no_grad()
def unpack(cfg: FwPKMConfig, packed: PackedState | Sequence[PackedState], memory: Memory[Tensor]) -> State[Tensor]:
    """The state that was packed, on the device of ``memory``; its position lies on the CPU."""
    whole = packing.prepare(cfg, packed, memory, SELF, to_numpy, _digests)
    device = memory.values.device

    def on_device(x: Any) -> Tensor:
        return torch.tensor(x, device=device)

    values = init_state(cfg, memory, whole.batch_size).memory.values
    at = packing.memory_ids(whole) * cfg.num_slots + whole.slots
    values.view(-1, cfg.value_dim).index_copy_(0, on_device(at), on_device(whole.values))
    pending = packing.unpack_pending(cfg, whole).map(on_device)
    uses = None if whole.uses is None else on_device(whole.uses)
    return State.of(Memory(on_device(whole.keys), values), pending, torch.tensor(whole.position), uses)


_KNOWN: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...], np.ndarray]] = {}
"""By the id of a memory's value table: the table, sums over the memory, and its digests."""


def _digests(memory: Memory[Tensor]) -> np.ndarray:
    """``packing.digests``; of tables on a device, from where they would travel to the host each time, remembered."""
    refuse_columns(memory.values)
    return _hashed(memory) if memory.values.device.type == "cpu" else remembered_digests(memory)


def _hashed(memory: Memory[Tensor]) -> np.ndarray:
    return packing.digests(Memory(*map(to_numpy, memory)))


def remembered_digests(memory: Memory[Tensor]) -> np.ndarray:
    """``packing.digests``, taken anew only for another table, or other sums over the bits of its rows or columns."""
    table = memory.values
    key, sums = id(table), _sums(memory)
    if key not in _KNOWN or _KNOWN[key][0]() is not table or _KNOWN[key][1] != sums:
        forget = weakref.ref(table, lambda _: _KNOWN.pop(key, None))
        _KNOWN[key] = forget, sums, _hashed(memory)
    return _KNOWN[key][2].copy()


def _sums(memory: Memory[Tensor]) -> tuple[Any, ...]:
    bits = [x.reshape(-1, x.shape[-1]).view(_BITS[x.element_size()]) for x in memory]
    sums = [x.sum(axis, dtype=torch.int64) for x in bits for axis in (0, 1)]
    return memory.values.dtype, *(to_numpy(x).tobytes() for x in sums)


def _changed_rows(values: Tensor, initial: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``packing.changed_rows``, found where the tables lie."""
    refuse_columns(values)
    refuse_columns(initial)
    if initial.device != values.device:
        initial = initial.to(values.device)
    bits = _BITS[values.element_size()]
    flags = [
        (values[start:stop].view(bits) != initial[start:stop].view(bits)).any(-1)
        for start, stop in packing.blocks(*values.shape)
    ]
    slots = torch.cat(flags).nonzero()[:, 0]
    return to_numpy(slots), to_numpy(values[slots])
