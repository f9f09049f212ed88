"""The functions of ops.py on the Triton kernels: the same calls, the same results (SPEC.md §8).

Nothing here waits for the GPU: the schedule follows from ``position``, which lives on the CPU.
"""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fwpkm import schedule
from fwpkm.backends.torch.flat import flat, flatten, unflatten
from fwpkm.backends.torch.left_aligned import left_align, moved
from fwpkm.backends.torch.tokens import filled, join, pad, without
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace
from fwpkm.tokens import Tokens

DEAD = 2
"""The kernels' flag of a token that is not finite; importing theirs would import triton."""
_EVERY_TOKEN = 2**30  # a chunk size that no call reaches


def check_decoding(state: State, query: Tensor) -> None:
    """Raise a ValueError unless one token can be read into a state that may be overwritten."""
    if query.shape[1] != 1:
        raise ValueError(
            f"query must be [B, 1, H*Dk]: decode reads one token of each sequence. Received: {tuple(query.shape)}"
        )
    if state.position.device != query.device:
        raise ValueError(
            f"state.position must be on the query's device, {query.device}: decode takes what start_decoding(state) "
            f"returns. Received: position on {state.position.device}"
        )
    for name, x in (*state.memory._asdict().items(), *state._asdict().items()):
        if not isinstance(x, Tensor):
            continue
        narrow = x.is_floating_point() and x.element_size() < 4
        if narrow or x.requires_grad or not x.is_contiguous():
            raise ValueError(
                f"{name} of the state must be float32, contiguous and without gradient: decode takes what "
                f"start_decoding(state) returns. Received: {x.dtype}, contiguous={x.is_contiguous()}, "
                f"requires_grad={x.requires_grad}"
            )


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def plain(x: Tensor | None) -> Tensor | None:
    """As kernels read it: contiguous, and without a sign that torch has yet to apply."""
    return None if x is None else (x.resolve_neg() if x.is_neg() else x).contiguous()


def stream_of(pending: Tokens, num_pending: int, new_tokens: Tokens) -> Tokens:
    """The tokens that are pending, then those of the call; these as they are where nothing is pending."""
    if not num_pending:
        return new_tokens
    return join(*(filled(torch.float32, x) for x in (pending.slice(0, num_pending), new_tokens)))


def unwritten(stream: Tokens, first: int, flags: Tensor) -> Tokens:
    """What no write has consumed: from token ``first`` on, the dead ones ``flags`` [B·n] blanked."""
    shape = stream.query.shape[:2]
    pending = filled(torch.float32, stream.slice(first, None))
    if not pending.length:
        return pending
    return without(pending, (flags[: shape.numel()].view(shape)[:, first:] & DEAD) != 0)


def apply(
    cfg: FwPKMConfig, state: State, position: int, new_tokens: Tokens, update: bool, owned: bool
) -> tuple[Tensor, Memory, Tokens, Trace]:
    """Read T tokens and write every chunk that they complete.

    Args:
        cfg: the configuration.
        state: where the sequence stands.
        position: of the state.
        new_tokens: as the caller passed them; gate and mask may be None.
        update: False only reads.
        owned: the value table may be overwritten.

    Returns:
        output, tables, what is pending then, and the trace.
    """
    from fwpkm.kernels.runtime import windows

    batch, length = new_tokens.query.shape[:2]
    plan = windows.plan(cfg, position, length, batch, update)
    pending = state.pending
    stream = stream_of(pending, plan.num_pending, new_tokens)
    columns, dtype = schedule.max_writes(cfg, length), new_tokens.query.dtype
    done = _run(cfg, plan, state.memory, stream, None, owned, columns, dtype)
    if plan.num_pending or plan.first_unwritten < plan.num_tokens:  # else there are zeros before and after
        pending = pad(unwritten(stream, plan.first_unwritten, done.flags), cfg.capacity)
    return done.output, done.memory, pending, done.trace


