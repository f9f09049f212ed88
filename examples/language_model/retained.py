"""Retention of several models, as tables and a picture, from the files that retention.py saves."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.language_model import comparing
from examples.language_model.intervals import Interval
from examples.language_model.phrasings import VALUE_LENGTH as DIGITS
from examples.language_model.settings import Experiment
from examples.language_model.tables import NOTHING, amount, cell, share, table

FILES = re.compile(r"(.+)\.retention\.json")
KINDS = {"episodes": "the texts that were read", "domain": "other documents of their domain"}
"""What bits per byte are of."""
MEMORIES = ("unread", "filler", "others", "kept")
LAST = "last"
"""Of the bits of a domain that was read last; files that were saved before it was measured lack it."""
LEAST = 0.01
"""Of b: where the first domain brings less than that, there is nothing to retain."""
DRAWS = 2000  # of a bootstrap


class Model(NamedTuple):
    """A model's rows, alike for each of its seeds.

    Attributes:
        label: the files' names, without seeds.
        seeds: S of them.
        names: of the domains, and of the filler.
        size: bytes of a domain.
        first: of each of the n rows, the domain that it begins with.
        bits: of KINDS, then of MEMORIES, and of LAST where it was measured: [S, n, number of domains read].
        right: of MEMORIES: digits right of each fact [S, n, domains, facts].
        state_bytes: of one row's memories and windows.
    """

    label: str
    seeds: tuple[int, ...]
    names: tuple[str, ...]
    size: int
    first: np.ndarray
    bits: dict[str, dict[str, np.ndarray]]
    right: dict[str, np.ndarray]
    state_bytes: int

    @property
    def most(self) -> int:
        """How many other domains are read."""
        return len(self.names) - 2

    def only(self, rows: np.ndarray) -> "Model":
        """Some of the rows."""
        bits = {kind: {m: x[:, rows] for m, x in its.items()} for kind, its in self.bits.items()}
        right = {m: x[:, rows] for m, x in self.right.items()}
        return self._replace(first=self.first[rows], bits=bits, right=right)

    def seed(self, i: int) -> "Model":
        """One of the seeds, by its number."""
        bits = {kind: {m: x[i : i + 1] for m, x in its.items()} for kind, its in self.bits.items()}
        right = {m: x[i : i + 1] for m, x in self.right.items()}
        return self._replace(seeds=self.seeds[i : i + 1], bits=bits, right=right)


def load(folder: Path) -> list[Model]:
    """The models of a folder, by name; NAME-0.retention.json and NAME-1.retention.json are two seeds of NAME.

    Raises:
        FileNotFoundError: the folder holds no such files.
        ValueError: a file is damaged, or differs from another of its name in more than the seed.
    """
    found: dict[str, list[tuple[Path, dict[str, Any], Experiment]]] = {}
    for path in sorted(folder.glob("*.retention.json")):
        try:
            data = json.loads(path.read_text())
            experiment = Experiment.of(data["experiment"], "experiment")
            name = path.name.removesuffix(".retention.json").removesuffix(f"-{experiment.training.seed}")
            _checked(data)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is damaged, or of another version ({error!r}): measure again") from error
        found.setdefault(name, []).append((path, data, experiment))
    if not found:
        raise FileNotFoundError(f"{folder} holds no NAME.retention.json: measure first")
    return [_model(name, files) for name, files in found.items()]


def _checked(data: dict[str, Any]) -> None:
    """Raise unless every row has the numbers of every moment."""
    most = len(data["names"]) - 2
    lengths = {"unread": 1, "filler": 1, "others": most, "kept": most + 1, LAST: 1}
    names = _names(data)
    for row in data["rows"]:
        numbers = {kind: {m: np.array(row[kind][m], float) for m in names} for kind in (*KINDS, "right")}
        for kind, its in numbers.items():
            for name in names:
                length = lengths[name]
                if len(its[name]) != length or not np.isfinite(its[name]).all():
                    raise ValueError(f"{kind} of {name} must be {length} finite numbers")
    if not data["rows"] or most < 1:
        raise ValueError("it has no rows, or no other domains")


def _names(*files: dict[str, Any]) -> tuple[str, ...]:
    """What all files have bits of."""
    return MEMORIES + (LAST,) * all(LAST in row["episodes"] for data in files for row in data["rows"])


def _model(name: str, files: Sequence[tuple[Path, dict[str, Any], Experiment]]) -> Model:
    def alike(data: dict[str, Any], experiment: Experiment) -> Any:
        fields = {key: data[key] for key in ("domains", "corpus", "memory", "seed", "size", "other", "names")}
        tables = experiment.tables()
        tables["training"]["seed"] = 0
        return fields, tables, [(row["first"], row["text"]) for row in data["rows"]]

    path, data, _ = files[0]
    for other, its, experiment in files[1:]:
        if alike(its, experiment) != alike(*files[0][1:]):
            raise ValueError(f"{other} differs from {path} in more than the seed of training: give it another name")
    sets = [its["rows"] for _, its, _ in files]
    names = _names(*(its for _, its, _ in files))
    bits = {k: {m: np.array([[row[k][m] for row in rows] for rows in sets]) for m in names} for k in KINDS}
    right = {m: np.array([[row["right"][m] for row in rows] for rows in sets]) for m in MEMORIES}
    return Model(
        name, tuple(x.training.seed for *_, x in files), tuple(data["names"]), data["size"],
        np.array([row["first"] for row in data["rows"]]), bits, right, data["state_bytes"],
    )  # fmt: skip


# Numbers


def retention(model: Model, kind: str, others: int) -> Interval | None:
    """R after so many other domains, of all seeds together, with a bootstrap interval over texts.

    None where what the first domain brings is not above 1% of b, by its interval.
    """
    its = {name: model.bits[kind][name].mean(0) for name in MEMORIES}
    kept = its["others"][:, others - 1] - its["kept"][:, others]
    brought = its["filler"][:, 0] - its["kept"][:, 0]
    chosen = np.random.default_rng(0).integers(len(kept), size=(DRAWS, len(kept)))
    brought_drawn = brought[chosen].mean(1)
    if np.quantile(brought_drawn / its["filler"][:, 0][chosen].mean(1), 0.025) <= LEAST:
        return None
    low, high = np.quantile(kept[chosen].mean(1) / brought_drawn, (0.025, 0.975))
    return Interval(float(kept.mean() / brought.mean()), float(low), float(high), len(kept))


def learned(model: Model, kind: str) -> Interval | None:
    """What the last domain brings to a memory that has read all others, of what it brings to one that has read nothing.

    Of all seeds together, with a bootstrap interval over texts; None where it was not measured, or the first brings
    nothing.
    """
    if LAST not in model.bits[kind] or retention(model, kind, model.most) is None:
        return None
    its = {name: x.mean(0)[:, 0] for name, x in model.bits[kind].items()}
    # Rows lie by first domain, then by text: the last domain of a row is the first of those before.
    before = np.roll(np.arange(len(model.first)), len(model.first) // (model.most + 1))
    last, brought = its["filler"][before] - its[LAST], (its["filler"] - its["kept"])[before]
    chosen = np.random.default_rng(0).integers(len(last), size=(DRAWS, len(last)))
    low, high = np.quantile(last[chosen].mean(1) / brought[chosen].mean(1), (0.025, 0.975))
    return Interval(float(last.mean() / brought.mean()), float(low), float(high), len(last))


def needles(model: Model, others: int) -> Interval:
    """Share of the facts of the first text that are answered exactly after so many other domains, of all seeds."""
    return comparing.share((model.right["kept"][:, :, others] == DIGITS).reshape(-1, model.right["kept"].shape[-1]))


# Tables

INTERVAL = "In brackets the 95% interval over texts. Of all seeds together, then of each."


def report(models: Sequence[Model]) -> str:
    """Every table, in Markdown."""
    left, needle = (
        f"What is left after so many other domains. {INTERVAL}",
        f"Answered exactly, after so many. {INTERVAL}",
    )
    parts = [
        *(_by_others(f"R on {KINDS[kind]}", left, models, 1, functools.partial(_left, kind=kind)) for kind in KINDS),
        _by_others("Needles of the first text", needle, models, 0, lambda m, n: share(needles(m, n))),
        _by_first(models),
        _learned(models),
        _bits(models),
    ]
    return "\n\n".join(parts) + "\n"


def _left(model: Model, others: int, kind: str) -> str:
    return cell(retention(model, kind, others), number)


def number(x: Interval) -> str:
    """A cell of R."""
    return f"{x.mean:.2f} ({x.low:.2f} to {x.high:.2f})"


def _seeds(model: Model) -> str:
    return ", ".join(map(str, model.seeds))


def _by_others(
    title: str, note: str, models: Sequence[Model], start: int, look: Callable[[Model, int], str]
) -> str:  # fmt: skip
    counts = range(start, max(m.most for m in models) + 1)
    parts = [x for m in models for x in (m, *(m.seed(i) for i in range(len(m.seeds)) if len(m.seeds) > 1))]
    rows = [[m.label, _seeds(m), *(look(m, n) if n <= m.most else NOTHING for n in counts)] for m in parts]
    return table(title, note, ["model", "seeds", *(f"after {n}" for n in counts)], rows, texts=2)


def _by_first(models: Sequence[Model]) -> str:
    names = list(dict.fromkeys(name for m in models for name in m.names[:-1]))
    rows = []
    for m in models:
        parts = [m.only(np.flatnonzero(m.first == name)) for name in names]
        found = [retention(part, "episodes", m.most) if len(part.first) else None for part in parts]
        rows.append([m.label, _seeds(m), *(cell(x, number) for x in found)])
    note = "On the texts that were read, after all others. In brackets the 95% interval over texts."
    return table("R by what was read first", note, ["model", "seeds", *names], rows, texts=2)


def _learned(models: Sequence[Model]) -> str:
    rows = [[m.label, _seeds(m), *(cell(learned(m, kind), number) for kind in KINDS)] for m in models]
    note = (
        "What the last domain brings to a memory that has read all others, of what it brings to a fresh one: a memory "
        "that keeps by no longer learning has less. In brackets the 95% interval over texts."
    )
    return table("The last domain", note, ["model", "seeds", *KINDS.values()], rows, texts=2)


def _bits(models: Sequence[Model]) -> str:
    rows = []
    for m in models:
        for kind in KINDS:
            its = {name: x.mean((0, 1)) for name, x in m.bits[kind].items()}
            found = its["unread"][0], its["filler"][0], its["kept"][0], its["kept"][-1], its["others"][-1]
            rows.append([m.label, KINDS[kind], f"{m.size:,}", *(f"{x:.4f}" for x in found), amount(m.state_bytes)])
    head = ["model", "of", "bytes a domain", "nothing", "filler", "first", "first, then others", "others", "state"]
    return table("Bits per byte", "By what the memory has read, and how large it is.", head, rows, texts=2)
