"""The functions of ops.py on the Triton kernels: the same calls, the same results (SPEC.md §8).

Nothing here waits for the GPU: the schedule follows from ``position``, which lives on the CPU.
"""

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fwpkm import schedule
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


def stream_of(pending: Tokens, arrived: int, given: Tokens) -> Tokens:
    """The tokens that are pending, then those of the call; as they are given where nothing is pending."""
    if not arrived:
        return given
    before, after = (filled(torch.float32, x) for x in (pending.slice(0, arrived), given))
    return join(before, after)


def left_of(stream: Tokens, left: int, flags: Tensor) -> Tokens:
    """What no write has consumed: from token ``left`` on, the dead ones ``flags`` [B·n] blanked."""
    shape = stream.query.shape[:2]
    waiting = filled(torch.float32, stream.slice(left, None))
    if not waiting.length:
        return waiting
    return without(waiting, (flags[: shape.numel()].view(shape)[:, left:] & DEAD) != 0)


def apply(
    cfg: FwPKMConfig, state: State, position: int, given: Tokens, update: bool, owned: bool
) -> tuple[Tensor, Memory, Tokens, Trace]:
    """Read T tokens and write every chunk that they complete.

    Args:
        cfg: the configuration.
        state: where the sequence stands.
        position: of the state.
        given: query, value, gate and mask as the caller gave them; the last two may be None.
        update: False only reads.
        owned: the value table may be overwritten.

    Returns:
        output, tables, what is pending then, and the trace.
    """
    from fwpkm.kernels import call, windows

    batch, length = given.query.shape[:2]
    plan = windows.plan(cfg, position, length, batch, update)
    pending = state.pending
    stream = stream_of(pending, plan.arrived, given)
    columns, dtype = schedule.max_writes(cfg, length), given.query.dtype
    output, memory, flags, trace = _run(cfg, plan, state.memory, call.Tokens(*stream), owned, columns, dtype)
    if plan.arrived or plan.left < plan.room:  # else nothing was pending and nothing is: zeros before and after
        pending = pad(left_of(stream, plan.left, flags), cfg.capacity)
    return output, memory, pending, trace


def flush(cfg: FwPKMConfig, memory: Memory, waiting: Tokens, owned: bool) -> tuple[Memory, Trace]:
    """Write the tokens that wait."""
    from fwpkm.kernels import call, windows

    batch, length = waiting.mask.shape
    plan = windows.write(length, batch)
    _, memory, _, trace = _run(cfg, plan, memory, call.Tokens(*waiting), owned, 1, waiting.query.dtype)
    return memory, trace


def lookup(cfg: FwPKMConfig, memory: Memory, query: Tensor) -> Lookup:
    """Read the tables."""
    from fwpkm.kernels import call, windows

    nothing = query.new_zeros(*query.shape[:2], cfg.value_dim)
    plan = windows.plan(cfg, 0, query.shape[1], query.shape[0], update=False)
    weights: list[Tensor] = []
    tokens = call.Tokens(query, nothing, None, None)
    output, _, _, trace = _run(cfg, plan, memory, tokens, False, 0, query.dtype, weights)
    return Lookup(output, trace.slots, weights[0])


def chunk_update(
    cfg: FwPKMConfig,
    memory: Memory,
    query: Tensor,
    target: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    pair: Tensor | None,
) -> tuple[Memory, Losses]:
    """Write one chunk whose targets are already shifted."""
    from fwpkm.kernels import call, windows

    cfg = dataclasses.replace(cfg, lookahead=0, chunk_size=_EVERY_TOKEN)
    batch, length = query.shape[:2]
    plan = windows.write(length, batch)
    pair = query.new_ones(batch, length, dtype=torch.bool) if pair is None else pair
    tokens = call.Tokens(query, target, gate, mask, pair)
    _, memory, _, trace = _run(cfg, plan, memory, tokens, False, 1, query.dtype)
    return memory, Losses(trace.memorization[:, 0], trace.addressing[:, 0])


