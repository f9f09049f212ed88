"""Needle in a haystack: five facts in a long text; after one or more readings, one of them is asked for."""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.language_model import facts
from examples.language_model.baselines import Carried
from examples.language_model.checkpoint import load, ready, replace
from examples.language_model.corpus import Corpus
from examples.language_model.facts import DIGITS, Haystack
from examples.language_model.model import LanguageModel, Reading, mapped
from examples.language_model.training import autocast, device_name
from fwpkm import State

SEGMENT = 4096  # tokens read by one call


class Answers(NamedTuple):
    """Of one model, phrasing, length and number of readings."""

    control: str
    phrasing: str
    length: int
    readings: int
    right: np.ndarray
    """``[n, 6]`` bool, by digit"""
    depth: np.ndarray
    """``[n]`` from 0, the beginning, to 1"""

    def record(self, **about: Any) -> dict[str, Any]:
        """For JSON: the shares, their intervals, and each sample."""
        exact = self.right.all(1)
        fields = {"control": self.control, "phrasing": self.phrasing, "length": self.length, "readings": self.readings}
        return {
            **about, **fields, "samples": len(exact),
            "exact": exact.mean(), "exact_interval": wilson(exact.sum(), len(exact)),
            "digits": self.right.mean(),
            "depth": self.depth.round(4).tolist(), "right": self.right.sum(1).tolist(),
        }  # fmt: skip


def wilson(successes: int, samples: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, 1927)."""
    share, scale = successes / samples, 1 + z * z / samples
    middle = (share + z * z / (2 * samples)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    return max(0.0, middle - half), min(1.0, middle + half)


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


def answer(model: LanguageModel, question: Tensor, reading: Reading) -> Tensor:
    """The six likeliest bytes in turn after ``question`` [B, q], with frozen memories."""
    said, ask = [], question.long()
    for _ in range(DIGITS):
        with autocast(question.device):
            hidden, reading = model(ask, reading, update=False)
            ask = model.logits(hidden[:, -1:]).argmax(-1)
        said.append(ask)
    return torch.cat(said, 1)


def another(reading: Reading) -> Reading:
    """Each sequence with the memory of the one before it; what attention sees stays its own."""

    def turned(state: State | Carried) -> State | Carried:
        return state._replace(memory=mapped(lambda x: x.roll(1, 0), state.memory))

    return reading._replace(memories=tuple(map(turned, reading.memories)))


def together(model: LanguageModel, device: torch.device, most: int, sets: int) -> int:
    """How many contexts are read at once: as ``sets`` of tables, a copy of one memory's and activations find room."""
    if device.type != "cuda":
        return min(most, 8)
    tables = [sum(x.nbytes for x in m.memory()) for m in model.memories.values()]
    activations = SEGMENT * model.settings.width * 4 * 64
    free, whole = torch.cuda.mem_get_info(device)
    allowed = whole * torch.cuda.get_per_process_memory_fraction(device)  # less where processes share a card
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
    """After each reading: its number, whether the memories were another document's, and what is right ``[n, 6]``."""
    right: dict[tuple[int, bool], list[np.ndarray]] = {}
    for part in parts(len(haystack.tokens), together(model, device, 64, sets=2)):
        tokens, question, expected = (
            torch.from_numpy(x[part]).to(device) for x in (haystack.tokens, haystack.question, haystack.answer)
        )
        reading = model.start(len(part))
        for count in range(1, readings + 1):
            reading = read(model, tokens, reading)
            for swapped in (False, True)[: 1 + (swap and len(part) > 1)]:
                said = answer(model, question, another(reading) if swapped else reading)
                right.setdefault((count, swapped), []).append((said == expected).cpu().numpy())
    for (count, swapped), found in sorted(right.items()):
        yield count, swapped, np.concatenate(found)


def measure(
    folder: Path, corpus: Corpus, out: Path, device: torch.device, *,
    lengths: list[int], samples: int, readings: int, phrasings: list[str], controls: bool, seed: int = 0,
    tell: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Ask the model of a folder; saves every answer in ``out``.

    Args:
        folder: of a trained model.
        corpus: its held-out documents make the haystacks.
        out: a JSON file.
        device: to read on.
        lengths: of contexts, in bytes.
        samples: of each length and phrasing.
        readings: how often a context is read before the last question.
        phrasings: names of phrasings, see ``named``.
        controls: also ask with learning rate 0 and with another document's memory.
        seed: of the haystacks.
        tell: receives a line for each result.

    Raises:
        FileNotFoundError: nothing was trained in the folder.
        ValueError: an argument is out of range, or no held-out document is long enough.
    """
    if readings < 1 or min(lengths) < 1 or samples < 1 + controls:
        raise ValueError(
            "readings, lengths and samples must be 1 or more, and samples with controls 2, since they swap memories. "
            f"Received: readings={readings}, lengths={lengths}, samples={samples}"
        )
    ready(out)
    model, experiment = load(folder, device, memory_scope="sequence")
    mixes, carries = bool(experiment.model.memories), experiment.model.carries
    still = controls and experiment.model.writes
    frozen = load(folder, device, memory_scope="sequence", learning_rate=0.0)[0] if still else None
    # All of them first, so that what does not fit is said before hours of reading.
    haystacks = []
    for name in dict.fromkeys(phrasings):
        for length in dict.fromkeys(lengths):
            rng = np.random.default_rng([seed, length, zlib.crc32(name.encode())])
            found = facts.haystacks(corpus.heldout, rng, samples, length, named(name), clear=experiment.model.beyond)
            haystacks.append((name, length, found))
    rows = []

    def keep(answers: Answers) -> None:
        row = answers.record(trained=folder.name)
        rows.append(row)
        tell(
            f"{row['control']}, {row['phrasing']}, {row['length']} bytes, {row['readings']} readings: "
            f"{100 * row['exact']:.1f}% exact, {100 * row['digits']:.1f}% of digits"
        )

    for name, length, haystack in haystacks:
        times = readings if carries else 1
        for count, swapped, right in try_out(model, haystack, device, times, swap=controls and carries):
            control = "another document's memory" if swapped else "memory" if mixes else "no memory"
            keep(Answers(control, name, length, count, right, haystack.depth))
        if frozen is not None:
            for count, _, right in try_out(frozen, haystack, device, 1):
                keep(Answers("learning rate 0", name, length, count, right, haystack.depth))
    about = {"corpus": corpus.sha256, "seed": seed, "device": device_name(device), "experiment": experiment.tables()}
    replace(out, lambda beside: beside.write_text(json.dumps({**about, "rows": rows})))
    return out


def named(name: str) -> str:
    """The phrasing "seen-0", ..., "unseen-0", ...

    Raises:
        ValueError: there is none of that name.
    """
    groups = {"seen": facts.SEEN, "unseen": facts.UNSEEN}
    known = {f"{group}-{i}": phrasing for group, all_ in groups.items() for i, phrasing in enumerate(all_)}
    if name not in known:
        last = len(facts.SEEN) - 1, len(facts.UNSEEN) - 1
        raise ValueError(f"a phrasing is seen-0 to seen-{last[0]} or unseen-0 to unseen-{last[1]}. Received: {name}")
    return known[name]
