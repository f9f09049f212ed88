"""Facts that only a memory can find: keys and values drawn at random, stated in sentences between pieces of text.

What is trained on and what is measured never share a key or a value: the CRC-32 of a word decides for which it is.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from examples.language_model import phrasings
from examples.language_model.corpus import Texts
from examples.language_model.phrasings import KEY_LENGTH, VALUE_LENGTH, Phrasing

KEY_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
MOST_FACTS = 100_000
"""At a time: of 10^6 values an eighth is for measuring."""
NEARBY = 32
"""Bytes in which a statement looks for the end of a word before it breaks into one."""
CROWDED = 0.25
"""Of the rows of training, those that state more facts than the others."""

_WORD_END = re.compile(rb"[ \n](?=[^ ])")


class Fact(NamedTuple):
    """A key of four letters a-z or digits, and its value, six digits."""

    key: str
    value: str


class Planned(NamedTuple):
    """A sentence, and the byte of a row to put it at or a few bytes after, where a word ends."""

    at: int
    sentence: bytes
    asked: int = -1
    """the byte of the sentence that an asked value begins at; -1 where nothing is asked"""


# Facts


def draw(rng: np.random.Generator, number: int, measuring: bool) -> list[Fact]:
    """Facts with distinct keys and distinct values, all for measuring or all for training.

    Raises:
        ValueError: ``number`` is negative or over ``MOST_FACTS``.
    """
    if not 0 <= number <= MOST_FACTS:
        raise ValueError(f"number must be between 0 and {MOST_FACTS:,}. Received: {number}")
    keys = _distinct(rng, number, measuring, len(KEY_LETTERS) ** KEY_LENGTH, _key)
    values = _distinct(rng, number, measuring, 10**VALUE_LENGTH, lambda n: f"{n:0{VALUE_LENGTH}}")
    return [Fact(key, value) for key, value in zip(keys, values)]


def for_measuring(word: str) -> bool:
    """Whether a key or a value is for measuring; the others are for training."""
    return zlib.crc32(word.encode()) % 8 == 0


def _distinct(
    rng: np.random.Generator, number: int, measuring: bool, space: int, write: Callable[[int], str]
) -> list[str]:
    found: dict[str, None] = {}  # in the order drawn
    while len(found) < number:
        words = map(write, rng.integers(space, size=2 * number).tolist())
        found.update(dict.fromkeys(word for word in words if for_measuring(word) == measuring))
    return list(found)[:number]


def _key(number: int) -> str:
    letters = []
    for _ in range(KEY_LENGTH):
        number, letter = divmod(number, len(KEY_LETTERS))
        letters.append(KEY_LETTERS[letter])
    return "".join(letters)


def padded(size: int, nearby: int = NEARBY) -> int:
    """Bytes to plan for a sentence: itself, a space on each side, and the way to the end of a word."""
    return size + 2 + nearby


# Rows for training


def check_fit(length: int, share: float, gap: int) -> None:
    """Raise a ValueError unless a row can hold a fact in every phrasing, stated twice; a share of 0 needs none."""
    size = phrasings.longest()
    least = max(2 * padded(size) + gap, math.ceil(2 * (size + 2) / share) if share else 0)
    if share and length + 1 < least:
        raise ValueError(
            f"training.length must be at least {least - 1:,} for a fact stated twice, {gap:,} bytes apart, in a share "
            f"of {share} of the bytes; or set training.facts to 0. Received: length={length}"
        )


class Row(NamedTuple):
    """Of a training batch."""

    start: int
    """byte of ``Texts.data``"""
    anew: bool
    """whether its memories begin anew"""
    stated: Phrasing
    """of its facts"""
    asked: Phrasing
    """of its questions"""
    crowded: bool
    """whether it states more facts than other rows"""


def rows(texts: Texts, seed: int, step: int, batch: int, length: int, span: int) -> list[Row]:
    """The rows of a step, which depend on seed and step alone.

    Each reads ``span`` windows of ``length`` bytes on in one document, drawn in proportion to its length of those that
    hold a window and the byte after; then it begins elsewhere. The rows do so in turn. Where a document holds fewer
    windows, the row comes round to where it began in it.

    In a step a row states all facts in one phrasing, and asks for them in one, so that only their keys tell them apart.
    The next step draws others, so that memories often meet a sentence for the first time.

    Raises:
        ValueError: no document is long enough.
    """
    sizes, ends, found = np.diff(texts.starts), _ends(texts, length + 1), []
    for row in range(batch):
        number, piece = divmod(step + row * span // batch, span)
        rng = np.random.default_rng([seed, row, number])
        document = np.searchsorted(ends, rng.integers(ends[-1]), side="right")
        whole = min(span, (sizes[document] - 1) // length)  # windows that follow one another
        first = texts.starts[document] + rng.integers(sizes[document] - whole * length)
        rng = np.random.default_rng([seed, row, number, piece])
        stated, asked = phrasings.draw(rng)
        crowded = bool(rng.random() < CROWDED)
        found.append(Row(int(first + piece % whole * length), piece == 0, stated, asked, crowded))
    return found


def training_batch(
    texts: Texts, rows: Sequence[Row], rng: np.random.Generator, length: int, share: float, gap: int = 520,
    crowd: int = 1, again: bool = False,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Windows of text, with facts stated, and asked for, in them.

    A row states each fact, and later once more as it asks for facts. The sentences stand between the words of the text,
    which they push apart. A row too short for that gets no facts.

    Args:
        texts: documents.
        rows: where each begins, and how it states facts and asks for them.
        rng: the source of all chance.
        length: tokens of a row that have a target.
        share: at most this part of a row's bytes is of facts.
        gap: least number of bytes between the end of a statement and the question.
        crowd: how many times as many facts crowded rows state, if they can.
        again: whether the memories have read these very rows before, so that the first statements are questions too.

    Returns:
        tokens uint8 [batch, length + 1] and asked bool [batch, length], which is true where the target, the token
        after, is a digit that is asked for.

    Raises:
        ValueError: an argument is out of range.
    """
    if not rows or length < 1 or gap < 0 or not 0 <= share <= 1 or crowd < 1:
        raise ValueError(
            "there must be a row, length must be 1 or more, gap 0 or more, share between 0 and 1, crowd 1 or more. "
            f"Received: {len(rows)} rows, length={length}, gap={gap}, share={share}, crowd={crowd}"
        )
    size = length + 1
    tokens, asked = np.empty((len(rows), size), np.uint8), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        part = min(1.0, share * crowd) if row.crowded else share
        planned = _statements(rng, row, size, part, gap, again)
        tokens[i], begins = insert(texts.data[row.start : row.start + size].tobytes(), planned)
        for begin, statement in zip(begins, planned):
            if statement.asked >= 0:
                first = begin + statement.asked  # of the digits; the byte before predicts it
                asked[i, first - 1 : first - 1 + VALUE_LENGTH] = True
    return tokens, asked


