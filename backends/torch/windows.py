"""Windows: runs of tokens that read the same tables, and the chunk that is written after them (SPEC.md §3 to §5).

The keys do not depend on the values. So ``windows`` walks a call's windows to find what each token selects, moving the
keys under autograd; then ``apply_values`` reads and writes the value table for all of them at once (values.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm import schedule
from fwpkm.backends.torch.addressing import Selection, recent_after, select_slots, write_keys
from fwpkm.backends.torch.column_parallel import Columns
from fwpkm.backends.torch.streams import Streams
from fwpkm.backends.torch.tokens import NAME, ahead, by_memory, finite, finite_rows, halves, maybe_any, without
from fwpkm.backends.torch.values import read_and_write
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, Trace
from fwpkm.rules import write_scale
from fwpkm.tokens import Array, Tokens
from fwpkm.validation import Implementation

SELF = Implementation.of(
    NAME,
    Tensor,
    """
    key_dim value_dim num_heads num_subkeys top_k chunk_size lookahead boundary score score_eps temperature
    learning_rate write_scale weight_decay grad_clip addressing_weight memory_scope usage_weight initial_decay
    recent_penalty query value gate mask forget
    """,
)
"""The fields of a configuration and of a token that this backend computes with."""


class Window(NamedTuple):
    """What the n tokens of one window select, and what they write."""

    slots: Tensor
    """``[B, n, H*k]``"""
    weights: Tensor
    """``[B, n, H*k]``"""
    tokens: Tokens
    """the window's tokens, the dead ones blanked."""
    dead: Tensor
    """``[B, n]`` bool: an input or a selected score is not finite."""
    target: Array = None
    """``[B, n, Dv]``: u of the tokens with a pair, else 0."""
    pair: Array = None
    """``[B, n]`` bool"""
    counted: Array = None
    """``[B, n]`` bool: the unmasked tokens of the chunk."""
    active: Array = None
    """``[M]`` bool: the memories in which the chunk has a pair."""
    addressing: Array = None
    """``[M]`` loss, None where nothing is written."""
    rows: Array = None
    """``[r]`` ids of the rows; None is all."""
    recent: Array = None
    """``[M, H, 2, S]``: V after what is written; None where sub-keys used lately lose nothing."""


def windows(
    cfg: FwPKMConfig, keys: Tensor, streams: Streams, recent: Tensor | None = None
) -> tuple[list[Window], Tensor, Tensor | None]:
    """Walk the windows of a call (§5): which tokens read one memory, and what is written after them.

    Returns:
        the windows in order, the keys afterwards, and V ``[M, H, 2, S]``, where ``recent`` is V before.
    """
    walked = []
    for part in streams:
        if part.writes:
            window, keys = write_part(cfg, keys, part.tokens, part.rows, recent)
            recent = window.recent
        else:
            own, lately = keys, recent
            if part.rows is not None:
                own = keys.index_select(0, part.rows)
                lately = None if recent is None else recent.index_select(0, part.rows)
            window = select_window(cfg, own, part.tokens, lately)._replace(rows=part.rows)
        streams.note(part, window.tokens, window.dead)
        walked.append(window)
    return walked, keys, recent


def write_part(
    cfg: FwPKMConfig, keys: Tensor, tokens: Tokens, rows: Tensor | None, recent: Tensor | None = None
) -> tuple[Window, Tensor]:
    """``write_window`` of some rows ``[r]``, or of all, and the keys (and V) of all rows afterwards."""
    if rows is None:
        return write_window(cfg, keys, tokens, recent)
    lately = None if recent is None else recent.index_select(0, rows)
    window, own = write_window(cfg, keys.index_select(0, rows), tokens, lately)
    if recent is not None:
        window = window._replace(recent=recent.index_copy(0, rows, window.recent))
    return window._replace(rows=rows), keys.index_copy(0, rows, own)


def pairs(cfg: FwPKMConfig, counted: Tensor, live: Tensor) -> Tensor:
    """Which counted tokens of a window [B, n] have a pair: their partner, L tokens later, is live (§3)."""
    return counted & ahead(live, cfg.lookahead)


