"""Windows: runs of tokens that read the same tables, and the chunk that is written after them (SPEC.md §3 to §5).

The keys do not depend on the values. So ``windows`` walks a call's windows to find what each token selects, moving the
keys under autograd; then ``apply_values`` reads and writes the value table for all of them at once (values.py).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fwpkm import schedule
from fwpkm.backends.torch.addressing import Selection, select_slots, write_keys
from fwpkm.backends.torch.tokens import NAME, ahead, by_memory, finite, finite_rows, halves, join, without
from fwpkm.backends.torch.values import read_and_write
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Losses, Memory, Trace
from fwpkm.rules import write_scale
from fwpkm.tokens import Array, Tokens
from fwpkm.validation import Implementation

SELF = Implementation.of(
    NAME,
    Tensor,
    """
    key_dim value_dim num_heads num_subkeys top_k chunk_size lookahead boundary score score_eps temperature
    learning_rate write_scale weight_decay grad_clip addressing_weight memory_scope query value gate mask
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
    first_new: int = 0
    """The tokens before it are read again, only to be written."""


def windows(
    cfg: FwPKMConfig, keys: Tensor, pending: Tokens, tokens: Tokens, runs: Iterable[schedule.Window]
) -> tuple[list[Window], Tensor, Tokens]:
    """Walk the windows of a call (§5): which tokens read one memory, and what is written after them.

    Args:
        cfg: the configuration.
        keys: as the call finds them.
        pending: tokens that were read before and that no write has consumed.
        tokens: those of the call.
        runs: the schedule of the call's tokens.

    Returns:
        the windows in order, the keys afterwards, and the tokens that are pending then.
    """
    walked = []
    for start, stop, writes in runs:
        part = tokens.slice(start, stop)
        if writes:  # the chunk's earlier tokens are read again, now to write them
            first_new = pending.length
            window, keys = write_window(cfg, keys, join(pending, part))
            pending = window.tokens.slice(cfg.chunk_size, None)
            walked.append(window._replace(first_new=first_new))
        else:
            window = select_window(cfg, keys, part)
            pending = join(pending, window.tokens)
            walked.append(window)
    return walked, keys, pending


def pairs(cfg: FwPKMConfig, counted: Tensor, live: Tensor) -> Tensor:
    """Which counted tokens of a window [B, n] have a pair: their partner, L tokens later, is live (§3)."""
    return counted & ahead(live, cfg.lookahead)


def select_window(cfg: FwPKMConfig, keys: Tensor, tokens: Tokens) -> Window:
    """What a window's tokens read; nothing is written after it."""
    _, window = _select(cfg, keys, tokens)
    never = torch.zeros_like(window.dead)
    target, active = torch.zeros_like(window.tokens.value), never.new_zeros(keys.shape[0])
    return window._replace(target=target, pair=never, counted=never, active=active)


def write_window(cfg: FwPKMConfig, keys: Tensor, tokens: Tokens) -> tuple[Window, Tensor]:
    """What a window's tokens read, and the keys after its first C are written; those after serve only as targets."""
    selection, window = _select(cfg, keys, tokens)
    live, value = window.tokens.mask, window.tokens.value
    counted = live & (torch.arange(tokens.length, device=live.device) < cfg.chunk_size)
    pair = pairs(cfg, counted, live)
    return _write(cfg, keys, selection, window, ahead(value, cfg.lookahead), pair, counted)


def write_chunk(cfg: FwPKMConfig, keys: Tensor, chunk: Tokens, pair: Tensor | None) -> tuple[Window, Tensor]:
    """Write a chunk whose values are its own targets, already shifted; those that are not finite make no pair."""
    finite_target = finite_rows(chunk.value.flatten(0, 1)).view_as(chunk.mask)
    chunk = chunk._replace(value=chunk.value.masked_fill(~finite_target[..., None], 0))
    selection, window = _select(cfg, keys, chunk)
    live = window.tokens.mask
    pair = live & finite_target & (True if pair is None else pair)
    return _write(cfg, keys, selection, window, window.tokens.value, pair, live)


def apply_values(
    cfg: FwPKMConfig, values: Tensor, walked: list[Window], owned: bool
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Read the values of every window, writing the chunks between them.

    Args:
        cfg: the configuration.
        values: ``[M, N, Dv]``.
        walked: the windows in order.
        owned: the table may be overwritten.

    Returns:
        reads ``[B, n, Dv]`` of each window, the table afterwards, and the memorization loss ``[M]`` of each write.
    """
    spans, start = [], 0
    for w in walked:
        spans.append(schedule.Window(start, start + w.tokens.length, w.addressing is not None))
        start += w.tokens.length
    strength = [torch.where(w.pair, write_scale(torch, cfg, w.weights) * w.tokens.gate, 0) for w in walked]
    slots, weights, target, counted = (
        torch.cat(of_all, dim=1) for of_all in zip(*((w.slots, w.weights, w.target, w.counted) for w in walked))
    )
    active = torch.stack([w.active for w in walked])
    reads, values, squared = read_and_write(
        cfg, values, spans, slots, weights, torch.cat(strength, dim=1), target, counted, active, owned
    )
    losses = [
        memorization_loss(squared[:, span.start : span.stop], w.tokens.gate, w.pair, values.shape[0])
        for w, span in zip(walked, spans)
        if span.writes
    ]
    return [reads[:, span.start : span.stop] for span in spans], values, losses


def memorization_loss(squared: Tensor, gate: Tensor, pair: Tensor, memories: int) -> Tensor:
    """L_mem = Σ over tokens with a pair of ½ g ‖u - v̂‖² (§3) ``[M]``; arguments ``[B, n]``. No gradient."""
    return by_memory(torch.where(pair, 0.5 * gate.detach() * squared, 0), memories).sum(1)


def new_tokens(arrays: list[Tensor], walked: list[Window]) -> Tensor:
    """Arrays of the windows ``[B, n, ...]`` end to end, without the tokens that are read again."""
    return torch.cat([x[:, w.first_new :] for x, w in zip(arrays, walked)], dim=1)


def trace_of(
    cfg: FwPKMConfig, memory: Memory, tokens: Tokens, walked: list[Window], losses: list[Tensor], columns: int
) -> Trace:
    """The record of a call: memorization ``losses`` in so many columns."""
    empty = tokens.mask.new_zeros(tokens.mask.shape[0], 0, cfg.slots_per_token)
    slots, weights = empty.long(), empty.to(memory.keys.dtype)
    if walked:
        slots = new_tokens([w.slots for w in walked], walked)
        weights = new_tokens([w.weights.detach().masked_fill(w.dead[..., None], torch.nan) for w in walked], walked)
    none = memory.keys.new_zeros(memory.keys.shape[0], 0)
    both = losses, [w.addressing for w in walked if w.addressing is not None]
    tables = (torch.cat([none, *(x[:, None] for x in each)], dim=1) for each in both)
    padded = Losses(*(F.pad(x, (0, columns - x.shape[1])).detach() for x in tables))
    return Trace(slots, weights, *padded, writes=torch.tensor(len(losses)))


def _select(cfg: FwPKMConfig, keys: Tensor, tokens: Tokens) -> tuple[Selection, Window]:
    """What tokens select; of the window, what it reads."""
    selection, shape = select_slots(cfg, halves(cfg, tokens.query, keys.shape[0]), keys), tokens.mask.shape
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
