"""The backends by name, imported when asked for (SPEC.md §8). Importing fwpkm imports no framework."""

import importlib
import importlib.util
from typing import Any, NamedTuple, cast

from fwpkm.protocol import DifferentiableBackend


class _Backend(NamedTuple):
    module: str
    framework: str
    extra: str | None
    arrays: tuple[str, ...]
    """The packages that the types of its arrays belong to."""


BACKENDS = {
    "numpy": _Backend("fwpkm.reference", "numpy", None, ("numpy",)),
    "torch": _Backend("fwpkm.backends.torch", "torch", "torch", ("torch",)),
    "jax": _Backend("fwpkm.backends.jax", "jax", "jax", ("jax", "jaxlib")),
    "keras": _Backend("fwpkm.backends.keras", "keras", "keras", ("keras", "tensorflow")),
}
"""By name. ``fwpkm backends`` reads the frameworks and their extras here too."""


def backend_names() -> tuple[str, ...]:
    """The names that :func:`get_backend` knows, whether or not their frameworks are installed."""
    return tuple(BACKENDS)


def get_backend(name: str) -> DifferentiableBackend:
    """The module with the functions of SPEC.md §8 for one framework: "numpy", "torch", "jax" or "keras".

    They are documented on :class:`fwpkm.protocol.Backend`; NumPy's has no ``vjp``.

    Raises:
        ValueError: no backend has this name.
        ImportError: its framework is not installed (names the extra to install), or it is not in this release.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}. Received: {name!r}")
    backend = BACKENDS[name]
    if not _shipped(backend):
        raise ImportError(
            f"the {name!r} backend is not part of this release of fwpkm; its extra, fwpkm[{backend.extra}], "
            f"installs the framework alone. Available: {', '.join(n for n, b in BACKENDS.items() if _shipped(b))}"
        )
    try:
        return cast(DifferentiableBackend, importlib.import_module(backend.module))
    except ModuleNotFoundError as error:
        # Only the framework's own absence means "install the extra"; any other failure must show itself.
        if error.name != backend.framework:
            raise
        raise ImportError(
            f"the {name!r} backend needs {backend.framework}, which could not be imported ({error}). "
            f"Install it with: pip install 'fwpkm[{backend.extra}]'",
            name=error.name,
        ) from error


def backend_of(array: Any) -> DifferentiableBackend:
    """The backend whose native arrays ``array`` belongs to.

    Raises:
        ValueError: an array of no known framework.
    """
    package = type(array).__module__.partition(".")[0]
    for name, backend in BACKENDS.items():
        if package in backend.arrays:
            return get_backend(name)
    raise ValueError(f"expected an array of one of {', '.join(BACKENDS)}. Received: {type(array)!r}")


def _shipped(backend: _Backend) -> bool:
    return importlib.util.find_spec(backend.module) is not None
