"""What training and decoding loops rely on: the same bits everywhere, no waiting, CUDA graphs, ``torch.compile``."""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.findings import Report, compared, digest, equal, same_bits
from benchmarks.gpu_agreement import compute, draw_memory, untied_inputs
from benchmarks.measure import DEVICE
from benchmarks.workloads import Decoder, Workload, capture, make_inputs
from fwpkm import FwPKMConfig, Memory
from fwpkm.agreement import comparable_tokens
from fwpkm.backends import torch as be
from fwpkm.tokens import Tokens


def repeatable(workload: Workload, dtype: str, seed: int, runs: int = 20) -> Report:
    """The same bits in every run of a training step; the note is to be compared with another process's."""
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype)
    first = compute(workload, inputs, "triton", seed)
    repeated = all(same_bits(compute(workload, inputs, "triton", seed), first) for _ in range(runs - 1))
    finite = all(bool(x.isfinite().all()) for x in first.values())
    findings = [equal(f"bits over {runs} runs", repeated), equal("outputs, tables and gradients finite", finite)]
    return Report(findings, [f"sha256 of outputs, tables and gradients: {digest(first)}"])


def training(workload: Workload, dtype: str, seed: int) -> Report:
    """A training step, after steps that compile: a wait of the host for the device is an error; in a CUDA graph,
    replayed on other inputs than it was captured with, it gives the bits of the step itself.

    Raises:
        RuntimeError: it waited.
    """
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype)
    state = be.init_state(workload.config, draw_memory(workload, seed=seed), batch_size=workload.batch)

    def step() -> tuple[Tensor, ...]:
        output, after, _ = be.apply(workload.config, state, *inputs.tokens, implementation="triton")
        return output, *after.memory, *torch.autograd.grad(output, inputs.tokens, inputs.cotangent)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    findings = [equal("a training step waits for nothing", True)]
    graph, results = capture(step)
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


def decoded(workload: Workload, dtype: str, seed: int) -> Report:
    """Every token of a workload by one captured ``decode``, replayed, beside the eager backend token by token."""
    cfg, length = workload.config, workload.length
    tokens = [x.detach() for x in untied_inputs(workload, dtype, seed).tokens]
    state = be.init_state(cfg, draw_memory(workload, seed=seed), batch_size=workload.batch)
    decoder = Decoder(cfg, state, tokens)
    outputs = torch.cat([decoder(t).clone() for t in range(length)], dim=1)
    expected = []
    with torch.no_grad():
        for t in range(length):
            token: Any = [x[:, t : t + 1].float() for x in tokens]
            output, state, _ = be.apply(cfg, state, *token, inplace=True, implementation="eager")
            expected.append(output)
    received, wanted = (
        {"output": output, **state.memory._asdict(), **state.pending._asdict(), "position": state.position}
        for output, state in ((outputs, decoder.state), (torch.cat(expected, dim=1), state))
    )
    return Report(compared(received, wanted), [f"{length} tokens, {length // cfg.chunk_size} writes"])


def compiled(seed: int) -> Report:
    """The layer under ``torch.compile(fullgraph=True)``: outputs, tables and gradients as without it.

    Layer and input are drawn anew until no choice of slots hangs on a small gap.
    """
    cfg, batch, length = FwPKMConfig(key_dim=64, value_dim=64, num_subkeys=16, top_k=4, chunk_size=16), 2, 40
    for number in itertools.count(seed):
        torch.manual_seed(number)
        layer, x = be.FwPKM(64, cfg).to(DEVICE), torch.randn(batch, length, 64, device=DEVICE)
        with torch.no_grad():
            query = layer.query_proj(layer.query_norm(x)).cpu().numpy()
        memory = Memory(*(table.cpu().numpy() for table in layer.memory()))
        value = np.zeros((batch, length, cfg.value_dim))  # keys do not depend on values
        if comparable_tokens(cfg, memory, Tokens(query, value), gap=1e-4) == length:
            break
    fast = torch.compile(layer, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "eager")
    return Report(compared(*(_through(module, layer, x) for module in (fast, layer))))


def _through(module: Any, layer: Any, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    y, state = module(x)
    (y.square().sum() + state.memory.values.square().sum()).backward()
    gradients = {f"grad {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **be.detach(state).memory._asdict(), **gradients}
