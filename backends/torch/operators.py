"""The kernels as operators of torch, which torch.compile keeps in its graph (SPEC.md §8).

``fwpkm::apply`` is functional: it clones the table once, and what it returns shares no memory. Where a call stands is
known only when it runs, so what it keeps for the backward has room for any position. ``fwpkm::decode`` overwrites the
state and has no gradient.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fwpkm import schedule, validation
from fwpkm.backends.torch import fast
from fwpkm.backends.torch.tokens import SELF, pad
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, Trace
from fwpkm.tokens import Tokens

_RESULTS = 13
"""How many of the operator's results come before what it keeps."""


unpacked = functools.lru_cache(FwPKMConfig.from_json)
"""A configuration from an operator's argument."""


def apply(
    cfg: FwPKMConfig, state: State, query: Tensor, value: Tensor, gate: Tensor | None, mask: Tensor | None, update: bool
) -> tuple[Tensor, State, Trace]:
    """``ops.apply`` as one operator. A memory of M = 1 serves as that of each sequence."""
    leaves = (*state.memory, *state.pending, query, value, *(() if gate is None else (gate,)))
    save = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    results = torch.ops.fwpkm.apply(cfg.to_json(), *state.memory, *state[1:], query, value, gate, mask, update, save)
    output, keys, values, *pending, position, slots, weights, memorization, addressing, writes = results[:_RESULTS]
    if update:
        pending_query, pending_value, pending_gate, pending_mask = pending
        state = State(Memory(keys, values), pending_query, pending_value, pending_gate, pending_mask, position)
    elif state.memory.keys.shape[0] == 1:
        state = state._replace(memory=_of_each(cfg, state.memory, query))
    return output, state, Trace(slots, weights.detach(), memorization, addressing, writes)


def _of_each(cfg: FwPKMConfig, memory: Memory, query: Tensor) -> Memory:
    """The tables that the call reads: those of M = 1 stand for each sequence's."""
    memories = validation.memories_for(cfg, query.shape[0])
    if memory.keys.shape[0] != 1 or memories == 1:
        return memory
    return Memory(*(x.expand(memories, *x.shape[1:]) for x in memory))


def _check(
    cfg: FwPKMConfig, state: State, query: Tensor, value: Tensor, gate: Tensor | None, mask: Tensor | None
) -> None:
    """What ``ops.apply`` checks, of arguments that are traced: shapes, dtypes, and that the kernels serve them.

    Raises:
        ValueError: names the argument, what was expected and what was received.
    """
    from fwpkm import kernels

    state = state._replace(memory=_of_each(cfg, state.memory, query))
    validation.check_apply(cfg, state, Tokens(query, value, gate, mask), SELF)
    reason = kernels.why_unsupported(cfg, state.memory, query)
    if reason is not None:
        raise ValueError(f"the kernels cannot serve this call: {reason}")


def _plan(cfg: FwPKMConfig, position: Tensor, query: Tensor, update: bool) -> Any:
    from fwpkm.kernels import windows

    at, (batch, length) = validation.check_position(position.tolist()), query.shape[:2]
    if update:
        validation.check_length(at, length)
    return windows.plan(cfg, at, length, batch, update)


def _kept_layout(cfg: FwPKMConfig, query: Tensor, update: bool) -> Any:
    """Of what a call keeps, in room for any position."""
    from fwpkm.kernels import layouts

    return layouts.kept_layout(*_kept(cfg, query, update))


def _kept(cfg: FwPKMConfig, query: Tensor, update: bool) -> tuple:
    """What that layout follows from; of a query that is traced, symbols."""
    from fwpkm.kernels import windows

    batch, length = query.shape[:2]
    return cfg, windows.bounds(cfg, length, batch, update), validation.memories_for(cfg, batch), batch, True


