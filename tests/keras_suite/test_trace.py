"""``return_trace`` of the Keras layer, eager and in a functional model."""

import keras
import numpy as np
import pytest
from keras_suite.layers import HIDDEN, SMALL, inputs, make
from traces import as_numpy, expected_trace, same_trace

import fwpkm
from fwpkm.agreement import BOUNDS
from fwpkm.backends.keras import FwPKM

BOUND = BOUNDS["float32"].forward


@pytest.mark.parametrize("options", [{"return_state": True}, {"gated": False}], ids=str)
def test_a_trace_is_the_references_with_the_gate(options):
    layer, x = make(learning_rate=0.1, **options), inputs(length=9, batch=3)
    mask = np.ones(x.shape[:2], bool)
    mask[0, :2] = mask[1, 5] = False
    x[2, 6, 1] = np.nan
    y, *state, trace = layer(x, mask=mask, return_trace=True)
    assert isinstance(trace, fwpkm.LayerTrace)
    assert len(state) == (7 if layer.return_state else 0)
    expected = expected_trace(layer.config, layer.export_tensors(), x, layer.gated, mask=mask)
    same_trace(trace, expected, BOUND)
    plain = layer(x, mask=mask)
    np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(a) for a in (y, plain[0] if state else plain)))
    summary = fwpkm.summarize(layer.config, trace)
    assert summary["chunks"] == 5
    assert summary["dead_tokens"] == 1


def test_a_functional_model_returns_it():
    x = keras.Input((None, HIDDEN))
    y, trace = FwPKM(**SMALL, gated=False)(x, return_trace=True)
    assert [len(array.shape) for array in trace] == [3, 3, 2, 2, 1, 2]
    model = keras.Model(x, [y, *trace])
    y, *arrays = model.predict(inputs(), verbose=0)
    for array, symbol in zip(arrays, trace):
        assert len(array.shape) == len(symbol.shape)
        assert keras.backend.standardize_dtype(array.dtype) == symbol.dtype
    assert as_numpy(fwpkm.LayerTrace(*arrays)).writes.tolist() == [2] * 4


def test_beside_segments_it_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="return_trace must be False beside segment_ids"):
        make()(inputs(), segment_ids=np.ones((4, 11), "int32"), return_trace=True)
