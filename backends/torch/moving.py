"""The functions of kernels/left_align.py: called at once, or as operators of torch while a call is compiled.

The places of a call are ``Places`` of kernels/places.py.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fwpkm.backends.torch import fast
from fwpkm.backends.torch.operators import unpacked
from fwpkm.config import FwPKMConfig


def left_align(cfg: FwPKMConfig, query: Tensor, batch: int, longest: int, **told: Tensor | None) -> Any:
    """The places of a call's tokens; an operator takes nothing ragged."""
    if torch.compiler.is_compiling():
        from fwpkm.kernels.places import Places

        return Places(*torch.ops.fwpkm.left_align(cfg.to_json(), query, batch, longest, **told))
    from fwpkm.kernels import left_align

    with fast.on_device_of(query):
        return left_align.left_align(cfg, query, batch, longest, **told)


def left_over(cfg: FwPKMConfig, places: Any, flags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is pending after a call: an index among the places ``[B·P]``, its inverse ``[B·Q]``, the mask ``[B, P]``."""
    if torch.compiler.is_compiling():
        index, inverse, mask = torch.ops.fwpkm.left_over(cfg.to_json(), list(places), flags)
        return index, inverse, mask
    from fwpkm.kernels import left_align

    with fast.on_device_of(flags):
        return left_align.left_over(cfg, places, flags)


def rows(
    index: Tensor, sources: Sequence[Tensor], pending: Sequence[Tensor], wide: bool, batch: int, length: int
) -> list[Tensor]:
    """The rows that an index says ``[batch, length, ...]``, of up to three tensors ``[b, m, ...]``."""
    if torch.compiler.is_compiling():
        return torch.ops.fwpkm.rows(index, list(sources), list(pending), wide, batch, length)
    from fwpkm.kernels import left_align

    with fast.on_device_of(index):
        return left_align.rows(index, fast.all_plain(sources), fast.all_plain(pending), wide, batch, length)


@torch.library.custom_op(
    "fwpkm::left_align",
    mutates_args=(),
    schema="(str config, Tensor query, SymInt batch, SymInt longest, Tensor? token_mask, Tensor? cu_seqlens, "
    "Tensor? num_pending, Tensor? pending_mask) -> Tensor[]",
)
def _left_align(config, query, batch, longest, token_mask, cu_seqlens, num_pending, pending_mask):
    told = {"token_mask": token_mask, "cu_seqlens": cu_seqlens}
    told |= {"num_pending": num_pending, "pending_mask": pending_mask}
    return list(left_align(unpacked(config), query, batch, longest, **told))


@_left_align.register_fake
def _(config, query, batch, longest, token_mask, cu_seqlens, num_pending, pending_mask):
    new = functools.partial(query.new_empty, dtype=torch.int32)
    tokens, pending = query.shape[0] * query.shape[1], 0 if num_pending is None else batch * unpacked(config).capacity
    flags = [query.new_empty(batch, longest, dtype=torch.bool) for _ in range(2)]
    return [new(batch * longest), new(tokens), new(pending), *flags, new(batch), new(batch)]


@torch.library.custom_op(
    "fwpkm::left_over", mutates_args=(), schema="(str config, Tensor[] places, Tensor flags) -> Tensor[]"
)
def _left_over(config, places, flags):
    from fwpkm.kernels.places import Places

    return list(left_over(unpacked(config), Places(*places), flags))


@_left_over.register_fake
def _(config, places, flags):
    batch, capacity = places[-1].shape[0], unpacked(config).capacity
    mask = flags.new_empty(batch, capacity, dtype=torch.bool)
    return [places[0].new_empty(batch * capacity), torch.empty_like(places[0]), mask]


@torch.library.custom_op(
    "fwpkm::rows",
    mutates_args=(),
    schema="(Tensor index, Tensor[] sources, Tensor[] pending, bool wide, SymInt batch, SymInt length) -> Tensor[]",
)
def _rows(index, sources, pending, wide, batch, length):
    return rows(index, sources, pending, wide, batch, length)


@_rows.register_fake
def _(index, sources, pending, wide, batch, length):
    dtypes = [torch.float32 if wide and x.is_floating_point() else x.dtype for x in sources]
    return [x.new_empty(batch, length, *x.shape[2:], dtype=dtype) for x, dtype in zip(sources, dtypes)]
