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
        folder: made here; one that is there already must be empty.

    Returns:
        the folder.

    Raises:
        FileExistsError: it holds something, or is no folder.
        OSError: it cannot be written.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"DIR must be a new or an empty folder. Received: {folder}, which is there already")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.mkdir()
    try:
        for name in names():
            (unfinished / name).write_bytes(_shipped().joinpath(name).read_bytes())
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def _shipped():
    return resources.files("fwpkm.data").joinpath("vectors")
