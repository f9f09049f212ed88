"""Documents of books and code, read from users' files; what cannot be read is named, never guessed."""

import hashlib
import io
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

LINES = (".jsonl", ".jsonl.xz")
TEXT = (".txt", ".md")
CODE = (".c", ".h")
BOM = b"\xef\xbb\xbf"  # byte order mark of UTF-8

LARGEST_CODE_FILE = 200_000
"""Bytes. Larger files of code are mostly tables that a program wrote."""
SMALLEST_CODE_DOCUMENT = 16_000
"""Characters."""
LARGEST_CODE_DOCUMENT = 2_000_000
"""Characters; of training documents only."""


class Document(NamedTuple):
    """A text, and whether it is held out."""

    heldout: bool
    name: str
    text: bytes
    """UTF-8, without a byte order mark"""


class Source:
    """A file, or a folder with all that lies below it.

    Args:
        path: a file of lines; a folder of lines, texts or both; or a tree of C code.
        code: whether it is a tree of code.

    Attributes:
        kind: "jsonl", "text", "jsonl and text", or "code".
        inputs: the SHA-256 of each file that was read, by its path in the folder.
        left_out: what was found and is no document, by its path or id: why.
        replaced: of files of code, how many bytes or sequences that are not UTF-8 became U+FFFD.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        OSError: a folder of it cannot be read.
    """

    def __init__(self, path: Path, code: bool):
        """Find the files."""
        if not path.exists():
            raise FileNotFoundError(f"There is no {path}. Name a folder of text files, or a .jsonl or .jsonl.xz file.")
        self.path, self.folder, self.code = path, path if path.is_dir() else path.parent, code
        self.inputs: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.replaced: dict[str, int] = {}
        found = _files(path) if path.is_dir() else [path]
        links = [file for file in found if file.is_symlink() and file != path]
        files = [file for file in found if not file.is_symlink() or file == path]
        self.lines, self.texts, self.sources = (
            [file for file in files if _ends(file, endings)] * wanted
            for endings, wanted in ((LINES, not code), (TEXT, not code and path.is_dir()), (CODE, code))
        )
        if not code:
            known = {*self.lines, *self.texts}
            others = [file for file in files if file not in known]
            why = {**dict.fromkeys(links, "a link"), **dict.fromkeys(others, "another kind of file")}
            self.left_out |= {self._name(file): said for file, said in why.items() if _shown(self._name(file))}
        kinds = {"code": code, "jsonl": self.lines, "text": self.texts}
        self.kind = " and ".join(kind for kind, files in kinds.items() if files) or "text"

    def documents(self, progress: Progress) -> Iterator[Document]:
        """Read them all, in the order of the paths' bytes, folder by folder; lines come first.

        Raises:
            ValueError: a line is no document, an archive is damaged, or texts are not UTF-8; names them.
        """
        for path in self.lines:
            yield from self._lines(path, progress)
        yield from self._texts(progress)
        yield from self._code(progress)

    def _name(self, path: Path) -> str:
        return _printable(path.relative_to(self.folder).as_posix())

    def _read(self, path: Path) -> bytes:
        data = path.read_bytes()
        self.inputs[self._name(path)] = hashlib.sha256(data).hexdigest()
        return data

    def _lines(self, path: Path, progress: Progress) -> Iterator[Document]:
        data = self._read(path)
        first = next(_unpacked(path, io.BytesIO(data)), b"").removeprefix(BOM)
        if self.path.is_dir() and _of_something_else(first):
            self.left_out[self._name(path)] = 'lines of other objects, without "id" and "text"'
            return
        with progress.wrap_file(io.BytesIO(data), len(data), description=path.name) as file:
            for number, line in enumerate(_unpacked(path, file), 1):
                line = line.removeprefix(BOM) if number == 1 else line
                if not line.strip():
                    continue
                name, text = _parse(path, number, line)
                if text:
                    yield Document("heldout" in path.name.lower(), name, text)
                else:
                    self.left_out[name] = "empty"

    def _texts(self, progress: Progress) -> Iterator[Document]:
        unreadable = []
        for path in progress.track(self.texts, description=self.path.name) if self.texts else ():
            name = path.relative_to(self.folder).as_posix()
            data = self._read(path)
            if fault := _fault(data):
                unreadable.append(f"{name} ({fault})")
            elif not (text := data.removeprefix(BOM)):
                self.left_out[_printable(name)] = "empty"
            else:
                yield Document(one_in_ten(name), _printable(name), text)
        if unreadable:
            raise ValueError(
                f"{self.path}: {len(unreadable)} of {len(self.texts)} files are not UTF-8: {listed(unreadable)}. "
                "Convert them, for example with `iconv -f WINDOWS-1252 -t UTF-8`, or take them out."
            )

    def _code(self, progress: Progress) -> Iterator[Document]:
        folders: dict[Path, list[Path]] = {}
        for path in self.sources:
            if path.stat().st_size <= LARGEST_CODE_FILE:
                folders.setdefault(path.parent, []).append(path)
        for folder, files in progress.track(folders.items(), description=self.path.name) if folders else ():
            name = folder.relative_to(self.folder).as_posix()
            heldout = one_in_ten("/".join(name.split("/")[:3]))
            text = "".join(map(self._code_file, files))
            if len(text) >= SMALLEST_CODE_DOCUMENT:
                text = text if heldout else text[:LARGEST_CODE_DOCUMENT]
                yield Document(heldout, _printable(name), text.encode())

    def _code_file(self, path: Path) -> str:
        """A file under its name, or nothing if it is binary."""
        data, name = self._read(path), self._name(path)
        if b"\0" in data:
            self.left_out[name] = "it holds NUL bytes: binary, or UTF-16"
            return ""
        text = data.decode("utf-8-sig", "replace")
        if bad := text.count("\ufffd") - data.count("\ufffd".encode()):
            self.replaced[name] = bad
        return f"/* FILE: {name} */\n{text}"


