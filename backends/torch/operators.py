"""The kernels as operators of torch, which torch.compile keeps in its graph (SPEC.md §8).

``fwpkm::apply`` is functional: it clones the table once, and what it returns shares no memory. Where a call stands is
known only when it runs, so its residuals have space for any position. ``fwpkm::decode`` overwrites the state and has no
gradient. Operators take and return flat lists: those of the NamedTuples here (flat.py).
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm import schedule, validation
from fwpkm.backends.torch import fast
from fwpkm.backends.torch.flat import flat, flatten, leaf_names, schema, unflatten
from fwpkm.backends.torch.tokens import pad
from fwpkm.backends.torch.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, Trace
from fwpkm.tokens import NUMBERS, TOKEN_FIELDS, Tokens

_GRADIENTS = ("keys", "values", *(f"pending_{name}" for name in NUMBERS), *NUMBERS)
"""What ``fwpkm::apply_backward`` returns."""

unpacked = functools.lru_cache(FwPKMConfig.from_json)
"""A configuration from an operator's argument."""


@flat
class _Apply(NamedTuple):
    """What ``fwpkm::apply`` takes."""

    config: str
    state: State
    tokens: Tokens
    update: bool
    save: bool


@flat
class _Applied(NamedTuple):
    """What it returns, before the residuals that a backward needs; the state is empty where nothing is updated."""

    output: Tensor
    state: State
    trace: Trace


@flat
class _Saved(NamedTuple):
    """What it keeps for its backward."""

    pending: Tokens
    position: Tensor
    tokens: Tokens
    residuals: Any
    """Bytes of a workspace, or None where no backward will come."""


@flat
class _Backward(NamedTuple):
    """What ``fwpkm::apply_backward`` takes."""

    config: str
    saved: _Saved
    d_output: Tensor | None
    d_memory: Memory
    d_pending: Tokens
    update: bool
    table: bool
    """Whether the gradient of the value table is asked for."""


@flat
class _Decode(NamedTuple):
    """What ``fwpkm::decode`` takes."""

    config: str
    state: State
    tokens: Tokens


def apply(cfg: FwPKMConfig, state: State, tokens: Tokens, update: bool) -> tuple[Tensor, State, Trace]:
    """``ops.apply`` as one operator. A memory of M = 1 serves as that of each sequence."""
    leaves = [*flatten(state), *flatten(tokens)]
    save = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in leaves])
    results = torch.ops.fwpkm.apply(*flatten(_Apply(cfg.to_json(), state, tokens, update, save)))
    applied = unflatten(_Applied, results)
    if update:
        state = applied.state
    elif state.memory.keys.shape[0] == 1:
        state = state._replace(memory=_of_each(cfg, state.memory, tokens.query))
    return applied.output, state, applied.trace._replace(weights=applied.trace.weights.detach())


def _of_each(cfg: FwPKMConfig, memory: Memory, query: Tensor) -> Memory:
    """The tables that the call reads: those of M = 1 stand for each sequence's."""
    memories = validation.memories_for(cfg, query.shape[0])
    if memory.keys.shape[0] != 1 or memories == 1:
        return memory
    return Memory(*(x.expand(memories, *x.shape[1:]) for x in memory))


def _check(cfg: FwPKMConfig, state: State, tokens: Tokens) -> None:
    """What ``ops.apply`` checks, of arguments that are traced: shapes, dtypes, and that the kernels serve them.

    Raises:
        ValueError: names the argument, what was expected and what was received.
    """
    from fwpkm import kernels

    state = state._replace(memory=_of_each(cfg, state.memory, tokens.query))
    validation.check_apply(cfg, state, tokens, SELF)
    reason = kernels.why_unsupported(cfg, state.memory, tokens.query)
    if reason is not None:
        raise ValueError(f"the kernels cannot serve this call: {reason}")


def _plan(cfg: FwPKMConfig, position: Tensor, query: Tensor, update: bool) -> Any:
    from fwpkm.kernels.runtime import windows

    at, (batch, length) = validation.check_position(position.tolist()), query.shape[:2]
    if update:
        validation.check_length(at, length)
    return windows.plan(cfg, at, length, batch, update)


def _residuals_of(cfg: FwPKMConfig, query: Tensor, update: bool) -> tuple:
    """What the layout of a call's residuals follows from, at any position; of a query that is traced, symbols."""
    from fwpkm.kernels.runtime import windows

    batch, length = query.shape[:2]
    return cfg, windows.bounds(cfg, length, batch, update), validation.memories_for(cfg, batch), batch, True


