"""Launches that CUDA makes from arguments that lie ready, where Triton's launcher looks at every argument each time.

What a kernel takes is that of Triton's own launcher: its tensors, its integers, and two addresses of scratch memory.
"""

import ctypes
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

Launch = tuple[Any, tuple[int, int, int], Sequence[int], Sequence[int]]
"""What Triton compiled, the grid, the indices of tensors, and integers."""


class Direct:
    """A list of launches whose arguments lie in memory: each call sets the tensors' addresses alone.

    For one thread: another would change the addresses before they are read.
    """

    def __init__(self, launches: Iterable[Launch], tensors: int) -> None:
        """Of so many ``tensors``."""
        self._addresses = (ctypes.c_uint64 * tensors)()
        first = ctypes.addressof(self._addresses)
        self._nothing = ctypes.c_uint64(0)  # Triton's scratch memory, which no kernel here has
        scratch = [ctypes.addressof(self._nothing)] * 2
        self._launches, self._integers = [], []
        for compiled, grid, indices, integers in launches:
            stored = (ctypes.c_int32 * len(integers))(*integers)
            where = ctypes.addressof(stored)
            pointers = [*(first + 8 * i for i in indices), *(where + 4 * i for i in range(len(integers))), *scratch]
            block = 32 * compiled.metadata.num_warps, 1, 1
            arguments = (ctypes.c_void_p * len(pointers))(*pointers)
            self._launches.append((compiled.function, *grid, *block, compiled.metadata.shared, arguments))
            self._integers.append(stored)

    def launch(self, addresses: Sequence[int | None], part: slice, stream: int) -> None:
        """Make the launches of a part; an address is None where no kernel takes it."""
        self._addresses[:] = [address or 0 for address in addresses]
        run = driver().cuLaunchKernel
        for *head, arguments in self._launches[part]:
            if status := run(*head, stream, arguments, None):
                raise RuntimeError(f"CUDA could not launch a kernel: error {status} of cuLaunchKernel")


@functools.cache
def driver() -> Any:
    """The CUDA driver's library, or None where there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    size = ctypes.c_uint
    library.cuLaunchKernel.argtypes = ctypes.c_void_p, *[size] * 7, *[ctypes.c_void_p] * 3
    return library


def takes(compiled: Any, tensors: int, integers: int) -> bool:
    """Whether a kernel takes its tensors, its integers as int32 and two addresses of scratch memory, and no more."""
    kinds = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    entry = compiled.asm["ptx"].partition(".entry")[2].partition("{")[0]
    metadata = compiled.metadata
    plain = metadata.num_ctas == 1 and not any(
        getattr(metadata, name, 0) for name in ("launch_pdl", "launch_cooperative_grid", "global_scratch_size")
    )
    expected = all(kind.startswith("*") for kind in kinds[:tensors]) and kinds[tensors:] == ["i32"] * integers
    return plain and expected and len(re.findall(r"\.param", entry)) == tensors + integers + 2