def select_window(cfg: FwPKMConfig, keys: Tensor, tokens: Tokens, recent: Tensor | None = None) -> Window:
    """What a window's tokens read; nothing is written after it."""
    _, window = _select(cfg, keys, tokens, recent)
    never = torch.zeros_like(window.dead)
    target, active = torch.zeros_like(window.tokens.value), never.new_zeros(keys.shape[0])
    return window._replace(target=target, pair=never, counted=never, active=active)


def write_window(cfg: FwPKMConfig, keys: Tensor, tokens: Tokens, recent: Tensor | None = None) -> tuple[Window, Tensor]:
    """What a window's tokens read, and the keys after its first C are written; those after serve only as targets."""
    selection, window = _select(cfg, keys, tokens, recent)
    live, value = window.tokens.mask, window.tokens.value
    counted = live & (torch.arange(tokens.length, device=live.device) < cfg.chunk_size)
    pair = pairs(cfg, counted, live)
    window, after = _write(cfg, keys, selection, window, ahead(value, cfg.lookahead), pair, counted)
    if recent is not None:
        lately = recent_after(recent, selection, by_memory(counted, keys.shape[0]), window.active)
        window = window._replace(recent=lately)
    return window, after


def write_chunk(cfg: FwPKMConfig, keys: Tensor, chunk: Tokens, pair: Tensor | None) -> tuple[Window, Tensor]:
    """Write a chunk whose values are its own targets, already shifted; those that are not finite make no pair."""
    finite_target = finite_rows(chunk.value.flatten(0, 1)).view_as(chunk.mask)
    chunk = chunk._replace(value=chunk.value.masked_fill(~finite_target[..., None], 0))
    selection, window = _select(cfg, keys, chunk)
    live = window.tokens.mask
    pair = live & finite_target & (True if pair is None else pair)
    return _write(cfg, keys, selection, window, window.tokens.value, pair, live)


