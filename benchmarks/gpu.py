"""The Triton kernels on a GPU: they agree, and only then how fast they are: ``python -m benchmarks.gpu``.

Agreement comes first, side by side in several processes: every vector; the float64 reference at small shapes; eager
float32 at the shapes that are timed, under the tie rule of SPEC.md §6. Inputs are drawn anew in every run, memory holds
NaN before the kernels write it, and all is computed twice for equal bits. Then one process at a time has the GPU to
itself. What did not agree is not timed, and the exit status is 1.
"""

import dataclasses
import importlib
import os
import secrets
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import compare, gpu_agreement, gpu_layer, gpu_report, gpu_speed, report
from benchmarks.findings import Report, equal
from benchmarks.worker import Outcome, Task, run_all
from benchmarks.workloads import WORKLOADS, Workload
from fwpkm import FwPKMConfig, vectors

_LEGEND = (
    "medians with their quartiles, by CUDA events around single calls, read in turn from three sets of bfloat16 inputs",
    "tables are rewritten in place: Dk = Dv = 512, H = 1, k = 8, C = 512; attention: 8 heads x 64, causal, bfloat16",
    "captured: one call in a CUDA graph, replayed with one set of inputs, so without the host's part",
    "the floor: each input and touched row read once, each output and touched row written once, at a copy's bandwidth",
)
SECTIONS = ("agreement", "bits", "graphs", "conform", "speed", "rows", "stateless", "layer", "decode")
ASKED = ("jax",)
"""Sections that run only where they are named: they need jax-triton."""
DTYPE = "bfloat16"
"""Of the inputs that are timed."""
CHECK_LIMIT, TIMING_LIMIT = 240.0, 120.0
"""Seconds that a task may take."""
_JAX = "shared-512"
"""What JAX is timed at."""
_ROWS = "train-512"
"""What rows that are not alike are timed at."""
_TIMED = dict.fromkeys(
    ("shared-2048", _ROWS, "shared-1024", "shared-512", "shared-256", "read-32k-512", "read-128k-512"),
    "agreement speed",
) | {_ROWS: "agreement speed rows layer"}
"""What is timed is compared as it is timed, for those sections."""
_TAIL = Workload("tail-512", WORKLOADS["shared-512"].config, batch=5, length=1300)
"""Two chunks of each sequence and a part of a third, whose gradients pass through the final tables. The sums over that
part's tokens have more pieces than those over a chunk's."""
_OVERLAID = dataclasses.replace(WORKLOADS["step-256"], name="overlaid-256", batch=6)
"""Four chunks of six sequences, whose one table has a gradient."""
_AT_REST = dataclasses.replace(
    _OVERLAID, name="at-rest-256", config=dataclasses.replace(_OVERLAID.config, addressing_weight=0.0)
)
"""The same where no write moves the keys: one launch addresses all windows."""
_FAR = Workload("far-1024", WORKLOADS["train-1024"].config, batch=5, length=1300)
"""Whose last numbers lie 2.7e9 behind the first, more than 32 bits count."""
_MANY = FwPKMConfig(16, 16, 1, 16, 4, 4, memory_scope="batch")
_SHARED_BY_MANY = Workload("many-rows", _MANY, batch=70_000, length=5)
_MANY_TABLES = Workload("many-tables", dataclasses.replace(_MANY, num_subkeys=4, memory_scope="sequence"), 32_767, 5)
"""As many rows as a grid's first number counts and others do not; and as many tables as a call may have."""
_STEP = Workload("step-256", WORKLOADS["shared-256"].config, batch=2, length=1300)
_LONG_STEP = dataclasses.replace(_STEP, name="step-long", batch=1, length=20 * _STEP.config.chunk_size)
_DECODED = Workload("decode-512", WORKLOADS["decode-512"].config, batch=1, length=1100)
_DECODED_ROWS = dataclasses.replace(_DECODED, name="decode-512-rows", batch=32)
_CONFORM_SHAPES = 10


