"""The backends by name, imported when asked for (SPEC.md §8). Importing fwpkm imports no framework."""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

from fwpkm.protocol import DifferentiableBackend

if TYPE_CHECKING:
    from fwpkm.backends import jax, keras, torch


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


@overload
def FwPKM(backend: Literal["torch"], *arguments: Any, **options: Any) -> "torch.FwPKM": ...
@overload
def FwPKM(backend: Literal["jax"], *arguments: Any, **options: Any) -> "jax.FwPKM": ...
@overload
def FwPKM(backend: Literal["keras"], *arguments: Any, **options: Any) -> "keras.FwPKM": ...
@overload
def FwPKM(backend: str, *arguments: Any, **options: Any) -> Any: ...
def FwPKM(backend: str, *arguments: Any, **options: Any) -> Any:  # noqa: N802
    """The layer of a framework named by a text: ``FwPKM("torch", 64)`` is ``fwpkm.backends.torch.FwPKM(64)``.

    Args:
        backend: "torch", "jax" or "keras".
        arguments: those of that layer.
        options: those of that layer, such as ``num_subkeys=64``.

    Raises:
        ValueError: no framework of this name has a layer, or an argument of the layer breaks its rule.
        ImportError: the framework is not installed; names the extra to install.
    """
    layers = [name for name in BACKENDS if name != "numpy"]
    if backend not in layers:
        raise ValueError(
            f"FwPKM's first argument must name the framework, one of {', '.join(map(repr, layers))}: "
            "fwpkm.FwPKM('torch', 64) is fwpkm.backends.torch.FwPKM(64). Flax NNX and Equinox have theirs in "
            "fwpkm.integrations. "
            f"Received: {backend!r}"
        )
    layer: Any = get_backend(backend)
    return layer.FwPKM(*arguments, **options)


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


def is_installed(package: str) -> bool:
    """Whether a framework could be imported, as far as one can tell without doing so."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is hidden, or stands in sys.modules without a spec
        return sys.modules.get(package) is not None


def _shipped(backend: _Backend) -> bool:
    return importlib.util.find_spec(backend.module) is not None
