"""The Keras layer over the native layer of the framework it runs on: ``python -m benchmarks.keras_layer WORKLOAD``.

Both hold the same weights and read the same inputs from a fresh state, without gradients; rounds are interleaved. Keras
takes its backend from KERAS_BACKEND, one for a process, so :func:`claims` starts a process for each.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.workloads import WORKLOADS

_HIDDEN = 512
_LIMIT = 1.1


def claims(workload: str, repeats: int) -> list[Any]:
    """The ratio Keras / native on torch and on JAX, each measured in a process of its own.

    Raises:
        subprocess.CalledProcessError: a process failed.
    """
    from benchmarks.measure import summarize
    from benchmarks.report import Claim

    made = []
    for backend in ("torch", "jax"):
        command = [sys.executable, "-m", "benchmarks.keras_layer", workload, str(repeats)]
        root = pathlib.Path(__file__).resolve().parents[1]
        environment = dict(os.environ, KERAS_BACKEND=backend)
        done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        ratios = [keras / native for keras, native in json.loads(done.stdout.splitlines()[-1])]
        made.append(Claim(f"{workload}: Keras layer on {backend} / native layer", summarize(ratios), at_most=_LIMIT))
    return made


def main(workload: str, repeats: str) -> None:
    """Print the seconds of each round, Keras and native, as one JSON array."""
    import keras

    import fwpkm
    from benchmarks.measure import timed
    from fwpkm.backends.keras import FwPKM

    case = WORKLOADS[workload]
    fields = {name: getattr(case.config, name) for name in case.config.__dataclass_fields__}
    layer = FwPKM(**fields)
    layer.build((case.batch, case.length, _HIDDEN))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "layer.safetensors")
        fwpkm.save(path, layer)
        keras_call, native_call = (_torch_calls if keras.backend.backend() == "torch" else _jax_calls)(layer, path)
    pairs = []
    for number in range(int(repeats) + 2):  # two to warm up
        x = np.random.default_rng(number).normal(size=(case.batch, case.length, _HIDDEN)).astype(np.float32)
        (first, ours), (second, native) = (timed(call, x) for call in (keras_call, native_call))
        np.testing.assert_allclose(ours, native, rtol=1e-3, atol=1e-4)
        if number > 1:
            pairs.append((first, second))
    print(json.dumps(pairs))


def _torch_calls(layer: Any, path: str) -> tuple[Any, Any]:
    import torch

    import fwpkm
    from fwpkm.backends.torch import FwPKM

    native = FwPKM(_HIDDEN, layer.config)
    fwpkm.load(path, native)

    def of(function: Any) -> Any:
        def call(x: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return function(torch.from_numpy(x)).numpy()

        return call

    return of(layer), of(lambda x: native(x)[0])


def _jax_calls(layer: Any, path: str) -> tuple[Any, Any]:
    import jax

    import fwpkm
    from fwpkm.backends.jax import FwPKM

    native = FwPKM(_HIDDEN, layer.config)
    variables = fwpkm.load(path, native)
    weights = [variable.value for variable in layer.trainable_variables]
    fixed = [variable.value for variable in layer.non_trainable_variables]
    keras_call = jax.jit(lambda weights, fixed, x: layer.stateless_call(weights, fixed, x)[0])
    native_call = jax.jit(lambda variables, x: native.apply(variables, x)[0])
    return lambda x: np.asarray(keras_call(weights, fixed, x)), lambda x: np.asarray(native_call(variables, x))


if __name__ == "__main__":
    main(*sys.argv[1:])
