"""The torch backend on CPU beside a dense formulation and a static memory: ``python -m benchmarks.cpu``.

One training step = the forward over all tokens from a given state, then backward of a random cotangent on the outputs
into query, value and gate. Rounds are interleaved: every round draws new inputs and runs every contestant at every
workload, and ratios are taken within rounds. Scoring is timed alone, right after its step, and subtracted.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks import baselines, compare, measure, report
from benchmarks.internals import torch_select
from benchmarks.measure import Summary, ratio, summarize
from benchmarks.report import Claim, Table, mebibytes, milliseconds
from benchmarks.steps import TorchSteps
from benchmarks.worker import Worker
from benchmarks.workloads import WORKLOADS, Inputs, Workload, by_size, make_inputs

_DEFAULT_WORKLOADS = ("step-128", "step-256", "step-512", "step-1024")
_LEGEND = (
    "medians with their quartiles; rounds are interleaved, and ratios of times are taken within rounds",
    "scoring (sub-scores and their top-k) is timed alone after each step, and the rest is the difference",
    "extra memory is the rise of the resident pages in one step; tables, inputs and libraries do not count",
)
_AGREEMENT = 1e-5  # of the median token's output; a near tie moves single tokens, a wrong equation moves all


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the work."""

    what: str
    step: Callable[[TorchSteps, Inputs], tuple[Tensor, ...]]
    """A training step from the bench's tables: the output, then whatever must not be freed while the clock runs."""
    score: Callable[[TorchSteps, Inputs], Any]
    """The scoring of that step alone: all sub-scores and their top-k."""
    tables: int
    """About how many value tables it needs at its peak, the bench's own one included."""
    writes: bool = True
    """Whether it computes the whole memory, so that its output must agree with the others'."""

    def fits(self, workload: Workload) -> bool:
        """Whether the memory at hand suffices for a step, so that none ends the run."""
        return (self.tables - 1) * workload.table_bytes < measure.available_bytes()


def _by_chunk(select: Callable[..., Any]) -> Callable[[TorchSteps, Inputs], None]:
    """Scoring in the calls that a step makes: one per chunk."""

    @torch.no_grad()
    def score(bench: TorchSteps, inputs: Inputs) -> None:
        for query in inputs.query.split(bench.config.chunk_size, dim=1):
            select(bench.config, bench.state.memory.keys, query)

    return score


def _dense_step(bench: TorchSteps, inputs: Inputs) -> tuple[Tensor, ...]:
    output, memory = baselines.dense(bench.config, bench.state.memory, *inputs.tokens)
    return output, *torch.autograd.grad(output, inputs.tokens, inputs.cotangent), *memory


def _static_step(bench: TorchSteps, inputs: Inputs, *, train: bool) -> tuple[Tensor, ...]:
    keys, rows = bench.state.memory.keys.detach(), bench.state.memory.values.detach().flatten(0, 1)
    tables = (keys.requires_grad_(), rows.requires_grad_()) if train else ()
    output = baselines.static(bench.config, keys, rows, inputs.query)
    return output, *torch.autograd.grad(output, (inputs.query, *tables), inputs.cotangent)


@torch.no_grad()
def _static_score(bench: TorchSteps, inputs: Inputs) -> Any:
    return baselines.static_select(bench.config, bench.state.memory.keys, inputs.query)


_DENSE_SCORE, _TORCH_SCORE = _by_chunk(baselines.dense_select), _by_chunk(torch_select)
# In place comes last, so that all the others see the same tables in a round.
CONTESTANTS = {
    "dense": Contestant("(a) autograd through whole tables", _dense_step, _DENSE_SCORE, 6),
    "static": Contestant(
        "(b) static product-key memory", partial(_static_step, train=True), _static_score, 1, writes=False
    ),
    "static-frozen": Contestant(
        "the same with frozen tables", partial(_static_step, train=False), _static_score, 1, writes=False
    ),
    "torch-copy": Contestant(
        "torch backend, functional: one table copy", partial(TorchSteps.train, inplace=False), _TORCH_SCORE, 3
    ),
    "torch": Contestant("torch backend, inplace=True", TorchSteps.train, _TORCH_SCORE, 1),
}
"""Everything that is compared, by name, in the order of a round."""


