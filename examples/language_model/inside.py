"""What a memory holds, as pictures: who wrote the slots that an answer is read from, and where the gates open."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples.language_model.checkpoint import load, replace
from examples.language_model.corpus import Corpus
from examples.language_model.haystacks import haystacks
from examples.language_model.model import LanguageModel
from examples.language_model.needle import read
from examples.language_model.phrasings import VALUE_LENGTH as DIGITS
from examples.language_model.phrasings import near
from examples.language_model.training import autocast
from fwpkm import FwPKMConfig, get_backend
from fwpkm.backends.torch import FwPKM

LENGTH = 8192  # of the context, in bytes
PAGE, LINE = 1600, 80  # of text with gates, and of one of its lines, in bytes


class Looks(NamedTuple):
    """What one memory did, token by token."""

    slots: np.ndarray
    """``[T, k]``"""
    weights: np.ndarray
    """``[T, k]``"""
    gate: np.ndarray
    """``[T]``"""


@contextmanager
def watched(model: LanguageModel) -> Iterator[dict[str, list[Looks]]]:
    """Record what the memories look up in each call, of one sequence; a call must not be longer than a chunk."""
    seen: dict[str, list[Looks]] = {name: [] for name in model.memories}

    def note(layer: FwPKM, arguments: tuple, *, name: str) -> None:
        x, state = arguments
        query = layer.query_proj(layer.query_norm(x))
        found = get_backend("torch").lookup(layer.config, state.memory, query)
        gate = layer.gate_proj(layer.gate_norm(x)).sigmoid()
        seen[name].append(Looks(*(z[0].cpu().numpy() for z in (found.slots, found.weights, gate[..., 0]))))

    handles = [
        layer.register_forward_pre_hook(functools.partial(note, name=name)) for name, layer in model.memories.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def joined(looks: list[Looks]) -> Looks:
    """Those of several calls, one after the other."""
    return Looks(*(np.concatenate(x) for x in zip(*looks)))


def writers(written: Looks, slots: np.ndarray, weights: np.ndarray, cfg: FwPKMConfig) -> np.ndarray:
    """How much each token of the context wrote into the slots of one read ``[T]``: Σ w_read g w_write / N.

    As if nothing had been written over since. The last ``lookahead`` tokens of a chunk write nothing.
    """
    share, chunk = np.zeros(len(written.gate)), cfg.chunk_size
    gate = np.where(np.arange(len(share)) % chunk < chunk - cfg.lookahead, written.gate, 0)
    for begin in range(0, len(share), chunk):
        here = written.slots[begin : begin + chunk]
        for slot, weight in zip(slots, weights):
            hit = here == slot
            amount = (hit * written.weights[begin : begin + chunk]).sum(1) * gate[begin : begin + chunk]
            share[begin : begin + chunk] += weight * amount / max(1, hit.sum())
    return share


@torch.no_grad()
def draw(
    folder: Path, corpus: Corpus, out: Path, device: torch.device, *, seed: int = 0, tell: Callable[[str], None] = print
) -> list[Path]:
    """Draw ``inside.png`` and ``gates.png`` for the first needle that the model of a folder answers.

    ``tell`` receives what ``use`` says of its context.

    Raises:
        ValueError: the model has no memory, or answers none of 20 needles.
    """
    model, experiment = load(folder, device, memory_scope="sequence")
    if not experiment.model.writes or not experiment.model.gated:
        raise ValueError(f"the model of {folder} has no memory with a gate to look into")
    cfg = experiment.model.memory_config()
    chunk = cfg.chunk_size
    rng = np.random.default_rng(seed)
    haystack = haystacks(corpus.heldout, rng, 20, LENGTH, near, clear=experiment.model.beyond)
    for tokens, questions, values, begins in zip(haystack.tokens, haystack.asked, haystack.value, haystack.begin):
        asks = questions[0, : values[0] + DIGITS]
        text, asked = (torch.from_numpy(x[None]).to(device) for x in (tokens, asks))
        with watched(model) as seen:
            reading = model.start(1)
            for first in range(0, LENGTH, chunk):
                reading = read(model, text[:, first : first + chunk], reading)
            written = {name: joined(looks) for name, looks in seen.items()}
        with watched(model) as seen:
            with autocast(device):
                hidden, _ = model(asked.long(), reading, update=False)
            said = model.logits(hidden)[0, -DIGITS - 1 : -1].argmax(-1)
        if torch.equal(said, asked[0, -DIGITS:].long()):
            shares = {name: _shares(written[name], joined(looks), cfg) for name, looks in seen.items()}
            for line in use(written):
                tell(line)
            out.mkdir(parents=True, exist_ok=True)
            figures = {
                "inside.png": _inside(tokens, _shown(asks[:-DIGITS]), _shown(asks[-DIGITS:]), int(begins[0]), shares),
                "gates.png": _gates(tokens, int(begins[0]), written),
            }
            for name, figure in figures.items():
                FigureCanvasAgg(figure)
                replace(out / name, lambda beside, figure=figure: figure.savefig(beside, dpi=100, format="png"))
            return [out / name for name in figures]
    raise ValueError(f"the model of {folder} answers none of 20 needles in {LENGTH} bytes: train it longer")


def use(written: dict[str, Looks]) -> Iterator[str]:
    """A line on each memory: how many rows the entries of the context fall on, and how its gate stands."""
    for name, looks in written.items():
        counts = np.sort(np.bincount(looks.slots.ravel()))[::-1]
        rows, entries = np.count_nonzero(counts), counts.sum()
        often = counts[: max(1, rows // 100)].sum() / entries
        yield (
            f"memory before layer {name}: {entries:,} entries on {rows:,} rows, {often:.0%} on the 1% most read; "
            f"mean gate {looks.gate.mean():.2f}"
        )


def _shares(written: Looks, asks: Looks, cfg: FwPKMConfig) -> np.ndarray:
    """Who wrote what the tokens before each digit read ``[DIGITS, T]``."""
    rows = range(len(asks.gate) - DIGITS - 1, len(asks.gate) - 1)
    return np.stack([writers(written, asks.slots[i], asks.weights[i], cfg) for i in rows])


def _shown(text: np.ndarray) -> str:
    """Bytes as one line of characters, one for each."""
    return "".join(chr(b) if 32 <= b < 127 else "·" for b in text)


def _inside(tokens: np.ndarray, question: str, answer: str, place: int, shares: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(10, 2.0 + 2.3 * len(shares)), layout="constrained")
    panels = figure.subplots(len(shares) + 1, 1, height_ratios=[*([2.3] * len(shares)), 1.6])
    for panel, (name, share) in zip(panels, shares.items()):
        whole = share / np.maximum(share.sum(1, keepdims=True), 1e-12)
        for digit, row in enumerate(whole):
            found = np.flatnonzero(row > 0.002)
            panel.vlines(found, digit + 0.45, digit + 0.45 - 0.9 * row[found], color="C0", lw=3)
        panel.axvspan(place, place + len(question) + DIGITS, color="C1", alpha=0.3, lw=0)
        panel.set(xlim=(0, len(tokens)), ylim=(DIGITS - 0.4, -0.6), yticks=range(DIGITS), yticklabels=list(answer))
        panel.set_ylabel(f"memory before\nlayer {name}: digit")
    panels[-2].set_xlabel("position of the writing token in the context; orange: the statement that was asked for")
    panels[-1].axis("off")
    upper = list(shares.values())[-1]
    lines = [f"asked:  {question.strip()} {answer}", ""]
    for digit, row in enumerate(upper):
        t = int(row.argmax())
        share = row[t] / max(row.sum(), 1e-12)
        lines.append(f"digit {answer[digit]}: {share:4.0%} written at …{_shown(tokens[max(0, t - 44) : t + 1])}"
                     f"▸{_shown(tokens[t + 1 : t + 2])}◂{_shown(tokens[t + 2 : t + 10])}…")  # fmt: skip
    panels[-1].text(0, 1, "\n".join(lines), family="monospace", size=9.5, va="top", transform=panels[-1].transAxes)
    return figure


def _gates(tokens: np.ndarray, place: int, written: dict[str, Looks]) -> Figure:
    begin = max(0, min(place - PAGE // 2, len(tokens) - PAGE)) // LINE * LINE
    figure = Figure(figsize=(10, 0.6 + 3.4 * len(written)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(written), 1))
    image = None
    for panel, (name, looks) in zip(panels, written.items()):
        page = looks.gate[begin : begin + PAGE].reshape(-1, LINE)
        image = panel.imshow(page, cmap="Blues", vmin=0, vmax=1.4, aspect="auto", interpolation="nearest")
        for i, line in enumerate(tokens[begin : begin + PAGE].reshape(-1, LINE)):
            for j, character in enumerate(_shown(line).replace("·", " ")):
                panel.text(j, i, character, family="monospace", size=7, ha="center", va="center")
        panel.set(xticks=[], yticks=[], ylabel=f"memory before layer {name}")
    bar = figure.colorbar(image, ax=panels.tolist(), fraction=0.02, pad=0.01, boundaries=np.linspace(0, 1, 101))
    bar.set_label("gate: 0 keeps the token's own value, 1 reads the memory and writes in full")
    bar.set_ticks([0, 0.5, 1])
    return figure
