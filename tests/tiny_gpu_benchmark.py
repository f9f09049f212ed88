"""``python -m benchmarks.gpu`` with a few tiny tasks in place of its own, for Triton's interpreter."""

import dataclasses
import sys

from benchmarks import gpu, gpu_agreement, gpu_layer, gpu_speed
from benchmarks.worker import Task
from benchmarks.workloads import WORKLOADS

TINY = WORKLOADS["tiny-kernels"], "float32"
OWN = (
    dataclasses.replace(TINY[0], config=dataclasses.replace(TINY[0].config, memory_scope="sequence"), batch=2),
    "float32",
)


LONGER = (dataclasses.replace(OWN[0], length=5), "float32")
"""Two rows, of which one stands in the middle of a chunk of two tokens."""


def checks(seed: int) -> list[Task]:
    return [
        Task("agreement speed", f"eager at tiny-kernels, float32: {TINY[0]}", gpu_agreement.agree, (*TINY, seed)),
        Task("agreement", "float64 at small shapes: tiny", gpu_agreement.drawn, ("tiny", seed, (2,))),
        *(Task("bits", f"bits: process {number}", gpu_agreement.repeatable, (*TINY, seed, 2)) for number in (1, 2)),
        Task("decode", "decode, against eager: one row", gpu_agreement.decoded, (*TINY, seed)),
        Task("decode", "decode, against eager: rows that differ", gpu_agreement.decoded, (*LONGER, seed)),
        Task(
            "agreement stateless",
            "from a memory, against eager: tiny",
            gpu_agreement.from_memory,
            (*OWN, seed, True, True),
        ),
        Task("agreement rows", "ragged streams, against eager: 3", gpu_agreement.streams, (range(3, 4), 3)),
        Task(
            "agreement rows",
            "ragged streams, against eager: a mask beside",
            gpu_agreement.streams,
            (range(40, 41), 3, True),
        ),
        Task("jax", "jax beside torch: tiny-kernels", gpu.in_jax, (*TINY, "agree", seed)),
        Task("jax", "jax beside torch: decode", gpu.in_jax, (*TINY, "decoded", seed)),
        *(Task("jax", f"bits in JAX: process {x}", gpu.in_jax, (*TINY, "repeatable", seed, 2)) for x in (1, 2)),
    ]


def timings() -> list[Task]:
    return [
        Task("speed", "copy bandwidth", gpu_speed.bandwidth, (2**20,)),
        Task("speed", "tiny-kernels", gpu_speed.speed, (*TINY, 1)),
        *(Task("decode", f"decode: {x[0].batch}", gpu_speed.decoding, x) for x in (TINY, LONGER)),
        Task("rows", "rows: mask", gpu_speed.masked, (*TINY, 1)),
        Task("rows", "rows: 3", gpu_speed.ragged, (*TINY, 3, 1)),
        Task("stateless", "stateless: 2", gpu_speed.stateless, (*OWN, 2, 1)),
        Task("layer", "layer: ours", gpu_layer.layer, (*TINY, 1)),
        Task("layer", "layer: Gated DeltaNet", gpu_layer.gated_deltanet, (*TINY, 1)),
        Task("jax", "jax: tiny-kernels", gpu.in_jax, (*TINY, "speed", True, 1)),
    ]


if __name__ == "__main__":
    gpu.checks, gpu.timings, gpu.CHECK_LIMIT, gpu.TIMING_LIMIT = checks, timings, 960.0, 480.0
    sys.exit(gpu.main(anywhere=True))
