"""The PyTorch backend's functions (SPEC.md §8): pure, sparse, differentiable."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fwpkm import schedule, validation
from fwpkm.backends.torch import engine, exporting, fast, left_aligned, ragged, ranks
from fwpkm.backends.torch.checks import check_apply, check_device, check_inplace, check_state_device
from fwpkm.backends.torch.column_parallel import by_columns, is_sharded, refuse_columns, refuse_uses
from fwpkm.backends.torch.context import through_checkpoints
from fwpkm.backends.torch.rows import init_state, mask_of, own_uses, start_state
from fwpkm.backends.torch.streams import Streams, pending_of, streams_of, together
from fwpkm.backends.torch.tokens import filled, maybe_any, without
from fwpkm.backends.torch.windows import (
    SELF,
    apply_values,
    empty_trace,
    select_window,
    trace_of,
    windows,
    without_masked,
    write_chunk,
    write_part,
)
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace, memories_for
from fwpkm.initial import initial_arrays
from fwpkm.tokens import Array, Tokens


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory[Tensor]:
    """New tables, on the CPU."""
    return Memory(*map(torch.from_numpy, initial_arrays(cfg, memories, seed)))


def apply(
    cfg: FwPKMConfig,
    state: State[Tensor] | Memory[Tensor],
    query: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    update: bool = True,
    *,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, State[Tensor] | None, Trace]:
    """Read T tokens and write every chunk that they complete.

    With ``inplace`` the state's value table may be overwritten, which saves one copy of it; torch.compile then runs the
    call between its graphs. ``implementation`` is None for the fastest that can serve the call, "triton" for the
    kernels (kernels/), or "eager" for plain PyTorch. torch.compile keeps a call that the kernels serve in its graph.

    Raises:
        ValueError: an argument does not fit, or ``implementation`` cannot serve the call.
        RuntimeError: ``inplace`` on a table that autograd still needs.
    """
    return read_on(cfg, state, Tokens(query, value, gate, mask), cu_seqlens, update, inplace, implementation)


@through_checkpoints
def read_on(
    cfg: FwPKMConfig,
    state: State[Tensor] | Memory[Tensor],
    inputs: Tokens,
    cu_seqlens: Tensor | None,
    update: bool,
    inplace: bool,
    implementation: str | None = None,
    layer: nn.Module | None = None,
) -> tuple[Tensor, State[Tensor] | None, Trace]:
    """``apply`` of tokens; ``layer`` is the module that calls, whose weights ranks with tables in columns compare."""
    if isinstance(state, Memory):
        return begin(cfg, state, inputs, cu_seqlens, update, False, implementation=implementation)
    if exporting.is_exporting():
        validation.check_apply(cfg, state, inputs, cu_seqlens, update, SELF)
        return exporting.apply(cfg, state, inputs, cu_seqlens, update)
    # The operator is functional, as autograd demands: a call that overwrites stays out of the graph.
    if torch.compiler.is_compiling() and not inplace:
        validation.check_apply(cfg, state, inputs, cu_seqlens, update, SELF)
        if engine.choose_engine(implementation, cfg, state.memory, inputs.query, cu_seqlens) == "compiled":
            return left_aligned.apply(cfg, state, inputs, cu_seqlens, update, False, False)
    return _apply(cfg, state, inputs, cu_seqlens, update, inplace, implementation, layer=layer)


@through_checkpoints
def begin(
    cfg: FwPKMConfig,
    memory: Memory[Tensor],
    inputs: Tokens,
    cu_seqlens: Tensor | None,
    update: bool,
    keep: bool,
    position_device: Any = None,
    implementation: str | None = None,
    layer: nn.Module | None = None,
) -> tuple[Tensor, State[Tensor] | None, Trace]:
    """``read_on`` of sequences that begin from a memory of M = 1; without ``keep`` no state is returned."""
    batch = ranks.told(memory, validation.check_apply, cfg, memory, inputs, cu_seqlens, update, SELF)
    exported = exporting.is_exporting()
    compiled = torch.compiler.is_compiling() and not exported
    if compiled:
        compiled = engine.choose_engine(implementation, cfg, memory, inputs.query, cu_seqlens) == "compiled"
    if not (exported or compiled):
        if not keep:
            return _without_state(cfg, memory, inputs, cu_seqlens, update, implementation, layer, batch)
        if cu_seqlens is not None:
            check_device(inputs.query, cu_seqlens=cu_seqlens)
            cu_seqlens = cu_seqlens.cpu()  # before the copies of the tables, behind which it would wait
        state, owned = init_state(cfg, memory, batch, position_device), not memory.values.requires_grad
        return _apply(cfg, state, inputs, cu_seqlens, update, owned, implementation, True, layer)
    state, after = _sharing(cfg, memory, batch, position_device, keep), None
    if exported:
        output, after, trace = exporting.apply(cfg, state, inputs, cu_seqlens, update)
    else:
        table = None if keep else memory.values
        output, after, trace = left_aligned.apply(cfg, state, inputs, cu_seqlens, update, False, True, table)
    return output, after if keep else None, trace


def _sharing(cfg: FwPKMConfig, memory: Memory, batch: int, position_device: Any = None, kept: bool = True) -> State:
    """A state whose rows share the tables of one memory; what writes makes the copy, if any."""
    memories = memories_for(cfg, batch)
    shared = Memory(*map(by_columns(lambda x: x.expand(memories, *x.shape[1:])), memory))
    return start_state(cfg, shared, batch, position_device, kept)


@engine.outside_graphs
def _without_state(
    cfg: FwPKMConfig,
    memory: Memory,
    inputs: Tokens,
    cu_seqlens: Tensor | None,
    update: bool,
    implementation: str | None,
    layer: nn.Module | None,
    batch: int,
) -> tuple[Tensor, None, Trace]:
    """``begin`` where no state is kept: what rows write the kernels lay over the one table."""
    chosen = ranks.told(memory, engine.choose_engine, implementation, cfg, memory, inputs.query)
    if cu_seqlens is None or chosen != "triton" or inputs.length == 0:
        state = _sharing(cfg, memory, batch, kept=False)
        output, _, trace = _apply(cfg, state, inputs, cu_seqlens, update, False, implementation, True, layer, memory)
        return output, None, trace
    same = {**inputs._asdict(), "cu_seqlens": cu_seqlens}
    with ranks.agreed("apply", memory, cfg, update, implementation, layer=layer, **same):
        check_device(inputs.query, memory=memory, **same)
        refuse_uses(cfg, memory.values)
        ends = cu_seqlens.cpu()
        validation.check_cu_seqlens(ends.tolist(), inputs.length)
    return ragged.apply(cfg, memory, _unmasked(inputs), ends, update)


@engine.outside_graphs
def _apply(
    cfg: FwPKMConfig,
    state: State,
    inputs: Tokens,
    cu_seqlens: Tensor | None,
    update: bool,
    inplace: bool,
    implementation: str | None,
    fresh: bool = False,
    layer: nn.Module | None = None,
    initial: Memory | None = None,
) -> tuple[Tensor, State | None, Trace]:
    """``fresh``: the state is one at position 0, with nothing pending.

    ``initial`` is the one memory that its rows begin from, where no state is asked for: the kernels return none.
    """
    same = {**inputs._asdict(), "cu_seqlens": cu_seqlens, **_beside_tables(state, fresh)}
    memory = getattr(state, "memory", None)
    with ranks.agreed("apply", memory, cfg, update, inplace, implementation, layer=layer, **same):
        check_apply(cfg, state, inputs, cu_seqlens, update)
        refuse_uses(cfg, state.memory.values)
        check_inplace(inplace, *state.memory, state.maybe_uses)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.cpu()
            validation.check_cu_seqlens(cu_seqlens.tolist(), inputs.length)
        inputs = _unmasked(inputs)
        chosen = engine.choose_engine(implementation, cfg, state.memory, inputs.query, cu_seqlens)
        on_kernels = chosen == "triton" and inputs.length > 0
        positions = [0] if fresh else None
        if not fresh and (state.position.device.type == "cpu" or not on_kernels):
            positions = state.position.tolist()
            validation.check_positions(cfg, positions)
    if not on_kernels:
        return _in_torch(cfg, state, inputs, cu_seqlens, update, inplace)
    table = None if initial is None else initial.values
    if not positions or not together(cfg, positions, inputs.mask, cu_seqlens):
        return left_aligned.apply(cfg, state, inputs, cu_seqlens, update, inplace, fresh, table)
    inputs = _mask_moved(inputs)
    output, memory, uses, left, trace = fast.apply(cfg, state, positions[0], inputs, update, inplace, table)
    if initial is not None:
        return output, None, trace
    if update:
        left = filled(memory.keys.dtype, left)
        state = State.of(memory, left, schedule.reduced(cfg, state.position) + inputs.length, uses)
    return output, state, trace


def _in_torch(
    cfg: FwPKMConfig, state: State, inputs: Tokens, cu_seqlens: Tensor | None, update: bool, inplace: bool
) -> tuple[Tensor, State, Trace]:
    """``_apply`` in plain PyTorch, of arguments that were checked."""
    inputs, memory = _mask_moved(inputs), _as_tables(state.memory, inputs.query)
    dtype = memory.keys.dtype
    tokens, ends = filled(dtype, inputs), None if cu_seqlens is None else cu_seqlens.to(inputs.query.device)
    streams = streams_of(cfg, state, tokens, inputs.mask, ends, update, dtype)
    uses = state.maybe_uses
    output, written, trace = _run_eagerly(cfg, memory, streams, tokens, inputs.mask, inplace, uses)
    if update:
        # Tables that are wider than what a call computed in stay so until a write.
        memory, uses = (state.memory, uses) if written is None else written
        state = State.of(memory, filled(memory.keys.dtype, streams.left()), streams.position(state.position), uses)
    return output.to(inputs.query.dtype), state, trace


def _unmasked(inputs: Tokens) -> Tokens:
    """Without a mask that, as the host can tell, masks nothing."""
    mask = inputs.mask
    return inputs._replace(mask=None) if mask is not None and mask.device.type == "cpu" and mask.all() else inputs


def _mask_moved(inputs: Tokens) -> Tokens:
    """With the mask where the queries are."""
    return inputs._replace(mask=None if inputs.mask is None else inputs.mask.to(inputs.query.device))


def _beside_tables(state: Any, fresh: bool = False) -> dict[str, Any]:
    """What of a state, checked or not, is whole on every rank; of one that begins, the position alone.

    No uses: a state in columns has none.
    """
    names = [name for name in State._fields if name not in ("memory", "uses") and (name == "position" or not fresh)]
    return {name: getattr(state, name, None) for name in names}


def _run_eagerly(
    cfg: FwPKMConfig, memory: Memory, streams: Streams, tokens: Tokens, mask: Tensor | None, owned: bool, uses: Array
) -> tuple[Tensor, tuple[Memory, Array] | None, Trace]:
    """In plain PyTorch: the output, the tables and uses if they were written, and the trace."""
    columns = schedule.max_writes(cfg, tokens.length)
    with _full_precision(tokens.query):
        walked, keys = windows(cfg, memory.keys, streams)
        if not walked:
            return _nothing_read(memory, tokens), None, empty_trace(cfg, memory, tokens.mask.shape, columns)
        if any(w.addressing is not None for w in walked):  # else nothing is written
            uses = own_uses(uses, memory.keys.dtype, owned)
        reads, values, losses = apply_values(cfg, memory.values, walked, owned, uses)
        output, dead = streams.of_call(reads), streams.of_call([w.dead for w in walked])
        if maybe_any(dead):
            output = output.masked_fill(dead[..., None], torch.nan)
        trace = trace_of(cfg, memory, streams, walked, losses, columns)
        if mask is not None:
            output, trace = without_masked(output, trace, mask)
    return output, (Memory(keys, values), uses) if losses else None, trace


def _nothing_read(memory: Memory, tokens: Tokens) -> Tensor:
    """The outputs of tokens that are not there; what they would have come from has gradient 0, for which DDP waits."""
    values = memory.values.to_local() if is_sharded(memory.values) else memory.values
    return torch.zeros_like(tokens.value) + sum(x[:0].sum() for x in (tokens.query, memory.keys, values))


@engine.outside_graphs
def flush(
    cfg: FwPKMConfig,
    state: State[Tensor],
    rows: Any = None,
    *,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[State[Tensor], Trace]:
    """Write the pending chunk and restart the count; ``inplace`` and ``implementation`` are those of ``apply``.

    Raises:
        ValueError: the state does not fit ``cfg``, or ``rows`` not the state.
        RuntimeError: ``inplace`` on a table that autograd still needs.
    """
    memory = getattr(state, "memory", None)
    with ranks.agreed("flush", memory, cfg, rows, inplace, implementation, **_beside_tables(state)):
        batch = validation.check_state(cfg, state, SELF)
        check_state_device(state.pending_query, state)
        refuse_uses(cfg, state.memory.values)
        validation.check_positions(cfg, state.position.tolist())
        check_inplace(inplace, *state.memory, state.maybe_uses)
        chosen = mask_of(cfg, rows, batch)
        memory = _as_tables(state.memory, state.pending_query)
        chosen_engine = engine.choose_engine(implementation, cfg, memory, state.pending_query)
    memories = memory.keys.shape[0]
    counts = torch.where(chosen, schedule.pending(cfg, state.position.cpu()), 0)
    of_memory = counts.view(memories, -1)[:, 0]
    trace = empty_trace(cfg, memory, (batch, 0), columns=1)
    trace = trace._replace(writes=schedule.flush_writes(cfg, of_memory).int())
    tables, uses = state.memory, state.maybe_uses
    if (of_memory > cfg.lookahead).any():  # else no token has a pair
        pending = filled(memory.keys.dtype, state.pending)
        if chosen_engine == "triton":
            tables, uses, losses = fast.flush(cfg, memory, pending_of(cfg, pending, counts, None), inplace, uses)
        else:
            uses = own_uses(uses, memory.keys.dtype, inplace)
            tables, losses = _write_pending(cfg, memory, pending, counts, inplace, uses)
        trace = trace._replace(**losses._asdict())
    gone = chosen.to(state.pending_mask.device)
    left = without(state.pending, gone[:, None].expand_as(state.pending_mask))
    position = state.position.masked_fill(chosen.to(state.position.device), 0)
    return State.of(tables, left, position, uses), trace


def _write_pending(
    cfg: FwPKMConfig, memory: Memory, pending: Tokens, counts: Tensor, owned: bool, uses: Array
) -> tuple[Memory, Losses]:
    """Write the first ``counts`` [B] pending tokens of each row: the tables, and the losses ``[M, 1]``.

    ``uses`` is overwritten.
    """
    memories, rows = memory.keys.shape[0], None
    due = (counts.view(memories, -1)[:, 0] > cfg.lookahead).nonzero().squeeze(1).to(memory.keys.device)
    if len(due) < memories:
        rows = due
    with _full_precision(memory.keys):
        window, keys = write_part(cfg, memory.keys, pending_of(cfg, pending, counts, rows), rows)
        _, values, (memorization,) = apply_values(cfg, memory.values, [window], owned, uses)
    none = memory.keys.new_zeros(memories)
    losses = (none.index_copy(0, due, x.detach())[:, None] for x in (memorization, window.addressing))
    return Memory(keys, values), Losses(*losses)


@engine.outside_graphs
def lookup(cfg: FwPKMConfig, memory: Memory[Tensor], query: Tensor, *, implementation: str | None = None) -> Lookup:
    """Read the tables; ``implementation`` is that of ``apply``."""
    with ranks.agreed("lookup", memory, cfg, implementation, query=query):
        validation.check_lookup(cfg, memory, query, SELF)
        check_device(query, memory=memory)
        chosen = engine.choose_engine(implementation, cfg, memory, query)
    memory = _as_tables(memory, query)
    if query.shape[1] == 0:
        entries = memory.keys.new_zeros(query.shape[0], 0, cfg.slots_per_token)
        return Lookup(query.new_zeros(query.shape[0], 0, cfg.value_dim), entries.long(), entries)
    if chosen == "triton":
        return fast.lookup(cfg, memory, query)
    no_value = query.new_zeros(*query.shape[:2], cfg.value_dim)
    with _full_precision(query):
        window = select_window(cfg, memory.keys, filled(memory.keys.dtype, Tokens(query, no_value)))
        (read,), _, _ = apply_values(cfg, memory.values, [window], owned=False)
        dead = window.dead[..., None]
        weights = window.weights.masked_fill(dead, torch.nan)
    return Lookup(read.masked_fill(dead, torch.nan).to(query.dtype), window.slots, weights)


@engine.outside_graphs
def chunk_update(
    cfg: FwPKMConfig,
    memory: Memory[Tensor],
    query: Tensor,
    target: Tensor,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    pair: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Memory[Tensor], Losses]:
    """Write one chunk whose targets are already shifted; ``implementation`` is that of ``apply``."""
    chunk = Tokens(query, target, gate, mask)
    with ranks.agreed("chunk_update", memory, cfg, implementation, **chunk._asdict(), pair=pair):
        validation.check_chunk(cfg, memory, chunk, pair, SELF)
        check_device(query, memory=memory, target=target, gate=gate, mask=mask, pair=pair)
        chosen = engine.choose_engine(implementation, cfg, memory, query)
    tables = _as_tables(memory, query)
    if chunk.length == 0:
        return memory, Losses(*tables.keys.new_zeros(2, tables.keys.shape[0]))
    if chosen == "triton":
        return fast.chunk_update(cfg, memory, chunk, pair)
    with _full_precision(query):
        window, keys = write_chunk(cfg, tables.keys, filled(tables.keys.dtype, chunk), pair)
        _, values, (memorization,) = apply_values(cfg, tables.values, [window], owned=False)
    return Memory(keys, values), Losses(memorization, window.addressing)


def detach(state: State[Tensor]) -> State[Tensor]:
    """The state without its gradient history."""
    validation.check_is_state(state)
    return state.map(by_columns(Tensor.detach))


def asarray(x: Any, dtype: str) -> Tensor:
    """A copy of ``x`` as a CPU tensor of the named dtype, such as "float32" or "bool"."""
    return torch.tensor(np.asarray(x)).to(getattr(torch, dtype))


def to_numpy(x: Tensor) -> np.ndarray:
    """The numbers of a tensor; bfloat16, which NumPy lacks, as float32.

    Raises:
        ValueError: a table in columns, which may be larger than one card or host; or a tensor on the meta device.
    """
    refuse_columns(x)
    if x.is_meta:
        raise ValueError(
            "a tensor on the meta device holds no numbers: make the layer or state on another device (layer.to_empty, "
            f"then reset_parameters). Received: a meta tensor of shape {tuple(x.shape)}"
        )
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def vjp(
    fn: Callable[..., Tensor | tuple[Tensor, ...]], args: Sequence[Tensor], cotangents: Sequence[Tensor] | Tensor
) -> tuple[Tensor, ...]:
    """Gradients of Σ output · cotangent with respect to every argument; zeros where one has no influence."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in args]
        outputs = fn(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    cotangents = (cotangents,) if isinstance(cotangents, Tensor) else tuple(cotangents)
    live = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not live:
        return tuple(torch.zeros_like(x) for x in inputs)
    outputs, cotangents = zip(*live)
    return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True)


def device_name() -> str:
    """The accelerator that torch finds here, or "cpu"."""
    return f"cuda: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"


def _full_precision(like: Tensor) -> contextlib.AbstractContextManager:
    """§6: float32 under any autocast."""
    device = like.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _as_tables(memory: Memory, query: Tensor) -> Memory:
    """float32, or float64 when queries and tables both are (§6)."""
    wide = query.dtype == memory.keys.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    return Memory(*map(by_columns(lambda x: x.to(dtype)), memory))
