"""What ranks that hold columns of one table tell each other before a call, so that all make it, or all raise.

Ranks that made different calls would wait for each other until the process group's timeout, or mix what is not of one
table. So each call begins with one gather of a few numbers, for which the host waits.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fwpkm.backends.torch.column_parallel import Columns

_REFUSED, _CALL, _FIRST_TENSOR = 0, 1, 2
_LENGTH = _FIRST_TENSOR + 8
_ALIKE = 1e-3
"""How much a number that sums a tensor up may differ between ranks, of its norm: sums in another order may, other
tokens differ by about 1."""


@contextlib.contextmanager
def agreed(call: str, memory: Any, *settings: Any, **tensors: Any) -> Iterator[None]:
    """Check the arguments of a call in the block; with a table in columns, leave it on all ranks or raise on all.

    Args:
        call: its name.
        memory: the tables.
        settings: what else must be equal on all ranks.
        tensors: what must be the same on all ranks, by name; None where there is none.

    Raises:
        ValueError: ranks make different calls, or read different tokens.
        RuntimeError: another rank refused its arguments, or did not come within the process group's timeout.
    """
    columns = Columns.of(getattr(memory, "values", None))
    if columns is None:
        yield
        return
    tensors = {"keys": memory.keys, **tensors}
    with together(call, columns) as (own, heard):
        yield
        described = {name: _description(x) for name, x in tensors.items()}
        own[_CALL] = float(zlib.crc32(repr((call, settings, columns.whole.shape, described)).encode()))
        for i, x in enumerate(tensors.values(), _FIRST_TENSOR):
            own[i] = _sum(x) if x is not None and x.is_floating_point() else 0.0
    _refuse_other_calls(call, columns, heard, described)
    for i, name in enumerate(tensors, _FIRST_TENSOR):
        _refuse_other_tokens(name, [numbers[i] for numbers in heard])


@contextlib.contextmanager
def together(call: str, columns: Columns) -> Iterator[tuple[list[float], list[list[float]]]]:
    """Run the block on all ranks of a table; where it raises on one, raise on all.

    Yields:
        the numbers that this rank tells the others, for the block to fill, and a list that then holds those of each.

    Raises:
        RuntimeError: the block raised on another rank, or a rank did not come within the process group's timeout.
    """
    heard: list[list[float]] = []
    with _telling(columns):
        own = [0.0] * _LENGTH
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
        _gathered(columns, [1.0, *[0.0] * (_LENGTH - 1)])
        raise


def _gathered(columns: Columns, own: list[float]) -> list[list[float]]:
    """Every rank's numbers."""
    message = torch.tensor(own, dtype=torch.float64, device=columns.table.device)
    try:
        heard = columns.of_each(message)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {columns.rank} of the {columns.size} that hold a table's columns did not hear from all others: one "
            "is gone, or did not make this call within the process group's timeout (timeout= of init_process_group). "
            f"Look for the first error among the ranks. Received: {error}"
        ) from error
    return torch.stack(heard).tolist()


def _description(x: Tensor | None) -> Any:
    """What of a tensor must be equal: all of what counts or chooses, the form of other numbers."""
    if x is None:
        return None
    form = tuple(x.shape), str(x.dtype)
    return form if x.is_floating_point() else (*form, zlib.crc32(x.detach().cpu().contiguous().numpy().tobytes()))


@torch.no_grad()
def _sum(x: Tensor) -> float:
    """The part of a tensor in a fixed direction, of its norm: equal for equal tensors, of other ones another."""
    x = x.flatten().to(torch.float64 if x.dtype == torch.float64 else torch.float32).nan_to_num(0, 0, 0)
    direction = torch.arange(len(x), device=x.device, dtype=x.dtype).mul_(0.7).cos_()
    return (x.dot(direction) / x.norm().clamp(min=1e-30)).item()


def _refuse_other_calls(call: str, columns: Columns, heard: list[list[float]], described: Any) -> None:
    others = [rank for rank, numbers in enumerate(heard) if numbers[_CALL] != heard[columns.rank][_CALL]]
    if others:
        raise ValueError(
            "every rank must make the same call with a table in columns: the same function and settings, tensors of "
            f"the same shapes and dtypes, the same masks and positions. Received: another call on ranks {others} than "
            f"on rank {columns.rank}, {call} with (shapes, dtypes) {described}"
        )


def _refuse_other_tokens(name: str, numbers: list[float]) -> None:
    differing = [rank for rank, number in enumerate(numbers) if abs(number - numbers[0]) > _ALIKE]
    if differing:
        raise ValueError(
            f"{name} must be the same on all ranks that hold columns of a table: each reads all tokens, and a part of "
            "every row. Deal a batch to ranks by another dimension of the mesh, and begin layers from one seed. "
            f"Received: {name} on ranks {differing} unlike that on rank 0"
        )
