"""Profiles, backends and the NaN that fresh memory holds, for every test."""

import importlib.machinery
import importlib.util
import itertools
import os
import re
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import is_hypothesis_test
from layer_files import CFG, FakeLayer, half_read_state
from quick_interpreter import quicken
from sources import ROOT

import fwpkm

# Importable without the root on the path, where ``kernels`` would shadow another package.
for _name in {"benchmarks", "examples"} - sys.modules.keys():
    _spec = importlib.machinery.ModuleSpec(_name, None, is_package=True)
    _spec.submodule_search_locations = [str(ROOT / _name)]
    sys.modules[_name] = importlib.util.module_from_spec(_spec)

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # the first call of an example may import or compile
    database=None,
    max_examples=30,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("deep", hypothesis.settings.get_profile("default"), max_examples=500)
hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("default"), max_examples=5)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

QUICK = {
    **dict.fromkeys(("house", "rules", "config", "schedule", "refusals", "engine", "agreement", "files", "cli"), ""),
    **dict.fromkeys(("summary", "doctor", "page", "release"), ""),
    "installation": "backends|listed|keras|versions|folder|line_is_printed",
    "imports": "core|shares|kernels|backend_imports|shipped",
    "vectors": r"forward\[(base|wait_mask)-(numpy|torch)-float64-one call\]|forward\[wait_mask-jax-float64-one call\]|"
    r"gradients\[torch-float64-one call-(base|wait_mask|dot_heads)\]|gradients\[jax-float64-one call-base\]",
    **dict.fromkeys(("lookup", "chunk_update", "stream", "state", "finite", "gradients", "precision"), "torch"),
    "layer": "test_(?!compile_)",
    "launch": "",
    "conform": "noticed",
    "mutants": r"\[0-(lookahead off by one|temperature ignored)\]",
    "demo": "text|picture",
}
"""What ``make test-quick`` runs: by file, without test_ and .py, a pattern of its tests."""

LONGEST = (
    *("keras", "operators", "vectors", "kernels", "language_model_commands", "examples", "demo", "conform", "compiled"),
    *("gpu_benchmark", "portability", "state", "mutants", "jax_rows", "jax", "jax_layer", "nnx_and_equinox"),
    "transformers_generate",
)
"""Files of minutes, in order. They come first, so that no core works on one while the others have nothing left."""

BACKENDS = ("numpy", "torch", "jax")
EAGER = ("numpy", "torch")
"""Those that take a new configuration as it comes. JAX compiles for seconds, so it has test_compiled.py and test_jax.py
instead of the properties that draw one for each example, and of tests marked ``eager``."""
GRADIENT_BACKENDS = ("torch", "jax")

# A fifth of the time that XLA takes otherwise. test_jax.py runs what users get.
QUICK_COMPILE = ("--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1")


def pytest_configure(config):
    # Kernels choose when they are defined: without a GPU, Triton's interpreter, before any test imports one.
    try:
        import torch
    except ImportError:
        pass
    else:
        if not torch.cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")
    # Triton's library binds to tensorflow's where that was loaded before it, and crashes.
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
        quicken(importlib.import_module("triton.runtime.interpreter"))
    config.addinivalue_line("markers", "eager: of inplace, or of many configurations; not for backends that compile")


def pytest_collection_modifyitems(items):
    """Mark the tests of ``QUICK``, and begin with those of ``LONGEST``."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))
    for item in items:
        pattern = QUICK.get(item.path.stem.removeprefix("test_"))
        if pattern is not None and re.search(pattern, item.name):
            item.add_marker(pytest.mark.quick)


def pytest_generate_tests(metafunc):
    """Each backend that a test is for, unless the folder of the test has a ``be`` of its own."""
    if metafunc.definition.path.parent != Path(__file__).parent:
        return
    eager = is_hypothesis_test(metafunc.function) or metafunc.definition.get_closest_marker("eager")
    for fixture in {"be", "gradient_be"} & set(metafunc.fixturenames):
        names = [name for name in BACKENDS if name in EAGER or not eager]
        names = [name for name in names if name in GRADIENT_BACKENDS or fixture == "be"]
        metafunc.parametrize(fixture, names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def be(request):
    """A backend's module. One that cannot be imported fails its tests: a skip would hide it."""
    return fwpkm.get_backend(request.param)


@pytest.fixture(scope="session")
def gradient_be(request):
    """The same of those that have ``vjp``."""
    return fwpkm.get_backend(request.param)


@pytest.fixture(scope="session", autouse=True)
def _jax_session():
    """JAX in 64 bits, and compiling fast; XLA reads its flags once, and child processes shall not inherit them."""
    try:
        import jax
    except ImportError:
        return
    jax.config.update("jax_enable_x64", True)
    with pytest.MonkeyPatch.context() as patch:
        # XLA aborts at a flag that it does not know, as this one in later releases.
        older = ["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11) else []
        patch.setenv("XLA_FLAGS", " ".join((*QUICK_COMPILE, *older, os.environ.get("XLA_FLAGS", ""))))
        jax.jit(lambda x: x + 1)(1)


_MAPS = Path("/proc/self/maps")
_FEW_MAPS = 20_000
"""Of the 65,530 that Linux lets a process have."""


_TESTS = itertools.count()


@pytest.fixture(autouse=True)
def _fewer_maps():
    """Forget what JAX compiled before a process has too many maps of memory, at which XLA crashes."""
    yield
    if next(_TESTS) % 20 or "jax" not in sys.modules or not _MAPS.exists():
        return
    if _MAPS.read_bytes().count(b"\n") > _FEW_MAPS:
        sys.modules["jax"].clear_caches()


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
