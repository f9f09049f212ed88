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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its share of a GPU

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import keras_layer, measure, report
from benchmarks.data import Inputs, make_inputs, make_memory
from benchmarks.report import Claim, Table, milliseconds
from benchmarks.workloads import WORKLOADS, Workload
from fwpkm.backends import jax as jax_backend
from fwpkm.backends import torch as torch_backend
from fwpkm.backends.jax import addressing, tokens
from fwpkm.containers import Memory, State

_DEFAULT_WORKLOADS = ("step-128", "step-512", "step-1024")
_LEGEND = (
    "medians with their quartiles; rounds are interleaved, and ratios of times are taken within rounds",
    "tables are rewritten in place: torch with inplace=True, JAX jitted with a donated state",
)
_AGREEMENT = 1e-5  # of the median token's output; a near tie moves single tokens, a wrong equation moves all
Samples = dict[tuple[str, str], list[float]]


class TorchSide:
    """The torch backend at one workload."""

    def __init__(self, workload: Workload, device: str) -> None:
        """Draw the tables."""
        self.config, self.device = workload.config, device
        memory = make_memory(workload, device=device)
        self.state = torch_backend.init_state(self.config, memory, batch_size=workload.batch)

    def prepare(self, inputs: Inputs) -> Inputs:
        """The inputs as they are."""
        return inputs

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> torch.Tensor:
        """Outputs."""
        output, state, _ = torch_backend.apply(self.config, self.state, *inputs[:3], inplace=True)
        return self._finish(output, state)

    def train(self, inputs: Inputs) -> torch.Tensor:
        """Outputs, after the gradients were computed."""
        output, state, _ = torch_backend.apply(self.config, self.state, *inputs[:3], inplace=True)
        torch.autograd.grad(output, inputs[:3], inputs.cotangent)
        return self._finish(output.detach(), state)

    def _finish(self, output: torch.Tensor, state: State) -> torch.Tensor:
        self.state = torch_backend.detach(state)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return output


