"""What the kernels serve of torch, in words for people. Imports triton only once nothing else is in the way."""

import functools

import torch
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory
from fwpkm.kernels.served import why_no_triton, why_unsupported_config, why_unsupported_packing, why_unsupported_tables

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_unsupported(cfg: FwPKMConfig, memory: Memory, query: Tensor, cu_seqlens: Tensor | None = None) -> str | None:
    """Why ``implementation="triton"`` cannot serve a call with these tables and queries, or None where it can.

    Args:
        cfg: the configuration.
        memory: the tables.
        query: ``[B, T, H*Dk]``, or packed ``[1, T, H*Dk]``.
        cu_seqlens: ``[B+1]`` of packed sequences with a state, or None; on a device, it is waited for.
    """
    reason = why_no_triton() or _of_config(cfg) or why_unsupported_tensors(memory, query) or _why_here(query)
    return reason or (None if cu_seqlens is None else why_unsupported_packing(cu_seqlens.tolist()))


_of_config = functools.lru_cache(why_unsupported_config)


def why_unsupported_tensors(memory: Memory, query: Tensor) -> str | None:
    """The reason that lies in dtypes, numbers of memories, or a device that no kernel was tried on; can be traced."""
    if torch.version.hip and query.device.type == "cuda":  # so torch names AMD's GPUs too
        return "the kernels serve NVIDIA GPUs, and this torch is built for AMD's (ROCm)"
    if query.dtype not in _DTYPES:
        return f"query must be float32, bfloat16 or float16. Received: {query.dtype}"
    if any(table.dtype not in _DTYPES for table in memory):
        return f"tables must be float32. Received: keys {memory.keys.dtype}, values {memory.values.dtype}"
    return why_unsupported_tables(*memory.keys.shape[:2])


@functools.lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _why_here(query: Tensor) -> str | None:
    from fwpkm.kernels.runtime.launch import INTERPRETED

    if INTERPRETED:
        return None  # on tensors of any device
    if query.device.type != "cuda":
        return (
            f"query must be on a CUDA device; to try the kernels without one, set TRITON_INTERPRET=1 before triton is "
            f"imported. Received: query on {query.device}"
        )
    capability = _capability(query.device)
    if capability < (8, 0):
        return f"the GPU's compute capability must be at least 8.0. Received: {'.'.join(map(str, capability))}"
    return None