def apply_values(
    cfg: FwPKMConfig,
    values: Tensor,
    walked: list[Window],
    owned: bool,
    uses: Tensor | None = None,
    initial_values: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Read the values of every window, writing the chunks between them.

    Args:
        cfg: the configuration.
        values: ``[M, N, Dv]``, whole or in columns.
        walked: the windows in order.
        owned: the table may be overwritten.
        uses: ``[M, N]``, contiguous, overwritten where a window writes; or None.
        initial_values: ``[1, N, Dv]`` that rows decay to, or None.

    Returns:
        reads ``[r, n, Dv]`` of each window, the table afterwards, and the memorization loss ``[M]`` of each write.
    """
    memories, num_slots, width = values.shape
    first_row = num_slots * torch.arange(memories, device=values.device)
    columns = Columns.of(values)
    own = table = values if columns is None else columns.table
    if own.stride(0) == 0 and not any(w.addressing is not None for w in walked):  # rows that share it read it there
        table, first_row = own[:1], torch.zeros_like(first_row)
    spans, shapes, entries, active, start = [], [], [], [], 0
    for w in walked:
        shape = w.dead.shape
        spans.append(schedule.Window(start, start + shape.numel(), w.addressing is not None))
        start = spans[-1].stop
        shapes.append(shape)
        first = first_row.expand(shape[0]) if w.rows is None else first_row[w.rows]
        strength = torch.where(w.pair, write_scale(torch, cfg, w.weights) * w.tokens.gate, 0)
        forget = torch.where(w.counted, w.tokens.forget, 0)
        entries.append((w.slots + first[:, None, None], w.weights, strength, w.target, w.counted, forget))
        active.append(w.active if w.rows is None else w.active.new_zeros(memories).index_copy(0, w.rows, w.active))
    slots, weights, strength, target, counted, forget = (
        torch.cat([x.flatten(0, 1) for x in of_all]) for of_all in zip(*entries)
    )
    forgets = forget.requires_grad or maybe_any(forget != 0)
    if columns is not None:
        if forgets:
            raise ValueError("forget must be None where a table lies in columns. Received: numbers other than 0")
        slots, weights, strength, target = columns.enter(slots, weights, strength, target)
    reads, written, squared = read_and_write(
        cfg, table, spans, slots, weights, strength, target, forget if forgets else None, counted, torch.stack(active),
        uses, initial_values, owned, columns,
    )  # fmt: skip
    if columns is not None:
        reads, squared = columns.leave(reads, squared)
    losses = [
        memorization_loss(squared[span.start : span.stop].view(shape), w.tokens.gate, w.pair, len(w.active))
        for w, span, shape in zip(walked, spans, shapes)
        if span.writes
    ]
    parts = zip(spans, shapes)
    if any(span.writes for span in spans):
        values = written if columns is None else columns.after(written)
    return [reads[span.start : span.stop].view(*shape, width) for span, shape in parts], values, losses


def memorization_loss(squared: Tensor, gate: Tensor, pair: Tensor, memories: int) -> Tensor:
    """L_mem = Σ over tokens with a pair of ½ g ‖u - v̂‖² (§3) ``[M]``; arguments ``[B, n]``. No gradient."""
    return by_memory(torch.where(pair, 0.5 * gate.detach() * squared, 0), memories).sum(1)


def trace_of(
    cfg: FwPKMConfig, memory: Memory, streams: Streams, walked: list[Window], losses: list[Tensor], columns: int
) -> Trace:
    """The record of a call: memorization ``losses`` of its writes, each row's in so many columns."""
    writes = streams.writes(memory.keys.shape[0])
    slots = streams.of_call([w.slots for w in walked])
    weights = streams.of_call([w.weights.detach().masked_fill(w.dead[..., None], torch.nan) for w in walked])
    tables = memory.keys.new_zeros(2, memory.keys.shape[0], columns)
    written = [w for w in walked if w.addressing is not None]
    for column, (w, loss) in enumerate(zip(written, losses)):
        rows = slice(None) if w.rows is None else w.rows
        tables[0, rows, column], tables[1, rows, column] = loss.detach(), w.addressing.detach()
    return Trace(slots, weights, memorization=tables[0], addressing=tables[1], writes=writes)


def without_masked(output: Tensor, trace: Trace, mask: Tensor) -> tuple[Tensor, Trace]:
    """Zeros in place of what tokens read that are not there; mask [B, T]."""
    gone = ~mask[..., None]
    slots, weights = trace.slots.masked_fill(gone, 0), trace.weights.masked_fill(gone, 0)
    return output.masked_fill(gone, 0), trace._replace(slots=slots, weights=weights)


def empty_trace(cfg: FwPKMConfig, memory: Memory, shape: tuple[int, ...], columns: int) -> Trace:
    """The record of tokens [B, T] that read and wrote nothing."""
    entries = memory.keys.new_zeros(*shape, cfg.slots_per_token)
    nothing = memory.keys.new_zeros(memory.keys.shape[0], columns)
    writes = torch.zeros(memory.keys.shape[0], dtype=torch.int32)
    return Trace(entries.long(), entries, nothing, nothing.clone(), writes)


def _select(cfg: FwPKMConfig, keys: Tensor, tokens: Tokens, recent: Tensor | None = None) -> tuple[Selection, Window]:
    """What tokens select; of the window, what it reads."""
    selection, shape = select_slots(cfg, halves(cfg, tokens.query, keys.shape[0]), keys, recent), tokens.mask.shape
    dead = ~(selection.finite.view(shape) & finite(tokens))
    slots, weights = (x.view(*shape, -1) for x in (selection.slots, selection.weights))
    return selection, Window(slots, weights, without(tokens, dead), dead)


def _write(
    cfg: FwPKMConfig, keys: Tensor, selection: Selection, window: Window, target: Tensor, pair: Tensor, counted: Tensor
) -> tuple[Window, Tensor]:
    """The window with what it writes, and the keys after that."""
    active = by_memory(pair, keys.shape[0]).any(1)
    keys, loss = write_keys(cfg, keys, selection, by_memory(counted, keys.shape[0]), active)
    target = target.masked_fill(~pair[..., None], 0)
    return window._replace(target=target, pair=pair, counted=counted, active=active, addressing=loss), keys
