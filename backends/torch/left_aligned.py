"""Rows at positions of their own, masked or packed, as one rectangle that the kernels read (SPEC.md §5).

Every stream, a row's pending tokens and then its new unmasked ones, begins at a chunk's start. So streams that are
moved to the left, and padded to the longest, are rows at position 0 for the kernels: they read all alike, and a chunk
that a row has not completed is written by none of its tokens, as none of them may be bound. Nothing here waits for the
device, but for a position that the host keeps; and all of it can be traced, so torch.compile keeps a call in its graph.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fwpkm import schedule
from fwpkm.backends.torch import fast, moving, operators
from fwpkm.backends.torch.streams import is_legal
from fwpkm.backends.torch.tokens import filled
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State, Trace
from fwpkm.tokens import NUMBERS, SCALARS, Array, Tokens


def apply(
    cfg: FwPKMConfig, state: State, inputs: Tokens, cu_seqlens: Tensor | None, update: bool, owned: bool, fresh: bool,
    initial: Tensor | None = None,
) -> tuple[Tensor, State | None, Trace]:  # fmt: skip
    """``ops.apply`` of such rows on the kernels: the output, the next state and the trace.

    Args:
        cfg: the configuration.
        state: where the rows stand; where nothing is updated the tables alone matter.
        inputs: as the caller passed them.
        cu_seqlens: ``[B+1]``, on the CPU unless the call is compiled, or None.
        update: False only reads.
        owned: the value table may be overwritten, unless the call is compiled.
        fresh: nothing is pending.
        initial: the one table of a call that keeps no state, as of ``fast.run``; the next state is then None.
    """
    device, batch, compiled = inputs.query.device, state.position.shape[0], torch.compiler.is_compiling()
    num_pending = None if fresh or not update else _num_pending(cfg, state.position)
    num_new = _num_new(cfg, inputs, cu_seqlens, batch)
    longest = _longest(cfg, num_pending, num_new, inputs.length, cu_seqlens)
    pending = None if num_pending is None else state.pending
    here = inputs._replace(mask=None if inputs.mask is None else inputs.mask.to(device))
    ends, wrong = None if cu_seqlens is None else _sent(cu_seqlens, device), None
    if compiled and ends is not None:  # nobody can raise: the call is then one of empty sequences, and outputs say it
        legal = is_legal(ends, inputs.length)
        ends, wrong = ends.where(legal, 0), ~legal if here.mask is None else (~legal & here.mask)[..., None]
    rows = left_align(cfg, pending, num_pending, here, ends, batch, longest)
    passed = num_new if num_new is not None else _later(rows.num_new, state.position.device)
    pair, columns = rows.places.pair if update else None, schedule.max_writes(cfg, inputs.length)
    uses = state.maybe_uses
    if compiled:
        dtype = inputs.query.dtype
        done = operators.run(cfg, state.memory, uses, rows.tokens, pair, update, columns, dtype, initial)
    else:
        from fwpkm.kernels.runtime import windows

        plan = windows.plan(cfg, 0, longest, batch, update)
        done = fast.run(cfg, plan, state.memory, rows.tokens, pair, owned, columns, inputs.query.dtype, uses, initial)
    writes = (rows.places.due if update else rows.places.due * 0).view(state.memory.keys.shape[0], -1)[:, 0]
    output, slots, weights = rows.of_call(done.output, done.trace.slots, done.trace.weights)
    if wrong is not None:
        output, weights = (x.masked_fill(wrong, torch.nan) for x in (output, weights))
    losses = {"memorization": done.trace.memorization, "addressing": done.trace.addressing}
    weights = weights.detach()
    trace = Trace(slots, weights, **losses, writes=writes)  # torch 2.11 compiles no ``_replace`` of what is returned
    if initial is not None:
        return output, None, trace
    if update:
        left = rows.left(cfg, done.flags)
        moved = passed() if callable(passed) else passed
        left = filled(done.memory.keys.dtype, left)
        position = schedule.reduced(cfg, state.position) + moved.to(state.position)
        state = State.of(done.memory, left, position, done.uses)
    return output, state, trace


class LeftAligned(NamedTuple):
    """The streams of a call ``[B, Q]``, padded with zeros."""

    tokens: Tokens
    places: Any
    """``Places`` of kernels/places.py."""
    num_new: Tensor
    """``[B]``: the tokens of the call in each."""
    shape: torch.Size
    """Of the call: [B, T], or packed [1, T]."""

    def of_call(self, *results: Tensor) -> tuple[Tensor, ...]:
        """What the streams' tokens gave ``[B, Q, ...]`` for those of the call, 0 for the masked ones."""
        return _Rows.apply(self.places.entries, self.places.cells, None, False, self.shape, len(results), *results)

    def left(self, cfg: FwPKMConfig, flags: Tensor) -> Tokens:
        """What is pending afterwards ``[B, P, ...]``; ``flags`` are the kernels' of the streams' tokens."""
        index, inverse, mask = moving.left_over(cfg, self.places, flags)
        names, numbers = _numbers(self.tokens)
        found = _Rows.apply(index, inverse, None, True, mask.shape, len(numbers), *numbers)
        pending = filled(torch.float32, Tokens(**dict(zip(names, found)), mask=mask))
        return pending._replace(**{name: getattr(pending, name) * mask for name in SCALARS if name not in names})


