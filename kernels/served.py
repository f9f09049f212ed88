"""What the kernels serve of a configuration, in words for people; needs no framework, and triton only at last."""

import dataclasses
import importlib.util
import itertools
import sys

from fwpkm.config import FwPKMConfig
from fwpkm.tokens import TOKEN_FIELDS

SERVED_CHOICES = {
    "boundary": ("drop", "wait"),
    "write_scale": ("slots", "unit", "normalized"),
    "memory_scope": ("sequence", "batch"),
}
"""The values of the fields that name a rule; any other is refused. Those of the score stand in scores.py."""
SERVED_FIELDS = {
    "key_dim", "value_dim", "num_heads", "num_subkeys", "top_k", "chunk_size", "lookahead", "boundary", "score",
    "score_eps", "temperature", "learning_rate", "write_scale", "weight_decay", "grad_clip", "addressing_weight",
    "memory_scope", "usage_weight", "initial_decay", "recent_penalty", "query", "value", "gate", "mask", "forget",
}  # fmt: skip
"""The fields of a configuration and of a token that the kernels serve; one of a configuration that is not listed must
be at its default."""
_MOST = {"num_heads": 4, "top_k": 32, "num_subkeys": 2048, "key_dim": 1024, "value_dim": 1024}
MOST_PADDING = 4
"""Packed sequences are padded to the longest, but to no more than so many times their tokens."""
_MOST_CODEBOOKS = 65_535
"""A launch has a row of programs for each codebook, and CUDA no more rows than that."""


def why_unsupported_config(cfg: FwPKMConfig) -> str | None:
    """The reason that lies in the configuration; can be traced."""
    from fwpkm.kernels.scores import SCORES

    for field in dataclasses.fields(cfg):
        if field.name not in SERVED_FIELDS and getattr(cfg, field.name) != field.default:
            return f"{field.name} must be {field.default!r}. Received: {field.name}={getattr(cfg, field.name)!r}"
    for token_field in TOKEN_FIELDS:
        if token_field.name not in SERVED_FIELDS:
            return f"the kernels do not serve {token_field.name} of a token"
    for name, values in (SERVED_CHOICES | {"score": SCORES}).items():
        if getattr(cfg, name) not in values:
            return f"{name} must be one of {', '.join(map(repr, values))}. Received: {name}={getattr(cfg, name)!r}"
    for name, most in _MOST.items():
        if getattr(cfg, name) > most:
            return f"{name} must be at most {most}. Received: {name}={getattr(cfg, name)}"
    for name in ("key_dim", "value_dim"):
        if getattr(cfg, name) % 16:
            return f"{name} must be a multiple of 16. Received: {name}={getattr(cfg, name)}"
    return None


def why_unsupported_tables(memories: int, heads: int) -> str | None:
    """The reason that lies in how many memories a call reads."""
    most = _MOST_CODEBOOKS // (2 * heads)
    if memories <= most:
        return None
    return f"memories of {heads} heads must be at most {most} in a call. Received: {memories}"


def why_unsupported_packing(ends: list[int], longest: int | None = None) -> str | None:
    """The reason that lies in where packed sequences end; ``longest`` of their lengths, where nothing else is known."""
    count = len(ends) - 1
    if longest is None:
        longest = max((stop - start for start, stop in itertools.pairwise(ends)), default=0)
    if count * longest <= MOST_PADDING * ends[-1]:
        return None
    return (
        f"packed sequences, padded to the longest, must be at most {MOST_PADDING} times their tokens. "
        f"Received: {count} sequences of up to {longest} tokens, {ends[-1]} in all"
    )


def why_no_triton(extra: str = "triton") -> str | None:
    """The reason that Triton cannot be imported here, and the extra that brings it; it is not imported."""
    if "triton" not in sys.modules:
        if importlib.util.find_spec("triton") is None:
            return f"triton is not installed: pip install 'fwpkm[{extra}]'"
        if "tensorflow" in sys.modules:  # whose LLVM its library would bind to, and crash
            return "triton must be imported before tensorflow in a process that uses both"
    return None
