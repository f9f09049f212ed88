"""Checks that only JAX needs: arrays that were donated, dimensions that have no number, 64-bit mode."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_alive(tree: Any) -> None:
    """Raise a RuntimeError where an array was deleted, because an earlier call took it over."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted():
            raise RuntimeError(
                "the arrays of this state were donated to an earlier call (donate_argnums, or decode), which overwrote "
                "them: go on from the state that it returned, and keep another by fwpkm.backends.jax.start_decoding, "
                f"which copies. Received: a deleted array of shape {x.shape}"
            )


def check_sizes(name: str, x: Any) -> None:
    """Raise a ValueError where a dimension is a symbol of ``jax.export``: what is written depends on the sizes."""
    if not all(isinstance(size, int) for size in getattr(x, "shape", ())):
        raise ValueError(
            f"{name} must have sizes that are numbers, as the memory decides by them how much is written: export one "
            f"program for each batch size and length, and pad the last piece under a mask. Received: shape {x.shape}"
        )


def check_known(*arrays: Any) -> None:
    """Raise a ValueError for arrays whose numbers nobody has: abstract ones of a shape and a dtype."""
    for x in arrays:
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(
                "an abstract layer holds no numbers: fill it first (fwpkm.load, or nnx.update from a checkpoint), or "
                f"run what calls it under nnx.eval_shape or jax.eval_shape. Received: {x}"
            )


def in_64_bits() -> bool:
    """Whether JAX's 64-bit mode is on, here and now: ``jax.enable_x64`` is a context too."""
    config: Any = jax.config
    return bool(config.jax_enable_x64)


def check_dtype(dtype: Any) -> None:
    """Raise a ValueError unless weights can have this dtype: for float64 JAX must not be confined to 32 bits."""
    if not jnp.issubdtype(np.dtype(dtype), np.floating):
        raise ValueError(f"dtype must be a floating one, such as 'float32' or 'bfloat16'. Received: {np.dtype(dtype)}")
    if np.dtype(dtype) == np.float64 and not in_64_bits():
        raise ValueError(
            "dtype float64 needs JAX's 64-bit mode: call jax.config.update('jax_enable_x64', True) first, or leave "
            "dtype out. Received: dtype='float64' with jax_enable_x64=False"
        )
