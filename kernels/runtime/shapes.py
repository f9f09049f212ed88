"""The compile-time arguments of every kernel that follow from the configuration, pinned block sizes among them.

Never from B or T, so nothing is tuned anew.
"""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.kernels.runtime.launch import INTERPRETED


class Score(NamedTuple):
    """The constant SCORE: what the score follows from (kernels/scores.py)."""

    name: str
    epsilon: float


def keys_move(cfg: FwPKMConfig) -> bool:
    """Whether a write moves the keys (SPEC.md §4); else they are at rest."""
    return bool(cfg.addressing_weight or cfg.weight_decay)


@functools.lru_cache
def shapes(cfg: FwPKMConfig, query: Any) -> SimpleNamespace:
    """By kernel, its compile-time arguments for a configuration and the dtype of the queries, of any framework."""
    half, k, heads, subkeys = cfg.key_dim // 2, cfg.top_k, cfg.num_heads, cfg.num_subkeys
    choices = triton.next_power_of_2(k)
    width = triton.next_power_of_2(cfg.value_dim)
    half_block = triton.next_power_of_2(half)
    head_block = triton.next_power_of_2(heads)
    entries = heads * k
    names = {"HEADS": heads, "SUBKEYS": subkeys}
    score = {"SCORE": Score(cfg.score, cfg.score_eps)}
    ranked, scored = names | {"HALF": half} | score, names | {"K": k} | score
    chosen = scored | {"CHUNK": cfg.chunk_size}
    table = {"SLOTS": cfg.num_slots, "WIDTH": cfg.value_dim, "ENTRIES": entries}
    bound = {"CHUNK": cfg.chunk_size, "LOOKAHEAD": cfg.lookahead, "WRITE_SCALE": cfg.write_scale}
    rate = {"RATE": cfg.learning_rate, "DECAY": cfg.weight_decay}
    exact = str(query).rpartition(".")[2] == "bfloat16"
    products = {"EXACT": exact, "UPCAST": INTERPRETED}
    # A row of sub-scores stays within a warp group's registers: 64 tokens x 256 sub-keys are 128 of a thread's 255.
    columns = max(16, min(256, triton.next_power_of_2(subkeys)))
    tiles = -(-subkeys // columns)
    # Ranked in a second step, so at most as many as in the first; more than three are seldom as near as rounding.
    proposed = min(subkeys, k + min(3, choices))
    proposals = {
        "TILES": tiles,
        "PROPOSED": proposed,
        "BITS": max(9, (subkeys - 1).bit_length()),
    }
    lanes = max(1, 32 // choices)
    by_warp = {"BLOCK": lanes, "HEAD_BLOCK": head_block, "CHOICES": choices, "num_warps": 1}
    # Short pieces: tokens that many others resemble keep their rows' own programs longest.
    row = {"BLOCK": width, "PIECE": 16, "num_warps": max(1, min(4, width // 512))}
    # Many entries in flight for the few rows that have many. One for the many that have few: 64 registers then, with
    # which a multiprocessor holds 32 programs instead of 21.
    many, few = row | {"ENTRY_BLOCK": 8}, row | {"ENTRY_BLOCK": 1}
    of_piece = {"WIDTH": cfg.value_dim, "ENTRIES": entries, **many}
    widths = {
        "QUERY": heads * cfg.key_dim,
        "VALUE": cfg.value_dim,
        "QUERY_BLOCK": triton.next_power_of_2(heads * cfg.key_dim),
        "VALUE_BLOCK": width,
    }
    lag = schedule.lag(cfg)
    pending = {"CAPACITY": cfg.capacity, "TOKENS": cfg.chunk_size + lag, **widths, "num_warps": 1}
    return SimpleNamespace(
        prepare={**widths, "ZEROS": 1024, "num_warps": 1},  # a token is a few KB: one warp reads it in a few wide loads
        begin_keys={"SUBKEYS": subkeys, "HALF": half, "BLOCK": half_block, "num_warps": 1},
        propose={
            **ranked,
            "CHUNK": cfg.chunk_size,
            "BLOCK": 64,  # the fewest rows that a warp group multiplies at once
            "COLUMNS": columns,
            "DEPTH": max(16, min(32, half_block)),
            "num_warps": 4,
            "num_stages": 3,
            **proposals,
            **products,
        },
        rank={
            **ranked,
            "K": k,
            "CHUNK": cfg.chunk_size,
            # A warp holds 1024 numbers of its token's sub-keys at once: 32 registers, all loads in flight.
            "DEPTH": max(8, min(1024 // choices, half_block)),
            "CHOICES": choices,
            "LISTED": triton.next_power_of_2(tiles * proposed),
            "EXACT": exact,
            "num_warps": 1,
            **proposals,
        },
        select_slots={**chosen, "TEMPERATURE": cfg.temperature, **by_warp},
        listed_select_slots={  # a token a thread
            **chosen,
            "TEMPERATURE": cfg.temperature,
            "BLOCK": 32,
            "num_warps": 1,
        },
        coefficients={
            **chosen,
            "LOOKAHEAD": cfg.lookahead,
            "WEIGHT": cfg.addressing_weight,
            "BLOCK": 32,
            "CHOICES": choices,
            "num_warps": 4,
        },
        key_sums={
            **ranked,
            "K": k,
            "CHUNK": cfg.chunk_size,
            "AT_REST": not keys_move(cfg),
            "BLOCK": half_block,
            "CHOICES": choices,
            # A warp takes so many tokens at once: their queries are 64 of its registers, and nothing crosses warps.
            "WORDS": max(1, min(8, 2048 // half_block)),
            "num_warps": 1,
        },
        addressing_loss={"ROWS": 2 * heads * subkeys, "BLOCK": 1024, "num_warps": 4},
        keys={**rate, "CLIP": cfg.grad_clip},  # beside those of key_sums
        read={
            **table,
            **bound,
            "BLOCK": width,
            "ENTRY_BLOCK": min(8, triton.next_power_of_2(entries)),
            "num_warps": 4,
        },
        piece={**of_piece, "CHUNK": cfg.chunk_size},
        values={
            **table,
            "CHUNK": cfg.chunk_size,
            **rate,
            "CLIP": cfg.grad_clip,
            "USAGE": cfg.usage_weight,
            **few,
        },
        read_backward={
            **table,
            **bound,
            "BLOCK": width,
            "ENTRY_BLOCK": min(4, triton.next_power_of_2(entries)),
            "num_warps": 4,
        },
        piece_backward=of_piece,
        rows_backward={**table, **rate, **few},
        table_backward={"SLOTS": cfg.num_slots, "WIDTH": cfg.value_dim, "BLOCK": width, "num_warps": 4},
        select_slots_backward={**names, "K": k, "TEMPERATURE": cfg.temperature, **by_warp},
        by_token={  # coefficients_backward and scores_backward
            **chosen,
            "HALF": half,
            "RATE": cfg.learning_rate,
            "WEIGHT": cfg.addressing_weight,
            "BLOCK": 1,  # one warp a token, as in combine
            "CHOICES": choices,
            "DEPTH": max(8, min(1024 // choices, half_block)),
            "num_warps": 1,
        },
        keys_backward=rate,
        scan={**ranked, "CHOICES": 16, "DEPTH": max(8, min(128, half_block)), "num_warps": 1},
        token={
            **chosen,
            **widths,
            "LAG": lag,
            "TEMPERATURE": cfg.temperature,
            "CHOICES": choices,
            "LISTED": triton.next_power_of_2(subkeys),
            "HEAD_BLOCK": head_block,
            "DEPTH": max(16, min(width, 4096 // (head_block * choices))),
            "VERSIONS": 1 + keys_move(cfg),
            "num_warps": 4,
        },
        stage={**pending, "SUBKEYS": subkeys, "HALF": half, "BLOCK": half_block, "ZERO_BLOCK": 1024},
        store_pending={**pending, "LAG": lag},
    )


def blocks_of(number: int, block: int) -> int:
    """How many blocks cover a number."""
    return -(-number // block)
