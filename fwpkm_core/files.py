"""Weights and states as safetensors files (SPEC.md §8): NumPy arrays under canonical names, the same for all backends.

A file carries four metadata strings: ``format_version``, ``kind`` ("layer" or "state"), ``config`` (as JSON: a layer's
``spec()``, or the config of a state) and ``sha256`` (as JSON: for each tensor the hex digest of its bytes in C order,
little-endian). Reading checks everything before anything is filled: a bad file changes nothing. Writing goes through a
temporary file beside the target, so that a save that fails or is killed leaves the old file whole; only a killed
process leaves its ``.fwpkm-*.tmp`` behind.

A layer takes part by having the methods of :class:`Layer`.
"""

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy

from fwpkm import registry, validation
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, state_specs

FORMAT_VERSION = "1"

_PathLike: TypeAlias = str | os.PathLike[str]
_Tensors: TypeAlias = dict[str, np.ndarray]

_FLOATS = ("float32", "float64")
_DTYPES = {"F32": "float32", "F64": "float64", "I32": "int32", "BOOL": "bool"}  # safetensors' names, in NumPy's
_ABSENT = object()
_DAMAGED = "The file is damaged or was edited: take another copy, or save it again."


class Layer(Protocol):
    """What :func:`save` and :func:`load` ask of a layer, whatever its framework."""

    @property
    def config(self) -> FwPKMConfig:
        """The configuration of the layer's memory."""

    def spec(self) -> dict[str, Any]:
        """What a file must agree with, JSON-able: "hidden_size", "gated", "value_norm" and "config", a dict."""

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical names and shapes that the layer exports and expects."""

    def export_tensors(self, variables: Any = None) -> dict[str, np.ndarray]:
        """Canonical names to float32 or float64 arrays; ``variables`` holds them where the layer itself does not."""

    def import_tensors(self, tensors: dict[str, np.ndarray]) -> Any:
        """Fill the layer and return None, or return new variables (JAX). Names, shapes and dtypes are checked."""


def layer_spec(hidden_size: int, gated: bool, value_norm: str | None, config: FwPKMConfig) -> dict[str, Any]:
    """What :meth:`Layer.spec` returns."""
    fields = dataclasses.asdict(config)
    return {"hidden_size": hidden_size, "gated": gated, "value_norm": value_norm, "config": fields}


class _Form(NamedTuple):
    """The shape of a tensor, and its dtype or the dtypes it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


_Forms: TypeAlias = dict[str, _Form]


def save(path: _PathLike, layer: Layer, variables: Any = None) -> None:
    """Write a layer's weights, initial memory included, to ``path`` (SPEC.md §8).

    Args:
        path: the file; one that exists is replaced in one step, or stays as it is when anything fails.
        layer: a layer of any backend (:class:`Layer`).
        variables: the arrays of a layer that does not hold its own (JAX).

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        ValueError: the layer exports other names, shapes or dtypes than it declares.
    """
    _check_layer(layer)
    tensors = layer.export_tensors(variables)
    _check_forms(path, _forms(tensors), _layer_forms(layer), "The layer's export_tensors and tensor_shapes disagree.")
    _write(path, "layer", layer.spec(), tensors)


def load(path: _PathLike, layer: Layer) -> Any:
    """Fill ``layer`` from a file of :func:`save`, once every check has passed (SPEC.md §8).

    Returns:
        None for a layer that holds its weights (torch, Keras), the variables for one that does not (JAX).

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: ``path`` is a folder.
        ValueError: the file is damaged or of another format or kind, or was saved from a layer with another ``spec()``.
    """
    _check_layer(layer)
    return layer.import_tensors(_read(path, "layer", layer.spec(), lambda _: _layer_forms(layer)))


