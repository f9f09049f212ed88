"""The JAX backend beside the torch backend, on the CPU or a GPU: ``python -m benchmarks.frameworks``.

Forward = all tokens from a state, whose tables are rewritten in place (torch: inplace=True; JAX: jitted, the state
donated). Training = the same, and the gradients of a random cotangent on the outputs with respect to query, value and
gate. Rounds are interleaved: each draws new inputs and runs every contestant at every workload, and ratios are taken
within rounds. JAX's scoring is timed alone, and subtracted for the growth with N.
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
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import compare, internals, keras_layer, measure, report
from benchmarks.measure import ratio, summarize
from benchmarks.report import Claim, Table, milliseconds
from benchmarks.steps import TorchSteps
from benchmarks.workloads import WORKLOADS, Inputs, Workload, by_size, make_inputs, make_memory
from fwpkm import Memory, State
from fwpkm.backends import jax as jax_backend

_DEFAULT_WORKLOADS = ("step-128", "step-512", "step-1024")
_LEGEND = (
    "medians with their quartiles; rounds are interleaved, and ratios of times are taken within rounds",
    "tables are rewritten in place: torch with inplace=True, JAX jitted with a donated state",
)
_AGREEMENT = 1e-5  # of the median token's output; a near tie moves single tokens, a wrong equation moves all
_STEPS = ("forward", "train")
Samples = dict[tuple[str, str], list[float]]
"""Seconds by workload and "torch" or "jax" with the step, "forward", "train" or "scoring"."""


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
            def loss(*arguments: Any) -> Any:
                output, after, _ = jax_backend.apply(cfg, state, *arguments)
                return (output * cotangent).sum(), (output, after)

            gradients, (output, after) = jax.grad(loss, (0, 1, 2), has_aux=True)(query, value, gate)
            return output, after, gradients

        @jax.jit
        def score(keys: Any, query: Any) -> Any:
            chunks = query.reshape(query.shape[0], -1, cfg.chunk_size, query.shape[2]).swapaxes(0, 1)
            return jax.lax.map(functools.partial(internals.jax_select, cfg, keys), chunks)

        self._forward, self._train, self._score = forward, train, score

    def prepare(self, inputs: Inputs) -> Any:
        """The inputs as JAX arrays."""
        return jax.block_until_ready(Inputs._make(jnp.asarray(x.detach().cpu().numpy()) for x in inputs))

    def forward(self, inputs: Inputs) -> Any:
        """Outputs."""
        output, self.state = jax.block_until_ready(self._forward(self.state, *inputs))
        return output

    def train(self, inputs: Inputs) -> Any:
        """Outputs, after the gradients were computed."""
        output, self.state, _ = jax.block_until_ready(self._train(self.state, *inputs))
        return output

    def score(self, inputs: Inputs) -> Any:
        """The scoring of all chunks: all sub-scores and their top-k."""
        return jax.block_until_ready(self._score(self.state.memory.keys, inputs.query))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge. Returns 1 if ``--check`` was given and a bound does not hold, else 0."""
    options = _parser().parse_args(arguments)
    if options.against:
        return compare.main("frameworks", options, options.workload)
    workloads = by_size(options.workload or _DEFAULT_WORKLOADS)
    samples = measure_all(workloads, options.repeats, options.device)
    claims = _claims(workloads, samples, options)
    if options.keras:
        claims += keras_layer.claims(options.keras, options.repeats)
    tables = [_table(workload, samples) for workload in workloads]
    report.show(_LEGEND, [*tables, report.claims_table("Ratios", claims)], markdown=options.markdown)
    return report.verdict(claims) if options.check else 0


