"""What training and decoding loops rely on: the same bits everywhere, no waiting, CUDA graphs, ``torch.compile``."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.findings import Finding, Report, digest, equal, error, same_bits
from benchmarks.gpu_agreement import compute, draw_memory, untied_inputs
from benchmarks.measure import DEVICE
from benchmarks.steps import Decoder, capture
from benchmarks.workloads import Inputs, Workload, make_inputs
from fwpkm import FwPKMConfig, Memory
from fwpkm.agreement import BOUNDS, comparable_tokens
from fwpkm.backends import torch as be
from fwpkm.tokens import Tokens


def repeatable(workload: Workload, dtype: str, seed: int, runs: int = 20) -> Report:
    """The same bits in every run of a training step; the digest is to be compared with another process's."""
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype)
    first = compute(workload, inputs, "triton", seed)
    repeated = all(same_bits(compute(workload, inputs, "triton", seed), first) for _ in range(runs - 1))
    parts = (first.output, *first.memory, *first.gradients)
    finite = all(bool(x.isfinite().all()) for x in parts)
    sha256 = digest(parts)
    findings = [equal(f"bits over {runs} runs", repeated), equal("outputs, tables and gradients finite", finite)]
    return Report(findings, [f"sha256 of outputs, tables and gradients: {sha256}"], sha256)


def unsynchronized(workload: Workload, dtype: str, seed: int) -> Report:
    """A training step in which a wait of the host for the device is an error, after steps that compile.

    Raises:
        RuntimeError: it waited.
    """
    step, _ = _training(workload, dtype, seed)
    for _ in range(3):
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
    step, inputs = _training(workload, dtype, seed)
    graph, results = capture(step)
    findings = []
    for number in (1, 2):
        others = make_inputs(workload, seed=seed + number, device=DEVICE, dtype=dtype)
        with torch.no_grad():
            for x, y in zip(inputs, others, strict=True):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.detach().clone() for x in results]
        same = all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
        findings.append(equal(f"replay {number} of outputs, tables and gradients", same))
    return Report(findings)


def _training(workload: Workload, dtype: str, seed: int) -> tuple[Callable[[], tuple[Tensor, ...]], Inputs]:
    """A step that starts from one state and leaves it, and the inputs that it reads."""
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype)
    state = be.init_state(workload.config, draw_memory(workload, seed), batch_size=workload.batch)

    def step() -> tuple[Tensor, ...]:
        output, after, _ = be.apply(workload.config, state, *inputs.tokens, implementation="triton")
        return output, *after.memory, *torch.autograd.grad(output, inputs.tokens, inputs.cotangent)

    return step, inputs


def decoded(workload: Workload, dtype: str, seed: int) -> Report:
    """Every token of a workload by one captured ``decode``, replayed, beside the eager backend token by token."""
    cfg, length = workload.config, workload.length
    tokens = [x.detach() for x in untied_inputs(workload, dtype, seed).tokens]
    state = be.init_state(cfg, draw_memory(workload, seed), batch_size=workload.batch)
    decoder = Decoder(cfg, state, tokens)
    outputs = torch.cat([decoder(t).clone() for t in range(length)], dim=1)
    expected, after = [], state
    with torch.no_grad():
        for t in range(length):
            token: Any = [x[:, t : t + 1].float() for x in tokens]
            output, after, _ = be.apply(cfg, after, *token, inplace=True, implementation="eager")
            expected.append(output)
    low, full = BOUNDS[dtype].forward, BOUNDS["float32"].forward
    findings = [Finding("output", error(outputs, torch.cat(expected, dim=1)), low)]
    fields = {**after.memory._asdict(), **after.pending._asdict(), "position": after.position}
    received = {**decoder.state.memory._asdict(), **decoder.state.pending._asdict(), "position": decoder.state.position}
    for name, x in fields.items():
        exact, y = not x.is_floating_point(), received[name]
        findings.append(equal(name, torch.equal(y.cpu(), x.cpu())) if exact else Finding(name, error(y, x), full))
    return Report(findings, [f"{length} tokens, {length // cfg.chunk_size} writes"])


def compiled(seed: int) -> Report:
    """The layer under ``torch.compile(fullgraph=True)``: outputs, tables and gradients as without it."""
    cfg = FwPKMConfig(key_dim=64, value_dim=64, num_subkeys=16, top_k=4, chunk_size=16)
    layer, x = _untied_layer(cfg, seed)
    fast = torch.compile(layer, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "eager")
    received, expected = (_through(module, layer, x) for module in (fast, layer))
    full = BOUNDS["float32"]
    bounds = {name: full.gradient if name.startswith("grad") else full.forward for name in expected}
    return Report([Finding(name, error(received[name], y), bounds[name]) for name, y in expected.items()])


def _through(module: Any, layer: Any, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    y, state = module(x)
    (y.square().sum() + state.memory.values.square().sum()).backward()
    gradients = {f"grad {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **{k: table.detach() for k, table in state.memory._asdict().items()}, **gradients}


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
        if comparable_tokens(cfg, memory, Tokens(query, value), gap=1e-4) == length:
            return layer, x
    raise RuntimeError("no layer without a tie in 50 draws")
