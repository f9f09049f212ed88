"""Two commits side by side: ``--against PATH`` of ``python -m benchmarks.cpu``, ``.frameworks`` and ``.gpu``.

Every case runs in two processes, one importing this tree's package and one the other's, on the same inputs from the
same tables (docs/benchmarks.md says how). Cases use public functions alone, so that they run on older commits.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import fwpkm
from benchmarks import measure, report
from benchmarks.worker import Worker
from benchmarks.workloads import WORKLOADS, Decoder, Inputs, TorchSteps, Workload, capture, make_inputs

_WARM_UP, _SETS = 3, 3
_LIMIT = 1.05
_AGREEMENT = 1e-3  # of the norms of outputs: a near tie moves single tokens, a wrong equation moves all
_LEGEND = (
    f"a ratio holds if the 95% interval of its median, over pairs of calls, lies below {_LIMIT} or contains 1",
    "times are medians; the two commits take turns, each in a process of its own, and their outputs agree",
)

Ready = tuple[Callable[[int], Any], int]
"""A case that is ready to run in this process: from the number of a sample to its output, or a tuple that begins with
it; and how many steps a sample has."""


_GPU = {"device": measure.DEVICE, "dtype": "float32" if measure.INTERPRETED else "bfloat16"}


def _by_turns(make: Callable[[int], Any], run: Callable[[Any], Any]) -> Ready:
    """Inputs of three seeds, read in turn."""
    sets = [make(seed) for seed in range(1, _SETS + 1)]
    return lambda number: run(sets[number % _SETS]), 1


def _stream(workload: Workload, **kind: str) -> tuple[list[Any], int]:
    """One chunk's tokens, so that every sample has a write; and their number."""
    length = workload.config.chunk_size
    inputs = make_inputs(Workload("stream", workload.config, workload.batch, length), seed=1, **kind)
    return [x.detach() for x in inputs.tokens], length


def _torch(workload: Workload, step: Callable[..., Any], captured: bool = False, gpu: bool = False) -> Ready:
    steps = TorchSteps(workload, measure.DEVICE, implementation="triton") if gpu else TorchSteps(workload)
    if not captured or measure.DEVICE == "cpu":
        kind = _GPU if gpu else {}
        return _by_turns(lambda seed: make_inputs(workload, seed=seed, **kind), partial(step, steps))
    inputs, read = make_inputs(workload, seed=1, **_GPU), []

    def call() -> Any:
        read.append(steps.state)
        return step(steps, inputs)

    graph, results = capture(call)

    def run(_: int, read_by_the_graph: Any = (read, inputs)) -> Any:  # it knows their addresses alone
        graph.replay()
        return results

    return run, 1


def _torch_decode(workload: Workload, gpu: bool = False) -> Ready:
    tokens, length = _stream(workload, **(_GPU if gpu else {}))
    steps = TorchSteps(workload, measure.DEVICE if gpu else "cpu")
    decode = Decoder(workload.config, steps.state, tokens)
    return lambda _: [decode(t) for t in range(length)][-1], length


def _torch_tokens(workload: Workload) -> Ready:
    steps, (tokens, length) = TorchSteps(workload), _stream(workload)
    return lambda _: steps.by_token(tokens, length), length


def _torch_layer(workload: Workload) -> Ready:
    from fwpkm.backends.torch import FwPKM

    torch.manual_seed(0)
    layer, shape = FwPKM(workload.config.key_dim, workload.config), (workload.batch, workload.length)

    def run(x: torch.Tensor) -> Any:
        layer.zero_grad()
        output, _ = layer(x)
        output.square().sum().backward()
        return output

    return _by_turns(lambda _: torch.randn(*shape, workload.config.key_dim), run)


def _jax(workload: Workload, part: str) -> Ready:
    from benchmarks.frameworks import JaxSteps

    steps = JaxSteps(workload)
    return _by_turns(lambda seed: steps.prepare(make_inputs(workload, seed=seed)), partial(steps.run, part))


def _jax_tokens(workload: Workload) -> Ready:
    from benchmarks.frameworks import JaxSteps

    steps = JaxSteps(Workload("token", workload.config, workload.batch, 1))
    (query, value, gate), length = _stream(workload)
    parts = [[x[:, t : t + 1] for x in (query, value, gate, value)] for t in range(length)]  # no cotangent is read
    tokens = [steps.prepare(Inputs(*part)) for part in parts]
    return lambda _: [steps.run("forward", token) for token in tokens][-1], length


