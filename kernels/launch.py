"""Launching a kernel many times: Triton looks at every argument each time, which costs more than a small kernel."""

from typing import Any

import torch

_COMPILED: dict[tuple, Any] = {}


class Launch:
    """A kernel with its tensors and compile-time arguments, to be launched with integers that are not specialized.

    What Triton compiles depends on the device, each tensor's dtype and alignment, and the constants. So these are
    looked at once, at the first launch, and what was compiled for them is launched again directly, with bare addresses,
    on the stream of the first launch.
    """

    def __init__(self, kernel: Any, *tensors: torch.Tensor | None, **constants: Any) -> None:
        """Nothing is looked at yet; the first of ``tensors`` is not None."""
        self.kernel, self.tensors, self.constants = kernel, tensors, constants
        self.ready: tuple | None = None

    def __call__(self, grid: tuple[int, ...], *integers: int) -> None:
        """Launch, on grids of one length; the current device must be the tensors'."""
        if self.ready is None:
            device: Any = self.tensors[0].device  # type: ignore[union-attr]
            addresses = [None if x is None else x.data_ptr() for x in self.tensors]
            dtypes = [None if x is None else x.dtype for x in self.tensors]
            alignments = [address and address % 16 for address in addresses]
            key = (id(self.kernel), device, *dtypes, *alignments, *self.constants.values())
            found = _COMPILED.get(key)
            if found is None:
                compiled = self.kernel[grid](*self.tensors, *integers, **self.constants)
                if compiled is not None:  # the interpreter compiles nothing
                    names = self.kernel.arg_names[len(self.tensors) + len(integers) :]
                    _COMPILED[key] = compiled, [self.constants[name] for name in names]
                return
            compiled, values = found
            rest_of_grid, stream = (1,) * (3 - len(grid)), torch._C._cuda_getCurrentRawStream(device.index)
            no_hooks = (None, None, None)
            head = *rest_of_grid, stream, compiled.function, compiled.packed_metadata, *no_hooks, *addresses
            self.ready = compiled.run, head, values
        run, head, values = self.ready
        run(*grid, *head, *integers, *values)
