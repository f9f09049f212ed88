"""Windows: runs of tokens that read the same tables, and the chunk that is written after them (SPEC.md §3 to §5)."""

from typing import NamedTuple

from keras import ops

from fwpkm.backends.keras import table
from fwpkm.backends.keras.addressing import Address, address, write_keys
from fwpkm.backends.keras.tokens import Tokens, ahead, blank, by_memory, by_row, finite_rows, halves
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Array, Losses, Memory


class Visit(NamedTuple):
    """What the n tokens of a window read."""

    output: Array
    """``[B, n, Dv]``, NaN for dead tokens."""
    slots: Array
    """``[B, n, H*k]``"""
    weights: Array
    """``[B, n, H*k]``, a record without gradient, NaN for dead tokens."""
    dead: Array
    """``[B, n]`` bool: some input or selected score is not finite."""


class Found(NamedTuple):
    """What a write needs to know about a window."""

    chosen: Address
    tokens: Tokens
    """the window's tokens, the dead ones blanked."""
    place: Array
    """``[M, R, H*k]`` the slots as rows of all tables."""
    reads: Array
    """``[M, R, Dv]``"""


def visit(cfg: FwPKMConfig, memory: Memory, window: Tokens) -> tuple[Visit, Found]:
    """Read a window."""
    memories = ops.shape(memory.keys)[0]
    chosen = address(cfg, halves(cfg, window.query, memories), memory.keys)
    dead = ~(by_row(chosen.finite, window) & window.finite())
    place = table.rows_of(memory.values, chosen.slots)
    reads = table.read(memory.values, place, chosen.weights)
    weights = ops.stop_gradient(by_row(chosen.weights, window))
    seen = Visit(_nan(by_row(reads, window), dead), by_row(chosen.slots, window), _nan(weights, dead), dead)
    return seen, Found(chosen, window.without(dead), place, reads)


def visit_and_write(cfg: FwPKMConfig, memory: Memory, window: Tokens) -> tuple[Visit, Memory, Losses]:
    """Read a window and write its first C tokens; those after serve only as targets (§5)."""
    seen, found = visit(cfg, memory, window)
    mask = found.tokens.mask
    counted = mask & (ops.arange(mask.shape[1]) < cfg.chunk_size)
    pair = counted & ahead(mask, cfg.lookahead)
    return seen, *_write(cfg, memory, found, ahead(found.tokens.value, cfg.lookahead), counted, pair)


def write_chunk(cfg: FwPKMConfig, memory: Memory, chunk: Tokens, pair: Array | None) -> tuple[Memory, Losses]:
    """Write a chunk whose values are its own targets, already shifted; those that are not finite make no pair."""
    finite_target = finite_rows(chunk.value)
    _, found = visit(cfg, memory, chunk._replace(value=blank(chunk.value, ~finite_target)))
    mask = found.tokens.mask
    has_target = finite_target if pair is None else finite_target & pair
    return _write(cfg, memory, found, found.tokens.value, mask, mask & has_target)


def _write(
    cfg: FwPKMConfig, memory: Memory, found: Found, target: Array, counted: Array, pair: Array
) -> tuple[Memory, Losses]:
    """Write the counted tokens ``[B, n]``, those with a pair pulling towards their targets (§4)."""
    memories = ops.shape(memory.keys)[0]
    target, counted, pair, gate = (by_memory(x, memories) for x in (target, counted, pair, found.tokens.gate))
    active, chosen = ops.any(pair, axis=1), found.chosen
    # Without a pair nothing pulls, not even where the token's own error would overflow.
    error = blank(found.reads - target, ~pair)
    squared = ops.sum(ops.square(error), axis=-1)
    memorization = ops.sum(blank(0.5 * gate * squared, ~pair), axis=1)
    strength = blank(_write_scale(cfg, chosen.weights) * gate, ~pair)
    pull = strength[..., None] * chosen.weights
    values = table.write(cfg, memory.values, found.place, pull, error, pair, counted, active)
    keys, addressing = write_keys(cfg, memory.keys, chosen, counted, active)
    return Memory(keys, values), Losses(*map(ops.stop_gradient, (memorization, addressing)))


def _write_scale(cfg: FwPKMConfig, weights: Array) -> Array | float:
    """κ of each token (§4)."""
    if cfg.write_scale == "slots":
        return float(cfg.slots_per_token)
    return 1.0 if cfg.write_scale == "unit" else 1 / ops.sum(ops.square(weights), axis=-1)


def _nan(x: Array, dead: Array) -> Array:
    return ops.where(dead[..., None], ops.cast(float("nan"), x.dtype), x)
