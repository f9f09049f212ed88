"""Triton's interpreter without what it does again and again, which is half of its time."""

import functools
from typing import Any

import numpy as np


def quicken(interpreter: Any) -> None:
    """Let a launch replace the functions of ``triton.language`` once, and types be looked up.

    The interpreter replaces them, by a search through all that the modules hold, for each call of one function of a
    kernel by another, and it builds its table of types for each number. Where Triton names them otherwise,
    all stays as it is.
    """
    if not all(hasattr(interpreter, name) for name in ("_LangPatchScope", "_patch_lang", "_get_np_dtype")):
        return
    language, patch_lang, np_dtype = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    replaced = set()

    def patch_once(fn: Any) -> Any:
        modules = frozenset(x.__name__ for x in fn.__globals__.values() if x is language or x is language.core)
        if modules and modules <= replaced:
            return interpreter._LangPatchScope()  # nothing to restore
        scope = patch_lang(fn)
        replaced.update(modules)
        restore = scope.restore

        def restore_all() -> None:  # of a launch: scopes of calls below it are thrown away
            replaced.clear()
            restore()

        scope.restore = restore_all
        return scope

    scalar = functools.cache(np_dtype)

    def looked_up(dtype: Any) -> np.dtype:
        dtype = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        return np_dtype(dtype) if isinstance(dtype, language.pointer_type) else scalar(dtype)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, looked_up
