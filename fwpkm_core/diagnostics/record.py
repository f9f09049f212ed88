"""Recordings: what a memory read and wrote, call by call, in one file that a killed process leaves readable.

A recording is a line that names the format, then entries: 8 bytes of length, 4 of the CRC-32 of those, 4 of the CRC-32
of the content (little-endian), and the content. The first holds the config as JSON, each other one a call as
safetensors. An entry is handed to the operating system before :meth:`Recorder.write` returns, so a process that is
killed loses at most the entry it was writing; a machine that loses power may lose more.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import safetensors
import safetensors.numpy

from fwpkm import validation
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State, memories_for
from fwpkm.diagnostics.calls import Call, read_call, to_numpy

MAGIC = b"fwpkm recording 1\n"
_HEAD = struct.Struct("<QII")
_LOST = -1  # where a row stands after a call that returned no state


class Entry(NamedTuple):
    """One call of a recording."""

    call: Call
    end: np.ndarray
    """``[B]`` int64: where each row stands after the call; -1 where its state was thrown away."""
    norms: np.ndarray | None
    """``[M, N]`` float32: the norms of the rows of the value tables after the call, where it may have changed them."""
    text: list[str] | None
    """The text of each of the call's n tokens."""


class Recorder:
    """Writes a recording while a layer reads; ``fwpkm inspect`` makes a page of it.

    Each call costs 8·H·k + 25 bytes a token and its text, and 4·N bytes for each memory whenever a chunk was written;
    nothing is held back in memory. A recording is of one layer and one batch: a call that does not go on where the last
    one stopped, or begin at position 0, is refused. Not for several threads at once. ::

        with fwpkm.Recorder("reading.fwpkm", layer.config) as recorder:
            y, after, trace = layer(x, state, return_trace=True)
            recorder.write(trace, before=state, after=after, text=[words])

    Args:
        path: the file.
        cfg: the configuration of the memory.
        overwrite: replace a file that exists.

    Raises:
        FileExistsError: the file exists, and ``overwrite`` is False.
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: ``path`` is a folder.
    """

    def __init__(self, path: str | os.PathLike[str], cfg: FwPKMConfig, *, overwrite: bool = False) -> None:
        """Create the file."""
        validation.check_config(cfg)
        validation.check_flag("overwrite", overwrite)
        self.path, self.config = os.fspath(path), cfg
        try:
            self._file: BinaryIO | None = open(path, "wb" if overwrite else "xb", buffering=0)  # noqa: SIM115
        except FileExistsError:
            raise FileExistsError(
                f"{self.path}: exists already. Pass overwrite=True to replace it, or name another file."
            ) from None
        self._size, self._began = 0, False
        self._stands: list[int] | None = None  # where each row stands after the calls so far
        self._append(MAGIC + _framed(json.dumps({"config": json.loads(cfg.to_json())}).encode()))

    def write(
        self,
        trace: Any,
        *,
        before: Any = None,
        after: State | None = None,
        cu_seqlens: Any = None,
        text: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Append one call, of a layer or of ``apply`` or ``flush``.

        Args:
            trace: the :class:`fwpkm.LayerTrace` or :class:`fwpkm.Trace` that it returned.
            before: the state that it was given; None for one without a state.
            after: the state that it returned; None where nobody reads on. From its tables come the norms of rows.
            cu_seqlens: ``[B+1]`` as it was given.
            text: what its tokens stand for, ``text[b][t]`` for each of the B rows (packed: the one row) and T tokens;
                of masked tokens it is not kept. A row may be one string of T characters.

        Raises:
            ValueError: an argument does not fit the config or the others, the call does not follow on the one before,
                or the recorder is closed. Nothing is written.
            OSError: the file cannot be written, as on a full disk; it still holds what it held before.
        """
        call = read_call(self.config, trace, before, cu_seqlens)
        self._check_follows(call)
        tensors = {name: array for name, array in call._asdict().items() if array is not None}
        tensors["end"] = np.full(len(call.start), _LOST, np.int64)
        if after is not None:
            tensors["end"] = _end(after, len(call.start))
            if call.writes.any() or not self._began:
                tensors["norms"] = _norms(self.config, after, len(call.writes))
        if text is not None:
            chosen = _words(text, to_numpy("trace.slots", trace.slots).shape[:2], call.flat_index)
            tensors["text"] = np.frombuffer(json.dumps(chosen).encode(), np.uint8)
        self._append(_framed(safetensors.numpy.save({name: np.asarray(x, order="C") for name, x in tensors.items()})))
        self._began, self._stands = True, tensors["end"].tolist()

    def _check_follows(self, call: Call) -> None:
        """Raise unless each row of a call goes on where the last one left it, or begins at position 0."""
        if self._stands is None:
            return
        if len(self._stands) != len(call.start):
            raise ValueError(
                f"trace must be of the {len(self._stands)} rows of the calls before, since a recording is of one "
                f"batch. Received: a call of {len(call.start)} rows"
            )
        for row, (start, left) in enumerate(zip(call.start.tolist(), self._stands)):
            if start not in (left, 0):
                where = "without a state (pass after= where somebody reads on)" if left == _LOST else f"at {left}"
                raise ValueError(
                    f"before must stand where the last call of this recording left row {row}, {where}, or at 0 where a "
                    "sequence begins: record every call of one layer, once and in order, and other layers or batches "
                    f"in recordings of their own. Received: row {row} at {start}"
                )

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        """The recorder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def _append(self, data: bytes) -> None:
        if self._file is None:
            raise ValueError(f"the recorder of {self.path} is closed: make another one, for another file")
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except BaseException:  # no half of an entry, behind which nothing could be read
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size += len(data)


class Recording(NamedTuple):
    """A recording that is being read."""

    config: FwPKMConfig
    size: int
    """Bytes up to the end of the last whole entry."""
    cut: int
    """Bytes behind it, of an entry whose writer was stopped."""
    path: str

    def entries(self) -> Iterator[Entry]:
        """The calls in order, each read when it is asked for.

        Raises:
            ValueError: one that does not fit the recording's config.
        """
        with open(self.path, "rb") as file:
            file.seek(len(MAGIC))
            _next(file, self.path, self.size)
            while file.tell() < self.size:
                at = file.tell()
                data = _next(file, self.path, self.size)
                assert data is not None
                yield _entry(self.config, self.path, at, data)


def open_recording(path: str | os.PathLike[str]) -> Recording:
    """A recording, once the checksums of all its entries were found right.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: ``path`` is a folder.
        ValueError: no recording, one that is damaged, or one of a config that this release does not know.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        magic = file.read(len(MAGIC))
        if magic != MAGIC:
            received = "an empty file" if not total else repr(magic)
            raise ValueError(f"{path}: no recording. Expected: a file of fwpkm.Recorder. Received: {received}")
        first = _next(file, path, total)
        if first is None:
            raise ValueError(f"{path}: a recording that was stopped before it held its config; there is nothing in it")
        try:
            config = FwPKMConfig.from_json(json.dumps(json.loads(first)["config"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: a recording of a config that this release does not know: {error}") from None
        size = file.tell()
        while _next(file, path, total) is not None:
            size = file.tell()
    return Recording(config, size, total - size, path)


def _framed(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return _HEAD.pack(len(content), zlib.crc32(length), zlib.crc32(content)) + content


def _next(file: BinaryIO, path: str, total: int) -> bytes | None:
    """The content of the next entry; None where the file ends before it does."""
    at = file.tell()
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    length, of_length, of_content = _HEAD.unpack(head)
    if zlib.crc32(head[:8]) != of_length:
        raise _damaged(path, at, "its length does not match its checksum")
    if length > total - file.tell():
        return None
    content = file.read(length)
    if zlib.crc32(content) != of_content:
        raise _damaged(path, at, "its content does not match its checksum")
    return content


def _damaged(path: str, at: int, reason: object) -> ValueError:
    return ValueError(f"{path}: the entry at byte {at} is damaged or was edited: {reason}. Take another copy")


def _entry(cfg: FwPKMConfig, path: str, at: int, data: bytes) -> Entry:
    """A call of a recording, whose shapes fit the config."""
    try:
        tensors = safetensors.numpy.load(data)
        text = json.loads(tensors.pop("text").tobytes()) if "text" in tensors else None
        end, norms = tensors.pop("end"), tensors.pop("norms", None)
        fields: dict[str, Any] = {"gate": None, **tensors}
        call = Call(**fields)
        n, rows, memories = len(call.row), len(call.start), memories_for(cfg, len(call.start))
        tokens = (call.position, call.weights, call.live, *([] if text is None else [text]))
        fits = (
            all(len(x) == n for x in tokens)
            and call.slots.shape == call.weights.shape == (n, cfg.slots_per_token)
            and call.writes.shape == (memories,)
            and len(call.memorization) == len(call.addressing) == memories
            and end.shape == call.stop.shape == (rows,)
            and (norms is None or norms.shape == (memories, cfg.num_slots))
            and (not n or (0 <= call.slots.min() <= call.slots.max() < cfg.num_slots and 0 <= call.row.max() < rows))
        )
    except (safetensors.SafetensorError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise _damaged(path, at, error) from None
    if not fits:
        raise _damaged(path, at, "its arrays do not fit the recording's config")
    return Entry(call, end, norms, text)


def _end(after: Any, rows: int) -> np.ndarray:
    validation.check_is_state(after)
    end = to_numpy("after.position", after.position).astype(np.int64)
    if end.shape != (rows,):
        raise ValueError(f"after must be a state of B={rows} rows, as the call's. Received: shape {end.shape}")
    return end


def _norms(cfg: FwPKMConfig, after: State, memories: int) -> np.ndarray:
    """``[M, N]`` float32: the norm of each row of the value tables."""
    values = to_numpy("after.memory.values", after.memory.values)
    if values.shape != (memories, cfg.num_slots, cfg.value_dim):
        raise ValueError(
            f"after.memory.values must have shape [M, N, Dv] = {(memories, cfg.num_slots, cfg.value_dim)}. "
            f"Received: shape {values.shape}"
        )
    return np.stack([np.sqrt(np.einsum("nd,nd->n", table, table)) for table in values]).astype(np.float32)


def _words(text: Any, shape: tuple[int, ...], flat_index: np.ndarray) -> list[str]:
    """The text of the tokens that are there."""
    rows, length = shape
    lengths = [len(row) for row in text] if hasattr(text, "__len__") and not isinstance(text, str) else []
    if lengths != [length] * rows:
        raise ValueError(
            f"text must have a row for each of B={rows}, of one string for each of T={length} tokens: text[b][t]. "
            f"Received: {f'rows of {lengths} strings' if lengths else type(text).__name__}"
        )
    flat = [word for row in text for word in row]
    wrong = next((word for word in flat if not isinstance(word, str)), None)
    if wrong is not None:
        raise ValueError(f"text must hold strings. Received: {wrong!r}, of type {type(wrong).__name__}")
    return [flat[i] for i in flat_index]
