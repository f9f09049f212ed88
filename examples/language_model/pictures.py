"""Pictures of what was measured: needles of every seed, capacity, bits by position, and the rise in training."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from examples.language_model import comparing, results
from examples.language_model.checkpoint import replace
from examples.language_model.results import MEMORY, NO_MEMORY, Run
from examples.language_model.tables import amount, size

DEPTHS = 5
FONTS: Any = {"font.size": 12, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.titlepad": 6}
# Colours of Okabe and Ito (2008), which those who see fewer tell apart; each kind has marks of its own beside them.
STYLES: dict[str, dict[str, Any]] = {
    MEMORY: {"color": "#0072b2", "linestyle": "-", "marker": "o"},
    "attention": {"color": "#009e73", "linestyle": "--", "marker": "s"},
    "Gated DeltaNet": {"color": "#cc79a7", "linestyle": "-.", "marker": "^"},
    "static memory": {"color": "#e69f00", "linestyle": (0, (4, 1, 1, 1, 1, 1)), "marker": "D"},
    NO_MEMORY: {"color": "#d55e00", "linestyle": ":", "marker": "v"},
}
LONGER = {"color": "#000000", "linestyle": (0, (1, 1)), "marker": ""}
FROZEN = {"color": "#56b4e9", "linestyle": "-.", "marker": ""}


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw needle.png, capacity.png, bits.png and training.png into ``out``, those that the folder has results for.

    Raises:
        FileNotFoundError: the folder holds no results.
        ValueError: a file is damaged, or does not belong with the others; names it.
    """
    runs = results.load(folder)
    out.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, Callable[[list[Run]], Figure | None]] = {
        "needle": needle, "capacity": capacity, "bits": bits, "training": training,
    }  # fmt: skip
    drawn = []
    with mpl.rc_context():
        mpl.rcdefaults()  # the user's own matplotlibrc was not made for these pictures
        mpl.rcParams.update(FONTS)
        for name, kind in kinds.items():
            if (figure := kind(runs)) is not None:
                path = out / f"{name}.png"
                replace(path, functools.partial(figure.savefig, format="png", dpi=140))
                drawn.append(path)
    return drawn


def _figure(height: float) -> Figure:
    """Nine inches wide, without a window and global state, whatever backend the user has set."""
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, axes: Sequence[Axes]) -> Figure:
    """Open axes with a light grid, and one legend below."""
    for a in axes:
        a.grid(axis="y", alpha=0.3)
        a.spines[["top", "right"]].set_visible(False)
    lines: dict[Any, Any] = {}
    for a in axes:
        lines |= {label: line for line, label in zip(*a.get_legend_handles_labels()) if label not in lines}
    # One entry for the lines of several seeds.
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


# Needles


def needle(runs: Sequence[Run]) -> Figure | None:
    """A small map for each seed and reading: what is answered near, by length and depth."""
    runs = [r for r in comparing.memories(runs) if any(x.kind == "near" for x in r.answers())]
    if not runs:
        return None
    asked = [x for r in runs for x in r.answers() if x.kind == "near"]
    lengths, readings = sorted({x.length for x in asked}), sorted({x.readings for x in asked})
    figure = _figure(0.9 + 1.45 * len(readings))
    panels = figure.subplots(len(readings), len(runs), squeeze=False, sharex=True, sharey=True)
    maps = {(i, j): _map(run, lengths, count) for i, count in enumerate(readings) for j, run in enumerate(runs)}
    least = min(float(np.nanmin(shares)) for shares in maps.values())
    for (i, j), shares in maps.items():
        axes = panels[i, j]
        image = axes.imshow(np.ma.masked_invalid(shares), cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
        for (y, x), found in np.ndenumerate(shares):
            if np.isfinite(found):
                shade = "white" if found > 0.55 else "black"
                axes.text(x, y, f"{100 * found:.0f}", ha="center", va="center", color=shade, size=9)
            if found == least:
                axes.add_patch(
                    Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="#d55e00", linewidth=2.5)
                )
        axes.tick_params(length=0, labelsize=9)
        axes.set_xticks(range(len(lengths)), list(map(size, lengths)))
        axes.set_yticks(np.arange(0, DEPTHS + 1, DEPTHS) - 0.5, ["begin", "end"])
        if i == 0:
            axes.set_title(f"seed {runs[j].seed}")
        if j == 0:
            axes.set_ylabel(f"{readings[i]} reading{'s'[: readings[i] > 1]}")
    figure.supxlabel("length of the context (bytes); from top to bottom, where in it the needle stands", size=11)
    bar = figure.colorbar(image, ax=panels, format=PercentFormatter(1), pad=0.01, aspect=40)
    bar.set_label(f"needles answered exactly; framed, the fewest: {100 * least:.0f}%", size=11)
    return figure


