"""Run by test_jax_meshes.py, as jax_sharded.py is: rows and columns at once, packed rows, one memory for all, another
mesh after a checkpoint, and what is refused."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_sharded import CFG, COTANGENT, KEYS, LAYER, ROWS, USED, VARIABLES, WIDTH, B, X, compared, report

from fwpkm.backends import jax as be
from fwpkm.backends.jax import FwPKM
from fwpkm.backends.jax.sharding import placed
from fwpkm.containers import Memory

SHAPE = {"key_dim": 8, "value_dim": 8, "num_subkeys": 8, "top_k": 2, "chunk_size": 4}
LEARNED = FwPKM(WIDTH, **SHAPE, learn_memory=True)
SHARED = FwPKM(WIDTH, **SHAPE, memory_scope="batch")
MEMORY = Memory(*(table[None] for table in VARIABLES["buffers"]["memory"]))
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(kind: AxisType, devices: int = 4, *names: str) -> jax.sharding.Mesh:
    """All devices in the shape of the axes that are named, or some of them as "rows"."""
    names = names or ("rows",)
    shape = (devices,) if len(names) == 1 else (2, 2)
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names), devices=jax.devices()[:devices])


def by_columns(mesh: jax.sharding.Mesh, tree: Any, rows: str | None = None) -> Any:
    """The tree on a mesh, value tables dealt out by their columns."""

    def put(path: Any, x: Any) -> Any:
        last = getattr(path[-1], "name", "") == "values"
        spec = P(*[None] * (x.ndim - 1), "columns") if last else P(rows)
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, tree)


def rows_and_columns(kind: AxisType) -> float:
    """Gradients of a layer, the table's among them, its output and its state, on a mesh of 2 × 2."""
    mesh, params = mesh_of(kind, 4, "rows", "columns"), LEARNED.init(KEYS[0], jnp.float64)["params"]

    def loss(params: Any, x: Any, cotangent: Any) -> Any:
        y, state = LEARNED.apply({"params": params, "buffers": {}}, x)
        return (y * cotangent).sum() + sum(jnp.square(table).sum() for table in state.memory), (y, state)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    expected = gradient(params, X, COTANGENT)
    with jax.set_mesh(mesh):
        x, cotangent = (jax.device_put(z, NamedSharding(mesh, ROWS)) for z in (X, COTANGENT))
        found = gradient(by_columns(mesh, params), x, cotangent)
    (d_params, (_, state)) = found
    assert state.memory.values.sharding.spec == P("rows", None, "columns")
    assert d_params["memory"].values.sharding.spec == P(None, "columns")
    return compared(found, expected)


def packed(kind: AxisType) -> float:
    """Two packed calls of a state whose rows are dealt out; every device sees all tokens."""
    ends = jnp.array([[0, 7, 9, 20, 30], [0, 1, 2, 5, 8]], jnp.int32)

    def call(variables: Any, state: Any, x: Any, ends: Any) -> Any:
        first, state = LAYER.apply(variables, x, state, cu_seqlens=ends[0])
        second, state = LAYER.apply(variables, x[:, :8], state, cu_seqlens=ends[1])
        return first, second, state

    given = VARIABLES, be.init_state(CFG, MEMORY, B), X.reshape(1, -1, WIDTH), ends
    expected, mesh = jax.jit(call)(*given), mesh_of(kind)
    variables, state, *rest = given
    with jax.set_mesh(mesh):
        variables, rest = jax.device_put((variables, rest), NamedSharding(mesh, P()))
        found = jax.jit(call)(variables, be.to_device(state, NamedSharding(mesh, ROWS)), *rest)
    assert all(x.sharding.spec[0] == "rows" for x in jax.tree.leaves(found[2]))
    return compared(found, expected)


def packed_mapped() -> float:
    """A packed row on each device."""
    ends = jnp.array([[0, 5, 9], [0, 0, 7], [0, 9, 9], [0, 4, 6]], jnp.int32)

    def call(x: Any, ends: Any) -> Any:
        return LAYER.apply(VARIABLES, x, cu_seqlens=ends[0])

    alone = [call(X[i : i + 1], ends[i : i + 1]) for i in range(B)]
    mapped = jax.jit(jax.shard_map(call, mesh=mesh_of(AxisType.Auto), in_specs=(ROWS, ROWS), out_specs=ROWS))
    return compared(mapped(X, ends), jax.tree.map(lambda *x: jnp.concatenate(x), *alone))


