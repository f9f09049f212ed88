"""Files of tables in columns: a folder, into which each rank writes its own columns.

``columns.json`` names the parts that belong together. It is written last, in one step, so that whoever is killed before
leaves the folder's older save whole; the next save removes what no index names. A part is a safetensors file with
checksums (tensor_files.py): the first holds all tensors, of the value table its own columns, the others those alone.
"""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from fwpkm import files, tensor_files, validation
from fwpkm.backends.torch import parts, ranks
from fwpkm.backends.torch.column_parallel import Columns, check_divides, check_mesh, like, refuse_uses
from fwpkm.backends.torch.layer import FwPKM
from fwpkm.backends.torch.ops import asarray, to_numpy
from fwpkm.backends.torch.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.tensor_files import DAMAGED, Forms, PathLike, Tensors, bad

INDEX = "columns.json"
_TABLE = "memory.values"


class _Index(NamedTuple):
    kind: str
    """"state" or "layer"."""
    save: str
    """Which of the folder's files belong together."""
    parts: int


def save_state(folder: PathLike, state: State, cfg: FwPKMConfig) -> None:
    """Write a state in columns into a folder that all ranks share; every rank must call it.

    Args:
        folder: an existing one. An older save in it stays whole until all ranks have written theirs.
        state: in columns.
        cfg: the config that the state was made with.

    Raises:
        ValueError: the state does not fit ``cfg``, or does not lie in columns.
        OSError: this rank could not write.
        RuntimeError: another rank could not.
    """
    validation.check_is_state(state)

    def checked_spec() -> dict[str, Any]:
        validation.check_state(cfg, state, SELF)
        refuse_uses(cfg, state.memory.values)
        validation.check_positions(cfg, state.position.tolist())
        return json.loads(cfg.to_json())

    _save(folder, "state", _columns_of(state.memory.values), checked_spec, state.arrays)


def save(folder: PathLike, layer: Any) -> None:
    """Write the weights of an FwPKM layer whose initial memory lies in columns; every rank must call it.

    Args:
        folder: an existing one. An older save in it stays whole until all ranks have written theirs.
        layer: an FwPKM layer.

    Raises:
        ValueError: the layer's tables do not lie in columns; or a part was replaced or wrapped, so that its weights do
            not say what it computes.
        OSError: this rank could not write.
        RuntimeError: another rank could not.
    """

    def weights() -> dict[str, Tensor]:
        files.check_layer(layer)
        tensors = {name: parts.weight_of(layer, name) for name in layer.tensor_shapes()}
        return {name: x.float() if x.dtype == torch.float16 else x for name, x in tensors.items()}

    _save(folder, "layer", _columns_of_layer(layer), layer.spec, weights)


def load_state(folder: PathLike, cfg: FwPKMConfig, mesh: Any) -> State:
    """Read a state of :func:`save_state`, on any number of ranks; every rank of the mesh must call it.

    Args:
        folder: that all ranks share.
        cfg: must equal the config that the state was saved with.
        mesh: as of :func:`shard`.

    Returns:
        The saved bits, in columns over ``mesh``; the position on the CPU.

    Raises:
        FileNotFoundError: there is no save in the folder.
        ValueError: a file is damaged or of another save or kind, or was saved with another config.
        RuntimeError: another rank could not read its part.
    """
    check_mesh(mesh)
    with ranks.together("load_state", _columns_of(_empty(mesh, mesh.size()))):
        validation.check_config(cfg)
        check_divides(cfg.value_dim, mesh.size())
        empty = _empty(mesh, cfg.value_dim)
        refuse_uses(cfg, empty)
        spec = json.loads(cfg.to_json())
        tensors = _read_own(folder, "state", _columns_of(empty), spec, lambda x: files.state_forms(cfg, x))
        files.check_counts(folder, "", cfg, tensors, DAMAGED)
        arrays = {name: asarray(x, x.dtype.name) for name, x in tensors.items()}
        position = arrays.pop("position")
        arrays = {name: x.to(mesh.device_type) for name, x in arrays.items()}
    memory = Memory(arrays.pop("memory.keys"), like(empty, arrays.pop(_TABLE)))
    return State(memory, position=position, **arrays)


