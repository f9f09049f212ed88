"""Calls on several devices: under ``jax.shard_map``, and with arrays whose types tell how they are dealt out."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fwpkm.backends.jax.checks import check_alive
from fwpkm.containers import Memory

try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # gone in JAX 0.11
    shard_alike = None  # type: ignore[assignment]


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


def dealt_as(like: Array, tree: Any) -> Any:
    """Arrays ``[B, ...]``, or ``[1, ...]`` for one memory, whose rows the compiler shall deal out as those of ``like``.

    For automatic axes, whose compiler would keep what it makes by itself on every device. Bits and gradients stay.
    """
    if like.size == 0:
        return tree
    first = lax.stop_gradient(like).reshape(len(like), -1)[:, 0]

    def placed_by_rows(x: Array) -> Array:
        if len(x) != len(like):
            return x
        if shard_alike is None:
            return _tied(x, lax.broadcast_in_dim(first, _edge(x).shape, (0,)))
        return shard_alike(x, lax.broadcast_in_dim(first, x.shape, (0,)))[0]

    return jax.tree.map(placed_by_rows, tree)


def dealt_alike(tree: Any, like: Any) -> Any:
    """The arrays of a tree, each of which the compiler shall deal out as the one in its place in ``like``.

    So what is donated can be overwritten, and a loop compiles once. For automatic axes, as ``dealt_as``. From JAX
    0.11 on nothing says so: rows stay where they are by themselves, pending values may be dealt out by columns once.
    """
    return tree if shard_alike is None else jax.tree.map(lambda x, y: shard_alike(x, y)[0], tree, like)


def _edge(x: Array) -> Array:
    """A part on the same devices: the second axis, of slots or of pending tokens, is not dealt out."""
    return x[:, :1] if x.ndim > 1 else x


@jax.custom_jvp
def _tied(x: Array, like: Array) -> Array:
    """``x``, its edge passed through an operation with ``like``: the compiler deals out both sides of one alike.

    The operation changes nothing, which a barrier hides. No more of a table is computed than its edge, in place.
    """
    one, other = lax.optimization_barrier((like, like))
    always = (one == other) | (one != other)  # two, for NaN
    return lax.dynamic_update_slice(x, jnp.where(always, _edge(x), jnp.zeros_like(_edge(x))), (0,) * x.ndim)


@_tied.defjvp
def _tied_jvp(primals: Any, tangents: Any) -> tuple[Array, Any]:
    return _tied(*primals), tangents[0]


_COLUMNS = ("value", "values", "pending_value", "output")
"""Fields whose last axis is the columns of the value table."""


def placed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, on a mesh with explicit axes too: the compiler deals out what it makes on its way.

    Its results are dealt out as its arguments are: their first axis, where it is as long as that of one whose rows are,
    and the columns of values. So a result's first axis must be that of rows or memories, of which there may be one.

    Raises:
        ValueError: tables that are known to be dealt out by slots or sub-keys, arrays of two meshes, or a shard_map
            over some axes of its mesh.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        check_alive(args)
        _check_mapped()
        if any(map(_is_dealt, jax.tree.leaves(args))):
            _check_dealt(args)
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
        with context():
            return jax.sharding.auto_axes(inside, out_sharding=specs)(*arrays.values())

    return call


def _check_mapped() -> None:
    """Raise inside a shard_map that leaves axes to the compiler: their collectives would stand in loops whose lengths
    differ from device to device, and wait for each other for ever."""
    mesh = jax.sharding.get_abstract_mesh()
    mapped = getattr(mesh, "manual_axes", ())
    rest = [name for name, size in mesh.shape.items() if name not in mapped and size > 1] if mapped else []
    if rest:
        raise ValueError(
            "jax.shard_map must map every axis of the mesh around a memory, whose loops are as long as each device's "
            "data say: leave axis_names out, or map the others by a jax.shard_map inside. "
            f"Received: mapped {tuple(mapped)}, not mapped {tuple(rest)}"
        )


def _is_dealt(x: Any) -> bool:
    """Whether it is known that an array lies on a mesh of several devices."""
    return isinstance(x, jax.Array) and getattr(_sharding_of(x), "num_devices", 1) > 1


def _sharding_of(x: Array) -> Any:
    """How an array is dealt out; of a traced one what its type tells, which is nothing on automatic axes."""
    return jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding


def _check_dealt(args: Any) -> None:
    """Raise for tables that a write could not leave where they lie, and for arrays of two meshes."""
    meshes: dict[tuple[Any, ...], str] = {}
    for path, x in jax.tree_util.tree_flatten_with_path(args)[0]:
        sharding, name = _sharding_of(x) if _is_dealt(x) else None, _name(path)
        if not isinstance(sharding, NamedSharding):
            continue
        if name in (*Memory._fields, "uses"):
            allowed = (0, x.ndim - 1) if name == "values" else (0,)
            if any(axis is not None for i, axis in enumerate(sharding.spec) if i not in allowed):
                field = "state.uses" if name == "uses" else f"memory.{name}"
                raise ValueError(
                    f"{field} must not be dealt out to devices by slots: a token may write any of them. Deal it "
                    "out by its first axis, a memory a row, or values by their last, the columns. "
                    f"Received: shape {x.shape}, {sharding.spec}"
                )
        if not isinstance(x, jax.core.Tracer):
            meshes.setdefault(tuple(device.id for device in sharding.mesh.devices.flat), name or "an array")
    if len(meshes) > 1:
        received = " and ".join(f"{name} on devices {list(ids)}" for ids, name in meshes.items())
        raise ValueError(
            "the arrays of a call must lie on the devices of one mesh: to_device(state, sharding) moves a state. "
            f"Received: {received}"
        )


def _explicit_mesh(args: Any) -> Any:
    """The mesh with explicit axes that the caller has set, or arrays lie on, and what sets it; None without one.

    ``jax.set_mesh`` sets it when it is called, and not when it is entered.
    """
    if _is_explicit(mesh := jax.sharding.get_abstract_mesh()):
        return mesh, contextlib.nullcontext
    for x in jax.tree.leaves(args):
        if isinstance(x, jax.Array) and _is_explicit(mesh := jax.typeof(x).sharding.mesh):
            # A mesh with its devices, where they are known: a call may use none of the arrays that tell them.
            if not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding):
                return mesh, functools.partial(jax.set_mesh, x.sharding.mesh)  # type: ignore[arg-type]
            return mesh, functools.partial(jax.sharding.use_abstract_mesh, mesh)
    return None


def _is_explicit(mesh: Any) -> bool:
    return bool(getattr(mesh, "explicit_axes", ()))


def _name(path: Any) -> str:
    """Of a leaf, the field that holds it; the first of a tuple is an output."""
    key = path[-1]
    return getattr(key, "name", "output" if getattr(key, "idx", None) == 0 and len(path) == 1 else "")
