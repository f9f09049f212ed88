"""What training leaves in a folder: the experiment, a record of losses, and a checkpoint that it goes on from.

A checkpoint holds weights and the optimizer's moments. The initial tables follow from the seed, so files stay small;
keys that are held (settings.py) are kept.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.language_model.model import LanguageModel
from examples.language_model.settings import Experiment

WEIGHTS, RECORD, SETTINGS = "checkpoint.safetensors", "record.jsonl", "experiment.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW calls them
PIECES = "weights-*.safetensors"
LARGEST = 16 * 2**20  # bytes of a piece
HEADER = 2**16  # bytes of a piece that are not weights, at most


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path``, then put that in its place, so that there is never half a file."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    beside.replace(path)


def ready(path: Path) -> None:
    """Make the folder that a file will be written to, before hours of work go by.

    Raises:
        ValueError: the file is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file that may be written")
    made(path.parent)


def made(folder: Path) -> None:
    """Make a folder, unless it is there.

    Raises:
        ValueError: a file is in its way.
    """
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"{part} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)


def claim(folder: Path, experiment: Experiment) -> None:
    """Make the folder an experiment's.

    Raises:
        ValueError: it is another experiment's, or a file.
    """
    made(folder)
    path = folder / SETTINGS
    if not path.exists():
        replace(path, lambda beside: beside.write_text(json.dumps(experiment.tables(), indent=1)))
    elif settings_of(folder) != experiment:
        raise ValueError(
            f"{folder} holds another experiment, see {path}. Give --out another folder, or remove this one"
        )


def mend(record: Path) -> None:
    """Cut off a line that a crash left unfinished, so that the next one begins a line."""
    if record.exists():
        whole = record.read_bytes()
        replace(record, lambda beside: beside.write_bytes(whole[: whole.rfind(b"\n") + 1]))


def settings_of(folder: Path) -> Experiment:
    """The experiment of a folder.

    Raises:
        FileNotFoundError: nothing was trained there.
        ValueError: the file is damaged.
    """
    path = folder / SETTINGS
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {SETTINGS}: train first, with --out {folder}")
    try:
        tables = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, or copy it again") from error
    try:
        return Experiment.of(tables, str(path))
    except ValueError as error:
        raise ValueError(f"{error}. It is damaged, or of another version: train in another folder") from error


def build(experiment: Experiment, device: torch.device, **memory: Any) -> LanguageModel:
    """The untrained model of an experiment: the same numbers for a seed on every device.

    ``memory`` overrides the configuration of its memories.
    """
    torch.manual_seed(experiment.training.seed)
    return LanguageModel(experiment.model, **memory).to(device)


def initial_keys(model: LanguageModel) -> dict[str, Tensor]:
    """Those of each memory, unless they are trained."""
    return {name: table for name, table in model.named_buffers() if name.endswith("memory.keys")}


def tables_of(model: LanguageModel) -> str:
    """A sha256 that tells one seed's initial tables from another's; those that are trained stand in the file."""
    digest = hashlib.sha256()
    for keys in initial_keys(model).values():
        digest.update(keys.cpu().numpy().tobytes())
    return digest.hexdigest()


def digest(tensors: dict[str, Tensor]) -> str:
    """A sha256 of named tensors."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def save(
    folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, step: int, corpus: str, drawn: str
) -> None:
    """Replace the folder's checkpoint by this one.

    ``corpus`` is the sha256 of what was read, ``drawn`` that of the tables that the seed gave (``tables_of``): initial
    keys that are others now are kept too.
    """
    moved = initial_keys(model) if tables_of(model) != drawn else {}
    tensors = {f"model.{name}": keys.contiguous() for name, keys in moved.items()}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach().contiguous()
        moments = optimizer.state.get(p, {})
        tensors |= {f"optimizer.{name}.{key}": moments[key].contiguous() for key in MOMENTS if key in moments}
    about = {"step": str(step), "corpus": corpus, "tables": drawn, "weights": digest(tensors)}
    replace(folder / WEIGHTS, lambda path: save_file(tensors, path, about))


def split(folder: Path, largest: int = LARGEST) -> list[Path]:
    """The weights of a folder's checkpoint again, without moments, in files of at most ``largest`` bytes.

    For ways that only small files pass. Tensors are cut along their first axis; a part is called NAME@FIRST_ROW.
    """
    tensors, about = _read(folder / WEIGHTS)
    weights = {name: x for name, x in tensors.items() if name.startswith("model.")}
    pieces: list[dict[str, Tensor]] = [{}]
    free = largest - HEADER
    for name, whole in weights.items():
        row, at = whole[:1].nbytes, 0
        while at < len(whole):
            if pieces[-1] and free < row:
                pieces.append({})
                free = largest - HEADER
            rows = max(1, min(len(whole) - at, free // row))
            pieces[-1][f"{name}@{at}"] = whole[at : at + rows].contiguous()
            at, free = at + rows, free - rows * row
    about |= {"weights": digest(weights), "pieces": str(len(pieces))}
    paths = [folder / PIECES.replace("*", str(i)) for i in range(len(pieces))]
    for path, piece in zip(paths, pieces):
        replace(path, lambda beside, piece=piece: save_file(piece, beside, about))  # type: ignore[misc]
    return paths


def _joined(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What ``split`` cut, as ``_read`` reads it."""
    first = folder / PIECES.replace("*", "0")
    number = _read(first, whole=False)[1].get("pieces", "0")
    parts: dict[str, dict[int, Tensor]] = {}
    about: dict[str, str] = {}
    for i in range(int(number)):
        piece, about = _read(folder / PIECES.replace("*", str(i)), whole=False)
        for name, x in piece.items():
            name, _, at = name.rpartition("@")
            parts.setdefault(name, {})[int(at)] = x
    tensors = {name: torch.cat([x for _, x in sorted(found.items())]) for name, found in parts.items()}
    if digest(tensors) != about.get("weights"):
        raise ValueError(f"{folder}: the files {PIECES} do not belong together, or are damaged: copy them again")
    return tensors, about


