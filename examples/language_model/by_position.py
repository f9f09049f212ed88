"""Bits per byte by position on held-out documents, with memories that write, go on, or stay as they began."""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from examples.language_model.checkpoint import load, ready, replace
from examples.language_model.corpus import Corpus
from examples.language_model.model import Going, LanguageModel, Reading
from examples.language_model.needle import MEMORIES, another, parts, read, together
from examples.language_model.training import autocast, device_name

BIN = 1024  # bytes whose bits are averaged


@torch.no_grad()
def bits(model: LanguageModel, tokens: Tensor, reading: Reading, *, update: bool) -> tuple[np.ndarray, Reading]:
    """Bits of the bytes of ``[B, T + 1]`` after the first, averaged over bins ``[B, T / BIN]``."""
    found = []

    def each(start: int, hidden: Tensor) -> None:
        targets = tokens[:, start + 1 : start + 1 + hidden.shape[1]].long()
        with autocast(tokens.device):
            losses = [F.cross_entropy(model.logits(h), t, reduction="none") for h, t in zip(hidden, targets)]
        found.append(torch.stack(losses).unflatten(1, (-1, BIN)).mean(2) / math.log(2))

    reading = read(model, tokens[:, :-1], reading, update=update, each=each)
    return torch.cat(found, 1).cpu().numpy(), reading


def documents(corpus: Corpus, length: int) -> tuple[np.ndarray, list[str]]:
    """The first ``length + 1`` bytes of every held-out document that has as many.

    Raises:
        ValueError: none has, or the length is no multiple of ``BIN``.
    """
    if length < 1 or length % BIN:
        raise ValueError(f"length must be a multiple of {BIN:,} bytes, at least one. Received: {length:,}")
    texts = corpus.heldout
    sizes = np.diff(texts.starts)
    long = [i for i, size in enumerate(sizes) if size > length]
    if not long:
        raise ValueError(f"no held-out document has more than {length} bytes; the longest has {sizes.max(initial=0)}")
    return np.stack([texts.document(i)[: length + 1] for i in long]), [texts.names[i] for i in long]


def _begun(start: Reading, left: Reading) -> Reading:
    """The start of documents with the tables that were left; no token that is still to be written comes along."""
    memories = zip(start.memories, left.memories)
    return start._replace(memories=tuple(Going.of(other).into(state) for state, other in memories))


def measure(folder: Path, corpus: Corpus, out: Path, device: torch.device, *, length: int) -> Path:
    """Measure the model of a folder; saves the bits of every document and bin in ``out``.

    Raises:
        FileNotFoundError: nothing was trained in the folder.
        ValueError: as in ``documents``; or ``out`` is a folder.
    """
    ready(out)
    model, experiment = load(folder, device, **MEMORIES)
    tokens, names = documents(corpus, length)
    rows: dict[str, list[np.ndarray]] = {}
    for part in parts(len(tokens), together(model, device, 32, sets=3)):
        text = torch.from_numpy(tokens[part]).to(device)
        found, after = bits(model, text, model.start(len(part)), update=True)
        rows.setdefault("reset" if model.memories else "no memory", []).append(found)
        if model.settings.carries and len(part) > 1:
            after = another(after)  # under the old name, so that the tables as they stood are freed
            after = _begun(model.start(len(part)), after)
            rows.setdefault("carried", []).append(bits(model, text, after, update=True)[0])
        del after
        if model.settings.writes:
            rows.setdefault("frozen", []).append(bits(model, text, model.start(len(part)), update=False)[0])
    about = {"corpus": corpus.sha256, "device": device_name(device), "experiment": experiment.tables()}
    found = {mode: np.concatenate(x).astype(np.float64).round(4).tolist() for mode, x in rows.items()}
    writers = [corpus.writer(name) for name in names]
    results = {**about, "trained": folder.name, "documents": names, "writers": writers, "bin": BIN, "bits": found}
    replace(out, lambda beside: beside.write_text(json.dumps(results)))
    return out
