"""What conversations cost: the first bytes of held-out documents are read, each with its own memories, and packed."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from examples.language_model.checkpoint import load, ready, replace
from examples.language_model.corpus import Corpus
from examples.language_model.needle import MEMORIES, parts, read, together
from examples.language_model.training import device_name
from fwpkm.backends.torch import pack, select


@torch.no_grad()
def measure(
    folder: Path, corpus: Corpus, out: Path, device: torch.device, *, number: int = 100, length: int = 4096,
    tell: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Pack the memories of ``number`` documents, after ``length`` bytes of each; saves the bytes of each in ``out``.

    Raises:
        FileNotFoundError: nothing was trained in the folder.
        ValueError: fewer documents are as long, or the model has no memory that is written.
    """
    ready(out)
    sizes = np.diff(corpus.heldout.starts)
    chosen = np.flatnonzero(sizes >= length)[:number]
    if number < 1 or length < 1 or len(chosen) < number:
        raise ValueError(
            f"number and length must be at least 1, and as many held-out documents hold as many bytes; "
            f"{(sizes >= length).sum()} do. Received: number={number}, length={length}"
        )
    model, experiment = load(folder, device, **MEMORIES)
    if not experiment.model.writes:
        raise ValueError(f"the model of {folder} has no memory that is written")
    rows = []
    for part in parts(number, together(model, device, 16, sets=2)):
        texts = np.stack([corpus.heldout.document(i)[:length] for i in chosen[part]])
        reading = read(model, torch.from_numpy(texts).to(device), model.start(len(part)))
        for row, i in enumerate(chosen[part]):
            packed, tables, written = [], [], []
            for layer, state in zip(model.memories.values(), reading.memories):
                one = pack(layer.config, select(layer.config, state, [row]), layer.memory())
                packed.append(one.nbytes)
                tables.append(4 * layer.config.num_slots * layer.config.value_dim)
                written.append(len(one.slots) / layer.config.num_slots)
            name = corpus.heldout.names[i]
            rows.append({"document": name, "packed": sum(packed), "tables": sum(tables), "rows_written": written})
        tell(f"{len(rows)} of {number}: packed to {rows[-1]['packed'] / rows[-1]['tables']:.1%} of their tables")
    ratio = sum(row["packed"] for row in rows) / sum(row["tables"] for row in rows)
    shares = np.mean([row["rows_written"] for row in rows], axis=0)
    tell(f"in all {ratio:.1%}; rows written in each memory: {', '.join(f'{share:.1%}' for share in shares)}")
    about = {"corpus": corpus.sha256, "device": device_name(device), "experiment": experiment.tables()}
    replace(out, lambda beside: beside.write_text(json.dumps({**about, "length": length, "rows": rows})))
    return out
