"""No input makes the tables non-finite, and none but the affected token reads NaN (SPEC.md §4, §5)."""

import dataclasses

import numpy as np
import pytest
from asserting import assert_same_bits
from drawn import drawn, masked_tick, row_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from fwpkm import FwPKMConfig, Memory
from fwpkm.conformance.running import apply, as_numpy, native, read, start, stream
from fwpkm.conformance.strategies import FLOATS, LEFT_OUT, Case, cases, floating, unmasked
from fwpkm.tokens import Tokens

NUMBERS = [np.nan, np.inf, -np.inf, 1e20, -1e20, 1e38, 3e38, -3e38]
PLACES = ("query", "value", "gate")
WITH_GATE = LEFT_OUT.map(lambda names: names - {"gate"})


def is_dead(cfg, dtype, place, number):
    """Whether a token with one such number among small ones is not finite, or has scores that are not.

    An idw score squares a query: in float32 it overflows from 2e19 on. A dot product with keys below 1 does not.
    """
    if not np.isfinite(number):
        return True
    return place == "query" and cfg.score == "idw" and dtype == "float32"


def spoilt(case, place, number, row, token, column):
    tokens = case.tokens._replace(**{place: getattr(case.tokens, place).copy()})
    array = getattr(tokens, place)
    array[(row, token, column % array.shape[2]) if array.ndim == 3 else (row, token)] = number
    return dataclasses.replace(case, tokens=tokens)


def draw_place(data, case):
    row, token = data.draw(st.integers(0, case.batch - 1)), data.draw(st.integers(0, case.length - 1))
    return row, token, data.draw(st.integers(0, 35))


@settings(max_examples=5 * settings.default.max_examples)
@given(
    cases(dtype=FLOATS, left_out=WITH_GATE, twists=("at_keys", "repeats"), temperature=st.sampled_from([1.0, 2.0])),
    st.sampled_from(PLACES),
    st.sampled_from(NUMBERS),
    st.data(),
)
def test_a_dead_token_takes_its_tick_and_reads_nan(be, case, place, number, data):
    """Others' outputs, the losses and the tables keep the very bits that masked zeros on its tick would give."""
    row, token, column = draw_place(data, case)
    bad = spoilt(case, place, number, row, token, column)
    received = read(be, bad)
    others = np.ones((case.batch, case.length), bool)
    if not unmasked(case.tokens)[row, token]:
        assert_same_bits(received, read(be, case))
    elif is_dead(case.cfg, case.dtype, place, number):
        others[row, token] = False
        assert np.isnan(received.output[row, token]).all()
        assert np.isnan(received.weights[row, token]).all()
        if case.cfg.memory_scope == "sequence":
            token, row, bad = int(unmasked(case.tokens)[row, :token].sum()), 0, row_alone(bad, row)
        assert_same_bits(*(without_token(read(be, x), row, token) for x in (bad, masked_tick(bad, row, token))))
    assert np.isfinite(received.output[others]).all()
    assert np.isfinite(received.weights[others]).all()
    assert received.slots.min() >= 0
    assert received.slots.max() < case.cfg.num_slots
    assert all(np.isfinite(table).all() for table in received.memory)


def without_token(reading, row, token):
    """A reading with zeros for what one token read."""
    fields = {name: getattr(reading, name).copy() for name in ("output", "slots", "weights")}
    for x in fields.values():
        x[row, token] = 0
    return reading._replace(**fields)