def apply_rows(
    cfg: FwPKMConfig, state: State, inputs: Tokens, cu_seqlens: Tensor | None, update: bool, owned: bool
) -> tuple[Tensor, State, Trace]:
    """``apply`` of rows at positions of their own, masked or packed: the output, the next state and the trace.

    Waits for the device only to learn how long packed rows are, or how far rows go on whose position the host keeps.
    """
    from fwpkm.kernels.runtime import windows

    device, position, batch = inputs.query.device, state.position, state.position.shape[0]
    columns = schedule.max_writes(cfg, inputs.length)
    num_pending = schedule.pending(cfg, position).long() * update
    most_pending = int(num_pending.max()) if position.device.type == "cpu" else cfg.capacity * update
    longest = most_pending + _longest(inputs, cu_seqlens)
    pending = state.pending if most_pending else None
    here = inputs._replace(mask=None if inputs.mask is None else inputs.mask.to(device))
    ends = None if cu_seqlens is None else cu_seqlens.to(device)
    rows = left_align(cfg, pending, num_pending.to(device), here, ends, longest)
    plan = windows.plan(cfg, 0, longest, batch, update)
    pair = rows.pair if plan.num_writes else None
    done = _run(cfg, plan, state.memory, rows.tokens, pair, owned, columns, inputs.query.dtype)
    shape = inputs.query.shape[:2]

    def of_call(x: Tensor) -> Tensor:
        return moved(x.flatten(0, 1), rows.entries, rows.cells).view(*shape, *x.shape[2:])

    record = done.trace
    losses = {x: getattr(record, x)[:, :columns] for x in ("memorization", "addressing")}
    writes = (rows.due * update).int()
    trace = Trace(of_call(record.slots), of_call(record.weights), **losses, writes=writes)
    if update:
        dead = (done.flags[: rows.pair.numel()].view_as(rows.pair) & DEAD) != 0
        left = rows.left(cfg, dead)
        position = schedule.reduced(cfg, position) + rows.num_new.to(position)
        state = State.of(done.memory, left, position)
    return of_call(done.output), state, trace


def _longest(inputs: Tokens, cu_seqlens: Tensor | None) -> int:
    """At least the most unmasked tokens of a row."""
    if cu_seqlens is not None:
        return int(cu_seqlens.diff().max())
    if inputs.mask is not None and inputs.mask.device.type == "cpu":
        return int(inputs.mask.sum(1).max())
    return inputs.length


def flush(cfg: FwPKMConfig, memory: Memory, pending: Tokens, owned: bool) -> tuple[Memory, Losses]:
    """Write the pending tokens: the tables, and the losses ``[M, 1]``."""
    from fwpkm.kernels.runtime import windows

    plan = windows.write(pending.length, pending.query.shape[0])
    done = _run(cfg, plan, memory, pending, None, owned, 1, pending.query.dtype)
    return done.memory, Losses(done.trace.memorization, done.trace.addressing)


def lookup(cfg: FwPKMConfig, memory: Memory, query: Tensor) -> Lookup:
    """Read the tables."""
    from fwpkm.kernels.runtime import windows

    nothing = query.new_zeros(*query.shape[:2], cfg.value_dim)
    plan = windows.plan(cfg, 0, query.shape[1], query.shape[0], update=False)
    done = _run(cfg, plan, memory, Tokens(query, nothing), None, False, 0, query.dtype)
    return Lookup(done.output, done.trace.slots, done.weights)


def chunk_update(cfg: FwPKMConfig, memory: Memory, chunk: Tokens, pair: Tensor | None) -> tuple[Memory, Losses]:
    """Write one chunk whose targets are already shifted."""
    from fwpkm.kernels.runtime import windows

    cfg = dataclasses.replace(cfg, lookahead=0, chunk_size=_EVERY_TOKEN)
    batch, length = chunk.query.shape[:2]
    plan = windows.write(length, batch, shifted=True)
    pair = chunk.query.new_ones(batch, length, dtype=torch.bool) if pair is None else pair
    done = _run(cfg, plan, memory, chunk, pair, False, 1, chunk.query.dtype)
    return done.memory, Losses(done.trace.memorization[:, 0], done.trace.addressing[:, 0])


class _Done(NamedTuple):
    """What a call gives."""

    output: Tensor
    memory: Memory
    flags: Tensor
    """At least those of the stream."""
    trace: Trace
    weights: Tensor
    """Those of the trace, differentiable."""


class _Settings(NamedTuple):
    """What the launches of a call follow from, beside its tensors."""

    cfg: FwPKMConfig
    plan: Any
    owned: bool
    """The value table may be overwritten."""
    dtype: torch.dtype
    """Of the output."""


def _run(
    cfg: FwPKMConfig, plan: Any, memory: Memory, stream: Tokens, pair: Tensor | None, owned: bool, columns: int,
    dtype: torch.dtype,
) -> _Done:  # fmt: skip
    """One call: output in ``dtype``, and a trace of so many columns."""
    keys, values = (table.to(torch.float32).resolve_neg() for table in memory)
    stream, pair, settings = stream.map(plain), plain(pair), _Settings(cfg, plan, owned, dtype)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (keys, values, *stream)):
        flat_inputs = (keys, values, pair, *flatten(stream))
        results = unflatten(_Results, _Call.apply(settings, *flat_inputs))
    else:
        results = _results(*_forward(settings, keys, values, stream, pair, False))
    writes = plan.num_writes
    if writes:
        memory = Memory(results.keys, results.values)
    trace = Trace(results.slots, results.weights.detach(), **losses_of(results, columns), writes=torch.tensor(writes))
    return _Done(results.output, memory, results.flags, trace, results.weights)


