"""The pinned block sizes of every kernel, from the configuration alone: never from B or T, so nothing is tuned anew."""

from typing import Any, NamedTuple

import triton

from fwpkm.config import FwPKMConfig


class Shapes(NamedTuple):
    """Compile-time arguments by kernel."""

    prepare: dict[str, Any]
    select: dict[str, Any]
    combine: dict[str, Any]
    keys: dict[str, Any]
    read: dict[str, Any]
    values: dict[str, Any]
    read_backward: dict[str, Any]
    pull_backward: dict[str, Any]
    share_backward: dict[str, Any]


def shapes(cfg: FwPKMConfig) -> Shapes:
    """The block sizes for a configuration."""
    half, k, heads = cfg.key_dim // 2, cfg.top_k, cfg.num_heads
    columns = max(16, triton.next_power_of_2(cfg.num_subkeys))
    choices = triton.next_power_of_2(k)
    width = triton.next_power_of_2(cfg.value_dim)
    half_block = triton.next_power_of_2(half)
    entries = heads * k
    return Shapes(
        prepare={
            "QUERY_BLOCK": triton.next_power_of_2(heads * cfg.key_dim),
            "VALUE_BLOCK": width,
            "num_warps": 1,  # a token is a few KB: one warp reads it in a few wide loads
        },
        select={
            # The products of all sub-keys stay in registers: 32 tokens x 512 sub-keys are 64 KB.
            "BLOCK": 32 if columns <= 1024 else 16,
            "COLUMNS": columns,
            "DEPTH": 16,
            "CHOICES": choices,
            "STEP": max(8, min(64, 256 // choices, half_block)),
            "PRECISION": "tf32x3",
            "ERROR": 16 * 2.0**-24,
            "num_warps": 8 if columns >= 512 else 4,
            "num_stages": 2,
        },
        combine={
            "BLOCK": max(1, min(16, 4096 // choices**2)),
            "HEAD_BLOCK": triton.next_power_of_2(heads),
            "CHOICES": choices,
            "num_warps": 4,
        },
        keys={
            "BLOCK": half_block,
            "CHOICES": choices,
            "ENTRIES": 16,
            "WORDS": 128,  # 4096 tokens at a time
            "num_warps": 4,
        },
        read={"BLOCK": width, "ENTRY_BLOCK": min(8, triton.next_power_of_2(entries)), "num_warps": 4},
        values={"BLOCK": width, "ENTRY_BLOCK": 2, "num_warps": 4},
        read_backward={"BLOCK": width, "ENTRY_BLOCK": min(4, triton.next_power_of_2(entries)), "num_warps": 4},
        pull_backward={
            "BLOCK": 16,
            "CHOICES": choices,
            "STEP": max(8, min(64, 256 // choices, half_block)),
            "num_warps": 4,
        },
        share_backward={"CHOICES": choices, "ENTRIES": 16, "WORDS": 128, "num_warps": 2},
    )
