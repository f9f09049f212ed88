"""The torch backend on CPU beside a dense formulation and a static memory: ``python -m benchmarks.cpu``.

One training step = the forward over all tokens from a given state, then backward of a random cotangent on the outputs
into query, value and gate. Every round draws new inputs and runs every contestant at every workload from the same
tables. Scoring is timed alone, right after its step, and subtracted.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import baselines, compare, measure, report
from benchmarks.measure import Samples, ratio
from benchmarks.report import Claim
from benchmarks.worker import Worker
from benchmarks.workloads import WORKLOADS, Inputs, TorchSteps, Workload, by_size, make_inputs
from fwpkm import FwPKMConfig
from fwpkm.backends.torch import addressing, tokens

_WORKLOADS = ("step-128", "step-256", "step-512", "step-1024")
_LEGEND = (
    report.ROUNDS,
    "scoring (sub-scores and their top-k) is timed alone after each step, and the rest is the difference",
    "extra memory is the rise of the resident pages in one step; tables, inputs and libraries do not count",
)
_BUDGET = 20.0
"""Seconds at one workload after which a contestant sits out."""
COLUMNS = {
    "time": ("time, ms", 1e3),
    "scoring": ("scoring, ms", 1e3),
    "time without scoring": ("the rest, ms", 1e3),
    "extra memory": ("extra memory, MiB", 2**-20),
}
CLAIMS: tuple[tuple[str, str, str, dict[str, float]], ...] = (
    ("time", "dense", "torch", {"at_least": 10}),
    ("extra memory", "torch", "dense", {"at_most": 0.25}),
    ("time", "torch", "static", {"at_most": 4}),
    ("time", "dense", "torch-copy", {}),
    ("extra memory", "torch-copy", "dense", {}),
    ("time", "torch", "static-frozen", {}),
)
"""Ratios: of what, whose to whose, and the bound."""
GROWTH = 1.2
"""The bound of the torch backend's time without scoring at the largest table over the same at the smallest."""


class Contestant(NamedTuple):
    """One way to do the work."""

    what: str
    step: Callable[[TorchSteps, Inputs], tuple[Tensor | None, ...]]
    """A training step: the output, None where it has no writes; then all that must not be freed while it is timed."""
    select: Callable[..., Any]
    """The scoring of a step's tokens: all sub-scores and their top-k."""
    tables: int
    """About how many value tables it needs at its peak, the given one included."""

    def fits(self, workload: Workload) -> bool:
        """Whether the memory at hand suffices for a step, so that none ends the run."""
        return (self.tables - 1) * workload.table_bytes < measure.available_bytes()


def _dense(steps: TorchSteps, inputs: Inputs) -> tuple[Tensor | None, ...]:
    output, memory = baselines.dense(steps.config, steps.state.memory, *inputs.tokens)
    return output, *torch.autograd.grad(output, inputs.tokens, inputs.cotangent), *memory


def _static(steps: TorchSteps, inputs: Inputs, train: bool = False) -> tuple[Tensor | None, ...]:
    keys, rows = steps.state.memory.keys.detach(), steps.state.memory.values.detach().flatten(0, 1)
    tables = (keys.requires_grad_(), rows.requires_grad_()) if train else ()
    output = baselines.static(steps.config, keys, rows, inputs.query)
    return None, output, *torch.autograd.grad(output, (inputs.query, *tables), inputs.cotangent)


def _torch_select(cfg: FwPKMConfig, keys: Tensor, query: Tensor) -> Any:
    return addressing.select_subkeys(cfg, tokens.halves(cfg, query, len(keys)), keys)


