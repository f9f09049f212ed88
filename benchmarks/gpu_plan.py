"""What ``python -m benchmarks.gpu`` runs, section by section."""

import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks import gpu_agreement, gpu_graphs, gpu_shapes, gpu_speed, measure
from benchmarks.findings import Report, equal
from benchmarks.gpu_tasks import Task
from benchmarks.workloads import WORKLOADS, Workload
from fwpkm import vectors
from fwpkm.config import FwPKMConfig

SECTIONS = ("agreement", "bits", "graphs", "conform", "speed", "decode")
DTYPE = "bfloat16"
"""Of the inputs that are timed."""
TRAIN = ("shared-512", "train-512", "shared-256", "shared-1024", "shared-2048")
"""Training batches, the one that the targets are stated for first."""
READ = tuple(f"read-{length}k-{s}" for length in (4, 32, 128) for s in (512, 256, 1024, 2048))
"""One sequence."""
TINY = Workload("tiny", FwPKMConfig(16, 16, 1, 4, 2, 2, memory_scope="batch"), batch=1, length=3)
"""For tests of the benchmark itself, in Triton's interpreter."""
_SHAPES = (
    *((name, DTYPE, {}) for name in ("shared-2048", "train-512", "shared-1024", "shared-512", "shared-256")),
    ("read-32k-512", DTYPE, {}),
    ("read-128k-512", DTYPE, {"derived": False}),
)
"""What is timed is compared as it is timed."""
_TAIL = Workload("tail-512", WORKLOADS["shared-512"].config, batch=5, length=1300)
"""Two chunks of each sequence and a part of a third, whose gradients pass through the final tables. The sums over that
part's tokens have more pieces than those over a chunk's."""
_STEP = Workload("step-256", WORKLOADS["shared-256"].config, batch=2, length=1300)
_DECODED = Workload("decode-512", WORKLOADS["decode-512"].config, batch=1, length=1100)
_CONFORM_SHAPES = 10


def checks(sections: set[str], seed: int, tiny: bool) -> list[Task]:
    """Tasks that may run side by side, long ones first; each returns a ``Report``.

    What is to be timed is compared first, whether or not "agreement" is among the sections.
    """
    if tiny:
        return list(_tiny_checks(sections, seed))
    tasks: list[Task] = []
    if sections & {"agreement", "speed"}:
        tasks += [_shape(WORKLOADS[name], dtype, seed, **options) for name, dtype, options in _SHAPES]
    if "conform" in sections:  # each of its shapes compiles, so they do it side by side before the whole run
        tasks += [
            Task("conform", f"fwpkm conform: case {n}", conform, ("--case", str(n))) for n in range(_CONFORM_SHAPES)
        ]
    if "graphs" in sections:
        tasks.append(Task("graphs", "torch.compile(fullgraph=True) of the layer", gpu_graphs.compiled, (seed,)))
    if sections & {"graphs", "decode"}:
        arguments = (_DECODED, DTYPE, seed)
        tasks.append(Task("decode", "decode in a CUDA graph, against eager", gpu_graphs.decoded, arguments))
    if "agreement" in sections:
        tasks += [_shape(_TAIL, dtype, seed, tables=True) for dtype in ("float32", "bfloat16", "float16")]
        tasks += [_small(name, seed) for name in gpu_agreement.SHAPES]
    if "bits" in sections:
        arguments = (WORKLOADS["shared-512"], DTYPE, seed)
        tasks += [Task("bits", f"bits: process {n}", gpu_graphs.repeatable, arguments) for n in (1, 2)]
    if "graphs" in sections:
        arguments = (_STEP, DTYPE, seed)
        tasks.append(Task("graphs", "a training step without a wait", gpu_graphs.unsynchronized, arguments))
        tasks.append(Task("graphs", "a training step in a CUDA graph", gpu_graphs.captured, arguments))
    if "conform" in sections:
        tasks.append(Task("conform", "fwpkm conform: 40 cases", conform, ("--cases", "40")))
    if "agreement" in sections:
        tasks += [Task("agreement", f"vectors: {name}", gpu_agreement.vector, (name,)) for name in vectors.names()]
    return tasks


