"""The functions of SPEC.md §8 in keras.ops, for the Keras backend that has no native one here: tensorflow.

They run eagerly, in tf.function and under XLA, with any of batch, time and position unknown until then: everything is
branch-free arithmetic but one loop over the chunks that a call completes. A write copies the value table, and gradients
through writes keep those copies.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import keras
import numpy as np
from keras import ops

from fwpkm import schedule, validation
from fwpkm import tokens as token_fields
from fwpkm.backends.keras.stream import no_losses, nothing_seen, read_stream, visit, visit_and_write, write_chunk
from fwpkm.backends.keras.tokens import Tokens, outer
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Array, Lookup, Losses, Memory, State, Trace
from fwpkm.initial import initial_arrays


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
    """Fresh tables (SPEC.md §7), the same numbers in every backend for one seed.

    Returns:
        float32 keys ``[M, H, 2, S, Dk/2]`` and values ``[M, N, Dv]``.

    Raises:
        ValueError: ``memories`` is not an integer of at least 1.
    """
    return Memory(*map(ops.convert_to_tensor, initial_arrays(cfg, memories, seed)))


def init_state(cfg: FwPKMConfig, memory: Memory, batch_size: int | Array) -> State:
    """A state at position 0; M = 1 is broadcast to B rows in "sequence" scope.

    Gradients flow from the state to ``memory``. ``batch_size`` may be an int32 scalar tensor, for one table.

    Raises:
        ValueError: the tables fit neither ``cfg`` nor ``batch_size``.
    """
    if ops.is_tensor(batch_size):
        validation.check_memory(cfg, memory, 1, _self())
    else:
        validation.check_initial(cfg, memory, batch_size, _self())
    memories = validation.memories_for(cfg, batch_size)
    tables = Memory(*(ops.broadcast_to(x, (memories, *x.shape[1:])) for x in memory))
    return State(tables, *_no_tokens(cfg, memory, batch_size), position=ops.zeros((batch_size,), "int32"))


def apply(
    cfg: FwPKMConfig,
    state: State,
    query: Array,
    value: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    update: bool = True,
) -> tuple[Array, State, Trace]:
    """Read T tokens and write every chunk that they complete (SPEC.md §5).

    Args:
        cfg: the configuration.
        state: where the sequence stands; left as it was.
        query: ``[B, T, H*Dk]``, any floating dtype.
        value: ``[B, T, Dv]``.
        gate: ``[B, T]`` in [0, 1], or None for 1.
        mask: ``[B, T]`` bool, False for tokens that never write, or None for True.
        update: False only reads: no write, nothing pending, position unchanged.

    Returns:
        output ``[B, T, Dv]`` in the query's dtype, the next state, and the trace.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what was received.
    """
    validation.check_apply(cfg, state, token_fields.Tokens(query, value, gate, mask), _self())
    length = ops.shape(query)[1]
    _check_position(state, length if update else 0)
    memory = _as_tables(state.memory, query)
    tokens = Tokens.of(_dtype(memory), query, value, gate, mask)
    losses, none = no_losses(memory, schedule.max_writes(cfg, length)), ops.zeros((), "int32")
    if isinstance(length, int) and length == 0:
        nothing = nothing_seen(cfg, tokens)
        trace = Trace(nothing.slots, nothing.weights, *losses, writes=none)
        return ops.cast(nothing.output, query.dtype), state, trace
    if not update:
        seen, _ = visit(cfg, memory, tokens)
        trace = Trace(seen.slots, seen.weights, *losses, writes=none)
        return ops.cast(seen.output, query.dtype), state, trace
    seen, memory, waiting, losses, writes = read_stream(cfg, memory, Tokens(*state.pending), state.position[0], tokens)
    state = State(memory, *waiting, position=state.position + length)
    return ops.cast(seen.output, query.dtype), state, Trace(seen.slots, seen.weights, *losses, writes)


def flush(cfg: FwPKMConfig, state: State) -> tuple[State, Trace]:
    """Write the pending chunk, empty it and restart the count (SPEC.md §5).

    Returns:
        the state at position 0, and the trace of that write: losses ``[M, 1]``, slots and weights ``[B, 0, H*k]``.

    Raises:
        ValueError: the state does not fit ``cfg``.
    """
    validation.check_state(cfg, state, None, _self())
    _check_position(state, 0)
    memory, batch = state.memory, ops.shape(state.position)[0]
    waiting, count = Tokens.of(_dtype(memory), *state.pending), schedule.pending(cfg, state.position[0])

    def due(written: Array, *_: Any) -> Array:
        return (written == 0) & (count > cfg.lookahead)  # else no token has a pair

    def step(written: Array, memory: Memory, losses: Losses) -> tuple:
        _, memory, losses = visit_and_write(cfg, memory, waiting)  # what is not valid is masked
        return written + 1, memory, Losses(*(x[:, None] for x in losses))

    start = (ops.zeros((), "int32"), memory, no_losses(memory, 1))
    _, memory, losses = ops.while_loop(due, step, start, maximum_iterations=1)
    state = State(memory, *_no_tokens(cfg, memory, batch), position=ops.zeros_like(state.position))
    nothing = nothing_seen(cfg, Tokens(*(x[:, :0] for x in state.pending)))
    trace = Trace(
        nothing.slots, nothing.weights, losses.memorization, losses.addressing, schedule.flush_writes(cfg, count)
    )
    return state, trace


def lookup(cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
    """Read the tables (SPEC.md §2): query ``[B, n, H*Dk]`` -> output ``[B, n, Dv]``, slots, weights ``[B, n, H*k]``.

    A token whose query or selected scores are not finite reads NaN.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    validation.check_lookup(cfg, memory, query, _self())
    memory = _as_tables(memory, query)
    value = ops.zeros((*ops.shape(query)[:2], cfg.value_dim), query.dtype)
    tokens = Tokens.of(_dtype(memory), query, value, None, None)
    seen = visit(cfg, memory, tokens)[0] if query.shape[1] != 0 else nothing_seen(cfg, tokens)
    return Lookup(ops.cast(seen.output, query.dtype), seen.slots, seen.weights)


