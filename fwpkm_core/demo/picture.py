"""The picture of a demo: recall by position for every pass, and how often each slot was read."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogFormatter, MaxNLocator

from fwpkm.demo.recall import Asked, Round

NAME = "recall.png"
MAX_BINS = 60
BESIDE = {
    "frozen": ("learning rate 0", "#d95f02", "--"),
    "shuffled": ("shuffled targets", "#7570b3", ":"),
    "dictionary": ("dictionary of 8 tokens", "#666666", "-."),
}
"""What stands beside the memory: two controls and the baseline."""
BARS = {"memory": "#225ea8", "dictionary": "#666666", "falling_back": "#bbbbbb"}
LABELS = ("memory", "dictionary", "falling\nback")
FONTS: Any = {"font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.titlepad": 10}


def save(folder: Path, title: str, rounds: Sequence[Round], plain: Asked, other: Asked) -> Path:
    """Draw what was found into ``folder``; a picture that is there already is replaced once the new one is complete.

    Raises:
        OSError: the folder cannot be written.
    """
    with mpl.rc_context():
        mpl.rcdefaults()  # the user's own matplotlibrc was not made for this picture
        mpl.rcParams.update(FONTS)
        figure = draw(title, rounds, plain, other)
        target = folder / NAME
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".recall-", suffix=".png", delete=False) as file:
            try:
                figure.savefig(file, format="png", dpi=140)
                file.close()
                os.chmod(file.name, 0o666 & ~_umask())  # a temporary file is private, a picture need not be
                os.replace(file.name, target)
            except BaseException:
                file.close()
                os.unlink(file.name)
                raise
    return target


def draw(title: str, rounds: Sequence[Round], plain: Asked, other: Asked) -> Figure:
    """The whole figure, 16 × 6 inches."""
    figure = Figure(figsize=(16, 6), layout="constrained")
    FigureCanvasAgg(figure)  # no window and no global state, whatever backend the user has set
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.45, 0.75, 1])
    figure.suptitle(f"An untrained fast-weight memory rereads a text: {shorten(title)}", x=0.01, ha="left", size=13)
    _recall_by_position(left, rounds)
    lines, labels = left.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower left", ncols=(len(lines) + 1) // 2, frameon=False)
    _asked_once_more(middle, plain, other)
    _slot_use(figure, right, rounds[-1].memory.reads, len(rounds))
    return figure


def shorten(title: str, limit: int = 70) -> str:
    """At most ``limit`` characters, cut in the middle, with "?" for what the font lacks; no "$" begins mathematics."""
    font = get_font(findfont("DejaVu Sans"))  # it comes with matplotlib
    plain = "".join(c if font.get_char_index(ord(c)) else "?" for c in title)
    half = (limit - 3) // 2
    short = plain if len(plain) <= limit else f"{plain[:half]}...{plain[-half:]}"
    return short.replace("$", r"\$")


def _recall_by_position(axes: Axes, rounds: Sequence[Round]) -> None:
    tokens = rounds[0].memory.hits.size
    edges = np.linspace(0, tokens, max(1, min(MAX_BINS, tokens // 20)) + 1).astype(int)
    shades = mpl.colormaps["YlGnBu"](np.linspace(0.4, 0.95, len(rounds)))
    labelled = set(range(len(rounds))) if len(rounds) <= 6 else {0, 1, 2, len(rounds) - 1}
    for number, (round_, shade) in enumerate(zip(rounds, shades)):
        label = f"memory, pass {number + 1}: {round_.memory.recall:.3f}" if number in labelled else None
        _steps(axes, edges, round_.memory.hits, color=shade, linewidth=2.2, label=label)
    for name, (label, colour, style) in BESIDE.items():
        last = getattr(rounds[-1], name)
        text = f"{label}, pass {len(rounds)}: {last.recall:.3f}"
        _steps(axes, edges, last.hits, color=colour, linestyle=style, linewidth=1.8, label=text)
    axes.set(xlim=(0, tokens), ylim=(-0.02, 1.04), xlabel="position in the text (tokens)")
    axes.set_ylabel(f"next-token recall (mean of {max(1, round(tokens / (len(edges) - 1)))} tokens)")
    axes.set_title("Recall by position, read before the write")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))


def _steps(axes: Axes, edges: np.ndarray, hits: np.ndarray, **style: Any) -> None:
    """The mean of ``hits`` between the edges, each drawn across its width."""
    means = np.add.reduceat(hits, edges[:-1], dtype=float) / np.diff(edges)
    axes.stairs(means, edges, baseline=None, **style)


def _asked_once_more(axes: Axes, plain: Asked, other: Asked) -> None:
    """Bars of the memory and the dictionaries, on the text as it was and with some of its tokens replaced."""
    for start, asked in ((0, plain), (4, other)):
        bars = axes.bar(range(start, start + 3), asked, color=list(BARS.values()), width=0.85)
        axes.bar_label(bars, [f"{fraction:.2f}" for fraction in asked], padding=2)
    axes.set_xticks([0, 1, 2, 4, 5, 6], LABELS * 2, rotation=90, size=9)
    for centre, text in ((1, "as it was"), (5, "1 token in 20\nreplaced")):
        axes.text(centre, 1.2, text, ha="center", va="top")
    axes.set(ylim=(0, 1.22), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_title("Asked once more, nothing written")
    axes.spines[["top", "right"]].set_visible(False)


def _slot_use(figure: Figure, axes: Axes, reads: np.ndarray, number: int) -> None:
    shades = mpl.colormaps["YlGnBu"](np.linspace(0.3, 1, 256))  # from where one read still stands out from white
    image = axes.imshow(
        np.ma.masked_equal(reads, 0),
        norm=LogNorm(1, max(10, reads.max())),
        cmap=ListedColormap(shades).with_extremes(bad="white"),
        interpolation="nearest" if len(reads) <= 512 else "auto",
        origin="lower",
    )
    bar = figure.colorbar(
        image, ax=axes, shrink=0.85, format=LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1))
    )
    bar.set_label(f"reads in pass {number} (log scale; white: none)")
    axes.set_anchor("N")  # its title beside the other one
    axes.set(xlabel="sub-key of the second codebook", ylabel="sub-key of the first codebook")
    used = np.count_nonzero(reads)
    axes.set_title(f"Use of the {reads.size:,} slots: {used:,} read ({used / reads.size:.0%})")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
