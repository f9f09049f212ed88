"""What ranks that hold columns of one table tell each other before a call, so that all make it, or all raise.

Ranks that made different calls would wait for each other until the process group's timeout, or mix what is not of one
table. So each call begins with one gather of a few numbers, for which the host waits.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fwpkm.backends.torch.column_parallel import Columns, is_sharded

_REFUSED, _CALL, _FIRST_TENSOR = 0, 1, 2
_NUMBERS = 3
"""That sum a tensor up (``_summary``)."""
_LENGTH = _FIRST_TENSOR + 15 * _NUMBERS
_ALIKE = 1e-3
"""How much a number that sums a tensor up may differ between ranks, of its norm: sums in another order may, other
tokens differ by about 1."""
_ODD = 0x9E3779B97F4A7C1
_EXACT = 2**53 - 1
"""The integers that float64 tells apart."""


@contextlib.contextmanager
def agreed(call: str, memory: Any, *settings: Any, layer: nn.Module | None = None, **tensors: Any) -> Iterator[None]:
    """Check the arguments of a call in the block; with a table in columns, leave it on all ranks or raise on all.

    Args:
        call: its name.
        memory: the tables.
        settings: what else must be equal on all ranks.
        layer: the module that makes the call, if one does: its weights must be the same too.
        tensors: what must be the same on all ranks, by name; None where there is none.

    Raises:
        ValueError: ranks make different calls, read different tokens, or have different weights.
        RuntimeError: another rank refused its arguments, or did not come within the process group's timeout.
    """
    columns = Columns.of(getattr(memory, "values", None))
    if columns is None:
        yield
        return
    tensors = {"keys": memory.keys, **tensors}
    with together(call, columns) as (own, heard):
        yield
        named = () if layer is None else layer.named_parameters()
        weights = [x for name, x in named if not name.startswith("memory.")]
        described = {name: _description(x) for name, x in {**tensors, "weights": weights or None}.items()}
        own[_CALL] = float(zlib.crc32(repr((call, settings, columns.whole.shape, described)).encode()))
        for i, x in enumerate(tensors.values()):
            if x is not None:
                own[_place_of(i)] = _summary(x)
        if weights:
            own[_place_of(len(tensors))] = _summary(_joined(weights))
    _refuse_other_calls(call, columns, heard, described)
    for i, name in enumerate([*tensors, "the layer's weights"]):
        _refuse_other_tokens(name, [numbers[_place_of(i)] for numbers in heard])


@contextlib.contextmanager
def together(call: str, columns: Columns) -> Iterator[tuple[Tensor, list[list[float]]]]:
    """Run the block on all ranks of a table; where it raises on one, raise on all.

    Yields:
        the numbers that this rank tells the others, for the block to fill, and a list that then holds those of each.

    Raises:
        RuntimeError: the block raised on another rank, or a rank did not come within the process group's timeout.
    """
    heard: list[list[float]] = []
    with _telling(columns):
        own = _message(columns)
        yield own, heard
    heard += _gathered(columns, own)
    refused = [rank for rank, numbers in enumerate(heard) if numbers[_REFUSED]]
    if refused:
        raise RuntimeError(
            f"{call} was given up on every rank, since it failed on one, whose own message says why. Received: "
            f"failures of ranks {refused} of the {columns.size} that hold the table's columns"
        )


def told(state: Any, check: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a check before a call of ``agreed``; where it raises, the ranks that wait there hear of it.

    ``state`` is a state, or the tables themselves. A graph of torch.compile holds the check alone.
    """
    if torch.compiler.is_compiling():
        return check(*arguments)
    columns = Columns.of(getattr(getattr(state, "memory", state), "values", None))
    if columns is None:
        return check(*arguments)
    with _telling(columns):
        return check(*arguments)


@contextlib.contextmanager
def _telling(columns: Columns) -> Iterator[None]:
    try:
        yield
    except Exception:
        message = _message(columns)
        message[_REFUSED] = 1
        _gathered(columns, message)
        raise


def _message(columns: Columns) -> Tensor:
    """What a rank tells the others, on the device, where it is written without the host's waiting."""
    return torch.zeros(_LENGTH, dtype=torch.float64, device=columns.table.device)


def _place_of(tensor: int) -> slice:
    """Of a tensor's numbers in a message."""
    first = _FIRST_TENSOR + tensor * _NUMBERS
    return slice(first, first + _NUMBERS)


@torch.no_grad()
def _gathered(columns: Columns, own: Tensor) -> list[list[float]]:
    """Every rank's numbers."""
    try:
        heard = columns.of_each(own)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {columns.rank} of the {columns.size} that hold a table's columns did not hear from all others: one "
            "is gone, or did not make this call within the process group's timeout (timeout= of init_process_group). "
            f"Look for the first error among the ranks. Received: {error}"
        ) from error
    return torch.stack(heard).tolist()


def _description(x: Any) -> Any:
    """The form of a tensor, or of several, which must be equal."""
    if isinstance(x, list):
        return [_description(y) for y in x]
    return None if x is None else (tuple(x.shape), str(x.dtype))


def _joined(weights: list[nn.Parameter]) -> Tensor:
    """All as one vector; of those that lie in shards, this rank's."""
    return torch.cat([(x.to_local() if is_sharded(x) else x).detach().flatten().float() for x in weights])


@torch.no_grad()
def _summary(x: Tensor) -> Tensor:
    """Three numbers, equal for equal tensors, of other ones others; no host waits for them.

    Of numbers: the part in a fixed direction, of the norm; how many are not finite; the norm. Of what counts or
    chooses: two sums that differ where one entry does.
    """
    if not x.is_floating_point():
        weight = torch.arange(1, x.numel() + 1, device=x.device).mul_(_ODD)
        hashed = (weight * (x.flatten().long() + 1)).sum() & _EXACT
        return torch.stack([hashed, x.sum(dtype=torch.int64), torch.zeros_like(hashed)]).double()
    finite = x.isfinite()
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).masked_fill(~finite, 0).flatten()
    direction = torch.arange(len(wide), device=x.device, dtype=wide.dtype).mul_(0.7).cos_()
    norm = torch.linalg.vector_norm(wide, dtype=torch.float64)
    part = wide.dot(direction) / norm.clamp(min=1e-30)
    return torch.stack([part, (~finite).sum().double(), norm])


def _refuse_other_calls(call: str, columns: Columns, heard: list[list[float]], described: Any) -> None:
    others = [rank for rank, numbers in enumerate(heard) if numbers[_CALL] != heard[columns.rank][_CALL]]
    if others:
        raise ValueError(
            "every rank must make the same call with a table in columns: the same function and settings, tensors of "
            f"the same shapes and dtypes. Received: another call on ranks {others} than "
            f"on rank {columns.rank}, {call} with (shapes, dtypes) {described}"
        )


def _refuse_other_tokens(name: str, numbers: list[list[float]]) -> None:
    first = numbers[0]
    bounds = [_ALIKE, _ALIKE, _ALIKE * first[-1]]
    differing = [
        rank
        for rank, own in enumerate(numbers)
        if any(abs(x - y) > z for x, y, z in zip(own, first, bounds, strict=True))
    ]
    if differing:
        raise ValueError(
            f"{name} must be the same on all ranks that hold columns of a table: each reads all tokens, and a part of "
            "every row. Deal a batch to ranks by another dimension of the mesh, and begin layers from one seed. "
            f"Received: {name} on ranks {differing} unlike that on rank 0"
        )
