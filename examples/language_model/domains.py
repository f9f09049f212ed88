"""Seven domains to read one after the other: six, and a filler, built from the documents that a list names.

A built folder holds NAME.read.txt and NAME.other.txt for each of them, and domains.json: in the order of the list the
documents with their starts and the SHA-256 of both files, and the SHA-256 of the corpus whose training documents were
kept out. The same sources give the same bytes.
"""

import hashlib
import json
import posixpath
import secrets
import shutil
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from examples.language_model import corpus
from examples.language_model.corpus import Texts
from examples.language_model.sources import Source

FORMAT = "fwpkm domains 1"
LIST = Path(__file__).with_name("domains.toml")
ABOUT = "domains.json"
KINDS = ("read", "other")


class Domain(NamedTuple):
    """What a memory reads of a domain, and what else of it is measured on; the filler has nothing else."""

    name: str
    read: Texts
    other: Texts


class Domains(NamedTuple):
    """The domains, the filler, the SHA-256 of the corpus whose training documents they have none of, and their own."""

    domains: tuple[Domain, ...]
    filler: Domain
    corpus: str
    sha256: str


# Lists


class Part(NamedTuple):
    """A domain or the filler, as a list has it."""

    name: str
    source: str
    read: Sequence[str]
    other: Sequence[str] = ()
    sha256: str = ""

    @property
    def documents(self) -> list[str]:
        """The ids of both."""
        return [*self.read, *self.other]


class Listed(NamedTuple):
    """A list: its file, its sources, and its parts, of which the last is the filler."""

    path: Path
    sources: Mapping[str, Mapping[str, Any]]
    parts: tuple[Part, ...]

    def get(self, source: str) -> str:
        """How a source can be had."""
        return str(self.sources[source].get("get", "see the list"))