@given(cases(dtype=FLOATS, left_out=WITH_GATE), st.data())
def test_many_bad_numbers_at_once_leave_the_tables_finite(be, case, data):
    """Ties and huge numbers together can move the keys far; then later scores overflow, and those tokens read NaN."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    numbers = data.draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=4))
    tokens = case.tokens.map(np.copy)
    for array in floating(tokens).values():
        array[rng.uniform(size=array.shape) < 0.2] = rng.choice(numbers)
    received = read(be, dataclasses.replace(case, tokens=tokens), [case.length // 2, case.length - case.length // 2])
    assert all(np.isfinite(table).all() for table in received.memory)
    dead = np.isnan(received.weights).any(-1)
    np.testing.assert_array_equal(np.isnan(received.weights).all(-1), dead)
    assert np.isnan(received.output[dead]).all()
    assert np.isfinite(received.output[~dead]).all()
    assert received.slots.min() >= 0
    assert received.slots.max() < case.cfg.num_slots


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_keys_stay_finite_when_their_step_overflows(be, dtype):
    """dot_product: ∂s/∂K = q. Two tokens tie between keys 0 and 1 and 1 and 2, so no softmax hides the huge query."""
    cfg = FwPKMConfig(2, 1, 1, 3, 2, 4, 0, score="dot_product", addressing_weight=1e4)
    largest = float(np.finfo(dtype).max) / 4
    keys = np.array([0.0, 0.0, -1.0], dtype)
    memory = Memory(np.tile(keys[:, None], (1, 1, 2, 1, 1)), np.ones((1, 9, 1), dtype))
    query = np.array([[[largest, 1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]]], dtype)
    case = Case(cfg, 0, dtype, frozenset(), 1, 4, memory, Tokens(query, np.zeros((1, 4, 1), dtype), None, None))
    received = read(be, case)
    assert all(np.isfinite(table).all() for table in received.memory)
    moved = (received.memory.keys != memory.keys).any(axis=-1)[0, 0]
    assert not moved[0, :2].any(), "the step of these two would overflow"
    assert moved[1].any()


@pytest.mark.parametrize("place", ["target", "query", "gate"])
@pytest.mark.parametrize("number", NUMBERS)
def test_chunk_update_keeps_tables_finite(be, place, number):
    cfg = FwPKMConfig(4, 3, 2, 4, 2, 5, 0)
    case, written = drawn(cfg, 2, 5, dtype="float32", left_out=["mask"]), []
    arrays = dict(zip(("query", "target", "gate"), case.tokens))
    for each in (number, 0.0):
        arrays[place][0, 2] = each
        written.append(as_numpy(be, be.chunk_update(cfg, *native(be, (case.memory, *arrays.values()))))[0])
        assert all(np.isfinite(table).all() for table in written[-1])
    assert_same_bits(*(tuple(table[1] for table in memory) for memory in written))


@pytest.mark.parametrize("score", ["idw", "dot_product"])
def test_a_token_whose_scores_overflow_is_for_all_others_as_one_that_is_not_finite(be, score):
    """Its numbers are finite and its scores are not: it must not keep its chunk's keys or rows from moving."""
    cfg = FwPKMConfig(8, 3, 1, 5, 2, 4, 1, score=score, addressing_weight=0.3)
    case, huge = drawn(cfg, 2, 12, dtype="float32", left_out=["mask"]), np.float32(3e38)
    expected = read(be, spoilt(case, "value", np.nan, 0, 0, 0))
    case.tokens.query[0, 0] = huge * np.sign(case.memory.keys[0, 0, :, 0].ravel())
    received = read(be, case)
    assert np.isnan(received.output[0, 0]).all()
    assert_same_bits(received.output[0, 1:], expected.output[0, 1:])
    assert_same_bits(received.output[1], expected.output[1])
    assert_same_bits(received[3:], expected[3:])
    assert (received.memory.keys != case.memory.keys).any((1, 2, 3, 4)).all()


@pytest.mark.parametrize("write_scale", ["slots", "unit", "normalized"])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("score", ["idw", "dot_product"])
def test_a_hundred_rereads_stay_finite(be, write_scale, num_heads, score):
    """Under "slots" the rows may grow until a step would overflow; then they stay as they are."""
    cfg = FwPKMConfig(8, 3, num_heads, 4, 3, 4, 1, write_scale=write_scale, score=score)
    case = drawn(cfg, 2, 4, dtype="float32", left_out=["mask"])
    hundred = case.tokens.map(lambda array: np.concatenate([array] * 100, axis=1))
    output, state, trace = apply(be, cfg, start(be, case), hundred)
    assert trace.writes.tolist() == [100, 100]
    assert np.isfinite(output).all()
    assert all(np.isfinite(table).all() for table in as_numpy(be, state.memory))


def test_rereads_do_overflow_where_a_step_overshoots(be):
    """One slot, κ = 1: a gate of 3 doubles the error each time and flips its sign."""
    cfg = FwPKMConfig(2, 1, 1, 1, 1, 1, 0)
    memory = Memory(np.zeros((1, 1, 2, 1, 1), "float32"), np.ones((1, 1, 1), "float32"))
    tokens = Tokens(np.zeros((1, 1, 2), "float32"), np.zeros((1, 1, 1), "float32"), np.full((1, 1), 3, "float32"), None)
    case = Case(cfg, 0, "float32", frozenset(), 1, 1, memory, tokens)
    state, outputs = start(be, case), []
    for _ in range(140):
        reading, state = stream(be, cfg, state, tokens)
        outputs.append(reading.output.item())
    assert outputs[:127] == [(-2.0) ** n for n in range(127)]
    # 2^128 does not exist in float32: the row keeps 2^127.
    assert outputs[127:] == [-(2.0**127)] * 13
