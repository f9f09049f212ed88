"""Several devices in JAX: rows and the table's columns dealt out, then the same state on another number of devices.

A layer reads sequences on a mesh of two axes, "rows" and "columns": each device holds some rows of the batch, and of
their tables some columns. A training step and a state that reads on give what one device gives. Orbax saves weights and
state; half as many devices restore them and go on.

On a machine with one CPU: XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/jax_devices.py
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fwpkm.backends.jax import FwPKM

layer = FwPKM(hidden_size=32, key_dim=16, value_dim=32, num_subkeys=16, top_k=4, chunk_size=16)


def loss(params, buffers, x, target):
    """Of a model that is the layer and a residual."""
    y, state = layer.apply({"params": params, "buffers": buffers}, x)
    return jnp.square(x + y - target).mean(), state


@jax.jit
def train_step(variables, x, target):
    """Variables after a step of gradient descent, the state after the rows, and the loss."""
    params, buffers = variables["params"], variables["buffers"]
    (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params, buffers, x, target)
    return {"params": jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), "buffers": buffers}, state, value


read_on = jax.jit(layer.apply)


def deal(mesh, tree, rows=None):
    """A tree on a mesh: first axes by ``rows``, and value tables by columns."""

    def sharding(path, x):
        is_table = getattr(path[-1], "name", "") == "values"
        spec = [rows, *[None] * (x.ndim - 1)]
        return NamedSharding(mesh, P(*spec[:-1], "columns") if is_table else P(*spec))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def worst(found, expected):
    """The largest difference of two trees."""
    pairs = zip(jax.tree.leaves(jax.device_get(found)), jax.tree.leaves(jax.device_get(expected)))
    return max(float(abs(x.astype("f4") - y.astype("f4")).max()) for x, y in pairs)


def main():
    """Train and read on all devices, on one, and after a checkpoint on half of them."""
    number = len(jax.devices())
    if number < 2 or number % 2:
        raise SystemExit(f"an even number of devices is needed. There are {number}")
    axes = {"axis_names": ("rows", "columns"), "axis_types": (AxisType.Auto,) * 2}
    mesh = jax.make_mesh((number // 2, 2), **axes)
    variables = layer.init(jax.random.key(0))
    x, target = jax.random.normal(jax.random.key(1), (2, number, 40, 32))

    alone = train_step(variables, x, target)
    expected, _ = read_on(alone[0], x, alone[1])

    dealt = jax.device_put(variables, deal(mesh, variables))
    rows = NamedSharding(mesh, P("rows"))
    trained, state, _ = train_step(dealt, jax.device_put(x, rows), jax.device_put(target, rows))
    values = state.memory.values
    part = values.sharding.shard_shape(values.shape)
    print(f"tables of {values.shape}, on each of {len(mesh.devices.flat)} devices {part}")
    print(f"a training step: worst difference {worst((trained, state), alone[:2]):.1e}")

    half = jax.make_mesh((1, number // 2), **axes, devices=jax.devices()[: number // 2])
    saved = {"variables": trained, "state": state}
    wanted = {"variables": deal(half, trained), "state": deal(half, state, "rows")}
    wanted = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), saved, wanted)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
        saver.save(Path(folder, "checkpoint"), saved)
        saver.wait_until_finished()
        found = saver.restore(Path(folder, "checkpoint"), wanted)
    y, _ = read_on(found["variables"], jax.device_put(x, NamedSharding(half, P("rows"))), found["state"])
    print(f"restored on {len(half.devices.flat)} devices, reading on: worst difference {worst(y, expected):.1e}")


if __name__ == "__main__":
    main()