def _keras(workload: Workload) -> Ready:
    from benchmarks.frameworks import draw_hidden, keras_calls

    return _by_turns(partial(draw_hidden, workload), keras_calls(workload)[0])


CASES: dict[str, dict[str, tuple[str, Callable[[Workload], Ready]]]] = {
    "cpu": {
        "training step, in place": ("step-512", partial(_torch, step=TorchSteps.train)),
        "training step, functional": ("step-512", partial(_torch, step=partial(TorchSteps.train, inplace=False))),
        "decode, a token": ("decode-512", _torch_decode),
        "apply of one token": ("decode-512", _torch_tokens),
        "layer, forward + backward": ("step-128", _torch_layer),
    },
    "frameworks": {
        "JAX forward": ("step-512", partial(_jax, part="forward")),
        "JAX forward + gradient": ("step-512", partial(_jax, part="train")),
        "JAX, apply of one token": ("decode-512", _jax_tokens),
        "Keras layer on jax": ("step-512", _keras),
        "Keras layer on torch": ("step-512", _keras),
    },
    "gpu": {
        f"{name}: {what}{', captured' * captured}": (name, partial(_torch, step=step, captured=captured, gpu=True))
        for name in ("shared-512", "train-512", "read-4k-512", "read-128k-512")
        for captured in (False, True)
        for step, what in ((TorchSteps.forward, "forward"), (TorchSteps.train, "forward + backward"))
        if not (captured and name == "read-128k-512")
    }
    | {"decode-512: decode, a token": ("decode-512", partial(_torch_decode, gpu=True))},
}
"""By command and name: the workload at which a case runs if none is chosen, and what makes it ready."""


def main(subject: str, options: argparse.Namespace, workloads: Sequence[str] | None = None) -> int:
    """Print how this tree compares with the one in ``options.against``.

    Args:
        subject: of ``CASES``.
        options: ``report.JUDGED``.
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
        rows.append((name, workload, before, now, report.spread(ratio), "holds" if holds else "SLOWER"))
        print(", ".join(rows[-1]), file=sys.stderr, flush=True)
    columns = ("case", "workload", "before, ms", "now, ms", "now / before", "verdict")
    legend = (*_LEGEND, f"before: {options.against}; {options.pairs} pairs")
    report.show(legend, [report.Table("Side by side with another commit", columns, rows)], markdown=options.markdown)
    return int(slower and options.check)


def measure_pairs(
    subject: str, case: str, workload: str, against: pathlib.Path, pairs: int
) -> list[tuple[float, float]]:
    """Seconds of a step, before and now, by pair.

    Raises:
        RuntimeError: a process failed, or imported another package than it was to.
        AssertionError: the two came to other outputs.
    """
    trees = against, pathlib.Path(fwpkm.__file__).parents[1]
    paths = [os.pathsep.join((str(tree), os.environ.get("PYTHONPATH", ""))).rstrip(os.pathsep) for tree in trees]
    keras = "torch" if case == "Keras layer on torch" else "jax"
    old, new = (Worker(PYTHONPATH=path, KERAS_BACKEND=keras) for path in paths)
    with old, new:
        for worker, tree in zip((old, new), trees):
            package = pathlib.Path(worker.run(prepare, subject, case, workload))
            if package.parents[1] != tree:
                raise RuntimeError(f"expected the package of {tree}. Received: {package}")
        sides = {
            name: lambda number, worker=worker: {case: partial(worker.run, sample, number)}
            for name, worker in (("before", old), ("now", new))
        }
        agree = partial(np.testing.assert_allclose, rtol=_AGREEMENT, equal_nan=False)
        settings: Any = {"warm_up": _WARM_UP, "alternate": True, "timer": lambda run: run(), "agree": agree}
        samples = measure.interleaved({workload: sides}, pairs, **settings)
    return list(zip(samples[workload, "before", case], samples[workload, "now", case]))


_ready: dict[str, Any] = {}
"""In a worker: its case, and what takes the time."""


def prepare(subject: str, case: str, workload: str) -> str:
    """Make a case ready; the path of the package that it imported."""
    _ready["timer"] = measure.device_timed if subject == "gpu" else measure.timed
    _ready["run"], _ready["steps"] = CASES[subject][case][1](WORKLOADS[workload])
    return fwpkm.__file__


def sample(number: int) -> tuple[float, float]:
    """Seconds of a step of the case that is ready, and the norm of its output."""
    seconds, result = _ready["timer"](_ready["run"], number)
    return seconds / _ready["steps"], float(np.linalg.norm(measure.output_of(result)))
