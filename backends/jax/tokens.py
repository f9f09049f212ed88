"""Tokens of B sequences as the tables see them, and the layout in which tokens meet their memory."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from fwpkm.config import FwPKMConfig


class Tokens(NamedTuple):
    """n tokens of B sequences, in the tables' dtype."""

    query: Array
    """``[B, n, H*Dk]``"""
    value: Array
    """``[B, n, Dv]``: what a token offers as a target."""
    gate: Array
    """``[B, n]``"""
    mask: Array
    """``[B, n]`` bool"""

    @classmethod
    def of(cls, dtype: jnp.dtype, query: Array, value: Array, gate: Array | None, mask: Array | None) -> "Tokens":
        """The arguments of a call; a missing gate is 1 and a missing mask True."""
        shape = query.shape[:2]
        gate = jnp.ones(shape, dtype) if gate is None else gate.astype(dtype)
        mask = jnp.ones(shape, bool) if mask is None else mask
        return cls(query.astype(dtype), value.astype(dtype), gate, mask)

    @property
    def length(self) -> int:
        """n."""
        return self.mask.shape[1]

    def slice(self, start: Array | int, length: int) -> "Tokens":
        """``length`` tokens of every row from ``start`` on, which may be traced."""
        return Tokens(*(lax.dynamic_slice_in_dim(x, start, length, axis=1) for x in self))

    def rest(self, start: Array, length: int) -> "Tokens":
        """Likewise; zeros where the tokens end."""
        return self._padded(length).slice(start, length)

    def insert(self, later: "Tokens", at: Array) -> "Tokens":
        """These tokens up to ``at``, then the later ones, then zeros: a stream of both lengths together."""
        longer = self._padded(later.length)
        return Tokens(*(lax.dynamic_update_slice_in_dim(x, y, at, axis=1) for x, y in zip(longer, later)))

    def _padded(self, length: int) -> "Tokens":
        """With so many zeros at the end."""
        return Tokens(*(jnp.pad(x, [(0, 0), (0, length)] + [(0, 0)] * (x.ndim - 2)) for x in self))

    def finite(self) -> Array:
        """``[B, n]``: query, value and gate are all finite."""
        return jnp.isfinite(self.query).all(-1) & jnp.isfinite(self.value).all(-1) & jnp.isfinite(self.gate)

    def without(self, dead: Array) -> "Tokens":
        """The dead ones ``[B, n]`` as zeros with mask False (SPEC.md §5); no gradient passes through them."""
        query, value = (jnp.where(dead[..., None], 0, x) for x in (self.query, self.value))
        return Tokens(query, value, jnp.where(dead, 0, self.gate), self.mask & ~dead)


def ahead(x: Array, lookahead: int) -> Array:
    """``[B, n, ...]``: x at t + L, zeros where that has not arrived."""
    shifted = x[:, lookahead:]
    return jnp.pad(shifted, [(0, 0), (0, x.shape[1] - shifted.shape[1])] + [(0, 0)] * (x.ndim - 2))


def by_memory(x: Array, memories: int) -> Array:
    """``[B, n, ...] -> [M, (B/M)*n, ...]``: the tokens that read each memory, whose sums §3 and §4 run over."""
    return x.reshape(memories, -1, *x.shape[2:])


def halves(cfg: FwPKMConfig, query: Array, memories: int) -> Array:
    """``[B, n, H*Dk] -> [M, H, 2, R, Dk/2]``: what each codebook scores, R = (B/M)*n."""
    split = query.reshape(memories, -1, cfg.num_heads, 2, cfg.key_dim // 2)
    return split.transpose(0, 2, 3, 1, 4)
