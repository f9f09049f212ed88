"""What a token brings to the memory: its fields, stated once for calls, states and every backend (SPEC.md §1, §5).

A new per-token scalar is one line of ``TOKEN_FIELDS`` and one field of ``Tokens`` here, and one of ``State`` in
containers.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeAlias

from fwpkm.config import FwPKMConfig

Array: TypeAlias = Any  # numpy.ndarray, torch.Tensor, jax.Array, ...: each backend uses its own
Axis: TypeAlias = tuple[str, int | None]


class ArraySpec(NamedTuple):
    """What an array must be."""

    axes: tuple[Axis, ...]
    """The name and size of each; None is any size."""
    kind: str
    """"float", "bool" or "int32"."""

    @property
    def shape(self) -> tuple[Any, ...]:
        """The sizes of its axes."""
        return tuple(size for _, size in self.axes)


class TokenField(NamedTuple):
    """One thing that a token brings."""

    name: str
    kind: str
    """"float", in the tables' dtype once it is stored, or "bool"."""
    width: Callable[[FwPKMConfig], Axis] | None
    """The axis behind batch and time, or None for a scalar."""
    default: float | bool | None
    """What None stands for in a call; None where the caller must give it."""


TOKEN_FIELDS = (
    TokenField("query", "float", lambda cfg: ("H*Dk", cfg.num_heads * cfg.key_dim), None),
    TokenField("value", "float", lambda cfg: ("Dv", cfg.value_dim), None),
    TokenField("gate", "float", None, 1.0),
    TokenField("mask", "bool", None, True),
    TokenField("forget", "float", None, 0.0),
)
"""In the order of ``Tokens``, and of ``State``'s pending fields."""
NUMBERS = tuple(field.name for field in TOKEN_FIELDS if field.kind == "float")
"""What of a token has a gradient."""
SCALARS = tuple(field.name for field in TOKEN_FIELDS if field.kind == "float" and field.width is None)
"""Those that are one number of each token."""


class Tokens(NamedTuple):
    """n tokens of B sequences. A field that may be left out is None in a call and an array everywhere else."""

    query: Array
    """``[B, n, H*Dk]``: head by head, each head's two halves one after the other."""
    value: Array
    """``[B, n, Dv]``: what a token offers as a target."""
    gate: Array = None
    """``[B, n]`` in [0, 1]; None is 1."""
    mask: Array = None
    """``[B, n]`` bool, False for tokens that are not there; None is True."""
    forget: Array = None
    """``[B, n]`` in [0, 1]: f, what a write takes from the rows that the token read; None is 0."""

    @property
    def length(self) -> int:
        """n."""
        return self.query.shape[1]

    def present(self) -> dict[str, Array]:
        """The fields that are not None by name, as the arguments of a call."""
        return {name: x for name, x in self._asdict().items() if x is not None}

    def map(self, function: Callable[[Array], Array]) -> Self:
        """The tokens with every field changed alike; a field that is None stays so."""
        return type(self)(*(None if x is None else function(x) for x in self))

    def slice(self, start: Any, stop: Any) -> Self:
        """Tokens start to stop of every row."""
        return self.map(lambda x: x[:, start:stop])


def token_specs(cfg: FwPKMConfig, batch: int | None, time: Axis) -> Tokens:
    """What the fields of these tokens must be, as ``ArraySpec``; ``time`` names and sizes their axis."""

    def spec(field: TokenField) -> ArraySpec:
        width = () if field.width is None else (field.width(cfg),)
        return ArraySpec((("B", batch), time, *width), field.kind)

    return Tokens(*map(spec, TOKEN_FIELDS))
