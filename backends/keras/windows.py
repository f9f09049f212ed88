"""Windows: which tokens read the same tables, and the chunk that is written after them (SPEC.md §3 to §5).

The stream is the state's pending tokens and then a call's T new ones. Window w of a call holds the stream's tokens
from w·C on, and once there are C + lag of them its first C are written (schedule.py).
"""

from typing import Any, NamedTuple

from keras import ops

from fwpkm import schedule
from fwpkm.backends.keras.addressing import Selection, select_slots, write_keys
from fwpkm.backends.keras.tokens import (
    NAME,
    ChunkFlags,
    ahead,
    blank,
    by_memory,
    by_row,
    filled,
    finite,
    finite_rows,
    halves,
    join,
    outer,
    take,
    without,
)
from fwpkm.backends.keras.values import memorization_loss, read, rows_of, write_values
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Losses, Memory, State
from fwpkm.rules import write_scale
from fwpkm.tokens import Array, Tokens
from fwpkm.validation import Implementation

SELF = Implementation.of(
    NAME,
    object,  # the type of its arrays is known once tensorflow is loaded: ops.py
    """
    key_dim value_dim num_heads num_subkeys top_k chunk_size lookahead boundary score score_eps temperature
    learning_rate write_scale weight_decay grad_clip addressing_weight memory_scope query value gate mask
    """,
)
"""The fields of a configuration and of a token that this backend computes with."""


class Windows(NamedTuple):
    """How a call's T new tokens fall into windows."""

    num_pending: Array
    """int32 scalar: the stream's tokens before the first new one."""
    writes: Array
    """int32 scalar: windows that end in a write; one more follows them."""
    stream_index: Array
    """``[T]`` where each new token stands in the stream."""

    def first_reads(self, cfg: FwPKMConfig, window: Array) -> tuple[Array, Array]:
        """Where in a window each new token stands ``[T]``, and whether it is read there first, not reread."""
        index, lag = self.stream_index - window * cfg.chunk_size, schedule.lag(cfg)
        return index, (index >= ops.where(window > 0, lag, 0)) & (index < cfg.chunk_size + lag)


class Reads(NamedTuple):
    """What n tokens read."""

    output: Array
    """``[B, n, Dv]``, NaN for dead tokens."""
    slots: Array
    """``[B, n, H*k]``"""
    weights: Array
    """``[B, n, H*k]``, a record without gradient, NaN for dead tokens."""
    dead: Array
    """``[B, n]`` bool: some input or selected score is not finite."""


class Selected(NamedTuple):
    """What a write needs to know about a window that was read."""

    selection: Selection
    tokens: Tokens
    """the window's tokens, the dead ones blanked."""
    row_index: Array
    """``[M, R, H*k]`` the slots as rows of all tables."""
    reads: Array
    """``[M, R, Dv]``"""


def windows(cfg: FwPKMConfig, position: Array, length: int | Array) -> Windows:
    """The windows into which ``length`` tokens fall that begin at ``position`` (§5)."""
    num_pending = schedule.pending(cfg, position)
    writes = schedule.written(cfg, position + length) - schedule.written(cfg, position)
    return Windows(num_pending, writes, num_pending + ops.arange(length, dtype="int32"))


def pairs(cfg: FwPKMConfig, counted: Array, live: Array) -> Array:
    """Which counted tokens of a window ``[B, n]`` have a pair: their partner, L tokens later, is live (§3)."""
    return counted & ahead(live, cfg.lookahead)


def select_window(cfg: FwPKMConfig, memory: Memory, window: Tokens) -> tuple[Reads, Selected]:
    """What a window's tokens read, and what a write of them needs."""
    memories = ops.shape(memory.keys)[0]
    selection = select_slots(cfg, halves(cfg, window.query, memories), memory.keys)
    dead = ~(by_row(selection.finite, window) & finite(window))
    row_index = rows_of(memory.values, selection.slots)
    output = read(memory.values, row_index, selection.weights)
    weights = ops.stop_gradient(by_row(selection.weights, window))
    reads = Reads(_nan(by_row(output, window), dead), by_row(selection.slots, window), _nan(weights, dead), dead)
    return reads, Selected(selection, without(window, dead), row_index, output)


def write_window(cfg: FwPKMConfig, memory: Memory, window: Tokens) -> tuple[Reads, Memory, Losses]:
    """Read a window and write its first C tokens; those after serve only as targets (§5)."""
    reads, selected = select_window(cfg, memory, window)
    live = selected.tokens.mask
    counted = live & (ops.arange(live.shape[1]) < cfg.chunk_size)
    target = ahead(selected.tokens.value, cfg.lookahead)
    return reads, *_write(cfg, memory, selected, target, counted, pairs(cfg, counted, live))


def write_chunk(cfg: FwPKMConfig, memory: Memory, chunk: Tokens, pair: Array | None) -> tuple[Memory, Losses]:
    """Write a chunk whose values are its own targets, already shifted; those that are not finite make no pair."""
    has_target = finite_rows(chunk.value)
    _, selected = select_window(cfg, memory, chunk._replace(value=blank(chunk.value, ~has_target)))
    counted = selected.tokens.mask
    has_target = has_target if pair is None else has_target & pair
    return _write(cfg, memory, selected, selected.tokens.value, counted, counted & has_target)