def save_state(path: _PathLike, state: State, cfg: FwPKMConfig) -> None:
    """Write a state of any backend to ``path``; its dtypes are kept (SPEC.md §5 and §8).

    Args:
        path: the file; one that exists is replaced in one step, or stays as it is when anything fails.
        state: a state for B rows with P = C + L - 1 pending tokens.
        cfg: the config that the state was made with.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        ValueError: the state does not fit ``cfg``.
    """
    validation.check_config(cfg)
    if not isinstance(state, State):
        raise ValueError(f"state must be a fwpkm.State. Received: {type(state).__name__}")
    to_numpy = registry.backend_of(state.memory.values).to_numpy
    tensors = {name: np.asarray(to_numpy(array)) for name, array in _state_arrays(state).items()}
    forms = _forms(tensors)
    _check_forms(path, forms, _state_forms(cfg, forms), "Pass the config that the state was made with.")
    _check_positions(path, cfg, tensors["position"], "Pass a state as apply or flush returned it.")
    _write(path, "state", json.loads(cfg.to_json()), tensors)


def load_state(path: _PathLike, cfg: FwPKMConfig, backend: Any) -> State:
    """Read a state of :func:`save_state`, written by any backend (SPEC.md §5 and §8).

    Args:
        path: the file.
        cfg: must equal the config that the state was saved with.
        backend: the backend to build arrays for: a name that :func:`fwpkm.get_backend` knows, or such a module.

    Returns:
        The state: the saved bits, in the saved dtypes, as the arrays that ``backend.asarray`` makes.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the backend's framework is not installed.
        IsADirectoryError: ``path`` is a folder.
        ValueError: the file is damaged or of another format or kind, or was saved with another config.
    """
    validation.check_config(cfg)
    module = registry.get_backend(backend) if isinstance(backend, str) else backend
    tensors = _read(path, "state", json.loads(cfg.to_json()), lambda forms: _state_forms(cfg, forms))
    _check_positions(path, cfg, tensors["position"], _DAMAGED)
    arrays = {name: module.asarray(tensor, tensor.dtype.name) for name, tensor in tensors.items()}
    memory = Memory(arrays.pop("memory.keys"), arrays.pop("memory.values"))
    return State(memory, **arrays)


def _state_arrays(state: State) -> dict[str, Any]:
    fields = state._asdict()
    memory = fields.pop("memory")
    return {"memory.keys": memory.keys, "memory.values": memory.values, **fields}


def _layer_forms(layer: Layer) -> _Forms:
    return {name: _Form(tuple(shape), _FLOATS) for name, shape in layer.tensor_shapes().items()}


def _state_forms(cfg: FwPKMConfig, found: _Forms) -> _Forms:
    """What a state must hold; only B is taken from what was found."""
    rows = found["position"].shape if "position" in found else ()
    batch = rows[0] if rows and rows[0] else 1
    dtypes = {"float": _FLOATS, "bool": ("bool",), "int32": ("int32",)}
    specs = _state_arrays(state_specs(cfg, batch))
    return {name: _Form(spec.shape, dtypes[spec.kind]) for name, spec in specs.items()}


def _forms(tensors: Mapping[str, np.ndarray]) -> _Forms:
    return {name: _Form(tensor.shape, (tensor.dtype.name,)) for name, tensor in tensors.items()}


def _check_layer(layer: Any) -> None:
    if not all(hasattr(layer, name) for name in ("spec", "tensor_shapes", "export_tensors", "import_tensors")):
        raise ValueError(f"layer must be an FwPKM layer of one of the backends. Received: {type(layer).__name__}")


def _write(path: _PathLike, kind: str, spec: dict[str, Any], tensors: _Tensors) -> None:
    """Write beside the target and put the file in its place in one step, or leave nothing behind."""
    if not os.fspath(path) or os.fspath(path).endswith(os.sep):
        raise ValueError(f"path must name a file. Received: {os.fspath(path)!r}")
    _refuse_folder(path)
    target = Path(os.path.realpath(path))  # a link keeps pointing at the file that it names
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {target.parent} does not exist. Create it first.")
    # safetensors reads the memory behind an array as if it were contiguous, whatever its strides.
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    metadata = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "config": json.dumps(spec),
        "sha256": json.dumps({name: _digest(tensor) for name, tensor in tensors.items()}),
    }
    temporary = target.with_name(f".fwpkm-{secrets.token_hex(8)}.tmp")
    try:
        # Not safetensors' save_file: its files open to their owner alone, and it renames them unsynchronised.
        _write_bytes(temporary, safetensors.numpy.save(tensors, metadata))
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or a crash soon after the rename could leave an empty file under the name


