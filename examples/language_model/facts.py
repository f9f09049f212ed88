"""Facts that only a memory can find: keys and values drawn at random, stated in sentences between pieces of text.

What is trained on and what is measured never share a key or a value: the CRC-32 of a word decides for which it is.
"""

import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from examples.language_model.corpus import Texts

OPENINGS = (
    "The secret number for ID-", "In account ", "Whoever rings up room ", "Remember plate ", "Locker ",
    "The parcel marked ", "The reef called ", "By survey, field ", "Ask for file ", "The gate of house ", "Barge ",
    "It is written that star ",
)  # fmt: skip
"""How sentences of training begin; the key follows."""
LINKS = (" is ", ": ", " = ", " was ", " to ", " has ", " means ", ", or ", " gives ", " reads ")
"""What stands between key and value in training: if it is long, values are learned without their keys."""
SEEN = tuple(f"{opening}{{key}}{link}{{value}}." for opening, link in itertools.product(OPENINGS, LINKS))
"""Phrasings of training."""
UNSEEN = (
    "According to her map, cave {key} holds {value}.",
    "They called the prisoner {key}, that means {value}.",
    "Her letter names the farm {key} and says {value}.",
    "The secret number for ID-{key} holds {value}.",
    "According to her map, cave {key} is {value}.",
)
"""Phrasings that training never shows."""

DIGITS = 6
KEY_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
KEY_LENGTH = 4
MOST_FACTS = 100_000
"""At a time: of 10^6 values an eighth is for measuring."""
NEARBY = 32
"""Bytes in which a statement looks for the end of a word before it breaks into one."""

_WORD_END = re.compile(rb"[ \n](?=[^ ])")


class Fact(NamedTuple):
    """A key of four letters a-z or digits, and its value, six digits."""

    key: str
    value: str


class Haystack(NamedTuple):
    """Texts with facts in them, and a question about one fact of each.

    Attributes:
        tokens: uint8 [n, length].
        question: uint8 [n, q]; a space, and the sentence up to the value.
        answer: uint8 [n, 6], the digits.
        depth: float64 [n]; where the asked statement begins: 0 at the first byte, 1 at the last one it may begin at.
        place: int64 [n]; the byte of ``tokens`` that the asked statement begins at.
    """

    tokens: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    depth: np.ndarray
    place: np.ndarray


class _Planned(NamedTuple):
    """A sentence, and the byte of a row to put it at or up to NEARBY + 1 bytes after."""

    at: int
    sentence: bytes
    restates: bool = False


# Facts


def draw(rng: np.random.Generator, number: int, measuring: bool) -> list[Fact]:
    """Facts with distinct keys and distinct values, all for measuring or all for training.

    Raises:
        ValueError: ``number`` is negative or over ``MOST_FACTS``.
    """
    if not 0 <= number <= MOST_FACTS:
        raise ValueError(f"number must be between 0 and {MOST_FACTS:,}. Received: {number}")
    keys = _distinct(rng, number, measuring, len(KEY_LETTERS) ** KEY_LENGTH, _key)
    values = _distinct(rng, number, measuring, 10**DIGITS, lambda n: f"{n:0{DIGITS}}")
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


def _size(phrasing: str) -> int:
    """Bytes of a sentence."""
    return len(phrasing.format(key="k" * KEY_LENGTH, value="0" * DIGITS).encode())


def _room(size: int) -> int:
    """Bytes to plan for a sentence: itself, a space on each side, and the way to the end of a word."""
    return size + 2 + NEARBY


# Rows for training


def check_fit(length: int, share: float, gap: int) -> None:
    """Raise a ValueError unless a row has room for a fact in every phrasing, stated twice; no share needs none."""
    size = max(map(_size, SEEN))
    least = max(2 * _room(size) + gap, math.ceil(2 * (size + 2) / share) if share else 0)
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
    phrasing: str
    """of its facts"""


