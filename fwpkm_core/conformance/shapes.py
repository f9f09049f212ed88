"""What one run of ``fwpkm conform`` tries: ten shapes, and cases that differ in numbers, not in shapes.

A backend may compile for every configuration and every length of a call, so a run has ten configurations, and each of
them calls of three lengths. The choices on which the equations branch stand in ``STRATA``, so that every seed covers
them all; sizes and real-valued fields are drawn.
"""

from typing import Any, NamedTuple

from hypothesis import strategies as st

from fwpkm.config import FwPKMConfig
from fwpkm.conformance.strategies import Case, configs, untied_case

TWISTS = ("at_keys", "repeats", "masked_row", "masked_chunk", "nonfinite")

_DECAY, _CLIP = st.sampled_from([0.01, 0.1]), st.sampled_from([0.05, 0.2])
_COLUMNS = (
    *("boundary", "memory_scope", "score", "write_scale", "num_heads", "lookahead", "gated", "masked"),
    *("grad_clip", "weight_decay", "temperature", "learning_rate", "addressing_weight", "score_eps"),
)
STRATA: tuple[tuple[Any, ...], ...] = (
    ("drop", "sequence", "idw", "slots", 1, 1, True, True, None, 0.0, 1.0, 1.0, 0.3, 1e-3),
    ("wait", "sequence", "idw", "normalized", 2, 1, True, True, None, 0.0, 0.5, 1.0, 0.3, 0.1),
    ("drop", "batch", "dot_product", "unit", 2, 2, True, False, None, _DECAY, 2.0, 1.0, 1.0, 1e-3),
    ("wait", "batch", "idw", "slots", 1, 2, False, True, _CLIP, 0.0, 1.0, 0.5, 1.0, 1e-3),
    ("drop", "sequence", "dot_product", "normalized", 1, 0, True, True, _CLIP, 0.0, 0.5, 1.0, 1.0, 1e-3),
    ("wait", "sequence", "dot_product", "unit", 2, 0, False, False, None, _DECAY, 1.0, 0.5, 1.0, 1e-3),
    ("drop", "batch", "idw", "normalized", 2, 1, True, True, None, _DECAY, 2.0, 1.0, 1.0, 0.1),
    ("wait", "batch", "dot_product", "normalized", 1, 2, True, True, None, 0.0, 1.0, 1.0, 1.0, 1e-3),
    ("wait", "sequence", "idw", "unit", 3, 3, True, True, _CLIP, _DECAY, 1.0, 1.0, 0.3, 0.1),
    ("drop", "sequence", "idw", "unit", 2, 0, True, True, None, 0.0, 1.0, 0.5, 0.3, 0.1),
)
"""Ten rows under ``_COLUMNS``: each value of each choice, and the combinations in which one hides another's error."""

SINGLE = 9
"""The row whose chunks are single tokens."""


class Shape(NamedTuple):
    """All that a compiled function depends on."""

    cfg: FwPKMConfig
    batch: int
    length: int
    gated: bool
    masked: bool


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
        """Whether gradients are judged too: in every fourth round over the shapes, as they cost compilations."""
        return self.number // len(STRATA) % 4 == 0


def shapes() -> st.SearchStrategy[tuple[Shape, ...]]:
    """Ten shapes, one for each stratum."""
    return st.tuples(*map(_shape, range(len(STRATA))))


@st.composite
def _shape(draw: st.DrawFn, number: int) -> Shape:
    row = dict(zip(_COLUMNS, STRATA[number]))
    gated, masked, lookahead = row.pop("gated"), row.pop("masked"), row["lookahead"]
    cfg = draw(
        configs(
            key_dim=st.sampled_from([4, 6, 8]),
            value_dim=st.integers(2, 6),
            num_subkeys=st.integers(4, 7),
            top_k=st.integers(2, 3),
            chunk_size=1 if number == SINGLE else st.integers(lookahead + 2, 5),
            **row,
        )
    )
    most = 3 * cfg.chunk_size + cfg.lookahead + 1
    length = draw(st.integers(max(6, most - cfg.chunk_size), max(8, most)))
    return Shape(cfg, draw(st.integers(2, 3)), length, gated, masked)


@st.composite
def passages(draw: st.DrawFn, number: int, shape: Shape, dtype: str) -> Passage:
    """Numbers, twists and calls for a shape: one call, single tokens, or two halves around what is left."""
    half, rest = divmod(shape.length, 2)
    halves = st.permutations([half, half] + [1] * rest)
    sizes = draw(st.one_of(halves, halves, st.just([shape.length]), st.just([1] * shape.length)))
    handed = draw(st.integers(1, max(1, len(sizes) - 1)))
    flushed = draw(st.one_of(st.none(), st.integers(1, handed - 1))) if handed > 1 else None
    flush_after = None if flushed is None else sum(sizes[:flushed])
    twists = draw(st.frozensets(st.sampled_from(TWISTS), max_size=2))
    if "at_keys" in twists:
        twists -= {"repeats"}  # a whole chunk at one key: the steepest scores there are, and nothing to tell them apart
    seed = draw(st.integers(0, 2**32 - 1))
    cfg, batch, length, gated, masked = shape
    case = untied_case(cfg, seed, dtype, twists, batch, length, gated, masked, flush_after)
    return Passage(number, case, sizes, handed)
