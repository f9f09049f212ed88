"""What training and decoding loops rely on: the same bits everywhere, no waiting, CUDA graphs, ``torch.compile``."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import gpu_shapes
from benchmarks.data import Inputs, make_inputs
from benchmarks.findings import Finding, Report, equal
from benchmarks.gpu_backend import DEVICE
from benchmarks.workloads import Workload
from fwpkm.agreement import BOUNDS, comparable_tokens
from fwpkm.backends import torch as be
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State

_WARM_UP = 3


def repeatable(workload: Workload, dtype: str, seed: int, runs: int = 20) -> Report:
    """The same bits in every run of a training step; the digest is to be compared with another process's."""
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=getattr(torch, dtype))
    first = gpu_shapes.go(workload, inputs, "triton", seed)
    repeated = all(gpu_shapes.same(gpu_shapes.go(workload, inputs, "triton", seed), first) for _ in range(runs - 1))
    parts = [first.output, *first.memory, *first.gradients]
    finite = all(bool(x.isfinite().all()) for x in parts)
    digest = gpu_shapes.digest(parts)
    findings = [equal(f"bits over {runs} runs", repeated), equal("outputs, tables and gradients finite", finite)]
    return Report(findings, [f"sha256 of outputs, tables and gradients: {digest}"], digest)