def columns_decoded(kind: AxisType) -> float:
    """Steps on a mesh of 2 × 2: they leave every array where it lay, so that one program serves them all."""
    mesh = mesh_of(kind, 4, "rows", "columns")
    step = jax.jit(LAYER.decode, donate_argnums=2)

    def call(variables: Any, x: Any) -> Any:
        y, state = jax.jit(LAYER.apply)(variables, x)
        before, results = jax.tree.map(lambda x: x.sharding, state), [y]
        for _ in range(4):
            y, state = step(variables, x[:, :1], state)
            results.append(y)
        after = jax.tree.map(lambda x: x.sharding, state)
        assert all(a.is_equivalent_to(b, x.ndim) for a, b, x in zip(*map(jax.tree.leaves, (before, after, state))))
        return results, state

    expected, programs = call(VARIABLES, X), step._cache_size()
    with jax.set_mesh(mesh):
        found = call(by_columns(mesh, VARIABLES), jax.device_put(X, NamedSharding(mesh, ROWS)))
    assert step._cache_size() == programs + 1
    return compared(found, expected)


def one_memory(kind: AxisType) -> float:
    """One memory for the rows of all devices."""
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        variables, x = jax.device_put((VARIABLES, X), (NamedSharding(mesh, P()), NamedSharding(mesh, ROWS)))
        return compared(jax.jit(SHARED.apply)(variables, x), SHARED.apply(VARIABLES, X))


def one_memory_mapped() -> float:
    """A memory for the rows of each device."""
    alone = [SHARED.apply(VARIABLES, X[i : i + 1]) for i in range(B)]
    mapped = jax.shard_map(SHARED.apply, mesh=mesh_of(AxisType.Auto), in_specs=(P(), ROWS), out_specs=ROWS)
    return compared(jax.jit(mapped)(VARIABLES, X), jax.tree.map(lambda *x: jnp.concatenate(x), *alone))


def mapped_twice() -> float:
    """A shard_map over the rows, and one inside it over what is left."""
    mesh = mesh_of(AxisType.Auto, 4, "rows", "columns")

    def rows(variables: Any, x: Any) -> Any:
        inner = jax.shard_map(LAYER.apply, in_specs=(P(), P()), out_specs=P(), axis_names={"columns"})
        return inner(variables, x)

    call = jax.shard_map(rows, mesh=mesh, in_specs=(P(), ROWS), out_specs=ROWS, axis_names={"rows"})
    return compared(jax.jit(call)(VARIABLES, X), LAYER.apply(VARIABLES, X))


def restored() -> float:
    """Weights and a state that four devices saved, on two devices that go on."""
    four, two = (mesh_of(AxisType.Auto, n) for n in (4, 2))
    variables, x = jax.device_put((VARIABLES, X), (NamedSharding(four, P()), NamedSharding(four, ROWS)))
    saved = variables, jax.jit(LAYER.apply)(variables, x[:, :5])[1]

    def on_two(tree: Any, spec: P) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(two, spec)), tree)

    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
        saver.save(Path(folder, "saved"), saved)
        saver.wait_until_finished()
        variables, state = saver.restore(Path(folder, "saved"), (on_two(saved[0], P()), on_two(saved[1], ROWS)))
    y, state = jax.jit(LAYER.apply)(variables, jax.device_put(X[:, 5:], NamedSharding(two, ROWS)), state)
    assert state.memory.values.sharding.num_devices == 2
    expected, whole = LAYER.apply(VARIABLES, X)
    return compared((y, state), (expected[:, 5:], whole))


# What is refused


def by_slots(kind: AxisType, traced: bool) -> Any:
    """A value table whose slots are dealt out."""
    mesh, state = mesh_of(kind), be.init_state(CFG, MEMORY, B)
    state, x = jax.device_put((state, X), NamedSharding(mesh, P()))
    values = jax.device_put(state.memory.values, NamedSharding(mesh, P(None, "rows")))
    state = state._replace(memory=state.memory._replace(values=values))
    call = jax.jit(be.apply, static_argnums=0) if traced else be.apply
    return call(CFG, state, x, x)


