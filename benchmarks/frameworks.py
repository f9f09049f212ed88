"""The JAX backend beside the torch backend, on the CPU or a GPU: ``python -m benchmarks.frameworks``.

Forward = all tokens from a state, whose tables are rewritten in place (torch: inplace=True; JAX: jitted, the state
donated). Training = the same, and the gradients of a random cotangent on the outputs with respect to query, value and
gate. Every round draws new inputs. JAX's scoring is timed alone, and subtracted for the growth with N.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its part of a GPU

import jax
import jax.numpy as jnp
import torch

from benchmarks import compare, internals, keras_layer, report, rounds
from benchmarks.measure import ratio
from benchmarks.report import Claim
from benchmarks.rounds import Samples
from benchmarks.steps import TorchSteps
from benchmarks.workloads import WORKLOADS, Inputs, Workload, by_size, make_inputs, make_memory
from fwpkm import Memory, State
from fwpkm.backends import jax as jax_backend

_WORKLOADS = ("step-128", "step-512", "step-1024")
_LEGEND = (rounds.LEGEND, "tables are rewritten in place: torch with inplace=True, JAX jitted with a donated state")
_COLUMNS = {part: (f"{text}, ms", 1e3) for part, text in (("forward", "forward"), ("train", "training step"))}
_TIME, _GROWTH = 2, 1.2
"""Bounds: of jax / torch at step-512 on the CPU, and of the time without scoring, largest N over smallest."""


class JaxSteps:
    """The JAX backend at one workload, from the tables of :class:`TorchSteps`."""

    def __init__(self, workload: Workload, device: str = "cpu") -> None:
        """Copy the tables; what is jitted compiles when it is first called."""
        cfg = workload.config
        memory = Memory(*(jnp.asarray(table.cpu().numpy()) for table in make_memory(workload, device=device)))
        self.state = jax_backend.init_state(cfg, memory, batch_size=workload.batch)

        @functools.partial(jax.jit, donate_argnums=0)
        def forward(state: State, query: Any, value: Any, gate: Any, _: Any) -> tuple[Any, State]:
            return jax_backend.apply(cfg, state, query, value, gate)[:2]

        @functools.partial(jax.jit, donate_argnums=0)
        def train(state: State, query: Any, value: Any, gate: Any, cotangent: Any) -> tuple[Any, State, Any]:
            def loss(*tokens: Any) -> Any:
                output, after, _ = jax_backend.apply(cfg, state, *tokens)
                return (output * cotangent).sum(), (output, after)

            gradients, (output, after) = jax.grad(loss, (0, 1, 2), has_aux=True)(query, value, gate)
            return output, after, gradients

        @jax.jit
        def score(keys: Any, query: Any) -> Any:
            chunks = query.reshape(query.shape[0], -1, cfg.chunk_size, query.shape[2]).swapaxes(0, 1)
            return jax.lax.map(functools.partial(internals.select, "jax", cfg, keys), chunks)

        self._jitted = {"forward": forward, "train": train}
        self._score = score

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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frameworks", description=__doc__.splitlines()[0])
    report.add_options(parser, _WORKLOADS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of torch; JAX takes its default one")
    parser.add_argument("--keras", metavar="NAME", choices=WORKLOADS, help="also the Keras layer over the native one")
    options = parser.parse_args(arguments)
    if options.against:
        return compare.main("frameworks", options, options.workload)
    workloads = by_size(options.workload or _WORKLOADS)
    contestants = {workload.name: _contestants(workload, options.device) for workload in workloads}
    samples = rounds.interleaved(contestants, options.repeats)
    rounds.subtract_scoring(samples)
    claims = _claims(workloads, samples, options.device)
    if options.keras:
        claims += keras_layer.claims(options.keras, options.repeats)
    columns = _COLUMNS | {"scoring": ("scoring, ms", 1e3)}
    tables = [rounds.table(workload, samples, {"torch": "torch", "jax": "jax"}, columns) for workload in workloads]
    report.show(_LEGEND, [*tables, report.claims_table("Ratios", claims)], markdown=options.markdown)
    return report.verdict(claims) if options.check else 0


def _contestants(workload: Workload, device: str) -> dict[str, rounds.Contestant]:
    torch_steps, jax_steps = TorchSteps(workload, device), JaxSteps(workload, device)

    def run_torch(part: str, inputs: Inputs) -> Any:
        output, *_ = getattr(torch_steps, part)(inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return output

    def parts(
        run: Callable[[str, Any], Any], prepare: Callable[[Inputs], Any], names: Sequence[str], number: int
    ) -> Any:
        inputs = prepare(make_inputs(workload, seed=number, device=device))
        if number:  # the two have read the same tables only so far
            return {name: lambda name=name: (None, run(name, inputs)) for name in names}
        return {name: functools.partial(run, name, inputs) for name in names}

    return {
        "torch": functools.partial(parts, run_torch, lambda inputs: inputs, tuple(_COLUMNS)),
        "jax": functools.partial(parts, jax_steps.run, jax_steps.prepare, (*_COLUMNS, "scoring")),
    }


def _claims(workloads: list[Workload], samples: Samples, device: str) -> list[Claim]:
    claims = []
    for workload in workloads:
        for part in _COLUMNS:
            measured = ratio(*(samples[workload.name, name, part] for name in ("jax", "torch")))
            bound = _TIME if workload.name == "step-512" and device == "cpu" else None
            claims.append(Claim(f"{workload.name}, {part}: jax / torch", measured, at_most=bound))
    if len({workload.config.num_subkeys for workload in workloads}) > 1:
        parts = (f"{part} without scoring" for part in _COLUMNS)
        claims += [rounds.growth(samples, workloads, "jax", part, _GROWTH) for part in parts]
    return claims


if __name__ == "__main__":
    sys.exit(main())
