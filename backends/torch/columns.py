"""Tables in columns, for a table that is larger than one card: each of n ranks holds Dv/n numbers of every row.

    mesh = torch.distributed.init_device_mesh("cuda", (n,))
    layer = columns.shard(layer, mesh)      # or a State, or a Memory

The table is then a DTensor placed by ``Shard`` on its value dimension, and every function of this backend takes it as
one that lies whole. All ranks make the same calls with the same tokens, and get the same outputs, gradients and
states; the rest of a model is the same on each. What the ranks tell each other stands in column_parallel.py.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fwpkm.backends.torch.column_files import join, load, load_state, save, save_state
from fwpkm.backends.torch.column_parallel import Columns, check_divides, check_mesh, is_sharded
from fwpkm.backends.torch.parts import InitialMemory
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State

__all__ = ["gather", "join", "load", "load_state", "save", "save_state", "shard"]

What = TypeVar("What", Memory, State, nn.Module)


def shard(what: What, mesh: Any) -> What:
    """Deal the value tables out in columns; nothing is sent, as each rank keeps its part of what it has whole.

    Args:
        what: a State or a Memory, the same on every rank: a new one is returned, on the mesh's device. Or a module that
            holds FwPKM layers, whose initial memories are replaced: on the meta device, ``to_empty`` and
            ``reset_parameters`` then make only this rank's columns.
        mesh: a one-dimensional ``torch.distributed.device_mesh.DeviceMesh``, such as a dimension ``mesh["columns"]``.

    Raises:
        ValueError: value_dim is no multiple of the mesh's size, the mesh is none of one dimension, or there is nothing
            to deal out, on every rank.
    """
    check_mesh(mesh)

    def deal(values: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        if is_sharded(values):
            raise ValueError("what is dealt out must lie whole. Received: a table that is a DTensor already")
        check_divides(values.shape[-1], mesh.size())
        rank, width = mesh.get_local_rank(), values.shape[-1] // mesh.size()
        own = values.detach()[..., rank * width : (rank + 1) * width]
        own = (own if own.is_meta else own.to(mesh.device_type)).clone(memory_format=torch.contiguous_format)
        shape, stride = values.shape, torch.empty(values.shape, device="meta").stride()
        return DTensor.from_local(own, mesh, [Shard(values.ndim - 1)], run_check=False, shape=shape, stride=stride)

    return _with_tables(what, deal, mesh.device_type)


def gather(what: What) -> What:
    """The inverse of :func:`shard`, on every rank: all must call it, and have space for the whole tables.

    Raises:
        ValueError: a table is no DTensor, or not in columns.
    """

    def join_columns(values: Tensor) -> Tensor:
        columns = Columns.of(values.detach())
        if columns is None:
            raise ValueError("what is gathered must lie in columns. Received: a table that lies whole")
        return columns.joined(columns.table)

    return _with_tables(what, join_columns, None)


def _with_tables(what: Any, function: Any, device: str | None) -> Any:
    """What it is, with every value table replaced; other tensors on ``device``."""
    if isinstance(what, Memory):
        return Memory(what.keys if device is None else what.keys.to(device), function(what.values))
    if isinstance(what, State):
        if what.maybe_uses is not None:
            raise ValueError(
                "what must be a state without uses (usage_weight=0): ranks that hold columns do not count them. "
                f"Received: uses of shape {tuple(what.maybe_uses.shape)}"
            )
        pending = what.pending if device is None else what.pending.map(lambda x: x.to(device))
        return State.of(_with_tables(what.memory, function, device), pending, what.position)
    memories = [x for x in what.modules() if isinstance(x, InitialMemory)] if isinstance(what, nn.Module) else []
    if not memories:
        received = type(what).__name__
        raise ValueError(f"what must be a State, a Memory or a module with FwPKM layers. Received: {received}")
    weights = [cfg.usage_weight for x in what.modules() if isinstance(cfg := getattr(x, "config", None), FwPKMConfig)]
    if any(weights):
        raise ValueError(f"usage_weight must be 0 where a table lies in columns. Received: layers with {weights}")
    for memory, values in [(x, function(x.values)) for x in memories]:
        if isinstance(memory.values, nn.Parameter):
            memory.values = nn.Parameter(values, requires_grad=memory.values.requires_grad)
        else:
            memory.values = values
    return what
