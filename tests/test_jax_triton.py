"""The JAX backend on the Triton kernels, in Triton's interpreter, beside what XLA computes in float64 (SPEC.md §6)."""

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import SMALL
from processes import python
from sources import ROOT

from fwpkm import FwPKMConfig
from fwpkm.agreement import BOUNDS, relative_error
from fwpkm.backends import jax as be
from fwpkm.backends.jax import engine
from fwpkm.containers import Memory
from fwpkm.kernels.runtime import launch

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"),
    pytest.mark.timeout(900),
]
PLAIN = FwPKMConfig(**SMALL)
CONFIGS = {
    "plain": (PLAIN, [10], False),
    "all weighed": (
        FwPKMConfig(**SMALL, score="dot_product", num_heads=2, grad_clip=0.05, weight_decay=0.1, usage_weight=0.5),
        [2, 9, 10], True,
    ),
    "one table, wait": (
        FwPKMConfig(**SMALL, boundary="wait", lookahead=2, memory_scope="batch", write_scale="normalized"), [3, 10],
        True,
    ),
    "keys at rest": (FwPKMConfig(**SMALL, addressing_weight=0.0), [3, 10], False),
}  # fmt: skip
BOUND = BOUNDS["float32"]


def worst(received: Any, expected: Any) -> float:
    """The largest relative error of two trees of the same shapes."""
    pairs = zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True)
    return max(relative_error(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs)


def draw(cfg: FwPKMConfig, batch: int, length: int, seed: int = 0) -> list[np.ndarray]:
    """Queries, values and gates in float32."""
    rng, width = np.random.default_rng(seed), cfg.num_heads * cfg.key_dim
    shapes = (batch, length, width), (batch, length, cfg.value_dim), (batch, length)
    query, value, gate = (rng.random(shape, np.float32) for shape in shapes)
    return [query - np.float32(0.5), value - np.float32(0.5), gate]


def reading(cfg: FwPKMConfig, cuts: list[int], with_holes: bool, implementation: str | None) -> tuple[Any, Any]:
    """Everything that a sequence gives, read in pieces, and the gradients of all of it."""
    rng, dtype = np.random.default_rng(1), np.float64 if implementation is None else np.float32
    inputs, mask = draw(cfg, 2, cuts[-1]), None
    if with_holes:
        mask = jnp.asarray(rng.random((2, cuts[-1])) > 0.2).at[:, [4, 8]].set(True)
        inputs[0][0, 4, 1], inputs[1][1, 8, 0] = np.inf, np.nan
    pair = jnp.asarray(rng.random((2, cuts[-1])) > 0.3)
    given = [jnp.asarray(x, dtype) for x in (*inputs, *be.init_memory(cfg, seed=1))]
    options = {"implementation": implementation}

    def total(query: Any, value: Any, gate: Any, *tables: Any) -> tuple[Any, Any]:
        state, outputs, weights, slots, losses, start = be.init_state(cfg, Memory(*tables), 2), [], [], [], [], 0
        for stop in cuts:
            part = [x[:, start:stop] for x in (query, value, gate)]
            masked = None if mask is None else mask[:, start:stop]
            output, state, trace = be.apply(cfg, state, *part, masked, **options)
            outputs.append(output)
            weights.append(trace.weights)
            slots.append(jnp.where(jnp.isnan(trace.weights), -1, trace.slots))
            losses += trace.memorization, trace.addressing, trace.writes
            start = stop
        left = state.pending
        state, trace = be.flush(cfg, state, **options)
        seen = be.lookup(cfg, state.memory, query, **options)
        alone = dataclasses.replace(cfg, usage_weight=0.0)
        memory, told = be.chunk_update(alone, state.memory, query, value, gate, pair=pair, **options)
        live = jnp.concatenate(outputs, 1), *state.memory, left.query, left.value, seen.output, seen.weights, *memory
        sums = (jnp.where(jnp.isnan(x), 0, x * jnp.cos(jnp.arange(x.size).reshape(x.shape))).sum() for x in live)
        records = weights, slots, losses, trace.memorization, trace.writes, told, state.uses, left.gate, left.mask
        return sum(sums), (live, records, state.position)

    gradients, found = jax.grad(total, range(5), has_aux=True)(*given)
    return found, gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_give_what_xla_gives(name: str) -> None:
    received, expected = (reading(*CONFIGS[name], implementation) for implementation in ("triton", None))
    assert worst(received[0], expected[0]) < BOUND.forward
    assert worst(received[1], expected[1]) < BOUND.gradient


def packed(implementation: str | None, ends: Any, query: Any, value: Any, gate: Any, *tables: Any) -> tuple[Any, Any]:
    """Two packed calls, the second from rows at different places; a total, and what the calls gave."""
    state, found, total = be.init_state(PLAIN, Memory(*tables), 3), [], 0.0
    for number in range(2):
        part = [x[number] for x in (query, value, gate)]
        output, state, trace = be.apply(PLAIN, state, *part, cu_seqlens=ends[number], implementation=implementation)
        total += (output * jnp.cos(jnp.arange(output.size).reshape(output.shape))).sum()
        found += output, trace.slots, trace.weights, trace.memorization, trace.writes
    return total + jnp.sin(state.memory.values).sum(), (found, state)


def test_packed_rows_whose_lengths_are_traced() -> None:
    """One sequence is empty, one ends where the tokens do not."""
    ends = jnp.asarray([[0, 5, 5, 8], [0, 1, 7, 9]], jnp.int32)
    drawn = [np.stack([x, x[::-1]]) for x in draw(PLAIN, 1, 9)]
    found = []
    for implementation, dtype in (("triton", np.float32), (None, np.float64)):
        given = [jnp.asarray(x, dtype) for x in (*drawn, *be.init_memory(PLAIN, seed=1))]
        step = jax.value_and_grad(functools.partial(packed, implementation), range(1, 6), has_aux=True)
        found.append(jax.jit(step)(ends, *given))
    assert worst(found[0][0], found[1][0]) < BOUND.forward
    assert worst(found[0][1], found[1][1]) < BOUND.gradient


def test_in_a_scan_positions_are_traced_and_gradients_pass_through_it() -> None:
    """Its rows stand at different places, as a mask has holes."""
    drawn = [np.stack(np.split(x, 2, 1)) for x in draw(PLAIN, 2, 8)]
    mask = jnp.asarray(np.random.default_rng(0).random((2, 2, 4)) > 0.3)
    found = []
    for implementation, dtype in (("triton", np.float32), (None, np.float64)):

        def total(memory: Any, *tokens: Any, implementation: Any = implementation) -> tuple[Any, Any]:
            def body(state: Any, part: Any) -> tuple[Any, Any]:
                output, state, trace = be.apply(PLAIN, state, *part, implementation=implementation)
                return state, (output, trace.slots)

            state, seen = jax.lax.scan(body, be.init_state(PLAIN, memory, 2), (*tokens, mask))
            return (seen[0] ** 2).sum() + jnp.sin(state.memory.values).sum(), (seen, state)

        memory = Memory(*(jnp.asarray(x, dtype) for x in be.init_memory(PLAIN, seed=1)))
        step = jax.jit(jax.value_and_grad(total, range(4), has_aux=True))
        found.append(step(memory, *(jnp.asarray(x, dtype) for x in drawn)))
    assert worst(found[0][0], found[1][0]) < BOUND.forward
    assert worst(found[0][1], found[1][1]) < BOUND.gradient


@pytest.mark.parametrize(
    "changed",
    [{}, {"boundary": "wait", "lookahead": 2, "memory_scope": "batch"}, {"usage_weight": 0.5, "num_heads": 2}],
    ids=str,
)
def test_decode_overwrites_a_donated_state(changed: dict) -> None:
    """Token by token beside XLA in float32, over two writes of rows that rest now and then."""
    cfg = FwPKMConfig(**SMALL | changed)
    tokens, mask = draw(cfg, 2, 10), np.random.default_rng(0).random((2, 10)) > 0.2
    states = [be.init_state(cfg, be.init_memory(cfg, seed=1), 2) for _ in range(2)]
    for t in range(10):
        part, outputs = [x[:, t : t + 1] for x in (*tokens, mask)], []
        for i, implementation in enumerate(("triton", None)):
            before = states[i]
            output, states[i] = be.decode(cfg, before, *part, implementation=implementation)
            assert before.memory.values.is_deleted()
            outputs.append(output)
        assert worst((outputs[0], states[0]), (outputs[1], states[1])) < BOUND.forward


def test_calls_are_mapped_over_an_outer_axis() -> None:
    """One memory for all, tokens of each; outputs, states and gradients are those of calls one by one."""
    query, value, _ = (np.stack([x, x[::-1]]) for x in draw(PLAIN, 1, 5))

    def total(memory: Memory, query: Any, value: Any) -> tuple[Any, Any]:
        output, state, _ = be.apply(PLAIN, be.init_state(PLAIN, memory, 1), query, value, implementation="triton")
        return (output**2).sum() + (state.memory.values**2).sum(), (output, state)

    one = jax.value_and_grad(total, range(3), has_aux=True)
    memory = be.init_memory(PLAIN, seed=1)
    received = jax.vmap(one, (None, 0, 0))(memory, query, value)
    expected = [one(memory, *map(jnp.asarray, part)) for part in zip(query, value)]
    assert worst(received, jax.tree.map(lambda *x: jnp.stack(x), *expected)) == 0


def test_rows_are_dealt_out_to_devices() -> None:
    """Under ``jax.shard_map``, each device with its rows; in a process that has two."""
    done = python(ROOT / "tests" / "jax_triton_mapped.py", timeout=600, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    forward, gradient = map(float, done.stdout.split())
    assert forward < BOUND.forward
    assert gradient < BOUND.gradient


def test_a_layer_hands_it_through() -> None:
    layer, x = be.FwPKM(16, PLAIN), jnp.asarray(draw(PLAIN, 2, 5)[0], jnp.float32)
    variables = layer.init(jax.random.key(0))
    found = []
    for implementation in ("triton", None):
        y, state = layer.apply(variables, x, implementation=implementation)
        last, state = layer.decode(variables, x[:, :1], state, implementation=implementation)
        found.append((y, last, state))
    assert worst(*found) < BOUND.forward
    with pytest.raises(ValueError, match=r'None, "triton" or "xla"\. Received: \'eager\''):
        layer.apply(variables, x, implementation="eager")


def test_what_is_donated_is_overwritten_in_place() -> None:
    """In calls, training steps and loops; and nothing that the kernels work in is copied either."""
    done = python(ROOT / "tests" / "jax_triton_in_place.py", timeout=300, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: copies for name, *copies in map(json.loads, done.stdout.splitlines())}
    assert found == {"apply": [0, 0], "train": [0, 0], "scan": [0, 0], "decode": [0, 0], "apply, kept": [1, 0]}


# Which engine


def test_what_nobody_asked_for_is_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fwpkm.kernels", None)  # whose import then fails
    for implementation in (None, "xla"):
        assert engine.choose_engine(implementation, PLAIN, be.init_memory(PLAIN), jnp.zeros((1, 1, 16))) == "xla"


CALLS = {
    "apply": lambda state, x, **options: be.apply(PLAIN, state, x, x, **options),
    "from a memory": lambda state, x, **options: be.apply(PLAIN, be.init_memory(PLAIN), x, x, **options),
    "flush": lambda state, x, **options: be.flush(PLAIN, state, **options),
    "lookup": lambda state, x, **options: be.lookup(PLAIN, state.memory, x, **options),
    "chunk_update": lambda state, x, **options: be.chunk_update(PLAIN, state.memory, x, x, **options),
    "decode": lambda state, x, **options: be.decode(PLAIN, state, x, x, **options),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_says_which_implementations_there_are(call: str) -> None:
    state = be.init_state(PLAIN, be.init_memory(PLAIN), 1)
    with pytest.raises(ValueError, match=r'None, "triton" or "xla"\. Received: \'eager\''):
        CALLS[call](state, jnp.zeros((1, 1, 16)), implementation="eager")


@pytest.mark.parametrize(
    ("changed", "dtype", "reason"),
    [
        ({"key_dim": 8}, "float32", "key_dim must be a multiple of 16"),
        ({"top_k": 33, "num_subkeys": 40}, "float32", "top_k must be at most 32"),
        ({}, "float64", "query must be float32, bfloat16 or float16. Received: float64"),
        ({"num_subkeys": 2048, "top_k": 2}, "slots", r"below 2\^31"),
    ],
    ids=str,
)
def test_the_kernels_say_why_they_cannot_serve(changed: dict, dtype: str, reason: str) -> None:
    cfg = FwPKMConfig(**SMALL | changed)
    length, dtype = (2048, "float32") if dtype == "slots" else (1, dtype)
    half = cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2
    memory = Memory(*(jax.ShapeDtypeStruct((1, *shape), "float32") for shape in (half, (cfg.num_slots, 16))))
    query = jax.ShapeDtypeStruct((1, length, cfg.key_dim), dtype)
    with pytest.raises(ValueError, match=f'implementation="triton" cannot serve this call: .*{reason}'):
        jax.eval_shape(functools.partial(be.lookup, cfg, implementation="triton"), memory, query)


def test_packed_rows_that_would_mostly_be_padding_are_refused() -> None:
    tokens, memory = jnp.zeros((1, 20, 16), "float32"), be.init_memory(PLAIN)
    ends = jnp.asarray([0, 15, *range(16, 21)], jnp.int32)
    with pytest.raises(ValueError, match=r"at most 4 times their tokens\. Received: 6 sequences of up to 15"):
        be.apply(PLAIN, memory, tokens, tokens, cu_seqlens=ends, implementation="triton")


def test_without_a_gpu_it_names_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"query must be on an NVIDIA GPU; .* TRITON_INTERPRET=1 .*Received: query on"):
        be.lookup(PLAIN, be.init_memory(PLAIN), jnp.zeros((1, 1, 16), "float32"), implementation="triton")
