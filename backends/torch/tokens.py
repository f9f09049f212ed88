"""Tokens of B sequences as the tables see them, and the layout in which tokens meet their memory."""

import functools
import operator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.tokens import TOKEN_FIELDS, TokenField, Tokens, token_specs

NAME = "the torch backend"


def filled(dtype: torch.dtype, tokens: Tokens) -> Tokens:
    """The tokens of a call in the tables' dtype, with defaults for what was left out."""
    shape = tokens.query.shape[:2]

    def fill(field: TokenField, x: Tensor | None) -> Tensor:
        wanted = dtype if field.kind == "float" else torch.bool
        return tokens.query.new_full(shape, field.default, dtype=wanted) if x is None else x.to(wanted)

    return Tokens(*map(fill, TOKEN_FIELDS, tokens))


def no_tokens(cfg: FwPKMConfig, keys: Tensor, batch_size: int) -> Tokens:
    """What a state with nothing pending holds ``[B, P, ...]``, where the keys lie."""
    specs = token_specs(cfg, batch_size, ("P", cfg.capacity))
    return specs.map(lambda spec: keys.new_zeros(spec.shape, dtype=keys.dtype if spec.kind == "float" else torch.bool))


def join(before: Tokens, after: Tokens) -> Tokens:
    """The tokens of one call after those of another."""
    if before.length == 0:
        return after
    if after.length == 0:
        return before
    return Tokens(*(torch.cat(two, dim=1) for two in zip(before, after)))


def pad(tokens: Tokens, length: int) -> Tokens:
    """Zeros and mask False up to a length, so that a state's shapes never change."""
    padding = length - tokens.length
    return tokens.map(lambda x: F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding)))


def finite(tokens: Tokens) -> Tensor:
    """``[B, n]``: every number of a token is finite."""
    numbers = [(field, x) for field, x in zip(TOKEN_FIELDS, tokens) if field.kind == "float"]
    flags = [finite_rows(x.flatten(0, 1)).view(x.shape[:2]) if field.width else x.isfinite() for field, x in numbers]
    return functools.reduce(operator.and_, flags)


def finite_rows(x: Tensor) -> Tensor:
    """``[P]``: whether all of a row of [P, D] is finite, from its sum, scaled so that finite terms do not overflow it.

    A fraction of the time of ``isfinite().all(-1)``, which passes over memory several times.
    """
    x = x.detach()
    return x.mv(x.new_full((x.shape[1],), 2.0**-20)).isfinite()


def without(tokens: Tokens, dead: Tensor) -> Tokens:
    """The dead ones ``[B, n]`` as zeros with mask False (SPEC.md §5); no gradient passes through them."""
    if not maybe_any(dead):
        return tokens
    return tokens.map(lambda x: x.masked_fill(dead.view(*dead.shape, *[1] * (x.ndim - 2)), 0))


def maybe_any(flags: Tensor) -> bool:
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
