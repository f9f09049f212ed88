"""The PyTorch backend's functions (SPEC.md §8): pure, sparse, differentiable."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fwpkm import schedule, validation
from fwpkm.backends.torch import fast, operators
from fwpkm.backends.torch.stream import Visit, settle, visit, visit_and_write, visit_chunk
from fwpkm.backends.torch.tokens import SELF, filled, join, maybe_any, pad
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace
from fwpkm.initial import initial_arrays
from fwpkm.tokens import Tokens


def _outside_graphs(fn: Callable) -> Callable:
    """Let torch.compile run ``fn`` as it is, between its graphs.

    The schedule decides in Python how many chunks a call writes, so tracing would compile anew for every position.
    The check comes first because merely naming ``disable`` imports the compiler, which takes seconds.
    """
    untraced: dict[str, Callable] = {}  # made once: a new object each time would compile anew each time

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        if "fn" not in untraced:
            untraced["fn"] = torch.compiler.disable(fn)
        return untraced["fn"](*args, **kwargs)

    return call


def init_memory(cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
    """Fresh tables on the CPU (SPEC.md §7), the same numbers in every backend for one seed.

    Returns:
        float32 keys ``[M, H, 2, S, Dk/2]`` and values ``[M, N, Dv]``.

    Raises:
        ValueError: ``memories`` is not an integer of at least 1.
    """
    return Memory(*map(torch.from_numpy, initial_arrays(cfg, memories, seed)))


@_outside_graphs
def init_state(cfg: FwPKMConfig, memory: Memory, batch_size: int) -> State:
    """A state at position 0 that owns a copy of ``memory``; M = 1 is broadcast to B rows in "sequence" scope.

    Gradients flow from the state to ``memory``.

    Raises:
        ValueError: the tables fit neither ``cfg`` nor ``batch_size``.
    """
    validation.check_initial(cfg, memory, batch_size, SELF)
    memories = validation.memories_for(cfg, batch_size)
    tables = (x.expand(memories, *x.shape[1:]).clone(memory_format=torch.contiguous_format) for x in memory)
    return _state(cfg, Memory(*tables), _no_tokens(cfg, memory.keys, batch_size), _position(batch_size, 0))


def fresh_state(cfg: FwPKMConfig, memory: Memory, query: Tensor) -> tuple[State, bool]:
    """What a layer's call without a state begins with, and whether the call may overwrite its tables.

    It may if they are the call's own copy and autograd does not need them; compiled, the operator makes that copy.
    """
    batch = query.shape[0]
    if torch.compiler.is_compiling() and fast.serves_traced(None, cfg, memory, query):
        return _state(cfg, memory, _no_tokens(cfg, memory.keys, batch), _position(batch, 0)), False
    return init_state(cfg, memory, batch), not memory.values.requires_grad


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
    """Read T tokens and write every chunk that they complete (SPEC.md §5).

    Args:
        cfg: the configuration.
        state: where the sequence stands; left as it was, unless ``inplace``.
        query: ``[B, T, H*Dk]``, any floating dtype.
        value: ``[B, T, Dv]``.
        gate: ``[B, T]`` in [0, 1], or None for 1.
        mask: ``[B, T]`` bool, False for tokens that never write, or None for True.
        update: False only reads: no write, nothing pending, position unchanged.
        inplace: the state's value table may be overwritten, which saves one copy of it. torch.compile then runs the
            call between its graphs.
        implementation: None for the fastest that can serve the call, "triton" for the kernels (kernels/), "eager" for
            plain PyTorch. torch.compile keeps a call that the kernels serve in its graph.

    Returns:
        output ``[B, T, Dv]`` in the query's dtype, the next state, and the trace.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what was received.
        RuntimeError: ``inplace`` on a table that autograd still needs.
    """
    # The operator is functional, as autograd demands: a call that overwrites stays out of the graph.
    traced = torch.compiler.is_compiling() and not inplace
    if traced and fast.serves_traced(implementation, cfg, state.memory, query):
        return operators.apply(cfg, state, query, value, gate, mask, update)
    return _apply(cfg, state, query, value, gate, mask, update, inplace, implementation)


@_outside_graphs
def _apply(
    cfg: FwPKMConfig,
    state: State,
    query: Tensor,
    value: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    update: bool,
    inplace: bool,
    implementation: str | None,
) -> tuple[Tensor, State, Trace]:
    _check_apply(cfg, state, query, value, gate, mask)
    _check_inplace(state.memory, inplace)
    length, position = query.shape[1], validation.check_position(state.position.tolist())
    if update:
        validation.check_length(position, length)
    if fast.serves(implementation, cfg, state.memory, query) and length:
        given = Tokens(query, value, gate, mask)
        output, memory, pending, trace = fast.apply(cfg, state, position, given, update, inplace)
        return output, State(memory, *pending, state.position + length) if update else state, trace
    memory = _as_tables(state.memory, query)
    dtype = memory.keys.dtype
    tokens = filled(dtype, Tokens(query, value, gate, mask))
    if length == 0:
        return tokens.value.to(query.dtype), state, _trace(cfg, memory, tokens, [], [], [])
    runs = list(schedule.windows(cfg, position, length)) if update else [schedule.Window(0, length, False)]
    waiting, keys, visits, first = _pending(cfg, state, dtype), memory.keys, [], []
    with _full_precision(query):
        for start, stop, writes in runs:
            part = tokens.slice(start, stop)
            if writes:  # the chunk's earlier tokens are read again, now to write them
                first.append(waiting.length)
                seen, keys = visit_and_write(cfg, keys, join(waiting, part))
                waiting = seen.tokens.slice(cfg.chunk_size, None)
            else:
                first.append(0)
                seen = visit(cfg, keys, part)
                waiting = join(waiting, seen.tokens)
            visits.append(seen)
        reads, values, losses = settle(cfg, memory.values, visits, owned=inplace)
        output = _news(reads, first)
        dead = _news([v.dead for v in visits], first)
        if maybe_any(dead):
            output = output.masked_fill(dead[..., None], torch.nan)
        trace = _trace(cfg, memory, tokens, visits, first, losses)
    if update:
        tables = Memory(keys, values) if losses else state.memory
        state = _state(cfg, tables, waiting, state.position + length)
    return output.to(query.dtype), state, trace


@_outside_graphs
def flush(
    cfg: FwPKMConfig, state: State, *, inplace: bool = False, implementation: str | None = None
) -> tuple[State, Trace]:
    """Write the pending chunk, empty it and restart the count (SPEC.md §5).

    Args:
        cfg: the configuration.
        state: left as it was, unless ``inplace``.
        inplace: the state's value table may be overwritten.
        implementation: as in :func:`apply`.

    Returns:
        the state at position 0, and the trace of that write: losses ``[M, 1]``, slots and weights ``[B, 0, H*k]``.

    Raises:
        ValueError: the state does not fit ``cfg``.
        RuntimeError: ``inplace`` on a table that autograd still needs.
    """
    validation.check_state(cfg, state, None, SELF)
    check_device(state.pending_query, **state._asdict())
    validation.check_position(state.position.tolist())
    _check_inplace(state.memory, inplace)
    memory = _as_tables(state.memory, state.pending_query)
    waiting = _pending(cfg, state, memory.keys.dtype)
    nothing = _no_tokens(cfg, memory.keys, waiting.mask.shape[0])
    losses: list[Tensor] = []
    visits: list[Visit] = []
    served = fast.serves(implementation, cfg, memory, waiting.query)
    if waiting.length > cfg.lookahead and served:
        memory, trace = fast.flush(cfg, memory, waiting, inplace)
        writes = torch.tensor(schedule.flush_writes(cfg, waiting.length))
        trace = trace._replace(writes=writes)
        return _state(cfg, memory, nothing, torch.zeros_like(state.position)), trace
    if waiting.length > cfg.lookahead:  # else no token has a pair
        with _full_precision(memory.keys):
            seen, keys = visit_and_write(cfg, memory.keys, waiting)
            _, values, losses = settle(cfg, memory.values, [seen], owned=inplace)
        memory, visits = Memory(keys, values), [seen]
    trace = _trace(cfg, memory, nothing, visits, [waiting.length] * len(visits), losses, columns=1)
    trace = trace._replace(writes=torch.tensor(schedule.flush_writes(cfg, waiting.length)))
    tables = memory if losses else state.memory
    return _state(cfg, tables, nothing, torch.zeros_like(state.position)), trace


@_outside_graphs
def lookup(cfg: FwPKMConfig, memory: Memory, query: Tensor, *, implementation: str | None = None) -> Lookup:
    """Read the tables (SPEC.md §2): query ``[B, n, H*Dk]`` -> output ``[B, n, Dv]``, slots, weights ``[B, n, H*k]``.

    A token whose query or selected scores are not finite reads NaN. ``implementation`` is as in :func:`apply`.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    validation.check_lookup(cfg, memory, query, SELF)
    check_device(query, memory=memory)
    served = fast.serves(implementation, cfg, memory, query)
    memory = _as_tables(memory, query)
    if query.shape[1] == 0:
        entries = memory.keys.new_zeros(query.shape[0], 0, cfg.slots_per_token)
        return Lookup(query.new_zeros(query.shape[0], 0, cfg.value_dim), entries.long(), entries)
    if served:
        return fast.lookup(cfg, memory, query)
    nothing = query.new_zeros(*query.shape[:2], cfg.value_dim)
    with _full_precision(query):
        seen = visit(cfg, memory.keys, filled(memory.keys.dtype, Tokens(query, nothing, None, None)))
        (read,), _, _ = settle(cfg, memory.values, [seen], owned=False)
        dead = seen.dead[..., None]
        weights = seen.weights.masked_fill(dead, torch.nan)
    return Lookup(read.masked_fill(dead, torch.nan).to(query.dtype), seen.slots, weights)


