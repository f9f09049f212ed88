"""Tasks in processes of their own: one that dies, hangs or spoils its CUDA context takes no other with it."""

import multiprocessing
import queue
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from benchmarks import measure


class Task(NamedTuple):
    """A function of a module with its arguments."""

    section: str
    """What the command line's ``--only`` calls it."""
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


def run_all(tasks: Sequence[Task], workers: int, limit: float) -> Iterator[Outcome]:
    """Outcomes in the order in which tasks end; they begin in the order they stand in.

    Args:
        tasks: functions, arguments and results must be picklable.
        workers: how many processes work side by side; one takes task after task until a task fails in it.
        limit: seconds after which a task is ended.
    """
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def run(task: Task) -> Outcome:
        started, worker = time.perf_counter(), None
        try:
            try:
                worker = idle.get_nowait()
            except queue.Empty:
                worker = _Worker()
            result, error = worker.run(task, limit)
        except Exception:
            result, error = None, traceback.format_exc()
        if worker and error:  # a CUDA error stays with its process
            worker.end()
        elif worker:
            idle.put(worker)
        return Outcome(task, result, error, time.perf_counter() - started)

    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(run, task) for task in tasks]):
            yield future.result()
    while not idle.empty():
        idle.get().end()


class _Worker:
    """A new process that runs one task after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that its death ends the pipe

    def run(self, task: Task, limit: float) -> tuple[Any, str]:
        """The result and "", or None and what went wrong."""
        try:
            self.connection.send((task.function, task.arguments))
            if not self.connection.poll(limit):
                return None, f"{task.name} took longer than {limit:.0f} s and was ended"
            return self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(10)
            return None, f"the process that ran {task.name} ended with status {self.process.exitcode}"

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = function(*arguments), ""
        except BaseException:
            reply = None, traceback.format_exc()
        connection.send(reply)
        measure.free_device_memory()
