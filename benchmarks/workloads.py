"""The named workloads, for every benchmark on every device: tables, inputs, and the torch steps that are timed.

Steps use public functions alone, so that they run on older commits too.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm import FwPKMConfig, Memory, State
from fwpkm.backends import torch as be

_BLOCK_ROWS = 16384


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of a memory: B sequences of T tokens."""

    name: str
    config: FwPKMConfig
    batch: int
    length: int

    @property
    def chunks(self) -> int:
        """How many chunks the call reads, a last partial one included."""
        return -(-self.length // self.config.chunk_size)

    @property
    def memories(self) -> int:
        """M: one memory for each sequence, or one for all."""
        return {"sequence": self.batch, "batch": 1}[self.config.memory_scope]

    @property
    def table_bytes(self) -> int:
        """Bytes of the value tables in float32."""
        return 4 * self.memories * self.config.num_slots * self.config.value_dim

    def rows(self, slots: Tensor) -> Tensor:
        """Slots ``[B, n, H*k]`` of each sequence's memory as rows of all tables, one after the other."""
        tables = torch.arange(self.memories, device=slots.device).repeat_interleave(self.batch // self.memories)
        return slots + tables[:, None, None] * self.config.num_slots

    def __str__(self) -> str:
        """Shapes in the spec's symbols."""
        cfg = self.config
        widths = f"Dk={cfg.key_dim} Dv={cfg.value_dim} H={cfg.num_heads} k={cfg.top_k} C={cfg.chunk_size}"
        scope = ", one table" * (cfg.memory_scope == "batch")
        return f"B={self.batch} T={self.length} N={cfg.num_subkeys}² {widths}{scope}"


def _paper(name: str, batch: int, length: int, num_subkeys: int, memory_scope: str = "sequence") -> Workload:
    config = dataclasses.replace(FwPKMConfig.paper(), num_subkeys=num_subkeys, memory_scope=memory_scope)
    return Workload(name, config, batch, length)


_LIST = (
    # One sequence through the paper's memory, at four table sizes: what the CPU benchmark measures.
    *(_paper(f"step-{s}", 1, 2048, s) for s in (128, 256, 512, 1024)),
    # A training batch, at the sizes for which the published code's times on one H200 are known.
    *(_paper(f"train-{s}", 8, 4096, s) for s in (256, 512, 1024)),
    *(_paper(f"shared-{s}", 8, 4096, s, "batch") for s in (256, 512, 1024, 2048)),
    # One sequence, from short to long; with one sequence both scopes have one table.
    *(_paper(f"read-{k}k-{s}", 1, 1024 * k, s, "batch") for k in (4, 32, 128) for s in (256, 512, 1024, 2048)),
    _paper("single-512", 1, 4096, 512),
    *(_paper(name, batch, 1, 512) for name, batch in (("decode-512", 1), ("decode-512-rows", 32))),
    # Milliseconds: for tests of the benchmarks themselves.
    *(Workload(name, FwPKMConfig(16, 16, 1, s, 4, 32), 1, 128) for name, s in (("tiny", 16), ("tiny-wide", 128))),
    Workload("tiny-kernels", FwPKMConfig(16, 16, 1, 4, 2, 2, memory_scope="batch"), 1, 3),
)
WORKLOADS = {workload.name: workload for workload in _LIST}
"""Every workload by its name."""


def by_size(names: Iterable[str]) -> list[Workload]:
    """Workloads from the smallest table to the largest."""
    return sorted((WORKLOADS[name] for name in set(names)), key=lambda workload: workload.table_bytes)


class Inputs(NamedTuple):
    """What one training step reads; all but the cotangent require grad."""

    query: Tensor
    """``[B, T, H*Dk]``"""
    value: Tensor
    """``[B, T, Dv]``"""
    gate: Tensor
    """``[B, T]``"""
    cotangent: Tensor
    """``[B, T, Dv]``: the gradient with respect to the output."""

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, value and gate, as ``apply`` takes them."""
        return self.query, self.value, self.gate


def make_memory(workload: Workload, *, seed: int = 0, device: str = "cpu", distinct: bool = False) -> Memory:
    """Random float32 tables of SPEC.md §7's scale, every page touched.

    Value rows repeat after 16384: times do not depend on them, and 2 GiB of normal numbers take 20 s to draw. Where
    results are compared they must be ``distinct``, so that a read of a wrong row shows.
    """
    cfg = workload.config
    generator = torch.Generator(device).manual_seed(seed)
    shape = (workload.memories, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2)
    keys = torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1).div_(math.sqrt(cfg.key_dim))
    values = torch.empty(workload.memories, cfg.num_slots, cfg.value_dim, device=device)
    if distinct:
        return Memory(keys, values.normal_(std=cfg.value_dim**-0.5, generator=generator))
    block = torch.randn(_BLOCK_ROWS, cfg.value_dim, generator=generator, device=device).div_(math.sqrt(cfg.value_dim))
    for rows in values.flatten(0, 1).split(_BLOCK_ROWS):
        rows.copy_(block[: len(rows)])
    return Memory(keys, values)


def make_inputs(workload: Workload, *, seed: int, device: str = "cpu", dtype: str = "float32") -> Inputs:
    """Random inputs; queries have the scale of the sub-keys, so that reads cover the whole table."""
    cfg = workload.config
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(workload.batch, workload.length, *shape, generator=generator, device=device)

    query = normal(cfg.num_heads * cfg.key_dim).div_(math.sqrt(cfg.key_dim))
    drawn = Inputs(query, normal(cfg.value_dim), normal().sigmoid_(), normal(cfg.value_dim))
    inputs = Inputs(*(x.to(getattr(torch, dtype)) for x in drawn))
    for x in inputs.tokens:
        x.requires_grad_()
    return inputs


# --- Steps ---


class TorchSteps:
    """The torch backend at one workload. A step in place leaves the tables rewritten, so nothing else may hold them."""

    def __init__(self, workload: Workload, device: str = "cpu", **options: Any) -> None:
        """Draw the tables; ``options`` are those of ``apply``."""
        self.workload, self.config, self.options = workload, workload.config, options
        memory = make_memory(workload, device=device)
        self.state: State | Memory | None = be.init_state(workload.config, memory, batch_size=workload.batch)
        self.slots: Tensor

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Read all tokens and rewrite the tables."""
        output, self.state, trace = be.apply(self.config, self.state, *inputs.tokens, inplace=True, **self.options)
        self.slots = trace.slots
        return (output,)

    def train(self, inputs: Inputs, inplace: bool = True) -> tuple[Tensor, ...]:
        """Outputs and gradients of query, value and gate; functional, also the new tables, and the old ones stay."""
        output, state, _ = be.apply(self.config, self.state, *inputs.tokens, inplace=inplace, **self.options)
        results = output, *torch.autograd.grad(output, inputs.tokens, inputs.cotangent)
        if not inplace:
            return *results, *state.memory
        self.state = state and be.detach(state)  # None of a call from a memory
        return results

    @torch.no_grad()
    def by_token(self, tokens: Sequence[Tensor], number: int) -> Tensor:
        """``apply`` of that many tokens, one by one; the last output."""
        for t in range(number):
            token: Any = [x[:, t : t + 1] for x in tokens]
            output, self.state, _ = be.apply(self.config, self.state, *token, inplace=True, **self.options)
        return output


def staggered(
    cfg: FwPKMConfig, memory: Memory, tokens: Sequence[Tensor], implementation: str
) -> tuple[State, list[Tensor]]:
    """A state of rows at positions that differ, over the whole of a chunk, and the tokens that each has yet to read.

    ``tokens`` are query, value and gate, ``[B, T, ...]``. Row b of the B has read the first b·C/B of its own.
    """
    batch, length = tokens[0].shape[:2]
    read, state = torch.arange(batch) * cfg.chunk_size // batch, be.init_state(cfg, memory, batch_size=batch)
    if batch > 1:
        longest, mask = int(read[-1]), torch.arange(int(read[-1])) < read[:, None]
        begun: Any = [x[:, :longest] for x in tokens]
        with torch.no_grad():
            state = be.apply(cfg, state, *begun, mask=mask, implementation=implementation)[1]
    left = [torch.stack([row[n : length - int(read[-1]) + n] for row, n in zip(x, read.tolist())]) for x in tokens]
    return state, left


class Decoder:
    """One ``decode`` of static buffers, captured in a CUDA graph where the state is on a GPU."""

    def __init__(self, cfg: FwPKMConfig, state: State, tokens: Sequence[Tensor]) -> None:
        """Capture at the state, which is left as it was; ``tokens`` are query, value and gate of tokens to come."""
        widths = [x.shape[2] if x.ndim == 3 else 1 for x in tokens]
        # One row a token, so that one copy brings the next.
        self.rows = torch.cat([x.reshape(*x.shape[:2], -1) for x in tokens], dim=2).transpose(0, 1).contiguous()
        self.buffer = self.rows[0].clone()
        query, value, gate = (x.unsqueeze(1) for x in self.buffer.split(widths, dim=1))
        self.config, self.token, self.state = cfg, (query, value, gate[..., 0]), be.start_decoding(state)
        self.step = self._eager
        if self.buffer.is_cuda:
            arrays = [*self.state.arrays().values()]
            before = [x.clone() for x in arrays]
            self.step = capture(self._eager)[0].replay
            for x, y in zip(arrays, before, strict=True):  # forget the tokens that warmed up
                x.copy_(y)
            torch.cuda.synchronize()

    def __call__(self, t: int) -> Tensor:
        """The output ``[B, 1, Dv]`` of token t, which must be the next; valid until the next call."""
        self.buffer.copy_(self.rows[t % len(self.rows)])
        self.step()
        return self.output

    @torch.no_grad()
    def _eager(self) -> None:
        self.output: Tensor = be.decode(self.config, self.state, *self.token)


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call as a CUDA graph, after calls that warm up; and what it returned, which every replay rewrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
