"""The Keras layer over the native layer of the framework it runs on, for ``python -m benchmarks.frameworks --keras``.

Both hold the same weights and read the same inputs from a fresh state, without gradients; rounds are interleaved. Keras
takes its backend from KERAS_BACKEND, one for a process, so :func:`claims` starts a process for each.
"""

import pathlib
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import fwpkm
from benchmarks import measure, rounds
from benchmarks.report import Claim
from benchmarks.worker import Worker
from benchmarks.workloads import WORKLOADS, Workload

_HIDDEN = 512
_LIMIT = 1.1


def claims(workload: str, repeats: int) -> list[Claim]:
    """The ratio Keras / native on torch and on JAX, each measured in a process of its own."""
    made = []
    for backend in ("torch", "jax"):
        with Worker(KERAS_BACKEND=backend) as worker:
            ratio = measure.ratio(*worker.run(seconds, workload, repeats))
        made.append(Claim(f"{workload}: Keras layer on {backend} / native layer", ratio, at_most=_LIMIT))
    return made


def seconds(workload: str, repeats: int) -> tuple[list[float], list[float]]:
    """Of the Keras layer and of the native one, by round."""
    case = WORKLOADS[workload]
    sides = {
        name: lambda number, call=call: {"call": partial(call, draw(case, number))}
        for name, call in zip(("keras", "native"), make_calls(case))
    }
    agree = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    samples = rounds.interleaved({workload: sides}, repeats, warm_up=2, agree=agree)
    return samples[workload, "keras", "call"], samples[workload, "native", "call"]


def draw(workload: Workload, number: int) -> np.ndarray:
    """Inputs of a layer ``[B, T, D]``."""
    shape = workload.batch, workload.length, _HIDDEN
    return np.random.default_rng(number).normal(size=shape).astype(np.float32)


def make_calls(workload: Workload) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A Keras layer and the native layer with its weights, jitted on JAX, as functions of NumPy arrays."""
    import keras

    from fwpkm.backends.keras import FwPKM

    keras.utils.set_random_seed(0)
    layer = FwPKM(**{name: getattr(workload.config, name) for name in workload.config.__dataclass_fields__})
    layer.build((workload.batch, workload.length, _HIDDEN))
    backend = keras.backend.backend()
    native = fwpkm.get_backend(backend).FwPKM(_HIDDEN, layer.config)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "layer.safetensors")
        fwpkm.save(path, layer)
        variables = fwpkm.load(path, native)

    if backend == "torch":
        import torch

        no_grad = torch.no_grad()
        runs = layer, lambda x: native(x)[0]
        return tuple(no_grad(lambda x, run=run: run(torch.from_numpy(x))) for run in runs)
    import jax

    weights, fixed = ([v.value for v in of] for of in (layer.trainable_variables, layer.non_trainable_variables))
    ours = jax.jit(lambda weights, fixed, x: layer.stateless_call(weights, fixed, x)[0])
    theirs = jax.jit(lambda variables, x: native.apply(variables, x)[0])
    return lambda x: np.asarray(ours(weights, fixed, x)), lambda x: np.asarray(theirs(variables, x))