def checks(seed: int) -> list[Task]:
    """Tasks that may run side by side, long ones first; each returns a ``Report``."""

    def eager(section: str, workload: Workload, dtype: str, *options: bool) -> Task:
        name = f"eager at {workload.name}, {dtype}: {workload}"
        return Task(section, name, gpu_agreement.agree, (workload, dtype, seed, *options))

    def small(name: str) -> Task:
        return Task("agreement", f"float64 at small shapes: {name}", gpu_agreement.drawn, (name, seed))

    def streams(numbers: range, both: bool = False) -> Task:
        name = f"ragged streams, against eager: {numbers.start} to {numbers.stop - 1}{', a mask beside' * both}"
        return Task("agreement rows", name, gpu_agreement.streams, (numbers, 120, both))

    def stateless(workload: Workload, dtype: str, packed: bool, learned: bool) -> Task:
        name = f"from a memory, against eager: {workload.name}, {dtype}{', packed' * packed}{', learned' * learned}"
        arguments = workload, dtype, seed, packed, learned
        return Task("agreement stateless", name, gpu_agreement.from_memory, arguments)

    bits = WORKLOADS["shared-512"], DTYPE, seed
    return [
        *(eager(_TIMED[name], WORKLOADS[name], DTYPE, name != "read-128k-512") for name in _TIMED),
        *(stateless(WORKLOADS[_ROWS], DTYPE, packed, False) for packed in (False, True)),
        *(stateless(_OVERLAID, dtype, True, True) for dtype in ("float32", "bfloat16")),
        *(stateless(_AT_REST, DTYPE, packed, True) for packed in (False, True)),
        *(streams(range(first, first + 10)) for first in range(0, 40, 10)),
        streams(range(40, 50), both=True),
        # Each of conform's shapes compiles, so they do it side by side before the whole run.
        *(Task("conform", f"fwpkm conform: case {n}", conform, ("--case", str(n))) for n in range(_CONFORM_SHAPES)),
        Task("graphs", "torch.compile(fullgraph=True) of the layer", gpu_agreement.compiled, (seed,)),
        *(
            Task(
                "decode graphs",
                f"decode in a CUDA graph, against eager: B={x.batch}",
                gpu_agreement.decoded,
                (x, DTYPE, seed),
            )
            for x in (_DECODED_ROWS, _DECODED)
        ),
        *(eager("agreement", _TAIL, dtype, True, True) for dtype in ("float32", "bfloat16", "float16")),
        *(eager("agreement", workload, "float32") for workload in (_FAR, _SHARED_BY_MANY, _MANY_TABLES)),
        *map(small, gpu_agreement.SHAPES),
        *(Task("bits", f"bits: process {number}", gpu_agreement.repeatable, bits) for number in (1, 2)),
        Task("graphs", "a training step: no wait, CUDA graph", gpu_agreement.training, (_STEP, DTYPE, seed)),
        Task("graphs", "a training step of 20 chunks: CUDA graph", gpu_agreement.training, (_LONG_STEP, DTYPE, seed)),
        Task(
            "graphs stateless",
            "a training step from a memory: no wait, CUDA graph",
            gpu_agreement.training,
            (_OVERLAID, DTYPE, seed, True),
        ),
        Task("conform", "fwpkm conform: 40 cases", conform, ("--cases", "40")),
        Task("jax", "jax beside torch: as it is timed", in_jax, (WORKLOADS[_JAX], DTYPE, "agree", seed)),
        Task("jax", "jax beside torch: a ragged end", in_jax, (_TAIL, "float32", "agree", seed)),
        Task("jax", "jax beside torch: decode", in_jax, (_DECODED, DTYPE, "decoded", seed)),
        *(Task("jax", f"bits in JAX: process {number}", in_jax, (*bits[:2], "repeatable", seed)) for number in (1, 2)),
        *(Task("jax", f"jax: conform: case {n}", conform_jax, ("--case", str(n))) for n in range(_CONFORM_SHAPES)),
        *(Task("agreement", f"vectors: {name}", gpu_agreement.vector, (name,)) for name in vectors.names()),
    ]


def timings() -> list[Task]:
    """Tasks that need the GPU to themselves."""

    def task(name: str, function: Callable = gpu_speed.speed, prefix: str = "", section: str = "speed") -> Task:
        return Task(section, prefix + name, function, (WORKLOADS[name], DTYPE))

    def attention(batch: int, length: int) -> Task:
        arguments = batch, length, WORKLOADS["shared-512"].config.value_dim, DTYPE
        return Task("speed", f"attention: B={batch} T={length}", gpu_speed.attention, arguments)

    return [
        Task("speed", "copy bandwidth", gpu_speed.bandwidth),
        *map(task, ("shared-512", "train-512", "shared-256", "shared-1024", "shared-2048")),
        *(task(name, gpu_speed.decoding, "decode: ", "decode") for name in ("decode-512", "decode-512-rows")),
        Task("rows", "rows: mask", gpu_speed.masked, (WORKLOADS[_ROWS], DTYPE)),
        Task("rows", "rows: 32", gpu_speed.ragged, (WORKLOADS[_ROWS], DTYPE, 32)),
        *(
            Task("stateless", f"stateless: {number}", gpu_speed.stateless, (WORKLOADS[_ROWS], DTYPE, number))
            for number in (20, 64)
        ),
        Task("jax", f"jax: {_JAX}", in_jax, (WORKLOADS[_JAX], DTYPE, "speed", True)),
        Task("jax", f"jax: anywhere {_JAX}", in_jax, (WORKLOADS[_JAX], DTYPE, "speed", False)),
        Task("layer", "layer: ours", gpu_layer.layer, (WORKLOADS[_ROWS], DTYPE)),
        Task("layer", "layer: Gated DeltaNet", gpu_layer.gated_deltanet, (WORKLOADS[_ROWS], DTYPE)),
        attention(8, 4096),
        *(task(f"shared-{s}", gpu_speed.kernels, "kernels: ") for s in (256, 512, 1024)),
        *(task(name, gpu_speed.initial_state, "initial state: ") for name in ("shared-512", "train-512")),
        *(attention(1, length) for length in (4096, 32768, 131072)),
        *(task(f"read-{length}k-{s}") for length in (4, 32, 128) for s in (512, 256, 1024, 2048)),
    ]


