"""Bad arguments (SPEC.md §8): one ValueError that names the argument, the same words in every backend."""

import dataclasses
import re

import numpy as np
import pytest
from asserting import assert_same_bits

import fwpkm
from fwpkm import FwPKMConfig, Memory, reference
from fwpkm.conformance.running import as_numpy, native

B, T = 2, 3
CFG = FwPKMConfig(key_dim=4, value_dim=3, num_heads=2, num_subkeys=4, top_k=2, chunk_size=4, lookahead=1)
SHARED = dataclasses.replace(CFG, memory_scope="batch")
NO_FLAGS = ["no", 1, 0, None, [True, False]]
NOT_ARRAYS = ["a text", 1.5, [[[0.0] * 8] * 3] * 2, object]


def f32(*shape):
    return np.zeros(shape, np.float32)


def arguments(function):
    """Good arguments, as NumPy arrays."""
    memory, state = _memory(B), _state(B)
    query, value, mask = f32(B, T, 8), f32(B, T, 3), np.ones((B, T), bool)
    tokens = {"query": query, "gate": f32(B, T), "mask": mask}
    return {
        "apply": {"cfg": CFG, "state": state, "value": value, **tokens},
        "flush": {"cfg": CFG, "state": state},
        "lookup": {"cfg": CFG, "memory": memory, "query": query},
        "chunk_update": {"cfg": CFG, "memory": memory, "target": value, "pair": mask.copy(), **tokens},
        "init_state": {"cfg": CFG, "memory": memory, "batch_size": B},
        "reset": {"cfg": CFG, "state": state, "memory": memory, "rows": [0]},
        "select": {"cfg": CFG, "state": state, "rows": [1, 0, 0]},
        "concat": {"cfg": CFG, "states": [state, _state(1)]},
        "put": {"cfg": CFG, "state": state, "rows": [1], "other": _state(1)},
        "pending": {"cfg": CFG, "state": state},
        "nbytes": {"state": state},
        "detach": {"state": state},
        "init_memory": {"cfg": CFG, "memories": 1, "seed": 0},
    }[function]


def packed(cu_seqlens=(0, 2, 2)):
    """Good arguments of a packed call of two sequences."""
    tokens = {"query": f32(1, T, 8), "value": f32(1, T, 3), "gate": f32(1, T), "mask": np.ones((1, T), bool)}
    return {"cfg": CFG, "state": _state(B), "cu_seqlens": np.array(cu_seqlens, np.int32), **tokens}


def wrong_packing():
    """(words the message must hold before "Received", arguments to change)."""
    for bounds in ((0, 2, 1), (0, 1, T + 1), (1, 2, 3), (-1, 1, 2), (0, -1, 2)):
        yield "cu_seqlens must begin with 0, never fall", packed(bounds)
    for bounds in ((0,), ()):
        yield "cu_seqlens", packed(bounds)
    for dtype in ("int64", "float32", "bool"):
        advice = ": convert it, as integers add up to int64" if dtype == "int64" else ". "
        yield f"cu_seqlens must have dtype int32{advice}", packed() | {"cu_seqlens": np.zeros(3, dtype)}
    yield "cu_seqlens", packed() | {"cu_seqlens": np.zeros((1, 3), np.int32)}
    yield from (("cu_seqlens", packed() | {"cu_seqlens": bad}) for bad in NOT_ARRAYS)
    yield "cu_seqlens must be None", packed() | {"cfg": SHARED, "state": reference.init_state(SHARED, _memory(1), B)}
    yield "query must be one packed row", packed() | {
        "query": f32(2, T, 8), "value": f32(2, T, 3), "gate": f32(2, T), "mask": np.ones((2, T), bool)
    }  # fmt: skip
    yield "mask must have dtype bool: compare integers with 0", packed() | {"mask": np.ones((1, T), int)}
    for shape in ((B, T), (1, T + 1), (T,)):
        yield "mask", packed() | {"mask": np.ones(shape, bool)}
        yield "gate", packed() | {"gate": f32(*shape)}
    yield "value", packed() | {"value": f32(1, T + 1, 3)}
    for batch in (1, 3):
        yield "state must have a row for each sequence of cu_seqlens [B+1], B=2", packed() | {"state": _state(batch)}


def wrong_positions():
    """(words, scope, positions of a state of B rows)."""
    for cfg in (CFG, SHARED):
        yield "state.position must hold numbers of at least 0", cfg, [-1] * B
    yield "state.position must hold numbers of at least 0", CFG, [3, -1]
    yield "state.position must be the same in all rows", SHARED, [0, 3]


