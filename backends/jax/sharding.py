"""Calls on several devices: under ``jax.shard_map``, and with arrays whose types tell how they are dealt out."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fwpkm.backends.jax.checks import check_alive


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


_COLUMNS = ("value", "values", "output")
"""Fields whose last axis is the columns of the value table."""


def placed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, on a mesh with explicit axes too: the compiler deals out what it makes on its way.

    Its results are dealt out as its arguments are: their first axis, where it is as long as that of one whose rows are,
    and the columns of values. So a result's first axis must be that of rows or memories, of which there may be one.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        check_alive(args)
        on_mesh = _explicit_mesh(args)
        if on_mesh is None:
            return function(*args)
        mesh, context = on_mesh
        leaves, tree = jax.tree_util.tree_flatten_with_path(args)
        arrays = {i: x for i, (_, x) in enumerate(leaves) if isinstance(x, jax.Array)}

        def inside(*arrays_inside: Any) -> Any:
            given = [x for _, x in leaves]
            for i, x in zip(arrays, arrays_inside):
                given[i] = x
            return function(*jax.tree.unflatten(tree, given))

        rows, columns = {}, None
        for i, x in arrays.items():
            spec = jax.typeof(x).sharding.spec
            if x.ndim and spec[0] is not None:
                rows[x.shape[0]] = spec[0]
            if x.ndim > 1 and spec[-1] is not None and _name(leaves[i][0]) in _COLUMNS:
                columns = spec[-1]

        def spec_of(path: Any, x: Any) -> PartitionSpec:
            spec = [rows.get(x.shape[0]) if x.ndim else None, *[None] * (x.ndim - 1)][: x.ndim]
            if _name(path) in _COLUMNS and x.ndim > 1:
                spec[-1] = columns
            return PartitionSpec(*spec)

        plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays.values()]
        with jax.sharding.use_abstract_mesh(mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))):
            shapes = jax.eval_shape(inside, *plain)
        specs = jax.tree_util.tree_map_with_path(spec_of, shapes)
        with context:
            return jax.sharding.auto_axes(inside, out_sharding=specs)(*arrays.values())

    return call


def _explicit_mesh(args: Any) -> Any:
    """The mesh with explicit axes that the caller has set, or arrays lie on, and what sets it; None without one."""
    if _is_explicit(mesh := jax.sharding.get_abstract_mesh()):
        return mesh, contextlib.nullcontext()
    for x in jax.tree.leaves(args):
        if isinstance(x, jax.Array) and _is_explicit(mesh := jax.typeof(x).sharding.mesh):
            # A mesh with its devices, where they are known: a call may use none of the arrays that tell them.
            if not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding):
                return mesh, jax.set_mesh(x.sharding.mesh)  # type: ignore[arg-type]
            return mesh, jax.sharding.use_abstract_mesh(mesh)
    return None


def _is_explicit(mesh: Any) -> bool:
    return bool(getattr(mesh, "explicit_axes", ()))


def _name(path: Any) -> str:
    """Of a leaf, the field that holds it; the first of a tuple is an output."""
    key = path[-1]
    return getattr(key, "name", "output" if getattr(key, "idx", None) == 0 and len(path) == 1 else "")
