"""The properties again, for backends that compile: in a few shapes, with calls of three lengths, that all share.

A case is 2h tokens, read in one call, in halves, or in single tokens around a half; h cuts a chunk where it can be cut.
"""

import numpy as np
import pytest
import test_backends
import test_chunk_update
import test_finite
import test_lookup
import test_state
import test_stream
from asserting import assert_close, assert_same_reading
from hypothesis import given, settings
from hypothesis import strategies as st

import fwpkm
from fwpkm import reference
from fwpkm.conformance.drawing import draw, shapes
from fwpkm.conformance.running import as_numpy, draw_cotangents, gradients, native, start, stream
from fwpkm.conformance.strategies import FLOAT64, FLOATS, unmasked, untied_case

DEEP = settings.default.max_examples > 100
# Rows of the strata: both boundaries, scopes and scores, every κ, no lookahead, more of it, and chunks of one token.
ROWS = range(10) if DEEP else (0, 1, 2, 3, 8, 9)
SHAPES = [draw(shapes(), 0)[row]._replace(batch=2) for row in ROWS]
SEQUENCE = [shape for shape in SHAPES if shape.cfg.memory_scope == "sequence"]
MASKED, GATED = ([shape for shape in SHAPES if name not in shape.left_out] for name in ("mask", "gate"))
NUMBERS, PLACES = st.sampled_from(test_finite.NUMBERS), st.sampled_from(test_finite.PLACES)
PAIRS = test_chunk_update.PAIRS
TORCH = fwpkm.get_backend("torch")


@pytest.fixture(scope="session", params=["jax"])
def compiled_be(request):
    """Each backend that compiles for every shape."""
    return fwpkm.get_backend(request.param)


@st.composite
def cases(draw, among=SHAPES, dtype=FLOAT64, flushed=False, half=False, twists=("at_keys", "repeats")):
    """A case of one of the shapes; ``flushed`` after a half, or in ``half`` the length."""
    shape = draw(st.sampled_from(among))
    chosen = draw(st.frozensets(st.sampled_from(twists), max_size=1)) if twists else frozenset()
    length = shape.length // 2 if half else shape.length
    after = length // 2 if flushed and draw(st.booleans()) else None
    arguments = (draw(dtype), chosen, shape.batch, length, shape.left_out, after)
    return untied_case(shape.cfg, draw(st.integers(0, 2**32 - 1)), *arguments)


@st.composite
def calls(draw, length):
    """Sizes of calls, with a cut in the middle or, of single tokens, anywhere."""
    half = length // 2
    before = draw(st.integers(0, half))
    return draw(st.sampled_from([[length], [half, half], [1] * before + [half] + [1] * (half - before), [1] * length]))


