"""Needles in a haystack: five facts in a long text; after every reading, all five are asked for."""

import functools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.language_model import phrasings
from examples.language_model.baselines import Carried
from examples.language_model.checkpoint import load, ready, replace
from examples.language_model.corpus import Corpus
from examples.language_model.haystacks import Draw, Haystack, haystacks
from examples.language_model.model import Going, LanguageModel, Reading, mapped
from examples.language_model.phrasings import VALUE_LENGTH
from examples.language_model.training import autocast, device_name
from fwpkm import State

SEGMENT = 4096  # tokens read by one call
AT_ONCE = 512  # questions of all contexts, each of which has a copy of what attention sees
MEMORIES = {"memory_scope": "sequence", "boundary": "wait"}
"""How memories are measured: each context has its own, and no pair is left out at a chunk's end."""

KINDS: dict[str, Draw] = {
    "near": phrasings.near,
    "far": phrasings.far,
    "value first": phrasings.value_first,
    "rephrased": phrasings.in_other_words,
    **{f"held out: {new}": functools.partial(phrasings.near, new=new) for new in phrasings.HELD_OUT},
}
"""What is asked, by name."""


class Cell(NamedTuple):
    """One line of what is measured."""

    kind: str
    length: int
    contexts: int = 200
    readings: int = 1
    controls: bool = False
    """also with learning rate 0 and with another document's memory"""


PROTOCOL = (
    *(Cell("near", length, readings=4, controls=True) for length in (4096, 32768, 131072)),
    *(Cell(kind, length) for kind in ("far", "value first", "rephrased") for length in (4096, 131072)),
    *(Cell(kind, length, contexts=40) for kind in KINDS if kind.startswith("held out") for length in (4096, 131072)),
)
"""What the results report; the same contexts for every model."""


def wilson(successes: int, samples: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, 1927)."""
    share, scale = successes / samples, 1 + z * z / samples
    middle = (share + z * z / (2 * samples)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def shares(right: np.ndarray) -> dict[str, Any]:
    """For JSON, of ``[contexts, facts, digits]`` bool: the shares, and the digits right of each answer."""
    exact = right.all(2)
    return {
        "answers": exact.size, "exact": float(exact.mean()), "exact_interval": wilson(int(exact.sum()), exact.size),
        "digits": float(right.mean()), "right": right.sum(2).tolist(),
    }  # fmt: skip


def read(
    model: LanguageModel, tokens: Tensor, reading: Reading, *,
    update: bool = True, each: Callable[[int, Tensor], None] | None = None,
) -> Reading:  # fmt: skip
    """Read ``[B, T]`` on, overwriting the tables of ``reading``; ``each(start, hidden)`` sees every segment."""
    for start in range(0, tokens.shape[1], SEGMENT):
        with autocast(tokens.device):
            hidden, reading = model(tokens[:, start : start + SEGMENT].long(), reading, update=update, inplace=True)
        if each is not None:
            each(start, hidden)
    return reading


def answers(model: LanguageModel, asked: Tensor, value: Tensor, reading: Reading) -> Tensor:
    """Which digits of each value are the likeliest bytes after those before them; memories stay frozen.

    All six are right just where greedy decoding writes the value.

    Args:
        model: that has read the contexts.
        asked: ``[B, Q, a]``, Q questions of each context with their answers, and padding.
        value: ``[B, Q]``, where the value begins.
        reading: of the B contexts.

    Returns:
        ``[B, Q, 6]`` bool.
    """
    found = []
    at_once = max(1, AT_ONCE // len(asked))
    for these, begins in zip(asked.split(at_once, 1), value.split(at_once, 1)):
        tokens, number = these.flatten(0, 1).long(), these.shape[1]
        with autocast(asked.device):
            hidden, _ = model(tokens, reading.fork(number), update=False)
        digits = begins.flatten()[:, None] + torch.arange(VALUE_LENGTH, device=asked.device)
        before = (digits - 1)[..., None].expand(-1, -1, hidden.shape[2])
        with autocast(asked.device):
            said = model.logits(hidden.gather(1, before)).argmax(-1)
        found.append((said == tokens.gather(1, digits)).unflatten(0, (-1, number)))
    return torch.cat(found, 1)


def another(reading: Reading) -> Reading:
    """Each sequence with the memory of the one before it; what attention sees stays its own."""

    def turned(state: State | Carried) -> State | Carried:
        return mapped(lambda x: x.roll(1, 0), Going.of(state)).into(state)

    return reading._replace(memories=tuple(map(turned, reading.memories)))


def together(model: LanguageModel, device: torch.device, most: int, sets: int) -> int:
    """How many contexts are read at once: as ``sets`` of tables, a copy of one memory's and activations find room."""
    if device.type != "cuda":
        return min(most, 8)
    tables = [sum(x.nbytes for x in m.memory()) for m in model.memories.values()]
    activations = SEGMENT * model.settings.width * 4 * 64
    free, whole = torch.cuda.mem_get_info(device)
    allowed = whole * torch.cuda.get_per_process_memory_fraction()  # less where processes share a card
    free = min(free + torch.cuda.memory_reserved(device), allowed) - torch.cuda.memory_allocated(device)
    room = 0.8 * free / (sets * sum(tables) + max(tables, default=0) + activations)
    return max(2, min(most, int(room)))


