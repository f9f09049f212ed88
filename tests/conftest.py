"""Profiles, backends and the NaN that fresh memory holds, for every test."""

import os

import hypothesis
import pytest
from layer_files import CFG, FakeLayer, half_read_state

import fwpkm

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # the first call of an example may import or compile
    database=None,
    max_examples=30,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("deep", hypothesis.settings.get_profile("default"), max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

BACKENDS = ("numpy", "torch")
GRADIENT_BACKENDS = ("torch",)


@pytest.fixture(scope="session", params=BACKENDS)
def be(request):
    """Each backend's module. One that cannot be imported fails its tests: a skip would hide it."""
    return fwpkm.get_backend(request.param)


@pytest.fixture(scope="session", params=GRADIENT_BACKENDS)
def gradient_be(request):
    """Each backend that has ``vjp``."""
    return fwpkm.get_backend(request.param)


@pytest.fixture(scope="session", autouse=True)
def _torch_session():
    """One thread for tables this small, unless the caller chose; and NaN in memory that nobody has written yet."""
    try:
        import torch
    except ImportError:
        yield
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _filled_with_nan(getattr(owner, name)))
        yield


def _filled_with_nan(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    return allocate_nan


@pytest.fixture
def layer_file(tmp_path):
    """A saved layer."""
    path = tmp_path / "layer.safetensors"
    fwpkm.save(path, FakeLayer(0))
    return path


@pytest.fixture
def state_file(tmp_path):
    """A saved half-read state."""
    path = tmp_path / "state.safetensors"
    fwpkm.save_state(path, half_read_state(), CFG)
    return path
