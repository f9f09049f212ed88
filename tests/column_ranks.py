"""What the cases of torch_columns.py and torch_column_files.py share: ranks, layers, and one process beside them."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from fwpkm.agreement import relative_error
from fwpkm.backends import torch as be
from fwpkm.backends.torch import FwPKM, columns

RANK, RANKS, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
SMALL = {"key_dim": 8, "value_dim": 8, "num_subkeys": 6, "top_k": 3, "chunk_size": 4}
CASES: dict[str, Callable[[], Any]] = {}


@functools.cache
def mesh() -> Any:
    """Of all ranks, once they have joined the group."""
    return init_device_mesh("cpu", (RANKS,))


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__.replace("_", " ")] = function
    return function


def draw(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sub(0.5).to(dtype)


def whole(x: Tensor) -> Tensor:
    """A tensor, or all columns of one; a gradient passes: each rank computes one loss of the whole."""
    return x.full_tensor(grad_placements=[Replicate()]) if isinstance(x, DTensor) else x


def leaves(*found: Any) -> list[Tensor]:
    """The tensors of results, tables whole; a None is left out."""
    there = [x for x in found if x is not None]
    return [y for x in there for y in (leaves(*x) if isinstance(x, (tuple, list)) else [whole(x)])]


def worst(received: list[Tensor], expected: list[Tensor]) -> float:
    errors = [relative_error(*(be.to_numpy(x.double()) for x in two)) for two in zip(received, expected, strict=True)]
    return max(errors)


def both(function: Callable[[Callable[[Any], Any]], list[Tensor]]) -> float:
    """The error of a function of how tables are dealt."""
    return worst(function(lambda x: columns.shard(x, mesh())), function(lambda x: x))


def layer_of(learn: bool = True, seed: int = 0) -> FwPKM:
    torch.manual_seed(seed)
    return FwPKM(8, **SMALL, learn_memory=learn, dtype=torch.float64)
