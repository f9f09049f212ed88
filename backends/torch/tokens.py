"""Tokens of B sequences as the tables see them, and the layout in which tokens meet their memory."""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fwpkm.backends.torch.entries import finite_rows
from fwpkm.config import FwPKMConfig


class Given(NamedTuple):
    """The tokens of a call, in the caller's dtypes; a gate or mask that is None is 1 or True."""

    query: Tensor
    """``[B, n, H*Dk]``"""
    value: Tensor
    """``[B, n, Dv]``"""
    gate: Tensor | None
    """``[B, n]``"""
    mask: Tensor | None
    """``[B, n]`` bool"""


class Tokens(NamedTuple):
    """n tokens of B sequences, in the tables' dtype."""

    query: Tensor
    """``[B, n, H*Dk]``"""
    value: Tensor
    """``[B, n, Dv]``: what a token offers as a target."""
    gate: Tensor
    """``[B, n]``"""
    mask: Tensor
    """``[B, n]`` bool"""

    @classmethod
    def of(cls, dtype: torch.dtype, query: Tensor, value: Tensor, gate: Tensor | None, mask: Tensor | None) -> "Tokens":
        """The arguments of a call; a missing gate is 1 and a missing mask True."""
        shape = query.shape[:2]
        gate = query.new_ones(shape, dtype=dtype) if gate is None else gate.to(dtype)
        mask = query.new_ones(shape, dtype=torch.bool) if mask is None else mask
        return cls(query.to(dtype), value.to(dtype), gate, mask)

    @property
    def length(self) -> int:
        """n."""
        return self.mask.shape[1]

    def slice(self, start: int, stop: int | None) -> "Tokens":
        """Tokens start to stop of every row."""
        return Tokens(*(x[:, start:stop] for x in self))

    def join(self, later: "Tokens") -> "Tokens":
        """These tokens, then the later ones."""
        if self.length == 0:
            return later
        return Tokens(*(torch.cat(pair, dim=1) for pair in zip(self, later)))

    def pad(self, length: int) -> "Tokens":
        """Zeros and mask False up to a length, so that a state's shapes never change."""
        room = length - self.length
        query, value = (F.pad(x, (0, 0, 0, room)) for x in (self.query, self.value))
        return Tokens(query, value, F.pad(self.gate, (0, room)), F.pad(self.mask, (0, room)))

    def finite(self) -> Tensor:
        """``[B, n]``: query, value and gate are all finite."""
        query, value = (finite_rows(x.flatten(0, 1)).view_as(self.mask) for x in (self.query, self.value))
        return query & value & self.gate.isfinite()

    def without(self, dead: Tensor) -> "Tokens":
        """The dead ones ``[B, n]`` as zeros with mask False (SPEC.md §5); no gradient passes through them."""
        if not some(dead):
            return self
        query, value = (x.masked_fill(dead[..., None], 0) for x in (self.query, self.value))
        return Tokens(query, value, self.gate.masked_fill(dead, 0), self.mask & ~dead)


def some(flags: Tensor) -> bool:
    """Whether any flag may be set: on the CPU a copy of all tokens is saved where none is; a GPU is not waited for."""
    return torch.compiler.is_compiling() or flags.device.type != "cpu" or bool(flags.any())


def ahead(x: Tensor, lookahead: int) -> Tensor:
    """``[B, n, ...]``: x at t + L, zeros where that has not arrived."""
    shifted = x[:, lookahead:]
    return torch.cat([shifted, x.new_zeros(x.shape[0], x.shape[1] - shifted.shape[1], *x.shape[2:])], dim=1)


def by_memory(x: Tensor, memories: int) -> Tensor:
    """``[B, n, ...] -> [M, (B/M)*n, ...]``: the tokens that read each memory, whose sums §3 and §4 run over."""
    return x.reshape(memories, -1, *x.shape[2:])


def halves(cfg: FwPKMConfig, query: Tensor, memories: int) -> Tensor:
    """``[B, n, H*Dk] -> [M, H, 2, R, Dk/2]``: what each codebook scores, R = (B/M)*n."""
    split = query.reshape(memories, -1, cfg.num_heads, 2, cfg.key_dim // 2)
    return split.permute(0, 2, 3, 1, 4).contiguous()
