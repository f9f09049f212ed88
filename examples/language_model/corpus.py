"""Texts to train and measure on: documents as UTF-8 bytes, one after another, in files that are read as they lie.

A corpus is a folder of three files. ``train.bin`` and ``heldout.bin`` hold the documents' bytes; ``corpus.json`` holds
the format, the kind of the source, the SHA-256 of both files together (``cat train.bin heldout.bin | sha256sum``) and,
for each of them, its size, its SHA-256, and the documents' ids and starts. The same source gives the same bytes.
"""

import hashlib
import json
import lzma
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from rich.console import Console
from rich.progress import Progress

FORMAT = "fwpkm corpus 1"
SPLITS = ("train", "heldout")
FILES = frozenset({"train.bin", "heldout.bin", "corpus.json"})

LARGEST_CODE_FILE = 200_000
"""Bytes. Larger files of code are mostly tables that a program wrote."""
SMALLEST_CODE_DOCUMENT = 16_000
"""Characters."""
LARGEST_CODE_DOCUMENT = 2_000_000
"""Characters; of training documents only."""

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


class _Document(NamedTuple):
    heldout: bool
    name: str
    text: bytes


_Documents: TypeAlias = Iterator[_Document]


# Preparing


def prepare(source: Path, out: Path, code: bool = False) -> Path:
    """Build the corpus of ``source`` in the folder ``out``: all of it, or nothing.

    Sources are:
        - a ``*.jsonl`` or ``*.jsonl.xz`` file or a folder of them, one object with "id" and "text" a line; the
          documents of files with "heldout" in their names are held out, those of the others are for training;
        - a folder of ``*.txt`` and ``*.md`` files, nested or not, each one document; those are held out whose relative
          path has a SHA-256 that is 0 mod 10;
        - with ``code``, a tree of C sources, one document for the .c and .h files of each directory; those are held out
          whose directory's first three parts have a SHA-256 that is 0 mod 10.

    Args:
        source: the file or folder.
        out: the folder to make; one that holds a corpus and nothing else is replaced.
        code: whether ``source`` is a tree of C sources.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: there is no ``source``.
        FileExistsError: ``out`` is a file, or a folder that holds something else.
        ValueError: ``source`` holds no documents, or a file of it is damaged; or no document of a folder of text is
            held out, or every one.
    """
    source, out = Path(source), Path(out)
    _check_target(out)
    # Beside the target, so that the last step is a rename.
    unfinished = out.absolute().parent / f".{out.absolute().name}-{secrets.token_hex(4)}.tmp"
    try:
        with Progress(console=Console(stderr=True)) as progress:
            kind, documents = _open(source, code, progress)
            unfinished.mkdir(parents=True)
            _write(unfinished, kind, documents, source)
        _move(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _check_target(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file. Name a folder that does not exist yet.")
    found = {path.name for path in out.iterdir()}
    if found and ("corpus.json" not in found or found - FILES):
        raise FileExistsError(
            f"{out} holds other files than a corpus ({', '.join(sorted(found - FILES)[:3]) or 'no corpus.json'}). "
            "Name a folder that does not exist yet."
        )


def _open(source: Path, code: bool, progress: Progress) -> tuple[str, _Documents]:
    """The kind of ``source`` and its documents."""
    if not source.exists():
        raise FileNotFoundError(f"There is no {source}. Name a folder of text files, or a .jsonl or .jsonl.xz file.")
    if code:
        return "code", _code(source, progress)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    lines = [path for path in files if path.name.endswith((".jsonl", ".jsonl.xz"))]
    if lines:
        return "jsonl", _jsonl(lines, progress)
    return "text", _text(source, progress)


def _write(folder: Path, kind: str, documents: _Documents, source: Path) -> None:
    splits: dict[str, Any] = {split: {"ids": [], "starts": [0]} for split in SPLITS}
    with (folder / "train.bin").open("wb") as train, (folder / "heldout.bin").open("wb") as heldout:
        for document in documents:
            split = splits[SPLITS[document.heldout]]
            file = heldout if document.heldout else train
            split["ids"].append(document.name)
            split["starts"].append(split["starts"][-1] + file.write(document.text))
        for file in (train, heldout):
            _sync(file)
    _check_both(source, kind, *(len(splits[split]["ids"]) for split in SPLITS))
    about = {"format": FORMAT, "kind": kind, "sha256": _sha256(folder / f"{split}.bin" for split in SPLITS)}
    for split, its in splits.items():
        digest = _sha256([folder / f"{split}.bin"])
        about[split] = {"documents": len(its["ids"]), "bytes": its["starts"][-1], "sha256": digest, **its}
    with (folder / "corpus.json").open("wb") as file:
        file.write((json.dumps(about, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        _sync(file)


def _check_both(source: Path, kind: str, train: int, heldout: int) -> None:
    """A file of lines may be meant for one side; a rule that leaves a side empty is never meant."""
    if train + heldout == 0:
        wanted = {"code": "directories with 16,000 characters or more of .c and .h files", "jsonl": "lines with text"}
        wanted["text"] = "*.txt, *.md, *.jsonl or *.jsonl.xz files with text in them"
        raise ValueError(f"{source} holds no documents. Name a folder that has {wanted[kind]}.")
    if kind != "jsonl" and 0 in (train, heldout):
        raise ValueError(
            f"{source}: of {train + heldout} documents {train} are for training and {heldout} are held out; each side "
            "needs one. The hash of a document's path decides: add documents (about 1 in 10 is held out), rename some, "
            "or write two .jsonl files, one with 'heldout' in its name, with an object of 'id' and 'text' on each line."
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
    """Put the finished folder in its place; a corpus that lies there gives way, or stays when that fails."""
    if not out.exists():
        unfinished.rename(out)
        return
    old = unfinished.with_suffix(".old")
    out.rename(old)
    try:
        unfinished.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


# Sources


def _jsonl(files: list[Path], progress: Progress) -> _Documents:
    for path in files:
        with progress.open(path, "rb", description=path.name) as file:
            for number, line in enumerate(_lines(path, file), 1):
                name, text = _parse(path, number, line) if line.strip() else ("", b"")
                if text:
                    yield _Document("heldout" in path.name.lower(), name, text)


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    if path.suffix != ".xz":
        yield from file
        return
    try:
        with lzma.open(file) as unpacked:
            yield from unpacked
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is damaged or was cut off ({error}). Take another copy.") from error


def _parse(path: Path, number: int, line: bytes) -> tuple[str, bytes]:
    """The id and the text of a line."""
    try:
        document = json.loads(line.decode("utf-8", "replace"))
    except ValueError:
        document = None
    fields = document if isinstance(document, dict) else {}
    name, text = fields.get("id"), fields.get("text")
    if not isinstance(name, str) or not isinstance(text, str):
        start = line[:60].decode("utf-8", "replace").strip()
        raise ValueError(
            f'{path}, line {number}: every line must be a JSON object with an "id" and a "text", both strings. '
            f"Received: {start!r}"
        )
    return name, text.encode("utf-8", "replace")


def _text(folder: Path, progress: Progress) -> _Documents:
    paths = [path for path in _files(folder) if path.suffix.lower() in (".txt", ".md")]
    for path in progress.track(paths, description=folder.name):
        name = path.relative_to(folder).as_posix()
        text = _utf8(path.read_bytes())
        if text:
            yield _Document(_one_in_ten(name), _printable(name), text.encode())


def _code(root: Path, progress: Progress) -> _Documents:
    folders: dict[Path, list[Path]] = {}
    for path in _files(root):
        if path.suffix in (".c", ".h") and path.stat().st_size <= LARGEST_CODE_FILE:
            folders.setdefault(path.parent, []).append(path)
    for folder, files in progress.track(folders.items(), description=root.name):
        name = folder.relative_to(root).as_posix()
        heldout = _one_in_ten("/".join(name.split("/")[:3]))
        text = "".join(
            f"/* FILE: {_printable(path.relative_to(root).as_posix())} */\n{_utf8(path.read_bytes())}" for path in files
        )
        if len(text) >= SMALLEST_CODE_DOCUMENT:
            yield _Document(heldout, _printable(name), (text if heldout else text[:LARGEST_CODE_DOCUMENT]).encode())


def _files(folder: Path) -> list[Path]:
    """The files in ``folder`` and below, links aside, directory by directory, both in the order of their bytes."""
    found = []
    for parent, _, names in sorted(os.walk(folder), key=lambda entry: os.fsencode(entry[0])):
        paths = (Path(parent, name) for name in sorted(names, key=os.fsencode))
        found += [path for path in paths if path.is_file() and not path.is_symlink()]
    return found


def _one_in_ten(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest(), "big") % 10 == 0


def _printable(name: str) -> str:
    return _utf8(os.fsencode(name))


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "replace")


# Loading


def load(folder: Path) -> Corpus:
    """Open a corpus of :func:`prepare`. Sizes are checked; the bytes, which may be many, are not read.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: the folder holds another thing than a corpus, or a file that was cut off.
    """
    folder = Path(folder)
    for name in sorted(FILES):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"There is no {folder / name}. {_again(folder)}")
    about = _about(folder)
    train, heldout = (_texts(folder, split, about[split]) for split in SPLITS)
    return Corpus(train, heldout, about["sha256"])


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "corpus.json").read_bytes())
    except ValueError as error:
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