def _map(run: Run, lengths: Sequence[int], readings: int) -> np.ndarray:
    """Shares answered exactly ``[DEPTHS, lengths]``."""
    shares = np.full((DEPTHS, len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        if (cell := run.cell("near", length, readings)) is None:
            continue
        band = np.minimum((cell.depth * DEPTHS).astype(int), DEPTHS - 1)
        for i in set(band.flat):
            shares[i, column] = cell.exact[band == i].mean()
    return shares


# Capacity


def capacity(runs: Sequence[Run]) -> Figure | None:
    """Facts in a context against those found: as a share, and as a number against bytes of state."""
    runs = [r for r in [*comparing.memories(runs), *comparing.equal_steps(runs)] if r.capacity]
    if not runs:
        return None
    length = max(x.length for r in runs for x in r.capacity)
    figure = _figure(4.6)
    left, right = figure.subplots(1, 2)
    for run in runs:
        cells = sorted((x.exact.shape[1], float(x.exact.mean())) for x in run.capacity if x.length == length)
        if not cells:
            continue
        facts, found = np.array(cells).T
        style = STYLES[run.kind]
        label = f"{run.kind} ({amount(run.state_bytes)}), {_seeds(runs, run.kind)}"
        left.plot(facts, found, label=label, **style, **_thin(runs, run.kind), markersize=5)
        right.scatter(
            run.state_bytes, max(facts * found), color=style["color"], marker=style["marker"], s=48, alpha=0.8
        )
    ticks = sorted({x.exact.shape[1] for r in runs for x in r.capacity})
    left.set_xscale("log")
    left.xaxis.set_major_locator(FixedLocator(ticks))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.tick_params(axis="x", labelsize=10, rotation=35)
    left.set(xlabel=f"facts in {size(length)} bytes", ylim=(-0.02, 1.02), ylabel="found after one reading")
    left.yaxis.set_major_formatter(PercentFormatter(1))
    right.set_xscale("symlog", linthresh=1000, linscale=0.6)  # a model may have no state
    right.set_yscale("symlog", linthresh=1)  # a model may find none
    right.xaxis.set_major_locator(FixedLocator([0, *(10**i for i in range(3, 12))]))
    right.set_xlim(-500, 4 * max(1000, right.dataLim.x1))
    right.tick_params(axis="x", labelsize=10, rotation=35)
    right.set_ylim(-0.2, 2 * max(1, right.dataLim.y1))
    right.xaxis.set_major_formatter(FuncFormatter(lambda x, _: amount(round(x))))
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.set(xlabel="state of one sequence", ylabel="facts found in one context")
    for axis in (left.xaxis, right.xaxis):
        axis.set_minor_locator(NullLocator())
    return _finish(figure, [left, right])


def _seeds(runs: Iterable[Run], kind: str) -> str:
    number = sum(r.kind == kind for r in runs)
    return f"{number} seed{'s'[: number > 1]}"


def _thin(runs: Iterable[Run], kind: str) -> dict[str, Any]:
    """Lines of several seeds are thin, so that all show."""
    return {"linewidth": 1.3 if sum(r.kind == kind for r in runs) > 1 else 2.2, "alpha": 0.85}


# Bits


def bits(runs: Sequence[Run]) -> Figure | None:
    """Bits per byte by position, and how far every seed is from the best model without memory at equal steps."""
    measured = [r for r in runs if r.bits]
    as_many, as_long = comparing.equal_steps(measured), comparing.equal_time(measured)
    own, plain, longer = comparing.memories(measured), comparing.best(as_many), comparing.best(as_long)
    if not own or plain is None:
        return None
    seeds = _seeds(own, MEMORY)
    lines: list[tuple[str, list[Run], str, dict[str, Any]]] = [
        (f"memory, {seeds}", own, "reset", STYLES[MEMORY]),
        (f"memory, frozen, {seeds}", own, "frozen", FROZEN),
        (f"no memory, equal steps, best of {_seeds(as_many, NO_MEMORY)}", [plain], NO_MEMORY, STYLES[NO_MEMORY]),
        (
            f"no memory, equal time, best of {_seeds(as_long, NO_MEMORY)}",
            [longer] if longer and longer is not plain else [],
            NO_MEMORY,
            LONGER,
        ),
    ]
    figure = _figure(4.6)
    left, right = figure.subplots(1, 2)
    edges = _octaves(plain.bits[NO_MEMORY].shape[1])
    bands = [slice(a, b) for a, b in itertools.pairwise(edges)]
    middle = np.sqrt(np.maximum(edges[:-1], 0.25) * edges[1:]) * plain.bin
    for label, which, mode, style in lines:
        style = {**style, "marker": "", "linewidth": 2 if len(which) == 1 else 1.1}
        for run in (r for r in which if mode in r.bits):
            left.plot(middle, [comparing.mean_bits(run, mode, band) for band in bands], label=label, **style)
            found = [comparing.relative(run, mode, plain, band) for band in bands]
            mean, low, high, _ = 100 * np.array(found).T
            right.plot(middle, mean, **style)
            if run is not plain:
                right.fill_between(middle, low, high, color=style["color"], alpha=0.25 / len(which), linewidth=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="position in the document (bytes)", xlim=(0.85 * middle[0], edges[-1] * plain.bin))
        ticks = plain.bin * 4 ** np.arange(np.log2(edges[-1]) // 2 + 1)
        axes.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size(round(x))))
    left.set_ylabel("bits per byte")
    right.set_ylabel("difference to no memory, equal steps")
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+g}%" if y else "0%"))
    return _finish(figure, [left, right])


