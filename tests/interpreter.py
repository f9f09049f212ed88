"""What tests of the kernels share: where they run, and when two results are the same."""

import torch
from torch import Tensor

from fwpkm.agreement import BOUNDS, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"key_dim": 16, "value_dim": 16, "num_subkeys": 5, "top_k": 3, "chunk_size": 4}


def same_or_close(received: Tensor, expected: Tensor) -> None:
    """NaN in the same places, and a relative error within float32's bound."""
    received, expected = (x.detach().double().cpu().numpy() for x in (received, expected))
    assert relative_error(received, expected) < BOUNDS["float32"].forward
