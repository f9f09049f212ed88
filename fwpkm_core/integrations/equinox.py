"""The layer as a module of Equinox, on the JAX backend."""

from collections.abc import Mapping
from typing import Any, Literal, overload

try:
    import equinox as eqx
except ImportError as error:
    if (error.name or "").partition(".")[0] not in ("equinox", "jax"):
        raise
    raise ImportError(
        f"fwpkm.integrations.equinox needs equinox ({error}). Install it with: pip install 'fwpkm[equinox]'",
        name=error.name,
    ) from error

import jax
import jax.numpy as jnp
import numpy as np

from fwpkm.backends.jax import FwPKM as JaxFwPKM
from fwpkm.backends.jax.arguments import AnyArray
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State

__all__ = ["FwPKM", "trainable"]


def __dir__() -> list[str]:
    return __all__


class FwPKM(eqx.Module):
    """A fast-weight product-key memory between two projections (SPEC.md §7); no residual inside.

    ``y, state = layer(x)`` starts from the layer's initial memory, so nothing leaks between calls;
    ``y, state = layer(x, state)`` reads on. States go in and come out, as those of ``eqx.nn.GRUCell`` do, and are plain
    pytrees. Unlike layers of ``eqx.nn`` it takes the whole batch: rows with a mask, or packed.

    Initial tables get no gradient unless ``learn_memory``, but an optimizer that decays weights would shrink them all
    the same: partition a model by :func:`trainable`.

    The numbers are those of :class:`fwpkm.backends.jax.FwPKM`, bit for bit.

    Args:
        hidden_size: width of x and y.
        config: the memory's configuration; ``config_fields`` (key_dim, num_subkeys, ...) override it or stand alone.
        gated: weigh reads and writes by a learned gate; without it, reads and values are added.
        value_norm: "zscore" standardises each value over its features, None leaves it.
        learn_memory: the initial tables are among the params; by default they are buffers.
        dtype: of the slow weights; the tables are float32, or float64 if this is.
        key: a ``jax.random`` key, which draws the weights and tables.
        config_fields: fields of :class:`fwpkm.FwPKMConfig`.

    Raises:
        ValueError: a field breaks its rule; names the field, the rule and the value.
        TypeError: an argument that the layer does not have; says which one was probably meant.
    """

    params: dict[str, Any]
    buffers: dict[str, Any]
    layer: JaxFwPKM = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        config: FwPKMConfig | None = None,
        *,
        gated: bool = True,
        value_norm: str | None = "zscore",
        learn_memory: bool = False,
        dtype: Any = jnp.float32,
        key: jax.Array,
        **config_fields: Any,
    ):
        """Draw all weights."""
        options: dict[str, Any] = {"gated": gated, "value_norm": value_norm, "learn_memory": learn_memory}
        self.layer = JaxFwPKM(hidden_size, config, **options, **config_fields)
        variables = self.layer.init(key, dtype)
        self.params, self.buffers = variables["params"], variables["buffers"]

    @property
    def config(self) -> FwPKMConfig:
        """The configuration of the memory."""
        return self.layer.config

    @overload
    def __call__(
        self, x: AnyArray, state: State[jax.Array] | None = None, mask: AnyArray | None = None,
        cu_seqlens: AnyArray | None = None, update: bool = True, return_state: Literal[True] = True,
        *, return_trace: Literal[False] = False,
    ) -> tuple[jax.Array, State[jax.Array]]: ...  # fmt: skip
    @overload
    def __call__(
        self, x: AnyArray, state: State[jax.Array] | None = None, mask: AnyArray | None = None,
        cu_seqlens: AnyArray | None = None, update: bool = True, return_state: bool = True,
        *, return_trace: bool = False,
    ) -> tuple[Any, ...]: ...  # fmt: skip
    def __call__(
        self,
        x: AnyArray,
        state: State[jax.Array] | None = None,
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
            state: where the sequences stand; None starts from the initial memory.
            mask: ``[B, T]`` bool, False for tokens that are not there (padding, at any place); None for True.
            cu_seqlens: ``[B+1]`` int32: sequence i is the tokens [cu_i, cu_{i+1}) of the packed row.
            update: False only reads and leaves the state as it is; a Python bool, as are the next two.
            return_state: False where nobody reads on: without a state nothing is kept that only a later call would
                read.
            return_trace: return a third thing, what the call did, as a :class:`fwpkm.LayerTrace`.

        Returns:
            y in the shape of x, in the projections' dtype: NaN for tokens that are not finite, 0 for masked ones; and
            the next state, or None without ``return_state``; with ``return_trace`` the trace behind them.

        Raises:
            ValueError: an argument does not fit; names it, what was expected and what was received.
        """
        told = mask, cu_seqlens, update, return_state
        return self.layer.apply(self.variables(), x, state, *told, return_trace=return_trace)

    def decode(
        self, x: AnyArray, state: State[jax.Array], mask: AnyArray | None = None
    ) -> tuple[jax.Array, State[jax.Array]]:
        """Read one token of each row, overwriting ``state``, which is donated. No gradient.

        One compilation serves all positions and masks. Under ``eqx.filter_jit`` donate the state there too, or its
        tables are copied in every step.

        Args:
            x: ``[B, 1, hidden_size]``.
            state: any that nobody needs any more: its arrays are deleted; ``fwpkm.backends.jax.start_decoding`` copies
                one.
            mask: ``[B, 1]`` bool, False for rows that rest; None for True.

        Returns:
            y ``[B, 1, hidden_size]``, and the next state, its arrays in the shapes and dtypes of ``state``.

        Raises:
            ValueError: an argument does not fit; names it, what was expected and what was received.
            TypeError: a gradient through it is asked for.
        """
        return self.layer.decode(self.variables(), x, state, mask)

    def init_state(self, batch_size: int) -> State[jax.Array]:
        """The state that a call without one starts from: the initial memory for each row, at position 0."""
        return self.layer.init_state(self.variables(), batch_size)

    def variables(self) -> dict[str, Any]:
        """The arrays of the module, as :class:`fwpkm.backends.jax.FwPKM` takes them; no gradient enters the buffers."""
        return {"params": self.params, "buffers": jax.lax.stop_gradient(self.buffers)}

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

    def import_tensors(self, tensors: Mapping[str, np.ndarray]) -> "FwPKM":
        """A layer of these tensors in this one's dtypes; names and shapes are those of :meth:`tensor_shapes`."""
        filled, own = self.layer.import_tensors(tensors), {"params": self.params, "buffers": self.buffers}
        form: Any = jax.tree.structure(filled)
        if jax.tree.structure(own) != form:
            raise ValueError(
                "layer must hold its weights and tables, and no others: load into a whole layer, and eqx.partition it "
                f"then. Received: {len(jax.tree.leaves(own))} arrays in place of {len(jax.tree.leaves(filled))}"
            )
        filled = jax.tree.map(lambda new, old: new.astype(old.dtype), filled, own)
        return eqx.tree_at(lambda layer: [layer.params, layer.buffers], self, [filled["params"], filled["buffers"]])


def trainable(model: Any) -> Any:
    """Which leaves of a model an optimizer may change: its floating arrays, less memories' initial tables and states.

    ``params, rest = eqx.partition(model, trainable(model))``; the tables of a layer with ``learn_memory=True`` are
    among the params.

    Args:
        model: any pytree that holds :class:`FwPKM` layers, and maybe a :class:`fwpkm.State` where one stands.

    Returns:
        a pytree of bools in the structure of ``model``.
    """

    def mark(node: Any) -> Any:
        marks = jax.tree.map(lambda x: eqx.is_inexact_array(x) and not isinstance(node, State), node)
        if not isinstance(node, FwPKM):
            return marks
        return eqx.tree_at(lambda layer: layer.buffers, marks, jax.tree.map(lambda _: False, node.buffers))

    return jax.tree.map(mark, model, is_leaf=lambda node: isinstance(node, FwPKM | State))
