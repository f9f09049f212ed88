"""These tests run under one KERAS_BACKEND, in a process of their own: tests/test_keras.py starts them."""

import os

import hypothesis
import pytest

import fwpkm

collect_ignore_glob = [] if "KERAS_BACKEND" in os.environ else ["*"]

# TensorFlow takes a second for an example that others do in milliseconds; `fwpkm conform keras-tensorflow` draws more.
hypothesis.settings.register_profile("few", hypothesis.settings.get_profile("default"), max_examples=4)
if "HYPOTHESIS_PROFILE" not in os.environ:
    hypothesis.settings.load_profile("few")


def pytest_configure(config):
    """Keras asks NumPy 2 for a copy in the words of NumPy 1."""
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(scope="session")
def be():
    """The functions that Keras runs on, for the tests of all backends."""
    return fwpkm.get_backend("keras")


def pytest_collection_modifyitems(config, items):
    """No inplace where there is none: tensorflow's arrays cannot be overwritten."""
    gone = [item for item in items if "inplace" in item.name or "inplace" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if item not in gone]
