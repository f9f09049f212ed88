"""What was measured, read from a folder of NAME.KIND.json and NAME.record.jsonl."""

import contextlib
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from examples.language_model.phrasings import VALUE_LENGTH
from examples.language_model.settings import Experiment

FILES = re.compile(r"(.+)\.(needle[^.]*\.json|capacity\.json|names\.json|bits\.json|record\.jsonl)")
MEMORY, NO_MEMORY = "memory", "no memory"
KINDS = {"fwpkm": MEMORY, "attention": "attention", "delta": "Gated DeltaNet", "static": "static memory"}
"""What models are called, by their mixers."""

_NUMBER = (int, float)
_LINE = {
    "step": int,
    "device": str,
    "side_by_side": int,
    **dict.fromkeys(("steps_per_second", "digits_right", "first_right"), _NUMBER),
}
_ROW = {"control": str, "kind": str, "length": int, "readings": int, "exact": _NUMBER, "digits": _NUMBER}
_CAPACITY = {"facts": int, "length": int, "exact": _NUMBER, "digits": _NUMBER}


class Answers(NamedTuple):
    """What was answered in one cell of needle.py or capacity.py."""

    control: str
    kind: str
    length: int
    """bytes of a context"""
    readings: int
    exact: np.ndarray
    """``[contexts, facts]`` bool"""
    depth: np.ndarray
    """``[contexts, facts]``, 0 at the first byte"""


class Run(NamedTuple):
    """All that a folder of results says of one model."""

    name: str
    """of its files"""
    experiment: Experiment
    twin: bool
    """whether another run of the folder is of the same experiment"""
    needles: Sequence[Answers] = ()
    capacity: Sequence[Answers] = ()
    state_bytes: int = 0
    """of one sequence; 0 where capacity was not measured"""
    names: Mapping[str, Any] = MappingProxyType({})
    """as names.py writes them; empty where they were not asked"""
    bits: Mapping[str, np.ndarray] = MappingProxyType({})
    """``[documents, bins]`` by what the memory does, see by_position.py"""
    documents: Sequence[str] = ()
    writers: Sequence[str] = ()
    """of the documents; each its own where the file does not name them"""
    bin: int = 0
    """bytes"""
    record: Sequence[dict[str, Any]] = ()

    @property
    def kind(self) -> str:
        """What the model has besides windows of attention."""
        model = self.experiment.model
        return KINDS[model.mixer] if model.memories else NO_MEMORY

    @property
    def alone(self) -> str:
        """What its bits are called where it reads each document by itself."""
        return NO_MEMORY if self.kind == NO_MEMORY else "reset"

    @property
    def seed(self) -> str:
        """The seed, with the name of the files where that does not tell it."""
        return f"{self.experiment.training.seed}" + f" ({self.name})" * self.twin

    @property
    def steps(self) -> int:
        """Steps that it was to be trained for."""
        return self.experiment.training.steps

    @property
    def label(self) -> str:
        """Kind, steps and seed."""
        last = self.record[-1]["step"] if self.record else self.steps
        stopped = f"{last:,} of " if last < self.steps else ""
        return f"{self.kind}, {stopped}{self.steps:,} steps, seed {self.seed}"

    @property
    def speed(self) -> float:
        """Median steps per second."""
        return speed(self.record)

    @property
    def seconds(self) -> float:
        """Of training, without the start of each run."""
        return self.record[-1]["step"] / self.speed

    @property
    def timed(self) -> bool:
        """Whether speed and seconds are known, of a training that had its device to itself."""
        return bool(self.record) and shared(self.record) == 1

    @property
    def device(self) -> str:
        """On what it was trained."""
        n = shared(self.record)
        return ", ".join(sorted({line["device"] for line in self.record})) + f", {n} side by side" * (n > 1)

    def answers(self, *, control: str | None = None) -> list[Answers]:
        """The cells of a control; None: of the model as it is."""
        control = control or (NO_MEMORY if self.kind == NO_MEMORY else MEMORY)
        return [x for x in self.needles if x.control == control]

    def cell(self, kind: str, length: int, readings: int = 1) -> Answers | None:
        """The answers of the model as it is."""
        asked = kind, length, readings
        return next((x for x in self.answers() if (x.kind, x.length, x.readings) == asked), None)


def load(folder: Path) -> list[Run]:
    """The models of a folder: those with a memory, then others by kind; by steps and seed.

    A record of training alone does not tell which model it is of, and is left out.

    Raises:
        FileNotFoundError: the folder holds no results.
        ValueError: a file is damaged, or does not belong with the others; names it.
    """
    found: dict[str, dict[str, Any]] = {}
    settled: dict[str, tuple[Path, Any]] = {}  # what the files must agree on, and who said so first
    for path in sorted(folder.glob("*.json*")):
        if (match := FILES.fullmatch(path.name)) is None:
            continue
        name, kind = match.groups()
        run = found.setdefault(name, {})
        with _naming(path):
            if kind == "record.jsonl":
                run["record"] = record(path.read_text(encoding="utf-8-sig"))
                continue
            data = json.loads(path.read_text(encoding="utf-8-sig"))
            run["experiment"] = Experiment.of(data["experiment"], "experiment")
            agreed = {f"model of {name}": run["experiment"], "corpus": data["corpus"]}
            if run["experiment"].model.writes:
                agreed["model with a memory, but for its seed,"] = alike(run["experiment"], seed=0)
            _take(run, kind, data)
            if kind == "bits.json":
                agreed["size and number of bins"] = run["bin"], len(next(iter(run["bits"].values()))[0])
        for what, value in agreed.items():
            first, said = settled.setdefault(what, (path, value))
            if said != value:
                raise ValueError(f"{path} is of another {what} than {first}: keep them in folders of their own")
    experiments = [run["experiment"] for run in found.values() if "experiment" in run]
    if not experiments:
        raise FileNotFoundError(
            f"{folder} holds no NAME.needle.json, NAME.capacity.json, NAME.names.json or NAME.bits.json: measure first"
        )
    runs = [
        Run(name, twin=experiments.count(run["experiment"]) > 1, **run)
        for name, run in found.items()
        if "experiment" in run
    ]
    return sorted(runs, key=_order)


