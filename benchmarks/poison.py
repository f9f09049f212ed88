"""Memory that nobody has written yet, made to show itself."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fwpkm.kernels.room import Room

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the block fresh tensors hold NaN, True, or the largest integer of their dtype, which is no valid index."""
    with contextlib.ExitStack() as stack:
        for owner, name in _ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, _filled(getattr(owner, name))))
        stack.enter_context(mock.patch.object(Room, "empty", _filled_room(Room.empty)))
        yield


def _filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.detach().fill_(_poison(tensor.dtype)).requires_grad_(tensor.requires_grad)

    return fill


def _filled_room(allocate: Callable[..., Room]) -> Callable[..., Room]:
    def fill(*args: Any) -> Room:
        room = allocate(*args)
        for name, place in room.layout.places.items():
            if place is not None:
                room[name].fill_(_poison(place.dtype))
        return room

    return fill


def _poison(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max
