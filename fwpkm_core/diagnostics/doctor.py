"""``fwpkm doctor``: what a saved layer or state holds, and whether it is sound (SPEC.md §8)."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import safetensors

from fwpkm import packing, schedule
from fwpkm.config import FwPKMConfig
from fwpkm.containers import memory_specs, state_specs
from fwpkm.diagnostics.record import MAGIC
from fwpkm.files import named, part_of
from fwpkm.tensor_files import FORMAT_VERSION, config_digest

QUARTILES = {"least": 0, "quartile_1": 25, "median": 50, "quartile_3": 75, "largest": 100}

Tensors = dict[str, np.ndarray]
Spec = dict[str, Any]


class DoctorError(ValueError):
    """Nothing that this doctor knows; the message names it."""


class Part(NamedTuple):
    """A memory or state that a file holds, for the report; most files hold one."""

    name: str
    """"" where there is one."""
    config: FwPKMConfig
    shapes: dict[str, tuple[int, ...]]
    """Those that the config asks for, of tensors by name."""
    values: np.ndarray | list[np.ndarray]
    """``[M, N, Dv]``; of a packed state only the rows that were written, ``[n, Dv]`` of each memory."""
    position: np.ndarray | None = None
    """``[B]``, of a state."""
    packed: bool = False


def _layer(spec: Spec, tensors: Tensors) -> list[Part]:
    config = FwPKMConfig.from_json(json.dumps(spec["config"]))
    shapes = {f"memory.{name}": x.shape[1:] for name, x in memory_specs(config, 1)._asdict().items()}
    return [Part("", config, shapes, tensors["memory.values"][None])]


def _state(spec: Spec, tensors: Tensors, name: str = "") -> list[Part]:
    config = FwPKMConfig.from_json(json.dumps(spec))
    prefix = f"{name}." if name else ""
    position, values = (tensors[f"{prefix}{field}"] for field in ("position", "memory.values"))
    arrays = state_specs(config, len(position)).arrays()
    return [Part(name, config, {f"{prefix}{field}": x.shape for field, x in arrays.items()}, values, position)]


def _states(spec: Spec, tensors: Tensors) -> list[Part]:
    return [part for name, fields in spec.items() for part in _state(fields, tensors, name)]


def _packed(spec: Spec, tensors: Tensors) -> list[Part]:
    parts = []
    for name, fields in spec.items():
        config, arrays = FwPKMConfig.from_json(json.dumps(fields)), part_of(tensors, name)
        rows, position = arrays["values"], arrays["position"]
        if rows.dtype == np.uint16:  # the upper halves of float32
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        specs = packing.specs(config, len(position), len(rows), len(arrays["pending_query"]))
        shapes = {key: spec.shape for key, spec in named(name, specs).items()}
        values = np.split(rows, np.cumsum(arrays["counts"])[:-1])
        parts.append(Part(name, config, shapes, values, position, packed=True))
    return parts


KINDS: dict[str, Callable[[Spec, Tensors], list[Part]]] = {
    "layer": _layer, "state": _state, "set of states": _states, "set of packed states": _packed,
}  # fmt: skip
"""By the kind that a file's metadata name."""


