"""What a check of agreement found, and how results are compared: to a bound, or to the last bit."""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fwpkm.agreement import BOUNDS

_BLOCK = 2**26
"""Numbers that are compared at a time: tables can be gigabytes."""
_ALLOCATORS = {torch: ("empty", "empty_like", "empty_strided"), Tensor: ("new_empty", "new_empty_strided")}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Finding(NamedTuple):
    """One quantity of one comparison; what must be equal has a bound of 0."""

    what: str
    error: float
    bound: float

    @property
    def agrees(self) -> bool:
        """Whether the error keeps the bound; NaN does not."""
        return self.error <= self.bound

    def __str__(self) -> str:
        """One line."""
        if self.bound == 0:
            return f"{self.what}: {'equal' if self.agrees else 'DIFFERS'}"
        return f"{self.what}: {self.error:.1e} of {self.bound:.0e}" + " DISAGREES" * (not self.agrees)


class Report(NamedTuple):
    """The findings of one task, and what else it has to say."""

    findings: Sequence[Finding]
    notes: Sequence[str] = ()

    @property
    def agrees(self) -> bool:
        """Whether there is anything, and all of it agrees."""
        return bool(self.findings) and all(finding.agrees for finding in self.findings)


def worst(findings: Iterable[Finding]) -> Finding | None:
    """The finding nearest to its bound, or farthest beyond it."""
    return max(findings, key=lambda x: (not x.agrees, x.error / (x.bound or 1)), default=None)


def equal(what: str, same: bool) -> Finding:
    """Of something that is equal or not."""
    return Finding(what, 0.0 if same else math.inf, 0.0)


def error(actual: Tensor, expected: Tensor) -> float:
    """:func:`fwpkm.agreement.relative_error` on the device; infinite where anything is not finite."""
    if actual.shape != expected.shape:
        return math.inf
    off = size = 0.0
    for a, b in zip(actual.reshape(-1).split(_BLOCK), expected.reshape(-1).split(_BLOCK)):
        off += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    if not (math.isfinite(off) and math.isfinite(size)):
        return math.inf
    return math.sqrt(off) if size < 1e-12 else math.sqrt(off / size)


def compared(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[Finding]:
    """Every quantity by name, at the bounds of float32, of what the kernels store in another dtype at that dtype's.

    What is no floating number must be equal.
    """
    findings = []
    for name, x in expected.items():
        stored = name in ("output", "grad query", "grad value", "grad gate")
        bounds = BOUNDS[str(actual[name].dtype).removeprefix("torch.") if stored else "float32"]
        if x.is_floating_point():
            bound = bounds.gradient if name.startswith("grad ") else bounds.forward
            findings.append(Finding(name, error(actual[name], x), bound))
        else:
            findings.append(equal(name, torch.equal(actual[name].to(x.device), x)))
    return findings


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors and arrays in dicts and tuples."""
    if isinstance(tree, dict | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(part)
    elif isinstance(tree, Tensor | np.ndarray | np.generic):
        yield torch.as_tensor(tree)


def bits(x: Tensor) -> Tensor:
    """A view in which NaN equal themselves."""
    return x.detach().contiguous().view(_INTEGERS[x.element_size()])


def same_bits(actual: Any, expected: Any) -> bool:
    """Whether two results are equal to the last bit, NaN included."""
    pairs = list(zip(tensors(actual), tensors(expected), strict=True))
    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs)


def digest(tree: Any) -> str:
    """A sha256 of the bits of a result."""
    total = hashlib.sha256()
    for x in tensors(tree):
        total.update(bits(x).reshape(-1).cpu().numpy())
    return total.hexdigest()


def differing_rows(actual: Tensor, expected: Tensor) -> Tensor:
    """``[rows]`` bool: rows of ``[rows, D]`` with other bits."""
    size = max(1, _BLOCK // actual.shape[1])
    return torch.cat([(a != b).any(1) for a, b in zip(bits(actual).split(size), bits(expected).split(size))])


def twice(compute: Callable[[], Any]) -> tuple[Any, Finding]:
    """A result computed in poisoned memory, and whether it comes out with the same bits again."""
    with poisoned():
        first, second = compute(), compute()
    return first, equal("the same bits twice", same_bits(first, second))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the block new tensors hold NaN, True, or the largest integer of their dtype, which is no valid index."""
    from fwpkm.kernels.runtime.workspace import Workspace

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.detach().fill_(_poison(tensor.dtype)).requires_grad_(tensor.requires_grad)

        return fill

    @functools.wraps(Workspace.empty)
    def workspace(*args: Any) -> Workspace:
        made = empty(*args)
        for name, spec in made.layout.tensors.items():
            if spec is not None:
                made[name].fill_(_poison(made[name].dtype))
        return made

    empty = Workspace.empty
    with contextlib.ExitStack() as stack:
        for owner, names in _ALLOCATORS.items():
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        stack.enter_context(mock.patch.object(Workspace, "empty", workspace))
        yield


def _poison(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max