def _octaves(bins: int) -> np.ndarray:
    """Edges of groups of bins, two to an octave."""
    edges = np.unique(np.round(2 ** (np.arange(0, 2 * np.log2(bins) + 1) / 2)).astype(int))
    return np.unique([0, *edges[edges < bins], bins])


# Training


def training(runs: Sequence[Run]) -> Figure | None:
    """The shares of asked digits that come out in training, for every seed."""
    runs = [r for r in [*comparing.memories(runs), *comparing.equal_steps(runs)] if r.record]
    runs = [r for r in runs if r.experiment.training.facts]
    if not comparing.memories(runs):
        return None
    figure = _figure(4.4)
    panels = figure.subplots(1, 2)
    for axes, field, title in zip(panels, ("digits_right", "first_right"), ("any digit", "the first digit")):
        for run in runs:
            style = {**STYLES[run.kind], **_thin(runs, run.kind), "marker": ""}
            steps = [line["step"] for line in run.record]
            axes.plot(
                steps, [line[field] for line in run.record], label=f"{run.kind}, {_seeds(runs, run.kind)}", **style
            )
        axes.set(xlabel="training step", ylim=(-0.02, 1.02), xlim=(0, None))
        axes.set_title(title)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    panels[0].set_ylabel("share of asked digits right")
    return _finish(figure, list(panels))
