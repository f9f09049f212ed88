"""The JAX backend beside the torch backend, on the CPU or a GPU: ``python -m benchmarks.frameworks``.

Every round draws new inputs, which both read from the same tables. JAX's scoring is timed alone, and subtracted for the
growth with N.

With ``--keras`` also the Keras layer over the native layer of the framework it runs on: with the same weights, from a
fresh state, without gradients. Keras takes its backend from KERAS_BACKEND, so each has a process of its own.
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its part of a GPU

import jax
import jax.numpy as jnp
import numpy as np
import torch

import fwpkm
from benchmarks import compare, measure, report
from benchmarks.measure import Samples, ratio
from benchmarks.report import Claim
from benchmarks.worker import Worker
from benchmarks.workloads import WORKLOADS, Inputs, TorchSteps, Workload, by_size, make_inputs, make_memory
from fwpkm import Memory, State
from fwpkm.backends import jax as jax_backend

_WORKLOADS = ("step-128", "step-512", "step-1024")
_LEGEND = (report.ROUNDS, "tables are rewritten in place: torch with inplace=True, JAX jitted with a donated state")
_STEPS = ("forward", "train")
_COLUMNS = {"forward": ("forward, ms", 1e3), "train": ("training step, ms", 1e3), "scoring": ("scoring, ms", 1e3)}
_TIME, _GROWTH, _KERAS = 2, 1.2, 1.1
"""Bounds: of jax / torch at step-512 on the CPU; of the time without scoring, largest N over smallest; of Keras."""
_HIDDEN = 512
"""Width of the Keras layer's inputs."""