def unsynchronized(workload: Workload, dtype: str, seed: int) -> Report:
    """A training step in which a wait of the host for the device is an error, after steps that compile.

    Raises:
        RuntimeError: it waited.
    """
    step, _ = _training(workload, dtype, seed)
    for _ in range(_WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Report([equal("a training step waits for nothing", True)])


def captured(workload: Workload, dtype: str, seed: int) -> Report:
    """A training step in a CUDA graph, replayed on other inputs than it was captured with, beside the step itself."""
    step, given = _training(workload, dtype, seed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    findings = []
    for number in (1, 2):
        _refill(given, make_inputs(workload, seed=seed + number, device=DEVICE, dtype=getattr(torch, dtype)))
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.detach().clone() for x in results]
        same = all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
        findings.append(equal(f"replay {number} of outputs, tables and gradients", same))
    return Report(findings)


def _training(workload: Workload, dtype: str, seed: int) -> tuple[Callable[[], tuple[Tensor, ...]], Inputs]:
    """A step that starts from one state and leaves it, and the inputs that it reads."""
    given = make_inputs(workload, seed=seed, device=DEVICE, dtype=getattr(torch, dtype))
    state = be.init_state(workload.config, gpu_shapes.draw_memory(workload, seed), batch_size=workload.batch)

    def step() -> tuple[Tensor, ...]:
        output, after, _ = be.apply(workload.config, state, *given[:3], implementation="triton")
        return output, *after.memory, *torch.autograd.grad(output, given[:3], given.cotangent)

    return step, given


@torch.no_grad()
def _refill(given: Inputs, fresh: Inputs) -> None:
    for x, y in zip(given, fresh, strict=True):
        x.copy_(y)


def decoded(workload: Workload, dtype: str, seed: int) -> Report:
    """Every token of a workload by one captured ``decode``, replayed, beside the eager backend token by token."""
    cfg, batch, length = workload.config, workload.batch, workload.length
    *given, _ = (x.detach() for x in gpu_shapes.untied_inputs(workload, dtype, seed))
    state = be.init_state(cfg, gpu_shapes.draw_memory(workload, seed), batch_size=batch)
    decoder = Decoder(cfg, state, given)
    outputs = torch.cat([decoder(t).clone() for t in range(length)], dim=1)
    expected, after = [], state
    with torch.no_grad():
        for t in range(length):
            token = [x[:, t : t + 1].float() for x in given]
            output, after, _ = be.apply(cfg, after, *token, inplace=True, implementation="eager")
            expected.append(output)
    low, full = BOUNDS[dtype].forward, BOUNDS["float32"].forward
    findings = [Finding("output", gpu_shapes.error(outputs, torch.cat(expected, dim=1)), low)]
    for name in Memory._fields:
        tables = (getattr(x.memory, name) for x in (decoder.state, after))
        findings.append(Finding(name, gpu_shapes.error(*tables), full))
    for name in State._fields[1:4]:
        findings.append(Finding(name, gpu_shapes.error(getattr(decoder.state, name), getattr(after, name)), full))
    for name in State._fields[4:]:
        findings.append(equal(name, torch.equal(getattr(decoder.state, name).cpu(), getattr(after, name).cpu())))
    return Report(findings, [f"{length} tokens, {length // cfg.chunk_size} writes"])


class Decoder:
    """One ``decode`` of static buffers, captured in a CUDA graph where there is a GPU."""

    def __init__(self, cfg: FwPKMConfig, state: State, given: list[Tensor]) -> None:
        """Capture at the state, which is left as it was; ``given`` holds query, value and gate of tokens to come."""
        batch = given[0].shape[0]
        widths = [x.shape[2] if x.ndim == 3 else 1 for x in given]
        # One row a token, so that one copy brings the next.
        self.tokens = torch.cat([x.reshape(*x.shape[:2], -1) for x in given], dim=2).transpose(0, 1).contiguous()
        self.buffer = self.tokens[0].clone()
        query, value, gate = (x.view(batch, 1, -1) for x in self.buffer.split(widths, dim=1))
        self.token = (query, value, gate[..., 0])
        self.state, self.graph = be.start_decoding(state), None
        if DEVICE == "cuda":
            self._capture(cfg)
        else:
            self.output = None
        self.step = self.graph.replay if self.graph else lambda: self._eager(cfg)

    def __call__(self, t: int) -> Tensor:
        """The output ``[B, 1, Dv]`` of token t, which must be the next; valid until the next call."""
        self.buffer.copy_(self.tokens[t % len(self.tokens)])
        self.step()
        return self.output

    @torch.no_grad()
    def _eager(self, cfg: FwPKMConfig) -> None:
        self.output = be.decode(cfg, self.state, *self.token)

    @torch.no_grad()
    def _capture(self, cfg: FwPKMConfig) -> None:
        before = _copies(self.state)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._eager(cfg)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._eager(cfg)
        for x, y in zip(_flat(self.state), before, strict=True):  # forget the tokens that warmed up
            x.copy_(y)
        torch.cuda.synchronize()


def _flat(state: State) -> list[Tensor]:
    return [*state.memory, *state[1:]]


def _copies(state: State) -> list[Tensor]:
    return [x.clone() for x in _flat(state)]


def compiled(seed: int) -> Report:
    """The layer under ``torch.compile(fullgraph=True)``: outputs, tables and gradients as without it."""
    cfg = FwPKMConfig(key_dim=64, value_dim=64, num_subkeys=16, top_k=4, chunk_size=16)
    layer, x = _untied_layer(cfg, seed)
    findings = []
    with _one_thread():
        fast = torch.compile(layer, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "eager")
        results = [_through(module, layer, x) for module in (fast, layer)]
    full = BOUNDS["float32"]
    for (name, a), (_, b) in zip(*results, strict=True):
        bound = full.gradient if name.startswith("grad") else full.forward
        findings.append(Finding(name, gpu_shapes.error(a, b), bound))
    return Report(findings)


def _through(module: Any, layer: Any, x: Tensor) -> list[tuple[str, Tensor]]:
    layer.zero_grad()
    y, state = module(x)
    (y.square().sum() + state.memory.values.square().sum()).backward()
    tables = [(name, table.detach()) for name, table in state.memory._asdict().items()]
    gradients = [(f"grad {name}", p.grad) for name, p in layer.named_parameters() if p.grad is not None]
    return [("output", y.detach()), *tables, *gradients]


def _untied_layer(cfg: FwPKMConfig, seed: int, batch: int = 2, length: int = 40) -> tuple[Any, Tensor]:
    """A layer and an input over which no choice of slots hangs on a small gap."""
    for attempt in range(50):
        torch.manual_seed(seed + attempt)
        layer = be.FwPKM(64, cfg).to(DEVICE)
        x = torch.randn(batch, length, 64, device=DEVICE)
        with torch.no_grad():
            query = layer.query_proj(layer.query_norm(x)).cpu().numpy()
        memory = Memory(*(table.cpu().numpy().astype(np.float64) for table in layer.memory()))
        memory = Memory(*(np.broadcast_to(table, (batch, *table.shape[1:])) for table in memory))
        value = np.zeros((batch, length, cfg.value_dim))  # keys do not depend on values
        if comparable_tokens(cfg, memory, query, value, gap=1e-4) == length:
            return layer, x
    raise RuntimeError("no layer without a tie in 50 draws")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Inductor compiles in this process: it is one of many."""
    import torch._inductor.config as inductor

    before, inductor.compile_threads = inductor.compile_threads, 1
    try:
        yield
    finally:
        inductor.compile_threads = before