def _run(
    cfg: FwPKMConfig, plan: Any, memory: Memory, stream: Any, owned: bool, columns: int, dtype: torch.dtype,
    weights: list | None = None,
) -> tuple[Tensor, Memory, Tensor, Trace]:  # fmt: skip
    """One call: output in ``dtype``, tables, at least the flags of the stream, and trace of so many columns.

    Its differentiable weights are appended to ``weights``.
    """
    keys, values = (table.to(torch.float32).resolve_neg() for table in memory)
    stream = type(stream)(*map(plain, stream))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (keys, values, *stream)):
        results = _Call.apply(cfg, plan, owned, dtype, keys, values, *stream)
        output, new_keys, new_values, slots, w, memorization, addressing, flags = results
    else:
        result, new_values = _forward(cfg, plan, owned, keys, values, stream, False, dtype)
        output, slots, w, new_keys, memorization, addressing, kept = result
        flags = kept["flags"]
    writes = len(memorization)
    if writes:
        memory = Memory(new_keys, new_values)
    if weights is not None:
        weights.append(w)
    memorization, addressing = memorization.T, addressing.T
    if writes < columns:
        memorization, addressing = (
            torch.nn.functional.pad(x, (0, columns - writes)) for x in (memorization, addressing)
        )
    return output, memory, flags, Trace(slots, w.detach(), memorization, addressing, torch.tensor(writes))


def _forward(
    cfg: FwPKMConfig, plan: Any, owned: bool, keys: Tensor, values: Tensor, stream: Any, save: bool, dtype: torch.dtype
) -> tuple[Any, Tensor]:
    """The result, and the table that was written: that of the caller if it is ``owned``, else a copy."""
    from fwpkm.kernels import call

    if True not in plan.kinds:
        values = values.contiguous()
    elif not (owned and values.is_contiguous()):
        values = values.clone(memory_format=torch.contiguous_format)
    with on_device_of(values):
        return call.forward(cfg, plan, keys.contiguous(), values, stream, save, dtype), values


def _of_news(plan: Any, batch: int, d: Tensor, total: int) -> Tensor:
    """Its adjoint: ``[w, ...]`` from ``[B, T, ...]``."""
    out = d.new_zeros(total, *d.shape[2:])
    for start, length, _, first, fresh in plan.windows:
        mine = out[first : first + batch * length].view(batch, length, *d.shape[2:])
        mine[:, fresh - start :] = d[:, fresh - plan.arrived : start + length - plan.arrived]
    return out


class _Call(torch.autograd.Function):
    """``kernels.call.forward`` and ``kernels.reverse.backward``."""

    @staticmethod
    def forward(ctx, cfg, plan, owned, dtype, keys, values, query, value, gate, mask, pair):
        from fwpkm.kernels import call

        tokens, save = call.Tokens(query, value, gate, mask, pair), any(ctx.needs_input_grad)
        result, written = _forward(cfg, plan, owned, keys, values, tokens, save, dtype)
        writes = len(result.memorization) > 0
        if writes and written is values:
            ctx.mark_dirty(values)
        kept = result.kept
        if save:
            ctx.save_for_backward(query, value, gate, mask, pair, kept.buffer)
            ctx.cfg, ctx.plan, ctx.shape, ctx.layout = cfg, plan, written.shape, kept.layout
        ctx.set_materialize_grads(False)
        flags = kept["flags"]
        ctx.mark_non_differentiable(result.slots, result.memorization, result.addressing, flags)
        keys = result.keys if writes else None
        new_values = written if writes else None
        records = result.slots, result.weights, result.memorization, result.addressing, flags
        return result.output, keys, new_values, *records

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, d_keys, d_values, _slots, d_weights, *_):
        from fwpkm.kernels import call, reverse
        from fwpkm.kernels.room import Room

        none = (None,) * 11
        if d_output is None and d_keys is None and d_values is None and d_weights is None:
            return none
        query, value, gate, mask, pair, buffer = ctx.saved_tensors
        kept = Room(ctx.layout, buffer)
        plan, batch = ctx.plan, query.shape[0]
        if d_weights is not None:
            d_weights = _of_news(plan, batch, d_weights, plan.total)
        d_output, d_keys, d_values = (
            None if d is None or d.numel() == 0 else plain(d) for d in (d_output, d_keys, d_values)
        )
        tokens = call.Tokens(query, value, gate, mask, pair)
        table = ctx.shape if ctx.needs_input_grad[5] else None
        with on_device_of(query):
            gradients = reverse.backward(ctx.cfg, plan, tokens, kept, d_output, d_keys, d_values, table, d_weights)
        return (
            None, None, None, None, gradients.keys, gradients.values, gradients.query.to(query.dtype), gradients.value,
            gradients.gate, None, None,
        )  # fmt: skip
