"""Times, memory and traffic of single workloads on a GPU that nothing else uses meanwhile."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import measure, traffic
from benchmarks.data import Inputs, make_inputs, make_memory
from benchmarks.gpu_backend import DEVICE
from benchmarks.gpu_graphs import Decoder
from benchmarks.traffic import Traffic
from benchmarks.workloads import Workload
from fwpkm.backends import torch as be

SAMPLES = 20
_LONG, _FEW = 65536, 8
"""Calls of so many tokens are sampled less often."""
_EAGER_TOO = ("read-32k-512",)
"""Calls of more than 8 chunks that the eager backend, which takes tens of milliseconds for each, reads all the same."""
_SETS = 3
"""Sets of inputs that are read in turn, so that none stays in the cache."""
_HEADS = 8
SCORING = ("select_kernel", "rank_kernel", "combine_kernel")
"""The kernels that score."""


class Speed(NamedTuple):
    """What one workload gave."""

    seconds: dict[str, list[float]]
    """By step: "forward", "train"; the same "captured", replayed from a CUDA graph, and of the "eager" backend."""
    extra_bytes: dict[str, int | None]
    """Likewise: the peak beyond inputs, outputs and tables."""
    least_bytes: Traffic


class _Side:
    """One implementation at one workload, rewriting its tables in place."""

    def __init__(self, workload: Workload, implementation: str) -> None:
        self.config, self.options = workload.config, {"inplace": True, "implementation": implementation}
        memory = make_memory(workload, device=DEVICE)
        self.state = be.init_state(workload.config, memory, batch_size=workload.batch)
        self.slots: Tensor | None = None

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        output, self.state, trace = be.apply(self.config, self.state, *inputs[:3], **self.options)
        self.slots = trace.slots
        return (output,)

    def train(self, inputs: Inputs) -> tuple[Tensor, ...]:
        output, state, _ = be.apply(self.config, self.state, *inputs[:3], **self.options)
        gradients = torch.autograd.grad(output, inputs[:3], inputs.cotangent)
        self.state = be.detach(state)
        return output, *gradients

    def steps(self) -> dict[str, Callable[[Inputs], tuple[Tensor, ...]]]:
        return {"forward": self.forward, "train": self.train}


def speed(workload: Workload, dtype: str, samples: int = SAMPLES) -> Speed:
    """The kernels, and the eager backend where it does not take too long.

    Raises:
        RuntimeError: an output is not finite.
    """
    sets = _inputs(workload, dtype)
    side = _Side(workload, "triton")
    seconds, extra = {}, {}
    for step, function in side.steps().items():
        function(sets[0])
        extra[step] = _extra_bytes(function, sets[1])
        seconds[step] = _sample(function, sets, min(samples, _FEW) if workload.length >= _LONG else samples)
        if workload.chunks <= 8 and DEVICE == "cuda":
            seconds[f"captured {step}"] = _captured(function, sets[0], samples)
    # What the last forward read follows from tables that many calls have written, as in a long sequence.
    (output,) = side.forward(sets[2])
    if not output.isfinite().all():
        raise RuntimeError(f"outputs are not finite after many calls at {workload}")
    least = traffic.floor(workload, side.slots, sets[0].query.element_size())
    del side
    measure.free_device_memory()
    short = workload.chunks <= 8
    if short or workload.name in _EAGER_TOO:
        slow = _Side(workload, "eager")
        for step, function in slow.steps().items():
            if short:
                function(sets[0])
            extra[f"eager {step}"] = _extra_bytes(function, sets[1])
            seconds[f"eager {step}"] = _sample(function, sets, min(samples, 5) if short else 1)
    return Speed(seconds, extra, least)


def _captured(function: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs, number: int) -> list[float]:
    """Seconds of a call in a CUDA graph: what is left of its time where the host need not launch anything."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function(inputs)
    graph.replay()
    seconds = [measure.device_timed(lambda _: graph.replay(), None)[0] for _ in range(number)]
    del kept
    return seconds


