"""A decoder whose attention sees one window in each layer; what lies beyond all of them, only the memories bring."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from examples.language_model.settings import ModelSettings
from fwpkm import State
from fwpkm.backends.torch import FwPKM, nbytes

VOCABULARY = 256  # bytes


class Reading(NamedTuple):
    """Where a batch of sequences stands."""

    memories: tuple[State, ...]
    """of each memory"""
    windows: tuple[Tensor, ...]
    """of each layer: ``[2, B, w, width]``, keys and values of the last w tokens, w at most the window less one."""

    def fork(self, number: int) -> "Reading":
        """Where ``number`` continuations of each sequence stand: they share its memories, which must not be written."""
        return self._replace(windows=tuple(past.repeat_interleave(number, 1) for past in self.windows))

    @property
    def nbytes(self) -> int:
        """Bytes of memories and windows."""
        return sum(map(nbytes, self.memories)) + sum(past.nbytes for past in self.windows)


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
    past = key.shape[1] - query.shape[1]
    place = torch.arange(key.shape[1], device=query.device)
    distance = place[past:, None] - place
    seen = (distance >= 0) & (distance < window)
    query, key, value = (z.transpose(1, 2) for z in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)


class Block(nn.Module):
    """Attention, then SwiGLU, each behind a norm and beside a residual."""

    def __init__(self, settings: ModelSettings):
        """Draw the weights."""
        super().__init__()
        width, hidden = settings.width, settings.hidden
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, settings.heads, settings.window)
        self.mlp_norm = nn.RMSNorm(width)
        self.project_in = nn.Linear(width, 2 * hidden, bias=False)
        self.project_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes as in ``Attention``."""
        read, past = self.attention(self.attention_norm(x), past)
        x = x + read
        gate, up = self.project_in(self.mlp_norm(x)).chunk(2, -1)
        return x + self.project_out(F.silu(gate) * up), past


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out.

    Args:
        settings: of the model.
        memory: fields of FwPKMConfig that override the settings', e.g. ``memory_scope`` or ``learning_rate``.
    """

    def __init__(self, settings: ModelSettings, **memory: Any):
        """Draw the weights and the initial tables from torch's generator."""
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(VOCABULARY, settings.width)
        config = settings.memory_config(**memory)
        self.memories = nn.ModuleDict({str(i): FwPKM(settings.width, config) for i in sorted(settings.memories)})
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width)
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
            for last in (block.attention.project_out, block.project_out):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * settings.layers))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def start(self, batch: int) -> Reading:
        """Where sequences begin: the initial memories, and nothing seen."""
        nothing = self.embedding.weight.new_zeros(2, batch, 0, self.settings.width)
        return Reading(tuple(m.init_state(batch) for m in self.memories.values()), (nothing,) * len(self.blocks))

    def forward(
        self, tokens: Tensor, reading: Reading, update: bool = True, inplace: bool = False
    ) -> tuple[Tensor, Reading]:
        """Read on.

        Args:
            tokens: ``[B, T]`` integers.
            reading: where the sequences stand; forked, B is a multiple of its memories' rows, and ``update`` is False.
            update: False reads the memories without writing; attention goes on as ever.
            inplace: the tables of ``reading`` may be overwritten, which saves a copy of each.

        Returns:
            the hidden state of each token, ready for ``logits``, ``[B, T, width]``, and where the sequences stand.
        """
        x = F.rms_norm(self.embedding(tokens), (self.settings.width,))
        states, windows = iter(reading.memories), []
        after = []
        for i, (block, past) in enumerate(zip(self.blocks, reading.windows)):
            if str(i) in self.memories:
                state = next(states)
                # Frozen, a token reads the table wherever it stands: continuations of a sequence lie end to end.
                rows = x if len(x) == len(state.position) or update else x.reshape(len(state.position), -1, x.shape[2])
                read, state = self.memories[str(i)](rows, state, update=update, inplace=inplace)
                x = x + read.view_as(x)
                after.append(state)
            x, past = block(x, past)
            windows.append(past)
        return self.norm(x), Reading(tuple(after), tuple(windows))

    def logits(self, x: Tensor) -> Tensor:
        """``[..., width]`` -> ``[..., 256]`` float32; under autocast, of bfloat16 products."""
        return F.linear(x, self.embedding.weight).float()