class JaxSide:
    """The JAX backend at one workload, from the same tables."""

    def __init__(self, workload: Workload, device: str) -> None:
        """Copy the tables and compile."""
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
            choose = functools.partial(addressing.choose, cfg, keys=keys)
            return jax.lax.map(lambda chunk: choose(tokens.halves(cfg, chunk, len(keys))), chunks)

        self._forward, self._train, self._score = forward, train, score

    def prepare(self, inputs: Inputs) -> Any:
        """The inputs as JAX arrays."""
        return jax.block_until_ready([jnp.asarray(x.detach().cpu().numpy()) for x in inputs])

    def forward(self, inputs: Any) -> Any:
        """Outputs."""
        output, self.state = jax.block_until_ready(self._forward(self.state, *inputs))
        return output

    def train(self, inputs: Any) -> Any:
        """Outputs, after the gradients were computed."""
        output, self.state, _ = jax.block_until_ready(self._train(self.state, *inputs))
        return output

    def score(self, inputs: Any) -> Any:
        """The scoring of all chunks: all sub-scores and their top-k."""
        return jax.block_until_ready(self._score(self.state.memory.keys, inputs[0]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge. Returns 1 if ``--check`` was given and a bound does not hold, else 0."""
    options = _parser().parse_args(arguments)
    workloads = sorted((WORKLOADS[name] for name in set(options.workload)), key=lambda workload: workload.table_bytes)
    samples = measure_all(workloads, options.repeats, options.device)
    claims = _claims(workloads, samples, options)
    if options.keras:
        claims += keras_layer.claims(options.keras, options.repeats)
    tables = [_table(workload, samples) for workload in workloads]
    report.show(_LEGEND, [*tables, report.claims_table("Ratios", claims)], markdown=options.markdown)
    return report.verdict(claims) if options.check else 0


def measure_all(workloads: list[Workload], repeats: int, device: str) -> Samples:
    """Seconds of every step, by workload and contestant, in ``repeats`` interleaved rounds after one to warm up.

    Raises:
        RuntimeError: the two disagree.
    """
    samples: Samples = {}
    sides = {workload: (TorchSide(workload, device), JaxSide(workload, device)) for workload in workloads}
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        for number in progress.track(range(repeats + 1), description="rounds"):
            for workload, (torch_side, jax_side) in sides.items():
                inputs = make_inputs(workload, seed=number, device=device)
                outputs = []
                for name, side in (("torch", torch_side), ("jax", jax_side)):
                    given = side.prepare(inputs)
                    steps: dict[str, Callable[[Any], Any]] = {"forward": side.forward, "train": side.train}
                    steps |= {"scoring": side.score} if side is jax_side else {}
                    for step, function in steps.items():
                        seconds, output = measure.timed(function, given)
                        if number:
                            samples.setdefault((workload.name, f"{name} {step}"), []).append(seconds)
                        elif step != "scoring":  # both sides have read the same tables so far
                            outputs.append(np.asarray(output.cpu() if name == "torch" else output))
                if not number:
                    _require_agreement(outputs[:2], outputs[2:])
    return samples


def _require_agreement(expected: list[np.ndarray], received: list[np.ndarray]) -> None:
    """Times of different results prove nothing."""
    for a, b in zip(received, expected):
        error = np.median(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1))
        if not error <= _AGREEMENT:
            raise RuntimeError(f"JAX computes something else. Received: a relative difference of {error:.1e}")


def _claims(workloads: list[Workload], samples: Samples, options: argparse.Namespace) -> list[Claim]:
    def ratio(workload: Workload, step: str) -> Claim:
        pairs = zip(samples[workload.name, f"jax {step}"], samples[workload.name, f"torch {step}"])
        bound = options.time if workload.name == "step-512" and options.device == "cpu" else None
        return Claim(f"{workload.name}, {step}: jax / torch", measure.summarize(a / b for a, b in pairs), at_most=bound)

    def growth(step: str) -> Claim:
        small, large = workloads[0], workloads[-1]
        rests = [
            [a - b for a, b in zip(samples[w.name, f"jax {step}"], samples[w.name, "jax scoring"])]
            for w in (large, small)
        ]
        sizes = " / ".join(f"N={w.config.num_subkeys}²" for w in (large, small))
        text = f"everything but scoring, jax, {step}: {sizes}"
        return Claim(text, measure.summarize(a / b for a, b in zip(*rests)), at_most=options.growth)

    steps = ("forward", "train")
    ratios = [ratio(workload, step) for workload in workloads for step in steps]
    grown = len({workload.config.num_subkeys for workload in workloads}) > 1
    return ratios + ([growth(step) for step in steps] if grown else [])


def _table(workload: Workload, samples: Samples) -> Table:
    rows = [
        (name, *(milliseconds(measure.summarize(samples[workload.name, f"{name} {s}"])) for s in ("forward", "train")))
        for name in ("torch", "jax")
    ]
    scoring = milliseconds(measure.summarize(samples[workload.name, "jax scoring"]))
    rows.append(("jax, scoring alone", scoring, scoring))
    title = f"{workload.name}: {workload}, value table {workload.table_bytes >> 20} MiB"
    return Table(title, ("backend", "forward, ms", "training step, ms"), rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frameworks", description=__doc__.splitlines()[0])
    names = ", ".join(WORKLOADS)
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=WORKLOADS,
        default=_DEFAULT_WORKLOADS,
        metavar="NAME",
        help=f"of {names} (default: {' '.join(_DEFAULT_WORKLOADS)})",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of torch; JAX takes its default one")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--keras", metavar="NAME", choices=WORKLOADS, help="also the Keras layer over the native one at this workload"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--check", action="store_true", help="fail where a bound does not hold or was not measured")
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--time", type=float, default=2, help="jax / torch at step-512, at most (%(default)s)")
    bounds.add_argument("--growth", type=float, default=1.2, help="rest at largest / smallest N (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
