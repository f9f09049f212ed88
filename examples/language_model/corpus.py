"""Texts to train and measure on: documents as UTF-8 bytes, one after another, in files that are read as they lie.

A corpus is a folder of three files. ``train.bin`` and ``heldout.bin`` hold the documents' bytes; ``corpus.json`` holds
the format, the kind of the source, the SHA-256 of both files together (``cat train.bin heldout.bin | sha256sum``) and,
for each of them, its size, its SHA-256, and the documents' ids and starts; then the SHA-256 of each file of the source,
the writers of held-out documents, and what was left out, and why. The same source gives the same bytes.
"""

import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from examples.language_model import holdout
from examples.language_model.sources import Document, Source, listed

FORMAT = "fwpkm corpus 1"
SPLITS = ("train", "heldout")
FILES = ("corpus.json", "train.bin", "heldout.bin")
NOT_OURS = ("lost+found", ".unfinished-")
"""Beginnings of names that an empty folder may hold: those of a mount point, and of a run that was killed."""

_PREPARE = "python -m examples.language_model prepare"


class Texts(NamedTuple):
    """Documents, one after another.

    Attributes:
        data: uint8 [n], a memory map of the file.
        starts: int64 [D + 1]; document i is ``data[starts[i]:starts[i + 1]]``.
        names: the D documents' ids.
    """

    data: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]

    def document(self, i: int) -> np.ndarray:
        """The bytes of document ``i``: uint8, a view. Raises IndexError where there is none."""
        if not 0 <= i < len(self.names):
            raise IndexError(f"There are documents 0 to {len(self.names) - 1}. Received: {i}")
        return self.data[self.starts[i] : self.starts[i + 1]]


class Corpus(NamedTuple):
    """What to train on, what to measure on, and the SHA-256 of the bytes of both."""

    train: Texts
    heldout: Texts
    sha256: str
    writers: Mapping[str, str] = {}
    """of held-out documents, by id"""

    def writer(self, name: str) -> str:
        """Who wrote the document of an id: who contributed it, if nothing else is known."""
        return self.writers.get(name, holdout.contributor(name))