def listed(path: Path) -> Listed:
    """Read a list, see domains.toml.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no list of domains; says what it lacks.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 either
        raise ValueError(f"{path} is not TOML: {error}") from error
    try:
        parts = tuple(Part(**table) for table in (*tables["domains"], tables["filler"]))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must have [[domains]], with name, source, read and other, and a [filler], with name, source and "
            f"read: {error}"
        ) from error
    *domains, filler = parts
    if len(domains) < 2 or not all(part.read and part.other for part in domains) or not filler.read:
        raise ValueError(f"{path} must have two [[domains]] or more, with documents to read and others, and a [filler]")
    names = [part.name for part in parts]
    if len(set(names)) < len(names) or not all(name.isalnum() for name in names):
        raise ValueError(f"{path}: names of domains must differ, and be letters and digits. Received: {names}")
    for part in parts:
        if part.source not in tables.get("sources", {}):
            raise ValueError(f"{path} has no [sources.{part.source}], which {part.name!r} names")
        if len(set(part.documents)) < len(part.documents):
            raise ValueError(f"{path}: domain {part.name!r} lists a document twice")
    return Listed(path, tables["sources"], parts)


# Building


def build(listing: Path, sources: Mapping[str, Path], trained: Path, out: Path) -> Path:
    """Build the folder ``out`` of the domains that a list names: all of it, or nothing.

    Args:
        listing: a TOML file, see domains.toml.
        sources: where each source of the list lies: a .jsonl or .jsonl.xz file or a folder of them, one object with
            "id" and "text" a line; or an archive, .zip, .whl or .tar.*.
        trained: the corpus that models are trained on, a folder made by ``corpus.prepare``.
        out: a folder that does not exist yet.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: a source, or a document of it, is missing.
        FileExistsError: there is something at ``out``.
        ValueError: the list is no list of domains, names a document that models are trained on, or has another SHA-256
            than a source or a domain; or a source is damaged.
    """
    if out.exists():
        raise FileExistsError(f"there is something at {out}: name a folder that does not exist yet, or remove it")
    wanted, learned = listed(listing), corpus.load(trained)
    _check(wanted, sources, set(learned.train.names), trained)
    found = {name: _documents(wanted, name, sources[name]) for name in wanted.sources}
    about: dict[str, Any] = {"format": FORMAT, "corpus": learned.sha256, "domains": []}
    unfinished = out.absolute().parent / f".{out.absolute().name}-{secrets.token_hex(4)}.tmp"
    unfinished.mkdir(parents=True)
    try:
        for part in wanted.parts:
            texts = [[found[part.source][name] for name in names] for names in (part.read, part.other)]
            both = b"".join(b"".join(some) for some in texts)
            digest = hashlib.sha256(both).hexdigest()
            if part.sha256 not in ("", digest):
                raise ValueError(_otherwise(wanted, f"domain {part.name!r}", part.source, part.sha256, digest))
            its: dict[str, Any] = {"name": part.name, "sha256": digest}
            for kind, names, some in zip(KINDS, (part.read, part.other), texts):
                (unfinished / f"{part.name}.{kind}.txt").write_bytes(b"".join(some))
                its[kind] = {"ids": list(names), "starts": np.cumsum([0, *map(len, some)]).tolist()}
            about["domains"].append(its)
        text = json.dumps(about, ensure_ascii=False, indent=1) + "\n"
        (unfinished / ABOUT).write_text(text, encoding="utf-8")
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _check(wanted: Listed, sources: Mapping[str, Path], learned: set[str], trained: Path) -> None:
    """Say what does not fit before anything is read."""
    if set(sources) != set(wanted.sources):
        how = "; ".join(f"{name}: {wanted.get(name)}" for name in wanted.sources)
        raise ValueError(f"the sources of {wanted.path} are {how}. Received: {', '.join(sorted(sources)) or 'none'}")
    for part in wanted.parts:
        if both := sorted(learned.intersection(part.documents)):
            raise ValueError(
                f"{both[0]!r} of domain {part.name!r} is a training document of {trained}. Take the corpus that "
                f"docs/retention.md prepares, which holds it out, or take it out of {wanted.path}"
            )
    for name, path in sources.items():
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}. Source {name!r} is {wanted.get(name)}")


def _otherwise(wanted: Listed, what: str, source: str, expected: str, received: str) -> str:
    return f"{what} must have the sha256 {expected}, of {source!r}: {wanted.get(source)}. Received: {received}"


# Sources


def _documents(wanted: Listed, name: str, path: Path) -> dict[str, bytes]:
    """The documents that the list names of one source."""
    source, names = wanted.sources[name], [x for part in wanted.parts if part.source == name for x in part.documents]
    if "sha256" in source:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != source["sha256"]:
            raise ValueError(_otherwise(wanted, str(path), name, source["sha256"], digest))
    if path.is_dir() or path.name.endswith((".jsonl", ".jsonl.xz")):
        with Progress(console=Console(stderr=True)) as progress:
            found = {x.name: x.text for x in Source(path, code=False).documents(progress) if x.name in names}
    else:
        found = _of_archive(path, names, tuple(source.get("files", ())), source.get("head", ""))
    if missing := [x for x in names if not found.get(x)]:
        raise FileNotFoundError(f"{path} has no document {missing[0]!r}, and lacks {len(missing)} of {len(names)}")
    return found


def _of_archive(path: Path, wanted: Sequence[str], files: tuple[str, ...], head: str) -> dict[str, bytes]:
    """Files by their paths, and folders as the files in them that end as ``files`` say, in the order of their bytes."""
    found: dict[str, bytes] = {}
    inside: dict[str, dict[str, bytes]] = {x: {} for x in wanted if x.endswith("/")}
    for name, data in _members(path, wanted):
        text, folder = data.decode("utf-8", "replace").encode(), posixpath.dirname(name) + "/"
        if name in wanted:
            found[name] = text
        if folder in inside and name.endswith(files):
            inside[folder][name] = (head.format(path=name) + "\n" if head else "").encode() + text
    return found | {folder: b"".join(its[name] for name in sorted(its)) for folder, its in inside.items()}


def _members(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The files of an archive that lie under what is wanted."""
    beginnings = tuple(wanted)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.startswith(beginnings) and not name.endswith("/"):
                        yield name, archive.read(name)
            return
        with tarfile.open(path, "r|*") as packed:
            for member in packed:
                if member.name.startswith(beginnings) and member.isfile() and (file := packed.extractfile(member)):
                    yield member.name, file.read()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is no .jsonl file and no archive that can be read ({error}): take another copy"
        ) from error


# Loading


def load(folder: Path) -> Domains:
    """Open a folder of :func:`build`; every byte is held to its SHA-256.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: the folder holds another thing than domains, or a file is damaged.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: build the domains first, see docs/retention.md")
    try:
        about, digest = json.loads(path.read_bytes()), hashlib.sha256(path.read_bytes()).hexdigest()
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}")
        *domains, filler = [_domain(folder, its) for its in about["domains"]]
        return Domains(tuple(domains), filler, str(about["corpus"]), digest)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of another version ({error!r}): build the domains again") from error


def _domain(folder: Path, its: Mapping[str, Any]) -> Domain:
    data = [np.fromfile(folder / f"{its['name']}.{part}.txt", np.uint8) for part in KINDS]
    if hashlib.sha256(b"".join(x.tobytes() for x in data)).hexdigest() != its["sha256"]:
        raise ValueError(f"the texts of {its['name']!r} are not those of their sha256")
    texts = [Texts(x, np.array(its[part]["starts"], np.int64), tuple(its[part]["ids"])) for x, part in zip(data, KINDS)]
    return Domain(its["name"], *texts)
