"""What was measured, read from a folder; a model's part follows from its experiment, not from its name."""

import contextlib
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.language_model.phrasings import VALUE_LENGTH as DIGITS
from examples.language_model.settings import Experiment

FILES = re.compile(r"(.+)\.(needle[^.]*\.json|bits\.json|record\.jsonl)")
EQUAL_TIME = 1.25  # trainings whose times differ by no more than this factor are compared


ASKED = ("control", "phrasing", "length", "readings")  # what tells rows apart
_NUMBER = (int, float)
_LINE = {"step": int, "device": str, **dict.fromkeys(("steps_per_second", "digits_right", "first_right"), _NUMBER)}
_ROW = {"control": str, "phrasing": str, "length": int, "readings": int, "exact": _NUMBER, "digits": _NUMBER}
# What models are called, by their mixers.
KINDS = {
    "fwpkm": "memory", "attention": "attention", "delta": "gated delta rule", "static": "memory never written",
}  # fmt: skip


class Run(NamedTuple):
    """All that a folder of results says of one model."""

    label: str
    experiment: Experiment
    rows: list[dict[str, Any]]
    """answers of needle.py, of every phrasing, control, length and number of readings"""
    bits: dict[str, np.ndarray]
    """``[documents, bins]`` by what the memory does, see by_position.py"""
    documents: list[str]
    bin: int
    """bytes"""
    record: list[dict[str, Any]]

    @property
    def memory(self) -> bool:
        """Whether it has memories, or what is compared with them."""
        return bool(self.experiment.model.memories)

    @property
    def headline(self) -> bool:
        """Whether it has memories that are written, and was trained on facts."""
        return self.experiment.model.writes and self.experiment.training.facts > 0

    @property
    def speed(self) -> float:
        """Median steps per second."""
        return statistics.median(line["steps_per_second"] for line in self.record)

    @property
    def seconds(self) -> float:
        """Of training, without the start of each run."""
        return self.record[-1]["step"] / self.speed

    @property
    def device(self) -> str:
        """On what it was trained."""
        return ", ".join(sorted({line["device"] for line in self.record}))

    def answers(self, control: str = "memory", *, unseen: bool = False) -> list[dict[str, Any]]:
        """The rows of a control, with phrasings of training or others."""
        return [r for r in self.rows if r["control"] == control and r["phrasing"].startswith("unseen") == unseen]


def load(folder: Path) -> list[Run]:
    """The models of a folder: headline ones, others with memories, and those without.

    A record of training alone does not tell which model it is of, and is left out.

    Raises:
        FileNotFoundError: the folder holds no results.
        ValueError: a file is damaged, or does not belong with the others; names it.
    """
    found: dict[str, dict[str, Any]] = {}
    experiments: dict[str, Experiment] = {}
    settled: dict[str, tuple[Path, Any]] = {}  # what the files must agree on, and who said so first
    for path in sorted(folder.glob("*.json*")):
        if (match := FILES.fullmatch(path.name)) is None:
            continue
        name, kind = match.groups()
        run = found.setdefault(name, {"rows": [], "bits": {}, "documents": [], "bin": 0, "record": []})
        with _naming(path):
            if kind == "record.jsonl":
                run["record"] = record(path.read_text(encoding="utf-8-sig"))
                continue
            data = json.loads(path.read_text(encoding="utf-8-sig"))
            experiment = Experiment.of(data["experiment"], "experiment")
            agreed = {f"model of {name}": experiment, "corpus": data["corpus"]}
            if experiment.model.writes and experiment.training.facts:
                agreed["headline model, but for its seed,"] = _of(experiment, experiment.model)
            if kind == "bits.json":
                run["bits"] = _bits(data, bool(experiment.model.memories))
                run["documents"], run["bin"] = data["documents"], data["bin"]
                agreed["size and number of bins"] = data["bin"], len(next(iter(run["bits"].values()))[0])
            else:
                run["rows"] += [_row(row) for row in data["rows"]]
                asked = [tuple(row[key] for key in ASKED) for row in run["rows"]]
                if len(set(asked)) < len(asked):
                    raise ValueError("another file of this model has the same answers")
        for what, value in agreed.items():
            first, said = settled.setdefault(what, (path, value))
            if said != value:
                raise ValueError(f"{path} is of another {what} than {first}: keep them in folders of their own")
        experiments[name] = experiment
    if not experiments:
        raise FileNotFoundError(f"{folder} holds no NAME.needle.json and no NAME.bits.json: measure first")
    labels = [_label(x, found[name]["record"]) for name, x in experiments.items()]
    runs = [
        Run(label if labels.count(label) == 1 else f"{label} ({name})", experiment, **found[name])
        for label, (name, experiment) in zip(labels, experiments.items())
    ]
    return sorted(runs, key=_order)


def _order(run: Run) -> tuple[Any, ...]:
    training = run.experiment.training
    return not run.memory, not run.experiment.model.writes, not run.headline, training.steps, training.seed, run.label


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


