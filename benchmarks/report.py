"""Tables, the judgement of the stated bounds, and the options that the commands share."""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column
from rich.table import Table as RichTable

from benchmarks import measure
from benchmarks.measure import Samples, Summary, ratio, summarize
from benchmarks.workloads import WORKLOADS, Workload

ROUNDS = "medians with their quartiles; rounds are interleaved, and ratios of times are taken within rounds"


class Claim(NamedTuple):
    """A measured ratio and, if one is stated, its bound."""

    text: str
    measured: Summary | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """ "holds", "FAILS", "not measured", or "" without a bound."""
        if not self.bound or self.measured is None:
            return self.bound and "not measured"
        above = self.at_least is None or self.measured.median >= self.at_least
        return "holds" if above and (self.at_most is None or self.measured.median <= self.at_most) else "FAILS"

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
        columns = (Column(column, justify="right" if i else "left") for i, column in enumerate(self.columns))
        grid = RichTable(*columns, title=self.title, title_justify="left")
        for row in self.rows:
            grid.add_row(*row)
        return grid


# --- Options ---


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


_NAMES = ", ".join(WORKLOADS)
OPTIONS: dict[str, dict[str, Any]] = {
    "workload": {
        "nargs": "+",
        "choices": WORKLOADS,
        "metavar": "NAME",
        "help": f"of {_NAMES} (default: the command's own)",
    },
    "markdown": {"action": "store_true", "help": "print the tables in Markdown"},
    "check": {"action": "store_true", "help": "fail where a bound does not hold or was not measured"},
    "against": {"type": tree, "metavar": "PATH", "help": "time this tree beside another commit's, and nothing else"},
    "pairs": {"type": count, "default": 30, "help": "of --against, for each case (default: %(default)s)"},
}
"""What several commands take, by name."""
JUDGED = ("markdown", "check", "against", "pairs")
"""Those of what states bounds and can be held against another commit."""


def parser(name: str, about: str, *options: str, **counts: tuple[int | None, str]) -> argparse.ArgumentParser:
    """Of ``python -m benchmarks.name``, with some of ``OPTIONS``, and with others that count something: their default
    and what it is.
    """
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about.partition("\n")[0])
    for option, (default, text) in counts.items():
        text += " (default: %(default)s)" * (default is not None)
        made.add_argument(f"--{option.replace('_', '-')}", type=count, default=default, help=text)
    for option in options:
        made.add_argument(f"--{option}", **OPTIONS[option])
    return made


# --- Tables ---


def show(legend: Sequence[str], tables: Sequence[Table], *, markdown: bool) -> None:
    """Print device, versions, the legend and the tables."""
    lines = [*(f"{key}: {text}" for key, text in measure.environment().items()), *legend]
    if markdown:
        print("\n".join(f"- {line}" for line in lines), *(table.markdown() for table in tables), sep="\n\n", flush=True)
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print("\n".join(lines), markup=False)
    console.print(*(table.rich() for table in tables))


def conclude(
    legend: Sequence[str], tables: Sequence[Table], claims: Sequence[Claim], options: argparse.Namespace
) -> int:
    """Show all; 1 where ``--check`` was given and a bound does not hold or was not measured, each named on stderr."""
    show(legend, tables, markdown=options.markdown)
    broken = [claim for claim in claims if claim.broken and options.check]
    for claim in broken:
        print(f"{claim.verdict}: {claim.text}: {spread(claim.measured)}, bound: {claim.bound}", file=sys.stderr)
    return int(bool(broken))


def spread(summary: Summary | None, form: str = "{:.3g}", factor: float = 1.0) -> str:
    """A median with its quartiles, in the unit that the factor leads to."""
    if summary is None:
        return "-"
    median, low, high = (form.format(factor * number) for number in summary[:3])
    return f"{median} ({low} to {high})" if summary.size > 1 else median


# --- From samples ---


def claims_table(title: str, claims: Sequence[Claim], what: str = "ratio") -> Table:
    """The ratios, or what else was measured, their bounds and whether they hold."""
    rows = [(claim.text, spread(claim.measured), claim.bound, claim.verdict) for claim in claims]
    return Table(title, (what, "measured", "bound", "verdict"), rows)


def growth(samples: Samples, workloads: Sequence[Workload], name: str, part: str, at_most: float) -> Claim:
    """The ratio of a part at the largest of several tables to the same at the smallest."""
    ends = (workloads[-1], workloads[0]) if len(workloads) > 1 else ()
    sizes = " / ".join(f"N={workload.config.num_subkeys}²" for workload in ends)
    measured = ratio(*(samples[workload.name, name, part] for workload in ends)) if ends else None
    return Claim(f"{name}, {part}: {sizes}", measured, at_most=at_most)


def workload_table(
    workload: Workload, samples: Samples, rows: Mapping[str, str], columns: Mapping[str, tuple[str, float]]
) -> Table:
    """What one workload gave: contestants with their titles, and parts with theirs and the factor to its unit."""

    first, cells = next(iter(columns)), []
    for name, text in rows.items():
        mine = ((summarize(samples[workload.name, name, part]), factor) for part, (_, factor) in columns.items())
        parts = (spread(summary, "{:.1f}", factor) for summary, factor in mine)
        cells.append((text, str(len(samples[workload.name, name, first])), *parts))
    title = f"{workload.name}: {workload}, value table {workload.table_bytes >> 20} MiB"
    return Table(title, ("", "rounds", *(text for text, _ in columns.values())), cells)
