"""One backend in a process of its own, judged as its results come in.

``python -m fwpkm.conformance.processes NAME FOLDER`` is that process: it reads FOLDER/passages and writes to standard
output, pickled, the reason why it cannot run, or for each passage its number, its result and the error that it raised.
Whatever the backend prints goes to standard error. ``python -m`` puts the current folder on the path, so that a module
that lies there can be judged.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from fwpkm.conformance import judging, results
from fwpkm.conformance.contestants import CannotRunError, environment, load
from fwpkm.conformance.drawing import Passage
from fwpkm.conformance.results import Result


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

    ``expected`` has the reference's results by number, None for a case that is set aside. ``folder`` exists; it is for
    what passes to the process and for its log, and folders beside it share a cache of what was compiled. ``advance`` is
    called after every passage.
    """
    (folder / "passages").write_bytes(pickle.dumps(list(passages)))
    configs = {passage.number: passage.case.cfg for passage in passages}
    worst: dict[str, Worst] = {}
    raised: dict[int, str] = {}
    cannot_run, judged = "", 0
    with _worker(name, dtype, folder) as (process, messages):
        for message in messages:
            if isinstance(message, str):
                cannot_run = message
                continue
            number, actual, error = message
            judged += 1
            right = expected[number].result()
            if error:
                raised[number] = error
            elif right is not None:
                for quantity, size in judging.errors(configs[number], actual, right):
                    if quantity not in worst or not size <= worst[quantity].error:
                        worst[quantity] = Worst(size, number)
            advance()
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    if judged < len(passages) and not cannot_run:  # whatever its exit status
        last = " ".join(log.split()[-60:]) or "it printed nothing"
        ended = f"its process ended with status {process.returncode} after {judged} of {len(passages)} cases"
        cannot_run = f"{ended}: ... {last}"
    return Verdict(name, cannot_run, worst, raised, log)


@contextmanager
def _worker(name: str, dtype: str, folder: Path) -> Iterator[tuple[subprocess.Popen, Iterator[Any]]]:
    """The process and what it says, message by message; it ends with the block, whatever happens."""
    command = [sys.executable, "-m", "fwpkm.conformance.processes", name, str(folder)]
    variables = environment(name, dtype, str(folder.parent / "compiled"))
    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=variables) as process,
    ):
        try:
            assert process.stdout is not None
            yield process, _messages(process.stdout)
            process.wait()
        finally:
            process.kill()


def _messages(stream: IO[bytes]) -> Iterator[Any]:
    while True:
        try:
            yield pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):  # the process has ended, perhaps within a message
            return


def main(name: str, folder: Path) -> int:
    """Run every passage; returns 0, also where some of them raised."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def tell(message: Any) -> None:
        pickle.dump(message, output)
        output.flush()

    passages = pickle.loads((folder / "passages").read_bytes())
    try:
        be = load(name, passages[0].case.dtype)
    except CannotRunError as error:
        tell(str(error))
        return 0
    for passage in passages:
        try:
            result, complaint = results.run(be, passage), ""
        except Exception as raised:
            result, complaint = None, "".join(traceback.format_exception_only(raised)).strip()
            traceback.print_exc()
        tell((passage.number, result, complaint))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
