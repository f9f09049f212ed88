"""What the properties are tried on: configurations, tables and tokens of every shape that SPEC.md §1 allows.

Choices are drawn by Hypothesis, numbers by NumPy from a drawn seed: an example then shrinks to a small configuration,
and its repr is short.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st

from fwpkm import reference
from fwpkm.agreement import GAP, comparable_tokens, deciding_gap
from fwpkm.config import CHOICES, FwPKMConfig
from fwpkm.containers import Memory, memories_for
from fwpkm.tokens import TOKEN_FIELDS, Array, Tokens

TWISTS = ("at_keys", "repeats", "masked_row", "masked_chunk", "padded", "twins")
"""Queries exactly at keys; one query repeated; a row, or a chunk, without unmasked tokens; rows padded at both ends,
with NaN among what is masked; equal keys (ties).

``make_case`` knows one more, "nonfinite": tokens that hold NaN or an infinity.
"""
MASKING = frozenset({"masked_row", "masked_chunk", "padded"})
"""Twists that need a mask."""

LAYOUTS = PADDED, PACKED, UNMASKED = "padded", "packed", "packed without a mask"
"""How the tokens of a case are handed over (SPEC.md §5)."""

ROWS = st.integers(1, 3)
_SERVED = [field for field in TOKEN_FIELDS if field.name in reference.SELF.fields]
NUMBERS = tuple(field.name for field in _SERVED if field.kind == "float")
"""What of a token has a gradient, of the fields that the reference serves."""
OPTIONAL = tuple(field.name for field in _SERVED if field.default is not None)
LEFT_OUT = st.frozensets(st.sampled_from(OPTIONAL))
"""Any of the fields of a token that a call may leave out."""
MOST_SEEDS = 500
"""That are tried for a case without ties."""
FLOAT64 = st.just("float64")
FLOATS = st.sampled_from(["float64", "float32"])


@dataclasses.dataclass(frozen=True)
class Case:
    """One drawn configuration with tables and tokens."""

    cfg: FwPKMConfig
    seed: int
    dtype: str
    twists: frozenset
    batch: int
    length: int
    memory: Memory
    tokens: Tokens
    flush_after: int | None = None
    layout: str = PADDED

    def _repr_pretty_(self, printer, cycle):
        """All that the arrays follow from, and not the arrays: what Hypothesis prints."""
        fields = ("cfg", "seed", "dtype", "twists", "batch", "length", "flush_after", "layout")
        present = [name for name, array in self.tokens._asdict().items() if array is not None]
        printer.text(f"Case({', '.join(f'{n}={getattr(self, n)!r}' for n in fields)}, tokens={present})")

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Case":
        """The same case with the function of each floating array."""

        def floats(array: np.ndarray) -> np.ndarray:
            return array if array.dtype == bool else function(array)

        memory, tokens = Memory(*map(floats, self.memory)), self.tokens.map(floats)
        return dataclasses.replace(self, memory=memory, tokens=tokens, dtype=str(memory.keys.dtype))

    def widened(self) -> "Case":
        """The same numbers in float64."""
        return self.map(lambda array: array.astype(np.float64))


def floating(tokens: Tokens) -> dict[str, Array]:
    """The fields that hold floating numbers, by name; None where one was left out."""
    return {name: getattr(tokens, name) for name in NUMBERS}


def unmasked(tokens: Tokens) -> np.ndarray:
    """``[B, T]`` bool, whether or not there is a mask."""
    return np.ones(tokens.query.shape[:2], bool) if tokens.mask is None else tokens.mask


def configs(**fixed: Any) -> st.SearchStrategy[FwPKMConfig]:
    """Any configuration of a few slots; ``fixed`` fields take the strategy or the value given instead."""
    drawn: dict[str, st.SearchStrategy] = {
        "key_dim": st.sampled_from(range(2, 13, 2)),
        "value_dim": st.integers(1, 6),
        "num_heads": st.integers(1, 3),
        "num_subkeys": st.integers(1, 7),
        "top_k": st.integers(1, 7),
        "chunk_size": st.integers(1, 6),
        "lookahead": st.integers(0, 5),
        "score_eps": st.sampled_from([1e-3, 1e-2, 0.1]),
        "temperature": st.sampled_from([0.5, 1.0, 2.0]),
        "learning_rate": st.sampled_from([1.0, 0.5, 0.1, 0.0]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.1]),
        "grad_clip": st.sampled_from([None, 0.05, 1.0]),
        "addressing_weight": st.sampled_from([1.0, 0.3, 0.0]),
        **{field: st.sampled_from(values) for field, values in CHOICES.items()},
    }
    for name, value in fixed.items():
        drawn[name] = value if isinstance(value, st.SearchStrategy) else st.just(value)
    return st.fixed_dictionaries(drawn).map(_config)


def _config(fields):
    """Fit the fields that depend on others: k to S, and L to C."""
    fields["top_k"] = min(fields["top_k"], fields["num_subkeys"])
    fields["lookahead"] = min(fields["lookahead"], fields["chunk_size"] - 1)
    return FwPKMConfig(**fields)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    batch: st.SearchStrategy[int] = ROWS,
    dtype: st.SearchStrategy[str] = FLOAT64,
    left_out: st.SearchStrategy[Collection[str]] = LEFT_OUT,
    twists: Collection[str] = TWISTS,
    flushed: bool = False,
    untied: bool = False,
    gap: float = GAP,
    max_length: int = 16,
    min_length: int = 1,
    **fixed: Any,
) -> Case:
    """A configuration, its tables, and tokens for a little more than two chunks.

    Args:
        draw: Hypothesis'.
        batch: strategy of B.
        dtype: strategy of the dtype's name.
        left_out: strategy of the fields that tokens are without.
        twists: the twists that may occur.
        flushed: whether a flush is to follow after a drawn number of tokens (``flush_after``).
        untied: only cases in which every gap exceeds ``gap`` at every read (§6), by drawing numbers again.
        gap: the gap for ``untied``.
        max_length: bound on T.
        min_length: bound on T.
        **fixed: fields of the configuration, as strategies or values.
    """
    cfg = draw(configs(**fixed))
    rows, name = draw(batch), draw(dtype)
    most = max(min_length, min(2 * cfg.chunk_size + cfg.lookahead + 2, max_length))
    length = draw(st.integers(min_length, most))
    chosen = draw(st.frozensets(st.sampled_from(list(twists)), max_size=2)) if twists else frozenset()
    if untied:
        chosen -= {"twins"}
    absent = frozenset(draw(left_out)) - ({"mask"} if chosen & MASKING else set())
    flush_after = draw(st.integers(0, length)) if flushed else None
    seed = draw(st.integers(0, 2**32 - 1))
    arguments = (name, chosen, rows, length, absent, flush_after)
    return untied_case(cfg, seed, *arguments, gap=gap) if untied else make_case(cfg, seed, *arguments)


def splits(length: int) -> st.SearchStrategy[list[int]]:
    """Sizes of calls that make up ``length`` tokens: single tokens, or any sizes, empty calls among them."""
    cuts = st.lists(st.integers(0, length), max_size=5).map(sorted)
    sizes = cuts.map(lambda at: np.diff([0, *at, length]).tolist())
    return st.one_of(st.just([1] * length or [0]), sizes)


def untied_case(cfg: FwPKMConfig, seed: int, *arguments: Any, gap: float = GAP) -> Case:
    """``make_case`` with the first seed from ``seed`` on that gives no gap of ``gap`` or less.

    After ``MOST_SEEDS`` of them the example is rejected, so that no configuration is searched for ever.
    """
    for at in range(seed, seed + MOST_SEEDS):
        if is_untied(case := make_case(cfg, at, *arguments), gap):
            return case
    hypothesis.reject()


def make_case(
    cfg: FwPKMConfig,
    seed: int,
    dtype: str,
    twists: frozenset,
    batch: int,
    length: int,
    left_out: Collection[str],
    flush_after: int | None,
    layout: str = PADDED,
    sizes: Sequence[int] = (),
) -> Case:
    """The case that follows from choices and a seed; packed, each row ends where it likes in calls of these sizes."""
    rng = np.random.default_rng(seed)
    memory, tokens = draw_memory(rng, cfg, batch, twists), draw_tokens(rng, cfg, batch, length, left_out)
    if "at_keys" in twists:
        tokens = tokens._replace(query=_at_keys(rng, cfg, memory, tokens.query))
    if "repeats" in twists:
        tokens.query[:, 1::2] = tokens.query[:, :1]
    if tokens.mask is not None and "masked_row" in twists:
        tokens.mask[-1] = False
    if tokens.mask is not None and "masked_chunk" in twists:
        tokens.mask[0, : cfg.chunk_size] = False
    if layout != PADDED:
        tokens = tokens._replace(mask=unmasked(tokens) & _ragged(rng, batch, sizes or [length]))
    if tokens.mask is not None and "padded" in twists:
        _pad(rng, tokens)
    if "nonfinite" in twists:
        _spoil(rng, tokens)
    case = Case(cfg, seed, dtype, twists, batch, length, memory, tokens, flush_after, layout)
    return case.map(lambda array: array.astype(dtype))


def draw_memory(rng: np.random.Generator, cfg: FwPKMConfig, batch: int, twists: Collection[str] = ()) -> Memory:
    """float64 tables; with "twins" the first half of each codebook stands in its second half again."""
    memories = memories_for(cfg, batch)
    keys = rng.uniform(-1, 1, (memories, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2))
    half = cfg.num_subkeys // 2
    if "twins" in twists and half:
        keys[..., -half:, :] = keys[..., :half, :]
    return Memory(keys, rng.normal(size=(memories, cfg.num_slots, cfg.value_dim)))


def draw_tokens(
    rng: np.random.Generator, cfg: FwPKMConfig, batch: int, length: int, left_out: Collection[str] = ()
) -> Tokens:
    """float64 tokens; queries about as large as keys, a quarter of them masked. Fields that may be are ``left_out``."""
    tokens = Tokens(
        rng.uniform(-1.2, 1.2, (batch, length, cfg.num_heads * cfg.key_dim)),
        rng.normal(size=(batch, length, cfg.value_dim)),
    )
    optional = [name for name in OPTIONAL if name not in left_out]
    drawn = {name: rng.uniform(size=(batch, length)) for name in optional}
    return tokens._replace(**{name: x if name in NUMBERS else x < 0.75 for name, x in drawn.items()})


def _at_keys(rng, cfg, memory, query):
    """Every second query stands exactly at a key of each codebook."""
    batch, length, _ = query.shape
    halves = query.reshape(batch, length, cfg.num_heads, 2, -1).copy()
    subkeys = rng.integers(cfg.num_subkeys, size=halves.shape[:-1])
    keys = np.broadcast_to(memory.keys, (batch, *memory.keys.shape[1:]))[:, None]
    at = np.take_along_axis(keys, subkeys[..., None, None], axis=-2)[..., 0, :]
    halves[:, ::2] = at[:, ::2]
    return halves.reshape(query.shape)


def _ragged(rng, batch, sizes):
    """``[B, T]`` bool: of each call a row takes no token, one, some or all."""
    ends = [rng.choice([0, 1, size // 2, size, size], batch) for size in sizes]
    return np.concatenate([np.arange(size) < end[:, None] for size, end in zip(sizes, ends)], axis=1)


def _pad(rng, tokens):
    """Rows begin later and end earlier, and what is masked holds anything."""
    batch, length = tokens.mask.shape
    first, last = rng.integers(0, length // 2 + 1, (batch, 1)), rng.integers(length // 2, length + 1, (batch, 1))
    tokens.mask[:] &= (first <= np.arange(length)) & (np.arange(length) < last)
    for x in (array for array in floating(tokens).values() if array is not None):
        x[~tokens.mask] = rng.choice([0, 1, np.nan, np.inf], x.shape)[~tokens.mask]


def _spoil(rng, tokens):
    """Some tokens hold a number that is not finite, in any field."""
    for spoilt in (array for array in floating(tokens).values() if array is not None):
        row, at = (rng.integers(size) for size in spoilt.shape[:2])
        spoilt[(row, at, *(rng.integers(size) for size in spoilt.shape[2:]))] = rng.choice([np.nan, np.inf, -np.inf])


def is_untied(case: Case, gap: float = GAP) -> bool:
    """Whether every gap exceeds ``gap``: of every read up to the flush in the middle and after it.

    The first chunk's reads of the first tables count even where a flush comes before its end.
    """
    case = case.widened()
    memory, there = case.memory, case.tokens.mask  # what is masked is read by nobody, and may be all zeros
    close = deciding_gap(case.cfg, memory, case.tokens.query) <= gap
    if (close if there is None else close & there).any():
        return False
    first = case.length if case.flush_after is None else case.flush_after
    for start, stop in ((0, first), (first, case.length)):
        tokens = case.tokens.slice(start, stop)
        if comparable_tokens(case.cfg, memory, tokens, gap) < stop - start:
            return False
        state = reference.init_state(case.cfg, memory, case.batch)
        memory = reference.flush(case.cfg, reference.apply(case.cfg, state, **tokens.present())[1])[0].memory
    return True
