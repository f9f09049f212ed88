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
import sys
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import gpu_plan, gpu_tables, report
from benchmarks.gpu_tables import Results
from benchmarks.gpu_tasks import Outcome, Task, run_all

_LEGEND = (
    "medians with their quartiles, by CUDA events around single calls, read in turn from three sets of bfloat16 inputs",
    "tables are rewritten in place: Dk = Dv = 512, H = 1, k = 8, C = 512; attention: 8 heads x 64, causal, bfloat16",
    "captured: one call in a CUDA graph, replayed with one set of inputs, so without the host's part",
    "the floor: each input and touched row read once, each output and touched row written once, at a copy's bandwidth",
)
_CHECK_LIMIT, _TIMING_LIMIT = 240.0, 120.0
_OUT_OF_MEMORY = "OutOfMemoryError"


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
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # many processes on few cores
    started = time.perf_counter()
    sections, seed = set(options.only), secrets.randbits(31) if options.seed is None else options.seed
    results = Results()
    _say(f"seed {seed}")
    _check(results, gpu_plan.checks(sections, seed, options.interpret), options.workers)
    _time(results, gpu_plan.timings(sections, options.interpret))
    claims = [] if options.interpret else gpu_tables.targets(results, sections)
    _show(results, claims, seed, time.perf_counter() - started, options.markdown)
    missed = report.verdict(claims) if options.check else 0
    for name in (*results.failed, *results.silenced):
        _say(f"FAILED: {name}" if name in results.failed else f"not timed, since it was not shown to agree: {name}")
    return int(bool(missed or results.failed or results.silenced))


def _check(results: Results, tasks: list[Task], workers: int) -> None:
    """Run the checks side by side; those that found too little memory beside the others again, alone."""
    outcomes = _run(tasks, workers, _CHECK_LIMIT, gpu_tables.check_line)
    crowded = [outcome.task for outcome in outcomes if _OUT_OF_MEMORY in outcome.error]
    outcomes = [outcome for outcome in outcomes if _OUT_OF_MEMORY not in outcome.error]
    outcomes += _run(crowded, 1, _CHECK_LIMIT, gpu_tables.check_line)
    compared = gpu_tables.between_processes(outcomes)
    if compared is not None:
        task = Task("bits", "bits: between processes", gpu_tables.between_processes)
        outcomes.append(Outcome(task, compared, "", 0.0))
        _say(gpu_tables.check_line(outcomes[-1]))
    position = {task.name: number for number, task in enumerate(tasks)}
    results.checks = sorted(outcomes, key=lambda outcome: position.get(outcome.task.name, len(position)))
    results.failed += [outcome.task.name for outcome in results.checks if not gpu_tables.agrees(outcome)]


def _time(results: Results, tasks: list[Task]) -> None:
    """Run, one after the other, the timings of what agrees."""
    results.silenced += [task.name for task in tasks if not results.agreed(task)]
    for outcome in _run([task for task in tasks if results.agreed(task)], 1, _TIMING_LIMIT, gpu_tables.timing_line):
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


def _show(results: Results, claims: list[report.Claim], seed: int, seconds: float, markdown: bool) -> None:
    tables = [gpu_tables.agreement_table(results.checks)] if results.checks else []
    for make in (gpu_tables.speed_tables, gpu_tables.kernel_tables, gpu_tables.other_tables):
        tables += make(results)
    if claims:
        tables.append(report.claims_table("Targets, for one H200", claims, "target"))
    notes = [
        f"{outcome.task.name}: {note}" for outcome in results.checks if outcome.result for note in outcome.result.notes
    ]
    legend = (*_LEGEND, f"seed {seed}; the whole run took {seconds:.0f} s", *notes)
    report.show(legend, tables, markdown=markdown)
    sys.stdout.flush()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=gpu_plan.SECTIONS,
        default=gpu_plan.SECTIONS,
        metavar="SECTION",
        help=f"of {', '.join(gpu_plan.SECTIONS)} (default: all); speed and decode first compare what they time",
    )
    parser.add_argument("--seed", type=int, help="of inputs and tables (default: another one in every run)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(12, len(os.sched_getaffinity(0))),
        help="processes that check agreement side by side (default: %(default)s)",
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--check", action="store_true", help="fail where a target is missed or was not measured")
    # For tests, where there is no GPU: a few tiny shapes in Triton's interpreter.
    parser.add_argument("--interpret", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
