"""The table of ``fwpkm conform``: quantities by backends, and below it what to look at again."""

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from fwpkm.conformance import judging
from fwpkm.conformance.contestants import unit
from fwpkm.conformance.processes import Verdict


def table(verdicts: Sequence[Verdict], dtype: str, markdown: bool = False) -> Table:
    """The worst relative error of every quantity in every backend that ran; "-" where there is none."""
    style = box.MARKDOWN if markdown else box.SIMPLE_HEAD
    shown = Table(box=style, title=None if markdown else f"worst relative errors, {dtype}", title_justify="left")
    shown.add_column("quantity", no_wrap=True)
    shown.add_column("bound", justify="right", no_wrap=True)
    ran = [verdict for verdict in verdicts if verdict.worst]
    for verdict in ran:
        shown.add_column(verdict.name, justify="right", overflow="fold")
    for quantity in judging.QUANTITIES:
        bound = judging.bound(quantity, dtype)
        cells = [_cell(verdict, quantity, bound) for verdict in ran]
        shown.add_row(quantity, f"{bound:.0e}" if bound else "equal", *cells)
    return shown


def _cell(verdict: Verdict, quantity: str, bound: float) -> str:
    if quantity not in verdict.worst:
        return "-"
    error = verdict.worst[quantity].error
    text = ("differ" if error else "equal") if quantity in judging.EXACT else f"{error:.1e}"
    return text if error <= bound else f"[bold red]{text}[/]"


def findings(verdict: Verdict, dtype: str, seed: int, beside: Sequence[str] = ()) -> list[str]:
    """Lines about a backend: why it cannot run, what it breaks, or its worst case, and how to repeat that.

    Args:
        verdict: of the backend.
        dtype: of the cases.
        seed: of the cases.
        beside: the names of backends without which the cases would be others.
    """
    names = " ".join(dict.fromkeys((verdict.name, *beside)))

    def repeat(number: int) -> str:
        return f"fwpkm conform --backends {names} --seed {seed} --dtype {dtype} --case {number}"

    lines = [f"{verdict.name} cannot run: {verdict.cannot_run}"] if verdict.cannot_run else []
    broken = verdict.broken(dtype)
    for quantity, worst in broken.items():
        lines.append(
            f"{verdict.name}: {quantity} {_amount(worst.error, judging.bound(quantity, dtype))}: {repeat(worst.number)}"
        )
    for number, error in list(verdict.raised.items())[:1]:
        lines.append(f"{verdict.name}: {len(verdict.raised)} cases raised, first {error}: {repeat(number)}")
    if verdict.worst and not broken and not verdict.raised:
        name, worst = max(verdict.worst.items(), key=lambda item: item[1].error / (judging.bound(item[0], dtype) or 1))
        lines.append(f"{verdict.name}: worst {name}, {worst.error:.1e}: {repeat(worst.number)}")
    return lines


def _amount(error: float, bound: float) -> str:
    if not bound:
        return "differ"
    if not math.isfinite(error):
        return "differ in shape, or in what is not finite"
    return f"off by {error:.1e}, more than {bound:.0e}"


def print_all(verdicts: Sequence[Verdict], summary: str, dtype: str, seed: int, markdown: bool) -> None:
    """The table, with ``markdown`` alone; else the findings and the summary too."""
    console = Console(soft_wrap=False, width=None if _is_wide() else 120, highlight=False)
    if any(verdict.worst for verdict in verdicts):
        console.print(table(verdicts, dtype, markdown))
    if markdown:
        console = Console(stderr=True, highlight=False)
    beside = [verdict.name for verdict in verdicts if unit([verdict.name]) > 1]
    for verdict in verdicts:
        for line in findings(verdict, dtype, seed, beside):
            console.print(line, markup=False, soft_wrap=True)
    console.print(summary, markup=False, soft_wrap=True)


def _is_wide() -> bool:
    console = Console()
    return console.is_terminal and console.width >= 100
