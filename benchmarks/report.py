"""From samples to tables, and the judgement of the stated bounds."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks import measure
from benchmarks.contestants import CONTESTANTS
from benchmarks.measure import Summary, summarize
from benchmarks.workloads import Workload


class Sample(NamedTuple):
    """One timed step, in seconds."""

    total: float
    scoring: float

    @property
    def rest(self) -> float:
        """Everything but scoring."""
        return self.total - self.scoring


@dataclasses.dataclass(frozen=True)
class Results:
    """What one run measured. Sample i of every list belongs to round i, so samples can be compared in pairs."""

    workloads: list[Workload]
    """From the smallest table to the largest."""
    samples: dict[tuple[str, str], list[Sample]]
    """By workload and contestant."""
    memory: dict[tuple[str, str], int | None]
    """Extra bytes, likewise."""

    @property
    def focus(self) -> Workload:
        """The workload that the bounds on ratios are stated for: step-512, or the last where it was not run."""
        return next((workload for workload in self.workloads if workload.name == "step-512"), self.workloads[-1])

    def time_ratio(self, contestant: str, other: str) -> Summary | None:
        """Time of a step over time of another's, round by round."""
        pairs = zip(self.samples[self.focus.name, contestant], self.samples[self.focus.name, other])
        return summarize(a.total / b.total for a, b in pairs)

    def memory_ratio(self, contestant: str, other: str) -> Summary | None:
        """Extra memory over another's."""
        size, reference = (self.memory.get((self.focus.name, name)) for name in (contestant, other))
        return summarize([size / reference] if size is not None and reference else [])

    def growth(self, contestant: str) -> Summary | None:
        """Everything but scoring at the largest N over the same at the smallest, round by round."""
        if len(self.workloads) == 1:
            return None
        pairs = zip(*(self.samples[workload.name, contestant] for workload in (self.workloads[-1], self.workloads[0])))
        return summarize(a.rest / b.rest for a, b in pairs)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A measured ratio and, if one is stated, its bound."""

    text: str
    measured: Summary | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """ "holds", "FAILS", "not measured", or "" without a bound."""
        if self.at_least is None and self.at_most is None:
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

    def __str__(self) -> str:
        """One line, for the terminal."""
        return f"{self.verdict}: {self.text}: {ratio_text(self.measured)}, bound: {self.bound}"


class Table(NamedTuple):
    """Rows of text under a title."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """The table in Markdown, the first column aligned left and the others right."""
        lines = (self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows)
        return "\n".join((f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)))


def steps_table(results: Results, workload: Workload) -> Table:
    """Time and memory of each contestant at one workload."""
    columns = ("one training step", "steps", "time, ms", "scoring, ms", "the rest, ms", "extra memory, MiB")
    rows = []
    for name, contestant in CONTESTANTS.items():
        samples = results.samples[workload.name, name]
        times = (summarize(getattr(sample, part) for sample in samples) for part in ("total", "scoring", "rest"))
        memory = _mebibytes(results.memory.get((workload.name, name)))
        rows.append((contestant.what, str(len(samples)), *map(milliseconds, times), memory))
    return Table(f"{workload.name}: {workload}, value table {_mebibytes(workload.table_bytes)} MiB", columns, rows)


def growth_tables(results: Results) -> list[Table]:
    """Everything but scoring, scoring, and extra memory, each against N."""
    columns = ("against N", *(f"{workload.config.num_subkeys}²" for workload in results.workloads))

    def row(name: str, part: str) -> tuple[str, ...]:
        if part == "memory":
            return tuple(_mebibytes(results.memory.get((workload.name, name))) for workload in results.workloads)
        every = (results.samples[workload.name, name] for workload in results.workloads)
        return tuple(milliseconds(summarize(getattr(sample, part) for sample in samples)) for samples in every)

    parts = {"rest": "everything but scoring, ms", "scoring": "scoring, ms", "memory": "extra memory, MiB"}
    return [
        Table(title, columns, [(contestant.what, *row(name, part)) for name, contestant in CONTESTANTS.items()])
        for part, title in parts.items()
    ]


def claims_table(title: str, claims: list[Claim], what: str = "ratio") -> Table:
    """The ratios, or what else was measured, their bounds and whether they hold."""
    rows = [(claim.text, ratio_text(claim.measured), claim.bound, claim.verdict) for claim in claims]
    return Table(title, (what, "measured", "bound", "verdict"), rows)


def show(legend: Sequence[str], tables: Sequence[Table], *, markdown: bool) -> None:
    """Print device, versions, the legend and the tables."""
    lines = [*(f"{key}: {text}" for key, text in measure.environment().items()), *legend]
    if markdown:
        print("\n".join(f"- {line}" for line in lines), *(table.markdown() for table in tables), sep="\n\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print("\n".join(lines), markup=False)
    for table in tables:
        console.print(_rich(table))


def verdict(claims: Sequence[Claim]) -> int:
    """1 where a bound does not hold or was not measured, each named on stderr, else 0."""
    broken = [claim for claim in claims if claim.broken]
    for claim in broken:
        print(claim, file=sys.stderr)
    return int(bool(broken))


def _rich(table: Table) -> RichTable:
    grid = RichTable(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        grid.add_column(column, justify="right" if number else "left")
    for row in table.rows:
        grid.add_row(*row)
    return grid


def ratio_text(ratio: Summary | None) -> str:
    """A ratio with its quartiles."""
    return _spread(ratio, "{:.3g}")


def milliseconds(seconds: Summary | None, form: str = "{:.1f}") -> str:
    """A time with its quartiles."""
    return _spread(seconds, form, scale=1e3)


def _spread(summary: Summary | None, form: str, scale: float = 1.0) -> str:
    if summary is None:
        return "-"
    median, low, high = (form.format(scale * number) for number in summary[:3])
    return f"{median} ({low} to {high})" if summary.size > 1 else median


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.1f}"