def measure_all(workloads: list[Workload], repeats: int, device: str) -> Samples:
    """Seconds of every step in ``repeats`` interleaved rounds after one to warm up.

    Raises:
        RuntimeError: the two disagree; times of different results prove nothing.
    """
    samples: Samples = {}
    sides = {workload: (TorchSteps(workload, device), JaxSteps(workload, device)) for workload in workloads}
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        for number in progress.track(range(repeats + 1), description="rounds"):
            for workload, (torch_side, jax_side) in sides.items():
                inputs = make_inputs(workload, seed=number, device=device)
                copies = jax_side.prepare(inputs)
                steps: dict[str, tuple[Callable[[Any], Any], Inputs]] = {
                    f"torch {step}": (_synchronized(getattr(torch_side, step), device), inputs) for step in _STEPS
                }
                steps |= {f"jax {step}": (getattr(jax_side, step), copies) for step in _STEPS}
                outputs = {}
                for step, (function, given) in (steps | {"jax scoring": (jax_side.score, copies)}).items():
                    seconds, output = measure.timed(function, given)
                    samples.setdefault((workload.name, step), []).extend([seconds] if number else [])
                    if not number and step in steps:  # both sides have read the same tables so far
                        outputs[step] = np.asarray(output.cpu() if isinstance(output, torch.Tensor) else output)
                for step in _STEPS if not number else ():
                    _require_agreement(outputs[f"jax {step}"], outputs[f"torch {step}"])
    return samples


def _synchronized(function: Callable[[Inputs], tuple[torch.Tensor, ...]], device: str) -> Callable[[Inputs], Any]:
    """A step of torch that ends when its device has; its output."""

    def run(inputs: Inputs) -> torch.Tensor:
        output = function(inputs)[0]
        if device == "cuda":
            torch.cuda.synchronize()
        return output.detach()

    return run


def _require_agreement(received: np.ndarray, expected: np.ndarray) -> None:
    error = np.median(np.linalg.norm(received - expected, axis=-1) / np.linalg.norm(expected, axis=-1))
    if not error <= _AGREEMENT:
        raise RuntimeError(f"JAX computes something else. Received: a relative difference of {error:.1e}")


def _claims(workloads: list[Workload], samples: Samples, options: argparse.Namespace) -> list[Claim]:
    def rest(workload: Workload, step: str) -> list[float]:
        return [a - b for a, b in zip(samples[workload.name, f"jax {step}"], samples[workload.name, "jax scoring"])]

    claims = []
    for workload in workloads:
        for step in _STEPS:
            measured = ratio(*(samples[workload.name, f"{name} {step}"] for name in ("jax", "torch")))
            bound = options.time if workload.name == "step-512" and options.device == "cpu" else None
            claims.append(Claim(f"{workload.name}, {step}: jax / torch", measured, at_most=bound))
    small, large = workloads[0], workloads[-1]
    sizes = " / ".join(f"N={workload.config.num_subkeys}²" for workload in (large, small))
    if len({workload.config.num_subkeys for workload in workloads}) > 1:
        for step in _STEPS:
            text, measured = (
                f"everything but scoring, jax, {step}: {sizes}",
                ratio(rest(large, step), rest(small, step)),
            )
            claims.append(Claim(text, measured, at_most=options.growth))
    return claims


def _table(workload: Workload, samples: Samples) -> Table:
    def cell(what: str) -> str:
        return milliseconds(summarize(samples[workload.name, what]))

    rows = [(name, *(cell(f"{name} {step}") for step in _STEPS)) for name in ("torch", "jax")]
    rows.append(("jax, scoring alone", cell("jax scoring"), cell("jax scoring")))
    title = f"{workload.name}: {workload}, value table {workload.table_bytes >> 20} MiB"
    return Table(title, ("backend", "forward, ms", "training step, ms"), rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frameworks", description=__doc__.splitlines()[0])
    report.add_options(parser, _DEFAULT_WORKLOADS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of torch; JAX takes its default one")
    parser.add_argument(
        "--keras", metavar="NAME", choices=WORKLOADS, help="also the Keras layer over the native one at this workload"
    )
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--time", type=float, default=2, help="jax / torch at step-512, at most (%(default)s)")
    bounds.add_argument("--growth", type=float, default=1.2, help="rest at largest / smallest N (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
