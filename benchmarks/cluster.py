"""Data parallel training on several cards beside one of them: ``python -m benchmarks.cluster --ranks 2``.

One run, in rounds: the first rank trains alone while the others wait, then all train together, the layer under DDP and
the language model by its Trainer, which holds the halves of a step in CUDA graphs there too. Weak scaling: each rank
has as many rows as the one alone, and the ratio is of rows per second; strong scaling: they share those rows. On the
CPU ranks are processes of one thread each. The bytes that a step sends are counted from its collectives.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks import ranks, report
from benchmarks.measure import ratio, summarize, timed
from benchmarks.report import Claim, Table, spread
from benchmarks.workloads import WORKLOADS
from examples.language_model.settings import Experiment
from examples.language_model.training import WARM_UP, Batch, Trainer
from fwpkm.backends.torch import FwPKM
from fwpkm.integrations.distributed import share_initial_memory

_PARTS = ("alone", "weak", "strong")
_ROUNDS_BEFORE = 2
_BOUND = 1.85
"""Of two cards over one, weak, on GPUs: the language model."""
_BYTES = {"float": 4, "double": 8, "int": 4, "long int": 8, "c10::BFloat16": 2, "c10::Half": 2, "unsigned char": 1}
Step = Callable[[], Any]


class Sent(NamedTuple):
    """What one rank hands to the collectives of one step."""

    calls: int
    bytes: int


def layer_step(name: str, rows: int, device: torch.device, parallel: bool) -> Step:
    """Forward and backward of a layer that reads each row from its initial memory, and AdamW."""
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    layer = FwPKM(workload.config.value_dim, workload.config).to(device)
    read: Any = layer
    if parallel:
        share_initial_memory(layer)
        read = DistributedDataParallel(layer, static_graph=True)
    optimizer = torch.optim.AdamW(layer.parameters())
    x = torch.randn(rows, workload.length, layer.hidden_size, device=device)

    def step() -> None:
        y, _ = read(x, return_state=False)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def model_step(experiment: Experiment, device: torch.device, compiled: bool) -> Step:
    """A step of the language model's training on random bytes; its rows are shared by the ranks of a process group."""
    trainer, settings = Trainer(experiment, device), experiment.training
    if compiled:
        trainer.compile()
    shape, rng = (settings.batch, settings.length), np.random.default_rng(0)
    tokens = rng.integers(256, size=(shape[0], shape[1] + 1), dtype=np.uint8)
    return functools.partial(trainer.take, Batch(tokens, np.zeros(shape, bool), [False] * shape[0]))


def sent(step: Step) -> Sent:
    """Collectives of a step, and the bytes that this rank hands to them, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    events = [e for e in profiler.events() if e.name.startswith(("gloo:", "nccl:"))]
    sizes = [
        math.prod(shape) * _BYTES[dtype]
        for e in events
        # Gradients are float32; older versions of torch than 2.13 do not tell.
        for shape, dtype in zip(e.input_shapes, getattr(e, "input_dtypes", ["float"] * len(e.input_shapes)))
        if dtype
    ]
    return Sent(len(events), sum(sizes))


def measure_rank(
    rank: int, device: torch.device, options: argparse.Namespace, join: Callable[[], None]
) -> dict[str, Any]:
    """One rank of the run: seconds by what trains and part, and what a step sends."""
    build: dict[str, Callable[[int, bool], Step]] = {
        "layer": lambda rows, parallel: layer_step(options.workload, rows, device, parallel),
        "language model": lambda rows, parallel: model_step(
            Experiment.read(options.experiment, batch=rows), device, options.compile
        ),
    }
    # Before there is a process group: a Trainer would share its rows.
    steps: dict[tuple[str, str], Step | None] = {
        (name, "alone"): make(options.rows, False) if rank == 0 else None for name, make in build.items()
    }
    for step in filter(None, steps.values()):
        for _ in range(WARM_UP + 1):
            step()
    join()
    for name, make in build.items():
        each = 1 if name == "layer" else options.ranks  # the language model is told the rows of all ranks
        steps |= {(name, "weak"): make(options.rows * each, True)}
        steps |= {(name, "strong"): make(options.rows // options.ranks * each, True)}
    samples: dict[str, list[float]] = {}
    for number in range(_ROUNDS_BEFORE + options.repeats):
        for (name, part), step in steps.items():
            dist.barrier()
            seconds = 0.0 if step is None else _timed(step, device)
            if number >= _ROUNDS_BEFORE:
                samples.setdefault(f"{name}, {part}", []).append(seconds)
    counted = {name: sent(step) for (name, part), step in steps.items() if step is not None and part == "weak"}
    return {"samples": samples, "sent": counted}


def _timed(step: Step, device: torch.device) -> float:
    """Seconds until all that a step asked for is done."""

    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return timed(run)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge. Returns 1 if ``--check`` was given and a bound does not hold, else 0."""
    counts = {"rows": (4, "of the one alone, and of each in weak scaling"), "repeats": (7, "rounds")}
    parser = ranks.parser("cluster", __doc__, "check", **counts)
    add = parser.add_argument
    configs = Path(__file__).parents[1] / "examples" / "language_model" / "configs"
    add("--workload", choices=WORKLOADS, metavar="NAME", default="step-128", help="of the layer: config and length")
    add("--experiment", type=Path, default=configs / "tiny.toml", help="of the language model")
    add("--compile", action="store_true", help="use torch.compile in the language model")
    options = parser.parse_args(arguments)
    if options.rows % options.ranks:
        parser.error(f"--rows must be a multiple of --ranks, {options.ranks}. Received: {options.rows}")
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks:
        parser.error(f"--ranks must be at most the {torch.cuda.device_count()} cards here. Received: {options.ranks}")
    found = ranks.run(measure_rank, options)
    claims = _claims(found["samples"], options)
    tables = [_times(found, options), report.claims_table(f"{options.ranks} ranks over one, rows a second", claims)]
    models = f"layer: {WORKLOADS[options.workload]}", f"language model: {options.experiment.name}"
    legend = (ranks.where(options), *models, report.ROUNDS)
    return report.conclude(legend, tables, claims, options)


def _times(found: dict[str, Any], options: argparse.Namespace) -> Table:
    rows = []
    for name, (calls, size) in found["sent"].items():
        texts = [spread(summarize(found["samples"][f"{name}, {part}"]), factor=1e3) for part in _PARTS]
        rows.append((name, *texts, f"{size / 1e6:.3f} in {calls}"))
    head = (f"alone, {options.rows} rows, ms", f"{options.rows} rows each, ms", f"{options.rows} rows shared, ms")
    return Table("A training step", ("", *head, "sent by a rank, MB in collectives"), rows)


def _claims(samples: dict[str, list[float]], options: argparse.Namespace) -> list[Claim]:
    claims = []
    for name in ("layer", "language model"):
        bound = _BOUND if (options.device, options.ranks, name) == ("cuda", 2, "language model") else None
        for part, factor in (("weak", options.ranks), ("strong", 1)):
            measured = ratio((factor * x for x in samples[f"{name}, alone"]), samples[f"{name}, {part}"])
            claims.append(Claim(f"{name}, {part}", measured, at_least=bound if part == "weak" else None))
    return claims


if __name__ == "__main__":
    sys.exit(main())