def uses_by_slots() -> Any:
    """The uses of a state, whose slots are dealt out."""
    state, x = jax.device_put((be.init_state(USED.config, MEMORY, B), X), NamedSharding(mesh_of(AxisType.Auto), P()))
    uses = jax.device_put(state.uses, NamedSharding(mesh_of(AxisType.Auto), P(None, "rows")))
    return be.apply(USED.config, state._replace(uses=uses), x, x)


def of_another_mesh(kind: AxisType) -> Any:
    """A state on two devices, tokens on four."""
    state = be.to_device(be.init_state(CFG, MEMORY, B), NamedSharding(mesh_of(kind, 2), ROWS))
    x = jax.device_put(X, NamedSharding(mesh_of(kind), ROWS))
    return be.apply(CFG, state, x, x)


def of_another_device() -> Any:
    """A state on one device, tokens on another."""
    state = be.to_device(be.init_state(CFG, MEMORY, B), jax.devices()[1])
    x = jax.device_put(X, jax.devices()[2])
    return be.apply(CFG, state, x, x)


def partly_mapped() -> Any:
    """A shard_map over the rows alone, columns left to the compiler; it would never end."""
    mesh = mesh_of(AxisType.Auto, 4, "rows", "columns")
    call = jax.shard_map(LAYER.apply, mesh=mesh, in_specs=(P(), ROWS), out_specs=ROWS, axis_names={"rows"})
    return jax.jit(call)(by_columns(mesh, VARIABLES), X)


def columns_mapped() -> Any:
    """A shard_map over columns, which sees a part of each."""
    mesh = mesh_of(AxisType.Auto, 4, "columns")
    specs = jax.tree.map(lambda _: P(), VARIABLES)
    specs["buffers"]["memory"] = Memory(P(), P(None, "columns"))
    return jax.jit(jax.shard_map(LAYER.apply, mesh=mesh, in_specs=(specs, P()), out_specs=P()))(VARIABLES, X)


def no_mesh_is_left() -> float:
    """A call that raises on explicit axes sets no mesh for those after it."""
    x = jax.device_put(X, NamedSharding(mesh_of(AxisType.Explicit), ROWS))
    try:
        placed(lambda x: x.no_such_attribute)(x)
    except AttributeError:
        return float(not jax.sharding.get_abstract_mesh().empty)
    return 1.0


def indivisible(spec: P) -> Any:
    """Four rows, or eight columns, on three devices."""
    mesh = mesh_of(AxisType.Auto, 3)
    return jax.device_put(be.init_state(CFG, MEMORY, B).memory.values, NamedSharding(mesh, spec))


def cases() -> dict[str, Callable[[], Any]]:
    """By name."""
    found: dict[str, Callable[[], Any]] = {"packed, mapped": packed_mapped, "restored": restored}
    found["no mesh is left"] = no_mesh_is_left
    found |= {"one memory, mapped": one_memory_mapped, "mapped twice": mapped_twice}
    for name, kind in KINDS.items():
        found[f"rows and columns, {name}"] = lambda k=kind: rows_and_columns(k)
        found[f"columns decoded, {name}"] = lambda k=kind: columns_decoded(k)
        found[f"packed, {name}"] = lambda k=kind: packed(k)
        found[f"one memory, {name}"] = lambda k=kind: one_memory(k)
        found[f"refused: slots, {name}"] = lambda k=kind: by_slots(k, traced=k is AxisType.Explicit)
        found[f"refused: another mesh, {name}"] = lambda k=kind: of_another_mesh(k)
    found["refused: uses by slots"] = uses_by_slots
    found["refused: another device"] = of_another_device
    found["refused: partly mapped"] = partly_mapped
    found["refused: columns mapped"] = columns_mapped
    found["refused: rows that do not divide"] = lambda: indivisible(ROWS)
    found["refused: columns that do not divide"] = lambda: indivisible(P(None, None, "rows"))
    return found


if __name__ == "__main__":
    warnings.simplefilter("error")  # JAX warns of donated arrays that it cannot overwrite
    report(cases())
