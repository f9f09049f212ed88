"""Launches listed once and made often: Triton looks at every argument each time, which costs more than a kernel."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from fwpkm.kernels.room import Layout, Place, Room

_COMPILED: dict[tuple, Any] = {}
_GIVEN, _ABSENT = -1, -2
"""Instead of a room."""


class Steps:
    """Launches of kernels in their order, with tensors that are named, and integers that are not specialized.

    What Triton compiles depends on the device, each tensor's dtype and alignment, and the constants. So what was
    compiled for tensors of one kind is launched again directly, with bare addresses.
    """

    def __init__(self, *layouts: Layout) -> None:
        """None yet. Names that are in ``layouts`` are those of tensors in rooms."""
        self.layouts = layouts
        self.names: dict[str, int] = {}
        self.sources: list[tuple[str, int, int]] = []
        """By number: the name, and a room with an offset, or where else the tensor is."""
        self.kernels: list[tuple[Any, list[int], dict[str, Any]]] = []
        self.launches: list[tuple[int, tuple[int, int, int], tuple[int, ...]]] = []
        self.ready: dict[tuple, list[tuple]] = {}

    def of(self, kernel: Any, *names: str, **constants: Any) -> Callable[..., None]:
        """What adds a launch of ``kernel`` on its tensors ``names`` and compile-time ``constants``.

        It takes the grid, then the kernel's integers.
        """
        number = None

        def launch(grid: tuple[int, ...], *integers: int) -> None:
            nonlocal number
            if number is None:
                number = len(self.kernels)
                self.kernels.append((kernel, [self._number(name) for name in names], constants))
            x, y, z = (*grid, 1, 1)[:3]
            self.launches.append((number, (x, y, z), integers))

        return launch

    def place(self, name: str) -> Place:
        """That of a tensor in a room."""
        return next(layout.place(name) for layout in self.layouts if name in layout.places)

    def _number(self, name: str) -> int:
        """That of a tensor, of which it is noted where its address will come from."""
        if name not in self.names:
            self.names[name] = len(self.names)
            rooms = [i for i, layout in enumerate(self.layouts) if name in layout.places]
            assert len(rooms) <= 1, f"{name} is in two layouts"
            place = self.layouts[rooms[0]].places[name] if rooms else None
            if place is not None:
                self.sources.append((name, rooms[0], place.offset))
            else:
                self.sources.append((name, _ABSENT if rooms else _GIVEN, 0))
        return self.names[name]

    def run(self, tensors: Mapping[str, Tensor | None], *rooms: Room) -> None:
        """Launch all on the current stream; the current device must be the tensors'.

        Args:
            tensors: all that are in no layout; one that is absent is None.
            rooms: of the layouts.
        """
        device = rooms[0].buffer.device
        bases = [room.buffer.data_ptr() for room in rooms]
        addresses: list[int | None] = []
        kind: list[Any] = [device, *(base % 16 for base in bases)]
        for name, room, offset in self.sources:
            if room >= 0:
                addresses.append(bases[room] + offset)
            elif room == _ABSENT:
                addresses.append(None)
            elif (x := tensors[name]) is None:
                addresses.append(None)
                kind.append(None)
            else:
                addresses.append(x.data_ptr())
                kind += x.dtype, addresses[-1] % 16  # type: ignore[operator]
        key = tuple(kind)
        if key not in self.ready:
            mine = self.tensors(tensors, *rooms)
            if not isinstance(self.kernels[0][0], JITFunction):  # the interpreter compiles nothing
                return self._interpret(mine)
            self.ready[key] = [self._compiled(number, mine, device) for number in range(len(self.kernels))]
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        bound = [
            (run, (stream, *function, *[addresses[i] for i in numbers]), values)
            for (run, function, values), (_, numbers, _) in zip(self.ready[key], self.kernels)
        ]
        for number, grid, integers in self.launches:
            run, head, values = bound[number]
            run(*grid, *head, *integers, *values)

    def tensors(self, given: Mapping[str, Tensor | None], *rooms: Room) -> list[Tensor | None]:
        """All that are named, by number; arguments as of ``run``."""
        absent = {_ABSENT: lambda name: None, _GIVEN: given.__getitem__}
        return [rooms[room][name] if room >= 0 else absent[room](name) for name, room, _ in self.sources]

    def _compiled(self, number: int, mine: list[Tensor | None], device: torch.device) -> tuple:
        """Of a kernel: what launches it, what it wants before the tensors, and what after the integers."""
        kernel, numbers, constants = self.kernels[number]
        tensors = [mine[i] for i in numbers]
        kinds = (None if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors)
        key = (id(kernel), device, *kinds, *constants.values())
        if key not in _COMPILED:
            grid, integers = next(launch[1:] for launch in self.launches if launch[0] == number)
            compiled = kernel.warmup(*tensors, *integers, grid=grid, **constants)
            values = [constants[name] for name in kernel.arg_names[len(tensors) + len(integers) :]]
            no_hooks = None, None, None
            _COMPILED[key] = compiled.run, (compiled.function, compiled.packed_metadata, *no_hooks), values
        return _COMPILED[key]

    def _interpret(self, mine: list[Tensor | None]) -> None:
        for number, grid, integers in self.launches:
            kernel, numbers, constants = self.kernels[number]
            kernel[grid](*(mine[i] for i in numbers), *integers, **constants)
