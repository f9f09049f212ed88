"""The Triton kernels on a GPU: they agree, and only then how fast they are: ``python -m benchmarks.gpu``.

Agreement comes first, side by side in several processes: every vector; the float64 reference at small shapes; eager
float32 at the shapes that are timed, under the tie rule of SPEC.md §6. Inputs are drawn anew in every run, memory holds
NaN before the kernels write it, and all is computed twice for equal bits. Then one process at a time has the GPU to
itself. What did not agree is not timed, and the exit status is 1.
"""

import argparse
import importlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import compare, gpu_agreement, gpu_graphs, gpu_report, gpu_speed, measure, report
from benchmarks.findings import Report, equal
from benchmarks.gpu_report import Results
from benchmarks.worker import Outcome, Task, run_all
from benchmarks.workloads import WORKLOADS, Workload
from fwpkm import vectors

_LEGEND = (
    "medians with their quartiles, by CUDA events around single calls, read in turn from three sets of bfloat16 inputs",
    "tables are rewritten in place: Dk = Dv = 512, H = 1, k = 8, C = 512; attention: 8 heads x 64, causal, bfloat16",
    "captured: one call in a CUDA graph, replayed with one set of inputs, so without the host's part",
    "the floor: each input and touched row read once, each output and touched row written once, at a copy's bandwidth",
)
_CHECK_LIMIT, _TIMING_LIMIT = 240.0, 120.0
_OUT_OF_MEMORY = "OutOfMemoryError"

SECTIONS = ("agreement", "bits", "graphs", "conform", "speed", "decode")
DTYPE = "bfloat16"
"""Of the inputs that are timed."""
READ = tuple(f"read-{length}k-{s}" for length in (4, 32, 128) for s in (512, 256, 1024, 2048))
"""One sequence."""
TINY = WORKLOADS["tiny-kernels"]
_SHAPES = ("shared-2048", "train-512", "shared-1024", "shared-512", "shared-256", "read-32k-512", "read-128k-512")
"""What is timed is compared as it is timed."""
_TAIL = Workload("tail-512", WORKLOADS["shared-512"].config, batch=5, length=1300)
"""Two chunks of each sequence and a part of a third, whose gradients pass through the final tables. The sums over that
part's tokens have more pieces than those over a chunk's."""
_STEP = Workload("step-256", WORKLOADS["shared-256"].config, batch=2, length=1300)
_DECODED = Workload("decode-512", WORKLOADS["decode-512"].config, batch=1, length=1100)
_CONFORM_SHAPES = 10


def checks(sections: set[str], seed: int, tiny: bool) -> list[Task]:
    """Tasks that may run side by side, long ones first; each returns a ``Report``.

    What is to be timed is compared first, whether or not "agreement" is among the sections. ``tiny`` ones are for tests
    of this command in Triton's interpreter.
    """
    if tiny:
        plan = [
            _eager(TINY, "float32", seed),
            Task("agreement", "float64 reference at small shapes: tiny", gpu_agreement.drawn, ("tiny", seed, (2,))),
            *(Task("bits", f"bits: process {n}", gpu_graphs.repeatable, (TINY, "float32", seed, 2)) for n in (1, 2)),
            Task("decode", "decode, against eager", gpu_graphs.decoded, (TINY, "float32", seed)),
        ]
        return _of(sections, plan)
    step = (_STEP, DTYPE, seed)
    plan = [
        *(_eager(WORKLOADS[name], DTYPE, seed, derived=name != "read-128k-512") for name in _SHAPES),
        # Each of conform's shapes compiles, so they do it side by side before the whole run.
        *(Task("conform", f"fwpkm conform: case {n}", conform, ("--case", str(n))) for n in range(_CONFORM_SHAPES)),
        Task("graphs", "torch.compile(fullgraph=True) of the layer", gpu_graphs.compiled, (seed,)),
        Task("decode graphs", "decode in a CUDA graph, against eager", gpu_graphs.decoded, (_DECODED, DTYPE, seed)),
        *(_eager(_TAIL, dtype, seed, tables=True) for dtype in ("float32", "bfloat16", "float16")),
        *(
            Task("agreement", f"float64 reference at small shapes: {name}", gpu_agreement.drawn, (name, seed))
            for name in gpu_agreement.SHAPES
        ),
        *(
            Task("bits", f"bits: process {n}", gpu_graphs.repeatable, (WORKLOADS["shared-512"], DTYPE, seed))
            for n in (1, 2)
        ),
        Task("graphs", "a training step without a wait", gpu_graphs.unsynchronized, step),
        Task("graphs", "a training step in a CUDA graph", gpu_graphs.captured, step),
        Task("conform", "fwpkm conform: 40 cases", conform, ("--cases", "40")),
        *(Task("agreement", f"vectors: {name}", gpu_agreement.vector, (name,)) for name in vectors.names()),
    ]
    return _of(sections, plan)


def _of(sections: set[str], plan: list[Task]) -> list[Task]:
    return [task for task in plan if sections.intersection(task.section.split())]


