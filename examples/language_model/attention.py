"""Attention to a window of the last tokens, with rotary positions."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention to the last ``window`` tokens, with rotary positions."""

    def __init__(self, width: int, heads: int, window: int):
        """Draw the projections."""
        super().__init__()
        self.heads, self.window = heads, window
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.project_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, width]``, and keys and values before it ``[2, B, w, width]`` -> the same, T tokens later."""
        query, key, value = self.project_in(x).chunk(3, -1)
        key, value = (torch.cat([old.to(new.dtype), new], 1) for old, new in zip(past, (key, value)))
        kept = max(0, key.shape[1] - (self.window - 1))
        after = torch.stack([key[:, kept:], value[:, kept:]])
        turn = rotation(key.shape[1], key.shape[2] // self.heads, x.device)
        query, key, value = (z.unflatten(-1, (self.heads, -1)) for z in (query, key, value))
        query, key = rotate(query, turn, past.shape[2]), rotate(key, turn, 0)
        return self.project_out(banded(query, key, value.to(query.dtype), self.window).flatten(2)), after


def rotation(length: int, width: int, device: torch.device) -> Tensor:
    """cos and sin of the angles of ``length`` positions ``[2, length, width/2]``."""
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(length, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, turn: Tensor, start: int) -> Tensor:
    """Turn the pairs of ``[B, T, heads, d]`` by their positions, counted from ``start``."""
    cos, sin = turn[:, start : start + x.shape[1], None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def banded(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attention of ``[B, T, heads, d]`` to the last ``window`` of ``[B, w + T, heads, d]``.

    Whole windows of queries after the first are computed together, each against two windows of keys.
    """
    (batch, length), past = query.shape[:2], key.shape[1] - query.shape[1]
    first = min(length, window)
    together = (length - first) // window * window
    out = [_within(query[:, :first], key[:, : past + first], value[:, : past + first], window)]
    if together:
        # The queries from `first` on are blocks of `window`; block i sees key blocks i and i + 1.
        keys, values = (z[:, past + first - window : past + first + together] for z in (key, value))
        blocks = [_pairs(z.unflatten(1, (-1, window))).flatten(0, 1) for z in (keys, values)]
        queries = query[:, first : first + together].unflatten(1, (-1, window)).flatten(0, 1)
        out.append(_within(queries, *blocks, window).reshape(batch, together, *query.shape[2:]))
    if (start := first + together) < length:
        before = past + start - window
        out.append(_within(query[:, start:], key[:, before:], value[:, before:], window))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _pairs(blocks: Tensor) -> Tensor:
    """Each block with the one before it: ``[B, n + 1, w, ...]`` -> ``[B, n, 2w, ...]``."""
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], 2)


def _within(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """The last queries' attention to all keys that lie in their window; ``[B, n, heads, d]``."""
    past, causal = key.shape[1] - query.shape[1], query.shape[1] == key.shape[1] <= window
    place = torch.arange(key.shape[1], device=query.device)
    distance = place[past:, None] - place
    # A causal call needs no mask, whose kernels take several times as long.
    seen = None if causal else (distance >= 0) & (distance < window)
    query, key, value = (z.transpose(1, 2) for z in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=causal).transpose(1, 2)
