"""NumPy's arrays as arguments, wherever JAX's own functions take them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fwpkm.backends.jax.checks import in_64_bits
from fwpkm.containers import State

AnyArray = jax.Array | np.ndarray
"""What the layer takes."""
_P = ParamSpec("_P")
_R = TypeVar("_R")


def takes_numpy(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function``, which also takes NumPy arrays, alone or in states and other pytrees, as JAX's own functions do.

    They become copies as ``jnp.array`` makes them, so outside of the 64-bit mode float64 becomes float32. Their values
    stay known under ``jax.jit`` too. ``rows`` are named on the host in any case, and stay what they are.
    """
    names = list(inspect.signature(function).parameters)

    def taken(name: str, x: Any) -> Any:
        # A state of JAX's arrays must stay the object that it is: who only reads is given it back.
        if name == "rows" or not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(x)):
            return x
        _check_states(name, x)
        return jax.tree.map(functools.partial(from_numpy, name), x)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        known: Any = map(taken, names, args)
        beyond: Any = args[len(names) :]  # which the function refuses
        named: Any = {name: taken(name, x) for name, x in kwargs.items()}
        return function(*known, *beyond, **named)

    return call


def _check_states(name: str, x: Any) -> None:
    """Raise where JAX would round NumPy's tables of a state."""
    if in_64_bits():
        return
    for state in jax.tree.leaves(x, is_leaf=lambda node: isinstance(node, State)):
        tables = jax.tree.leaves(state.memory) if isinstance(state, State) else []
        if any(getattr(table, "dtype", None) == np.float64 for table in tables):
            raise ValueError(
                "a state in float64 needs JAX's 64-bit mode, without which its tables would be rounded: call "
                "jax.config.update('jax_enable_x64', True) first, or round them yourself with state.map(...). "
                f"Received: float64 tables in {name}"
            )


def from_numpy(name: str, x: Any) -> Any:
    """A NumPy array as an array of JAX; anything else, and what JAX has no dtype for, as it is.

    Python's and NumPy's scalars stay what they are: counts and switches, and no array of a call has so few axes.

    Raises:
        ValueError: the array is masked, or holds integers too large for the dtype that JAX has for them here.
    """
    if not isinstance(x, np.ndarray):
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError(
            f"{name} must not be a masked array, whose mask JAX drops: pass x.filled(0), and say by the argument mask "
            "which tokens are not there. Received: numpy.ma.MaskedArray"
        )
    if x.dtype.kind in "iu" and x.size:
        bounds = jnp.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
        beyond = next((int(n) for n in (x.min(), x.max()) if not bounds.min <= int(n) <= bounds.max), None)
        if beyond is not None:
            raise ValueError(
                f"{name} must hold integers that fit {bounds.dtype}, which is what JAX makes of them outside of its "
                f"64-bit mode. Received: {beyond}"
            )
    try:
        with jax.ensure_compile_time_eval():
            return jnp.array(x)  # a copy: device_put may share NumPy's, which its owner overwrites
    except TypeError:  # another byte order, texts, objects: the checks refuse it by its name
        return x
