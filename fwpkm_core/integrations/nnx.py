"""The layer as a module of Flax NNX (flax 0.12.1 or later), on the JAX backend.

What it holds is nnx.Variables of three kinds, which ``nnx.split``, ``nnx.state`` and optimizers tell apart: weights are
``nnx.Param``, initial tables :class:`InitialMemory`, and where sequences stand, if a module keeps it, is
:class:`MemoryState`.
"""

from collections.abc import Mapping
from typing import Any, Literal, overload

try:
    import flax
    from flax import nnx
except ImportError as error:
    if (error.name or "").partition(".")[0] not in ("flax", "jax"):
        raise
    raise ImportError(
        f"fwpkm.integrations.nnx needs flax 0.12.1 or later ({error}). Install it with: pip install 'fwpkm[nnx]'",
        name=error.name,
    ) from error

import jax
import jax.numpy as jnp
import numpy as np

from fwpkm.backends.jax import FwPKM as JaxFwPKM
from fwpkm.backends.jax.arguments import AnyArray
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State

if not hasattr(nnx.Variable, "get_value"):
    raise ImportError(
        f"fwpkm.integrations.nnx needs flax 0.12.1 or later. Here is {flax.__version__}: pip install 'fwpkm[nnx]'",
        name="flax",
    )

__all__ = ["FwPKM", "InitialMemory", "MemoryState"]


def __dir__() -> list[str]:
    return __all__


class InitialMemory(nnx.Variable):
    """A table that new sequences start from: saved with a model, not trained."""


class MemoryState(nnx.Variable):
    """Where the sequences of a module stand: a :class:`fwpkm.State`, which calls overwrite.

    ``self.state = MemoryState(self.memory.init_state(batch_size))`` in a module, and ``self.memory(x, self.state)`` in
    its call, carry a memory from call to call, as ``nnx.BatchStat`` carries its means. ``get_value()`` is the state,
    ``set_value(layer.init_state(batch_size))`` begins anew.
    """


