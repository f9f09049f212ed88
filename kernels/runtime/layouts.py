"""What a call computes, and where that lies.

By window: token w of all windows, entry e = w·H·k + j, memory m of all windows, group g of [M, H, 2]. There may be
space for more of them.
"""

import functools

from fwpkm.config import FwPKMConfig
from fwpkm.kernels.key_sums import most_pieces, words_for
from fwpkm.kernels.runtime.shapes import blocks_of, keys_move
from fwpkm.kernels.runtime.windows import Bounds, Call
from fwpkm.kernels.runtime.workspace import Layout, Specs, TensorSpec

_FLOAT, _INT, _LONG, _BYTE = "float32", "int32", "int64", "int8"


def layout_of_residuals(
    cfg: FwPKMConfig, most: Bounds, memories: int, batch: int, save: bool, keys: bool = True, overlaid: bool = False
) -> Layout:
    """Of what outlives a call's forward, for its backward.

    "zeros" is what of it must begin as such, and "counters" that without "largest".

    Args:
        cfg: the configuration.
        most: the windows that there is space for.
        memories: M.
        batch: B.
        save: whether a backward will come.
        keys: whether the keys are among it.
        overlaid: whether what is written is laid over one table.
    """
    window_memories, total, num_streamed, longest, followed, ragged = most
    moving, codebooks = window_memories * keys_move(cfg), 2 * cfg.num_heads
    entries, width, half, subkeys = total * cfg.slots_per_token, cfg.value_dim, cfg.key_dim // 2, cfg.num_subkeys
    choices, clipped = (total, cfg.num_heads, 2, cfg.top_k), cfg.grad_clip is not None
    counters: Specs = {
        "probability_sums": ((window_memories, codebooks, subkeys), _LONG),  # Σ p over the chunk
        # A bit for each token of the window, set where it chose the sub-key.
        "maps": ((window_memories, codebooks, subkeys, words_for(longest * batch // memories)), _INT),
        "counts": ((window_memories,), _INT),  # n
        "active": ((window_memories,), _INT),  # whether any token has a pair
        # The largest ‖K‖² before each window, as the integer that has its bits; behind what else begins as zeros.
        "largest": ((memories + moving, codebooks), _INT),
    }
    computed: dict = {
        "begins": ((memories + 1,), _LONG) if ragged else None,  # of each memory's stream
        "flags": ((num_streamed,), _BYTE),
        "window_flags": ((total,), _BYTE),  # the flags as the window found them
        "ids": (choices, _INT),  # sub-keys, in any order
        "ranks": (choices, _FLOAT),  # -‖q - K‖², or q·K
        "slots": ((total, cfg.slots_per_token), _INT),
        "weights": ((total, cfg.slots_per_token), _FLOAT),
        "strength": ((total,), _FLOAT),  # κ g of the tokens that have a pair, else 0
        "error": ((total, width), _FLOAT),  # v̂ - u of those, else 0
        "order": ((entries,), _LONG),  # the entries by window, table row and token
        # Their table rows, those of the next window's tables behind those of this one's.
        "sorted_rows": ((entries,), _LONG if window_memories * cfg.num_slots > 2**31 - 1 else _INT),
    }
    # By segment: the table row after the write.
    computed["new_rows"] = ((followed * cfg.slots_per_token, width), _FLOAT) if overlaid else None
    if keys:  # before each window, and after the last, where they move; or only the last
        computed["keys"] = (memories + moving * save, codebooks, subkeys, half), _FLOAT
    saved: Specs = {
        "moved": ((moving, codebooks, subkeys), _BYTE),  # whether the sub-key moved
        "coefficient_sums": ((moving, codebooks, subkeys), _FLOAT),  # Σ c
        "segment_start": ((entries,), _INT),  # where each entry's segment begins in the order
        "step_sizes": ((entries,), _FLOAT),  # by segment: η/N of a row that moved, else 0
        "decays": ((entries,), _FLOAT) if cfg.usage_weight and cfg.weight_decay else None,  # by segment: η λ
        # By segment: the table row before the write; or the segment that left it, -1 for the one table.
        "old_rows": None if overlaid else ((entries, width), _FLOAT),
        "sources": ((entries,), _INT) if overlaid else None,
        "keys_unclipped": ((moving, codebooks, subkeys, half), _BYTE) if clipped else None,
        "values_unclipped": ((entries, width), _BYTE) if clipped else None,
    }
    layout = Layout.of({**counters, **computed, **(saved if save else dict.fromkeys(saved))})
    largest = layout.spec("largest")
    ends = {"counters": largest.offset, "zeros": largest.offset + largest.nbytes}
    of_zeros = {name: TensorSpec(0, (end // 4,), _INT) for name, end in ends.items()}  # of the first tensors once more
    return Layout({**layout.tensors, **of_zeros}, layout.size)


residuals_layout = functools.lru_cache(1024)(layout_of_residuals)
"""The same of plain integers; torch.compile traces symbols, which have no hash."""


def forward_layout(call: Call, row: str) -> Layout:
    """Of what the forward needs besides; ``row`` holds the number of any table row."""
    cfg, plan, size = call.cfg, call.plan, call.shapes
    half, subkeys, entries, writes = cfg.key_dim // 2, cfg.num_subkeys, cfg.slots_per_token, plan.num_writes > 0
    moving, by_token = writes and keys_move(cfg), (call.most_at_once, cfg.num_heads, 2)
    pieces = blocks_of(plan.batch * plan.longest * entries, size.piece["PIECE"]) * (writes and not call.decided)
    by_row = ((call.memories * cfg.num_slots,), _INT) if call.overlaid else None
    layout = Layout.of(
        {
            "latest": by_row,  # of each memory's: the segment that wrote it last, or -1
            "last_windows": by_row,  # of the last window that reads it: how many memories those before have; or -1
            "norms": ((call.groups, subkeys), _FLOAT),  # ‖K‖²
            "keys_hi_lo": ((call.groups, 2, subkeys, half), "bfloat16"),  # each sub-key as a sum of two
            "proposals": ((*by_token, size.propose["TILES"] * size.propose["PROPOSED"]), _INT),  # (propose_kernel)
            "scales": (by_token, _FLOAT),  # the unit of their ranks
            "table_rows": ((plan.total * entries,), row),  # the entries', unsorted
            "coefficients": ((*by_token, cfg.top_k * moving), _FLOAT),  # c of each choice
            **(_sums_specs(call) if moving else {}),
            "partial": ((pieces, cfg.value_dim), _FLOAT),  # sums over the entries of a row that has many
            "partial_counts": ((pieces,), _INT),  # how many of those count
            "squared": ((plan.total,), _FLOAT),  # ½ g ‖v̂ - u‖²
        }
    )
    if by_row is None:
        return layout
    end = layout.spec("last_windows")
    both = TensorSpec(0, ((end.offset + end.nbytes) // 4,), _INT)  # which begin as -1
    return Layout({**layout.tensors, "by_row": both}, layout.size)


def backward_layout(call: Call, table: bool) -> Layout:
    """Of what the backward needs besides; whether the gradient of the ``table`` is asked for."""
    cfg, plan, entries, width = call.cfg, call.plan, call.cfg.slots_per_token, call.cfg.value_dim
    longest, choices = plan.batch * plan.longest, ((plan.total, cfg.num_heads, 2, cfg.top_k), _FLOAT)
    return Layout.of(
        {
            # By segment; nobody asks for those of the first window's rows but the table.
            "gradients": ((plan.total * entries * (table or len(plan.windows) > 1), width), _FLOAT),
            "d_weights": ((plan.total, entries), _FLOAT),
            "d_read": ((longest, width), _FLOAT),
            "partial": ((blocks_of(longest * entries, call.shapes.piece_backward["PIECE"]), width), _FLOAT),
            **dict.fromkeys(("d_scores", "d_coefficients", "d_slopes", "d_ranks"), choices),
            **_sums_specs(call),
        }
    )


def _sums_specs(call: Call) -> Specs:
    """Of the sums over each sub-key's tokens of a run of windows, in pieces."""
    words, runs = 32 * call.shapes.key_sums["WORDS"], [call.integers(*run) for run in call.runs]
    sizes = [(call.blocks(x, words), x["groups"] * call.cfg.num_subkeys) for x in runs]
    most = max(most_pieces(rounds, rows) * rows for rounds, rows in sizes)
    return {"sums": ((most, call.cfg.key_dim // 2), _FLOAT), "totals": ((most,), _FLOAT)}
