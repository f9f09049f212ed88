"""The functions of ops.py on the Triton kernels: the same calls, the same results (SPEC.md §8).

Nothing here waits for the GPU: the schedule of rows that are alike follows from a position that the host knows, and
left_aligned.py makes others alike.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm import schedule, validation
from fwpkm.backends.torch.column_parallel import Columns
from fwpkm.backends.torch.derivatives import first_only
from fwpkm.backends.torch.flat import flat, flatten, unflatten
from fwpkm.backends.torch.rows import own_uses
from fwpkm.backends.torch.tokens import filled, join, pad, without
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace
from fwpkm.tokens import Tokens

DEAD = 2
"""The kernels' flag of a token that is not finite; importing theirs would import triton."""
_EVERY_TOKEN = 2**30  # a chunk size that no call reaches


def check_decoding(state: State, query: Tensor) -> None:
    """Raise a ValueError unless one token can be read into a state that may be overwritten."""
    validation.check_one_token(query)
    if state.position.device != query.device:
        raise ValueError(
            f"state.position must be on the tokens' device, {query.device}: decode takes what start_decoding(state) "
            f"returns. Received: position on {state.position.device}"
        )
    for name, x in state.arrays().items():
        narrow = x.is_floating_point() and x.element_size() < 4
        if narrow or x.requires_grad or not x.is_contiguous():
            raise ValueError(
                f"{name.removeprefix('memory.')} of the state must be float32, contiguous and without gradient: decode "
                f"takes what start_decoding(state) returns. Received: {x.dtype}, contiguous={x.is_contiguous()}, "
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


def all_plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each as kernels read it."""
    return [x for x in map(plain, tensors) if x is not None]


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
    cfg: FwPKMConfig, state: State, position: int, new_tokens: Tokens, update: bool, owned: bool,
    initial: Tensor | None = None,
) -> tuple[Tensor, Memory, Tensor | None, Tokens, Trace]:  # fmt: skip
    """Read T tokens and write every chunk that they complete.

    Args:
        cfg: the configuration.
        state: where the sequence stands.
        position: of the state.
        new_tokens: as the caller passed them; gate and mask may be None.
        update: False only reads.
        owned: the value table may be overwritten.
        initial: that of ``run``; what is pending then and the tables are those from before the call.

    Returns:
        output, tables, uses, what is pending then, and the trace.
    """
    from fwpkm.kernels.runtime import windows

    batch, length = new_tokens.query.shape[:2]
    plan = windows.plan(cfg, schedule.reduced(cfg, position), length, batch, update)
    pending = state.pending
    stream = stream_of(pending, plan.num_pending, new_tokens)
    columns, dtype = schedule.max_writes(cfg, length), new_tokens.query.dtype
    done = run(cfg, plan, state.memory, stream, None, owned, columns, dtype, state.maybe_uses, initial)
    if initial is None and (
        plan.num_pending or plan.first_unwritten < plan.num_tokens
    ):  # else there are zeros before and after
        pending = pad(unwritten(stream, plan.first_unwritten, done.flags), cfg.capacity)
    writes = torch.full(done.memory.keys.shape[:1], plan.num_writes, dtype=torch.int32)
    return done.output, done.memory, done.uses, pending, done.trace._replace(writes=writes)


def flush(
    cfg: FwPKMConfig, memory: Memory, pending: Tokens, owned: bool, uses: Tensor | None
) -> tuple[Memory, Tensor | None, Losses]:
    """Write the pending tokens: the tables, the uses, and the losses ``[M, 1]``."""
    from fwpkm.kernels.runtime import windows

    plan = windows.write(pending.length, pending.query.shape[0])
    done = run(cfg, plan, memory, pending, None, owned, 1, pending.query.dtype, uses)
    return done.memory, done.uses, Losses(done.trace.memorization, done.trace.addressing)


def lookup(cfg: FwPKMConfig, memory: Memory, query: Tensor) -> Lookup:
    """Read the tables."""
    from fwpkm.kernels.runtime import windows

    nothing = query.new_zeros(*query.shape[:2], cfg.value_dim)
    plan = windows.plan(cfg, 0, query.shape[1], query.shape[0], update=False)
    done = run(cfg, plan, memory, Tokens(query, nothing), None, False, 0, query.dtype)
    return Lookup(done.output, done.trace.slots, done.weights)


def chunk_update(cfg: FwPKMConfig, memory: Memory, chunk: Tokens, pair: Tensor | None) -> tuple[Memory, Losses]:
    """Write one chunk whose targets are already shifted."""
    from fwpkm.kernels.runtime import windows

    cfg = dataclasses.replace(cfg, lookahead=0, chunk_size=_EVERY_TOKEN)
    batch, length = chunk.query.shape[:2]
    plan = windows.write(length, batch, shifted=True)
    pair = chunk.query.new_ones(batch, length, dtype=torch.bool) if pair is None else pair
    done = run(cfg, plan, memory, chunk, pair, False, 1, chunk.query.dtype)
    return done.memory, Losses(done.trace.memorization[:, 0], done.trace.addressing[:, 0])


class Done(NamedTuple):
    """What a call gives."""

    output: Tensor
    memory: Memory
    flags: Tensor
    """At least those of the stream."""
    trace: Trace
    """Without ``writes``."""
    weights: Tensor
    """Those of the trace, differentiable."""
    uses: Tensor | None


class Settings(NamedTuple):
    """What the launches of a call follow from, beside its tensors."""

    cfg: FwPKMConfig
    plan: Any
    owned: bool
    """The value table may be overwritten."""
    dtype: torch.dtype
    """Of the output."""
    dealt: Columns | None = None
    """Of which columns the table is, where it does not lie whole."""
    overlaid: bool = False
    """Whether what is written is laid over one table of all memories, and not returned."""


def lays_over(cfg: FwPKMConfig, plan: Any, memories: int, initial: Tensor, derived: bool) -> bool:
    """Whether to lay what is written over the one table, where that takes less memory than a table for each memory.

    A gradient needs the rows that were written in any case; but it cannot keep an inference tensor.
    """
    if derived:
        return not initial.is_inference()
    return plan.windows[-1].first * cfg.slots_per_token < memories * cfg.num_slots


def run(
    cfg: FwPKMConfig, plan: Any, memory: Memory, stream: Tokens, pair: Tensor | None, owned: bool, columns: int,
    dtype: torch.dtype, uses: Tensor | None = None, initial: Tensor | None = None,
) -> Done:  # fmt: skip
    """One call: output in ``dtype``, and a trace of so many columns; ``uses`` [M, N] are those before it.

    ``initial`` [1, N, Dv] is the one table that all memories begin from, where nothing that they write is asked for.
    The result then has the tables of before, or ones that nobody asks for.
    """
    inputs = (*memory, *stream) if initial is None else (memory.keys, initial, *stream)
    derived = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    overlaid = initial is not None and lays_over(cfg, plan, memory.keys.shape[0], initial, derived)
    memory = memory._replace(values=initial) if overlaid else memory
    dealt, whole, before = Columns.of(memory.values), memory, uses
    if dealt is not None:
        cfg, memory, stream = dealt.narrowed(cfg, memory, stream)
    keys, values = as_tables(memory)
    if not plan.num_writes and keys.stride(0) == 0 == values.stride(0) * (not overlaid):
        keys, values = keys[:1], values if overlaid else values[:1]  # rows that share a table read it where it is
    stream, pair, settings = stream.map(plain), plain(pair), Settings(cfg, plan, owned, dtype, dealt, overlaid)
    uses = own_uses(uses, torch.float32, owned) if plan.num_writes else None
    if derived:
        flat_inputs = (keys, values, pair, *flatten(stream), uses)
        results = unflatten(Results, _Call.apply(settings, *flat_inputs))
    else:
        results = results_of(*forward(settings, keys, values, stream, pair, False, uses))
    if dealt is not None:
        results = _of_all_columns(dealt, results)
    return done_with(results, whole, columns, before if uses is None else uses)


def _of_all_columns(dealt: Columns, results: "Results") -> "Results":
    """What all ranks gave; outputs are NaN where a loss overflowed.

    Ranks do not ask each other between launches whether a row is finite in all columns (§4). It is, unless an error
    was so large that its square is not.
    """
    output, memorization = dealt.leave(results.output, results.memorization)
    output = output.masked_fill(~memorization.isfinite().all(), torch.nan)
    values = None if results.values is None else dealt.after(results.values)
    return results._replace(output=output, memorization=memorization, values=values)


def as_tables(memory: Memory) -> Memory:
    """As kernels compute with them: float32, and without a sign that torch has yet to apply."""
    return Memory(*(table.to(torch.float32).resolve_neg() for table in memory))


def done_with(results: "Results", memory: Memory, columns: int, uses: Tensor | None) -> Done:
    """What a call gives that read ``memory``: the same tables where nothing was written; a trace of so many columns.

    ``uses`` are those after the call.
    """
    writes = len(results.memorization)
    if results.keys is not None:
        memory = Memory(results.keys, results.values)
    losses = {"memorization": results.memorization.T, "addressing": results.addressing.T}
    if not writes:  # rows that share a table were read as one memory
        losses = {name: x.new_zeros(memory.keys.shape[0], columns) for name, x in losses.items()}
    elif writes < columns:
        losses = {name: torch.nn.functional.pad(x, (0, columns - writes)) for name, x in losses.items()}
    trace = Trace(results.slots, results.weights.detach(), **losses, writes=None)
    return Done(results.output, memory, results.flags, trace, results.weights, uses)


def forward(
    settings: Settings, keys: Tensor, values: Tensor, stream: Tokens, pair: Tensor | None, save: bool,
    uses: Tensor | None, most: Any = None,
) -> tuple[Any, Tensor]:  # fmt: skip
    """The result, and the table that was written: that of the caller if it is ``owned``, else a copy.

    ``uses`` [M, N] float32, contiguous, are overwritten.
    """
    from fwpkm.kernels.runtime import call

    cfg, plan, owned, dtype, _, overlaid = settings
    if overlaid or not plan.num_writes:
        values = values.contiguous()
    elif not (owned and values.is_contiguous()):
        values = values.clone(memory_format=torch.contiguous_format)
    else:
        # Autograd must see what the kernels overwrite, or a backward that kept the table would take the new one.
        torch.autograd.graph.increment_version(values)
    with on_device_of(values):
        result = call.forward(cfg, plan, keys.contiguous(), values, stream, pair, save, dtype, uses, most, overlaid)
    return result, values


def _by_window(plan: Any, batch: int, d: Tensor) -> Tensor:
    """Gradients of the tokens that a call outputs, ``[B, T, ...]``, as ``[w, ...]`` of its windows."""
    by_window = d.new_zeros(plan.total, *d.shape[2:])
    for w in plan.windows:
        window = by_window[w.first : w.first + batch * w.length].view(batch, w.length, *d.shape[2:])
        new = slice(w.first_new - plan.num_pending, w.start + w.length - plan.num_pending)
        window[:, w.first_new - w.start :] = d[:, new]
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
    uses: Tensor | None
    """Overwritten; a count, without gradient."""


@flat
class Results(NamedTuple):
    """What a call returns, here and as an operator; of the tables only those that were written."""

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
    initial: Tensor | None
    """The table of an overlaid call."""


def results_of(result: Any, written: Tensor) -> Results:
    """As autograd sees a call: a result of the kernels, and the table that they wrote."""
    keys, values = (result.keys, written) if len(result.memorization) and result.keys is not None else (None, None)
    return Results(
        result.output, keys, values, result.slots, result.weights, result.memorization, result.addressing,
        result.residuals["flags"],
    )  # fmt: skip


class _Call(torch.autograd.Function):
    """``forward`` and ``backward`` of kernels/runtime/call.py."""

    @staticmethod
    def forward(ctx, *inputs):
        settings, keys, values, pair, tokens, uses = unflatten(_Inputs, inputs)
        save = any(ctx.needs_input_grad)
        result, written = forward(settings, keys, values, tokens, pair, save, uses)
        results = results_of(result, written)
        if results.values is values:
            ctx.mark_dirty(values)
        if save:
            saved = _Saved(tokens, result.residuals.buffer, written if settings.overlaid else None)
            ctx.save_for_backward(*flatten(saved))
            ctx.settings, ctx.shape, ctx.layout = settings, written.shape, result.residuals.layout
            ctx.memories = keys.shape[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(results.slots, results.memorization, results.addressing, results.flags)
        return tuple(results)

    @staticmethod
    @first_only
    def backward(ctx, *d_results):
        from fwpkm.kernels.runtime import call
        from fwpkm.kernels.runtime.workspace import Workspace

        d = unflatten(Results, d_results)
        if d.output is None and d.keys is None and d.values is None and d.weights is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, plan = unflatten(_Saved, ctx.saved_tensors), ctx.settings.plan
        tokens, residuals = saved.tokens, Workspace(ctx.layout, saved.residuals)
        d_weights = None if d.weights is None else _by_window(plan, tokens.query.shape[0], d.weights)
        d_output, d_keys, d_values = (
            None if x is None or x.numel() == 0 else plain(x) for x in (d.output, d.keys, d.values)
        )
        table = ctx.shape if unflatten(_Inputs, ctx.needs_input_grad).values else None
        dealt = ctx.settings.dealt
        with on_device_of(tokens.query):
            gradients = call.backward(
                ctx.settings.cfg, plan, tokens, residuals, ctx.memories, d_output, d_keys, d_values, table, d_weights,
                None if dealt is None else dealt.summed, saved.initial,
            )  # fmt: skip
        of_tokens = gradients.tokens._replace(query=gradients.tokens.query.to(tokens.query.dtype))
        return tuple(flatten(_Inputs(None, gradients.keys, gradients.values, None, of_tokens, None)))
