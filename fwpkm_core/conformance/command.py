"""``fwpkm conform``: draw cases, ask the reference, run the backends, print the table and what to look at again."""

import itertools
import json
import math
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from fwpkm.conformance import contestants, judging, processes
from fwpkm.conformance.drawing import Passage, drawer
from fwpkm.conformance.processes import Verdict
from fwpkm.conformance.results import Result

AT_ONCE = 2
"""Processes: two cores are what a small machine has."""

SET_ASIDE = 50
"""One case in so many may be set aside (SPEC.md §6)."""


def _steady(draw: Callable[..., Passage], number: int) -> Passage:
    """A case that a rounding of its inputs hardly moves where it is read in one call; few need a second draw.

    What else it is judged by can still be moved: such a case is set aside.
    """
    attempts = (draw(number, attempt) for attempt in itertools.count())
    return next(passage for passage in attempts if judging.is_steady(passage.case))


def run(
    backends: Sequence[str],
    *,
    cases: int = 200,
    seed: int = 0,
    dtype: str = "float32",
    case: int | None = None,
    markdown: bool = False,
    as_json: bool = False,
) -> int:
    """Judge backends and print what came out.

    Args:
        backends: names as ``contestants.load`` takes them; none for ``contestants.DEFAULT``.
        cases: how many cases are drawn.
        seed: what they follow from.
        dtype: "float32" or "float64".
        case: the number of one case to run alone, whatever ``cases``.
        markdown: print the table alone, as Markdown; all else goes to standard error.
        as_json: print one JSON object alone; docs/commands.md has its keys.

    Returns:
        the exit status: 1 where a bound is broken, a case raised or too many cases were set aside; else 2 where a
        backend cannot run; else 0.

    Raises:
        CannotRunError: none of the names can be found.
    """
    names = list(dict.fromkeys(backends or contestants.DEFAULT))
    if not any(map(contestants.found, names)):
        contestants.load(names[0], dtype)  # which says so: no case need be drawn
    numbers = range(cases) if case is None else [case]
    with _progress() as progress, tempfile.TemporaryDirectory(prefix="fwpkm-conform-") as folder:
        draw = drawer(seed, dtype, contestants.unit(names))
        passages = [_steady(draw, number) for number in progress.track(numbers, description="drawing")]
        with ThreadPoolExecutor(1) as pool:  # the reference works beside the first backends
            expected = {passage.number: pool.submit(judging.expect_unmoved, passage) for passage in passages}
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
    failed = too_many or any(verdict.raised or verdict.broken(dtype) for verdict in verdicts)
    status = 1 if failed else 2 if any(verdict.cannot_run for verdict in verdicts) else 0
    if as_json:
        about = {"dtype": dtype, "seed": seed, "judged": len(judged), "set_aside": aside, "exit_status": status}
        print(json.dumps(as_object(verdicts, about), indent=1, allow_nan=False))
    else:
        _print(verdicts, summary, dtype, seed, markdown)
    if case is not None:
        sys.stderr.write("".join(verdict.log for verdict in verdicts))
    return status


