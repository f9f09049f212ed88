"""Windows: which tokens read the same tables, and the chunk that is written after them (SPEC.md §3 to §5).

Window w of a call holds the tokens from w·C on of every row's stream (streams.py). In a row that has C + lag of them
the first C are written (schedule.py); others only read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from fwpkm import schedule
from fwpkm.backends.keras.addressing import Selection, select_slots, write_keys
from fwpkm.backends.keras.streams import Streams
from fwpkm.backends.keras.tokens import (
    NAME,
    ChunkFlags,
    ahead,
    blank,
    by_memory,
    by_row,
    finite,
    finite_rows,
    halves,
    nan_where,
    without,
)
from fwpkm.backends.keras.values import memorization_loss, read, rows_of, write_values
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Losses, Memory
from fwpkm.rules import write_scale
from fwpkm.tokens import Array, Tokens
from fwpkm.validation import Implementation

SELF = Implementation.of(
    NAME,
    object,  # the type of its arrays is known once tensorflow is loaded: ops.py
    """
    key_dim value_dim num_heads num_subkeys top_k chunk_size lookahead boundary score score_eps temperature
    learning_rate write_scale weight_decay grad_clip addressing_weight memory_scope usage_weight query value gate mask
    """,
)
"""The fields of a configuration and of a token that this backend computes with."""


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
    reads = Reads(
        nan_where(dead, by_row(output, window)), by_row(selection.slots, window), nan_where(dead, weights), dead
    )
    return reads, Selected(selection, without(window, dead), row_index, output)


def write_window(
    cfg: FwPKMConfig, memory: Memory, uses: Array | None, window: Tokens, may_write: Array
) -> tuple[Reads, Memory, Array | None, Losses]:
    """Read a window and write its first C tokens in rows that ``may_write`` [B]; those after serve only as targets."""
    reads, selected = select_window(cfg, memory, window)
    live = selected.tokens.mask
    counted = live & (ops.arange(live.shape[1]) < cfg.chunk_size)
    target = ahead(selected.tokens.value, cfg.lookahead)
    pair = pairs(cfg, counted, live) & may_write[:, None]
    return reads, *_write(cfg, memory, uses, selected, target, counted, pair)


def write_chunk(cfg: FwPKMConfig, memory: Memory, chunk: Tokens, pair: Array | None) -> tuple[Memory, Losses]:
    """Write a chunk whose values are its own targets, already shifted; those that are not finite make no pair."""
    has_target = finite_rows(chunk.value)
    _, selected = select_window(cfg, memory, chunk._replace(value=blank(chunk.value, ~has_target)))
    counted = selected.tokens.mask
    has_target = has_target if pair is None else has_target & pair
    memory, _, losses = _write(cfg, memory, None, selected, selected.tokens.value, counted, counted & has_target)
    return memory, losses


def windows(
    cfg: FwPKMConfig, memory: Memory, uses: Array | None, streams: Streams, tokens: Tokens
) -> tuple[Reads, Memory, Array | None, Losses]:
    """Read the tokens of a call and write the chunks that are due (§5).

    Returns:
        what the tokens read ``[n, ...]``, the tables and their uses afterwards, and the losses ``[M, W]``.
    """
    length, size, lag = ops.shape(tokens.mask)[1], cfg.chunk_size, schedule.lag(cfg)
    columns, last = schedule.max_writes(cfg, length), ops.max(streams.due)

    def due(window: Array, *_: Any) -> Array:
        return window < last

    def read_one(window: Array, memory: Memory, uses: Array | None, reads: Reads, losses: Losses) -> tuple:
        start = ops.zeros_like(streams.due) + window * size
        tokens = streams.tokens(streams.cells(start, size + lag), reads.dead)
        here, memory, uses, written = write_window(cfg, memory, uses, tokens, streams.due > window)
        first = (streams.index >= _read_before(cfg, window)) & (streams.index < (window + 1) * size + lag)
        column = ops.arange(columns, dtype="int32") == window
        losses = Losses(*(ops.where(column, x[:, None], all_) for x, all_ in zip(written, losses)))
        return window + 1, memory, uses, _merge(streams, reads, here, start, first), losses

    start = (ops.zeros((), "int32"), memory, uses, nothing_read(cfg, tokens), no_losses(memory, columns))
    _, memory, uses, reads, losses = while_loop(due, read_one, start, columns)
    # What no write covers: of each row at most so many tokens, the last of its stream.
    tail = ops.minimum(length, size + lag)
    start_of_tail = ops.maximum(streams.num_pending, _read_before(cfg, last))
    here, _ = select_window(cfg, memory, streams.tokens(streams.cells(start_of_tail, tail), reads.dead))
    first = streams.index >= _read_before(cfg, last)
    return _merge(streams, reads, here, start_of_tail, first), memory, uses, losses


def read_only(cfg: FwPKMConfig, memory: Memory, streams: Streams, tokens: Tokens) -> Reads:
    """What the tokens of a call read ``[n, ...]`` of the memories of their streams, where nothing is written."""
    length, size = ops.shape(tokens.mask)[1], cfg.chunk_size
    longest = ops.max(streams.lengths)

    def is_left(window: Array, _: Any) -> Array:
        return window * size < longest

    def read_one(window: Array, reads: Reads) -> tuple:
        start = ops.zeros_like(streams.due) + window * size
        here, _ = select_window(cfg, memory, streams.tokens(streams.cells(start, size), reads.dead))
        first = (streams.index >= window * size) & (streams.index < (window + 1) * size)
        return window + 1, _merge(streams, reads, here, start, first)

    start = (ops.zeros((), "int32"), nothing_read(cfg, tokens))
    return ops.while_loop(is_left, read_one, start, maximum_iterations=-(-length // size))[1]


def _read_before(cfg: FwPKMConfig, window: Array) -> Array:
    """How many tokens of a stream were read before a window was."""
    return ops.where(window > 0, window * cfg.chunk_size + schedule.lag(cfg), 0)


def _merge(streams: Streams, reads: Reads, here: Reads, start: Array, first: Array) -> Reads:
    return Reads(*(streams.merge(x, y, start, first) for x, y in zip(reads, here)))


def nothing_read(cfg: FwPKMConfig, tokens: Tokens) -> Reads:
    """Zeros in the shapes of what the tokens read, ``[n, ...]`` of all rows."""
    gate, value, mask = (ops.reshape(x, (-1, *x.shape[2:])) for x in (tokens.gate, tokens.value, tokens.mask))
    weights = ops.zeros_like(gate)[..., None] + ops.zeros((cfg.slots_per_token,), gate.dtype)
    return Reads(ops.zeros_like(value), ops.cast(weights, "int32"), weights, ops.zeros_like(mask))


def no_losses(memory: Memory, columns: int | Array) -> Losses:
    """``[M, columns]`` zeros: losses yet to come."""
    zeros = ops.zeros((ops.shape(memory.keys)[0], columns), memory.keys.dtype)
    return Losses(zeros, zeros)


def while_loop(going: Callable, body: Callable, start: tuple, maximum_iterations: int | Array) -> tuple:
    """``ops.while_loop`` of variables some of which may be None, which tensorflow's may not be."""

    def present(variables: tuple) -> tuple:
        return tuple(x for x in variables if x is not None)

    def whole(variables: tuple) -> tuple:
        rest = iter(variables)
        return tuple(None if x is None else next(rest) for x in start)

    def next_variables(*variables: Any) -> tuple:
        return present(body(*whole(variables)))

    return whole(ops.while_loop(going, next_variables, present(start), maximum_iterations=maximum_iterations))


def _write(
    cfg: FwPKMConfig, memory: Memory, uses: Array | None, selected: Selected, target: Array, counted: Array, pair: Array
) -> tuple[Memory, Array | None, Losses]:
    """Write the counted tokens ``[B, n]``, those with a pair moving their slots towards their targets (§4)."""
    memories, weights = ops.shape(memory.keys)[0], selected.selection.weights
    target, counted, pair, gate = (by_memory(x, memories) for x in (target, counted, pair, selected.tokens.gate))
    # Without a pair nothing moves, not even where the token's own error would overflow.
    error, flags = blank(selected.reads - target, ~pair), ChunkFlags(counted, pair)
    coefficient = blank(write_scale(ops, cfg, weights) * gate, ~pair)[..., None] * weights
    values, uses = write_values(cfg, memory.values, uses, selected.row_index, coefficient, error, flags)
    keys, addressing = write_keys(cfg, memory.keys, selected.selection, flags)
    losses = Losses(memorization_loss(error, gate, pair), addressing)
    return Memory(keys, values), uses, Losses(*map(ops.stop_gradient, losses))
