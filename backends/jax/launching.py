"""Lists of launches (kernels/runtime/launch.py) as functions of JAX's arrays.

On a GPU each launch is a call of jax-triton, in which whatever the kernel may write is an input and an output in one
place: XLA copies an array only where somebody still needs it as it was. In Triton's interpreter a list is a callback.
"""

import functools
import importlib
import os
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import sequential_vmap

from fwpkm.backends.jax.sharding import alike

Arrays = Mapping[str, Any]
"""By name an array; None where there is none; or a ``jax.ShapeDtypeStruct``, of one that is made and not yet filled."""
_ONE_AT_A_TIME = threading.Lock()
"""Triton's interpreter keeps what it runs in one place."""


def run(launches: Any, arrays: Arrays, own: str, untouched: tuple[str, ...] = ()) -> dict[str, Any]:
    """Make all launches, one after the other.

    Args:
        launches: a ``Launches``.
        arrays: all of its inputs, and of its layouts' tensors those that were begun; others are made.
        own: the name of one of them that no other call has too.
        untouched: what is known to stay as it is, though a kernel that is launched may write such a thing elsewhere.

    Returns:
        ``arrays``, as they are then, and those that were made. A 64-bit integer is two int32, [..., 2], in JAX.
    """
    from fwpkm.kernels.runtime.launch import INTERPRETED

    known = {name: _begun(launches, name, arrays) for name, *_ in launches.sources}
    changed = {name for bound in launches.kernels for name in _stored(launches, bound).values()} - {*untouched}
    changed = {name for name in changed if known[name] is not None} | {*_of_kind(known, jax.ShapeDtypeStruct)}
    make = functools.partial(_interpreted if INTERPRETED else _launched, launches, known, changed, own)
    taken = _of_kind(known, Array) | {own: arrays[own]}
    made, _ = alike(sequential_vmap(make)(taken), taken)
    return {**arrays, **made}


def _of_kind(known: Arrays, kind: type) -> dict[str, Any]:
    return {name: x for name, x in known.items() if isinstance(x, kind)}


def _begun(launches: Any, name: str, arrays: Arrays) -> Any:
    """What a tensor is before the first launch. What a layout wants as zeros is so already."""
    if name in launches.inputs or name in arrays:
        return arrays[name]
    layout = next(layout for layout in launches.layouts if name in layout.tensors)
    spec, zeros = layout.tensors[name], layout.tensors.get("zeros")
    if spec is None:
        return None
    dtype, shape = ("int32", (*spec.shape, 2)) if spec.dtype == "int64" else (spec.dtype, spec.shape)
    if zeros is not None and name not in ("zeros", "counters") and spec.offset < zeros.nbytes:
        return jnp.zeros(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype)


def _stored(launches: Any, bound: Any) -> dict[str, str]:
    """By parameter, the names of the tensors into which a kernel may store."""
    from fwpkm.kernels.runtime.functional import written

    names = [launches.sources[i][0] for i in bound.tensors]
    return {x: name for x, name in zip(bound.kernel.arg_names, names) if x in written(bound.kernel)}


def _wide(launches: Any, known: Arrays) -> set[str]:
    """The tensors whose numbers are two of JAX's each."""
    specs = {name: spec for layout in launches.layouts for name, spec in layout.tensors.items() if spec is not None}
    return {name for name, x in known.items() if name in specs and x is not None and x.ndim > len(specs[name].shape)}


# --- On a GPU ---


def _launched(launches: Any, known: Arrays, changed: set[str], own: str, taken: Arrays) -> dict[str, Array]:
    """What is ``changed``, by calls of jax-triton; ``taken`` are the arrays of ``known``, perhaps traced anew."""
    missing, wide = _of_kind(known, jax.ShapeDtypeStruct), _wide(launches, known)
    # XLA would make constants of the empty, and copy them; nobody reads or writes the number that stands for one.
    shapes = (x if x.size else jax.ShapeDtypeStruct((1,), x.dtype) for x in missing.values())
    # Every launch takes and gives it, so that XLA sees their order: what one reads, another may overwrite later.
    turn = jax.ShapeDtypeStruct((1,), jnp.int32)
    *made, last = _allocated((*shapes, turn), taken[own])
    now = {**known, **taken, **dict(zip(missing, made))}
    names = [name for name, *_ in launches.sources]
    for number, grid, integers in launches.launches:
        bound = launches.kernels[number]
        tensors = dict(zip(bound.kernel.arg_names, (names[i] for i in bound.tensors)))
        present = {x: name for x, name in tensors.items() if now[name] is not None}
        stored = [x for x, name in _stored(launches, bound).items() if name in changed and x in present]
        kernel = _of_arrays(
            bound.kernel, tuple(present), bound.integers, tuple(stored), tuple(x for x in present if present[x] in wide)
        )
        given = [*(now[name] for name in present.values()), last]
        places = [*map([*present].index, stored), len(present)]
        *results, last = _triton_call(
            *given, *map(_Integer, integers), kernel=kernel, grid=grid,
            out_shape=[jax.ShapeDtypeStruct(given[i].shape, given[i].dtype) for i in places],
            input_output_aliases={i: output for output, i in enumerate(places)},
            **dict.fromkeys(x for x in tensors if x not in present), **bound.constants,
        )  # fmt: skip
        now |= zip((present[x] for x in stored), results)
    return {name: now[name] if known[name].size else jnp.zeros_like(known[name]) for name in changed}


