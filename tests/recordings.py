"""A reading to record: two rows, several calls, a dead token, padding, text that tries to leave its page, a flush."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fwpkm
from fwpkm import FwPKMConfig, LayerTrace, Recorder, reference

CFG = FwPKMConfig(key_dim=8, value_dim=4, num_heads=2, num_subkeys=8, top_k=2, chunk_size=8)
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "🦊 ",
    "שלום ",
    "&amp; ",
    "\ud800",
    "{{data}}",
]


class Step(NamedTuple):
    """One call, and the arguments of Recorder.write that belong to it."""

    trace: Any
    options: dict[str, Any]


def reading(cfg: FwPKMConfig = CFG, sizes: tuple[int, ...] = (5, 7, 20, 1), be: Any = reference) -> Iterator[Step]:
    """The calls of a reading; the last one is a flush."""
    rng = np.random.default_rng(0)
    state = be.init_state(cfg, be.init_memory(cfg), 2)
    count = 0
    for size in sizes:
        query = rng.normal(size=(2, size, cfg.num_heads * cfg.key_dim)).astype("f4")
        value, gate = rng.normal(size=(2, size, cfg.value_dim)).astype("f4"), rng.random((2, size)).astype("f4")
        mask = np.ones((2, size), bool)
        mask[1, :2] = False
        if size > 10:
            query[0, 3] = np.nan
        arrays = [be.asarray(x, "float32") for x in (query, value, gate)]
        _, after, trace = be.apply(cfg, state, *arrays, mask=be.asarray(mask, "bool"))
        words = [[f"{name}{count + t} " for t in range(size)] for name in "ab"]
        for t, word in enumerate(HOSTILE if size > 10 else ()):
            words[0][5 + t] = word
        count += size
        yield Step(LayerTrace(*trace, gate=arrays[2]), {"before": state, "after": after, "text": words})
        state = after
    flushed, trace = be.flush(cfg, state)
    yield Step(trace, {"before": state, "after": flushed})


def record(path: Path, cfg: FwPKMConfig = CFG, **options: Any) -> list[Step]:
    """Record a reading."""
    steps = list(reading(cfg, **options))
    with Recorder(path, cfg) as recorder:
        for step in steps:
            recorder.write(step.trace, **step.options)
    return steps


def changed_slots(cfg: FwPKMConfig, steps: list[Step], memory: int) -> set[int]:
    """The slots whose rows differ from the initial memory at the end, by their bits."""
    be = fwpkm.registry.backend_of(steps[-1].options["after"].memory.values)
    first, last = (
        be.to_numpy(steps[i].options[name].memory.values)[memory] for i, name in ((0, "before"), (-1, "after"))
    )
    return set(np.flatnonzero((first.view("u4") != last.view("u4")).any(-1)).tolist())
