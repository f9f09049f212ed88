"""Tokens of B sequences as the tables see them, and the layout in which tokens meet their memory."""

from typing import NamedTuple

from keras import ops

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Array


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
    def of(cls, dtype: str, query: Array, value: Array, gate: Array | None, mask: Array | None) -> "Tokens":
        """The arguments of a call; a missing gate is 1 and a missing mask True."""
        one = ops.ones_like(query[..., 0], dtype=dtype)
        gate = one if gate is None else ops.cast(gate, dtype)
        mask = ops.cast(one, "bool") if mask is None else mask
        return cls(ops.cast(query, dtype), ops.cast(value, dtype), gate, mask)

    def join(self, later: "Tokens") -> "Tokens":
        """These tokens, then the later ones."""
        return Tokens(*(ops.concatenate(pair, axis=1) for pair in zip(self, later)))

    def take(self, index: Array) -> "Tokens":
        """The tokens at ``index`` [m] of every row."""
        return Tokens(*(ops.take(x, index, axis=1) for x in self))

    def finite(self) -> Array:
        """``[B, n]``: query, value and gate are all finite."""
        return finite_rows(self.query) & finite_rows(self.value) & ops.isfinite(self.gate)

    def without(self, dead: Array) -> "Tokens":
        """The dead ones ``[B, n]`` as zeros with mask False (SPEC.md §5); no gradient passes through them."""
        query, value, gate = (blank(x, dead) for x in self[:3])
        return Tokens(query, value, gate, self.mask & ~dead)


def blank(x: Array, dead: Array) -> Array:
    """``x`` with zeros where ``dead``, whose axes are the first of x."""
    return ops.where(outer(dead, x), ops.zeros((), dtype=x.dtype), x)


def outer(flags: Array, like: Array) -> Array:
    """``flags`` with axes of length 1 behind its own, so that it broadcasts against ``like``."""
    for _ in range(len(like.shape) - len(flags.shape)):
        flags = flags[..., None]
    return flags


def finite_rows(x: Array) -> Array:
    """Whether all of the last axis is finite."""
    return ops.all(ops.isfinite(ops.stop_gradient(x)), axis=-1)


def ahead(x: Array, lookahead: int) -> Array:
    """``[B, n, ...]``: x at t + L, zeros where that has not arrived."""
    return ops.concatenate([x[:, lookahead:], ops.zeros_like(x[:, :lookahead])], axis=1) if lookahead else x


def by_memory(x: Array, memories: Array) -> Array:
    """``[B, n, ...] -> [M, (B/M)*n, ...]``: the tokens that read each memory, whose sums §3 and §4 run over."""
    return ops.reshape(x, (memories, -1, *x.shape[2:]))


def by_row(x: Array, tokens: Tokens) -> Array:
    """The inverse of ``by_memory``: ``[M, (B/M)*n, ...] -> [B, n, ...]``."""
    return ops.reshape(x, (*ops.shape(tokens.mask), *x.shape[2:]))


def halves(cfg: FwPKMConfig, query: Array, memories: Array) -> Array:
    """``[B, n, H*Dk] -> [M, H, 2, R, Dk/2]``: what each codebook scores, R = (B/M)*n."""
    split = ops.reshape(query, (memories, -1, cfg.num_heads, 2, cfg.key_dim // 2))
    return ops.transpose(split, (0, 2, 3, 1, 4))