def as_object(verdicts: Sequence[Verdict], about: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--json`` prints (docs/commands.md); an error that is no finite number is null there, and never holds."""
    backends = []
    for verdict in verdicts:
        worst = {}
        for name, (error, number) in verdict.worst.items():
            bound = judging.bound(name, about["dtype"])
            shown = float(error) if math.isfinite(error) else None
            worst[name] = {"error": shown, "bound": bound, "holds": bool(error <= bound), "case": number}
        raised = {str(number): error for number, error in verdict.raised.items()}
        backends.append({"name": verdict.name, "cannot_run": verdict.cannot_run, "raised": raised, "worst": worst})
    return {"fwpkm": version("fwpkm"), **about, "backends": backends}


def _judge(
    names: Sequence[str],
    passages: Sequence[Passage],
    expected: Mapping[int, Future[Result | None]],
    dtype: str,
    folder: Path,
    progress: Progress,
) -> list[Verdict]:
    def one(name: str) -> Verdict:
        task, own = progress.add_task(name, total=len(passages)), Path(tempfile.mkdtemp(dir=folder))
        return processes.judge(name, passages, expected, dtype, own, lambda: progress.advance(task))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, names))


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


# --- The table ---


def table(verdicts: Sequence[Verdict], dtype: str, markdown: bool = False) -> Table:
    """The worst relative error of every quantity in every backend, "-" where there is none; last, what stopped one."""
    style = box.MARKDOWN if markdown else box.SIMPLE_HEAD
    shown = Table(box=style, title=None if markdown else f"worst relative errors, {dtype}", title_justify="left")
    shown.add_column("quantity", no_wrap=True)
    shown.add_column("bound", justify="right", no_wrap=True)
    for verdict in verdicts:
        shown.add_column(verdict.name, justify="right", overflow="fold")
    for quantity in judging.QUANTITIES:
        bound = judging.bound(quantity, dtype)
        cells = [_cell(verdict, quantity, bound) for verdict in verdicts]
        shown.add_row(quantity, f"{bound:.0e}" if bound else "equal", *cells)
    stopped = [verdict.cannot_run or _raised(verdict) for verdict in verdicts]
    if any(stopped):
        reasons = (textwrap.shorten(reason, 90, placeholder=" ...") or "-" for reason in stopped)
        shown.add_row("stopped by", "", *(Text(reason, "" if reason == "-" else "bold red") for reason in reasons))
    return shown


def _cell(verdict: Verdict, quantity: str, bound: float) -> str:
    if quantity not in verdict.worst:
        return "-"
    error = verdict.worst[quantity].error
    text = ("differ" if error else "equal") if quantity in judging.EXACT else f"{error:.1e}"
    return text if error <= bound else f"[bold red]{text}[/]"


def _raised(verdict: Verdict) -> str:
    return f"{len(verdict.raised)} cases raised, first {next(iter(verdict.raised.values()))}" if verdict.raised else ""


def findings(verdict: Verdict, dtype: str, seed: int, beside: Sequence[str] = ()) -> list[str]:
    """Lines about a backend: why it cannot run, what it breaks, or its worst case, and how to repeat that.

    ``beside`` names the backends without which the cases would be others.
    """
    names = " ".join(dict.fromkeys((verdict.name, *beside)))

    def repeat(number: int) -> str:
        return f"fwpkm conform --backends {names} --seed {seed} --dtype {dtype} --case {number}"

    lines = [f"{verdict.name} cannot run: {verdict.cannot_run}"] if verdict.cannot_run else []
    broken = verdict.broken(dtype)
    for quantity, worst in broken.items():
        amount = _amount(worst.error, judging.bound(quantity, dtype))
        lines.append(f"{verdict.name}: {quantity} {amount}: {repeat(worst.number)}")
    if verdict.raised:
        lines.append(f"{verdict.name}: {_raised(verdict)}: {repeat(next(iter(verdict.raised)))}")
    if verdict.worst and not broken and not verdict.raised:
        name, worst = max(verdict.worst.items(), key=lambda item: item[1].error / (judging.bound(item[0], dtype) or 1))
        lines.append(f"{verdict.name}: worst {name}, {worst.error:.1e}: {repeat(worst.number)}")
    return lines


def _amount(error: float, bound: float) -> str:
    if not bound:
        return "differ"
    if not math.isfinite(error):
        return "differ in shape, in what is not finite, or in what must be equal"
    return f"off by {error:.1e}, more than {bound:.0e}"


def _print(verdicts: Sequence[Verdict], summary: str, dtype: str, seed: int, markdown: bool) -> None:
    """The table, with ``markdown`` alone; else the findings and the summary too."""
    if markdown or any(verdict.worst or verdict.raised for verdict in verdicts):  # else it would hold dashes alone
        shown = table(verdicts, dtype, markdown)
        # A row of Markdown must not be wrapped.
        width = Console(width=10_000).measure(shown).maximum if markdown else max(120, Console().width)
        Console(soft_wrap=False, width=width, highlight=False).print(shown)
    console = Console(stderr=markdown, highlight=False)
    beside = [verdict.name for verdict in verdicts if contestants.unit([verdict.name]) > 1]
    for verdict in verdicts:
        for line in findings(verdict, dtype, seed, beside):
            console.print(line, markup=False, soft_wrap=True)
    console.print(summary, markup=False, soft_wrap=True)
