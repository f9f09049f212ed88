"""Tokens of B sequences as the tables see them, and the layout in which tokens meet their memory."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fwpkm.config import FwPKMConfig
from fwpkm.tokens import TOKEN_FIELDS, TokenField, Tokens, token_specs

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


def no_uses(cfg: FwPKMConfig, memories: int, dtype: jnp.dtype) -> Array | None:
    """``[M, N]``: the uses that memories begin with; None where nothing weighs them."""
    return jnp.zeros((memories, cfg.num_slots), dtype) if cfg.usage_weight else None


def uses_in(uses: Array | None, dtype: jnp.dtype) -> Array | None:
    """Uses in the dtype that a call computes in."""
    return None if uses is None else uses.astype(dtype)


def as_table(tokens: Tokens) -> Array:
    """``[R, D]``: all fields of tokens ``[B, n, ...]`` side by side, so that one gather finds all of a token."""
    count, dtype = tokens.mask.size, tokens.query.dtype
    columns = [x.reshape(count, x.shape[2] if x.ndim > 2 else 1).astype(dtype) for x in tokens]
    return jnp.concatenate(columns, axis=1)


def from_table(cfg: FwPKMConfig, table: Array) -> Tokens:
    """The tokens ``[..., n]`` of a table ``[..., n, D]``."""
    widths: Any = [1 if field.width is None else field.width(cfg)[1] for field in TOKEN_FIELDS]
    parts = jnp.split(table, np.cumsum(widths[:-1]).tolist(), axis=-1)

    def field_of(field: TokenField, x: Array) -> Array:
        x = x if field.width else x[..., 0]
        return x if field.kind == "float" else x > 0

    return Tokens(*map(field_of, TOKEN_FIELDS, parts))


def live_rows(table: Array, mask: Array | None) -> Array:
    """``[R, D]``: with zeros, and so mask False, for tokens that are masked or not finite (SPEC.md §5)."""
    live = finite_rows(table)
    return jnp.where((live if mask is None else live & mask.ravel())[:, None], table, 0)


def finite_rows(x: Array) -> Array:
    """Whether all of the last axis is finite: 0 · x is NaN where it is not.

    XLA takes thrice as long to compile ``isfinite(x).all(-1)``, and its largest magnitude may pass over a NaN.
    """
    return (0 * lax.stop_gradient(x)).sum(-1) == 0


def without(tokens: Tokens, dead: Array) -> Tokens:
    """The dead ones ``[B, n]`` as zeros with mask False (SPEC.md §5); no gradient passes through them."""
    return tokens.map(lambda x: jnp.where(outer(dead, x), jnp.zeros((), x.dtype), x))


def outer(flags: Array, like: Array) -> Array:
    """``flags`` with axes of length 1 behind its own, so that it broadcasts against ``like``."""
    return flags.reshape(*flags.shape, *[1] * (like.ndim - flags.ndim))


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
