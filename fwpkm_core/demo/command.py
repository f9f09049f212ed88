"""``fwpkm demo``: everything that can fail is tried before the long work begins."""

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fwpkm.demo import DemoError, text
from fwpkm.demo.recall import Trial, config
from fwpkm.registry import get_backend


def run(
    files: Sequence[str], backend: str, *, passes: int = 3, num_subkeys: int = 256, chunk_size: int = 512, out: str
) -> Path:
    """Read the files, print what was recalled, and save the picture.

    Args:
        files: UTF-8 texts, read in order as one; none for the text that ships with the package.
        backend: a name that :func:`fwpkm.get_backend` knows.
        passes: how many times the text is read.
        num_subkeys: S; the memory has S·S slots.
        chunk_size: tokens a write, at least 2.
        out: folder for the picture, made where it is missing.

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

    trial, report, rounds = Trial(be, cfg, read), Report(), []
    report.introduce(read, cfg, backend, trial.device)
    report.header()
    with report.progress(3 * passes * len(read.ids)) as advance:
        for number in range(1, passes + 1):
            rounds.append(trial.read(advance))
            report.row(number, rounds[-1])
    try:
        path = picture.save(folder, read.title, rounds)
    except OSError as error:
        raise DemoError(f"--out {out}: the picture cannot be written ({error.strerror or error})") from None
    report.conclude(read, cfg, rounds, str(path))
    return path


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
