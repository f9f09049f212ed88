"""The vectors (SPEC.md §6, §8): every number of every file, in one call and streamed; `-s` prints the worst errors."""

import collections
import dataclasses
import functools
import itertools
from pathlib import Path

import make_vectors
import numpy as np
import pytest
from asserting import assert_close
from hypothesis import settings

import fwpkm
from fwpkm import FwPKMConfig, Memory, agreement
from fwpkm.conformance.running import INPUTS, Reading, as_numpy, forward, joined_traces, native, start, stream
from fwpkm.conformance.strategies import Case
from fwpkm.tokens import Tokens

FOLDER = Path(__file__).parents[1] / "fwpkm_core" / "data" / "vectors"
_NAMES = """
    addressing10 base batch_nonfinite batch_scope clip_alpha dead_chunk decay_clip dot_heads dot_product eps heads
    heads_normalized heads_temperature larger lookahead0 lookahead2 mask mask_batch mask_heads mask_nonfinite masked_out
    no_addressing no_gate no_gate_mask nonfinite normalized packed packed_heads packed_mask packed_nonfinite
    packed_short packed_wait pad_left pad_left_wait pad_right short single state state_batch state_wait temperature
    ties top_k_all unit uses uses_packed wait wait0 wait2 wait_batch wait_flush wait_mask wait_nonfinite
"""
NAMES = _NAMES.split()
STATES = ["state", "state_batch", "state_wait", "uses"]
SPLITS = ("one call", "single tokens", "uneven")
FORWARD = [
    *itertools.product(["numpy"], ["float64"], SPLITS),
    *itertools.product(["torch"], ["float64", "float32"], SPLITS),
    # JAX compiles every length of a call, so each precision has the splits that tell most.
    *itertools.product(["jax"], ["float64"], ["one call", "single tokens"]),
    ("jax", "float32", "uneven"),
]
SOME = ["dot_heads", "nonfinite", "packed_wait", "wait_batch", "wait_mask"]
FEW = NAMES if settings.default.max_examples > 100 else SOME
"""Where ten seconds of compilation for a file would be too much; the deep profile reads them all."""
GRADIENTS = [
    *itertools.product(["torch"], ["float64", "float32"], ["one call", "uneven"], NAMES),
    *itertools.product(["jax"], ["float64"], ["one call"], NAMES),
    *itertools.product(["jax"], ["float32"], ["uneven"], FEW),
]
LOW_PRECISION = [*itertools.product(["torch"], NAMES), *itertools.product(["jax"], FEW)]


@dataclasses.dataclass(frozen=True)
class Vector:
    """One file: what is read, and all arrays by the file's names."""

    case: Case
    """Packed tokens as they are, [1, T, ...]; B is the number of sequences."""
    arrays: dict

    @property
    def ends(self):
        """``cu_seqlens`` [B+1], or None."""
        return self.arrays.get("cu_seqlens")

    @functools.cached_property
    def comparable(self):
        """How many time steps of a float32 run are compared (§6)."""
        case = self.case
        return agreement.comparable_tokens(case.cfg, case.memory, case.tokens, cu_seqlens=self.ends)


@functools.cache
def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    cfg = FwPKMConfig.from_json(str(arrays.pop("config")))
    memory, tokens = Memory(arrays["keys"], arrays["values"]), Tokens(*map(arrays.get, Tokens._fields))
    batch = len(arrays["cu_seqlens"]) - 1 if "cu_seqlens" in arrays else len(tokens.query)
    return Vector(Case(cfg, 0, "float64", frozenset(), batch, tokens.length, memory, tokens), arrays)


def sequences(be, vector, start_, stop):
    """What a call of these time steps says of its sequences."""
    return {} if vector.ends is None else {"cu_seqlens": native(be, np.clip(vector.ends - start_, 0, stop - start_))}


def calls(be, vector, case, sizes):
    """The tokens of each call, and where its sequences lie: a cut may fall anywhere in a packed row."""
    ends = np.cumsum([0, *sizes]).tolist()
    for start_, stop in itertools.pairwise(ends):
        yield case.tokens.slice(start_, stop), sequences(be, vector, start_, stop)


def read(be, vector, case, sizes):
    """Every call's output and trace as NumPy arrays, the state before the flush, and the state and trace after it."""
    state, outputs, traces = start(be, case), [], []
    for tokens, packed in calls(be, vector, case, sizes):
        output, state, trace = be.apply(case.cfg, state, **native(be, tokens).present(), **packed)
        outputs.append(as_numpy(be, output))
        traces.append(as_numpy(be, trace))
    flushed, trace = be.flush(case.cfg, state)
    reading = Reading(np.concatenate(outputs, 1), **joined_traces(traces), memory=as_numpy(be, flushed.memory))
    return reading, as_numpy(be, state), as_numpy(be, flushed), as_numpy(be, trace)


