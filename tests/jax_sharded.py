"""Run by test_jax_sharding.py in a process with four devices: prints, by case, the largest relative error or a refusal.

Each case computes on a mesh of four what one device computes: outputs, states and gradients. No dtype and no rank is
promoted unasked.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fwpkm.agreement import relative_error
from fwpkm.backends import jax as be
from fwpkm.backends.jax import FwPKM
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

B, T, WIDTH = 4, 9, 8
LAYER = FwPKM(WIDTH, key_dim=8, value_dim=8, num_subkeys=8, top_k=2, chunk_size=4)
CFG = LAYER.config
USED = FwPKM(WIDTH, key_dim=8, value_dim=8, num_subkeys=8, top_k=2, chunk_size=2, usage_weight=0.7)
KEYS = jax.random.split(jax.random.key(0), 6)
VARIABLES = LAYER.init(KEYS[0], jnp.float64)
X = jax.random.normal(KEYS[1], (B, T, WIDTH), jnp.float64)
MASK = jax.random.uniform(KEYS[2], (B, T)) > 0.3
COTANGENT = jax.random.normal(KEYS[3], (B, T, WIDTH), jnp.float64)
ROWS = P("rows")


def in_pieces(variables: Any, x: Any, mask: Any) -> Any:
    """Two calls and a flush: outputs side by side, and the state."""
    first, state = LAYER.apply(variables, x[:, :5], mask=mask[:, :5])
    second, state = LAYER.apply(variables, x[:, 5:], state, mask=mask[:, 5:])
    state, _ = be.flush(CFG, state)
    return jnp.concatenate([first, second], 1), state


def overlaid(variables: Any, x: Any, mask: Any) -> Any:
    """Rows that share the initial memory."""
    return LAYER.apply(variables, x, mask=mask, return_state=False)[0]


def chunk(variables: Any, x: Any, mask: Any) -> Any:
    """A lookup and a write of single functions, of a table for each row."""
    memory = be.init_state(CFG, Memory(*(table[None] for table in variables["buffers"]["memory"])), len(x)).memory
    return be.lookup(CFG, memory, x).output, be.chunk_update(CFG, memory, x, x, mask=mask)


def decode(variables: Any, x: Any, mask: Any) -> Any:
    """Token by token in a scan."""

    def step(state: Any, token: Any) -> Any:
        y, state = LAYER.apply(variables, token[:, None], state)
        return state, y[:, 0]

    state, y = jax.lax.scan(step, LAYER.apply(variables, x[:, :1])[1], x[:, 1:].swapaxes(0, 1))
    return y.swapaxes(0, 1), state


def in_place(variables: Any, x: Any, mask: Any) -> Any:
    """The same by ``decode``, under a mask: rows complete their chunks in different steps."""

    def step(state: Any, token: Any) -> Any:
        y, state = LAYER.decode(variables, token[0][:, None], state, token[1][:, None])
        return state, y[:, 0]

    begun = LAYER.apply(variables, x[:, :1], mask=mask[:, :1])[1]
    state, y = jax.lax.scan(step, begun, (x[:, 1:].swapaxes(0, 1), mask[:, 1:].swapaxes(0, 1)))
    return y.swapaxes(0, 1), state


def begun_inside(variables: Any, x: Any, mask: Any) -> Any:
    """Tables that the compiler makes by itself: a state that no array with rows tells how to deal out."""
    memory = Memory(*(table[None] for table in variables["buffers"]["memory"]))
    return be.apply(CFG, be.init_state(CFG, memory, len(x)), x, x, mask=mask)[1]


def used(variables: Any, x: Any, mask: Any) -> Any:
    """Writes weighted by use: two calls, a step that overwrites the state, and a flush."""
    first, state = USED.apply(variables, x[:, :5], mask=mask[:, :5])
    second, state = USED.apply(variables, x[:, 5:8], state, mask=mask[:, 5:8])
    third, state = USED.decode(variables, x[:, 8:], state, mask[:, 8:])
    return jnp.concatenate([first, second, third], 1), be.flush(USED.config, state)[0]


FUNCTIONS = {
    "begun inside": begun_inside, "in pieces": in_pieces, "overlaid": overlaid, "chunk": chunk, "decode": decode,
    "decode in place": in_place, "used": used,
}  # fmt: skip


def loss(params: Any, x: Any, mask: Any, cotangent: Any, layer: FwPKM = LAYER) -> Any:
    """Of outputs and of the tables afterwards."""
    y, state = layer.apply({**VARIABLES, "params": params}, x, mask=mask)
    return (jnp.nan_to_num(y) * cotangent).sum() + sum(jnp.square(table).sum() for table in state.memory)


def auto(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under jit, rows dealt to the devices, the compiler free to choose the rest."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))

    def run(weights: Any, *arrays: Any) -> Any:
        arrays = tuple(jax.device_put(x, NamedSharding(mesh, ROWS)) for x in arrays)
        result = jax.jit(function)(weights, *arrays)
        if function in (in_pieces, begun_inside, used):  # so that no device holds the tables of other rows
            assert all(x.sharding.spec[0] == "rows" for x in jax.tree.leaves(result))
        return result

    return run


def explicit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under jit, rows dealt to the devices, every array's type telling how."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))

    def run(weights: Any, *arrays: Any) -> Any:
        arrays = tuple(jax.device_put(x, NamedSharding(mesh, ROWS)) for x in arrays)
        with jax.set_mesh(mesh):
            result = jax.jit(function)(weights, *arrays)
        assert all(jax.typeof(x).sharding.spec[0] == "rows" for x in jax.tree.leaves(result) if x.shape[:1] == (B,))
        return result

    return run


def in_columns(kind: AxisType, cfg: FwPKMConfig = CFG) -> Any:
    """The functions, tables and values dealt to the devices by columns: output and state; uses lie on every device."""
    mesh = jax.make_mesh((4,), ("columns",), axis_types=(kind,))
    memory = Memory(*(table[None] for table in VARIABLES["buffers"]["memory"]))
    state = be.init_state(cfg, memory, B)

    def call(state: Any, query: Any, value: Any) -> Any:
        output, state, _ = be.apply(cfg, state, query, value)
        state, _ = be.flush(cfg, state)
        return (output, state.memory.values), state.uses

    expected = call(state, X, X)
    columns = NamedSharding(mesh, P(None, None, "columns"))
    dealt = state._replace(memory=state.memory._replace(values=jax.device_put(state.memory.values, columns)))
    with jax.set_mesh(mesh):
        result = jax.jit(call)(dealt, jax.device_put(X, NamedSharding(mesh, P())), jax.device_put(X, columns))
    assert all(x.sharding.shard_shape(x.shape)[-1] == WIDTH // 4 for x in result[0])
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(result[1]))
    return compared(result, expected)


def row_functions(kind: str, cfg: FwPKMConfig = CFG) -> Any:
    """What picks and replaces rows, of states that are dealt out, or that lie on one device while a mesh is set."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    memory = Memory(*(table[None] for table in VARIABLES["buffers"]["memory"]))

    def call(state: Any, x: Any) -> Any:
        state = be.apply(cfg, state, x, x)[1]
        state = be.put(cfg, be.flush(cfg, state, [1, 2])[0], [3], be.init_state(cfg, memory, 1))
        state = be.reset(cfg, state, memory, [0])
        return be.apply(cfg, memory, x, x)[0], be.concat(cfg, [be.select(cfg, state, [2, 1]), state])

    given = be.init_state(cfg, memory, B), X
    expected = call(*given)
    if kind == "plain":
        with jax.set_mesh(mesh):
            return compared(call(*given), expected)
    return compared(call(*jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, ROWS)), given)), expected)