def in_jax(workload: Workload, dtype: str, name: str, *arguments: Any) -> Any:
    """A function of gpu_jax.py, which imports JAX."""
    return getattr(importlib.import_module("benchmarks.gpu_jax"), name)(workload, dtype, *arguments)


def chosen(sections: set[str], tasks: list[Task]) -> list[Task]:
    """Those of some sections: what is to be timed is compared, whether or not "agreement" is among them."""
    return [task for task in tasks if sections.intersection(task.section.split())]


def conform_jax(*arguments: str) -> Report:
    """``conform`` of the JAX backend on the kernels."""
    return conform(*arguments, backend="jax-triton")


def conform(*arguments: str, backend: str = "triton") -> Report:
    """``fwpkm conform`` of the kernels.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    command = [sys.executable, "-m", "fwpkm", "conform", "--backends", backend, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return Report([equal(f"fwpkm conform {' '.join(arguments)} passes", True)], done.stdout.strip().splitlines()[-1:])


def main(arguments: Sequence[str] | None = None, anywhere: bool = False) -> int:
    """Check, time, print, judge.

    Returns:
        2 where there is no CUDA device, unless ``anywhere``; 1 where something raised or did not agree, or, with
        ``--check``, where a target is missed or was not measured; else 0.
    """
    workers = min(12, len(os.sched_getaffinity(0)))
    parser = report.parser("gpu", __doc__, *report.JUDGED, workers=(workers, "checks side by side"))
    sections = f"of {', '.join(SECTIONS)} (default: all) and jax; speed and what follows it compare first"
    parser.add_argument(
        "--only", nargs="+", choices=(*SECTIONS, *ASKED), default=SECTIONS, metavar="SECTION", help=sections
    )
    parser.add_argument("--seed", type=int, help="of inputs and tables (default: another one in every run)")
    options, started = parser.parse_args(arguments), time.perf_counter()
    importlib.import_module("triton")  # whose version stands above the tables
    if not (anywhere or torch.cuda.is_available()):
        finds = f"torch {torch.__version__} finds none here: torch.cuda.is_available() is False"
        _say(f"python -m benchmarks.gpu needs a CUDA device, and {finds}")
        return 2
    if options.against:
        return compare.main("gpu", options)
    for threads in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):  # many processes on few cores
        os.environ.setdefault(threads, "1")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # many processes on one GPU
    only, seed = set(options.only), secrets.randbits(31) if options.seed is None else options.seed
    _say(f"seed {seed}")
    checked = _check(chosen(only, checks(seed)), options.workers)
    planned = chosen(only, timings())
    admitted = [task for task in planned if gpu_report.agreed(checked, task)]
    timed = _run(admitted, 1, TIMING_LIMIT)
    found = {f"{x.task.name}/{name}": samples for x in timed if x.result for name, samples in x.result.items()}
    claims = list(gpu_report.targets(found, only))
    notes = [f"{x.task.name}: {note}" for x in checked if x.result for note in x.result.notes]
    legend = (*_LEGEND, f"seed {seed}; the whole run took {time.perf_counter() - started:.0f} s", *notes)
    missed = report.conclude(legend, gpu_report.tables(checked, found, claims), claims, options)
    failed = [f"FAILED: {x.task.name}" for x in (*checked, *timed) if not gpu_report.agrees(x)]
    failed += [f"not timed, since it was not shown to agree: {task.name}" for task in planned if task not in admitted]
    _say(*failed)
    return int(bool(missed or failed))


def _check(tasks: list[Task], workers: int) -> list[Outcome]:
    """Run the checks side by side; those that found too little memory beside the others again, alone."""
    outcomes = {outcome.task.name: outcome for outcome in _run(tasks, workers, CHECK_LIMIT)}
    crowded = [outcome.task for outcome in outcomes.values() if "OutOfMemoryError" in outcome.error]
    outcomes |= {outcome.task.name: outcome for outcome in _run(crowded, 1, CHECK_LIMIT)}
    ordered = [outcomes[task.name] for task in tasks]
    digests = defaultdict(list)
    for task, result in [(x.task, x.result) for x in ordered if "process" in x.task.name and x.result]:
        digests[task.section, task.name.partition(":")[0]].append(result.notes)
    for (section, name), (first, *others) in digests.items():
        same = Report([equal("sha256 in two processes", others == [first])])
        ordered.append(Outcome(Task(section, f"{name}: between processes", set), same, "", 0.0))
        _say(gpu_report.line(ordered[-1]))
    return ordered


def _run(tasks: list[Task], workers: int, limit: float) -> list[Outcome]:
    """Outcomes of the tasks, each told as it comes."""
    outcomes = []
    for outcome in run_all(tasks, workers, limit):
        outcomes.append(outcome)
        _say(gpu_report.line(outcome), *outcome.error.splitlines())
    return outcomes


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
