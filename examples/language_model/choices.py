"""One table of models that differ in a choice: what each keeps, finds, predicts and costs, against one of them."""

import functools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.language_model import results, retained
from examples.language_model.phrasings import VALUE_LENGTH as DIGITS
from examples.language_model.retained import Interval, Model

FILES = re.compile(r"(.+)-(\d+)\.(retention\.json|needle\.json|bits\.json|record\.jsonl)")
LENGTHS = (4096, 131072)
"""Of the contexts that needles are asked in, near, after one reading."""
DRAWS = 2000  # of a bootstrap
NOTHING = "-"


class Choice(NamedTuple):
    """What was measured of a model; what was not is None.

    Attributes:
        label: the files' names, without seeds.
        seeds: of its trainings.
        retention: of all seeds.
        needles: by length, share exact of each context, mean over seeds [contexts].
        bits: per byte of each held-out document, mean over seeds [documents].
        speed: median steps per second of training, mean over seeds.
    """

    label: str
    seeds: tuple[int, ...]
    retention: Model | None
    needles: dict[int, np.ndarray]
    bits: np.ndarray | None
    speed: float | None


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
    def each(kind: str, read: Callable[[str], Any]) -> list[Any]:
        return [_read(path, read) for path in files.get(kind, {}).values()]

    needles = {length: each("needle.json", functools.partial(_needles, length=length)) for length in LENGTHS}
    bits, speeds = each("bits.json", _bits), each("record.jsonl", _speed)
    for kind, rows in (("needle.json", needles[LENGTHS[0]]), ("needle.json", needles[LENGTHS[1]]), ("bits.json", bits)):
        if len({None if row is None else len(row) for row in rows}) > 1:
            raise ValueError(
                f"the seeds of {name} were measured otherwise: {', '.join(map(str, files[kind].values()))}"
            )
    return Choice(
        name,
        tuple(sorted({seed for its in files.values() for seed in its})),
        retention,
        {n: np.mean(rows, 0) for n, rows in needles.items() if rows and rows[0] is not None},
        np.mean(bits, 0) if bits else None,
        statistics.mean(speeds) if speeds else None,
    )


def _read(path: Path, read: Callable[[str], Any]) -> Any:
    try:
        return read(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged, or of another version ({error!r}): measure or copy it again") from error


def _needles(text: str, length: int) -> np.ndarray | None:
    for row in json.loads(text)["rows"]:
        if (row["control"], row["kind"], row["length"], row["readings"]) == ("memory", "near", length, 1):
            return (np.array(row["right"]) == DIGITS).mean(1)
    return None


def _bits(text: str) -> np.ndarray:
    return np.array(json.loads(text)["bits"]["reset"], float).mean(1)


def _speed(text: str) -> float:
    return statistics.median(line["steps_per_second"] for line in results.record(text))


# The table


def against(own: np.ndarray, base: np.ndarray, *, relative: bool) -> Interval:
    """The difference of means, or their ratio less 1, with a bootstrap interval over units, which are paired [n].

    Raises:
        ValueError: they are of different units.
    """
    if own.shape != base.shape:
        raise ValueError(f"what is compared must be of the same texts. Received: {len(own)} and {len(base)}")

    def apart(a: Any, b: Any) -> Any:
        return a / b - 1 if relative else a - b

    chosen = np.random.default_rng(0).integers(len(own), size=(DRAWS, len(own)))
    low, high = np.quantile(apart(own[chosen].mean(1), base[chosen].mean(1)), (0.025, 0.975))
    return Interval(float(apart(own.mean(), base.mean())), float(low), float(high))


def report(choices: Sequence[Choice], base: str) -> str:
    """The table, in Markdown; differences are to the model called ``base``.

    Raises:
        ValueError: there is no such model, or another was measured on other texts.
    """
    named = {x.label: x for x in choices}
    if base not in named:
        raise ValueError(f"no model is called {base!r}: there are {', '.join(named)}")
    head = ["model", "seeds", *(name for name, _ in COLUMNS)]
    ordered = [named[base], *(x for x in choices if x.label != base)]
    rows = [[x.label, ", ".join(map(str, x.seeds)), *(look(x, named[base]) for _, look in COLUMNS)] for x in ordered]
    kept = [i for i in range(len(head)) if i < 2 or any(row[i] != NOTHING for row in rows)]
    lines = [head, ["---"] * 2 + ["---:"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in lines) + "\n"


def _retention(x: Choice, base: Choice, kind: str) -> str:
    r = retained.retention(x.retention, kind, x.retention.most) if x.retention else None
    return NOTHING if r is None else f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f})"


def _kept(x: Choice, base: Choice) -> str:
    return f"{100 * retained.needles(x.retention, x.retention.most).value:.1f}%" if x.retention else NOTHING


def _found(x: Choice, base: Choice, length: int) -> str:
    own, other = x.needles.get(length), base.needles.get(length)
    if own is None:
        return NOTHING
    apart = "" if x is base or other is None else _difference(against(own, other, relative=False))
    return f"{100 * own.mean():.1f}%{apart}"


def _predicted(x: Choice, base: Choice) -> str:
    if x.bits is None:
        return NOTHING
    apart = "" if x is base or base.bits is None else _difference(against(x.bits, base.bits, relative=True))
    return f"{x.bits.mean():.4f}{apart}"


def _difference(x: Interval) -> str:
    return f", {100 * x.value:+.1f} ({100 * x.low:+.1f} to {100 * x.high:+.1f})"


def _time(x: Choice, base: Choice) -> str:
    return f"{base.speed / x.speed:.2f}" if x.speed and base.speed else NOTHING


def _bytes(x: Choice, base: Choice) -> str:
    return f"{x.retention.state_bytes / 1e6:,.0f} MB" if x.retention else NOTHING


COLUMNS: tuple[tuple[str, Callable[[Choice, Choice], str]], ...] = (
    ("R, what was read", functools.partial(_retention, kind="episodes")),
    ("R, its domain", functools.partial(_retention, kind="domain")),
    ("needles of the first domain", _kept),
    *((f"needles, {n // 1024}K", functools.partial(_found, length=n)) for n in LENGTHS),
    ("bits per byte", _predicted),
    ("time of training", _time),
    ("state", _bytes),
)
"""Retention is after all other domains. Differences are in points, of bits in per cent."""