class Sample(NamedTuple):
    """One timed step, in seconds."""

    total: float
    scoring: float

    @property
    def rest(self) -> float:
        """Everything but scoring."""
        return self.total - self.scoring


@dataclasses.dataclass(frozen=True)
class Results:
    """What one run measured. Sample i of every list belongs to round i, so samples can be compared in pairs."""

    workloads: list[Workload]
    """From the smallest table to the largest."""
    samples: dict[tuple[str, str], list[Sample]]
    """By workload and contestant."""
    memory: dict[tuple[str, str], int | None]
    """Extra bytes by workload and contestant."""

    @property
    def focus(self) -> Workload:
        """The workload that the bounds on ratios are stated for: step-512, or the last where it was not run."""
        return next((workload for workload in self.workloads if workload.name == "step-512"), self.workloads[-1])

    def of(self, workload: Workload, contestant: str, part: str) -> list[float]:
        """Seconds by round of a part: "total", "scoring" or "rest"."""
        return [getattr(sample, part) for sample in self.samples[workload.name, contestant]]

    def time_ratio(self, contestant: str, other: str) -> Summary | None:
        """Time of a step over time of another's, round by round."""
        return ratio(*(self.of(self.focus, name, "total") for name in (contestant, other)))

    def memory_ratio(self, contestant: str, other: str) -> Summary | None:
        """Extra memory over another's."""
        size, reference = (self.memory.get((self.focus.name, name)) for name in (contestant, other))
        return summarize([size / reference] if size is not None and reference else [])

    def growth(self, contestant: str) -> Summary | None:
        """Everything but scoring at the largest N over the same at the smallest, round by round."""
        ends = self.workloads[-1], self.workloads[0]
        return ratio(*(self.of(workload, contestant, "rest") for workload in ends)) if len(self.workloads) > 1 else None

    def cell(self, workload: Workload, name: str, part: str) -> str:
        """A number of a table: "total", "scoring" or "rest" in ms, or "memory" in MiB."""
        if part == "memory":
            return mebibytes(self.memory.get((workload.name, name)))
        return milliseconds(summarize(self.of(workload, name, part)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge. Returns 1 if ``--check`` was given and a bound does not hold, else 0."""
    options = _parser().parse_args(arguments)
    if options.against:
        return compare.main("cpu", options, options.workload)
    workloads = by_size(options.workload or _DEFAULT_WORKLOADS)
    results = measure_all(workloads, options.repeats, options.seconds)
    claims = _claims(results, options)
    report.show(_LEGEND, _tables(results, claims), markdown=options.markdown)
    if options.json:
        _save(options.json, results, claims)
    return report.verdict(claims) if options.check else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    report.add_options(parser, _DEFAULT_WORKLOADS)
    parser.add_argument(
        "--seconds", type=float, default=20, help="a contestant that took longer in all sits out (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write every sample here")
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
        sizes = progress.track(_extra_memory(workloads), len(workloads) * len(CONTESTANTS), description="memory")
        memory = dict(sizes)
        benches = [TorchSteps(workload) for workload in workloads]
        samples: dict[tuple[str, str], list[Sample]] = {
            (workload.name, name): [] for workload in workloads for name in CONTESTANTS
        }
        for bench in benches:  # warm up; the dense formulation only where it is quick: each step's tables are new
            names = [name for name in CONTESTANTS if name != "dense" or bench is benches[0]]
            list(_round(bench, names, make_inputs(bench.workload, seed=0)))
        for number in progress.track(range(repeats), description="rounds"):
            for bench in benches:
                mine = {name: samples[bench.workload.name, name] for name in CONTESTANTS}
                names = [name for name in CONTESTANTS if sum(sample.total for sample in mine[name]) <= seconds]
                for name, sample in _round(bench, names, make_inputs(bench.workload, seed=number + 1)):
                    mine[name].append(sample)
    return Results(workloads, samples, memory)


def _extra_memory(workloads: list[Workload]) -> Iterator[tuple[tuple[str, str], int | None]]:
    """Bytes by workload and contestant, one after the other as they are measured in another process."""
    # A fixed threshold makes malloc map every large block by itself and unmap it when freed.
    with Worker(MALLOC_MMAP_THRESHOLD_=str(256 * 1024)) as worker:
        for name in CONTESTANTS:  # loads what loads once, and leaves nothing large
            worker.run(extra_bytes, "tiny", name)
        for workload in workloads:
            for name in CONTESTANTS:
                yield (workload.name, name), worker.run(extra_bytes, workload.name, name)


def extra_bytes(workload: str, contestant: str) -> int | None:
    """Of one step, as :func:`benchmarks.measure.peak_extra_bytes` counts; None where too little memory is at hand.

    Tables, inputs and libraries are in the baseline; graph, temporaries, outputs, gradients and new tables are not.
    """
    bench = TorchSteps(WORKLOADS[workload])
    inputs, step = make_inputs(bench.workload, seed=1), CONTESTANTS[contestant].step
    fits = CONTESTANTS[contestant].fits(bench.workload)
    return measure.peak_extra_bytes(step, bench, inputs) if fits else None


def _round(bench: TorchSteps, names: list[str], inputs: Inputs) -> Iterator[tuple[str, Sample]]:
    """One step of each contestant from the same tables, on the same inputs; what should agree is compared.

    Raises:
        RuntimeError: outputs differ; times of different results prove nothing.
    """
    expected = None
    for name in names:
        contestant = CONTESTANTS[name]
        if not contestant.fits(bench.workload):
            continue
        total, made = measure.timed(contestant.step, bench, inputs)
        output = made[0].detach()
        del made  # all else that the step made is freed
        scoring, _ = measure.timed(contestant.score, bench, inputs)
        if contestant.writes:
            expected = output if expected is None else expected
            error = ((output - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
            if not error <= _AGREEMENT:
                raise RuntimeError(f"{name} computes something else. Received: a relative difference of {error:.1e}")
        yield name, Sample(total, scoring)


def _tables(results: Results, claims: list[Claim]) -> list[Table]:
    columns = ("one training step", "steps", "time, ms", "scoring, ms", "the rest, ms", "extra memory, MiB")
    tables = []
    for workload in results.workloads:
        rows = []
        for name, contestant in CONTESTANTS.items():
            cells = (results.cell(workload, name, part) for part in ("total", "scoring", "rest", "memory"))
            rows.append((contestant.what, str(len(results.samples[workload.name, name])), *cells))
        title = f"{workload.name}: {workload}, value table {mebibytes(workload.table_bytes)} MiB"
        tables.append(Table(title, columns, rows))
    parts = {"rest": "everything but scoring, ms", "scoring": "scoring, ms", "memory": "extra memory, MiB"}
    sizes = ("against N", *(f"{workload.config.num_subkeys}²" for workload in results.workloads))
    for part, title in parts.items() if len(results.workloads) > 1 else ():
        rows = [
            (contestant.what, *(results.cell(workload, name, part) for workload in results.workloads))
            for name, contestant in CONTESTANTS.items()
        ]
        tables.append(Table(title, sizes, rows))
    return [*tables, report.claims_table(f"Ratios at {results.focus.name}", claims)]


def _save(path: str, results: Results, claims: list[Claim]) -> None:
    workloads = {
        workload.name: {
            "shapes": str(workload),
            "seconds": {name: [x._asdict() for x in results.samples[workload.name, name]] for name in CONTESTANTS},
            "extra_bytes": {name: results.memory.get((workload.name, name)) for name in CONTESTANTS},
        }
        for workload in results.workloads
    }
    ratios = [dataclasses.asdict(claim) | {"verdict": claim.verdict} for claim in claims]
    with open(path, "w") as file:
        json.dump(measure.environment() | {"workloads": workloads, "ratios": ratios}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
