"""The two normalisations of the layer (SPEC.md §7), at least in float32 whatever the input."""

import keras
from keras import ops

from fwpkm.containers import Array

_NORM_EPS = 1e-5
_ZSCORE_EPS = 1e-6


def rms_normalised(x: Array) -> Array:
    """x / √(mean of x² + 1e-5) over the last axis: RMSNorm before its weight."""
    x = _wide(x)
    return x * ops.rsqrt(_mean(ops.square(x)) + _NORM_EPS)


def zscore(z: Array) -> Array:
    """(z - mean) / (std + 1e-6) over the last axis, std unbiased; a constant row gives 0 and gradient 0."""
    z = _wide(z)
    constant = ops.all(z == z[..., :1], axis=-1, keepdims=True)
    centred = z - _mean(z)
    variance = ops.sum(ops.square(centred), axis=-1, keepdims=True) / (z.shape[-1] - 1)
    deviation = ops.sqrt(ops.where(constant, ops.ones_like(variance), variance))
    return ops.where(constant, ops.zeros_like(z), centred / (deviation + _ZSCORE_EPS))


def _mean(x: Array) -> Array:
    """Over the last axis; on torch Keras' own takes the mean of float64 in float32."""
    return ops.sum(x, axis=-1, keepdims=True) / x.shape[-1]


def _wide(x: Array) -> Array:
    """At least float32."""
    return ops.cast(x, "float32") if "float16" in keras.backend.standardize_dtype(x.dtype) else x
