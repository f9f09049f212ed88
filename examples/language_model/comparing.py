"""Which runs are compared with which, and how sure a difference is."""

import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from examples.language_model import intervals
from examples.language_model.intervals import Interval, Measured
from examples.language_model.needle import wilson
from examples.language_model.results import MEMORY, NO_MEMORY, Run, alike

EQUAL_TIME = 1.25  # trainings whose times differ by no more than this factor are compared
WHOLE = slice(None)


# Which


def memories(runs: Iterable[Run]) -> list[Run]:
    """All seeds of the model with a memory."""
    return [r for r in runs if r.kind == MEMORY]


def _peers(runs: Sequence[Run]) -> list[Run]:
    """The other models that were trained as those with a memory are, but for steps and seed, on as large windows."""

    def trained(r: Run) -> tuple[object, ...]:
        model = r.experiment.model
        return model.width, model.layers, model.heads, model.window, alike(r.experiment, seed=0, steps=1).training

    own = [trained(r) for r in memories(runs)]
    return [r for r in runs if r.kind != MEMORY and trained(r) in own]


def equal_steps(runs: Sequence[Run]) -> list[Run]:
    """The other models that took as many steps as those with a memory."""
    steps = {r.steps for r in memories(runs)}
    return [r for r in _peers(runs) if r.steps in steps]


def equal_time(runs: Sequence[Run]) -> list[Run]:
    """Of each other kind, the runs of the number of steps whose time is nearest to that of a memory's training."""
    if (own := time(memories(runs))) is None:
        return []
    lots: dict[str, dict[int, list[Run]]] = {}
    for run in _peers(runs):
        if run.timed:
            lots.setdefault(run.kind, {}).setdefault(run.steps, []).append(run)
    found = []
    for lot in lots.values():
        apart = {steps: max(t / own, own / t) for steps, same in lot.items() if (t := time(same))}
        nearest = min(apart, key=apart.__getitem__)
        found += lot[nearest] if apart[nearest] <= EQUAL_TIME else []
    return found


def time(runs: Iterable[Run]) -> float | None:
    """The median seconds of trainings that shared no device; None where none is known."""
    return statistics.median(known) if (known := [r.seconds for r in runs if r.timed]) else None


def best(runs: Iterable[Run]) -> Run | None:
    """Of the models without memory, the one of the fewest bits per byte."""
    known = [r for r in runs if r.kind == NO_MEMORY and r.bits]
    return min(known, key=lambda r: mean_bits(r, r.alone), default=None)


# How sure


def share(exact: np.ndarray) -> Interval:
    """Of ``[contexts, facts]`` bool, with Wilson's interval of as many independent answers as these are worth.

    The facts of a context share their sentence, so they may be right or wrong together; then they are worth fewer
    answers, by the design effect (Kish, 1965): the variance over contexts by that of independent answers.
    """
    contexts, facts = exact.shape
    found = float(exact.mean())
    alone = found * (1 - found) / facts
    effect = max(1.0, float(exact.mean(1).var(ddof=1)) / alone) if contexts > 1 and alone else 1.0
    worth = exact.size / effect
    return Interval(found, *wilson(found * worth, worth), contexts)


def change(later: np.ndarray, first: np.ndarray) -> Interval:
    """How much more of ``[contexts, facts]`` bool is right later, with the paired interval over contexts."""
    return intervals.interval(later.mean(1) - first.mean(1))


def mean_bits(run: Run, mode: str, band: slice = WHOLE) -> float:
    """The mean over writers of a band of positions."""
    return intervals.over_writers(_measured(run, mode, band, run.documents)).mean


def relative(run: Run, mode: str, base: Run, band: slice = WHOLE) -> Interval:
    """How many bits more than ``base`` a run takes, as a share of them, with the paired interval over writers.

    Raises:
        ValueError: no document was measured with both.
    """
    shared = sorted(set(run.documents) & set(base.documents))
    if not shared:
        raise ValueError(f"no document was measured with both {run.label} and {base.label}")
    return intervals.relative(_measured(run, mode, band, shared), _measured(base, base.alone, band, shared))


def _measured(run: Run, mode: str, band: slice, documents: Sequence[str]) -> Measured:
    means = dict(zip(run.documents, run.bits[mode][:, band].mean(1).tolist()))
    return Measured({name: means[name] for name in documents}, dict(zip(run.documents, run.writers)))