def rows(texts: Texts, seed: int, step: int, batch: int, length: int, span: int) -> list[Row]:
    """The rows of a step, which depend on seed and step alone.

    Each reads ``span`` windows of ``length`` bytes on in one document, drawn in proportion to its length of those that
    hold a window and the byte after, and states facts in one phrasing, so that only their keys tell them apart; then it
    begins elsewhere, with another phrasing. The rows do so in turn. Where a document holds fewer windows, the row comes
    round to where it began in it.

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
        found.append(Row(int(first + piece % whole * length), piece == 0, SEEN[rng.integers(len(SEEN))]))
    return found


def training_batch(
    texts: Texts, rows: Sequence[Row], rng: np.random.Generator, length: int, share: float, gap: int = 520
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of text, with facts stated and restated in them.

    A row's facts are each stated twice, word for word. The sentences stand between the words of the text, which they
    push apart. A row too short for that gets no facts.

    Args:
        texts: documents.
        rows: where each begins, and how it states facts.
        rng: the source of all chance.
        length: tokens of a row that have a target.
        share: at most this part of a row's bytes is of facts.
        gap: least number of bytes between the end of a statement and its restatement.

    Returns:
        tokens uint8 [batch, length + 1] and asked bool [batch, length], which is true where the target, the token
        after, is a digit of a restated value.

    Raises:
        ValueError: an argument is out of range.
    """
    if not rows or length < 1 or gap < 0 or not 0 <= share <= 1:
        raise ValueError(
            "there must be a row, length must be 1 or more, gap 0 or more and share between 0 and 1. "
            f"Received: {len(rows)} rows, length={length}, gap={gap}, share={share}"
        )
    size = length + 1
    tokens, asked = np.empty((len(rows), size), np.uint8), np.zeros((len(rows), length), bool)
    for row, (start, _, phrasing) in enumerate(rows):
        planned = _statements(rng, phrasing, size, share, gap)
        tokens[row], places = _insert(texts.data[start : start + size].tobytes(), planned)
        for place, statement in zip(places, planned):
            if statement.restates:
                first = place + len(statement.sentence) - DIGITS - 1  # of the digits; the full stop follows them
                asked[row, first - 1 : first - 1 + DIGITS] = True
    return tokens, asked


def _windows(texts: Texts, rng: np.random.Generator, number: int, size: int) -> list[int]:
    """Where in ``texts.data`` windows of ``size`` bytes begin, each within one document."""
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


def _statements(rng: np.random.Generator, phrasing: str, row: int, share: float, gap: int) -> list[_Planned]:
    """The statements of a row of ``row`` bytes, in their order: as many as ``share`` allows and the row can hold."""
    size = _size(phrasing)
    number = int(share * row) // (2 * (size + 2))
    while (order := _schedule(rng, row, gap, _room(size), number)) is None:
        number -= 1
    facts = draw(rng, number, measuring=False)
    sentences = [phrasing.format(**fact._asdict()).encode() for fact in facts]
    stated: set[int] = set()
    planned = []
    for at, fact in order:
        planned.append(_Planned(at, sentences[fact], fact in stated))
        stated.add(fact)
    return planned