def record(text: str) -> list[dict[str, Any]]:
    """The lines of a record of training, without those of steps that a later run took again."""
    lines: list[dict[str, float]] = []
    for line in map(json.loads, text.splitlines()):
        _check(line, _LINE)
        if line["steps_per_second"] <= 0 or line["step"] < 1 or not line["device"]:
            raise ValueError(f"not a line of a record: {line}")
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    if not lines:
        raise ValueError("it is empty")
    return lines


def _bits(data: dict[str, Any], memory: bool) -> dict[str, np.ndarray]:
    bits, documents = {mode: np.array(rows, float) for mode, rows in data["bits"].items()}, set(data["documents"])
    shapes = {rows.shape for rows in bits.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or shape[0] != len(documents) or data["bin"] < 1:
        raise ValueError(f"bits must be of {len(documents)} documents by position, of equally many bins")
    if not all(np.isfinite(rows).all() for rows in bits.values()):
        raise ValueError("bits must be finite")
    if memory == ("no memory" in bits):
        raise ValueError(f"bits are of {', '.join(bits)}, which the model's memories do not fit")
    return bits


def _row(row: dict[str, Any]) -> dict[str, Any]:
    _check(row, _ROW)
    low, high = row["exact_interval"]
    _check({"low": low, "high": high}, {"low": _NUMBER, "high": _NUMBER})
    for name in ("depth", "right"):
        for value in row[name]:
            _check({name: value}, {name: _NUMBER})
    exact = np.array(row["right"]) == DIGITS
    if len(exact) != len(row["depth"]) or abs(exact.mean() - row["exact"]) > 1e-3:
        raise ValueError(f"the samples of {row['length']} bytes do not give the share of them that is right")
    return {name: row[name] for name in (*ASKED, "exact", "exact_interval", "digits", "depth", "right")}


def _label(experiment: Experiment, record: list[dict[str, Any]]) -> str:
    training = experiment.training
    stopped = f"{record[-1]['step']:,} of " if record and record[-1]["step"] < training.steps else ""
    kind = KINDS[experiment.model.mixer] if experiment.model.memories else "no memory"
    parts = [kind, "" if training.facts else "no facts in training"]
    return ", ".join(filter(None, [*parts, f"{stopped}{training.steps:,} steps", f"seed {training.seed}"]))


def _of(experiment: Experiment, *shared: Any, steps: int | None = None) -> tuple[Any, ...]:
    """What must be alike, with the training but for seeds and, where given, steps."""
    steps = experiment.training.steps if steps is None else steps
    return *shared, dataclasses.replace(experiment.training, seed=0, steps=steps)


def _plain(run: Run, runs: Iterable[Run]) -> list[Run]:
    """The models without memory that were trained alike, but for steps and seed."""

    def kind(r: Run) -> tuple[Any, ...]:
        model = r.experiment.model
        return _of(r.experiment, model.width, model.layers, model.heads, model.window, steps=1)

    return [r for r in runs if not r.memory and kind(r) == kind(run)]


def equal_steps(run: Run, runs: Iterable[Run]) -> Run | None:
    """The model without memory that took as many steps, otherwise trained alike; of the same seed if it can."""
    own = run.experiment.training
    same = [r for r in _plain(run, runs) if r.experiment.training.steps == own.steps]
    differs = [r.experiment.training.seed != own.seed for r in same]
    return same[differs.index(min(differs))] if same else None


def equal_time(run: Run, runs: Iterable[Run]) -> Run | None:
    """The model without memory, trained alike for other steps, whose training took nearest as long."""
    if not run.record:
        return None
    steps = run.experiment.training.steps
    others = [r for r in _plain(run, runs) if r.record and r.experiment.training.steps != steps]
    apart = [max(r.seconds / run.seconds, run.seconds / r.seconds) for r in others]
    return others[apart.index(min(apart))] if apart and min(apart) <= EQUAL_TIME else None


def relative(bits: np.ndarray, base: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """How much less or more the mean of ``bits`` ``[documents]`` is, as a share, and its bootstrap 95% interval."""
    chosen = np.random.default_rng(0).integers(len(bits), size=(draws, len(bits)))
    low, high = np.quantile(bits[chosen].mean(1) / base[chosen].mean(1) - 1, (0.025, 0.975))
    return float(bits.mean() / base.mean() - 1), float(low), float(high)


def paired(run: Run, mode: str, base: Run) -> tuple[np.ndarray, np.ndarray]:
    """The bits ``[documents, bins]`` of the documents that both were measured on, in one order."""
    places = {name: i for i, name in enumerate(base.documents)}
    both = [(i, places[name]) for i, name in enumerate(run.documents) if name in places]
    if not both:
        raise ValueError(f"no document was measured with both {run.label} and {base.label}")
    own, other = np.array(both).T
    return run.bits[mode][own], base.bits["no memory"][other]
