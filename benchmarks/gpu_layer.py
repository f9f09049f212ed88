"""A whole layer on a GPU (SPEC.md §7), and a Gated DeltaNet layer of flash-linear-attention, of one width.

Both under bfloat16 autocast, on all tokens from no state, and none is kept. Seconds of single calls, and "captured"
from a CUDA graph, by step.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.gpu_speed import SAMPLES, SETS, Samples, sample
from benchmarks.measure import DEVICE
from benchmarks.workloads import Workload, capture
from fwpkm.backends import torch as be

_HEAD = 128
_REFUSAL = "Triton"
"""In what flash-linear-attention says of versions of Triton with which its backward would be wrong."""


def layer(workload: Workload, dtype: str, samples: int = SAMPLES) -> Samples:
    """This project's, compiled as one graph where there is a GPU."""
    torch.manual_seed(1)
    module = be.FwPKM(workload.config.value_dim, workload.config, device=DEVICE)
    call: Any = torch.compile(module, fullgraph=True) if DEVICE == "cuda" else module
    return _steps(module, lambda x: call(x, return_state=False)[0], workload, dtype, samples)


def gated_deltanet(workload: Workload, dtype: str, samples: int = SAMPLES) -> Samples:
    """Gated DeltaNet, heads of 128 and else its defaults; nothing where flash-linear-attention is not installed.

    Without a training step where it refuses the installed Triton.
    """
    try:
        from fla.layers import GatedDeltaNet
    except ImportError:
        return {}
    torch.manual_seed(1)
    width = workload.config.value_dim
    module = GatedDeltaNet(hidden_size=width, head_dim=_HEAD, num_heads=width // _HEAD).to(DEVICE)
    return _steps(module, lambda x: module(x)[0], workload, dtype, samples)


def _steps(
    module: nn.Module, call: Callable[[Tensor], Tensor], workload: Workload, dtype: str, samples: int
) -> Samples:
    shape = workload.batch, workload.length, workload.config.value_dim
    *sets, cotangent = torch.randn(SETS + 1, *shape, device=DEVICE).to(getattr(torch, dtype))
    parameters, found = [x for x in module.parameters() if x.requires_grad], Samples()

    def forward(x: Tensor) -> Any:
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            return call(x)

    def train(x: Tensor) -> Any:
        x = x.requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            y = call(x)
        return torch.autograd.grad(y, [x, *parameters], cotangent.to(y.dtype))

    for step, function in (("forward", forward), ("train", train)):
        try:
            found[step] = sample(function, sets, samples, warm_up=True)
        except RuntimeError as error:
            if _REFUSAL not in str(error):
                raise
            continue
        if DEVICE == "cuda":
            graph, results = capture(functools.partial(function, sets[0]))
            found[f"captured {step}"] = [measure.device_timed(graph.replay)[0] for _ in range(samples)]
            del graph, results
    return found