def wrong_arrays(width):
    """Wrong ranks, widths, batches, times and dtypes of a ``[B, T, width]`` array; width 0 stands for ``[B, T]``."""
    tail = (width,) if width else ()
    yield from (f32(B, *tail), f32(B, T, *tail, 1), f32(B + 1, T, *tail), f32(B, T + 1, *tail), f32(1, T, *tail))
    yield from (np.zeros((B, T, *tail), dtype) for dtype in ("int64", "bool", "complex64"))
    if width:
        yield from (f32(B, T, width + 1), f32(B, T, 1), f32(B, T, 0))


def wrong_flags():
    yield from (np.ones(shape, bool) for shape in [(B,), (B, T, 1), (B + 1, T), (B, T + 1), (1, T), (T, B)])
    yield from (np.ones((B, T), dtype) for dtype in ("float32", "int64", "uint8"))


def wrong_calls():
    """(function, argument, bad value, words the message must hold)."""
    for function in ("apply", "lookup", "chunk_update"):
        for query in (f32(B, 8), f32(B, T, 7), f32(B, T, 9), f32(B, T, 2, 4), np.zeros((B, T, 8), int)):
            yield function, "query", query, "query"
        yield function, "query", f32(0, T, 8), "query"
        yield from ((function, "query", bad, "query") for bad in (*NOT_ARRAYS, None))
        yield function, "cfg", {"key_dim": 4}, "cfg"
    flags = (*wrong_flags(), *NOT_ARRAYS)
    for function, name in (("apply", "value"), ("chunk_update", "target")):
        yield from ((function, name, array, name) for array in (*wrong_arrays(3), None, *NOT_ARRAYS))
        yield from ((function, "gate", gate, "gate") for gate in (*wrong_arrays(0), *NOT_ARRAYS))
        yield from ((function, "mask", mask, "mask") for mask in flags)
    yield from (("chunk_update", "pair", pair, "pair") for pair in flags)
    for function in ("apply", "flush"):
        for words, state in wrong_states():
            yield function, "state", state, words
    yield "apply", "state", _state(3), "state must have a row for each of the batch, B=2"
    yield from (("apply", "update", flag, "update must be True or False") for flag in NO_FLAGS)
    for function in ("nbytes", "detach"):
        yield from ((function, "state", bad, "state must be a fwpkm.State") for bad in (_memory(B), None, "a text"))
    yield from (
        ("init_memory", "seed", bad, "seed must be an integer of at least 0") for bad in (-1, 0.5, "a", None, True)
    )
    for function in ("lookup", "chunk_update", "init_state"):
        for words, memory in wrong_memories():
            yield function, "memory", memory, words
    for function in ("lookup", "chunk_update"):
        for memories in (1, 3):
            yield function, "memory", _memory(memories), "memory.keys"
    yield "init_state", "memory", _memory(3), "memory"
    for size in (0, -1, 1.5, "2", None, True):
        yield "init_state", "batch_size", size, "batch_size"
        yield "init_memory", "memories", size, "memories"
    beyond, no_rows = ([2], [-1], [0, 5]), ([0.5], ["a"], [[0, 1]], np.array([True]), np.ones((2, 2), bool), "a text")
    repeated = ([0, 0], [1, 0, 1])
    yield from (("reset", "rows", rows, "rows") for rows in (*beyond, *repeated, *no_rows))
    yield from (("flush", "rows", rows, "rows") for rows in (*beyond, *repeated, *no_rows))
    yield from (("select", "rows", rows, "rows") for rows in (*beyond, *no_rows, [], np.zeros(B, bool)))
    yield from (("put", "rows", rows, "rows") for rows in (*beyond, *repeated, *no_rows))
    for rows in ([], np.zeros(B, bool)):
        yield "put", "rows", rows, "rows must name the 1 rows"
    for rows in (None, [0, 1], np.ones(B, bool)):
        yield "put", "rows", rows, "other must have a row for each of rows"
    for function in ("reset", "select", "put", "pending"):
        for words, state in wrong_states():
            yield function, "state", state, words
    for words, state in wrong_states():
        yield "put", "other", state, f"other: {words}"
        yield "concat", "states", [_state(B), state], f"states[1]: {words}"
    for states in ([], _state(B), None, "a text"):
        yield "concat", "states", states, "states"
    yield "put", "other", _wider(_state(1)), "other must have tables of dtype float32"
    yield "concat", "states", [_state(B), _wider(_state(1))], "states[1] must have tables of dtype float32"
    yield "reset", "memory", _memory(3), "memory must hold 1 or 2 tables"
    wide = Memory(*(table.astype(np.float64) for table in _memory(1)))
    yield "reset", "memory", wide, "memory must have tables of dtype float32"
    for words, memory in wrong_memories():
        yield "reset", "memory", memory, words
    for function in ("concat", "put"):
        yield function, "cfg", SHARED, f"{function} needs memory_scope='sequence'"