def attention(batch: int, length: int, width: int, dtype: str) -> dict[str, list[float]]:
    """Seconds of causal attention of 8 heads, by step."""
    shape = (batch, _HEADS, length, width // _HEADS)
    drawn = [torch.randn(4, *shape, device=DEVICE).to(getattr(torch, dtype)) for _ in range(_SETS)]
    sets = [(*(x.requires_grad_() for x in parts[:3].clone()), parts[3]) for parts in drawn]

    @torch.no_grad()
    def forward(inputs: Sequence[Tensor]) -> Any:
        return F.scaled_dot_product_attention(*inputs[:3], is_causal=True)

    def train(inputs: Sequence[Tensor]) -> Any:
        output = F.scaled_dot_product_attention(*inputs[:3], is_causal=True)
        return output, torch.autograd.grad(output, inputs[:3], inputs[3])

    number = _FEW if length >= _LONG else SAMPLES
    return {"forward": _warm(forward, sets, number), "train": _warm(train, sets, number)}


def fresh_state(workload: Workload, dtype: str) -> list[float]:
    """Seconds of the copies of one initial memory that a call without a state begins with; for inputs of any dtype."""
    one = make_memory(workload, device=DEVICE)
    one = type(one)(*(table[:1].clone() for table in one))
    measure.free_device_memory()
    return _warm(lambda _: be.init_state(workload.config, one, batch_size=workload.batch), [None], SAMPLES)


def kernels(workload: Workload, dtype: str, calls: int = 5) -> dict[str, dict[str, float]]:
    """Device seconds a call by the kernel's name, for each step, from the profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    sets, side, found = _inputs(workload, dtype), _Side(workload, "triton"), {}
    for step, function in side.steps().items():
        for inputs in sets:
            function(inputs)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for number in range(calls):
                function(sets[number % len(sets)])
            torch.cuda.synchronize()
        rows = [row for row in profiler.key_averages() if row.device_type == DeviceType.CUDA]
        found[step] = {row.key: row.self_device_time_total / 1e6 / calls for row in rows}
    return found


def decoding(workload: Workload, dtype: str) -> dict[str, list[float]]:
    """Seconds a token at B sequences, averaged over whole chunks with their writes.

    "graph": a captured ``decode``, replayed after a copy of the next token into its buffers. "graph, one token":
    replayed alone, so that all tokens are the same. "triton" and "eager": ``apply`` of one token, without a graph.
    """
    cfg = workload.config
    chunk = cfg.chunk_size
    stream = Workload("stream", cfg, workload.batch, 2 * chunk)
    given = [x.detach() for x in make_inputs(stream, seed=1, device=DEVICE, dtype=getattr(torch, dtype))[:3]]
    state = be.init_state(cfg, make_memory(workload, device=DEVICE), batch_size=workload.batch)
    decoder = Decoder(cfg, state, given)

    def replay(number: int) -> None:
        for t in range(number):
            decoder(t)

    def replay_one(number: int) -> None:
        for _ in range(number):
            decoder.step()

    found = {"graph": _per_token(replay, 2 * chunk), "graph, one token": _per_token(replay_one, 2 * chunk)}
    for implementation in ("triton", "eager"):
        reader = _Reader(workload, implementation, given)
        found[implementation] = _per_token(reader, chunk, samples=1)
    return found


class _Reader:
    """``apply`` token by token."""

    def __init__(self, workload: Workload, implementation: str, given: list[Tensor]) -> None:
        self.config, self.given = workload.config, given
        self.options = {"inplace": True, "implementation": implementation}
        self.state = be.init_state(workload.config, make_memory(workload, device=DEVICE), batch_size=workload.batch)

    @torch.no_grad()
    def __call__(self, number: int) -> None:
        for t in range(number):
            token = [x[:, t : t + 1] for x in self.given]
            _, self.state, _ = be.apply(self.config, self.state, *token, **self.options)


def _per_token(run: Callable[[int], None], number: int, samples: int = 5) -> list[float]:
    run(number)
    return [measure.device_timed(run, number)[0] / number for _ in range(samples)]


def _inputs(workload: Workload, dtype: str) -> list[Inputs]:
    return [
        make_inputs(workload, seed=seed, device=DEVICE, dtype=getattr(torch, dtype)) for seed in range(1, _SETS + 1)
    ]


def _warm(function: Callable[[Any], Any], sets: Sequence[Any], number: int) -> list[float]:
    for inputs in sets:
        function(inputs)
    return _sample(function, sets, number)


def _sample(function: Callable[[Any], Any], sets: Sequence[Any], number: int) -> list[float]:
    return [measure.device_timed(function, sets[i % len(sets)])[0] for i in range(number)]


def _extra_bytes(function: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs) -> int | None:
    """The peak beyond what was there before, and beyond what is returned."""
    peak, returned = measure.peak_device_bytes(function, inputs)
    return None if peak is None else peak - sum(x.numel() * x.element_size() for x in returned)
