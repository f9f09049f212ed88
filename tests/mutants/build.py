"""Wrong backends: copies of the reference with one mistake, or right backends with functions replaced."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

CORE = Path(__file__).parents[2] / "fwpkm_core"
SOURCES = ("reference.py", "equations.py", "schedule.py")
OWN_IMPORTS = {
    "from fwpkm import equations, packing, schedule,": "from {} import equations, schedule\nfrom fwpkm import packing,",
    "from fwpkm.equations import": "from {}.equations import",
}
"""How the copies import each other."""


class Mutant(NamedTuple):
    """One mistake in one place."""

    name: str
    file: str
    right: str
    """A part of the file that occurs once."""
    wrong: str
    caught_by: str
    """One of the quantities that must give it away."""

    def load(self, folder: Path) -> Any:
        """The module of the copy."""
        return load(folder, "mutant_" + re.sub(r"\W", "_", self.name), self)


class Wrapper(NamedTuple):
    """One mistake in the functions of a user's own module, which takes the others from a right backend."""

    name: str
    base: Any
    caught_by: str
    functions: dict[str, Any]
    """By the name of what they replace."""

    def load(self, folder: Path) -> Any:
        """The module's names; nothing is written to the folder."""
        return SimpleNamespace(**vars(self.base) | self.functions)


def build(folder: Path, package: str, mutant: Mutant | None = None) -> str:
    """Write the reference's sources, with the mutant's mistake in them, as a package; returns the module to judge."""
    target = folder / package
    target.mkdir()
    for name in SOURCES:
        text = (CORE / name).read_text(encoding="utf-8")
        if mutant is not None and mutant.file == name:
            assert text.count(mutant.right) == 1, mutant
            text = text.replace(mutant.right, mutant.wrong)
        for found, instead in OWN_IMPORTS.items():
            text = text.replace(found, instead.format(package))
        (target / name).write_text(text, encoding="utf-8")
    (target / "__init__.py").touch()
    return f"{package}.reference"


def load(folder: Path, package: str, mutant: Mutant | None = None) -> Any:
    """``build``, and the module imported."""
    module = build(folder, package, mutant)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))
