"""Packed states as files: each holds its configuration, and the digest of the initial memory that it needs."""

import json
from collections.abc import Mapping
from typing import Any

from fwpkm import packing
from fwpkm.config import FwPKMConfig
from fwpkm.files import check_names, check_saved_names, floats_beside, named, part_of
from fwpkm.packing import PackedState
from fwpkm.tensor_files import DAMAGED, Form, Forms, PathLike, bad, read, write

_KIND = "set of packed states"


def save_packed(path: PathLike, packed: Mapping[str, PackedState]) -> None:
    """Write packed states, such as one row's of every layer of a model, to one file, which holds all of them or none.

    Args:
        path: the file; one that exists is replaced in one step, or stays as it is when anything fails.
        packed: at least one, by a name of the caller's.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        ValueError: none, or one whose arrays do not fit each other.
    """
    check_names("packed", packed)
    for name, one in packed.items():
        packing.check(f"packed[{name!r}]", one)
    tensors = {key: x for name, one in packed.items() for key, x in named(name, packing.arrays(one)).items()}
    write(path, _KIND, {name: json.loads(one.config.to_json()) for name, one in packed.items()}, tensors)


def load_packed(path: PathLike) -> dict[str, PackedState]:
    """Read the packed states of :func:`save_packed`, in their order; ``be.unpack`` of any backend goes on from there.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: ``path`` is a folder.
        ValueError: the file is damaged, of another format or kind, or has a configuration that this release lacks.
    """
    configs: dict[str, FwPKMConfig] = {}

    def wanted(saved: dict[str, Any]) -> dict[str, Any]:
        check_saved_names(path, saved)
        configs.update({name: _config(path, name, fields) for name, fields in saved.items()})
        return {name: json.loads(cfg.to_json()) for name, cfg in configs.items()}

    def expected(saved: dict[str, Any], forms: Forms) -> Forms:
        parts = {name: _forms(cfg, part_of(forms, name)) for name, cfg in configs.items()}
        return {key: form for name, part in parts.items() for key, form in named(name, part).items()}

    _, tensors = read(path, _KIND, wanted, expected)
    packed = {name: packing.from_arrays(cfg, part_of(tensors, name)) for name, cfg in configs.items()}
    for name, one in packed.items():
        if problem := packing.problem_of(one):
            field, needed, received = problem
            raise bad(path, f"bad {name}.{field}", needed, received, DAMAGED)
    return packed


def _config(path: PathLike, name: str, fields: dict[str, Any]) -> FwPKMConfig:
    try:
        return FwPKMConfig.from_json(json.dumps(fields))
    except ValueError as error:
        advice = "Read it with the release of fwpkm that wrote it, or take another copy."
        problem = f"unreadable metadata 'config' of {name}"
        raise bad(path, problem, "the fields of an FwPKMConfig", error, advice) from error


def _forms(cfg: FwPKMConfig, found: Forms) -> Forms:
    """What a packed state must hold; how many rows and tokens is taken from what was found."""

    def length(name: str) -> int:
        return next(iter(found[name].shape), 0) if name in found else 0

    dtype = floats_beside(found, "keys")
    specs = packing.specs(cfg, length("position"), length("slots"), length("pending_query"))
    forms = {name: Form(spec.shape, dtype if spec.kind == "float" else (spec.kind,)) for name, spec in specs.items()}
    return forms | {"values": Form(specs["values"].shape, (*dtype, "uint16"))}
