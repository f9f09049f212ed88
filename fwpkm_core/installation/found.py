"""What is installed beside this package, told from metadata and import specs: nothing is imported."""

import functools
import importlib.metadata as metadata
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from fwpkm.registry import BACKENDS

SERVED_BY_KERAS = ("tensorflow", "jax", "torch")
UNKNOWN = "of unknown version"
_DISTRIBUTIONS = {"tensorflow": ("tensorflow-cpu", "tensorflow")}
"""Where it differs, what brings a package, the likeliest first; the search through all that is installed is slow."""


class Status(NamedTuple):
    """One backend, or another part of this package that needs others, and whether it could run here."""

    name: str
    packages: dict[str, str]
    """The packages that it needs and that are here, by the name that is imported, with their versions."""
    reason: str
    """Why it cannot run and what to do, in one line, or ""."""
    note: str
    """What else decides how it runs, or ""."""


class _Part(NamedTuple):
    packages: tuple[str, ...]
    extra: str


_OTHERS = {
    "triton": _Part(("triton", "torch"), "triton"),
    "jax-triton": _Part(("jax_triton", "jax"), "jax-triton"),
    "nnx": _Part(("flax", "jax"), "nnx"),
    "equinox": _Part(("equinox", "jax"), "equinox"),
    "transformers": _Part(("transformers", "torch"), "transformers"),
    "demo": _Part(("matplotlib", "rich"), "demo"),
    "conform": _Part(("hypothesis", "rich", "torch"), "conform"),
}


def backend_status() -> tuple[Status, ...]:
    """Each backend with the versions of its framework, or why it cannot run; from metadata, so nothing is imported.

    Whether a framework that is installed can also be imported, ``fwpkm backends --check`` tries.
    """
    parts = {name: _Part((backend.framework,), backend.extra or "") for name, backend in BACKENDS.items()}
    return tuple(_keras(part) if name == "keras" else _status(name, part) for name, part in parts.items())


def other_status() -> tuple[Status, ...]:
    """The kernels, the integrations and the commands that need more than NumPy, by the names of their extras."""
    found = {name: _status(name, part) for name, part in _OTHERS.items()}
    if sys.platform != "linux":
        for name, backend in {"triton": "torch", "jax-triton": "jax"}.items():
            reason = f"Triton's kernels run on Linux only; the {backend} backend computes without them"
            found[name] = found[name]._replace(reason=reason)
    kernels = found["jax-triton"]
    if kernels.reason:
        found["jax-triton"] = kernels._replace(reason=f"{kernels.reason}; XLA runs the jax backend without it")
    else:
        note = 'for implementation="triton" of the jax backend; XLA runs what does not ask for it'
        found["jax-triton"] = kernels._replace(note=note)
    return tuple(found.values())


def _status(name: str, part: _Part) -> Status:
    versions = {package: version_of(package) for package in part.packages}
    missing = [package for package, version in versions.items() if not version]
    present = {package: version for package, version in versions.items() if version}
    install = f"pip install 'fwpkm[{part.extra}]'" if part.extra else ""
    if missing:
        return Status(name, present, f"{' and '.join(missing)} not installed: {install}", "")
    outside = [f"{package} {versions[package]}, needed is {_ranges()[package]}" for package in _outside(versions)]
    return Status(name, present, f"{'; '.join(outside)}: {install or 'pip install -U fwpkm'}" if outside else "", "")


def _keras(part: _Part) -> Status:
    status = _status("keras", part)
    if status.reason:
        return status
    framework, source = keras_framework()
    here = [name for name in SERVED_BY_KERAS if version_of(name)]
    other = f"or set KERAS_BACKEND to one that is here: {', '.join(here)}" if here else "or another that it serves"
    if framework not in SERVED_BY_KERAS:
        reason = f"{source} names {framework!r}; this layer serves {', '.join(SERVED_BY_KERAS)}: set KERAS_BACKEND"
        return status._replace(reason=reason)
    if not version_of(framework):
        wanted = framework if framework == "tensorflow" else f"'fwpkm[{framework}]'"
        reason = f"{framework}, which {source} names, is not installed: pip install {wanted}, {other}"
        return status._replace(reason=reason)
    packages = status.packages | {framework: version_of(framework)}
    return status._replace(packages=packages, note=f"on {framework}, which {source} names")


def keras_framework() -> tuple[str, str]:
    """The framework that Keras would run on, and what says so: the variable, Keras's file, or its default."""
    if name := os.environ.get("KERAS_BACKEND"):
        return name, "KERAS_BACKEND"
    home = Path(os.path.expanduser("~"))
    folder = os.environ.get("KERAS_HOME") or (home if os.access(home, os.W_OK) else Path("/tmp")) / ".keras"
    path = Path(folder) / "keras.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("backend")
    except (OSError, ValueError, AttributeError):  # no file, or one that Keras passes over too
        name = None
    return (name, str(path)) if isinstance(name, str) and name else ("tensorflow", "Keras's default")


@functools.cache
def version_of(package: str) -> str:
    """The version of a package by the name that is imported; "" where it is not here. It is not imported."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:  # no origin: a mere folder of this name
        return ""
    for name in _DISTRIBUTIONS.get(package, (package,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    names = metadata.packages_distributions().get(package, ())
    return metadata.version(names[0]) if names else UNKNOWN


@functools.cache
def _ranges() -> dict[str, str]:
    """By package, the versions that this one's metadata asks for, such as ">=2.8"."""
    found: dict[str, str] = {}
    for line in metadata.requires("fwpkm") or ():
        name, wanted = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;\s]*)", line).groups()  # type: ignore[union-attr]
        if wanted:
            found.setdefault(name.replace("-", "_"), wanted)
    return found


def _outside(versions: dict[str, str]) -> list[str]:
    """The packages whose version is outside its range."""
    found = []
    for package, version in versions.items():
        for sign, bound in re.findall(r"(>=|<)([\d.]+)", _ranges().get(package, "")):
            if version != UNKNOWN and (_numbers(version) >= _numbers(bound)) != (sign == ">="):
                found.append(package)
    return found


def _numbers(version: str) -> list[int]:
    """The release of a version, for comparison: 2.13.0 of 2.13.0+cpu; without zeros at the end."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers
