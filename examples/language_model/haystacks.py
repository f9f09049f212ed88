"""Texts with facts in them, and a question about each: what needle.py and capacity.py ask."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from examples.language_model.corpus import Texts
from examples.language_model.facts import NEARBY, Planned, draw, insert, padded, windows
from examples.language_model.phrasings import VALUE_LENGTH, Phrasing

Draw = Callable[[np.random.Generator], tuple[Phrasing, Phrasing]]
"""Draws how a context states its facts, and how it is asked for them."""


class Haystack(NamedTuple):
    """Contexts of facts, and a question about each fact, in the order in which they are stated.

    Attributes:
        tokens: uint8 [n, length].
        asked: uint8 [n, facts, a]; a space, the question, the value, and zeros up to the longest.
        value: int64 [n, facts]; the byte of ``asked`` that the value begins at.
        depth: float64 [n, facts]; where a statement begins: 0 at the first byte, 1 at the last one it may begin at.
        begin: int64 [n, facts]; the byte of ``tokens`` that the statement begins at.
    """

    tokens: np.ndarray
    asked: np.ndarray
    value: np.ndarray
    depth: np.ndarray
    begin: np.ndarray

    def part(self, rows: np.ndarray) -> "Haystack":
        """Some of the contexts."""
        return Haystack(*(x[rows] for x in self))


def haystacks(
    texts: Texts, rng: np.random.Generator, number: int, length: int, phrase: Draw, *, facts: int = 5, clear: int = 600,
    nearby: int = NEARBY,
) -> Haystack:  # fmt: skip
    """Random windows of text with facts for measuring in them, all of which are asked for.

    Args:
        texts: documents; one is drawn in proportion to its length, of those that are long enough.
        rng: the source of all chance.
        number: contexts, n.
        length: tokens of a context.
        phrase: draws the phrasings of a context; all its facts have the same.
        facts: of a context, each stated once, at random bytes.
        clear: bytes at the end in which no statement begins.
        nearby: how far a statement may be moved to stand between words.

    Raises:
        ValueError: no document has ``length`` bytes, the statements do not fit, or an argument is out of range.
    """
    if number < 1 or facts < 1 or clear < 0 or nearby < 0:
        raise ValueError(
            "number and facts must be 1 or more, clear and nearby 0 or more. "
            f"Received: number={number}, facts={facts}, clear={clear}, nearby={nearby}"
        )
    samples = []
    for start in windows(texts, rng, number, length):
        stated, asked = phrase(rng)
        space = _space(length, clear, stated.size, facts, nearby)
        samples.append(_context(rng, texts.data[start : start + length].tobytes(), stated, asked, facts, space, nearby))
    longest = max(len(question) for sample in samples for question in sample[1])
    tokens = np.stack([sample[0] for sample in samples])
    padded_questions = np.zeros((number, facts, longest), np.uint8)
    for i, sample in enumerate(samples):
        for j, question in enumerate(sample[1]):
            padded_questions[i, j, : len(question)] = np.frombuffer(question, np.uint8)
    value = np.array([[len(question) - VALUE_LENGTH for question in sample[1]] for sample in samples])
    begin = np.array([sample[2] for sample in samples])
    return Haystack(tokens, padded_questions, value, begin / max(length - clear - 1, 1), begin)


def _space(length: int, clear: int, size: int, facts: int, nearby: int) -> int:
    """The bytes that statements may be planned in: the last one, moved, still begins before the clear bytes."""
    each = padded(size, nearby)
    space = min(length - clear - nearby - 2 + each, length)
    if space < facts * each:
        least = max(facts * each, clear + nearby + 2 + (facts - 1) * each)
        raise ValueError(
            f"length must be at least {least:,} for {facts:,} statements of {size} bytes in front of {clear:,} clear "
            f"bytes. Received: {length:,}"
        )
    return space


def _context(
    rng: np.random.Generator, text: bytes, stated: Phrasing, asked: Phrasing, number: int, space: int, nearby: int
) -> tuple[np.ndarray, list[bytes], list[int]]:
    """Tokens, questions with their answers, and where statements begin."""
    each = padded(stated.size, nearby)
    offsets = np.sort(rng.integers(space - number * each + 1, size=number)) + each * np.arange(number)
    facts = draw(rng, number, measuring=True)
    sentences = [stated.sentence(*fact) for fact in facts]
    tokens, begins = insert(text, map(Planned, offsets.tolist(), sentences), nearby)
    return tokens, [b" " + asked.question(fact.key) + fact.value.encode() for fact in facts], begins
