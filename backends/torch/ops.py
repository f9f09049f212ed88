"""The PyTorch backend's functions (SPEC.md §8): pure, sparse, differentiable."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fwpkm import schedule, validation
from fwpkm.backends.torch import engine, fast, operators
from fwpkm.backends.torch.checks import check_apply, check_device, check_inplace
from fwpkm.backends.torch.tokens import filled, maybe_any, pad
from fwpkm.backends.torch.windows import SELF, apply_values, new_tokens, select_window, trace_of, windows, write_chunk
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace, memories_for
from fwpkm.initial import initial_arrays
from fwpkm.tokens import Tokens


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
    """New tables, on the CPU."""
    return Memory(*map(torch.from_numpy, initial_arrays(cfg, memories, seed)))


@engine.outside_graphs
def init_state(cfg: FwPKMConfig, memory: Memory, batch_size: int) -> State:
    """A state at position 0 that owns a copy of ``memory``, on its device but for the position."""
    validation.check_initial(cfg, memory, batch_size, SELF)
    memories = memories_for(cfg, batch_size)
    tables = (x.expand(memories, *x.shape[1:]).clone(memory_format=torch.contiguous_format) for x in memory)
    return _start(cfg, Memory(*tables), batch_size)


def initial_state(cfg: FwPKMConfig, memory: Memory, query: Tensor) -> tuple[State, bool]:
    """What a layer's call without a state begins with, and whether the call may overwrite its tables.

    It may if they are the call's own copy and autograd does not need them; compiled, the operator makes that copy.
    """
    if torch.compiler.is_compiling() and engine.choose_engine(None, cfg, memory, query) == "compiled":
        return _start(cfg, memory, query.shape[0]), False
    return init_state(cfg, memory, query.shape[0]), not memory.values.requires_grad


def apply(
    cfg: FwPKMConfig,
    state: State,
    query: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    update: bool = True,
    *,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, State, Trace]:
    """Read T tokens and write every chunk that they complete.

    With ``inplace`` the state's value table may be overwritten, which saves one copy of it; torch.compile then runs the
    call between its graphs. ``implementation`` is None for the fastest that can serve the call, "triton" for the
    kernels (kernels/), or "eager" for plain PyTorch. torch.compile keeps a call that the kernels serve in its graph.

    Raises:
        ValueError: an argument does not fit, or ``implementation`` cannot serve the call.
        RuntimeError: ``inplace`` on a table that autograd still needs.
    """
    tokens = Tokens(query, value, gate, mask)
    # The operator is functional, as autograd demands: a call that overwrites stays out of the graph.
    traced = torch.compiler.is_compiling() and not inplace
    if traced and engine.choose_engine(implementation, cfg, state.memory, query) == "compiled":
        return operators.apply(cfg, state, tokens, update)
    return _apply(cfg, state, tokens, update, inplace, implementation)


@engine.outside_graphs
def _apply(
    cfg: FwPKMConfig, state: State, inputs: Tokens, update: bool, inplace: bool, implementation: str | None
) -> tuple[Tensor, State, Trace]:
    check_apply(cfg, state, inputs)
    check_inplace(state.memory, inplace)
    length, position = inputs.length, validation.check_position(state.position.tolist())
    if update:
        validation.check_length(position, length)
    chosen = engine.choose_engine(implementation, cfg, state.memory, inputs.query)
    if chosen == "triton" and length:
        output, memory, pending, trace = fast.apply(cfg, state, position, inputs, update, inplace)
        return output, State.of(memory, pending, state.position + length) if update else state, trace
    memory, columns = _as_tables(state.memory, inputs.query), schedule.max_writes(cfg, length)
    tokens = filled(memory.keys.dtype, inputs)
    if length == 0:
        return tokens.value.to(inputs.query.dtype), state, trace_of(cfg, memory, tokens, [], [], columns)
    runs = schedule.windows(cfg, position, length) if update else [schedule.Window(0, length, False)]
    pending = _pending(cfg, state, memory.keys.dtype)
    output, written, pending, trace = _run_eagerly(cfg, memory, pending, tokens, runs, inplace, columns)
    if update:
        state = _state(cfg, state.memory if written is None else written, pending, state.position + length)
    return output.to(inputs.query.dtype), state, trace


def _run_eagerly(
    cfg: FwPKMConfig,
    memory: Memory,
    pending: Tokens,
    tokens: Tokens,
    runs: Iterable[schedule.Window],
    owned: bool,
    columns: int,
) -> tuple[Tensor, Memory | None, Tokens, Trace]:
    """In plain PyTorch: the output, the tables if they were written, what is pending then, and the trace."""
    with _full_precision(tokens.query):
        walked, keys, pending = windows(cfg, memory.keys, pending, tokens, runs)
        reads, values, losses = apply_values(cfg, memory.values, walked, owned)
        output, dead = new_tokens(reads, walked), new_tokens([w.dead for w in walked], walked)
        if maybe_any(dead):
            output = output.masked_fill(dead[..., None], torch.nan)
        trace = trace_of(cfg, memory, tokens, walked, losses, columns)
    return output, Memory(keys, values) if losses else None, pending, trace


@engine.outside_graphs
def flush(
    cfg: FwPKMConfig, state: State, *, inplace: bool = False, implementation: str | None = None
) -> tuple[State, Trace]:
    """Write the pending chunk and restart the count; ``inplace`` and ``implementation`` are those of ``apply``.

    Raises:
        ValueError: the state does not fit ``cfg``.
        RuntimeError: ``inplace`` on a table that autograd still needs.
    """
    validation.check_state(cfg, state, None, SELF)
    check_device(state.pending_query, **state._asdict())
    validation.check_position(state.position.tolist())
    check_inplace(state.memory, inplace)
    memory, written = _as_tables(state.memory, state.pending_query), None
    pending = _pending(cfg, state, memory.keys.dtype)
    nothing = _no_tokens(cfg, memory.keys, state.position.shape[0])
    chosen = engine.choose_engine(implementation, cfg, memory, pending.query)
    if pending.length <= cfg.lookahead:  # no token has a pair
        trace = trace_of(cfg, memory, nothing, [], [], columns=1)
    elif chosen == "triton":
        written, trace = fast.flush(cfg, memory, pending, inplace)
    else:
        runs = [schedule.Window(0, 0, True)]
        _, written, _, trace = _run_eagerly(cfg, memory, pending, nothing, runs, inplace, columns=1)
    trace = trace._replace(writes=torch.tensor(schedule.flush_writes(cfg, pending.length)))
    return _state(cfg, state.memory if written is None else written, nothing, torch.zeros_like(state.position)), trace


@engine.outside_graphs
def lookup(cfg: FwPKMConfig, memory: Memory, query: Tensor, *, implementation: str | None = None) -> Lookup:
    """Read the tables; ``implementation`` is that of ``apply``."""
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
    memory: Memory,
    query: Tensor,
    target: Tensor,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    pair: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Memory, Losses]:
    """Write one chunk whose targets are already shifted; ``implementation`` is that of ``apply``."""
    chunk = Tokens(query, target, gate, mask)
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


def detach(state: State) -> State:
    """The state without its gradient history."""
    memory = Memory(*(x.detach() for x in state.memory))
    return State.of(memory, state.pending.map(Tensor.detach), state.position.detach())


def reset(state: State, memory: Memory, rows: Sequence[int] | Sequence[bool] | Tensor | np.ndarray | int) -> State:
    """Give rows their initial memory back and mask their pending tokens."""
    validation.check_reset(state, memory, Tensor)
    batch, memories = state.position.shape[0], state.memory.keys.shape[0]
    rows = to_numpy(rows) if isinstance(rows, Tensor) else rows
    chosen = torch.from_numpy(validation.row_mask(rows, batch, memories)).to(state.pending_mask.device)

    def blend(initial: Tensor, current: Tensor) -> Tensor:
        pick = chosen[: current.shape[0]].view(-1, *[1] * (current.ndim - 1))
        return torch.where(pick, initial.to(current.dtype), current)

    tables = Memory(*map(blend, memory, state.memory))
    return State.of(tables, state.pending.map(lambda x: blend(torch.zeros_like(x[:1]), x)), state.position)


def asarray(x: Any, dtype: str) -> Tensor:
    """A copy of ``x`` as a CPU tensor of the named dtype, such as "float32" or "bool"."""
    return torch.tensor(np.asarray(x)).to(getattr(torch, dtype))


def to_numpy(x: Tensor) -> np.ndarray:
    """The numbers of a tensor; bfloat16, which NumPy lacks, as float32."""
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
    return Memory(memory.keys.to(dtype), memory.values.to(dtype))


def _no_tokens(cfg: FwPKMConfig, keys: Tensor, batch_size: int) -> Tokens:
    query = keys.new_zeros(batch_size, 0, cfg.num_heads * cfg.key_dim)
    return filled(keys.dtype, Tokens(query, keys.new_zeros(batch_size, 0, cfg.value_dim)))


def _pending(cfg: FwPKMConfig, state: State, dtype: torch.dtype) -> Tokens:
    """The valid entries of the state's buffers."""
    return filled(dtype, state.pending).slice(0, schedule.pending(cfg, int(state.position[0])))


def _state(cfg: FwPKMConfig, memory: Memory, pending: Tokens, position: Tensor) -> State:
    return State.of(memory, pad(pending, cfg.capacity), position)


def _start(cfg: FwPKMConfig, memory: Memory, batch_size: int) -> State:
    """A state at position 0, which the CPU holds, of these tables."""
    position = torch.full((batch_size,), 0, dtype=torch.int32, device="cpu")
    return _state(cfg, memory, _no_tokens(cfg, memory.keys, batch_size), position)
