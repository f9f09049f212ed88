"""Rows that are not alike, masked or packed: whether they agree with eager float32, and what they cost."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.findings import Report, compared, twice
from benchmarks.gpu_speed import SAMPLES, STEPS, Samples
from benchmarks.measure import DEVICE
from benchmarks.steps import TorchSteps
from benchmarks.workloads import Inputs, Workload, make_inputs
from fwpkm import FwPKMConfig, Memory
from fwpkm.backends import torch as be

_CALLS = 3
_FEWEST = 100
"""Tokens of the shortest of the rows that are timed."""


def streams(numbers: range, longest: int = 120) -> Report:
    """Ragged streams of three calls each, beside eager float32: outputs, traces, states, and gradients through all.

    Every number draws one shape and its inputs, the same in every run: so none has choices that hang on rounding. A row
    has up to ``longest`` tokens in a call.
    """
    findings = []
    for number in numbers:
        cfg, memory, calls = _drawn(number, longest)
        received, bits = twice(partial(_read, cfg, memory, calls, "triton", number))
        findings += [bits, *compared(received, _read(cfg, memory, calls, "eager", number))]
    return Report(findings)


def _drawn(number: int, longest: int) -> tuple[FwPKMConfig, Memory, list[dict[str, Tensor]]]:
    """A configuration, its tables, and the arguments of each call; masks and cu_seqlens lie on either device."""
    draw = torch.Generator().manual_seed(number)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    def choice(*options: Any) -> Any:
        return options[integer(0, len(options) - 1)]

    cfg = FwPKMConfig(
        *(32, 32, integer(1, 2), 32, 4, choice(4, 16, 40), integer(0, 2), choice("drop", "wait")),
        write_scale=choice("slots", "unit", "normalized"),
    )
    batch, calls = integer(1, 5), []
    for _ in range(_CALLS):
        rows, given = batch, {}
        if choice(True, False):
            length = integer(1, longest)
            given["mask"] = (torch.rand(batch, length, generator=draw) < 0.7).to(choice("cpu", DEVICE))
        else:
            ends = [*itertools.accumulate((integer(0, longest * 3 // 4) for _ in range(batch)), initial=0)]
            rows, length = 1, ends[-1] + 2
            given["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32).to(choice("cpu", DEVICE))
        shapes = {"query": (rows, length, 32 * cfg.num_heads), "value": (rows, length, 32), "gate": (rows, length)}
        drawn = {name: torch.rand(shape, generator=draw).to(DEVICE) for name, shape in shapes.items()}
        calls.append({**drawn, **given, "query": drawn["query"] - 0.5, "value": drawn["value"] - 0.5})
    return cfg, Memory(*(x.to(DEVICE) for x in be.init_memory(cfg, batch, seed=number))), calls


def _read(
    cfg: FwPKMConfig, memory: Memory, calls: list[dict[str, Tensor]], implementation: str, seed: int
) -> dict[str, Tensor]:
    """What the calls give, one after the other, and at last the state, by name."""
    state, found, leaves = be.init_state(cfg, memory, memory.keys.shape[0]), {}, {}
    results: list[Tensor] = []
    for number, call in enumerate(calls):
        numbers = {name: call[name].clone().requires_grad_() for name in ("query", "value", "gate")}
        output, state, trace = be.apply(cfg, state, **call | numbers, implementation=implementation)
        told = {"output": output, **trace._asdict(), "slots": trace.slots.sort(-1).values}  # near ties have no order
        found |= {f"{name} {number}": x for name, x in told.items()}
        leaves |= {f"grad {name} {number}": x for name, x in numbers.items()}
        results.append(output)
    found |= {**state.memory._asdict(), **state.pending._asdict(), "position": state.position}
    results += [*state.memory, *(x for x in state.pending if x.is_floating_point())]
    draw = torch.Generator(DEVICE).manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=draw, device=DEVICE) for x in results]
    live = [(x, c) for x, c in zip(results, cotangents) if x.requires_grad]
    live_results, of_live = zip(*live)
    gradients = torch.autograd.grad(live_results, [*leaves.values()], of_live, allow_unused=True)
    found |= {name: torch.zeros_like(x) if d is None else d for (name, x), d in zip(leaves.items(), gradients)}
    return {name: x.detach() for name, x in found.items()}


def masked(workload: Workload, dtype: str, samples: int = SAMPLES) -> Samples:
    """Seconds of "masked", where four of five tokens are there, and of "alike", where all are, by step."""
    mask = torch.rand(workload.batch, workload.length, device=DEVICE) < 0.8
    inputs = make_inputs(workload, seed=1, device=DEVICE, dtype=dtype)
    return _in_turn(workload, {"alike": (inputs, {}), "masked": (inputs, {"mask": mask})}, samples)


def ragged(workload: Workload, dtype: str, batch: int, samples: int = SAMPLES) -> Samples:
    """Seconds of ``batch`` rows of 100 tokens up to all, "masked" and "packed", and of "full" rows, by step.

    Each row has a table of its own, as packed ones need.
    """
    own = dataclasses.replace(workload.config, memory_scope="sequence")
    workload = dataclasses.replace(workload, config=own, batch=batch)
    fewest = min(_FEWEST, workload.length)
    lengths = torch.linspace(fewest, workload.length, batch, device=DEVICE).long()
    mask = torch.arange(workload.length, device=DEVICE) < lengths[:, None]
    inputs = make_inputs(workload, seed=1, device=DEVICE, dtype=dtype)
    packed = Inputs(*(x.detach()[mask][None].requires_grad_(x.requires_grad) for x in inputs))
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().cpu()
    calls = {"full": (inputs, {}), "masked": (inputs, {"mask": mask}), "packed": (packed, {"cu_seqlens": ends})}
    return _in_turn(workload, calls, samples)


def _in_turn(workload: Workload, calls: dict[str, tuple[Inputs, dict[str, Tensor]]], samples: int) -> Samples:
    """Samples of every call by turns, all of them from one state at position 0 whose tables each rewrites."""
    steps = TorchSteps(workload, DEVICE)
    start = steps.state
    found: Samples = {}

    def run(step: str, inputs: Inputs, options: dict[str, Tensor]) -> None:
        steps.state, steps.options = be.detach(start), {"implementation": "triton", **options}
        getattr(steps, step)(inputs)

    for step in STEPS:
        for turn in range(-2, samples):  # the first two warm up
            for name, call in calls.items():
                seconds, _ = measure.device_timed(run, step, *call)
                if turn >= 0:
                    found.setdefault(f"{name} {step}", []).append(seconds)
    return found