def windows(texts: Texts, rng: np.random.Generator, number: int, size: int) -> list[int]:
    """Where in ``texts.data`` windows of ``size`` bytes begin, each within one document.

    Raises:
        ValueError: no document is long enough.
    """
    ends = _ends(texts, size)
    documents = np.searchsorted(ends, rng.integers(ends[-1], size=number), side="right")
    lengths = np.diff(texts.starts)[documents]
    return (texts.starts[documents] + rng.integers(lengths - size + 1)).tolist()


def _ends(texts: Texts, size: int) -> np.ndarray:
    """The running sum of the lengths of the documents that hold a window of ``size`` bytes."""
    lengths = np.diff(texts.starts)
    ends = np.cumsum(np.where(lengths >= size, lengths, 0))
    if not ends.size or ends[-1] == 0:
        longest = lengths.max() if lengths.size else 0
        raise ValueError(
            f"No document is long enough for a window of {size:,} bytes: of {len(lengths):,} documents the longest has "
            f"{longest:,}. Take a shorter length, or a corpus of longer documents."
        )
    return ends


def _statements(rng: np.random.Generator, row: Row, length: int, share: float, gap: int, again: bool) -> list[Planned]:
    """The sentences of a row of ``length`` bytes, in their order: as many as ``share`` allows and the row can hold."""
    size = max(row.stated.size, row.asked.size)
    number = int(share * length) // (row.stated.size + row.asked.size + 4)
    while (order := _schedule(rng, length, gap, padded(size), number)) is None:
        number -= 1
    stated: set[int] = set()
    facts, planned = draw(rng, number, measuring=False), []
    for at, i in order:
        phrasing = row.asked if i in stated else row.stated
        asks = phrasing.asks and (again or i in stated)
        begins = len(phrasing.question(facts[i].key)) if asks else -1
        planned.append(Planned(at, phrasing.sentence(*facts[i]), begins))
        stated.add(i)
    return planned


def _schedule(rng: np.random.Generator, row: int, gap: int, room: int, number: int) -> list[tuple[int, int]] | None:
    """When each fact is stated and asked for: bytes and facts in order, or None where they do not all fit.

    Each fact draws its bytes as if it were alone; then statements that collide push each other to the right, and those
    that this pushes too far go back to the last bytes that are possible.
    """
    free = row - 2 * room - gap
    if free < 0:
        return None if number else []
    offsets = np.sort(rng.integers(free + 1, size=(number, 2))).tolist()
    wished = sorted(
        (offset + i * (room + gap), fact) for fact, pair in enumerate(offsets) for i, offset in enumerate(pair)
    )
    order = []
    end, again = 0, [0] * number
    for at, fact in wished:
        at = max(at, end, again[fact])
        order.append((at, fact))
        end, again[fact] = at + room, at + room + gap
    end, ends = row, [row] * number
    for i, (at, fact) in reversed(list(enumerate(order))):
        last = min(end, ends[fact]) - room
        order[i] = (min(at, last), fact)
        end, ends[fact] = last, last - gap
    return order if end >= 0 else None


def insert(text: bytes, planned: Iterable[Planned], nearby: int = NEARBY) -> tuple[np.ndarray, list[int]]:
    """A row as long as ``text``, of its beginning and the planned sentences, and where each of them begins.

    A sentence stands after a space or a newline, where there is one within ``nearby`` bytes, between single spaces.
    """
    row, begins, cursor = bytearray(), [], 0
    for statement in planned:
        cut = cursor + statement.at - len(row)
        end = _WORD_END.search(text, max(cut - 1, cursor), cut + nearby + 1)
        cut = end.end() if end else cut
        row += text[cursor:cut]
        cursor = cut
        if not row.endswith(b" "):
            row += b" "
        begins.append(len(row))
        row += statement.sentence + b" "
    row += text[cursor : cursor + len(text) - len(row)]
    return np.frombuffer(row, np.uint8), begins
