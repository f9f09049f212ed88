"""One experiment and seed from start to end: train, cut the weights in pieces, measure; what is done is kept."""

import gc
import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from examples.language_model import (
    by_position,
    capacity,
    checkpoint,
    domains,
    names,
    needle,
    results,
    retention,
    training,
)
from examples.language_model.corpus import Corpus
from examples.language_model.domains import Domains
from examples.language_model.settings import Experiment


class Asked(NamedTuple):
    """How much is measured, of every model alike."""

    length: int = 131072
    """of texts, in bytes, for bits by position and for capacity"""
    cells: Sequence[needle.Cell] = needle.PROTOCOL
    facts: Sequence[int] = capacity.NUMBERS
    """numbers of them, for capacity"""
    domains: Path | None = None
    """a folder made by the command domains, for retention"""


Measure = Callable[[Path, Corpus, Path, torch.device, Asked], Any]


def _bits(folder: Path, corpus: Corpus, out: Path, device: torch.device, asked: Asked) -> None:
    by_position.measure(folder, corpus, out, device, length=asked.length)


def _needle(folder: Path, corpus: Corpus, out: Path, device: torch.device, asked: Asked) -> None:
    needle.measure(folder, corpus, out, device, asked.cells)


def _capacity(folder: Path, corpus: Corpus, out: Path, device: torch.device, asked: Asked) -> None:
    capacity.measure(folder, corpus, out, device, length=asked.length, numbers=asked.facts)


def _names(folder: Path, corpus: Corpus, out: Path, device: torch.device, asked: Asked) -> None:
    names.measure(folder, corpus, out, device, length=asked.length)


def _retention(folder: Path, corpus: Corpus, out: Path, device: torch.device, asked: Asked) -> None:
    retention.measure(folder, _domains(asked), out, device)


def _domains(asked: Asked) -> Domains:
    if asked.domains is None:
        raise ValueError("to measure retention, name the folder of the domains, --domains")
    return domains.load(asked.domains)


MEASURES: dict[str, Measure] = {
    "bits": _bits, "needle": _needle, "capacity": _capacity, "names": _names, "retention": _retention,
}  # fmt: skip
"""What can be measured of the model of a folder; each writes OUT/NAME.MEASURE.json."""


class Job(NamedTuple):
    """One experiment with its seed."""

    name: str
    config: Path
    experiment: Experiment

    @property
    def seed(self) -> int:
        """Of weights, tables and data."""
        return self.experiment.training.seed


def plan(configs: list[Path], seeds: list[int], steps: int | None) -> list[Job]:
    """Every experiment with every seed; ``steps`` are taken instead of a file's, and then stand in the name.

    Raises:
        ValueError: two of them have one name; or a file is no experiment.
        FileNotFoundError: there is no such file.
    """
    given = {} if steps is None else {"steps": steps}
    jobs = []
    for config in configs:
        name = config.stem if steps is None else f"{config.stem}-{steps}"
        jobs += [Job(f"{name}-{seed}", config, Experiment.read(config, seed=seed, **given)) for seed in seeds]
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise ValueError(f"experiments and seeds must differ, or results would have one name. Received: {names}")
    return jobs


def about(job: Job, out: Path) -> dict[str, Any]:
    """What OUT/NAME.run.json says has been done; empty before anything has."""
    path = out / f"{job.name}.run.json"
    if not path.exists():
        return {}
    try:
        said = json.loads(path.read_text())
    except ValueError:
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("measured"), dict):
        raise ValueError(f"{path} is damaged: remove it and what else has this name, and run again")
    return said


def check(job: Job, corpus: Corpus, out: Path, measures: list[str], asked: Asked) -> list[str]:
    """Which measures are still to be taken.

    Raises:
        ValueError: the folder has results of another experiment, corpus or question under this name.
    """
    said, another = about(job, out), "Give --out another folder, or remove what has this name"
    if said and said.get("digest") != _digest(job.experiment.tables(), corpus.sha256):
        raise ValueError(f"{out / job.name}.run.json is of another experiment or corpus. {another}")
    taken = said.get("measured", {})
    if "retention" in measures:
        retention.check(corpus.sha256, _domains(asked))
        measures = [name for name in measures if name != "retention" or job.experiment.model.writes]
    missing = []
    for measure in measures:
        path = out / f"{job.name}.{measure}.json"
        if not path.exists():
            missing.append(measure)
        elif measure not in taken or taken[measure].get("digest") != _question(measure, asked):
            raise ValueError(f"{path} was measured otherwise than is asked now. {another}")
    return missing


def do(
    job: Job,
    corpus: Corpus,
    out: Path,
    device: torch.device,
    measures: list[str],
    asked: Asked,
    *,
    compile: bool,
    side_by_side: int = 1,
) -> None:
    """Train and measure what is not done yet; writes OUT/NAME.run.json, .record.jsonl and a file for each measure.

    OUT/NAME holds checkpoint and weights.

    Raises:
        ValueError: as in ``check``, ``training.train`` and the measures.
    """
    missing, said, folder = check(job, corpus, out, measures, asked), about(job, out), out / job.name
    path = out / f"{job.name}.run.json"

    def write() -> None:
        checkpoint.replace(path, lambda beside: beside.write_text(json.dumps(said, indent=1)))

    if "training" not in said:
        training.train(job.experiment, corpus, folder, device, compile=compile, side_by_side=side_by_side)
        gc.collect()  # the trainer's tables, so that the measures fit
        checkpoint.split(folder)
        shutil.copyfile(folder / checkpoint.RECORD, out / f"{job.name}.{checkpoint.RECORD}")
        tables = job.experiment.tables()
        said |= {"digest": _digest(tables, corpus.sha256), "experiment": tables, "corpus": corpus.sha256}
        said |= {"versions": versions(), "training": _trained(folder), "measured": {}}
        write()
    for measure in missing:
        began = time.monotonic()
        MEASURES[measure](folder, corpus, out / f"{job.name}.{measure}.json", device, asked)
        taken = {"digest": _question(measure, asked), "seconds": round(time.monotonic() - began, 1)}
        said["measured"][measure] = {**taken, "device": training.device_name(device)}
        write()


def versions() -> dict[str, str]:
    """Of what computes."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for name in ("fwpkm", "triton", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _trained(folder: Path) -> dict[str, Any]:
    """Steps, seconds and speed of a training, as its record tells them; seconds count compiling, not checkpoints."""
    lines = results.record((folder / checkpoint.RECORD).read_text())
    seconds, last = 0.0, 0
    for line in lines:
        seconds += (line["step"] - last) / line["steps_per_second"]
        last = line["step"]
    about = {"device": lines[-1]["device"], "side_by_side": results.shared(lines)}
    return {"steps": last, "seconds": round(seconds, 1), "steps_per_second": results.speed(lines), **about}


def _question(measure: str, asked: Asked) -> str:
    """A digest of what a measure asks."""
    if measure == "retention":
        return _digest(_domains(asked).sha256)
    return _digest((asked.length, asked.cells, asked.facts))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
