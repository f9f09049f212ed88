"""JAX on meshes: rows and columns at once, packed rows, checkpoints on another mesh; and what is refused.

Also, of many configurations, that no dtype or rank is promoted unasked: by tracing alone, which takes no compiler.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from processes import python
from sources import ROOT

from fwpkm.agreement import BOUNDS
from fwpkm.backends import jax as be
from fwpkm.backends.jax import FwPKM

SCRIPT = ROOT / "tests" / "jax_meshes.py"


@pytest.fixture(scope="module")
def found() -> dict[str, float | str]:
    """By case, the largest relative error, or what was raised."""
    done = python(SCRIPT, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    "case",
    [
        *("rows and columns, auto", "rows and columns, explicit", "packed, auto", "packed, explicit"),
        *("columns decoded, auto", "columns decoded, explicit"),
        *(
            "packed, mapped",
            "one memory, auto",
            "one memory, explicit",
            "no mesh is left",
            "one memory, mapped",
            "mapped twice",
            "restored",
        ),
    ],
)
def test_meshes_agree_with_one_device(found: dict[str, float | str], case: str) -> None:
    error = found[case]
    assert not isinstance(error, str), error
    bounds = BOUNDS["float64"]
    assert error < (bounds.gradient if "columns" in case else bounds.forward)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("slots, auto", "ValueError: memory.values must not be dealt out to devices by slots"),
        ("slots, explicit", "ValueError: memory.values must not be dealt out to devices by slots"),
        ("uses by slots", "ValueError: state.uses must not be dealt out to devices by slots"),
        ("another mesh, auto", "keys on devices [0, 1] and query on devices [0, 1, 2, 3]"),
        ("another mesh, explicit", "keys on devices [0, 1] and query on devices [0, 1, 2, 3]"),
        ("another device", "ValueError: Received incompatible devices for jitted computation"),
        ("partly mapped", "ValueError: jax.shard_map must map every axis of the mesh around a memory"),
        ("columns mapped", "ValueError: memory.values of the variables must have shape (64, 8)"),
        ("rows that do not divide", "array axis 0 is partitioned 3 times, but the dimension size is 4"),
        ("columns that do not divide", "array axis 2 is partitioned 3 times, but the dimension size is 8"),
    ],
)
def test_refusals_say_what_was_wrong(found: dict[str, float | str], case: str, words: str) -> None:
    raised = found[f"refused: {case}"]
    assert isinstance(raised, str), "nothing was raised"
    assert words in raised


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"score": "dot_product", "num_heads": 2, "boundary": "wait", "gated": False, "value_norm": None},
        {"memory_scope": "batch", "grad_clip": 0.1, "weight_decay": 0.1, "write_scale": "normalized"},
        {"usage_weight": 0.5, "weight_decay": 0.1},
    ],
    ids=["defaults", "dot products", "one memory", "weighted by use"],
)
def test_nothing_is_promoted_unasked(fields: dict[str, Any], dtype: str) -> None:
    layer = FwPKM(8, key_dim=8, value_dim=8, num_subkeys=64, top_k=2, chunk_size=4, **fields)
    cfg, variables = layer.config, layer.init(jax.random.key(0), dtype)
    x, mask, memory = jnp.ones((2, 9, 8), dtype), jnp.ones((2, 9), bool), be.init_memory(cfg)
    state, ends, rows = layer.init_state(variables, 2), jnp.array([0, 5, 7], jnp.int32), jnp.array([1], jnp.int32)

    def loss(params: Any) -> Any:
        y = layer.apply({**variables, "params": params}, x, mask=mask)[0]
        return y.astype("float32").sum()

    def functions(state: Any, rows: Any) -> Any:
        fresh = be.reset(cfg, be.flush(cfg, state)[0], memory)
        if cfg.memory_scope == "sequence":
            packed = layer.apply(variables, x[:1], state, mask[:1], ends), be.select(cfg, state, rows)
            return packed, be.put(cfg, be.flush(cfg, state, rows)[0], [0], be.select(cfg, fresh, [1]))
        return fresh

    ones = jnp.ones((2, 4, cfg.num_heads * cfg.key_dim), dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(lambda x: layer.apply(variables, x, state, mask, return_trace=True), x)
        jax.eval_shape(lambda x: layer.apply(variables, x, return_state=False), x)
        jax.eval_shape(lambda x: layer.decode(variables, x, state, mask[:, :1]), x[:, :1])
        jax.eval_shape(lambda x: be.lookup(cfg, state.memory, x), ones)
        if not cfg.usage_weight:  # which it refuses
            jax.eval_shape(lambda x: be.chunk_update(cfg, state.memory, x, x[..., :8], pair=mask[:, :4]), ones)
        jax.eval_shape(jax.grad(loss), variables["params"])
        jax.eval_shape(functions, state, rows)
