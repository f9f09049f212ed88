"""A grammar of sentences that state a fact, for training, and those that are held out from it.

A sentence is an opening, a noun, the key, a link and the value, each of the two in quotes or not, and an end:

    By the register, barge wgql holds "148759".

Held-out openings, nouns and links never occur in training; of those that do, an eighth of the pairs of an opening and
a link never occur together. So a sentence can be new by its opening, noun, link or pair alone, or by the first three.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

KEY_LENGTH, VALUE_LENGTH = 4, 6  # bytes
NEAR = 8  # most bytes between key and value of what is called near
FAR = 9, 40  # least and most bytes between them of what is called far

OPENINGS = (
    "According to the ledger, ", "By the register, ", "They say that ", "Note that ", "In the old book ",
    "It is written that ", "He swore that ", "Remember: ", "As the clerk told us, ", "The captain wrote that ",
    "We read that ", "You will find that ", "On the last page, ", "Her sister knew that ", "In those days ",
    "For the record, ", "Let it be known that ", "Mark this: ", "At the office ", "Under seal, ", "To my surprise ",
    "In the margin: ", "The law says that ", "Some believe that ", "I was told that ", "At dawn ", "From the tower ",
    "Do not forget: ", "The porter said: ", "In plain words, ", "As agreed, ", "In the north ", "On the quay ",
    "Between us, ", "By order, ", "The list shows: ", "It was found that ", "Count again: ", "Beside the door ",
    "In her diary, ", "The guard noted that ", "Since Monday ", "After the war ", "With some care, ", "P.S. ",
    "One more thing: ", "My uncle claims that ", "Item: ",
)  # fmt: skip
HELD_OPENINGS = (
    "Her letter says that ", "By her map, ", "The sailors sing that ", "Below the bridge ", "Ask anybody: ",
    "The inspector reported that ", "During the feast ", "Written in chalk, ", "If memory serves, ", "Nota bene: ",
    "Our neighbours insist that ", "Last winter ",
)  # fmt: skip
NOUNS = (
    "box ", "the box ", "locker ", "account ", "barge ", "room ", "plate ", "the parcel ", "field ", "file ", "house ",
    "star ", "the secret number for ", "the code of ", "ship ", "horse ", "bridge ", "bottle ", "the number on ",
    "ticket ", "drawer ", "the password of ", "case ", "crate ", "well ", "mine ", "farm ", "mill ", "the seal of ",
    "the price of ", "letter ", "chapter ", "the weight of ", "cell ", "regiment ", "soldier ", "the port of ",
    "engine ", "wagon ", "the tax on ", "coin ", "the reef ", "gate ", "street ", "member ID-", "lot #", "item no. ",
    "sample ", "patient ", "key ", "the sum for ", "agent ", "platform ", "the date of ", "tree ", "stone ", "island ",
    "the phone of ", "server ", "the score of ", "bird ", "machine ", "shelf ", "the count at ",
)  # fmt: skip
HELD_NOUNS = (
    "cave ", "prisoner ", "the farmer called ", "comet ", "violin ", "the size of ", "canal ", "the rank of ", "tent ",
    "statue ", "planet ", "theorem ", "the age of ", "clock ", "orchard ", "passport no. ",
)  # fmt: skip
LINKS = (
    " is ", ": ", " = ", " was ", " has ", " reads ", " to ", ", or ", " means ", " gives ", " had ", " got ",
    " shows ", " bears ", " keeps ", " -> ", " took ", " needs ", " owes ", " lists ", " at ", " with ", " by ",
    " made ", ", thus ", " costs ", " counts ", " / ", "; ", " being ", " for ", " marks ", " names ", " pays ",
    " won ", " drew ",
)  # fmt: skip
HELD_LINKS = (" holds ", " equals ", " says ", " sold ", " met ", " on ", " lost ", " saw ", " := ", " bore ")
LONG_LINKS = (
    " was opened by the clerk and gave ", " has long been known as ", ", as everybody knows, is ",
    " was counted twice, and made ", " is said to be worth ", " (see the appendix) is ", " could be reached under ",
    ", if I am not mistaken, was ", " changed hands at ", " has been written down as ", " must be answered with ",
    " still carries the number ", ", which nobody doubts, reads ", " belongs together with ",
)  # fmt: skip
BACKWARD = (
    " is the number of ", " belongs to ", " was given to ", " stands for ", " opens ", " was found on ", " marks ",
    " is what they call ", " was paid for ", " goes with ",
)  # fmt: skip
QUOTES = (("", ""), ("'", "'"), ('"', '"'), ("(", ")"), ("<", ">"))
ENDS = (".", ";", ",", "!", " -", "\n")

KINDS = ("near", "short", "far", "value first")
_SHARES = (0.65, 0.10, 0.15, 0.10)
"""Of KINDS in training."""
INVENTED = 0.25
"""Share of the sentences of training with invented words, so that words never seen before are nothing new."""
QUOTED = 0.3
"""Share of keys, and of values, in quotes."""
REPHRASED = 0.5
"""Share of the questions of training that are phrased unlike the statement."""
HELD_OUT = ("opening", "noun", "link", "pair", "all new")
"""By what a held-out sentence is new."""

_SYLLABLES = [first + vowel for first in (*"bdfghklmnprstvwz", "br", "cl", "st", "tr", "gr") for vowel in "aeiou"]


class Phrasing(NamedTuple):
    """A sentence that states a fact: ``before``, the value, ``after``; one of the two parts has {key}."""

    before: str
    after: str

    @property
    def asks(self) -> bool:
        """Whether the key stands before the value, so that the sentence up to the value is a question."""
        return "{key}" in self.before

    @property
    def size(self) -> int:
        """Bytes of the sentence."""
        return len(self.before + self.after) - len("{key}") + KEY_LENGTH + VALUE_LENGTH

    def sentence(self, key: str, value: str) -> bytes:
        """The statement of a fact."""
        return f"{self.before}{value}{self.after}".replace("{key}", key).encode()

    def question(self, key: str) -> bytes:
        """The sentence up to the value."""
        if not self.asks:
            raise ValueError(f"a sentence with its value first asks nothing. Received: {self}")
        return self.before.replace("{key}", key).encode()


class Words(NamedTuple):
    """What a sentence is made of."""

    opening: str
    noun: str
    link: str


def pair_held_out(opening: str, link: str) -> bool:
    """Whether training never shows the two in one sentence."""
    return zlib.crc32(f"{opening}|{link}".encode()) % 8 == 0


def number_of_sentences() -> int:
    """How many near sentences the grammar has for one key and value, without invented and held-out words."""
    pairs = sum(_quotings(x) for o in OPENINGS for x in LINKS if not pair_held_out(o, x))
    return pairs * len(NOUNS) * len(ENDS)


def _quotings(link: str) -> int:
    """In how many ways key and value may be quoted about a link."""
    keys = QUOTES if len(link) < NEAR else QUOTES[:1]
    return sum(len(QUOTES) if len(link) + len(close) < NEAR else 1 for _, close in keys)


def draw(rng: np.random.Generator) -> tuple[Phrasing, Phrasing]:
    """How a row of training states its facts, and how it asks for them: word for word, or in other words."""
    kind = KINDS[int(rng.choice(len(KINDS), p=_SHARES))]
    words = _words(rng, LONG_LINKS if kind == "far" else LINKS)
    stated = _phrase(rng, kind, words)
    if stated.asks and rng.random() >= REPHRASED:
        return stated, stated
    return stated, rephrased(rng, words)


def near(rng: np.random.Generator, new: str | None = None) -> tuple[Phrasing, Phrasing]:
    """A sentence as in training, key and value near each other, asked word for word; ``new``: by what it is held out.

    Raises:
        ValueError: ``new`` is none of ``HELD_OUT``.
    """
    if new is not None and new not in HELD_OUT:
        raise ValueError(f"a sentence is held out by one of {', '.join(HELD_OUT)}. Received: {new!r}")
    every = new == "all new"
    if new == "pair":
        held = [(o, x) for o in OPENINGS for x in LINKS if pair_held_out(o, x)]
        opening, link = held[rng.integers(len(held))]
    else:
        openings = HELD_OPENINGS if every or new == "opening" else OPENINGS
        opening, link = _pair(rng, openings, HELD_LINKS if every or new == "link" else LINKS)
    noun = _one(rng, HELD_NOUNS if every or new == "noun" else NOUNS)
    phrasing = _phrase(rng, "near", Words(opening, noun, link))
    return phrasing, phrasing


def far(rng: np.random.Generator) -> tuple[Phrasing, Phrasing]:
    """A sentence with 9 to 40 bytes between key and value, asked word for word."""
    phrasing = _phrase(rng, "far", _words(rng, LONG_LINKS, invent=False))
    return phrasing, phrasing


def value_first(rng: np.random.Generator) -> tuple[Phrasing, Phrasing]:
    """A sentence with the value before the key, and a question in other words."""
    words = _words(rng, LINKS, invent=False)
    return _phrase(rng, "value first", words), rephrased(rng, words)


def in_other_words(rng: np.random.Generator) -> tuple[Phrasing, Phrasing]:
    """A sentence, and a question with another opening and link."""
    words = _words(rng, LINKS, invent=False)
    return _phrase(rng, "near", words), rephrased(rng, words)


def short(rng: np.random.Generator) -> tuple[Phrasing, Phrasing]:
    """A noun, the key, a link and the value, of 30 bytes at most, asked word for word."""
    while (phrasing := _phrase(rng, "short", _words(rng, LINKS, invent=False))).size > 30:
        pass
    return phrasing, phrasing


def rephrased(rng: np.random.Generator, words: Words) -> Phrasing:
    """A near sentence about the same noun with another opening and another link."""
    while True:
        opening, link = _pair(rng, OPENINGS, LINKS)
        if opening != words.opening and link != words.link:
            return _phrase(rng, "near", Words(opening, words.noun, link))


def _phrase(rng: np.random.Generator, kind: str, words: Words) -> Phrasing:
    """The sentence of a kind; quotes stand where they leave key and value near."""
    opening, noun, link = words
    free = NEAR - len(link) if kind in ("near", "short") else 2
    key_quotes = _quotes(rng) if free >= 1 else QUOTES[0]
    value_quotes = _quotes(rng) if free >= 1 + len(key_quotes[1]) else QUOTES[0]
    key = noun + "{key}".join(key_quotes)
    end = _one(rng, ENDS)
    if kind == "value first":
        return Phrasing(opening + value_quotes[0], f"{value_quotes[1]}{_one(rng, BACKWARD)}{key}{end}")
    if kind == "short":
        opening, key = "", key[0].upper() + key[1:]
    return Phrasing(opening + key + link + value_quotes[0], value_quotes[1] + end)


def _quotes(rng: np.random.Generator) -> tuple[str, str]:
    return QUOTES[rng.integers(1, len(QUOTES))] if rng.random() < QUOTED else QUOTES[0]


def _words(rng: np.random.Generator, links: Sequence[str], invent: bool = True) -> Words:
    """Words of training; in some sentences, each half of the time invented."""
    opening, link = _pair(rng, OPENINGS, links)
    words = Words(opening, _one(rng, NOUNS), link)
    if not invent or rng.random() >= INVENTED:
        return words
    made: tuple[Callable[[np.random.Generator], str], ...] = (invented_opening, invented_noun, invented_link)
    if links is LONG_LINKS:
        made = made[:2]
    return Words(*(make(rng) if rng.random() < 0.5 else word for make, word in zip(made, words)), *words[len(made) :])


def _pair(rng: np.random.Generator, openings: Sequence[str], links: Sequence[str]) -> tuple[str, str]:
    """An opening and a link that are not held out together."""
    while True:
        opening, link = _one(rng, openings), _one(rng, links)
        if openings is not OPENINGS or links is not LINKS or not pair_held_out(opening, link):
            return opening, link


def _one(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[rng.integers(len(choices))]


# Invented words


def invented_opening(rng: np.random.Generator) -> str:
    """One to four made-up words; never a held-out opening."""
    return _not_in(HELD_OPENINGS, lambda: _capital(_made_up(rng, 1, 4)) + _one(rng, (" ", ", ", ": ", " that ")))


def invented_noun(rng: np.random.Generator) -> str:
    """A made-up word, with an article or mark or without; never a held-out noun."""
    return _not_in(
        HELD_NOUNS, lambda: _one(rng, ("", "", "the ", "a ")) + _made_up(rng, 1, 1) + _one(rng, (" ", " ", "-", " #"))
    )


def invented_link(rng: np.random.Generator) -> str:
    """A made-up verb or mark of at most NEAR bytes; never a held-out link."""
    longest = NEAR - 2

    def link() -> str:
        if rng.random() < 0.3:
            return _one(rng, (" ", "")) + "".join(rng.choice(list(":=~|>*+&@"), rng.integers(1, 3))) + " "
        return f" {_made_up(rng, 1, 1)[:longest]} "

    return _not_in(HELD_LINKS, link)


def _made_up(rng: np.random.Generator, least: int, most: int) -> str:
    words = []
    for _ in range(rng.integers(least, most + 1)):
        word = "".join(_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=rng.integers(1, 4)))
        words.append(word + _one(rng, ("", "", "s", "n", "t", "ck", "ld")))
    return " ".join(words)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _not_in(held: Sequence[str], make: Callable[[], str]) -> str:
    """What ``make`` makes, made anew while a held-out word is in it."""
    held_words = {word.strip(" ,:-#.").lower() for word in held}
    while (made := make()).strip(" ,:-#.").lower() in held_words:
        pass
    return made


def longest() -> int:
    """Bytes of the longest sentence that ``draw`` makes, invented words included."""
    word = 3 * 3 + 2  # three syllables of three letters and an ending
    opening = max(max(map(len, OPENINGS)), 4 * (word + 1) + len(" that "))
    noun = max(max(map(len, NOUNS)), len("the ") + word + 2)
    link = max(NEAR, *map(len, LONG_LINKS), *map(len, BACKWARD))
    return opening + noun + link + KEY_LENGTH + VALUE_LENGTH + 4 + max(map(len, ENDS))
