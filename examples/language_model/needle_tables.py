"""What was answered, in tables: needles near, in other sentences, controls, capacity, and books' own names."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from examples.language_model import comparing, intervals, names
from examples.language_model.intervals import Interval
from examples.language_model.results import MEMORY, Run
from examples.language_model.tables import (
    NOTHING,
    Look,
    amount,
    cell,
    difference,
    of_seeds,
    several,
    share,
    size,
    table,
)

HELD_OUT = "held out: "
LESS = -0.03  # a change by reading on, wholly below which is counted
INTERVALS = "95% intervals (Wilson's, for as many independent answers as the contexts are worth)"


def near(runs: Sequence[Run]) -> list[str]:
    """Sentences of training, key and value near each other, asked word for word, after every reading."""
    runs, lengths, counts = _asked(runs, ["near"])
    later = [n for n in counts if n > 1]
    changes = [x for r in runs for length in lengths for n in later if (x := _change(r, length, n))]
    fewer = sum(x.high < LESS for x in changes)
    over = "context (bytes)", [(size(length), length) for length in lengths]
    return [
        of_seeds(
            "Needles near", f"Answered exactly, of {_samples(runs, ['near'])}, with {INTERVALS}.", runs, over,
            {_readings(n): functools.partial(_found, ["near"], readings=n) for n in counts},
        ),
        of_seeds(
            "Needles near: what reading on changes",
            "Points more than after the first reading, with the paired 95% interval over contexts. Wholly below "
            f"{100 * LESS:+.0f} points: {fewer} of {len(changes)}.",
            runs, over, {f"{_readings(n)} less the first": functools.partial(_change, readings=n) for n in later},
            write=difference,
        ),
    ]  # fmt: skip


def other_sentences(runs: Sequence[Run]) -> list[str]:
    """Sentences with key and value apart, the value first, rephrased questions, and words that training never shows."""
    every = list(dict.fromkeys(x.kind for r in runs for x in r.answers()))
    held = [kind for kind in every if kind.startswith(HELD_OUT)]
    others = [kind for kind in every if kind not in held and kind != "near"]
    tables = []
    for title, kinds in (("Needles in other sentences", others), ("Needles in held-out words", held)):
        own, lengths, _ = _asked(runs, kinds)
        columns: dict[str, Look] = {"all together": functools.partial(_found, kinds)} if kinds == held else {}
        columns |= {kind.removeprefix(HELD_OUT): functools.partial(_found, [kind]) for kind in kinds}
        note = f"Answered exactly after one reading, of {_samples(own, kinds)} a kind, with {INTERVALS}."
        tables.append(of_seeds(title, note, own, ("context (bytes)", [(size(n), n) for n in lengths]), columns))
    return tables


def controls(runs: Sequence[Run]) -> str:
    """Whatever must not answer, each by length at the seed, kind and number of readings that find most."""
    asked = list(dict.fromkeys((r.kind, x.control) for r in runs for x in r.needles if x.control != MEMORY))
    own = [[r for r in runs if r.kind == kind and r.answers(control=control)] for kind, control in asked]
    lengths = sorted({x.length for r in runs for x in r.needles if x.control != MEMORY})
    rows = [
        [control, kind, several(found), *(_most(found, control, length) for length in lengths)]
        for (kind, control), found in zip(asked, own)
    ]
    note = f"Answered exactly, at the seed, the kind and the number of readings that find most, with {INTERVALS}."
    return table("Controls", note, ["control", "model", "seeds", *map(size, lengths)], rows, texts=3)


def _most(runs: Sequence[Run], control: str, length: int) -> str:
    """The cell of a control at the seed that finds most."""
    cells = [(comparing.share(x.exact), r) for r in runs for x in r.answers(control=control) if x.length == length]
    if not cells:
        return NOTHING
    highest, run = max(cells, key=lambda x: x[0].mean)
    return f"{share(highest)}, seed {run.seed}"


def capacity(runs: Sequence[Run]) -> list[str]:
    """Of ever more facts in one context, those found after one reading: by the memory's seeds, and by other models."""
    measured = [r for r in runs if r.capacity]
    own, others = comparing.memories(measured), [r for r in measured if r.kind != MEMORY]
    lengths = sorted({x.length for r in measured for x in r.capacity})
    numbers = sorted({x.exact.shape[1] for r in measured for x in r.capacity})
    over = "context (bytes)", [(size(length), length) for length in lengths]
    columns: dict[str, Look] = {f"{facts:,} facts": functools.partial(_held, facts=facts) for facts in numbers}
    states = sorted({r.state_bytes for r in own})
    note = f"Facts answered exactly after one reading, with {INTERVALS}."
    tables = [
        of_seeds("Capacity", f"{note} State of one sequence: {' or '.join(map(amount, states))}.", own, over, columns)
    ]
    rows = [
        [run.label, amount(run.state_bytes), name, *(cell(look(run, length)) for look in columns.values())]
        for run in others
        for name, length in over[1]
    ]
    return [*tables, table("Capacity of other models", note, ["model", "state", over[0], *columns], rows, texts=3)]


