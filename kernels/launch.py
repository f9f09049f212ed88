"""Launching a kernel many times: Triton looks at every argument of every launch, which costs more than a small kernel."""

from typing import Any

import torch

_COMPILED: dict[tuple, Any] = {}


class Launch:
    """A kernel with its tensors and compile-time arguments, to be launched with integers that are not specialized.

    What Triton compiles depends on each tensor's dtype and alignment and on the constants. So these are looked at once
    for all launches, and what was compiled for them is launched again directly.
    """

    def __init__(self, kernel: Any, *tensors: torch.Tensor | None, **constants: Any) -> None:
        self.kernel, self.tensors, self.constants = kernel, tensors, constants
        kinds = tuple(x if x is None else (x.dtype, x.data_ptr() % 16, x.device) for x in tensors)
        self.key = (id(kernel), kinds, *constants.items())
        self.known = _COMPILED.get(self.key)

    def __call__(self, grid: tuple[int, ...], *integers: int) -> None:
        if self.known is not None:
            compiled, values = self.known
            compiled[(*grid, 1, 1)[:3]](*self.tensors, *integers, *values)
            return
        compiled = self.kernel[grid](*self.tensors, *integers, **self.constants)
        if compiled is not None:  # the interpreter compiles nothing
            names = self.kernel.arg_names[len(self.tensors) + len(integers) :]
            self.known = _COMPILED[self.key] = compiled, [self.constants[name] for name in names]
