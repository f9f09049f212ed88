"""One backend in a process of its own, judged as its results come in."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fwpkm.conformance import exchange, judging
from fwpkm.conformance.contestants import environment
from fwpkm.conformance.results import Result
from fwpkm.conformance.shapes import Passage


class Worst(NamedTuple):
    """The largest error of a quantity, and the case that gave it."""

    error: float
    number: int


class Verdict(NamedTuple):
    """What a backend's process showed."""

    name: str
    cannot_run: str
    """The reason, or ""."""
    worst: dict[str, Worst]
    """By quantity."""
    raised: dict[int, str]
    """Cases that raised an error, by number."""
    log: str
    """What the process printed."""

    def broken(self, dtype: str) -> dict[str, Worst]:
        """The quantities beyond their bounds."""
        return {name: worst for name, worst in self.worst.items() if not worst.error <= judging.bound(name, dtype)}


def judge(
    name: str,
    passages: Sequence[Passage],
    expected: Mapping[int, Future[Result | None]],
    dtype: str,
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> Verdict:
    """Run a backend over passages, in ``folder``, and hold every result to what was expected of it.

    Args:
        name: as ``contestants.load`` takes it.
        passages: what to run.
        expected: by number: what the reference gives, or None where a case is set aside.
        dtype: of the passages.
        folder: an existing one for the files that pass between the processes; others beside it share a cache.
        advance: called after every passage.
    """
    exchange.save_passages(folder / "passages.json", passages)
    configs = {passage.number: passage.case.cfg for passage in passages}
    worst: dict[str, Worst] = {}
    raised: dict[int, str] = {}
    cannot_run = ""
    with _worker(name, dtype, folder) as (process, lines):
        for line in lines:
            number, cannot_run = line.get("number"), line.get("cannot_run", "")
            if number is None:
                continue
            right = expected[number].result()
            if line["error"]:
                raised[number] = line["error"]
            elif right is not None:
                actual = exchange.load_result(folder / f"{number}.npz")
                _add(worst, number, judging.errors(configs[number], actual, right))
            advance()
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    if process.returncode and not cannot_run:
        last = " ".join(log.split()[-60:]) or "it printed nothing"
        cannot_run = f"its process ended with status {process.returncode}: ... {last}"
    return Verdict(name, cannot_run, worst, raised, log)


def _add(worst: dict[str, Worst], number: int, errors: Iterable[tuple[str, float]]) -> None:
    for quantity, error in errors:
        if quantity not in worst or not error <= worst[quantity].error:
            worst[quantity] = Worst(error, number)


@contextmanager
def _worker(name: str, dtype: str, folder: Path) -> Iterator[tuple[subprocess.Popen, Iterator[dict]]]:
    """The process and what it says, line by line; it ends with the block, whatever happens."""
    cache = str(folder.parent / "compiled")
    command = [sys.executable, "-m", "fwpkm.conformance.worker", name, str(folder)]
    variables = environment(name, dtype, cache)
    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=variables, encoding="utf-8") as process,
    ):
        try:
            assert process.stdout is not None
            yield process, (json.loads(line) for line in process.stdout)
            process.wait()
        finally:
            process.kill()