def load(folder: PathLike, layer: Any) -> None:
    """Fill a layer in columns from a folder of :func:`save`, once every check has passed on all ranks.

    Args:
        folder: that all ranks share; saved by any number of ranks.
        layer: an FwPKM layer, in columns.

    Raises:
        FileNotFoundError: there is no save in the folder.
        ValueError: a file is damaged or of another save or kind, or of a layer with another ``spec()``; it holds
            float64, and the layer's tables are float32; or a part was replaced, wrapped or parametrized.
        RuntimeError: another rank could not read its part.
    """
    columns = _columns_of_layer(layer)
    shapes = {name: tensor_files.Form(shape, tensor_files.FLOATS) for name, shape in layer.tensor_shapes().items()}
    with ranks.together("load", columns):
        files.check_layer(layer)
        own = {name: parts.plain_weight_of(layer, name) for name in shapes}
        tensors = _read_own(folder, "layer", columns, layer.spec(), lambda _: shapes)
        files.check_width(Path(folder) / INDEX, layer, tensors)
    with torch.no_grad():
        for name, x in own.items():
            (columns.table if name == _TABLE else x).copy_(torch.from_numpy(tensors[name]))


def join(folder: PathLike, path: PathLike) -> None:
    """Make one file of a folder's parts, as ``fwpkm.save`` or ``fwpkm.save_state`` writes it; needs no process group.

    Args:
        folder: of :func:`save` or :func:`save_state`.
        path: the file; one that exists is replaced in one step, or stays as it is when anything fails.

    Raises:
        FileNotFoundError: there is no save in the folder.
        ValueError: a file is damaged or of another save.
    """
    index = _read_index(folder)
    spec, tensors = _read_part(folder, index, 0, lambda spec: spec, lambda forms: forms)
    parts = [tensors[_TABLE]]
    for i in range(1, index.parts):
        parts.append(_read_part(folder, index, i, lambda _: spec, lambda forms: forms)[1][_TABLE])
    tensor_files.write(path, index.kind, spec, {**tensors, _TABLE: np.concatenate(parts, -1)})


