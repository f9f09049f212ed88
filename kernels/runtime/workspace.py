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


class TensorSpec(NamedTuple):
    """A tensor in a workspace, from byte ``offset`` on."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What a workspace holds, and its bytes. Each is made once and equal to itself alone, so that it is a quick key."""

    tensors: dict[str, TensorSpec | None]
    size: int

    @classmethod
    def of(cls, specs: Specs) -> "Layout":
        """One tensor after the other."""
        tensors: dict[str, TensorSpec | None] = {}
        offset = 0
        for name, spec in specs.items():
            tensors[name] = tensor = None if spec is None else TensorSpec(offset, *spec)
            offset += 0 if tensor is None else -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tensors, offset)

    def spec(self, name: str) -> TensorSpec:
        """Where a tensor lies; it must not be an absent one."""
        spec = self.tensors[name]
        assert spec is not None, name
        return spec


class Workspace:
    """A buffer of bytes, and which of them are which tensor."""

    __slots__ = ("buffer", "layout")

    def __init__(self, layout: Layout, buffer: Tensor) -> None:
        """``buffer`` has ``layout.size`` bytes."""
        self.layout, self.buffer = layout, buffer

    @classmethod
    def empty(cls, layout: Layout, like: Tensor) -> "Workspace":
        """One that nobody has written, on the device of ``like``."""
        return cls(layout, like.new_empty(layout.size, dtype=torch.uint8))

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of it."""
        spec = self.layout.spec(name)
        return self.buffer[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).view(spec.shape)
