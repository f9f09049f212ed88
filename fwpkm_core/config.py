"""The configuration of a memory (SPEC.md §1 and §8)."""

import dataclasses
import decimal
import difflib
import functools
import json
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Self

import numpy as np

CHOICES = {
    "boundary": ("drop", "wait"),
    "score": ("idw", "dot_product"),
    "write_scale": ("slots", "unit", "normalized"),
    "memory_scope": ("sequence", "batch"),
}
"""The values of the fields that name a rule. Whatever computes by one names every value and refuses any other."""
_POSITIVE_INTEGERS = ("key_dim", "value_dim", "num_heads", "num_subkeys", "top_k", "chunk_size")
_POSITIVE_NUMBERS = ("score_eps", "temperature", "grad_clip")
_NON_NEGATIVE_NUMBERS = (
    "learning_rate", "weight_decay", "addressing_weight", "usage_weight", "initial_decay", "recent_penalty"
)  # fmt: skip


def check_arguments(taker: str, received: Iterable[str], known: Sequence[str]) -> None:
    """Raise unless all of the names are known.

    Raises:
        TypeError: for the first that is not; names the one that was probably meant, or else all that are known.
    """
    for name in received:
        if name not in known:
            meant = difflib.get_close_matches(name, known, 1)
            advice = f"Did you mean {meant[0]}?" if meant else f"It takes {', '.join(known)}."
            raise TypeError(f"{taker} takes no argument {name!r}. {advice}")


class _Text:
    """Holds a configuration's text outside ``vars``, which are its fields."""

    __slots__ = ("_json",)
    _json: str


