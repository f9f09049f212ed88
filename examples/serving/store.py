"""Where users are kept who hold no row: their texts on disk, their memories packed in memory, then on disk.

A user has a file of text, ``NAME.text``, every byte in order, and may have one of packed states, ``NAME.state``, made
when some of that text was read. The text is the record: what it has beyond the states' position is read again. So a
process may be killed at any time: what an append brought is there, and states are replaced whole or not at all. What a
model needs beside its memories stands in a file of its own, ``NAME.POSITION.beside``, written before the states of that
position and removed after those of a later one.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

import fwpkm
from fwpkm import PackedState


class Packed(NamedTuple):
    """One user's row."""

    memories: dict[str, PackedState]
    """by name"""
    beside: dict[str, np.ndarray]
    """what else the model needs to go on, by name"""

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(one.nbytes for one in self.memories.values()) + sum(x.nbytes for x in self.beside.values())

    @property
    def position(self) -> int:
        """How many bytes were read."""
        return int(next(iter(self.memories.values())).position[0])


MOST = 100
"""Bytes of a user's name in UTF-8, since files are named by them."""
LITTER = ".fwpkm-*.tmp"
"""Half-written files, here as of ``fwpkm.save_packed``."""


class Store:
    """Texts and packed memories by user; a folder belongs to one process at a time.

    Args:
        folder: new, empty, or of an earlier process, whose half-written files are removed.
        in_memory: how many users' packed states memory holds; those used least recently go to disk.
        model: a digest of the model that reads the texts.

    Raises:
        ValueError: the folder holds something else, or what another model read.
    """

    def __init__(self, folder: str | os.PathLike[str], in_memory: int, model: str):
        """Open the folder."""
        self.folder, self.in_memory = Path(folder), in_memory
        self._packed: dict[str, Packed] = {}  # in the order of their last use
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_folder(model)
        for litter in self.folder.glob(LITTER):
            litter.unlink()
        for kept in (*self.folder.glob("*.state"), *self.folder.glob("*.beside")):
            if not (self.folder / f"{kept.name.split('.')[0]}.text").exists():  # killed while it deleted this user
                kept.unlink()

    def _check_folder(self, model: str) -> None:
        """Raise unless the folder is new or this model's; nothing in it has been touched then."""
        mark = self.folder / "model"
        if not mark.exists():
            if others := sorted({path.name for path in self.folder.iterdir() if not path.match(LITTER)}):
                raise ValueError(
                    f"{self.folder} must be a new or empty folder, or one of users. Received: one with {others[:3]}"
                )
            self._write(mark, model.encode())
        if (found := mark.read_text()) != model:
            raise ValueError(
                f"{self.folder} holds what another model read: its states mean nothing to this one. Open it with that "
                f"model, or take another folder. Expected: {found}. Received: {model}"
            )

    # --- Texts ---

    def lengths(self) -> dict[str, int]:
        """How many bytes of text each user has."""
        found = sorted(self.folder.glob("*.text"))
        return {bytes.fromhex(path.stem).decode(): path.stat().st_size for path in found}

    def create(self, user: str, text: bytes) -> None:
        """Begin a user's text: all of it is there, or the user is not."""
        self._write(self._file(user, "text"), text)

    def append(self, user: str, text: bytes, length: int) -> None:
        """Add to a text that has ``length`` bytes, or leave it as it was.

        Raises:
            OSError: the disk is full, or the file has gone.
            ValueError: the text has another length: another process has written it.
        """
        path = self._file(user, "text")
        with path.open("r+b", buffering=0) as file:
            if (found := file.seek(0, os.SEEK_END)) != length:
                raise ValueError(
                    f"{path}: another process has written the text of {user!r}: give each process a folder of its own. "
                    f"Expected: {length} bytes. Received: {found}"
                )
            try:
                written = 0
                while written < len(text):
                    written += file.write(text[written:])
            except BaseException:
                file.truncate(length)
                raise

    def text(self, user: str, start: int = 0) -> bytes:
        """A user's text, from byte ``start`` on."""
        with self._file(user, "text").open("rb") as file:
            file.seek(start)
            return file.read()

    # --- Packed states ---

    def keep(self, user: str, packed: Packed) -> None:
        """Hold packed states in memory; ``spill`` brings memory back under its bound."""
        self._packed.pop(user, None)
        self._packed[user] = packed

    def load(self, user: str) -> Packed | None:
        """A user's latest packed states; None where only the text is there.

        Raises:
            ValueError: the file is damaged, or another user's.
        """
        if user in self._packed:
            return self._packed[user]
        path = self._file(user, "state")
        if not path.exists():
            return None
        packed = fwpkm.load_packed(path)
        if wrong := [name for name in packed if not name.startswith(f"{user}/")]:
            raise ValueError(f"{path} holds the memory of another user. Expected: {user!r}. Received: {wrong}")
        memories = {name.removeprefix(f"{user}/"): one for name, one in packed.items()}
        return self._with_beside(user, memories)

    def _with_beside(self, user: str, memories: dict[str, PackedState]) -> Packed:
        """With what was saved beside states of this position, if anything was."""
        alone = Packed(memories, {})
        path = self._file(user, f"{alone.position}.beside")
        if not path.exists():
            return alone
        try:
            with safetensors.safe_open(path, "np") as file:
                about, names = file.metadata() or {}, file.keys()
                beside = {name: file.get_tensor(name) for name in names}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if about.get("sha256") != _digest(user, beside):
            raise ValueError(f"{path} is damaged, or of another user than {user!r}")
        return Packed(memories, beside)

    def spill(self) -> dict[str, OSError]:
        """Save the users beyond the bound, those used least recently first; who cannot be saved stays, and is named."""
        failed = {}
        for user in list(self._packed)[: max(0, len(self._packed) - self.in_memory)]:
            try:
                self.save(user)
            except OSError as error:
                failed[user] = error
        return failed

    def save(self, user: str) -> None:
        """Bring what a user has to the disk, so that it outlasts a loss of power too, and out of memory."""
        with self._file(user, "text").open("rb") as file:
            os.fsync(file.fileno())  # before the states: they must never be ahead of the text
        if user in self._packed:
            packed = self._packed[user]
            beside = self._file(user, f"{packed.position}.beside")
            if packed.beside:
                self._write(beside, safetensors.numpy.save(packed.beside, {"sha256": _digest(user, packed.beside)}))
            fwpkm.save_packed(self._file(user, "state"), {f"{user}/{k}": one for k, one in packed.memories.items()})
            for old in self._beside(user):
                if old != beside or not packed.beside:
                    old.unlink()
            del self._packed[user]
        self._sync_folder()

    def release(self, user: str) -> None:
        """Forget the packed states in memory: a row holds newer ones."""
        self._packed.pop(user, None)

    def drop_states(self, user: str) -> None:
        """Forget a user's packed states everywhere; the text stays."""
        self.release(user)
        self._file(user, "state").unlink(missing_ok=True)
        for path in self._beside(user):
            path.unlink()
        self._sync_folder()

    def delete(self, user: str) -> None:
        """Forget a user. The text goes first: states without a text are removed when the folder is opened."""
        self.release(user)
        self._file(user, "text").unlink(missing_ok=True)
        self.drop_states(user)

    # --- Sizes ---

    def bytes_in_memory(self) -> dict[str, int]:
        """Of the packed states of each user in memory."""
        return {user: packed.nbytes for user, packed in self._packed.items()}

    def bytes_on_disk(self) -> dict[str, int]:
        """Of the files of packed states of each user who has some."""
        users = [bytes.fromhex(path.stem).decode() for path in sorted(self.folder.glob("*.state"))]
        files = {user: [self._file(user, "state"), *self._beside(user)] for user in users}
        return {user: sum(path.stat().st_size for path in its) for user, its in files.items()}

    # --- Files ---

    def _file(self, user: str, kind: str) -> Path:
        """In hexadecimal: names that differ in case only, or hold a slash, are files of their own everywhere."""
        return self.folder / f"{user.encode().hex()}.{kind}"

    def _beside(self, user: str) -> list[Path]:
        return list(self.folder.glob(f"{user.encode().hex()}.*.beside"))

    def _write(self, path: Path, data: bytes) -> None:
        with self._temporary() as temporary:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        self._sync_folder()

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        path = self.folder / f".fwpkm-{secrets.token_hex(8)}.tmp"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _sync_folder(self) -> None:
        """So that a file's new name, or that it has none, outlasts a loss of power."""
        if os.name == "posix":  # elsewhere a folder cannot be opened
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _digest(user: str, arrays: dict[str, np.ndarray]) -> str:
    """Of whose arrays these are, and of all of them."""
    sha = hashlib.sha256(user.encode())
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        sha.update(np.ascontiguousarray(arrays[name]).data)
    return sha.hexdigest()