def timings(sections: set[str], tiny: bool) -> list[Task]:
    """Tasks that need the GPU to themselves."""
    if tiny:
        return list(_tiny_timings(sections))
    tasks = []
    if "speed" in sections:
        tasks.append(Task("speed", "copy bandwidth", measure.copy_bandwidth))
        tasks += [_speed(WORKLOADS[name]) for name in TRAIN]
        tasks.append(_attention(8, 4096))
        tasks += [_kernels(WORKLOADS[name]) for name in ("shared-256", "shared-512", "shared-1024")]
        for name in ("shared-512", "train-512"):
            arguments = (WORKLOADS[name], DTYPE)
            tasks.append(Task("speed", f"initial state: {name}", gpu_speed.fresh_state, arguments))
        tasks += [_attention(1, WORKLOADS[name].length) for name in READ if name.endswith("-512")]
        tasks += [_speed(WORKLOADS[name]) for name in READ]
    if "decode" in sections:
        tasks.insert(len(TRAIN) + 1, _decoding(WORKLOADS["decode-512"]))
    return tasks


def conform(*arguments: str) -> Report:
    """``fwpkm conform`` of the kernels.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    command = [sys.executable, "-m", "fwpkm.cli", "conform", "--backends", "triton", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    last = done.stdout.strip().splitlines()[-1:]
    return Report([equal(f"fwpkm conform {' '.join(arguments)} passes", True)], last)


def subject(task: Task) -> tuple[FwPKMConfig, str] | None:
    """The configuration and the dtype that a task is about, which all that is compiled depends on."""
    if not task.arguments or not isinstance(task.arguments[0], Workload):
        return None
    return task.arguments[0].config, task.arguments[1]


def _shape(workload: Workload, dtype: str, seed: int, derived: bool = True, tables: bool = False) -> Task:
    name = f"eager at {workload.name}, {dtype}: {workload}"
    return Task("agreement", name, gpu_shapes.agree, (workload, dtype, seed, derived, tables))


def _small(name: str, seed: int, numbers: Sequence[int] = (1, 2)) -> Task:
    title = f"float64 reference at small shapes: {name}"
    return Task("agreement", title, gpu_agreement.drawn, (name, seed, numbers))


def _speed(workload: Workload) -> Task:
    return Task("speed", workload.name, gpu_speed.speed, (workload, DTYPE))


def _attention(batch: int, length: int) -> Task:
    width = WORKLOADS["shared-512"].config.value_dim
    return Task("speed", f"attention: B={batch} T={length}", gpu_speed.attention, (batch, length, width, DTYPE))


def _kernels(workload: Workload) -> Task:
    return Task("speed", f"kernels: {workload.name}", gpu_speed.kernels, (workload, DTYPE))


def _decoding(workload: Workload) -> Task:
    return Task("decode", f"decode: {workload.name}", gpu_speed.decoding, (workload, DTYPE))


def _tiny_checks(sections: set[str], seed: int) -> Iterator[Task]:
    if sections & {"agreement", "speed"}:
        yield _shape(TINY, "float32", seed)
    if "agreement" in sections:
        yield _small("tiny", seed, (2,))
    if "bits" in sections:
        for n in (1, 2):
            yield Task("bits", f"bits: process {n}", gpu_graphs.repeatable, (TINY, "float32", seed, 2))
    if "decode" in sections:
        yield Task("decode", "decode, against eager", gpu_graphs.decoded, (TINY, "float32", seed))


def _tiny_timings(sections: set[str]) -> Iterator[Task]:
    if "speed" in sections:
        yield Task("speed", "copy bandwidth", measure.copy_bandwidth, (2**20,))
        yield Task("speed", TINY.name, gpu_speed.speed, (TINY, "float32", 1))
    if "decode" in sections:
        yield Task("decode", f"decode: {TINY.name}", gpu_speed.decoding, (TINY, "float32"))
