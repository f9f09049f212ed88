"""What every file of this library is: a safetensors file with checksums, written whole or not at all (SPEC.md §8).

A file carries five metadata strings: ``format_version``, ``kind``, ``config`` (as JSON: what the tensors belong to),
``config_sha256`` (its hex digest; files of 0.1 and 0.2 lack it) and ``sha256`` (as JSON: for each tensor the hex digest
of its bytes in C order, little-endian); no others, so that damage to a name is seen. Reading checks everything before
it returns anything. Writing goes through a temporary file beside the target, so that a save that fails or is
killed leaves the old file whole. A killed process leaves its ``.fwpkm-*.tmp`` behind; the next save into that folder
removes it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy

from fwpkm.config import FwPKMConfig

FORMAT_VERSION = "1"

PathLike: TypeAlias = str | os.PathLike[str]
Tensors: TypeAlias = dict[str, np.ndarray]

FLOATS = ("float32", "float64")
DAMAGED = "The file is damaged or was edited: take another copy, or save it again."
_DTYPES = {"F32": "float32", "F64": "float64", "I32": "int32", "BOOL": "bool", "U8": "uint8", "U16": "uint16"}
"""The names of safetensors, in NumPy's."""
_METADATA = {"format_version", "kind", "config", "config_sha256", "sha256"}
_ABSENT = object()
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(FwPKMConfig)}
_READERS = "Read layers with fwpkm.load, states with fwpkm.load_state, load_states or, packed, load_packed."


class Form(NamedTuple):
    """The shape of a tensor, and its dtype or the dtypes it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


Forms: TypeAlias = dict[str, Form]


def forms_of(tensors: Mapping[str, np.ndarray]) -> Forms:
    """The forms of arrays."""
    return {name: Form(tensor.shape, (tensor.dtype.name,)) for name, tensor in tensors.items()}


def write(path: PathLike, kind: str, spec: dict[str, Any], tensors: Tensors) -> None:
    """Write beside the target and put the file in its place in one step, or leave nothing behind."""
    _check_path(path)
    if not os.fspath(path) or os.fspath(path).endswith(os.sep):
        raise ValueError(f"path must name a file. Received: {os.fspath(path)!r}")
    target = Path(os.path.realpath(path))  # a link keeps pointing at the file that it names
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {target.parent} does not exist. Create it first.")
    # safetensors reads the memory behind an array as if it were contiguous, whatever its strides.
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    config = json.dumps(spec)
    metadata = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "config": config,
        "config_sha256": config_digest(config),
        "sha256": json.dumps({name: _digest(tensor) for name, tensor in tensors.items()}),
    }
    # Not safetensors' save_file: its files open to their owner alone, and it renames them unsynchronised.
    data = safetensors.numpy.save(tensors, metadata)
    _remove_litter(target.parent)
    with _temporary(target.parent) as temporary:
        with temporary.open("r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a crash soon after the rename could leave an empty file under the name
        with contextlib.suppress(OSError):  # what only its owner may read stays so
            temporary.chmod(target.stat().st_mode & 0o777)
        os.replace(temporary, target)


# --- Temporary files: whoever writes one holds a lock on it, which ends with the process, however that ends ---


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new file, locked in the block; removed where the block fails."""
    while True:
        path = folder / f".fwpkm-{secrets.token_hex(8)}.tmp"
        with contextlib.closing(_Lock(path, os.O_CREAT | os.O_EXCL)) as lock:
            if lock.held is not False and path.exists():  # else another save took it for litter just now
                try:
                    yield path
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
                return


def _remove_litter(folder: Path) -> None:
    """Remove what writers that were killed have left; what another save is writing, or another user's, stays."""
    paths: list[Path] = []
    with contextlib.suppress(OSError):  # a folder that may be written to, and not listed
        paths += folder.glob(".fwpkm-*.tmp")
    for path in paths:
        with contextlib.suppress(OSError), contextlib.closing(_Lock(path)) as lock:
            if lock.held:
                path.unlink(missing_ok=True)


class _Lock:
    """An open file, locked unless another is already: ``held`` is None where there are no locks, as on Windows."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.held: bool | None = None
        self._descriptor: int | None = os.open(path, os.O_RDWR | flags, 0o666)
        if sys.platform == "win32":  # nor could a file be renamed while it is open
            self.close()
            return
        import fcntl

        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = True
        except BlockingIOError:
            self.held = False
        except OSError:
            self.held = None

    def close(self) -> None:
        """Close it, which unlocks it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read(
    path: PathLike,
    kind: str,
    wanted: Callable[[dict[str, Any]], dict[str, Any]],
    expected: Callable[[dict[str, Any], Forms], Forms],
) -> tuple[dict[str, Any], Tensors]:
    """The config and tensors of a file whose metadata, names, shapes, dtypes and digests are all as they must be.

    Args:
        path: the file.
        kind: what it must hold.
        wanted: from the config that it has, JSON-able, to the one that it must have.
        expected: from its config and what forms it holds, to the forms that it must hold.
    """
    _check_path(path)
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            spec = _read_spec(path, metadata, kind)
            _check_spec(path, kind, spec, json.loads(json.dumps(wanted(spec))))
            digests = _json_object(path, metadata, "sha256")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            forms = {name: Form(tuple(s.get_shape()), (_dtype(s),)) for name, s in slices.items()}
            check_forms(path, forms, expected(spec, forms), DAMAGED)
            tensors = {name: file.get_tensor(name) for name in forms}
    except safetensors.SafetensorError as error:
        raise bad(path, "not a whole safetensors file", "a file of fwpkm.save", error, DAMAGED) from error
    received = {name: _digest(tensor) for name, tensor in tensors.items()}
    wrong = {name: digests.get(name) for name in received if digests.get(name) != received[name]}
    if wrong:
        received = {name: received[name] for name in wrong}
        raise bad(path, f"the contents of {', '.join(wrong)} do not match their sha256", wrong, received, DAMAGED)
    return spec, tensors


