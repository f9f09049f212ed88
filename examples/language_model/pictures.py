"""Pictures of what was measured: needles by depth and length, bits by position, the sudden rise in training."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from examples.language_model import results
from examples.language_model.checkpoint import replace
from examples.language_model.phrasings import VALUE_LENGTH as DIGITS
from examples.language_model.report import size
from examples.language_model.results import Run

DEPTHS = 10
FONTS: Any = {"font.size": 12, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.titlepad": 8}
WRITTEN, FROZEN = {"color": "#08306b", "linewidth": 2.4}, {"color": "#41b6c4", "linewidth": 2.2, "linestyle": "-."}
PLAIN = {"color": "#d95f02", "linewidth": 2, "linestyle": "--"}
LONGER = {"color": "#7570b3", "linewidth": 2.2, "linestyle": ":"}


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw needle.png, bits.png and training.png into ``out``, those that the folder holds results for.

    Raises:
        FileNotFoundError: the folder holds no results.
        ValueError: a file is damaged, or does not belong with the others; names it.
    """
    runs = results.load(folder)
    out.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, Callable[[list[Run]], Figure | None]] = {"needle": needle, "bits": bits, "training": training}
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


def _figure(height: float, panels: int) -> tuple[Figure, list[Axes]]:
    """Nine inches wide, without a window and global state, whatever backend the user has set."""
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _finish(figure: Figure, axes: list[Axes]) -> Figure:
    """Open axes with a light grid, and one legend below."""
    for a in axes:
        a.grid(axis="y", alpha=0.3)
        a.spines[["top", "right"]].set_visible(False)
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2 if len(lines) > 3 else 3, frameon=False)
    return figure


def needle(runs: list[Run]) -> Figure | None:
    """Shares answered exactly by length and depth, of all headline models together."""
    asked = [rows for r in runs if r.headline and (rows := r.answers())]
    if not asked:
        return None
    counts = set.intersection(*({row["readings"] for row in rows} for rows in asked))
    if not counts:
        return None
    rows = [row for rows in asked for row in rows]
    lengths = sorted({row["length"] for row in rows})
    readings = sorted({min(counts), max(counts)})
    figure, panels = _figure(4.9, len(readings))
    for axes, count in zip(panels, readings):
        shares = np.full((DEPTHS, len(lengths)), np.nan)
        for column, length in enumerate(lengths):
            these = [row for row in rows if (row["length"], row["readings"]) == (length, count)]
            exact = np.concatenate([[], *(np.array(row["right"]) == DIGITS for row in these)])
            depth = np.concatenate([[], *(row["depth"] for row in these)])
            band = np.minimum((depth * DEPTHS).astype(int), DEPTHS - 1)
            for i in set(band.tolist()):
                shares[i, column] = exact[band == i].mean()
        image = axes.imshow(np.ma.masked_invalid(shares), cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
        for (i, column), share in np.ndenumerate(shares):
            if np.isfinite(share):
                shade = "white" if share > 0.55 else "black"
                axes.text(column, i, f"{100 * share:.0f}", ha="center", va="center", color=shade, size=11)
        axes.set_title(f"{count} reading{'s'[: count > 1]}")
        axes.set(xlabel="length of the context (bytes)", xticks=range(len(lengths)))
        axes.set_xticklabels(map(size, lengths))
        axes.set_yticks(np.arange(DEPTHS + 1) - 0.5, [f"{100 * i // DEPTHS}%" for i in range(DEPTHS + 1)])
    panels[0].set_ylabel("depth of the needle (0%: beginning)")
    figure.colorbar(image, ax=panels, format=PercentFormatter(1), label="needles answered exactly", pad=0.02)
    return figure


def bits(runs: list[Run]) -> Figure | None:
    """Bits per byte by position, and how far they are from the model without memory at equal steps."""
    models = [r for r in runs if r.headline and r.bits]
    if not models or (plain := results.equal_steps(models[0], [r for r in runs if r.bits])) is None:
        return None
    longer = results.equal_time(models[0], [r for r in runs if r.bits])
    lines: dict[str, tuple[list[tuple[Run, str]], dict[str, Any]]] = {
        "memory": ([(r, "reset") for r in models if "reset" in r.bits], WRITTEN),
        "memory, never written": ([(r, "frozen") for r in models if "frozen" in r.bits], FROZEN),
        "no memory, equal steps": ([(plain, "no memory")], PLAIN),
        "no memory, equal time": ([(longer, "no memory")] if longer else [], LONGER),
    }
    figure, (left, right) = _figure(4.6, 2)
    number = plain.bits["no memory"].shape[1]
    edges = np.unique(np.round(2 ** (np.arange(0, 2 * np.log2(number) + 1) / 2)).astype(int))  # two to an octave
    edges = np.unique([0, *edges[edges < number], number])
    middle = np.sqrt(np.maximum(edges[:-1], 0.25) * edges[1:]) * plain.bin
    for label, (parts, style) in lines.items():
        if not parts:
            continue
        pairs = [results.paired(run, mode, plain) for run, mode in parts]
        own, base = (_binned(np.mean(x, 0), edges) for x in zip(*pairs))  # over seeds
        left.plot(middle, own.mean(0), label=label, **style)
        if parts[0][0] is plain:
            right.axhline(0, **style)
            continue
        mean, low, high = 100 * np.array([results.relative(a, b) for a, b in zip(own.T, base.T)]).T
        right.plot(middle, mean, **style)
        right.fill_between(middle, low, high, color=style["color"], alpha=0.18, linewidth=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="position in the document (bytes)", xlim=(0.85 * middle[0], number * plain.bin))
        ticks = plain.bin * 4 ** np.arange(np.log2(number) // 2 + 1)
        axes.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size(round(x))))
    left.set_ylabel("bits per byte")
    right.set_ylabel("difference to no memory, equal steps")
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+g}%" if y else "0%"))
    return _finish(figure, [left, right])


def _binned(rows: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means ``[documents, groups]`` of the bins between the edges."""
    return np.add.reduceat(rows, edges[:-1], axis=1) / np.diff(edges)


def training(runs: list[Run]) -> Figure | None:
    """The shares of asked digits that come out in training."""
    models = [r for r in runs if r.headline and r.record]
    if not models:
        return None
    shades = mpl.colormaps["YlGnBu"](np.linspace(0.95, 0.45, len(models)))
    figure, panels = _figure(4.2, 2)
    plain = results.equal_steps(models[0], [r for r in runs if r.record])
    lines = [(f"memory, seed {r.experiment.training.seed}", r, {"color": c}) for r, c in zip(models, shades)]
    lines += [("no memory", plain, PLAIN)] if plain else []
    for axes, field, title in zip(panels, ("digits_right", "first_right"), ("any digit", "the first digit")):
        for label, run, style in lines:
            steps = [line["step"] for line in run.record]
            axes.plot(steps, [line[field] for line in run.record], label=label, **{"linewidth": 2, **style})
        axes.set(xlabel="training step", ylim=(-0.02, 1.02), xlim=(0, None))
        axes.set_title(title)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    panels[0].set_ylabel("share of asked digits right")
    return _finish(figure, panels)