def resume(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, corpus: str) -> int:
    """Fill a model and its optimizer from the folder's checkpoint; returns the step to go on from.

    Raises:
        ValueError: the checkpoint is damaged, or of another corpus or other tables.
    """
    tensors, about = _read(folder / WEIGHTS)
    for name, received in (("corpus", corpus), ("tables", tables_of(model))):
        if received != about[name]:
            raise ValueError(
                f"{folder / WEIGHTS} was trained with another {name}, sha256 {about[name]}. Received: {received}. "
                f"Give --out another folder to begin anew"
            )
    _fill(model, tensors, folder)
    step = int(about["step"])
    for name, p in model.named_parameters():
        if not any(f"optimizer.{name}.{key}" in tensors for key in MOMENTS):
            continue  # it had no gradient yet
        moments = {key: _fitting(tensors, f"optimizer.{name}.{key}", p, folder).to(p) for key in MOMENTS}
        optimizer.state[p] = {"step": torch.tensor(float(step)).to(p.device), **moments}
    return step


def load(folder: Path, device: torch.device, **memory: Any) -> tuple[LanguageModel, Experiment]:
    """The trained model of a folder, from its checkpoint or from the pieces of its weights.

    Its memories are configured as ``model.reading`` says, and ``memory`` overrides that; with another ``num_subkeys``
    they have other tables than it was trained with.

    Raises:
        FileNotFoundError: nothing was trained there.
        ValueError: a file is damaged, or of other tables than this version of torch draws.
    """
    experiment, (tensors, about) = settings_of(folder), _found(folder)
    held = {"addressing_weight": 0.0} if experiment.training.holds(int(about["step"])) else {}
    model = build(experiment, device, **held | {**experiment.model.reading, **memory})
    if "num_subkeys" not in memory and about["tables"] != tables_of(model):
        raise ValueError(f"{folder / WEIGHTS} was trained with other tables than seed {experiment.training.seed} gives")
    own, kept = experiment.model.memory_config().num_subkeys, any(f"model.{x}" in tensors for x in initial_keys(model))
    if kept and memory.get("num_subkeys", own) != own:
        raise ValueError(f"num_subkeys must be {own}: the keys of {folder} are held. Received: {memory['num_subkeys']}")
    _fill(model, tensors, folder)
    return model.requires_grad_(False).eval(), experiment


def corpus_of(folder: Path) -> str:
    """The sha256 of the corpus that the model of a folder was trained on. Raises as ``load`` does."""
    return _found(folder)[1]["corpus"]


def _found(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a folder's checkpoint, or of the pieces of its weights."""
    whole = folder / WEIGHTS
    return _joined(folder) if not whole.exists() and list(folder.glob(PIECES)) else _read(whole)


def _read(path: Path, whole: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint, whose sha256 is that of ``whole`` checkpoints only."""
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}: train first, with --out {path.parent}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, or copy it again") from error
    if missing := {"step", "corpus", "tables"} - set(about):
        raise ValueError(f"{path} is no checkpoint of this example: its metadata lacks {sorted(missing)}")
    if not about["step"].isdecimal():
        raise ValueError(f"{path} is damaged (step {about['step']!r}): remove it, or copy it again")
    if whole and about.get("weights", found := digest(tensors)) != found:  # checkpoints of before have no checksum
        raise ValueError(f"{path} is damaged (its tensors do not match their sha256): remove it, or copy it again")
    return tensors, about


def _fill(model: LanguageModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy the weights in, and initial keys that are kept, after all of them were found to fit."""
    kept = {name: keys for name, keys in initial_keys(model).items() if f"model.{name}" in tensors}
    own = dict(model.named_parameters()) | kept
    fitting = {name: _fitting(tensors, f"model.{name}", p, folder) for name, p in own.items()}
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(fitting[name])


def _fitting(tensors: dict[str, Tensor], name: str, like: Tensor, folder: Path) -> Tensor:
    """The tensor of a name, which must have the shape of ``like``."""
    found = tensors.get(name)
    if found is None or found.shape != like.shape:
        shape = None if found is None else tuple(found.shape)
        raise ValueError(f"{folder / WEIGHTS}: {name} must be {tuple(like.shape)}. Received: {shape}")
    if not found.isfinite().all():
        raise ValueError(f"{folder / WEIGHTS}: {name} must be finite. Received: numbers that are not")
    return found
