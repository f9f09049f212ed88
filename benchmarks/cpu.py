"""The torch backend on CPU beside a dense formulation and a static memory: ``python -m benchmarks.cpu``.

One training step = the forward over all tokens from a given state, then backward of a random cotangent on the outputs
into query, value and gate. Rounds are interleaved: every round draws new inputs and runs every contestant at every
workload, and ratios are taken within rounds. Scoring is timed alone, right after its step, and subtracted.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import measure, report
from benchmarks.contestants import CONTESTANTS, Bench, Contestant
from benchmarks.data import Inputs, make_inputs
from benchmarks.memory import extra_memory
from benchmarks.report import Claim, Results, Sample, Table
from benchmarks.workloads import WORKLOADS, Workload

_DEFAULT_WORKLOADS = ("step-128", "step-256", "step-512", "step-1024")
_LEGEND = (
    "medians with their quartiles; rounds are interleaved, and ratios of times are taken within rounds",
    "scoring (sub-scores and their top-k) is timed alone after each step, and the rest is the difference",
    "extra memory is the rise of the resident pages in one step; tables given, inputs and libraries do not count",
)
_AGREEMENT = 1e-5  # of the median token's output; a near tie moves single tokens, a wrong equation moves all


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge. Returns 1 if ``--check`` was given and a bound does not hold, else 0."""
    options = _parser().parse_args(arguments)
    workloads = sorted((WORKLOADS[name] for name in set(options.workload)), key=lambda workload: workload.table_bytes)
    results = measure_all(workloads, options.repeats, options.seconds)
    claims = _claims(results, options)
    report.show(_LEGEND, _tables(results, claims), markdown=options.markdown)
    if options.json:
        _save(options.json, results, claims)
    return report.verdict(claims) if options.check else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=WORKLOADS,
        default=_DEFAULT_WORKLOADS,
        metavar="NAME",
        help=f"of {', '.join(WORKLOADS)} (default: {' '.join(_DEFAULT_WORKLOADS)})",
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=20, help="a contestant that took longer in all sits out (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write every sample here")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--check", action="store_true", help="fail where a bound does not hold or was not measured")
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--dense-time", type=float, default=10, help="time of dense / torch, at least (%(default)s)")
    bounds.add_argument("--dense-memory", type=float, default=0.25, help="torch / dense, at most (%(default)s)")
    bounds.add_argument("--static-time", type=float, default=4, help="torch / static, at most (%(default)s)")
    bounds.add_argument("--growth", type=float, default=1.2, help="rest at largest / smallest N (%(default)s)")
    return parser


def _claims(results: Results, options: argparse.Namespace) -> list[Claim]:
    sizes = " / ".join(f"N={results.workloads[i].config.num_subkeys}²" for i in (-1, 0))
    return [
        Claim("time: dense / torch", results.time_ratio("dense", "torch"), at_least=options.dense_time),
        Claim("extra memory: torch / dense", results.memory_ratio("torch", "dense"), at_most=options.dense_memory),
        Claim("time: torch / static", results.time_ratio("torch", "static"), at_most=options.static_time),
        Claim(f"everything but scoring, torch: {sizes}", results.growth("torch"), at_most=options.growth),
        Claim("time: dense / torch-copy", results.time_ratio("dense", "torch-copy")),
        Claim("extra memory: torch-copy / dense", results.memory_ratio("torch-copy", "dense")),
        Claim("time: torch / static-frozen", results.time_ratio("torch", "static-frozen")),
    ]


def measure_all(workloads: list[Workload], repeats: int, seconds: float) -> Results:
    """Memory first, in a process of its own, then time in ``repeats`` interleaved rounds.

    Args:
        workloads: from the smallest table to the largest.
        repeats: rounds.
        seconds: a contestant whose steps at a workload took longer in all sits out the rounds that remain.
    """
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        memory = _measure_memory(workloads, progress)
        samples = _measure_time(workloads, repeats, seconds, progress)
    return Results(workloads, samples, memory)


