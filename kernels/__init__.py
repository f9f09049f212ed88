"""Triton kernels, one file per step of the spec, and why a call of torch would not run on them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwpkm.kernels.support import why_unsupported

__all__ = ["why_unsupported"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It has {', '.join(__all__)}")
    from fwpkm.kernels import support  # which imports torch

    return globals().setdefault(name, getattr(support, name))


def __dir__() -> list[str]:
    return __all__