def losses_of(result: Any, columns: int) -> dict[str, Tensor]:
    """Memorization and addressing of a trace ``[M, columns]``, 0 behind those of its writes."""
    losses = {"memorization": result.memorization.T, "addressing": result.addressing.T}
    rest = columns - len(result.memorization)
    return {name: torch.nn.functional.pad(x, (0, rest)) if rest else x for name, x in losses.items()}


def _forward(
    settings: _Settings, keys: Tensor, values: Tensor, stream: Tokens, pair: Tensor | None, save: bool
) -> tuple[Any, Tensor]:
    """The result, and the table that was written: that of the caller if it is ``owned``, else a copy."""
    from fwpkm.kernels.runtime import call

    cfg, plan, owned, dtype = settings
    if not plan.num_writes:
        values = values.contiguous()
    elif not (owned and values.is_contiguous()):
        values = values.clone(memory_format=torch.contiguous_format)
    with on_device_of(values):
        return call.forward(cfg, plan, keys.contiguous(), values, stream, pair, save, dtype), values


def _by_window(plan: Any, batch: int, d: Tensor) -> Tensor:
    """Gradients of the tokens that a call outputs, ``[B, T, ...]``, as ``[w, ...]`` of its windows."""
    by_window = d.new_zeros(plan.total, *d.shape[2:])
    for start, length, _, first, first_new in plan.windows:
        window = by_window[first : first + batch * length].view(batch, length, *d.shape[2:])
        window[:, first_new - start :] = d[:, first_new - plan.num_pending : start + length - plan.num_pending]
    return by_window


@flat
class _Inputs(NamedTuple):
    """What ``_Call`` takes."""

    settings: Any
    keys: Tensor
    values: Any
    """``[M, N, Dv]``; its gradient may be None."""
    pair: Tensor | None
    tokens: Tokens


@flat
class _Results(NamedTuple):
    """What ``_Call`` returns; of the tables only those that were written."""

    output: Tensor
    keys: Tensor | None
    values: Tensor | None
    slots: Tensor
    weights: Tensor
    memorization: Tensor
    addressing: Tensor
    flags: Tensor


@flat
class _Saved(NamedTuple):
    """What ``_Call`` keeps for its backward."""

    tokens: Tokens
    residuals: Tensor


def _results(result: Any, written: Tensor) -> _Results:
    keys, values = (result.keys, written) if len(result.memorization) else (None, None)
    return _Results(
        result.output, keys, values, result.slots, result.weights, result.memorization, result.addressing,
        result.residuals["flags"],
    )  # fmt: skip


class _Call(torch.autograd.Function):
    """``forward`` and ``backward`` of kernels/runtime/call.py."""

    @staticmethod
    def forward(ctx, *inputs):
        settings, keys, values, pair, tokens = unflatten(_Inputs, inputs)
        save = any(ctx.needs_input_grad)
        result, written = _forward(settings, keys, values, tokens, pair, save)
        results = _results(result, written)
        if results.values is values:
            ctx.mark_dirty(values)
        if save:
            ctx.save_for_backward(*flatten(_Saved(tokens, result.residuals.buffer)))
            ctx.settings, ctx.shape, ctx.layout = settings, written.shape, result.residuals.layout
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(results.slots, results.memorization, results.addressing, results.flags)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_results):
        from fwpkm.kernels.runtime import call
        from fwpkm.kernels.runtime.workspace import Workspace

        d = unflatten(_Results, d_results)
        if d.output is None and d.keys is None and d.values is None and d.weights is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, plan = unflatten(_Saved, ctx.saved_tensors), ctx.settings.plan
        tokens, residuals = saved.tokens, Workspace(ctx.layout, saved.residuals)
        d_weights = None if d.weights is None else _by_window(plan, tokens.query.shape[0], d.weights)
        d_output, d_keys, d_values = (
            None if x is None or x.numel() == 0 else plain(x) for x in (d.output, d.keys, d.values)
        )
        table = ctx.shape if unflatten(_Inputs, ctx.needs_input_grad).values else None
        with on_device_of(tokens.query):
            gradients = call.backward(
                ctx.settings.cfg, plan, tokens, residuals, d_output, d_keys, d_values, table, d_weights
            )
        of_tokens = gradients.tokens._replace(query=gradients.tokens.query.to(tokens.query.dtype))
        return tuple(flatten(_Inputs(None, gradients.keys, gradients.values, None, of_tokens)))
