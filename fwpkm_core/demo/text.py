"""Files to token ids."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fwpkm.demo import DemoError

SHIPPED = "scandal_in_bohemia.txt"
SHIPPED_TITLE = "A Scandal in Bohemia (A. Conan Doyle, 1891; ships with fwpkm)"
TOKEN = re.compile(r"\w+|[^\w\s]")


class Text(NamedTuple):
    """A text as ids into its own vocabulary."""

    title: str
    ids: np.ndarray
    """``[T]`` int64 in [0, V), numbered by first appearance."""
    vocabulary: list[str]
    """The V different tokens."""

    @property
    def next_ids(self) -> np.ndarray:
        """``[T]``: the token that follows each one; V, an id of its own, after the last."""
        return np.append(self.ids[1:], len(self.vocabulary))


def load(paths: Sequence[str]) -> Text:
    """The files in order as one text, or without any the text that ships with the package.

    Raises:
        DemoError: a file is missing, unreadable, binary or empty, or there are too few tokens to recall one.
    """
    if not paths:
        story = resources.files("fwpkm.data").joinpath(SHIPPED).read_text("utf-8")
        return tokenize(SHIPPED_TITLE, story)
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return tokenize(", ".join(paths[:3]) + more, "\n".join(_read(path) for path in paths))


def tokenize(title: str, text: str) -> Text:
    """Number the tokens of ``text``: the matches of ``\\w+|[^\\w\\s]``.

    Raises:
        DemoError: fewer than two different tokens.
    """
    tokens = TOKEN.findall(text)
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(token, len(numbers)) for token in tokens], np.int64)
    if len(numbers) < 2:
        raise DemoError(
            f"{title}: at least 2 different tokens are needed, since the demo recalls which one follows. "
            f"Received: {len(ids)} {'token' if len(ids) == 1 else 'tokens'}, {len(numbers)} different"
        )
    return Text(title, ids, list(numbers))


def _read(path: str) -> str:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DemoError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DemoError(f"{path}: is a directory; name the text files in it instead") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DemoError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if b"\0" in data:
        raise DemoError(f"{path}: is a binary file or UTF-16 (it holds NUL bytes); the demo reads UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DemoError(
            f"{path}: is a binary file or not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); "
            f"the demo reads UTF-8 text"
        ) from None
    if not TOKEN.search(text):
        raise DemoError(f"{path}: is empty, it holds no token")
    return text
