"""A picture of retention: R and needles by how many other domains were read."""

import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from examples.language_model.checkpoint import replace
from examples.language_model.intervals import Interval
from examples.language_model.retained import KINDS, Model, needles, retention


def draw(models: Sequence[Model], out: Path) -> Path:
    """Draw ``retention.png`` into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context():
        mpl.rcdefaults()  # the user's own matplotlibrc was not made for this picture
        mpl.rcParams.update({"font.size": 12, "axes.titlesize": 12, "axes.titlelocation": "left"})
        replace(out / "retention.png", functools.partial(figure(models).savefig, format="png", dpi=140))
    return out / "retention.png"


def figure(models: Sequence[Model]) -> Figure:
    """A panel for each of KINDS and one for needles; a line for each model, and a thin one for each of its seeds."""
    whole = Figure(figsize=(13, 4.8), layout="constrained")
    FigureCanvasAgg(whole)
    panels = list(whole.subplots(1, len(KINDS) + 1))
    for i, model in enumerate(models):
        color = f"C{i % 10}"
        every, later = range(model.most + 1), range(1, model.most + 1)
        measures = [(later, functools.partial(_retained, kind)) for kind in KINDS] + [(every, needles)]
        for axes, (counts, measure) in zip(panels, measures):
            _line(axes, counts, [measure(model, n) for n in counts], color, model.label)
            for one in (model.seed(s) for s in range(len(model.seeds)) if len(model.seeds) > 1):
                values = [np.nan if (x := measure(one, n)) is None else x.mean for n in counts]
                axes.plot(counts, values, color=color, linewidth=0.8, alpha=0.6)
    for axes, title in zip(panels, (*(f"R on {what}" for what in KINDS.values()), "needles of the first text")):
        axes.set_title(title)
        axes.set(xlabel="other domains read since", ylim=(min(0, axes.get_ylim()[0]), max(1, axes.get_ylim()[1])))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].yaxis.set_major_formatter(PercentFormatter(1))
    lines, labels = panels[-1].get_legend_handles_labels()
    whole.legend(lines, labels, loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
    return whole


def _retained(kind: str, model: Model, n: int) -> Interval | None:
    return retention(model, kind, n)


def _line(axes: mpl.axes.Axes, counts: Sequence[int], curve: Sequence[Interval | None], color: str, label: str) -> None:
    mean, low, high, _ = np.array([(np.nan,) * 4 if x is None else x for x in curve]).T
    axes.plot(counts, mean, color=color, linewidth=2.2, marker="o", label=label)
    axes.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
