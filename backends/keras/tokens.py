"""Tokens of B sequences as the tables see them, and the layout in which tokens meet their memory."""

import functools
import operator
from typing import NamedTuple

from keras import ops

from fwpkm.config import FwPKMConfig
from fwpkm.tokens import TOKEN_FIELDS, Array, TokenField, Tokens, token_specs

NAME = "the Keras backend"


class ChunkFlags(NamedTuple):
    """What the tokens of a chunk do in its write."""

    counted: Array
    """``[M, R]`` bool: unmasked tokens, whose reads count in N_i and p̄."""
    pair: Array
    """``[M, R]`` bool: counted tokens with a target."""

    @property
    def active(self) -> Array:
        """``[M]`` bool: the memories in which the chunk has a pair."""
        return ops.any(self.pair, axis=1)


def dtype_of(kind: str, tables: str) -> str:
    """The dtype of a stored array: a float has that of the tables."""
    return tables if kind == "float" else kind


def filled(dtype: str, tokens: Tokens) -> Tokens:
    """The tokens of a call in the tables' dtype, with defaults for what was left out."""
    shape = ops.shape(tokens.query)[:2]

    def fill(field: TokenField, x: Array | None) -> Array:
        wanted = dtype_of(field.kind, dtype)
        return ops.full(shape, field.default, dtype=wanted) if x is None else ops.cast(x, wanted)

    return Tokens(*map(fill, TOKEN_FIELDS, tokens))


def no_tokens(cfg: FwPKMConfig, batch_size: int | Array, dtype: str) -> Tokens:
    """The pending tokens ``[B, P, ...]`` of a state that begins: zeros, and mask False."""
    specs = token_specs(cfg, batch_size, ("P", cfg.capacity))
    return specs.map(lambda spec: ops.zeros(spec.shape, dtype_of(spec.kind, dtype)))


def join(before: Tokens, after: Tokens) -> Tokens:
    """The tokens of one call after those of another."""
    return Tokens(*(ops.concatenate(two, axis=1) for two in zip(before, after)))


def take(tokens: Tokens, index: Array) -> Tokens:
    """The tokens at ``index`` [n] of every row."""
    return tokens.map(lambda x: ops.take(x, index, axis=1))


def finite(tokens: Tokens) -> Array:
    """``[B, n]``: every number of a token is finite."""
    numbers = [(field, x) for field, x in zip(TOKEN_FIELDS, tokens) if field.kind == "float"]
    return functools.reduce(operator.and_, [finite_rows(x) if field.width else ops.isfinite(x) for field, x in numbers])


def without(tokens: Tokens, dead: Array) -> Tokens:
    """The dead ones, ``[B, n]`` or ``[B]``, as zeros with mask False (SPEC.md §5); no gradient passes through them."""
    return tokens.map(lambda x: blank(x, dead))


def blank(x: Array, dead: Array) -> Array:
    """``x`` with zeros where ``dead``, whose axes are the first of x."""
    return ops.where(outer(dead, x), ops.zeros((), dtype=x.dtype), x)


def nan_where(dead: Array, x: Array) -> Array:
    """``x`` with NaN where ``dead``, whose axes are the first of x."""
    return ops.where(outer(dead, x), ops.cast(float("nan"), x.dtype), x)


def outer(flags: Array, like: Array) -> Array:
    """``flags`` with axes of length 1 behind its own, so that it broadcasts against ``like``."""
    return flags[(...,) + (None,) * (len(like.shape) - len(flags.shape))]


def finite_rows(x: Array) -> Array:
    """Whether all of the last axis is finite."""
    return ops.all(ops.isfinite(ops.stop_gradient(x)), axis=-1)


def ahead(x: Array, lookahead: int) -> Array:
    """``[B, n, ...]``: x at t + L, zeros behind the last."""
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
