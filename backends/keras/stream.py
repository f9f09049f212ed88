"""Windows: runs of tokens that read the same tables, and the chunk that is written after them (SPEC.md §3 to §5).

Stream tokens are the state's p pending ones and then the T new ones. Chunk w of a call covers the stream from w·C on;
it is written once C + lag tokens from there have arrived (schedule.py).
"""

from typing import Any, NamedTuple

from keras import ops

from fwpkm import schedule
from fwpkm.backends.keras import table
from fwpkm.backends.keras.addressing import Address, address, write_keys
from fwpkm.backends.keras.tokens import Tokens, ahead, blank, by_memory, by_row, finite_rows, halves, outer
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


def read_stream(
    cfg: FwPKMConfig, memory: Memory, pending: Tokens, position: Array, tokens: Tokens
) -> tuple[Visit, Memory, Tokens, Losses, Array]:
    """Read T tokens, at least one where T is known, after the pending ones, and write the chunks that are due.

    Returns:
        what the tokens read, the tables, the tokens pending now, the losses ``[M, W]``, and the number of writes.
    """
    length, size, lag = ops.shape(tokens.mask)[1], cfg.chunk_size, schedule.lag(cfg)
    before, room = schedule.pending(cfg, position), cfg.capacity
    writes = schedule.written(cfg, position + length) - schedule.written(cfg, position)
    columns = schedule.max_writes(cfg, length)
    buffer = Tokens.of(tokens.query.dtype, *pending).join(tokens)
    new = ops.arange(length, dtype="int32")

    def stream(index: Array, dead: Array) -> Tokens:
        """Stream tokens at ``index`` [n], those that were found ``dead`` [B, T] blanked."""
        at = ops.clip(index - before, 0, length - 1)
        old = index < before
        return buffer.take(ops.where(old, index, room + at)).without(ops.take(dead, at, axis=1) & ~old)

    def due(chunk: Array, *_: Any) -> Array:
        return chunk < writes

    def step(chunk: Array, memory: Memory, seen: Visit, losses: Losses) -> tuple:
        window = stream(chunk * size + ops.arange(size + lag, dtype="int32"), seen.dead)
        part, memory, lost = visit_and_write(cfg, memory, window)
        at = before + new - chunk * size
        fresh = (at >= ops.where(chunk > 0, lag, 0)) & (at < size + lag)
        here = ops.arange(columns, dtype="int32") == chunk
        losses = Losses(*(ops.where(here, x[:, None], all_) for x, all_ in zip(lost, losses)))
        return chunk + 1, memory, _merge(seen, part, at, fresh), losses

    start = (ops.zeros((), "int32"), memory, nothing_seen(cfg, tokens), no_losses(memory, columns))
    _, memory, seen, losses = ops.while_loop(due, step, start, maximum_iterations=columns)

    tail = ops.minimum(length, size + lag)  # more cannot follow the last write
    first = length - tail
    part, _ = visit(cfg, memory, tokens.take(first + ops.arange(tail, dtype="int32")))
    late = (before + new >= writes * size + lag) | (writes == 0)
    seen = _merge(seen, part, new - first, late)
    rest = writes * size + ops.arange(room, dtype="int32")
    waiting = stream(rest, seen.dead)
    waiting = waiting.without(ops.zeros_like(waiting.mask) | (rest >= before + length))
    return seen, memory, waiting, losses, writes


def _merge(seen: Visit, part: Visit, at: Array, fresh: Array) -> Visit:
    """What T tokens have read, with the ``fresh`` ones [T] taken from places ``at`` [T] of a part."""
    at = ops.clip(at, 0, ops.shape(part.dead)[1] - 1)
    return Visit(*(ops.where(outer(fresh, x[0]), ops.take(y, at, axis=1), x) for x, y in zip(seen, part)))


def nothing_seen(cfg: FwPKMConfig, tokens: Tokens) -> Visit:
    """Zeros in the shapes of what the tokens read."""
    weights = ops.zeros_like(tokens.gate)[..., None] + ops.zeros((cfg.slots_per_token,), tokens.gate.dtype)
    return Visit(ops.zeros_like(tokens.value), ops.cast(weights, "int32"), weights, ops.zeros_like(tokens.mask))


def no_losses(memory: Memory, columns: int | Array) -> Losses:
    """``[M, columns]`` zeros: losses yet to come."""
    zeros = ops.zeros((ops.shape(memory.keys)[0], columns), memory.keys.dtype)
    return Losses(zeros, zeros)


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
