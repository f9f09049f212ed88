"""One folder per framework, each with ops.py (pure functions) and layer.py (the module); imported when asked for."""

from typing import TYPE_CHECKING, Any

from fwpkm.registry import get_backend, is_installed

if TYPE_CHECKING:
    from fwpkm.backends import jax, keras, torch

__all__ = ["jax", "keras", "torch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It has {', '.join(__all__)}")
    return get_backend(name)


def __dir__() -> list[str]:
    return [name for name in __all__ if is_installed(name)]
