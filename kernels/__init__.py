"""Triton kernels, one file per step of the spec, and why a call would not run on them."""

from fwpkm.kernels.support import why_unsupported

__all__ = ["why_unsupported"]


def __dir__() -> list[str]:
    return __all__
