"""The functions of SPEC.md §8 in keras.ops, for the Keras backend that has no native one here: tensorflow.

They run eagerly, in tf.function and under XLA, with any of batch, time and position unknown until then: everything is
branch-free arithmetic but one loop over the chunks that a call completes. A write copies the value table, and gradients
through writes keep those copies. The functions are documented on ``fwpkm.protocol.Backend``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from fwpkm import schedule, validation
from fwpkm.backends.keras.packing import pack, unpack  # noqa: F401
from fwpkm.backends.keras.rows import (  # noqa: F401
    concat,
    fitted,
    implementation,
    init_state,
    mask_of,
    nbytes,
    num_rows,
    pending,
    put,
    reset,
    select,
    with_rows,
)
from fwpkm.backends.keras.streams import is_legal, streams_of
from fwpkm.backends.keras.tokens import blank, filled, nan_where, without
from fwpkm.backends.keras.windows import (
    Reads,
    no_losses,
    nothing_read,
    read_only,
    select_window,
    while_loop,
    windows,
    write_chunk,
    write_window,
)
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace
from fwpkm.initial import initial_arrays
from fwpkm.tokens import Array, Tokens


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
    """Fresh tables (SPEC.md §7), the same numbers in every backend for one seed."""
    return Memory(*map(ops.convert_to_tensor, initial_arrays(cfg, memories, seed)))


def apply(
    cfg: FwPKMConfig,
    state: State | Memory,
    query: Array,
    value: Array,
    gate: Array | None = None,
    mask: Array | None = None,
    cu_seqlens: Array | None = None,
    update: bool = True,
) -> tuple[Array, State | None, Trace]:
    """Read T tokens and write every chunk that they complete (SPEC.md §5)."""
    validation.check_apply(cfg, state, Tokens(query, value, gate, mask), cu_seqlens, update, implementation())
    query = _some_rows(query)
    if isinstance(state, Memory):
        state = init_state(cfg, state, ops.shape(query)[0] if cu_seqlens is None else ops.shape(cu_seqlens)[0] - 1)
        output, _, trace = apply(cfg, state, query, value, gate, mask, cu_seqlens, update)
        return output, None, trace
    known = _check_values(cfg, state, cu_seqlens, query.shape[1])
    shape = ops.shape(query)
    state = fitted(cfg, state, shape[0] if cu_seqlens is None else ops.shape(cu_seqlens)[0] - 1)
    memory = _as_tables(state.memory, query)
    dtype = _dtype(memory)
    uses = None if state.maybe_uses is None else ops.cast(state.maybe_uses, dtype)
    inputs = Tokens(query, value, gate, mask).map(lambda x: with_rows(x, shape[0]))
    tokens, legal = filled(dtype, inputs), None
    if cu_seqlens is not None and not known:  # nobody can raise: the call is then one of empty sequences
        legal = is_legal(cu_seqlens, shape[1])
        cu_seqlens = ops.where(legal, cu_seqlens, 0)
    losses, writes = no_losses(memory, schedule.max_writes(cfg, shape[1])), ops.zeros_like(memory.keys[:, 0, 0, 0, 0])
    if isinstance(shape[1], int) and shape[1] == 0:
        reads = nothing_read(cfg, tokens)
    elif update:
        streams = streams_of(cfg, filled(dtype, state.pending), state.position, tokens, cu_seqlens)
        reads, memory, uses, losses = windows(cfg, memory, uses, streams, tokens)
        rest = streams.cells(streams.due * cfg.chunk_size, cfg.capacity)
        left = streams.tokens(rest, reads.dead | ~ops.reshape(tokens.mask, (-1,)))
        state = State.of(memory, left, streams.position(cfg, state.position), uses)
        writes = ops.reshape(streams.due, (ops.shape(memory.keys)[0], -1))[:, 0]
    elif cu_seqlens is not None:  # as if nothing were pending
        streams = streams_of(cfg, filled(dtype, state.pending), ops.zeros_like(state.position), tokens, cu_seqlens)
        reads = read_only(cfg, memory, streams, tokens)
    else:
        found, _ = select_window(cfg, memory, tokens)
        reads = Reads(*(ops.reshape(x, (-1, *x.shape[2:])) for x in found))
    if legal is not None:  # whose outputs say it
        wrong = ops.broadcast_to(~legal, ops.shape(reads.dead))
        reads = reads._replace(output=nan_where(wrong, reads.output), weights=nan_where(wrong, reads.weights))
    if mask is not None:
        reads = Reads(*(blank(x, ~ops.reshape(tokens.mask, (-1,))) for x in reads))
    output, slots, weights = (
        ops.reshape(x, (shape[0], shape[1], x.shape[1])) for x in (reads.output, reads.slots, reads.weights)
    )
    trace = Trace(slots, weights, losses.memorization, losses.addressing, ops.cast(writes, "int32"))
    return ops.cast(output, query.dtype), state, trace


def flush(cfg: FwPKMConfig, state: State, rows: Any = None) -> tuple[State, Trace]:
    """Write the pending chunk of every row, or of ``rows``, empty it and restart the count (SPEC.md §5)."""
    validation.check_state(cfg, state, implementation())
    _check_values(cfg, state, None, 0)
    state = fitted(cfg, state, num_rows(state))
    dtype, chosen = _dtype(state.memory), mask_of(cfg, rows, state)
    num_pending = schedule.pending(cfg, state.position)
    behind = ops.arange(cfg.capacity, dtype="int32") >= num_pending[:, None]
    tokens = without(filled(dtype, state.pending), behind)
    may_write = chosen & (num_pending > cfg.lookahead)  # else no token has a pair

    def due(written: Array, *_: Any) -> Array:
        return (written == 0) & ops.any(may_write)

    def write(written: Array, memory: Memory, uses: Array | None, losses: Losses) -> tuple:
        _, memory, uses, losses = write_window(cfg, memory, uses, tokens, may_write)
        return written + 1, memory, uses, Losses(*(x[:, None] for x in losses))

    start = (ops.zeros((), "int32"), state.memory, state.maybe_uses, no_losses(state.memory, 1))
    _, memory, uses, losses = while_loop(due, write, start, 1)
    nothing = ops.zeros((*ops.shape(state.pending_mask)[:1], 0, cfg.slots_per_token), dtype)
    writes = schedule.flush_writes(cfg, ops.where(chosen, num_pending, 0))
    writes = ops.reshape(writes, (ops.shape(memory.keys)[0], -1))[:, 0]
    trace = Trace(ops.cast(nothing, "int32"), nothing, losses.memorization, losses.addressing, writes)
    return State.of(memory, without(state.pending, chosen), ops.where(chosen, 0, state.position), uses), trace


def lookup(cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
    """Read the tables (SPEC.md §2)."""
    validation.check_lookup(cfg, memory, query, implementation())
    memory = _as_tables(memory, query)
    value = ops.zeros((*ops.shape(query)[:2], cfg.value_dim), query.dtype)
    tokens = filled(_dtype(memory), Tokens(query, value))
    if query.shape[1] == 0:
        nothing = ops.zeros((*ops.shape(query)[:2], cfg.slots_per_token), _dtype(memory))
        return Lookup(value, ops.cast(nothing, "int32"), nothing)
    reads, _ = select_window(cfg, memory, tokens)
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
    validation.check_chunk(cfg, memory, chunk, pair, implementation())
    tables = _as_tables(memory, query)
    if query.shape[1] == 0:
        return memory, Losses(*[ops.zeros_like(tables.keys[:, 0, 0, 0, 0])] * 2)
    return write_chunk(cfg, tables, filled(_dtype(tables), chunk), pair)


def detach(state: State) -> State:
    """The state without its gradient history."""
    validation.check_is_state(state)
    return state.map(ops.stop_gradient)


def start_decoding(state: State) -> State:
    """The state itself: ``decode`` of the layer overwrites nothing on tensorflow."""
    validation.check_is_state(state)
    return state


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


def _some_rows(query: Array) -> Array:
    """The query of at least one row, which a graph may not know until it runs."""
    if query.shape[0] is not None:
        return query
    import tensorflow

    message = "query must have at least one row (B >= 1)"
    with tensorflow.control_dependencies([tensorflow.debugging.assert_positive(ops.shape(query)[0], message)]):
        return tensorflow.identity(query)


def _check_values(cfg: FwPKMConfig, state: State, cu_seqlens: Array | None, length: int | None) -> bool:
    """Check numbers where they are known, which they are not while a graph is traced; whether ``cu_seqlens`` were."""
    if hasattr(state.position, "numpy"):
        validation.check_positions(cfg, state.position.numpy().tolist())
    if cu_seqlens is None or length is None or not hasattr(cu_seqlens, "numpy"):
        return False
    validation.check_cu_seqlens(cu_seqlens.numpy().tolist(), length)
    return True
