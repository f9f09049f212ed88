"""Batches of unequal lengths (SPEC.md §5, §8): padded, packed or streamed, each sequence is what it is alone."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops
from keras_suite.layers import HIDDEN, SMALL, gradients, inputs, make, numpy

from fwpkm import agreement
from fwpkm.backends.keras import FwPKM, as_state, native
from fwpkm.backends.keras.layout import NAMES

BOUNDS = agreement.BOUNDS["float64"]
WAIT = {"boundary": "wait", "lookahead": 2}
T = 20
LEFT, BETWEEN = [False] * 7 + [True] * 13, [True] * 3 + [False] * 2 + [True] * 6 + [False] + [True] * 4 + [False] * 4
MASK = np.array([LEFT, BETWEEN, [False] * T])
# Runs that touch, ids that come again, padding between, runs that read what they wrote and runs that do not.
IDS = np.array([[1] * 8 + [2] * 4 + [0] + [1] * 7, [0] * 2 + [2] + [1] + [5] * 5 + [-1] * 4 + [3] * 7])
IDS_MASK = np.ones((2, T), bool)
IDS_MASK[0, 3] = IDS_MASK[1, 8] = False


def sequences(ids, there):
    """Every sequence as its row and the places of its tokens."""
    for b, row in enumerate(ids):
        cuts = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
        for start, stop in itertools.pairwise(cuts):
            own = start + np.flatnonzero(there[b, start:stop])
            if row[start] and own.size:
                yield b, own


def check_each_alone(layer, x, ids, there, **options):
    """Outputs and gradients are those of every sequence in a call of its own, and padding has none."""
    y, cotangent = numpy(layer(x, **options)), np.random.default_rng(3).normal(size=x.shape)
    found, expected = gradients(layer, x, cotangent, **options), {}
    outputs, d_x = np.zeros_like(y), np.zeros_like(x)
    for b, own in sequences(ids, there):
        alone = x[b : b + 1, own]
        outputs[b, own] = numpy(layer(alone))[0]
        for name, gradient in gradients(layer, alone, cotangent[b : b + 1, own]).items():
            if name == "x":
                d_x[b, own] = gradient[0]
            else:
                expected[name] = expected.get(name, 0) + gradient
    np.testing.assert_array_equal(np.isnan(y), np.isnan(outputs))
    gone = ~there | (ids == 0)
    assert (y[gone] == 0).all()
    assert (found["x"][gone] == 0).all()
    assert agreement.relative_error(np.nan_to_num(y), np.nan_to_num(outputs)) < BOUNDS.forward
    for name, gradient in {**expected, "x": d_x}.items():
        assert agreement.relative_error(found[name], gradient) < BOUNDS.gradient, name


def spoiled(there):
    """Inputs whose padding holds what no arithmetic survives, and one token that is there but not finite."""
    x = inputs(T, len(there), "float64")
    x[~there] = np.random.default_rng(4).choice([np.nan, np.inf, 1e300], size=x.shape)[~there]
    x[1, 6, 1] = np.nan
    return x


@pytest.mark.parametrize("options", [{}, WAIT], ids=str)
def test_a_padded_batch_is_each_row_alone(options):
    layer = make(dtype="float64", learn_memory=True, **options)
    check_each_alone(layer, spoiled(MASK), np.ones((3, T), int), MASK, mask=MASK)


@pytest.mark.parametrize(("options", "mask"), [({}, None), (WAIT, IDS_MASK)], ids=["drop", "wait, masked"])
def test_packed_sequences_are_separate_calls(options, mask):
    layer = make(dtype="float64", learn_memory=True, **options)
    there = np.ones(IDS.shape, bool) if mask is None else mask
    check_each_alone(layer, spoiled(there & (IDS != 0)), IDS, there, segment_ids=IDS, mask=mask)


def test_packed_sequences_need_few_tables(monkeypatch):
    """At most a row's T // (C + lag + 1), however many sequences it holds; a call that only reads needs none."""
    calls, apply = [], native.apply

    def spy(*args, cu_seqlens=None, **options):
        calls.append(0 if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        return apply(*args, cu_seqlens=cu_seqlens, **options)

    monkeypatch.setattr(native, "apply", spy)
    layer, x = make(), inputs(T, 2)
    ids = np.array([[1] * 5 + list(range(2, 17)), [1] * 5 + [2] * 4 + [3] * 11])  # C is 4: only more than 4 tokens
    layer(x, segment_ids=ids)
    assert max(calls) <= 2 * T // 5
    calls.clear()
    frozen = layer(x, segment_ids=ids, update=False)
    assert calls == [0]
    np.testing.assert_array_equal(numpy(frozen)[:, :4], numpy(layer(x, segment_ids=ids))[:, :4])
    calls.clear()
    layer(x[:, :4], segment_ids=ids[:, :4])
    assert calls == [0]


def test_what_does_not_fit_segment_ids():
    x, ids = inputs(T), np.ones((4, T), int)
    for layer, message in (
        (make(return_state=True), "segment_ids must be None beside a state.*with return_state=True"),
        (make(batch=4, stateful=True), "segment_ids must be None beside a state.*stateful=True"),
        (make(memory_scope="batch"), "segment_ids must be None where one memory serves all rows"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, segment_ids=ids)
        with pytest.raises(ValueError, match=message):
            layer(keras.Input((T, HIDDEN), batch_size=4), segment_ids=keras.Input((T,), batch_size=4, dtype="int32"))
    _, *state = make(return_state=True)(x)
    with pytest.raises(ValueError, match=r"segment_ids must be None beside a state.*initial_state given"):
        make()(x, segment_ids=ids, initial_state=state)
    with pytest.raises(ValueError, match=r"segment_ids must have shape \[B=4, T=20\]. Received: shape \(4, 19\)"):
        make()(x, segment_ids=ids[:, 1:])
    with pytest.raises(ValueError, match=r"segment_ids must have an integer dtype\. Received: dtype float32"):
        make()(x, segment_ids=ids.astype("float32"))
    for far in (2**32, -(2**31) - 1):
        with pytest.raises(ValueError, match=rf"segment_ids must fit into int32.*Received: ids from .*{far}"):
            make()(x, segment_ids=np.where(ids == ids[0, 0], far, 0))
    with pytest.raises(ValueError, match=r"segment_ids must have shape \[B, T\]. Received: lists of unequal lengths"):
        make()(x, segment_ids=[[1, 2], [1]])


def test_segment_ids_may_be_lists_and_positional():
    layer, x = make(), inputs(T, 2)
    expected = numpy(layer(x, segment_ids=IDS))
    np.testing.assert_array_equal(numpy(layer(x, segment_ids=IDS.tolist())), expected)
    np.testing.assert_array_equal(numpy(layer(x, None, IDS.tolist())), expected)


def test_a_mask_of_numbers_that_are_no_flags_is_refused():
    """An additive mask, 0 where a token is there, would mean the opposite."""
    layer, x, there = make(), inputs(T, 2), MASK[:2]
    with pytest.raises(ValueError, match=r"mask must have dtype bool. Received: dtype float32"):
        layer(x, mask=np.where(there, 0, -1e9).astype("float32"))
    np.testing.assert_array_equal(numpy(layer(x, mask=there.astype("int32"))), numpy(layer(x, mask=there)))


@pytest.mark.parametrize("options", [{}, WAIT], ids=str)
def test_rows_go_on_from_where_each_of_them_stands(options):
    """Padded pieces of a stream, by states that are passed and by states that are kept, equal each row in one call."""
    layer, x = make(dtype="float64", return_state=True, **options), spoiled(MASK)
    keeping = make(batch=3, dtype="float64", stateful=True, **options)
    state, outputs, kept = None, [], []
    for start, stop in itertools.pairwise([0, 6, 7, 15, T]):
        piece, mask = x[:, start:stop], MASK[:, start:stop]
        y, *state = layer(piece, mask=mask, initial_state=state)
        outputs.append(numpy(y))
        kept.append(numpy(keeping(piece, mask=mask)))
    outputs = np.concatenate(outputs, axis=1)
    np.testing.assert_array_equal(np.concatenate(kept, axis=1), outputs)
    assert numpy(as_state(state).position).tolist() == MASK.sum(axis=1).tolist()
    for b, own in enumerate(MASK):
        if own.any():
            y, *alone = layer(x[b : b + 1, own])
            assert agreement.relative_error(np.nan_to_num(outputs[b, own]), np.nan_to_num(numpy(y)[0])) < BOUNDS.forward
            for name, array, wanted in zip(NAMES[:-1], state, alone, strict=True):
                assert agreement.relative_error(numpy(array)[b], numpy(wanted)[0]) < BOUNDS.forward, name
    keeping.reset_state()
    assert numpy(keeping.state.position).tolist() == [0] * 3
    np.testing.assert_array_equal(numpy(keeping(x[:, :6], mask=MASK[:, :6])), kept[0])


def test_the_mask_of_an_embedding_pads_anywhere():
    tokens = np.array([[0, 0, 3, 1, 2, 1, 4, 2], [3, 1, 2, 1, 4, 2, 0, 0], [3, 0, 1, 2, 1, 4, 0, 2]])
    embedding, layer = keras.layers.Embedding(5, HIDDEN, mask_zero=True), make()
    y = numpy(layer(embedding(tokens)))
    for row, words in zip(y, tokens):
        np.testing.assert_allclose(row[words != 0], y[0, 2:], rtol=1e-5, atol=1e-6)
        assert (row[words == 0] == 0).all()


def test_shapes_of_packed_calls_are_known_without_running():
    y = FwPKM(**SMALL)(keras.Input((None, HIDDEN)), segment_ids=keras.Input((None,), dtype="int32"))
    assert tuple(y.shape) == (None, None, HIDDEN)


def test_integer_ids_of_every_width():
    layer, x = make(), inputs(T, 2)
    expected = numpy(layer(x, segment_ids=IDS))
    for dtype in ("int8", "int32", "int64"):
        np.testing.assert_array_equal(numpy(layer(x, segment_ids=ops.convert_to_tensor(IDS, dtype))), expected)