def left_align(
    cfg: FwPKMConfig,
    pending: Tokens | None,
    num_pending: Tensor | None,
    inputs: Tokens,
    cu_seqlens: Array,
    batch: int,
    longest: int,
    **ragged: Tensor | None,
) -> LeftAligned:
    """Move the streams of a call to the left.

    Args:
        cfg: the configuration.
        pending: ``[B, P, ...]``, or None where nothing is pending.
        num_pending: ``[B]``, or None.
        inputs: those of the call.
        cu_seqlens: ``[B+1]`` where the tokens lie, or None.
        batch: B.
        longest: Q, at least the length of every stream.
        ragged: ``order`` and ``begins`` of kernels/left_align.py, where streams lie end to end, ``[1, Q]``.
    """
    num_pending = None if num_pending is None else num_pending.to(inputs.query.device)
    told = {"token_mask": inputs.mask, "cu_seqlens": cu_seqlens, "num_pending": num_pending}
    told["pending_mask"] = None if pending is None else pending.mask
    places = moving.left_align(cfg, inputs.query, batch, longest, **told, **ragged)
    num_new, before = places.lengths, []
    if pending is not None and num_pending is not None:
        num_new = num_new - num_pending
        whole = filled(torch.float32, inputs)
        inputs = inputs._replace(**{name: getattr(whole, name) for name in SCALARS})  # as what is pending has them
        before = _numbers(pending)[1]
    names, numbers = _numbers(inputs)
    ways = places.cells, places.entries, places.pending_entries
    shape = places.mask.shape
    found = _Rows.apply(*ways, pending is not None, shape, len(numbers), *numbers, *before)
    return LeftAligned(Tokens(**dict(zip(names, found)), mask=places.mask), places, num_new, inputs.query.shape[:2])


def _num_pending(cfg: FwPKMConfig, position: Tensor) -> Tensor | None:
    """``[B]``: the pending tokens of each row; None is none, as far as the host can tell without waiting."""
    count = schedule.pending(cfg, position)
    on_host = count.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if on_host and not count.any() else count


def _num_new(cfg: FwPKMConfig, inputs: Tokens, cu_seqlens: Array, batch: int) -> Tensor | None:
    """``[B]``: the tokens of the call that take a position in each row, where the host can tell; None where not."""
    mask = None if cfg.memory_scope == "batch" else inputs.mask
    if torch.compiler.is_compiling() or (mask is not None and mask.device.type != "cpu"):
        return None
    if cu_seqlens is None:
        return torch.full((batch,), inputs.length) if mask is None else mask.sum(1)
    return cu_seqlens.diff() if mask is None else F.pad(mask.flatten().cumsum(0), (1, 0))[cu_seqlens.long()].diff()


def _longest(cfg: FwPKMConfig, num_pending: Array, num_new: Array, length: int, cu_seqlens: Array) -> int:
    """Q: the length of the longest stream, or as long as it can be where the host does not know; then ``rounded``."""
    most_pending = cfg.chunk_size + schedule.lag(cfg) - 1
    if torch.compiler.is_compiling():
        return length + (0 if num_pending is None else most_pending)
    on_host = num_pending is None or num_pending.device.type == "cpu"
    if on_host and num_new is not None:
        return rounded(int((num_new if num_pending is None else num_pending + num_new).max()))
    if num_new is not None:
        length = int(num_new.max())
    elif cu_seqlens is not None:
        length = int(cu_seqlens.diff().max())
    return rounded(length + (0 if num_pending is None else int(num_pending.max()) if on_host else most_pending))


def rounded(length: int) -> int:
    """Up to six significant bits, and at least 1: masks and positions give ever new lengths, and each length that the
    kernels meet has its launches listed anew, which takes longer than so many more tokens (at most one in 32).
    """
    step = 1 << max(0, length.bit_length() - 6)
    return max(1, -(-length // step) * step)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """x on a device; the host waits for the copy only where it would read x later, as it does from pinned memory."""
    return x.to(device, non_blocking=not (torch.compiler.is_compiling() or (x.is_cpu and x.is_pinned())))


def _later(x: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """x on a device: the copy begins now, and the host waits for it when it asks, but for nothing launched since."""
    if torch.compiler.is_compiling() or not x.is_cuda or device.type != "cpu":
        return lambda: x.to(device)
    copy, done = x.to(device, non_blocking=True), torch.cuda.Event()
    done.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait


class _Rows(torch.autograd.Function):
    """``rows`` of kernels/left_align.py, of ``number`` tensors, and of as many that were pending or none.

    Gradients take the inverse ways.
    """

    @staticmethod
    def forward(
        ctx: Any, index: Tensor, inverse: Tensor, of_pending: Array, wide: bool, shape: tuple, number: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(inverse, of_pending)
        ctx.number, ctx.dtypes, ctx.shapes = number, [x.dtype for x in tensors], [x.shape[:2] for x in tensors]
        ctx.set_materialize_grads(False)
        found = moving.rows(index, tensors[:number], tensors[number:], wide, *shape)
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        back: list[Tensor | None] = []
        for way, first in zip(ctx.saved_tensors, range(0, len(ctx.dtypes), ctx.number)):
            asked = ctx.needs_input_grad[6 + first :]
            chosen = {first + i: d for i, d in enumerate(gradients) if d is not None and asked[i]}
            found = moving.rows(way, [*chosen.values()], [], False, *ctx.shapes[first]) if chosen else []
            of = {i: d.to(ctx.dtypes[i]) for i, d in zip(chosen, found)}
            back += [of.get(first + i) for i in range(ctx.number)]
        return *[None] * 6, *back


def _numbers(tokens: Tokens) -> tuple[list[str], list[Tensor]]:
    """The numbers of tokens that are present, by name."""
    present = {name: x for name, x in tokens.present().items() if name in NUMBERS}
    return [*present], [*present.values()]
