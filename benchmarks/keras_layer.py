"""The Keras layer over the native layer of the framework it runs on, for ``python -m benchmarks.frameworks --keras``.

Both hold the same weights and read the same inputs from a fresh state, without gradients; rounds are interleaved. Keras
takes its backend from KERAS_BACKEND, one for a process, so :func:`claims` starts a process for each.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

import fwpkm
from benchmarks import measure
from benchmarks.report import Claim
from benchmarks.worker import Worker
from benchmarks.workloads import WORKLOADS, Workload

HIDDEN = 512
_LIMIT = 1.1
_WARM_UP = 2
Call = Callable[[np.ndarray], np.ndarray]


def claims(workload: str, repeats: int) -> list[Claim]:
    """The ratio Keras / native on torch and on JAX, each measured in a process of its own."""
    made = []
    for backend in ("torch", "jax"):
        with Worker(KERAS_BACKEND=backend) as worker:
            ratio = measure.summarize(worker.run(ratios, workload, repeats))
        made.append(Claim(f"{workload}: Keras layer on {backend} / native layer", ratio, at_most=_LIMIT))
    return made


def ratios(workload: str, repeats: int) -> list[float]:
    """Time of the Keras layer over that of the native one, by round."""
    case = WORKLOADS[workload]
    layer, keras_call = make_keras_call(case)
    native_call = _make_native_call(layer)
    found = []
    for number in range(repeats + _WARM_UP):
        x = np.random.default_rng(number).normal(size=(case.batch, case.length, HIDDEN)).astype(np.float32)
        (first, ours), (second, native) = (measure.timed(call, x) for call in (keras_call, native_call))
        np.testing.assert_allclose(ours, native, rtol=1e-3, atol=1e-4)
        found.append(first / second)
    return found[_WARM_UP:]


def make_keras_call(workload: Workload) -> tuple[Any, Call]:
    """A Keras layer with its own weights, and its call, jitted on JAX, from NumPy to NumPy."""
    import keras

    from fwpkm.backends.keras import FwPKM

    keras.utils.set_random_seed(0)
    layer = FwPKM(**{name: getattr(workload.config, name) for name in workload.config.__dataclass_fields__})
    layer.build((workload.batch, workload.length, HIDDEN))
    if keras.backend.backend() == "torch":
        return layer, _torch_call(layer)
    import jax

    weights = [variable.value for variable in layer.trainable_variables]
    fixed = [variable.value for variable in layer.non_trainable_variables]
    call = jax.jit(lambda weights, fixed, x: layer.stateless_call(weights, fixed, x)[0])
    return layer, lambda x: np.asarray(call(weights, fixed, x))


def _make_native_call(layer: Any) -> Call:
    """The native layer with a Keras layer's weights."""
    import keras

    name = keras.backend.backend()
    native = fwpkm.get_backend(name).FwPKM(HIDDEN, layer.config)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "layer.safetensors"
        fwpkm.save(path, layer)
        variables = fwpkm.load(path, native)
    if name == "torch":
        return _torch_call(lambda x: native(x)[0])
    import jax

    call = jax.jit(lambda variables, x: native.apply(variables, x)[0])
    return lambda x: np.asarray(call(variables, x))


def _torch_call(function: Callable[[Any], Any]) -> Call:
    import torch

    def call(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return function(torch.from_numpy(x)).numpy()

    return call
