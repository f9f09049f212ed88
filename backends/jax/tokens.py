"""Tokens of B sequences as the tables see them, and the layout in which tokens meet their memory."""

import functools
import operator
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from fwpkm.config import FwPKMConfig
from fwpkm.tokens import NUMBERS, TOKEN_FIELDS, TokenField, Tokens, token_specs

NAME = "the JAX backend"


def filled(dtype: jnp.dtype, tokens: Tokens) -> Tokens:
    """The tokens of a call in the tables' dtype, with defaults for what was left out."""
    shape = tokens.query.shape[:2]

    def fill(field: TokenField, x: Array | None) -> Array:
        wanted = dtype if field.kind == "float" else bool
        default: Any = field.default
        return jnp.full(shape, default, wanted) if x is None else x.astype(wanted)

    return Tokens(*map(fill, TOKEN_FIELDS, tokens))


def no_tokens(cfg: FwPKMConfig, batch_size: int, dtype: jnp.dtype) -> Tokens:
    """What a state with nothing pending holds ``[B, P, ...]``."""
    specs = token_specs(cfg, batch_size, ("P", cfg.capacity))
    return specs.map(lambda spec: jnp.zeros(spec.shape, dtype if spec.kind == "float" else bool))


def numbers(tokens: Tokens) -> dict[str, Array]:
    """The fields that gradients pass through, by name."""
    return {name: getattr(tokens, name) for name in NUMBERS}


def cut(tokens: Tokens, start: Array | int, length: int) -> Tokens:
    """``length`` tokens of every row from ``start`` on, which may be traced."""
    return tokens.map(lambda x: lax.dynamic_slice_in_dim(x, start, length, axis=1))


def pad(tokens: Tokens, padding: int) -> Tokens:
    """With so many zeros, and mask False, at the end."""
    return tokens.map(lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)))


def insert(tokens: Tokens, later: Tokens, at: Array) -> Tokens:
    """The tokens up to ``at``, then the later ones, then zeros: a stream of both lengths together."""
    both = zip(pad(tokens, later.length), later)
    return Tokens(*(lax.dynamic_update_slice_in_dim(x, y, at, axis=1) for x, y in both))


def finite(tokens: Tokens) -> Array:
    """``[B, n]``: every number of a token is finite."""
    flags = (finite_rows(x) if x.ndim > 2 else jnp.isfinite(x) for x in numbers(tokens).values())
    return functools.reduce(operator.and_, flags)


def finite_rows(x: Array) -> Array:
    """Whether all of the last axis is finite: 0 · x is NaN where it is not.

    XLA takes thrice as long to compile ``isfinite(x).all(-1)``, and its largest magnitude may pass over a NaN.
    """
    return (0 * lax.stop_gradient(x)).sum(-1) == 0


def without(tokens: Tokens, dead: Array) -> Tokens:
    """The dead ones ``[B, n]`` as zeros with mask False (SPEC.md §5); no gradient passes through them."""
    return tokens.map(lambda x: jnp.where(dead.reshape(*dead.shape, *[1] * (x.ndim - 2)), jnp.zeros((), x.dtype), x))


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