def _read(path: _PathLike, kind: str, spec: dict[str, Any], expected: Callable[[_Forms], _Forms]) -> _Tensors:
    """The tensors of a file whose metadata, names, shapes, dtypes and digests are all as they must be."""
    _refuse_folder(path)
    try:
        with safetensors.safe_open(path, "np") as file:
            digests = _check_metadata(path, file.metadata() or {}, kind, spec)
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            forms = {name: _Form(tuple(s.get_shape()), (_dtype(s),)) for name, s in slices.items()}
            _check_forms(path, forms, expected(forms), _DAMAGED)
            tensors = {name: file.get_tensor(name) for name in forms}
    except safetensors.SafetensorError as error:
        raise _bad(path, "not a whole safetensors file", "a file of fwpkm.save", error, _DAMAGED) from error
    received = {name: _digest(tensor) for name, tensor in tensors.items()}
    wrong = {name: digests.get(name) for name in received if digests.get(name) != received[name]}
    if wrong:
        received = {name: received[name] for name in wrong}
        raise _bad(path, f"the contents of {', '.join(wrong)} do not match their sha256", wrong, received, _DAMAGED)
    return tensors


def _check_metadata(path: _PathLike, metadata: dict[str, str], kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Check the version, the kind and the spec; return the digests."""
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        advice = "Read it with the release of fwpkm that wrote it, or save it again."
        raise _bad(path, "unknown format_version", repr(FORMAT_VERSION), repr(version), advice)
    if metadata.get("kind") != kind:
        advice = "Read layers with fwpkm.load and states with fwpkm.load_state."
        raise _bad(path, f"not the file of a {kind}", f"kind {kind!r}", f"kind {metadata.get('kind')!r}", advice)
    saved, wanted = _flat(_json_object(path, metadata, "config")), _flat(json.loads(json.dumps(spec)))
    differing = [name for name in {**wanted, **saved} if wanted.get(name, _ABSENT) != saved.get(name, _ABSENT)]
    if differing:
        received, expected = (
            ", ".join(f"{name}={fields[name]!r}" if name in fields else f"no {name}" for name in differing)
            for fields in (saved, wanted)
        )
        problem = f"saved with another configuration, which differs in {', '.join(differing)}"
        raise _bad(path, problem, expected, received, f"Use the file's values for the {kind}, or another file.")
    return _json_object(path, metadata, "sha256")


def _check_forms(path: _PathLike, found: _Forms, expected: _Forms, advice: str) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        problem = f"wrong tensors: missing {missing}, unknown {extra}"
        raise _bad(path, problem, sorted(expected), sorted(found), advice)
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
        raise _bad(path, f"wrong shape or dtype of {', '.join(wrong)}", wanted, received, advice)


def _check_positions(path: _PathLike, cfg: FwPKMConfig, position: np.ndarray, advice: str) -> None:
    shared = cfg.memory_scope != "sequence"  # one clock
    if position.min() < 0 or (shared and position.min() != position.max()):
        expected = "numbers of at least 0" + ", equal in all rows" * shared
        raise _bad(path, "bad position", expected, position.tolist(), advice)


def _refuse_folder(path: _PathLike) -> None:
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a folder. Expected the path of a file; add a file name.")


def _json_object(path: _PathLike, metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _bad(path, f"unreadable metadata {key!r}", "a JSON object", repr(metadata.get(key)), _DAMAGED)
    return value


def _flat(spec: dict[str, Any]) -> dict[str, Any]:
    """The fields of a spec with those of its config beside them, as "config.top_k"."""
    config = spec.get("config")
    inner = {f"config.{name}": value for name, value in config.items()} if isinstance(config, dict) else {}
    return {**{name: value for name, value in spec.items() if not inner or name != "config"}, **inner}


def _dtype(piece: Any) -> str:
    name = piece.get_dtype()
    return _DTYPES.get(name, name)


def _digest(tensor: np.ndarray) -> str:
    little_endian = np.asarray(tensor, tensor.dtype.newbyteorder("<"), order="C")
    return hashlib.sha256(little_endian.reshape(-1).view(np.uint8).data).hexdigest()


def _bad(path: _PathLike, wrong: str, expected: object, received: object, advice: str) -> ValueError:
    return ValueError(f"{path}: {wrong}. Expected: {expected}. Received: {received}. {advice}")
