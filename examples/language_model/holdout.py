"""Which books are held out, and by whom they are: no writer on both sides, no edition twice."""

import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from examples.language_model.sources import Document

KNOWN = Path(__file__).with_name("writers.toml")


class Books(NamedTuple):
    """What is known of books beside their ids."""

    writers: Mapping[str, tuple[str, ...]]
    """of a document's id"""
    editions: Mapping[str, str]
    """that a document is a volume of"""

    @classmethod
    def read(cls, path: Path = KNOWN) -> "Books":
        """From a TOML file with the tables [writers], id = "name" or a list of names, and [editions], id = "name"."""
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        named = {name: (x,) if isinstance(x, str) else tuple(x) for name, x in tables["writers"].items()}
        return cls(named, tables["editions"])

    def writers_of(self, name: str) -> tuple[str, ...]:
        """Of a document; its contributor, if nothing else is known."""
        return self.writers.get(name, (contributor(name),))


def contributor(name: str) -> str:
    """The first part of a document's id or path."""
    return name.partition("/")[0]


def chosen(names: Iterable[str], number: int) -> set[str]:
    """The contributors that are held out: those whose names have the smallest SHA-256.

    Raises:
        ValueError: there are not more of them than ``number``.
    """
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    if not 0 <= number < len(ordered):
        raise ValueError(
            f"hold_out must be at least 0 and less than the {len(ordered)} contributors of the training documents, "
            f"which are the first parts of their ids. Received: {number}"
        )
    return set(ordered[:number])


def hold_out(documents: list[Document], number: int, books: Books) -> tuple[list[Document], dict[str, str]]:
    """Hold out ``number`` contributors of the training documents, with all their documents.

    Then what would be on both sides, or twice on one, is left out: held-out documents of several writers, volumes of an
    edition after the first by id, and training documents that a held-out writer has a part in.

    Args:
        documents: of both sides.
        number: of contributors to hold out beside those that are.
        books: who wrote what.

    Returns:
        the documents that stay, in their order, and the ids of the others: why.

    Raises:
        ValueError: as in ``chosen``, or nothing is left to train on.
    """
    more = chosen((contributor(x.name) for x in documents if not x.heldout), number)
    sides = [x._replace(heldout=x.heldout or contributor(x.name) in more) for x in documents]
    left_out = {x.name: why for x in sides if x.heldout and (why := _unfit(x.name, sides, books))}
    kept = {x.name for x in sides if x.heldout and x.name not in left_out}
    writers = {writer for name in kept for writer in books.writers_of(name)}
    for document in sides:
        both = writers.intersection(books.writers_of(document.name))
        if both and not document.heldout:
            left_out[document.name] = f"by {', '.join(sorted(both))}, whose books are held out"
    stay = [x for x in sides if x.name not in left_out]
    if all(x.heldout for x in stay):
        raise ValueError(f"no training document is left beside those of held-out writers. Received: hold_out={number}")
    return stay, left_out


def _unfit(name: str, documents: list[Document], books: Books) -> str:
    """Why a document cannot be held out; nothing if it can."""
    writers, edition = books.writers_of(name), books.editions.get(name)
    if len(writers) > 1:
        return f"of several writers: {', '.join(writers)}"
    if edition is None:
        return ""
    first = min(x.name for x in documents if x.heldout and books.editions.get(x.name) == edition)
    return "" if name == first else f"of an edition that {first} is of"
