"""Books' own names and numbers: a measure that nobody put into the texts.

A name that no training book holds can be known from the book alone. Where it stands again, after more than 4,096 bytes
without it, attention has lost it; the model is asked for it from what stands to its left. It answers greedily, so it is
right exactly where each byte is the likeliest after those before it: reading the book as it stands tells.

A name is hard to guess from its left context, so it is also asked after its first two bytes.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.language_model import intervals
from examples.language_model.by_position import documents
from examples.language_model.checkpoint import load, ready, replace
from examples.language_model.corpus import Corpus, Texts
from examples.language_model.model import LanguageModel, Reading
from examples.language_model.needle import parts, read, together
from examples.language_model.training import autocast, device_name

GAP = 4096
"""Bytes before a question in which the name must not stand."""
SHORTEST = 5
"""Bytes of a name or number."""
GIVEN = (0, 2)
"""Bytes of the name that the question gives."""

_LETTER = rb"(?:[A-Za-z]|[\xc3-\xca\xce-\xd4][\x80-\xbf])"  # ASCII, Latin, Greek, Cyrillic in UTF-8
_WORD = re.compile(rb"%b+|\d(?:[\d,]*\d)?" % _LETTER)
_NAME = re.compile(rb"(?:[A-Z]|\xc3[\x80-\x9e])(?:[a-z]|[\xc3-\xca][\x80-\xbf])+|\d[\d,]*\d")


class Question(NamedTuple):
    """Where a name stands that is asked for."""

    place: int
    """byte of the document that the name begins at; what stands before it is the context"""
    name: bytes
    known: int
    """bytes back to where it stood last, more than ``GAP``"""


def words(texts: Texts) -> set[bytes]:
    """All words and numbers of at least ``SHORTEST`` bytes, ASCII letters in lower case."""
    found: set[bytes] = set()
    for i in range(len(texts.names)):
        found.update(_WORD.findall(texts.document(i).tobytes().lower()))
    return {word for word in found if len(word) >= SHORTEST}


def questions(document: bytes, training_words: Collection[bytes]) -> list[Question]:
    """One question for each name that is far from where it stood before; by place.

    A name is a capitalised word or a number, of at least ``SHORTEST`` bytes, that ``training_words`` lack (in lower
    case, as in ``words``) and that the document never writes in small letters. It is asked where it first stands again
    after more than ``GAP`` bytes without it.

    Args:
        document: its bytes.
        training_words: see ``words``.
    """
    last: dict[bytes, int] = {}
    found: dict[bytes, Question] = {}
    small: set[bytes] = set()
    for match in _WORD.finditer(document):
        word, place = match.group(), match.start()
        cut = match.end() == len(document)  # perhaps in the midst of a word
        if cut or len(word) < SHORTEST or word.lower() in training_words:
            continue
        if not _NAME.fullmatch(word):
            small.add(word)
            continue
        back = place - last.get(word, place)
        if back > GAP:
            found.setdefault(word, Question(place, word, back))
        last[word] = place
    return sorted(question for name, question in found.items() if name.lower() not in small)


@torch.no_grad()
def foreseen(model: LanguageModel, tokens: Tensor, reading: Reading, *, update: bool) -> np.ndarray:
    """Whether each byte of ``[B, T]`` but the first is the likeliest after those before it: bool ``[B, T - 1]``."""
    found = []

    def each(start: int, hidden: Tensor) -> None:
        targets = tokens[:, start + 1 : start + 1 + hidden.shape[1]]
        with autocast(tokens.device):
            found.append(torch.stack([model.logits(h).argmax(-1) == t for h, t in zip(hidden, targets)]))

    read(model, tokens[:, :-1], reading, update=update, each=each)
    return torch.cat(found, 1).cpu().numpy()


def correct(seen: np.ndarray, place: int, name: bytes) -> int:
    """How many bytes at the name's end are right in one go: all of them, or from some byte on.

    Args:
        seen: ``[T - 1]``, of the text whose byte ``place`` the name begins at; from ``foreseen``.
        place: at least 1.
        name: its bytes.
    """
    right = seen[place - 1 : place - 1 + len(name)]
    return len(name) if right.all() else len(name) - 1 - int(np.flatnonzero(~right)[-1])


def whole(
    model: LanguageModel, tokens: np.ndarray, asked: list[list[Question]], device: torch.device, *, update: bool
) -> list[int]:
    """What is ``correct`` of each name while whole documents ``[D, T]`` are read, from the initial memories."""
    found = []
    for part in parts(len(tokens), together(model, device, 32, sets=2)):
        text = torch.from_numpy(tokens[part]).to(device)
        seen = foreseen(model, text, model.start(len(part)), update=update)
        found += [correct(row, q.place, q.name) for i, row in zip(part, seen) for q in asked[i]]
    return found


def anew(model: LanguageModel, tokens: np.ndarray, asked: list[list[Question]], device: torch.device) -> list[int]:
    """What is ``correct`` of each name with memories that began ``GAP`` bytes before, and so never read the name."""
    where = [(row, q) for row, questions in zip(tokens, asked) for q in questions]
    longest = max(len(q.name) for _, q in where)
    # What stands after a name does not change the answer; it fills rows up to one length.
    rows = np.stack([np.resize(row[q.place - GAP : q.place + longest], GAP + longest) for row, q in where])
    found = []
    for part in parts(len(rows), together(model, device, 64, sets=2)):
        text = torch.from_numpy(rows[part]).to(device)
        seen = foreseen(model, text, model.start(len(part)), update=True)
        found += [correct(row, GAP, where[i][1].name) for i, row in zip(part, seen)]
    return found


def measure(
    folder: Path, corpus: Corpus, out: Path, device: torch.device, *, length: int, tell: Callable[[str], None] = print
) -> Path:
    """Ask the model of a folder for the names of every held-out document; saves every answer in ``out``.

    A model with memories is asked with memories "carried" from the document's beginning, "reset" (begun ``GAP`` bytes
    before each question) and "frozen" (never written).

    Args:
        folder: of a trained model.
        corpus: names that its training documents hold are not asked for.
        out: a JSON file: questions by document, and for each the bytes at the name's end that were right, by mode.
        device: to read on.
        length: bytes of a document that are read; shorter ones are left out.
        tell: receives a line for each result.

    Raises:
        FileNotFoundError: nothing was trained in the folder.
        ValueError: ``length`` is no multiple of 1,024, no document is longer, or none has a name to ask for.
    """
    ready(out)
    tokens, names = documents(corpus, length)
    model, experiment = load(folder, device, memory_scope="sequence")
    known = words(corpus.train)
    asked = [questions(row.tobytes(), known) for row in tokens]
    if not any(asked):
        raise ValueError(
            f"no name of {len(names)} held-out documents stands again after {GAP:,} bytes. Received: length={length:,}"
        )
    right = {}
    if model.memories:
        right["carried"] = whole(model, tokens, asked, device, update=True)
        right["reset"] = anew(model, tokens, asked, device)
    right["frozen" if model.memories else "no memory"] = whole(model, tokens, asked, device, update=False)
    about: dict[str, Any] = {"corpus": corpus.sha256, "device": device_name(device), "experiment": experiment.tables()}
    of = [i for i, found in enumerate(asked) for _ in found]
    rows = [(i, q.place, q.name.decode(), q.known) for i, q in zip(of, (q for found in asked for q in found))]
    writers = [corpus.writer(name) for name in names]
    results = {
        **about, "trained": folder.name, "length": length, "documents": names, "writers": writers,
        "questions": rows, "right": right,
    }  # fmt: skip
    for line in summary(results):
        tell(line)
    replace(out, lambda beside: beside.write_text(json.dumps(results)))
    return out


def shares(results: Mapping[str, Any], mode: str, given: int) -> intervals.Measured:
    """The share of each document's names that were answered exactly after ``given`` bytes of them."""
    by_document: dict[str, list[bool]] = {}
    for (i, _, name, _), right in zip(results["questions"], results["right"][mode]):
        by_document.setdefault(results["documents"][i], []).append(right >= len(name.encode()) - given)
    values = {document: float(np.mean(found)) for document, found in by_document.items()}
    return intervals.Measured(values, dict(zip(results["documents"], results["writers"])))


def summary(results: dict[str, Any]) -> Iterator[str]:
    """A line for each mode and each number of bytes given, then the paired differences."""
    modes = list(results["right"])
    for given in GIVEN:
        asked = "from the left context" if not given else f"after their first {given} bytes"
        for mode in modes:
            found = intervals.over_writers(shares(results, mode, given))
            yield (
                f"{mode}: of {len(results['questions']):,} names {_percent(found)} are right {asked}, mean of "
                f"{found.units} writers"
            )
        for mode in modes[1:]:
            more = intervals.difference(shares(results, modes[0], given), shares(results, mode, given))
            yield f"{modes[0]} less {mode}, {asked}: {_percent(more)}"


def _percent(found: intervals.Interval) -> str:
    return f"{100 * found.mean:.1f}% ({100 * found.low:.1f} to {100 * found.high:.1f})"
