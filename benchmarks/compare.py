"""Two commits side by side: ``--against PATH`` of ``python -m benchmarks.cpu``, ``.frameworks`` and ``.gpu``.

Every case runs in two processes, one importing this tree's package and one the other's, which take turns in pairs (A B,
B A, A B, ...) on the same inputs from the same tables; both must come to the same outputs. Imports, compilation and
warming up are not timed. The ratio is taken within pairs; the interval of its median is one of order statistics, so no
distribution is assumed. Cases use public functions alone, so that they run on older commits.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

import fwpkm
from benchmarks import measure, report
from benchmarks.report import spread
from benchmarks.steps import Decoder, TorchSteps, capture
from benchmarks.worker import Worker
from benchmarks.workloads import WORKLOADS, Inputs, Workload, make_inputs

_WARM_UP, _SETS = 3, 3
_LIMIT = 1.05
_AGREEMENT = 1e-3  # of the norms of outputs: a near tie moves single tokens, a wrong equation moves all
_LEGEND = (
    f"a ratio holds if the 95% interval of its median, over pairs of calls, lies below {_LIMIT} or contains 1",
    "times are medians; the two commits take turns, each in a process of its own, and their outputs agree",
)


class Case(NamedTuple):
    """A case that is ready to run in this process."""

    run: Callable[[int], Any]
    """From the number of a sample to its output, or a tuple that begins with it."""
    calls: int = 1
    """How many steps a sample has."""


def _inputs(workload: Workload, **kind: str) -> list[Inputs]:
    return [make_inputs(workload, seed=seed, **kind) for seed in range(1, _SETS + 1)]


def _stream(workload: Workload) -> Workload:
    """One chunk's tokens, so that every sample has a write."""
    return Workload("stream", workload.config, workload.batch, workload.config.chunk_size)


def _torch(
    workload: Workload,
    step: Callable[..., Any],
    device: str = "cpu",
    dtype: str = "float32",
    captured: bool = False,
    **options: str,
) -> Case:
    sets, steps, read = _inputs(workload, device=device, dtype=dtype), TorchSteps(workload, device, **options), []

    def call(inputs: Inputs) -> Any:
        read.append(steps.state)
        return step(steps, inputs)

    if not captured or device == "cpu":
        return Case(lambda number: step(steps, sets[number % _SETS]))
    graph, results = capture(partial(call, sets[0]))

    def run(_: int, read_by_the_graph: Any = (read, sets)) -> Any:  # it knows their addresses alone
        graph.replay()
        return results

    return Case(run)


def _torch_decode(workload: Workload, device: str = "cpu", dtype: str = "float32", **_: str) -> Case:
    stream = _stream(workload)
    tokens = [x.detach() for x in make_inputs(stream, seed=1, device=device, dtype=dtype).tokens]
    decode = Decoder(workload.config, TorchSteps(workload, device).state, tokens)
    return Case(lambda _: [decode(t) for t in range(stream.length)][-1], stream.length)


def _torch_tokens(workload: Workload) -> Case:
    steps, stream = TorchSteps(workload), _stream(workload)
    tokens = [x.detach() for x in make_inputs(stream, seed=1).tokens]
    return Case(lambda _: steps.by_token(tokens, stream.length), stream.length)


def _torch_layer(workload: Workload) -> Case:
    from fwpkm.backends.torch import FwPKM

    torch.manual_seed(0)
    layer = FwPKM(workload.config.key_dim, workload.config)
    drawn = torch.randn(_SETS, workload.batch, workload.length, workload.config.key_dim)

    def run(number: int) -> Any:
        layer.zero_grad()
        output, _ = layer(drawn[number % _SETS])
        output.square().sum().backward()
        return output

    return Case(run)


def _jax(workload: Workload, step: str) -> Case:
    from benchmarks.frameworks import JaxSteps

    steps = JaxSteps(workload)
    sets = [steps.prepare(inputs) for inputs in _inputs(workload)]
    return Case(lambda number: getattr(steps, step)(sets[number % _SETS]))


def _jax_tokens(workload: Workload) -> Case:
    from benchmarks.frameworks import JaxSteps

    stream = _stream(workload)
    steps, whole = JaxSteps(Workload("token", workload.config, workload.batch, 1)), make_inputs(stream, seed=1)
    tokens = [steps.prepare(Inputs(*(x[:, t : t + 1] for x in whole))) for t in range(stream.length)]
    return Case(lambda _: [steps.forward(token) for token in tokens][-1], stream.length)


def _keras(workload: Workload) -> Case:
    from benchmarks.keras_layer import HIDDEN, make_keras_call

    _, call = make_keras_call(workload)
    drawn = torch.randn(_SETS, workload.batch, workload.length, HIDDEN, generator=torch.Generator().manual_seed(0))
    return Case(lambda number: call(drawn[number % _SETS].numpy()))