@st.composite
def split_cases(draw, **options):
    case = draw(cases(**options))
    sizes = draw(calls(case.length))
    return (case, sizes if case.flush_after is None else [case.length // 2] * 2)


PROPERTIES = {
    test_backends.test_float64_equals_the_reference: [cases(flushed=True)],
    test_backends.test_float32_equals_the_float64_reference: [cases(flushed=True, dtype=st.just("float32"))],
    test_stream.test_any_split_equals_one_call: [split_cases(flushed=True), st.data()],
    test_stream.test_any_split_leaves_the_same_state: [split_cases(), st.data()],
    test_stream.test_contents_of_masked_tokens_change_nothing: [
        split_cases(among=MASKED, flushed=True),
        test_stream.OTHERS,
        st.booleans(),
    ],
    test_stream.test_permuted_rows_permute_results: [split_cases(among=SEQUENCE), st.randoms(use_true_random=False)],
    test_stream.test_a_row_keeps_its_bits_whatever_another_holds: [cases(among=SEQUENCE), test_stream.OTHERS],
    test_stream.test_no_later_token_changes_an_output: [cases(), st.data()],
    test_stream.test_a_memory_without_a_pair_keeps_its_bits: [
        cases(among=MASKED, twists=("masked_row", "masked_chunk"))
    ],
    test_stream.test_no_tokens_change_nothing: [cases(flushed=True), st.booleans()],
    test_stream.test_update_false_only_reads: [cases(half=True)],
    test_finite.test_a_dead_token_takes_its_tick_and_reads_nan: [
        *(cases(among=[shape for shape in GATED if shape in MASKED], dtype=FLOATS), PLACES, NUMBERS, st.data())
    ],
    test_finite.test_many_bad_numbers_at_once_leave_the_tables_finite: [cases(among=GATED, dtype=FLOATS), st.data()],
    test_lookup.test_slots_and_weights_are_those_of_all_slots_sorted: [cases(half=True)],
    test_lookup.test_output_is_the_weighted_sum_over_all_heads: [cases(half=True)],
    test_chunk_update.test_a_write_is_a_step_down_the_gradients_of_its_losses: [cases(half=True), PAIRS],
    test_chunk_update.test_slots_that_no_unmasked_token_reads_keep_their_bits: [cases(half=True), PAIRS],
    test_state.test_pending_tokens_come_first_then_zeros: [cases()],
    test_state.test_a_call_leaves_its_arguments_as_they_were: [cases(half=True), st.just(True)],
}
"""Properties of test_*.py, and what each is tried on."""


@settings(max_examples=max(10, settings.default.max_examples // 2))
@pytest.mark.parametrize(("tried", "strategies"), PROPERTIES.items(), ids=[tried.__name__ for tried in PROPERTIES])
@given(data=st.data())
def test_properties(compiled_be, tried, strategies, data):
    tried.hypothesis.inner_test(compiled_be, *(data.draw(strategy) for strategy in strategies))


@given(cases(), st.booleans())
def test_states_pass_from_one_backend_to_another(compiled_be, case, forth):
    """The first half in one, the second in the other."""
    half = case.length // 2
    first, second = (TORCH, compiled_be) if forth else (compiled_be, TORCH)
    expected, _ = stream(reference, case.cfg, start(reference, case), case.tokens)
    before, state = stream(first, case.cfg, start(first, case), case.tokens.slice(0, half))
    moved = native(second, as_numpy(first, state))
    after, _ = stream(second, case.cfg, moved, case.tokens.slice(half, None))
    assert_close(np.concatenate([before.output, after.output], axis=1), expected.output, case.dtype)
    assert_close(after.memory, expected.memory, case.dtype)


@given(cases(among=SEQUENCE, flushed=True), st.lists(st.booleans(), min_size=2, max_size=2))
def test_a_row_that_is_reset_reads_on_as_a_new_one(compiled_be, case, rows):
    be, half = compiled_be, case.length // 2
    first, second = case.tokens.slice(0, half), case.tokens.slice(half, None)
    chosen = np.array(rows)
    state = stream(be, case.cfg, start(be, case), first)[1]
    received, _ = stream(be, case.cfg, be.reset(case.cfg, state, native(be, case.memory), rows), second, flush=True)
    masked = first._replace(mask=unmasked(first) & ~chosen[:, None])
    state = stream(reference, case.cfg, start(reference, case), masked)[1]
    expected, _ = stream(reference, case.cfg, state, second, flush=True)
    assert_same_reading(case.cfg, received, expected, case.dtype)


@settings(max_examples=max(10, settings.default.max_examples // 2))
@given(cases(twists=("at_keys", "repeats", "masked_row", "masked_chunk")))
def test_gradients_equal_those_of_torch(compiled_be, case):
    """Through every write, and for some shapes through a state that is carried from one call to the next."""
    half = case.length // 2
    sizes = [half, half] if case.cfg.boundary == "wait" else [case.length]
    weights = draw_cotangents(case, np.random.default_rng(case.seed))
    expected = gradients(TORCH, case, weights, sizes)
    for received, wanted in zip(gradients(compiled_be, case, weights, sizes), expected):
        if wanted is not None:
            assert_close(received, wanted, case.dtype, "gradient")
