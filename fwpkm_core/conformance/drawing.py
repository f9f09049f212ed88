"""What one run of ``fwpkm conform`` tries: ten shapes, and cases that differ in numbers, not in shapes.

The same seed gives the same cases, drawn from Hypothesis strategies outside a test.

A backend may compile for every configuration and every length of a call, which can take it ten seconds each. So a run
has ten configurations, each of them calls of two lengths, and six of them gradients through calls of one. The choices
on which the equations branch stand in ``STRATA``, so that every seed covers them all; sizes and real-valued fields are
drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import hypothesis
from hypothesis import strategies as st

from fwpkm.config import CHOICES, FwPKMConfig
from fwpkm.conformance.strategies import MASKING, PACKED, PADDED, UNMASKED, Case, configs, untied_case

TWISTS = ("at_keys", "repeats", "masked_row", "masked_chunk", "padded", "nonfinite")

T = TypeVar("T")

_DECAY, _CLIP = st.sampled_from([0.01, 0.1]), st.sampled_from([0.05, 0.2])
_COLUMNS = (
    *("boundary", "memory_scope", "score", "write_scale", "num_heads", "lookahead", "left_out", "layout"),
    *("grad_clip", "weight_decay", "temperature", "learning_rate", "addressing_weight", "score_eps", "usage_weight"),
)
STRATA: tuple[tuple[Any, ...], ...] = (
    ("drop", "sequence", "idw", "slots", 1, 1, (), PADDED, None, 0.0, 1.0, 1.0, 0.3, 1e-3, 0),
    ("wait", "sequence", "idw", "normalized", 2, 1, (), PADDED, None, 0.0, 0.5, 1.0, 0.3, 0.1, 0.25),
    ("drop", "batch", "dot_product", "unit", 2, 2, ("mask",), PADDED, None, _DECAY, 2.0, 1.0, 1.0, 1e-3, 1.0),
    ("wait", "batch", "idw", "slots", 1, 2, ("gate",), PADDED, _CLIP, 0.0, 1.0, 0.5, 1.0, 1e-3, 1.0),
    ("drop", "sequence", "dot_product", "normalized", 1, 0, ("mask",), PADDED, _CLIP, 0.0, 0.5, 1.0, 1.0, 1e-3, 0),
    ("wait", "sequence", "dot_product", "unit", 2, 0, ("gate", "mask"), UNMASKED, None, _DECAY, 1.0, 0.5, 1.0, 1e-3, 0),
    ("drop", "batch", "idw", "normalized", 2, 1, (), PADDED, None, _DECAY, 2.0, 1.0, 1.0, 0.1, 0.25),
    ("wait", "batch", "dot_product", "normalized", 1, 2, (), PADDED, None, 0.0, 1.0, 1.0, 1.0, 1e-3, 0),
    ("wait", "sequence", "idw", "unit", 3, 3, (), PACKED, _CLIP, _DECAY, 1.0, 1.0, 0.3, 0.1, 1.0),
    ("drop", "sequence", "idw", "unit", 2, 0, (), PADDED, None, 0.0, 1.0, 0.5, 0.3, 0.1, 0),
)
"""Ten rows under ``_COLUMNS``: each value of each choice, and the combinations in which one hides another's error."""

SINGLE = 9
"""The row whose chunks are single tokens."""

SMALL = (0, 3, 4, 9)
"""Rows that are read in single tokens, alone or around a half; the others in one call, or two halves."""

DERIVED = (0, 1, 2, 3, 4, 8)
"""Rows whose gradients are judged, in every second round over the rows."""

IN_HALVES = (1,)
"""Rows whose gradients pass through a state."""


class Shape(NamedTuple):
    """All that a compiled function depends on."""

    cfg: FwPKMConfig
    batch: int
    length: int
    left_out: tuple[str, ...]
    """Fields of its tokens."""
    layout: str = PADDED
    """How its tokens are handed over."""


