"""The losses of SPEC.md §3 and their slopes (§4): probabilities of sub-keys, their mean, and what a token misses."""

import triton
import triton.language as tl

from fwpkm.kernels.tokens import INF

EQUATIONS = ("memorization_loss", "sub_key_probabilities", "mean_probabilities", "addressing_loss")
PROBABILITY_UNIT = tl.constexpr(float(2**40))
"""Sums of probabilities are integers in this unit, because an atomic sum of integers has no order."""


@triton.jit
def memorization_loss(error, gate):
    """½ g ‖v̂ - u‖² of one token."""
    return 0.5 * gate * tl.sum(error * error, 0)


@triton.jit
def sub_key_probabilities(score, picked):
    """p, the softmax over the last axis of the sub-scores that are ``picked``; 0 elsewhere."""
    score = tl.where(picked, score, -INF)
    e = tl.exp(score - tl.max(score, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def mean_probabilities(probability_sum, count):
    """p̄, from the sum of p over the chunk in its unit."""
    return probability_sum.to(tl.float32) / (PROBABILITY_UNIT * count)


@triton.jit
def addressing_loss(mean):
    """p̄ log(p̄ + 1e-8) of one sub-key."""
    return mean * tl.log(mean + 1e-8)


@triton.jit
def addressing_slope(mean):
    """a = log(p̄ + 1e-8) + p̄ / (p̄ + 1e-8), the derivative of ``addressing_loss``."""
    return tl.log(mean + 1e-8) + mean / (mean + 1e-8)


@triton.jit
def addressing_curvature(mean):
    """The derivative of ``addressing_slope``."""
    mean = mean + 1e-8
    return 1 / mean + 1e-8 / (mean * mean)