def _read_spec(path: PathLike, metadata: dict[str, str], kind: str) -> dict[str, Any]:
    """The config of a file of the right version and kind."""
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        advice = "Read it with the release of fwpkm that wrote it, or save it again."
        raise bad(path, "unknown format_version", repr(FORMAT_VERSION), repr(version), advice)
    if metadata.get("kind") != kind:
        raise bad(path, f"not the file of a {kind}", f"kind {kind!r}", f"kind {metadata.get('kind')!r}", _READERS)
    unknown = sorted(metadata.keys() - _METADATA)  # such as a digest whose name is damaged, which would not be compared
    if unknown:
        raise bad(path, f"unknown metadata {', '.join(unknown)}", sorted(_METADATA), sorted(metadata), DAMAGED)
    spec, received = _json_object(path, metadata, "config"), config_digest(metadata["config"])
    if metadata.get("config_sha256", received) != received:
        raise bad(path, "the config does not match its sha256", metadata["config_sha256"], received, DAMAGED)
    return spec


def _check_spec(path: PathLike, kind: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A field of a configuration that the file lacks came later, and has its default."""
    saved, expected = _flat(found), _flat(wanted)
    later = {name: _DEFAULTS[field] for name in expected if (field := name.rpartition(".")[2]) in _DEFAULTS}
    known = later | saved
    differing = [name for name in {**expected, **saved} if expected.get(name, _ABSENT) != known.get(name, _ABSENT)]
    if differing:
        received, needed = (
            ", ".join(f"{name}={fields[name]!r}" if name in fields else f"no {name}" for name in differing)
            for fields in (known, expected)
        )
        problem = f"saved with another configuration, which differs in {', '.join(differing)}"
        raise bad(path, problem, needed, received, f"Use the file's values for the {kind}, or another file.")


def check_forms(path: PathLike, found: Forms, expected: Forms, advice: str) -> None:
    """Raise unless names, shapes and dtypes are those that are expected."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        problem = f"wrong tensors: missing {missing}, unknown {extra}"
        raise bad(path, problem, sorted(expected), sorted(found), advice)
    wrong = [
        name
        for name, form in expected.items()
        if found[name].shape != form.shape or not set(found[name].dtypes) <= set(form.dtypes)
    ]
    if wrong:
        received, wanted = (
            ", ".join(f"{name} {forms[name].shape} {' or '.join(forms[name].dtypes)}" for name in wrong)
            for forms in (found, expected)
        )
        raise bad(path, f"wrong shape or dtype of {', '.join(wrong)}", wanted, received, advice)


def _check_path(path: Any) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path must be a str or an os.PathLike. Received: {type(path).__name__}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a folder. Expected the path of a file; add a file name.")
    if os.path.exists(path) and not os.path.isfile(path):  # as /dev/null, which a save would replace
        raise ValueError(f"{path}: is a device, pipe or socket. Expected the path of a file.")


def _json_object(path: PathLike, metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise bad(path, f"unreadable metadata {key!r}", "a JSON object", repr(metadata.get(key)), DAMAGED)
    return value


def _flat(spec: dict[str, Any]) -> dict[str, Any]:
    """The fields of a spec with those of what it holds beside them, as "config.top_k"."""
    flat: dict[str, Any] = {}
    for name, value in spec.items():
        flat |= {f"{name}.{inner}": x for inner, x in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _dtype(piece: Any) -> str:
    name = piece.get_dtype()
    return _DTYPES.get(name, name)


def config_digest(config: str) -> str:
    """The hex digest of a file's config, as it stands there."""
    return hashlib.sha256(config.encode()).hexdigest()


def _digest(tensor: np.ndarray) -> str:
    little_endian = np.asarray(tensor, tensor.dtype.newbyteorder("<"), order="C")
    return hashlib.sha256(little_endian.reshape(-1).view(np.uint8).data).hexdigest()


def bad(path: PathLike, wrong: str, expected: object, received: object, advice: str) -> ValueError:
    """The error of a file, or of what was to be written to one."""
    return ValueError(f"{path}: {wrong}. Expected: {expected}. Received: {received}. {advice}")
