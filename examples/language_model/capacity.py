"""How many facts a memory holds: short statements in 128K bytes, more and more of them, all asked after one reading."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from examples.language_model import phrasings
from examples.language_model.checkpoint import load, ready, replace
from examples.language_model.corpus import Corpus
from examples.language_model.haystacks import haystacks
from examples.language_model.needle import MEMORIES, SEGMENT, read, shares, try_out
from examples.language_model.training import device_name

LENGTH = 131072
NUMBERS = (5, 15, 50, 150, 500, 1500, 3000)
"""Of facts in a context."""
CONTEXTS = 100, 8
"""At most and at least; in between as many as ask ANSWERS questions."""
ANSWERS = 1000
NEARBY = 4  # thousands of statements leave little text between them


def contexts(facts: int) -> int:
    """How many contexts of so many facts are read."""
    most, least = CONTEXTS
    return max(least, min(most, ANSWERS // max(1, facts)))


def measure(
    folder: Path, corpus: Corpus, out: Path, device: torch.device, *, length: int = LENGTH,
    numbers: Sequence[int] = NUMBERS, seed: int = 0, tell: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Ask the model of a folder for all of ever more facts; saves every answer in ``out``.

    Raises:
        FileNotFoundError: nothing was trained in the folder.
        ValueError: facts do not fit in ``length`` bytes, or no held-out document is long enough.
    """
    ready(out)
    model, experiment = load(folder, device, **MEMORIES)
    drawn = [
        haystacks(
            corpus.heldout, np.random.default_rng([seed, length, number]), contexts(number), length, phrasings.short,
            facts=number, clear=experiment.model.beyond, nearby=NEARBY,
        ) for number in numbers
    ]  # fmt: skip
    with torch.no_grad():  # a state that has read, since attention begins with none
        begun = torch.from_numpy(drawn[0].tokens[:1, : 2 * SEGMENT]).to(device)
        state_bytes = read(model, begun, model.start(1)).nbytes
    rows = []
    for number, haystack in zip(numbers, drawn):
        ((_, _, right),) = try_out(model, haystack, device, 1)
        rows.append({"facts": number, "length": length} | shares(right) | {"depth": haystack.depth.round(4).tolist()})
        tell(
            f"{number} facts in {length} bytes: {100 * rows[-1]['exact']:.1f}% of {right[..., 0].size} answered exactly"
        )
    about = {
        "corpus": corpus.sha256, "seed": seed, "device": device_name(device), "experiment": experiment.tables(),
        "trained": folder.name, "state_bytes": state_bytes, "rows": rows,
    }  # fmt: skip
    replace(out, lambda beside: beside.write_text(json.dumps(about)))
    return out