def _wider(state):
    return state.map(lambda x: x.astype("float64") if x.dtype == "float32" else x)


def _memory(memories):
    return Memory(f32(memories, 2, 2, 4, 2), f32(memories, 16, 3))


def _state(batch):
    return reference.init_state(CFG, _memory(batch), batch_size=batch)


def wrong_memories():
    """Each table with each axis too long by one, of another rank, dtype or kind; and tables that do not match."""
    good = _memory(B)
    for name in Memory._fields:
        shape = getattr(good, name).shape
        for axis in range(1, len(shape)):
            longer = f32(*(n + (i == axis) for i, n in enumerate(shape)))
            yield f"memory.{name}", good._replace(**{name: longer})
        yield f"memory.{name}", good._replace(**{name: f32(*shape[1:])})
        yield f"memory.{name}", good._replace(**{name: np.zeros(shape, int)})
        yield f"memory.{name}", good._replace(**{name: "a text"})
    yield "memory.values", good._replace(values=f32(B + 1, 16, 3))
    yield "memory.keys and memory.values must have one dtype", good._replace(values=np.zeros((B, 16, 3)))
    yield (
        "memory.keys and memory.values must be float32 or float64",
        Memory(*(table.astype(np.float16) for table in good)),
    )
    yield "memory", "a text"
    yield "memory", None


def wrong_states():
    """Each field with each axis too long by one, and of another dtype or kind."""
    good = _state(B)
    for name, array in good.arrays().items():
        if name.startswith("memory."):
            continue
        for axis in range(array.ndim):
            if name == "position" and axis == 0:
                continue  # another batch size: the other fields are then at odds with it, below
            longer = np.zeros([n + (i == axis) for i, n in enumerate(array.shape)], array.dtype)
            yield f"state.{name}", good._replace(**{name: longer})
        yield f"state.{name}", good._replace(**{name: array[0]})
        yield f"state.{name}", good._replace(**{name: array.astype("int64" if name != "pending_mask" else "uint8")})
        yield f"state.{name}", good._replace(**{name: "a text"})
    for name in ("query", "value", "gate"):  # the tables are float32
        array = getattr(good, f"pending_{name}")
        for dtype in (np.float16, np.float64):
            yield (
                f"state.pending_{name} must have the tables' dtype",
                good._replace(**{f"pending_{name}": array.astype(dtype)}),
            )
    for uses in (f32(B, 16), "a text"):
        yield "state.uses must be (), since usage_weight is 0.0", good._replace(uses=uses)
    yield "", good._replace(position=np.zeros(B + 1, np.int32))  # which of them is wrong, nobody can say
    for words, memory in wrong_memories():
        yield words, good._replace(memory=memory)
    yield "memory", good._replace(memory=_memory(B + 1))
    yield "state", "a text"
    yield "state", None
    yield "state", tuple(good)


CALLS = list(wrong_calls())


def call(be, function, given):
    def as_native(name, x):
        if name == "rows":  # as a caller names them
            return x
        return [as_native("", each) for each in x] if isinstance(x, list) else native(be, x)

    return getattr(be, function)(**{name: as_native(name, x) for name, x in given.items()})


def message(be, function, given):
    with pytest.raises(ValueError, match="Received: ") as caught:
        call(be, function, given)
    assert type(caught.value) is ValueError
    return str(caught.value)


def plain(text):
    """A message without the backend's own names of an array; JAX takes two kinds."""
    native_type = r"\b(( or )?((numpy|torch|tensorflow|jax)\.)?\b(ndarray|EagerTensor|Tensor|ArrayImpl|Array)\b)+"
    return re.sub(native_type, "ARRAY", text).replace("torch.", "")


CHECKED = ("apply", "flush", "lookup", "chunk_update", "init_state", "init_memory")
OF_ROWS = ("reset", "select", "concat", "put", "pending", "nbytes", "detach")


@pytest.mark.parametrize("function", [*CHECKED, *OF_ROWS])
def test_the_arguments_are_good_but_for_what_is_tried(be, function):
    call(be, function, arguments(function))
    call(be, "apply", packed())


