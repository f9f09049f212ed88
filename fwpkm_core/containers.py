"""The values that pass between a caller and a backend (SPEC.md §5 and §8): NamedTuples of native arrays."""

from typing import Any, NamedTuple, TypeAlias

Array: TypeAlias = Any  # numpy.ndarray, torch.Tensor, jax.Array, ...: each backend uses its own


class Memory(NamedTuple):
    """The tables. float32, or float64 when queries and tables both are."""

    keys: Array
    """``[M, H, 2, S, Dk/2]``: two codebooks of S sub-keys for each head."""
    values: Array
    """``[M, N, Dv]``: one row for each of the N = S·S slots."""


class State(NamedTuple):
    """A half-read sequence: the tables and the tokens that no write has consumed yet. P = C + L - 1 (SPEC.md §5)."""

    memory: Memory
    pending_query: Array
    """``[B, P, H*Dk]``"""
    pending_value: Array
    """``[B, P, Dv]``"""
    pending_gate: Array
    """``[B, P]``"""
    pending_mask: Array
    """``[B, P]`` bool"""
    position: Array
    """``[B]`` int32: tokens since the count began, equal in all rows."""


class Lookup(NamedTuple):
    """What a query reads (SPEC.md §2). Entries are ordered by head, then by descending sum of sub-scores."""

    output: Array
    """``[B, n, Dv]`` in the query's dtype."""
    slots: Array
    """``[B, n, H*k]`` slot ids in [0, N)."""
    weights: Array
    """``[B, n, H*k]`` in the tables' dtype; each token's sum to 1."""


class Losses(NamedTuple):
    """The two losses of one chunk (SPEC.md §3). A record: no gradient passes through it."""

    memorization: Array
    """``[M]``"""
    addressing: Array
    """``[M]``"""


class Trace(NamedTuple):
    """What a call did. A record: no gradient passes through it."""

    slots: Array
    """``[B, T, H*k]`` slot ids that each token read."""
    weights: Array
    """``[B, T, H*k]`` their weights, NaN for a token with non-finite input or scores."""
    memorization: Array
    """``[M, W]`` loss of each write in order, W = ceil(T/C); columns past ``writes`` are 0."""
    addressing: Array
    """``[M, W]`` likewise."""
    writes: Array
    """int scalar: how many chunks were written."""
