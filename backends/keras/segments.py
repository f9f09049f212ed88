"""Several sequences in a row of the layer: each run of one id other than 0 has a memory of its own (SPEC.md §8).

Only a sequence of more than C + lag tokens ever reads what it wrote. So these alone are given tables, of which a row
of T tokens needs at most T // (C + lag + 1), and all others read the initial memory.
"""

from typing import Any

import numpy as np
from keras import ops

from fwpkm import schedule, validation
from fwpkm.backends.keras import native
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory
from fwpkm.tokens import Array, Tokens


def as_ids(segment_ids: Any) -> Any:
    """What a caller passed, lists as an array.

    Raises:
        ValueError: lists of unequal lengths, or ids that JAX would cut to 32 bits, which could make them equal or 0.
    """
    if isinstance(segment_ids, list | tuple):
        try:
            segment_ids = np.asarray(segment_ids)
        except ValueError:
            raise ValueError("segment_ids must have shape [B, T]. Received: lists of unequal lengths") from None
    integers = isinstance(segment_ids, np.ndarray) and segment_ids.dtype.kind in "iu" and segment_ids.size
    if integers and not -(2**31) <= segment_ids.min() <= segment_ids.max() < 2**31:
        raise ValueError(
            f"segment_ids must fit into int32: number the sequences of a row from 1. "
            f"Received: ids from {segment_ids.min()} to {segment_ids.max()}"
        )
    return segment_ids


def there(segment_ids: Array, mask: Array | None) -> Array:
    """``[B, T]`` bool: the tokens that belong to a sequence."""
    inside = segment_ids != 0
    return inside if mask is None else inside & mask


def read(cfg: FwPKMConfig, memory: Memory, tokens: Tokens, segment_ids: Array, update: bool) -> Array:
    """What packed tokens read ``[B, T, Dv]``: each sequence begins from ``memory``, of M = 1."""
    shape = ops.shape(tokens.value)
    packed = tokens.map(lambda x: ops.reshape(x, (1, -1, *x.shape[2:])))
    output, _, _ = native.apply(cfg, memory, packed, False)
    per_row = shape[1] // (cfg.chunk_size + schedule.lag(cfg) + 1)
    if update and not (isinstance(per_row, int) and per_row == 0):
        first, writes = _writing(cfg, segment_ids, tokens.mask)
        tables = native.count(first, at_most=shape[0] * per_row)
        if not (isinstance(tables, int) and tables == 0):
            written, _, _ = native.apply(
                cfg, memory, packed._replace(mask=packed.mask & writes), True, cu_seqlens=_ends(first, tables)
            )
            output = ops.where(writes[..., None], written, output)
    return ops.reshape(output, shape)


def _writing(cfg: FwPKMConfig, segment_ids: Array, mask: Array) -> tuple[Array, Array]:
    """``[B*T]`` bool: where a sequence begins that reads what it wrote; ``[1, B*T]`` bool: the tokens of these."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = ops.reshape(ops.concatenate([ops.ones_like(segment_ids[:, :1], dtype="bool"), changes], axis=1), (-1,))
    run = ops.cumsum(ops.cast(starts, "int32")) - 1
    lengths = ops.segment_sum(ops.cast(ops.reshape(mask, (-1,)), "int32"), run, ops.shape(run)[0])
    writes = ops.take(lengths, run) > cfg.chunk_size + schedule.lag(cfg)
    return starts & writes, writes[None]


def _ends(first: Array, sequences: int | Array) -> Array:
    """cu_seqlens ``[sequences + 1]``: from each ``first`` to the next; what is between belongs to no sequence."""
    number = ops.maximum(ops.cumsum(ops.cast(first, "int32")), 1) - 1
    sizes = ops.segment_sum(ops.ones_like(number), number, sequences)
    return ops.cast(ops.cumsum(ops.concatenate([ops.zeros((1,), sizes.dtype), sizes])), "int32")


def flags(x: Array, mask: Any) -> Array | None:
    """The mask ``[B, T]`` of x as a bool tensor."""
    if mask is None:
        return None
    mask = ops.convert_to_tensor(mask)
    if "float" in validation.dtype_name(mask):
        raise ValueError(f"mask must have dtype bool. Received: dtype {validation.dtype_name(mask)}")
    mask = ops.cast(mask, "bool")
    validation.check_array("mask", mask, [("B", x.shape[0]), ("T", x.shape[1])], "bool", object)
    return native.as_many_rows(mask, x)
