"""Passages and results as files, between the command and the processes that run the backends."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.conformance.results import Result
from fwpkm.conformance.running import Reading
from fwpkm.conformance.shapes import Passage
from fwpkm.conformance.strategies import make_case
from fwpkm.containers import Memory, State


def save_passages(path: Path, passages: Sequence[Passage]) -> None:
    """Write what passages follow from, and no arrays: those come from each case's seed."""
    lines = [
        {
            "number": passage.number,
            "sizes": passage.sizes,
            "handed": passage.handed,
            "cfg": passage.case.cfg.to_json(),
            "seed": passage.case.seed,
            "dtype": passage.case.dtype,
            "twists": sorted(passage.case.twists),
            "batch": passage.case.batch,
            "length": passage.case.length,
            "gated": passage.case.tokens.gate is not None,
            "masked": passage.case.tokens.mask is not None,
            "flush_after": passage.case.flush_after,
        }
        for passage in passages
    ]
    path.write_text(json.dumps(lines), encoding="utf-8")


def load_passages(path: Path) -> list[Passage]:
    """The passages that :func:`save_passages` wrote."""
    passages = []
    for line in json.loads(path.read_text(encoding="utf-8")):
        number, sizes, handed = (line.pop(name) for name in ("number", "sizes", "handed"))
        cfg, twists = FwPKMConfig.from_json(line.pop("cfg")), frozenset(line.pop("twists"))
        passages.append(Passage(number, make_case(cfg, twists=twists, **line), sizes, handed))
    return passages


def save_result(path: Path, result: Result) -> None:
    """Write the arrays of a result as one npz."""
    reading, state = result.reading._asdict(), result.state._asdict()
    memories = {"reading": reading.pop("memory"), "state": state.pop("memory")}
    parts = {"reading": reading, "state": state, "gradients": result.gradients}
    parts |= {f"{name} memory": memory._asdict() for name, memory in memories.items()}
    np.savez(path, **{f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()})


def load_result(path: Path) -> Result:
    """The result that :func:`save_result` wrote."""
    parts: dict[str, dict[str, np.ndarray]] = {"gradients": {}}
    with np.load(path) as file:
        for key, array in file.items():
            part, name = key.split("/")
            parts.setdefault(part, {})[name] = array
    memories = {name: Memory(**parts[f"{name} memory"]) for name in ("reading", "state")}
    reading = Reading(**parts["reading"], memory=memories["reading"])
    return Result(reading, State(**parts["state"], memory=memories["state"]), parts["gradients"])