def timings(sections: set[str], tiny: bool) -> list[Task]:
    """Tasks that need the GPU to themselves."""

    def task(name: str, prefix: str = "", function: Callable = gpu_speed.speed, section: str = "speed") -> Task:
        return Task(section, prefix + name, function, (WORKLOADS[name], DTYPE))

    def attention(batch: int, length: int) -> Task:
        width = WORKLOADS["shared-512"].config.value_dim
        return Task("speed", f"attention: B={batch} T={length}", gpu_speed.attention, (batch, length, width, DTYPE))

    plan = [
        Task("speed", "copy bandwidth", measure.copy_bandwidth),
        *map(task, ("shared-512", "train-512", "shared-256", "shared-1024", "shared-2048")),
        task("decode-512", "decode: ", gpu_speed.decoding, "decode"),
        attention(8, 4096),
        *(task(name, "kernels: ", gpu_speed.kernels) for name in gpu_report.PROFILED),
        *(task(name, "initial state: ", gpu_speed.initial_state) for name in ("shared-512", "train-512")),
        *(attention(1, WORKLOADS[name].length) for name in READ if name.endswith("-512")),
        *map(task, READ),
    ]
    if tiny:
        plan = [
            Task("speed", "copy bandwidth", measure.copy_bandwidth, (2**20,)),
            Task("speed", TINY.name, gpu_speed.speed, (TINY, "float32", 1)),
            Task("decode", f"decode: {TINY.name}", gpu_speed.decoding, (TINY, "float32")),
        ]
    return _of(sections, plan)


def _eager(workload: Workload, dtype: str, seed: int, derived: bool = True, tables: bool = False) -> Task:
    name = f"eager at {workload.name}, {dtype}: {workload}"
    section = "agreement" if tables else "agreement speed"
    return Task(section, name, gpu_agreement.agree, (workload, dtype, seed, derived, tables))


def conform(*arguments: str) -> Report:
    """``fwpkm conform`` of the kernels.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    command = [sys.executable, "-m", "fwpkm.cli", "conform", "--backends", "triton", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    last = done.stdout.strip().splitlines()[-1:]
    return Report([equal(f"fwpkm conform {' '.join(arguments)} passes", True)], last)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print, judge.

    Returns:
        2 where there is no CUDA device; 1 where something raised or did not agree, or, with ``--check``, where a target
        is missed or was not measured; else 0.
    """
    options = _parser().parse_args(arguments)
    importlib.import_module("triton")  # whose version stands above the tables
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read by the processes that import the kernels
    elif not torch.cuda.is_available():
        print(
            f"python -m benchmarks.gpu needs a CUDA device, and torch {torch.__version__} finds none here: "
            f"torch.cuda.is_available() is False",
            file=sys.stderr,
        )
        return 2
    if options.against:
        return compare.main("gpu", options, [TINY.name] if options.interpret else None)
    for threads in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):  # many processes on few cores
        os.environ.setdefault(threads, "1")
    started = time.perf_counter()
    sections, seed = set(options.only), secrets.randbits(31) if options.seed is None else options.seed
    results = Results()
    _say(f"seed {seed}")
    patience = 4 if options.interpret else 1
    _check(results, checks(sections, seed, options.interpret), options.workers, patience * _CHECK_LIMIT)
    _time(results, timings(sections, options.interpret), patience * _TIMING_LIMIT)
    claims = [] if options.interpret else gpu_report.targets(results, sections)
    notes = [f"{x.task.name}: {note}" for x in results.checks if x.result for note in x.result.notes]
    legend = (*_LEGEND, f"seed {seed}; the whole run took {time.perf_counter() - started:.0f} s", *notes)
    report.show(legend, gpu_report.tables(results, claims), markdown=options.markdown)
    missed = report.verdict(claims) if options.check else 0
    for name in (*results.failed, *results.silenced):
        _say(f"FAILED: {name}" if name in results.failed else f"not timed, since it was not shown to agree: {name}")
    return int(bool(missed or results.failed or results.silenced))


def _check(results: Results, tasks: list[Task], workers: int, limit: float) -> None:
    """Run the checks side by side; those that found too little memory beside the others again, alone."""
    outcomes = _run(tasks, workers, limit, gpu_report.check_line)
    crowded = [outcome.task for outcome in outcomes if _OUT_OF_MEMORY in outcome.error]
    outcomes = [outcome for outcome in outcomes if _OUT_OF_MEMORY not in outcome.error]
    outcomes += _run(crowded, 1, limit, gpu_report.check_line)
    digests = [x.result.digest for x in outcomes if isinstance(x.result, Report) and x.result.digest]
    if len(digests) > 1:
        compared = Report([equal("sha256 in two processes", len(set(digests)) == 1)])
        outcomes.append(Outcome(Task("bits", "bits: between processes", set), compared, "", 0.0))
        _say(gpu_report.check_line(outcomes[-1]))
    order = {task.name: number for number, task in enumerate(tasks)}
    results.checks = sorted(outcomes, key=lambda outcome: order.get(outcome.task.name, len(order)))
    results.failed += [outcome.task.name for outcome in results.checks if not gpu_report.agrees(outcome)]


def _time(results: Results, tasks: list[Task], limit: float) -> None:
    """Run, one after the other, the timings of what agrees."""
    results.silenced += [task.name for task in tasks if not results.agreed(task)]
    for outcome in _run([task for task in tasks if results.agreed(task)], 1, limit, gpu_report.timing_line):
        if outcome.error:
            results.failed.append(outcome.task.name)
        else:
            results.timings[outcome.task.name] = outcome.result


def _run(tasks: list[Task], workers: int, limit: float, line: Callable[[Outcome], str]) -> list[Outcome]:
    """Outcomes of the tasks, each told as it comes."""
    outcomes = []
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("checks" if workers > 1 else "timings", total=len(tasks))
        for outcome in run_all(tasks, workers, limit):
            outcomes.append(outcome)
            progress.advance(bar)
            console.print(line(outcome), markup=False)
            if outcome.error:
                console.print(outcome.error, markup=False)
    return outcomes


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: all); speed and decode first compare what they time",
    )
    parser.add_argument("--seed", type=int, help="of inputs and tables (default: another one in every run)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(12, len(os.sched_getaffinity(0))),
        help="processes that check agreement side by side (default: %(default)s)",
    )
    report.add_options(parser)
    # For tests, where there is no GPU: a few tiny shapes in Triton's interpreter.
    parser.add_argument("--interpret", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
