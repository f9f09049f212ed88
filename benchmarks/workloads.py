"""The named workloads, for every benchmark on every device, and the tables and inputs that are drawn for them."""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm import FwPKMConfig, Memory

_BLOCK_ROWS = 16384


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of a memory: B sequences of T tokens."""

    name: str
    config: FwPKMConfig
    batch: int
    length: int

    @property
    def chunks(self) -> int:
        """How many chunks the call reads, a last partial one included."""
        return -(-self.length // self.config.chunk_size)

    @property
    def memories(self) -> int:
        """M: one memory for each sequence, or one for all."""
        return {"sequence": self.batch, "batch": 1}[self.config.memory_scope]

    @property
    def table_bytes(self) -> int:
        """Bytes of the value tables in float32."""
        return 4 * self.memories * self.config.num_slots * self.config.value_dim

    def rows(self, slots: Tensor) -> Tensor:
        """Slots ``[B, n, H*k]`` of each sequence's memory as rows of all tables, one after the other."""
        tables = torch.arange(self.memories, device=slots.device).repeat_interleave(self.batch // self.memories)
        return slots + tables[:, None, None] * self.config.num_slots

    def __str__(self) -> str:
        """Shapes in the spec's symbols."""
        cfg = self.config
        widths = f"Dk={cfg.key_dim} Dv={cfg.value_dim} H={cfg.num_heads} k={cfg.top_k} C={cfg.chunk_size}"
        scope = ", one table" * (cfg.memory_scope == "batch")
        return f"B={self.batch} T={self.length} N={cfg.num_subkeys}² {widths}{scope}"


def _paper(name: str, batch: int, length: int, num_subkeys: int, memory_scope: str = "sequence") -> Workload:
    config = dataclasses.replace(FwPKMConfig.paper(), num_subkeys=num_subkeys, memory_scope=memory_scope)
    return Workload(name, config, batch, length)


_LIST = (
    # One sequence through the paper's memory, at four table sizes: what the CPU benchmark measures.
    *(_paper(f"step-{s}", 1, 2048, s) for s in (128, 256, 512, 1024)),
    # A training batch, at the sizes for which the published code's times on one H200 are known.
    *(_paper(f"train-{s}", 8, 4096, s) for s in (256, 512, 1024)),
    *(_paper(f"shared-{s}", 8, 4096, s, "batch") for s in (256, 512, 1024, 2048)),
    # One sequence, from short to long; with one sequence both scopes have one table.
    *(_paper(f"read-{k}k-{s}", 1, 1024 * k, s, "batch") for k in (4, 32, 128) for s in (256, 512, 1024, 2048)),
    _paper("single-512", 1, 4096, 512),
    _paper("decode-512", 1, 1, 512),
    # Milliseconds: for tests of the benchmarks themselves.
    *(Workload(name, FwPKMConfig(16, 16, 1, s, 4, 32), 1, 128) for name, s in (("tiny", 16), ("tiny-wide", 128))),
    Workload("tiny-kernels", FwPKMConfig(16, 16, 1, 4, 2, 2, memory_scope="batch"), 1, 3),
)
WORKLOADS = {workload.name: workload for workload in _LIST}
"""Every workload by its name."""


def by_size(names: Iterable[str]) -> list[Workload]:
    """Workloads from the smallest table to the largest."""
    return sorted((WORKLOADS[name] for name in set(names)), key=lambda workload: workload.table_bytes)


class Inputs(NamedTuple):
    """What one training step reads; all but the cotangent require grad."""

    query: Tensor
    """``[B, T, H*Dk]``"""
    value: Tensor
    """``[B, T, Dv]``"""
    gate: Tensor
    """``[B, T]``"""
    cotangent: Tensor
    """``[B, T, Dv]``: the gradient with respect to the output."""

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, value and gate, as ``apply`` takes them."""
        return self.query, self.value, self.gate


def make_memory(workload: Workload, *, seed: int = 0, device: str = "cpu") -> Memory:
    """Random float32 tables of SPEC.md §7's scale, every page touched.

    Value rows repeat after 16384: times do not depend on them, and 2 GiB of normal numbers take 20 s to draw.
    """
    cfg = workload.config
    generator = torch.Generator(device).manual_seed(seed)
    shape = (workload.memories, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2)
    keys = torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1).div_(math.sqrt(cfg.key_dim))
    block = torch.randn(_BLOCK_ROWS, cfg.value_dim, generator=generator, device=device).div_(math.sqrt(cfg.value_dim))
    values = torch.empty(workload.memories, cfg.num_slots, cfg.value_dim, device=device)
    for rows in values.flatten(0, 1).split(_BLOCK_ROWS):
        rows.copy_(block[: len(rows)])
    return Memory(keys, values)


def make_inputs(workload: Workload, *, seed: int, device: str = "cpu", dtype: str = "float32") -> Inputs:
    """Random inputs; queries have the scale of the sub-keys, so that reads cover the whole table."""
    cfg = workload.config
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(workload.batch, workload.length, *shape, generator=generator, device=device)

    query = normal(cfg.num_heads * cfg.key_dim).div_(math.sqrt(cfg.key_dim))
    drawn = Inputs(query, normal(cfg.value_dim), normal().sigmoid_(), normal(cfg.value_dim))
    inputs = Inputs(*(x.to(getattr(torch, dtype)) for x in drawn))
    for x in inputs.tokens:
        x.requires_grad_()
    return inputs