class JaxSteps:
    """The JAX backend at one workload, from the tables of :class:`TorchSteps`."""

    def __init__(self, workload: Workload, device: str = "cpu") -> None:
        """Copy the tables; what is jitted compiles when it is first called."""
        cfg = workload.config
        memory = Memory(*(jnp.asarray(table.cpu().numpy()) for table in make_memory(workload, device=device)))
        self.state = jax_backend.init_state(cfg, memory, batch_size=workload.batch)

        @partial(jax.jit, donate_argnums=0)
        def forward(state: State, query: Any, value: Any, gate: Any, _: Any) -> tuple[Any, State]:
            return jax_backend.apply(cfg, state, query, value, gate)[:2]

        @partial(jax.jit, donate_argnums=0)
        def train(state: State, query: Any, value: Any, gate: Any, cotangent: Any) -> tuple[Any, State, Any]:
            def loss(*tokens: Any) -> Any:
                output, after, _ = jax_backend.apply(cfg, state, *tokens)
                return (output * cotangent).sum(), (output, after)

            gradients, (output, after) = jax.grad(loss, (0, 1, 2), has_aux=True)(query, value, gate)
            return output, after, gradients

        @jax.jit
        def score(keys: Any, query: Any) -> Any:
            from fwpkm.backends.jax import addressing, tokens  # the inside: not where only public functions may be used

            chunks = query.reshape(query.shape[0], -1, cfg.chunk_size, query.shape[2]).swapaxes(0, 1)
            return jax.lax.map(lambda x: addressing.select_slots(cfg, tokens.halves(cfg, x, len(keys)), keys), chunks)

        self._jitted, self._score = {"forward": forward, "train": train}, score

    def prepare(self, inputs: Inputs) -> Any:
        """The inputs as JAX arrays."""
        return jax.block_until_ready(Inputs._make(jnp.asarray(x.detach().cpu().numpy()) for x in inputs))

    def run(self, part: str, inputs: Inputs) -> Any:
        """The output of "forward" or "train", when all is computed; of "scoring" all sub-scores and their top-k."""
        if part == "scoring":
            return jax.block_until_ready(self._score(self.state.memory.keys, inputs.query))
        output, self.state, *_ = jax.block_until_ready(self._jitted[part](self.state, *inputs))
        return output


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge. Returns 1 if ``--check`` was given and a bound does not hold, else 0."""
    parser = report.parser("frameworks", __doc__, "workload", *report.JUDGED, repeats=(7, "rounds"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of torch; JAX takes its default one")
    parser.add_argument("--keras", metavar="NAME", choices=WORKLOADS, help="also the Keras layer over the native one")
    options = parser.parse_args(arguments)
    if options.against:
        return compare.main("frameworks", options, options.workload)
    workloads = by_size(options.workload or _WORKLOADS)
    contestants = {workload.name: _contestants(workload, options.device) for workload in workloads}
    samples = measure.interleaved(contestants, options.repeats)
    claims = _claims(workloads, samples, options.device)
    claims += keras_claims(options.keras, options.repeats) if options.keras else []
    rows = {"torch": "torch", "jax": "jax"}
    tables = [report.workload_table(workload, samples, rows, _COLUMNS) for workload in workloads]
    return report.conclude(_LEGEND, [*tables, report.claims_table("Ratios", claims)], claims, options)


def _contestants(workload: Workload, device: str) -> dict[str, measure.Contestant]:
    torch_steps, jax_steps = TorchSteps(workload, device), JaxSteps(workload, device)

    def run_torch(part: str, inputs: Inputs) -> Any:
        output, *_ = getattr(torch_steps, part)(inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return output

    def parts(run: Callable[..., Any], prepare: Callable[[Inputs], Any], names: Sequence[str], number: int) -> Any:
        inputs = prepare(make_inputs(workload, seed=number, device=device))
        if number:  # the two have read the same tables only so far
            return {name: lambda name=name: (None, run(name, inputs)) for name in names}
        return {name: partial(run, name, inputs) for name in names}

    return {
        "torch": partial(parts, run_torch, lambda inputs: inputs, _STEPS),
        "jax": partial(parts, jax_steps.run, jax_steps.prepare, tuple(_COLUMNS)),
    }


def _claims(workloads: list[Workload], samples: Samples, device: str) -> list[Claim]:
    claims = []
    for workload in workloads:
        for part in _STEPS:
            measured = ratio(*(samples[workload.name, name, part] for name in ("jax", "torch")))
            bound = _TIME if workload.name == "step-512" and device == "cpu" else None
            claims.append(Claim(f"{workload.name}, {part}: jax / torch", measured, at_most=bound))
    if len({workload.config.num_subkeys for workload in workloads}) > 1:
        parts = (f"{part} without scoring" for part in _STEPS)
        claims += [report.growth(samples, workloads, "jax", part, _GROWTH) for part in parts]
    return claims


# --- Keras ---


def keras_claims(workload: str, repeats: int) -> list[Claim]:
    """The ratio Keras / native on torch and on JAX, each measured in a process of its own."""
    made = []
    for backend in ("torch", "jax"):
        with Worker(KERAS_BACKEND=backend) as worker:
            measured = ratio(*worker.run(keras_seconds, workload, repeats))
        made.append(Claim(f"{workload}: Keras layer on {backend} / native layer", measured, at_most=_KERAS))
    return made


def keras_seconds(workload: str, repeats: int) -> tuple[list[float], list[float]]:
    """Of the Keras layer and of the native one, by round."""
    case = WORKLOADS[workload]
    sides = {
        name: lambda number, call=call: {"call": partial(call, draw_hidden(case, number))}
        for name, call in zip(("keras", "native"), keras_calls(case))
    }
    samples = measure.interleaved({workload: sides}, repeats, warm_up=2)
    return samples[workload, "keras", "call"], samples[workload, "native", "call"]


def draw_hidden(workload: Workload, number: int) -> np.ndarray:
    """Inputs of a layer ``[B, T, D]``."""
    shape = workload.batch, workload.length, _HIDDEN
    return np.random.default_rng(number).normal(size=shape).astype(np.float32)


def keras_calls(workload: Workload) -> tuple[Callable[..., Any], Callable[..., Any]]:
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
        no_grad, runs = torch.no_grad(), (layer, lambda x: native(x)[0])
        return tuple(no_grad(lambda x, run=run: run(torch.from_numpy(x))) for run in runs)
    weights, fixed = ([v.value for v in of] for of in (layer.trainable_variables, layer.non_trainable_variables))
    ours = jax.jit(lambda weights, fixed, x: layer.stateless_call(weights, fixed, x)[0])
    theirs = jax.jit(lambda variables, x: native.apply(variables, x)[0])
    return lambda x: np.asarray(ours(weights, fixed, x)), lambda x: np.asarray(theirs(variables, x))


if __name__ == "__main__":
    sys.exit(main())
