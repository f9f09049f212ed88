"""Functions run in processes of their own: one that dies, hangs or spoils its CUDA context takes no other with it."""

import contextlib
import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self

from benchmarks import measure


class Task(NamedTuple):
    """A function of a module with its arguments."""

    section: str
    """What the command line's ``--only`` calls it; several, separated by spaces, where any of them needs it."""
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class Outcome(NamedTuple):
    """What became of a task."""

    task: Task
    result: Any
    error: str
    """"" or a traceback."""
    seconds: float


class Worker:
    """A process that runs one function after the other; what it prints goes to stderr."""

    def __init__(self, **environment: str) -> None:
        """Start it, with these variables too."""
        self.connection, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-m", "benchmarks.worker", str(theirs.fileno())]
        variables, files = {**os.environ, **environment}, [theirs.fileno()]
        self.process = subprocess.Popen(command, cwd=measure.ROOT, env=variables, stdout=2, pass_fds=files)
        theirs.close()  # so that its death ends the pipe

    def __enter__(self) -> Self:
        """Ended where the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def run(self, function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
        """What a function of a module returns there; it, its arguments and the result must be picklable.

        Raises:
            RuntimeError: it raised (with its traceback), took longer than ``limit`` seconds, or ended the process.
        """
        module, name = function.__module__, function.__qualname__
        if module == "__main__":
            module = sys.modules[module].__spec__.name  # type: ignore[union-attr]
        try:
            self.connection.send((module, name, arguments))
            if not self.connection.poll(limit):
                raise RuntimeError(f"{name} took longer than {limit:.0f} s and was ended")
            result, error = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RuntimeError(f"the process that ran {name} ended with status {self.process.wait(10)}") from None
        if error:
            raise RuntimeError(error)
        return result


def run_all(tasks: Sequence[Task], workers: int, limit: float) -> Iterator[Outcome]:
    """Outcomes in the order in which tasks end; they begin in the order they stand in.

    Args:
        tasks: what is to be run.
        workers: how many processes work side by side; one takes task after task until a task fails in it.
        limit: seconds after which a task is ended.
    """
    own = threading.local()

    def run(task: Task) -> Outcome:
        started, result, error = time.perf_counter(), None, ""
        own.worker = getattr(own, "worker", None) or everyone.enter_context(Worker())
        try:
            result = own.worker.run(task.function, *task.arguments, limit=limit)
        except RuntimeError as raised:
            error = str(raised)
            own.worker.__exit__()  # a CUDA error stays with its process
            own.worker = None
        return Outcome(task, result, error, time.perf_counter() - started)

    with contextlib.ExitStack() as everyone, ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(run, task) for task in tasks]):
            yield future.result()


def _serve(connection: Connection) -> None:
    while True:
        try:
            module, name, arguments = connection.recv()
            reply = getattr(importlib.import_module(module), name)(*arguments), ""
        except EOFError:
            return
        except BaseException:
            reply = None, traceback.format_exc()
        connection.send(reply)
        measure.free_device_memory()


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
