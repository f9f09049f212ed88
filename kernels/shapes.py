"""The pinned block sizes of every kernel, from the configuration alone: never from B or T, so nothing is tuned anew."""

import functools
import os
from typing import Any, NamedTuple

import torch
import triton

from fwpkm.config import FwPKMConfig


class Shapes(NamedTuple):
    """Compile-time arguments by kernel."""

    prepare: dict[str, Any]
    select: dict[str, Any]
    combine: dict[str, Any]
    pull: dict[str, Any]
    key_sums: dict[str, Any]
    keys: dict[str, Any]
    read: dict[str, Any]
    values: dict[str, Any]
    read_backward: dict[str, Any]
    by_token: dict[str, Any]


@functools.lru_cache
def shapes(cfg: FwPKMConfig, query: torch.dtype) -> Shapes:
    """The block sizes for a configuration and the dtype of the queries."""
    half, k, heads = cfg.key_dim // 2, cfg.top_k, cfg.num_heads
    columns = max(16, triton.next_power_of_2(cfg.num_subkeys))
    choices = triton.next_power_of_2(k)
    width = triton.next_power_of_2(cfg.value_dim)
    half_block = triton.next_power_of_2(half)
    entries = heads * k
    exact = query == torch.bfloat16
    products = {"EXACT": exact, "UPCAST": os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")}
    return Shapes(
        prepare={
            "QUERY_BLOCK": triton.next_power_of_2(heads * cfg.key_dim),
            "VALUE_BLOCK": width,
            "num_warps": 1,  # a token is a few KB: one warp reads it in a few wide loads
        },
        select={
            # The products with all sub-keys stay in registers: 64 tokens x 512 sub-keys are 128 KB of 256.
            "BLOCK": max(16, min(64, 32768 // columns)),
            "COLUMNS": columns,
            "DEPTH": 32 if columns <= 512 else 16,
            "CHOICES": choices,
            "STEP": max(8, min(32, 256 // choices, half_block)),
            # What the parts leave out, of (|q| + max |K|)² or |q| max |K|, at worst.
            "ERROR": (1 if exact else 2) * (2.0**-18 if cfg.score == "idw" else 2.0**-17),
            "num_warps": 16 if columns >= 512 else 8,
            "num_stages": 2 if columns <= 1024 else 1,
            **products,
        },
        combine={
            "BLOCK": max(1, min(16, 4096 // choices**2)),
            "HEAD_BLOCK": triton.next_power_of_2(heads),
            "CHOICES": choices,
            "num_warps": 4,
        },
        pull={"BLOCK": 32, "CHOICES": choices, "num_warps": 4},
        key_sums={
            "TILE": 64,  # the fewest rows that a warp group multiplies at once
            "BLOCK": 64,
            "COLUMNS": max(16, min(256, half_block)),
            "PIECE": 512,
            "num_warps": 4,
            "num_stages": 2,
            **products,
        },
        keys={"BLOCK": half_block, "num_warps": 1},
        read={"BLOCK": width, "ENTRY_BLOCK": min(8, triton.next_power_of_2(entries)), "num_warps": 4},
        values={"BLOCK": width, "ENTRY_BLOCK": 2, "num_warps": max(1, min(4, width // 512))},
        read_backward={"BLOCK": width, "ENTRY_BLOCK": min(4, triton.next_power_of_2(entries)), "num_warps": 4},
        by_token={
            "BLOCK": 16,
            "CHOICES": choices,
            "STEP": max(8, min(64, 256 // choices, half_block)),
            "num_warps": 4,
        },
    )
