"""Rules of the memory that the backends compute alike, each stated once (SPEC.md §3, §4 and §7).

``xp`` is a namespace of array functions: torch, jax.numpy or keras.ops. A derivative stands here where a hand-written
backward uses it; tests hold each to differences. The reference never uses this module: it sees a fault in it.
"""

from typing import Any

from fwpkm.config import FwPKMConfig
from fwpkm.tokens import Array

RMS_EPS = 1e-5
ZSCORE_EPS = 1e-6
LOG_EPS = 1e-8


def write_scale(xp: Any, cfg: FwPKMConfig, weights: Array) -> Array | float:
    """κ of each token (§4): weights ``[..., H*k]`` -> ``[...]``, or one number for all.

    Raises:
        ValueError: ``cfg.write_scale`` is none that this knows.
    """
    if cfg.write_scale == "slots":
        return float(cfg.slots_per_token)
    if cfg.write_scale == "unit":
        return 1.0
    if cfg.write_scale == "normalized":
        return 1 / xp.sum(xp.square(weights), axis=-1)
    return cfg.refuse("write_scale", "fwpkm.rules")


def addressing_loss(xp: Any, mean: Array) -> Array:
    """The terms of L_addr = Σ p̄ log(p̄ + 1e-8) (§3), one for each sub-key; their sum is the loss."""
    return mean * xp.log(mean + LOG_EPS)


def addressing_slope(xp: Any, mean: Array) -> Array:
    """a = log(p̄ + 1e-8) + p̄ / (p̄ + 1e-8), the derivative of :func:`addressing_loss` (§4)."""
    return xp.log(mean + LOG_EPS) + mean / (mean + LOG_EPS)


def free_fractions(cfg: FwPKMConfig, reads: Array, uses: Array) -> Array:
    """p_i = N_i / (N_i + β U_i) of slots (§11), which move by η_i = η p_i; N_i = ``reads`` > 0 and U_i = ``uses``."""
    return reads / (reads + cfg.usage_weight * uses)


def dealing(xp: Any, cfg: FwPKMConfig, weights: Array, fractions: Array) -> tuple[Array, Array]:
    """δ = (1 + γ) / (1 + γ Σ p w² / Σ w²) of tokens ``[...]`` (§11), and its derivative by the weights ``[..., H*k]``.

    p = ``fractions`` ``[..., H*k]``: ``free_fractions`` of a token's slots.
    """
    square = xp.square(weights)
    power = xp.sum(square, -1)
    free = xp.sum(fractions * square, -1) / power
    rest = 1 + cfg.usage_dealing * free
    scale = (1 + cfg.usage_dealing) / rest
    slope = -2 * cfg.usage_dealing * scale / (rest * power)
    return scale, slope[..., None] * weights * (fractions - free[..., None])


def step(xp: Any, cfg: FwPKMConfig, rows: Array, gradient: Array) -> Array:
    """rows - η (clip(gradient) + λ rows) (§4), for keys and, where that costs nothing, for values.

    Whoever calls it keeps the rows that would not be finite.
    """
    if cfg.grad_clip is not None:
        gradient = xp.clip(gradient, -cfg.grad_clip, cfg.grad_clip)
    if cfg.weight_decay:
        gradient = gradient + cfg.weight_decay * rows
    return rows - cfg.learning_rate * gradient


def step_vjp(xp: Any, cfg: FwPKMConfig, d_new: Array, unclipped: Array | None) -> tuple[Array, Array]:
    """The gradients of :func:`step`'s rows and gradient from that of its result.

    ``unclipped`` says where the gradient's magnitude is at most ``cfg.grad_clip``; None where nothing is clipped.
    """
    d_gradient = -cfg.learning_rate * d_new
    d_rows = d_new + cfg.weight_decay * d_gradient if cfg.weight_decay else d_new
    return d_rows, d_gradient if unclipped is None else d_gradient * unclipped


def traced_gate(xp: Any, gate: Array | None, weights: Array) -> Array:
    """``[B, T]`` the gate of a trace: like the weights ``[B, T, H*k]`` 0 for a masked token and NaN for a dead one."""
    total = xp.sum(weights, -1)  # near 1 where a token is live
    return xp.where(total > 0, 1.0 if gate is None else gate, total)


def rms_norm(xp: Any, x: Array, weight: Array) -> Array:
    """x / √(mean of x² + 1e-5) · weight over the last axis (§7); x must be at least float32."""
    return x / xp.sqrt(_mean(xp, xp.square(x)) + RMS_EPS) * weight


def zscore(xp: Any, z: Array) -> Array:
    """(z - mean) / (std + 1e-6) over the last axis, std unbiased; z must be at least float32 (§7).

    A constant row gives 0 and gradient 0.
    """
    constant = xp.all(z == z[..., :1], axis=-1, keepdims=True)
    centred = z - _mean(xp, z)
    variance = xp.sum(xp.square(centred), axis=-1, keepdims=True) / (z.shape[-1] - 1)
    deviation = xp.sqrt(xp.where(constant, 1.0, variance))
    return xp.where(constant, 0.0, centred / (deviation + ZSCORE_EPS))


def mix(gate: Array | None, read: Array, value: Array) -> Array:
    """o = g v̂ + (1 - g) v, or v̂ + v without a gate (§7); gate ``[...]``, read and value ``[..., Dv]``."""
    if gate is None:
        return read + value
    return gate[..., None] * read + (1 - gate[..., None]) * value


def _mean(xp: Any, x: Array) -> Array:
    """Over the last axis; keras.ops on torch would take the mean of float64 in float32."""
    return xp.sum(x, axis=-1, keepdims=True) / x.shape[-1]
