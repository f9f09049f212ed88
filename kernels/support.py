"""What the kernels serve, in words for people. Imports triton only once nothing else is in the way."""

import dataclasses
import functools
import importlib.util
import itertools
import sys

import torch
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory
from fwpkm.tokens import TOKEN_FIELDS

SERVED_CHOICES = {
    "boundary": ("drop", "wait"),
    "write_scale": ("slots", "unit", "normalized"),
    "memory_scope": ("sequence", "batch"),
}
"""The values of the fields that name a rule; any other is refused. Those of the score stand in scores.py."""
SERVED_FIELDS = {
    "key_dim", "value_dim", "num_heads", "num_subkeys", "top_k", "chunk_size", "lookahead", "boundary", "score",
    "score_eps", "temperature", "learning_rate", "write_scale", "weight_decay", "grad_clip", "addressing_weight",
    "memory_scope", "usage_weight", "query", "value", "gate", "mask",
}  # fmt: skip
"""The fields of a configuration and of a token that the kernels serve; one of a configuration that is not listed must
be at its default."""
_MOST = {"num_heads": 4, "top_k": 32, "num_subkeys": 2048, "key_dim": 1024, "value_dim": 1024}
MOST_PADDING = 4
"""Packed sequences are padded to the longest, but to no more than so many times their tokens."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_unsupported(cfg: FwPKMConfig, memory: Memory, query: Tensor, cu_seqlens: Tensor | None = None) -> str | None:
    """Why ``implementation="triton"`` cannot serve a call with these tables and queries, or None where it can.

    Args:
        cfg: the configuration.
        memory: the tables.
        query: ``[B, T, H*Dk]``, or packed ``[1, T, H*Dk]``.
        cu_seqlens: ``[B+1]`` of packed sequences that are read together, or None; on a device, it is waited for.
            Without a state sequences of unlike lengths are not: such a call may be served all the same.
    """
    reason = _why_no_triton() or _of_config(cfg) or why_unsupported_tensors(memory, query) or _why_here(query)
    return reason or (None if cu_seqlens is None else _of_packing(cu_seqlens.tolist()))


def why_unsupported_config(cfg: FwPKMConfig) -> str | None:
    """The reason that lies in the configuration; can be traced."""
    from fwpkm.kernels.scores import SCORES

    for field in dataclasses.fields(cfg):
        if field.name not in SERVED_FIELDS and getattr(cfg, field.name) != field.default:
            return f"{field.name} must be {field.default!r}. Received: {field.name}={getattr(cfg, field.name)!r}"
    for token_field in TOKEN_FIELDS:
        if token_field.name not in SERVED_FIELDS:
            return f"the kernels do not serve {token_field.name} of a token"
    for name, values in (SERVED_CHOICES | {"score": SCORES}).items():
        if getattr(cfg, name) not in values:
            return f"{name} must be one of {', '.join(map(repr, values))}. Received: {name}={getattr(cfg, name)!r}"
    for name, most in _MOST.items():
        if getattr(cfg, name) > most:
            return f"{name} must be at most {most}. Received: {name}={getattr(cfg, name)}"
    for name in ("key_dim", "value_dim"):
        if getattr(cfg, name) % 16:
            return f"{name} must be a multiple of 16. Received: {name}={getattr(cfg, name)}"
    return None


_of_config = functools.lru_cache(why_unsupported_config)


def why_unsupported_tensors(memory: Memory, query: Tensor) -> str | None:
    """The reason that lies in dtypes, or in a device that no kernel was tried on; can be traced."""
    if torch.version.hip and query.device.type == "cuda":  # so torch names AMD's GPUs too
        return "the kernels serve NVIDIA GPUs, and this torch is built for AMD's (ROCm)"
    if query.dtype not in _DTYPES:
        return f"query must be float32, bfloat16 or float16. Received: {query.dtype}"
    if any(table.dtype not in _DTYPES for table in memory):
        return f"tables must be float32. Received: keys {memory.keys.dtype}, values {memory.values.dtype}"
    return None


def _of_packing(ends: list[int]) -> str | None:
    count, longest = len(ends) - 1, max(stop - start for start, stop in itertools.pairwise(ends))
    if count * longest <= MOST_PADDING * ends[-1]:
        return None
    return (
        f"packed sequences, padded to the longest, must be at most {MOST_PADDING} times their tokens. "
        f"Received: {count} sequences of up to {longest} tokens, {ends[-1]} in all"
    )


@functools.lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _why_no_triton() -> str | None:
    if "triton" not in sys.modules:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'fwpkm[triton]'"
        if "tensorflow" in sys.modules:  # whose LLVM its library would bind to, and crash
            return "triton must be imported before tensorflow in a process that uses both"
    return None


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