_ON_GPU = {
    "device": measure.DEVICE,
    "dtype": "float32" if measure.INTERPRETED else "bfloat16",
    "implementation": "triton",
}
CASES: dict[str, dict[str, tuple[str, Callable[[Workload], Case]]]] = {
    "cpu": {
        "training step, in place": ("step-512", partial(_torch, step=TorchSteps.train)),
        "training step, functional": ("step-512", partial(_torch, step=partial(TorchSteps.train, inplace=False))),
        "decode, a token": ("decode-512", _torch_decode),
        "apply of one token": ("decode-512", _torch_tokens),
        "layer, forward + backward": ("step-128", _torch_layer),
    },
    "frameworks": {
        "JAX forward": ("step-512", partial(_jax, step="forward")),
        "JAX forward + gradient": ("step-512", partial(_jax, step="train")),
        "JAX, apply of one token": ("decode-512", _jax_tokens),
        "Keras layer on jax": ("step-512", _keras),
        "Keras layer on torch": ("step-512", _keras),
    },
    "gpu": {
        f"{name}: {what}{', captured' * captured}": (name, partial(_torch, step=step, captured=captured, **_ON_GPU))
        for name in ("shared-512", "train-512", "read-4k-512", "read-128k-512")
        for captured in (False, True)
        for step, what in ((TorchSteps.forward, "forward"), (TorchSteps.train, "forward + backward"))
        if not (captured and name == "read-128k-512")
    }
    | {"decode-512: decode, a token": ("decode-512", partial(_torch_decode, **_ON_GPU))},
}
"""By command and name: the workload at which a case runs if none is chosen, and what makes it ready."""


def main(subject: str, options: argparse.Namespace, workloads: Sequence[str] | None = None) -> int:
    """Print how this tree compares with the one in ``options.against``.

    Args:
        subject: of ``CASES``.
        options: of :func:`benchmarks.report.add_options`.
        workloads: for every case, instead of its own.

    Returns:
        1 if ``--check`` was given and a ratio does not hold, else 0.
    """
    rows, slower = [], False
    runs = [(name, workload) for name, (own, _) in CASES[subject].items() for workload in workloads or [own]]
    for name, workload in runs:
        if "Keras" in name and importlib.util.find_spec("keras") is None:
            rows.append((name, "keras is not installed", *[""] * 4))
            continue
        samples = measure_pairs(subject, name, workload, options.against, options.pairs)
        ratio = measure.median_interval([now / before for before, now in samples])
        holds = ratio.high < _LIMIT or ratio.low <= 1 <= ratio.high
        slower |= not holds
        before, now = (f"{1e3 * np.median(column):.3g}" for column in zip(*samples))
        rows.append((name, workload, before, now, spread(ratio), "holds" if holds else "SLOWER"))
        print(", ".join(rows[-1]), file=sys.stderr, flush=True)
    columns = ("case", "workload", "before, ms", "now, ms", "now / before", "verdict")
    legend = (*_LEGEND, f"before: {options.against}; {options.pairs} pairs")
    report.show(legend, [report.Table("Side by side with another commit", columns, rows)], markdown=options.markdown)
    return int(slower and options.check)


def measure_pairs(subject: str, case: str, workload: str, against: str, pairs: int) -> list[tuple[float, float]]:
    """Seconds of a step, before and now, by pair.

    Raises:
        RuntimeError: a process failed, imported another package than it was to, or came to other outputs.
    """
    other = pathlib.Path(against).resolve()
    trees = other / "src" if (other / "src" / "fwpkm").exists() else other, pathlib.Path(fwpkm.__file__).parents[1]
    keras, samples = "torch" if case == "Keras layer on torch" else "jax", []
    paths = [os.pathsep.join((str(tree), os.environ.get("PYTHONPATH", ""))).rstrip(os.pathsep) for tree in trees]
    with (
        Worker(PYTHONPATH=paths[0], KERAS_BACKEND=keras) as old,
        Worker(PYTHONPATH=paths[1], KERAS_BACKEND=keras) as new,
    ):
        for worker, tree in ((old, trees[0]), (new, trees[1])):
            package = pathlib.Path(worker.run(prepare, subject, case, workload))
            if package.parents[1] != tree:
                raise RuntimeError(f"expected the package of {tree}. Received: {package}")
        for number in range(pairs):
            order = (old, new) if number % 2 == 0 else (new, old)
            found = {worker: worker.run(sample, number) for worker in order}
            (before, expected), (now, received) = found[old], found[new]
            if not abs(received - expected) <= _AGREEMENT * abs(expected):
                raise RuntimeError(f"{case}: outputs of norm {expected} before. Received: {received}")
            samples.append((before, now))
    return samples


_ready: dict[str, Any] = {}
"""In a worker: its case, and what takes the time."""


def prepare(subject: str, case: str, workload: str) -> str:
    """Make a case ready and warm up; the path of the package that it imported."""
    _ready["timer"] = measure.device_timed if subject == "gpu" else measure.timed
    _ready["case"] = CASES[subject][case][1](WORKLOADS[workload])
    for number in range(_WARM_UP):
        _ready["case"].run(number)
    return fwpkm.__file__


def sample(number: int) -> tuple[float, float]:
    """Seconds of a step of the case that is ready, and the norm of its output."""
    case = _ready["case"]
    seconds, output = _ready["timer"](case.run, number)
    output = output[0] if isinstance(output, tuple) else output
    output = output.detach().float().cpu() if isinstance(output, torch.Tensor) else output
    return seconds / case.calls, float(np.linalg.norm(np.asarray(output)))
