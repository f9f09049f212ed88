"""Tables in Markdown, and how their cells are written; a table of seeds begins with the worst."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from examples.language_model.intervals import Interval
from examples.language_model.results import Run

NOTHING = "-"
Look = Callable[[Run, Any], Interval | None]
"""What a cell says of a run, and a length or whatever the rows are of; None where it was not measured."""


def table(title: str, note: str, head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """With a heading and a line on what the cells are; nothing without rows.

    Columns after the first ``texts`` stand to the right, and those of no entry are left out.
    """
    if not rows:
        return ""
    kept = [i for i in range(len(head)) if i < texts or any(row[i] != NOTHING for row in rows)]
    lines = [[*head], ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    text = "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in lines)
    return f"### {title}\n\n{note}\n\n{text}"


def of_seeds(
    title: str, note: str, runs: Sequence[Run], over: tuple[str, Sequence[tuple[str, Any]]], columns: dict[str, Look],
    *, write: Callable[[Interval], str] | None = None, high: bool = False, means: Sequence[Sequence[str]] = (),
) -> str:  # fmt: skip
    """A row for each seed and each of ``over``, below rows of the worst of several seeds, cell by cell.

    Args:
        title: of the table.
        note: what the cells are.
        runs: one for each seed.
        over: what the rows of a seed are told apart by, and the names and values of that.
        columns: what the cells say.
        write: a cell; by default as a share of 1.
        high: whether high numbers are bad.
        means: rows of all seeds together.
    """
    write = write or share
    what, values = over
    worst, rows = [], []
    for name, value in values:
        found = [[look(run, value) for look in columns.values()] for run in runs]
        worst.append([f"**worst of {len(runs)}**", name, *(_worst(runs, cells, write, high) for cells in zip(*found))])
    for run in runs:
        for name, value in values:
            cells = [cell(look(run, value), write) for look in columns.values()]
            if set(cells) - {NOTHING}:
                rows.append([run.seed, name, *cells])
    above = [*worst, *means] if len(runs) > 1 else []
    return table(title, note, ["seed", what, *columns], [*above, *rows] if rows else [], texts=2)


def _worst(runs: Sequence[Run], cells: Sequence[Interval | None], write: Callable[[Interval], str], high: bool) -> str:
    known = [(x, run) for x, run in zip(cells, runs) if x]
    if not known:
        return NOTHING
    worst, run = (max if high else min)(known, key=lambda x: x[0].mean)
    return f"{write(worst)}, seed {run.seed}"


def size(count: int) -> str:
    """4096 as 4K."""
    return f"{count // 1024}K" if count and count % 1024 == 0 else str(count)


def amount(count: int) -> str:
    """Bytes, as 537 MB."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count} B"


def cell(x: Interval | None, write: Callable[[Interval], str] | None = None) -> str:
    """Of a number that may not have been measured; by default a share of 1."""
    return NOTHING if x is None else (write or share)(x)


def share(x: Interval) -> str:
    """In per cent; one unit alone has no interval."""
    return f"{100 * x.mean:.1f}%" + f" ({100 * x.low:.1f} to {100 * x.high:.1f})" * math.isfinite(x.low)


def difference(x: Interval) -> str:
    """In points or per cent, with signs; one unit alone has no interval."""
    return f"{100 * x.mean:+.1f}" + f" ({100 * x.low:+.1f} to {100 * x.high:+.1f})" * math.isfinite(x.low)


def several(runs: Sequence[Run]) -> str:
    """The seeds of runs."""
    return ", ".join(dict.fromkeys(run.seed for run in runs))
