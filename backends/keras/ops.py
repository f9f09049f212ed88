"""The functions of SPEC.md §8 in keras.ops, for the Keras backend that has no native one here: tensorflow.

They run eagerly, in tf.function and under XLA, with any of batch, time and position unknown until then: everything is
branch-free arithmetic but one loop over the chunks that a call completes. A write copies the value table, and gradients
through writes keep those copies. The functions are documented on ``fwpkm.protocol.Backend``.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import keras
import numpy as np
from keras import ops

from fwpkm import schedule, validation
from fwpkm.backends.keras.tokens import filled, no_tokens, outer, without
from fwpkm.backends.keras.windows import (
    SELF,
    no_losses,
    nothing_read,
    read_stream,
    select_window,
    write_chunk,
    write_window,
)
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace, memories_for
from fwpkm.initial import initial_arrays
from fwpkm.tokens import Array, Tokens


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
    """Fresh tables (SPEC.md §7), the same numbers in every backend for one seed."""
    return Memory(*map(ops.convert_to_tensor, initial_arrays(cfg, memories, seed)))


def init_state(cfg: FwPKMConfig, memory: Memory, batch_size: int | Array) -> State:
    """A state at position 0; ``batch_size`` may be an int32 scalar tensor, for one table."""
    if ops.is_tensor(batch_size):
        validation.check_memory(cfg, memory, 1, _self())
    else:
        validation.check_initial(cfg, memory, batch_size, _self())
    memories = memories_for(cfg, batch_size)
    tables = Memory(*(ops.broadcast_to(x, (memories, *x.shape[1:])) for x in memory))
    return State.of(tables, no_tokens(cfg, batch_size, _dtype(memory)), ops.zeros((batch_size,), "int32"))


def apply(
    cfg: FwPKMConfig,
    state: State,
    query: Array,
    value: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    update: bool = True,
) -> tuple[Array, State, Trace]:
    """Read T tokens and write every chunk that they complete (SPEC.md §5)."""
    tokens = Tokens(query, value, gate=gate, mask=mask)
    validation.check_apply(cfg, state, tokens, _self())
    length = ops.shape(query)[1]
    _check_position(state, length if update else 0)
    memory = _as_tables(state.memory, query)
    tokens = filled(_dtype(memory), tokens)
    losses, writes = no_losses(memory, schedule.max_writes(cfg, length)), ops.zeros((), "int32")
    if isinstance(length, int) and length == 0:
        reads = nothing_read(cfg, tokens)
    elif update:
        reads, state, losses, writes = read_stream(cfg, state._replace(memory=memory), tokens)
    else:
        reads, _ = select_window(cfg, memory, tokens)
    trace = Trace(reads.slots, reads.weights, losses.memorization, losses.addressing, writes)
    return ops.cast(reads.output, query.dtype), state, trace


def flush(cfg: FwPKMConfig, state: State) -> tuple[State, Trace]:
    """Write the pending chunk, empty it and restart the count (SPEC.md §5)."""
    validation.check_state(cfg, state, None, _self())
    _check_position(state, 0)
    dtype = _dtype(state.memory)
    num_pending = schedule.pending(cfg, state.position[0])
    behind = ops.arange(cfg.capacity, dtype="int32") >= num_pending
    pending = without(filled(dtype, state.pending), behind[None])

    def due(written: Array, *_: Any) -> Array:
        return (written == 0) & (num_pending > cfg.lookahead)  # else no token has a pair

    def write(written: Array, memory: Memory, losses: Losses) -> tuple:
        _, memory, losses = write_window(cfg, memory, pending)
        return written + 1, memory, Losses(*(x[:, None] for x in losses))

    start = (ops.zeros((), "int32"), state.memory, no_losses(state.memory, 1))
    _, memory, losses = ops.while_loop(due, write, start, maximum_iterations=1)
    nothing = nothing_read(cfg, pending.slice(0, 0))
    writes = schedule.flush_writes(cfg, num_pending)
    trace = Trace(nothing.slots, nothing.weights, losses.memorization, losses.addressing, writes)
    empty = no_tokens(cfg, ops.shape(state.position)[0], dtype)
    return State.of(memory, empty, ops.zeros_like(state.position)), trace


def lookup(cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
    """Read the tables (SPEC.md §2)."""
    validation.check_lookup(cfg, memory, query, _self())
    memory = _as_tables(memory, query)
    value = ops.zeros((*ops.shape(query)[:2], cfg.value_dim), query.dtype)
    tokens = filled(_dtype(memory), Tokens(query, value))
    reads = select_window(cfg, memory, tokens)[0] if query.shape[1] != 0 else nothing_read(cfg, tokens)
    return Lookup(ops.cast(reads.output, query.dtype), reads.slots, reads.weights)


def chunk_update(
    cfg: FwPKMConfig,
    memory: Memory,
    query: Array,
    target: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    pair: Array | None = None,
) -> tuple[Memory, Losses]:
    """Write one chunk (SPEC.md §4) whose targets are already shifted."""
    chunk = Tokens(query, target, gate=gate, mask=mask)
    validation.check_chunk(cfg, memory, chunk, pair, _self())
    tables = _as_tables(memory, query)
    if query.shape[1] == 0:
        return memory, Losses(*[ops.zeros_like(tables.keys[:, 0, 0, 0, 0])] * 2)
    return write_chunk(cfg, tables, filled(_dtype(tables), chunk), pair)


def detach(state: State) -> State:
    """The state without its gradient history."""
    stop = ops.stop_gradient
    return State.of(Memory(*map(stop, state.memory)), state.pending.map(stop), stop(state.position))


def reset(state: State, memory: Memory, rows: Any) -> State:
    """Give rows their initial memory back and mask their pending tokens; the count goes on (SPEC.md §5)."""
    validation.check_reset(state, memory, _tensor())
    batch, memories = state.position.shape[0], state.memory.keys.shape[0]
    rows = to_numpy(rows) if ops.is_tensor(rows) else rows
    chosen = ops.convert_to_tensor(validation.row_mask(rows, batch, memories))

    def blend(initial: Array, current: Array) -> Array:
        return ops.where(outer(chosen[:memories], current), ops.cast(initial, current.dtype), current)

    return State.of(Memory(*map(blend, memory, state.memory)), without(state.pending, chosen), state.position)


def asarray(x: Any, dtype: str) -> Array:
    """``x`` as a tensor of the named dtype."""
    return ops.cast(ops.convert_to_tensor(np.asarray(x)), dtype)


def to_numpy(x: Array) -> np.ndarray:
    """The numbers of a tensor; bfloat16, which NumPy lacks, as float32."""
    return ops.convert_to_numpy(ops.cast(x, "float32") if "bfloat16" in str(x.dtype) else x)


def vjp(
    fn: Callable[..., Array | tuple[Array, ...]], args: Sequence[Array], cotangents: Sequence[Array] | Array
) -> tuple[Array, ...]:
    """Gradients of Σ output · cotangent with respect to every argument; zeros where one has no influence."""
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
    return SELF._replace(arrays=_tensor())


def _tensor() -> type:
    import tensorflow  # Keras has no name for the type of its tensors

    return tensorflow.Tensor
