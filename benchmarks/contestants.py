"""What is compared, behind one interface: a training step, and its scoring alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import dense, measure, static_pkm
from benchmarks.data import Inputs, make_memory
from benchmarks.workloads import Workload
from fwpkm.backends import torch as torch_backend
from fwpkm.backends.torch import addressing
from fwpkm.backends.torch.tokens import halves
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory


class Bench:
    """A workload with its tables. A step in place leaves them rewritten, so nothing else may hold on to them."""

    def __init__(self, workload: Workload, seed: int = 0) -> None:
        """Draw the tables."""
        self.workload = workload
        self.config = workload.config
        self.state = torch_backend.init_state(self.config, make_memory(workload, seed=seed), batch_size=workload.batch)

    @property
    def memory(self) -> Memory:
        """The tables as they are now."""
        return self.state.memory


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
        name: how tables and the command line call it.
        what: what it is, in a line.
        step: a training step; returns the output, then whatever else must not be freed while the clock runs.
        score: the scoring of that step alone: all sub-scores and their top-k.
        tables: about how many value tables it needs at its peak, the bench's own one included.
        writes: whether it computes the whole memory, so that its output must agree with the others'.
    """

    name: str
    what: str
    step: Callable[[Bench, Inputs], tuple[torch.Tensor, ...]]
    score: Callable[[Bench, Inputs], Any]
    tables: int
    writes: bool

    def fits(self, bench: Bench) -> bool:
        """Whether the memory at hand suffices for a step, so that none ends the run."""
        available = measure.available_bytes()
        return available is None or (self.tables - 1) * bench.workload.table_bytes < available


def _torch_select(cfg: FwPKMConfig, memory: Memory, query: torch.Tensor) -> Any:
    """The torch backend's scoring of one chunk: the only place here that knows internal names of it."""
    return addressing.select(cfg, halves(cfg, query, len(memory.keys)), memory.keys)


def _dense_select(cfg: FwPKMConfig, memory: Memory, query: torch.Tensor) -> Any:
    return dense.select(cfg, memory.keys, query)


def _by_chunk(select: Callable[[FwPKMConfig, Memory, torch.Tensor], Any]) -> Callable[[Bench, Inputs], None]:
    """Scoring in the calls that a step makes: one per chunk."""

    @torch.no_grad()
    def score(bench: Bench, inputs: Inputs) -> None:
        for query in inputs.query.split(bench.config.chunk_size, dim=1):
            select(bench.config, bench.memory, query)

    return score


def _torch_step(*, inplace: bool) -> Callable[[Bench, Inputs], tuple[torch.Tensor, ...]]:
    def step(bench: Bench, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        *arguments, cotangent = inputs
        output, state, _ = torch_backend.apply(bench.config, bench.state, *arguments, inplace=inplace)
        gradients = torch.autograd.grad(output, arguments, cotangent)
        if inplace:
            bench.state = torch_backend.detach(state)
        return output, *gradients, *state.memory

    return step


def _dense_step(bench: Bench, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    *arguments, cotangent = inputs
    output, memory = dense.apply(bench.config, bench.memory, *arguments)
    return output, *torch.autograd.grad(output, arguments, cotangent), *memory


def _static_step(*, train: bool) -> Callable[[Bench, Inputs], tuple[torch.Tensor, ...]]:
    def step(bench: Bench, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        keys, rows = bench.memory.keys.detach(), bench.memory.values.detach().flatten(0, 1)
        tables = (keys.requires_grad_(), rows.requires_grad_()) if train else ()
        output = static_pkm.apply(bench.config, keys, rows, inputs.query)
        return output, *torch.autograd.grad(output, (inputs.query, *tables), inputs.cotangent)

    return step


@torch.no_grad()
def _static_score(bench: Bench, inputs: Inputs) -> Any:
    return static_pkm.select(bench.config, bench.memory.keys, inputs.query)


# In place comes last, so that all the others see the same tables in a round.
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            "dense", "(a) autograd through whole tables", _dense_step, _by_chunk(_dense_select), tables=6, writes=True
        ),
        Contestant(
            "static",
            "(b) static product-key memory",
            _static_step(train=True),
            _static_score,
            tables=1,
            writes=False,
        ),
        Contestant(
            "static-frozen",
            "the same with frozen tables",
            _static_step(train=False),
            _static_score,
            tables=1,
            writes=False,
        ),
        Contestant(
            "torch-copy",
            "torch backend, functional: one table copy",
            _torch_step(inplace=False),
            _by_chunk(_torch_select),
            tables=3,
            writes=True,
        ),
        Contestant(
            "torch",
            "torch backend, inplace=True",
            _torch_step(inplace=True),
            _by_chunk(_torch_select),
            tables=1,
            writes=True,
        ),
    )
}
"""Everything that is compared, by name, in the order of a round."""