def listed(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def one_in_ten(name: str) -> bool:
    """Whether a path is held out: its SHA-256 is 0 mod 10."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest(), "big") % 10 == 0


def _fault(data: bytes) -> str:
    """Why a text is not UTF-8; nothing if it is."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16 or UTF-32, by its byte order mark"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"byte {error.start} is 0x{data[error.start]:02x}"
    # NUL is valid UTF-8, and every second byte of English in UTF-16.
    return f"byte {data.index(0)} is NUL: binary, or UTF-16" if 0 in data else ""


def _unpacked(path: Path, file: io.BufferedIOBase) -> Iterator[bytes]:
    if not _ends(path, (".xz",)):
        yield from file
        return
    try:
        with lzma.open(file) as unpacked:
            yield from unpacked
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is damaged or was cut off ({error}). Take another copy.") from error


def _object(line: bytes) -> dict[str, object] | None:
    """The JSON object of a line; None if there is none."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):  # nested too deep
        return None
    return found if isinstance(found, dict) else None


def _of_something_else(line: bytes) -> bool:
    found = _object(line)
    return found is not None and not {"id", "text"} & set(found)


def _parse(path: Path, number: int, line: bytes) -> tuple[str, bytes]:
    """The id and the text of a line."""
    fields = _object(line) or {}
    name, text = fields.get("id"), fields.get("text")
    try:
        if isinstance(name, str) and isinstance(text, str):
            return name.encode().decode(), text.removeprefix("\ufeff").encode()
        wanted = 'an "id" and a "text", both strings'
    except UnicodeEncodeError as error:
        wanted = f"whole characters, not {error.object[error.start]!a}, one half of a pair"
    if fault := _fault(line):
        wanted = f"UTF-8 ({fault})"
    start = line[:60].decode("utf-8", "replace").strip()
    raise ValueError(f"{path}, line {number}: every line must be a JSON object with {wanted}. Received: {start!r}")


def _files(folder: Path) -> list[Path]:
    """The files and links in ``folder`` and below, directory by directory, both in the order of their bytes."""

    def unreadable(error: OSError) -> None:
        raise error  # os.walk would pass over it

    found = []
    for parent, folders, names in sorted(os.walk(folder, onerror=unreadable), key=lambda entry: os.fsencode(entry[0])):
        paths = [Path(parent, name) for name in sorted(names, key=os.fsencode)]
        found += [path for path in paths if path.is_file() or path.is_symlink()]
        found += [path for path in (Path(parent, name) for name in sorted(folders)) if path.is_symlink()]
    return found


def _ends(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)


def _shown(name: str) -> bool:
    """Whether no part of a path is hidden."""
    return not any(part.startswith(".") for part in name.split("/"))


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")
