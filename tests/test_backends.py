"""Every backend against the reference, over drawn configurations (SPEC.md §6): one suite judges them all alike."""

import numpy as np
import pytest
from asserting import assert_close, assert_same_bits, assert_same_reading
from drawn import drawn
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fwpkm
from fwpkm import FwPKMConfig, Memory, reference
from fwpkm.conformance.judging import survives_rounding
from fwpkm.conformance.running import as_numpy, native, read, start, stream
from fwpkm.conformance.strategies import Case, cases, draw_memory, draw_tokens, is_untied, splits

OTHERS = ["torch"]
FUNCTIONS = """
    init_memory init_state apply flush lookup chunk_update detach reset pack unpack asarray to_numpy device_name
"""


@pytest.fixture(params=OTHERS, scope="module")
def other(request):
    """Each backend but the reference."""
    return fwpkm.get_backend(request.param)


@settings(max_examples=4 * settings.default.max_examples)
@given(cases(untied=True, flushed=True))
def test_float64_equals_the_reference(other, case):
    assert_same_reading(case.cfg, read(other, case), read(reference, case), "float64")


@settings(max_examples=4 * settings.default.max_examples)
@given(cases(untied=True, flushed=True, dtype=st.just("float32")))
def test_float32_equals_the_float64_reference(be, case):
    wide = case.widened()
    expected = read(reference, wide)
    assume(survives_rounding(wide, expected))
    assert_same_reading(case.cfg, read(be, case), expected, "float32")


@given(cases(untied=True), st.data())
def test_states_pass_from_one_backend_to_another(other, case, data):
    """Half a sequence in one, half in the other: the fields mean the same."""
    at = data.draw(st.integers(0, case.length))
    expected, _ = stream(reference, case.cfg, start(reference, case), case.tokens, [at, case.length - at])
    for first, second in ((reference, other), (other, reference)):
        before, state = stream(first, case.cfg, start(first, case), case.tokens.slice(0, at))
        moved = native(second, as_numpy(first, state))
        after, _ = stream(second, case.cfg, moved, case.tokens.slice(at, None), data.draw(splits(case.length - at)))
        assert_close(np.concatenate([before.output, after.output], axis=1), expected.output, case.dtype)
        assert_close(after.memory, expected.memory, case.dtype)


@pytest.mark.parametrize("num_subkeys", [17, 40])
@pytest.mark.parametrize(("score", "far"), [("idw", 0.0), ("idw", 30.0), ("dot_product", 0.0)])
def test_many_subkeys(be, num_subkeys, score, far):
    """More sub-keys than a shortlist holds, also far from the origin, where an expanded square loses its digits."""
    cfg = FwPKMConfig(8, 3, 2, num_subkeys, 3, 4, 1, score=score)
    case = untied_case(cfg, np.random.default_rng(num_subkeys), 11, far)
    assert_same_reading(cfg, read(be, case), read(reference, case.widened()), "float32")


def untied_case(cfg, rng, length, shift):
    """A float32 case of two rows, keys and queries moved by ``shift``, drawn until no read is close to a tie."""
    for _ in range(100):
        memory, tokens = draw_memory(rng, cfg, 2), draw_tokens(rng, cfg, 2, length)
        memory = Memory((memory.keys + shift).astype(np.float32), memory.values.astype(np.float32))
        tokens = tokens._replace(query=tokens.query + shift)
        tokens = tokens.map(lambda array: array if array.dtype == bool else array.astype(np.float32))
        case = Case(cfg, 0, "float32", frozenset(), 2, length, memory, tokens)
        if is_untied(case):
            return case
    pytest.fail("a hundred cases, all of them with ties")


def test_every_backend_has_the_same_functions(be):
    missing = [name for name in FUNCTIONS.split() if not callable(getattr(be, name, None))]
    assert not missing
    assert be is reference or callable(be.vjp)


def test_gate_and_mask_may_be_left_out(be):
    """None means 1 and True."""
    cfg = FwPKMConfig(4, 3, 1, 4, 2, 3, 1)
    case = drawn(cfg, 2, 8, left_out=["gate", "mask"])
    full = case.tokens._replace(gate=np.ones((2, 8)), mask=np.ones((2, 8), bool))
    runs = [stream(be, cfg, start(be, case), each, [5, 3], flush=True)[0] for each in (case.tokens, full)]
    assert_same_bits(*runs)
    query, value, *others = native(be, tuple(full))
    short, long = (as_numpy(be, be.apply(cfg, start(be, case), query, value, *given)[0]) for given in ((), others))
    assert_same_bits(short, long)


@pytest.mark.eager
@pytest.mark.parametrize("inplace", [False, True])
def test_arrays_may_be_views_of_larger_ones(be, inplace):
    """Strides are no part of a value: every second token of longer arrays, every second table of more tables."""
    cfg = FwPKMConfig(4, 3, 2, 4, 2, 3, 1)
    memory, tokens, runs = drawn(cfg, 4, 16).memory, drawn(cfg, 2, 16).tokens, []
    for cut_first in (True, False):

        def every_second(array, axis, cut_first=cut_first):
            index = (slice(None),) * axis + (slice(None, None, 2),)
            return native(be, np.ascontiguousarray(array[index])) if cut_first else native(be, array)[index]

        tables = Memory(*(every_second(table, 0) for table in memory))
        arrays = [every_second(array, 1) for array in tokens]
        look, (written, _) = be.lookup(cfg, tables, arrays[0]), be.chunk_update(cfg, tables, *arrays)
        state = be.init_state(cfg, tables, batch_size=2)._replace(memory=tables)
        output, state, trace = be.apply(cfg, state, *arrays, inplace=inplace)
        state, _ = be.flush(cfg, state, inplace=inplace)
        runs.append(as_numpy(be, (output, state.memory, trace.slots, tuple(look), written)))
    assert_same_bits(runs[0], runs[1])