class FwPKM(nnx.Module):
    """A fast-weight product-key memory between two projections (SPEC.md §7); no residual inside.

    ``y, state = layer(x)`` starts from the layer's initial memory, so nothing leaks between calls;
    ``y, state = layer(x, state)`` reads on. States are pytrees, so they can be what ``nnx.scan`` carries; one that is
    passed as a :class:`MemoryState` is overwritten by what comes after it. A gradient goes back through the states of
    one differentiated function and no further, so a state that an update step takes brings no history along.

    The numbers are those of :class:`fwpkm.backends.jax.FwPKM`, bit for bit.

    Args:
        hidden_size: width of x and y.
        config: the memory's configuration; ``config_fields`` (key_dim, num_subkeys, ...) override it or stand alone.
        gated: weigh reads and writes by a learned gate; without it, reads and values are added.
        value_norm: "zscore" standardises each value over its features, None leaves it.
        learn_memory: the initial tables are ``nnx.Param``; by default they are :class:`InitialMemory`.
        param_dtype: of the slow weights; the tables are float32, or float64 if this is.
        rngs: draws the weights and tables, from its stream "params".
        config_fields: fields of :class:`fwpkm.FwPKMConfig`.

    Raises:
        ValueError: a field breaks its rule; names the field, the rule and the value.
        TypeError: an argument that the layer does not have; says which one was probably meant.
    """

    def __init__(
        self,
        hidden_size: int,
        config: FwPKMConfig | None = None,
        *,
        gated: bool = True,
        value_norm: str | None = "zscore",
        learn_memory: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **config_fields: Any,
    ):
        """Draw all weights."""
        options: dict[str, Any] = {"gated": gated, "value_norm": value_norm, "learn_memory": learn_memory}
        self.layer = JaxFwPKM(hidden_size, config, **options, **config_fields)
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs must be a flax.nnx.Rngs, such as nnx.Rngs(0). Received: {type(rngs).__name__}")
        variables = self.layer.init(rngs.params(), param_dtype)
        self.params = nnx.data(jax.tree.map(nnx.Param, variables["params"]))
        self.buffers = nnx.data(jax.tree.map(InitialMemory, variables["buffers"]))

    @property
    def config(self) -> FwPKMConfig:
        """The configuration of the memory."""
        return self.layer.config

    @property
    def hidden_size(self) -> int:
        """The width of x and y."""
        return self.layer.hidden_size

    @property
    def gated(self) -> bool:
        """Whether a learned gate weighs reads and writes."""
        return self.layer.gated

    @property
    def value_norm(self) -> str | None:
        """What is done to each value: "zscore" or None."""
        return self.layer.value_norm

    @property
    def learn_memory(self) -> bool:
        """Whether the initial tables are ``nnx.Param``."""
        return self.layer.learn_memory

    @overload
    def __call__(
        self, x: AnyArray, state: State[jax.Array] | MemoryState | None = None, mask: AnyArray | None = None,
        cu_seqlens: AnyArray | None = None, update: bool = True, return_state: Literal[True] = True,
        *, return_trace: Literal[False] = False,
    ) -> tuple[jax.Array, State[jax.Array]]: ...  # fmt: skip
    @overload
    def __call__(
        self, x: AnyArray, state: State[jax.Array] | MemoryState | None = None, mask: AnyArray | None = None,
        cu_seqlens: AnyArray | None = None, update: bool = True, return_state: bool = True,
        *, return_trace: bool = False,
    ) -> tuple[Any, ...]: ...  # fmt: skip
    def __call__(
        self,
        x: AnyArray,
        state: State[jax.Array] | MemoryState | None = None,
        mask: AnyArray | None = None,
        cu_seqlens: AnyArray | None = None,
        update: bool = True,
        return_state: bool = True,
        *,
        return_trace: bool = False,
    ) -> tuple[Any, ...]:
        """Read T tokens, writing every chunk that they complete.

        Args:
            x: ``[B, T, hidden_size]``, or packed ``[1, T, hidden_size]``.
            state: where the sequences stand; None starts from the initial memory. A :class:`MemoryState` is set to
                where they stand then.
            mask: ``[B, T]`` bool, False for tokens that are not there (padding, at any place); None for True.
            cu_seqlens: ``[B+1]`` int32: sequence i is the tokens [cu_i, cu_{i+1}) of the packed row.
            update: False only reads and leaves the state as it is. Static under ``nnx.jit``, as are the next two.
            return_state: False where nobody reads on: without a state nothing is kept that only a later call would
                read.
            return_trace: return a third thing, what the call did, as a :class:`fwpkm.LayerTrace`.

        Returns:
            y in the shape of x, in the projections' dtype: NaN for tokens that are not finite, 0 for masked ones; and
            the next :class:`fwpkm.State`, or None without ``return_state``; with ``return_trace`` the trace behind
            them.

        Raises:
            ValueError: an argument does not fit; names it, what was expected and what was received.
        """
        held = state if isinstance(state, MemoryState) else None
        y, after, *trace = self.layer.apply(
            self.variables(),
            x,
            _value(state),
            mask,
            cu_seqlens,
            update,
            return_state or held is not None,
            return_trace=return_trace,
        )
        if held is not None and update:
            held.set_value(after)
        return y, after if return_state else None, *trace

    def decode(
        self, x: AnyArray, state: State[jax.Array] | MemoryState, mask: AnyArray | None = None
    ) -> tuple[jax.Array, State[jax.Array]]:
        """Read one token of each row, overwriting ``state``, which is donated. No gradient.

        One compilation serves all positions and masks. Under ``nnx.jit`` donate the state there too, or its tables are
        copied in every step.

        Args:
            x: ``[B, 1, hidden_size]``.
            state: any that nobody needs any more: its arrays are deleted; ``fwpkm.backends.jax.start_decoding`` copies
                one. A :class:`MemoryState` is set to where the sequences stand then.
            mask: ``[B, 1]`` bool, False for rows that rest; None for True.

        Returns:
            y ``[B, 1, hidden_size]``, and the next state, its arrays in the shapes and dtypes of ``state``.

        Raises:
            ValueError: an argument does not fit; names it, what was expected and what was received.
            TypeError: a gradient through it is asked for.
        """
        y, after = self.layer.decode(self.variables(), x, _value(state), mask)
        if isinstance(state, MemoryState):
            state.set_value(after)
        return y, after

    def init_state(self, batch_size: int) -> State[jax.Array]:
        """The state that a call without one starts from: the initial memory for each row, at position 0."""
        return self.layer.init_state(self.variables(), batch_size)

    def variables(self) -> dict[str, Any]:
        """The arrays of the module, as :class:`fwpkm.backends.jax.FwPKM` takes them."""
        return jax.tree.map(_value, self._variables(), is_leaf=_is_variable)

    def spec(self) -> dict[str, Any]:
        """What a file of this layer's weights must have been saved from."""
        return self.layer.spec()

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical names (SPEC.md §8) and their shapes."""
        return self.layer.tensor_shapes()

    def table_dtype(self) -> str:
        """The widest that a file may hold for them: "float64" where weights and initial tables are, else "float32"."""
        wide = all(x.dtype == "float64" for x in jax.tree.leaves(self.variables()))
        return "float64" if wide else "float32"

    def export_tensors(self, variables: None = None) -> dict[str, np.ndarray]:
        """Weights and initial tables by canonical name; bfloat16 and float16 as float32."""
        return self.layer.export_tensors(self.variables())

    def import_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Fill weights and initial tables in their dtypes; names and shapes are those of :meth:`tensor_shapes`."""
        filled = self.layer.import_tensors(tensors)
        own = jax.tree.leaves(self._variables(), is_leaf=_is_variable)
        for variable, x in zip(own, jax.tree.leaves(filled), strict=True):
            variable.set_value(x.astype(variable.get_value().dtype))

    def _variables(self) -> dict[str, Any]:
        return {"params": self.params, "buffers": self.buffers}


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _value(x: Any) -> Any:
    """What a variable holds; of anything else, itself."""
    return x.get_value() if _is_variable(x) else x