def own_names(runs: Sequence[Run]) -> list[str]:
    """Names that books hold and training does not, asked far from where they stood before."""
    measured = [r for r in runs if r.names]
    own, others = comparing.memories(measured), [r for r in measured if r.kind != MEMORY]
    modes = list(dict.fromkeys(mode for r in own for mode in r.names["right"]))
    over = "given", [(f"{given} bytes" if given else "the left context", given) for given in names.GIVEN]
    columns: dict[str, Look] = {mode: functools.partial(_named, mode=mode) for mode in modes}
    more: dict[str, Look] = {
        f"{modes[0]} less {mode}": functools.partial(_named, mode=modes[0], less=mode) for mode in modes[1:]
    }
    counts = sorted({len(r.names["questions"]) for r in measured})
    note = (
        f"Of {' or '.join(f'{n:,}' for n in counts)} questions, those answered exactly: means over writers, with the "
        "95% interval over them. Carried: the book was read from its beginning. Reset: the memory began 4,096 bytes "
        "before, so it never read the name. Frozen: it was never written."
    )
    rows = [
        [run.label, mode, *(cell(_named(run, given, mode)) for given in names.GIVEN)]
        for run in others
        for mode in run.names["right"]
    ]
    return [
        of_seeds("Names of books", note, own, over, columns),
        of_seeds("Names of books: what reading adds", "Points more, in pairs.", own, over, more, write=difference),
        table("Names of books, other models", note, ["model", "memory", *(x for x, _ in over[1])], rows, texts=2),
    ]


def _named(run: Run, given: int, mode: str, less: str | None = None) -> Interval | None:
    """The mean over writers of the share of names that is found in a mode; ``less``: how much more than in another."""
    if not {mode, less} - {None} <= set(run.names["right"]):
        return None
    found = names.shares(run.names, mode, given)
    if less is None:
        return intervals.over_writers(found)
    return intervals.difference(found, names.shares(run.names, less, given))


def _held(run: Run, length: int, facts: int) -> Interval | None:
    """The share of so many facts that is found."""
    found = [x for x in run.capacity if (x.exact.shape[1], x.length) == (facts, length)]
    return comparing.share(found[0].exact) if found else None


def _asked(runs: Iterable[Run], kinds: Sequence[str]) -> tuple[list[Run], list[int], list[int]]:
    """The runs that were asked any of the kinds, with which lengths, and how many readings."""
    asked = [(r, x) for r in runs for x in r.answers() if x.kind in kinds]
    return (
        list({r.name: r for r, _ in asked}.values()),
        sorted({x.length for _, x in asked}),
        sorted({x.readings for _, x in asked}),
    )


def _samples(runs: Iterable[Run], kinds: Sequence[str]) -> str:
    """How many answers the cells of some kinds are of."""
    shapes = sorted({x.exact.shape for r in runs for x in r.answers() if x.kind in kinds})
    return " or ".join(f"{contexts * facts:,} ({contexts} contexts of {facts} facts)" for contexts, facts in shapes)


def _found(kinds: Sequence[str], run: Run, length: int, readings: int = 1) -> Interval | None:
    """The share of some kinds together."""
    cells = [cell.exact for kind in kinds if (cell := run.cell(kind, length, readings))]
    return comparing.share(np.concatenate(cells)) if cells else None


def _change(run: Run, length: int, readings: int) -> Interval | None:
    """How much more is found near than after the first reading."""
    later, first = run.cell("near", length, readings), run.cell("near", length)
    return comparing.change(later.exact, first.exact) if later and first else None


def _readings(number: int) -> str:
    return f"{number} reading{'s'[: number > 1]}"
