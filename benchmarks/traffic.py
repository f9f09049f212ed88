"""The least that a call must move through a GPU's memory: every byte that must be read or written, once.

A kernel cannot be faster than these bytes at the speed of a plain copy. What is small beside them (keys, slots,
weights, losses) is left out, and so are second reads of what no cache could hold.
"""

from typing import NamedTuple

import torch

from benchmarks.workloads import Workload

_TABLE_ITEM = 4  # bytes of a float32


class Traffic(NamedTuple):
    """Bytes of one call."""

    forward: int
    train: int
    """Of forward and backward."""


def floor(workload: Workload, slots: torch.Tensor, item: int) -> Traffic:
    """The least bytes of a call whose state began at a chunk's first token, under boundary="drop".

    Forward: queries, values and gates are read and outputs written; each chunk reads the rows that it touches, and
    writes them if it is complete.
    With backward: the forward also keeps each touched row as it was before its write, and the backward reads it; the
    gradient of each such row is written once and read once; queries, values, gates and the outputs' gradients are
    read, the inputs' gradients written.

    Args:
        workload: the shapes.
        slots: ``[B, T, H*k]`` what was read (``trace.slots``).
        item: bytes of a number of the inputs and outputs.
    """
    cfg, tokens = workload.config, workload.batch * workload.length
    inputs = tokens * item * (cfg.num_heads * cfg.key_dim + cfg.value_dim + 1)
    outputs = tokens * item * cfg.value_dim
    read, written = (rows * _TABLE_ITEM * cfg.value_dim for rows in touched_rows(workload, slots))
    forward = inputs + outputs + read + written
    backward = inputs + outputs + inputs + read + 2 * read
    return Traffic(forward, forward + read + backward)


def touched_rows(workload: Workload, slots: torch.Tensor) -> tuple[int, int]:
    """Distinct table rows of each chunk, summed over the chunks: all of them, and those of complete chunks."""
    cfg, memories = workload.config, workload.memories
    read = written = 0
    tables = torch.arange(memories, device=slots.device).repeat_interleave(workload.batch // memories)
    rows = slots + tables[:, None, None] * cfg.num_slots
    for chunk in rows.split(cfg.chunk_size, dim=1):
        distinct = chunk.unique().numel()
        read += distinct
        written += distinct if chunk.shape[1] == cfg.chunk_size else 0
    return read, written
