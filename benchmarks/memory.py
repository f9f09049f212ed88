"""Peak extra memory of each contestant, in a process of its own: ``python -m benchmarks.memory WORKLOAD...``.

What counts is written in :func:`benchmarks.measure.peak_extra_bytes`: tables, inputs and libraries are in the
baseline; graph, temporaries, outputs, gradients and new tables are not.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Iterator

from benchmarks import measure
from benchmarks.contestants import CONTESTANTS, Bench
from benchmarks.data import make_inputs
from benchmarks.workloads import WORKLOADS, Workload


def extra_memory(workloads: Iterable[Workload]) -> Iterator[tuple[str, str, int | None]]:
    """Workload, contestant and bytes, one after the other as they are measured, by running this module.

    Raises:
        subprocess.CalledProcessError: that run failed.
    """
    # A fixed threshold makes malloc map every large block by itself and unmap it when freed.
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(256 * 1024))
    root = pathlib.Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "benchmarks.memory", *(workload.name for workload in workloads)]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            yield tuple(json.loads(line))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def main(workloads: Iterable[str]) -> None:
    """Print workload, contestant and bytes, a JSON array a line; null where too little memory is at hand."""
    small = Bench(WORKLOADS["tiny"])
    for contestant in CONTESTANTS.values():
        contestant.step(small, make_inputs(small.workload, seed=1))  # loads what loads once, and leaves nothing large
    for workload in workloads:
        bench = Bench(WORKLOADS[workload])
        inputs = make_inputs(bench.workload, seed=1)
        for name, contestant in CONTESTANTS.items():
            size = measure.peak_extra_bytes(contestant.step, bench, inputs) if contestant.fits(bench) else None
            print(json.dumps([workload, name, size]), flush=True)
        del bench, inputs


if __name__ == "__main__":
    main(sys.argv[1:])
