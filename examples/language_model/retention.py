"""What a memory keeps: it reads a domain, then up to five others, and frozen, it is measured on the first again.

Three memories are compared, each beginning as the model begins: ``kept`` reads the first domain and then the others,
``others`` the others alone, ``filler`` as many bytes of a seventh domain as ``kept`` of the first. Bits per byte b of
texts of the first domain give the retention after n others:

    R(n) = (b(others n) - b(kept n)) / (b(filler) - b(kept 0))

1 if the others took nothing of what the first domain had brought, 0 if they took all of it. Every domain is once the
first, the others follow it in the order of the list, from its end on to its beginning. A memory that keeps by no longer
learning shows in ``last``: ``kept`` after all domains, measured on the last that it read.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.language_model import phrasings
from examples.language_model.by_position import BIN, bits
from examples.language_model.checkpoint import corpus_of, load, ready, replace
from examples.language_model.corpus import Texts
from examples.language_model.domains import Domains
from examples.language_model.haystacks import Haystack, haystacks
from examples.language_model.model import LanguageModel, Reading
from examples.language_model.needle import MEMORIES, answers, read, together
from examples.language_model.snapshots import Snapshots
from examples.language_model.training import device_name

SIZE = 131072  # bytes that are read of a domain
OTHER = 32768  # bytes of other documents of it that are measured on
TEXTS = 10  # of a domain
FACTS = 5  # stated in a text that is read first
AT_ONCE = 64  # rows, each with memories of its own


class Read(NamedTuple):
    """What is read, and what else is measured on, of D domains, n texts each.

    Attributes:
        names: of the D domains and of the filler.
        texts: uint8 [D, n, size]; of the six domains.
        filler: uint8 [n, size].
        other: uint8 [D, n, other + 1]; of other documents of the domains.
        facts: of each domain and text [D][n], the text with facts in it, and questions.
    """

    names: tuple[str, ...]
    texts: np.ndarray
    filler: np.ndarray
    other: np.ndarray
    facts: list[list[Haystack]]


def cut(name: str, texts: Texts, number: int, size: int) -> np.ndarray:
    """The first ``number`` texts of ``size`` bytes, one after another: uint8 [number, size].

    Raises:
        ValueError: there are not as many.
    """
    if len(texts.data) < number * size:
        raise ValueError(
            f"domain {name!r} has {len(texts.data):,} bytes, and {number} texts of {size:,} are asked for. Take "
            "shorter texts or fewer, or a list of domains with more documents"
        )
    return np.asarray(texts.data[: number * size]).reshape(number, size)


def prepared(domains: Domains, clear: int, *, size: int, other: int, texts: int, seed: int) -> Read:
    """Cut the texts, and state facts in those of the six domains.

    Args:
        domains: to read.
        clear: bytes at the end of a text in which no fact is stated.
        size: bytes of a text that is read, a multiple of 1,024.
        other: bytes of a text of other documents, a multiple of 1,024.
        texts: of a domain.
        seed: of the facts.

    Raises:
        ValueError: a size is no such multiple, or a domain is too small.
    """
    if min(size // 2, other) < BIN or size % BIN or other % BIN or texts < 1:
        raise ValueError(
            f"sizes must be multiples of {BIN:,} bytes, {2 * BIN:,} or more of what is read, and texts 1 or more. "
            f"Received: size={size}, other={other}, texts={texts}"
        )
    read_ = np.stack([cut(x.name, x.read, texts, size) for x in domains.domains])
    return Read(
        (*(x.name for x in domains.domains), domains.filler.name),
        read_,
        cut(domains.filler.name, domains.filler.read, texts, size),
        np.stack([cut(x.name, x.other, texts, other + 1) for x in domains.domains]),
        [[_stated(text, [seed, d, i], clear) for i, text in enumerate(row)] for d, row in enumerate(read_)],
    )


def _stated(text: np.ndarray, seed: list[int], clear: int) -> Haystack:
    one = Texts(text, np.array([0, len(text)]), ("",))
    return haystacks(one, np.random.default_rng(seed), 1, len(text), phrasings.near, facts=FACTS, clear=clear)


def joined(parts: list[Haystack]) -> Haystack:
    """Contexts of several haystacks, their questions padded to the longest."""
    longest = max(x.asked.shape[2] for x in parts)
    padded = [x._replace(asked=np.pad(x.asked, ((0, 0), (0, 0), (0, longest - x.asked.shape[2])))) for x in parts]
    return Haystack(*map(np.concatenate, zip(*padded)))


class Found(NamedTuple):
    """Of B rows, at one moment."""

    episodes: np.ndarray
    """bits per byte of the text that was read first, without its facts [B]"""
    domain: np.ndarray
    """of other documents of its domain [B]"""
    right: np.ndarray
    """which digits of the facts in it are answered bool [B, facts, 6]"""


@torch.no_grad()
def moments(
    model: LanguageModel, given: Read, rows: np.ndarray, device: torch.device, snapshots: bool = False
) -> Iterator[tuple[str, int, Found]]:
    """Read everything, and measure the frozen memories in between.

    Args:
        model: with memories of one scope to a row.
        given: what is read.
        rows: int [B, 2]; the domain that a row begins with, and which of each domain's texts it reads.
        device: of the model.
        snapshots: keep the memories after each domain; what is measured reads those that fit it (snapshots.py).

    Yields:
        "unread", "filler", "others", "kept" or, of texts of the domain that was read last instead of the first,
        "last"; how many other domains were read; what was found.
    """
    number = len(given.texts)
    first, text = rows.T
    stated = joined([given.facts[d][i] for d, i in rows])

    def here(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    asked, value = here(stated.asked), here(stated.value)

    def bits_of(reading: Reading, domain: np.ndarray, kept: Snapshots | None) -> dict[str, np.ndarray]:
        fresh = reading._replace(windows=tuple(past[:, :, :0] for past in reading.windows))
        # Sentences push out what stands at the end, at most a bin.
        its = {
            "episodes": here(given.texts[domain, text, : given.texts.shape[2] - BIN + 1]),
            "domain": here(given.other[domain, text]),
        }
        return {
            name: bits(model, x, fresh if kept is None else kept.best(x), update=False)[0].mean(1)
            for name, x in its.items()
        }

    def look(reading: Reading, kept: Snapshots | None = None) -> Found:
        if kept is not None:
            kept.keep(reading)
        found = bits_of(reading, first, kept)
        reading = reading if kept is None else kept.best(asked.flatten(1))
        return Found(**found, right=answers(model, asked, value, reading).cpu().numpy())

    reading = model.start(len(rows))
    yield "unread", 0, look(reading)
    reading = read(model, here(given.filler[text]), reading)
    yield "filler", 0, look(reading)
    for name in ("others", "kept"):
        del reading  # its tables, so that new ones fit
        reading, kept = model.start(len(rows)), Snapshots(model) if snapshots else None
        if name == "kept":
            reading = read(model, here(stated.tokens), reading)
            yield name, 0, look(reading, kept)
        for count in range(1, number):
            reading = read(model, here(given.texts[(first + count) % number, text]), reading)
            found = look(reading, kept)
            yield name, count, found
    yield "last", number - 1, found._replace(**bits_of(reading, (first + number - 1) % number, kept))


def check(learned: str, domains: Domains) -> None:
    """Raise a ValueError unless the domains have nothing of the corpus of this sha256 that is trained on."""
    if learned != domains.corpus:
        raise ValueError(
            f"the model learns from the corpus {learned}, and the domains have nothing of the training documents of "
            f"{domains.corpus}: build them again, with --corpus of what it learns from"
        )


def measure(
    folder: Path, domains: Domains, out: Path, device: torch.device, *, size: int = SIZE, other: int = OTHER,
    texts: int = TEXTS, memory: Mapping[str, Any] | None = None, seed: int = 0, snapshots: bool = False,
    tell: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Measure the model of a folder; saves every number of every row in ``out``.

    Args:
        folder: of a trained model.
        domains: to read.
        out: a JSON file.
        device: to read on.
        size: bytes of a domain that are read.
        other: bytes of its other documents that are measured on.
        texts: of each domain; that many rows begin with each.
        memory: fields of the memories' configuration to override, to try them without training.
        seed: of the facts.
        snapshots: as in ``moments``; on the host each takes about as much as the memories do.
        tell: receives a line for each moment.

    Raises:
        FileNotFoundError: nothing was trained in the folder.
        ValueError: the model has no memory that is written, or was trained on another corpus than the domains were held
            against; or a domain is too small.
    """
    ready(out)
    began, memory = time.monotonic(), dict(memory or {})
    model, experiment = load(folder, device, **{**MEMORIES, **memory})
    if not experiment.model.writes:
        raise ValueError(f"the model of {folder} has no memory that is written, to keep anything")
    check(corpus_of(folder), domains)
    given = prepared(domains, experiment.model.beyond, size=size, other=other, texts=texts, seed=seed)
    rows = np.stack(np.meshgrid(np.arange(len(given.texts)), np.arange(texts), indexing="ij"), -1).reshape(-1, 2)
    found: dict[str, dict[int, list[Found]]] = {}
    at_once = together(model, device, AT_ONCE, sets=1)
    for part in np.array_split(rows, -(-len(rows) // at_once)):
        for name, count, here in moments(model, given, part, device, snapshots):
            found.setdefault(name, {}).setdefault(count, []).append(here)
            tell(
                f"{len(part)} of {len(rows)} rows, {name} {count}: {here.episodes.mean():.4f} bits per byte of the "
                f"{'last' if name == 'last' else 'first'} text, {here.domain.mean():.4f} of its domain, "
                f"{here.right.all(2).mean():.1%} of the first's needles"
            )
    about = {
        "domains": domains.sha256, "corpus": domains.corpus, "device": device_name(device),
        "experiment": experiment.tables(), "trained": folder.name, "memory": memory, "seed": seed, "size": size,
        "snapshots": snapshots, "other": other, "names": given.names, "state_bytes": model.start(1).nbytes,
        "seconds": round(time.monotonic() - began, 1), "rows": _rows(found, given, rows),
    }  # fmt: skip
    replace(out, lambda beside: beside.write_text(json.dumps(about)))
    return out


def _rows(found: Mapping[str, Mapping[int, list[Found]]], given: Read, rows: np.ndarray) -> list[dict[str, Any]]:
    """For JSON: of each row the domain and text that it begins with, and its numbers by memory, in order of others."""
    whole = {
        name: [Found(*map(np.concatenate, zip(*its[count]))) for count in sorted(its)] for name, its in found.items()
    }
    return [
        {
            "first": given.names[d], "text": int(i), "depth": given.facts[d][i].depth[0].round(4).tolist(),
            "episodes": {name: [round(float(x.episodes[row]), 5) for x in its] for name, its in whole.items()},
            "domain": {name: [round(float(x.domain[row]), 5) for x in its] for name, its in whole.items()},
            "right": {name: [x.right[row].sum(1).tolist() for x in its] for name, its in whole.items()},
        } for row, (d, i) in enumerate(rows)
    ]  # fmt: skip
