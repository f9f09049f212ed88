"""The JAX layer (SPEC.md §7): pure functions of plain pytrees, to be used alone or inside a Flax or Equinox module."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fwpkm import validation
from fwpkm.backends.jax import ops
from fwpkm.backends.jax.arguments import AnyArray, takes_numpy
from fwpkm.backends.jax.checks import check_dtype, check_known, check_sizes, in_64_bits
from fwpkm.backends.jax.decoding import decode
from fwpkm.backends.jax.rows import begin, init_state
from fwpkm.backends.jax.streams import inside
from fwpkm.backends.jax.tokens import finite_rows
from fwpkm.backends.jax.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import LayerTrace, Memory, State
from fwpkm.files import layer_spec
from fwpkm.rules import mix, rms_norm, traced_gate, zscore
from fwpkm.tokens import Tokens

Variables = dict[str, Any]


class FwPKM:
    """A fast-weight product-key memory between two projections (SPEC.md §7); no residual inside.

    ``variables = layer.init(key)`` draws ``{"params": ..., "buffers": ...}``; differentiate with respect to the params
    alone. ``y, state = layer.apply(variables, x)`` starts from the layer's initial memory, so nothing leaks between
    calls; ``y, state = layer.apply(variables, x, state)`` reads on. A state that is passed into the
    differentiated function brings no history along; where one such function reads several pieces,
    ``fwpkm.backends.jax.detach(state)`` between them ends it.

    The layer itself holds no arrays: it is hashable and equal to another of the same arguments, so that ``jax.jit`` may
    take it as a static argument. So its arguments are fixed: compiled calls would go on with the old ones.

    Args:
        hidden_size: width of x and y.
        config: the memory's configuration; ``config_fields`` (key_dim, num_subkeys, ...) override it or stand alone.
        gated: weigh reads and writes by a learned gate; without it, reads and values are added.
        value_norm: "zscore" standardises each value over its features, None leaves it.
        learn_memory: the initial tables are among the params; by default they are buffers.
        config_fields: fields of :class:`fwpkm.FwPKMConfig`.

    Raises:
        ValueError: a field breaks its rule; names the field, the rule and the value.
        TypeError: an argument that the layer does not have; says which one was probably meant.
    """

    hidden_size, config, gated, value_norm, learn_memory = (
        validation.Fixed("which takes this one's variables where their form is the same") for _ in range(5)
    )

    def __init__(
        self,
        hidden_size: int,
        config: FwPKMConfig | None = None,
        *,
        gated: bool = True,
        value_norm: str | None = "zscore",
        learn_memory: bool = False,
        **config_fields: Any,
    ):
        """Check the arguments; nothing is drawn before :meth:`init`."""
        self._config = validation.layer_config(
            hidden_size, config, value_norm, config_fields, gated=gated, learn_memory=learn_memory
        )
        self._hidden_size, self._gated = hidden_size, gated
        self._value_norm, self._learn_memory = value_norm, learn_memory

    def __eq__(self, other: object) -> bool:
        """Whether the arguments are the same."""
        return isinstance(other, FwPKM) and self._key() == other._key()

    def __hash__(self) -> int:
        """Of the arguments."""
        return hash(self._key())

    def __repr__(self) -> str:
        """The arguments."""
        flags = f"gated={self.gated}, value_norm={self.value_norm!r}, learn_memory={self.learn_memory}"
        return f"FwPKM({self.hidden_size}, {self.config}, {flags})"

    def init(self, key: Array, dtype: Any = jnp.float32) -> Variables:
        """Draw weights (normal, std 0.02; biases 0, norms 1) and initial tables (SPEC.md §7).

        Args:
            key: a ``jax.random`` key.
            dtype: of the slow weights; the tables are float32, or float64 if this is.

        Returns:
            ``{"params": ..., "buffers": {"memory": Memory}}``, or with ``learn_memory`` the memory among the params and
            no buffers. The params are a dict by the first part of the canonical names: ``params["query_proj"]`` holds
            "weight" ``[out, in]`` and "bias" ``[out]``, ``params["query_norm"]`` "weight" ``[in]``.

        Raises:
            ValueError: float64 while JAX is not in 64-bit mode.
        """
        check_dtype(dtype)
        params: Variables = {}
        wide = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
        *keys, first, second = jax.random.split(key, 6)
        for (name, (width, size)), each in zip(self._projections().items(), keys):
            params[f"{name}_norm"] = {"weight": jnp.ones(width, dtype)}
            weight = (0.02 * jax.random.normal(each, (size, width))).astype(dtype)
            params[f"{name}_proj"] = {"weight": weight, "bias": jnp.zeros(size, dtype)}
        cfg = self.config
        half = (cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2)
        bound = cfg.key_dim**-0.5
        memory = Memory(
            jax.random.uniform(first, half, wide, -bound, bound),
            cfg.value_dim**-0.5 * jax.random.normal(second, (cfg.num_slots, cfg.value_dim), wide),
        )
        if self.learn_memory:
            return {"params": {**params, "memory": memory}, "buffers": {}}
        return {"params": params, "buffers": {"memory": memory}}

    @overload
    def apply(
        self, variables: Variables, x: AnyArray, state: State[Array] | None = None, mask: AnyArray | None = None,
        cu_seqlens: AnyArray | None = None, update: bool = True, return_state: Literal[True] = True,
        *, return_trace: Literal[False] = False, implementation: str | None = None,
    ) -> tuple[Array, State[Array]]: ...  # fmt: skip
    @overload
    def apply(
        self, variables: Variables, x: AnyArray, state: State[Array] | None = None, mask: AnyArray | None = None,
        cu_seqlens: AnyArray | None = None, update: bool = True, return_state: bool = True,
        *, return_trace: bool = False, implementation: str | None = None,
    ) -> tuple[Any, ...]: ...  # fmt: skip
    @takes_numpy
    def apply(
        self,
        variables: Variables,
        x: AnyArray,
        state: State[Array] | None = None,
        mask: AnyArray | None = None,
        cu_seqlens: AnyArray | None = None,
        update: bool = True,
        return_state: bool = True,
        *,
        return_trace: bool = False,
        implementation: str | None = None,
    ) -> tuple[Any, ...]:
        """Read T tokens, writing every chunk that they complete.

        Args:
            variables: as :meth:`init` returns them.
            x: ``[B, T, hidden_size]``, or packed ``[1, T, hidden_size]``.
            state: where the sequences stand; None starts from the initial memory.
            mask: ``[B, T]`` bool, False for tokens that are not there (padding, at any place); None for True.
            cu_seqlens: ``[B+1]`` int32: sequence i is the tokens [cu_i, cu_{i+1}) of the packed row. Offsets that are
                traced and not legal give NaN in every token and leave the state.
            update: False only reads and leaves the state as it is. Static under ``jax.jit``, as are the next two.
            return_state: False where nobody reads on: without a state nothing is kept that only a later call would
                read.
            return_trace: return a third thing, what the call did, as a :class:`fwpkm.LayerTrace`.
            implementation: of the memory, as in :func:`fwpkm.backends.jax.apply`.

        Returns:
            y in the shape of x, in the projections' dtype: NaN for tokens that are not finite, 0 for masked ones; and
            the next state, or None without ``return_state``; with ``return_trace`` the trace behind them.

        Raises:
            ValueError: an argument does not fit; names it, what was expected and what was received.
        """
        for name, flag in {"update": update, "return_state": return_state, "return_trace": return_trace}.items():
            validation.check_flag(name, flag)
        check_sizes("x", x)
        validation.check_x(x, None, self.hidden_size, SELF.arrays)
        if mask is not None:
            validation.check_array("mask", mask, [("B", x.shape[0]), ("T", x.shape[1])], "bool", SELF.arrays)
        there = mask
        if cu_seqlens is not None:
            validation.check_packed("x", x, cu_seqlens, SELF.arrays)
            there = inside(cu_seqlens, x.shape[1])
            there = there if mask is None else mask & there
        tokens = self._tokens(variables, x, mask, there)
        if update:
            validation.check_not_rounded(state, validation.dtype_name(tokens.query))
        start: Any = state
        ends: Any = cu_seqlens
        if state is None:
            start = Memory(*(table[None] for table in self._memory(variables)))
        if state is None and return_state:
            start = begin(self.config, start, len(x) if cu_seqlens is None else len(cu_seqlens) - 1, tokens.query)
        options: Any = {"update": update, "implementation": implementation}
        read, state, trace = ops.apply(self.config, start, **tokens.present(), cu_seqlens=ends, **options)
        y, state = self._output(variables, read, tokens, there), state if return_state else None
        if not return_trace:
            return y, state
        gate = None if tokens.gate is None else jax.lax.stop_gradient(tokens.gate).astype(trace.weights.dtype)
        return y, state, LayerTrace(*trace, gate=traced_gate(jnp, gate, trace.weights))

    @takes_numpy
    def decode(
        self,
        variables: Variables,
        x: AnyArray,
        state: State[Array],
        mask: AnyArray | None = None,
        *,
        implementation: str | None = None,
    ) -> tuple[Array, State[Array]]:
        """Read one token of each row, overwriting ``state``, which is donated. No gradient.

        One compilation serves all positions and masks. Under ``jax.jit`` donate the state there too, or its tables are
        copied in every step.

        Args:
            variables: as :meth:`init` returns them.
            x: ``[B, 1, hidden_size]``.
            state: of ``fwpkm.backends.jax.start_decoding``, or any that nobody needs any more: its arrays are deleted.
            mask: ``[B, 1]`` bool, False for rows that rest; None for True.
            implementation: of the memory, as in :func:`fwpkm.backends.jax.apply`.

        Returns:
            y ``[B, 1, hidden_size]``, and the next state, its arrays in the shapes and dtypes of ``state``.

        Raises:
            ValueError: an argument does not fit; names it, what was expected and what was received.
            TypeError: a gradient through it is asked for.
        """
        validation.check_x(x, 1, self.hidden_size, SELF.arrays)
        if mask is not None:
            validation.check_array("mask", mask, [("B", x.shape[0]), ("T", 1)], "bool", SELF.arrays)
        tokens = self._tokens(variables, x, mask, mask)
        validation.check_not_rounded(state, validation.dtype_name(tokens.query))
        read, state = decode(self.config, state, **tokens.present(), implementation=implementation)
        return self._output(variables, read, tokens, mask), state

    def _tokens(self, variables: Variables, x: Any, mask: Any, there: Any) -> Tokens:
        """What the tokens bring to the memory; ``there`` is the mask less what no packed sequence holds."""
        params = self._checked(variables)["params"]
        x = x.astype(params["query_proj"]["weight"].dtype)
        # A token that is not finite must not reach the projections: their weights' gradients would be 0 · NaN. Nor must
        # one that is not there.
        finite = finite_rows(x)
        dead = ~finite if there is None else ~finite & there
        x = jnp.where((finite if there is None else finite & there)[..., None], x, 0)
        query, value = (_project(params, name, x) for name in ("query", "value"))
        if self.value_norm == "zscore":
            value = zscore(jnp, _wide(value))
        gate = jax.nn.sigmoid(_project(params, "gate", x)[..., 0]) if self.gated else None
        # The memory must see that a token is dead, as it takes its position.
        return Tokens(query, jnp.where(dead[..., None], jnp.nan, value), gate, mask)

    def _output(self, variables: Variables, read: Array, tokens: Tokens, there: Any) -> Array:
        """y from v̂: the mixture with the values, normalised and projected; NaN for dead tokens, 0 for masked ones."""
        finite = finite_rows(read)
        read, value = (jnp.where(finite[..., None], z, 0) for z in (read, tokens.value))
        parts = (z if z is None else _wide(z) for z in (tokens.gate, read, value))
        y = _project(variables["params"], "output", mix(*parts).astype(tokens.query.dtype))
        y = jnp.where(finite[..., None], y, jnp.nan)
        return y if there is None else jnp.where(there[..., None], y, 0)

    @takes_numpy
    def init_state(self, variables: Variables, batch_size: int) -> State[Array]:
        """The state that a call without one starts from: the initial memory for each row, at position 0."""
        memory = self._memory(self._checked(variables))
        return init_state(self.config, Memory(*(table[None] for table in memory)), batch_size)

    def spec(self) -> dict[str, Any]:
        """What a file of this layer's weights must have been saved from."""
        return layer_spec(self.hidden_size, self.gated, self.value_norm, self.config)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical names (SPEC.md §8) and their shapes."""
        return {name: tuple(x.shape) for name, x in self._flat(_form(self)).items()}

    def table_dtype(self) -> str:
        """The widest that initial tables can have here: "float64" in JAX's 64-bit mode, else "float32"."""
        return "float64" if in_64_bits() else "float32"

    @takes_numpy
    def export_tensors(self, variables: Variables | None = None) -> dict[str, np.ndarray]:
        """Weights and initial tables by canonical name; bfloat16 and float16 as float32.

        Raises:
            ValueError: ``variables`` are missing, or are not those of such a layer.
        """
        tensors = {name: ops.to_numpy(x) for name, x in self._flat(self._checked(variables)).items()}
        return {name: x.astype(np.float32) if x.dtype == np.float16 else x for name, x in tensors.items()}

    def import_tensors(self, tensors: Mapping[str, np.ndarray]) -> Variables:
        """New variables from tensors whose names and shapes are those of :meth:`tensor_shapes`."""
        variables = _form(self)
        leaves = [ops.asarray(tensors[name], tensors[name].dtype.name) for name in self._flat(variables)]
        return jax.tree.unflatten(jax.tree.structure(variables), leaves)

    def _projections(self) -> dict[str, tuple[int, int]]:
        """Widths in and out of each projection."""
        cfg, width = self.config, self.hidden_size
        gate = {"gate": (width, 1)} if self.gated else {}
        query, value = (width, cfg.num_heads * cfg.key_dim), (width, cfg.value_dim)
        return {"query": query, "value": value, **gate, "output": (cfg.value_dim, width)}

    def _memory(self, variables: Variables) -> Memory:
        return variables["params" if self.learn_memory else "buffers"]["memory"]

    def _flat(self, variables: Variables) -> dict[str, Array]:
        """Leaves by canonical name, in the order of the pytree."""
        leaves = jax.tree_util.tree_leaves_with_path(variables)
        names = (".".join(getattr(step, "key", None) or step.name for step in path[1:]) for path, _ in leaves)
        return dict(zip(names, (leaf for _, leaf in leaves)))

    def _checked(self, variables: Any) -> Variables:
        """``variables``, if they have the form that :meth:`init` gives them: its tree, shapes and floating dtypes."""
        wanted = _form(self)
        tree: Any = jax.tree.structure(wanted)
        if jax.tree.structure(variables) != tree:
            raise ValueError(
                f"variables must have the form that layer.init(key) returns, {tree}. "
                f"Received: {jax.tree.structure(variables)}"
            )
        check_known(*jax.tree.leaves(variables))
        for (name, x), like in zip(self._flat(variables).items(), jax.tree.leaves(wanted)):
            if x.shape != like.shape or not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(
                    f"{name} of the variables must have shape {like.shape} and a floating dtype. "
                    f"Received: shape {x.shape}, dtype {x.dtype}"
                )
        return variables

    def _key(self) -> tuple[Any, ...]:
        return self.hidden_size, self.config, self.gated, self.value_norm, self.learn_memory


@functools.lru_cache(64)
def _form(layer: FwPKM) -> Any:
    """The tree of shapes that ``init`` gives; to trace it takes longer than a call of the memory."""
    return jax.eval_shape(layer.init, jax.random.key(0))


def _project(params: Variables, name: str, x: Array) -> Array:
    """W·RMSNorm(x) + b."""
    norm, proj = params[f"{name}_norm"], params[f"{name}_proj"]
    normed = rms_norm(jnp, _wide(x), _wide(norm["weight"])[None, None]).astype(x.dtype)
    return normed @ proj["weight"].T + proj["bias"][None, None]


def _wide(x: Array) -> Array:
    """At least float32, whatever the projections are."""
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)
