"""How two results are judged to agree (SPEC.md §6): the one place that holds tolerances.

Everything takes NumPy arrays. The tests and ``fwpkm conform`` judge every backend by these functions.
"""

import operator
from typing import Any, NamedTuple

import numpy as np

from fwpkm import reference
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory
from fwpkm.equations import sub_scores
from fwpkm.schedule import windows, written
from fwpkm.tokens import Array, Tokens

GAP = 1e-5
"""Slots must be equal wherever every gap that decided them exceeds this (§6)."""

DIFFERENCE_STEP = 1e-6
"""Step of a central difference in float64, along a direction of norm 1."""

DIFFERENCE_BOUND = 1e-6
"""Bound on \\|central difference - directional derivative\\| over the gradient's norm: the difference's own error."""


class Bounds(NamedTuple):
    """The largest relative errors that still count as agreement, for one dtype."""

    forward: float
    """Outputs, weights, losses and tables."""
    gradient: float


BOUNDS = {
    "float64": Bounds(forward=1e-10, gradient=1e-9),
    "float32": Bounds(forward=1e-5, gradient=1e-4),
    # What is stored in 8 or 11 bits: outputs and the gradients of inputs. Tables stay float32 and are judged as such.
    "bfloat16": Bounds(forward=4e-3, gradient=4e-3),
    "float16": Bounds(forward=1e-3, gradient=1e-3),
}
"""By dtype name (§6)."""


def relative_error(actual: Any, expected: Any) -> float:
    """‖a - b‖ / ‖b‖, or ‖a - b‖ where ‖b‖ < 1e-6 (§6).

    Infinite where shapes differ, where NaN do not coincide, or where an infinity on either side is not equal.
    """
    actual, expected = (np.asarray(array, dtype=np.float64) for array in (actual, expected))
    if actual.shape != expected.shape or not np.array_equal(np.isnan(actual), np.isnan(expected)):
        return float("inf")
    infinite = np.isinf(actual) | np.isinf(expected)
    if not np.array_equal(actual[infinite], expected[infinite]):
        return float("inf")
    finite = np.isfinite(expected) & ~infinite
    actual, expected = actual[finite], expected[finite]
    scale = max(np.abs(expected).max(initial=0.0), 1.0)  # so that squares of numbers near the largest do not overflow
    size = float(np.linalg.norm(expected / scale))
    error = float(np.linalg.norm(actual / scale - expected / scale))
    return error * float(scale) if size * scale < 1e-6 else error / size


def by_slot(cfg: FwPKMConfig, slots: Array, weights: Array) -> tuple[Array, Array]:
    """Each head's entries ordered by slot id: sums that nearly tie inside a selection have no agreed order.

    Args:
        cfg: gives H and k.
        slots: ``[B, n, H*k]``.
        weights: ``[B, n, H*k]``.
    """
    flat, by_head = slots.shape, (*slots.shape[:-1], cfg.num_heads, cfg.top_k)
    slots, weights = slots.reshape(by_head), weights.reshape(by_head)
    order = np.argsort(slots, axis=-1, kind="stable")
    slots, weights = (np.take_along_axis(array, order, axis=-1) for array in (slots, weights))
    return slots.reshape(flat), weights.reshape(flat)


def deciding_gap(cfg: FwPKMConfig, memory: Memory, query: Array) -> Array:
    """The smallest gap that decided a token's slots, computed in float64 (§6).

    The smallest, over the heads, of: the kth sub-score less the next, in either codebook, and the kth sum less the
    next. Infinite where nothing was left to choose, and for a token whose gaps are not finite.

    Args:
        cfg: the score, H and k.
        memory: tables ``[M, ...]`` with M = B or 1.
        query: ``[B, n, H*Dk]``.

    Returns:
        ``[B, n]`` float64.
    """
    batch, length, _ = query.shape
    heads, k = cfg.num_heads, cfg.top_k
    keys = np.asarray(memory.keys, dtype=np.float64)
    halves = np.asarray(query, dtype=np.float64).reshape(batch, length, heads, 2, cfg.key_dim // 2)
    scores = np.empty((batch, length, heads, 2, cfg.num_subkeys))
    with np.errstate(all="ignore"):
        for b, h, codebook in np.ndindex(batch, heads, 2):
            codes = keys[min(b, len(keys) - 1), h, codebook]
            scores[b, :, h, codebook] = sub_scores(cfg, halves[b, :, h, codebook], codes)
        scores = -np.sort(-scores, axis=-1)  # descending
        sums = scores[..., 0, :k, None] + scores[..., 1, None, :k]
        sums = -np.sort(-sums.reshape(batch, length, heads, k * k), axis=-1)
        gaps = np.concatenate([_gap_after(scores, k).reshape(batch, length, 2 * heads), _gap_after(sums, k)], axis=-1)
    return np.where(np.isfinite(gaps), gaps, np.inf).min(axis=-1)


def comparable_tokens(
    cfg: FwPKMConfig, memory: Memory, tokens: Tokens, gap: float = GAP, cu_seqlens: Array | None = None
) -> int:
    """How many time steps two float32 runs may be compared over: up to the first chunk that holds a smaller gap (§6).

    Follows the float64 reference from the start of the sequences and looks at every read of a token that is there,
    those repeated by the writes too. T where no gap is smaller. Runs cut there read nothing that could differ, flush
    included.

    Args:
        cfg: the configuration.
        memory: the tables that the sequences begin with.
        tokens: ``[B, T, ...]``, or packed ``[1, T, ...]``.
        gap: what counts as smaller.
        cu_seqlens: ``[B+1]`` of packed ones.
    """
    memory = Memory(*(np.asarray(table, dtype=np.float64) for table in memory))
    tokens = tokens.map(lambda x: x if x.dtype == bool else np.asarray(x, dtype=np.float64))
    mask = np.ones(tokens.query.shape[:2], bool) if tokens.mask is None else tokens.mask
    flat, (_, length) = tokens.map(lambda x: x.reshape(-1, *x.shape[2:])), mask.shape
    end = length
    for m, at in enumerate(reference.sequences(cfg, mask, cu_seqlens)):
        own = Memory(*(table[min(m, len(table) - 1)][None] for table in memory))
        alone = _comparable_alone(cfg, own, flat.map(operator.itemgetter(at)), gap)
        if alone < at.shape[1]:
            end = min(end, int(at[0, alone]) % length)
    return end


def _comparable_alone(cfg: FwPKMConfig, memory: Memory, tokens: Tokens, gap: float) -> int:
    """The same of the tokens that read one memory, by its clock: all, or a multiple of C."""
    state = reference.init_state(cfg, memory, batch_size=len(tokens.query))
    for start, stop, _ in windows(cfg, 0, tokens.length):
        first = written(cfg, start) * cfg.chunk_size  # from here on, tokens are read again by a write yet to come
        part = tokens.slice(first, stop)
        gaps = deciding_gap(cfg, state.memory, part.query)
        close = ((gaps <= gap) if part.mask is None else (gaps <= gap) & part.mask).any(axis=0)
        if close.any():
            return (first + int(close.argmax())) // cfg.chunk_size * cfg.chunk_size
        state = reference.apply(cfg, state, **tokens.slice(start, stop).present())[1]
    return tokens.length


def _gap_after(descending: Array, k: int) -> Array:
    """The kth entry of the last axis less the next; infinite where there is no next."""
    if descending.shape[-1] <= k:
        return np.full(descending.shape[:-1], np.inf)
    return descending[..., k - 1] - descending[..., k]
