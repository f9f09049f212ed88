"""Memory for what a call computes: tensors side by side in one allocation, since each costs as much as a launch."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype] | None]
"""Shapes and dtypes by name; None of what is absent."""
_ALIGNMENT = 256
"""Bytes, as of an allocation."""


class Place(NamedTuple):
    """A tensor in a room, from byte ``offset`` on."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What a room holds, and its bytes. Each is made once and equal to itself alone, so that it is a quick key."""

    places: dict[str, Place | None]
    size: int

    @classmethod
    def of(cls, specs: Specs) -> "Layout":
        """One after the other."""
        places: dict[str, Place | None] = {}
        at = 0
        for name, spec in specs.items():
            places[name] = place = None if spec is None else Place(at, *spec)
            at += 0 if place is None else -(-place.bytes // _ALIGNMENT) * _ALIGNMENT
        return cls(places, at)

    def place(self, name: str) -> Place:
        """That of a tensor which is there."""
        place = self.places[name]
        assert place is not None, name
        return place


class Room:
    """A buffer of bytes, and what of it is what."""

    __slots__ = ("buffer", "layout")

    def __init__(self, layout: Layout, buffer: Tensor) -> None:
        """``buffer`` has ``layout.size`` bytes."""
        self.layout, self.buffer = layout, buffer

    @classmethod
    def empty(cls, layout: Layout, like: Tensor) -> "Room":
        """With no contents yet, where ``like`` is."""
        return cls(layout, like.new_empty(layout.size, dtype=torch.uint8))

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of it."""
        place = self.layout.place(name)
        return self.buffer[place.offset : place.offset + place.bytes].view(place.dtype).view(place.shape)