def _empty(mesh: Any, width: int) -> Any:
    """A table in columns over a mesh, which tells the group and the width of all."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(torch.empty(1, 1, width // mesh.size(), device=mesh.device_type), mesh, [Shard(2)])


def _columns_of_layer(layer: Any) -> Columns:
    if not isinstance(layer, FwPKM):
        raise ValueError(
            "layer must be an FwPKM of fwpkm.backends.torch; torch.distributed.checkpoint saves whole models. "
            f"Received: {type(layer).__name__}"
        )
    return _columns_of(layer.memory.values)


def _columns_of(values: Tensor) -> Columns:
    columns = Columns.of(values.detach())
    if columns is None:
        raise ValueError(
            "the value table must lie in columns: fwpkm.save and save_state write one that lies whole. Received: a "
            "tensor that is no DTensor"
        )
    return columns


def _path(folder: PathLike, save: str, part: int, parts: int) -> Path:
    return Path(folder) / f"columns-{save}-{part}-of-{parts}.safetensors"


def _save(
    folder: PathLike,
    kind: str,
    columns: Columns,
    spec_of: Callable[[], dict[str, Any]],
    tensors_of: Callable[[], dict[str, Tensor]],
) -> None:
    drawn = torch.tensor(secrets.randbits(62), device=columns.table.device)
    distributed.broadcast(drawn, distributed.get_global_rank(columns.group, 0), group=columns.group)
    index = _Index(kind, f"{drawn.item():016x}", columns.size)
    path = None
    try:
        with ranks.together("save", columns):
            path = _path(folder, index.save, columns.rank, index.parts)
            spec, tensors = spec_of(), tensors_of()
            arrays = {name: to_numpy(x) for name, x in tensors.items() if name != _TABLE and columns.rank == 0}
            arrays[_TABLE] = to_numpy(columns.table)
            tensor_files.write(path, f"{kind} in columns", {**spec, "columns": _place(index, columns.rank)}, arrays)
    except Exception:
        if path is not None:
            path.unlink(missing_ok=True)
        raise
    with ranks.together("save", columns):
        if columns.rank == 0:
            _write_index(folder, index)


def _place(index: _Index, part: int) -> dict[str, Any]:
    return {"save": index.save, "part": part, "parts": index.parts}


def _write_index(folder: PathLike, index: _Index) -> None:
    """Put the index in its place, once all parts are there, and remove what it does not name."""
    parts = [_path(folder, index.save, part, index.parts) for part in range(index.parts)]
    if missing := [path.name for path in parts if not path.is_file()]:
        raise FileNotFoundError(
            f"{folder}: all ranks must write into one folder that the first of them sees, and no other save at the "
            f"same time. Not there: {', '.join(missing)}"
        )
    temporary = Path(folder) / f".{INDEX}-{index.save}.tmp"
    with temporary.open("w") as file:
        json.dump({"format_version": tensor_files.FORMAT_VERSION, **index._asdict()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, Path(folder) / INDEX)
    left = [*Path(folder).glob(f".{INDEX}-*.tmp"), *Path(folder).glob("columns-*-of-*.safetensors")]
    for path in left:
        if not path.name.startswith(f"columns-{index.save}-"):
            path.unlink(missing_ok=True)


def _read_index(folder: PathLike) -> _Index:
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no save of tables in columns is here. Expected: a folder with {INDEX}")
    try:
        found = json.loads(path.read_text())
        index = _Index(*(found[name] for name in _Index._fields))
        whole = found["format_version"] == tensor_files.FORMAT_VERSION
        whole = whole and isinstance(index.parts, int) and isinstance(index.save, str) and index.parts >= 1
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise bad(
            path, "not an index of tables in columns", "what columns.save writes", path.read_text()[:200], DAMAGED
        )
    return index


def _read_part(
    folder: PathLike, index: _Index, part: int, wanted: Callable[[dict[str, Any]], dict[str, Any]],
    expected: Callable[[Forms], Forms],
) -> tuple[dict[str, Any], Tensors]:  # fmt: skip
    """The spec that was saved, and the tensors of a part."""
    path = _path(folder, index.save, part, index.parts)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, though {INDEX} names it. Copy all files of the folder.")

    def saved(spec: dict[str, Any]) -> dict[str, Any]:
        return {name: x for name, x in spec.items() if name != "columns"}

    spec, tensors = tensor_files.read(
        path,
        f"{index.kind} in columns",
        lambda spec: {**wanted(saved(spec)), "columns": _place(index, part)},
        lambda _, forms: expected(forms),
    )
    return saved(spec), tensors


def _read_own(
    folder: PathLike, kind: str, columns: Columns, spec: dict[str, Any], whole_forms: Callable[[Forms], Forms]
) -> Tensors:
    """All tensors, of the value table this rank's columns."""
    index = _read_index(folder)
    if index.kind != kind:
        raise bad(Path(folder) / INDEX, f"not the save of a {kind}", kind, index.kind, "Read it by load or load_state.")
    width = columns.whole.shape[-1]
    if width % index.parts:
        raise bad(Path(folder) / INDEX, "other columns", f"parts that divide {width} columns", index.parts, DAMAGED)
    each, own = width // index.parts, width // columns.size
    first, end = columns.rank * own, (columns.rank + 1) * own

    def of_first(found: Forms) -> Forms:
        whole = whole_forms(found)
        return {**whole, _TABLE: whole[_TABLE]._replace(shape=(*whole[_TABLE].shape[:-1], each))}

    _, tensors = _read_part(folder, index, 0, lambda _: spec, of_first)
    table, others = [], {_TABLE: tensor_files.forms_of(tensors)[_TABLE]}
    for part in range(first // each, -(-end // each)):
        read = tensors if part == 0 else _read_part(folder, index, part, lambda _: spec, lambda _: others)[1]
        table.append(read[_TABLE][..., max(first - part * each, 0) : end - part * each])
    return {**tensors, _TABLE: np.concatenate(table, -1)}