def chunk_update(
    cfg: FwPKMConfig,
    memory: Memory,
    query: Array,
    target: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    pair: Array | None = None,
) -> tuple[Memory, Losses]:
    """Write one chunk (SPEC.md §4) whose targets are already shifted.

    Args:
        cfg: the configuration.
        memory: the tables to be written; left as they were.
        query: ``[B, n, H*Dk]``.
        target: ``[B, n, Dv]``, u_t.
        gate: ``[B, n]``, or None for 1.
        mask: ``[B, n]`` bool, or None for True.
        pair: ``[B, n]`` bool, which tokens have a target; None for all unmasked ones.

    Returns:
        the new tables and the losses ``[M]``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    validation.check_chunk(cfg, memory, token_fields.Tokens(query, target, gate, mask), pair, _self())
    tables = _as_tables(memory, query)
    if query.shape[1] == 0:
        return memory, Losses(*[ops.zeros_like(tables.keys[:, 0, 0, 0, 0])] * 2)
    return write_chunk(cfg, tables, Tokens.of(_dtype(tables), query, target, gate, mask), pair)


def detach(state: State) -> State:
    """The state without its gradient history: truncated backpropagation between calls."""
    return State(Memory(*map(ops.stop_gradient, state.memory)), *map(ops.stop_gradient, state[1:]))


def reset(state: State, memory: Memory, rows: Any) -> State:
    """Give rows their initial memory back and mask their pending tokens; the count goes on (SPEC.md §5).

    Args:
        state: left as it was.
        memory: the initial tables, M = 1 or that of the state.
        rows: integers, or a bool mask ``[B]``; all of them where one table serves the batch.

    Raises:
        ValueError: rows out of range, some of the rows that share one table, or tables of other shapes.
    """
    validation.check_reset(state, memory, _tensor())
    batch, memories = state.position.shape[0], state.memory.keys.shape[0]
    rows = to_numpy(rows) if ops.is_tensor(rows) else rows
    chosen = ops.convert_to_tensor(validation.row_mask(rows, batch, memories))

    def blend(fresh: Array, current: Array) -> Array:
        return ops.where(outer(chosen[: current.shape[0]], current), ops.cast(fresh, current.dtype), current)

    tables = Memory(*map(blend, memory, state.memory))
    pending = Tokens(*(blend(ops.zeros_like(x[:1]), x) for x in state.pending))
    return State(tables, *pending, position=state.position)


def asarray(x: Any, dtype: str) -> Array:
    """``x`` as a tensor of the named dtype, such as "float32" or "bool"."""
    return ops.cast(ops.convert_to_tensor(np.asarray(x)), dtype)


def to_numpy(x: Array) -> np.ndarray:
    """The numbers of a tensor; bfloat16, which NumPy lacks, as float32."""
    return ops.convert_to_numpy(ops.cast(x, "float32") if "bfloat16" in str(x.dtype) else x)


def vjp(
    fn: Callable[..., Array | tuple[Array, ...]], args: Sequence[Array], cotangents: Sequence[Array] | Array
) -> tuple[Array, ...]:
    """Gradients of Σ output · cotangent with respect to every argument; zeros where one has no influence.

    Args:
        fn: takes the arguments one by one, returns an array or a tuple of arrays.
        args: floating arrays.
        cotangents: one for each output, in its shape.

    Returns:
        a gradient for each argument, in its shape.
    """
    import tensorflow  # Keras has no gradient of a function

    args = [ops.convert_to_tensor(x) for x in args]
    with tensorflow.GradientTape() as tape:
        tape.watch(args)
        outputs = fn(*args)
    outputs = [outputs] if ops.is_tensor(outputs) else list(outputs)
    cotangents = [cotangents] if ops.is_tensor(cotangents) else list(cotangents)
    zero = tensorflow.UnconnectedGradients.ZERO
    gradients = tape.gradient(outputs, args, output_gradients=cotangents, unconnected_gradients=zero)
    return tuple(map(ops.convert_to_tensor, gradients))


def device_name() -> str:
    """The accelerator that Keras finds here, or "cpu"."""
    return next(iter(keras.distribution.list_devices("gpu")), "cpu")


def _no_tokens(cfg: FwPKMConfig, memory: Memory, batch_size: int | Array) -> Tokens:
    """The pending tokens of a fresh state."""
    shape, dtype = (batch_size, cfg.capacity), _dtype(memory)
    query, value = (ops.zeros((*shape, width), dtype) for width in (cfg.num_heads * cfg.key_dim, cfg.value_dim))
    return Tokens(query, value, ops.zeros(shape, dtype), ops.zeros(shape, "bool"))


def _dtype(memory: Memory) -> str:
    return keras.backend.standardize_dtype(memory.keys.dtype)


def _as_tables(memory: Memory, query: Array) -> Memory:
    """float32, or float64 when queries and tables both are (§6)."""
    wide = _dtype(memory) == keras.backend.standardize_dtype(query.dtype) == "float64"
    return Memory(*(ops.cast(x, "float64" if wide else "float32") for x in memory))


def _check_position(state: State, length: int | Array) -> None:
    """Check the position where its value is known, which it is not while a graph is traced."""
    if hasattr(state.position, "numpy"):
        validation.check_length(validation.check_position(state.position.numpy().tolist()), int(length))


@cache
def _self() -> validation.Implementation:
    return validation.Implementation.of(
        "the Keras backend",
        _tensor(),
        """
        key_dim value_dim num_heads num_subkeys top_k chunk_size lookahead boundary score score_eps temperature
        learning_rate write_scale weight_decay grad_clip addressing_weight memory_scope
        """,
    )


def _tensor() -> type:
    import tensorflow  # Keras has no name for the type of its tensors

    return tensorflow.Tensor