@pytest.mark.parametrize(
    ("function", "argument", "bad", "words"), CALLS, ids=[f"{i}-{c[0]}-{c[1]}" for i, c in enumerate(CALLS)]
)
def test_a_bad_argument_is_named(be, function, argument, bad, words):
    """What was expected stands before "Received:", what came after it; and all backends say the same."""
    given = arguments(function) | {argument: bad}
    text = message(be, function, given)
    assert words in text.partition("Received: ")[0]
    assert text.partition("Received: ")[2]
    assert plain(text) == plain(message(reference, function, given))


@pytest.mark.parametrize(("words", "given"), list(wrong_packing()))
def test_bad_packing_is_named(be, words, given):
    text = message(be, "apply", given)
    assert words in text.partition("Received: ")[0]
    assert plain(text) == plain(message(reference, "apply", given))


@pytest.mark.parametrize(("words", "cfg", "positions"), list(wrong_positions()))
def test_positions_that_a_scope_forbids(be, words, cfg, positions):
    state = reference.init_state(cfg, _memory(1), B)._replace(position=np.array(positions, np.int32))
    given = {"cfg": cfg, "state": state}
    for function, others in (("apply", {"query": f32(B, T, 8), "value": f32(B, T, 3)}), ("flush", {}), ("pending", {})):
        text = message(be, function, given | others)
        assert words in text.partition("Received: ")[0]
        assert plain(text) == plain(message(reference, function, given | others))


@pytest.mark.parametrize("rows", [[0], [1], [True, False]])
def test_one_row_of_a_shared_table_cannot_be_reset_or_flushed(be, rows):
    memory = native(be, _memory(1))
    state = be.init_state(SHARED, memory, batch_size=B)
    for function, others in (("reset", {"memory": memory}), ("flush", {})):
        with pytest.raises(ValueError, match=r"rows .*Received: "):
            getattr(be, function)(SHARED, state, rows=rows, **others)


@pytest.mark.parametrize("scope", ["lookup", "init_state"])
def test_a_shared_memory_holds_one_table(be, scope):
    assert "memory" in message(be, scope, arguments(scope) | {"memory": _memory(B), "cfg": SHARED})


@pytest.mark.eager
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("argument", "bad"), [("mask", f32(B, T)), ("gate", f32(B, T + 1)), ("value", f32(B, T, 2))])
def test_after_an_error_the_arguments_are_as_they_were(be, argument, bad, inplace):
    rng = np.random.default_rng(0)
    given = arguments("apply")
    memory = Memory(*(rng.normal(size=table.shape).astype(np.float32) for table in _memory(B)))
    state = be.init_state(CFG, native(be, memory), batch_size=B)
    query, value = (be.asarray(rng.normal(size=(B, T, n)), "float32") for n in (8, 3))
    _, state, _ = be.apply(CFG, state, query, value)
    before = as_numpy(be, (state, (query, value)))
    tokens = {"query": query, "value": value, "gate": native(be, given["gate"]), "mask": native(be, given["mask"])}
    with pytest.raises(ValueError, match=argument):
        be.apply(CFG, state, **(tokens | {argument: native(be, bad)}), inplace=inplace)
    assert_same_bits(as_numpy(be, (state, (query, value))), before)


def test_a_lookup_of_no_tokens_is_empty(be):
    cfg = FwPKMConfig(4, 3, 2, 4, 2, 3, 1)
    look = be.lookup(cfg, be.init_memory(cfg, 2), be.asarray(np.zeros((2, 0, 8)), "float32"))
    assert [tuple(part.shape) for part in look] == [(2, 0, 3), (2, 0, 4), (2, 0, 4)]


@pytest.mark.parametrize("call", ["save", "load", "save_state", "load_state"])
def test_files_of_what_is_no_layer_and_no_state(be, tmp_path, call):
    cfg = FwPKMConfig(4, 3, 1, 4, 2, 3, 1)
    state = be.init_state(cfg, be.init_memory(cfg), 1)
    arguments, message = {
        "save": ((state,), "layer must be an FwPKM layer"),
        "load": ((None,), "layer must be an FwPKM layer"),
        "save_state": ((state.memory, cfg), "state must be a fwpkm.State, as init_state returns. Received: Memory"),
        "load_state": ((None, be), "cfg must be an FwPKMConfig. Received: NoneType"),
    }[call]
    with pytest.raises(ValueError, match=message):
        getattr(fwpkm, call)(tmp_path / "file", *arguments)
    assert not list(tmp_path.iterdir())