# Preparing


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def prepare(
    source: Path, out: Path, code: bool = False, hold_out: int = 0, tell: Callable[[str], None] = _tell
) -> Path:
    """Build the corpus of ``source`` in the folder ``out``: all of it, or nothing.

    Sources are:
        - a ``*.jsonl`` or ``*.jsonl.xz`` file, one object with "id" and "text" a line; its documents are held out if
          "heldout" is in the file's name, else for training;
        - a folder of such files and of ``*.txt`` and ``*.md`` files, nested or not; each of the latter is one document,
          held out if its relative path has a SHA-256 that is 0 mod 10. Other files are named and left out, and so are
          lines of objects that have neither an "id" nor a "text";
        - with ``code``, a tree of C sources, one document for the .c and .h files of each directory; those are held out
          whose directory's first three parts have a SHA-256 that is 0 mod 10.

    Texts are UTF-8; a byte order mark comes off.

    Args:
        source: the file or folder.
        out: the folder to make, or to fill if it is empty; a corpus that it holds is replaced.
        code: whether ``source`` is a tree of C sources. Bytes in it that are not UTF-8 become U+FFFD, and are counted.
        hold_out: how many contributors (the first part of an id or path) of the training documents to hold out beside
            those that are: those whose names have the smallest SHA-256, with all their documents. Of each held-out
            document the writer is looked up (writers.toml); then no writer is on both sides, and no edition is held out
            twice: ``holdout.hold_out``.
        tell: receives what was left out or replaced, and what the corpus holds, a line each.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: there is no ``source``.
        FileExistsError: ``out`` is a file, or a folder that holds something else.
        ValueError: ``source`` holds no documents, a file of it is damaged, texts are not UTF-8, or two documents have
            one id; or no document of a folder of text is held out, or every one; or ``hold_out`` is too large.
    """
    source, out = Path(source), Path(out)
    _check_target(out)
    # Inside the target or beside it, so that the last step is a rename; a mount point is another file system.
    home = out if out.exists() else out.absolute().parent
    unfinished = home / f".unfinished-{out.absolute().name}-{secrets.token_hex(4)}"
    try:
        opened, books = Source(source, code), holdout.Books.read()
        with Progress(console=Console(stderr=True)) as progress:
            unfinished.mkdir(parents=True)
            documents: Iterable[Document] = opened.documents(progress)
            if hold_out:
                documents, left_out = holdout.hold_out(list(documents), hold_out, books)
                opened.left_out |= left_out
            about = _write(unfinished, documents)
        _check_both(opened, *(about[split]["documents"] for split in SPLITS))
        about |= _describe(opened, hold_out, books, about)
        with (unfinished / "corpus.json").open("wb") as file:
            file.write((json.dumps(about, ensure_ascii=False) + "\n").encode())
            _sync(file)
        _move(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _report(about, tell)
    return out


def _check_target(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file. Name a folder that does not exist yet.")
    found = {path.name for path in out.iterdir() if not path.name.startswith(NOT_OURS)}
    if found and ("corpus.json" not in found or found - set(FILES)):
        raise FileExistsError(
            f"{out} holds other files than a corpus ({', '.join(sorted(found - set(FILES))[:3]) or 'no corpus.json'}). "
            "Name a folder that is empty or does not exist yet."
        )


def _write(folder: Path, documents: Iterable[Document]) -> dict[str, Any]:
    """Write the documents' bytes; returns what ``corpus.json`` says of them."""
    splits: dict[str, Any] = {split: {"ids": [], "starts": [0]} for split in SPLITS}
    names: set[str] = set()
    with (folder / "train.bin").open("wb") as train, (folder / "heldout.bin").open("wb") as heldout:
        for document in documents:
            if document.name in names:
                raise ValueError(f"two documents have the id {document.name!r}: results are told apart by ids")
            names.add(document.name)
            split = splits[SPLITS[document.heldout]]
            file = heldout if document.heldout else train
            split["ids"].append(document.name)
            split["starts"].append(split["starts"][-1] + file.write(document.text))
        for file in (train, heldout):
            _sync(file)
    about: dict[str, Any] = {"sha256": _sha256(folder / f"{split}.bin" for split in SPLITS)}
    for split, its in splits.items():
        digest = _sha256([folder / f"{split}.bin"])
        about[split] = {"documents": len(its["ids"]), "bytes": its["starts"][-1], "sha256": digest, **its}
    return about


def _describe(source: Source, hold_out: int, books: holdout.Books, about: dict[str, Any]) -> dict[str, Any]:
    ids = about["heldout"]["ids"]
    return {
        "format": FORMAT, "kind": source.kind, "inputs": source.inputs, "hold_out": hold_out,
        "left_out": source.left_out, "replaced": source.replaced,
        "writers": {name: ", ".join(books.writers_of(name)) for name in ids},
        "unlisted": [name for name in ids if name not in books.writers] if hold_out else [],
    }  # fmt: skip


def _report(about: dict[str, Any], tell: Callable[[str], None]) -> None:
    """What a user should know before training."""
    if left_out := [f"{name} ({why})" for name, why in about["left_out"].items()]:
        tell(f"left out: {len(left_out):,}, all named in corpus.json: {listed(left_out, 3)}")
    if replaced := about["replaced"]:
        tell(f"not UTF-8, replaced by U+FFFD: {sum(replaced.values()):,} places in {listed(list(replaced))}")
    if unlisted := about["unlisted"]:
        tell(f"not in writers.toml, so taken to be by their contributors: {listed(unlisted)}")
    train, heldout = (about[split] for split in SPLITS)
    tell(
        f"{train['documents']:,} documents to train on, {train['bytes'] / 1e6:.1f} MB; {heldout['documents']:,} held "
        f"out, {heldout['bytes'] / 1e6:.1f} MB, by {len(set(about['writers'].values())):,} writers"
    )


def _check_both(source: Source, train: int, heldout: int) -> None:
    """A file of lines may be meant for one side; a rule that leaves a side empty is never meant."""
    if train + heldout == 0:
        wanted = "*.txt, *.md, *.jsonl or *.jsonl.xz files with text in them"
        if source.code:
            wanted = "directories with 16,000 characters or more of .c and .h files"
        found = listed([f"{name} ({why})" for name, why in source.left_out.items()])
        raise ValueError(
            f"{source.path} holds no documents. Name a folder that has {wanted}. Found: {found or 'nothing'}"
        )
    if source.kind != "jsonl" and 0 in (train, heldout):
        raise ValueError(
            f"{source.path}: of {train + heldout} documents {train} are for training and {heldout} are held out; each "
            "side needs one. The hash of a document's path decides: add documents (about 1 in 10 is held out), rename "
            "some, hold contributors out (--hold-out), or write two .jsonl files, one with 'heldout' in its name, with "
            "an object of 'id' and 'text' on each line."
        )


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())  # or a crash soon after the rename could leave empty files under the name


def _sha256(files: Iterable[Path]) -> str:
    """The hex digest of the files' bytes, one file after another."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _move(unfinished: Path, out: Path) -> None:
    """Put the finished files in their place; those of a corpus that lies there give way, or stay when that fails."""
    if not out.exists():
        unfinished.rename(out)
        return
    old = unfinished / "old"
    old.mkdir()
    moves = [(out / name, old / name) for name in FILES if (out / name).exists()]
    # corpus.json goes first and comes last: a crash in between leaves no corpus, never one of two halves.
    moves += [(unfinished / name, out / name) for name in reversed(FILES)]
    done: list[tuple[Path, Path]] = []
    try:
        for move in moves:
            move[0].rename(move[1])
            done.append(move)
    except OSError:
        for there, back in reversed(done):
            back.rename(there)
        raise


# Loading


def load(folder: Path) -> Corpus:
    """Open a corpus of :func:`prepare`. Sizes are checked; the bytes, which may be many, are not read.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: the folder holds another thing than a corpus, or a file that was cut off.
    """
    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"There is no {folder / name}. {_again(folder)}")
    about = _about(folder)
    train, heldout = (_texts(folder, split, about[split]) for split in SPLITS)
    return Corpus(train, heldout, about["sha256"], about.get("writers", {}))


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "corpus.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'corpus.json'} is damaged ({error}). {_again(folder)}") from error
    found = about.get("format") if isinstance(about, dict) else None
    if found != FORMAT:
        raise ValueError(f"{folder / 'corpus.json'} is of format {found!r}, not {FORMAT!r}. {_again(folder)}")
    if not isinstance(about.get("sha256"), str) or not all(isinstance(about.get(split), dict) for split in SPLITS):
        raise ValueError(f"{folder / 'corpus.json'} lacks 'sha256', 'train' or 'heldout'. {_again(folder)}")
    return about


def _texts(folder: Path, split: str, about: dict[str, Any]) -> Texts:
    path = folder / f"{split}.bin"
    size, ids = path.stat().st_size, about.get("ids")
    try:
        starts = np.array(about.get("starts"), np.int64)
    except (TypeError, ValueError, OverflowError):
        starts = np.zeros(0, np.int64)
    sound = starts.ndim == 1 and starts.size > 0 and starts[0] == 0 and (np.diff(starts) >= 0).all()
    if not sound or not isinstance(ids, list) or len(ids) != len(starts) - 1:
        raise ValueError(f"{folder / 'corpus.json'}: the ids and starts of {split!r} do not fit. {_again(folder)}")
    if size != starts[-1]:
        raise ValueError(f"{path} has {size:,} bytes, and corpus.json says {starts[-1]:,}. {_again(folder)}")
    # No file of zero bytes can be mapped.
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    return Texts(data, starts, tuple(map(str, ids)))


def _again(folder: Path) -> str:
    return f"Run `{_PREPARE} SOURCE {folder}` to build the corpus."
