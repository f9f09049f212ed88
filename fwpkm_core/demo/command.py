"""``fwpkm demo``: everything that can fail is tried before the long work begins."""

import importlib
import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fwpkm.demo import DemoError, text
from fwpkm.demo.recall import Asked, Round, Trial, config
from fwpkm.registry import get_backend


def run(
    files: Sequence[str],
    backend: str,
    *,
    passes: int = 3,
    num_subkeys: int = 256,
    chunk_size: int = 512,
    out: str,
    as_json: bool = False,
) -> Path:
    """Read the files, print what was recalled, and save the picture.

    Args:
        files: UTF-8 texts, read in order as one; none for the text that ships with the package.
        backend: a name that :func:`fwpkm.get_backend` knows.
        passes: how many times the text is read.
        num_subkeys: S; the memory has S·S slots.
        chunk_size: tokens a write, at least 2.
        out: folder for the picture, made where it is missing.
        as_json: print one JSON object at the end instead of the tables; docs/commands.md has its keys.

    Returns:
        the path of the picture.

    Raises:
        DemoError: a file cannot be read, or ``out`` cannot be written.
        ImportError: the backend's framework, matplotlib or rich is missing; names the extra.
        ValueError: a number that the memory cannot have.
    """
    read = text.load(files)
    cfg = config(num_subkeys, chunk_size)
    require_extra()
    be = get_backend(backend)
    folder = writable_folder(out)
    # Only now: these import rich and matplotlib.
    from fwpkm.demo import picture
    from fwpkm.demo.report import Report

    trial, report, rounds = Trial(be, cfg, read), Report(quiet=as_json), []
    report.introduce(read, cfg, backend, trial.device)
    report.header()
    with report.progress((3 * passes + 2) * len(read.ids)) as advance:
        for number in range(1, passes + 1):
            rounds.append(trial.read(advance))
            report.row(number, rounds[-1])
        plain, other = (trial.ask(advance, replaced=replaced) for replaced in (False, True))
    try:
        path = picture.save(folder, read.title, rounds, plain, other)
    except OSError as error:
        raise DemoError(f"--out {out}: the picture cannot be written ({error.strerror or error})") from None
    report.conclude(read, cfg, rounds, plain, other, str(path))
    if as_json:
        about = {"backend": backend, "device": trial.device, "num_subkeys": num_subkeys, "chunk_size": chunk_size}
        print(json.dumps(as_object(read, about, rounds, plain, other, str(path)), indent=1))
    return path


def as_object(
    read: text.Text, about: dict[str, Any], rounds: Sequence[Round], plain: Asked, other: Asked, picture: str
) -> dict[str, Any]:
    """What ``--json`` prints (docs/commands.md)."""
    tokens = len(read.ids)
    passes = []
    for round_ in rounds:
        memory = round_.memory
        found: dict[str, Any] = {name: getattr(round_, name).recall for name in Round._fields}
        found |= {"slots_used": memory.slots_used, "collisions": memory.collisions}
        passes.append(found | {"tokens_per_second": tokens / memory.seconds, "seconds": memory.seconds})
    return {
        "fwpkm": version("fwpkm"),
        "text": {"title": read.title, "tokens": tokens, "different": len(read.vocabulary)},
        **about,
        "passes": passes,
        "asked_once_more": {"as_it_was": plain._asdict(), "one_in_twenty_replaced": other._asdict()},
        "picture": picture,
    }


def require_extra() -> None:
    """Raise ImportError, naming the extra, unless what prints and draws can be imported."""
    for package in ("rich", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"the demo needs {package}, which could not be imported ({error}). "
                f"Install it with: pip install 'fwpkm[demo]'",
                name=error.name,
            ) from error


def writable_folder(out: str) -> Path:
    """The folder ``out``, made where it is missing.

    Raises:
        DemoError: it is no folder, cannot be made, or takes no files.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DemoError(f"--out {out}: is not a folder that can be written ({reason})") from None