class Passage(NamedTuple):
    """A case and the calls that read it."""

    number: int
    """Of the case in its run."""
    case: Case
    sizes: list[int]
    """Tokens of each call."""
    handed: int
    """After so many calls the state passes through NumPy, and its fields are judged."""

    @property
    def with_gradients(self) -> bool:
        """Whether gradients are judged too."""
        return self.number // len(STRATA) % 2 == 0 and self.number % len(STRATA) in DERIVED

    @property
    def gradient_sizes(self) -> list[int]:
        """The calls that gradients pass through: halves in one of the shapes, one call in the others."""
        length = self.case.length
        return [length // 2, length // 2] if self.number % len(STRATA) in IN_HALVES else [length]


def shapes(unit: int = 1) -> st.SearchStrategy[tuple[Shape, ...]]:
    """Ten shapes, one for each stratum; Dk and Dv of a few numbers, or of one to three times ``unit``.

    Raises:
        RuntimeError: a value of a choice stands in no stratum, so that nothing would be drawn with it.
    """
    for name, values in CHOICES.items():
        undrawn = set(values) - {row[_COLUMNS.index(name)] for row in STRATA}
        if undrawn:
            raise RuntimeError(f"STRATA must have a row with each {name}. Received: none with {sorted(undrawn)}")
    return st.tuples(*(_shape(number, unit) for number in range(len(STRATA))))


@st.composite
def _shape(draw: st.DrawFn, number: int, unit: int) -> Shape:
    row = dict(zip(_COLUMNS, STRATA[number]))
    left_out, layout, lookahead = row.pop("left_out"), row.pop("layout"), row["lookahead"]
    multiples = st.sampled_from([unit, 2 * unit, 3 * unit])
    if unit > 1 and row["score"] == "idw" and row["grad_clip"] is not None:
        row["addressing_weight"] *= 4  # or clipping would never bite: wide keys have a gradient of small parts
    cfg = draw(
        configs(
            key_dim=st.sampled_from([4, 6, 8]) if unit == 1 else multiples,
            value_dim=st.integers(2, 6) if unit == 1 else multiples,
            num_subkeys=st.integers(4, 7),
            top_k=st.integers(2, 3),
            chunk_size=1 if number == SINGLE else st.integers(lookahead + 2, 5),
            **row,
        )
    )
    chunk = cfg.chunk_size
    # A half of three chunks or so, and cut within a chunk where a chunk can be cut.
    halves = range((3 * chunk + cfg.lookahead) // 2, 3 * chunk // 2 + cfg.lookahead + 3)
    half = draw(st.sampled_from([size for size in halves if size > 2 and (chunk == 1 or size % chunk)]))
    return Shape(cfg, draw(st.integers(2, 3)), 2 * half, left_out, layout)


@st.composite
def passages(draw: st.DrawFn, number: int, shape: Shape, dtype: str) -> Passage:
    """Numbers, twists and calls for a shape."""
    half = shape.length // 2
    sizes = draw(_small(half) if number % len(STRATA) in SMALL else st.sampled_from([[2 * half], [half, half]]))
    handed = draw(st.integers(1, max(1, len(sizes) - 1)))
    flushed = draw(st.one_of(st.none(), st.integers(1, handed - 1))) if handed > 1 else None
    flush_after = None if flushed is None else sum(sizes[:flushed])
    twists = draw(st.frozensets(st.sampled_from(TWISTS), max_size=2))
    if "at_keys" in twists:
        twists -= {"repeats"}  # a whole chunk at one key: the steepest scores there are, and nothing to tell them apart
    seed = draw(st.integers(0, 2**32 - 1))
    cfg, batch, length, left_out, layout = shape
    if layout == UNMASKED:
        twists -= MASKING
    case = untied_case(cfg, seed, dtype, twists, batch, length, left_out, flush_after, layout, sizes)
    return Passage(number, case, sizes, handed)


def _small(half: int) -> st.SearchStrategy[list[int]]:
    """Single tokens, alone or around a half."""
    around = st.integers(0, half).map(lambda before: [1] * before + [half] + [1] * (half - before))
    return st.one_of(around, st.just([1] * (2 * half)))


def draw(strategy: st.SearchStrategy[T], seed: int | str) -> T:
    """One value of a strategy that follows from the seed, and from the version of Hypothesis."""
    drawn: list[T] = []

    # The first example is always the simplest, and the second the first that is random.
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=2,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(value: Any) -> None:
        drawn.append(value)

    collect()
    return drawn[-1]


def drawer(seed: int, dtype: str, unit: int = 1) -> Callable[..., Passage]:
    """From a case's number to the case, whatever the number of cases: it is of shape number modulo ten.

    A second argument, 1 or more, draws another case of that number.

    Args:
        seed: what the cases follow from.
        dtype: of their arrays.
        unit: of Dk and Dv: see :func:`shapes`.
    """
    drawn: tuple[Shape, ...] = draw(shapes(unit), seed)

    def passage(number: int, attempt: int = 0) -> Passage:
        again = f"/{attempt}" * bool(attempt)
        return draw(passages(number, drawn[number % len(drawn)], dtype), f"{seed}/{number}{again}")

    return passage
