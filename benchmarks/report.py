"""Tables, and the judgement of the stated bounds."""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Column
from rich.table import Table as RichTable

from benchmarks import measure
from benchmarks.measure import Summary
from benchmarks.workloads import WORKLOADS


class Claim(NamedTuple):
    """A measured ratio and, if one is stated, its bound."""

    text: str
    measured: Summary | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """ "holds", "FAILS", "not measured", or "" without a bound."""
        if not self.bound:
            return ""
        if self.measured is None:
            return "not measured"
        above = self.at_least is None or self.measured.median >= self.at_least
        below = self.at_most is None or self.measured.median <= self.at_most
        return "holds" if above and below else "FAILS"

    @property
    def broken(self) -> bool:
        """Whether ``--check`` must fail: a bound that was not measured is not known to hold."""
        return self.verdict not in ("", "holds")

    @property
    def bound(self) -> str:
        """The bound in words."""
        limits = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)


class Table(NamedTuple):
    """Rows of text under a title."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """The table in Markdown, the first column aligned left and the others right."""
        lines = (self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows)
        return "\n".join((f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)))

    def rich(self) -> RichTable:
        """The table for a terminal."""
        sides = ("left", *("right" for _ in self.columns[1:]))
        columns = (Column(column, justify=side) for column, side in zip(self.columns, sides))
        grid = RichTable(*columns, title=self.title, title_justify="left")
        for row in self.rows:
            grid.add_row(*row)
        return grid


def add_options(parser: argparse.ArgumentParser, default: Sequence[str] = ()) -> None:
    """What the commands share; with default workloads, also a choice of them and a number of rounds."""
    add = parser.add_argument
    if default:
        text = f"of {', '.join(WORKLOADS)} (default: {' '.join(default)})"
        add("--workload", nargs="+", choices=WORKLOADS, metavar="NAME", help=text)
        add("--repeats", type=count, default=7, help="rounds (default: %(default)s)")
    add("--markdown", action="store_true", help="print the tables in Markdown")
    add("--check", action="store_true", help="fail where a bound does not hold or was not measured")
    add("--against", type=tree, metavar="PATH", help="time this tree beside another commit's, and nothing else")
    add("--pairs", type=count, default=30, help="of --against, for each case (default: %(default)s)")


def count(text: str) -> int:
    """An option that is a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1. Received: {text}")
    return int(text)


def tree(text: str) -> pathlib.Path:
    """An option that names the tree of a commit: the folder that fwpkm is to be imported from."""
    root = pathlib.Path(text).resolve()
    for folder in (root / "src", root):
        if (folder / "fwpkm" / "__init__.py").exists():
            return folder
    raise argparse.ArgumentTypeError(f"must be a folder that holds src/fwpkm, as a checkout does. Received: {text}")


def claims_table(title: str, claims: Sequence[Claim], what: str = "ratio") -> Table:
    """The ratios, or what else was measured, their bounds and whether they hold."""
    rows = [(claim.text, spread(claim.measured), claim.bound, claim.verdict) for claim in claims]
    return Table(title, (what, "measured", "bound", "verdict"), rows)


def show(legend: Sequence[str], tables: Sequence[Table], *, markdown: bool) -> None:
    """Print device, versions, the legend and the tables."""
    lines = [*(f"{key}: {text}" for key, text in measure.environment().items()), *legend]
    if markdown:
        print("\n".join(f"- {line}" for line in lines), *(table.markdown() for table in tables), sep="\n\n", flush=True)
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print("\n".join(lines), markup=False)
    console.print(*(table.rich() for table in tables))


def verdict(claims: Sequence[Claim]) -> int:
    """1 where a bound does not hold or was not measured, each named on stderr, else 0."""
    broken = [claim for claim in claims if claim.broken]
    for claim in broken:
        print(f"{claim.verdict}: {claim.text}: {spread(claim.measured)}, bound: {claim.bound}", file=sys.stderr)
    return int(bool(broken))


def spread(summary: Summary | None, form: str = "{:.3g}") -> str:
    """A median with its quartiles."""
    if summary is None:
        return "-"
    median, low, high = (form.format(number) for number in (summary.median, summary.low, summary.high))
    return f"{median} ({low} to {high})" if summary.size > 1 else median
