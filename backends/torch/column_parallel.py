"""Value tables in columns over the ranks of a mesh: a DTensor, of which each of n ranks holds ``[M, N, Dv/n]``.

What a token selects, and how strongly it writes there, follows from keys, queries and gates alone, which every rank has
whole: all n repeat the addressing (SPEC.md §2, §3 and the keys of §4). A column of the values is read and written
without the others, so that the ranks need no more of each other than this, for T tokens, K = H·k entries each:

    forward     slots and weights ``[T, K]`` and strengths ``[T]`` are those of the first rank, so that a rounding that
                differs between cards never makes two columns of one table read or write different rows
                v̂ ``[T, Dv]`` is gathered
                ‖u - v̂‖² ``[T]`` of the memorization loss is summed
                a row moves if its new value is finite in all columns (§4): ``[P]`` flags a write, P rows touched
    backward    the gradients of weights and strengths are sums over columns: summed, so that what lies before them
                (queries, keys, gates) gets its whole gradient on every rank
                the gradient of the targets ``[T, Dv]`` is gathered

All else is elementwise in the columns (the step, its clip and decay) or whole on every rank (pending tokens, the
layer's norms and projections). The gradient of a whole output is the same on every rank, which takes its own columns.
The kernels, which address and write in one call, take no numbers of the first rank and do not compare rows (fast.py).
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, distributed, nn

from fwpkm.backends.torch.derivatives import first_only
from fwpkm.backends.torch.tokens import finite_rows
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory
from fwpkm.tokens import SCALARS, Tokens

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


_ROWS_DRAWN = 4096


def is_sharded(x: Any) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor. Nobody has one who has not imported their module, which takes a second."""
    if type(x) is Tensor or type(x) is nn.Parameter:  # which compilers follow
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


