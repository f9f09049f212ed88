"""What tests of the kernels share: where they run, and when two results are the same."""

import importlib

import pytest
import torch
from torch import Tensor

from fwpkm.agreement import BOUNDS, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"key_dim": 16, "value_dim": 16, "num_subkeys": 5, "top_k": 3, "chunk_size": 4}


def interpreted():
    """A fixture for a module: kernels choose when they are defined, so before any of them is imported."""

    @pytest.fixture(scope="module", autouse=True)
    def _interpreter():
        with pytest.MonkeyPatch.context() as patch:
            if DEVICE == "cpu":
                patch.setenv("TRITON_INTERPRET", "1")
            importlib.import_module("fwpkm.kernels.reverse")
            yield

    return _interpreter


def same_or_close(received: Tensor, expected: Tensor) -> None:
    """NaN in the same places, and a relative error within float32's bound."""
    received, expected = (x.detach().double().cpu().numpy() for x in (received, expected))
    assert relative_error(received, expected) < BOUNDS["float32"].forward