def read_stream(cfg: FwPKMConfig, state: State, tokens: Tokens) -> tuple[Reads, State, Losses, Array]:
    """Read T tokens, at least one where T is known, after the pending ones, and write the chunks that are due.

    Returns:
        what the tokens read, the next state, the losses ``[M, W]``, and the number of writes.
    """
    length, size, lag = ops.shape(tokens.mask)[1], cfg.chunk_size, schedule.lag(cfg)
    runs = windows(cfg, state.position[0], length)
    columns = schedule.max_writes(cfg, length)
    buffer = join(filled(tokens.query.dtype, state.pending), tokens)

    def stream(index: Array, dead: Array) -> Tokens:
        """Stream tokens at ``index`` [n], those of the new ones that were found ``dead`` [B, T] blanked."""
        new = ops.clip(index - runs.num_pending, 0, length - 1)
        old = index < runs.num_pending
        found = take(buffer, ops.where(old, index, cfg.capacity + new))
        return without(found, ops.take(dead, new, axis=1) & ~old)

    def due(window: Array, *_: Any) -> Array:
        return window < runs.writes

    def read_one(window: Array, memory: Memory, reads: Reads, losses: Losses) -> tuple:
        read_here = stream(window * size + ops.arange(size + lag, dtype="int32"), reads.dead)
        here, memory, written = write_window(cfg, memory, read_here)
        column = ops.arange(columns, dtype="int32") == window
        losses = Losses(*(ops.where(column, x[:, None], all_) for x, all_ in zip(written, losses)))
        return window + 1, memory, _merge(reads, here, *runs.first_reads(cfg, window)), losses

    start = (ops.zeros((), "int32"), state.memory, nothing_read(cfg, tokens), no_losses(state.memory, columns))
    _, memory, reads, losses = ops.while_loop(due, read_one, start, maximum_iterations=columns)

    tail = ops.minimum(length, size + lag)  # more cannot follow the last write
    start_of_tail = length - tail
    here, _ = select_window(cfg, memory, take(tokens, start_of_tail + ops.arange(tail, dtype="int32")))
    _, first = runs.first_reads(cfg, runs.writes)
    reads = _merge(reads, here, runs.stream_index - runs.num_pending - start_of_tail, first)
    rest = runs.writes * size + ops.arange(cfg.capacity, dtype="int32")
    pending = without(stream(rest, reads.dead), (rest >= runs.num_pending + length)[None])
    return reads, State.of(memory, pending, state.position + length), losses, runs.writes


def _merge(reads: Reads, here: Reads, index: Array, first: Array) -> Reads:
    """What T tokens have read, those that a window reads ``first`` [T] with what it holds for them at ``index`` [T]."""
    index = ops.clip(index, 0, ops.shape(here.dead)[1] - 1)
    return Reads(*(ops.where(outer(first, x[0]), ops.take(y, index, axis=1), x) for x, y in zip(reads, here)))


def nothing_read(cfg: FwPKMConfig, tokens: Tokens) -> Reads:
    """Zeros in the shapes of what the tokens read."""
    weights = ops.zeros_like(tokens.gate)[..., None] + ops.zeros((cfg.slots_per_token,), tokens.gate.dtype)
    return Reads(ops.zeros_like(tokens.value), ops.cast(weights, "int32"), weights, ops.zeros_like(tokens.mask))


def no_losses(memory: Memory, columns: int | Array) -> Losses:
    """``[M, columns]`` zeros: losses yet to come."""
    zeros = ops.zeros((ops.shape(memory.keys)[0], columns), memory.keys.dtype)
    return Losses(zeros, zeros)


def _write(
    cfg: FwPKMConfig, memory: Memory, selected: Selected, target: Array, counted: Array, pair: Array
) -> tuple[Memory, Losses]:
    """Write the counted tokens ``[B, n]``, those with a pair moving their slots towards their targets (§4)."""
    memories, weights = ops.shape(memory.keys)[0], selected.selection.weights
    target, counted, pair, gate = (by_memory(x, memories) for x in (target, counted, pair, selected.tokens.gate))
    # Without a pair nothing moves, not even where the token's own error would overflow.
    error, flags = blank(selected.reads - target, ~pair), ChunkFlags(counted, pair)
    coefficient = blank(write_scale(ops, cfg, weights) * gate, ~pair)[..., None] * weights
    values = write_values(cfg, memory.values, selected.row_index, coefficient, error, flags)
    keys, addressing = write_keys(cfg, memory.keys, selected.selection, flags)
    losses = Losses(memorization_loss(error, gate, pair), addressing)
    return Memory(keys, values), Losses(*map(ops.stop_gradient, losses))


def _nan(x: Array, dead: Array) -> Array:
    return ops.where(dead[..., None], ops.cast(float("nan"), x.dtype), x)