@torch.library.custom_op("fwpkm::apply", mutates_args=(), schema=f"({schema(_Apply)}) -> Tensor[]")
def _apply(*arguments: Any) -> list[Tensor]:
    from fwpkm.kernels.runtime import call, windows

    config, before, new_tokens, update, save = unflatten(_Apply, arguments)
    cfg, query = unpacked(config), new_tokens.query
    batch, length = query.shape[:2]
    memories = validation.memories_for(cfg, batch)
    plan = _plan(cfg, before.position, query, update)
    stream = fast.stream_of(before.pending, plan.num_pending, new_tokens)
    keys, values = (x.expand(memories, *x.shape[1:]).to(torch.float32).resolve_neg() for x in before.memory)
    # With update=False nothing is written, and no table is returned.
    table = values.clone(memory_format=torch.contiguous_format) if update else values.contiguous()
    most, tokens = windows.bounds(cfg, length, batch, update), stream.map(fast.plain)
    with fast.on_device_of(query):
        result = call.forward(cfg, plan, keys.contiguous(), table, tokens, None, save, query.dtype, most)
        if update:
            memory = Memory(result.keys if plan.windows[0].writes else keys.clone(), table)
            pending = pad(fast.unwritten(stream, plan.first_unwritten, result.residuals["flags"]), cfg.capacity)
            state = State.of(memory, pending.map(torch.clone), before.position + length)
        else:
            state = _no_state(query)
        losses = fast.losses_of(result, schedule.max_writes(cfg, length))
        losses = {name: x.contiguous() for name, x in losses.items()}
    trace = Trace(result.slots, result.weights, **losses, writes=torch.tensor(plan.num_writes))
    return [*flatten(_Applied(result.output, state, trace)), *([result.residuals.buffer] if save else [])]


def _no_state(query: Tensor) -> State:
    """What stands for a state that is not returned."""
    return unflatten(State, iter(lambda: query.new_empty(0), None))


@_apply.register_fake
def _(*arguments: Any) -> list[Tensor]:
    config, before, tokens, update, save = unflatten(_Apply, arguments)
    cfg, query = unpacked(config), tokens.query
    _check(cfg, before, tokens)
    batch, length = query.shape[:2]
    memories, capacity = validation.memories_for(cfg, batch), cfg.capacity
    columns, entries = schedule.max_writes(cfg, length), cfg.slots_per_token
    new = functools.partial(torch.empty, device=query.device, dtype=torch.float32)
    if update:
        memory = Memory(*(new(memories, *x.shape[1:]) for x in before.memory))
        dtypes = {"float": torch.float32, "bool": torch.bool}
        shapes = {name: x.shape[2:] for name, x in before.pending._asdict().items()}
        pending = {
            field.name: new(batch, capacity, *shapes[field.name], dtype=dtypes[field.kind]) for field in TOKEN_FIELDS
        }
        state = State.of(memory, Tokens(**pending), torch.empty_like(before.position))
    else:
        state = _no_state(query)
    slots, weights = new(batch, length, entries, dtype=torch.int64), new(batch, length, entries)
    writes = torch.empty((), dtype=torch.int64, device="cpu")
    trace = Trace(slots, weights, new(memories, columns), new(memories, columns), writes)
    residuals = []
    if save:
        from fwpkm.kernels.runtime import layouts

        layout = layouts.layout_of_residuals(*_residuals_of(cfg, query, update))
        residuals = [new(layout.size, dtype=torch.uint8)]
    return [*flatten(_Applied(query.new_empty(batch, length, cfg.value_dim), state, trace)), *residuals]


