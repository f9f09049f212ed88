"""Calls inside ``jax.shard_map``, where every array has the mapped axes over which it varies in its type."""

from typing import Any

import jax
from jax import lax


def alike(*trees: Any) -> tuple[Any, ...]:
    """The same arrays, each of them varying over every mapped axis over which one of them does.

    What goes round a loop must have one type. The gradient of what did not vary is summed over the axis, as it should.
    """
    axes = frozenset[str]().union(*map(_varies, jax.tree.leaves(trees)))

    def varying(x: Any) -> Any:
        missing = tuple(axes - _varies(x))
        return _cast(x, missing) if missing else x

    return jax.tree.map(varying, trees)


def _varies(x: Any) -> frozenset[str]:
    """The mapped axes over which an array varies; before JAX 0.10 its type had them itself."""
    kind = jax.typeof(x)
    return frozenset(getattr(getattr(kind, "manual_axis_type", None), "varying", getattr(kind, "vma", ())))


def _cast(x: Any, axes: tuple[str, ...]) -> Any:
    """``x`` as one that varies over these axes too; before JAX 0.9 the function had another name."""
    return lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)  # type: ignore[attr-defined]