def _measure_memory(workloads: list[Workload], progress: Progress) -> dict[tuple[str, str], int | None]:
    sizes = progress.track(extra_memory(workloads), len(workloads) * len(CONTESTANTS), description="memory")
    return {(workload, name): size for workload, name, size in sizes}


def _measure_time(
    workloads: list[Workload], repeats: int, seconds: float, progress: Progress
) -> dict[tuple[str, str], list[Sample]]:
    benches = [Bench(workload) for workload in workloads]
    samples: dict[tuple[str, str], list[Sample]] = {
        (workload.name, name): [] for workload in workloads for name in CONTESTANTS
    }
    for bench in benches:
        _warm_up(bench, dense=bench is benches[0])
    for number in progress.track(range(repeats), description="rounds"):
        for bench in benches:
            mine = {name: samples[bench.workload.name, name] for name in CONTESTANTS}
            names = [name for name in CONTESTANTS if sum(sample.total for sample in mine[name]) <= seconds]
            for name, sample in _round(bench, names, make_inputs(bench.workload, seed=number + 1)):
                mine[name].append(sample)
    return samples


def _warm_up(bench: Bench, *, dense: bool) -> None:
    """One step of each; of the dense formulation only where it is quick, since all its tables are new in every step."""
    names = [name for name in CONTESTANTS if dense or name != "dense"]
    for _ in _round(bench, names, make_inputs(bench.workload, seed=0)):
        pass


def _round(bench: Bench, names: list[str], inputs: Inputs) -> Iterator[tuple[str, Sample]]:
    """One step of each contestant from the same tables, on the same inputs; what should agree is compared."""
    expected = None
    for name in names:
        contestant = CONTESTANTS[name]
        if not contestant.fits(bench):
            continue
        sample, output = _sample(contestant, bench, inputs)
        if contestant.writes:
            expected = output if expected is None else expected
            _require_agreement(name, output, expected)
        yield name, sample


def _sample(contestant: Contestant, bench: Bench, inputs: Inputs) -> tuple[Sample, torch.Tensor]:
    """Times of one step, and its output; all else it made is freed."""
    total, made = measure.timed(contestant.step, bench, inputs)
    output = made[0].detach()
    del made
    scoring, _ = measure.timed(contestant.score, bench, inputs)
    return Sample(total, scoring), output


def _require_agreement(name: str, output: torch.Tensor, expected: torch.Tensor) -> None:
    """Times of different results prove nothing.

    Raises:
        RuntimeError: the outputs differ.
    """
    error = ((output - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
    if not error <= _AGREEMENT:
        raise RuntimeError(f"{name} computes something else. Received: a relative difference of {error:.1e}")


def _tables(results: Results, claims: list[Claim]) -> list[Table]:
    steps = [report.steps_table(results, workload) for workload in results.workloads]
    growth = report.growth_tables(results) if len(results.workloads) > 1 else []
    return [*steps, *growth, report.claims_table(f"Ratios at {results.focus.name}", claims)]


def _save(path: str, results: Results, claims: list[Claim]) -> None:
    def by_contestant(measured: dict[tuple[str, str], Any], workload: Workload) -> dict[str, Any]:
        return {name: measured.get((workload.name, name)) for name in CONTESTANTS}

    workloads = {
        workload.name: {
            "shapes": str(workload),
            "seconds": {
                name: [sample._asdict() for sample in samples]
                for name, samples in by_contestant(results.samples, workload).items()
            },
            "extra_bytes": by_contestant(results.memory, workload),
        }
        for workload in results.workloads
    }
    ratios = [dataclasses.asdict(claim) | {"verdict": claim.verdict} for claim in claims]
    with open(path, "w") as file:
        json.dump(measure.environment() | {"workloads": workloads, "ratios": ratios}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
