"""The JAX backend on the Triton kernels beside the torch backend on them: that they agree, and how fast both are.

jax-triton 0.3 must be there; without a GPU both run in Triton's interpreter.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from benchmarks import gpu_agreement, measure
from benchmarks.findings import Report, compared, twice
from benchmarks.gpu_speed import SAMPLES, STEPS, Samples
from benchmarks.measure import DEVICE
from benchmarks.workloads import Inputs, TorchSteps, Workload, capture, make_inputs, make_memory
from fwpkm import Memory, State
from fwpkm.backends import jax as jax_backend
from fwpkm.backends import torch as torch_backend

_CALLS = 5
"""That are made one after the other for a sample, as in training: the host makes the next while the GPU computes."""


def agree(workload: Workload, dtype: str, seed: int) -> Report:
    """Outputs, traces, tables and gradients of both; JAX's twice, with equal bits; a state that stands anywhere too."""
    inputs = gpu_agreement.untied_inputs(workload, dtype, seed)  # from any position queries are float32
    expected = gpu_agreement.compute(workload, inputs, "triton", seed)
    findings: list[Any] = []
    for name, begins in {"": True, "any position: ": False}.items():
        received, bits = twice(partial(_compute, _jitted(workload, "train", begins), workload, inputs, seed))
        received = {key: x.to(expected[key]) for key, x in received.items()}
        for finding in (bits, *gpu_agreement.judge(workload, received, expected)):
            findings.append(finding._replace(what=name + finding.what))
    return Report(findings)


def repeatable(workload: Workload, dtype: str, seed: int, runs: int = 20) -> Report:
    """The same bits in every run of a training step; the note is to be compared with another process's."""
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype)
    train = _jitted(workload, "train", True)
    return gpu_agreement.repeated(lambda: _compute(train, workload, inputs, seed), runs)


def decoded(workload: Workload, dtype: str, seed: int) -> Report:
    """Tokens one by one, in a ``lax.scan`` over a donated state, beside torch's."""
    cfg, inputs = workload.config, make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype)
    memory = gpu_agreement.draw_memory(workload, seed=seed)
    ours = jax_backend.init_state(cfg, _tables(memory), workload.batch)
    state = torch_backend.start_decoding(torch_backend.init_state(cfg, memory, workload.batch))
    tokens = [x.detach() for x in inputs.tokens]
    outputs = [
        torch_backend.decode(cfg, state, *(x[:, t : t + 1] for x in tokens), implementation="triton")
        for t in range(workload.length)
    ]

    @partial(jax.jit, donate_argnums=0)
    def read(state: State, *tokens: Any) -> Any:
        def body(state: State, token: Any) -> Any:
            output, state = jax_backend.decode(cfg, state, *token, implementation="triton")
            return state, output[:, 0]

        return jax.lax.scan(body, state, tuple(x.swapaxes(0, 1)[:, :, None] for x in tokens))

    after, read_ = read(ours, *map(_array, tokens))
    received = {
        "output": _tensor(read_).transpose(0, 1),
        **{x: _tensor(getattr(after.memory, x)) for x in after.memory._fields},
    }
    return Report(compared(received, {"output": torch.cat(outputs, 1), **state.memory._asdict()}))


def speed(workload: Workload, dtype: str, begins: bool, samples: int = SAMPLES) -> Samples:
    """Seconds of a step of JAX, a mean of calls in a row: from position 0, or from a state that stands anywhere.

    In the first case "torch captured ..." too, replayed from a CUDA graph. "compile ..." are those of the first call.
    """
    sets = [make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype) for seed in (1, 2, 3)]
    found: Samples = {}
    if begins and DEVICE == "cuda":
        steps = TorchSteps(workload, DEVICE, implementation="triton")
        for step in STEPS:
            graph, results = capture(partial(getattr(steps, step), sets[0]))
            graph.replay()
            found[f"torch captured {step}"] = [measure.device_timed(graph.replay)[0] for _ in range(samples)]
            del graph, results
        del steps
        measure.free_device_memory()
    arrays = [[*map(_array, inputs)] for inputs in sets]
    for step in STEPS:
        memory = _tables(make_memory(workload, device=DEVICE))
        state, run = jax_backend.init_state(workload.config, memory, workload.batch), _jitted(workload, step, begins)
        seconds, (state, *results) = measure.timed(
            lambda *x, run=run: jax.block_until_ready(run(*x)), state, *arrays[0]
        )
        found[f"compile {step}"], found[step] = [seconds], []

        def calls(state: State, run: Any = run) -> Any:
            for number in range(_CALLS):
                state, *results = run(state, *arrays[number % len(arrays)])
            return jax.block_until_ready((state, results))

        for _ in range(samples):
            seconds, (state, results) = measure.timed(calls, state)
            found[step].append(seconds / _CALLS)
        if not jnp.isfinite(results[0]).all():
            raise RuntimeError(f"outputs are not finite after many calls at {workload}")
        del memory, state, results
    return found


def _jitted(workload: Workload, step: str, begins: bool) -> Callable[..., Any]:
    """A step: from a donated state, which is known to stand at position 0 or may stand anywhere, to the next."""
    cfg = workload.config

    def forward(state: State, *tokens: Any) -> Any:
        if begins:
            state = state._replace(position=np.zeros(workload.batch, np.int32))
        return jax_backend.apply(cfg, state, *tokens, implementation="triton")

    @partial(jax.jit, donate_argnums=0)
    def run(state: State, *inputs: Any) -> Any:
        *tokens, cotangent = inputs
        if step == "forward":
            output, after, trace = forward(state, *tokens)
            return after, output, trace, ()
        output, back, (after, trace) = jax.vjp(
            lambda *x: (lambda output, *rest: (output, rest))(*forward(state, *x)), *tokens, has_aux=True
        )
        return jax.lax.stop_gradient(after), output, trace, back(cotangent)

    return run


def _compute(train: Callable[..., Any], workload: Workload, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """What ``gpu_agreement.compute`` gives, of a step of the JAX backend."""
    memory = _tables(gpu_agreement.draw_memory(workload, seed=seed))
    state = jax_backend.init_state(workload.config, memory, workload.batch)
    after, output, trace, gradients = train(state, *map(_array, inputs))
    named = zip(("query", "value", "gate"), gradients)
    found = {"output": output, **trace._asdict(), **after.memory._asdict(), **{f"grad {x}": d for x, d in named}}
    return {name: _tensor(x) for name, x in found.items()}


def _tables(memory: Memory) -> Memory:
    return Memory(*map(_array, memory))


def _array(x: Tensor) -> jax.Array:
    return jnp.from_dlpack(x.detach().contiguous())


def _tensor(x: jax.Array) -> Tensor:
    return torch.from_dlpack(jax.block_until_ready(x)).clone()