@_outside_graphs
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
    """Write one chunk (SPEC.md §4) whose targets are already shifted.

    Args:
        cfg: the configuration.
        memory: the tables to be written; left as they were.
        query: ``[B, n, H*Dk]``.
        target: ``[B, n, Dv]``, u_t.
        gate: ``[B, n]``, or None for 1.
        mask: ``[B, n]`` bool, or None for True.
        pair: ``[B, n]`` bool, which tokens have a target; None for all unmasked ones.
        implementation: as in :func:`apply`.

    Returns:
        the new tables and the losses ``[M]``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    validation.check_chunk(cfg, memory, Tokens(query, target, gate, mask), pair, SELF)
    check_device(query, memory=memory, target=target, gate=gate, mask=mask, pair=pair)
    served = fast.serves(implementation, cfg, memory, query)
    tables = _as_tables(memory, query)
    if query.shape[1] == 0:
        return memory, Losses(*tables.keys.new_zeros(2, tables.keys.shape[0]))
    if served:
        return fast.chunk_update(cfg, memory, query, target, gate, mask, pair)
    with _full_precision(query):
        chunk = filled(tables.keys.dtype, Tokens(query, target, gate, mask))
        seen, keys = visit_chunk(cfg, tables.keys, chunk, pair)
        _, values, (memorization,) = settle(cfg, tables.values, [seen], owned=False)
    return Memory(keys, values), Losses(memorization, seen.addressing)


def detach(state: State) -> State:
    """The state without its gradient history: truncated backpropagation between calls."""
    return State(Memory(*(x.detach() for x in state.memory)), *(x.detach() for x in state[1:]))


def reset(state: State, memory: Memory, rows: Sequence[int] | Sequence[bool] | Tensor | np.ndarray | int) -> State:
    """Give rows their initial memory back and mask their pending tokens; the count goes on (SPEC.md §5).

    Args:
        state: left as it was.
        memory: the initial tables, M = 1 or that of the state.
        rows: integers, or a bool mask ``[B]``; all of them where one table serves the batch.

    Raises:
        ValueError: rows out of range, some of the rows that share one table, or tables of other shapes.
    """
    validation.check_reset(state, memory, Tensor)
    batch, memories = state.position.shape[0], state.memory.keys.shape[0]
    rows = to_numpy(rows) if isinstance(rows, Tensor) else rows
    chosen = torch.from_numpy(validation.row_mask(rows, batch, memories)).to(state.pending_mask.device)

    def blend(fresh: Tensor, current: Tensor) -> Tensor:
        pick = chosen[: current.shape[0]].view(-1, *[1] * (current.ndim - 1))
        return torch.where(pick, fresh.to(current.dtype), current)

    tables = Memory(*map(blend, memory, state.memory))
    pending = Tokens(*(blend(torch.zeros_like(x[:1]), x) for x in state.pending))
    return State(tables, *pending, position=state.position)


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
    """Gradients of Σ output · cotangent with respect to every argument; zeros where one has no influence.

    Args:
        fn: takes the arguments one by one, returns an array or a tuple of arrays.
        args: floating arrays.
        cotangents: one for each output, in its shape.

    Returns:
        a gradient for each argument, in its shape.
    """
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


_FITTING: set[tuple] = set()
_MOST_KINDS = 1000


def _check_apply(
    cfg: FwPKMConfig, state: State, query: Tensor, value: Tensor, gate: Tensor | None, mask: Tensor | None
) -> None:
    """Check the arguments of ``apply``, of one kind once: that takes longer than some kernels.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what was received.
    """
    kind = _kind_of(cfg, state, query, value, gate, mask)
    if kind is not None and kind in _FITTING:
        return
    validation.check_apply(cfg, state, Tokens(query, value, gate, mask), SELF)
    check_device(query, value=value, gate=gate, mask=mask, **state._asdict())
    if len(_FITTING) > _MOST_KINDS:
        _FITTING.clear()
    if kind is not None:
        _FITTING.add(kind)


def _kind_of(cfg: FwPKMConfig, state: State, *tokens: Tensor | None) -> tuple | None:
    """What the checks look at; None of what is no tensor, or has symbols for sizes: those have no hash."""
    if not (isinstance(cfg, FwPKMConfig) and isinstance(state, State) and isinstance(state.memory, Memory)):
        return None
    leaves = (*state.memory, *state[1:], *tokens)
    if not all([x is None or isinstance(x, Tensor) for x in leaves]):
        return None
    kind = (cfg, *[None if x is None else (x.shape, x.dtype, x.device) for x in leaves])
    try:
        hash(kind)
    except TypeError:
        return None
    return kind


def check_device(query: Tensor, **others: Any) -> None:
    """Raise a ValueError unless all tensors but ``position`` lie where the query does."""
    for name, x in others.items():
        if isinstance(x, Memory):
            check_device(query, **{f"{name}.{field}": table for field, table in x._asdict().items()})
        elif x is not None and name != "position" and x.device != query.device:
            raise ValueError(f"{name} must be on the query's device, {query.device}. Received: {name} on {x.device}")


def _check_inplace(memory: Memory, inplace: bool) -> None:
    if inplace and torch.is_grad_enabled() and memory.values.requires_grad:
        raise RuntimeError(
            "inplace=True would overwrite state.memory.values, which autograd still needs: pass detach(state), or "
            "inplace=False. Received: a table with requires_grad=True"
        )


def _position(batch_size: int, position: int) -> Tensor:
    return torch.full((batch_size,), position, dtype=torch.int32, device="cpu")


def _no_tokens(cfg: FwPKMConfig, keys: Tensor, batch_size: int) -> Tokens:
    query = keys.new_zeros(batch_size, 0, cfg.num_heads * cfg.key_dim)
    return filled(keys.dtype, Tokens(query, keys.new_zeros(batch_size, 0, cfg.value_dim)))


def _pending(cfg: FwPKMConfig, state: State, dtype: torch.dtype) -> Tokens:
    """The valid entries of the state's buffers."""
    return filled(dtype, state.pending).slice(0, schedule.pending(cfg, int(state.position[0])))


