"""What a call computes, and where that lies.

By window: token w of all windows, entry e = w·H·k + j, group g of [M, H, 2]. There may be room for more windows and
tokens.
"""

import functools
import math

import torch

from fwpkm.config import FwPKMConfig
from fwpkm.kernels.room import Layout, Place, Specs
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.sums import most_pieces, steps_over, words_for
from fwpkm.kernels.windows import Bounds, Plan, of_plan

_FLOAT, _INT, _LONG, _BYTE = torch.float32, torch.int32, torch.int64, torch.int8


def layout_of_kept(cfg: FwPKMConfig, most: Bounds, memories: int, batch: int, save: bool, keys: bool = True) -> Layout:
    """Of what a call keeps; "zeros" is what of it must begin as such, and "counted" that without "largest".

    Args:
        cfg: the configuration.
        most: the windows that there is room for.
        memories: M.
        batch: B.
        save: for the backward.
        keys: whether the keys are among it.
    """
    windows, total, room, longest = most
    groups, half, subkeys = 2 * memories * cfg.num_heads, cfg.key_dim // 2, cfg.num_subkeys
    entries, width = total * cfg.slots_per_token, cfg.value_dim
    choices, clipped = (total, cfg.num_heads, 2, cfg.top_k), cfg.grad_clip is not None
    counted: Specs = {
        "share": ((windows, groups, subkeys), _LONG),  # Σ p over the chunk
        # A bit for each token of the window, set where it chose the sub-key.
        "maps": ((windows, groups, subkeys, words_for(longest * batch // memories)), _INT),
        "counts": ((windows, memories), _INT),  # n
        "active": ((windows, memories), _INT),  # whether any token has a pair
        # The largest ‖K‖² before each window, as the integer that has its bits; behind what else begins as zeros.
        "largest": ((windows + 1, groups), _INT),
    }
    computed: dict = {
        "flags": ((batch * room,), _BYTE),
        "kinds": ((total,), _BYTE),  # the flags as the window found them
        "ids": (choices, _INT),  # sub-keys, best first
        "ranks": (choices, _FLOAT),  # -‖q - K‖², or q·K
        "slots": ((total, cfg.slots_per_token), _INT),
        "weights": ((total, cfg.slots_per_token), _FLOAT),
        "strength": ((total,), _FLOAT),  # κ g of the tokens that have a pair, else 0
        "error": ((total, width), _FLOAT),  # v̂ - u of those, else 0
        "order": ((entries,), _LONG),  # the entries by window, table row and token
        # Their table rows, those of the next window's tables behind those of this one's.
        "sorted_rows": ((entries,), _LONG if windows * memories * cfg.num_slots > 2**31 - 1 else _INT),
    }
    if keys:  # before each window, and after the last; or only the last
        computed["keys"] = (windows + 1 if save else 1, groups, subkeys, half), _FLOAT
    saved: Specs = {
        "moved": ((windows, groups, subkeys), _BYTE),  # whether the sub-key moved
        "pulled": ((windows, groups, subkeys), _FLOAT),  # Σ c
        "heads": ((entries,), _INT),  # where each entry's segment begins in the order
        "steps": ((entries,), _FLOAT),  # by segment: η/N of a row that moved, else 0
        "rows": ((entries, width), _FLOAT),  # by segment: the table row before the write
        "keys_unclipped": ((windows, groups, subkeys, half), _BYTE) if clipped else None,
        "values_unclipped": ((entries, width), _BYTE) if clipped else None,
    }
    layout = Layout.of({**counted, **computed, **(saved if save else dict.fromkeys(saved))})
    largest = layout.place("largest")
    ends = {"counted": largest.offset, "zeros": largest.offset + largest.bytes}
    of_zeros = {name: Place(0, (end // 4,), _INT) for name, end in ends.items()}  # of the first tensors once more
    return Layout({**layout.places, **of_zeros}, layout.size)


kept_layout = functools.lru_cache(1024)(layout_of_kept)
"""The same of plain integers; torch.compile traces symbols, which have no hash."""


@of_plan
def scratch_layout(
    cfg: FwPKMConfig, plan: Plan, memories: int, batch: int, query: torch.dtype, row: torch.dtype
) -> Layout:
    """Of what the forward needs besides; ``row`` holds the number of any table row."""
    size, half, subkeys = shapes(cfg, query), cfg.key_dim // 2, cfg.num_subkeys
    groups, entries = 2 * memories * cfg.num_heads, cfg.slots_per_token
    by_token = batch * plan.longest, cfg.num_heads, 2
    pieces = blocks_of(batch * plan.longest * entries, size.piece["PIECE"]) * (True in plan.kinds)
    return Layout.of(
        {
            "norms": ((groups, subkeys), _FLOAT),  # ‖K‖²
            "halves": ((groups, 2, subkeys, half), torch.bfloat16),  # two parts of each sub-key
            "proposals": ((*by_token, size.select["TILES"] * size.select["PROPOSED"]), _INT),  # (select_kernel)
            "scales": (by_token, _FLOAT),  # the unit of their ranks
            "table_rows": ((plan.total * entries,), row),  # the entries', unsorted
            "pulls": ((*by_token, cfg.top_k * (True in plan.kinds)), _FLOAT),  # c of each choice
            **(sums_specs(cfg, plan, memories, batch, query) if True in plan.kinds else {}),
            "terms": ((len(plan.windows), groups, subkeys), _FLOAT),  # of the addressing loss
            "partial": ((pieces, cfg.value_dim), _FLOAT),  # sums over the entries of a row that has many
            "partial_counts": ((pieces,), _INT),  # how many of those count
            "squared": ((plan.total,), _FLOAT),  # ½ g ‖v̂ - u‖²
        }
    )


@of_plan
def backward_layout(cfg: FwPKMConfig, plan: Plan, memories: int, batch: int, query: torch.dtype) -> Layout:
    """Of what the backward needs besides."""
    size, entries, width = shapes(cfg, query), cfg.slots_per_token, cfg.value_dim
    longest, choices = batch * plan.longest, ((plan.total, cfg.num_heads, 2, cfg.top_k), _FLOAT)
    return Layout.of(
        {
            "gradients": ((plan.total * entries, width), _FLOAT),  # by segment
            "d_weights": ((plan.total, entries), _FLOAT),
            "d_read": ((longest, width), _FLOAT),
            "partial": ((blocks_of(longest * entries, size.piece_backward["PIECE"]), width), _FLOAT),
            **dict.fromkeys(("d_scores", "d_pulls", "d_slopes", "d_ranks"), choices),
            **sums_specs(cfg, plan, memories, batch, query),
        }
    )


def sums_specs(cfg: FwPKMConfig, plan: Plan, memories: int, batch: int, query: torch.dtype) -> Specs:
    """Of the sums over each sub-key's tokens of a window, in pieces."""
    rows = 2 * memories * cfg.num_heads, cfg.num_subkeys
    words = shapes(cfg, query).key_sums["WORDS"]
    pieces = most_pieces(steps_over(batch // memories * plan.longest, words), math.prod(rows))
    return {"sums": ((pieces, *rows, cfg.key_dim // 2), _FLOAT), "totals": ((pieces, *rows), _FLOAT)}