def _order(run: Run) -> tuple[Any, ...]:
    return [*KINDS.values(), NO_MEMORY].index(run.kind), run.steps, run.experiment.training.seed, run.name


def alike(experiment: Experiment, **training: Any) -> Experiment:
    """An experiment with other fields of training."""
    return dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, **training))


# Files


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or of another version ({error!r}): measure or copy it again") from error


def _check(data: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise where a value is not of its kind; numbers must be finite, and not bool."""
    for name, kind in kinds.items():
        value = data[name]
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not number or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}")


def speed(record: Sequence[dict[str, Any]]) -> float:
    """Median steps per second of a record of training."""
    return statistics.median(line["steps_per_second"] for line in record)


def shared(record: Sequence[dict[str, Any]]) -> int:
    """How many trainings shared a device, at most; speeds can be compared where each had it to itself."""
    return max(line["side_by_side"] for line in record)


def record(text: str) -> list[dict[str, Any]]:
    """The lines of a record of training, without those of steps that a later run took again."""
    lines: list[dict[str, float]] = []
    for line in map(json.loads, text.splitlines()):
        _check(line, _LINE)
        if line["steps_per_second"] <= 0 or min(line["step"], line["side_by_side"]) < 1 or not line["device"]:
            raise ValueError(f"not a line of a record: {line}")
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    if not lines:
        raise ValueError("it is empty")
    return lines


def _take(run: dict[str, Any], kind: str, data: Mapping[str, Any]) -> None:
    """Add what a file of a kind says to a run."""
    if kind == "bits.json":
        run["bits"] = _bits(data, bool(run["experiment"].model.memories))
        run["documents"], run["bin"] = data["documents"], data["bin"]
        run["writers"] = data.get("writers", run["documents"])
        if len(run["writers"]) != len(run["documents"]):
            raise ValueError(f"{len(run['documents'])} documents are by {len(run['writers'])} writers")
    elif kind == "names.json":
        run["names"] = _names(data)
    elif kind == "capacity.json":
        _check(data, {"state_bytes": int})
        run["state_bytes"] = data["state_bytes"]
        run["capacity"] = [_capacity(row) for row in data["rows"]]
        _once([(x.length, x.exact.shape[1]) for x in run["capacity"]])
    else:
        run["needles"] = [*run.get("needles", []), *map(_needle, data["rows"])]  # several files may share what is asked
        _once([x[:4] for x in run["needles"]])


def _once(asked: Sequence[Any]) -> None:
    if len(set(asked)) < len(asked):
        raise ValueError("the same was asked twice, here or in another file of this model")


def _bits(data: Mapping[str, Any], mixes: bool) -> dict[str, np.ndarray]:
    bits, documents = {mode: np.array(rows, float) for mode, rows in data["bits"].items()}, set(data["documents"])
    shapes = {rows.shape for rows in bits.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or shape[0] != len(documents) or data["bin"] < 1:
        raise ValueError(f"bits must be of {len(documents)} documents by position, of equally many bins")
    if len(data["documents"]) != len(documents):
        raise ValueError("a document is there twice")
    if not all(np.isfinite(rows).all() for rows in bits.values()):
        raise ValueError("bits must be finite")
    if (NO_MEMORY in bits) == mixes or (mixes and "reset" not in bits):
        raise ValueError(f"bits are of {', '.join(bits)}, which the model's memories do not fit")
    return bits


def _names(data: Mapping[str, Any]) -> Mapping[str, Any]:
    documents, writers, questions = data["documents"], data["writers"], data["questions"]
    sizes = np.array([len(name.encode()) for _, _, name, _ in questions])
    rights = [np.array(right, float) for right in data["right"].values()]
    if len(set(documents)) != len(writers) or not {i for i, *_ in questions} <= set(range(len(documents))):
        raise ValueError("questions must be of the documents, each of which has a writer")
    if not len(sizes) or not rights or not all(x.shape == sizes.shape and (x <= sizes).all() for x in rights):
        raise ValueError(f"there must be answers to {len(sizes)} questions, of no more bytes than the names have")
    return data


def _needle(row: Mapping[str, Any]) -> Answers:
    _check(row, _ROW)
    return Answers(row["control"], row["kind"], row["length"], row["readings"], *_samples(row))


def _capacity(row: Mapping[str, Any]) -> Answers:
    _check(row, _CAPACITY)
    exact, depth = _samples(row)
    if exact.shape[1] != row["facts"]:
        raise ValueError(f"contexts have {exact.shape[1]} facts instead of {row['facts']}")
    return Answers(MEMORY, "short", row["length"], 1, exact, depth)


def _samples(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Which answers are exact, and how deep their facts stood; both must be what the row says of them."""
    right, depth = np.array(row["right"], float), np.array(row["depth"], float)
    if right.ndim != 2 or not right.size or right.shape != depth.shape or not np.isfinite(depth).all():
        raise ValueError("right and depth must be numbers of [contexts, facts]")
    exact = right == VALUE_LENGTH
    said, found = (row["exact"], row["digits"]), (exact.mean(), right.mean() / VALUE_LENGTH)
    if np.abs(np.subtract(said, found)).max() > 1e-3 or not ((right >= 0) & (right <= VALUE_LENGTH)).all():
        raise ValueError(f"the answers in {row['length']} bytes do not give the shares that are said of them")
    return exact, depth