@pytest.fixture(scope="module")
def worst():
    """The largest error of each kind; printed at the end of this file."""
    errors = collections.defaultdict(lambda: (0.0, ""))
    yield errors
    for key, (error, name) in sorted(errors.items()):
        print(f"\n{' '.join(key):40} {error:.2e}  {name}", end="")
    print()


def judge(worst, key, name, actual, expected, dtype, kind="forward"):
    """Hold to the bound, and remember the error."""
    error = agreement.relative_error(actual, expected)
    worst[key] = max(worst[key], (error, name))
    assert_close(actual, expected, dtype, kind, " ".join(key))


def splits_of(length):
    """One call; single tokens; and an uneven split."""
    thirds = [length // 3, 0, 1, length - length // 3 - 1]
    return {"one call": [length], "single tokens": [1] * length, "uneven": thirds}


@pytest.mark.parametrize("name", make_vectors.VECTORS)
def test_the_command_makes_these(name):
    """All but the gradients, which take it minutes."""
    vector, made = load(name), make_vectors.made(name, gradients=False)
    assert FwPKMConfig.from_json(str(made.pop("config"))) == vector.case.cfg
    assert made.keys() == {field for field in vector.arrays if not field.startswith("grad_")}
    for field, x in made.items():
        assert_close(x, vector.arrays[field], "float64", name=field)


def test_no_vector_is_missing():
    assert sorted(path.stem for path in FOLDER.glob("*.npz")) == sorted(NAMES)


def same_slots(vector, slots):
    """Whether a run picked the vector's slots, where these have a meaning; by head, in any order."""
    cfg, arrays = vector.case.cfg, vector.arrays
    meaningful = np.isfinite(arrays["out_weights"]).all(-1)
    slots, expected = (agreement.by_slot(cfg, s, s)[0][meaningful] for s in (slots, arrays["out_slots"]))
    return np.array_equal(slots, expected)


@pytest.mark.parametrize(("backend", "dtype", "split"), FORWARD)
@pytest.mark.parametrize("name", NAMES)
def test_forward(name, backend, dtype, split, worst):
    be, vector = fwpkm.get_backend(backend), load(name)
    case, arrays = vector.case.map(lambda x: x.astype(dtype)), vector.arrays
    cfg, length = case.cfg, case.length
    reading, state, after, flushed = read(be, vector, case, splits_of(length)[split])

    # A float32 run may leave the vector's path in a chunk that holds a tie; before it, never.
    whole = dtype == "float64" or same_slots(vector, reading.slots)
    n = length if whole else vector.comparable
    finite = np.isfinite(arrays["out_weights"][:, :n]).all(-1)  # the slots of the others have no meaning
    slots, weights = agreement.by_slot(cfg, reading.slots[:, :n], reading.weights[:, :n])
    expected_slots, expected_weights = agreement.by_slot(cfg, arrays["out_slots"][:, :n], arrays["out_weights"][:, :n])
    np.testing.assert_array_equal(slots[finite], expected_slots[finite])
    assert np.isnan(reading.weights[:, :n][~finite]).all()
    assert reading.slots.min() >= 0
    assert reading.slots.max() < cfg.num_slots
    judge_forward = functools.partial(judge, worst, name=f"{name}, {split}", dtype=dtype)
    judge_forward((backend, dtype, "output"), actual=reading.output[:, :n], expected=arrays["out_output"][:, :n])
    judge_forward((backend, dtype, "weights"), actual=weights[finite], expected=expected_weights[finite])
    np.testing.assert_array_equal(reading.writes, arrays["out_writes"])
    np.testing.assert_array_equal(state.position, arrays["out_position"])
    np.testing.assert_array_equal(flushed.writes, arrays["flush_writes"])
    used = reading.writes.max()
    for loss in ("memorization", "addressing") if whole else ():
        expected = arrays[f"out_{loss}"]
        assert not expected[:, used:].any()
        judge_forward((backend, dtype, loss), actual=getattr(reading, loss), expected=expected[:, :used])
        judge_forward((backend, dtype, loss), actual=getattr(flushed, loss)[:, 0], expected=arrays[f"flush_{loss}"])
    for table in Memory._fields if whole else ():
        judge_forward((backend, dtype, table), actual=getattr(reading.memory, table), expected=arrays[f"out_{table}"])
    if whole:
        np.testing.assert_array_equal(after.maybe_uses, arrays.get("out_uses"))


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("name", STATES)
def test_states_in_mid_sequence(name, backend, worst):
    be, vector = fwpkm.get_backend(backend), load(name)
    tokens = vector.case.tokens.slice(0, int(vector.arrays["split"]))
    state = as_numpy(be, stream(be, vector.case.cfg, start(be, vector.case), tokens)[1])
    arrays = {field.removeprefix("memory."): x for field, x in state.arrays().items()}
    assert {f"mid_{field}" for field in arrays} == {name for name in vector.arrays if name.startswith("mid_")}
    for field, x in arrays.items():
        judge(worst, (backend, "float64", field), name, x, vector.arrays[f"mid_{field}"], "float64")


def run_with_gradients(be, vector, args, sizes, dtype):
    """Gradients of Σ output·cot_output + Σ final tables·cotangents, as NumPy arrays by the names of INPUTS.

    Args:
        be: the backend.
        vector: gives the configuration, the mask and the cotangents.
        args: native arrays by the names of INPUTS; no gate where the vector has none.
        sizes: of the calls.
        dtype: name of the dtype of the query, and so of the outputs.
    """

    packed = sequences(be, vector, 0, vector.case.length)

    def function(*tensors):
        return forward(be, vector.case, list(map(dict(zip(args, tensors)).get, INPUTS)), sizes, **packed)

    ends = np.cumsum(sizes).tolist()
    cotangents = [vector.arrays["cot_output"][:, end - size : end] for end, size in zip(ends, sizes)]
    cotangents = [be.asarray(cotangent, dtype) for cotangent in cotangents]
    for table in Memory._fields:
        cotangents.append(be.asarray(vector.arrays[f"cot_{table}"], "float64" if dtype == "float64" else "float32"))
    gradients = as_numpy(be, tuple(be.vjp(function, tuple(args.values()), tuple(cotangents))))
    return dict(zip(args, gradients))


def left_at_a_tie(be, vector, dtype):
    """Whether a float32 run leaves the vector's path, from a tie on: in the two files that hold one."""
    if dtype == "float64" or vector.comparable == vector.case.length:
        return False
    case = vector.case.map(lambda x: x.astype(dtype))
    return not same_slots(vector, read(be, vector, case, [case.length])[0].slots)


@pytest.mark.parametrize(("backend", "dtype", "split", "name"), GRADIENTS)
def test_gradients(name, backend, dtype, split, worst):
    be, vector = fwpkm.get_backend(backend), load(name)
    if left_at_a_tie(be, vector, dtype):
        return
    args = {key: be.asarray(vector.arrays[key], dtype) for key in INPUTS if key in vector.arrays}
    sizes = splits_of(vector.case.length)["one call" if vector.ends is not None else split]
    for key, gradient in run_with_gradients(be, vector, args, sizes, dtype).items():
        expected = vector.arrays[f"grad_{key}"]
        judge(worst, (backend, dtype, f"grad {key}"), f"{name}, {split}", gradient, expected, dtype, "gradient")


def in_float32(be, array):
    return None if array is None else be.asarray(as_numpy(be, array), "float32")


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize(("backend", "name"), LOW_PRECISION)
def test_low_precision_inputs(backend, name, low, worst):
    """Judged against a float32 run on the rounded inputs; the tables never see anything but float32."""
    be, vector = fwpkm.get_backend(backend), load(name)
    cfg, case = vector.case.cfg, vector.case.map(np.float32)
    *inputs, mask = vector.case.tokens
    mask, ends = native(be, (mask, vector.ends))
    rounded = [None if x is None else be.asarray(x, low) for x in inputs]
    runs = []
    for query, value, gate in (rounded, [in_float32(be, x) for x in rounded]):
        output, state, trace = be.apply(cfg, start(be, case), query, value, gate, mask, ends)
        assert output.dtype == query.dtype
        tables = be.flush(cfg, state)[0].memory
        runs.append((as_numpy(be, output).astype(np.float32), as_numpy(be, trace), as_numpy(be, tables)))
    (output, trace, tables), (expected_output, expected_trace, expected_tables) = runs
    judge(worst, (backend, low, "output"), name, output, expected_output, low)
    np.testing.assert_array_equal(trace.slots, expected_trace.slots)
    for field, actual, expected in (
        ("weights", trace.weights, expected_trace.weights),
        ("keys", tables.keys, expected_tables.keys),
        ("values", tables.values, expected_tables.values),
    ):
        assert actual.dtype == np.float32
        judge(worst, (backend, low, field), name, actual, expected, "float32")


@pytest.mark.parametrize(("backend", "name"), LOW_PRECISION)
def test_low_precision_gradients(backend, name, worst):
    """bfloat16 inputs: their gradients come back in bfloat16, those of the tables in float32."""
    be, vector = fwpkm.get_backend(backend), load(name)
    cotangent = as_numpy(be, be.asarray(vector.arrays["cot_output"], "bfloat16"))  # rounded once, for both runs
    vector = dataclasses.replace(vector, arrays=vector.arrays | {"cot_output": cotangent})
    precisions = {"query": "bfloat16", "value": "bfloat16", "gate": "bfloat16", "keys": "float32", "values": "float32"}
    args = {key: be.asarray(vector.arrays[key], precisions[key]) for key in INPUTS if key in vector.arrays}
    rounded = {key: in_float32(be, array) for key, array in args.items()}
    sizes = [vector.case.length]
    actual = run_with_gradients(be, vector, args, sizes, "bfloat16")
    expected = run_with_gradients(be, vector, rounded, sizes, "float32")
    for key, gradient in actual.items():
        judge(worst, (backend, "bfloat16", f"grad {key}"), name, gradient, expected[key], precisions[key], "gradient")
