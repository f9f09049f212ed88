"""The Keras layer (SPEC.md §7), on the tensorflow, jax and torch backends of Keras 3."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, initializers, ops

from fwpkm import validation
from fwpkm.backends.keras import checks, native, segments
from fwpkm.backends.keras.layout import as_state, copies_of, fill, specs, trace_spec
from fwpkm.backends.keras.tokens import blank, dtype_of, finite_rows, nan_where
from fwpkm.backends.keras.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import LayerTrace, Memory, State, Trace, memory_specs
from fwpkm.files import layer_spec
from fwpkm.rules import mix, rms_norm, traced_gate, zscore
from fwpkm.tokens import Array, Tokens

_ELSEWHERE = {
    "hidden_size": "it is taken from the input, whose last axis it is",
    "go_backwards": "it reads forwards. In place of Bidirectional, turn x and y by keras.ops.flip(..., axis=1)",
    "config": "give the fields of a configuration by name, as **dataclasses.asdict(config)",
}
"""What layers of other frameworks are told, and how this one learns it."""
_CONFIG = "config"
"""The name of the configuration beside the arrays of a layer in Keras's files."""


@keras.saving.register_keras_serializable(package="fwpkm")
class FwPKM(keras.layers.Layer):
    """A fast-weight product-key memory between two projections (SPEC.md §7); no residual inside.

    ``y = layer(x)``: x and y are ``[B, T, hidden_size]``, T may be None. Each call starts from the layer's initial
    memory, so nothing leaks between calls or between the rows of a batch. To read on, ask for the state with
    ``return_state=True`` and pass it as ``initial_state``, or let the layer keep it with ``stateful=True``.

    A mask, such as ``Embedding(mask_zero=True)`` makes, takes tokens out of their sequence, wherever they stand: y is
    that of each row's other tokens read alone, and 0 for these. It is passed on with y; join y to x by
    ``keras.layers.Add``, as ``x + y`` has none. ``segment_ids`` packs several texts
    into a row, each with a memory of its own. Under a mixed precision policy the projections run in its compute dtype;
    tables and states stay float32 (float64 under the float64 policy).

    On torch and jax the memory is the native backend's. On tensorflow it is written in keras.ops, and every write
    copies the value table.

    Args:
        gated: weigh reads and writes by a learned gate; without it, reads and values are added.
        value_norm: "zscore" standardises each value over its features, None leaves it.
        learn_memory: train the initial tables; by default they are non-trainable weights.
        return_state: return ``[y, *state]``, the arrays in the order and shapes of :class:`fwpkm.State`.
        stateful: each call goes on where the last one stopped, until :meth:`reset_state`; every batch must have the
            size that the layer was built with. The state is among ``variables``: a saved model goes on as well. Nothing
            else begins anew: pass :class:`ResetState` to ``fit``, ``evaluate`` and ``predict``, or each goes on too.
        trainable: as in any Keras layer.
        dtype: as in any Keras layer; it may be a policy.
        name: as in any Keras layer.
        config_fields: fields of :class:`fwpkm.FwPKMConfig`, such as key_dim or num_subkeys.

    Raises:
        ValueError: a field breaks its rule; names the field, the rule and the value.
        TypeError: an argument that the layer does not have; says which one was probably meant.
    """

    gated, value_norm, learn_memory, return_state, stateful = (  # compiled functions would go on with the old ones
        validation.Fixed("which takes this one's weights") for _ in range(5)
    )

    def __init__(
        self,
        *,
        gated: bool = True,
        value_norm: str | None = "zscore",
        learn_memory: bool = False,
        return_state: bool = False,
        stateful: bool = False,
        trainable: bool = True,
        dtype: Any = None,
        name: str | None = None,
        **config_fields: Any,
    ):
        """See the class."""
        for argument, instead in _ELSEWHERE.items():
            if argument in config_fields:
                raise TypeError(f"FwPKM takes no argument {argument!r} in Keras: {instead}")
        # autocast would round the tables of a passed state, and of weights that allow it: the layer casts for itself.
        super().__init__(trainable=trainable, dtype=dtype, name=name, autocast=False)
        self._config = validation.layer_config(  # the width comes with build
            1, None, value_norm, config_fields,
            gated=gated, learn_memory=learn_memory, return_state=return_state, stateful=stateful,
        )  # fmt: skip
        validation.check_served(self._config, SELF)
        if learn_memory and stateful:
            raise ValueError(
                "learn_memory must be False with stateful=True, where batches pass no gradient to the initial memory. "
                "Received: learn_memory=True"
            )
        self._gated, self._value_norm, self._learn_memory = gated, value_norm, learn_memory
        self._return_state, self._stateful = return_state, stateful
        self.supports_masking = True

    @property
    def config(self) -> FwPKMConfig:
        """The configuration of the memory."""
        return self._config

    def build(self, input_shape: Sequence[Any]) -> None:
        """Make the weights for inputs ``[B, T, hidden_size]``; B may be None unless the layer is stateful.

        Raises:
            ValueError: another rank, an unknown hidden_size, an unknown B where the layer is stateful, a
                ``keras.distribution`` that Keras does not carry out or that deals slots out to devices, or float64 on a
                JAX that is not in 64-bit mode.
        """
        if len(input_shape) != 3 or input_shape[2] is None:
            raise ValueError(
                f"x must have shape [B, T, hidden_size] with a known hidden_size. Received: shape {tuple(input_shape)}"
            )
        if self.stateful and input_shape[0] is None:
            raise ValueError(
                "a stateful layer must know its batch size when it is built: use keras.Input(batch_shape=...), or call "
                f"the layer on a batch first. Received: shape {tuple(input_shape)}"
            )
        native.check_dtype(self.variable_dtype)
        cfg, hidden = self._config, input_shape[2]
        self.hidden_size, self.batch_size = hidden, input_shape[0]
        # Weights have the names and shapes of SPEC.md §8, "." written as "_".
        widths = {"query": (cfg.num_heads * cfg.key_dim, hidden), "value": (cfg.value_dim, hidden)}
        widths |= {"gate": (1, hidden)} if self.gated else {}
        for part, (out, into) in (widths | {"output": (hidden, cfg.value_dim)}).items():
            self._add(f"{part}_norm.weight", (into,), initializers.Ones())
            self._add(f"{part}_proj.weight", (out, into), initializers.RandomNormal(stddev=0.02))
            self._add(f"{part}_proj.bias", (out,), initializers.Zeros())
        bound, dtype = cfg.key_dim**-0.5, self._table_dtype
        start = Memory(initializers.RandomUniform(-bound, bound), initializers.RandomNormal(stddev=cfg.value_dim**-0.5))
        tables = {}
        for name, spec in memory_specs(cfg, 1)._asdict().items():
            options = {"dtype": dtype, "trainable": self.learn_memory, "autocast": False}
            tables[f"memory.{name}"] = self._add(f"memory.{name}", spec.shape[1:], getattr(start, name), **options)
        for name, spec in specs(cfg, self.batch_size).items() if self.stateful else ():
            initial = copies_of(tables[name]) if name in tables else initializers.Zeros()
            options = {"dtype": dtype_of(spec.kind, dtype), "trainable": False, "autocast": False}
            self._add(f"state.{name}", spec.shape, initial, **options)
        native.check_distribution(self.variables)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``call``, with ``segment_ids`` and states as they are before Keras makes tensors of them, which cuts both."""
        state = args[3] if len(args) > 3 else kwargs.get("initial_state")
        checks.check_state(self, state)
        if state is not None and not kwargs.get("_decoding"):
            native.share(as_state(state))
        if len(args) > 2:
            args = (*args[:2], segments.as_ids(args[2]), *args[3:])
        if "segment_ids" in kwargs:
            kwargs["segment_ids"] = segments.as_ids(kwargs["segment_ids"])
        return super().__call__(*args, **kwargs)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        """What Keras calls instead of ``call`` inside ``keras.RematScope``: a backward then computes it anew.

        Raises:
            ValueError: the layer is stateful, and would read every token twice; or on tensorflow an initial state,
                whose gradient would be lost.
        """
        if kwargs.get("_decoding"):
            return layer_call  # without a backward there is nothing to compute anew
        call = super().rematerialized_call(native.without_names(self, layer_call, args, kwargs))
        return lambda *_, **__: call(args[0])

    def call(
        self,
        x: Array,
        mask: Array | None = None,
        segment_ids: Array | None = None,
        initial_state: Any = None,
        training: bool | None = None,
        update: bool = True,
        x_mask: Array | None = None,
        return_trace: bool = False,
        _decoding: bool = False,
    ) -> Any:
        """Read T tokens, writing every chunk that they complete.

        Args:
            x: ``[B, T, hidden_size]``.
            mask: ``[B, T]`` bool, False for tokens that are not there (padding, at any place); None for True.
            segment_ids: ``[B, T]`` integers that pack several sequences into a row: 0 is padding, each run of one other
                id is a sequence that starts from the initial memory; None makes each row one sequence.
            initial_state: where the sequences stand, as a :class:`fwpkm.State` or the list of its arrays; None starts
                from the initial memory, or where the last call of a stateful layer stopped.
            training: makes no difference; the memory is written in training and at inference.
            update: False only reads and leaves the state as it is.
            x_mask: stands for a mask that is None; Keras fills in the one that x carries.
            return_trace: return what the call did as well, as a :class:`fwpkm.LayerTrace`; not beside ``segment_ids``.

        Returns:
            y ``[B, T, hidden_size]`` in the compute dtype, NaN for tokens that are not finite, 0 for those that are not
            there; with ``return_state`` ``[y, *state]``; with ``return_trace`` a list whose last entry is the trace.

        Raises:
            ValueError: an argument does not fit; names it, what was expected and what was received.
        """
        validation.check_flag("update", update)
        checks.check_call(self, x, mask, segment_ids, initial_state, return_trace)
        mask = segments.flags(
            x, x_mask if mask is None else mask
        )  # Keras fills in mask where x is the only array, else x_mask
        x = native.whole_batch(x, self.batch_size) if self.stateful else x
        there = mask if segment_ids is None else segments.there(segment_ids, mask)
        tokens = self._tokens(ops.cast(x, self.compute_dtype), there)
        if _decoding:
            read, after = native.decode(self._config, initial_state, tokens.map(ops.stop_gradient))
            return [ops.stop_gradient(self._output(read, tokens)), *after.arrays().values()]
        read, state, trace = self._read(tokens, segment_ids, initial_state, update)
        outputs = [self._output(read, tokens)]
        if state is not None:
            if self.stateful and update:
                self._keep(native.after(read, native.functions().detach(state)))
            outputs += state.arrays().values() if self.return_state else ()
        if return_trace:
            assert trace is not None
            outputs.append(self._trace(trace, tokens.gate))
        return outputs[0] if len(outputs) == 1 else outputs

    def decode(self, x: Array, state: Any, mask: Array | None = None) -> list[Array]:
        """Read one token of each row, using up ``state``: where it can be, it is overwritten. No gradient.

        On torch and jax it is the native backend's decode, which writes the tables in place. On torch those of a state
        that neither decode nor ``start_decoding`` returned, which an older one may share, are copied once, by the first
        step. On jax under ``jax.jit`` donate the state, or the tables are copied. On tensorflow a chunk's end copies
        the table, and one ``tf.function`` around the step of a model serves all positions and masks.

        Args:
            x: ``[B, 1, hidden_size]``.
            state: where the sequences stand, as a :class:`fwpkm.State` or the list of its arrays. It is used up, on jax
                with older ones that share its tables: go on from the one that comes back, and keep others by
                ``start_decoding``, which copies.
            mask: ``[B, 1]`` bool, False for rows that rest; None for the mask that x carries, or for True.

        Returns:
            ``[y, *state]``: y ``[B, 1, hidden_size]`` in the compute dtype, which carries the mask on, and where the
            sequences stand then.

        Raises:
            ValueError: an argument does not fit; names it, what was expected and what was received.
        """
        self._weight("memory.keys")  # which says so where the layer is not built
        x = ops.convert_to_tensor(x)
        validation.check_x(x, 1, self.hidden_size, object)
        state = as_state(state, "state")
        checks.check_state(self, state, "state")
        # As a call of Keras, which alone knows the mask that x carries, and which hands it on with y.
        return self(x, mask=mask, initial_state=state, _decoding=True)

    def _tokens(self, x: Array, mask: Array | None) -> Tokens:
        """What the tokens bring to the memory."""
        # What is not finite must not reach the projections: their weights' gradients would be 0 · NaN. Nor must a
        # token that is not there.
        x = x if mask is None else blank(x, ~mask)
        dead = ~finite_rows(x)
        x = blank(x, dead)
        query, value = self._project("query", x), self._project("value", x)
        value = zscore(ops, _wide(value)) if self.value_norm == "zscore" else value
        value = nan_where(dead, value)  # so that the memory sees it: such a token takes its position
        gate = ops.sigmoid(self._project("gate", x)[..., 0]) if self.gated else None
        return Tokens(query, value, gate, mask)

    def _read(
        self, tokens: Tokens, segment_ids: Any, initial_state: Any, update: bool
    ) -> tuple[Array, State | None, Trace | None]:
        """What the tokens read, the state afterwards if somebody reads on, and the trace unless they are packed."""
        cfg = self._config
        if segment_ids is not None:
            return segments.read(cfg, self._initial_memory(), tokens, segment_ids, update), None, None
        if initial_state is not None:
            return native.apply(cfg, as_state(initial_state), tokens, update)
        if not (self.stateful or self.return_state):
            return native.apply(cfg, self._initial_memory(), tokens, update)
        state = self.state if self.stateful else self.init_state(ops.shape(tokens.query)[0])
        return native.apply(cfg, state, tokens, update, owned=True)

    def _output(self, read: Array, tokens: Tokens) -> Array:
        """y from v̂: the mixture with the values, normalised and projected; NaN for dead tokens, 0 for masked ones."""
        dead, dtype = ~finite_rows(read), tokens.value.dtype
        gate = None if tokens.gate is None else ops.cast(tokens.gate, dtype)
        mixed = mix(gate, ops.cast(blank(read, dead), dtype), blank(tokens.value, dead))
        y = nan_where(dead, self._project("output", mixed))
        return y if tokens.mask is None else blank(y, ~tokens.mask)

    def _trace(self, trace: Trace, gate: Array | None) -> LayerTrace:
        """A record of a call: slot ids as int32, which torch has as int64, and no gradient into the gate."""
        gate = traced_gate(ops, None if gate is None else ops.stop_gradient(gate), trace.weights)
        return LayerTrace(*trace._replace(slots=ops.cast(trace.slots, "int32")), gate=gate)

    def compute_output_spec(
        self,
        x: KerasTensor,
        mask: Any = None,
        segment_ids: Any = None,
        initial_state: Any = None,
        training: Any = None,
        update: bool = True,
        x_mask: Any = None,
        return_trace: bool = False,
    ) -> Any:
        """What ``call`` returns for symbolic inputs; no operation runs."""
        checks.check_call(self, x, mask, segment_ids, initial_state, return_trace)
        outputs: list[Any] = [KerasTensor(x.shape, dtype=self.compute_dtype)]
        dtype = self._table_dtype if initial_state is None else as_state(initial_state).memory.keys.dtype
        if self.return_state:
            state = specs(self._config, x.shape[0]).values()
            outputs += [KerasTensor(spec.shape, dtype=dtype_of(spec.kind, dtype)) for spec in state]
        if return_trace:
            outputs.append(trace_spec(self._config, x.shape, dtype))
        return outputs[0] if len(outputs) == 1 else outputs

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Any:
        """The shape of y, or of ``[y, *state]``."""
        shape = tuple(input_shape)
        if not self.return_state:
            return shape
        return [shape, *(spec.shape for spec in specs(self._config, shape[0]).values())]

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """The mask goes on with y; the arrays of a state have none."""
        return [previous_mask, *[None] * len(specs(self._config, None))] if self.return_state else previous_mask

    def get_config(self) -> dict[str, Any]:
        """Every argument of the layer."""
        names = ("gated", "value_norm", "learn_memory", "return_state", "stateful")
        own = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **dataclasses.asdict(self._config), **own}

    def init_state(self, batch_size: int) -> State:
        """The state that a call without one starts from: the initial memory for each row, at position 0.

        Raises:
            ValueError: the layer is not built.
        """
        return native.functions().init_state(self._config, self._initial_memory(), batch_size)

    @property
    def state(self) -> State:
        """Where a stateful layer stands: a copy, since torch overwrites its weights in place.

        Raises:
            ValueError: the layer is not stateful, or not built.
        """
        if not self.stateful:
            raise ValueError("only a layer with stateful=True keeps a state. Received: stateful=False")
        self._weight("memory.keys")  # which says so where the layer is not built
        return as_state([ops.stop_gradient(ops.copy(weight)) for weight in self._state_weights()])

    def reset_state(self) -> None:
        """Let a stateful layer start from its initial memory again; nothing happens before it is built.

        Raises:
            ValueError: the layer is not stateful.
        """
        if not self.stateful:
            raise ValueError("reset_state needs a layer with stateful=True. Received: stateful=False")
        if self.built:
            self._keep(native.functions().detach(self.init_state(self.batch_size)))

    @property
    def weights(self) -> list[keras.Variable]:
        """Every weight but the state of a stateful layer, so that they fit a layer with another batch size, or none.

        The state is among ``variables``, and in ``.keras`` and ``.weights.h5`` files.
        """
        kept = {id(x) for x in self._state_weights()}
        return [x for x in super().weights if id(x) not in kept]

    def load_own_variables(self, store: Any) -> None:
        """Fill the layer from a model's file, which may be that of a stateful layer or not, of any batch size.

        A stateful layer goes on from a state of its own batch size and configuration in the file; without one it starts
        anew. Files of 0.2 do not tell the configuration.

        Raises:
            ValueError: the file has another number of weights, other shapes, or a configuration with fields that this
                version does not know; nothing is filled.
        """
        arrays = {name: store[name] for name in store.keys()}  # noqa: SIM118 (not a mapping)
        saved = arrays.pop(_CONFIG, None)
        same = saved is None or FwPKMConfig.from_json(bytes(np.asarray(saved)).decode()) == self._config
        if not fill(self.weights, self._state_weights() if same else [], arrays) and self.stateful:
            self.reset_state()

    def save_own_variables(self, store: Any) -> None:
        """Put the variables into a model's file, and beside a state the configuration that it was made with."""
        super().save_own_variables(store)
        if self.stateful:
            store[_CONFIG] = np.frombuffer(self._config.to_json().encode(), np.uint8)

    def spec(self) -> dict[str, Any]:
        """What a file of this layer's weights must have been saved from."""
        self._weight("memory.keys")
        return layer_spec(self.hidden_size, self.gated, self.value_norm, self._config)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical names (SPEC.md §8) and their shapes."""
        return {name: tuple(weight.shape) for name, weight in self._canonical().items()}

    def table_dtype(self) -> str:
        """Of the initial tables: "float32" or "float64"."""
        return keras.backend.standardize_dtype(self._weight("memory.values").dtype)

    def export_tensors(self, variables: None = None) -> dict[str, np.ndarray]:
        """Weights and initial tables by canonical name; bfloat16 and float16 as float32."""
        to_numpy = native.functions().to_numpy
        tensors = {name: to_numpy(ops.convert_to_tensor(weight)) for name, weight in self._canonical().items()}
        return {name: x.astype(np.float32) if x.dtype == np.float16 else x for name, x in tensors.items()}

    def import_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Fill weights and initial tables; names and shapes are those of :meth:`tensor_shapes`. Resets the state."""
        for name, weight in self._canonical().items():
            weight.assign(tensors[name])
        if self.stateful:
            self.reset_state()

    def _keep(self, state: State) -> None:
        """Let the next call of a stateful layer go on from here."""
        for name, array in state.arrays().items():
            self._weight(f"state.{name}").assign(array)

    @property
    def _table_dtype(self) -> str:
        return "float64" if self.variable_dtype == "float64" else "float32"

    def _add(self, name: str, shape: tuple[int | None, ...], initializer: Any, **options: Any) -> keras.Variable:
        weight = self.add_weight(name=_attribute(name), shape=shape, initializer=initializer, **options)
        setattr(self, _attribute(name), weight)
        return weight

    def _weight(self, name: str) -> keras.Variable:
        if not self.built:
            raise ValueError(
                "the layer has no weights yet: build it first, by calling it on an input or by "
                f"layer.build((None, None, hidden_size)). Received: {self.name}, not built"
            )
        return getattr(self, _attribute(name))

    def _state_weights(self) -> list[keras.Variable]:
        """The arrays of a stateful layer's state, once it is built."""
        if not (self.stateful and self.built):
            return []
        return [self._weight(f"state.{name}") for name in specs(self._config, None)]

    def _canonical(self) -> dict[str, keras.Variable]:
        """Weights and initial tables by canonical name."""
        parts = [part for part in ("query", "value", "gate", "output") if self.gated or part != "gate"]
        names = [f"{part}_{weight}" for part in parts for weight in ("norm.weight", "proj.weight", "proj.bias")]
        return {name: self._weight(name) for name in (*names, *(f"memory.{name}" for name in Memory._fields))}

    def _initial_memory(self) -> Memory:
        return Memory(*(ops.convert_to_tensor(self._weight(f"memory.{name}"))[None] for name in Memory._fields))

    def _project(self, part: str, x: Array) -> Array:
        """W · RMSNorm(x) + b in the compute dtype; the norm at least in float32."""
        norm, weight, bias = (
            ops.cast(self._weight(f"{part}_{name}"), self.compute_dtype)
            for name in ("norm.weight", "proj.weight", "proj.bias")
        )
        x = ops.cast(rms_norm(ops, _wide(x), 1.0), self.compute_dtype) * norm
        return ops.einsum("bti,oi->bto", x, weight) + bias  # on torch ops.matmul multiplies float64 in float32


def _wide(x: Array) -> Array:
    """At least float32, as the norms of §7 are whatever the policy."""
    return ops.cast(x, "float32") if "float16" in keras.backend.standardize_dtype(x.dtype) else x


def _attribute(name: str) -> str:
    return name.replace(".", "_")
