"""Memory for what a call computes, and what of it the backward needs."""

import functools
import math
from typing import Any, NamedTuple

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
_COUNTED = ("share", "counts", "active", "maps")
"""What begins as zeros."""


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
    """int32: what must begin as zeros, of ``Kept`` and, behind it, ``largest``"""
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
    memories, groups, device = keys.shape[0], 2 * keys.shape[0] * cfg.num_heads, keys.device
    specs, size, places = _layout(cfg, most, memories, batch, save)
    zeros = torch.empty(size, dtype=torch.int32, device=device)
    *counted, largest = (
        (zeros if dtype == torch.int32 else zeros.view(dtype)).as_strided(*place) for dtype, place in places
    )
    rooms: dict[str, Tensor | None] = dict(zip(_COUNTED, counted))
    if in_keys:
        rooms["keys"] = keys.view(specs["keys"][0])
    for name, spec in specs.items():
        if name not in rooms:
            rooms[name] = None if spec is None else torch.empty(spec[0], dtype=spec[1], device=device)
    kept = Kept(**rooms)  # type: ignore[arg-type]
    used = plan.total * cfg.slots_per_token
    if len(kept.sorted_rows) > used:  # what no window uses comes last
        kept.sorted_rows[used:] = torch.iinfo(kept.sorted_rows.dtype).max
    norms = torch.empty(groups, cfg.num_subkeys, device=device)
    halves = torch.empty(groups, 2, cfg.num_subkeys, cfg.key_dim // 2, dtype=torch.bfloat16, device=device)
    return kept, Scratch(zeros, largest, norms, halves)


@functools.lru_cache(64)
def _layout(cfg: FwPKMConfig, most: Bounds, memories: int, batch: int, save: bool) -> tuple[dict, int, list]:
    """``kept_shapes`` with None for what a call does not need; how many int32 must begin as zeros; and what they are.

    That is, as dtypes and places: what is counted, and ``largest``. In one buffer all become zeros by one launch.
    """
    specs: dict[str, Any] = dict(kept_shapes(cfg, most, memories, batch))
    for name, (shape, _) in specs.items():
        if shape == (0,) or name == "order" or not (save or name in _OF_FORWARD):
            specs[name] = None  # the sort makes the order
    if not save:  # of the keys only the last
        shape, dtype = specs["keys"]
        specs["keys"] = (1, *shape[1:]), dtype
    largest = (most.windows + 1, 2 * memories * cfg.num_heads), torch.int32
    places, at = [], 0
    for shape, dtype in (*(specs[name] for name in _COUNTED), largest):
        words = dtype.itemsize // 4
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        places.append((dtype, (shape, strides, at // words)))
        at += blocks_of(math.prod(shape) * words, 4) * 4  # addresses of 16 bytes
    return specs, at, places
