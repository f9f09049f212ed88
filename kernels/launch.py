"""Launching a kernel many times: Triton looks at every argument of every launch, which costs more than a small kernel."""

from typing import Any

import torch

_COMPILED: dict[tuple, Any] = {}


class Launch:
    """A kernel with its tensors and compile-time arguments, to be launched with integers that are not specialized.

    What Triton compiles depends on the device, each tensor's dtype and alignment, and the constants. So these are
    looked at once for all launches, and what was compiled for them is launched again directly, with bare addresses.
    The tensors must outlive the launches.
    """

    def __init__(self, kernel: Any, *tensors: torch.Tensor | None, **constants: Any) -> None:
        self.kernel, self.tensors, self.constants = kernel, tensors, constants
        self.addresses = [None if x is None else x.data_ptr() for x in tensors]
        kinds = [None if at is None else (x.dtype, at % 16) for x, at in zip(tensors, self.addresses)]
        device = next(x.device for x in tensors if x is not None)
        self.key = (id(kernel), device, *kinds, *constants.values())
        self.known = _COMPILED.get(self.key)

    def __call__(self, grid: tuple[int, ...], *integers: int) -> None:
        """Launch; the current device must be the tensors'."""
        if self.known is not None:
            compiled, values = self.known
            compiled[(*grid, 1, 1)[:3]](*self.addresses, *integers, *values)
            return
        compiled = self.kernel[grid](*self.tensors, *integers, **self.constants)
        if compiled is not None:  # the interpreter compiles nothing
            names = self.kernel.arg_names[len(self.tensors) + len(integers) :]
            self.known = _COMPILED[self.key] = compiled, [self.constants[name] for name in names]