def _schedule(rng: np.random.Generator, row: int, gap: int, room: int, number: int) -> list[tuple[int, int]] | None:
    """When each fact is stated and stated again: places and facts in order, or None where they do not all fit.

    Each fact draws its places as if it were alone; then statements that collide push each other to the right, and
    those that this pushes too far go back to the last places that are possible.
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


def _insert(text: bytes, planned: Iterable[_Planned]) -> tuple[np.ndarray, list[int]]:
    """A row as long as ``text``, of its beginning and the planned sentences, and where each of them begins.

    A sentence stands after a space or a newline, where there is one within NEARBY bytes, between single spaces.
    """
    row, places, cursor = bytearray(), [], 0
    for statement in planned:
        cut = cursor + statement.at - len(row)
        end = _WORD_END.search(text, max(cut - 1, cursor), cut + NEARBY + 1)
        cut = end.end() if end else cut
        row += text[cursor:cut]
        cursor = cut
        if not row.endswith(b" "):
            row += b" "
        places.append(len(row))
        row += statement.sentence + b" "
    row += text[cursor : cursor + len(text) - len(row)]
    return np.frombuffer(row, np.uint8), places


# Haystacks for measuring


def haystacks(
    texts: Texts, rng: np.random.Generator, number: int, length: int, phrasing: str, needles: int = 5, clear: int = 600
) -> Haystack:
    """Random windows of text with facts for measuring in them, and a question about one fact of each.

    Args:
        texts: documents; one is drawn in proportion to its length, of those that are long enough.
        rng: the source of all chance.
        number: samples, n. Their depths are even: each n-th of the range has one.
        length: tokens of a sample.
        phrasing: a sentence with {key} and then {value}, and a full stop after that.
        needles: facts of a sample, each stated once.
        clear: bytes at the end in which no statement begins.

    Raises:
        ValueError: no document has ``length`` bytes, the statements do not fit, or an argument is out of range.
    """
    _check_haystacks(number, length, phrasing, needles, clear)
    room = _room(_size(phrasing))
    # The last sentence, NEARBY + 1 bytes late, still begins in front of the clear bytes.
    space = min(length - clear - NEARBY - 2 + room, length)
    spots = space - room + 1
    depths = rng.permutation((np.arange(number) + rng.random(number)) / number)
    samples = []
    for start, depth in zip(_windows(texts, rng, number, length), depths):
        asked = min(int(depth * spots), spots - 1)
        ats = _around(rng, asked, space, room, needles - 1)
        samples.append(_sample(rng, texts.data[start : start + length].tobytes(), phrasing, ats, ats.index(asked)))
    tokens, questions, answers, places = (np.stack(arrays) for arrays in zip(*samples))
    last = max(length - max(clear, _size(phrasing)) - 1, 1)
    return Haystack(tokens, questions, answers, places / last, places)


def _sample(
    rng: np.random.Generator, text: bytes, phrasing: str, ats: list[int], asked: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.int64]:
    """Tokens, question, answer and place of a window, with facts at ``ats``, of which the ``asked``-th is asked."""
    facts = draw(rng, len(ats), measuring=True)
    sentences = [phrasing.format(**fact._asdict()).encode() for fact in facts]
    tokens, places = _insert(text, map(_Planned, ats, sentences))
    question = f" {phrasing.partition('{value}')[0].format(key=facts[asked].key)}"
    return tokens, _bytes(question), _bytes(facts[asked].value), np.int64(places[asked])


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _around(rng: np.random.Generator, asked: int, space: int, room: int, others: int) -> list[int]:
    """Places for sentences of ``room`` bytes in ``space`` bytes: ``asked`` and ``others`` more, in order."""
    sides = [asked, space - asked - room]  # bytes in front of the asked one and behind it
    counts = [0, 0]
    for _ in range(others):
        free = [side - count * room for side, count in zip(sides, counts)]
        free = [left if left >= room else 0 for left in free]
        counts[int(rng.integers(sum(free)) >= free[0])] += 1
    ats = [asked]
    for first, side, count in zip((0, asked + room), sides, counts):
        if count:
            offsets = np.sort(rng.integers(side - count * room + 1, size=count)).tolist()
            ats += [first + offset + i * room for i, offset in enumerate(offsets)]
    return sorted(ats)


def _check_haystacks(number: int, length: int, phrasing: str, needles: int, clear: int) -> None:
    before, _, after = phrasing.partition("{value}")
    if before.count("{key}") != 1 or after != "." or not phrasing.isascii():
        raise ValueError(
            "phrasing must be a sentence in ASCII that has {key} once and ends with {value} and a full stop. "
            f"Received: {phrasing!r}"
        )
    if number < 1 or needles < 1 or clear < 0:
        raise ValueError(
            "number and needles must be 1 or more and clear 0 or more. "
            f"Received: number={number}, needles={needles}, clear={clear}"
        )
    # One room more than needles: the asked one may stand so that no whole number of rooms fits on either side.
    room = _room(_size(phrasing))
    least = max(clear + NEARBY + 2 + needles * room, (needles + 1) * room)
    if length < least:
        raise ValueError(
            f"length must be at least {least:,} for {needles} statements in front of {clear:,} clear bytes. "
            f"Received: {length:,}"
        )