class Columns(NamedTuple):
    """This rank's columns of a table."""

    whole: "DTensor"
    """``[M, N, Dv]``, or ``[N, Dv]``"""
    table: Tensor
    """``[M, N, Dv/n]``: those of this rank; it shares the table's memory."""
    group: Any
    """The process group of the n ranks."""
    rank: int
    """In the group."""
    size: int
    """n"""

    @classmethod
    def of(cls, values: Any) -> "Columns | None":
        """Those of a table that lies in columns; None of one that lies whole.

        Raises:
            ValueError: the table is dealt out in another way.
        """
        if not is_sharded(values):
            return None
        mesh_dim = check_placements("values", values)
        group = values.device_mesh.get_group(mesh_dim)
        table = values.to_local()
        if not values.requires_grad:
            table = table.detach()  # no view, which autograd would not let a function overwrite that gives more
        return cls(values, table, group, distributed.get_rank(group), distributed.get_world_size(group))

    def enter(self, slots: Tensor, weights: Tensor, strength: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """From whole tensors to what this rank's columns are read and written with; the target ``[T, Dv/n]``."""
        slots = slots.clone()
        distributed.broadcast(slots, distributed.get_global_rank(self.group, 0), group=self.group)
        weights, strength = _OfFirst.apply(self, weights, strength)
        return slots, weights, strength, _Slice.apply(self, target)

    def leave(self, reads: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
        """From what this rank's columns gave, reads ``[..., Dv/n]`` and sums ‖u - v̂‖² over columns, to that of all."""
        return _Gather.apply(self, reads), self.summed(squared)

    def narrowed(self, cfg: FwPKMConfig, memory: Memory, tokens: Tokens) -> tuple[FwPKMConfig, Memory, Tokens]:
        """A call of this rank's columns alone; scalars are widened, as sums of their gradients shall lose nothing.

        A value that is not finite in one column is not in any, as its token is dead on every rank (§5).
        """
        value = _Slice.apply(self, tokens.value)
        finite = finite_rows(tokens.value.detach().float().flatten(0, 1)).view(value.shape[:2])
        value = value.masked_fill(~finite[..., None], torch.nan)
        scalars = {name: x.float() for name, x in tokens.present().items() if name in SCALARS}
        cfg = dataclasses.replace(cfg, value_dim=value.shape[-1])
        return cfg, memory._replace(values=self.table), tokens._replace(value=value, **scalars)

    def on_all(self, flags: Tensor) -> Tensor:
        """Which flags ``[P]`` are set on all ranks."""
        flags = flags.to(torch.uint8)
        distributed.all_reduce(flags, distributed.ReduceOp.MIN, group=self.group)
        return flags.bool()

    def summed(self, x: Tensor) -> Tensor:
        """The sum over ranks, of what has no gradient."""
        x = x.contiguous()
        distributed.all_reduce(x, group=self.group)
        return x

    def own(self, x: Tensor) -> Tensor:
        """This rank's columns ``[..., Dv/n]`` of what is whole ``[..., Dv]``."""
        return x.unflatten(-1, (self.size, -1))[..., self.rank, :].contiguous()

    def joined(self, x: Tensor) -> Tensor:
        """What is whole ``[..., Dv]``, of every rank's ``[..., Dv/n]``."""
        return torch.cat(self.of_each(x), -1)

    def of_each(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor of one shape."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        distributed.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def after(self, written: Tensor) -> Tensor:
        """The table ``[M, N, Dv]`` whose columns here are these; the same object where these were overwritten.

        With a gradient it is another object: a DTensor would not know of it.
        """
        if (
            not written.requires_grad
            and written.untyped_storage().data_ptr() == self.table.untyped_storage().data_ptr()
        ):
            return self.whole
        return like(self.whole, written)


def check_placements(name: str, values: "DTensor") -> int:
    """The dimension of the mesh over which a table's columns are dealt.

    Raises:
        ValueError: rows are dealt out, or nothing, or columns that the ranks do not divide.
    """
    from torch.distributed.tensor import Replicate, Shard

    last, placements = values.ndim - 1, values.placements
    dealt = [i for i, x in enumerate(placements) if not isinstance(x, Replicate)]
    if len(dealt) != 1 or type(placements[dealt[0]]) is not Shard or placements[dealt[0]] != Shard(last):
        raise ValueError(
            f"{name} must be placed by Shard({last}), that of the value dimension, over one dimension of its mesh, and "
            "replicated over others: in rows (Shard(0)), a rank would drop every write to a row that it does not hold. "
            f"Received: placements {tuple(placements)} of a table of shape {tuple(values.shape)}"
        )
    check_divides(values.shape[-1], values.device_mesh.size(dealt[0]))
    return dealt[0]


def check_mesh(mesh: Any) -> None:
    """Raise a ValueError unless columns can be dealt over a mesh."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        raise ValueError(
            "mesh must be a DeviceMesh of one dimension: mesh['name'] is one of several. Received: "
            f"{mesh if isinstance(mesh, DeviceMesh) else type(mesh).__name__}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            "mesh must hold this rank: only the ranks of a mesh call with it. Received: a mesh without rank "
            f"{distributed.get_rank()}, {mesh}"
        )


def check_divides(width: int, size: int) -> None:
    """Raise a ValueError unless so many columns can be dealt to so many ranks."""
    if width % size:
        raise ValueError(
            f"value_dim must be a multiple of the ranks that hold its columns. Received: value_dim={width} on {size} "
            "ranks"
        )


def refuse_columns(x: Tensor) -> None:
    """Raise a ValueError for what must lie whole."""
    if is_sharded(x):
        raise ValueError(
            "a table must lie whole here: fwpkm.backends.torch.columns.save and save_state write each rank's columns, "
            f"gather makes them whole where they fit. Received: columns over {x.device_mesh}"
        )


def refuse_uses(cfg: FwPKMConfig, values: Tensor) -> None:
    """Raise a ValueError where writes into a table in columns would be weighed by use."""
    if cfg.usage_weight and is_sharded(values):
        raise ValueError(
            "usage_weight must be 0 where a table lies in columns, whose ranks do not count uses. "
            f"Received: usage_weight={cfg.usage_weight!r}, and columns over {values.device_mesh}"
        )
    for name in ("initial_decay", "recent_penalty"):
        if getattr(cfg, name) and is_sharded(values):
            raise ValueError(
                f"{name} must be 0 where a table lies in columns. "
                f"Received: {name}={getattr(cfg, name)!r}, and columns over {values.device_mesh}"
            )


def like(whole: "DTensor", columns: Tensor) -> "DTensor":
    """A DTensor over the mesh of ``whole``, whose columns here are these ``[..., Dv/n]``; a gradient passes."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shape = torch.Size((*columns.shape[:-1], whole.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    placements = [x if isinstance(x, Replicate) else Shard(columns.ndim - 1) for x in whole.placements]
    return DTensor.from_local(columns, whole.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def by_columns(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` of tensors that treats all columns alike, for tables in columns too: of those of this rank.

    DTensors have most such functions themselves, but not under ``torch.inference_mode``.
    """

    def call(*tensors: Tensor) -> Tensor:
        sharded = [x for x in tensors if is_sharded(x)]  # not next(), of which torch.compile of 2.8 warns
        if not sharded:
            return function(*tensors)
        whole = sharded[0]
        for x in tensors:
            if not is_sharded(x) or (x.device_mesh, x.placements) != (whole.device_mesh, whole.placements):
                received = f"{x.placements} on {x.device_mesh}" if is_sharded(x) else "one that lies whole"
                raise ValueError(
                    f"value tables that meet must lie in columns alike: columns.shard deals out one that lies whole. "
                    f"Received: one of {whole.placements} on {whole.device_mesh}, and {received}"
                )
        check_placements("values", whole)
        local = [x.to_local() for x in sharded]
        result = function(*local)
        overwritten = [x for x, own in zip(tensors, local) if own is result]
        return overwritten[0] if overwritten else like(whole, result)

    return call


def fill(table: Tensor, whole: Tensor) -> None:
    """Overwrite a table with a whole one ``[..., Dv]``, or its columns here with theirs."""
    columns = Columns.of(table)
    if columns is None:
        table.copy_(whole)
    else:
        columns.table.copy_(columns.own(whole))


def fill_normal(table: Tensor, std: float) -> None:
    """Draw a table anew; of one in columns every rank draws all, some rows at a time: generators stay alike."""
    in_shards = any(placement.is_shard(0) for placement in getattr(table, "placements", ()))  # FSDP2's
    columns = None if in_shards else Columns.of(table)
    if columns is None:
        table.normal_(std=std)
        return
    for rows in columns.table.split(_ROWS_DRAWN):
        rows.copy_(columns.own(rows.new_empty(len(rows), table.shape[-1]).normal_(std=std)))


class _OfFirst(torch.autograd.Function):
    """Numbers of the first rank, which all compute alike; their gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx, columns, weights, strength):
        ctx.columns = columns
        both = torch.cat([weights, strength[:, None]], 1)
        distributed.broadcast(both, distributed.get_global_rank(columns.group, 0), group=columns.group)
        return both[:, :-1].contiguous(), both[:, -1].contiguous()

    @staticmethod
    @first_only
    def backward(ctx, d_weights, d_strength):
        both = ctx.columns.summed(torch.cat([d_weights, d_strength[:, None]], 1))
        return None, both[:, :-1], both[:, -1]


class _Slice(torch.autograd.Function):
    """This rank's columns; their gradients are gathered."""

    @staticmethod
    def forward(ctx, columns, x):
        ctx.columns = columns
        return columns.own(x)

    @staticmethod
    @first_only
    def backward(ctx, d):
        return None, ctx.columns.joined(d)


class _Gather(torch.autograd.Function):
    """All columns; of the gradient, which is the same on every rank, each takes its own."""

    @staticmethod
    def forward(ctx, columns, x):
        ctx.columns = columns
        return columns.joined(x)

    @staticmethod
    @first_only
    def backward(ctx, d):
        return None, ctx.columns.own(d)
