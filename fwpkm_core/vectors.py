"""``fwpkm vectors DIR``: the reference vectors that ship with the package (docs/conformance.md says what they hold)."""

import os
import shutil
from importlib import resources
from pathlib import Path


def names() -> list[str]:
    """The files' names, sorted."""
    return sorted(file.name for file in _shipped().iterdir())


def write(folder: str) -> Path:
    """Write all vectors into a new folder: all of them or, after an error, none.

    Args:
        folder: made here; one that is there already must be empty, and is filled.

    Returns:
        the folder.

    Raises:
        FileExistsError: it holds something, or is no folder.
        OSError: it cannot be written.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        received = "a folder that is not empty" if target.is_dir() else "a file"
        raise FileExistsError(f"DIR must be a new or an empty folder. Received: {folder}, {received}")
    there = target.exists()
    # Inside an empty folder: it may be a mount point, which cannot be replaced and is another file system.
    unfinished = (target if there else target.parent) / f".{target.name}.{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        for name in names():
            (unfinished / name).write_bytes(_shipped().joinpath(name).read_bytes())
        if there:
            for name in names():
                (unfinished / name).rename(target / name)
            unfinished.rmdir()
        else:
            unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if there:
            for name in names():
                (target / name).unlink(missing_ok=True)
        raise
    return target


def _shipped():
    return resources.files("fwpkm.data").joinpath("vectors")
