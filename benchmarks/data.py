"""Tables and inputs for a workload, as torch tensors."""

import math
from typing import NamedTuple

import torch

from benchmarks.workloads import Workload
from fwpkm.containers import Memory

_BLOCK_ROWS = 16384


class Inputs(NamedTuple):
    """What one training step reads; all but the cotangent require grad."""

    query: torch.Tensor
    """``[B, T, H*Dk]``"""
    value: torch.Tensor
    """``[B, T, Dv]``"""
    gate: torch.Tensor
    """``[B, T]``"""
    cotangent: torch.Tensor
    """``[B, T, Dv]``: the gradient with respect to the output."""


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


def make_inputs(workload: Workload, *, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Random inputs; queries have the scale of the sub-keys, so that reads spread over the table."""
    cfg = workload.config
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(workload.batch, workload.length, *shape, generator=generator, device=device)

    query = normal(cfg.num_heads * cfg.key_dim).div_(math.sqrt(cfg.key_dim))
    value, gate, cotangent = normal(cfg.value_dim), normal().sigmoid_(), normal(cfg.value_dim)
    query, value, gate, cotangent = (x.to(dtype) for x in (query, value, gate, cotangent))
    return Inputs(query.requires_grad_(), value.requires_grad_(), gate.requires_grad_(), cotangent)