def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under shard_map with its defaults: a row on each device."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))

    def run(weights: Any, *arrays: Any) -> Any:
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(P(), *[ROWS] * len(arrays)), out_specs=ROWS))(
            weights, *arrays
        )

    return run


def mapped_loss(params: Any, x: Any, mask: Any, cotangent: Any) -> Any:
    """``loss`` of all devices."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    whole = jax.shard_map(
        lambda *given: jax.lax.psum(loss(*given), "rows"), mesh=mesh, in_specs=(P(), ROWS, ROWS, ROWS), out_specs=P()
    )
    return whole(params, x, mask, cotangent)


def compared(found: Any, expected: Any) -> float:
    """The largest relative error of two trees."""
    found, expected = (jax.tree.leaves(jax.device_get(tree)) for tree in (found, expected))
    assert [x.shape for x in found] == [x.shape for x in expected]
    pairs = zip(found, expected)
    return max(relative_error(np.asarray(x, "float64"), np.asarray(y, "float64")) for x, y in pairs if y.size)


def report(cases: dict[str, Callable[[], Any]]) -> None:
    """Print what each case gives, or what it raises; those whose name holds the first argument."""
    for name, case in cases.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        try:
            print(json.dumps([name, case()]), flush=True)
        except Exception as error:
            print(json.dumps([name, f"{type(error).__name__}: {error}"[:2000]]), flush=True)


def cases() -> dict[str, Callable[[], float]]:
    """By name."""
    found: dict[str, Callable[[], float]] = {}
    given = VARIABLES, X, MASK
    for way, names in (
        (auto, ["in pieces", "begun inside", "used"]),
        (explicit, ["in pieces", "decode", "decode in place", "used"]),
        (mapped, FUNCTIONS),
    ):
        for name in names:
            function = FUNCTIONS[name]
            found[f"{way.__name__}, {name}"] = lambda f=function, w=way, g=given: compared(w(f)(*g), f(*g))
    given = VARIABLES["params"], X, MASK, COTANGENT
    expected = jax.jit(jax.grad(loss))
    found["auto, gradient"] = lambda: compared(auto(jax.grad(loss))(*given), expected(*given))
    found["explicit, gradient"] = lambda: compared(explicit(jax.grad(loss))(*given), expected(*given))
    found["auto, columns"] = lambda: in_columns(AxisType.Auto)
    found["explicit, columns"] = lambda: in_columns(AxisType.Explicit)
    found["explicit, rows"] = lambda: row_functions("dealt")
    found["explicit, plain"] = lambda: row_functions("plain")
    of_used = partial(loss, layer=USED)
    found["auto, used gradient"] = lambda: compared(auto(jax.grad(of_used))(*given), jax.jit(jax.grad(of_used))(*given))
    found["auto, used columns"] = lambda: in_columns(AxisType.Auto, USED.config)
    found["explicit, used columns"] = lambda: in_columns(AxisType.Explicit, USED.config)
    found["explicit, used rows"] = lambda: row_functions("dealt", USED.config)
    found["mapped, gradient"] = lambda: compared(jax.jit(jax.grad(mapped_loss))(*given), expected(*given))
    return found


if __name__ == "__main__":
    report(cases())
