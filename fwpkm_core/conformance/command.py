"""``fwpkm conform``: draw cases, ask the reference, run the backends, print the table."""

import importlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from fwpkm.conformance.processes import Verdict
    from fwpkm.conformance.results import Result
    from fwpkm.conformance.shapes import Passage

AT_ONCE = 2
"""Processes: two cores are what a small machine has."""

SET_ASIDE = 50
"""One case in so many may be set aside (SPEC.md §6)."""


def run(
    backends: Sequence[str],
    *,
    cases: int = 200,
    seed: int = 0,
    dtype: str = "float32",
    case: int | None = None,
    markdown: bool = False,
) -> int:
    """Judge backends and print what came out.

    Args:
        backends: names as ``contestants.load`` takes them; none for ``contestants.DEFAULT``.
        cases: how many cases are drawn.
        seed: what they follow from.
        dtype: "float32" or "float64".
        case: the number of one case to run alone, whatever ``cases``.
        markdown: print the table alone, as Markdown; all else goes to standard error.

    Returns:
        the exit status: 1 where a bound is broken, a case raised or too many cases were set aside; else 2 where a
        backend cannot run; else 0.

    Raises:
        ImportError: hypothesis, rich or torch is missing; names the extra.
    """
    require_extra()
    # Only now: these import hypothesis, rich and torch.
    from fwpkm.conformance import contestants, report
    from fwpkm.conformance.drawing import drawer
    from fwpkm.conformance.rounding import expect_unmoved

    names = list(dict.fromkeys(backends or contestants.DEFAULT))
    numbers = range(cases) if case is None else [case]
    with _progress() as progress, tempfile.TemporaryDirectory(prefix="fwpkm-conform-") as folder:
        draw = drawer(seed, dtype, contestants.unit(names))
        passages = [draw(number) for number in progress.track(numbers, description="drawing")]
        with ThreadPoolExecutor(1) as pool:  # the reference works beside the first backends
            expected = {passage.number: pool.submit(expect_unmoved, passage) for passage in passages}
            try:
                verdicts = _judge(names, passages, expected, dtype, Path(folder), progress)
                judged = [passage for passage in passages if expected[passage.number].result() is not None]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for the rest
                raise
    aside = len(passages) - len(judged)
    too_many = aside > -(-len(numbers) // SET_ASIDE)
    summary = f"{len(judged)} cases, {sum(passage.with_gradients for passage in judged)} of them with gradients"
    summary += f"; {aside} of {len(numbers)} set aside, as rounding their inputs would move them by too much"
    summary += f": more than one in {SET_ASIDE}" * too_many
    report.print_all(verdicts, summary, dtype, seed, markdown)
    if case is not None:
        sys.stderr.write("".join(verdict.log for verdict in verdicts))
    if too_many or any(verdict.raised or verdict.broken(dtype) for verdict in verdicts):
        return 1
    return 2 if any(verdict.cannot_run for verdict in verdicts) else 0


def require_extra() -> None:
    """Raise ImportError, naming the extra, unless what draws, derives and prints can be imported."""
    for package in ("hypothesis", "rich", "torch"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"conform needs {package}, which could not be imported ({error}). "
                f"Install it with: pip install 'fwpkm[conform]'",
                name=error.name,
            ) from error


def _judge(
    names: Sequence[str],
    passages: "Sequence[Passage]",
    expected: "Mapping[int, Future[Result | None]]",
    dtype: str,
    folder: Path,
    progress: "Progress",
) -> "list[Verdict]":
    from fwpkm.conformance.processes import judge

    def one(number: int, name: str) -> "Verdict":
        task = progress.add_task(name, total=len(passages))
        own = folder / str(number)
        own.mkdir()
        return judge(name, passages, expected, dtype, own, lambda: progress.advance(task))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, range(len(names)), names))


def _progress() -> "Progress":
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
