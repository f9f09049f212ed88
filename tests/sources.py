"""The package's source files as tests read them: through src/, whose links make three folders one package."""

import ast
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"


class Source(NamedTuple):
    """One file of the package."""

    package: str
    """The package that holds the module, such as "fwpkm.backends.torch"."""
    path: Path
    tree: ast.Module

    @property
    def where(self) -> str:
        """Its path below src/."""
        return self.path.relative_to(SRC).as_posix()


@functools.cache
def sources(package: str = "fwpkm") -> tuple[Source, ...]:
    """Every module below a package, in the order of paths."""
    return tuple(_walk(package))


def _walk(package: str) -> Iterator[Source]:
    for folder, folders, files in os.walk(SRC / package.replace(".", "/"), followlinks=True):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix == ".py":
                tree = ast.parse(path.read_text(encoding="utf-8"))
                yield Source(".".join(path.parent.relative_to(SRC).parts), path, tree)


def core() -> Iterator[Source]:
    """The modules of the core alone."""
    return (source for source in sources() if not source.package.startswith(("fwpkm.backends", "fwpkm.kernels")))
