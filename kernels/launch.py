"""Launching a kernel many times: Triton looks at every argument each time, which costs more than a small kernel."""

from typing import Any

import torch

_COMPILED: dict[tuple, Any] = {}


class Launch:
    """A kernel with its tensors and compile-time arguments, to be launched with integers that are not specialized.

    What Triton compiles depends on the device, each tensor's dtype and alignment, and the constants. So these are
    looked at once, at the first launch, and what was compiled for them is launched again directly, with bare addresses.
    """

    def __init__(self, kernel: Any, *tensors: torch.Tensor | None, **constants: Any) -> None:
        """Nothing is looked at yet."""
        self.kernel, self.tensors, self.constants = kernel, tensors, constants
        self.ready: tuple | None = None

    def __call__(self, grid: tuple[int, ...], *integers: int) -> None:
        """Launch; the current device must be the tensors'."""
        if self.ready is None:
            addresses = [None if x is None else x.data_ptr() for x in self.tensors]
            kinds = [None if x is None else (x.dtype, x.data_ptr() % 16) for x in self.tensors]
            device = next(x.device for x in self.tensors if x is not None)
            key = (id(self.kernel), device, *kinds, *self.constants.values())
            if key not in _COMPILED:
                compiled = self.kernel[grid](*self.tensors, *integers, **self.constants)
                if compiled is not None:  # the interpreter compiles nothing
                    names = self.kernel.arg_names[len(self.tensors) + len(integers) :]
                    _COMPILED[key] = compiled, [self.constants[name] for name in names]
                return
            compiled, values = _COMPILED[key]
            no_hooks = (None, None, None)
            head = compiled.function, compiled.packed_metadata, *no_hooks, *addresses
            self.ready = compiled.run, device.index, head, values
        run, index, head, values = self.ready
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, torch._C._cuda_getCurrentRawStream(index), *head, *integers, *values)