def parts(number: int, at_once: int) -> list[np.ndarray]:
    """The numbers below ``number`` in parts of about ``at_once``, none of one alone, which ``another`` could not turn.

    A part of three stands for two parts of two and one.
    """
    return np.array_split(np.arange(number), max(1, min(-(-number // at_once), number // 2)))


@torch.no_grad()
def try_out(
    model: LanguageModel, haystack: Haystack, device: torch.device, readings: int, *, swap: bool = False
) -> Iterator[tuple[int, bool, np.ndarray]]:
    """After each reading: its number, whether the memories were another document's, what is right ``[n, facts, 6]``."""
    right: dict[tuple[int, bool], list[np.ndarray]] = {}
    for rows in parts(len(haystack.tokens), together(model, device, 64, sets=2)):
        part = haystack.part(rows)
        tokens, asked, value = (torch.from_numpy(x).to(device) for x in (part.tokens, part.asked, part.value))
        reading = model.start(len(rows))
        for count in range(1, readings + 1):
            reading = read(model, tokens, reading)
            for swapped in (False, True)[: 1 + (swap and len(rows) > 1)]:
                found = answers(model, asked, value, another(reading) if swapped else reading)
                right.setdefault((count, swapped), []).append(found.cpu().numpy())
    for (count, swapped), found in sorted(right.items()):
        yield count, swapped, np.concatenate(found)


def chosen(
    kinds: Sequence[str] | None, lengths: Sequence[int] | None, contexts: int | None, readings: int | None
) -> list[Cell]:
    """The cells of the protocol of some kinds, with lengths, contexts and readings of one's own where given."""
    known = {kind: [cell for cell in PROTOCOL if cell.kind == kind] for kind in KINDS}
    cells = []
    for kind in dict.fromkeys(kinds or KINDS):
        first, *others = known.get(kind) or [Cell(kind, SEGMENT)]
        alike = [first._replace(length=n) for n in dict.fromkeys(lengths)] if lengths else [first, *others]
        given = {"contexts": contexts, "readings": readings}
        cells += [cell._replace(**{k: v for k, v in given.items() if v is not None}) for cell in alike]
    return cells


def check(cells: Sequence[Cell]) -> None:
    """Raise a ValueError for a cell that cannot be asked."""
    for cell in cells:
        if cell.kind not in KINDS:
            raise ValueError(f"what is asked is one of {', '.join(KINDS)}. Received: {cell.kind!r}")
        if min(cell.length, cell.readings) < 1 or cell.contexts < 1 + cell.controls:
            raise ValueError(
                "length, readings and contexts must be 1 or more, and contexts with controls 2, since they swap "
                f"memories. Received: {cell}"
            )


def measure(
    folder: Path, corpus: Corpus, out: Path, device: torch.device, cells: Sequence[Cell] = PROTOCOL, *, seed: int = 0,
    tell: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Ask the model of a folder; saves every answer in ``out``.

    Args:
        folder: of a trained model.
        corpus: its held-out documents make the contexts.
        out: a JSON file.
        device: to read on.
        cells: what is asked.
        seed: of the contexts.
        tell: receives a line for each result.

    Raises:
        FileNotFoundError: nothing was trained in the folder.
        ValueError: a cell cannot be asked, or no held-out document is long enough.
    """
    check(cells)
    ready(out)
    model, experiment = load(folder, device, **MEMORIES)
    written, carried = experiment.model.writes, experiment.model.carries
    # All of them first, so that what does not fit is said before hours of reading.
    contexts = [
        haystacks(
            corpus.heldout, np.random.default_rng([seed, cell.length, zlib.crc32(cell.kind.encode())]), cell.contexts,
            cell.length, KINDS[cell.kind], clear=experiment.model.beyond,
        ) for cell in cells
    ]  # fmt: skip
    rows = []

    def keep(control: str, cell: Cell, count: int, right: np.ndarray, depth: np.ndarray) -> None:
        about = {"control": control, "kind": cell.kind, "length": cell.length, "readings": count}
        rows.append(about | shares(right) | {"depth": depth.round(4).tolist()})
        tell(
            f"{control}, {cell.kind}, {cell.length} bytes, {count} readings: {100 * rows[-1]['exact']:.1f}% exact, "
            f"{100 * rows[-1]['digits']:.1f}% of digits"
        )

    own = "memory" if model.memories else "no memory"
    for cell, haystack in zip(cells, contexts):
        swap = cell.controls and carried
        for count, swapped, right in try_out(model, haystack, device, cell.readings if carried else 1, swap=swap):
            keep("another document's memory" if swapped else own, cell, count, right, haystack.depth)
    if written and any(cell.controls for cell in cells):
        del model  # its tables
        frozen = load(folder, device, **MEMORIES, learning_rate=0.0)[0]
        for cell, haystack in zip(cells, contexts):
            if cell.controls:
                ((count, _, right),) = try_out(frozen, haystack, device, 1)
                keep("learning rate 0", cell, count, right, haystack.depth)
    about = {"corpus": corpus.sha256, "seed": seed, "device": device_name(device), "experiment": experiment.tables()}
    replace(out, lambda beside: beside.write_text(json.dumps({**about, "trained": folder.name, "rows": rows})))
    return out