@torch.library.custom_op("fwpkm::apply", mutates_args=())
def _apply(
    config: str, keys: Tensor, values: Tensor, pending_query: Tensor, pending_value: Tensor, pending_gate: Tensor,
    pending_mask: Tensor, position: Tensor, query: Tensor, value: Tensor, gate: Tensor | None, mask: Tensor | None,
    update: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    from fwpkm.kernels import call, windows

    cfg = unpacked(config)
    batch, length = query.shape[:2]
    memories = validation.memories_for(cfg, batch)
    plan = _plan(cfg, position, query, update)
    pending = Tokens(pending_query, pending_value, pending_gate, pending_mask)
    stream = fast.stream_of(pending, plan.arrived, Tokens(query, value, gate, mask))
    tokens: Any = call.Tokens(*map(fast.plain, stream))  # type: ignore[arg-type]
    tables = [x.expand(memories, *x.shape[1:]).to(torch.float32).resolve_neg() for x in (keys, values)]
    # With update=False nothing is written, and no table is returned.
    table = tables[1].clone(memory_format=torch.contiguous_format) if update else tables[1].contiguous()
    most = windows.bounds(cfg, length, batch, update)
    with fast.on_device_of(query):
        result = call.forward(cfg, plan, tables[0].contiguous(), table, tokens, save, query.dtype, most)
        if update:
            new_keys = result.keys if plan.windows[0].writes else tables[0].clone()
            left = pad(fast.left_of(stream, plan.left, result.kept["flags"]), cfg.capacity)
            state = [new_keys, table, *(x.clone() for x in left), position + length]
        else:
            state = [query.new_empty(0) for _ in range(7)]
        writes, columns = len(result.memorization), schedule.max_writes(cfg, length)
        losses = [
            torch.nn.functional.pad(x.T, (0, columns - writes)).contiguous()
            for x in (result.memorization, result.addressing)
        ]
        kept = [result.kept.buffer] if save else []
    return [result.output, *state, result.slots, result.weights, *losses, torch.tensor(writes), *kept]


@_apply.register_fake
def _(
    config, keys, values, pending_query, pending_value, pending_gate, pending_mask, position, query, value, gate, mask,
    update, save,
):  # fmt: skip
    cfg = unpacked(config)
    state = State(Memory(keys, values), pending_query, pending_value, pending_gate, pending_mask, position)
    _check(cfg, state, query, value, gate, mask)
    batch, length = query.shape[:2]
    memories, capacity = validation.memories_for(cfg, batch), cfg.capacity
    columns, entries = schedule.max_writes(cfg, length), cfg.slots_per_token
    new = functools.partial(torch.empty, device=query.device, dtype=torch.float32)
    if update:
        after = [new(memories, *x.shape[1:]) for x in (keys, values)]
        after += [new(batch, capacity, x.shape[-1]) for x in (query, value)]
        after += [new(batch, capacity), new(batch, capacity, dtype=torch.bool), torch.empty_like(position)]
    else:
        after = [query.new_empty(0) for _ in range(7)]
    records = [new(batch, length, entries, dtype=torch.int64), new(batch, length, entries)]
    records += [new(memories, columns), new(memories, columns), torch.empty((), dtype=torch.int64, device="cpu")]
    kept = []
    if save:
        from fwpkm.kernels import layouts

        kept = [new(layouts.layout_of_kept(*_kept(cfg, query, update)).size, dtype=torch.uint8)]
    return [query.new_empty(batch, length, cfg.value_dim), *after, *records, *kept]


def _set_up(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    config, keys, values, *pending, position, query, value, gate, mask, update, save = inputs
    ctx.set_materialize_grads(False)
    ctx.config, ctx.update, ctx.shapes = config, update, (keys.shape, values.shape)
    ctx.save_for_backward(*pending, position, query, value, gate, mask, *(output[_RESULTS:] if save else ()))


def _backward(ctx: Any, d_results: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *pending, position, query, value, gate, mask = ctx.saved_tensors[:9]
    d_output, d_keys, d_values, d_query, d_value, d_gate = d_results[:6]
    if not ctx.update:
        d_keys = d_values = d_query = d_value = d_gate = None
    nothing = (None,) * 14
    if all(d is None for d in (d_output, d_keys, d_values, d_query, d_value, d_gate)):
        return nothing
    gradients = torch.ops.fwpkm.apply_backward(
        ctx.config, *pending, position, query, value, gate, mask, ctx.saved_tensors[9],
        d_output, d_keys, d_values, d_query, d_value, d_gate, ctx.update, ctx.needs_input_grad[2],
    )  # fmt: skip
    keys, values, pending_query, pending_value, pending_gate, query, value, d_gate = gradients
    keys, values = (
        x.sum(0, keepdim=True) if x.numel() and x.shape[0] != shape[0] else x
        for x, shape in zip((keys, values), ctx.shapes)
    )
    values, d_gate = values if ctx.needs_input_grad[2] else None, None if gate is None else d_gate
    of_pending = pending_query, pending_value, pending_gate, None
    return (None, keys, values, *of_pending, None, query, value, d_gate, *nothing[11:])


_apply.register_autograd(_backward, setup_context=_set_up)


@torch.library.custom_op("fwpkm::apply_backward", mutates_args=())
def _apply_backward(
    config: str, pending_query: Tensor, pending_value: Tensor, pending_gate: Tensor, pending_mask: Tensor,
    position: Tensor, query: Tensor, value: Tensor, gate: Tensor | None, mask: Tensor | None, kept: Tensor,
    d_output: Tensor | None, d_keys: Tensor | None, d_values: Tensor | None, d_pending_query: Tensor | None,
    d_pending_value: Tensor | None, d_pending_gate: Tensor | None, update: bool, table: bool,
) -> list[Tensor]:  # fmt: skip
    from fwpkm.kernels import call, reverse, room

    cfg = unpacked(config)
    batch = query.shape[0]
    memories = validation.memories_for(cfg, batch)
    plan = _plan(cfg, position, query, update)
    pending = Tokens(pending_query, pending_value, pending_gate, pending_mask)
    stream = fast.stream_of(pending, plan.arrived, Tokens(query, value, gate, mask))
    tokens: Any = call.Tokens(*map(fast.plain, stream))  # type: ignore[arg-type]
    whole = room.Room(_kept_layout(cfg, query, update), kept)
    d_output, d_keys, d_values = (fast.plain(d) for d in (d_output, d_keys, d_values))
    shape = torch.Size((memories, cfg.num_slots, cfg.value_dim)) if table else None
    with fast.on_device_of(query):
        found = reverse.backward(cfg, plan, tokens, whole, d_output, d_keys, d_values, shape)
        gate_gradient = pending_gate.new_zeros(batch, plan.room) if found.gate is None else found.gate
        of_stream = [found.query, found.value, gate_gradient]
        dead = (whole["flags"][: batch * plan.room].view(batch, plan.room)[:, plan.left :] & fast.DEAD) != 0
        left = dead.shape[1]
        for i, d in enumerate((d_pending_query, d_pending_value, d_pending_gate)):
            if d is not None and left:
                blank = dead if d.ndim == 2 else dead[..., None]
                of_stream[i] = of_stream[i].to(d.dtype)
                of_stream[i][:, plan.left :] += d[:, :left].masked_fill(blank, 0)
        of_pending = [torch.zeros_like(x) for x in (pending_query, pending_value, pending_gate)]
        for into, d in zip(of_pending, of_stream):
            into[:, : plan.arrived] = d[:, : plan.arrived]
        like = (query, value, pending_gate if gate is None else gate)
        of_call = [d[:, plan.arrived :].to(x.dtype, copy=True).contiguous() for d, x in zip(of_stream, like)]
        values = query.new_empty(0) if found.values is None else found.values
    return [found.keys.clone(), values, *of_pending, *of_call]


@_apply_backward.register_fake
def _(
    config, pending_query, pending_value, pending_gate, pending_mask, position, query, value, gate, mask, kept,
    d_output, d_keys, d_values, d_pending_query, d_pending_value, d_pending_gate, update, table,
):  # fmt: skip
    cfg = unpacked(config)
    memories = validation.memories_for(cfg, query.shape[0])
    new = functools.partial(torch.empty, device=query.device, dtype=torch.float32)
    keys = new(memories, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2)
    values = new(memories, cfg.num_slots, cfg.value_dim) if table else query.new_empty(0)
    like = (pending_query, pending_value, pending_gate, query, value)
    of_gate = new(*query.shape[:2], dtype=pending_gate.dtype if gate is None else gate.dtype)
    return [keys, values, *(x.new_empty(x.shape) for x in like), of_gate]


@torch.library.custom_op(
    "fwpkm::decode",
    mutates_args=(
        "keys", "values", "pending_query", "pending_value", "pending_gate", "pending_mask", "position",
    ),
)  # fmt: skip
def _decode(
    config: str, keys: Tensor, values: Tensor, pending_query: Tensor, pending_value: Tensor, pending_gate: Tensor,
    pending_mask: Tensor, position: Tensor, query: Tensor, value: Tensor, gate: Tensor | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    from fwpkm.kernels import decode

    state = State(Memory(keys, values), pending_query, pending_value, pending_gate, pending_mask, position)
    with fast.on_device_of(query):
        return decode.decode(unpacked(config), state, query, value, gate, mask)


@_decode.register_fake
def _(
    config, keys, values, pending_query, pending_value, pending_gate, pending_mask, position, query, value, gate, mask
):  # fmt: skip
    cfg = unpacked(config)
    state = State(Memory(keys, values), pending_query, pending_value, pending_gate, pending_mask, position)
    _check(cfg, state, query, value, gate, mask)
    fast.check_decoding(state, query)
    return query.new_empty(*query.shape[:2], cfg.value_dim)


def decode(
    cfg: FwPKMConfig, state: State, query: Tensor, value: Tensor, gate: Tensor | None, mask: Tensor | None
) -> Tensor:
    """``ops.decode`` on the kernels."""
    given = map(fast.plain, (query, value, gate, mask))
    return torch.ops.fwpkm.decode(cfg.to_json(), *state.memory, *state[1:], *given)
