"""Launches listed once and made often: Triton looks at every argument each time, which costs more than a kernel.

The list needs no framework; ``run`` is torch's way to make the launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from triton.runtime import JITFunction

from fwpkm.kernels.runtime.interpreting import keep_truths
from fwpkm.kernels.runtime.workspace import Layout, TensorSpec, Workspace

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_COMPILED: dict[tuple, Any] = {}
_INPUT, _ABSENT = -1, -2
"""Instead of the number of a workspace."""
_OPTIONS = {"num_warps", "num_stages"}
"""Constants that are no parameters of a kernel, but say how it is compiled."""


@triton.jit
def nothing():
    """A kernel without parameters."""


INTERPRETED = not any(isinstance(kernel, JITFunction) for kernel in (nothing, tl.cdiv))
"""Whether Triton's interpreter runs the kernels; tl.cdiv is one of its own, for which it was decided earlier."""
if INTERPRETED:
    keep_truths()


class Bound(NamedTuple):
    """A kernel whose parameters have been looked up by their names."""

    kernel: Any
    tensors: tuple[int, ...]
    """By parameter, the tensor's number among the list's."""
    integers: tuple[str, ...]
    """The parameters that each launch sets."""
    constants: dict[str, Any]


class Launches:
    """Launches of kernels in their order, with tensors that are named, and integers that are not specialized.

    What Triton compiles depends on the device, each tensor's dtype and alignment, and the constants. So what was
    compiled for tensors of one kind is launched again directly, with bare addresses.
    """

    def __init__(self, *layouts: Layout, inputs: Iterable[str] = ()) -> None:
        """None yet.

        Args:
            layouts: of the workspaces that hold tensors.
            inputs: the names of tensors that ``run`` receives one by one.
        """
        self.layouts, self.inputs = layouts, frozenset(inputs)
        self.names: dict[str, int] = {}
        self.sources: list[tuple[str, int, int]] = []
        """By tensor: its name, and a workspace with an offset, or where else it is."""
        self.kernels: list[Bound] = []
        self.launches: list[tuple[int, tuple[int, int, int], tuple[int, ...]]] = []
        self._ready: dict[tuple, tuple[Any, list[tuple]]] = {}
        self._bound: dict[tuple, int] = {}

    def add(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        integers: Mapping[str, int],
        constants: Mapping[str, Any],
        **buffers: str,
    ) -> None:
        """Add a launch. Each parameter is bound by its name: to a constant, an integer, or the tensor of that name.

        Args:
            kernel: takes tensors first, then integers, then constants.
            grid: up to three numbers of programs.
            integers: by name; may hold more than the kernel asks for.
            constants: compile-time arguments and options, all of them the kernel's.
            buffers: by parameter, a tensor of another name.

        Raises:
            TypeError: a parameter has no tensor, or what is passed has no parameter; names both.
        """
        key = id(kernel), *constants.items(), *buffers.items()
        if key not in self._bound:
            self._bound[key] = len(self.kernels)
            self.kernels.append(self._bind(kernel, integers, dict(constants), buffers))
        number = self._bound[key]
        x, y, z = (*grid, 1, 1)[:3]
        self.launches.append((number, (x, y, z), tuple([integers[name] for name in self.kernels[number].integers])))

    def spec(self, name: str) -> TensorSpec:
        """Where a tensor lies in its workspace."""
        return next(layout.spec(name) for layout in self.layouts if name in layout.tensors)

    def _bind(
        self, kernel: Any, integers: Mapping[str, int], constants: dict[str, Any], buffers: Mapping[str, str]
    ) -> Bound:
        names = list(kernel.arg_names)
        if unknown := (constants.keys() - _OPTIONS | buffers.keys()) - set(names):
            raise TypeError(f"{kernel.__name__} has no parameter {', '.join(sorted(unknown))}")
        tensors = [name for name in names if name not in constants and name not in integers]
        numbers = [name for name in names if name not in constants and name in integers]
        if names != [*tensors, *numbers, *(name for name in names if name in constants)]:
            raise TypeError(f"{kernel.__name__} must take tensors, then integers, then constants. Received: {names}")
        indices = [self._index(kernel, name, buffers.get(name, name)) for name in tensors]
        return Bound(kernel, tuple(indices), tuple(numbers), constants)

    def _index(self, kernel: Any, parameter: str, name: str) -> int:
        """The number of a tensor, of which it is noted where its address will come from."""
        if name not in self.names:
            owners = [i for i, layout in enumerate(self.layouts) if name in layout.tensors]
            if len(owners) + (name in self.inputs) != 1:
                where = "in two of them" if owners else "in none"
                raise TypeError(
                    f"{kernel.__name__}({parameter}=...): {name} must be in one layout or input, is {where}"
                )
            spec = self.layouts[owners[0]].tensors[name] if owners else None
            if spec is not None:
                self.sources.append((name, owners[0], spec.offset))
            else:
                self.sources.append((name, _ABSENT if owners else _INPUT, 0))
            self.names[name] = len(self.names)
        return self.names[name]

    def run(self, inputs: Mapping[str, Tensor | None], *workspaces: Workspace) -> None:
        """Launch all on the current stream; the current device must be the tensors'.

        Args:
            inputs: all that are in no layout; one that is absent is None.
            workspaces: of the layouts.
        """
        device = next(x.device for x in (*(w.buffer for w in workspaces), *inputs.values()) if x is not None)
        bases = [workspace.buffer.data_ptr() for workspace in workspaces]
        addresses: list[int | None] = []
        signature: list[Any] = [device, *(base % 16 for base in bases)]
        for name, owner, offset in self.sources:
            if owner >= 0:
                addresses.append(bases[owner] + offset)
            elif owner == _ABSENT:
                addresses.append(None)
            elif (x := inputs[name]) is None:
                addresses.append(None)
                signature.append(None)
            else:
                addresses.append(x.data_ptr())
                signature += x.dtype, addresses[-1] % 16  # type: ignore[operator]
        key = tuple(signature)
        if key not in self._ready:
            tensors = self.tensors(inputs, *workspaces)
            if not isinstance(self.kernels[0].kernel, JITFunction):  # the interpreter compiles nothing
                return self.interpret(tensors)
            import torch

            compiled = [self._compiled(number, tensors, device) for number in range(len(self.kernels))]
            self._ready[key] = torch._C._cuda_getCurrentRawStream, compiled
        stream_of, compiled = self._ready[key]
        stream = stream_of(device.index)
        bound = [
            (run, (stream, *function, *[addresses[i] for i in indices]), constants)
            for (run, function, constants), (_, indices, _, _) in zip(compiled, self.kernels)
        ]
        for number, grid, integers in self.launches:
            run, head, constants = bound[number]
            run(*grid, *head, *integers, *constants)

    def tensors(self, inputs: Mapping[str, Tensor | None], *workspaces: Workspace) -> list[Tensor | None]:
        """All that are named, by number; arguments as of ``run``."""
        absent = {_ABSENT: lambda name: None, _INPUT: inputs.__getitem__}
        return [workspaces[i][name] if i >= 0 else absent[i](name) for name, i, _ in self.sources]

    def _compiled(self, number: int, all_tensors: list[Tensor | None], device: torch.device) -> tuple:
        """Of a kernel: what launches it, what it wants before the tensors, and what after the integers."""
        kernel, indices, _, constants = self.kernels[number]
        tensors = [all_tensors[i] for i in indices]
        signature = (None if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors)
        key = (id(kernel), device, *signature, *constants.items())
        if key not in _COMPILED:
            grid, integers = next(launch[1:] for launch in self.launches if launch[0] == number)
            compiled = kernel.warmup(*tensors, *integers, grid=grid, **constants)
            values = [constants[name] for name in kernel.arg_names if name in constants]
            no_hooks = None, None, None
            _COMPILED[key] = compiled.run, (compiled.function, compiled.packed_metadata, *no_hooks), values
        return _COMPILED[key]

    def interpret(self, tensors: list[Tensor | None]) -> None:
        """Make all launches in Triton's interpreter; the tensors by number."""
        for number, grid, integers in self.launches:
            kernel, indices, _, constants = self.kernels[number]
            kernel[grid](*(tensors[i] for i in indices), *integers, **constants)
