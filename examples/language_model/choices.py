"""One table of models that differ in a choice: what each keeps, finds, predicts and costs, against one of them."""

import functools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.language_model import intervals, results, retained
from examples.language_model.intervals import Measured
from examples.language_model.phrasings import VALUE_LENGTH as DIGITS
from examples.language_model.retained import Model
from examples.language_model.tables import NOTHING, amount, cell, difference, size, table

FILES = re.compile(r"(.+)-(\d+)\.(retention\.json|needle\.json|bits\.json|record\.jsonl)")
LENGTHS = (4096, 131072)
"""Of the contexts that needles are asked in, near, after one reading."""


class Choice(NamedTuple):
    """What was measured of a model, of all its seeds; what was not is None.

    Attributes:
        label: the files' names, without seeds.
        seeds: of its trainings.
        retention: what it keeps.
        needles: by length, the share of each context's facts that is answered exactly [contexts].
        bits: per byte of each held-out document.
        seconds: of training, its steps at their median speed, where no other shared its device.
    """

    label: str
    seeds: tuple[int, ...]
    retention: Model | None
    needles: dict[int, np.ndarray]
    bits: Measured | None
    seconds: float | None


def load(folder: Path) -> list[Choice]:
    """The models of a folder, by name, from NAME-SEED.retention.json, .needle.json, .bits.json and .record.jsonl.

    Raises:
        FileNotFoundError: the folder holds no such files.
        ValueError: a file is damaged, or was measured otherwise than another seed's.
    """
    found: dict[str, dict[str, dict[int, Path]]] = {}
    for path in sorted(folder.glob("*.json*")):
        if match := FILES.fullmatch(path.name):
            name, seed, kind = match.groups()
            found.setdefault(name, {}).setdefault(kind, {})[int(seed)] = path
    if not found:
        raise FileNotFoundError(f"{folder} holds no NAME-SEED.retention.json, .needle.json, .bits.json, .record.jsonl")
    kept = any("retention.json" in files for files in found.values())
    retention = {model.label: model for model in retained.load(folder)} if kept else {}
    return [_choice(name, files, retention.get(name)) for name, files in found.items()]


def _choice(name: str, files: dict[str, dict[int, Path]], retention: Model | None) -> Choice:
    def each(kind: str, read: Callable[[Path], Any]) -> list[Any]:
        return [_read(path, read) for path in files.get(kind, {}).values()]

    needles = {length: each("needle.json", functools.partial(_needles, length=length)) for length in LENGTHS}
    bits, seconds = each("bits.json", _bits), each("record.jsonl", _seconds)
    asked = [{None if x is None else len(x) for x in rows} for rows in needles.values()]
    if max(map(len, asked)) > 1 or len({tuple(x.values) for x in bits}) > 1:
        raise ValueError(f"the seeds of {name} were measured otherwise, one than the other: measure them again")
    means = {x: float(np.mean([one.values[x] for one in bits])) for x in (bits[0].values if bits else ())}
    return Choice(
        name,
        tuple(sorted({seed for its in files.values() for seed in its})),
        retention,
        {n: np.mean(rows, 0) for n, rows in needles.items() if rows and rows[0] is not None},
        Measured(means, bits[0].writers) if bits else None,
        statistics.mean(known) if (known := [x for x in seconds if x is not None]) else None,
    )


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged, or of another version ({error!r}): measure or copy it again") from error


def _bits(path: Path) -> Measured:
    """With memories that begin anew, or of a model without any."""
    modes = json.loads(path.read_text(encoding="utf-8-sig"))["bits"]
    return intervals.bits(path, results.NO_MEMORY if results.NO_MEMORY in modes else "reset")


def _needles(path: Path, length: int) -> np.ndarray | None:
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if (row["control"], row["kind"], row["length"], row["readings"]) == ("memory", "near", length, 1):
            return (np.array(row["right"]) == DIGITS).mean(1)
    return None


def _seconds(path: Path) -> float | None:
    record = results.record(path.read_text(encoding="utf-8"))
    return record[-1]["step"] / results.speed(record) if results.shared(record) == 1 else None


# The table


def report(choices: Sequence[Choice], base: str) -> str:
    """The table, in Markdown; differences are to the model called ``base``.

    Raises:
        ValueError: there is no such model, or another was measured on other texts.
    """
    named = {x.label: x for x in choices}
    if base not in named:
        raise ValueError(f"no model is called {base!r}: there are {', '.join(named)}")
    ordered = [named[base], *(x for x in choices if x.label != base)]
    rows = [[x.label, ", ".join(map(str, x.seeds)), *(look(x, named[base]) for _, look in COLUMNS)] for x in ordered]
    note = (
        "R after all other domains, and what the last of them brings of what it brings to a fresh memory, with their "
        "intervals over texts. Needles near, after one reading, and bits per byte of held-out documents: then "
        f"the difference to {base}, in points and in per cent, with the paired 95% interval "
        "over contexts and over writers. Time of training as a multiple."
    )
    return table(f"Against {base}", note, ["model", "seeds", *(name for name, _ in COLUMNS)], rows, texts=2) + "\n"


def _retention(x: Choice, base: Choice, kind: str) -> str:
    return cell(retained.retention(x.retention, kind, x.retention.most) if x.retention else None, retained.number)


def _learned(x: Choice, base: Choice) -> str:
    return cell(retained.learned(x.retention, "episodes") if x.retention else None, retained.number)


def _kept(x: Choice, base: Choice) -> str:
    return f"{100 * retained.needles(x.retention, x.retention.most).mean:.1f}%" if x.retention else NOTHING


def _found(x: Choice, base: Choice, length: int) -> str:
    own, other = x.needles.get(length), base.needles.get(length)
    if own is None:
        return NOTHING
    if x is base or other is None:
        return f"{100 * own.mean():.1f}%"
    if own.shape != other.shape:
        raise ValueError(f"{x.label} was asked in {len(own)} contexts and {base.label} in {len(other)}: ask them alike")
    return f"{100 * own.mean():.1f}%, {difference(intervals.interval(own - other))}"


def _predicted(x: Choice, base: Choice) -> str:
    if x.bits is None:
        return NOTHING
    apart = "" if x is base or base.bits is None else f", {difference(intervals.relative(x.bits, base.bits))}"
    return f"{intervals.over_writers(x.bits).mean:.4f}{apart}"


def _time(x: Choice, base: Choice) -> str:
    return f"{x.seconds / base.seconds:.2f}" if x.seconds and base.seconds else NOTHING


def _bytes(x: Choice, base: Choice) -> str:
    return amount(x.retention.state_bytes) if x.retention else NOTHING


COLUMNS: tuple[tuple[str, Callable[[Choice, Choice], str]], ...] = (
    ("R, what was read", functools.partial(_retention, kind="episodes")),
    ("R, its domain", functools.partial(_retention, kind="domain")),
    ("the last domain", _learned),
    ("needles of the first domain", _kept),
    *((f"needles, {size(n)}", functools.partial(_found, length=n)) for n in LENGTHS),
    ("bits per byte", _predicted),
    ("time of training", _time),
    ("state", _bytes),
)