class _Integer(int):
    """One that nobody finds equal to 1, for which jax-triton would compile a kernel of its own."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Integer) and int(self) == int(other)

    __hash__ = int.__hash__


@functools.cache
def _of_arrays(
    kernel: Any, tensors: tuple[str, ...], integers: tuple[str, ...], stored: tuple[str, ...], wide: tuple[str, ...]
) -> Any:
    """A kernel as jax-triton passes arguments: arrays, integers, outputs, and by name what else there is."""
    from fwpkm.kernels.runtime.functional import Reordered

    outputs = *(f"{name}_after" for name in stored), "turn_after"
    rest = (name for name in kernel.arg_names if name not in (*tensors, *integers))
    return Reordered(kernel, (*tensors, "turn", *integers, *outputs, *rest), wide)


def _allocated(shapes: tuple[jax.ShapeDtypeStruct, ...], like: Array) -> list[Array]:
    """Arrays that nobody has filled: what a kernel gives that does nothing.

    It takes an array of the call's own: else XLA would make one allocation for several calls, or before a loop, and
    copy it each time.
    """
    from fwpkm.kernels.runtime import launch

    made = tuple(f"made{i}" for i in range(len(shapes)))
    kernel = _of_arrays(launch.nothing, (), (), made, ())
    shapes = *shapes, jax.ShapeDtypeStruct((1,), jnp.int32)
    return _triton_call(like, kernel=kernel, grid=(1,), out_shape=list(shapes))[:-1]


def _triton_call(*given: Any, **options: Any) -> list[Array]:
    made: list[Array] = jax_triton().triton_call(*given, **options)
    return made


@functools.cache
def jax_triton() -> Any:
    """The module; it takes the folder from Triton's cache, which torch's kernels need, so that is put back."""
    before = os.environ.get("TRITON_CACHE_DIR")
    module = importlib.import_module("jax_triton")
    os.environ.pop("TRITON_CACHE_DIR", None)
    if before is not None:
        os.environ["TRITON_CACHE_DIR"] = before
    return module


# --- In Triton's interpreter ---


def _interpreted(launches: Any, known: Arrays, changed: set[str], _: str, taken: Arrays) -> dict[str, Array]:
    """What is ``changed``, by a callback."""
    shapes = {name: jax.ShapeDtypeStruct(known[name].shape, known[name].dtype) for name in sorted(changed)}
    missing, wide = _of_kind(known, jax.ShapeDtypeStruct), _wide(launches, known)

    def interpret(taken: Arrays) -> dict[str, np.ndarray]:
        arrays = {name: np.array(x) for name, x in taken.items()}
        arrays |= {name: _unfilled(x) for name, x in missing.items()}
        tensors = [_as_tensor(arrays.get(name), name in wide) for name, *_ in launches.sources]
        with _ONE_AT_A_TIME:
            launches.interpret(tensors)
        return {name: arrays[name] for name in shapes}

    made: dict[str, Array] = jax.pure_callback(interpret, shapes, taken)
    return made


def _unfilled(x: jax.ShapeDtypeStruct) -> np.ndarray:
    """NaN, True, or the largest integer, which is no valid index."""
    is_whole = jnp.issubdtype(x.dtype, jnp.integer)
    return np.full(x.shape, jnp.iinfo(x.dtype).max if is_whole else jnp.nan, x.dtype)  # NaN as a bool is True


def _as_tensor(x: np.ndarray | None, wide: bool) -> Any:
    """The same memory as the interpreter wants it, which is torch's tensor."""
    if x is None:
        return None
    torch = importlib.import_module("torch")
    name = "int64" if wide else x.dtype.name
    same = x.view(np.int64)[..., 0] if wide else x.view(np.int16) if name == "bfloat16" else x
    return torch.from_numpy(same).view(getattr(torch, name))
