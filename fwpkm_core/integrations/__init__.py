"""What makes the memory a part of libraries around it; each is imported only when asked for."""

import importlib
from typing import TYPE_CHECKING, Any

from fwpkm.registry import is_installed

if TYPE_CHECKING:
    from fwpkm.integrations import equinox, nnx, transformers

__all__ = ["equinox", "nnx", "transformers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It has {', '.join(__all__)}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return [name for name in __all__ if is_installed({"nnx": "flax"}.get(name, name))]