def _state(cfg: FwPKMConfig, memory: Memory, waiting: Tokens, position: Tensor) -> State:
    return State.of(memory, pad(waiting, cfg.capacity), position)


def _news(parts: list[Tensor], first: list[int]) -> Tensor:
    """Windows ``[B, n, ...]`` end to end, each from the token on that this call brought."""
    return torch.cat([x[:, n:] for x, n in zip(parts, first)], dim=1)


def _trace(
    cfg: FwPKMConfig,
    memory: Memory,
    tokens: Tokens,
    visits: list[Visit],
    first: list[int],
    losses: list[Tensor],
    columns: int | None = None,
) -> Trace:
    """The record of a call; the reads of window i that are news begin at its token first[i]."""
    columns = schedule.max_writes(cfg, tokens.length) if columns is None else columns
    empty = tokens.mask.new_zeros(tokens.mask.shape[0], 0, cfg.slots_per_token)
    slots, weights = empty.long(), empty.to(memory.keys.dtype)
    if visits:
        slots = _news([v.slots for v in visits], first)
        weights = _news([v.weights.detach().masked_fill(v.dead[..., None], torch.nan) for v in visits], first)
    none = memory.keys.new_zeros(memory.keys.shape[0], 0)
    kinds = losses, [v.addressing for v in visits if v.addressing is not None]
    columns_of = (torch.cat([none, *(x[:, None] for x in kind)], dim=1) for kind in kinds)
    padded = Losses(*(F.pad(x, (0, columns - x.shape[1])).detach() for x in columns_of))
    return Trace(slots, weights, *padded, writes=torch.tensor(len(losses)))