def _set_up(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    config, state, tokens, update, _ = unflatten(_Apply, inputs)
    results = iter(output)
    unflatten(_Applied, results)
    ctx.set_materialize_grads(False)
    ctx.config, ctx.update, ctx.shapes = config, update, Memory(*(x.shape for x in state.memory))
    ctx.save_for_backward(*flatten(_Saved(state.pending, state.position, tokens, next(results, None))))


def _backward(ctx: Any, d_results: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved, d = unflatten(_Saved, ctx.saved_tensors), unflatten(_Applied, d_results)
    d_memory, d_pending = d.state.memory, d.state.pending._replace(mask=None)
    if not ctx.update:
        d_memory, d_pending = Memory(None, None), Tokens(None, None)
    if all([x is None for x in (d.output, *d_memory, *d_pending)]):
        return (None,) * len(ctx.needs_input_grad)
    table = unflatten(_Apply, ctx.needs_input_grad).state.memory.values
    arguments = _Backward(ctx.config, saved, d.output, d_memory, d_pending, ctx.update, table)
    gradients = dict(zip(_GRADIENTS, torch.ops.fwpkm.apply_backward(*flatten(arguments))))
    for name, shape in ctx.shapes._asdict().items():
        x = gradients[name]
        gradients[name] = x.sum(0, keepdim=True) if x.numel() and x.shape[0] != shape[0] else x
    memory = Memory(gradients["keys"], gradients["values"] if table else None)
    pending = Tokens(**{name: gradients[f"pending_{name}"] for name in NUMBERS})
    tokens = {name: gradients[name] for name in NUMBERS if getattr(saved.tokens, name) is not None}
    state = State.of(memory, pending, None)
    return tuple(flatten(_Apply(None, state, Tokens(**tokens), None, None)))  # type: ignore[arg-type]


_apply.register_autograd(_backward, setup_context=_set_up)


@torch.library.custom_op("fwpkm::apply_backward", mutates_args=(), schema=f"({schema(_Backward)}) -> Tensor[]")
def _apply_backward(*arguments: Any) -> list[Tensor]:
    from fwpkm.kernels.runtime import call, layouts, workspace

    config, saved, d_output, d_memory, d_pending, update, table = unflatten(_Backward, arguments)
    cfg, query = unpacked(config), saved.tokens.query
    batch = query.shape[0]
    plan = _plan(cfg, saved.position, query, update)
    stream = fast.stream_of(saved.pending, plan.num_pending, saved.tokens).map(fast.plain)
    residuals = workspace.Workspace(layouts.residuals_layout(*_residuals_of(cfg, query, update)), saved.residuals)
    d_output, d_keys, d_values = (fast.plain(x) for x in (d_output, *d_memory))
    shape = torch.Size((validation.memories_for(cfg, batch), cfg.num_slots, cfg.value_dim)) if table else None
    with fast.on_device_of(query):
        found = call.backward(cfg, plan, stream, residuals, d_output, d_keys, d_values, shape)
        first, num_pending = plan.first_unwritten, plan.num_pending
        flags = residuals["flags"][: batch * plan.num_tokens].view(batch, plan.num_tokens)
        dead = (flags[:, first:] & fast.DEAD) != 0
        of_pending, of_call = [], []
        for name in NUMBERS:
            pending, new, d_left = (getattr(x, name) for x in (saved.pending, saved.tokens, d_pending))
            of_stream = getattr(found.tokens, name)
            if of_stream is None:
                of_stream = pending.new_zeros(batch, plan.num_tokens)
            if d_left is not None and dead.shape[1]:
                blank = dead if d_left.ndim == 2 else dead[..., None]
                of_stream = of_stream.to(d_left.dtype)
                of_stream[:, first:] += d_left[:, : dead.shape[1]].masked_fill(blank, 0)
            d_pending_field = torch.zeros_like(pending)
            d_pending_field[:, :num_pending] = of_stream[:, :num_pending]
            of_pending.append(d_pending_field)
            dtype = (pending if new is None else new).dtype
            of_call.append(of_stream[:, num_pending:].to(dtype, copy=True).contiguous())
        values = query.new_empty(0) if found.values is None else found.values
    return [found.keys.clone(), values, *of_pending, *of_call]


@_apply_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    config, saved, _, _, _, _, table = unflatten(_Backward, arguments)
    cfg, query = unpacked(config), saved.tokens.query
    memories = validation.memories_for(cfg, query.shape[0])
    new = functools.partial(torch.empty, device=query.device, dtype=torch.float32)
    keys = new(memories, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2)
    values = new(memories, cfg.num_slots, cfg.value_dim) if table else query.new_empty(0)
    pending = {name: getattr(saved.pending, name) for name in NUMBERS}
    dtypes = {name: x.dtype for name, x in (pending | saved.tokens.present()).items()}
    of_call = [new(*query.shape[:2], *x.shape[2:], dtype=dtypes[name]) for name, x in pending.items()]
    return [keys, values, *map(torch.empty_like, pending.values()), *of_call]


@torch.library.custom_op(
    "fwpkm::decode",
    mutates_args=[f"state_{name}" for name in leaf_names(State)],
    schema=f"({schema(_Decode, mutated='state')}) -> Tensor",
)
def _decode(*arguments: Any) -> Tensor:
    from fwpkm.kernels.runtime import decoding

    config, state, tokens = unflatten(_Decode, arguments)
    with fast.on_device_of(tokens.query):
        return decoding.decode(unpacked(config), state, tokens)


@_decode.register_fake
def _(*arguments: Any) -> Tensor:
    config, state, tokens = unflatten(_Decode, arguments)
    cfg = unpacked(config)
    _check(cfg, state, tokens)
    fast.check_decoding(state, tokens.query)
    return tokens.query.new_empty(*tokens.query.shape[:2], cfg.value_dim)


def decode(cfg: FwPKMConfig, state: State, tokens: Tokens) -> Tensor:
    """``ops.decode`` on the kernels."""
    return torch.ops.fwpkm.decode(*flatten(_Decode(cfg.to_json(), state, tokens.map(fast.plain))))
