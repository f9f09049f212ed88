"""Configurations that no implementation knows, and calls that must refuse them: for every backend and the kernels."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import fwpkm
from fwpkm import config

BASE = {"key_dim": 16, "value_dim": 16, "num_subkeys": 4, "top_k": 2, "chunk_size": 4}
CHOICES = tuple(config.CHOICES)


@dataclasses.dataclass(frozen=True)
class WiderConfig(fwpkm.FwPKMConfig):
    """A configuration with a field that nobody implements."""

    forget: float = 0.0


def of_unknown_value(monkeypatch: pytest.MonkeyPatch, field: str) -> fwpkm.FwPKMConfig:
    """A configuration whose ``field`` holds a value that was added to the list of choices alone."""
    monkeypatch.setitem(config.CHOICES, field, (*config.CHOICES[field], "novel"))
    return fwpkm.FwPKMConfig(**BASE, **{field: "novel"})


def calls(be: Any, cfg: fwpkm.FwPKMConfig, **options: Any) -> dict[str, Any]:
    """A call of each function that computes, by name, with tables and a state of an ordinary configuration."""
    plain = fwpkm.FwPKMConfig(**BASE)
    memory = be.init_memory(plain)
    state = be.init_state(plain, memory, 1)
    query, value = (be.asarray(np.ones((1, 9, 16)), "float32") for _ in range(2))
    pending = be.apply(plain, state, query[:, :3], value[:, :3])[1]
    packed = be.pack(plain, state, memory)
    rows = {
        "reset": lambda: be.reset(cfg, state, memory),
        "select": lambda: be.select(cfg, state, [0]),
        "concat": lambda: be.concat(cfg, [state]),
        "put": lambda: be.put(cfg, state, [0], state),
        "pending": lambda: be.pending(cfg, state),
        "pack": lambda: be.pack(cfg, state, memory),
        "unpack": lambda: be.unpack(cfg, packed, memory),
    }
    return {
        **({} if options else rows),
        "init_state": lambda: be.init_state(cfg, memory, 1),
        "apply": lambda: be.apply(cfg, state, query, value, **options),
        "flush": lambda: be.flush(cfg, pending, **options),
        "lookup": lambda: be.lookup(cfg, memory, query, **options),
        "chunk_update": lambda: be.chunk_update(cfg, memory, query, value, **options),
    }


CONCERNED = {
    "score": ("apply", "flush", "lookup", "chunk_update"),
    "write_scale": ("apply", "flush", "chunk_update"),
    "boundary": ("apply", "flush", "pending", "pack", "unpack"),
    "memory_scope": (
        *("init_state", "apply", "flush", "lookup", "chunk_update", "reset", "select", "concat", "put"),
        *("pack", "unpack"),
    ),
}
"""The functions whose results a choice may change."""


def check_unknown_values(be: Any, monkeypatch: pytest.MonkeyPatch, field: str, **options: Any) -> None:
    """Every function that a choice concerns refuses a value that nobody implements, by the field's name."""
    cfg = of_unknown_value(monkeypatch, field)
    found = calls(be, cfg, **options)
    for name in found.keys() & CONCERNED[field]:
        with pytest.raises(ValueError, match=rf"{field}.*novel"):
            found[name]()


def check_unknown_fields(be: Any, **options: Any) -> None:
    """Every function refuses a field that is unknown to it and off its default, and takes one at its default."""
    for call in calls(be, WiderConfig(**BASE), **options).values():
        call()
    for call in calls(be, WiderConfig(**BASE, forget=0.5), **options).values():
        with pytest.raises(ValueError, match=r"forget.*0\.5"):
            call()
