"""Tables of what was measured, in Markdown."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from examples.language_model import results
from examples.language_model.results import Run

ROSE = 0.2  # share of first digits right above which needles are being found
NOTHING = "-"


def report(folder: Path) -> str:
    """The tables of a folder of results; parts that nothing was measured for are left out.

    Raises:
        FileNotFoundError: the folder holds no results.
        ValueError: a file is damaged, or does not belong with the others; names it.
    """
    runs = results.load(folder)
    asked = [r for r in runs if r.memory and r.experiment.training.facts]
    parts = [
        *(_needle(run, unseen=False) for run in asked),
        _controls(runs),
        *(_needle(run, unseen=True) for run in asked),
        _bits(runs),
        _compared(runs, "at equal steps", results.equal_steps),
        _compared(runs, "at equal time", results.equal_time),
        _training(runs),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def size(count: int) -> str:
    """4096 as 4K."""
    return f"{count // 1024}K" if count and count % 1024 == 0 else str(count)


def _table(title: str, note: str, head: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """With a heading and a line on what the cells are; columns after the first ``texts`` stand to the right."""
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {title}\n\n{note}\n\n{text}" if rows else ""


def _found(row: dict[str, Any] | None) -> str:
    """The cell of an answer."""
    if row is None:
        return NOTHING
    low, high = (100 * x for x in row["exact_interval"])
    return f"{100 * row['exact']:.1f}% ({low:.1f} to {high:.1f}), {100 * row['digits']:.1f}%"


CELLS = "Needles answered exactly, with the 95% interval, and digits right, of {} needles each."


def _samples(rows: Iterable[dict[str, Any]]) -> str:
    """How many needles the cells are of."""
    counts = sorted({len(row["right"]) for row in rows})
    return " to ".join(str(c) for c in dict.fromkeys([counts[0], counts[-1]])) if counts else "no"


def _needle(run: Run, *, unseen: bool) -> str:
    """Lengths by readings."""
    rows = run.answers(unseen=unseen)
    cells = {(r["phrasing"], r["length"], r["readings"]): r for r in rows}
    readings = sorted({r["readings"] for r in rows})
    names = sorted({r["phrasing"] for r in rows})
    kind = "never seen in training" if unseen else "seen in training"
    return _table(
        f"Needles, {kind} ({', '.join(names)}): {run.label}",
        CELLS.format(_samples(rows)),
        ["context (bytes)", *(f"{n} reading{'s'[: n > 1]}" for n in readings)],
        [
            [size(length) + f", {name}" * (len(names) > 1), *(_found(cells.get((name, length, n))) for n in readings)]
            for name, length in sorted({(r["phrasing"], r["length"]) for r in rows})
        ],
    )


def _controls(runs: list[Run]) -> str:
    """Each control by length, at whichever number of readings finds most."""
    asked = [(r, c, r.answers(c)) for r in runs if r.headline for c in ("learning rate 0", "another document's memory")]
    asked += [(r, "no memory", r.answers("no memory")) for r in runs if not r.memory]
    asked += [(r, "trained without facts", r.answers()) for r in runs if r.memory and not r.experiment.training.facts]
    asked = [(run, control, rows) for run, control, rows in asked if rows]
    lengths = sorted({r["length"] for _, _, rows in asked for r in rows})

    def most(rows: list[dict[str, Any]], length: int) -> dict[str, Any] | None:
        return max((r for r in rows if r["length"] == length), key=lambda r: (r["exact"], r["digits"]), default=None)

    return _table(
        "Controls, phrasings seen in training",
        CELLS.format(_samples(r for _, _, rows in asked for r in rows))
        + " Of several phrasings and numbers of readings, those that found most.",
        ["control", "model", *map(size, lengths)],
        [[control, run.label, *(_found(most(rows, length)) for length in lengths)] for run, control, rows in asked],
        texts=2,
    )


def _bands(run: Run) -> dict[str, slice]:
    """The bins of whole documents and of bands of positions, each reaching four times as far as the one before."""
    bins = next(iter(run.bits.values())).shape[1]
    edges = [0, *(4**i for i in range(bins) if 4**i < bins), bins]
    parts = {f"{size(a * run.bin)} to {size(b * run.bin)}": slice(a, b) for a, b in itertools.pairwise(edges)}
    return {"whole": slice(0, bins), **parts}


def _bits(runs: list[Run]) -> str:
    """Means over documents, by what the memory does and by bands."""
    measured = [r for r in runs if r.bits]
    bands = _bands(measured[0]) if measured else {}
    counts = sorted({len(r.documents) for r in measured})
    return _table(
        "Bits per byte by position",
        f"Means of {' or '.join(map(str, counts))} held-out documents. Reset: each begins with the initial memory. "
        "Carried: with what another held-out document left. Frozen: the initial memory is read and never written.",
        ["model", "memory", *bands],
        [
            [run.label, mode if run.memory else NOTHING, *(f"{bits[:, band].mean():.4f}" for band in bands.values())]
            for run in measured
            for mode, bits in run.bits.items()
        ],
        texts=2,
    )


def _compared(runs: list[Run], how: str, choose: Callable[[Run, list[Run]], Run | None]) -> str:
    """Of every model with memories, against one without."""
    measured = [r for r in runs if r.bits]
    rows = []
    for run in measured:
        if not run.memory or (base := choose(run, measured)) is None:
            continue
        time = f" ({base.seconds / run.seconds:.2f} of the time)" if base.record and run.record else ""
        for mode in run.bits:
            own, other = results.paired(run, mode, base)
            parts = (results.relative(own[:, b].mean(1), other[:, b].mean(1)) for b in _bands(run).values())
            cells = (f"{100 * mean:+.1f}% ({100 * low:+.1f} to {100 * high:+.1f})" for mean, low, high in parts)
            rows.append([run.label, mode, base.label + time, *cells])
    return _table(
        f"Bits per byte against no memory, {how}",
        "Relative difference of the means, with the bootstrap 95% interval over documents; below 0 is better.",
        ["model", "memory", "against", *(_bands(measured[0]) if measured else {})],
        rows,
        texts=3,
    )


def _training(runs: list[Run]) -> str:
    """Steps, speeds and what was learned."""
    trained = [r for r in runs if r.record]
    first = next((r for r in trained if r.headline), None)
    plain = results.equal_steps(first, trained) if first else None
    rows = []
    for run in trained:
        settings, last = run.experiment.training, run.record[-1]
        rose = next((line["step"] for line in run.record if line["first_right"] > ROSE), None)
        tokens = run.speed * settings.batch * settings.length
        done = f"{last['step']:,}" + f" of {settings.steps:,}" * (last["step"] < settings.steps)
        rows.append([
            run.label, done, f"{run.speed:.1f}", f"{float(f'{tokens:.3g}'):,.0f}",
            f"{run.seconds:.0f}", f"{run.speed / plain.speed:.2f}" if plain else NOTHING,
            f"{rose:,}" if rose else NOTHING, f"{last['digits_right']:.1%}" if settings.facts else NOTHING, run.device,
        ])  # fmt: skip
    head = [
        "model", "steps", "steps/s (median)", "tokens/s", "seconds (steps / median)", "speed to no memory",
        f"first digits above {ROSE:.0%} at step", "digits right in the end", "device",
    ]  # fmt: skip
    against = f" Speeds are relative to: {plain.label}." if plain else ""
    return _table("Training", f"Asked digits of the training data, stated again there.{against}", head, rows)
