"""Everything that was measured, in Markdown: answers, bits per byte, baselines, training."""

import functools
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from examples.language_model import comparing, intervals, needle_tables, results
from examples.language_model.intervals import Interval
from examples.language_model.results import NO_MEMORY, Run
from examples.language_model.tables import NOTHING, amount, difference, of_seeds, several, share, size, table

ROSE = 0.2  # share of first digits right above which needles are being found


def report(folder: Path) -> str:
    """The tables of a folder of results; parts that nothing was measured for are left out.

    Raises:
        FileNotFoundError: the folder holds no results.
        ValueError: a file is damaged, or does not belong with the others; names it.
    """
    runs = results.load(folder)
    own = comparing.memories(runs)
    pairs = [("equal steps", comparing.equal_steps(runs)), ("equal time", comparing.equal_time(runs))]
    parts = [
        _in_short(own, pairs),
        *needle_tables.near(own),
        *needle_tables.other_sentences(own),
        needle_tables.controls(runs),
        *needle_tables.capacity(runs),
        *needle_tables.own_names(runs),
        *(_baselines(own, others, how) for how, others in pairs),
        *(_compared(own, others, how) for how, others in pairs),
        _bits(runs),
        _training(runs),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _in_short(own: Sequence[Run], pairs: Sequence[tuple[str, Sequence[Run]]]) -> str:
    """The worst seed's answers and bits, in a line each."""
    lines = []
    if cells := [(comparing.share(x.exact), x, r) for r in own for x in r.answers() if x.kind == "near"]:
        fewest, x, run = min(cells, key=lambda found: found[0].mean)
        lines.append(
            f"- Needles near: every seed ({several(own)}), at every length, after every reading answers at least "
            f"{share(fewest)} exactly; the fewest seed {run.seed} in {size(x.length)} after reading {x.readings}."
        )
    for how, others in pairs:
        base, measured = comparing.best(others), [r for r in own if r.bits]
        if base is not None and measured:
            worst, run = _worst(measured, base)
            sign, word = (-1, "fewer") if worst.mean < 0 else (1, "more")
            low, high = sorted((sign * worst.low, sign * worst.high))
            worst_of = f"of seeds {several(measured)} the worst, {run.seed}," if measured[1:] else f"seed {run.seed}"
            lines.append(
                f"- At {how}: {share(Interval(sign * worst.mean, low, high, worst.units))} {word} bits per byte with "
                f"the memory than without; {worst_of} against {base.label}."
            )
    return "\n".join(["### In short", "", *lines]) if lines else ""


# Other models


def _baselines(own: Sequence[Run], others: Sequence[Run], how: str) -> str:
    """The other models beside the memory's: time, answers, bits."""
    own_time, measured = comparing.time(own), [r for r in own if r.bits]
    lengths = sorted({x.length for r in [*own, *others] for x in r.answers() if x.kind == "near"})

    def row(run: Run) -> list[str]:
        taken = f"{run.seconds / own_time:.2f}" if run.timed and own_time else NOTHING
        speed = f"{run.speed:.1f}" if run.timed else NOTHING
        near = [share(comparing.share(x.exact)) if (x := run.cell("near", n)) else NOTHING for n in lengths]
        facts = max(((x.exact.mean() * x.exact.shape[1], x.exact.shape[1]) for x in run.capacity), default=None)
        most = f"{facts[0]:,.0f} of {facts[1]:,}" if facts else NOTHING
        state = amount(run.state_bytes) if run.capacity else NOTHING
        bits = f"{comparing.mean_bits(run, run.alone):.4f}" if run.bits else NOTHING
        against = NOTHING
        if run.bits and measured and run not in own:
            worst, seed = _worst(measured, run)
            against = f"{difference(worst)}, seed {seed.seed}"
        return [f"{run.kind}, {run.steps:,} steps", run.seed, taken, speed, *near, most, state, bits, against]

    head = ["model", "seed", "time", "steps/s", *(f"near, {size(n)}" for n in lengths)]
    return table(
        f"Other models, {how}",
        "Time: of training, as a share of the memory's. Near: answered exactly after one reading. Facts: found in one "
        "context, in the mean, of the number of which most are found. Last, how many per cent more or less bits per "
        "byte the memory's worst seed takes than this model, with the 95% interval over writers; below 0 the memory "
        "is better.",
        [*head, "facts", "state", "bits per byte", "memory against it"],
        [row(run) for run in [*own, *others]] if others else [],
        texts=2,
    )


def _worst(measured: Sequence[Run], base: Run) -> tuple[Interval, Run]:
    """How many bits more or less the worst seed of the memory takes, each document by itself."""
    return max(((comparing.relative(r, r.alone, base), r) for r in measured), key=lambda x: x[0].mean)


# Bits per byte


def _bands(run: Run) -> dict[str, slice]:
    """The bins of whole documents and of bands of positions, each reaching four times as far as the one before."""
    bins = next(iter(run.bits.values())).shape[1]
    edges = [0, *(4**i for i in range(bins) if 4**i < bins), bins]
    parts = {f"{size(a * run.bin)} to {size(b * run.bin)}": slice(a, b) for a, b in itertools.pairwise(edges)}
    return {"whole": slice(0, bins), **parts}


MODES = (
    "Reset: each document begins with the initial memory. Carried: with what another held-out document left. Frozen: "
    "the initial memory is read and never written."
)


def _bits(runs: Sequence[Run]) -> str:
    """Means over documents, by what the memory does and by bands."""
    measured = [r for r in runs if r.bits]
    bands = _bands(measured[0]) if measured else {}
    counts = sorted({(len(r.documents), len(set(r.writers))) for r in measured})
    samples = " or ".join(f"{writers} writers of {documents} held-out documents" for documents, writers in counts)
    return table(
        "Bits per byte by position",
        f"Means of {samples}. {MODES}",
        ["model", "memory", *bands],
        [
            [
                run.label,
                NOTHING if mode == NO_MEMORY else mode,
                *(f"{comparing.mean_bits(run, mode, band):.4f}" for band in bands.values()),
            ]
            for run in measured
            for mode in run.bits
        ],
        texts=2,
    )


def _compared(own: Sequence[Run], others: Sequence[Run], how: str) -> str:
    """The memory's seeds against the best model without memory."""
    measured, base = [r for r in own if r.bits], comparing.best(others)
    if not measured or base is None:
        return ""
    modes, bands = list(dict.fromkeys(mode for r in measured for mode in r.bits)), _bands(base)

    def look(run: Run, mode: str, *, band: slice) -> Interval | None:
        return comparing.relative(run, mode, base, band) if mode in run.bits else None

    means = []
    for mode in modes:
        found = [[x for r in measured if (x := look(r, mode, band=band))] for band in bands.values()]
        if len(found[0]) > 1:
            means.append([f"mean of {len(found[0])}", mode, *(difference(intervals.over_seeds(x)) for x in found)])
    own_time, base_time = comparing.time(own), comparing.time([base])
    time = f" Its training took {base_time / own_time:.2f} of the memory's time." if own_time and base_time else ""
    return of_seeds(
        f"Bits per byte against no memory, {how}",
        f"Per cent more or less than {base.label}, of those without memory the one of the fewest bits.{time} Means "
        f"over {len(set(base.writers))} writers of {len(base.documents)} documents (one of no known writer is its "
        "own), with the paired 95% interval over writers; of the mean of seeds, the one over seeds. Below 0 the memory "
        f"is better. {MODES}",
        measured, ("memory", [(mode, mode) for mode in modes]),
        {name: functools.partial(look, band=band) for name, band in bands.items()},
        write=difference, high=True, means=means,
    )  # fmt: skip


# Training


def _training(runs: Sequence[Run]) -> str:
    """Steps, speeds and what was learned."""
    plain = [r.speed for r in comparing.equal_steps(runs) if r.timed and r.kind == NO_MEMORY]
    rows = []
    for run in runs:
        if not run.record:
            continue
        settings, last = run.experiment.training, run.record[-1]
        rose = next((line["step"] for line in run.record if line["first_right"] > ROSE), None)
        tokens = run.speed * settings.batch * settings.length
        done = f"{last['step']:,}" + f" of {run.steps:,}" * (last["step"] < run.steps)
        beside = f"{run.speed / statistics.median(plain):.2f}" if plain and run.timed else NOTHING
        rows.append([
            run.kind, run.seed, done, f"{run.speed:.1f}", f"{float(f'{tokens:.3g}'):,.0f}", f"{run.seconds:.0f}",
            beside, f"{rose:,}" if rose else NOTHING,
            f"{last['digits_right']:.1%}" if settings.facts else NOTHING, run.device,
        ])  # fmt: skip
    head = [
        "model", "seed", "steps", "steps/s (median)", "tokens/s", "seconds (steps / median)", "speed to no memory",
        f"first digits above {ROSE:.0%} at step", "digits right in the end", "device",
    ]  # fmt: skip
    return table("Training", "Digits: of facts that the training data ask for.", head, rows, texts=2)