@dataclasses.dataclass(frozen=True)
class FwPKMConfig(_Text):
    """Every choice that changes what a memory computes; the same in all backends.

    Attributes:
        key_dim: Dk, width of a head's query; even, since each half meets one codebook.
        value_dim: Dv, width of a value row.
        num_heads: H, read heads; all read the one value table.
        num_subkeys: S, sub-keys per codebook; the table has N = S·S slots.
        top_k: k, slots that a head reads for a token, 1 ≤ k ≤ S.
        chunk_size: C, tokens per write.
        lookahead: L, a query at t is bound to the value at t + L, 0 ≤ L < C.
        boundary: "drop" writes a chunk at its end; "wait" reads L more tokens first, so that no pair is lost (§5).
        score: "idw" (inverse distance) or "dot_product" (§2).
        score_eps: ε of the idw score.
        temperature: divides the selected sums before the softmax (§2).
        learning_rate: η, the step of a write (§4).
        write_scale: κ: "slots" (H·k), "unit" (1) or "normalized" (1 / Σ w²) (§4).
        weight_decay: λ (§4).
        grad_clip: elementwise bound on the gradients of a write, or None (§4).
        addressing_weight: α, weight of the addressing loss (§4).
        memory_scope: "sequence" gives each row of a batch its own tables, "batch" one table to all (§1).
        usage_weight: β: a slot that earlier chunks have used much takes smaller steps; 0 is the plain rule (§4).
        initial_decay: by how much of what it differs from its initial row a written row goes back, times η.
        recent_penalty: γ: sub-scores less γ log(1 + V), V the uses of a sub-key, halved after each chunk; only "idw".

    Raises:
        ValueError: a field breaks its rule; names the field, the rule and the value.

    A sequence-scope memory costs 4·S²·Dv bytes a row: 16 MiB by default.
    """

    key_dim: int = 256
    value_dim: int = 256
    num_heads: int = 1
    num_subkeys: int = 128
    top_k: int = 8
    chunk_size: int = 512
    lookahead: int = 1
    boundary: str = "drop"
    score: str = "idw"
    score_eps: float = 1e-3
    temperature: float = 1.0
    learning_rate: float = 1.0
    write_scale: str = "slots"
    weight_decay: float = 0.0
    grad_clip: float | None = None
    addressing_weight: float = 1.0
    memory_scope: str = "sequence"
    usage_weight: float = 0.0
    initial_decay: float = 0.0
    recent_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Check every field and store plain ints and floats, so that configs compare and serialise alike."""
        for name in _POSITIVE_INTEGERS:
            self._integer(name, minimum=1)
        self._integer("lookahead", minimum=0)
        for name in _POSITIVE_NUMBERS:
            if name != "grad_clip" or self.grad_clip is not None:
                self._number(name, positive=True)
        for name in _NON_NEGATIVE_NUMBERS:
            self._number(name, positive=False)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}. Received: {name}={value!r}")
        if self.key_dim % 2:
            raise ValueError(
                f"key_dim must be even, because each half of a query meets one codebook. "
                f"Received: key_dim={self.key_dim}"
            )
        if self.top_k > self.num_subkeys:
            raise ValueError(
                f"top_k must be at most num_subkeys. Received: top_k={self.top_k}, num_subkeys={self.num_subkeys}"
            )
        if self.recent_penalty and self.score != "idw":
            raise ValueError(
                f"recent_penalty must be 0 where the score is not 'idw'. Received: "
                f"recent_penalty={self.recent_penalty!r}, score={self.score!r}"
            )
        if self.lookahead >= self.chunk_size:
            raise ValueError(
                f"lookahead must be less than chunk_size. "
                f"Received: lookahead={self.lookahead}, chunk_size={self.chunk_size}"
            )
        # Made once, so that compilers that trace a caller find one constant string.
        object.__setattr__(self, "_json", json.dumps(dataclasses.asdict(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made anew from the fields."""
        return type(self), dataclasses.astuple(self)

    def _integer(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, (bool, np.bool_)) or number < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}. Received: {name}={value!r}")
        object.__setattr__(self, name, number)

    def _number(self, name: str, *, positive: bool) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (numbers.Real, decimal.Decimal)) and not isinstance(value, bool)
        try:
            number = float(value) if is_number else math.nan
        except OverflowError:
            number = math.nan
        if not math.isfinite(number) or number < 0 or (positive and number == 0):
            rule = "a finite number above 0" if positive else "a finite number of at least 0"
            alternative = " or None" if name == "grad_clip" else ""
            raise ValueError(f"{name} must be {rule}{alternative}. Received: {name}={value!r}")
        object.__setattr__(self, name, number)

    @property
    def num_slots(self) -> int:
        """N = S·S."""
        return self.num_subkeys**2

    @property
    def slots_per_token(self) -> int:
        """H·k, the entries that one token reads."""
        return self.num_heads * self.top_k

    @property
    def counts(self) -> int:
        """The numbers that a state counts for each memory: N of slots (U) and 2·H·S of sub-keys (V), where on."""
        subkeys = 2 * self.num_heads * self.num_subkeys
        return self.num_slots * bool(self.usage_weight) + subkeys * bool(self.recent_penalty)

    @property
    def capacity(self) -> int:
        """P, the pending tokens that a state has space for: C + L - 1."""
        return self.chunk_size + self.lookahead - 1

    def refuse(self, field: str, implementation: str) -> NoReturn:
        """Raise for a value of ``field`` that an implementation does not know; the last branch on every choice.

        Raises:
            ValueError: always; names the field, its value and the implementation.
        """
        raise ValueError(f"{field}={getattr(self, field)!r} is not implemented by {implementation}")

    @classmethod
    def paper(cls) -> Self:
        """The layer of the paper (arXiv 2601.00671): Dk = Dv = 512, S = 512; 512 MiB of values a row."""
        return cls(key_dim=512, value_dim=512, num_subkeys=512)

    def to_json(self) -> str:
        """The fields as one JSON object, in the order of the class."""
        return self._json

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of :meth:`to_json`.

        Fields that it lacks have their defaults.

        Raises:
            ValueError: not a JSON object, an unknown field, or a field that breaks its rule.
        """
        try:
            fields: Any = json.loads(text.removeprefix("\ufeff"))
        except RecursionError:
            raise ValueError("a config must be a JSON object of plain fields. Received: one nested too deep") from None
        unknown = sorted(fields.keys() - set(FIELDS)) if isinstance(fields, dict) else fields
        if unknown or not isinstance(fields, dict):
            raise ValueError(f"a config must be a JSON object with fields among {[*FIELDS]}. Received: {unknown!r}")
        return cls(**fields)


FIELDS = tuple(field.name for field in dataclasses.fields(FwPKMConfig))
"""The names of the fields of a configuration."""


def _naming_fields(init: Any) -> Any:
    """``FwPKMConfig.__init__``, which says of an unknown field which one was probably meant."""

    @functools.wraps(init)
    def wrapped(self: FwPKMConfig, *values: Any, **fields: Any) -> None:
        check_arguments("FwPKMConfig", fields, FIELDS)
        init(self, *values, **fields)

    return wrapped


FwPKMConfig.__init__ = _naming_fields(FwPKMConfig.__init__)  # type: ignore[method-assign]
