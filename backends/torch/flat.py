"""NamedTuples of tensors as the flat lists that autograd functions and operators of torch pass, and back."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, get_origin, get_type_hints

import torch

from fwpkm.containers import Memory, State
from fwpkm.tokens import Tokens

T = TypeVar("T", bound=tuple)
_NESTED: dict[type, dict[str, type | None]] = {}
"""By NamedTuple, the fields that are NamedTuples themselves, and None for the others."""
_TYPES = {str: "str", bool: "bool", torch.dtype: "ScalarType"}


def flat(kind: type[T]) -> type[T]:
    """Let ``unflatten`` make a NamedTuple, and those that its fields are annotated with."""
    # Not Memory[A] but Memory: graphs look a class up, and no alias of one.
    hints = {name: get_origin(hint) or hint for name, hint in get_type_hints(kind).items()}
    _NESTED[kind] = {name: hint if hasattr(hint, "_fields") else None for name, hint in hints.items()}
    for nested in _NESTED[kind].values():
        if nested is not None:
            flat(nested)
    return kind


flat(Memory)
flat(State)
flat(Tokens)


def flatten(x: Any) -> list[Any]:
    """The fields of a NamedTuple in order, and of those that it holds; of what is no tuple, itself.

    Operators take and return lists of one length: of ``()``, where a state has no uses, None.
    """
    return ([leaf for field in x for leaf in flatten(field)] or [None]) if isinstance(x, tuple) else [x]


def unflatten(kind: type[T], leaves: Iterable[Any]) -> T:
    """The inverse of ``flatten`` for a NamedTuple of this kind; takes no more leaves than it has."""
    return _filled(kind, iter(leaves))


def _filled(kind: type[T], leaves: Iterator[Any]) -> T:
    fields = [next(leaves) if nested is None else _filled(nested, leaves) for nested in _NESTED[kind].values()]
    return kind(*fields)


def schema(kind: type, mutated: str | None = None) -> str:
    """The arguments of an operator that takes ``flatten`` of a NamedTuple, in the words of torch.

    Every tensor may be None; those of the field ``mutated`` the operator overwrites.
    """
    hints = get_type_hints(kind)
    arguments: list[str] = []
    for name, nested in _NESTED[kind].items():
        of = "Tensor(a{}!)?" if name == mutated else _TYPES.get(hints[name], "Tensor?")
        arguments += [f"{of.format(len(arguments) + i)} {leaf}" for i, leaf in enumerate(_leaves(name, nested))]
    return ", ".join(arguments)


def leaf_names(kind: type) -> list[str]:
    """The name of each leaf: its field's, behind those of the fields that it lies in."""
    return [leaf for name, nested in _NESTED[kind].items() for leaf in _leaves(name, nested)]


def _leaves(name: str, nested: type | None) -> list[str]:
    return [name] if nested is None else [f"{name}_{leaf}" for leaf in leaf_names(nested)]
