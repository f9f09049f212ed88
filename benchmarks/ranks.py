"""Commands that run as several ranks, a card each; on the CPU processes of one thread each."""

import argparse
import datetime
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import report

_TIMEOUT = datetime.timedelta(minutes=5)


def parser(name: str, about: str, *options: str, **counts: tuple[int | None, str]) -> argparse.ArgumentParser:
    """As :func:`benchmarks.report.parser`, with the options of ranks and of what prints tables."""
    made = report.parser(name, about, "markdown", *options, ranks=(2, "processes, a card each"), **counts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(default: %(default)s)")
    return made


def where(options: argparse.Namespace) -> str:
    """A line above the tables."""
    return f"{options.ranks} ranks on {options.device}, {os.cpu_count()} cores"


def run(measure: Callable[..., Any], options: argparse.Namespace) -> Any:
    """What ``measure(rank, device, options, join)`` returns on the first rank, by way of JSON.

    Every rank calls ``join()`` when the process group is to begin.
    """
    with tempfile.TemporaryDirectory() as folder:
        method = "spawn" if options.device == "cuda" else "fork"
        arguments = (measure, options, folder)
        torch.multiprocessing.start_processes(_rank, arguments, options.ranks, start_method=method)
        return json.loads(Path(folder, "found.json").read_text())


def _rank(rank: int, measure: Callable[..., Any], options: argparse.Namespace, folder: str) -> None:
    device, backend = torch.device("cpu"), "gloo"
    if options.device == "cuda":
        device, backend = torch.device("cuda", rank), "nccl"
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)

    def join() -> None:
        group = {"rank": rank, "world_size": options.ranks, "timeout": _TIMEOUT}
        dist.init_process_group(backend, f"file://{folder}/store", **group)

    found = measure(rank, device, options, join)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