def examine(path: str | os.PathLike[str], initial: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """A report on a file of ``fwpkm.save``, ``save_state``, ``save_states`` or ``save_packed``, JSON-able.

    Args:
        path: the file.
        initial: a file with the memory that it began from, a layer's or a state's, to count the slots written since.

    Returns:
        "path", "kind", "config", "tensors" (shape, dtype, how many numbers are not finite), "memories" (for each whose
        it is, "" where the file holds one; the norms of its rows, of a packed state of those that were written: least,
        quartiles, largest of the finite ones; rows that are not finite; slots whose bits differ from ``initial``, which
        a packed state tells by itself, or None), "rows" (position and pending tokens of
        each row of a state), and "problems": what is wrong, in words; none where all is well.

    Raises:
        DoctorError: a kind of file that is unknown here, or an ``initial`` that cannot be read or does not fit.
        OSError: a file cannot be read.
    """
    report: dict[str, Any] = {"path": os.fspath(path), "kind": None, "config": None}
    report |= {"tensors": {}, "memories": [], "rows": [], "problems": []}
    parts = _open(path, report)
    began = None if initial is None else _initial(initial)
    if initial is not None and (len(parts) > 1 or any(part.packed for part in parts)):
        raise DoctorError(
            f"--memory {initial}: serves a file of one layer or state. Packed states tell what was written themselves; "
            f"of a set of states it cannot tell whose it is. Received: {path}, a {report['kind']}"
        )
    for part in parts:
        initial_values = None if began is None else _baseline(initial, began, part)
        for m, values in enumerate(part.values):
            baseline = None if initial_values is None else initial_values[m % len(initial_values)]
            report["memories"].append({"of": part.name, **_memory(values, baseline, part)})
            if part.packed and report["memories"][-1]["rows_not_finite"]:
                report["problems"].append(f"{part.name}.values: rows of memory {m} hold numbers that are not finite")
            if initial is not None:
                _judge_written(part, m, report["memories"][-1]["slots_written"], initial, report["problems"])
        if part.position is not None:
            pending = [int(schedule.pending(part.config, int(p))) for p in part.position]
            report["rows"] += [
                {"of": part.name, "position": int(p), "pending": n} for p, n in zip(part.position, pending)
            ]
            _judge_positions(part, report["problems"])
    return report


def _open(path: str | os.PathLike[str], report: dict[str, Any]) -> list[Part]:
    """What a file holds; nothing, with the reason among the problems, where it is too damaged to tell."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a folder. Expected a file of fwpkm.save or fwpkm.save_state")
    if os.path.exists(path) and not os.path.isfile(path):
        raise DoctorError(f"{path}: is a device, pipe or socket. Expected a file of fwpkm.save or fwpkm.save_state")
    with open(path, "rb") as raw:
        start = raw.read(max(len(MAGIC), 9))
    if start[: len(MAGIC)] == MAGIC:
        raise DoctorError(f"{path}: a recording, of which fwpkm inspect makes a page. Expected: a saved layer or state")
    # The length of a header, eight bytes of which the upper four are 0, then the header, which is JSON.
    if any(start[4:8]) or start[8:9] not in (b"", b"{"):
        hint = " (a file of torch.save?)" if start[:4] == b"PK\3\4" or start[:1] == b"\x80" else ""
        raise DoctorError(f"{path}: no safetensors file{hint}. Expected: a file of fwpkm.save or fwpkm.save_state")
    problems: list[str] = report["problems"]
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        problems.append(f"not a whole safetensors file: {error}")
        return []
    report["kind"] = metadata["kind"]
    report["tensors"] = {name: _tensor(x) for name, x in tensors.items()}
    problems += _wrong_digests(metadata, tensors)
    if config_digest(metadata.get("config", "")) != metadata.get("config_sha256", config_digest(metadata["config"])):
        problems.append("config: it does not match its sha256: damaged or edited")
    for name, found in report["tensors"].items():
        if found["not_finite"]:
            problems.append(f"{name}: {found['not_finite']} of {tensors[name].size} numbers are not finite")
        if name.rpartition(".")[2] == "uses" and (tensors[name] < 0).any():
            problems.append(f"{name}: expected numbers of at least 0, received {tensors[name].min()}")
    try:
        spec = json.loads(metadata["config"])
        report["config"] = spec
        parts = KINDS[metadata["kind"]](spec, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        problems.append(f"its config cannot be read, or tensors are missing: {type(error).__name__}: {error}")
        return []
    for name, shape in (item for part in parts for item in part.shapes.items()):
        received = tensors[name].shape if name in tensors else None
        if received != shape:
            problems.append(f"{name}: expected shape {shape}, received {received or 'no such tensor'}")
    return [part for part in parts if all(x.ndim == 2 and x.dtype.kind == "f" for x in part.values)]


def _check_kind(path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    version, kind = metadata.get("format_version"), metadata.get("kind")
    if version is None or kind is None:
        raise DoctorError(
            f"{path}: a safetensors file, but none of this library: it names no format_version and kind. Expected: a "
            "file of fwpkm.save or fwpkm.save_state"
        )
    if version != FORMAT_VERSION:
        raise DoctorError(f"{path}: unknown format_version. Expected: {FORMAT_VERSION!r}. Received: {version!r}")
    if kind not in KINDS:
        raise DoctorError(f"{path}: unknown kind. Expected: one of {', '.join(KINDS)}. Received: {kind!r}")


def _tensor(x: np.ndarray) -> dict[str, Any]:
    not_finite = int((~np.isfinite(x)).sum()) if x.dtype.kind == "f" else 0
    return {"shape": list(x.shape), "dtype": x.dtype.name, "not_finite": not_finite}


def _wrong_digests(metadata: dict[str, str], tensors: Tensors) -> list[str]:
    try:
        digests = json.loads(metadata["sha256"])
        wrong = [name for name, x in tensors.items() if digests.get(name) != _digest(x)]
    except (KeyError, AttributeError, ValueError, RecursionError):
        return ["its checksums cannot be read"]
    return [f"{name}: its contents do not match their sha256: damaged or edited" for name in wrong]


def _digest(x: np.ndarray) -> str:
    little_endian = np.asarray(x, x.dtype.newbyteorder("<"), order="C")
    return hashlib.sha256(little_endian.reshape(-1).view(np.uint8).data).hexdigest()


def _memory(values: np.ndarray, initial: np.ndarray | None, part: Part) -> dict[str, Any]:
    """The norms of a table's rows ``[N, Dv]``, and how many of them differ from the initial ones."""
    finite = np.isfinite(values).all(1)
    norms = np.linalg.norm(values[finite].astype(np.float64), axis=1)
    quantiles = np.percentile(norms, list(QUARTILES.values())).tolist() if norms.size else [None] * len(QUARTILES)
    written = len(values) if part.packed else None
    if initial is not None:
        bits = f"u{values.dtype.itemsize}"
        written = int((np.ascontiguousarray(values).view(bits) != initial.view(bits)).any(1).sum())
    norm = dict(zip(QUARTILES, quantiles))
    return {
        "slots": part.config.num_slots,
        "norm": norm,
        "rows_not_finite": int((~finite).sum()),
        "slots_written": written,
    }


def _initial(path: str | os.PathLike[str]) -> Part:
    """The memory of a file, or the memories of a state, that another state began from."""
    report: dict[str, Any] = {"problems": []}
    try:
        found = _open(path, report)
    except FileNotFoundError:
        raise DoctorError(f"--memory {path}: no such file") from None
    except (OSError, DoctorError) as error:
        raise DoctorError(f"--memory {error}") from None
    if report["problems"] or len(found) != 1:
        problems = "; ".join(report["problems"]) or f"expected a file of one memory. Received: {len(found)}"
        raise DoctorError(f"--memory {path}: {problems}")
    return found[0]


def _baseline(path: str | os.PathLike[str] | None, initial: Part, part: Part) -> np.ndarray:
    """``[1 or M, N, Dv]``: the tables that those of a part began from, in their dtype."""
    values, wanted = np.asarray(initial.values), np.asarray(part.values)
    if values.shape[1:] != wanted.shape[1:] or len(values) not in (1, len(wanted)) or values.dtype != wanted.dtype:
        raise DoctorError(
            f"--memory {path}: expected value tables of shape [1 or {len(wanted)}, {wanted.shape[1]}, "
            f"{wanted.shape[2]}] and dtype {wanted.dtype}. Received: shape {values.shape}, dtype {values.dtype}"
        )
    return np.ascontiguousarray(values)


def _judge_written(part: Part, m: int, written: int, initial: str | os.PathLike[str], problems: list[str]) -> None:
    """A memory in which more slots differ than its tokens can have written began from another one."""
    if part.position is None:
        return
    tokens = int(part.position.sum() if part.config.memory_scope == "batch" else part.position[m])
    most = tokens * part.config.slots_per_token
    if written > most:
        problems.append(
            f"memory {m}: {written} of {part.config.num_slots} slots differ from {initial}, and its {tokens} tokens "
            f"can have written {most} at most: is that the memory that it began from?"
        )


def _judge_positions(part: Part, problems: list[str]) -> None:
    position = part.position
    assert position is not None
    name = f"{part.name}.position" if part.name else "position"
    if position.min(initial=0) < 0:
        problems.append(f"{name}: expected numbers of at least 0, received {position.tolist()}")
    elif part.config.memory_scope == "batch" and len(set(position.tolist())) > 1:
        problems.append(f"{name}: expected one for all rows in batch scope, received {position.tolist()}")


def as_text(report: dict[str, Any]) -> str:
    """A report for people."""
    lines = [f"{report['path']}: {report['kind'] or 'unreadable'}"]
    config = report["config"] or {}
    fields = {**{k: v for k, v in config.items() if k != "config"}, **config.get("config", {})}
    if fields:
        lines += ["", "config  " + " ".join(f"{name}={value}" for name, value in fields.items())]
    tensors = [(name, str(x["shape"]), x["dtype"], x["not_finite"]) for name, x in report["tensors"].items()]
    lines += _table(("tensor", "shape", "dtype", "not finite"), tensors)
    memories = [
        (name, x["slots"], x["slots_written"], x["rows_not_finite"], *x["norm"].values())
        for name, x in _numbered(report["memories"])
    ]
    heads = ("memory", "slots", "written", "not finite", "least norm", "quartile", "median", "quartile", "largest")
    lines += _table(heads, memories)
    lines += _table(
        ("row", "position", "pending"),
        [(name, x["position"], x["pending"]) for name, x in _numbered(report["rows"])],
    )
    problems = [f"problem: {problem}" for problem in report["problems"]]
    return "\n".join([*lines, "", *(problems or ["nothing is wrong"])])


def _numbered(entries: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Each with whose it is and a number, which begins anew with each of those."""
    counts: Counter[str] = Counter()
    numbered = []
    for entry in entries:
        numbered.append((f"{entry['of']} {counts[entry['of']]}".strip(), entry))
        counts[entry["of"]] += 1
    return numbered


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """An empty line and aligned columns, or nothing where there are no rows."""
    if not rows:
        return []
    shown = [heads, *(tuple(_cell(x) for x in row) for row in rows)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(heads))]
    return ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown)]


def _cell(x: Any) -> str:
    return "-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)
