"""Tokens of B sequences as the tables see them, and the layout in which tokens meet their memory."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fwpkm.backends.jax.indexing import update
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


def pack(tokens: Tokens) -> Array:
    """``[B, n, F]``: all fields side by side, so that one operation moves them; flags as zeros and ones."""
    columns = [x[..., None] if field.width is None else x for field, x in zip(TOKEN_FIELDS, tokens)]
    return jnp.concatenate([x.astype(tokens.query.dtype) for x in columns], -1)


def unpack(cfg: FwPKMConfig, packed: Array) -> Tokens:
    """The tokens that ``pack`` laid side by side."""
    widths = [1 if field.width is None else field.width(cfg)[1] for field in TOKEN_FIELDS]
    columns = jnp.split(packed, np.cumsum(widths)[:-1], -1)
    scalars = (x[..., 0] if field.width is None else x for field, x in zip(TOKEN_FIELDS, columns))
    return Tokens(*(x if field.kind == "float" else x != 0 for field, x in zip(TOKEN_FIELDS, scalars)))


def pad(x: Array, padding: int) -> Array:
    """``[B, n, ...]`` with so many tokens of zeros at the end."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, padding, 0)] + [(0, 0, 0)] * (x.ndim - 2))


def insert(x: Array, later: Array, at: Array) -> Array:
    """The tokens up to ``at``, then the later ones, then zeros: a stream of both lengths together."""
    return update(pad(x, later.shape[1]), later, at)


def finite_rows(x: Array) -> Array:
    """Whether all of the last axis is finite: x - x is NaN where it is not.

    XLA takes thrice as long to compile ``isfinite(x).all(-1)``, and its largest magnitude may pass over a NaN.
    """
    x = lax.stop_gradient(x)
    return (x - x).sum(-1) == 0


def without(x: Array, dead: Array) -> Array:
    """``[B, n, ...]``, the dead tokens ``[B, n]`` as zeros (SPEC.md §5); no gradient passes through them."""
    return jnp.where(dead.reshape(*dead.shape, *[1] * (x.ndim - 2)), jnp.zeros((), x.dtype), x)


def ahead(x: Array, lookahead: int) -> Array:
    """``[B, n, ...]``: x at t + L, zeros where that has not arrived."""
    shift = min(lookahead, x.shape[1])
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (-shift, shift, 0)] + [(0, 0, 0)] * (x.ndim - 2))


def by_memory(x: Array, memories: int) -> Array:
    """``[B, n, ...] -> [M, (B/M)*n, ...]``: the tokens that read each memory, whose sums §3 and §4 run over."""
    return x.reshape(memories, -1, *x.shape[2:])


def halves(cfg: FwPKMConfig, query: Array, memories: int) -> Array:
    """``[B, n, H*Dk] -> [M, H, 2, R, Dk/2]``: what each codebook scores, R = (B/M)*n."""
    split = query.reshape(memories, -1, cfg.num_heads, 2, cfg.key_dim // 2)
    return split.transpose(0, 2, 3, 1, 4)
