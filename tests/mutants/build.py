"""Wrong backends: copies of a right one's sources with one line replaced."""

import importlib
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = {
    "numpy": ("fwpkm", ROOT / "fwpkm_core", ("reference.py", "equations.py", "schedule.py"), "reference"),
    "torch": ("fwpkm.backends.torch", ROOT / "backends" / "torch", ("*.py",), ""),
}
"""By backend: the package that its modules lie in, their folder, which of them are copied, and the one to import."""

REFERENCE_IMPORT = "from fwpkm import equations, schedule, validation\n"


class Mutant(NamedTuple):
    """One mistake."""

    name: str
    backend: str
    file: str
    right: str
    """A line of the file, without its indentation; it occurs once."""
    wrong: str
    caught_by: str
    """One of the quantities that must give it away."""


def build(backend: str, folder: Path, package: str, mutant: Mutant | None = None) -> str:
    """Write the backend's sources, with the mutant's line in them, as a package; returns the module to judge."""
    origin, source, patterns, entry = SOURCES[backend]
    target = folder / package
    target.mkdir()
    for path in sorted(path for pattern in patterns for path in source.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        if mutant is not None and mutant.file == path.name:
            text = replace_line(text, mutant)
        if backend == "numpy":
            text = text.replace(
                REFERENCE_IMPORT, f"from fwpkm import validation\nfrom {package} import equations, schedule\n"
            )
        else:
            text = text.replace(f"from {origin}.", f"from {package}.")
        (target / path.name).write_text(text, encoding="utf-8")
    (target / "__init__.py").touch()
    return f"{package}.{entry}".rstrip(".")


def replace_line(text: str, mutant: Mutant) -> str:
    """The text with the mutant's line; fails unless the right one stands there once."""
    lines = text.splitlines(keepends=True)
    (at,) = [i for i, line in enumerate(lines) if line.strip() == mutant.right]
    lines[at] = lines[at].replace(mutant.right, mutant.wrong)
    return "".join(lines)


def load(backend: str, folder: Path, package: str, mutant: Mutant | None = None):
    """``build``, and the module imported."""
    module = build(backend, folder, package, mutant)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))
