"""Memory for what a call computes, and what of it the backward needs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.kernels.shapes import blocks_of
from fwpkm.kernels.sums import words_for
from fwpkm.kernels.windows import Bounds, Plan


class Kept(NamedTuple):
    """What a call computed, by window: token w of all windows, entry e = w·H·k + j, group g of [M, H, 2].

    There may be room for more windows and tokens.
    """

    flags: Tensor
    """``[B*n]`` int8, at least"""
    kinds: Tensor
    """``[w]`` int8: the flags as the window found them."""
    keys: Tensor
    """``[windows + 1, g, S, Dk/2]``: before each window, and after the last."""
    ids: Tensor
    """``[w, H, 2, k]`` sub-keys, best first."""
    ranks: Tensor
    """``[w, H, 2, k]``: -‖q - K‖², or q·K."""
    share: Tensor
    """``[windows, g, S]`` int64: Σ p over the chunk."""
    counts: Tensor
    """``[windows, M]``: n."""
    active: Tensor
    """``[windows, M]``: whether any token has a pair."""
    maps: Tensor
    """``[windows, g, S, words]`` int32: a bit for each token of the window, set where it chose the sub-key."""
    moved: Tensor
    """``[windows, g, S]`` int8: whether the sub-key moved."""
    pulled: Tensor
    """``[windows, g, S]``: Σ c."""
    keys_unclipped: Tensor
    slots: Tensor
    """``[w, H*k]``"""
    weights: Tensor
    """``[w, H*k]``"""
    strength: Tensor
    """``[w]``: κ g of the tokens that have a pair, else 0."""
    error: Tensor
    """``[w, Dv]``: v̂ - u of those, else 0."""
    order: Tensor
    """``[w*H*k]``: the entries by window, table row and token."""
    sorted_rows: Tensor
    """``[w*H*k]``: their table rows, those of the next window's tables behind those of this one's."""
    heads: Tensor
    """``[w*H*k]``: where each entry's segment begins in that order."""
    steps: Tensor
    """by segment: η/N of a row that moved, else 0."""
    rows: Tensor
    """by segment: the table row before the write, ``[Dv]``."""
    values_unclipped: Tensor


_OF_FORWARD = {"flags", "kinds", "keys", "ids", "ranks", "share", "counts", "active", "slots", "weights", "strength"}
_OF_FORWARD |= {"error", "order", "sorted_rows", "maps"}
"""What the forward computes in any case."""


def kept_shapes(
    cfg: FwPKMConfig, most: Bounds, memories: int, batch: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of each field of ``Kept``; (0,) of one that the configuration does not need."""
    windows, total, room, longest = most
    longest *= batch // memories
    groups, half, subkeys, entries = (
        2 * memories * cfg.num_heads,
        cfg.key_dim // 2,
        cfg.num_subkeys,
        cfg.slots_per_token,
    )
    float32, int8, int32, int64 = torch.float32, torch.int8, torch.int32, torch.int64
    row = int64 if windows * memories * cfg.num_slots > 2**31 - 1 else int32
    keys_clip, values_clip = (windows, groups, subkeys, half), (total * entries, cfg.value_dim)
    return {
        "flags": ((batch * room,), int8),
        "kinds": ((total,), int8),
        "keys": ((windows + 1, groups, subkeys, half), float32),
        "ids": ((total, cfg.num_heads, 2, cfg.top_k), int32),
        "ranks": ((total, cfg.num_heads, 2, cfg.top_k), float32),
        "share": ((windows, groups, subkeys), int64),
        "counts": ((windows, memories), int32),
        "active": ((windows, memories), int32),
        "maps": ((windows, groups, subkeys, words_for(longest)), int32),
        "moved": ((windows, groups, subkeys), int8),
        "pulled": ((windows, groups, subkeys), float32),
        "keys_unclipped": ((0,) if cfg.grad_clip is None else keys_clip, int8),
        "slots": ((total, entries), int32),
        "weights": ((total, entries), float32),
        "strength": ((total,), float32),
        "error": ((total, cfg.value_dim), float32),
        "order": ((total * entries,), int64),
        "sorted_rows": ((total * entries,), row),
        "heads": ((total * entries,), int32),
        "steps": ((total * entries,), float32),
        "rows": ((total * entries, cfg.value_dim), float32),
        "values_unclipped": ((0,) if cfg.grad_clip is None else values_clip, int8),
    }


class Scratch(NamedTuple):
    """What the address of tokens needs besides."""

    zeros: Tensor
    """bytes: what must begin as zeros, of ``Kept`` and, behind it, ``largest``"""
    largest: Tensor
    """``[windows + 1, g]``: the largest ‖K‖² before each window, as the integer that has its bits."""
    norms: Tensor
    """``[g, S]``: ‖K‖²"""
    halves: Tensor
    """``[g, 2, S, Dk/2]``: two bfloat16 parts of each sub-key."""


def room_for(
    cfg: FwPKMConfig, plan: Plan, most: Bounds, keys: Tensor, batch: int, save: bool, in_keys: bool = False
) -> tuple[Kept, Scratch]:
    """Memory for all that a call computes by window; with ``in_keys`` the keys are written where they stand."""
    memories, groups = keys.shape[0], 2 * keys.shape[0] * cfg.num_heads
    specs = kept_shapes(cfg, most, memories, batch)
    if not save:
        specs["keys"] = (1, *specs["keys"][0][1:]), torch.float32
    summed = ("share", "counts", "active", "maps")
    zeros, (*counted, largest) = _together(
        keys.device, *(specs[name] for name in summed), ((most.windows + 1, groups), torch.int32)
    )
    rooms: dict[str, Tensor | None] = dict(zip(summed, counted))
    rooms["order"] = None  # the sort makes it
    if in_keys:
        rooms["keys"] = keys.view(specs["keys"][0])
    for name in Kept._fields:
        if name not in rooms:
            shape, dtype = specs[name]
            needed = shape != (0,) and (save or name in _OF_FORWARD)
            rooms[name] = torch.empty(shape, dtype=dtype, device=keys.device) if needed else None
    kept = Kept(**rooms)  # type: ignore[arg-type]
    used = plan.total * cfg.slots_per_token
    if len(kept.sorted_rows) > used:  # what no window uses comes last
        kept.sorted_rows[used:] = torch.iinfo(kept.sorted_rows.dtype).max
    norms = torch.empty(groups, cfg.num_subkeys, device=keys.device)
    halves = torch.empty(groups, 2, cfg.num_subkeys, cfg.key_dim // 2, dtype=torch.bfloat16, device=keys.device)
    return kept, Scratch(zeros, largest, norms, halves)


def _together(device: torch.device, *parts: tuple[tuple[int, ...], torch.dtype]) -> tuple[Tensor, list[Tensor]]:
    """One buffer, and tensors of these shapes and dtypes in it: all become zeros at the price of one launch."""
    sizes = [blocks_of(math.prod(shape) * dtype.itemsize, 16) * 16 for shape, dtype in parts]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    taken = [x[: math.prod(shape) * dtype.itemsize] for x, (shape, dtype) in zip(buffer.split(sizes), parts)]
    return buffer, [x.view(dtype).view(shape) for x, (shape, dtype) in zip(taken, parts)]
