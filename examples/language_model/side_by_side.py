"""Several jobs at once, a process each, on all cards; one that fails leaves the others alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from examples.language_model import checkpoint, results, run
from examples.language_model.interrupt import noted
from examples.language_model.run import Job

ROOT = Path(__file__).parents[2]  # what -m finds this example from
LOG = "log.txt"
PAUSE = 0.2  # seconds between looks at the processes


def cards() -> list[str]:
    """The cards to use, as CUDA_VISIBLE_DEVICES names them; one empty name for the CPU alone."""
    visible, number = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    names = [str(i) for i in range(number)] if visible is None else visible.split(",")[:number]
    return names or [""]


class _Running(NamedTuple):
    """A job that was started."""

    job: Job
    process: subprocess.Popen[bytes]
    card: str
    began: float


def run_all(jobs: list[Job], out: Path, arguments: list[str], on_a_card: int) -> None:
    """Run every job in a process of its own, ``on_a_card`` at a time on each; shows how far they are.

    Args:
        jobs: from ``run.plan``.
        out: each writes what it prints to OUT/NAME/log.txt.
        arguments: of the command ``run``, but for config and seed.
        on_a_card: how many run on one card at a time.

    Raises:
        ValueError: some have failed; the others were finished.
        KeyboardInterrupt: Ctrl-C; the running ones stopped after a step, and saved it. The same command goes on.
    """
    waiting, free, failed = list(jobs), cards() * on_a_card, []
    running: list[_Running] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns) as progress, noted(progress.console.print) as interrupted, _ending(running):
        bars = {job.name: progress.add_task(f"{job.name}: waits", total=job.experiment.training.steps) for job in jobs}
        told = False
        while running or (waiting and not interrupted()):
            while waiting and free and not interrupted():
                running.append(started := _start(waiting.pop(0), out, arguments, free.pop(0)))
                where = f"card {started.card}" if started.card else "the CPU"
                progress.console.print(f"{started.job.name}: begins on {where}", highlight=False)
            if interrupted() and not told:
                told = True
                for one in running:
                    one.process.send_signal(signal.SIGINT)
            for one in list(running):
                _show(progress, bars[one.job.name], one.job, out)
                if (status := one.process.poll()) is None:
                    continue
                running.remove(one)
                free.append(one.card)
                said = f"done in {time.monotonic() - one.began:.0f} s"
                if status:
                    failed.append(one.job.name)
                    said = f"failed: {_last_line(out / one.job.name / LOG)}"
                progress.update(bars[one.job.name], description=f"{one.job.name}: {said.partition(':')[0]}")
                progress.console.print(f"{one.job.name}: {said}", highlight=False, markup=False)
            time.sleep(PAUSE)
    if interrupted():
        raise KeyboardInterrupt("stopped; the same command goes on from here")
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(jobs)} failed: {', '.join(failed)}. See {out}/NAME/{LOG}; the same command tries "
            f"them again"
        )


def _start(job: Job, out: Path, arguments: list[str], card: str) -> _Running:
    """In a session of its own, so that a Ctrl-C reaches it once, from here."""
    checkpoint.made(out / job.name)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": card, "PYTHONPATH": path}
    line = [sys.executable, "-m", "examples.language_model", "run", str(job.config), "--seeds", str(job.seed)]
    with (out / job.name / LOG).open("ab") as log:
        process = subprocess.Popen(
            [*line, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            start_new_session=True,
        )  # fmt: skip
    return _Running(job, process, card, time.monotonic())


@contextmanager
def _ending(running: list[_Running]) -> Iterator[None]:
    """Nothing runs on after the block, whatever ends it."""
    try:
        yield
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()


def _show(progress: Progress, bar: TaskID, job: Job, out: Path) -> None:
    """How far a job is, from what it has written."""
    said, path = run.about(job, out), out / job.name / checkpoint.RECORD
    done = ["trained", *said["measured"]] if said else ["training"]
    # A line may be half written: the record ends with the last whole one.
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    step = results.record(whole)[-1]["step"] if whole else 0
    progress.update(bar, completed=step, description=f"{job.name}: {', '.join(done)}")


def _last_line(log: Path) -> str:
    """What a process said in the end."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
