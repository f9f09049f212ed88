"""Memory for what a call computes: tensors side by side in one allocation, since each costs as much as a launch.

A ``Layout`` needs no framework; a ``Workspace`` is torch's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Specs = Mapping[str, tuple[tuple[int, ...], str] | None]
"""Shapes and the names of dtypes by name; None of what is absent."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1}
"""The dtypes that there are, and what one number takes."""
_ALIGNMENT = 256
"""Bytes, as of an allocation."""


class TensorSpec(NamedTuple):
    """A tensor in a workspace, from byte ``offset`` on."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What a workspace holds, and its bytes. Each is made once and equal to itself alone, so that it is a quick key."""

    tensors: dict[str, TensorSpec | None]
    size: int

    @classmethod
    def of(cls, specs: Specs) -> Layout:
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


class _Dtypes(dict[str, Any]):
    """Torch's dtypes by name, imported when the first is asked for."""

    def __missing__(self, name: str) -> Any:
        import torch

        return self.setdefault(name, getattr(torch, name))


_DTYPES = _Dtypes()


class Workspace:
    """A buffer of bytes, and which of them are which tensor."""

    __slots__ = ("buffer", "layout")

    def __init__(self, layout: Layout, buffer: Tensor) -> None:
        """``buffer`` has ``layout.size`` bytes."""
        self.layout, self.buffer = layout, buffer

    @classmethod
    def empty(cls, layout: Layout, like: Tensor) -> Workspace:
        """One that nobody has written, on the device of ``like``."""
        return cls(layout, like.new_empty(layout.size, dtype=_DTYPES["uint8"]))

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of it."""
        spec = self.layout.spec(name)
        return self.buffer[spec.offset : spec.offset + spec.nbytes].view(_DTYPES[spec.dtype]).view(spec.shape)