_dense_select = partial(baselines.select, by_differences=True)
_copy = partial(TorchSteps.train, inplace=False)
# In place comes last, so that all the others see the same tables in a round.
CONTESTANTS = {
    "dense": Contestant("(a) autograd through whole tables", _dense, _dense_select, 6),
    "static": Contestant("(b) static product-key memory", partial(_static, train=True), baselines.select, 1),
    "static-frozen": Contestant("the same with frozen tables", _static, baselines.select, 1),
    "torch-copy": Contestant("torch backend, functional: one table copy", _copy, _torch_select, 3),
    "torch": Contestant("torch backend, inplace=True", TorchSteps.train, _torch_select, 1),
}
"""Everything that is compared, by name, in the order of a round."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge. Returns 1 if ``--check`` was given and a bound does not hold, else 0."""
    parser = report.parser("cpu", __doc__, "workload", *report.JUDGED, repeats=(7, "rounds"))
    options = parser.parse_args(arguments)
    if options.against:
        return compare.main("cpu", options, options.workload)
    workloads = by_size(options.workload or _WORKLOADS)
    samples = measure_all(workloads, options.repeats)
    focus = next((workload.name for workload in workloads if workload.name == "step-512"), workloads[-1].name)
    claims = [
        Claim(f"{part}: {a} / {b}", ratio(samples[focus, a, part], samples[focus, b, part]), **bound)
        for part, a, b, bound in CLAIMS
    ]
    claims.append(report.growth(samples, workloads, "torch", "time without scoring", GROWTH))
    titles = {name: contestant.what for name, contestant in CONTESTANTS.items()}
    tables = [report.workload_table(workload, samples, titles, COLUMNS) for workload in workloads]
    return report.conclude(_LEGEND, [*tables, report.claims_table(f"Ratios at {focus}", claims)], claims, options)


def measure_all(workloads: list[Workload], repeats: int) -> Samples:
    """Memory first, in a process of its own, then time; ``workloads`` from the smallest table to the largest."""
    memory: Samples = {}
    # A fixed threshold makes malloc map every large block by itself and unmap it when freed.
    with Worker(MALLOC_MMAP_THRESHOLD_=str(256 * 1024)) as worker:
        # The first workload loads what loads once, and leaves nothing large.
        for workload in ("tiny", *(workload.name for workload in workloads)):
            for name in CONTESTANTS:
                size = worker.run(extra_bytes, workload, name)
                memory[workload, name, "extra memory"] = [] if size is None else [size]
    steps = {workload.name: TorchSteps(workload) for workload in workloads}
    contestants = {
        workload: {name: partial(_parts, mine, name, workload == workloads[0].name) for name in CONTESTANTS}
        for workload, mine in steps.items()
    }
    samples = measure.interleaved(contestants, repeats, budget=_BUDGET)
    samples.update(memory)
    return samples


def extra_bytes(workload: str, contestant: str) -> int | None:
    """Of one step, as :func:`benchmarks.measure.peak_extra_bytes` counts; None where too little memory is at hand.

    Tables, inputs and libraries are in the baseline; graph, temporaries, outputs, gradients and new tables are not.
    """
    steps, mine = TorchSteps(WORKLOADS[workload]), CONTESTANTS[contestant]
    inputs = make_inputs(steps.workload, seed=1)
    return measure.peak_extra_bytes(mine.step, steps, inputs) if mine.fits(steps.workload) else None


def _parts(steps: TorchSteps, name: str, smallest: bool, number: int) -> dict[str, Callable[[], Any]]:
    """A step and its scoring alone; the dense formulation warms up only where it is quick: its tables are all new."""
    contestant = CONTESTANTS[name]
    if not contestant.fits(steps.workload) or (name == "dense" and number == 0 and not smallest):
        return {}
    inputs = make_inputs(steps.workload, seed=number)
    return {
        "time": partial(contestant.step, steps, inputs),
        "scoring": partial(_score, contestant, steps, inputs.query),
    }


@torch.no_grad()
def _score(contestant: Contestant, steps: TorchSteps, query: Tensor) -> None:
    """Scoring in the calls that a step makes: one per chunk, or one in all."""
    size = query.shape[1] if contestant.select is baselines.select else steps.config.chunk_size
    for part in query.split(size, dim=1):
        contestant.select(steps.config, steps.state.memory.keys, part)


if __name__ == "__main__":
    sys.exit(main())
