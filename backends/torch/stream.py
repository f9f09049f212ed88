"""Windows: runs of tokens that read the same tables, and the chunk that is written after them (SPEC.md §3 to §5).

The keys do not depend on the values. So windows are visited one after the other to find what each token picks, moving
the keys under autograd; then ``settle`` reads and writes the value table for all of them at once (table.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.backends.torch.addressing import Address, address, write_keys
from fwpkm.backends.torch.entries import finite_rows
from fwpkm.backends.torch.table import Window, read_and_write
from fwpkm.backends.torch.tokens import ahead, by_memory, finite, halves, without
from fwpkm.config import FwPKMConfig
from fwpkm.tokens import Tokens


class Visit(NamedTuple):
    """What the n tokens of one window picked, and what they will write."""

    slots: Tensor
    """``[B, n, H*k]``"""
    weights: Tensor
    """``[B, n, H*k]``"""
    tokens: Tokens
    """the window's tokens, the dead ones blanked."""
    dead: Tensor
    """``[B, n]`` bool: some input or selected score is not finite."""
    target: Tensor
    """``[B, n, Dv]``: u of the tokens with a pair, else 0."""
    pair: Tensor
    """``[B, n]`` bool"""
    counted: Tensor
    """``[B, n]`` bool: the unmasked tokens of the chunk."""
    active: Tensor
    """``[M]`` bool: the memories in which the chunk has a pair."""
    addressing: Tensor | None
    """``[M]`` loss, None where nothing is written."""


def visit(cfg: FwPKMConfig, keys: Tensor, window: Tokens) -> Visit:
    """Find what a window's tokens read; nothing is written after it."""
    _, slots, weights, window, dead = _look(cfg, keys, window)
    never = torch.zeros_like(dead)
    target = torch.zeros_like(window.value)
    active = never.new_zeros(keys.shape[0])
    return Visit(slots, weights, window, dead, target, never, never, active, None)


def visit_and_write(cfg: FwPKMConfig, keys: Tensor, window: Tokens) -> tuple[Visit, Tensor]:
    """Find what a window's tokens read, and write its first C tokens; those after serve only as targets (§5)."""
    chosen, slots, weights, window, dead = _look(cfg, keys, window)
    counted = window.mask & (torch.arange(window.length, device=dead.device) < cfg.chunk_size)
    pair = counted & ahead(window.mask, cfg.lookahead)
    target = ahead(window.value, cfg.lookahead)
    return _write(cfg, keys, chosen, Visit(slots, weights, window, dead, target, pair, counted, pair, None))


def visit_chunk(cfg: FwPKMConfig, keys: Tensor, chunk: Tokens, pair: Tensor | None) -> tuple[Visit, Tensor]:
    """Write a chunk whose values are its own targets, already shifted; those that are not finite make no pair."""
    finite_target = finite_rows(chunk.value.flatten(0, 1)).view_as(chunk.mask)
    chunk = chunk._replace(value=chunk.value.masked_fill(~finite_target[..., None], 0))
    chosen, slots, weights, chunk, dead = _look(cfg, keys, chunk)
    pair = chunk.mask & finite_target & (True if pair is None else pair)
    return _write(cfg, keys, chosen, Visit(slots, weights, chunk, dead, chunk.value, pair, chunk.mask, pair, None))


def settle(
    cfg: FwPKMConfig, values: Tensor, visits: list[Visit], owned: bool
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Read every window, writing the chunks between them.

    Args:
        cfg: the configuration.
        values: ``[M, N, Dv]``.
        visits: the windows in order.
        owned: the table may be overwritten.

    Returns:
        reads ``[B, n, Dv]`` of each window, the table afterwards, and the memorization loss ``[M]`` of each write.
    """
    windows, start = [], 0
    for v in visits:
        windows.append(Window(start, start + v.tokens.length, v.addressing is not None))
        start += v.tokens.length
    strength = [torch.where(v.pair, _write_scale(cfg, v.weights) * v.tokens.gate, 0) for v in visits]
    slots, weights, target, counted = (
        torch.cat(parts, dim=1) for parts in zip(*((v.slots, v.weights, v.target, v.counted) for v in visits))
    )
    active = torch.stack([v.active for v in visits])
    reads, values, squared = read_and_write(
        cfg, values, windows, slots, weights, torch.cat(strength, dim=1), target, counted, active, owned
    )
    losses = []
    for v, (begin, end, writes) in zip(visits, windows):
        if writes:
            share = torch.where(v.pair, 0.5 * v.tokens.gate.detach() * squared[:, begin:end], 0)
            losses.append(by_memory(share, values.shape[0]).sum(1))
    return [reads[:, window.start : window.stop] for window in windows], values, losses


def _look(cfg: FwPKMConfig, keys: Tensor, window: Tokens) -> tuple[Address, Tensor, Tensor, Tokens, Tensor]:
    chosen = address(cfg, halves(cfg, window.query, keys.shape[0]), keys)
    shape = window.mask.shape
    dead = ~(chosen.finite.view(shape) & finite(window))
    return chosen, chosen.slots.view(*shape, -1), chosen.weights.view(*shape, -1), without(window, dead), dead


def _write(cfg: FwPKMConfig, keys: Tensor, chosen: Address, v: Visit) -> tuple[Visit, Tensor]:
    memories = keys.shape[0]
    active = by_memory(v.pair, memories).any(1)
    keys, loss = write_keys(cfg, keys, chosen, by_memory(v.counted, memories), active)
    target = v.target.masked_fill(~v.pair[..., None], 0)
    return v._replace(target=target, active=active, addressing=loss.detach()), keys


def _write_scale(cfg: FwPKMConfig, weights: Tensor) -> Tensor | float:
    """κ of each token (§4)."""
    if cfg.write_scale == "slots":
        return float(cfg.slots_per_token)
    return 1.0 if cfg.write_scale == "unit" else 1 / weights.square().sum(-1)
